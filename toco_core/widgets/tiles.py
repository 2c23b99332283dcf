"""The part of the explorer that shows the views: side by side, one alone, or two with a curtain between them."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

import ipywidgets as w

from toco_core.errors import ToCoError
from toco_core.widgets import draw, report
from toco_core.widgets.canvas import Canvas, Chips
from toco_core.widgets.markup import Markup, Panel, element, joined
from toco_core.widgets.session import SHARED, Session, Tile, View
from toco_core.widgets.settings import ARRANGEMENTS, LABELS, SHOWN

HINT = "point: values · click or arrow keys: choose a place · n, p: next, previous image · + - 0: zoom · e: enlarge"
ALONE = 640  # width of a picture that is shown alone, CSS pixels


class Tiles:
    """A canvas with a legend for each tile of a session. `do(action)` runs an action of the reader's, `listen(canvas)`
    is called once with each canvas, `on_arranged()` after tiles were arranged in another way."""

    def __init__(
        self,
        session: Session,
        do: Callable[[Callable[[], None]], None],
        *,
        group: str,
        listen: Callable[[Canvas], None],
        on_arranged: Callable[[], None],
    ):
        self.session, self._do, self._group = session, do, group
        self._listen, self._on_arranged = listen, on_arranged
        self.canvases: list[Canvas] = []  # one per tile, made when first needed
        self.legends: list[Panel] = []
        self._panes: list[w.VBox] = []
        self.shown: list[Tile] = []
        self._drawn: dict[int, tuple] = {}  # what each canvas shows, the notes about it, its strength
        self._pointed: tuple[int, Sequence[float]] = (0, [])  # number of a tile, and the place in it
        self.row = w.Box()
        self.row.add_class("toco-row")
        self.reading = Panel()
        self.reading.add_class("toco-reading")
        self.arrange = w.ToggleButtons(options=ARRANGEMENTS, style={"button_width": "92px"})
        self.arrange.tooltips = ["views in a row", "one large picture", "two views, one to the left of a curtain"]
        self.views = Chips(label="views side by side")
        self.curtain = [
            w.Dropdown(description=word, style={"description_width": "46px"}, layout=w.Layout(width="210px"))
            for word in ("left", "right")
        ]
        self.controls = [self.arrange, self.views, *self.curtain]
        self.arrange.observe(lambda change: do(lambda: self._arrange(arrange=change["new"])), "value")
        for dropdown in self.curtain:
            dropdown.observe(lambda _: do(self._divide), "value")
        self.views.observe(lambda change: do(lambda: self._toggle(change["new"][0])), "toggled")

    def fill(self) -> None:
        """Set the controls to what the session says."""
        session = self.session
        self.arrange.value = session.arrange
        self.views.disabled = session.arrange != "side by side"
        self.views.items = [{"name": view, "on": view in session.views} for view in SHOWN]
        for dropdown, tile in zip(self.curtain, session.curtain_tiles(), strict=True):
            dropdown.layout.display = None if session.arrange == "curtain" else "none"
            dropdown.options = session.tile_names()
            dropdown.value = session.tile_name(tile)

    def visible(self) -> tuple[Tile, ...]:
        """The tiles that are seen; both of a curtain's."""
        session = self.session
        return tuple(session.curtain_tiles() if session.arrange == "curtain" else session.tiles())

    def draw(self, waiting: Collection[int] = ()) -> None:
        """Draw the tiles of which something has changed; what takes longest comes last. Of sides in `waiting` the
        segmentation is not there yet: its tile shows the image."""
        session, in_row = self.session, self.session.arrange == "side by side"
        curtain = session.curtain_tiles() if session.arrange == "curtain" else ()
        self.shown = [curtain[0]] if curtain else session.tiles()
        for number in sorted(range(len(self.shown)), key=lambda i: self.shown[i].show == "pseudo label"):
            tile, canvas = self.shown[number], self._canvas(number)
            parts = curtain or (tile,)
            looks = len(session.sides), *((session.look(part), waits(part, waiting)) for part in parts)
            strengths = [None if waits(part, waiting) else session.strength(part) for part in parts]
            before, notes, strengths_before = self._drawn.get(number, (None, (), None))
            if before != looks or (curtain and strengths_before != strengths):
                notes = self._draw(number, parts, waiting)
            elif strengths_before != strengths:
                self._mix(canvas, tile, strengths[0])
            self._drawn[number] = looks, notes, strengths
            with canvas.hold_sync():
                canvas.pin = list(session.place or ())
                canvas.width = 0 if in_row or len(self.shown) > 1 else ALONE
                canvas.chosen = in_row and tile.show == session.sides[tile.side].settings.show
        n, columns = len(self.shown), list(dict.fromkeys(tile.show for tile in self.shown))
        for tile, pane in zip(self.shown, self._panes, strict=False):  # one side below the other
            # not grid_row and grid_column: the browser's side takes them away again where grid_area says nothing
            pane.layout.grid_area = f"{tile.side + 1} / {columns.index(tile.show) + 1}" if in_row else None
        self.row.layout.grid_template_columns = f"repeat({len(columns) if in_row else n}, minmax(0, 1fr))"
        (self.row.add_class if n == 1 else self.row.remove_class)("toco-single")
        if len(self.row.children) != n:
            self.row.children = self._panes[:n]

    def forget(self) -> None:
        """Draw all tiles when they are drawn next, as after other images were opened."""
        self._drawn = {}

    @property
    def notes(self) -> list[str]:
        """What the tiles cannot show, and why."""
        found = [self._drawn[i][1] for i in range(len(self.shown)) if i in self._drawn]
        return list(dict.fromkeys(note for notes in found for note in notes))

    def read(self) -> None:
        """Tell what is at the place that is pointed at; without one what the reader can do."""
        number, place = self._pointed
        seen = place and number < len(self.shown)
        words = self.session.read_out(self.shown[number].side, *place) if seen else HINT
        self.reading.put(element("div", words, class_="toco-words", aria_live="polite"))

    # ---- what the reader does

    def _canvas(self, number: int) -> Canvas:
        """The canvas of a tile, made and listened to where it is not there yet."""
        while len(self.canvases) <= number:
            i, canvas = len(self.canvases), Canvas(group=self._group)
            self.canvases.append(canvas)
            self.legends.append(Panel())
            self._panes.append(w.VBox([canvas, self.legends[i]]))
            self._listen(canvas)
            canvas.observe(lambda change, i=i: self._point(i, change["new"]), "pointer")
            canvas.observe(lambda _, i=i: self._do(lambda: self._enlarge(i)), "enlarge")
        return self.canvases[number]

    def _point(self, number: int, place: Sequence[float]) -> None:
        self._pointed = number, place
        self.read()

    def _arrange(self, **how: Any) -> None:
        self.session.arrange_views(**how)
        self._on_arranged()

    def _divide(self) -> None:
        self._arrange(curtain=[dropdown.value for dropdown in self.curtain])

    def _toggle(self, view: str) -> None:
        shown = set(self.session.views)
        if shown == {view}:
            raise ToCoError("one view at least stays")
        self._arrange(views=tuple(shown ^ {view}))

    def _enlarge(self, number: int) -> None:
        """One tile alone; where one is, all again."""
        session = self.session
        if session.arrange == "side by side":
            side, show = session.tiles()[number]
            session.active = side
            session.sides[side] = replace(session.sides[side], settings=session.settings(side, show))
            session.arrange_views("one")
        else:
            session.arrange_views("side by side")
        self._on_arranged()

    # ---- what is seen

    def _draw(self, number: int, tiles: Sequence[Tile], waiting: Collection[int]) -> tuple[str, ...]:
        """Draw one tile, or a curtain of two; returns the notes."""
        session, canvas = self.session, self.canvases[number]
        views = [session.view(tile.side, "image" if waits(tile, waiting) else tile.show) for tile in tiles]
        with canvas.hold_sync():
            canvas.picture = draw.encoded(views[0].picture)
            canvas.ends, canvas.under = [], draw.encoded(views[1].picture) if len(views) == 2 else b""
            canvas.title = " | ".join(self._title(tile, view) for tile, view in zip(tiles, views, strict=True))
            canvas.label = f"{session.picture.name}: {canvas.title}"
        legends = [self._legend(tile, view) for tile, view in zip(tiles, views, strict=True)]
        self.legends[number].put(*dict.fromkeys(legends))
        return tuple(note for view in views for note in view.notes)

    def _mix(self, canvas: Canvas, tile: Tile, strength: float) -> None:
        """Let the browser mix the overlay, so that one that grows stronger is neither drawn nor sent again: between
        strength 0 and 1 a tile's picture moves along a line."""
        with canvas.hold_sync():
            if not canvas.ends:
                views = [self.session.view(tile.side, tile.show, strength=end) for end in (0.0, 1.0)]
                canvas.ends = [draw.encoded(view.picture) for view in views]
            canvas.strength = strength

    def _title(self, tile: Tile, view: View) -> str:
        name = self.session.tile_name(tile)
        known = view.numbers is not None and tile.show in LABELS
        return f"{name} · {100 * view.numbers.scores.miou:.0f} % mIoU" if known else name

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


def waits(tile: Tile, waiting: Collection[int]) -> bool:
    """Whether a tile's label is still being computed, see `Tiles.draw`."""
    return tile.show == "segmentation" and tile.side in waiting
