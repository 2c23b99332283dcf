"""What the explorer says in words and tables (HTML), and its figure for paper (matplotlib)."""

import html
from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from toco_core import viz
from toco_core.widgets import draw
from toco_core.widgets.analysis import Crop
from toco_core.widgets.scoring import Numbers
from toco_core.widgets.session import Session


def notes_html(notes: Sequence[str]) -> str:
    """Messages, one a line; nothing for none."""
    lines = "<br>".join(html.escape(note) for note in notes)
    return f'<div class="toco-notes" role="status">{lines}</div>' if lines else ""


def numbers_html(found: Numbers | None, names: Sequence[str], title: str, *, missing: str = "no ground truth") -> str:
    """A table of IoU, precision and recall per class that truth or prediction shows, in percent; or what is missing."""
    if found is None:
        return f'<div class="toco-heading">{html.escape(title)}</div>{html.escape(missing)}'
    scores, rows = found.scores, []
    for k, name in enumerate(names):
        values = scores.iou[k], scores.precision[k], scores.recall[k]
        if not all(np.isnan(v) for v in values):
            cells = "".join(f"<td>{'–' if np.isnan(v) else f'{100 * v:.1f}'}</td>" for v in values)
            rows.append(f"<tr><td>{html.escape(name)}</td>{cells}</tr>")
    mean = f"<tr><th>mean IoU</th><th>{_percent(scores.miou)}</th><th></th><th></th></tr>"
    some = "" if found.coverage > 0.9995 else f", on the {100 * found.coverage:.0f} % of pixels that it decides"
    return (
        f'<div class="toco-heading">{html.escape(title + some)}</div><table class="toco-table"><tr><th>%</th>'
        f"<th>IoU</th><th>precision</th><th>recall</th></tr>{mean}{''.join(rows)}</table>"
    )


def crops_html(crops: Sequence[Crop], threshold: float) -> str:
    """A table of the local views."""
    if not crops:
        return "no crops yet: sample them, or click on the picture with <i>click places a crop</i>"
    rows = "".join(
        f"<tr><td>{i}</td><td>{'positive' if c.is_positive else 'negative'}</td><td>{c.ratio:.2f}</td>"
        f"<td>{c.similarity:+.2f}</td></tr>"
        for i, c in enumerate(crops, 1)
    )
    return (
        f'<table class="toco-table"><tr><th>crop</th><th>flag</th><th>ratio (&gt; {threshold:g})</th>'
        f"<th>similarity</th></tr>{rows}</table>"
    )


def figure(session: Session) -> Figure:
    """What is on the screen, for paper: image, each side, the clicked patch's similarity and its curve over depth."""
    sides = range(len(session.sides))
    columns = 1 + len(sides) + 2
    made = Figure(figsize=(2.9 * columns, 3.3), dpi=110, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, columns, gridspec_kw={"width_ratios": [1] * (columns - 1) + [0.9]})
    viz.show(axes[0], session.picture.image, session.picture.name)
    used = set()
    for i in sides:
        view, settings = session.view(i), session.sides[i].settings
        viz.show(axes[1 + i], view.picture, _title(session, i))
        if view.label is not None and settings.show not in ("image", "CAM"):
            used |= {int(k) for k in np.unique(view.label)} - {0, 255}
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
    if used:
        names = session.joint(0).names
        viz.class_legend(made, names, sorted(k for k in used if k < len(names)))
    return made


def _title(session: Session, side: int) -> str:
    settings, name = session.sides[side].settings, session.sides[side].subject
    what = settings.show if settings.show != "CAM" else f"{settings.cam} CAM, 0 to 1"
    mark = f"{'AB'[side]}: " if len(session.sides) == 2 else ""
    return f"{mark}{what}\n{name if len(name) < 32 else name[:29] + '...'}"


def _percent(value: float) -> str:
    return "–" if np.isnan(value) else f"{100 * value:.1f}"
