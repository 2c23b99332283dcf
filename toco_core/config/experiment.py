"""Every number of an experiment, in frozen records that refuse a wrong value where it is declared.

A `TrainConfig` is made of one record per concept. `override` changes some fields by name:

    config = override(tiny(), layer=10, steps=200)

Steps are counted from 0, as in the loop `for step in range(steps)`. A field of `LossConfig`
called `..._start` is the first step on which something counts.
"""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from typing import Any

from toco_core.config.crops import CropConfig
from toco_core.config.data import DataConfig
from toco_core.config.fields import Config, did_you_mean, is_config, option
from toco_core.config.labels import LabelConfig
from toco_core.config.losses import LossConfig
from toco_core.config.model import ModelConfig
from toco_core.config.release import ReleaseBehaviour
from toco_core.config.schedule import ScheduleConfig
from toco_core.errors import ToCoError

PRECISIONS = ("auto", "fp32", "medium", "bf16")
DEVICES = ("auto", "cpu", "cuda", "mps")


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
        # of cuda:300 torch would make device 44
        if self.device not in DEVICES and not re.fullmatch(r"cuda:[0-9]{1,2}", self.device):
            raise ToCoError(f"device = {self.device!r} is not allowed: one of {', '.join(DEVICES)}, cuda:<number>")
        if self.crops.local_size > self.data.crop_size:
            raise ToCoError(f"local_size = {self.crops.local_size} must be at most crop_size = {self.data.crop_size}")
        if self.loss.ctc_whole_teacher and not self.schedule.teacher_momentum:
            raise ToCoError("ctc_whole_teacher = True with teacher_momentum = 0 is not allowed: above 0")
        if self.loss.discrepancy and self.schedule.teacher_momentum:
            both = f"discrepancy = {self.loss.discrepancy} with teacher_momentum = {self.schedule.teacher_momentum}"
            raise ToCoError(f"{both} is not allowed: one of them is 0, labels are the rival's or the teacher's")
        needs = {name: getattr(self.loss, name) for name in ("class_tokens", "class_contrast")}
        for name, value in (needs | {"class_attention": self.labels.class_attention}).items():
            if value and not self.model.class_tokens_after:
                raise ToCoError(f"{name} = {value} with class_tokens_after = 0 is not allowed: above 0")
        if self.loss.cls and self.labels.class_attention and not any(needs.values()):
            what = f"class_attention = {self.labels.class_attention} with class_tokens = 0 and class_contrast = 0"
            raise ToCoError(f"{what} is not allowed: one of them above 0, or nothing teaches that map")
        exchange, start = self.loss.exchange, self.loss.exchange_start
        if exchange and not (self.loss.seg and start >= self.loss.seg_start):
            what = f"exchange = {exchange} with exchange_start = {start}, seg_start = {self.loss.seg_start} and"
            raise ToCoError(
                f"{what} seg = {self.loss.seg} is not allowed: exchange_start at least seg_start and seg above 0, a "
                f"decoder that has learned nothing can teach nothing"
            )
        if self.loss.consistency and self.release.independent_local_image:
            what = f"consistency = {self.loss.consistency} with independent_local_image = True"
            raise ToCoError(f"{what} is not allowed: one of them, its two pictures must show the same places")
        if self.loss.cls and self.labels.attention_kind == "learned" and not self.loss.affinity:
            raise ToCoError(
                "attention_kind = 'learned' with affinity = 0 is not allowed: above 0, or nothing is learned"
            )
        self.check_parts()

    def check_parts(self, processes: int = 1) -> None:
        """Raise ToCoError where so many processes, or `accumulate`, cannot divide a batch."""
        self.schedule.images_at_once(processes)
        whole = {
            "ctc_batch_negatives": self.loss.ctc_batch_negatives,
            "prototypes": self.loss.prototypes > 0,
            "dynamic_thresholds": self.labels.dynamic_thresholds,
        }
        for parts, n in (("accumulate", self.schedule.accumulate), ("processes", processes)):
            for name, needed in whole.items():
                if n > 1 and needed:
                    raise ToCoError(f"{parts} = {n} with {name} is not allowed: 1, it needs the batch in one piece")

    def affinity_blocks(self) -> tuple[int, ...]:
        """The blocks whose attention the model's affinity head reads; none where it has no such head."""
        return self.labels.attention_blocks if self.loss.affinity else ()

    def attended(self) -> tuple[int, ...]:
        """The blocks whose attention a training pass must keep: for its CAMs, or for the affinity head."""
        return self.labels.attended() or self.affinity_blocks()

    def label_cam_options(self, step: int) -> dict:
        """The keywords of `cam.labelled_cams` for the labels of a step."""
        begun = 0 < self.loss.affinity_walk_start <= step
        return self.labels.cam_options(carried=begun or self.labels.attention_kind != "learned")

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


def override(config: TrainConfig, /, **values: Any) -> TrainConfig:
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
        if not is_config(type(given)):
            raise ToCoError(f"{section} = {given!r:.60} is not allowed: a {type(getattr(config, section)).__name__}")
        whole[section] = dataclasses.replace(given, **fields)
    return dataclasses.replace(config, **whole)


def field_sections() -> dict[str, str]:
    """Name of every field -> section of `TrainConfig` that holds it ('' for its own fields). Names are unique."""
    where = {}
    for own in dataclasses.fields(TrainConfig):
        where[own.name] = ""
        if is_config(own.type):
            where |= {f.name: own.name for f in dataclasses.fields(own.type)}
    return where


def _real_path(path: str) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no path at all: whoever opens it says so
        return path
