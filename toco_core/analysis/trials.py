"""Trials: trainings of seconds on a part of the images, one after the other, whose first shares its work with the rest.

    trials = Trials(n_train=64, n_val=32)
    one = trials.run(ptc=0.5, steps=60)     # computes the tokens of the frozen blocks, picture by picture
    other = trials.run(ptc=2.0, steps=60)   # finds them (see `train.kept_tokens`)
    other.scores, other.token_similarity, other.seconds, other.computed, other.found

A trial answers "in which direction", not "how much": few images, few steps, one seed. Its scores are of a part of the
validation images, each CAM at the threshold that is best on that part. Nothing of it stays on the disk.
"""

import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from toco_core.cam import multi_scale_cam
from toco_core.config import TrainConfig, configured, field_sections, override, tiny
from toco_core.data import EvalItem, TrainVal, evaluation_items, open_data, to_unit
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import Evaluation, evaluate_as
from toco_core.labels import token_label, upsampled_argmax, valid_cam
from toco_core.machine.precision import passes_of
from toco_core.model import ToCo
from toco_core.predict.tokens import token_similarity
from toco_core.train.kept_tokens import KeptTokens
from toco_core.train.loop import train

STEPS = 60
SHOWN = 4  # validation images in a frame
LOGGED_EVERY = 2  # steps
SCORED = ("cam", "aux_cam", "seg")


class Frame(NamedTuple):
    """What the shown images look like to a model that has learned for `step` steps, at `crop_size` square."""

    step: int
    cam: Float32[np.ndarray, "B H W"]
    """The largest CAM of the labelled classes, in [0, 1]."""
    token_label: UInt8[np.ndarray, "B h w"]
    """What PTC reads, from the auxiliary CAM: 0 background, 1..K, 255 uncertain."""
    segmentation: UInt8[np.ndarray, "B H W"]


class Trial(NamedTuple):
    """One row of the table of trials."""

    number: int
    """From 1."""
    changed: dict[str, Any]
    """The fields in which it differs from the trials' config."""
    config: TrainConfig
    steps: int
    """Fewer than the config's where it was stopped."""
    seconds: float
    """Of training and scoring together."""
    computed: int
    found: int
    """Pictures that went through the frozen blocks in this trial, and passes that did not need to."""
    records: list[dict]
    """Logged losses, each with "step" and "total"."""
    scores: dict[str, float]
    """`SCORED` -> mIoU in percent; NaN without masks."""
    beta: float
    aux_beta: float
    """The thresholds that are best on these images, at which "cam" and "aux_cam" are scored; NaN without masks."""
    token_similarity: float
    """Mean cosine of pairs of final patch tokens."""
    frame: Frame
    """After the last step."""

    @property
    def stopped(self) -> bool:
        return self.steps < self.config.schedule.steps


class Trials:
    """A config, a part of its images, and what their frozen blocks say, which all trials share.

    The images of both parts are spread evenly over their splits. Fields of `config` that are set here: few steps (the
    stages keep their share of them), one variation per image, no validation before the end.
    """

    def __init__(
        self,
        config: TrainConfig | None = None,
        *,
        n_train: int = 64,
        n_val: int = 32,
        steps: int = STEPS,
        every: int = 5,
        data: TrainVal | None = None,
    ):
        """`config`: by default `tiny()`. `every`: steps between two frames. Raises ToCoError where no block is frozen,
        and for numbers below 1."""
        for name, value in {"n_train": n_train, "n_val": n_val, "every": every}.items():
            if value < 1:
                raise ToCoError(f"{name} = {value!r} is not allowed: at least 1")
        config = tiny() if config is None else config
        if not config.schedule.frozen_blocks:
            raise ToCoError("frozen_blocks = 0 is not allowed: trials share what the frozen blocks compute")
        config = override(config, views_per_image=1, eval_interval=0, log_interval=LOGGED_EVERY, log_to="")
        self.config, self.every = configured(config, steps=steps), every
        data = data or open_data(config.data)
        self.data = data._replace(train=data.train.spread(n_train), val=data.val.spread(n_val))
        self.kept = KeptTokens()
        self.depth = ToCo(config.model, data.train.n_classes).depth
        self.done: list[Trial] = []
        shown = self.data.val.spread(SHOWN, labelled=True)
        self.shown = list(evaluation_items(shown, size=config.data.crop_size, native=True))

    def configured(self, **values: Any) -> TrainConfig:
        """The config of a trial with these fields. Raises ToCoError for what cannot be, as training would."""
        config = configured(self.config, **values)
        if config.model.layer > self.depth:
            raise ToCoError(f"layer = {config.model.layer} is not allowed: {config.model.backbone} has 1..{self.depth}")
        return config

    def run(
        self,
        *,
        on_record: Callable[[dict], None] = lambda record: None,
        on_frame: Callable[[Frame], None] = lambda frame: None,
        stop: Callable[[], bool] = lambda: False,
        **values: Any,
    ) -> Trial:
        """Train and score with some fields changed by name, and note the row.

        `on_record` gets the losses as they are logged, `on_frame` a frame after every `every` steps and after the last
        one; where `stop` says so after a step, training ends there and is scored as it is. Raises ToCoError as `train`
        does; then there is no row.
        """
        config, began = self.configured(**values), time.perf_counter()
        before, records, measured = (self.kept.computed, self.kept.found), [], {}

        def note(record: dict) -> None:
            if "total" in record:
                records.append(record)
                on_record(record)

        def look(model: ToCo, done: int) -> None:
            stopped = done < config.schedule.steps and stop()
            last = stopped or done == config.schedule.steps
            if last or done % self.every == 0:
                measured["frame"] = self._frame(model, config, done)
                on_frame(measured["frame"])
            if last:
                measured["similarity"] = self._similarity(model, config)
            if stopped:
                measured["validation"] = evaluate_as(config, model, self.data.val, progress=False)
                raise _Stopped

        with tempfile.TemporaryDirectory(prefix="toco-trial-") as folder:
            try:
                trained = train(
                    override(config, out_dir=folder),
                    data=self.data,
                    on_record=note,
                    on_step=look,
                    progress=False,
                    save_minutes=0,
                    kept=self.kept,
                )
                measured["validation"] = trained.validation
            except _Stopped:
                pass
        scores, beta, aux_beta = _scores(measured["validation"])
        trial = Trial(
            number=len(self.done) + 1,
            changed=self._changes(config),
            config=config,
            steps=measured["frame"].step,
            seconds=time.perf_counter() - began,
            computed=self.kept.computed - before[0],
            found=self.kept.found - before[1],
            records=records,
            scores=scores,
            beta=beta,
            aux_beta=aux_beta,
            token_similarity=measured["similarity"],
            frame=measured["frame"],
        )
        self.done.append(trial)
        return trial

    def _changes(self, config: TrainConfig) -> dict[str, Any]:
        """The named fields that differ; those that follow from the number of steps are left out."""
        found = {}
        like = configured(self.config, steps=config.schedule.steps)
        for name, section in field_sections().items():
            one, other = ((getattr(c, section) if section else c) for c in (config, like))
            value = getattr(one, name)
            if not dataclasses.is_dataclass(value) and value != getattr(other, name):
                found[name] = value
        steps = config.schedule.steps
        return found | ({"steps": steps} if steps != self.config.schedule.steps else {})

    @torch.no_grad()
    def _frame(self, model: ToCo, config: TrainConfig, step: int) -> Frame:
        images, image_labels = _batch(model, self.shown)
        with model.evaluating(), passes_of(model, config)():
            tokens = model.encode(images, attend=config.labels.attended(), classes=config.labels.class_attention > 0)
            options = {"tokens": tokens, "image_labels": image_labels, **config.labels.cam_options()}
            cams = multi_scale_cam(model, images, **options)
            seg_logits = model.decoder(tokens.patch_map)
        label = token_label(cams.aux_cam.float(), image_labels, tokens.grid, **config.labels.thresholds())
        segmentation = upsampled_argmax(seg_logits.float(), tuple(images.shape[-2:]))
        return Frame(
            step,
            valid_cam(cams.cam.float(), image_labels).amax(1).cpu().numpy(),
            label.to(torch.uint8).cpu().numpy(),
            segmentation.to(torch.uint8).cpu().numpy(),
        )

    @torch.no_grad()
    def _similarity(self, model: ToCo, config: TrainConfig) -> float:
        """Mean over the validation images, whose frozen blocks the scoring needs anyway."""
        found = []
        with model.evaluating(), passes_of(model, config)():
            for item in evaluation_items(self.data.val, size=config.data.crop_size):
                found.append(token_similarity(model.encode(_batch(model, [item])[0]).patch_tokens.float()))
        return float(torch.cat(found).mean())


class _Stopped(Exception):
    """Ends a training from within."""


def _batch(model: ToCo, items: list[EvalItem]) -> tuple[Tensor, Tensor]:
    """Normalised images on the model's device, and image-level labels."""
    unit = to_unit(torch.cat([item.image for item in items]).to(model.classifier.weight.device))
    return model.normalise(unit), torch.cat([item.image_labels for item in items])


def _scores(validation: Evaluation) -> tuple[dict[str, float], float, float]:
    if not validation.n_masks:
        return dict.fromkeys(SCORED, float("nan")), float("nan"), float("nan")
    found = {"cam": np.nanmax(validation.cam.miou), "aux_cam": np.nanmax(validation.aux_cam.miou)}
    percent = {name: 100 * float(value) for name, value in (found | {"seg": validation.seg.miou}).items()}
    return percent, validation.cam.best_beta, validation.aux_cam.best_beta
