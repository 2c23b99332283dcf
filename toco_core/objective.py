"""The training objective ("Training Objective" in the paper): terms over a step.

    L = cls + aux_cls + l1 ptc + l2 ctc + l3 seg + l4 energy

A `Term` is a function of a `Step`: one batch, which computes what is asked of it (tokens, CAMs, labels, views) once,
when it is first asked. A term of weight 0 costs nothing, and neither does what only it needs. The main image is the
first global view and the teacher differs from the student only in its projection head, so the encoder sees every
picture once: main image, second global view, local views, the scaled and mirrored copies for CAM.

**A term of your own** is a function and a row, also in a notebook:

    def entropy(step):
        p = step.output.class_logits.float().sigmoid()
        return -(p * p.clamp(min=1e-6).log()).mean()

    train(config, terms=TERMS | {"entropy": Term(entropy, weight=0.01, start=100)})

It is in the curves, in the estimates of time and memory, and in the run's manifest; its source and what it reads are
part of the run's name. A term that stays has its row in `TERMS`, and its weight and first step as the fields `<name>`
and `<name>_start` of `config.LossConfig` (`added_later=True`).

**A label source** is a function of a step, too, or a cached property of `Step`. A term that learns from one names it in
`Term.label`; then it is made without a graph, once per step (`step.made(label)`), and, where a batch is computed in
parts, before the losses of the first part. A loss whose mean runs over something other than images (pairs, pixels)
also names what is counted in its label, `Term.count`, and takes the number from `step.count(name)`: that of the whole
batch, over all parts and processes; its value is multiplied by `step.parts`, so that the parts' mean is the whole's.

    def confident(step):                        # a label: B h w
        return step.token_label.masked_fill(step.cams.aux_cam.amax() < 0.9, IGNORE)

    Term(my_loss, label=confident, count=losses.count_pairs)
"""

import contextlib
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from . import crops, labels, losses, methods
from .cam import CAMs, LabelledCAMs, labelled_cams, on_all_classes
from .config import TrainConfig
from .errors import ToCoError
from .lattice import Lattice, energy_lattices
from .losses import dense_energy_loss
from .machine.distributed import ALONE, Share
from .machine.resizing import resized
from .model import Output, ToCo, Tokens


class StepInput(NamedTuple):
    """One step's images, normalised, on the training device (see `data.training_views`).

    The image labels stay on the CPU: what they choose is then known there, and the step never waits for the device.
    """

    images: Float[Tensor, "B 3 H W"]
    global_view: Float[Tensor, "B 3 H W"]
    local_image: Float[Tensor, "B 3 H W"]
    image_labels: Float[Tensor, "B K"]
    valid_box: Int[Tensor, "B 4"]


class Step:
    """One batch on its way through the objective. Everything is computed when it is first asked for, and kept."""

    def __init__(
        self,
        model: ToCo,
        batch: StepInput,
        config: TrainConfig,
        number: int = 0,
        *,
        terms: "Mapping[str, Term] | None" = None,
        weights: Mapping[str, float] | None = None,
        autocast: Callable = contextlib.nullcontext,
        generator: torch.Generator | None = None,
        boxes: crops.CropBoxes | None = None,
        share: Share = ALONE,
        parts: int = 1,
        teacher: ToCo | None = None,
    ):
        """
        Args:
            number: of the step, from 0.
            terms: name -> term; by default `TERMS`.
            weights: name -> weight, by default those of this step in `config.loss` (see `Term.at`).
            autocast: returns the context of encoder and heads; labels and losses are always float32.
            generator: on the CPU, draws where local views are cut.
            boxes: where to cut them instead.
            share: of several processes, whose batches make one whole. The mean of their totals is the whole's total.
            parts: how many such steps on each process make a whole batch.
            teacher: the network whose CAMs make the labels, by default the model itself.
        """
        self.model, self.batch, self.config, self.number = model, batch, config, number
        self.autocast, self.generator, self.share, self.parts = autocast, generator, share, parts * share.n
        self.teacher = teacher
        self.rival: Step | None = None  # of a second network on the same batch, given later (see `train.rival`)
        self.terms = TERMS if terms is None else terms
        self.weights = dict(term_weights(config, number, self.terms) if weights is None else weights)
        self.graph = torch.is_grad_enabled()
        self.counts: dict[str, Tensor] = {}
        self._made: dict[Callable, Tensor] = {}
        if boxes is not None:
            self.boxes = boxes

    def made(self, label: "str | Callable[[Step], Tensor]") -> Tensor:
        """A label of this step: the property of that name, or what the function makes; once, and without a graph."""
        if isinstance(label, str):
            return getattr(self, label)
        if label not in self._made:
            with torch.no_grad():
                self._made[label] = label(self)
        return self._made[label]

    def count(self, term: str) -> Int[Tensor, " n"]:
        """What the mean of a term runs over, in the whole batch; every process must ask."""
        if term not in self.counts:
            self.counts[term] = self.share.total(self.terms[term].counted(self))
        return self.counts[term]

    def has(self, term: str) -> bool:
        """Whether a term ever counts."""
        return self.terms[term].schedule(term, self.config)[0] > 0

    def forget(self, *names: str) -> None:
        """Free what was computed under these names."""
        for name in names:
            self.__dict__.pop(name, None)

    # ---- the network

    @cached_property
    def tokens(self) -> Tokens:
        """Of the main images, with their graph."""
        with torch.set_grad_enabled(self.graph), self.autocast():
            classes = self.model.class_tokens is not None
            return self.model.encode(self.batch.images, attend=self.config.attended(), classes=classes)

    @cached_property
    def output(self) -> Output:
        """Class logits; `seg_logits` are asked for by themselves."""
        tokens = self.tokens
        with torch.set_grad_enabled(self.graph), self.autocast():
            return self.model.heads(tokens, segmentation=False)

    @cached_property
    def decoded(self) -> Float[Tensor, "B C h w"]:
        """The decoder's logits at the patch grid, float32."""
        tokens = self.tokens
        with torch.set_grad_enabled(self.graph), self.autocast():
            return self.model.decoder(tokens.patch_map).contiguous().float()  # contiguous: resized twice as fast

    @cached_property
    def seg_logits(self) -> Float[Tensor, "B C H W"]:
        """The same at the images' size."""
        decoded = self.decoded
        with torch.set_grad_enabled(self.graph):
            height, width = self.batch.images.shape[-2:]
            return resized(decoded, (height, width))

    # ---- labels, without a graph

    @cached_property
    def labelled(self) -> LabelledCAMs:
        """CAM and auxiliary CAM of the classes that the main images have, over the configured scales."""
        batch, options = self.batch, self.config.label_cam_options(self.number)
        model, tokens = (self.model, self.tokens) if self.teacher is None else (self.teacher, None)
        with torch.no_grad(), self.autocast():
            return labelled_cams(model, batch.images, batch.image_labels, **options, tokens=tokens)

    @property
    def cams(self) -> CAMs:
        """The same with a map for every class, B K H W, made when it is asked for."""
        return on_all_classes(self.labelled, self.model.n_classes)

    @cached_property
    def token_label(self) -> Int[Tensor, "B h w"]:
        """What each token shows, by the auxiliary CAM: 0 background, 1..K, 255 uncertain."""
        (_, cam), classes, present = self.labelled
        given = dict[str, Any](grid=self.tokens.grid, valid_box=self.batch.valid_box, **methods.thresholds(self, cam))
        if (refiner := self.config.labels.token_refiner) == "none":
            given["pixel_box_on_tokens"] = self.config.release.pixel_box_on_tokens
            label = labels.token_label(cam, present, **given)
        else:
            given |= self.config.labels.refiner_options(refiner)
            label = labels.refined_token_label(self.unit, cam, present, **given)
        return labels.slot_to_class(methods.grown(self, label, cam), classes)

    @cached_property
    def region_mask(self) -> Int[Tensor, "B H W"]:
        """0 background, 1 uncertain, 2 foreground, by the auxiliary CAM."""
        (_, cam), _, present = self.labelled
        return labels.region_mask(cam, present, **methods.thresholds(self, cam))

    @cached_property
    def pseudo_label(self) -> Int[Tensor, "B H W"]:
        """The CAM after PAR; before step `final_cam_start`, the auxiliary CAM after PAR."""
        batch, image, (cams, classes, present) = self.batch, self.unit, self.labelled
        cam = cams.cam if self.number >= self.config.loss.final_cam_start else cams.aux_cam
        if self.config.release.truncated_denormalisation:
            image = (image * 255).floor() / 255
        options: dict[str, Any] = methods.thresholds(self, cam) | self.config.labels.refiner_options()
        label = labels.pseudo_label(image, cam, present, valid_box=batch.valid_box, **options)
        return labels.slot_to_class(methods.grown(self, label, cam), classes)

    # ---- views and images

    @cached_property
    def boxes(self) -> crops.CropBoxes:
        """Where local views are cut."""
        return crops.sample_crops(
            self.region_mask,
            n_crops=self.config.crops.n_local,
            crop_size=self.config.crops.local_size,
            generator=self.generator,
            valid_box=self.batch.valid_box,
            crops_in_padding=self.config.release.crops_in_padding,
        )

    @cached_property
    def is_positive(self) -> Bool[Tensor, "B V"]:
        """Both global views, which are, then the local ones by their flags."""
        flags = crops.crop_flags(
            self.region_mask,
            *self.boxes,
            self.config.crops.local_size,
            threshold=self.config.crops.positive_threshold,
            foreground_counts_double=self.config.release.foreground_counts_double,
        )
        return torch.cat([flags.new_ones(len(flags), 2), flags], dim=1)

    @cached_property
    def unit(self) -> Float[Tensor, "B 3 H W"]:
        """The main images in [0, 1]."""
        return self.model.denormalise(self.batch.images).clamp(0, 1)

    @cached_property
    def lattices(self) -> list[Lattice]:
        """Of the main images, for the dense energy; making them waits for the device."""
        return energy_lattices(self.unit)


# ---- the terms


class Term(NamedTuple):
    """A term of the objective."""

    loss: Callable[[Step], Float[Tensor, ""]]
    label: str | Callable[[Step], Tensor] | None = None
    """What it learns from: a property of `Step`, or a function of a step."""
    count: Callable[[Tensor], Int[Tensor, " n"]] | None = None
    """What of that label its mean runs over, where that is not the images."""
    weight: float | None = None
    """None: the field of `config.LossConfig` that has the term's name."""
    start: int = 0
    """First step on which it counts, where `weight` is given here."""

    def at(self, name: str, config: TrainConfig, step: int) -> float:
        """Its weight on a step; 0 before its first one."""
        weight, start = self.schedule(name, config)
        return weight if step >= start else 0.0

    def schedule(self, name: str, config: TrainConfig) -> tuple[float, int]:
        """Its weight, and its first step."""
        if self.weight is not None:
            return float(self.weight), self.start
        if not hasattr(config.loss, name):
            raise ToCoError(f"the term {name!r} has no weight: give Term(..., weight=...), or a field of LossConfig")
        return getattr(config.loss, name), getattr(config.loss, f"{name}_start", 0)

    def counted(self, step: Step) -> Int[Tensor, " n"]:
        """What its mean runs over, in this step alone."""
        if self.label is None or self.count is None:
            raise ToCoError("a term is counted by Term(..., label=..., count=...)")
        return self.count(step.made(self.label))


def cls(step: Step) -> Float[Tensor, ""]:
    """Multi-label classification by the last block's tokens."""
    return losses.classification_loss(step.output.class_logits.float(), step.batch.image_labels)


def aux_cls(step: Step) -> Float[Tensor, ""]:
    """The same by the tokens of block `layer`."""
    return losses.classification_loss(step.output.aux_class_logits.float(), step.batch.image_labels)


def ptc(step: Step) -> Float[Tensor, ""]:
    """Patch token contrast."""
    label, pairs, constant = step.token_label, step.count("ptc"), step.config.release.ptc_constant
    return losses.ptc_loss(step.tokens.patch_map, label, pairs=pairs, parts=step.parts, keep_constant=constant)


def ctc(step: Step) -> Float[Tensor, ""]:
    """Class token contrast of main image, second global view and local views; the teacher sees the first two."""
    model, batch, boxes, is_positive = step.model, step.batch, step.boxes, step.is_positive
    size, resized = step.config.crops.local_size, step.config.crops.local_resized
    with step.autocast():
        views = crops.local_views(batch.local_image, boxes, size, resized=resized)
        second = model.encode(batch.global_view).class_token
        local = model.encode(views.flatten(0, 1), keep=False).class_token.unflatten(0, (len(views), -1))
        both = torch.stack([step.tokens.class_token, second], dim=1)
        student = model.project(torch.cat([both, local], dim=1))
        if step.teacher is not None and step.config.loss.ctc_whole_teacher:
            with torch.no_grad():
                seen = step.teacher.encode(torch.cat([batch.images, batch.global_view])).class_token
                teacher = step.teacher.project(torch.stack(seen.chunk(2), dim=1))
        else:
            teacher = model.project_ema(both.detach())
    return losses.ctc_loss(
        student.float(),
        teacher.float(),
        is_positive,
        temperature=step.config.loss.temperature,
        negatives_only_term=step.config.release.ctc_negatives_only_term,
        cosine=step.config.loss.ctc_cosine,
        unrelated=methods.unrelated_images(step) if step.config.loss.ctc_batch_negatives else None,
    )


def seg(step: Step) -> Float[Tensor, ""]:
    """Cross-entropy of the decoder with the pseudo label."""
    label, pixels, nan = step.made(methods.seg_label), step.count("seg"), step.config.release.nan_segmentation_loss
    return losses.segmentation_loss(step.seg_logits, label, pixels=pixels, parts=step.parts, nan_when_empty=nan)


def energy(step: Step) -> Float[Tensor, ""]:
    """Dense energy of the decoder's probabilities."""
    label, box = step.pseudo_label, step.batch.valid_box
    return dense_energy_loss(step.seg_logits, step.unit, label, box, lattices=step.lattices)


TERMS: dict[str, Term] = {
    "cls": Term(cls),
    "aux_cls": Term(aux_cls),
    "ptc": Term(ptc, "token_label", losses.count_pairs),
    "ctc": Term(ctc, "region_mask"),
    "seg": Term(seg, methods.seg_label, losses.count_pixels),
    "energy": Term(energy, "pseudo_label"),
    # not the paper's: in a run's records only where they count
    "exchange": Term(methods.exchange, methods.exchanged, losses.count_known),
    "consistency": Term(methods.consistency, methods.unsure_choice, losses.count_known),
    "prototypes": Term(methods.prototypes, "token_label"),
    "discrepancy": Term(methods.discrepancy),
    "class_tokens": Term(methods.class_tokens),
    "class_contrast": Term(methods.class_contrast, "token_label", methods.count_shown),
    "affinity": Term(methods.affinity, methods.token_pairs, methods.count_affinity_pairs),
    "frequency": Term(methods.frequency),
    "reliable": Term(methods.reliable, methods.reliable_tokens, losses.count_known),
}
PAPER = ("cls", "aux_cls", "ptc", "ctc", "seg", "energy")


def term_weights(config: TrainConfig, step: int, terms: Mapping[str, Term] = TERMS) -> dict[str, float]:
    """Name -> weight on a step."""
    return {name: term.at(name, config, step) for name, term in terms.items()}


def stage_starts(config: TrainConfig, terms: Mapping[str, Term] = TERMS) -> list[int]:
    """The first steps of all terms that count at some time, in order."""
    found = (term.schedule(name, config) for name, term in terms.items())
    return sorted({start for weight, start in found if weight > 0})


# ---- their sum


class Objective(NamedTuple):
    """The sum of a step's terms."""

    total: Float[Tensor, ""]
    terms: dict[str, Tensor]
    """Before weighting; a term of weight 0 is 0."""


def objective(step: Step) -> Objective:
    """The weighted sum of the terms, with its graph; changes nothing. Raises ToCoError where all weights are 0, and for
    a term that is not one number."""
    weights = {name: step.weights[name] for name in step.terms if step.weights.get(name, 0) > 0}
    if not weights:
        names = ", ".join(step.terms)
        raise ToCoError(f"all weights of the loss are 0 on step {step.number}: one of {names} must be above 0")
    if "energy" in weights:
        _ = step.lattices  # now: it waits for the device, which has least to do at the beginning of a step
    zero = step.batch.images.new_zeros(())
    shown = [name for name in step.terms if name in weights or name in PAPER or step.has(name)]
    terms = {name: step.terms[name].loss(step) if name in weights else zero for name in shown}
    for name, value in terms.items():
        if not isinstance(value, Tensor) or value.shape or not value.is_floating_point():
            found = f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
            raise ToCoError(f"the term {name!r} is {found:.60}: a floating-point tensor of shape () is wanted")
    total: Any = sum(weight * terms[name] for name, weight in weights.items())
    return Objective(total, terms)
