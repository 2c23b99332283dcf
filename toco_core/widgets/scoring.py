"""Numbers against ground truth, of one image and of a whole split in a thread of its own.

Data set and model may know different classes. They are brought together by name in one list, the data set's first; a
class that only one of them knows can be missed or wrong, but never right.
"""

import atexit
import functools
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.evaluation.metrics import OpenCounts, Scores
from toco_core.widgets.analysis import Analysis, no_classifier
from toco_core.widgets.pictures import Pictures
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import Subject


class Joint(NamedTuple):
    """The classes of data set and model in one list."""

    names: tuple[str, ...]  # background first
    of_model: np.ndarray  # uint8 256: class of the model -> place in `names`; 255 stays
    missing: frozenset[int]  # places of the data set's classes that the model lacks


class Numbers(NamedTuple):
    """Scores of one label map, or of many. `coverage`: share of the valid pixels that have a label at all; only they
    are scored."""

    scores: Scores
    coverage: float
    n_images: int = 1


@functools.lru_cache(maxsize=32)  # asked for many times a picture
def joint_classes(data: tuple[str, ...], model: tuple[str, ...]) -> Joint:
    """Match classes by name. Where one side only counts its classes ("class 1" ...) and both have equally many, they
    are taken to be the same in order."""
    data = data or model
    counted = [all(name == f"class {k}" for k, name in enumerate(names[1:], 1)) for names in (data, model)]
    if len(data) == len(model) and any(counted):
        model = data
    names = data + tuple(name for name in model if name not in data)
    if len(names) >= IGNORE:
        raise ToCoError(f"data set and model have {len(names)} classes together: at most {IGNORE - 1} are allowed")
    of_model = np.zeros(256, np.uint8)
    of_model[: len(model)] = [names.index(name) for name in model]
    of_model[IGNORE] = IGNORE
    return Joint(names, of_model, frozenset(k for k, name in enumerate(data) if name not in model))


def count(label: np.ndarray, mask: np.ndarray, names: Sequence[str]) -> OpenCounts:
    """A label map (uint8, 255 = undecided) against a mask; raises ToCoError for values beyond the classes."""
    counts = OpenCounts(len(names) - 1)
    counts.update(mask, label)
    return counts


def numbers(counts: OpenCounts, n_images: int = 1) -> Numbers:
    """Scores over the pixels that labels decide."""
    return Numbers(counts.decided_scores(), counts.decided, n_images)


def chosen_classes(
    analysis: Analysis, settings: Settings, labels: Sequence[int] | None, joint: Joint
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The model's classes that the settings ask for, and notes about those that cannot be had.

    `labels` are the data set's classes of the image, None where they are not known: then the predicted ones are taken.
    """
    notes = []
    to_model = {int(place): k for k, place in enumerate(joint.of_model[: analysis.subject.model.n_classes + 1]) if k}
    model_name = analysis.subject.name
    if not analysis.class_names[1:]:
        return (), (no_classifier(analysis.subject),)
    if settings.classes == "none":
        return (), ()
    if settings.classes == "all":
        return tuple(sorted(to_model.values())), ()
    if settings.classes == "predicted":
        return analysis.predicted, () if analysis.predicted else (f"{model_name} sees none of its classes here",)
    if settings.classes == "labelled":
        if labels is None or (analysis.subject.head and not set(labels) & set(to_model)):
            if labels is not None:
                return analysis.predicted, ()
            words = ", ".join(joint.names[joint.of_model[k]] for k in analysis.predicted) or "none"
            return analysis.predicted, (f"this image has no labels: the predicted classes are shown ({words})",)
        wanted = list(labels)
    else:
        known = {name: place for place, name in enumerate(joint.names)}
        named = [name.strip() for name in settings.classes.split(",") if name.strip()]
        unknown = [name for name in named if not known.get(name)]
        if unknown:
            notes.append(f"there is no class {', '.join(unknown)}: known are {', '.join(joint.names[1:])}")
        wanted = [known[name] for name in named if known.get(name)]
    lacking = [joint.names[place] for place in wanted if place not in to_model]
    if lacking:
        notes.append(f"{model_name} does not know {', '.join(lacking)}: left out")
    return tuple(sorted(to_model[place] for place in wanted if place in to_model)), tuple(notes)


class SplitScores(NamedTuple):
    """What a run through the split has found so far."""

    numbers: Numbers | None
    iou: dict[int, float]  # image -> its mean IoU
    skipped: tuple[str, ...]  # images without mask, or that cannot be read
    done: int
    total: int


class SplitScoring:
    """Scores every image of the split with some settings, in a thread. `stop()` ends it; what it found stays.

    `give_way()` is called between pieces of work and may wait: whoever moves a slider comes first.
    """

    def __init__(
        self,
        subject: Subject,
        pictures: Pictures,
        settings: Settings,
        joint: Joint,
        on_progress: Callable[[SplitScores], None],
        *,
        give_way: Callable[[], None] = lambda: None,
    ):
        self.result = SplitScores(None, {}, (), 0, pictures.n_listed)
        self.error: Exception | None = None
        self._task = (subject, pictures, settings, joint)
        self._on_progress, self._give_way = on_progress, give_way
        self._stopped = threading.Event()
        self.thread = threading.Thread(target=self._run, name="scoring the split", daemon=True)

    def start(self) -> "SplitScoring":
        atexit.register(self._end)  # a pass through the encoder must not outlive the interpreter
        self.thread.start()
        return self

    def stop(self) -> None:
        """End after the image at hand; returns at once."""
        self._stopped.set()

    def _end(self) -> None:
        self.stop()
        self.thread.join()

    @property
    def over(self) -> bool:
        """Whether no further image will be begun."""
        return self._stopped.is_set()

    @property
    def running(self) -> bool:
        return self.thread.is_alive()

    def _run(self) -> None:
        subject, pictures, settings, joint = self._task
        total, iou, skipped = OpenCounts(len(joint.names) - 1), {}, []
        told = time.monotonic()
        try:
            for index in range(pictures.n_listed):
                if self._stopped.is_set():
                    break
                self._give_way()
                try:
                    one = self._one(subject, pictures, settings, joint, index)
                except ToCoError as error:
                    skipped.append(f"{pictures.names[index]}: {error}")
                else:
                    total.counts = total.counts + one.counts
                    iou[index] = one.decided_scores().miou
                found = numbers(total, len(iou)) if iou else None
                self.result = SplitScores(found, dict(iou), tuple(skipped), index + 1, pictures.n_listed)
                if time.monotonic() - told > 0.2:
                    told = time.monotonic()
                    self._on_progress(self.result)
        except Exception as error:  # noqa: BLE001  a thread's error is shown by whoever started it
            self.error = error
        finally:
            self._stopped.set()
            atexit.unregister(self._end)
            try:
                self._on_progress(self.result)
            except Exception as error:  # noqa: BLE001  who cannot hear of it finds it here
                self.error = self.error or error

    def _one(self, subject, pictures, settings, joint, index):
        picture = pictures.picture(index)
        if picture.mask is None:
            raise ToCoError("no mask")
        analysis = Analysis(subject, picture.image)
        self._give_way()
        classes, _ = chosen_classes(analysis, settings, picture.labels, joint)
        label = joint.of_model[analysis.label(settings, classes)]
        return count(label, picture.mask, joint.names)
