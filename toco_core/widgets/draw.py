"""Pictures of what is seen, as pure functions of arrays: quick enough to follow a slider.

RGB uint8 throughout. Colours mean what they mean in `viz`: CAM is fixed to 0..1, similarity diverges around 0, labels
have PASCAL VOC's colours, what is ignored is hatched grey.
"""

import functools
from collections.abc import Sequence

import cv2
import matplotlib as mpl
import numpy as np

from toco_core import viz
from toco_core.conventions import IGNORE, voc_palette
from toco_core.widgets.analysis import Crop
from toco_core.widgets.markup import Markup, drawing, element, joined

SIDE = 448  # longer side of the picture, pixels
DARK, LIGHT = (20, 20, 20), (255, 255, 255)
LOWER = (120, 200, 255)  # the line at the lower of two thresholds
POSITIVE, NEGATIVE = (0, 158, 115), (213, 94, 0)  # crops; told apart by colour-blind readers, too


def _table(name: str) -> np.ndarray:
    return (255 * mpl.colormaps[name](np.arange(256) / 255.0)[:, :3]).round().astype(np.uint8)


CAM_COLOURS, SIMILARITY_COLOURS, ATTENTION_COLOURS = _table("inferno"), _table("RdBu_r"), _table("viridis")

LABEL_COLOURS = voc_palette()
LABEL_COLOURS[IGNORE] = viz.IGNORE_GREYS[0]


def shown_size(size: tuple[int, int], side: int = SIDE) -> tuple[int, int]:
    """(H, W) at which an image is shown: its longer side is `side`."""
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def enlarged(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A photograph at (H, W)."""
    shrinks = size[0] < image.shape[0]
    return cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def ground(image: np.ndarray) -> np.ndarray:
    """The image with less colour, so that an overlay's colours stand out: what `viz.overlay` lays a CAM over."""
    grey = image.astype(np.float32).mean(-1, keepdims=True)
    return (0.35 * image + 0.65 * grey).round().astype(np.uint8)


def cam_picture(under: np.ndarray, value: np.ndarray, *, strength: float) -> np.ndarray:
    """A CAM over `ground(image)`. Equal to `viz.overlay` up to rounding. `value` H W in [0, 1] at the same size."""
    index = cv2.convertScaleAbs(value, alpha=256, beta=-0.5)  # rounds, and stays within 0..255
    return cv2.addWeighted(under, 1 - strength, _looked_up(index, CAM_COLOURS), strength, 0)


def class_colouring(values: Sequence[np.ndarray], classes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Of several CAMs (H W in [0, 1]): the colours of their labels mixed by the values, and the largest value."""
    mixed = np.zeros((*values[0].shape, 3), np.float32)
    total, largest = np.full(values[0].shape, 1e-6, np.float32), np.zeros(values[0].shape, np.float32)
    for value, k in zip(values, classes, strict=True):
        mixed += value[..., None] * LABEL_COLOURS[k].astype(np.float32)
        total += value
        np.maximum(largest, value, out=largest)
    return (mixed / total[..., None]).round().astype(np.uint8), largest


def classes_picture(under: np.ndarray, colours: np.ndarray, value: np.ndarray, *, strength: float) -> np.ndarray:
    """What `class_colouring` made, over `ground(image)`: a colour covers the image by its value."""
    return cv2.blendLinear(under, colours, 1 - strength * value, strength * value)


def labels_in(label: np.ndarray) -> list[int]:
    """The values of a label map, ascending."""
    return np.flatnonzero(cv2.calcHist([label], [0], None, [256], [0, 256])).tolist()


def label_colours(label: np.ndarray) -> np.ndarray:
    """The same colours as `viz.label_colours`, by one look-up per pixel: uint8 H W -> uint8 H W 3."""
    colours = _looked_up(label, LABEL_COLOURS)
    ignored = cv2.compare(label, IGNORE, cv2.CMP_EQ)
    if cv2.countNonZero(ignored):
        lines, grey = _hatching(label.shape)
        cv2.copyTo(grey, cv2.bitwise_and(ignored, lines), colours)
    return colours


def _looked_up(index: np.ndarray, table: np.ndarray) -> np.ndarray:
    return cv2.applyColorMap(index, table[:, None])


@functools.lru_cache(maxsize=4)
def _hatching(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Where the lines of uncertain pixels are, 255 or 0, and a picture of their colour."""
    y, x = np.indices(size)
    return np.where((x + y) % 6 < 2, 255, 0).astype(np.uint8), np.full((*size, 3), viz.IGNORE_GREYS[1], np.uint8)


def label_picture(image: np.ndarray, label: np.ndarray, *, strength: float) -> np.ndarray:
    """Label colours over the image, whose background stays as it is. `label` H W at the same size."""
    picture = cv2.addWeighted(image, 1 - strength, label_colours(label), strength, 0)
    cv2.copyTo(image, cv2.compare(label, 0, cv2.CMP_EQ), picture)
    return picture


def resized(values: np.ndarray, size: tuple[int, int], *, smooth: bool = False) -> np.ndarray:
    """Values at (H, W): each keeps its square, or `smooth` bilinear."""
    how = cv2.INTER_LINEAR if smooth else cv2.INTER_NEAREST_EXACT
    return cv2.resize(np.ascontiguousarray(values), tuple(size)[::-1], interpolation=how)


def with_levels(picture: np.ndarray, value: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """Lines where the CAM crosses the levels: the lowest dotted by darkness, all on a dark rim."""
    for level in levels:
        above = (value >= level).astype(np.uint8)
        picture = with_regions(picture, above, colour=LIGHT if level == max(levels) else LOWER)
    return picture


def with_regions(picture: np.ndarray, label: np.ndarray, *, colour=LIGHT) -> np.ndarray:
    """A line on a dark rim around each region of a label map, ignored ones included."""
    drawn, where = _lines(label.tobytes(), label.shape, colour)
    return cv2.copyTo(drawn, where, picture.copy())


@functools.lru_cache(maxsize=16)
def _lines(label: bytes, size: tuple[int, int], colour: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """The lines around the regions of a label map on black, and where they are: kept, as an overlay that grows stronger
    moves none."""
    values, drawn = np.frombuffer(label, np.uint8).reshape(size), np.zeros((*size, 3), np.uint8)
    for k in labels_in(values):
        if k:
            lines, _ = cv2.findContours((values == k).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE)
            cv2.drawContours(drawn, lines, -1, DARK, 3)
            cv2.drawContours(drawn, lines, -1, colour, 1)
    return drawn, cv2.extractChannel(drawn, 2)  # no line's colour has a 0 there


def with_patch(picture: np.ndarray, grid: tuple[int, int], patch: int) -> np.ndarray:
    """A frame around one patch."""
    H, W = picture.shape[:2]
    row, column = divmod(patch, grid[1])
    top, left = round(row * H / grid[0]), round(column * W / grid[1])
    bottom, right = round((row + 1) * H / grid[0]) - 1, round((column + 1) * W / grid[1]) - 1
    picture = picture.copy()
    cv2.rectangle(picture, (left, top), (right, bottom), DARK, 4)
    cv2.rectangle(picture, (left, top), (right, bottom), LIGHT, 2)
    return picture


def with_crops(picture: np.ndarray, crops: Sequence[Crop]) -> np.ndarray:
    """Numbered frames of local views: green where positive, orange where negative."""
    picture, (H, W) = picture.copy(), picture.shape[:2]
    for crop in crops:
        corner = round(crop.left * W), round(crop.top * H)
        end = round((crop.left + crop.width) * W) - 1, round((crop.top + crop.height) * H) - 1
        cv2.rectangle(picture, corner, end, DARK, 4)
        cv2.rectangle(picture, corner, end, POSITIVE if crop.is_positive else NEGATIVE, 2)
    for number, crop in enumerate(crops, 1):  # after all frames: none covers a number
        place = round(crop.left * W) + 5, round(crop.top * H) + 19
        for colour, thickness in ((DARK, 4), (LIGHT, 1)):
            cv2.putText(picture, str(number), place, cv2.FONT_HERSHEY_SIMPLEX, 0.55, colour, thickness, cv2.LINE_AA)
    return picture


def similarity_picture(values: np.ndarray, size: tuple[int, int], patch: int) -> np.ndarray:
    """Cosine similarities h w in [-1, 1] at (H, W): blue -1, white 0, red 1, a frame around the patch asked about."""
    index = ((values.astype(np.float32) + 1) * 127.5).round().clip(0, 255).astype(np.uint8)
    return with_patch(_looked_up(resized(index, size), SIMILARITY_COLOURS), values.shape, patch)


def attention_picture(heads: np.ndarray, size: tuple[int, int], *, head: int = 0) -> tuple[np.ndarray, float]:
    """Attention of one head (0: their mean), heads h w, at (H, W) from 0 to the largest value, and that value."""
    values = heads.mean(0) if head == 0 else heads[head - 1]
    top = float(values.max())
    index = (values / max(top, 1e-12) * 255).round().astype(np.uint8)
    return _looked_up(resized(index, size), ATTENTION_COLOURS), top


def encoded(picture: np.ndarray, *, kind: str = "jpeg") -> bytes:
    """The bytes of a JPEG (colours at full resolution), or of a PNG written quickly."""
    if kind == "jpeg":
        sampling = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
        name, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, 92, *sampling]
    else:
        name, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 1]
    return cv2.imencode(name, cv2.cvtColor(picture, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def curve_svg(curves: dict[str, np.ndarray], *, block: int, layer: int, width: int = 310, height: int = 190) -> Markup:
    """Values in [-1, 1] after each block, one line per name; takes the page's text colour, light or dark."""
    left, right, top, bottom = 44, 12, 26, 40
    depth = max(len(values) for values in curves.values())
    low = -1.0 if min(min(values) for values in curves.values()) < -0.05 else 0.0

    def x(number: float) -> float:
        return left + (number - 1) / max(depth - 1, 1) * (width - left - right)

    def y(value: float) -> float:
        return top + (1 - value) / (1 - low) * (height - top - bottom)

    parts = []
    for tick in np.linspace(low, 1, 5):
        at = f"{y(tick):.1f}"
        parts.append(element("line", x1=left, x2=width - right, y1=at, y2=at, stroke="currentColor", opacity=".15"))
        parts.append(element("text", f"{tick:.2g}", x=left - 6, y=f"{y(tick) + 4:.1f}", text_anchor="end"))
    for number in range(1, depth + 1):
        if depth <= 14 or number % 2 == 0:
            at = {"x": f"{x(number):.1f}", "y": height - bottom + 15}
            parts.append(element("text", str(number), **at, text_anchor="middle"))
    for number, dash in ((layer, "3 3"), (block, "")):
        if 1 <= number <= depth:
            at = {"x1": f"{x(number):.1f}", "x2": f"{x(number):.1f}", "y1": top, "y2": height - bottom}
            parts.append(element("line", **at, stroke="currentColor", opacity=".5", stroke_dasharray=dash))
    colours = ("#d55e00", "#0072b2")
    for values, colour in zip(curves.values(), colours, strict=False):
        places = [(f"{x(i):.1f}", f"{y(value):.1f}") for i, value in enumerate(values, 1)]
        points = " ".join(",".join(place) for place in places)
        parts.append(element("polyline", points=points, fill="none", stroke=colour, stroke_width=2))
        parts += [element("circle", cx=px, cy=py, r=2.6, fill=colour) for px, py in places]
    legend = [element("tspan", f"● {name}", fill=colour) for name, colour in zip(curves, colours, strict=False)]
    parts.append(element("text", joined(legend, " "), x=left, y=14))
    below = f"block (solid: chosen, dashed: auxiliary, {layer})"
    parts.append(element("text", below, x=(left + width - right) / 2, y=height - 8, text_anchor="middle"))
    return drawing(*parts, width=width, height=height, label="similarity by block")


def colour_bar(kind: str, *, top: float = 1.0) -> Markup:
    """HTML of a scale: `CAM` 0..1, `similarity` -1..1, or `attention` 0..`top`."""
    tables = {"CAM": CAM_COLOURS, "similarity": SIMILARITY_COLOURS, "attention": ATTENTION_COLOURS}
    table, low = tables[kind], "−1" if kind == "similarity" else "0"
    stops = ",".join(f"rgb({r},{g},{b})" for r, g, b in table[::15].tolist())
    bar = element("span", class_="toco-bar", style=f"background:linear-gradient(90deg,{stops})")
    return element("span", f"{low} ", bar, f" {top:.3g}", class_="toco-scale")


def class_colour(k: int) -> str:
    """CSS of a label's colour."""
    return f"rgb({','.join(map(str, LABEL_COLOURS[k].tolist()))})"


def contour_key(beta_l: float, beta_h: float) -> Markup:
    """HTML that names the two lines of `with_levels`."""
    lines = ((LOWER, f"beta_l {beta_l:g}"), (LIGHT, f"beta_h {beta_h:g}"))
    styles = [(f"background:rgb{colour};border:3px solid rgb{DARK}", name) for colour, name in lines]
    return joined(element("span", element("i", style=style), name, class_="toco-chip") for style, name in styles)


def label_key(names: dict[int, str], *, ignored: bool) -> Markup:
    """HTML that names the colours of labels: number -> name."""
    colours = [(class_colour(k), name) for k, name in names.items()]
    if ignored:
        light, dark = (f"rgb{grey}" for grey in viz.IGNORE_GREYS)
        colours.append((f"repeating-linear-gradient(135deg,{light} 0 3px,{dark} 3px 5px)", "uncertain"))
    return joined(
        element("span", element("i", style=f"background:{colour}"), name, class_="toco-chip")
        for colour, name in colours
    )
