"""A gallery of a split: thumbnails with label overlays, sorted and filtered by what is right and wrong with the labels.

    Gallery(session, on_open=explorer.go)

Nothing is worked out but the page on the screen, until an order or a filter needs every image; that runs in a thread,
with a bar, and can be stopped. Kinds of errors are those of `analysis.errors`.
"""

import base64
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import cv2
import ipywidgets as w
import numpy as np

from toco_core.analysis.errors import KINDS, PixelErrors, total_errors
from toco_core.errors import ToCoError, in_a_line
from toco_core.widgets import draw
from toco_core.widgets.canvas import Thumbnails
from toco_core.widgets.markup import Markup, Panel, element, joined
from toco_core.widgets.session import Session
from toco_core.widgets.survey import LabelSurvey, Surveyed, Surveying, disagreement, unpacked

PER_PAGE = 18
LABELS = ("CAM label", "seed label", "pseudo label", "vote", "segmentation")
ORDERS = ("list order", "lowest IoU first", "highest IoU first", "by class", "most disagreement first")
ANY_KIND, ANY_CLASS, NO_MODEL = "any errors", "any class", "no second model"
OVERLAYS = ("label", "errors", "ground truth", "second model's label", "image only")
KIND_COLOURS = ((0, 114, 178), (230, 159, 0), (200, 30, 30), (204, 121, 167))  # in the order of KINDS
SMALLEST = 10  # images that are worked out without a bar


class Gallery(w.VBox):
    """The images of a session's split, judged with the settings of its first side.

    `on_open(index)` is called with the image that was clicked; by default the session goes there. Everything is a
    widget's value, so setting it from Python does as a click does; `settle` waits for the thread.
    """

    def __init__(
        self,
        session: Session,
        *,
        on_open: Callable[[int], Any] | None = None,
        give_way: Callable[[], None] = lambda: None,
        per_page: int = PER_PAGE,
    ):
        super().__init__()
        self.session, self.on_open, self.per_page = session, on_open or session.go, per_page
        self.pictures = session.pictures
        self.problem, self.page, self.order = "", 0, list(range(len(self.pictures)))
        self._filling = False  # a list is being brought up to date
        self.surveying, self._drawing = Surveying(self._told, give_way=give_way), threading.RLock()
        self._surveys: dict[tuple, LabelSurvey] = {}
        self._differing: dict[tuple, float] = {}
        self._thumbnails: dict[tuple, str] = {}
        show = session.sides[0].settings.show
        options = {"layout": w.Layout(width="250px"), "style": {"description_width": "64px"}}
        self.label = w.Dropdown(
            options=LABELS, value=show if show in LABELS else "pseudo label", description="label", **options
        )
        self.overlay = w.Dropdown(options=OVERLAYS, description="overlay", **options)
        self.other = w.Dropdown(options=[NO_MODEL, *session.subjects.names], description="against", **options)
        self.sort = w.Dropdown(options=ORDERS, description="order", **options)
        self.kind = w.Dropdown(options=[ANY_KIND, *KINDS], description="mostly", **options)
        self.of_class = w.Dropdown(options=[ANY_CLASS], description="class", **options)
        self.back, self.forth = (
            w.Button(description=word, tooltip=tip, layout=w.Layout(width="auto"))
            for word, tip in (("‹", "previous page"), ("›", "next page"))
        )
        self.measure = w.Button(
            description="judge all images", tooltip="work out every image's label", layout=w.Layout(width="auto")
        )
        self.stop = w.Button(description="stop", tooltip="keep what was found", layout=w.Layout(width="auto"))
        self.renew = w.Button(
            description="use the settings above",
            tooltip="thresholds, blocks and classes as they are in the explorer now",
            layout=w.Layout(width="auto"),
        )
        self.progress = w.IntProgress(layout=w.Layout(width="160px"))
        self.grid = Thumbnails(captions=True, label="gallery of the split")
        self.position, self.notes, self.summary = Panel(), Panel(), Panel()
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        self.children = [
            w.HBox([self.label, self.overlay, self.other], layout=wrap),
            w.HBox([self.sort, self.of_class, self.kind], layout=wrap),
            w.HBox(
                [self.back, self.forth, self.position, self.measure, self.stop, self.progress, self.renew], layout=wrap
            ),
            self.notes,
            self.grid,
            self.summary,
        ]
        self.add_class("toco-explorer")
        for widget, action in (
            (self.label, self._judge_anew),
            (self.other, self._judge_anew),
            (self.overlay, self._show),
            (self.sort, self._arrange_anew),
            (self.kind, self._arrange_anew),
            (self.of_class, self._arrange_anew),
        ):
            widget.observe(lambda _, action=action: self._do(action), "value")
        for button, action in (
            (self.back, lambda: self._turn_page(-1)),
            (self.forth, lambda: self._turn_page(1)),
            (self.measure, self._judge_all),
            (self.stop, self._stop),
            (self.renew, self._use_settings),
        ):
            button.on_click(lambda _, action=action: self._do(action))
        self.grid.observe(lambda change: self._do(lambda: self.open_image(change["new"][0])), "wanted")
        self._use_settings()

    # ---- for Python

    def open_image(self, index: int) -> None:
        """As a click on a thumbnail does. Raises ToCoError where the image cannot be read."""
        if self.session.pictures is not self.pictures:
            raise ToCoError("the explorer shows other images by now: `use the settings above` shows those")
        self.on_open(index)
        self.grid.chosen = index

    def settle(self, timeout: float = 60.0) -> None:
        """Wait for what is worked out in the background."""
        self.surveying.settle(timeout)

    @property
    def survey(self) -> LabelSurvey:
        """What is known of the images now."""
        return self._survey_of(self.subject)

    @property
    def against(self) -> LabelSurvey | None:
        """The second model's survey; None without one."""
        return None if self.other.value == NO_MODEL else self._survey_of(self.other.value)

    def errors(self) -> PixelErrors:
        """The wrong pixels of all images that were judged so far, by kind."""
        return total_errors([found.errors for found in dict(self.survey.found).values() if found.errors])

    def __repr__(self) -> str:
        found, errors = self.survey, self.errors()
        shares = ", ".join(f"{kind} {100 * share:.0f} %" for kind, share in zip(KINDS, errors.shares, strict=True))
        return f"Gallery({found.subject.name}, {self.label.value}: {len(found.found)} of {len(self.order)}; {shares})"

    # ---- what the controls do

    def _do(self, action: Callable[[], None]) -> None:
        """Run an action of the reader's; what goes wrong is told in the widget."""
        if self._filling:
            return
        try:
            self.problem = ""
            action()
        except Exception as error:  # noqa: BLE001  a traceback in a log that nobody reads helps nobody
            self.problem = in_a_line(error)
        self._show_notes()

    def _use_settings(self) -> None:
        """Judge with the model and settings that the session's first side has now."""
        side, models = self.session.sides[0], (NO_MODEL, *self.session.subjects.names)
        if self.session.pictures is not self.pictures:
            self.surveying.stop()
            self.pictures = self.session.pictures
            for kept in (self._surveys, self._differing, self._thumbnails):
                kept.clear()
        if self.other.options != models:
            self._filling, before = True, self.other.value
            self.other.options = models
            self.other.value, self._filling = before, False
        self.subject, self.settings = side.subject, replace(side.settings, show="pseudo label")
        self.grid.chosen = self.session.index
        names = self._survey_of(self.subject).class_names[1:]
        self.of_class.options = [ANY_CLASS, *names]
        self._judge_anew()

    def _judge_anew(self) -> None:
        if self.other.value == NO_MODEL and self.overlay.value == "second model's label":
            self.overlay.value = "label"
        self._arrange_anew()

    def _judge_all(self) -> None:
        self.surveying.want(self._all_surveys(), self._on_page())
        self.surveying.all()
        self._show()

    def _stop(self) -> None:
        self.surveying.stop()
        self._show()

    def _turn_page(self, by: int) -> None:
        self.page = min(max(self.page + by, 0), max(0, (len(self.order) - 1) // self.per_page))
        self._show()

    def _arrange_anew(self) -> None:
        if self.sort.value == ORDERS[4] and self.other.value == NO_MODEL:
            raise ToCoError("most disagreement first needs a second model: choose one under `against`")
        self.page = 0
        self._arrange()
        self._show()
        if self.sort.value != ORDERS[0] or self.kind.value != ANY_KIND:
            self.surveying.all()
            self._show()

    def _arrange(self) -> None:
        """The images that the filters leave, in order; those that were not judged yet come last, or not at all."""
        pictures, found = self.pictures, dict(self.survey.found)
        shown = list(range(len(pictures)))
        if self.of_class.value != ANY_CLASS:
            shown = [i for i in shown if self.of_class.value in self._class_names(i)]
        if self.kind.value != ANY_KIND:
            shown = [i for i in shown if i in found and found[i].errors and found[i].errors.main == self.kind.value]

        def iou(i: int) -> float:
            return found[i].iou if i in found and not np.isnan(found[i].iou) else np.inf

        if self.sort.value == ORDERS[1]:
            shown.sort(key=iou)
        elif self.sort.value == ORDERS[2]:
            shown.sort(key=lambda i: -iou(i) if np.isfinite(iou(i)) else np.inf)
        elif self.sort.value == ORDERS[3]:
            shown.sort(key=lambda i: (self._class_names(i) or ("\uffff",), iou(i)))
        elif self.sort.value == ORDERS[4] and self.against is not None:
            shown.sort(key=lambda i: -self._differs(i) if not np.isnan(self._differs(i)) else np.inf)
        self.order = shown
        self.page = min(self.page, max(0, (len(shown) - 1) // self.per_page))

    def _differs(self, index: int) -> float:
        if self.against is None:
            return np.nan
        key = (self._key(self.subject), self._key(self.other.value), index)
        if np.isnan(self._differing.get(key, np.nan)):
            self._differing[key] = disagreement(self.survey, self.against, index)
        return self._differing[key]

    def _class_names(self, index: int) -> tuple[str, ...]:
        """Names of the classes that an image is known to show."""
        names = self.survey.class_names
        return tuple(names[k] for k in self.pictures.labels(index) or ())

    def _key(self, subject: str) -> tuple:
        return subject, replace(self.settings, show=self.label.value)

    def _survey_of(self, subject: str) -> LabelSurvey:
        key = self._key(subject)
        if key not in self._surveys:
            model = self.session.subjects.get(subject)
            settings = replace(key[1], block=min(key[1].block, model.model.depth))
            self._surveys[key] = LabelSurvey(self.pictures, model, settings)
        return self._surveys[key]

    def _all_surveys(self) -> list[LabelSurvey]:
        return [self.survey] if self.against is None else [self.survey, self.against]

    def _on_page(self) -> list[int]:
        return self.order[self.page * self.per_page : (self.page + 1) * self.per_page]

    # ---- what is seen

    def _told(self) -> None:
        """The thread has found something."""
        if self.surveying.error:
            self.problem = in_a_line(self.surveying.error)
        if self.sort.value != ORDERS[0] or self.kind.value != ANY_KIND:
            self._arrange()
        self._show(ask=self.surveying.running)

    def _show(self, *, ask: bool = True) -> None:
        if ask:
            self.surveying.want(self._all_surveys(), self._on_page())
        with self._drawing:
            self._draw()

    def _draw(self) -> None:
        """Read what is known and put it on the screen; one thread at a time, or an older state might come last."""
        with self.grid.hold_sync():
            self.grid.items = [self._item(index) for index in self._on_page()]
        total = sum(len(self.pictures) for _ in self._all_surveys())
        done, running = sum(len(survey.found) for survey in self._all_surveys()), self.surveying.running
        self.progress.max, self.progress.value = total, done
        self.progress.layout.visibility = "visible" if running else "hidden"
        self.stop.disabled, self.measure.disabled = not running, running or done == total
        pages = max(0, len(self.order) - 1) // self.per_page + 1
        self.position.put(
            f"\u2002page {self.page + 1} of {pages}, {len(self.order)} images, {done} of {total} judged\u2002"
        )
        self.summary.put(self._summary())
        self._show_notes()

    def _item(self, index: int) -> dict[str, Any]:
        name, found = self.pictures.names[index], self.survey.found.get(index)
        title, marks = [name, *self._class_names(index)[:6]], []
        if found and not np.isnan(found.iou):
            marks.append(f"IoU {100 * found.iou:.0f}")
            title.append(f"mean IoU {100 * found.iou:.1f} %, wrong pixels {100 * found.errors.rate:.1f} %")
            title += [
                f"{kind}: {100 * share:.0f} % of the wrong pixels"
                for kind, share in zip(KINDS, found.errors.shares, strict=True)
            ]
            if self.kind.value != ANY_KIND:
                marks = [f"{100 * found.errors.shares[KINDS.index(self.kind.value)]:.0f} % of errors"]
        elif found:
            marks.append(", ".join(found.classes[:3]) or "background")
            title.append(f"seen: {', '.join(found.classes) or 'background alone'}")
        differs = self._differs(index)
        if not np.isnan(differs):
            marks = [*marks, f"≠ {100 * differs:.0f} %"]
            title.append(f"{100 * differs:.1f} % of the pixels are named differently by {self.other.value}")
        words = "..." if found is None else found.problem
        source = self._source(index, found)
        return {
            "index": index, "name": name.rpartition("/")[2], "title": "\n".join(title), "source": source,
            "words": words, "mark": " · ".join(marks),
        }  # fmt: skip

    def _source(self, index: int, found: Surveyed | None) -> str:
        """The address of a thumbnail with its overlay; kept for what is shown again."""
        other = self.against.found.get(index) if self.against is not None else None
        if (
            found is None
            or not found.image
            or (self.overlay.value == OVERLAYS[3] and (other is None or not other.image))
        ):
            return ""
        key = (index, self._key(self.subject), self.overlay.value, self.other.value)
        if key not in self._thumbnails:
            if len(self._thumbnails) > 20 * self.per_page:
                self._thumbnails.clear()
            picture = overlaid(found, self.overlay.value, other)
            self._thumbnails[key] = f"data:image/jpeg;base64,{base64.b64encode(draw.encoded(picture)).decode()}"
        return self._thumbnails[key]

    def _summary(self) -> Markup:
        """How the wrong pixels of the judged images split into kinds, as a bar, and what each kind means."""
        errors = self.errors()
        if not errors.counts.any():
            return Markup()
        head = f"wrong pixels of {len(self.survey.found)} judged images: {100 * errors.rate:.1f} % of the decided ones"
        rows = list(zip(KINDS, KIND_COLOURS, errors.shares.tolist(), strict=True))
        bar = joined(
            element("span", style=f"background:rgb{colour};width:{100 * share:.2f}%") for _, colour, share in rows
        )
        chips = joined(
            element(
                "span", element("i", style=f"background:rgb{colour}"), f"{kind} {100 * share:.0f} %", class_="toco-chip"
            )
            for kind, colour, share in rows
        )
        return joined([element("div", head, class_="toco-heading"), element("div", bar, class_="toco-kinds"), chips])

    def _show_notes(self) -> None:
        notes = [self.problem] if self.problem else []
        if not self.order:
            notes.append("no image so far" if self.surveying.running else "no image is left by class and errors")
        side, same = self.session.sides[0], self.session.pictures is self.pictures
        if not same or side.subject != self.subject or self.settings != replace(side.settings, show=self.settings.show):
            notes.append("the explorer's settings have changed since: `use the settings above` judges with them")
        self.notes.put(element("div", " · ".join(notes), class_="toco-notes", role="status") if notes else Markup())


def overlaid(found: Surveyed, overlay: str, other: Surveyed | None = None) -> np.ndarray:
    """The thumbnail of an image under one of `OVERLAYS`, uint8 RGB; the image where there is nothing to lay over it."""
    image = np.ascontiguousarray(cv2.imdecode(np.frombuffer(found.image, np.uint8), cv2.IMREAD_COLOR)[..., ::-1])
    layers = {
        "label": found.small_label,
        "ground truth": found.small_mask,
        "second model's label": other.small_label if other else None,
    }
    if overlay == "errors" and found.small_kinds:
        return with_kinds(draw.ground(image), unpacked(found.small_kinds))
    if layers.get(overlay):
        label = unpacked(layers[overlay])
        return draw.label_picture(image, label, strength=0.55)
    return image


def with_kinds(picture: np.ndarray, kinds: np.ndarray, colours: Sequence[tuple] = KIND_COLOURS) -> np.ndarray:
    """Lay the colours of error kinds (uint8 h w, 0: none) over a picture."""
    table = np.array([(0, 0, 0), *colours], np.uint8)
    wrong = (kinds > 0)[..., None]
    return np.where(wrong, (0.2 * picture + 0.8 * table[kinds]).round().astype(np.uint8), picture)
