"""Recipes fill a `TrainConfig`, and what a user names changes them.

`voc()` and `coco()` hold the hyper-parameters of the published release, `tiny()` the embedded data set that a laptop
trains in minutes, `photographs()` what a small folder of photographs begins with.
"""

import dataclasses
import math
import re
from typing import Any

from toco_core.config.crops import CropConfig
from toco_core.config.data import DataConfig
from toco_core.config.experiment import TrainConfig, override
from toco_core.config.fields import LARGEST
from toco_core.config.labels import LabelConfig
from toco_core.config.losses import LossConfig
from toco_core.config.model import ModelConfig
from toco_core.config.schedule import ScheduleConfig
from toco_core.errors import ToCoError


def voc(dataset: str = "VOCdevkit/VOC2012") -> TrainConfig:
    """The release's hyper-parameters for PASCAL VOC 2012; `dataset` is the folder that holds JPEGImages."""
    return TrainConfig(data=DataConfig(dataset=dataset, train_split="train_aug", workers=10))


def coco(dataset: str = "MSCOCO") -> TrainConfig:
    """The release's hyper-parameters for MS COCO 2014, with its three stages: classification only, then
    segmentation taught by the auxiliary CAM, then everything. `dataset` holds annotations/ and train2014/, val2014/."""
    return TrainConfig(
        labels=LabelConfig(beta_h=0.65, beta=0.45),
        loss=LossConfig(
            temperature=1.0, seg_start=8001, energy_start=8001, ptc_start=12001, ctc_start=12001, final_cam_start=12001
        ),
        data=DataConfig(dataset=dataset, val_split="val_part", workers=10),
        schedule=ScheduleConfig(steps=80000, batch_size=8),
        eval_interval=4000,
    )


def tiny() -> TrainConfig:
    """The embedded data set and backbone: the whole method on a laptop, in minutes. Also the variant that notebooks and
    tests use.

    The classifiers are fitted to the frozen tokens first and the lower eight blocks stay as they are, so that nothing
    that the backbone knows is bent by random heads. The auxiliary classifier reads the first block that is trained, and
    there the mean of the tokens: a broader map than the maximum makes, cut at higher thresholds, for PTC to learn from.
    CTC is off: it gains little, for half as much time again (see `docs/results.md`).
    """
    return TrainConfig(
        model=ModelConfig(
            backbone="scenes_vit_nano",
            layer=9,
            aux_pooling="mean",
            proj_hidden=256,
            proj_bottleneck=64,
            proj_dim=128,
            decoder_width=64,
            decoder_dilation=1,
        ),
        labels=LabelConfig(beta_l=0.3, beta_h=0.5, beta=0.4, cam_scales=(1.0,), par_dilations=(1, 2, 4, 8)),
        loss=LossConfig(ptc=3.0, ctc=0.0, seg=0.05, energy=0.0, ctc_start=60, seg_start=60, energy_start=60),
        crops=CropConfig(n_local=4, local_size=48, positive_threshold=1.0),
        data=DataConfig(crop_size=128, scale_range=(0.85, 1.25), blur_sigma=(0.1, 0.4), cache=True, views_per_image=2),
        schedule=ScheduleConfig(
            steps=400,
            batch_size=8,
            lr=4e-4,
            head_lr_scale=14.0,
            classifier_lr_scale=3.0,
            warm_start_steps=100,
            frozen_blocks=8,
            warmup_steps=10,
        ),
        eval_interval=200,
    )


def photographs(dataset: str = "photographs") -> TrainConfig:
    """A folder of some hundred photographs and a small ImageNet backbone, its upper blocks tuned at 224 pixels in
    minutes.

    Each class is read where its own scores are highest (`cam_topk`), the classifiers are fitted to frozen tokens first,
    and every CAM is carried along the attention of blocks 9 to 12. Patch token contrast learns from labels that PAR has
    refined, and begins with the second half: from the first step it would harden what the first CAMs say, be it the sky
    for the aeroplane. With 900 photographs `steps=400` is better still, 270 it then learns by heart. Chosen on training
    images of PASCAL VOC and MSRC, the thresholds too: where a folder has no masks they stay as they are. CTC is off:
    see `docs/results.md`.
    """
    return TrainConfig(
        model=ModelConfig(
            backbone="vit_tiny_patch16_224", aux_norm=True, pooling="cam_topk", decoder_width=128, decoder_dilation=2
        ),
        labels=LabelConfig(
            beta_l=0.3,
            beta_h=0.4,
            beta=0.4,
            cam_scales=(1.0,),
            attention_steps=1,
            par_dilations=(1, 2, 4, 8),
            token_refiner="par",
        ),
        loss=LossConfig(
            ptc=8.0, ctc=0.0, seg=0.2, energy=0.0, ptc_start=100, ctc_start=20, seg_start=20, energy_start=20
        ),
        crops=CropConfig(local_size=64),
        data=DataConfig(
            dataset=dataset,
            crop_size=224,
            scale_range=(0.8, 1.6),
            scale_relative=True,
            views_per_image=2,
            blur_sigma=(0.1, 1.0),
        ),
        schedule=ScheduleConfig(
            steps=200,
            batch_size=8,
            lr=3e-4,
            head_lr_scale=4.0,
            classifier_lr_scale=3.0,
            warm_start_steps=300,
            frozen_blocks=8,
            warmup_steps=10,
        ),
        eval_interval=100,
    )


RECIPES = {"voc": voc, "coco": coco, "tiny": tiny, "photographs": photographs}


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """The same experiment in another number of steps: the first step of every term and the interval of validations keep
    their share of the schedule.

    The warm-up keeps its number of steps (at most half of them all): a rate that rises faster than in the recipe would
    spoil the pretrained tokens.
    """
    share = steps / config.schedule.steps
    names = [f.name for f in dataclasses.fields(LossConfig) if f.name.endswith("_start")]
    starts = {name: round(share * getattr(config.loss, name)) for name in names}
    if config.loss.affinity_walk_start:
        starts["affinity_walk_start"] = max(1, starts["affinity_walk_start"])  # 0 would be never
    return override(
        config,
        steps=steps,
        warmup_steps=min(config.schedule.warmup_steps, steps // 2),
        eval_interval=math.ceil(share * config.eval_interval),
        **starts,
    )


def configured(recipe: TrainConfig, /, **values: Any) -> TrainConfig:
    """Change fields of a recipe as a user names them.

    Like `override`; but where `steps` is among them, the first steps of the terms, the warm-up and the interval of
    validations that are not named keep their share of the schedule (`shortened`). Where a value does not fit one that
    the recipe has, the ToCoError begins with the one that was named here.
    """
    steps = values.get("steps")
    try:
        if isinstance(steps, int) and not isinstance(steps, bool) and 1 <= steps <= LARGEST:
            recipe = shortened(recipe, steps)
        return override(recipe, **values)
    except ToCoError as error:
        blamed = re.match(r"(\w+) = ", str(error))
        mine = [name for name in values if re.search(rf"\b{re.escape(name)} = ", str(error))]
        if blamed is None or blamed[1] in values or not mine:
            raise
        named = ", ".join(f"{name} = {values[name]!r}" for name in mine)
        raise ToCoError(f"{named} does not fit the recipe's {blamed[1]}: {error}; give {blamed[1]}, too") from error


def changed_batch(config: TrainConfig, recipe: TrainConfig) -> str:
    """A sentence where the images per step are not the recipe's, "" where they are; nothing is changed.

    How many processes or parts share a batch does not matter: `batch_size` is that of all together.
    """
    ours, theirs = config.schedule, recipe.schedule
    if ours.batch_size == theirs.batch_size:
        return ""
    share = ours.batch_size / theirs.batch_size
    return (
        f"batch_size = {ours.batch_size} is not the recipe's {theirs.batch_size}, for which its rates were chosen: by "
        f"the linear rule lr = {theirs.lr * share:.3g} (it is {ours.lr:g}), and steps = {theirs.steps / share:.0f} "
        f"(it is {ours.steps}) see as many images; or keep {theirs.batch_size} and let accumulate save memory"
    )
