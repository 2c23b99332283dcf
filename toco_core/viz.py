"""Pictures: images under their CAM, labels in VOC's colours, curves. Functions take an `ax` and return it.

CAMs are always shown from 0 to 1 and never stretched, so that two overlays can be compared; labels have PASCAL VOC's
colours, and what is ignored (255) is grey. Figures carry their own light background: they read the same on a dark page.
"""

import contextlib
import functools
import io
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from matplotlib.text import Text
from PIL import Image, ImageDraw, ImageFont

from .conventions import IGNORE, voc_palette

OWN_TERM_COLOURS = ("#8c564b", "#7f7f7f", "#17becf", "#6a3d9a", "#bcbd22", "#e377c2")
IGNORE_GREYS = (225, 225, 225), (150, 150, 150)  # ground and lines of the hatching
TERM_COLOURS = {
    "total": "#222222",
    "cls": "#0072b2",
    "aux_cls": "#56b4e9",
    "ptc": "#d55e00",
    "ctc": "#cc79a7",
    "seg": "#009e73",
    "energy": "#b8860b",
}
METHOD_COLOURS = {  # a method has the colour of the term that it adds
    "backbone": "#666666",
    "classification only": TERM_COLOURS["cls"],
    "PTC": TERM_COLOURS["ptc"],
    "CTC": TERM_COLOURS["ctc"],
    "PTC + CTC": "#88264d",
}
METHODS = {  # other names of the methods: of shipped runs, and as figures put them
    "pretrained": "backbone",
    "before training": "backbone",
    "classification": "classification only",
    "without PTC": "classification only",
    "with PTC": "PTC",
    "full": "PTC",
    "ctc": "PTC + CTC",
}
KIND_NAMES = {
    "cam": "final CAM",
    "aux_cam": "auxiliary CAM",
    "pseudo_label": "pseudo label (PAR)",
    "seg": "segmentation",
    "seg_ms": "segmentation, scales + flip",
    "seg_crf": "segmentation, scales + flip + CRF",
}
KIND_COLOURS = {
    "cam": "#e69f00",
    "aux_cam": "#56b4e9",
    "pseudo_label": "#6a3d9a",
    "seg": "#009e73",
    "seg_ms": "#7fce9b",
    "seg_crf": "#b8860b",
}
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#666666")
SCORE_COLOURS = {f"{kind}_miou": KIND_COLOURS[kind] for kind in ("cam", "aux_cam", "seg")}
NAMES = {
    "cam_miou": "final CAM",
    "aux_cam_miou": "auxiliary CAM",
    "seg_miou": "segmentation",
    "map": "image labels (mAP)",
}


def name_colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour: a method or a kind of label keeps its own in every figure; others take those of `RUN_COLOURS`
    that are left, in turn."""
    names = list(names)
    own = METHOD_COLOURS | {name: METHOD_COLOURS[method] for name, method in METHODS.items()}
    own |= {KIND_NAMES[kind]: colour for kind, colour in KIND_COLOURS.items()}
    known = {name: own[name.removeprefix("+ ")] for name in names if name.removeprefix("+ ") in own}
    free = [colour for colour in RUN_COLOURS if colour not in known.values()] or list(RUN_COLOURS)
    others = [name for name in dict.fromkeys(names) if name not in known]
    return known | {name: free[i % len(free)] for i, name in enumerate(others)}


def use_theme() -> None:
    """One look for all figures: white ground, dark text, a light grid below what is drawn."""
    plt.rcParams.update(
        {
            "text.parse_math": False,  # names of files and classes are no formulas
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "text.color": "#222222",
            "axes.labelcolor": "#222222",
            "xtick.color": "#222222",
            "ytick.color": "#222222",
            "axes.edgecolor": "#999999",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "figure.dpi": 90,
            "font.size": 9,
        }
    )


def plain_text(drawn: plt.Figure | plt.Axes) -> None:
    """Let every text stand as it is: names of files and classes are no formulas, whatever `$` they hold, and what no
    font can show is replaced."""
    for text in drawn.findobj(Text):
        if r"\mathdefault" not in text.get_text():  # numbers that matplotlib has set itself
            text.set_parse_math(False)
            text.set_text(_showable(text.get_text()))


def _showable(value: Any) -> Any:
    """Texts, in lists and dictionaries too, with what no font can show replaced: labels of ticks are made anew by each
    drawing."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if type(value) in (list, tuple):
        return type(value)(map(_showable, value))
    if type(value) is dict:
        return {_showable(key): _showable(item) for key, item in value.items()}
    return value


def _with_plain_text(function: Callable) -> Callable:
    """A function that draws names into the axes or the figure that it returns."""

    @functools.wraps(function)
    def draws(*args, **options):
        parse_math = mpl.rcParams["text.parse_math"]
        mpl.rcParams["text.parse_math"] = False  # not rc_context, which also undoes what a backend sets as it is loaded
        try:
            drawn = function(*_showable(args), **_showable(options))
        finally:
            mpl.rcParams["text.parse_math"] = parse_math
        plain_text(drawn)
        return drawn

    return draws


def label_colours(label: np.ndarray) -> np.ndarray:
    """RGB of a label map: uint8 H W -> uint8 H W 3, with what is ignored in hatched grey."""
    label = np.asarray(label)
    colours = voc_palette()[label]
    y, x = np.indices(label.shape)
    hatched = np.where(((x + y) % 6 < 2)[..., None], IGNORE_GREYS[1], IGNORE_GREYS[0])
    return np.where((label == IGNORE)[..., None], hatched, colours).astype(np.uint8)


def overlay(image: np.ndarray, cam: np.ndarray, *, strength: float = 0.65) -> np.ndarray:
    """A CAM over its image: `image` uint8 H W 3, `cam` H W in [0, 1]; RGB in [0, 1]. The colours stand for 0..1."""
    cam = np.clip(np.asarray(cam, np.float32), 0, 1)
    colours = plt.get_cmap("inferno")(cam)[..., :3]
    grey = image.astype(np.float32).mean(-1, keepdims=True) / 255
    alpha = strength * np.ones_like(cam)[..., None]
    return (1 - alpha) * (0.35 * image / 255 + 0.65 * grey) + alpha * colours


def label_over_image(
    image: np.ndarray, label: np.ndarray, names: Mapping[int, str] | None, *, strength: float = 0.55, side: int = 900
) -> np.ndarray:
    """A label map over its image, uint8 RGB: background stays the image, uncertain pixels (255) are hatched, each class
    has its outline, and a strip below names the colours.

    image: uint8 H W 3. label: uint8 H W. names: what is written below, by class; None: no strip. The longer
    side is at most `side`.
    """
    scale = min(1.0, side / max(label.shape))
    width, height = (max(1, round(n * scale)) for n in label.shape[::-1])
    small = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BOX)).astype(np.float32)
    label = np.asarray(Image.fromarray(label).resize((width, height), Image.Resampling.NEAREST))
    alpha = np.where(label == 0, 0, np.where(label == IGNORE, 0.6 * strength, strength))[..., None]
    edge = np.zeros(label.shape, bool)
    edge[1:] |= label[1:] != label[:-1]
    edge[:, 1:] |= label[:, 1:] != label[:, :-1]
    picture = (1 - alpha) * small + alpha * label_colours(label)
    picture[edge] = 255
    picture = picture.round().astype(np.uint8)
    return picture if names is None else np.vstack([picture, _named_colours(names, width)])


def titled_row(pictures: Sequence[np.ndarray], titles: Sequence[str], *, gap: int = 6) -> np.ndarray:
    """Pictures (uint8 h w 3, of one height) side by side on white, each under its title, which is cut to its width."""
    font, parts = ImageFont.load_default(14), []
    for picture, title in zip(pictures, titles, strict=True):
        text = title.encode(errors="replace").decode()
        while text and font.getlength(text) > picture.shape[1]:
            text = text[:-1]
        strip = Image.new("RGB", (picture.shape[1], 22), "white")
        ImageDraw.Draw(strip).text((0, 3), text, fill=(30, 30, 30), font=font)
        column = np.vstack([np.asarray(strip), picture])
        parts += [column, np.full((len(column), gap, 3), 255, np.uint8)]
    return np.hstack(parts[:-1])


def _named_colours(names: Mapping[int, str], width: int) -> np.ndarray:
    """A white strip of that width: a square in the colour of each class and its name, in as many lines as needed."""
    font, line = ImageFont.load_default(14), 22
    entries = [(k, str(name).encode(errors="replace").decode()) for k, name in sorted(names.items())] or [
        (0, "no class")
    ]
    places, x, y = [], 6, 0
    for k, name in entries:
        needed = 20 + font.getlength(name) + 12
        if x > 6 and x + needed > width:
            x, y = 6, y + line
        places.append((x, y, k, name))
        x += needed
    strip = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(strip)
    for x, y, k, name in places:
        draw.rectangle((x, y + 4, x + 14, y + 18), fill=tuple(voc_palette()[k].tolist()))
        draw.text((x + 20, y + 3), name, fill=(30, 30, 30), font=font)
    return np.asarray(strip)


@_with_plain_text
def show(ax: plt.Axes, picture: np.ndarray, title: str = "") -> plt.Axes:
    """A picture without axes."""
    ax.imshow(picture, interpolation="nearest")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


@_with_plain_text
def picture_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], *, names: Sequence[str] = (), width=1.7):
    """Pictures in rows, one title per column, one name per row; returns the figure."""
    ratio = max(np.mean([row[0].shape[0] / row[0].shape[1] for row in rows]), 0.5)
    figure, axes = plt.subplots(
        len(rows), len(titles), figsize=(width * len(titles), width * ratio * len(rows) + 0.4), squeeze=False
    )
    for r, row in enumerate(rows):
        for c, picture in enumerate(row):
            show(axes[r, c], picture, titles[c] if r == 0 else "")
        if r < len(names):
            axes[r, 0].text(-0.04, 0.5, names[r], transform=axes[r, 0].transAxes, rotation=90, va="center", ha="right")
    figure.tight_layout(pad=0.4)
    return figure


@_with_plain_text
def class_legend(figure: plt.Figure, class_names: Sequence[str], labels: Sequence[int]) -> plt.Figure:
    """Name the colours of some classes under a figure."""
    palette = voc_palette() / 255
    patches = [Patch(color=palette[i], label=class_names[i]) for i in labels]
    ground, lines = (np.array(grey) / 255 for grey in IGNORE_GREYS)
    patches.append(Patch(facecolor=ground, edgecolor=lines, hatch="////", linewidth=0, label="ignored"))
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncol=min(len(patches), 8))
    return figure


@_with_plain_text
def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str], *, columns: int = 8, width: float = 1.2):
    """Small pictures side by side, each with its caption below; returns the figure."""
    columns = max(1, min(columns, len(images)))
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(width * columns, (width + 0.15) * rows), squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for ax, image, caption in zip(axes.flat, images, captions, strict=False):
        ax.imshow(image)
        ax.text(0.5, -0.04, caption, transform=ax.transAxes, ha="center", va="top", fontsize=6.5)
    figure.tight_layout(pad=0.5)
    return figure


@_with_plain_text
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


@_with_plain_text
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


@_with_plain_text
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
    ylabel = "mIoU (%)" if masks or not lines else "mean average precision (%)"
    ax.set(title="Validation", xlabel="step", ylabel=ylabel, ylim=(0, None))
    if ax.lines:
        ax.legend()
    return ax


@_with_plain_text
def training_figure(records: Sequence[dict]) -> plt.Figure:
    """Losses and validation side by side."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3))
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


@_with_plain_text
def token_similarity(ax: plt.Axes, curves: dict[str, Sequence[float]], *, layer: int | None = None) -> plt.Axes:
    """Mean pairwise cosine similarity of the patch tokens after each block, one line per name."""
    colours = name_colours(curves)
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "o-", ms=4, color=colours[name], label=name)
    if layer is not None:
        ax.axvline(layer, color="#999999", ls="--", lw=1)
        place = {"transform": ax.get_xaxis_transform(), "color": "#666666", "fontsize": 8}
        ax.text(layer, 0.02, f" auxiliary block {layer}", **place)
    ax.set(title="Over-smoothing", xlabel="block", ylabel="mean cosine similarity\nof patch tokens", ylim=(None, 1.0))
    ax.legend()
    return ax


def score_table(evaluation, beta: float, aux_beta: float, class_names: Sequence[str]) -> str:
    """IoU per class, in percent: final CAM and auxiliary CAM at their thresholds, segmentation."""
    columns = [evaluation.cam.scores(beta), evaluation.aux_cam.scores(aux_beta), evaluation.seg]
    lines = [f"{'IoU (%)':16}{'final CAM':>12}{'aux. CAM':>12}{'segmentation':>14}"]
    for i, name in enumerate(class_names):
        cells = ["-" if np.isnan(c.iou[i]) else f"{100 * c.iou[i]:.1f}" for c in columns]
        lines.append(f"{name:16}{cells[0]:>12}{cells[1]:>12}{cells[2]:>14}")
    means = [f"{100 * c.miou:.1f}" for c in columns]
    return "\n".join([*lines, f"{'mean':16}{means[0]:>12}{means[1]:>12}{means[2]:>14}"])


# ---- runs side by side


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


@_with_plain_text
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


@_with_plain_text
def compared_curves(runs: dict[str, tuple[Sequence[dict], int]], *, published: Sequence[dict] = ()) -> plt.Figure:
    """Total loss and the three validation scores of several runs.

    `runs`: name -> its records and its number of steps. With `published`, points with "step" and the three scores of
    which the last ends the schedule, the x axis is the share of the schedule, so that other lengths can be compared.
    """
    figure, axes = plt.subplots(1, 4, figsize=(12, 3))
    colours = name_colours(runs)
    for name, (records, steps) in runs.items():
        colour, unit = colours[name], 100 / steps if published else 1
        losses = [(r["step"] * unit, r["total"]) for r in records if r.get("total") is not None]
        if losses:
            axes[0].plot(*zip(*losses, strict=True), color=colour, lw=1.2, label=name)
        for ax, score in zip(axes[1:], SCORE_COLOURS, strict=True):
            points = [((r["step"] + 1) * unit, r[score]) for r in records if r.get(score) is not None]
            if points:
                ax.plot(*zip(*points, strict=True), "o-", color=colour, ms=4, label=name)
    for ax, score in zip(axes[1:], SCORE_COLOURS, strict=True):
        if published:
            share = [100 * point["step"] / published[-1]["step"] for point in published]
            ax.plot(share, [point[score] for point in published], "k--", lw=1.2, label="published")
        ax.set(title=f"{NAMES[score][0].upper()}{NAMES[score][1:]}, validation", ylabel="mIoU (%)", ylim=(0, None))
    axes[0].set(title="Total loss", ylabel="loss (terms weighted)")
    for ax in axes:
        ax.set_xlabel("share of the schedule (%)" if published else "step")
    handles = {label: handle for ax in axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    figure.tight_layout()
    if handles:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0.02), "ncol": min(len(handles), 6)}
        figure.legend(handles.values(), handles, **place)
    return figure


@_with_plain_text
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


@_with_plain_text
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


SIMILARITY_COLOURS = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}  # diverging around 0


@_with_plain_text
def by_block(
    ax: plt.Axes, curves: dict[str, Sequence[float]], *, title: str, ylabel: str, layer: int | None = None
) -> plt.Axes:
    """A number for each block, from 1, one line per name; `layer` marks the auxiliary classifier's block."""
    colours = name_colours(curves)
    for name, values in curves.items():
        ax.plot(range(1, len(values) + 1), values, "o-", ms=4, color=colours[name], label=name)
    if layer is not None:
        ax.axvline(layer, color="#999999", ls="--", lw=1)
    ax.set(title=title, xlabel="block", ylabel=ylabel)
    ax.set_xticks(range(1, len(next(iter(curves.values()))) + 1))
    ax.legend()
    return ax


@_with_plain_text
def similarity_matrix(ax: plt.Axes, matrix: np.ndarray, title: str = "", *, borders: Sequence[int] = ()) -> plt.Axes:
    """Cosine similarity of all pairs of patches (N N), blue -1 to red 1; a line before each index in `borders`."""
    ax.imshow(matrix, interpolation="nearest", **SIMILARITY_COLOURS)
    for border in borders:
        ax.axhline(border - 0.5, color="#222222", lw=0.7)
        ax.axvline(border - 0.5, color="#222222", lw=0.7)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


@_with_plain_text
def similarity_map(ax: plt.Axes, similarity: np.ndarray, title: str = "", *, patch: int | None = None) -> plt.Axes:
    """Cosine similarity of one patch with all (h w), blue -1 to red 1; the patch, counted row by row, gets a frame."""
    ax.imshow(similarity, interpolation="nearest", **SIMILARITY_COLOURS)
    if patch is not None:
        y, x = divmod(patch, similarity.shape[1])
        ax.add_patch(plt.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, edgecolor="#222222", lw=1.5))
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


@_with_plain_text
def attention_map(ax: plt.Axes, attention: np.ndarray, title: str = "", *, most: float = 4.0) -> plt.Axes:
    """Attention of the class token to the patches (h w) in units of an even spread: black 0, white `most` and more."""
    ax.imshow(attention * attention.size, interpolation="nearest", cmap="magma", vmin=0, vmax=most)
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


@_with_plain_text
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


def is_live() -> bool:
    """Whether a JupyterLab shows this kernel's outputs, so that what reacts to the pointer is worth its bytes."""
    return "JPY_SESSION_NAME" in os.environ


# ---- labels and crops against the masks

FLAG_COLOURS = {True: "#009e73", False: "#d55e00"}  # positive crops, negative crops
TRUTH_COLOURS = {
    "background": "#8c8c8c",
    "object (in the last bar: of that class)": "#0072b2",
    "another class": "#d55e00",
}
CROP_CURVES = {
    "positive_right": ("positive crops that show an object", FLAG_COLOURS[True], "-"),
    "shows_object": ("all crops that show an object", "#666666", "--"),
    "negative_right": ("negative crops that show none", FLAG_COLOURS[False], "-"),
    "positive": ("crops that are positive", "#0072b2", "-"),
    "images_with_positive": ("draws with a positive crop", FLAG_COLOURS[True], ":"),
    "images_with_negative": ("draws with a negative crop", FLAG_COLOURS[False], ":"),
}


@_with_plain_text
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


@_with_plain_text
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


def region_colours(region: np.ndarray) -> np.ndarray:
    """RGB of a region mask: background black, uncertain hatched grey, foreground white."""
    region = np.asarray(region)
    colours = label_colours(np.where(region == 1, IGNORE, 0))
    return np.where((region == 2)[..., None], 255, colours).astype(np.uint8)


@_with_plain_text
def crop_boxes(
    ax: plt.Axes,
    picture: np.ndarray,
    corners: Sequence[tuple[int, int]],
    size: int,
    is_positive: Sequence[bool],
    title: str = "",
) -> plt.Axes:
    """Numbered crops on a picture, positive ones green, negative ones orange and dashed; `corners` are (top, left)."""
    show(ax, picture, title)
    for number, ((top, left), positive) in enumerate(zip(corners, is_positive, strict=True), 1):
        colour, style = FLAG_COLOURS[bool(positive)], "-" if positive else "--"
        place = (left - 0.5, top - 0.5)
        ax.add_patch(plt.Rectangle(place, size, size, fill=False, ec="white", lw=3.2))
        ax.add_patch(plt.Rectangle(place, size, size, fill=False, ec=colour, lw=1.8, ls=style))
        box = {"facecolor": colour, "edgecolor": "none", "pad": 1.2}
        ax.text(left + 1, top + 1, number, color="white", fontsize=7, va="top", ha="left", bbox=box)
    return ax


@_with_plain_text
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


@_with_plain_text
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


# ---- one checkpoint under every protocol (see `assess`)


def protocol_table(summary: dict[str, dict], class_names: Sequence[str]) -> str:
    """IoU per class and the means of every kind in `Assessment.summary`, in percent, one column per kind."""

    def line(name: str, values) -> str:
        return f"{name:16}" + "".join(f"{'-' if v is None else f'{v:.1f}':>14}" for v in values)

    rows = [line(name, [s["classes"][name]["iou"] for s in summary.values()]) for name in class_names]
    means = {"mIoU": "miou", "pixel accuracy": "pixel_accuracy", "decided pixels": "decided"}
    rows += [line(name, [s[score] for s in summary.values()]) for name, score in means.items()]
    return "\n".join([f"{'IoU (%)':16}" + "".join(f"{kind:>14}" for kind in summary), *rows])


@_with_plain_text
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


@_with_plain_text
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


@_with_plain_text
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


@_with_plain_text
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


@_with_plain_text
def poster(
    rows: Sequence[Sequence[np.ndarray]],
    titles: Sequence[str],
    class_names: Sequence[str],
    shown: Sequence[int],
    *,
    cams: Sequence[int] = (),
    width: float = 1.75,
) -> plt.Figure:
    """Pictures in rows that keep their shapes, with titles above, and below them the colours of CAM and classes.

    `shown` are the classes to name; `cams` the columns that show a CAM, which get one bar from 0 to 1 for all.
    """
    n, gap, below = len(titles), 0.06, 0.75
    heights = [width * row[0].shape[0] / row[0].shape[1] for row in rows]
    size = n * width + (n - 1) * gap, sum(heights) + (len(rows) - 1) * gap + 0.5 + below
    figure = plt.figure(figsize=size)
    top = size[1] - 0.5
    for r, (row, height) in enumerate(zip(rows, heights, strict=True)):
        for c, picture in enumerate(row):
            place = [c * (width + gap) / size[0], (top - height) / size[1], width / size[0], height / size[1]]
            ax = show(figure.add_axes(place), picture)
            ax.set_aspect("auto")
            if r == 0:
                ax.set_title(titles[c], fontsize=10, linespacing=1.15)
        top -= height + gap
    if len(cams):
        left = min(cams) * (width + gap) / size[0]
        bar = figure.add_axes([left, 0.42 / size[1], (len(cams) * (width + gap) - gap) / size[0], 0.14 / size[1]])
        bar.imshow(np.linspace(0, 1, 256)[None], cmap="inferno", aspect="auto", extent=(0, 1, 0, 1))
        bar.set(yticks=[], xlabel="class activation (the same scale everywhere)")
        bar.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        bar.grid(False)
    palette = voc_palette() / 255
    ground, lines = (np.array(grey) / 255 for grey in IGNORE_GREYS)
    patches = [Patch(facecolor=palette[i], edgecolor="#999999", lw=0.5, label=class_names[i]) for i in shown]
    patches.append(Patch(facecolor=ground, edgecolor=lines, hatch="////", linewidth=0, label="uncertain / void"))
    left = (max(cams) + 1) * (width + gap) / size[0] if len(cams) else 0.0
    place = {"loc": "upper left", "bbox_to_anchor": (left + 0.1 / size[0], 0.64 / size[1]), "columnspacing": 1.0}
    figure.legend(handles=patches, ncol=min(len(patches), 4), fontsize=9, **place)
    return figure
