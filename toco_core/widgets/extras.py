"""Below the explorer: the gallery of the split, the player, and the image as a page; each is made when it is opened."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ipywidgets as w

from toco_core.errors import ToCoError
from toco_core.machine.writing import write_file
from toco_core.widgets.gallery import Gallery
from toco_core.widgets.keeping import side_word
from toco_core.widgets.markup import Panel, element, joined
from toco_core.widgets.page import session_page
from toco_core.widgets.player import Player
from toco_core.widgets.session import Session


class Extras(w.VBox):
    """Buttons that open a gallery and a player of a session, and one that makes a page of its image.

    `on_open(index)` shows an image of the gallery, `give_way` is what threads call before each piece of work. Files are
    saved in `folder` where `may_save`, elsewhere `offer(name, data, kind)` makes a download of them; the page is a
    download in any case.
    """

    def __init__(
        self,
        session: Session,
        *,
        folder: Path,
        may_save: bool,
        offer: Callable[[str, bytes, str], None] | None = None,
        on_open: Callable[[int], Any] | None = None,
        give_way: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.session, self.folder, self.may_save = session, folder, may_save
        self.gallery: Gallery | None = None
        self.player: Player | None = None
        self._offer, self._on_open, self._give_way = offer, on_open, give_way
        self.show_gallery = _toggle("gallery of the split", "all images, sorted and filtered by what is wrong")
        self.show_player = _toggle("play", "over the blocks, over PAR's iterations, over a training")
        self.make_page = w.Button(
            description="save as a page",
            tooltip="one HTML file with this image under all settings, which needs no kernel",
            layout=w.Layout(width="auto"),
        )
        self.made = Panel()
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        self._row = w.HBox([self.show_gallery, self.show_player, self.make_page, self.made], layout=wrap)
        self.children = [self._row]
        self.show_gallery.observe(lambda _: self._arrange(), "value")
        self.show_player.observe(lambda _: self._arrange(), "value")
        self.make_page.on_click(lambda _: self._make_page())

    def settle(self, timeout: float = 60.0) -> None:
        """Wait for what runs in the background."""
        for part in (self.gallery, self.player):
            if part is not None:
                part.settle(timeout)

    def _arrange(self) -> None:
        shown = [self._row]
        if self.show_gallery.value:
            if self.gallery is None:
                self.gallery = Gallery(self.session, on_open=self._on_open, give_way=self._give_way)
            shown.append(self.gallery)
        elif self.gallery is not None:
            self.gallery.surveying.stop()
        if self.show_player.value:
            if self.player is None:
                options = {"folder": self.folder, "may_save": self.may_save, "offer": self._offer}
                self.player = Player(self.session, **options, give_way=self._give_way)
            else:
                self.player.renew.click()
            shown.append(self.player)
        self.children = shown

    def _make_page(self) -> None:
        try:
            page = session_page(self.session, self.session.active)
            name = f"{self.session.picture.name.replace('/', '_')}{side_word(self.session)}.html"
            if self.may_save:
                write_file(self.folder / name, page)
            data = base64.b64encode(page.encode()).decode()
            link = element("a", f"download {name}", href=f"data:text/html;base64,{data}", download=name)
            saved = f", saved {self.folder.name}/{name}" if self.may_save else ""
            self.made.put(joined([link, f" ({len(page) // 1000} kB{saved})"]))
        except ToCoError as error:
            self.made.put(str(error))


def _toggle(word: str, tip: str) -> w.ToggleButton:
    return w.ToggleButton(description=word, tooltip=tip, layout=w.Layout(width="auto"))
