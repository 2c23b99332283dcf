"""The explorer in the browser: its parts around a `Session`, which does everything that can be done without one.

Every control changes the session and redraws what depends on it; what goes wrong is told in the widget, which goes on
working. Setting a control's value from Python does the same as moving it.
"""

import base64
import io
import os
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as w

from toco_core.errors import ToCoError, in_a_line
from toco_core.widgets import report
from toco_core.widgets.address import address_parameters
from toco_core.widgets.analysis import Analysis
from toco_core.widgets.canvas import Canvas, Door
from toco_core.widgets.controls import CLICKS, Controls
from toco_core.widgets.extras import Extras
from toco_core.widgets.finder import Finder
from toco_core.widgets.keeping import Keeping
from toco_core.widgets.markup import Markup, Panel, button
from toco_core.widgets.panels import SPREAD, TokenPanel, WhyPanel
from toco_core.widgets.pictures import Pictures, open_pictures
from toco_core.widgets.scoring import SplitScores, SplitScoring
from toco_core.widgets.session import Session
from toco_core.widgets.subjects import open_subject, own_name
from toco_core.widgets.tiles import Tiles

WRAP = {"flex_flow": "row wrap", "align_items": "center"}
COLUMN = 376  # width of tabs and tables, CSS pixels
TABLE = "340px"  # height at which a table of numbers begins to scroll: nine classes fit


class Explorer(w.VBox):
    """`Explorer(session)`, shown as the last line of a cell: live in JupyterLab and voila, a still picture elsewhere.

    `others` are notebook parameters that the session does not know (dataset, model): they go into the papermill line.
    Files are saved in `folder` and below it, nowhere else. `may_save` None: not where voila serves the notebook to
    visitors. Parts: `finder` (which image), `controls` (settings), `tiles` (the views), `why` and `tokens` (the clicked
    pixel), `keeping` (files), `extras` (gallery, player, page).
    """

    def __init__(
        self,
        session: Session,
        *,
        others: dict[str, Any] | None = None,
        folder: str | Path = "explored",
        may_save: bool | None = None,
        datasets: Mapping[str, Callable[[], Pictures]] | None = None,
    ):
        super().__init__()
        self.session = session
        self.may_save = not is_served() if may_save is None else may_save
        self.others = {name: value for name, value in (others or {}).items() if value}
        pictures = session.pictures
        self.data_name = self.first_data = str(self.others.get("dataset", pictures.title))
        self.datasets = {self.data_name: lambda: pictures}
        self.datasets |= {name: made for name, made in (datasets or {}).items() if name != self.data_name}
        self._data_places: dict[str, str] = {}  # of those that were opened by the reader
        self.scoring: SplitScoring | None = None
        self.problem = ""
        self._busy = 0  # callbacks under way: the scoring thread gives way to them
        self._filling = False  # controls are being set to what the session says
        self._threads: list[threading.Thread] = []
        self._crf_runs = False
        self._make_controls()
        self.finder = Finder(session, self._do, self.go)
        self.controls = Controls(session, self._do, fill=self._fill, on_change=lambda t: self.redraw(tokens=t))
        self.tiles = Tiles(
            session, self._do, group=f"explorer-{self.model_id}", listen=self._listen_to, on_arranged=self._arranged
        )
        self.why, self.tokens = WhyPanel(session), TokenPanel(session, self.controls.of["head"])
        shared = {"folder": Path(folder), "may_save": self.may_save}
        self.keeping = Keeping(session, self._do, door=self.door, line=self.parameters_line, **shared)
        self.extras = Extras(
            session,
            **shared,
            offer=self.door.offer,
            on_open=lambda index: self._do(lambda: self.go(index)),
            give_way=self._give_way,
        )
        self._arrange()
        self._listen()
        self._fill()
        self.finder.follow()
        self.redraw()
        if is_served():
            self._do(lambda: self.visit(os.environ.get("QUERY_STRING", "")))

    # ---- for Python

    def set(self, **values: Any) -> None:
        """Change settings as the controls do. Raises ToCoError for a wrong one."""
        self.session.set(**values)
        self._fill()
        self.redraw()

    def go(self, image: int | str) -> None:
        """Another image, by number or name. Raises ToCoError where it cannot be read."""
        self.session.go(image)
        self._went()

    def visit(self, query: str) -> None:
        """Go where an address leads, by the part behind its question mark (`address_parameters`). Model and data set
        are names of those that are offered. Raises ToCoError for what is not."""
        found = address_parameters(query)
        if "dataset" in found:
            self._show_data(found["dataset"])
        if "model" in found:
            self.session.use(self.session.subjects.find(found["model"]), side=0)
        self.session.restore(found)
        self._went()

    def settle(self, timeout: float = 60.0) -> None:
        """Wait for what runs in the background."""
        until = time.monotonic() + timeout
        while time.monotonic() < until and (alive := [thread for thread in self._all_threads() if thread.is_alive()]):
            alive[0].join(max(0.0, until - time.monotonic()))  # it may have started another one

    def figure(self):
        """What is shown, as a matplotlib figure."""
        return report.figure(self.session)

    def parameters_line(self) -> str:
        """The papermill command that shows this again."""
        others = dict(self.others)
        if self.session.sides[0].subject != self.session.first:
            others.pop("weights", None)  # they belong to the model that was there first
        if self.data_name != self.first_data:
            others["dataset"] = self._data_places.get(self.data_name, self.data_name)
        return self.session.papermill_line(**others)

    def __repr__(self) -> str:
        return self.session.describe()

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self), "image/png": base64.b64encode(self._png()).decode()}, metadata

    def _png(self) -> bytes:
        file = io.BytesIO()
        self.figure().savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
        return file.getvalue()

    # ---- controls

    def _make_controls(self) -> None:
        """Those that belong to no part: model and images, the second side, opening, scores."""
        full = {"layout": w.Layout(width="auto"), "style": {"description_width": "92px"}}
        narrow = {"layout": w.Layout(width="auto"), "style": {"description_width": "52px"}}
        self.model = w.Dropdown(options=self.session.subjects.names, description="model", **narrow)
        self.data = w.Dropdown(options=list(self.datasets), description="images", **narrow)
        self.door = Door()
        self.open_model = w.Text(placeholder="a run's folder, a checkpoint, a timm name", description="model", **full)
        self.open_weights = w.Text(placeholder="file of a timm model, else a download", description="weights", **full)
        self.open_data = w.Text(placeholder="a data set, or any folder of images", description="images", **full)
        self.open_split = w.Text(value="val", description="split", **full)
        self.open = button("open", "open this model, these images, or both")
        self._opening = [self.open_model, self.open_weights, self.open_data, self.open_split, self.open]
        for widget in self._opening:
            widget.disabled = not self.may_save
        self.compare = w.ToggleButton(
            description="compare", tooltip="a second model, or other settings, beside", layout=w.Layout(width="86px")
        )
        self.side = w.ToggleButtons(options=[("A", 0), ("B", 1)], style={"button_width": "34px"})
        self.linked = w.Checkbox(value=True, description="controls move both", indent=False)
        self.notes = Panel()
        self.numbers, self.split_numbers = (Panel(layout=w.Layout(max_height=TABLE)) for _ in range(2))
        for table in (self.numbers, self.split_numbers):  # many classes must not push the maps below out of sight
            table.add_class("toco-scrolls")
        self.score, self.stop = button("score the split", "all images"), button("stop", "stop scoring")
        self.stop.disabled = True
        self.progress = w.IntProgress(layout=w.Layout(width="160px", visibility="hidden"))

    def _arrange(self) -> None:
        def line(*widgets: w.Widget) -> w.HBox:
            return w.HBox(widgets, layout=w.Layout(**WRAP))

        tabs = self.controls.tabs() | {"keep": self.keeping.controls, "open": self._opening}
        self.tabs = w.Tab([w.VBox(children) for children in tabs.values()], titles=list(tabs))
        self.tabs.layout = w.Layout(width=f"{COLUMN}px", max_width="calc(100% - 4px)")  # a margin of 2 on each side
        self.tabs.add_class("toco-tabs")
        counts = [self.numbers, line(self.score, self.stop, self.progress), self.split_numbers]
        counts = w.VBox(counts, layout=w.Layout(width=f"{COLUMN}px", max_width="100%"))
        left = w.VBox([self.tabs, counts], layout=w.Layout(width=f"{COLUMN + 4}px", max_width="100%"))
        self.children = [
            line(self.model, self.data, self.door, self.compare, self.side, self.linked),
            line(*self.finder.controls),
            self.finder.film,
            self.controls.classes,
            line(*self.tiles.controls),
            self.notes,
            self.tiles.row,
            self.tiles.reading,
            w.HBox([left, self.why, self.tokens], layout=w.Layout(**SPREAD)),
            self.extras,
        ]
        self.add_class("toco-explorer")

    def _listen(self) -> None:
        for widget, action in (
            (self.model, self._use),
            (self.compare, self._compare),
            (self.side, self._choose_side),
            (self.linked, self._link),
            (self.data, self._show_data),
        ):
            widget.observe(lambda change, action=action: self._do(lambda: action(change["new"])), "value")
        for widget, action in (
            (self.score, self._start_scoring),
            (self.stop, self._stop_scoring),
            (self.open, self._open),
        ):
            widget.on_click(lambda _, action=action: self._do(action))
        self.door.on_msg(lambda _, content, buffers: self._do(lambda: self._bring(content, buffers)))
        for canvas in self.tokens.maps:
            self._listen_to(canvas)

    def _listen_to(self, canvas: Canvas) -> None:
        canvas.observe(lambda change: self._do(lambda: self._click(change["new"])), "click")
        canvas.observe(lambda change: self._do(lambda: self._step(change["new"])), "step")
        canvas.observe(lambda change: self._do(lambda: self._turn(change["new"][0])), "turn")

    # ---- what the controls do

    def _do(self, action: Callable[[], None]) -> None:
        """Run an action of the reader's; what goes wrong is told in the widget."""
        if self._filling:
            return
        self._busy += 1
        try:
            self.problem = ""
            action()
        except Exception as error:  # noqa: BLE001  a traceback in a log that nobody reads helps nobody
            self.problem = in_a_line(error)
            if isinstance(error, ToCoError):
                self._fill()
        finally:
            self._busy -= 1
        self._show_notes()

    def _use(self, name: str) -> None:
        self.session.use(name, side=self.session.active)
        self._fill()
        self.redraw()

    def _bring(self, content: Any, buffers: list) -> None:
        """A photograph from the browser: as little is taken for granted as of a file from outside."""
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or len(buffers) != 1:
            raise ToCoError("a photograph is one file with a name")
        self.session.bring(name, bytes(buffers[0]))
        self.finder.show_all()
        self._went()

    def _show_data(self, name: str) -> None:
        titles = [name] if name in self.datasets else [t for t in self.datasets if name == t.rpartition(" [")[0]]
        if not titles:
            raise ToCoError(f"dataset = {name!r:.90} is not offered here: one of {', '.join(self.datasets)}")
        self.session.show_pictures(self.datasets[titles[0]]())
        self.data_name = titles[0]
        self._forget_scoring()
        self.tiles.forget()
        self.finder.begin_anew()
        self._went()

    def _open(self) -> None:
        """The model and the images that are named, by whoever owns this machine."""
        if not self.may_save:
            raise ToCoError("nothing is opened where the notebook is served: choose from the lists")
        spec, data = self.open_model.value.strip(), self.open_data.value.strip()
        if not spec and not data:
            raise ToCoError("nothing to open: name a model, images, or both")
        if spec:
            opened = open_subject(spec, weights=self.open_weights.value.strip() or None)
            name = self.session.subjects.add(opened)
            self.session.use(name)
        if data:
            pictures = open_pictures(data, self.open_split.value.strip() or "val")
            name = self._name_of(pictures, data)
            self.datasets[name], self._data_places[name] = (lambda: pictures), data
            self._show_data(name)
        self._fill()
        self.redraw()

    def _name_of(self, pictures: Pictures, data: str) -> str:
        """Their title; where images of another folder have it, a name of their own."""
        title = pictures.title
        alike = [name for name in self.datasets if name == title or name.startswith(f"{title} (")]
        known = [name for name in alike if self.datasets[name]().beside(pictures)]
        return known[0] if known else own_name(title, Path(data).resolve().parent.name, self.datasets)

    def _compare(self, on: bool) -> None:
        self.session.compare(on)
        self._fill()
        self.redraw()

    def _choose_side(self, side: int) -> None:
        self.session.active = side if side < len(self.session.sides) else 0
        self._arranged()

    def _link(self, on: bool) -> None:
        self.session.linked = on

    def _arranged(self) -> None:
        self._fill()
        self.redraw()

    def _turn(self, by: int) -> None:
        """Next or previous image of the order shown; unreadable ones are passed over."""
        for index in self.finder.onward(by):
            try:
                return self.go(index)
            except ToCoError as error:
                self.problem = str(error)

    def _went(self) -> None:
        self.redraw()  # first: the picture is what one waits for
        self._fill()
        self.finder.follow()

    def _click(self, value: list) -> None:
        y, x, _ = value
        if self.controls.click_means.value == CLICKS[1]:
            self.session.place_crop(y, x)
            self.redraw(tokens=False)
        else:
            self.session.click(y, x)
            self.redraw()

    def _step(self, value: list) -> None:
        """Choose the patch some rows and columns on."""
        rows, columns, _ = value
        h, w_ = self.session.analysis(self.session.active).grid
        y, x = self.session.place or (0.5, 0.5)
        row, column = int(y * h) + rows, int(x * w_) + columns
        self.session.click((min(max(row, 0), h - 1) + 0.5) / h, (min(max(column, 0), w_ - 1) + 0.5) / w_)
        self.redraw()

    # ---- scoring the split

    def _start_scoring(self) -> None:
        if self.session.subject(self.session.active).head:
            raise ToCoError("an ImageNet head ranks its classes for each image: a split cannot be scored with it")
        if self.scoring and self.scoring.running:
            raise ToCoError("the split is being scored already: stop it first")
        session, side = self.session, self.session.active
        subject, settings, joint = session.subject(side), session.sides[side].settings, session.joint(side)
        what = f"{settings.show} of {session.sides[side].subject}"
        self.progress.max, self.progress.layout.visibility = session.pictures.n_listed, "visible"

        def tell(found: SplitScores) -> None:
            self._give_way()
            if self.scoring is not scoring:  # other images were opened: what is found of these is of no use
                return
            self.stop.disabled = scoring.over
            self.finder.iou = found.iou
            self.progress.value = found.done
            title, problem = f"{found.done} of {found.total} images: {what}", scoring.error
            skipped = f"{len(found.skipped)} skipped, first: {found.skipped[0]}" if found.skipped else ""
            notes = [word for word in (f"scoring stopped: {problem}" if problem else "", skipped) if word]
            self.split_numbers.put(report.numbers_html(found.numbers, joint.names, title), report.notes_html(notes))
            if scoring.over:
                self.finder.fill()  # with the IoU on each thumbnail

        scoring = SplitScoring(subject, session.pictures, settings, joint, tell, give_way=self._give_way)
        self.scoring, self.stop.disabled = scoring, False
        scoring.start()

    def _stop_scoring(self) -> None:
        if self.scoring:
            self.scoring.stop()

    def _forget_scoring(self) -> None:
        """End it as after other images were opened; it tells no more."""
        self._stop_scoring()
        if self.scoring:
            self._threads.append(self.scoring.thread)  # which still is at an image
        self.scoring, self.stop.disabled = None, True
        self.progress.value, self.progress.layout.visibility = 0, "hidden"
        self.split_numbers.put()

    def _give_way(self) -> None:
        while self._busy and not (self.scoring and not self.scoring.running):
            time.sleep(0.002)

    # ---- what is seen

    def redraw(self, *, tokens: bool = True) -> None:
        """Draw the sides, and what is known about patches where that has changed."""
        waiting = self._waiting_for_crf()
        self.tiles.draw(waiting)
        self.tiles.read()
        self.keeping.saved.put()  # what is saved is not what is shown any more
        self.controls.disable(self.tiles.visible())
        self.numbers.put(*(self._numbers_table(i, i in waiting) for i in range(len(self.session.sides))))
        self.controls.tell_crops()
        if tokens:
            self.tokens.draw()
        self.why.draw()
        self._show_notes()

    def _numbers_table(self, i: int, waits: bool) -> Markup:
        session, settings = self.session, self.session.sides[i].settings
        what = "CAM label" if settings.show in ("image", "CAM") else settings.show
        title = f"{'AB'[i] if len(session.sides) == 2 else 'this image'}: {what}"
        title += f" at beta {settings.beta:g}" if what == "CAM label" else ""
        waits = waits and settings.show == "segmentation"
        missing = "being computed" if waits else "nothing to score"
        missing = "no ground truth" if session.picture.mask is None else missing
        try:
            found = None if waits else session.numbers(i)
        except ToCoError:
            found = None
        return report.numbers_html(found, session.joint(i).names, title, missing=missing)

    def _show_notes(self) -> None:
        notes = [self.problem] if self.problem else []
        self.notes.put(report.notes_html(list(dict.fromkeys([*notes, *self.tiles.notes]))))

    def _waiting_for_crf(self) -> frozenset[int]:
        """The sides whose dense CRF is not there yet. It takes seconds: it runs beside, one at a time, and what it has
        found is drawn when it is there."""
        session, waiting = self.session, {}
        for i in {tile.side for tile in self.tiles.visible() if tile.show == "segmentation"}:
            if session.crf_pending(i):
                waiting[i] = session.analysis(i)
        if waiting:
            self.problem = "the dense CRF is being computed ..."
            if not self._crf_runs:
                self._crf_runs, first = True, waiting[min(waiting)]
                thread = threading.Thread(target=self._run_crf, args=(first,), name="dense CRF", daemon=True)
                self._threads = [*(t for t in self._threads if t.is_alive()), thread]
                thread.start()
        return frozenset(waiting)

    def _run_crf(self, analysis: Analysis) -> None:
        """Compute it and draw what is shown by then. An error switches it off, or it would be tried for ever."""
        try:
            try:
                self._give_way()
                analysis.segmentation(with_crf=True)
            finally:
                self._crf_runs = False  # before drawing: another image may wait for its own by now
            self.problem = ""
            self.redraw(tokens=False)
        except Exception as error:  # noqa: BLE001  a thread's error is shown in the widget
            sides = self.session.sides
            self.session.sides = [replace(side, settings=replace(side.settings, crf=False)) for side in sides]
            self.problem = f"no dense CRF: {in_a_line(error)}"
            self._fill()
            self.redraw(tokens=False)

    def _all_threads(self) -> list[threading.Thread]:
        return [*self._threads, *([self.scoring.thread] if self.scoring else [])]

    def _fill(self) -> None:
        """Set all controls to what the session says."""
        session, two = self.session, len(self.session.sides) == 2
        self._filling = True
        try:
            self.model.options, self.data.options = session.subjects.names, list(self.datasets)
            self.model.value, self.data.value = session.sides[session.active].subject, self.data_name
            self.compare.value, self.side.value = two, session.active
            for widget in (self.side, self.linked):
                widget.layout.display = None if two else "none"
            self.tiles.fill()
            self.controls.fill()
        finally:
            self._filling = False


def is_served() -> bool:
    """Whether voila shows the notebook to visitors, who are not its owner."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
