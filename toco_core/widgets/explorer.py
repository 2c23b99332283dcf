"""The explorer in the browser: controls around a `Session`, which does everything that can be done without one.

Every control changes the session and redraws what depends on it; what goes wrong is told in the widget, which goes on
working. Setting a control's value from Python does the same as moving it.
"""

import base64
import dataclasses
import io
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as w
import matplotlib as mpl
import numpy as np

from toco_core.data.files import palette_png
from toco_core.data.split import inside_name
from toco_core.errors import ToCoError, in_a_line
from toco_core.widgets import draw, report, why
from toco_core.widgets.address import address_parameters
from toco_core.widgets.canvas import Canvas, Chips, Door, Thumbnails
from toco_core.widgets.extras import Extras
from toco_core.widgets.markup import Markup, Panel, element, joined
from toco_core.widgets.pictures import Pictures, open_pictures
from toco_core.widgets.scoring import SplitScores, SplitScoring
from toco_core.widgets.session import SHARED, Session, Tile, View, written
from toco_core.widgets.settings import (
    ARRANGEMENTS,
    CAMS,
    CLASS_CHOICES,
    LABEL_FIELDS,
    LABELS,
    MAP_FIELDS,
    SHOWN,
    Settings,
    fields_seen,
)
from toco_core.widgets.subjects import DECODER, open_subject

PER_PAGE = 10  # thumbnails
HINT = "point: values · click or arrow keys: choose a place · n, p: next, previous image · + - 0: zoom · e: enlarge"
ALONE = 640  # width of a picture that is shown alone, CSS pixels
MANY = 24  # classes; of more, chips show the most probable ones
SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
TABLE = "340px"  # height at which a table of numbers begins to scroll: nine classes fit
SMALL = 224  # width of the maps of tokens


class Explorer(w.VBox):
    """`Explorer(session)`, shown as the last line of a cell: live in JupyterLab and voila, a still picture elsewhere.

    `others` are notebook parameters that the session does not know (dataset, model): they go into the papermill line.
    Files are saved in `folder` and below it, nowhere else. `may_save` None: not where voila serves the notebook to
    visitors.
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
        self.session, self.folder = session, Path(folder)
        self.may_save = not is_served() if may_save is None else may_save
        self.others = {name: value for name, value in (others or {}).items() if value}
        pictures = session.pictures
        self.data_name = self.first_data = str(self.others.get("dataset", pictures.title))
        self.datasets = {self.data_name: lambda: pictures}
        self.datasets |= {name: made for name, made in (datasets or {}).items() if name != self.data_name}
        self._data_places: dict[str, str] = {}  # of those that were opened by the reader
        self.scoring: SplitScoring | None = None
        self.split: SplitScores | None = None
        self.order = list(range(len(session.pictures)))
        self.page, self.problem = self.order.index(session.index) // PER_PAGE, ""
        self._busy = 0  # callbacks under way: the scoring thread gives way to them
        self._filling = False  # controls are being set to what the session says
        self._thumbnails: dict[int, str] = {}
        self._threads: list[threading.Thread] = []
        self._make_controls()
        self._arrange()
        self.extras = Extras(
            session,
            folder=self.folder,
            may_save=self.may_save,
            offer=self.door.offer,
            on_open=lambda index: self._do(lambda: self._go(index)),
            give_way=self._give_way,
        )
        self.children = [*self.children, self.extras]
        self._listen()
        self._fill_controls()
        self._fill_film()
        self.redraw()
        self._hover(0, [])
        if is_served():
            self._do(lambda: self.visit(os.environ.get("QUERY_STRING", "")))

    # ---- for Python

    def set(self, **values: Any) -> None:
        """Change settings as the controls do. Raises ToCoError for a wrong one."""
        self.session.set(**values)
        self._fill_controls()
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
            self.session.use(found["model"], side=0)
        self.session.restore(found)
        self._went()

    def settle(self, timeout: float = 60.0) -> None:
        """Wait for what runs in the background."""
        until = time.monotonic() + timeout
        for thread in [*self._threads, *([self.scoring.thread] if self.scoring else [])]:
            thread.join(max(0.0, until - time.monotonic()))

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
        session, full = self.session, {"layout": w.Layout(width="auto"), "style": {"description_width": "92px"}}
        slider = {**full, "continuous_update": True}
        small_label = {**slider, "style": {"description_width": "36px"}}
        narrow_label = {**full, "style": {"description_width": "52px"}}
        self.search = w.Text(placeholder="name or class", description="search", continuous_update=False, **narrow_label)
        self.sort = w.Dropdown(options=["list order", "worst first"], description="order", **narrow_label)
        self.film = Thumbnails()
        self.back, self.forth = (_button(word, tip) for word, tip in (("‹", "previous page"), ("›", "next page")))
        self.position = Panel()
        self.model = w.Dropdown(options=session.subjects.names, description="model", **narrow_label)
        self.data = w.Dropdown(options=list(self.datasets), description="images", **narrow_label)
        self.door = Door()
        self.open_model = w.Text(placeholder="a run's folder, a checkpoint, a timm name", description="model", **full)
        self.open_weights = w.Text(placeholder="file of a timm model, else a download", description="weights", **full)
        self.open_data = w.Text(placeholder="a data set, or any folder of images", description="images", **full)
        self.open_split = w.Text(value="val", description="split", **full)
        self.open = _button("open", "open this model, these images, or both")
        self.compare = w.ToggleButton(
            description="compare", tooltip="a second model, or other settings, beside", layout=w.Layout(width="86px")
        )
        self.side = w.ToggleButtons(options=[("A", 0), ("B", 1)], style={"button_width": "34px"})
        self.linked = w.Checkbox(value=True, description="controls move both", indent=False)
        self.canvases: list[Canvas] = []  # one per tile, made when first needed
        self.legends: list[Panel] = []
        self._panes: list[w.VBox] = []
        self._tiles: list[Tile] = []
        self._drawn: dict[int, tuple] = {}  # what each canvas shows, and the notes about it
        self.reading = Panel()
        self.reading.add_class("toco-reading")
        self.arrange = w.ToggleButtons(options=ARRANGEMENTS, style={"button_width": "92px"})
        self.arrange.tooltips = ["views in a row", "one large picture", "two views, one to the left of a curtain"]
        self.views = Chips(label="views side by side")
        self.curtain = [
            w.Dropdown(description=word, style={"description_width": "46px"}, layout=w.Layout(width="210px"))
            for word in ("left", "right")
        ]
        self.classes = Chips(label="classes of CAM and labels, with the classifier's probability")
        self.notes, self.numbers = Panel(), Panel(layout=w.Layout(max_height=TABLE))

        unit = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", **slider}
        self.controls: dict[str, w.Widget] = {
            "show": w.Dropdown(options=SHOWN, description="show", **full),
            "cam": w.Dropdown(options=CAMS, description="CAM", **full),
            "block": w.IntSlider(min=1, max=12, description="block", **slider),
            "strength": w.FloatSlider(description="overlay", **unit),
            "class_colours": w.Checkbox(description="each class in its colour", indent=False),
            "contours": w.Checkbox(description="contours", indent=False),
            "outline": w.Checkbox(description="outline of ground truth", indent=False),
            "beta_l": w.FloatSlider(description="beta_l", **unit),
            "beta_h": w.FloatSlider(description="beta_h", **unit),
            "beta": w.FloatSlider(description="beta (score)", **unit),
            "par_iterations": w.IntSlider(min=0, max=30, description="PAR iterations", **slider),
            "par_dilations": w.Text(description="PAR dilations", continuous_update=False, **full),
            "crf": w.Checkbox(description="segmentation through the dense CRF", indent=False),
            "cam_scales": w.SelectMultiple(options=SCALES, rows=4, description="scales", **full),
            "flip": w.Checkbox(description="also mirrored", indent=False),
            "head": w.IntSlider(min=0, max=12, description="head", **small_label),
            "crop_size": w.IntSlider(min=8, max=224, description="crop size", **slider),
            "n_crops": w.IntSlider(min=1, max=16, description="crops", **slider),
            "crop_seed": w.IntSlider(min=0, max=20, description="seed", **slider),
        }
        for field in dataclasses.fields(Settings):
            if field.name in self.controls:
                self.controls[field.name].tooltip = " ".join(field.metadata["help"].split())
        self.class_choice = w.Dropdown(options=[*CLASS_CHOICES, "chosen"], description="which", **full)
        self.class_names = w.SelectMultiple(rows=4, description="classes", **full)
        self.click_means = w.ToggleButtons(
            options=["compares a patch", "places a crop"], description="click", style={"button_width": "125px"}
        )
        self.sample, self.clear = _button("sample crops", "draw crops as in training"), _button("clear", "no crops")
        self.crop_table = Panel()
        self.maps = [Canvas(width=SMALL, label="cosine similarity to the framed patch"), Canvas(width=SMALL)]
        self.maps[0].words = "cosine; click another patch to compare it"
        self.maps[1].label = "attention of the class token"
        self.curve, self.map_titles = Panel(), [Panel(), Panel()]
        self.why, self.votes = Panel(), Panel()
        self.why_maps = [Canvas(width=176) for _ in range(3)]
        labels = ("neighbours that vote", "where the score comes from", "patches that token contrast pulls and pushes")
        for canvas, label in zip(self.why_maps, labels, strict=True):
            canvas.label = label
        self.score, self.stop = _button("score the split", "all images"), _button("stop", "stop scoring")
        self.stop.disabled = True
        self.progress = w.IntProgress(layout=w.Layout(width="160px", visibility="hidden"))
        self.split_numbers = Panel(layout=w.Layout(max_height=TABLE))
        self.copy = _button("copy as parameters", "the papermill line")
        self.line = w.Textarea(rows=5, layout=w.Layout(width="auto"))
        self.save_name = w.Text(description="folder", placeholder=f"below {self.folder.name}", **full)
        self.save_png, self.save_svg = _button("figure PNG", "save"), _button("figure SVG", "save")
        self.save_label, self.saved = _button("label PNG", "save the label with VOC's palette"), Panel()
        goals = ["folder", "browser"] if self.may_save else ["browser"]
        self.save_to = w.ToggleButtons(options=goals, description="to", style={"button_width": "80px"})
        self.save_to.tooltips = ["below the notebook's folder", "as a download"][-len(goals) :]
        for widget in (self.open_model, self.open_weights, self.open_data, self.open_split, self.open):
            widget.disabled = not self.may_save
        self.save_name.disabled = not self.may_save

    def _arrange(self) -> None:
        c, wrap = self.controls, w.Layout(flex_flow="row wrap", align_items="center")
        spread = w.Layout(flex_flow="row wrap", align_items="flex-start", grid_gap="14px")
        choose = w.HBox([self.model, self.data, self.door, self.compare, self.side, self.linked], layout=wrap)
        find = w.HBox([self.back, self.forth, self.position, self.search, self.sort], layout=wrap)
        self.row = w.Box()
        self.row.add_class("toco-row")
        order = w.HBox([self.arrange, self.views, *self.curtain], layout=wrap)
        both = w.HBox([c["contours"], c["outline"], c["class_colours"]], layout=wrap)
        look = [c["show"], c["cam"], c["block"], c["strength"], both, self.class_choice, self.class_names]
        labels = [c["beta_l"], c["beta_h"], c["beta"], c["par_iterations"], c["par_dilations"], c["crf"]]
        inputs = [c["cam_scales"], c["flip"]]
        crop_buttons = w.HBox([self.sample, self.clear], layout=wrap)
        crops = [self.click_means, c["crop_size"], c["n_crops"], c["crop_seed"], crop_buttons, self.crop_table]
        saves = w.HBox([self.save_png, self.save_svg, self.save_label], layout=wrap)
        keep = [self.copy, self.line, self.save_to, self.save_name, saves, self.saved]
        opens = [self.open_model, self.open_weights, self.open_data, self.open_split, self.open]
        names = {"look": look, "labels": labels, "scales": inputs, "crops": crops, "keep": keep, "open": opens}
        self.tabs = w.Tab([w.VBox(children) for children in names.values()], titles=list(names))
        self.tabs.layout = w.Layout(width="376px", max_width="calc(100% - 4px)")  # a margin of 2 on each side
        self.tabs.add_class("toco-tabs")
        split = w.HBox([self.score, self.stop, self.progress], layout=wrap)
        counts = w.VBox([self.numbers, split, self.split_numbers], layout=w.Layout(width="376px", max_width="100%"))
        self.vote_maps = w.Box(self.why_maps)
        self.vote_maps.add_class("toco-votes")
        self.pinned = w.VBox([self.why, self.vote_maps, self.votes])
        self.pinned.add_class("toco-pinned")
        left = w.VBox([self.tabs, counts], layout=w.Layout(width="380px", max_width="100%"))
        narrow = {"layout": w.Layout(width=f"{SMALL + 6}px")}
        similar = w.VBox([self.map_titles[0], self.maps[0]], **narrow)
        tokens = [similar, self.curve, w.VBox([self.map_titles[1], self.maps[1], c["head"]], **narrow)]
        self.tokens = w.HBox(tokens, layout=spread)
        self.tokens.add_class("toco-tokens")
        below = w.HBox([left, self.pinned, self.tokens], layout=spread)
        self.children = [choose, find, self.film, self.classes, order, self.notes, self.row, self.reading, below]
        for table in (self.numbers, self.split_numbers):  # many classes must not push the maps below out of sight
            table.add_class("toco-scrolls")
        self.add_class("toco-explorer")

    def _listen(self) -> None:
        for name, control in self.controls.items():
            control.observe(lambda change, name=name: self._change(name, change["new"]), "value")
        for widget, action in (
            (self.model, self._use),
            (self.compare, self._compare),
            (self.side, self._choose_side),
            (self.linked, self._link),
            (self.search, self._find),
            (self.sort, self._find),
            (self.class_choice, self._choose_classes),
            (self.class_names, self._name_classes),
            (self.arrange, self._arrange_views),
            (self.data, self._show_data),
            (self.save_to, self._save_elsewhere),
            *((dropdown, self._draw_curtain) for dropdown in self.curtain),
        ):
            widget.observe(lambda change, action=action: self._do(lambda: action(change["new"])), "value")
        for button, action in (
            (self.back, lambda: self._turn_page(-1)),
            (self.forth, lambda: self._turn_page(1)),
            (self.sample, self._sample),
            (self.clear, self._clear),
            (self.score, self._start_scoring),
            (self.stop, self._stop_scoring),
            (self.copy, self._copy),
            (self.open, self._open),
            (self.save_png, lambda: self._save("png")),
            (self.save_svg, lambda: self._save("svg")),
            (self.save_label, self._save_label),
        ):
            button.on_click(lambda _, action=action: self._do(action))
        self.film.observe(lambda change: self._do(lambda: self._go(change["new"][0])), "wanted")
        self.door.on_msg(lambda _, content, buffers: self._do(lambda: self._bring(content, buffers)))
        for chips, action in ((self.classes, self._toggle_class), (self.views, self._toggle_view)):
            chips.observe(lambda change, action=action: self._do(lambda: action(change["new"][0])), "toggled")
        for canvas in self.maps:
            self._listen_to(canvas)

    def _listen_to(self, canvas: Canvas) -> None:
        canvas.observe(lambda change: self._do(lambda: self._click(change["new"])), "click")
        canvas.observe(lambda change: self._do(lambda: self._step(self.session.active, change["new"])), "step")
        canvas.observe(lambda change: self._do(lambda: self._turn(change["new"][0])), "turn")

    def _canvas(self, number: int) -> Canvas:
        """The canvas of a tile, made and listened to where it is not there yet."""
        while len(self.canvases) <= number:
            i, canvas = len(self.canvases), Canvas(group=f"explorer-{self.model_id}")
            self.canvases.append(canvas)
            self.legends.append(Panel())
            self._panes.append(w.VBox([canvas, self.legends[i]]))
            self._listen_to(canvas)
            canvas.observe(lambda change, i=i: self._hover(i, change["new"]), "pointer")
            canvas.observe(lambda change, i=i: self._do(lambda: self._enlarge(i)), "enlarge")
        return self.canvases[number]

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
                self._fill_controls()
        finally:
            self._busy -= 1
        self._show_notes()

    def _change(self, name: str, value: Any) -> None:
        def action() -> None:
            self.session.set(**{name: value})
            if name in ("beta_l", "beta_h"):
                self._fill_controls()  # one may have pushed the other
            self.redraw(tokens=name in ("block", "head"))

        self._do(action)

    def _use(self, name: str) -> None:
        self.session.use(name, side=self.session.active)
        self._fill_controls()
        self.redraw()

    def _bring(self, content: Any, buffers: list) -> None:
        """A photograph from the browser: as little is taken for granted as of a file from outside."""
        name = content.get("name") if isinstance(content, dict) else None
        if not isinstance(name, str) or len(buffers) != 1:
            raise ToCoError("a photograph is one file with a name")
        self.session.bring(name, bytes(buffers[0]))
        self.search.value = ""
        self.order = list(range(len(self.session.pictures)))
        self._went()

    def _show_data(self, name: str) -> None:
        titles = [title for title in self.datasets if name in (title, title.rpartition(" [")[0])]
        if not titles:
            raise ToCoError(f"dataset = {name!r:.90} is not offered here: one of {', '.join(self.datasets)}")
        self.session.show_pictures(self.datasets[titles[0]]())
        self.data_name = titles[0]
        self._stop_scoring()
        self.split, self._drawn, self._thumbnails = None, {}, {}
        self.split_numbers.put()
        self.order, self.page = list(range(len(self.session.pictures))), 0
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
            self.datasets[pictures.title], self._data_places[pictures.title] = (lambda: pictures), data
            self._show_data(pictures.title)
        self._fill_controls()
        self.redraw()

    def _compare(self, on: bool) -> None:
        self.session.compare(on)
        self._fill_controls()
        self.redraw()

    def _choose_side(self, side: int) -> None:
        self.session.active = side if side < len(self.session.sides) else 0
        self._fill_controls()
        self.redraw(tokens=False)

    def _link(self, on: bool) -> None:
        self.session.linked = on

    def _choose_classes(self, choice: str) -> None:
        if choice == "chosen":
            self._name_classes(self.class_names.value)
        else:
            self._change_classes(choice)

    def _name_classes(self, names: tuple[str, ...]) -> None:
        self._change_classes(",".join(names) if names else "none")

    def _toggle_class(self, name: str) -> None:
        session = self.session
        joint, (chosen, _) = session.joint(session.active), session.classes(session.active)
        on = {joint.names[joint.of_model[k]] for k in chosen} ^ {name}
        self._name_classes(tuple(known for known in joint.names if known in on))

    def _toggle_view(self, view: str) -> None:
        shown = set(self.session.views)
        if view in self.session.views and len(shown) == 1:
            raise ToCoError("one view at least stays")
        self.session.arrange_views(views=tuple(shown ^ {view}))
        self._fill_controls()
        self.redraw(tokens=False)

    def _arrange_views(self, arrange: str) -> None:
        self.session.arrange_views(arrange)
        self._fill_controls()
        self.redraw(tokens=False)

    def _draw_curtain(self, _: str) -> None:
        self.session.arrange_views(curtain=[dropdown.value for dropdown in self.curtain])
        self.redraw(tokens=False)

    def _enlarge(self, number: int) -> None:
        """One tile alone; where one is, all again."""
        session = self.session
        if session.arrange == "side by side":
            tile = session.tiles()[number]
            session.active = tile.side
            session.sides[tile.side] = dataclasses.replace(
                session.sides[tile.side],
                settings=dataclasses.replace(session.sides[tile.side].settings, show=tile.show),
            )
            session.arrange_views("one")
        else:
            session.arrange_views("side by side")
        self._fill_controls()
        self.redraw(tokens=False)

    def _change_classes(self, classes: str) -> None:
        self.session.set(classes=classes)
        self._fill_controls()
        self.redraw(tokens=False)

    def _find(self, _: Any) -> None:
        found = self.session.pictures.find(self.search.value)
        if not found:
            raise ToCoError(f"no image's name or class holds {self.search.value!r}")
        if self.sort.value == "worst first":
            if not self.split or not self.split.iou:
                raise ToCoError("worst first needs scores: press `score the split` first")
            iou = self.split.iou
            found.sort(key=lambda i: iou.get(i, np.inf) if not np.isnan(iou.get(i, np.inf)) else np.inf)
        self.order, self.page = found, 0
        self._fill_film()

    def _turn_page(self, by: int) -> None:
        self.page = min(max(self.page + by, 0), max(0, (len(self.order) - 1) // PER_PAGE))
        self._fill_film()

    def _turn(self, by: int) -> None:
        """Next or previous image of the order shown; unreadable ones are passed over."""
        at = self.order.index(self.session.index) if self.session.index in self.order else -1
        for distance in range(1, len(self.order) + 1):
            index = self.order[(at + by * distance) % len(self.order)]
            try:
                return self._go(index)
            except ToCoError as error:
                self.problem = str(error)

    def _go(self, index: int) -> None:
        self.session.go(index)
        self._went()

    def _went(self) -> None:
        if self.session.index in self.order:
            self.page = self.order.index(self.session.index) // PER_PAGE
        self.redraw()  # first: the picture is what one waits for
        self._fill_controls()
        self._fill_film()

    def _click(self, value: list) -> None:
        y, x, _ = value
        if self.click_means.value == "places a crop":
            self.session.place_crop(y, x)
            self.redraw(tokens=False)
        else:
            self.session.click(y, x)
            self.redraw()

    def _step(self, side: int, value: list) -> None:
        rows, columns, _ = value
        h, w_ = self.session.analysis(min(side, len(self.session.sides) - 1)).grid
        y, x = self.session.place or (0.5, 0.5)
        row, column = int(y * h) + rows, int(x * w_) + columns
        self.session.click((min(max(row, 0), h - 1) + 0.5) / h, (min(max(column, 0), w_ - 1) + 0.5) / w_)
        self.redraw()

    def _hover(self, number: int, place: list) -> None:
        tiles = self._tiles
        side = tiles[number].side if number < len(tiles) else 0
        self.reading.put(element("div", self._reading(side, place), class_="toco-words", aria_live="polite"))

    def _reading(self, side: int, place: list) -> str:
        return self.session.read_out(side, *place) if place else HINT

    def _sample(self) -> None:
        self.session.sample_crops()
        self.redraw(tokens=False)

    def _clear(self) -> None:
        self.session.clear_crops()
        self.redraw(tokens=False)

    def _copy(self) -> None:
        if self.session.index >= self.session.pictures.n_listed:
            raise ToCoError("a photograph of yours is in no folder: put it in one, and open that with -p dataset")
        self.line.value = self.parameters_line()
        self.door.clipboard = [self.line.value, self.door.clipboard[1] + 1]

    def _save(self, kind: str) -> None:
        def make() -> bytes:
            file = io.BytesIO()
            with mpl.rc_context({"svg.hashsalt": "toco"}):
                options = {"bbox_inches": "tight", "metadata": {"Date": None} if kind == "svg" else {}}
                self.figure().savefig(file, format=kind, **options)
            return file.getvalue()

        self._hand_over(f"{self._file_name()}.{kind}", make, {"svg": "image/svg+xml"}.get(kind, "image/png"))

    def _save_label(self) -> None:
        label = palette_png(self.session.label(self.session.active))
        self._hand_over(f"{self._file_name()}-label.png", lambda: label, "image/png")

    def _hand_over(self, name: str, make: Callable[[], bytes], kind: str) -> None:
        """A file to the folder or to the browser, as the reader wishes."""
        if self.save_to.value == "browser":
            self.door.offer(name, make(), kind)
            return self.saved.put(f"downloaded {name}")
        path = self._place(name)  # first: a figure takes a second
        data = make()
        written(path, lambda place: place.write_bytes(data))
        self.saved.put(f"saved {self.folder.name}/{path.relative_to(self.folder).as_posix()}")

    def _save_elsewhere(self, to: str) -> None:
        self.save_name.disabled = to == "browser"

    def _place(self, name: str) -> Path:
        """Where a file of this name goes. Raises ToCoError where nothing may be saved, or not there."""
        if not self.may_save:
            raise ToCoError("nothing is saved where the notebook is served: Explorer(..., may_save=True) allows it")
        below = self.save_name.value.strip()
        folder = self.folder / inside_name(below, "folder", str(self.folder.name)) if below else self.folder
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise ToCoError(f"folder: {below!r:.200} leads out of {self.folder.name}")
        return folder / name

    def _file_name(self) -> str:
        name = self.session.picture.name.replace("/", "_")
        return f"{name}-{self.session.sides[self.session.active].settings.show.replace(' ', '_')}"

    # ---- scoring the split

    def _start_scoring(self) -> None:
        if self.session.subject(self.session.active).head:
            raise ToCoError("an ImageNet head ranks its classes for each image: a split cannot be scored with it")
        if self.scoring and self.scoring.running:
            raise ToCoError("the split is being scored already: stop it first")
        session, side = self.session, self.session.active
        what = f"{session.sides[side].settings.show} of {session.sides[side].subject}"
        self.stop.disabled = False
        self.progress.max, self.progress.layout.visibility = len(session.pictures), "visible"

        def tell(found: SplitScores) -> None:
            self.split = found
            self.progress.value = found.done
            names, problem = session.joint(side).names, self.scoring.error
            title = f"{found.done} of {found.total} images: {what}"
            skipped = f"{len(found.skipped)} skipped, first: {found.skipped[0]}" if found.skipped else ""
            notes = [word for word in (f"scoring stopped: {problem}" if problem else "", skipped) if word]
            self.split_numbers.put(report.numbers_html(found.numbers, names, title), report.notes_html(notes))
            if self.scoring.over:
                self.stop.disabled = True
                self._fill_film()  # with the IoU on each thumbnail

        self.scoring = SplitScoring(
            session.subject(side),
            session.pictures,
            session.sides[side].settings,
            session.joint(side),
            tell,
            give_way=self._give_way,
        ).start()

    def _stop_scoring(self) -> None:
        if self.scoring:
            self.scoring.stop()

    def _give_way(self) -> None:
        while self._busy and not (self.scoring and not self.scoring.running):
            time.sleep(0.002)

    # ---- what is seen

    def redraw(self, *, tokens: bool = True) -> None:
        """Draw the sides, and what is known about patches where that has changed."""
        session = self.session
        if self._crf_is_pending():
            return
        self._draw_tiles()
        self.saved.put()  # what is saved is not what is shown any more
        self._disable_controls()
        self.numbers.put(*(self._numbers_table(i) for i in range(len(session.sides))))
        crops, _ = session.crops(session.active)
        threshold = session.subject(session.active).config.crops.positive_threshold
        self.crop_table.put(report.crops_html(crops, threshold))
        if tokens:
            self._draw_tokens()
        self._draw_reasons()
        self._show_notes()

    def _draw_tiles(self) -> None:
        """Draw the tiles of which something has changed; what takes longest comes last."""
        session, in_row = self.session, self.session.arrange == "side by side"
        curtain = session.curtain_tiles() if session.arrange == "curtain" else ()
        self._tiles = [curtain[0]] if curtain else session.tiles()
        for number in sorted(range(len(self._tiles)), key=lambda i: self._tiles[i].show == "pseudo label"):
            tile, canvas = self._tiles[number], self._canvas(number)
            looks = len(session.sides), *(session.look(part) for part in curtain or (tile,))
            if self._drawn.get(number, (None,))[0] != looks:
                self._drawn[number] = looks, self._draw_tile(number, curtain or (tile,))
            with canvas.hold_sync():
                canvas.pin = list(session.place or ())
                canvas.width = 0 if in_row or len(self._tiles) > 1 else ALONE
                canvas.chosen = in_row and tile.show == session.sides[tile.side].settings.show
        n, columns = len(self._tiles), list(dict.fromkeys(tile.show for tile in self._tiles))
        for tile, pane in zip(self._tiles, self._panes, strict=False):  # one side below the other
            pane.layout.grid_row = str(tile.side + 1) if in_row else None
            pane.layout.grid_column = str(columns.index(tile.show) + 1) if in_row else None
        self.row.layout.grid_template_columns = f"repeat({len(columns) if in_row else n}, minmax(0, 1fr))"
        (self.row.add_class if n == 1 else self.row.remove_class)("toco-single")
        if len(self.row.children) != n:
            self.row.children = self._panes[:n]

    def _draw_tile(self, number: int, tiles: Sequence[Tile]) -> tuple[str, ...]:
        """Draw one tile, or a curtain of two; returns the notes."""
        session, canvas = self.session, self.canvases[number]
        views = [session.view(tile.side, tile.show) for tile in tiles]
        with canvas.hold_sync():
            canvas.picture = draw.encoded(views[0].picture)
            canvas.under = draw.encoded(views[1].picture) if len(views) == 2 else b""
            canvas.title = " | ".join(self._title(tile, view) for tile, view in zip(tiles, views, strict=True))
            canvas.label = f"{session.picture.name}: {canvas.title}"
        legends = [self._legend(tile, view) for tile, view in zip(tiles, views, strict=True)]
        self.legends[number].put(*dict.fromkeys(legends))
        return tuple(note for view in views for note in view.notes)

    def _title(self, tile: Tile, view: View) -> str:
        name = self.session.tile_name(tile)
        known = view.numbers is not None and tile.show in LABELS
        return f"{name} · {100 * view.numbers.scores.miou:.0f} % mIoU" if known else name

    def _disable_controls(self) -> None:
        """Those that change nothing of what is shown now; crops are drawn from the CAM, whatever is shown."""
        session = self.session
        tiles = session.curtain_tiles() if session.arrange == "curtain" else session.tiles()
        sides = range(len(session.sides)) if session.linked else [session.active]
        seen = {n for t in tiles if t.side in sides for n in fields_seen(session.settings(t.side, t.show))}
        if session.crops(session.active)[0]:
            seen |= {*MAP_FIELDS, "beta_l", "beta_h"}
        shown = {session.sides[side].settings.show for side in sides}
        if session.picture.mask is not None and shown & {"image", "CAM", "CAM label"}:
            seen |= {*LABEL_FIELDS["CAM label"]}
        if all(len(session.classes(side)[0]) < 2 for side in sides):
            seen -= {"class_colours"}
        if all(session.subject(side).head for side in sides):
            seen -= {"cam", "cam_scales", "flip"}
        always = {"show", "block", "head", "crop_size", "n_crops", "crop_seed"}
        always |= {"outline"} if session.picture.mask is not None else set()
        for name, control in self.controls.items():
            control.disabled = name not in seen | always

    def _draw_reasons(self) -> None:
        """The panel about the clicked pixel, for the active side."""
        session = self.session
        try:
            found, image = session.why(session.active), session.picture.image
        except ToCoError:  # a view tells what the model lacks
            found = None
        self.pinned.layout.display = None if found else "none"
        if not found:
            return
        self.why.put(why.why_html(found, session.sides[session.active].settings))
        self.votes.put(why.votes_html(found) if found.trace else Markup())
        pictures: list[np.ndarray | None] = [None, None, None]
        if found.trace:
            pictures[:2] = why.votes_picture(found, image), why.influence_picture(found, image)
        if found.pairs:
            patch = session.analysis(session.active).patch_at(*session.place)
            pictures[2] = why.pairs_picture(found, image, patch)
        titles = ("votes in a step", f"after {session.sides[session.active].settings.par_iterations} steps")
        for canvas, picture, title in zip(self.why_maps, pictures, (*titles, "PTC pulls, pushes"), strict=True):
            canvas.layout.display = "none" if picture is None else None
            if picture is not None:
                canvas.picture, canvas.title = draw.encoded(picture), title

    def _draw_tokens(self) -> None:
        session = self.session
        side, settings = session.active, session.sides[session.active].settings
        found = session.tokens(side)
        size = draw.shown_size(session.picture.image.shape[:2], 2 * SMALL)
        self.maps[0].picture = draw.encoded(draw.similarity_picture(found.similarity, size, found.patch))
        head = min(settings.head, len(found.attention))
        picture, top = draw.attention_picture(found.attention, size, head=head)
        self.maps[1].picture = draw.encoded(picture)
        title = report.heading(f"similar to the frame, block {settings.block}")
        self.map_titles[0].put(title, draw.colour_bar("similarity"))
        which = f"head {head} of {len(found.attention)}" if head else f"mean of {len(found.attention)} heads"
        self.maps[1].words = f"{which}; 1 would be an even spread"
        title = report.heading(f"class token looks at, block {settings.block}")
        self.map_titles[1].put(title, draw.colour_bar("attention", top=top))
        names = "AB" if len(session.sides) == 2 else ["all other patches"]
        curves = {name: session.tokens(i).by_block for i, name in enumerate(names)}
        layer = session.subject(side).model.layer
        title = report.heading("the framed patch: mean similarity to all others")
        self.curve.put(title, draw.curve_svg(curves, block=settings.block, layer=layer))

    def _legend(self, tile: Tile, view: View) -> Markup:
        session, settings = self.session, self.session.settings(tile.side, tile.show)
        two = len(session.sides) == 2 and tile.show not in SHARED
        head = report.heading(f"{'AB'[tile.side]}: {session.sides[tile.side].subject}") if two else Markup()
        names = session.joint(tile.side).names
        if settings.show == "CAM":
            places = [int(session.joint(tile.side).of_model[k]) for k in session.classes(tile.side)[0]]
            several = settings.class_colours and len(places) > 1
            scale = draw.label_key({k: names[k] for k in places}, ignored=False) if several else draw.colour_bar("CAM")
            key = draw.contour_key(settings.beta_l, settings.beta_h) if settings.contours else Markup()
            return joined([head, scale, key])
        if view.label is None or settings.show == "image":
            return head
        places = draw.labels_in(view.label)
        return joined([head, draw.label_key({k: names[k] for k in places if k < len(names)}, ignored=255 in places)])

    def _numbers_table(self, i: int) -> Markup:
        session, settings = self.session, self.session.sides[i].settings
        what = "CAM label" if settings.show in ("image", "CAM") else settings.show
        title = f"{'AB'[i] if len(session.sides) == 2 else 'this image'}: {what}"
        title += f" at beta {settings.beta:g}" if what == "CAM label" else ""
        missing = "no ground truth" if session.picture.mask is None else "nothing to score"
        try:
            found = session.numbers(i)
        except ToCoError:
            found = None
        return report.numbers_html(found, session.joint(i).names, title, missing=missing)

    def _show_notes(self) -> None:
        notes = [self.problem] if self.problem else []
        for number in range(len(getattr(self, "_tiles", []))):
            notes += self._drawn[number][1] if number in self._drawn else ()
        self.notes.put(report.notes_html(list(dict.fromkeys(notes))))

    def _crf_is_pending(self) -> bool:
        """The dense CRF takes seconds: it runs beside, and what it has found is drawn when it is there."""
        session = self.session
        tiles = session.curtain_tiles() if session.arrange == "curtain" else session.tiles()
        for i in sorted({tile.side for tile in tiles if tile.show == "segmentation"}):
            if not (session.sides[i].settings.crf and DECODER in session.subject(i).has):
                continue
            analysis = session.analysis(i)
            if analysis.has_crf():
                continue
            self.problem = "the dense CRF is being computed ..."
            self._show_notes()

            def work(analysis=analysis) -> None:
                self._give_way()
                analysis.segmentation(with_crf=True)
                self.problem = ""
                self.redraw(tokens=False)

            if not any(t.is_alive() for t in self._threads):
                self._threads = [threading.Thread(target=work, name="dense CRF", daemon=True)]
                self._threads[0].start()
            return True
        return False

    # ---- controls follow the session

    def _fill_controls(self) -> None:
        session = self.session
        side = session.sides[session.active]
        subject = session.subject(session.active)
        self._filling = True
        try:
            two = len(session.sides) == 2
            self.model.options = session.subjects.names
            self.compare.value, self.side.value, self.model.value = two, session.active, side.subject
            self.data.options = list(self.datasets)
            self.data.value = self.data_name
            for widget in (self.side, self.linked):
                widget.layout.display = None if two else "none"
            self.arrange.value = session.arrange
            self.views.disabled = session.arrange != "side by side"
            self.views.items = [{"name": view, "on": view in session.views} for view in SHOWN]
            for dropdown, tile in zip(self.curtain, session.curtain_tiles(), strict=True):
                dropdown.layout.display = None if session.arrange == "curtain" else "none"
                dropdown.options = session.tile_names()
                dropdown.value = session.tile_name(tile)
            self.controls["block"].max = subject.model.depth
            self.controls["head"].max = subject.model.encoder.blocks[0].attn.num_heads
            self.controls["crop_size"].max = min(session.analysis(session.active).images.shape[-2:])
            for name, control in self.controls.items():
                value = getattr(side.settings, name)
                if name == "par_dilations":
                    value = ", ".join(map(str, value))
                if name == "cam_scales":
                    control.options = sorted({*control.options, *value})
                control.value = value
            names = session.joint(session.active).names[1:]
            self.class_names.options = names
            classes = side.settings.classes
            if classes in CLASS_CHOICES:
                self.class_choice.value = classes
                chosen, _ = session.classes(session.active)
                joint = session.joint(session.active)
                self.class_names.value = tuple(joint.names[joint.of_model[k]] for k in chosen)
            else:
                self.class_choice.value = "chosen"
                wanted = [name.strip() for name in classes.split(",")]
                self.class_names.value = tuple(name for name in names if name in wanted)
            self._fill_classes()
        finally:
            self._filling = False

    def _fill_classes(self) -> None:
        """A chip per class; of very many the labelled, the chosen and the most probable ones."""
        session = self.session
        side, joint = session.active, session.joint(session.active)
        score = session.class_scores(side)
        on = {int(joint.of_model[k]) for k in session.classes(side)[0]}
        known, labelled = range(1, len(joint.names)), session.picture.labels or ()
        if len(joint.names) > MANY:
            ranked = sorted(known, key=lambda k: (k in on or k in labelled, score.get(k, 0.0)), reverse=True)
            known = ranked[: MANY // 2]
        tips = {True: "in the image's labels", False: "not in the image's labels"}
        self.classes.items = [
            {
                "name": joint.names[k],
                "on": k in on,
                "colour": draw.class_colour(k),
                "number": f"{score[k]:.2f}" if k in score else "",
                "tip": ("" if session.picture.labels is None else tips[k in labelled])
                + ("" if k in score else "; the model does not know it"),
            }
            for k in known
        ]

    def _fill_film(self) -> None:
        shown = self.order[self.page * PER_PAGE : (self.page + 1) * PER_PAGE]
        iou = self.split.iou if self.split else {}
        with self.film.hold_sync():
            self.film.items = [
                {
                    "index": i,
                    "title": self.session.pictures.names[i],
                    "source": self._thumbnail(i),
                    "words": "unreadable",
                    "mark": f"{100 * iou[i]:.0f}" if i in iou and not np.isnan(iou[i]) else "",
                }
                for i in shown
            ]
            self.film.chosen = self.session.index
        pages = (len(self.order) - 1) // PER_PAGE + 1
        where = f"\u2002page {self.page + 1} of {pages}, {len(self.order)} images\u2002"
        self.position.put(element("b", self.session.picture.name), where)

    def _thumbnail(self, index: int) -> str:
        if index not in self._thumbnails:
            picture = self.session.pictures.thumbnail(index)
            data = "" if picture is None else base64.b64encode(draw.encoded(picture)).decode()
            self._thumbnails[index] = data and f"data:image/jpeg;base64,{data}"
        return self._thumbnails[index]


def _button(word: str, tip: str) -> w.Button:
    return w.Button(description=word, tooltip=tip, layout=w.Layout(width="auto"))


def is_served() -> bool:
    """Whether voila shows the notebook to visitors, who are not its owner."""
    return os.environ.get("SERVER_SOFTWARE", "").startswith("voila")
