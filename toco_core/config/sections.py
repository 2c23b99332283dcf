"""Every number of an experiment, in frozen records that refuse a wrong value where it is declared.

A `TrainConfig` is made of one record per concept. Recipes fill it: `voc()` and `coco()` hold the hyper-parameters
of the published release, `tiny()` the embedded data set that a laptop trains in minutes, `photographs()` what a small
folder of photographs begins with. `override` changes some fields by name:

    config = override(tiny(), layer=10, steps=200)

Steps are counted from 0, as in the loop `for step in range(steps)`. A field called `..._start` is the first step on
which something counts.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import numbers
import os
import re
import sys
import typing
from dataclasses import dataclass, field
from typing import Any

from toco_core.errors import ToCoError

PRECISIONS = ("auto", "fp32", "medium", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


LARGEST = 10**9


def option(
    default: Any,
    help: str,
    *,
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    one_of=None,
    length=None,
    added_later: bool = False,
):
    """A field with its help text and the values that it allows (bounds also hold for each item of a tuple).

    A whole number has an upper bound, `LARGEST` unless `at_most` says otherwise: a config may come from a stranger.

    `added_later`: configs without this field name runs already. At its default it is left out of `short_hash`, so that
    a newer version of the package finds the runs of an older one.
    """
    if type(default) is int and at_most is None:
        at_most = LARGEST
    allowed = {
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "one_of": one_of,
        "length": length,
    }
    allowed = {name: limit for name, limit in allowed.items() if limit is not None}
    facts = {"help": " ".join(help.split()), "allowed": allowed, "added_later": added_later}
    return field(default=default, metadata=facts)


class Config:
    """What all records share: conversion, refusal of wrong values, dictionaries."""

    __no_type_check__ = (
        True  # jaxtyping's import hook leaves __init__ alone: wrong values get a ToCoError, lists become tuples
    )

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = _converted(f, getattr(self, f.name))
            _check_bounds(f, value)
            object.__setattr__(self, f.name, value)
        self.check()

    def check(self):
        """Conditions between fields."""

    def to_dict(self) -> dict:
        """Plain dictionaries, lists, numbers and strings: what JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def without_later_defaults(self) -> dict:
        """`to_dict` without the fields that were added later and are at their defaults."""
        plain = self.to_dict()
        for f in dataclasses.fields(self):
            if f.metadata["added_later"] and getattr(self, f.name) == f.default:
                del plain[f.name]
        return plain

    @classmethod
    def from_dict(cls, values: dict):
        """The inverse of `to_dict`. A missing field takes its default; an unknown one is refused, with the nearest
        name."""
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ToCoError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")
        nested = {
            n: known[n].type.from_dict(v)
            for n, v in values.items()
            if _is_config(known[n].type) and isinstance(v, dict)
        }
        return cls(**values | nested)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field name -> what it means."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The network: an encoder of plain ViT blocks and the heads of the paper's figure 3."""

    backbone: str = option(
        "deit_base_patch16_224", "Name of a plain vision transformer of timm, or `scenes_vit_nano`, which is shipped."
    )
    weights: str | None = option(
        None,
        """File with the encoder's weights (.safetensors or .pth, timm's key names). None or '': those that are
        shipped with `scenes_vit_nano` or that timm downloads.""",
    )
    pretrained: bool = option(
        True, "Begin with pretrained weights. False begins with random ones and ignores `weights`."
    )
    layer: int = option(
        10,
        "Block that feeds the auxiliary classifier, counted from 1 as in the paper (10 of 12).",
        at_least=1,
        at_most=1000,
    )
    aux_norm: bool = option(
        False,
        """Bring the tokens of block `layer` to mean 0 and variance 1 each before the auxiliary classifier. Off: as
        published. On: for backbones in which single tokens of the middle blocks are many times longer than the others
        (small ViTs pretrained on ImageNet have them in the corners): the maximum over tokens would pick these.""",
        added_later=True,
    )
    pooling: str = option(
        "max",
        """How a classifier reads an image's patch tokens. Channel by channel, as one vector: their maximum (`max`, as
        published), their mean (`mean`) or the mean of the largest fifth (`topk`). Or class by class: its scores at the
        tokens, which are its CAM, and of these the mean of the largest fifth (`cam_topk`).""",
        one_of=("max", "mean", "topk", "cam_topk"),
        added_later=True,
    )
    proj_hidden: int = option(2048, "Width of the two hidden layers of the projection head.", at_least=1, at_most=65536)
    proj_bottleneck: int = option(
        256, "Width of the projection head before its last, weight-normalised layer.", at_least=1, at_most=65536
    )
    proj_dim: int = option(1024, "P, the width in which crops are compared by CTC.", at_least=1, at_most=65536)
    decoder_width: int = option(512, "Channels of the LargeFOV decoder.", at_least=1, at_most=65536)
    decoder_dilation: int = option(
        5,
        """Dilation of the LargeFOV decoder. 5: as published, for 28 x 28 tokens. On a grid of 16 x 16 its outer taps
        lie beyond the border for many tokens.""",
        at_least=1,
        at_most=1000,
        added_later=True,
    )
    pos_embed_antialias: bool = option(
        False,
        """Antialias when position embeddings are resized, as timm does. Off: the release does not, and its
        checkpoints expect that.""",
    )
    freeze_pos_embed: bool = option(
        True, "Do not train the position embeddings, as in the release: they are resized for every view size."
    )
    mean: tuple[float, ...] | None = option(
        None,
        """Mean of the images that the encoder expects, per RGB channel in [0, 1]. None: what the backbone was
        pretrained with. (The release always takes ImageNet's, also for backbones pretrained with 0.5.)""",
        length=3,
        at_least=0,
        at_most=1,
    )
    std: tuple[float, ...] | None = option(
        None, "Standard deviation that belongs to `mean`. None: the backbone's.", length=3, above=0, at_most=1
    )

    @property
    def weights_file(self) -> str | None:
        """The file that the encoder begins with; None where it begins with others or at random."""
        return self.weights if self.pretrained else None

    def check(self):
        if not self.backbone:
            raise ToCoError("backbone = '' is empty: name a plain vision transformer of timm, or 'scenes_vit_nano'")


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Config):
    """From CAM to labels ("Patch Token Contrast" in the paper) and their refinement."""

    beta_l: float = option(
        0.25, "A pixel whose largest CAM value is at most this is background.", at_least=0, at_most=1
    )
    beta_h: float = option(
        0.7,
        "A pixel whose largest CAM value is at least this is foreground; between the two it is uncertain.",
        at_least=0,
        at_most=1,
    )
    beta: float = option(0.5, "The one threshold with which a CAM is scored.", at_least=0, at_most=1)
    cam_scales: tuple[float, ...] = option(
        (1.0, 0.5, 1.5), "Image scales over which CAM is summed, each also mirrored.", above=0, at_most=16
    )
    par_iterations: int = option(
        10, "Iterations of pixel-adaptive refinement; 0 leaves the CAM as it is.", at_least=0, at_most=1000
    )
    attention_steps: int = option(
        0,
        """How often CAMs are carried along the encoder's own attention before anything is made of them (see
        `refiners.attention`). 0: never, as published.""",
        at_least=0,
        at_most=16,
        added_later=True,
    )
    attention_blocks: tuple[int, ...] = option(
        (9, 10, 11, 12),
        "Blocks, from 1, whose attention is averaged for that.",
        at_least=1,
        at_most=1000,
        added_later=True,
    )
    attention_kind: str = option(
        "attention",
        """`attention`: tokens go together where they attend to each other. `pattern`: where they attend to the same
        tokens, for backbones whose tokens attend to what they are not.""",
        one_of=("attention", "pattern"),
        added_later=True,
    )
    par_dilations: tuple[int, ...] = option(
        (1, 2, 4, 8, 12, 24), "Distances of the eight neighbours that PAR compares with.", at_least=1, at_most=10000
    )
    par_scale: float = option(0.5, "PAR refines at this fraction of the image's size.", above=0, at_most=1)
    refiner: str = option(
        "par",
        """What refines pseudo labels along the image's edges: `par`, as published; `crf`, the dense CRF; `none`; or
        another row of `refiners.REFINERS`.""",
        added_later=True,
    )

    def check(self):
        if self.beta_l >= self.beta_h:
            raise ToCoError(f"beta_l = {self.beta_l} must be below beta_h = {self.beta_h}")

    def attended(self) -> tuple[int, ...]:
        """The blocks whose attention a pass must keep for its CAMs."""
        return self.attention_blocks if self.attention_steps else ()

    def cam_options(self) -> dict:
        """The keywords of `cam.multi_scale_cam`: its scales, and how CAMs are carried along attention."""
        carried = {name: getattr(self, name) for name in ("attention_steps", "attention_blocks", "attention_kind")}
        return {"scales": self.cam_scales, **(carried if self.attention_steps else {})}

    def thresholds(self) -> dict:
        """The keywords `beta_l` and `beta_h`."""
        return {"beta_l": self.beta_l, "beta_h": self.beta_h}

    def refiner_options(self, refiner: str | None = None) -> dict:
        """The keywords of `labels.refined_labels`: the refiner's name and the fields that begin with it, by the rest of
        their names (`par_iterations` as `iterations`). None: the configured one."""
        refiner = refiner or self.refiner
        start = f"{refiner}_"
        fields = [f.name for f in dataclasses.fields(self) if f.name.startswith(start)]
        return {"refiner": refiner, **{name.removeprefix(start): getattr(self, name) for name in fields}}

    def pseudo_label_options(self, refiner: str | None = None) -> dict:
        """The keywords of `labels.pseudo_label`: both thresholds and those of the refiner."""
        return {**self.thresholds(), **self.refiner_options(refiner)}


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Weights of the terms of the total loss ("Training Objective") and the step from which each counts."""

    cls: float = option(1.0, "Weight of the multi-label classification loss.", at_least=0)
    aux_cls: float = option(1.0, "Weight of the same loss on the auxiliary classifier.", at_least=0)
    ptc: float = option(0.2, "Weight of patch token contrast.", at_least=0)
    ctc: float = option(0.5, "Weight of class token contrast.", at_least=0)
    seg: float = option(0.1, "Weight of the segmentation loss.", at_least=0)
    energy: float = option(0.05, "Weight of the dense energy loss.", at_least=0)
    temperature: float = option(0.5, "Tau of class token contrast.", above=0)
    ctc_cosine: bool = option(
        False,
        """Bring both projections to length 1 before they are compared, so that the logits of class token contrast are
        cosines over tau. Off: of any length, as in the release; then the loss can also shrink or grow them all.""",
        added_later=True,
    )
    ctc_batch_negatives: bool = option(
        False,
        """Count all views of those images of the batch that share no class with an image among its negatives. Off: its
        own views alone, as published. The batch must be in one piece: no `accumulate`, one process.""",
        added_later=True,
    )
    ptc_start: int = option(0, "First step with patch token contrast.", at_least=0)
    ctc_start: int = option(0, "First step with class token contrast.", at_least=0)
    seg_start: int = option(
        2001, "First step with the segmentation loss. The release warms up on VOC for the steps 0..2000.", at_least=0
    )
    energy_start: int = option(2001, "First step with the dense energy loss.", at_least=0)
    final_cam_start: int = option(
        0,
        """First step whose segmentation labels come from the final CAM; until then they come from the auxiliary CAM,
        which is usable earlier (COCO).""",
        at_least=0,
    )

    def at(self, step: int) -> dict[str, float]:
        """Term -> weight on this step; 0 before the term's start, so that the loop can skip it."""
        names = [f.name for f in dataclasses.fields(self)]
        terms = [name for name in names if name in ("cls", "aux_cls") or f"{name}_start" in names]
        return {term: getattr(self, term) if step >= getattr(self, f"{term}_start", 0) else 0.0 for term in terms}


@dataclass(frozen=True, kw_only=True)
class CropConfig(Config):
    """Local views for class token contrast ("Class Token Contrast" in the paper)."""

    n_local: int = option(8, "Local views per image, besides the two global ones.", at_least=0, at_most=1000)
    local_size: int = option(96, "Height and width of a local view in pixels.", at_least=8, at_most=16384)
    local_resized: bool = option(
        False,
        """Resize local views to the image's size before they are encoded, so that their size does not tell them from
        global views. Off: they are encoded as they are cut, as published.""",
        added_later=True,
    )
    positive_threshold: float = option(
        0.2, "A crop is positive when the mean of its region values is above this.", at_least=0, at_most=2
    )


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
        (0.1, 2.0), "Sigma in pixels of the Gaussian blur that views get, lowest and highest.", length=2, above=0
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


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Config):
    """Optimiser and learning rate (see `lr_at`)."""

    steps: int = option(20000, "Training steps.", at_least=1)
    batch_size: int = option(4, "Images per step, over all devices.", at_least=1)
    accumulate: int = option(
        1,
        """Equal parts into which each process cuts its images of a step, computed one after the other where memory is
        short. Losses and gradients stay those of `batch_size` images in one piece.""",
        at_least=1,
        added_later=True,
    )
    compile_blocks: bool = option(
        False,
        """Train with the encoder's blocks compiled by torch.compile, once for each size of view: minutes before the
        first step, for steps that a GPU waits less in. Values differ in their last bits.""",
        added_later=True,
    )
    lr: float = option(6e-5, "Base learning rate of the encoder.", above=0)
    head_lr_scale: float = option(10.0, "The rate of the heads is this many times the encoder's.", above=0)
    classifier_lr_scale: float | None = option(
        None,
        """The same for the two classifiers. None: `head_lr_scale`, as published. A larger one lets them settle on the
        pretrained tokens before the encoder bends these to whatever tells a small data set's classes apart.""",
        above=0,
        added_later=True,
    )
    warm_start_steps: int = option(
        0,
        """Steps of 64 images in which the two classifiers alone are fitted to the frozen tokens of all training images
        before training begins: random heads would bend pretrained tokens (Kumar et al., ICLR 2022). Costs one pass over
        the images. 0: none, as published.""",
        at_least=0,
        added_later=True,
    )
    frozen_blocks: int = option(
        0,
        "The patch embedding and so many first blocks stay as they are. 0: everything is trained, as published.",
        at_least=0,
        added_later=True,
    )
    weight_decay: float = option(0.01, "Decoupled weight decay of AdamW.", at_least=0)
    betas: tuple[float, ...] = option((0.9, 0.999), "Moments of AdamW.", length=2, at_least=0, below=1)
    warmup_steps: int = option(1500, "Steps of linear warm-up.", at_least=0)
    warmup_ratio: float = option(1e-6, "Rate on step 0 as a fraction of the base rate.", at_least=0, at_most=1)
    power: float = option(0.9, "Power of the polynomial decay.", above=0)
    momentum: float = option(
        0.9, "Momentum of the projection head's moving average (the teacher's head).", at_least=0, at_most=1
    )

    def check(self):
        if self.warmup_steps > self.steps:
            raise ToCoError(f"warmup_steps = {self.warmup_steps} must be at most steps = {self.steps}")
        self.images_at_once()

    def images_at_once(self, processes: int = 1) -> int:
        """Images whose graph a process holds at a time. Raises ToCoError where the parts would not be equal."""
        if self.batch_size % (processes * self.accumulate):
            among = f" x {processes} processes" if processes > 1 else ""
            raise ToCoError(f"accumulate = {self.accumulate}{among} must divide batch_size = {self.batch_size}")
        return self.batch_size // (processes * self.accumulate)


@dataclass(frozen=True, kw_only=True)
class ReleaseBehaviour(Config):
    """Where the published release departs from its paper or from what it means to do. True does as the release does.

    The first eight lose information or are slips: off by default. The others shape the published results: on by
    default. `release_exact()` turns all of them on.
    """

    mirrored_valid_box: bool = option(
        False,
        """Take the valid box before the last random flip of the image. Off: half of the boxes would be mirrored, so
        that padding counts as image and image as padding.""",
    )
    independent_local_image: bool = option(
        False,
        """Flip and jitter the image that local views are cut from independently of the image that the region map
        belongs to.
        Off: half of the views would come from the mirrored place with the wrong flag, and flags are what CTC learns
        from.""",
    )
    pixel_box_on_tokens: bool = option(
        False,
        """Apply the valid box in pixels to labels at token scale. Off: an image padded by more than a grid's height or
        width would have no valid token for PTC.""",
    )
    nan_segmentation_loss: bool = option(
        False,
        """Let the segmentation loss be NaN where no foreground or no background pixel is valid. Off: the missing half
        counts 0; NaN times weight 0 is NaN and would end the training.""",
    )
    crops_in_padding: bool = option(
        False, "Allow local views to be centred on padding. Off: a black view says nothing about an image."
    )
    truncated_denormalisation: bool = option(
        False,
        """Truncate to whole grey levels when PAR's image is denormalised. Off: what rounding has put just below a level
        comes out one too low, 19 of 256 levels in the release and others here.""",
    )
    dropped_border: bool = option(
        False,
        """Ignore up to a patch minus one pixel at the right and at the bottom where a size is not a multiple of the
        patch. Off: the image is resized to the nearest multiple.""",
    )
    ptc_constant: bool = option(
        False,
        """Let PTC be at least the constant 1/2 where no two tokens share a class. Off: it is 0 there, with the same
        gradient, so that the curve shows only what is learned.""",
    )
    foreground_counts_double: bool = option(
        True,
        """Judge a local view by the mean of the region values 0 background, 1 uncertain, 2 foreground. On: the
        threshold 0.2 was chosen for it. Off: the share of uncertain and foreground pixels.""",
    )
    ctc_negatives_only_term: bool = option(
        True,
        """Add to CTC one term per image that holds negatives only. On: it pushes background views away even where
        an image has no positive view, and the published weight was chosen with it.""",
    )
    average_before_teacher: bool = option(
        True,
        """Update the moving average before the teacher's head is used. On: the published order. Off: after it,
        so that the teacher lags by one step more.""",
    )
    rate_jump: bool = option(
        True,
        """Let the polynomial decay count from step 0, so that the rate falls at the end of the warm-up (from 1.0 to
        0.932 on VOC). On: the published schedule. Off: the decay begins where the warm-up ends.""",
    )
    decay_all: bool = option(
        True, "Decay every trained parameter. On: as published. Off: biases and norms are not decayed."
    )
    always_blurred: bool = option(
        True, "Blur the main image a little every time. On: as published, and mild. Off: it is left sharp."
    )
    black_padding: bool = option(
        True, "Pad with black. On: as published. Off: with the data's mean colour, which is 0 after normalisation."
    )
    square_evaluation: bool = option(
        True, "Evaluate at `crop_size` square whatever the aspect. On: as published. Off: aspect is kept."
    )
    max_over_scales: bool = option(
        True, "Over several `seg_scales` take the maximum of the logits, not the mean. On: as published."
    )

    @classmethod
    def release_exact(cls) -> "ReleaseBehaviour":
        """Everything as the release does it, slips included."""
        return cls(**{f.name: True for f in dataclasses.fields(cls)})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Config):
    """A whole experiment."""

    model: ModelConfig = field(default_factory=ModelConfig, metadata={"help": "The network."})
    labels: LabelConfig = field(default_factory=LabelConfig, metadata={"help": "From CAM to labels."})
    loss: LossConfig = field(default_factory=LossConfig, metadata={"help": "The total loss and its stages."})
    crops: CropConfig = field(default_factory=CropConfig, metadata={"help": "Local views."})
    data: DataConfig = field(default_factory=DataConfig, metadata={"help": "Images."})
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig, metadata={"help": "Optimiser and rates."})
    release: ReleaseBehaviour = field(
        default_factory=ReleaseBehaviour, metadata={"help": "What is done as in the published release."}
    )
    seed: int = option(0, "Seed of everything random.", at_least=0, at_most=9 * 10**12)
    device: str = option("auto", "`auto`, `cpu`, `cuda`, `cuda:<number>` or `mps`.")
    precision: str = option(
        "auto",
        """`fp32`, `bf16` (automatic mixed precision), `medium` (float32 whose matrix products are computed in bf16
        inside; TF32 on CUDA; on a CPU without matrix engines the same as fp32), or `auto`: bf16 where the device gains
        by it.""",
        one_of=PRECISIONS,
    )
    out_dir: str = option("runs", "Folder in which the run's folder is made.")
    eval_interval: int = option(2000, "Steps between validations; 0 validates only at the end.", at_least=0)
    seg_scales: tuple[float, ...] = option(
        (1.0,),
        "Image scales over which segmentation is evaluated, each also mirrored; 1 alone is one pass, not mirrored.",
        above=0,
        at_most=16,
    )
    log_interval: int = option(10, "Steps between logged losses.", at_least=1)
    log_to: str = option(
        "",
        """Tracker that also gets losses, rates, scores and pictures: `tensorboard` or `trackio` (see `train.trackers`);
        empty: none. Like `out_dir` it does not name the run.""",
        one_of=("", "tensorboard", "trackio"),
    )

    def check(self):
        name, _, number = self.device.partition(":")
        if name not in DEVICES or (_ and not (name == "cuda" and number.isdigit())):
            raise ToCoError(f"device = {self.device!r} is not allowed: one of {', '.join(DEVICES)}, cuda:<number>")
        if self.crops.local_size > self.data.crop_size:
            raise ToCoError(f"local_size = {self.crops.local_size} must be at most crop_size = {self.data.crop_size}")
        if self.loss.ctc_batch_negatives and self.schedule.accumulate > 1:
            raise ToCoError(f"accumulate = {self.schedule.accumulate} with ctc_batch_negatives is not allowed: 1")

    def short_hash(self, *, every_field: bool = False) -> str:
        """Ten hexadecimal digits that name the experiment: equal for equal fields, wherever it is written (`out_dir`
        and `log_to` do not count) and however it is computed (see `named`).

        every_field: what older versions named it.
        """
        config = self if every_field else self.named()
        values = config.to_dict()
        del values["out_dir"], values["log_to"]
        for name, section in values.items():
            if isinstance(section, dict):
                values[name] = getattr(config, name).without_later_defaults()
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:10]

    def named(self) -> "TrainConfig":
        """The config with the recipes' values in those fields that are no part of the experiment.

        `workers`, `cache`, `log_interval` and `log_to` move no bit of the weights. `accumulate` moves their rounding,
        as the number of processes does, which no config holds. So a run that stopped goes on with other values of
        these. All others count: `device` and `precision` are other arithmetic, which is compared in experiments;
        `eval_interval` decides which state is the best and which numbers are kept.
        """
        official = self.data.train_split == "train_aug" or self.data.val_split == "val_part"  # VOC and COCO
        workers, cache = 10 if official else 0, self.model.backbone == "scenes_vit_nano"
        return override(self, workers=workers, cache=cache, log_interval=10, log_to="", accumulate=1)

    def resolved(self) -> "TrainConfig":
        """The config with `dataset` and `weights`, where they are paths, from the root on and without links: one name
        for one place, whatever folder this process is in."""
        dataset = self.data.dataset if self.data.dataset == "scenes" else _real_path(self.data.dataset)
        return override(self, dataset=dataset, weights=self.model.weights and _real_path(self.model.weights))


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
    that the backbone knows is bent by random heads. CTC is off: here it does not help (see `docs/results.md`).
    """
    return TrainConfig(
        model=ModelConfig(
            backbone="scenes_vit_nano",
            proj_hidden=256,
            proj_bottleneck=64,
            proj_dim=128,
            decoder_width=64,
            decoder_dilation=2,
        ),
        labels=LabelConfig(beta_l=0.2, beta_h=0.45, beta=0.4, cam_scales=(1.0,), par_dilations=(1, 2, 4, 8)),
        loss=LossConfig(ptc=2.0, ctc=0.0, seg=0.05, energy=0.0, ctc_start=60, seg_start=60, energy_start=60),
        crops=CropConfig(n_local=4, local_size=48, positive_threshold=1.0),
        data=DataConfig(crop_size=128, scale_range=(0.85, 1.25), blur_sigma=(0.1, 0.4), cache=True),
        schedule=ScheduleConfig(
            steps=200,
            batch_size=8,
            lr=1e-3,
            head_lr_scale=8.0,
            classifier_lr_scale=3.0,
            warm_start_steps=400,
            frozen_blocks=8,
            warmup_steps=10,
        ),
        eval_interval=100,
    )


def photographs(dataset: str = "photographs") -> TrainConfig:
    """A folder of some hundred photographs and a small ImageNet backbone, fine-tuned at 224 pixels in minutes.

    The classifiers' rate is high: they begin at random, and until they point at the object there is nothing to
    contrast. A slow one leaves the task to the encoder, which then learns the surroundings, too.
    """
    return TrainConfig(
        model=ModelConfig(backbone="vit_tiny_patch16_224", aux_norm=True),
        labels=LabelConfig(beta_l=0.3, beta_h=0.6, cam_scales=(1.0, 0.5)),
        loss=LossConfig(ptc=0.5, ctc=0.2, seg=0.2, ptc_start=60, ctc_start=120, seg_start=140, energy_start=140),
        crops=CropConfig(local_size=64),
        data=DataConfig(dataset=dataset, crop_size=224, scale_range=(0.75, 1.5), blur_sigma=(0.1, 1.0)),
        schedule=ScheduleConfig(steps=300, batch_size=8, lr=1e-4, classifier_lr_scale=200.0, warmup_steps=30),
        eval_interval=150,
    )


RECIPES = {"voc": voc, "coco": coco, "tiny": tiny, "photographs": photographs}


def lr_at(
    step: int,
    *,
    base_lr: float,
    steps: int,
    warmup_steps: int,
    warmup_ratio: float,
    power: float,
    rate_jump: bool = True,
) -> float:
    """Learning rate used on `step` (0 <= step <= steps): linear warm-up, then polynomial decay to 0 at `steps`.

    Warm-up goes from `warmup_ratio` * base_lr on step 0 to base_lr at `warmup_steps`. With `rate_jump`, as in the
    release, the decay (1 - step / steps) ** power counts from step 0, so the rate falls suddenly when the warm-up ends;
    without, it counts from there.
    """
    if not 0 <= step <= steps:
        raise ToCoError(f"step = {step} is outside the schedule: allowed are 0..{steps}")
    if step < warmup_steps:
        return base_lr * (1 - (1 - step / warmup_steps) * (1 - warmup_ratio))
    if rate_jump:
        return base_lr * (1 - step / steps) ** power
    return base_lr * (1 - (step - warmup_steps) / max(steps - warmup_steps, 1)) ** power


def override(config: TrainConfig, **values: Any) -> TrainConfig:
    """A copy with some fields changed, each named alone (`steps=200`); a section may be given whole
    (`loss=LossConfig(...)`).

    An unknown name is refused with the nearest one. All fields are changed before conditions between them are checked.
    """
    where = field_sections()
    changes: dict[str, dict] = {}
    for name, value in values.items():
        if name not in where:
            raise ToCoError(f"there is no parameter {name!r}{did_you_mean(name, where)}")
        changes.setdefault(where[name], {})[name] = value
    whole = changes.pop("", {})
    for section, fields in changes.items():
        given = whole.get(section, getattr(config, section))
        if not _is_config(type(given)):
            raise ToCoError(f"{section} = {given!r:.60} is not allowed: a {type(getattr(config, section)).__name__}")
        whole[section] = dataclasses.replace(given, **fields)
    return dataclasses.replace(config, **whole)


def shortened(config: TrainConfig, steps: int) -> TrainConfig:
    """The same experiment in another number of steps: the first step of every term and the interval of validations keep
    their share of the schedule.

    The warm-up keeps its number of steps (at most half of them all): a rate that rises faster than in the recipe would
    spoil the pretrained tokens.
    """
    share = steps / config.schedule.steps
    starts = [f.name for f in dataclasses.fields(LossConfig) if f.name.endswith("_start")]
    return override(
        config,
        steps=steps,
        warmup_steps=min(config.schedule.warmup_steps, steps // 2),
        eval_interval=math.ceil(share * config.eval_interval),
        **{name: round(share * getattr(config.loss, name)) for name in starts},
    )


def configured(recipe: TrainConfig, **values: Any) -> TrainConfig:
    """Change fields of a recipe as a user names them.

    Like `override`; but where `steps` is among them, the first steps of the terms, the warm-up and the interval of
    validations that are not named keep their share of the schedule (`shortened`). Where a value does not fit one that
    the recipe has, the ToCoError begins with the one that was named here.
    """
    steps = values.get("steps")
    try:
        if isinstance(steps, int) and not isinstance(steps, bool) and steps >= 1:
            recipe = shortened(recipe, steps)
        return override(recipe, **values)
    except ToCoError as error:
        blamed = re.match(r"(\w+) = ", str(error))
        mine = [name for name in values if re.search(rf"\b{name} = ", str(error))]
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


def field_sections() -> dict[str, str]:
    """Name of every field -> section of `TrainConfig` that holds it ('' for its own fields). Names are unique."""
    where = {}
    for own in dataclasses.fields(TrainConfig):
        where[own.name] = ""
        if _is_config(own.type):
            where |= {f.name: own.name for f in dataclasses.fields(own.type)}
    return where


def did_you_mean(name: str, known, otherwise: str | None = None) -> str:
    """': did you mean ...?' with the nearest known names; where none is near, `otherwise` or the list of all."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": known are {', '.join(sorted(known))}" if otherwise is None else otherwise


def _real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no path at all: whoever opens it says so
        return path


def _is_config(kind) -> bool:
    return isinstance(kind, type) and issubclass(kind, Config)


def _plain(value):
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _converted(f, value):
    """The value in the type of its field, or an error that says which type is wanted."""
    kinds = typing.get_args(f.type) if type(None) in typing.get_args(f.type) else (f.type,)
    empty = value is None or (isinstance(value, (str, tuple, list)) and len(value) == 0)
    if type(None) in kinds and empty:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise ToCoError(f"{f.name} = {value!r} is not allowed: a tuple of numbers is wanted")
        return tuple(_scalar(f.name, typing.get_args(kind)[0], v) for v in value)
    return _scalar(f.name, kind, value)


def _scalar(name, kind, value):
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and _is_finite(value):
        return float(value)
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if (kind is bool or _is_config(kind)) and isinstance(value, kind):
        return value
    wanted = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}.get(
        kind, f"a {kind.__name__}"
    )
    raise ToCoError(f"{name} = {value!r} is not allowed: {wanted} is wanted")


def _is_finite(value) -> bool:
    """Whether it is a number that a float can hold; a whole number may be too large for one."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max


def _check_bounds(f, value):
    allowed = f.metadata.get("allowed")
    if value is None or not allowed:
        return
    items = value if isinstance(value, tuple) else (value,)
    bad = "length" in allowed and len(items) != allowed["length"]
    for item in items:
        bad |= "one_of" in allowed and item not in allowed["one_of"]
        bad |= "at_least" in allowed and not item >= allowed["at_least"]
        bad |= "above" in allowed and not item > allowed["above"]
        bad |= "at_most" in allowed and not item <= allowed["at_most"]
        bad |= "below" in allowed and not item < allowed["below"]
    if bad:
        words = []
        if "length" in allowed:
            words.append(f"{allowed['length']} numbers")
        if "one_of" in allowed:
            words.append(f"one of {', '.join(map(str, allowed['one_of']))}")
        words += [
            f"{k.replace('_', ' ')} {allowed[k]}" for k in ("at_least", "above", "at_most", "below") if k in allowed
        ]
        raise ToCoError(f"{f.name} = {value!r} is not allowed: {', '.join(words)}")
