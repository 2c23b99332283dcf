"""Label maps of many images and what is wrong with each, worked out in a thread while a widget goes on answering.

A `LabelSurvey` is one model with some settings over the images of a split. `Surveying` is the thread: what is on the
screen comes first, the rest when it is asked for. What has been found stays, so that going back costs nothing; of an
image some kilobytes are kept.
"""

import atexit
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8

from toco_core.analysis.errors import PixelErrors, error_kinds, pixel_errors
from toco_core.conventions import IGNORE, classes_in
from toco_core.errors import ToCoError
from toco_core.widgets.analysis import Analysis
from toco_core.widgets.pictures import Pictures
from toco_core.widgets.scoring import chosen_classes, count, joint_classes
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import Subject

SIDE = 132  # longer side of a thumbnail, pixels


class Surveyed(NamedTuple):
    """One image under one model: a label map and its errors; small pictures are at the size of a thumbnail."""

    image: bytes
    """JPEG."""
    label: bytes
    """PNG at native size, numbers of `names`."""
    small_label: bytes
    small_mask: bytes | None
    small_kinds: bytes | None
    """Of `error_kinds`."""
    iou: float
    """Mean IoU over the decided pixels, as the explorer scores; NaN without a mask."""
    errors: PixelErrors | None
    names: tuple[str, ...] = ()
    """The classes of data set and model in one list; an ImageNet head has others for each image."""
    classes: tuple[str, ...] = ()
    """Those that the label map holds, without background."""
    problem: str = ""
    """Why there is no label."""


class LabelSurvey:
    """What one model's labels look like on the images of a split: `found` has those that were worked out."""

    def __init__(self, pictures: Pictures, subject: Subject, settings: Settings):
        self.pictures, self.subject, self.settings = pictures, subject, settings
        own = ("background",) if subject.head else subject.class_names  # a head's are known per image
        self.class_names = joint_classes(pictures.class_names, own).names
        self.found: dict[int, Surveyed] = {}

    def look(self, index: int) -> Surveyed:
        """Work out an image, once. What goes wrong with it is its `problem`."""
        if index not in self.found:
            try:
                self.found[index] = self._made(index)
            except ToCoError as error:
                self.found[index] = Surveyed(b"", b"", b"", None, None, np.nan, None, problem=str(error))
        return self.found[index]

    def label(self, index: int) -> UInt8[np.ndarray, "H W"] | None:
        """The label map at native size of an image that was worked out; None where it has none."""
        found = self.found.get(index)
        return unpacked(found.label) if found and found.label else None

    def _made(self, index: int) -> Surveyed:
        picture = self.pictures.picture(index)
        image, mask = picture.image, picture.mask
        scale = min(1.0, SIDE / max(image.shape[:2]))
        size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
        small = cv2.imencode(".jpg", cv2.resize(image, size, interpolation=cv2.INTER_AREA)[..., ::-1])[1].tobytes()
        analysis = Analysis(self.subject, image)
        joint = joint_classes(self.pictures.class_names, analysis.class_names)
        classes, _ = chosen_classes(analysis, self.settings, picture.labels, joint)
        label = joint.of_model[analysis.label(self.settings, classes)]
        seen = tuple(joint.names[k] for k in classes_in(label) if k < len(joint.names))
        parts = packed(label), _small(label, size), None, None
        found = Surveyed(small, *parts, np.nan, None, joint.names, seen)
        if mask is None:
            return found
        return found._replace(
            small_mask=_small(mask, size),
            small_kinds=_small(error_kinds(label, mask), size),
            iou=count(label, mask, joint.names).decided_scores().miou,
            errors=pixel_errors(label, mask),
        )


def disagreement(one: LabelSurvey, other: LabelSurvey, index: int) -> float:
    """Share of the pixels that both label maps decide which they name differently; NaN where one is missing.

    Classes are compared by name.
    """
    labels = one.label(index), other.label(index)
    if labels[0] is None or labels[1] is None:
        return np.nan
    table = np.full(256, IGNORE - 1, np.uint8)  # a class that only the other model knows: never equal
    names = one.found[index].names
    for k, name in enumerate(other.found[index].names):
        if name in names:
            table[k] = names.index(name)
    table[IGNORE] = IGNORE
    first, second = labels[0], table[labels[1]]
    decided = (first != IGNORE) & (second != IGNORE)
    return float(((first != second) & decided).sum() / max(int(decided.sum()), 1)) if decided.any() else np.nan


class Surveying:
    """The thread. `want` names what comes first, `all` whether the rest follows; it ends when nothing is left to do.

    `tell()` is called now and then, and when it ends. `give_way()` is called before each image and may wait.
    """

    def __init__(self, tell: Callable[[], None], *, give_way: Callable[[], None] = lambda: None):
        self.error: Exception | None = None
        self._tell, self._give_way = tell, give_way
        self._lock = threading.Lock()
        self._first: list[tuple[LabelSurvey, int]] = []
        self._surveys: tuple[LabelSurvey, ...] = ()
        self._all = self._active = False
        self.thread: threading.Thread | None = None

    @property
    def running(self) -> bool:
        """Whether the thread is at work, beyond what is on the screen too."""
        return self._active and self._all

    def want(self, surveys: Sequence[LabelSurvey], indices: Sequence[int]) -> None:
        """Put these images before all others; what was asked for of other surveys is dropped."""
        self._surveys = tuple(surveys)
        self._first = [(survey, index) for index in indices for survey in surveys]
        self._start()

    def all(self) -> None:
        """Go on with every image."""
        self._all = True
        self._start()

    def stop(self) -> None:
        """End after the image at hand; returns at once."""
        self._all, self._first = False, []

    def settle(self, timeout: float = 60.0) -> None:
        """Wait until nothing is left to do."""
        if self.thread:
            self.thread.join(timeout)

    def _start(self) -> None:
        with self._lock:
            if self._active or self._next() is None:
                return
            self._active, self.error = True, None
            self.thread = threading.Thread(target=self._run, name="surveying the split", daemon=True)
        atexit.register(self._end)  # a pass through the encoder must not outlive the interpreter
        self.thread.start()

    def _end(self) -> None:
        self.stop()
        self.thread.join()

    def _next(self) -> tuple[LabelSurvey, int] | None:
        for survey, index in self._first:
            if index not in survey.found:
                return survey, index
        if self._all:
            for survey in self._surveys:
                if len(survey.found) < len(survey.pictures):
                    return survey, next(i for i in range(len(survey.pictures)) if i not in survey.found)
        return None

    def _run(self) -> None:
        told = time.monotonic()
        try:
            while True:
                with self._lock:
                    task = self._next()
                    if task is None:
                        self._active = self._all = False
                        break
                self._give_way()
                task[0].look(task[1])
                if time.monotonic() - told > 0.3:
                    self._tell()
                    told = time.monotonic()
        except Exception as error:  # noqa: BLE001  a thread's error is shown by whoever started it
            self.error = error
            self._active = self._all = False
        finally:
            atexit.unregister(self._end)
            self._tell()


def packed(label: UInt8[np.ndarray, "H W"]) -> bytes:
    """The bytes of a PNG."""
    return cv2.imencode(".png", label)[1].tobytes()


def unpacked(data: bytes) -> UInt8[np.ndarray, "H W"]:
    """The label map in a PNG of `packed`."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def _small(values: np.ndarray, size: tuple[int, int]) -> bytes:
    return packed(cv2.resize(values, size, interpolation=cv2.INTER_NEAREST_EXACT))
