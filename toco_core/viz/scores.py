"""Scores as tables, bars and matrices."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch

from toco_core.viz.theme import KIND_COLOURS, KIND_NAMES, name_colours, with_plain_text


@with_plain_text
def label_histogram(ax: plt.Axes, counts: dict[str, Sequence[int]], class_names: Sequence[str]) -> plt.Axes:
    """How many images of each split show each class. `counts`: split -> K numbers; `class_names` with background."""
    colours, height = ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), 0.8 / max(len(counts), 1)
    places = np.arange(len(class_names) - 1)
    for i, (split, numbers) in enumerate(counts.items()):
        bars = ax.barh(
            places + (i - (len(counts) - 1) / 2) * height, numbers, height, label=split, color=colours[i % 4]
        )
        ax.bar_label(bars, padding=2, fontsize=7)
    ax.set(title="Images per class", xlabel="images", yticks=places, yticklabels=class_names[1:])
    ax.invert_yaxis()
    ax.grid(axis="y", visible=False)
    ax.legend()
    return ax


@with_plain_text
def class_bars(ax: plt.Axes, class_names: Sequence[str], differences: dict[str, Sequence[float]], *, title: str):
    """Differences per class in points, one bar per run and class; the first class is on top."""
    height, colours = 0.8 / max(len(differences), 1), name_colours(["reference", *differences])
    for i, (name, values) in enumerate(differences.items()):
        places = np.arange(len(class_names)) + (i - (len(differences) - 1) / 2) * height
        ax.barh(places, values, height=0.9 * height, color=colours[name], label=name)
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set_axisbelow(True)
    ax.axvline(0, color="#222222", lw=0.8)
    ax.invert_yaxis()
    ax.set(title=title, xlabel="IoU (points)")
    ax.legend()
    return ax


TRUTH_COLOURS = {
    "background": "#8c8c8c",
    "object (in the last bar: of that class)": "#0072b2",
    "another class": "#d55e00",
}


@with_plain_text
def threshold_heatmap(
    ax: plt.Axes,
    values: np.ndarray,
    betas: Sequence[float],
    title: str,
    *,
    marked: dict[str, tuple[float, float]] | None = None,
    highest: float | None = None,
    difference: bool = False,
) -> plt.Axes:
    """A score of all pairs of thresholds, [beta_l, beta_h], written in percent; NaN stays white.

    The colours go from 0 to `highest`, so that two heatmaps can be compared; by default to the highest value.

    `marked`: marker -> (beta_l, beta_h), put between the cells where it is none of `betas`. `difference` colours around
    0.
    """
    values = 100 * np.asarray(values, float)
    most = np.nanmax(np.abs(values)) if np.isfinite(values).any() else 1.0
    limits = (
        {"vmin": -most, "vmax": most, "cmap": "RdBu"}
        if difference
        else {"vmin": 0, "vmax": most if highest is None else 100 * highest, "cmap": "viridis"}
    )
    picture = ax.imshow(values, origin="lower", **limits)
    for (i, j), value in np.ndenumerate(values):
        if np.isfinite(value):
            red, green, blue, _ = picture.cmap(picture.norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:+.0f}" if difference else f"{value:.0f}"
            ax.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "#222222")
    places = range(len(betas))
    for marker, (l, h) in (marked or {}).items():
        x, y = (np.interp(beta, betas, places) for beta in (h, l))
        ax.plot(x, y, marker, ms=17, mfc="none", mec="#d62728", mew=1.6)
    ax.set_xticks(places, [f"{beta:g}" for beta in betas])
    ax.set_yticks(places, [f"{beta:g}" for beta in betas])
    ax.set(title=title, xlabel="beta_h", ylabel="beta_l")
    ax.grid(False)
    return ax


@with_plain_text
def composition_bars(ax: plt.Axes, compositions: dict[str, np.ndarray]) -> plt.Axes:
    """What the mask shows where a label says background, is uncertain, or names a class: one group of three bars per
    name, out of `LabelCounts.composition()`."""
    kinds = ("background", "uncertain", "a class")
    places, names = [], []
    for g, (name, shares) in enumerate(compositions.items()):
        for row, kind in enumerate(kinds):
            place, total = 3.6 * g + row, shares[row].sum()
            places.append(place)
            names.append(f"{name}: {kind}")
            left = 0.0
            for column, colour in enumerate(TRUTH_COLOURS.values()):
                width = 100 * shares[row, column] / total if total else 0.0
                ax.barh(place, width, left=left, color=colour, height=0.8)
                if width >= 6:
                    ax.text(
                        left + width / 2, place, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8
                    )
                left += width
            ax.text(101, place, f"{100 * total:.0f} % of all pixels", va="center", fontsize=8, color="#666666")
    ax.set_yticks(places, names)
    ax.invert_yaxis()
    ax.grid(False)
    ax.set(xlim=(0, 100), xlabel="share of the pixels that are labelled so (%)", title="What the mask shows there")
    patches = [Patch(color=colour, label=name) for name, colour in TRUTH_COLOURS.items()]
    ax.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=3)
    return ax


@with_plain_text
def iou_bars(ax: plt.Axes, summary: dict[str, dict], class_names: Sequence[str]) -> plt.Axes:
    """IoU of every class, one bar per kind of label; lines mark the means."""
    height = 0.84 / len(summary)
    for i, (kind, scores) in enumerate(summary.items()):
        values = [scores["classes"][name]["iou"] or 0.0 for name in class_names]
        places = np.arange(len(class_names)) + (i - (len(summary) - 1) / 2) * height
        ax.barh(places, values, height, color=KIND_COLOURS[kind], label=f"{KIND_NAMES[kind]}: mean {scores['miou']}")
        ax.axvline(scores["miou"], color=KIND_COLOURS[kind], lw=1, ls=":")
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set(title="IoU per class", xlabel="IoU (%)", xlim=(0, None), ylim=(len(class_names) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    ax.set_axisbelow(True)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


@with_plain_text
def confusion_matrix(ax: plt.Axes, counts: np.ndarray, class_names: Sequence[str], *, title: str = "") -> plt.Axes:
    """Where the pixels of every class went, in percent of the class: rows the mask's class, columns the label's.

    A last column more than classes are open pixels, left out where there are none.
    """
    counts = np.asarray(counts, float)
    columns = list(class_names)
    if counts.shape[1] > len(columns):
        columns, counts = (columns, counts[:, :-1]) if not counts[:, -1].any() else ([*columns, "open"], counts)
    share = 100 * counts / np.maximum(counts.sum(1, keepdims=True), 1)
    ax.imshow(share, cmap="Blues", vmin=0, vmax=100)
    for (row, column), value in np.ndenumerate(share) if len(columns) <= 24 else ():
        colour = "white" if value > 55 else "#222222"
        ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=colour)
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(class_names)), class_names)
    ax.set(title=title, xlabel="label", ylabel="ground truth")
    ax.grid(False)
    return ax


@with_plain_text
def method_bars(ax: plt.Axes, miou: dict[str, dict[str, float]]) -> plt.Axes:
    """mIoU in percent of several methods: a group for each kind of label, in it a bar for each method.

    `miou`: method -> kind (see `KIND_NAMES`) -> percent; a kind that a method lacks has no bar there.
    """
    kinds = list(dict.fromkeys(kind for values in miou.values() for kind in values))
    width, colours = 0.8 / max(len(miou), 1), name_colours(miou)
    for i, (name, values) in enumerate(miou.items()):
        places = [kinds.index(kind) + (i - (len(miou) - 1) / 2) * width for kind in values]
        bars = ax.bar(places, list(values.values()), 0.94 * width, color=colours[name], label=name)
        ax.bar_label(bars, fmt="%.0f", padding=2, fontsize=8)
    ax.set_xticks(range(len(kinds)), [KIND_NAMES.get(kind, kind) for kind in kinds])
    ax.set(ylabel="mIoU (%)", ylim=(0, 100))
    ax.grid(axis="x", visible=False)
    ax.set_axisbelow(True)
    ax.legend(ncol=max(len(miou), 1), loc="upper right")
    return ax
