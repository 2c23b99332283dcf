"""From a loaded batch to the input of a step, as a config wants both."""

from collections.abc import Iterator

import torch
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.data import Batch, TrainVal, to_unit, training_batches
from toco_core.data.augment import IMAGE_COLOUR
from toco_core.model import ToCo
from toco_core.objective import StepInput


def view_options(config: TrainConfig, model: ToCo) -> dict:
    """Keywords of `data.training_views` that a config determines, and the model's mean colour."""
    mean_colour = tuple((255 * model.mean).round().int().flatten().tolist())
    return {
        "scale_range": config.data.scale_range,
        "scale_relative": config.data.scale_relative,
        "blur_sigma": config.data.blur_sigma,
        "image_colour": IMAGE_COLOUR if config.release.always_blurred else IMAGE_COLOUR._replace(blur=0.0),
        "pad_colour": (0, 0, 0) if config.release.black_padding else mean_colour,
        "independent_local_image": config.release.independent_local_image,
        "mirrored_valid_box": config.release.mirrored_valid_box,
    }


def config_batches(data: TrainVal, config: TrainConfig, model: ToCo, **options) -> Iterator[Batch]:
    """`data.training_batches` as a config trains on them, from the first step on; `options` are its other keywords."""
    own = {"crop_size": config.data.crop_size, "batch_size": config.schedule.batch_size, "seed": config.seed}
    return training_batches(data.train, **own, **view_options(config, model), **options)


def to_device(batch: Batch, model: ToCo, device: torch.device) -> StepInput:
    """A loaded batch, its images normalised as the backbone expects, its image labels where they are."""

    def ready(images: Tensor) -> Tensor:
        return model.normalise(to_unit(images.to(device, non_blocking=True)))

    return StepInput(
        ready(batch.images),
        ready(batch.global_view),
        ready(batch.local_image),
        batch.image_labels,
        batch.valid_box.to(device, non_blocking=True),
    )
