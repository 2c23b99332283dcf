"""HTML and buttons of the explorer, built in one place: text is escaped here or nowhere.

    element("tr", element("td", name), element("td", "0.31"))

Names of files, classes, splits and folders come from strangers, and `ipywidgets.HTML` puts what it is given into the
page: a photograph called `<img src=x onerror=...>` would run in the reader's browser, with the reader's cookie.
"""

import html
from collections.abc import Iterable

import ipywidgets as w

from toco_core.viz.theme import showable


class Markup(str):
    """HTML from `element` and `joined`: shown as it is, whereas any other text is escaped."""


def joined(parts: Iterable[str], between: str = "") -> Markup:
    """Concatenate parts: `Markup` as it is, all other text escaped."""
    return Markup(_escaped(between).join(_escaped(part) for part in parts))


def element(tag: str, *parts: str, **attributes: str | float) -> Markup:
    """Build `<tag attributes>parts</tag>`, parts as `joined` takes them.

    Attributes are escaped and quoted. An underscore in a name stands for a dash, one at its end for nothing (`class_`,
    `text_anchor`). Without parts of any kind the element is still closed.
    """
    pairs = "".join(f' {name.rstrip("_").replace("_", "-")}="{_plain(value)}"' for name, value in attributes.items())
    return Markup(f"<{tag}{pairs}>{joined(parts)}</{tag}>")


def drawing(*parts: str, width: int, height: int, label: str) -> Markup:
    """An SVG in the text's colour, light or dark, no wider than its place; `label` is read aloud."""
    size = {"viewBox": f"0 0 {width} {height}", "width": width, "height": height}
    style = "font:11px sans-serif;fill:currentColor;max-width:100%"
    return element("svg", *parts, **size, role="img", aria_label=label, style=style)


LINE_BREAK = Markup("<br>")


class Panel(w.HTML):
    """An HTML widget that is filled by `put` alone."""

    def put(self, *parts: str) -> None:
        """Show the parts, as `joined` takes them; what is shown already is not sent again."""
        value = str(joined(parts))
        if self.value != value:
            self.value = value


def button(word: str, tip: str) -> w.Button:
    """A button as wide as its word."""
    return w.Button(description=word, tooltip=tip, layout=w.Layout(width="auto"))


def _escaped(part: str) -> str:
    return str(part) if isinstance(part, Markup) else _plain(part)


def _plain(value: str | float) -> str:
    return html.escape(showable(str(value)))
