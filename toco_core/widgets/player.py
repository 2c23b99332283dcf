"""Play what changes: the image at hand over the blocks or over PAR's iterations, a run over its training.

    Player(session)

Frames are worked out ahead in a thread, so that playing never waits long; GIF and MP4 hold all of them.
"""

import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w

from toco_core.data.split import inside_name
from toco_core.errors import ToCoError, in_a_line
from toco_core.widgets import draw
from toco_core.widgets.markup import Markup, Panel, element
from toco_core.widgets.movies import Movie, movies_of
from toco_core.widgets.session import Session

MS = 400  # between two frames
KINDS = {"gif": "image/gif", "mp4": "video/mp4"}


class Player(w.VBox):
    """The session's image and first side, as they are when the player is made or `renew` is pressed.

    Files are saved in `folder` where `may_save`; elsewhere `offer(name, data, kind)` is called with each, a download.
    `on_saved(path)` is called with each that was saved. `settle` waits for what runs in the background.
    """

    def __init__(
        self,
        session: Session,
        *,
        folder: Path | str = "explored",
        may_save: bool = True,
        offer: Callable[[str, bytes, str], None] | None = None,
        on_saved: Callable[[Path], None] = lambda path: None,
        give_way: Callable[[], None] = lambda: None,
    ):
        super().__init__()
        self.session, self.folder, self.may_save = session, Path(folder), may_save
        self.on_saved, self._offer, self._give_way = on_saved, offer, give_way
        self.movie: Movie | None = None
        self.problem, self._threads, self._filling = "", [], False
        self.what = w.Dropdown(description="play", layout=w.Layout(width="290px"), style={"description_width": "36px"})
        self.play = w.Play(interval=MS, show_repeat=True)
        self.at = w.IntSlider(readout=False, layout=w.Layout(width="260px"))
        self.image = w.Image(format="jpeg", layout=w.Layout(max_width="calc(100% - 4px)"))
        self.image.add_class("toco-played")
        self.caption, self.notes = Panel(), Panel()
        self.caption.add_class("toco-played-caption")
        self.renew = _button("use the image above", "with the settings that it has now")
        self.saves = [_button(kind.upper(), f"all frames as {kind.upper()}") for kind in KINDS]
        for button in self.saves:
            button.disabled = not may_save and offer is None
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        self.children = [
            w.HBox([self.what, self.renew, *self.saves], layout=wrap),
            w.HBox([self.play, self.at, self.caption], layout=wrap),
            self.notes,
            self.image,
        ]
        self.add_class("toco-explorer")
        self._link = w.jslink((self.play, "value"), (self.at, "value"))
        self.at.observe(lambda _: self._do(self._show), "value")
        self.what.observe(lambda _: self._do(self._open_movie), "value")
        self.renew.on_click(lambda _: self._do(self.follow))
        for kind, button in zip(KINDS, self.saves, strict=True):
            button.on_click(lambda _, kind=kind: self._do(lambda: self._save(kind)))
        self._do(self.follow)

    # ---- for Python

    def follow(self) -> None:
        """Play the session's image with the settings that it has now."""
        self._movies, before = movies_of(self.session), self.what.value
        self._filling = True
        self.what.options = list(self._movies)
        self.what.value = before if before in self._movies else next(iter(self._movies))
        self._filling = False
        self._open_movie()

    def settle(self, timeout: float = 60.0) -> None:
        """Wait for frames and files."""
        for thread in self._threads:
            thread.join(timeout)

    def __repr__(self) -> str:
        return f"Player({self.movie.title}: {len(self.movie)} frames)" if self.movie else f"Player({self.problem})"

    # ---- within

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

    def _open_movie(self) -> None:
        movie = self._movies[self.what.value]()
        self._filling = True
        for widget in (self.play, self.at):
            widget.max = len(movie) - 1
            widget.value = movie.begins_at
        self._filling = False
        self.movie = movie
        self._show()
        self._in_background(lambda: self._work_ahead(movie), "frames")

    def _show(self) -> None:
        picture = self.movie.frame(self.at.value)
        self.caption.put(element("b", self.movie.captions[self.at.value]))  # first: no picture has another's
        self.image.value = draw.encoded(picture)
        self.image.width = str(picture.shape[1])

    def _work_ahead(self, movie: Movie) -> None:
        for i in range(len(movie)):
            if self.movie is not movie:
                return
            self._give_way()
            movie.frame(i)

    def _save(self, kind: str) -> None:
        if not self.may_save and self._offer is None:
            raise ToCoError("nothing is saved where the notebook is served")
        movie = self.movie
        name = inside_name(movie.title.replace("/", "_").replace(", ", "-").replace(" ", "_"), "name", "title")
        name = f"{name}-{self.what.value.split()[-1].strip(',')}.{kind}"

        def write() -> None:
            if self.may_save:
                saved = movie.save(self.folder / name, seconds=MS / 1000)
                self.problem = f"saved {self.folder.name}/{saved.name}"
                self.on_saved(saved)
            else:
                with tempfile.TemporaryDirectory(prefix="toco-") as folder:
                    data = movie.save(Path(folder) / name, seconds=MS / 1000).read_bytes()
                self._offer(name, data, KINDS[kind])
                self.problem = f"downloaded {name}"
            self._show_notes()

        self.problem = "the frames are being written ..."
        self._in_background(write, "movie")

    def _in_background(self, work: Callable[[], None], name: str) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001  a thread's error is told where its result would be
                self.problem = in_a_line(error)
                self._show_notes()

        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=run, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _show_notes(self) -> None:
        self.notes.put(element("div", self.problem, class_="toco-notes", role="status") if self.problem else Markup())


def _button(word: str, tip: str) -> w.Button:
    return w.Button(description=word, tooltip=tip, layout=w.Layout(width="auto"))
