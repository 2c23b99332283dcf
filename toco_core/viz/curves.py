"""Curves: losses and scores against the step, the block, the threshold; runs and variants side by side."""

import contextlib
import io
import os
import time
from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np

from toco_core.viz.theme import (
    FLAG_COLOURS,
    KIND_COLOURS,
    KIND_NAMES,
    NAMES,
    OWN_TERM_COLOURS,
    SCORE_COLOURS,
    TERM_COLOURS,
    name_colours,
    with_plain_text,
)

SCORE_UNITS = {True: "mIoU (%)", False: "mean average precision (%)"}  # whether the validation part has masks


@with_plain_text
def loss_curves(ax: plt.Axes, records: Sequence[dict]) -> plt.Axes:
    """Every term of the loss, unweighted, against the step; terms that have not begun are left out.

    Terms of one's own (see `objective`) come after the package's.
    """
    lines = [r for r in records if "total" in r]
    known = {*TERM_COLOURS, "step", "skipped"}
    own = [term for term in dict.fromkeys(name for r in lines for name in r) if term not in known]
    colours = TERM_COLOURS | {term: OWN_TERM_COLOURS[i % len(OWN_TERM_COLOURS)] for i, term in enumerate(own)}
    for term, colour in colours.items():
        points = [(r["step"], r[term]) for r in lines if r.get(term)]
        if points:
            ax.plot(*zip(*points, strict=True), color=colour, label=term, lw=2 if term == "total" else 1.2)
    ax.set(title="Losses (terms before weighting)", xlabel="step", ylabel="loss")
    if ax.lines:
        ax.legend(ncol=2)
    return ax


def _from_zero(ax: plt.Axes) -> None:
    """From 0 to a little above the highest curve, which flat ones would lie on."""
    values = np.concatenate([np.asarray(line.get_ydata(), float) for line in ax.lines] or [np.ones(1)])
    ax.set_ylim(0, 1.08 * (values[np.isfinite(values)].max(initial=0) or 1))


@with_plain_text
def score_curves(ax: plt.Axes, records: Sequence[dict]) -> plt.Axes:
    """mIoU of final CAM, auxiliary CAM and segmentation on the validation part against the step.

    Without masks: the mean average precision of the image-level predictions.
    """
    lines = [r for r in records if "map" in r or "cam_miou" in r]
    masks = any("cam_miou" in r for r in lines)
    for score, colour in (SCORE_COLOURS if masks else {"map": TERM_COLOURS["cls"]}).items():
        if lines:
            steps, values = [r["step"] + 1 for r in lines], [r[score] for r in lines]
            ax.plot(steps, values, "o-", color=colour, label=NAMES[score], ms=4)
    ax.set(title="Validation", xlabel="step", ylabel=SCORE_UNITS[masks or not lines])
    _from_zero(ax)
    if ax.lines:
        ax.legend()
    return ax


@with_plain_text
def training_figure(records: Sequence[dict]) -> plt.Figure:
    """Losses and validation side by side, over the same steps."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharex=True)
    loss_curves(axes[0], records)
    score_curves(axes[1], records)
    figure.tight_layout()
    return figure


class LiveCurves:
    """Curves that grow while a live JupyterLab trains; headless runs are left alone and draw once at the end.

    Give `update` to `train(on_record=...)`.
    """

    def __init__(self, *, every: float = 2.0, live: bool | None = None):
        self.records: list[dict] = []
        self.every, self.drawn, self.image = every, 0.0, None
        self.live = "JPY_SESSION_NAME" in os.environ if live is None else live

    def update(self, record: dict) -> None:
        """Note one record and draw, at most every `every` seconds."""
        self.records.append(record)
        if not self.live or (time.monotonic() - self.drawn < self.every and "map" not in record):
            return
        picture = self.png()
        if self.image is None:
            import ipywidgets
            from IPython.display import display

            self.image = ipywidgets.Image(value=picture, format="png")
            display(self.image)
        self.image.value = picture
        self.drawn = time.monotonic()

    def png(self) -> bytes:
        """The curves so far, as a PNG file."""
        with contextlib.closing(io.BytesIO()) as file:
            figure = training_figure(self.records)
            figure.savefig(file, format="png")
            plt.close(figure)
            return file.getvalue()


def error_points(ax: plt.Axes, groups: dict[float, Sequence[float]], *, colour: str, label: str, shift: float = 0.0):
    """Mean and sample standard deviation of each group's values over its place on the x axis, and the single values
    beside it; one value alone has no error bar. `shift` moves everything sideways, so that curves do not hide each
    other."""
    places, means = list(groups), [np.mean(values) for values in groups.values()]
    spreads = [np.std(values, ddof=1) if len(values) > 1 else 0.0 for values in groups.values()]
    x = np.array(places, float) + shift
    ax.errorbar(x, means, yerr=spreads if any(spreads) else None, fmt="o-", color=colour, label=label, ms=5, capsize=3)
    for place, values in zip(x, groups.values(), strict=True):
        if len(values) > 1:
            ax.plot(np.full(len(values), place), values, "_", color=colour, alpha=0.6, ms=8)
    return ax


@with_plain_text
def layer_figure(
    scores: dict[str, dict[int, Sequence[float]]],
    similarity: dict[str, dict[int, Sequence[float]]],
    *,
    chosen: int | None = None,
    frozen: int = 0,
) -> plt.Figure:
    """mIoU against the auxiliary block, and beside it how alike patch tokens are.

    `scores`: kind of label (see `KIND_NAMES`) -> block -> percent, one value per seed. `similarity`: name -> block ->
    mean cosine, one value per seed. `chosen` is marked, and the blocks up to `frozen` are shaded.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6))
    for i, (kind, groups) in enumerate(scores.items()):
        shift = 0.08 * (i - (len(scores) - 1) / 2)
        error_points(left, groups, colour=KIND_COLOURS[kind], label=KIND_NAMES[kind], shift=shift)
    for (name, groups), colour in zip(similarity.items(), ("#222222", "#999999"), strict=False):
        error_points(right, groups, colour=colour, label=name)
    seeds = sorted({len(values) for groups in scores.values() for values in groups.values()}) or [0]
    said = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    left.set(title=f"Scores ({said} seed{'s' * (seeds[-1] != 1)})", ylabel="mIoU (%)")
    right.set(title="Over-smoothing after training", ylabel="mean cosine similarity\nof patch tokens", ylim=(None, 1.0))
    blocks = sorted({block for groups in [*scores.values(), *similarity.values()] for block in groups})
    for ax in (left, right):
        ax.set(xlabel="auxiliary block", xticks=blocks)
        if frozen >= min(blocks, default=frozen + 1):
            ax.axvspan(min(blocks) - 0.4, frozen + 0.4, color="#eeeeee", zorder=0, label="frozen blocks")
        if chosen is not None:
            ax.axvspan(chosen - 0.2, chosen + 0.2, color="#f2e9c9", zorder=0, label="chosen on val")
    figure.tight_layout()
    figure.legend(*left.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.07, 0.02), ncol=3)
    figure.legend(*right.get_legend_handles_labels(), loc="upper left", bbox_to_anchor=(0.57, 0.02), ncol=2)
    return figure


@with_plain_text
def compared_curves(runs: dict[str, tuple[Sequence[dict], int]], *, published: Sequence[dict] = ()) -> plt.Figure:
    """Total loss and the three validation scores of several runs; where no run has any, as without masks, the mean
    average precision of the image-level predictions.

    `runs`: name -> its records and its number of steps. With `published`, points with "step" and the three scores of
    which the last ends the schedule, the x axis is the share of the schedule, so that other lengths can be compared.
    """
    known = {name for records, _ in runs.values() for record in records for name in record}
    masks = bool(published) or "map" not in known or not known.isdisjoint(SCORE_COLOURS)
    shown = tuple(SCORE_COLOURS) if masks else ("map",)
    figure, axes = plt.subplots(1, 1 + len(shown), figsize=(3 + 3 * len(shown), 3), sharex=True)
    colours = name_colours(runs)
    for name, (records, steps) in runs.items():
        colour, unit = colours[name], 100 / steps if published else 1
        losses = [(r["step"] * unit, r["total"]) for r in records if r.get("total") is not None]
        if losses:
            axes[0].plot(*zip(*losses, strict=True), color=colour, lw=1.2, label=name)
        for ax, score in zip(axes[1:], shown, strict=True):
            points = [((r["step"] + 1) * unit, r[score]) for r in records if r.get(score) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=name)
    for ax, score in zip(axes[1:], shown, strict=True):
        if published:
            share = [100 * point["step"] / published[-1]["step"] for point in published]
            ax.plot(share, [point[score] for point in published], "k--", lw=1.2, label="published")
        ax.set(title=f"{NAMES[score][0].upper()}{NAMES[score][1:]}, validation", ylabel=SCORE_UNITS[masks])
        _from_zero(ax)
    axes[0].set(title="Total loss", ylabel="loss (terms weighted)")
    for ax in axes:
        ax.set_xlabel("share of the schedule (%)" if published else "step")
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    if handles:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncol": min(len(handles), 6)}
        figure.legend(handles.values(), handles, **place)
    return figure


@with_plain_text
def variant_points(ax: plt.Axes, groups: dict[str, Sequence[float]], *, reference: str | None = None) -> plt.Axes:
    """One row per variant: mean, sample standard deviation and the single values; a line through the mean of
    `reference`. The first variant is on top."""
    for place, (name, values) in enumerate(groups.items()):
        colour = "#222222" if name == reference else "#d55e00"
        spread = np.std(values, ddof=1) if len(values) > 1 else None
        ax.errorbar(np.mean(values), place, xerr=spread, fmt="o", color=colour, ms=6, capsize=3)
        if len(values) > 1:
            ax.plot(values, np.full(len(values), place), "|", color=colour, alpha=0.6, ms=9)
    if reference in groups:
        ax.axvline(np.mean(groups[reference]), color="#999999", ls="--", lw=1, zorder=0)
    ax.set_yticks(range(len(groups)), list(groups))
    ax.set(ylim=(len(groups) - 0.5, -0.5), xlabel="mIoU (%)")
    return ax


CROP_CURVES = {
    "positive_right": ("positive crops that show an object", FLAG_COLOURS[True], "-"),
    "shows_object": ("all crops that show an object", "#666666", "--"),
    "negative_right": ("negative crops that show none", FLAG_COLOURS[False], "-"),
    "positive": ("crops that are positive", "#0072b2", "-"),
    "images_with_positive": ("draws with a positive crop", FLAG_COLOURS[True], ":"),
    "images_with_negative": ("draws with a negative crop", FLAG_COLOURS[False], ":"),
}


@with_plain_text
def crop_curves(
    ax: plt.Axes,
    values: Sequence[float],
    scores: Sequence,
    which: Sequence[str],
    *,
    xlabel: str,
    marked: float | None = None,
) -> plt.Axes:
    """Some of `CropScores`, in percent, while one setting moves; `marked` is the value in use."""
    for name in which:
        label, colour, style = CROP_CURVES[name]
        ax.plot(values, [100 * getattr(s, name) for s in scores], style, color=colour, label=label, marker="o", ms=3)
    if marked is not None:
        ax.axvline(marked, color="#999999", lw=1, ls="--")
    ax.set(xlabel=xlabel, ylabel="share (%)", ylim=(-3, 103))
    return ax


@with_plain_text
def threshold_curves(ax: plt.Axes, curves: dict[str, tuple], *, chosen: dict[str, float]) -> plt.Axes:
    """mIoU in percent against the CAM's threshold. `curves`: name -> (betas, mIoU in [0, 1]); `chosen`: threshold that
    is marked by a line, under its name."""
    colours = name_colours(curves)
    for name, (betas, miou) in curves.items():
        ax.plot(betas, 100 * np.asarray(miou), "o-", ms=3, color=colours[name], label=name)
    for style, (name, beta) in zip((":", "--", "-."), chosen.items(), strict=False):
        ax.axvline(beta, color="#888888", ls=style, lw=1.2, label=f"{name}: {beta:g}")
    ax.set(title="Threshold of the CAM", xlabel="threshold: CAM at most this is background", ylabel="mIoU (%)")
    ax.set(xlim=(0, 1), ylim=(0, None))
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax
