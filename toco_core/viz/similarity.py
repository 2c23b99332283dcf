"""How alike tokens are, and what attends to what."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from toco_core.viz.theme import FLAG_COLOURS, bare, name_colours, with_plain_text


def _lines_by_block(ax: plt.Axes, curves: dict[str, Sequence[float]], layer: int | None) -> None:
    colours = name_colours(curves)
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "o-", ms=4, color=colours[name], label=name)
    if layer is not None:
        ax.axvline(layer, color="#999999", ls="--", lw=1)


@with_plain_text
def token_similarity(ax: plt.Axes, curves: dict[str, Sequence[float]], *, layer: int | None = None) -> plt.Axes:
    """Mean pairwise cosine similarity of the patch tokens after each block, one line per name."""
    _lines_by_block(ax, curves, layer)
    if layer is not None:
        place = {"transform": ax.get_xaxis_transform(), "color": "#666666", "fontsize": 8}
        ax.text(layer, 0.02, f" auxiliary block {layer}", **place)
    ax.set(title="Over-smoothing", xlabel="block", ylabel="mean cosine similarity\nof patch tokens", ylim=(None, 1.0))
    ax.legend()
    return ax


SIMILARITY_COLOURS = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}  # diverging around 0


@with_plain_text
def by_block(
    ax: plt.Axes, curves: dict[str, Sequence[float]], *, title: str, ylabel: str, layer: int | None = None
) -> plt.Axes:
    """A number for each block, from 1, one line per name; `layer` marks the auxiliary classifier's block."""
    _lines_by_block(ax, curves, layer)
    ax.set(title=title, xlabel="block", ylabel=ylabel)
    ax.set_xticks(range(1, len(next(iter(curves.values()))) + 1))
    ax.legend()
    return ax


@with_plain_text
def similarity_matrix(ax: plt.Axes, matrix: np.ndarray, title: str = "", *, borders: Sequence[int] = ()) -> plt.Axes:
    """Cosine similarity of all pairs of patches (N N), blue -1 to red 1; a line before each index in `borders`."""
    ax.imshow(matrix, interpolation="nearest", **SIMILARITY_COLOURS)
    for border in borders:
        ax.axhline(border - 0.5, color="#222222", lw=0.7)
        ax.axvline(border - 0.5, color="#222222", lw=0.7)
    return bare(ax, title)


@with_plain_text
def similarity_map(ax: plt.Axes, similarity: np.ndarray, title: str = "", *, patch: int | None = None) -> plt.Axes:
    """Cosine similarity of one patch with all (h w), blue -1 to red 1; the patch, counted row by row, gets a frame."""
    ax.imshow(similarity, interpolation="nearest", **SIMILARITY_COLOURS)
    if patch is not None:
        y, x = divmod(patch, similarity.shape[1])
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#222222", lw=1.5))
    return bare(ax, title)


@with_plain_text
def attention_map(ax: plt.Axes, attention: np.ndarray, title: str = "", *, most: float = 4.0) -> plt.Axes:
    """Attention of the class token to the patches (h w) in units of an even spread: black 0, white `most` and more."""
    ax.imshow(attention * attention.size, interpolation="nearest", cmap="magma", vmin=0, vmax=most)
    return bare(ax, title)


@with_plain_text
def colour_scale(figure: plt.Figure, axes, label: str) -> plt.Figure:
    """One colour scale beside all `axes`, which show the same range."""
    axes = np.asarray(axes).ravel().tolist()
    bar = figure.colorbar(axes[0].images[0], ax=axes, fraction=0.02, pad=0.01)
    bar.set_label(label)
    bar.ax.grid(False)
    return figure


def similarity_explorer(matrices: dict[str, np.ndarray], grid: tuple[int, int], *, max_bytes: int = 1_000_000):
    """A plotly figure of similarity matrices (N N), a slider between them; the pointer tells both patches and a value.

    Values are whole percents, a byte each. Matrices beyond `max_bytes` in all are left out, evenly, but not the last.
    """
    import plotly.graph_objects as go

    names = list(matrices)
    most = max(1, int(max_bytes / max(len(m) ** 2 for m in matrices.values())))
    names = [names[i] for i in np.unique(np.linspace(len(names) - 1, 0, min(most, len(names))).round().astype(int))]
    places = [f"row {n // grid[1] + 1}, column {n % grid[1] + 1}" for n in range(grid[0] * grid[1])]
    figure = go.Figure()
    for name in names:
        percent = np.round(100 * np.asarray(matrices[name], np.float64)).astype(np.int8)
        figure.add_heatmap(
            z=percent,
            x=places,
            y=places,
            zmin=-100,
            zmax=100,
            colorscale="RdBu_r",
            visible=name == names[-1],
            colorbar={"title": "cosine, %"},
            hovertemplate="%{y}<br>%{x}<br>%{z} %<extra></extra>",
        )
    steps = [{"label": n, "method": "restyle", "args": ["visible", [n == m for m in names]]} for n in names]
    figure.update_layout(
        width=560,
        height=560,
        template="plotly_white",
        title="Cosine similarity of patch tokens",
        sliders=[{"active": len(names) - 1, "currentvalue": {"prefix": "after block "}, "steps": steps}],
        margin={"l": 10, "r": 10, "t": 40, "b": 10},
    )
    hidden = {"showticklabels": False, "type": "category"}
    figure.update_layout(xaxis=hidden, yaxis=hidden | {"autorange": "reversed", "scaleanchor": "x"})
    return figure


@with_plain_text
def logit_matrix(ax: plt.Axes, logits: np.ndarray, is_positive: Sequence[bool], title: str) -> plt.Axes:
    """What CTC contrasts: a row per view (two global ones, then the crops), a column per global view of the teacher."""
    logits = np.asarray(logits)
    most = max(float(np.abs(logits).max()), 1e-12)
    ax.imshow(logits, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for (i, j), value in np.ndenumerate(logits):
        light = abs(value) < 0.6 * most
        ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color="#222222" if light else "white")
    names = ["global 1", "global 2", *(f"crop {n + 1}" for n in range(len(logits) - 2))]
    ax.set_yticks(range(len(logits)), names)
    for tick, positive in zip(ax.get_yticklabels(), [True, True, *is_positive], strict=True):
        tick.set_color(FLAG_COLOURS[bool(positive)])
    ax.set_xticks(range(logits.shape[1]), [f"teacher,\nglobal {n + 1}" for n in range(logits.shape[1])])
    ax.set_title(title)
    ax.grid(False)
    return ax
