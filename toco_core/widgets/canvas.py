"""The parts of the explorer that ipywidgets lacks: a picture that can be pointed at, and a row of thumbnails."""

from pathlib import Path

import anywidget
import traitlets

HERE = Path(__file__).parent


class Canvas(anywidget.AnyWidget):
    """A JPEG picture. The browser sets `pointer`, `click`, `step` and `turn`; places are (y, x) in [0, 1)."""

    _esm, _css = HERE / "canvas.js", HERE / "look.css"
    picture = traitlets.Bytes(b"").tag(sync=True)
    label = traitlets.Unicode("").tag(sync=True)  # for readers of the screen
    words = traitlets.Unicode("").tag(sync=True)  # below the picture
    width = traitlets.Int(448).tag(sync=True)
    pointer = traitlets.List([]).tag(sync=True)  # [y, x], or [] outside
    click = traitlets.List([]).tag(sync=True)  # [y, x, number of the click]
    step = traitlets.List([]).tag(sync=True)  # [rows, columns, number]: arrow keys
    turn = traitlets.List([]).tag(sync=True)  # [1 or -1, number]: next or previous image


class Filmstrip(anywidget.AnyWidget):
    """Thumbnails: `items` have index, title, source (an address, or "" where the file cannot be read) and mark."""

    _esm, _css = HERE / "filmstrip.js", HERE / "look.css"
    items = traitlets.List([]).tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)
    wanted = traitlets.List([]).tag(sync=True)  # [index, number of the click]
    clipboard = traitlets.List(["", 0]).tag(sync=True)  # a text for the browser's clipboard, and its number


class RowTable(anywidget.AnyWidget):
    """A table whose rows are chosen by a click, or by Enter: texts, and a colour in front of each row."""

    _esm, _css = HERE / "rows.js", HERE / "look.css"
    head = traitlets.List([]).tag(sync=True)
    rows = traitlets.List([]).tag(sync=True)  # lists of texts, as long as `head`
    colours = traitlets.List([]).tag(sync=True)
    chosen = traitlets.Int(-1).tag(sync=True)
    wanted = traitlets.List([]).tag(sync=True)  # [row, number of the click]
