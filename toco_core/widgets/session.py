"""What the explorer knows and can do, without a browser: images, models, one or two sides, and what each shows.

    session = Session(pictures, subjects)
    session.go("val_00003")
    session.set(show="seed label", beta_h=0.5)
    view = session.view(0)            # a picture, a label, its numbers, and notes in words

A wrong value raises ToCoError and leaves everything as it was.
"""

from collections import OrderedDict
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from toco_core.data.files import palette_png
from toco_core.errors import ToCoError
from toco_core.machine.writing import write_file
from toco_core.widgets import draw, recall
from toco_core.widgets.analysis import Analysis, Crop
from toco_core.widgets.pictures import Picture, Pictures
from toco_core.widgets.scoring import Joint, Numbers, chosen_classes, count, joint_classes, numbers
from toco_core.widgets.settings import (
    ARRANGEMENTS,
    LABEL_FIELDS,
    LABELS,
    MAP_FIELDS,
    SHOWN,
    VIEWS,
    Settings,
    changed,
    fields_seen,
    papermill_line,
    settings_of,
    showing,
    within,
)
from toco_core.widgets.subjects import CLASSIFIER, DECODER, Subject, Subjects
from toco_core.widgets.why import Reasons, reasons

KEPT = 16  # images whose passes are kept
PLACES = 4  # decimals of a place in the image: less than a tenth of a pixel, and what a line of parameters can hold

SHARED = ("image", "ground truth")  # views that both sides have in common
LABELS_KEPT = 12  # label maps of both sides and their numbers

# parameters of `restore`, beside settings
RESTORED = ("image", "patch", "crop_places", "compare", "other", "linked", "views", "arrange", "curtain")


@dataclass(frozen=True)
class SideChoice:
    """One of the two pictures: which model, and which settings."""

    subject: str
    settings: Settings


class Tile(NamedTuple):
    """One picture of those that are seen together."""

    side: int
    show: str  # one of `SHOWN`


class View(NamedTuple):
    """What one side shows."""

    picture: np.ndarray  # uint8 RGB
    label: np.ndarray | None  # uint8 H W at native size, in the numbers of `Session.joint`
    numbers: Numbers | None  # of the label against ground truth
    notes: tuple[str, ...]  # what cannot be shown, and why


class TokenView(NamedTuple):
    """One patch compared with all others, and where the class token looks."""

    similarity: np.ndarray  # h w
    by_block: np.ndarray  # mean over the other patches, one number per block
    attention: np.ndarray  # heads h w, in multiples of an even spread
    patch: int


class Session:
    """See the module. `sides` holds one side, or two while comparing; `active` is the one that `set` changes."""

    def __init__(self, pictures: Pictures, subjects: Subjects, *, first: str | None = None):
        self.pictures, self.subjects = pictures, subjects
        self.first = first or subjects.names[0]
        subject = subjects.get(self.first)
        self.sides: list[SideChoice] = [SideChoice(self.first, settings_of(subject.config, subject.model.depth))]
        self.active, self.linked = 0, True
        self.views: tuple[str, ...] = VIEWS
        self.arrange = ARRANGEMENTS[0]
        self.curtain: tuple[str, str] = ("", "")  # names of two tiles; empty: the first image, and what is shown
        self.index, self.picture = -1, None
        self.place: tuple[float, float] | None = None  # of the patch that was clicked, fractions of the image
        self.centres: list[tuple[float, float]] = []  # of local views
        self._analyses: OrderedDict[tuple[str, int], Analysis] = OrderedDict()
        self._decoded: OrderedDict[int, Picture] = OrderedDict()
        self._shown: tuple | None = None
        self._colourings: dict[int, tuple] = {}
        self._labels: OrderedDict[tuple, tuple[np.ndarray, Numbers | None]] = OrderedDict()
        self._go_to_first_readable()

    # ---- changes

    def go(self, index: int | str) -> None:
        """Another image, by number or name. Raises ToCoError, and stays, where it cannot be read."""
        index = self.pictures.index_of(index) if isinstance(index, str) else index % len(self.pictures)
        if index not in self._decoded:
            self._decoded[index] = self.pictures.picture(index)
            if len(self._decoded) > KEPT:
                self._decoded.popitem(last=False)
        self.index, self.picture, self.centres = index, self._decoded[index], []

    def bring(self, name: str, data: bytes) -> None:
        """Go to a photograph of the reader's, given as the bytes of a file. Raises ToCoError for what is no image."""
        self.go(self.pictures.bring(name, data))

    def show_pictures(self, pictures: Pictures) -> None:
        """Another data set, whose first readable image is shown; the photographs that were brought stay. Raises
        ToCoError, and leaves all as it was, where none can be read."""
        before = self.pictures, self.index, self.picture, self._decoded
        try:
            pictures.adopt(self.pictures)
            self.pictures, self._decoded = pictures, OrderedDict()
            self._go_to_first_readable()
        except ToCoError:
            self.pictures, self.index, self.picture, self._decoded = before
            raise
        for kept in (self._analyses, self._labels, self._colourings):
            kept.clear()
        self.place = None

    def set(self, **values: Any) -> None:
        """Change settings of the active side; while `linked`, of both, each from its own values."""
        targets = range(len(self.sides)) if self.linked else [self.active]
        sides = list(self.sides)
        for i in targets:
            settings = changed(sides[i].settings, **values)
            depth = self.subjects.get(sides[i].subject).model.depth
            if settings.block > depth:
                raise ToCoError(f"block = {settings.block} is not allowed: {sides[i].subject} has blocks 1..{depth}")
            sides[i] = replace(sides[i], settings=settings)
        self.sides = sides

    def use(self, name: str, *, side: int | None = None) -> None:
        """Another model on a side (the active one). Settings stay, except that blocks beyond its depth come down."""
        side = self.active if side is None else side
        subject = self.subjects.get(name)
        settings = within(self.sides[side].settings, subject.model.depth)
        self.sides[side] = SideChoice(name, replace(settings, cam="final") if subject.head else settings)

    def compare(self, on: bool) -> None:
        """Two sides, the second one a copy at first; or one. A curtain keeps its tiles, or begins anew without them."""
        named = self._named_tiles()
        divided = [named[name] for name in self.curtain if name in named]
        if on and len(self.sides) == 1:
            self.sides.append(self.sides[0])
        elif not on:
            del self.sides[1:]
            self.active = 0
        stay = len(divided) == 2 and all(tile.side < len(self.sides) for tile in divided)
        self.curtain = (self.tile_name(divided[0]), self.tile_name(divided[1])) if stay else ("", "")

    def arrange_views(self, arrange: Any = None, *, views: Any = None, curtain: Any = None) -> None:
        """Choose how pictures are arranged (`ARRANGEMENTS`), which are side by side (of `SHOWN`), and the two names of
        tiles that a curtain divides; texts are names separated by commas. Raises ToCoError for others."""
        arrange = self.arrange if arrange is None else arrange
        if arrange not in ARRANGEMENTS:
            raise ToCoError(f"arrange = {arrange!r:.60} is not allowed: one of {', '.join(ARRANGEMENTS)}")
        chosen = self.views if views is None else _names(views)
        unknown = [view for view in chosen if view not in SHOWN]
        if unknown or not chosen:
            raise ToCoError(f"views = {views!r:.90} is not allowed: some of {', '.join(SHOWN)}")
        pair, known = self.curtain if curtain is None else _names(curtain), ("", *self.tile_names())
        if curtain is not None and (len(pair) != 2 or any(name not in known for name in pair)):
            raise ToCoError(f"curtain = {curtain!r:.90} is not allowed: two of {', '.join(known[1:])}")
        self.arrange, self.curtain = arrange, (pair[0], pair[1])
        self.views = tuple(view for view in SHOWN if view in chosen)

    def click(self, y: float, x: float) -> None:
        """Choose the patch at a place, in fractions of the image."""
        self.place = _checked_place(y, x)

    def place_crop(self, y: float, x: float) -> None:
        """Add a local view around a place."""
        self.centres = [*self.centres, _checked_place(y, x)]

    def sample_crops(self) -> None:
        """Local views drawn as in training, instead of those that are there."""
        side = self.sides[self.active]
        classes, _ = self.classes(self.active)
        self.centres = []
        for place in self.analysis(self.active).sampled(side.settings, classes):
            self.place_crop(*place)

    def clear_crops(self) -> None:
        self.centres = []

    def snapshot(self, side: int) -> "Session":
        """One side with the image at hand, for a thread of its own: neither session moves the other. Of what was worked
        out it shares the passes of this image; nothing is marked in it."""
        still, key = copy(self), (self.sides[side].subject, self.index)
        still.sides, still.active, still.place, still.centres = [self.sides[side]], 0, None, []
        still._analyses = OrderedDict((k, found) for k, found in self._analyses.items() if k == key)
        still._decoded = OrderedDict({self.index: self.picture})
        still._labels, still._colourings = OrderedDict(), {}
        return still

    # ---- what is seen

    def subject(self, side: int) -> Subject:
        return self.subjects.get(self.sides[side].subject)

    def start(self, side: int) -> Settings:
        """The settings with which a session of this side's model begins."""
        subject = self.subject(side)
        return settings_of(subject.config, subject.model.depth)

    def spec(self, side: int) -> str:
        """The parameter that opens the model of a side."""
        return self.subject(side).spec or self.sides[side].subject

    def joint(self, side: int) -> Joint:
        """The classes of data set and model together."""
        ranked = self.subject(side).head is not None  # per image
        names = self.analysis(side).class_names if ranked else self.subject(side).class_names
        return joint_classes(self.pictures.class_names, names)

    def analysis(self, side: int) -> Analysis:
        """Image and model of a side; the passes of the last `KEPT` are kept."""
        key = (self.sides[side].subject, self.index)
        if key not in self._analyses:
            self._analyses[key] = Analysis(self.subject(side), self.picture.image)
            if len(self._analyses) > KEPT:
                self._analyses.popitem(last=False)
        self._analyses.move_to_end(key)
        return self._analyses[key]

    def classes(self, side: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """The model's classes that are shown, and notes about those that cannot be."""
        return chosen_classes(self.analysis(side), self.sides[side].settings, self.picture.labels, self.joint(side))

    def class_scores(self, side: int) -> dict[int, float]:
        """Place in `joint` -> the classifier's probability; empty where none was trained."""
        if CLASSIFIER not in self.subject(side).has:
            return {}
        of_model, scores = self.joint(side).of_model, self.analysis(side).class_scores
        return {int(of_model[k]): float(score) for k, score in enumerate(scores, 1)}

    def settings(self, side: int, show: str | None = None) -> Settings:
        """Those of a side, as they are or with another `show`."""
        settings = self.sides[side].settings
        return settings if show in (None, settings.show) else showing(settings, show)

    def label(self, side: int, show: str | None = None) -> np.ndarray:
        """The label map of a side, uint8 at native size, in the numbers of `joint`; `show` None: what the side shows.

        That of an image and of a CAM is the CAM's label. Raises ToCoError where there is none.
        """
        return self._label_and_numbers(side, show)[0]

    def numbers(self, side: int, show: str | None = None) -> Numbers | None:
        """Scores of `label`; None without ground truth, and for ground truth itself."""
        return self._label_and_numbers(side, show)[1]

    def tiles(self) -> list[Tile]:
        """What is seen: of each side what it shows, or for each view one of each side; those of `SHARED` once, and no
        ground truth where the image has none."""
        sides = range(len(self.sides))
        shown = [side.settings.show for side in self.sides]
        if self.arrange == "one":
            return [Tile(i, shown[i]) for i in sides]
        has = [view for view in SHOWN if self.picture.mask is not None or view != "ground truth" or view in shown]
        wanted = [view for view in has if view in self.views or view in shown]
        return [Tile(i, view) for view in wanted for i in sides if i == 0 or view not in SHARED]

    def tile_names(self) -> list[str]:
        """Names of all tiles that there could be: those of a curtain."""
        return list(self._named_tiles())

    def tile_name(self, tile: Tile) -> str:
        """The view; with a side's letter where two have it."""
        two = len(self.sides) == 2 and tile.show not in SHARED
        return f"{'AB'[tile.side]}: {tile.show}" if two else tile.show

    def look(self, tile: Tile) -> tuple:
        """All that a tile's picture depends on but its overlay's strength: where it is the same, so is the picture."""
        settings = self.settings(tile.side, tile.show)
        names = tuple(name for name in fields_seen(settings) if name != "strength")
        if self.centres:
            names = tuple(dict.fromkeys((*names, *MAP_FIELDS, "beta_l", "beta_h", "crop_size")))
        classes = () if tile.show in SHARED and not self.centres else self.classes(tile.side)
        what = (self.sides[tile.side].subject, self.index, tile.show, settings.outline, classes)
        return (*what, self.place, tuple(self.centres), *((name, getattr(settings, name)) for name in names))

    def strength(self, tile: Tile) -> float | None:
        """How strong a tile's overlay is; None for a picture without one."""
        settings = self.settings(tile.side, tile.show)
        return settings.strength if "strength" in fields_seen(settings) else None

    def curtain_tiles(self) -> tuple[Tile, Tile]:
        """The two tiles that a curtain divides: by name, else the two sides, else the image and what is shown."""
        named, show = self._named_tiles(), self.sides[0].settings.show
        first = Tile(0, show) if len(self.sides) == 2 else Tile(0, "image")
        last = Tile(len(self.sides) - 1, self.sides[-1].settings.show)
        if first == last:
            last = Tile(0, "CAM")
        return named.get(self.curtain[0], first), named.get(self.curtain[1], last)

    def view(self, side: int, show: str | None = None, *, strength: float | None = None) -> View:
        """Picture, label and numbers of a side, as it is or with another `show` or strength of the overlay. What cannot
        be had is left out and noted; nothing is raised for it."""
        settings, notes = self.settings(side, show), list(self.picture.notes)
        settings = settings if strength is None else replace(settings, strength=strength)
        base, ground = self._base()
        size = base.shape[:2]
        picture, label, found = base, None, None
        try:
            if settings.show not in SHARED or show is None:
                notes += self.classes(side)[1]
            if settings.show in LABELS or show is None:  # of a tile without a label nothing is scored
                label, found = self._label_and_numbers(side, show)
            if settings.show == "CAM":
                picture = self._cam_picture(side, settings, ground)
            elif settings.show in LABELS:
                shown = draw.resized(label, size)
                picture = draw.label_picture(base, shown, strength=settings.strength)
                picture = draw.with_regions(picture, shown) if settings.contours else picture
        except ToCoError as error:
            notes.append(str(error))
        if settings.outline and self.picture.mask is not None:
            picture = draw.with_regions(picture, draw.resized(self.picture.mask, size))
        crops, more = self.crops(side)
        notes += more
        if crops:
            picture = draw.with_crops(picture, crops)
        if self.place is not None:
            analysis = self.analysis(side)
            picture = draw.with_patch(picture, analysis.grid, analysis.patch_at(*self.place))
        return View(picture, label, found, tuple(dict.fromkeys(notes)))

    def crops(self, side: int) -> tuple[list[Crop], tuple[str, ...]]:
        """The local views as a side's model judges them, or why it cannot."""
        if not self.centres:
            return [], ()
        try:
            classes, _ = self.classes(side)
            return self.analysis(side).crops(self.sides[side].settings, classes, self.centres), ()
        except ToCoError as error:
            return [], (str(error),)

    def tokens(self, side: int) -> TokenView:
        """The clicked patch (the middle of the image where none was) among the others, and attention."""
        analysis, settings = self.analysis(side), self.sides[side].settings
        patch = analysis.patch_at(*(self.place or (0.5, 0.5)))
        return TokenView(
            analysis.similarity(settings.block, patch),
            analysis.similarity_by_block(patch),
            analysis.attention(settings.block),
            patch,
        )

    def why(self, side: int) -> Reasons | None:
        """What is known about the pixel that was clicked; None where none was."""
        if self.place is None:
            return None
        settings, (classes, _) = self.sides[side].settings, self.classes(side)
        return reasons(self.analysis(side), settings, classes, self.joint(side), self.place)

    def read_out(self, side: int, y: float, x: float) -> str:
        """In words: what is at a place, in fractions of the image."""
        H, W = self.picture.image.shape[:2]
        row, column = min(int(y * H), H - 1), min(int(x * W), W - 1)
        settings, joint = self.sides[side].settings, self.joint(side)
        words = [f"row {row}, column {column}"]
        try:
            analysis = self.analysis(side)
            classes, _ = self.classes(side)
            for k in classes[:6]:
                cam = analysis.cam(settings, k)
                h, w = cam.shape
                value = float(cam[min(int(y * h), h - 1), min(int(x * w), w - 1)])
                words.append(f"{joint.names[joint.of_model[k]]} {value:.2f}")
            if settings.show in LABELS and not (settings.show == "segmentation" and self.crf_pending(side)):
                words.append(f"{settings.show}: {self.class_word(side, int(self.label(side)[row, column]))}")
        except ToCoError:
            pass
        if self.picture.mask is not None:
            words.append(f"truth: {self.class_word(side, int(self.picture.mask[row, column]))}")
        return " · ".join(words)

    def crf_pending(self, side: int) -> bool:
        """Whether a side's segmentation would need a dense CRF, which takes seconds, that is not there yet."""
        wanted = self.sides[side].settings.crf and DECODER in self.subject(side).has
        return wanted and not self.analysis(side).has_crf()

    def class_word(self, side: int, place: int) -> str:
        names = self.joint(side).names
        return names[place] if place < len(names) else "uncertain" if place == 255 else f"value {place}"

    # ---- taking something along

    def parameters(self) -> dict[str, Any]:
        """The notebook's parameters that lead here: `restore` of a new session takes them. Settings that a session of
        this model begins with are left out."""
        return recall.parameters(self)

    def restore(self, values: Mapping[str, Any]) -> None:
        """Go where parameters lead, see `recall.restore`. Raises ToCoError for a wrong value."""
        recall.restore(self, values)

    def papermill_line(self, notebook: str = "notebooks/explore.ipynb", **others: Any) -> str:
        """The command that shows this again; `others` are parameters that the session does not know (dataset, ...)."""
        return papermill_line(notebook, {**others, **self.parameters()})

    def save_label(self, path: str | Path, *, side: int = 0) -> Path:
        """Write the label of a side as a PNG with VOC's palette. Raises ToCoError where there is none."""
        return write_file(path, palette_png(self.label(side)))

    def describe(self) -> str:
        """The state and its numbers in lines that are the same on every machine."""
        return recall.describe(self)

    # ---- within

    def _named_tiles(self) -> dict[str, Tile]:
        sides = range(len(self.sides))
        tiles = [Tile(i, view) for view in SHOWN for i in sides if i == 0 or view not in SHARED]
        return {self.tile_name(tile): tile for tile in tiles}

    def _label_and_numbers(self, side: int, show: str | None) -> tuple[np.ndarray, Numbers | None]:
        """Of the last few settings they are kept: the numbers, the picture and the read-out ask for the same label."""
        settings, mask = self.settings(side, show), self.picture.mask
        if settings.show == "ground truth":
            if mask is None:
                raise ToCoError(f"{self.picture.name} has no ground truth")
            return mask, None
        classes, _ = self.classes(side)
        made_by = LABEL_FIELDS["CAM label" if settings.show in ("image", "CAM") else settings.show]
        key = (self.sides[side].subject, self.index, classes, made_by, *(getattr(settings, name) for name in made_by))
        if key not in self._labels:
            joint = self.joint(side)
            label = joint.of_model[self.analysis(side).label(settings, classes)]
            found = None if mask is None else numbers(count(label, mask, joint.names))
            self._labels[key] = label, found
            if len(self._labels) > LABELS_KEPT:
                self._labels.popitem(last=False)
        self._labels.move_to_end(key)
        return self._labels[key]

    def _cam_picture(self, side: int, settings: Settings, ground: np.ndarray) -> np.ndarray:
        several = settings.class_colours and len(self.classes(side)[0]) > 1
        value, colours = self._colouring(side, settings, ground.shape[:2], several=several)
        if several:
            picture = draw.classes_picture(ground, colours, value, strength=settings.strength)
        else:
            picture = draw.cam_picture(ground, value, strength=settings.strength)
        if settings.contours:
            picture = draw.with_levels(picture, value, (settings.beta_l, settings.beta_h))
        return picture

    def _colouring(self, side: int, settings: Settings, size: tuple[int, int], *, several: bool) -> tuple:
        """The strongest CAM at `size` and, for several classes, their colours; kept while only thresholds move."""
        analysis, (classes, _) = self.analysis(side), self.classes(side)
        key = (self.sides[side].subject, self.index, classes, several, *(getattr(settings, n) for n in MAP_FIELDS))
        if self._colourings.get(side, (None,))[0] != key:
            if several:
                places = [int(self.joint(side).of_model[k]) for k in classes]
                cams = analysis.cams(settings, classes)[0].cpu().numpy()
                colours, value = draw.class_colouring([draw.resized(cam, size, smooth=True) for cam in cams], places)
            else:
                colours, value = None, analysis.strongest(settings, classes).value
                value = draw.resized(value, size, smooth=True)
            self._colourings[side] = key, (value, colours)
        return self._colourings[side][1]

    def _base(self) -> tuple[np.ndarray, np.ndarray]:
        """The image at the size at which it is shown, and the same with less colour; kept for the image at hand."""
        if self._shown is None or self._shown[0] is not self.picture:
            base = draw.enlarged(self.picture.image, draw.shown_size(self.picture.image.shape[:2]))
            self._shown = (self.picture, base, draw.ground(base))
        return self._shown[1:]

    def _go_to_first_readable(self) -> None:
        problem = None
        for index in range(len(self.pictures)):
            try:
                return self.go(index)
            except ToCoError as error:
                problem = error
        raise ToCoError(f"no image of {self.pictures.title} can be read: {problem}")


def _names(given: Any) -> tuple:
    if isinstance(given, str):
        return tuple(name.strip() for name in given.split(","))
    return tuple(given) if isinstance(given, (list, tuple)) else (given,)


def _checked_place(y: float, x: float) -> tuple[float, float]:
    if not (0 <= y <= 1 and 0 <= x <= 1):
        raise ToCoError(f"place ({y:g}, {x:g}) is outside the image: 0 to 1 is allowed")
    return round(float(y), PLACES), round(float(x), PLACES)
