"""The part of the explorer with which an image is found: thumbnails in pages, a search, an order."""

import base64
from collections.abc import Callable, Iterator, Mapping

import ipywidgets as w
import numpy as np

from toco_core.errors import ToCoError
from toco_core.widgets import draw
from toco_core.widgets.canvas import Thumbnails
from toco_core.widgets.markup import Panel, button, element
from toco_core.widgets.session import Session

PER_PAGE = 10  # thumbnails
ORDERS = ("list order", "worst first")


class Finder:
    """The images that were found, in their order. `do(action)` runs an action of the reader's, `go(index)` shows an
    image; `iou` holds the scores of images that are known."""

    def __init__(self, session: Session, do: Callable[[Callable[[], None]], None], go: Callable[[int], None]):
        self.session = session
        self.iou: Mapping[int, float] = {}
        self.order, self.page = list(range(len(session.pictures))), 0
        self._sources: dict[int, str] = {}
        options = {"layout": w.Layout(width="auto"), "style": {"description_width": "52px"}}
        self.search = w.Text(placeholder="name or class", description="search", continuous_update=False, **options)
        self.sort = w.Dropdown(options=ORDERS, description="order", **options)
        self.film = Thumbnails()
        self.back, self.forth = button("‹", "previous page"), button("›", "next page")
        self.position = Panel()
        self.controls = [self.back, self.forth, self.position, self.search, self.sort]
        for widget in (self.search, self.sort):
            widget.observe(lambda _: do(self.find), "value")
        for widget, by in ((self.back, -1), (self.forth, 1)):
            widget.on_click(lambda _, by=by: do(lambda: self.turn_page(by)))
        self.film.observe(lambda change: do(lambda: go(change["new"][0])), "wanted")

    def find(self) -> None:
        """Show the images that search and order ask for. Raises ToCoError where there is none, or no score."""
        found = self.session.pictures.find(self.search.value)
        if not found:
            raise ToCoError(f"no image's name or class holds {self.search.value!r}")
        if self.sort.value == ORDERS[1]:
            if not self.iou:
                raise ToCoError("worst first needs scores: press `score the split` first")
            score = {i: self.iou.get(i, np.nan) for i in found}
            found.sort(key=lambda i: np.inf if np.isnan(score[i]) else score[i])
        self.order, self.page = found, 0
        self.fill()

    def begin_anew(self) -> None:
        """All images, as after another data set was opened."""
        self.order, self.page, self.iou, self._sources = list(range(len(self.session.pictures))), 0, {}, {}

    def show_all(self) -> None:
        """All images, as after one was added."""
        self.search.value = ""
        self.order = list(range(len(self.session.pictures)))

    def follow(self) -> None:
        """Turn to the page of the image at hand, where it was found."""
        if self.session.index in self.order:
            self.page = self.order.index(self.session.index) // PER_PAGE
        self.fill()

    def turn_page(self, by: int) -> None:
        self.page = min(max(self.page + by, 0), (len(self.order) - 1) // PER_PAGE)
        self.fill()

    def onward(self, by: int) -> Iterator[int]:
        """The images after (`by` 1) or before (-1) the one at hand, all round."""
        at = self.order.index(self.session.index) if self.session.index in self.order else -1
        for distance in range(1, len(self.order) + 1):
            yield self.order[(at + by * distance) % len(self.order)]

    def fill(self) -> None:
        """Show the page, with the score on each thumbnail where it is known."""
        names = self.session.pictures.names
        with self.film.hold_sync():
            self.film.items = [
                {
                    "index": i,
                    "title": names[i],
                    "source": self._source(i),
                    "words": "unreadable",
                    "mark": f"{100 * self.iou[i]:.0f}" if i in self.iou and not np.isnan(self.iou[i]) else "",
                }
                for i in self.order[self.page * PER_PAGE : (self.page + 1) * PER_PAGE]
            ]
            self.film.chosen = self.session.index
        pages = (len(self.order) - 1) // PER_PAGE + 1
        where = f"\u2002page {self.page + 1} of {pages}, {len(self.order)} images\u2002"
        self.position.put(element("b", self.session.picture.name), where)

    def _source(self, index: int) -> str:
        if index not in self._sources:
            picture = self.session.pictures.thumbnail(index)
            data = "" if picture is None else base64.b64encode(draw.encoded(picture)).decode()
            self._sources[index] = data and f"data:image/jpeg;base64,{data}"
        return self._sources[index]
