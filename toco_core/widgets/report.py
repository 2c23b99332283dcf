"""What the explorer says in words and tables (HTML), and its figure for paper (matplotlib)."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toco_core import viz
from toco_core.conventions import classes_in
from toco_core.widgets import draw
from toco_core.widgets.analysis import Crop
from toco_core.widgets.markup import LINE_BREAK, Markup, element, joined
from toco_core.widgets.scoring import Numbers
from toco_core.widgets.session import Session


def heading(text: str) -> Markup:
    """The line above a table, a scale or a picture."""
    return element("div", text, class_="toco-heading")


def notes_html(notes: Sequence[str]) -> Markup:
    """Messages, one a line; nothing for none."""
    return element("div", joined(notes, LINE_BREAK), class_="toco-notes", role="status") if any(notes) else Markup()


def numbers_html(
    found: Numbers | None, names: Sequence[str], title: str, *, missing: str = "no ground truth"
) -> Markup:
    """A table of IoU, precision and recall per class that truth or prediction shows, in percent; or what is missing."""
    if found is None:
        return joined([heading(title), missing])
    scores, rows = found.scores, [_row("th", "%", "IoU", "precision", "recall")]
    rows.append(_row("th", "mean IoU", _percent(scores.miou), "", ""))
    for k, name in enumerate(names):
        values = scores.iou[k], scores.precision[k], scores.recall[k]
        if not all(np.isnan(v) for v in values):
            rows.append(_row("td", name, *(_percent(v) for v in values)))
    some = "" if found.coverage > 0.9995 else f", on the {100 * found.coverage:.0f} % of pixels that it decides"
    return joined([heading(title + some), element("table", *rows, class_="toco-table")])


def crops_html(crops: Sequence[Crop], threshold: float) -> Markup:
    """A table of the local views."""
    if not crops:
        where = element("i", "click places a crop")
        return joined(["no crops yet: sample them, or click on the picture with ", where])
    rows = [_row("th", "crop", "flag", f"ratio (> {threshold:g})", "similarity")]
    for i, crop in enumerate(crops, 1):
        flag = "positive" if crop.is_positive else "negative"
        rows.append(_row("td", str(i), flag, f"{crop.ratio:.2f}", f"{crop.similarity:+.2f}"))
    return element("table", *rows, class_="toco-table")


def _row(tag: str, *cells: str) -> Markup:
    return element("tr", *(element(tag, cell) for cell in cells))


def figure(session: Session) -> Figure:
    """What is on the screen, for paper: image, each side, the clicked patch's similarity and its curve over depth."""
    sides = range(len(session.sides))
    columns = 1 + len(sides) + 2
    made = Figure(figsize=(2.9 * columns, 3.3), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, gridspec_kw={"width_ratios": [1] * (columns - 1) + [0.9]})
    viz.show(axes[0], session.picture.image, session.picture.name)
    named: dict[int, dict[str, str]] = {}  # colour -> what it means on A, on B
    for i in sides:
        view, settings = session.view(i), session.sides[i].settings
        viz.show(axes[1 + i], view.picture, _title(session, i))
        if view.label is not None and settings.show not in ("image", "CAM"):
            names = session.joint(i).names
            for k in classes_in(view.label):
                if k < len(names):
                    named.setdefault(k, {})["AB"[i]] = names[k]
    tokens, settings = session.tokens(0), session.sides[0].settings
    picture = draw.similarity_picture(tokens.similarity, draw.shown_size(session.picture.image.shape[:2]), tokens.patch)
    viz.show(axes[-2], picture, f"similarity to the framed patch\nblock {settings.block}, −1 blue to 1 red")
    ax = axes[-1]
    for i in sides:
        values = session.tokens(i).by_block
        ax.plot(range(1, len(values) + 1), values, "o-", ms=3, label="AB"[i], color=("#d55e00", "#0072b2")[i])
    ax.axvline(settings.block, color="#999999", lw=1)
    ax.set(title="that patch, all others", xlabel="block", ylabel="mean cosine similarity", ylim=(None, 1))
    ax.title.set_fontsize(9)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_box_aspect(0.8)
    if len(sides) == 2:
        ax.legend(fontsize=8)
    if named:
        words = {k: _colour_name(names) for k, names in named.items()}
        viz.class_legend(made, [words.get(k, "") for k in range(max(words) + 1)], sorted(words))
    viz.plain_text(made)
    return made


def _colour_name(names: Mapping[str, str]) -> str:
    """One name where the sides agree, else that of each."""
    meant = set(names.values())
    return meant.pop() if len(meant) == 1 else " / ".join(f"{side}: {name}" for side, name in names.items())


def _title(session: Session, side: int) -> str:
    settings, name = session.sides[side].settings, session.sides[side].subject
    what = settings.show if settings.show != "CAM" else f"{settings.cam} CAM, 0 to 1"
    mark = f"{'AB'[side]}: " if len(session.sides) == 2 else ""
    return f"{mark}{what}\n{name if len(name) < 32 else name[:29] + '...'}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f}"
