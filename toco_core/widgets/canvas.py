"""The parts of the explorer that ipywidgets lacks: pictures to point at, thumbnails, chips to switch on and off."""

from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent


class Canvas(anywidget.AnyWidget):
    """A JPEG picture. The browser sets `pointer`, `click`, `step`, `turn`, `enlarge`; places are (y, x) in [0, 1).

    Canvases of one `group` are zoomed, moved and pointed at together, in the browser alone. With a picture `under` the
    other one it is a curtain. An overlay that grows stronger is mixed in the browser, from its two `ends`.
    """

    _esm, _css = HERE / "canvas.js", HERE / "look.css"
    picture = traitlets.Bytes(b"").tag(sync=True)
    ends = traitlets.List([]).tag(sync=True)  # [without overlay, overlay alone]: shown mixed instead of `picture`
    strength = traitlets.Float(0.0).tag(sync=True)  # of the overlay among `ends`, 0 to 1
    under = traitlets.Bytes(b"").tag(sync=True)  # seen to the right of the curtain
    title = traitlets.Unicode("").tag(sync=True)  # above the picture
    label = traitlets.Unicode("").tag(sync=True)  # for readers of the screen
    words = traitlets.Unicode("").tag(sync=True)  # below the picture
    width = traitlets.Int(0).tag(sync=True)  # CSS pixels; 0: all that there is
    group = traitlets.Unicode("").tag(sync=True)
    chosen = traitlets.Bool(False).tag(sync=True)
    pin = traitlets.List([]).tag(sync=True)  # [y, x] of a mark, or []
    pointer = traitlets.List([]).tag(sync=True)  # [y, x], or [] outside
    click = traitlets.List([]).tag(sync=True)  # [y, x, number of the click]
    step = traitlets.List([]).tag(sync=True)  # [rows, columns, number]: arrow keys
    turn = traitlets.List([]).tag(sync=True)  # [1 or -1, number]: next or previous image
    enlarge = traitlets.Int(0).tag(sync=True)  # number of the wish


class Thumbnails(anywidget.AnyWidget):
    """Small pictures to choose from: `items` have index, title (a tip), source (an address, or "" where there is no
    picture), words (in its place) and mark. With `captions` a grid, whose items have a name too; else a strip."""

    _esm, _css = HERE / "thumbnails.js", HERE / "look.css"
    items = traitlets.List([]).tag(sync=True)
    captions = traitlets.Bool(False).tag(sync=True)
    label = traitlets.Unicode("images").tag(sync=True)  # for readers of the screen
    chosen = traitlets.Int(-1).tag(sync=True)
    wanted = traitlets.List([]).tag(sync=True)  # [index, number of the click]


class Door(anywidget.AnyWidget):
    """Photographs from the browser, chosen, dropped or pasted, come as messages {name} with one buffer; `offer` sends a
    download to it, `clipboard` a text."""

    _esm, _css = HERE / "door.js", HERE / "look.css"
    clipboard = traitlets.List(["", 0]).tag(sync=True)  # a text, and its number

    def offer(self, name: str, data: bytes, kind: str) -> None:
        """Download bytes under a name; `kind` is their MIME type."""
        self.send({"name": name, "kind": kind}, [data])


class Chips(anywidget.AnyWidget):
    """Names to switch on and off: `items` have name and on, and may have colour (CSS), number and tip."""

    _esm, _css = HERE / "chips.js", HERE / "look.css"
    items = traitlets.List([]).tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)  # for readers of the screen
    disabled = traitlets.Bool(False).tag(sync=True)
    toggled = traitlets.List([]).tag(sync=True)  # [name, number of the click]


class RowTable(anywidget.AnyWidget):
    """A table whose rows are chosen by a click, or by Enter: texts, and a colour in front of each row."""

    _esm, _css = HERE / "rows.js", HERE / "look.css"
    head = traitlets.List([]).tag(sync=True)
    rows = traitlets.List([]).tag(sync=True)  # lists of texts, as long as `head`
    colours = traitlets.List([]).tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)
    wanted = traitlets.List([]).tag(sync=True)  # [row, number of the click]
