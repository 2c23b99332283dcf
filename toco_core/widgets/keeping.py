"""The part of the explorer with which something is taken along: a papermill line, a figure, a label."""

import io
import re
from collections.abc import Callable
from pathlib import Path

import ipywidgets as w
import matplotlib as mpl

from toco_core.data.files import palette_png
from toco_core.data.split import inside_name
from toco_core.errors import ToCoError
from toco_core.machine.writing import write_file
from toco_core.widgets import report
from toco_core.widgets.canvas import Door
from toco_core.widgets.markup import Panel, button
from toco_core.widgets.session import Session


class Keeping:
    """Files are saved in `folder` and below it where `may_save`, or go to the browser through the door.

    `do(action)` runs an action of the reader's, `line()` gives the command that shows this again.
    """

    def __init__(
        self,
        session: Session,
        do: Callable[[Callable[[], None]], None],
        *,
        door: Door,
        folder: Path,
        may_save: bool,
        line: Callable[[], str],
    ):
        self.session, self.folder, self.may_save = session, folder, may_save
        self._door, self._line = door, line
        full = {"layout": w.Layout(width="auto"), "style": {"description_width": "92px"}}
        self.copy = button("copy as parameters", "the papermill line")
        self.line = w.Textarea(rows=5, layout=w.Layout(width="auto"))
        self.name = w.Text(description="folder", placeholder=f"below {folder.name}", disabled=not may_save, **full)
        self.png, self.svg = button("figure PNG", "save"), button("figure SVG", "save")
        self.label, self.saved = button("label PNG", "save the label with VOC's palette"), Panel()
        goals = ["folder", "browser"] if may_save else ["browser"]
        self.to = w.ToggleButtons(options=goals, description="to", style={"button_width": "80px"})
        self.to.tooltips = ["below the notebook's folder", "as a download"][-len(goals) :]
        files = w.HBox([self.png, self.svg, self.label], layout=w.Layout(flex_flow="row wrap", align_items="center"))
        self.controls = [self.copy, self.line, self.to, self.name, files, self.saved]
        for widget, action in (
            (self.copy, self._copy),
            (self.png, lambda: self._save("png")),
            (self.svg, lambda: self._save("svg")),
            (self.label, self._save_label),
        ):
            widget.on_click(lambda _, action=action: do(action))
        self.to.observe(lambda _: do(self._choose_goal), "value")

    def place(self, name: str) -> Path:
        """Where a file of this name goes. Raises ToCoError where nothing may be saved, or not there."""
        if not self.may_save:
            raise ToCoError("nothing is saved where the notebook is served: Explorer(..., may_save=True) allows it")
        below = self.name.value.strip()
        folder = self.folder / inside_name(below, "folder", str(self.folder.name)) if below else self.folder
        if not folder.resolve().is_relative_to(self.folder.resolve()):
            raise ToCoError(f"folder: {below!r:.200} leads out of {self.folder.name}")
        return folder / name

    def _copy(self) -> None:
        if self.session.index >= self.session.pictures.n_listed:
            raise ToCoError("a photograph of yours is in no folder: put it in one, and open that with -p dataset")
        self.line.value = self._line()
        self._door.clipboard = [self.line.value, self._door.clipboard[1] + 1]

    def _choose_goal(self) -> None:
        self.name.disabled = self.to.value == "browser"

    def _save(self, kind: str) -> None:
        def make() -> bytes:
            file = io.BytesIO()
            with mpl.rc_context({"svg.hashsalt": "toco"}):
                options = {"bbox_inches": "tight", "metadata": {"Date": None} if kind == "svg" else {}}
                report.figure(self.session).savefig(file, format=kind, **options)
            return file.getvalue()

        self._hand_over(f"{self._stem()}.{kind}", make, {"svg": "image/svg+xml"}.get(kind, "image/png"))

    def _save_label(self) -> None:
        label = palette_png(self.session.label(self.session.active))
        self._hand_over(f"{self._stem()}{side_word(self.session)}-label.png", lambda: label, "image/png")

    def _hand_over(self, name: str, make: Callable[[], bytes], kind: str) -> None:
        """A file to the folder or to the browser, as the reader wishes."""
        if self.to.value == "browser":
            self._door.offer(name, make(), kind)
            return self.saved.put(f"downloaded {name}")
        path = self.place(name)  # first: a figure takes a second
        write_file(path, make())
        self.saved.put(f"saved {self.folder.name}/{path.relative_to(self.folder).as_posix()}")

    def _stem(self) -> str:
        show = self.session.sides[self.session.active].settings.show
        return f"{self.session.picture.name.replace('/', '_')}-{show.replace(' ', '_')}"


def side_word(session: Session) -> str:
    """The active side and its model, for the name of a file; nothing where there is one side."""
    if len(session.sides) == 1:
        return ""
    name = re.sub(r"[^\w.-]+", "_", session.sides[session.active].subject)
    return f"-{'AB'[session.active]}-{name[:60]}"
