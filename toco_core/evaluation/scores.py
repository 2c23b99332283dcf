"""What a run is reported with: thresholds chosen on the validation part, scores on the test part, kept beside the run.

`scored_run` trains a config unless its run is finished, and scores it unless that was done: asked a second time it
answers at once. The scores are mIoU in percent of

    cam           the final CAM at the threshold that is best on val
    aux_cam       the auxiliary CAM at its own best threshold on val
    refined       the final CAM after PAR (or another refiner) at its own best threshold on val
    pseudo_label  the label that the decoder learns from: the final CAM, PAR, the config's two thresholds; pixels that
                  it leaves open count as missed
    seg           the decoder's segmentation

Where the data set has no part "test" with masks, the scores are of val, on which the thresholds were chosen: a little
too high. Where only test has masks, the thresholds of the CAMs are the config's `beta`.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from toco_core.config import TrainConfig, override
from toco_core.data import Split, TrainVal, open_data, split_names
from toco_core.data.fingerprint import differences, split_fingerprint
from toco_core.data.source import open_beside
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import Evaluation, evaluate_as
from toco_core.evaluation.metrics import ConfusionMatrix, OpenCounts, Scores
from toco_core.labels import pseudo_label, refined_labels
from toco_core.model import ToCo
from toco_core.predict.tokens import similarity_of_split
from toco_core.runs.comparison import refuse_other_run
from toco_core.runs.folder import Run
from toco_core.runs.opened import Opened
from toco_core.runs.shipped import shipped_run
from toco_core.train.kept_tokens import KeptTokens
from toco_core.train.loop import train

FINGERPRINT = "fingerprint"  # in scores.json: of the part that was scored
SCORED = ("cam", "aux_cam", "refined", "pseudo_label", "seg")
CHOSEN_BY = ("cam", "aux_cam", "seg", "refined")  # those that are also scored on val
CHOOSERS = 200  # images of val, evenly spread, on which the threshold of the refined CAM is chosen
OFFSETS = (-0.2, -0.15, -0.1, -0.05, 0.0, 0.05)  # from the CAM's own threshold: refinement takes what is weak


class RunScores(NamedTuple):
    """Scores of one run, in percent."""

    part: str
    """"test", or "val" where the data set has no test part with masks."""
    protocol: str
    beta: float
    aux_beta: float
    refined_beta: float
    val: dict[str, float]
    """mIoU of all but the pseudo label on val, the CAMs at these thresholds: what choices are made by. Of the refined
    CAM it is that of at most `CHOOSERS` images. NaN where val has no masks."""
    miou: dict[str, float]
    """Each of `SCORED` on `part`; NaN for what needs a classifier that was not trained (of a second network)."""
    iou: dict[str, list[float]]
    """The same per class, background first; NaN for a class that `part` does not show and nothing predicts."""
    committed: float
    """Share of pixels that the pseudo label leaves neither uncertain nor ignored."""
    token_similarity: list[float]
    """After each block, in [-1, 1] (see `similarity`)."""

    @property
    def of_background_alone(self) -> bool:
        """Whether no mask of `part` shows a class: the mean over what is shown is the background's IoU."""
        return all(self.miou[kind] == self.iou[kind][0] for kind in SCORED)


class Scored(NamedTuple):
    """A finished run and its scores."""

    config: TrainConfig
    run: Run
    scores: RunScores


def scored_run(
    config: TrainConfig, *, data: TrainVal | None = None, progress: bool = True, kept: KeptTokens | None = None
) -> Scored:
    """The scores of a config's run: from its folder, or after training it, `kept` as for `train`.

    Raises ToCoError as `train` does, also for a finished run of other data or other weights; and before anything is
    trained, where no mask could score it.
    """
    data, run = data or open_data(config.data), shipped_run(config) or Run.of(config)
    if run.finished:
        refuse_other_run(run, config, data)
    found = _scores_of(run, data)
    if found is None:
        with_masks(*reported_part(data))
        trained = train(config, data=data, progress=progress, kept=kept)
        opened = Opened(trained.model, config, trained.run, trained.data)
        found = score_run(opened, validation=trained.validation, progress=progress)
    return Scored(config, run, found)


def reported_part(data: TrainVal) -> tuple[str, Split]:
    """The part that results are told of, and its name: "test" where there is one with masks, else "val".

    A test part that cannot be opened is told by a warning, and counts as none."""
    if "test" in split_names(data.val.root):
        try:
            test = open_beside(data.val, "test")
        except ToCoError as error:
            warnings.warn(f"scores are of val, as test cannot be opened: {error}", stacklevel=1)  # once, whoever asks
        else:
            if test.n_masks:
                return "test", test
    return "val", data.val


def with_masks(part: str, source: Split) -> tuple[str, Split]:
    """The part as it is. Raises ToCoError where it has no mask, for those who ask before they train."""
    if not source.n_masks:
        raise ToCoError(f"{source.root}: none of the {len(source)} images of {part} has a mask to score by")
    return part, source


def score_run(opened: Opened, *, validation: Evaluation | None = None, progress: bool = True) -> RunScores:
    """The scores of an opened run: from its folder, or by evaluating it, which is then kept there if it is finished.

    `validation`: its evaluation on val, where that is at hand.
    """
    model, config, run, data = opened
    found = _scores_of(run, data)
    if found is None:
        found = score_model(model, config, data, validation=validation, progress=progress)
        if run.finished:
            run.keep_scores(found._asdict() | {FINGERPRINT: split_fingerprint(reported_part(data)[1])})
    return found


def score_model(
    model: ToCo, config: TrainConfig, data: TrainVal, *, validation: Evaluation | None = None, progress: bool = True
) -> RunScores:
    """The scores of a model on a data set. Nothing is kept. `validation` as for `score_run`.

    Raises ToCoError where neither test nor val has masks.
    """
    part, source = with_masks(*reported_part(data))
    if not config.loss.cls:
        config = override(config, attention_steps=0, class_attention=0.0)  # what such CAMs need was not trained either
    if not data.val.n_masks:
        validation, chosen = None, RefinedCounts(config, model.n_classes, [config.labels.beta])
    else:
        if part == "test":
            validation = validation or evaluate_as(config, model, data.val, progress=progress, what="validating")
        chosen = _refined_near(model, config, data.val, validation, progress=progress)
    pseudo, refined = OpenCounts(model.n_classes), RefinedCounts(config, model.n_classes, [chosen.best_beta])
    labels = _each_pseudo_label(config, pseudo.update)

    def count(*batch) -> None:
        labels(*batch)
        refined.update(*batch)

    final = evaluate_as(config, model, source, on_batch=count, progress=progress, what="scoring")
    validation = final if part == "val" else validation
    if validation is None:
        beta = aux_beta = config.labels.beta
        how, val = f"threshold {beta:g} of the config, as val has no masks", dict.fromkeys(CHOSEN_BY, math.nan)
    else:
        beta, aux_beta, how = validation.cam.best_beta, validation.aux_cam.best_beta, "thresholds chosen on val"
        of_val = [validation.cam.scores(beta), validation.aux_cam.scores(aux_beta), validation.seg]
        of_val.append(chosen.scores(chosen.best_beta))
        val = {name: _percent(score.miou) for name, score in zip(CHOSEN_BY, of_val, strict=True)}
    scores = {"cam": final.cam.scores(beta), "aux_cam": final.aux_cam.scores(aux_beta), "seg": final.seg}
    scores |= {"refined": refined.scores(chosen.best_beta), "pseudo_label": pseudo.scores()}
    found = RunScores(
        part=part,
        protocol=f"{part}: {final.protocol}; {how}",
        beta=beta,
        aux_beta=aux_beta,
        refined_beta=chosen.best_beta,
        val=val,
        miou={name: _percent(scores[name].miou) for name in SCORED},
        iou={name: _percents(scores[name].iou) for name in SCORED},
        committed=_percent(pseudo.decided),
        token_similarity=[round(value, 4) for value in similarity_of_split(model, data.val, config)],
    )
    return found if config.loss.cls else _of_decoder(found)


def _of_decoder(scores: RunScores) -> RunScores:
    """The scores of a second network, whose classifiers were not trained: its CAMs say nothing."""
    kinds = [kind for kind in SCORED if kind != "seg"]
    return scores._replace(
        protocol=f"{scores.protocol}; the classifiers were not trained",
        beta=math.nan,
        aux_beta=math.nan,
        refined_beta=math.nan,
        val=dict.fromkeys(CHOSEN_BY, math.nan) | {"seg": scores.val["seg"]},
        miou=scores.miou | dict.fromkeys(kinds, math.nan),
        iou=scores.iou | {kind: [math.nan] * len(scores.iou["seg"]) for kind in kinds},
        committed=math.nan,
    )


class RefinedCounts:
    """Counts of the final CAM after the config's refiner, against each of some background scores: nothing is open."""

    def __init__(self, config: TrainConfig, n_classes: int, betas: Sequence[float]):
        self.config = config
        self.counts = {beta: ConfusionMatrix(n_classes) for beta in betas}

    def update(self, items, images, cams, image_labels) -> None:
        """Adds a batch; called by `evaluate` (`on_batch`). Each pixel of a mask takes its nearest of the label."""
        if not any(item.mask is not None for item in items):
            return
        options = self.config.labels.refiner_options()
        labels = refined_labels(images, cams.cam.float(), image_labels, betas=list(self.counts), **options)
        for matrix, found in zip(self.counts.values(), labels.cpu().numpy(), strict=True):
            for item, label in zip(items, found, strict=True):
                if item.mask is not None:
                    matrix.update(item.mask, _nearest(label, item.mask.shape))

    def scores(self, beta: float) -> Scores:
        """Scores against one of the background scores."""
        return self.counts[beta].scores()

    @property
    def best_beta(self) -> float:
        """The background score with the highest mIoU, the lowest among equals."""
        return max(self.counts, key=lambda beta: np.nan_to_num(self.scores(beta).miou, nan=-1))


def refined_near(beta: float) -> list[float]:
    """The background scores among which that of the refined CAM is chosen, `beta` being best for the CAM itself."""
    return sorted({min(max(round(beta + offset, 2), 0.0), 1.0) for offset in OFFSETS})


def _refined_near(
    model: ToCo, config: TrainConfig, val: Split, validation: Evaluation | None, *, progress: bool
) -> RefinedCounts:
    """The refined CAM's counts on images of val that have masks, where its threshold is chosen; `validation`, if known,
    is val's."""
    masked = val.subset(i for i in range(len(val)) if val.mask_source(i) is not None)
    chooser, shown = masked.spread(CHOOSERS), {"progress": progress, "what": "choosing thresholds"}
    beta = (validation or evaluate_as(config, model, chooser, **shown)).cam.best_beta
    chosen = RefinedCounts(config, model.n_classes, refined_near(beta))
    evaluate_as(config, model, chooser, on_batch=chosen.update, **shown)
    return chosen


def pseudo_label_iou(
    model: ToCo, source: Split, config: TrainConfig, *, progress: bool = False
) -> Float64[np.ndarray, " M"]:
    """Mean IoU of the pseudo label of every image of a split with masks, in [0, 1]: what pictures are ranked by.

    Over the classes that the image's mask shows, NaN for a mask that is all void; an open pixel is one that its class
    misses.
    """
    found = []

    def count(mask: np.ndarray, label: np.ndarray) -> None:
        one = OpenCounts(model.n_classes)
        one.update(mask, label)
        found.append(one.scores().miou)

    evaluate_as(config, model, source, on_batch=_each_pseudo_label(config, count), progress=progress, what="ranking")
    return np.array(found, np.float64)


def read_scores(run: Run) -> RunScores | None:
    """What `score_run` left in the folder of a finished run; None where it has not been there, or was
    of a version that scored less."""
    values = run.scores()
    if values is None:
        return None
    values = {name: value for name, value in values.items() if name != FINGERPRINT}
    if set(values) == set(RunScores._fields) - {"refined_beta"}:
        return None  # of a version that did not score it
    if set(values) != set(RunScores._fields):
        raise ToCoError(f"{run.folder}/scores.json is of another version: delete it, and the run is scored again")
    try:
        for name, kind in (
            ("part", str),
            ("protocol", str),
            ("beta", float),
            ("aux_beta", float),
            ("refined_beta", float),
            ("committed", float),
        ):
            values[name] = _number(values[name]) if kind is float else _text(values[name])
        for name in ("val", "miou"):
            values[name] = {_text(key): _number(value) for key, value in values[name].items()}
        values["iou"] = {_text(key): [_number(value) for value in row] for key, row in values["iou"].items()}
        values["token_similarity"] = [_number(value) for value in values["token_similarity"]]
    except (AttributeError, TypeError, OverflowError) as error:
        raise ToCoError(f"{run.folder}/scores.json holds no scores: {error}") from error
    return RunScores(**values)


def _number(value: Any) -> float:
    """A number of JSON, null as NaN."""
    if value is not None and type(value) not in (int, float):
        raise TypeError(f"{value!r:.60} is no number")
    return math.nan if value is None else float(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _scores_of(run: Run, data: TrainVal) -> RunScores | None:
    """What is kept, where it was found on these images and masks; None where there is nothing or it was not."""
    found, known = read_scores(run), (run.scores() or {}).get(FINGERPRINT)
    if found is None or known is None:
        return found
    part, source = reported_part(data)
    differs = differences(known, split_fingerprint(source, known))
    if part != found.part:
        why = f"its scores are of {found.part}, and {part} is what can be scored today"
    elif differs:
        why = f"{part} has {', '.join(differs)} than when it was scored"
    elif data.val.n_masks and math.isnan(found.val["seg"]):
        why = "val had no masks when it was scored"
    else:
        return found
    warnings.warn(f"{run.folder} is scored again: {why}", stacklevel=3)
    return None


def _each_pseudo_label(config: TrainConfig, count: Callable[[np.ndarray, np.ndarray], None]) -> Callable:
    """The function that `evaluate` calls with each batch: `count` gets every mask and its pseudo label. Labels are made
    at the size that is evaluated, as in training, and each pixel of the mask takes its nearest."""

    def on_batch(items, images, cams, image_labels) -> None:
        labels = pseudo_label(images, cams.cam.float(), image_labels, **config.labels.pseudo_label_options())
        for item, label in zip(items, labels.cpu().numpy(), strict=True):
            if item.mask is not None:
                count(item.mask, _nearest(label, item.mask.shape))

    return on_batch


def _nearest(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label map at another size."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, label.shape, strict=True))
    return label[rows[:, None], columns]


def _percent(value: float) -> float:
    return round(100 * float(value), 3)


def _percents(values: np.ndarray) -> list[float]:
    return [_percent(value) for value in values]
