"""Images under their CAM or label, crops on them, and pictures in rows."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.patches import Patch
from PIL import Image, ImageDraw, ImageFont

from toco_core.conventions import IGNORE, voc_palette
from toco_core.errors import ToCoError
from toco_core.viz.theme import FLAG_COLOURS, IGNORE_GREYS, bare, showable, with_plain_text


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
        text = showable(title)
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
    entries = [(k, showable(str(name))) for k, name in sorted(names.items())] or [(0, "no class")]
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


@with_plain_text
def show(ax: plt.Axes, picture: np.ndarray, title: str = "") -> plt.Axes:
    """A picture without axes."""
    ax.imshow(picture, interpolation="nearest")
    return bare(ax, title)


@with_plain_text
def picture_rows(rows: Sequence[Sequence[np.ndarray]], titles: Sequence[str], *, names: Sequence[str] = (), width=1.7):
    """Pictures in rows, one title per column, one name per row; returns the figure. Raises ToCoError for no picture."""
    if not any(map(len, rows)):
        raise ToCoError("0 pictures are to be shown: at least 1 is wanted")
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


@with_plain_text
def class_legend(figure: plt.Figure, class_names: Sequence[str], labels: Sequence[int]) -> plt.Figure:
    """Name the colours of some classes under a figure."""
    palette = voc_palette() / 255
    patches = [Patch(color=palette[i], label=class_names[i]) for i in labels]
    ground, lines = (np.array(grey) / 255 for grey in IGNORE_GREYS)
    patches.append(Patch(facecolor=ground, edgecolor=lines, hatch="////", linewidth=0, label="ignored"))
    figure.legend(handles=patches, loc="upper center", bbox_to_anchor=(0.5, 0.01), ncol=min(len(patches), 8))
    return figure


@with_plain_text
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


def region_colours(region: np.ndarray) -> np.ndarray:
    """RGB of a region mask: background black, uncertain hatched grey, foreground white."""
    region = np.asarray(region)
    colours = label_colours(np.where(region == 1, IGNORE, 0))
    return np.where((region == 2)[..., None], 255, colours).astype(np.uint8)


@with_plain_text
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


@with_plain_text
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
