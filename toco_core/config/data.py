"""Images: which, how large, how varied, and how they are read."""

from dataclasses import dataclass

from toco_core.config.fields import Config, option
from toco_core.errors import ToCoError


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config):
    """Images and how they are varied in training."""

    dataset: str = option(
        "scenes",
        """`scenes`, the embedded data set; or a folder in VOC or COCO layout, a folder per class, a CSV or JSON of
        file names and tags (see `data.source`).""",
    )
    train_split: str = option("train", "Split to train on.")
    val_split: str = option("val", "Split to validate on during training.")
    crop_size: int = option(
        448, "Height and width of a training crop and of an evaluated image, in pixels.", at_least=16, at_most=16384
    )
    scale_range: tuple[float, ...] = option(
        (0.5, 2.0), "Random rescaling of a training image before it is cropped.", length=2, above=0
    )
    scale_relative: bool = option(
        False,
        """Count `scale_range` from the size at which an image has the area of a crop, so that photographs of any size
        show as much of themselves in a crop. Off: from the image's own size, as published, which is meant for
        photographs a little larger than a crop.""",
        added_later=True,
    )
    views_per_image: int = option(
        0,
        """In how many ways an image is varied: pass p over the images shows each as pass p modulo this did. 0: anew in
        every pass, as published. With `frozen_blocks` the tokens of those blocks are then computed once for every
        variation, image by image, and kept (see `train.kept_tokens`).""",
        at_least=0,
        added_later=True,
    )
    blur_sigma: tuple[float, ...] = option(
        (0.1, 2.0),
        "Sigma in pixels of the Gaussian blur that views get, lowest and highest.",
        length=2,
        above=0,
        at_most=100,
    )
    cache: bool = option(False, "Decode every training image once and keep it in memory.")
    workers: int = option(
        0,
        "Processes that load images; 0 loads in the training process. The images are the same, bit for bit.",
        at_least=0,
        at_most=1024,
    )

    def check(self):
        if self.scale_range[0] > self.scale_range[1]:
            raise ToCoError(f"scale_range = {self.scale_range} must go from small to large")
        if not self.dataset:
            raise ToCoError("dataset = '' is empty: give 'scenes' or the folder of a data set")
