"""One image under all settings as a single HTML file, which needs no kernel and no network.

    predictor.set_image(image)
    write_page(predictor, "sheep.html", title="sheep.jpg", class_names=names)
    toco page runs/<run> sheep.jpg sheep.html

The file holds the class activation maps of every block, the picture, the segmentation and, where there is one, the
mask; thresholds, pixel-adaptive refinement, overlay and scores are worked out by its script as sliders are moved. Text
from files is data to it, never markup, and its policy allows no script but its own and no address at all.
"""

import base64
import hashlib
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import matplotlib as mpl
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from toco_core import par
from toco_core.conventions import voc_palette
from toco_core.data.files import picture_bytes
from toco_core.errors import ToCoError, one_line
from toco_core.machine.writing import write_file
from toco_core.predict.image import AUXILIARY, ImagePredictor

HERE = Path(__file__).parent
MOST_BYTES = 3_000_000
SIDES = (224, 160, 112, 80)  # longer side of the stored maps, pixels: the first that keeps the file small
PICTURE_SIDE = 448  # longer side of the picture, pixels
MOST_CLASSES = 8
SHOWN = ("image", "CAM", "CAM label", "seed label", "pseudo label", "segmentation", "ground truth")


def write_page(predictor: ImagePredictor, path: Path | str, **options: Any) -> Path:
    """Write `page_html` to a file. Raises ToCoError where it cannot be written."""
    return write_file(path, page_html(predictor, **options))


def page_html(
    predictor: ImagePredictor,
    *,
    title: str,
    class_names: Sequence[str],
    model: str = "",
    mask: UInt8[np.ndarray, "nh nw"] | None = None,
    mask_names: Sequence[str] | None = None,
    classes: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    has: Sequence[str] | None = None,
) -> str:
    """Return the page of the image that was set, less than `MOST_BYTES` long.

    Args:
        class_names: the model's, background first.
        mask: the ground truth in numbers of `mask_names`, by default of `class_names`; 255 void.
        classes: those to begin with, 1..K; None: the labelled ones, else the predicted ones.
        settings: what to begin with: show, block, strength, beta, beta_l, beta_h, par_iterations; and what stays:
            par_dilations, cam_scales, flip.
        has: the trained heads, of classifier, auxiliary and decoder; None: those whose loss has a weight in the config.
            Without a decoder there is no segmentation.

    Raises ToCoError for a model without a trained classifier.
    """
    if has is None:
        loss = predictor.config.loss
        weights = {"classifier": loss.cls, "auxiliary": loss.aux_cls, "decoder": loss.seg}
        has = [head for head, weight in weights.items() if weight > 0]
    if "classifier" not in has or len(class_names) < 2:
        other = "; `toco label --method seg` writes its segmentation" if "decoder" in has else ""
        raise ToCoError(f"{model or 'this model'} has no trained classifier: there is no CAM for a page{other}")
    for side in SIDES:
        page = _filled(_content(predictor, side, title, class_names, model, mask, mask_names, classes, settings, has))
        if len(page.encode()) < MOST_BYTES:
            return page
    raise ToCoError(f"the page would be {len(page.encode())} bytes long: at most {MOST_BYTES} are allowed")


def _filled(content: dict[str, Any]) -> str:
    """The template with its script and its data; no text of the data can end the script's element."""
    script = "\n" + (HERE / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    data = (
        json.dumps(content, ensure_ascii=True).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    )
    page = (HERE / "page.html").read_text(encoding="utf-8")
    values = {"HASH": digest, "TITLE": html.escape(one_line(content["title"])), "SCRIPT": script, "DATA": data}
    return re.sub("@([A-Z]+)@", lambda found: values[found[1]], page)


def _content(predictor, side, title, class_names, model, mask, mask_names, classes, settings, has) -> dict[str, Any]:
    """What the script works with, as JSON holds it; pictures are addresses that hold their bytes."""
    labels, wanted = predictor.config.labels, dict(settings or {})
    H, W = predictor.images.shape[-2:]
    scale = min(1.0, side / max(H, W))
    size = max(1, round(H * scale)), max(1, round(W * scale))
    small = tuple(max(1, int(n * labels.par_scale)) for n in size)
    scores = predictor.class_scores()
    begun = tuple(predictor.labelled if classes is None else classes)
    begun = begun or tuple(int(k) + 1 for k in np.flatnonzero(scores > 0.5)) or (int(scores.argmax()) + 1,)
    probable = [int(k) + 1 for k in np.argsort(-scores, kind="stable")]
    stored = sorted([*begun, *[k for k in probable if k not in begun and scores[k - 1] > 0.2]][:MOST_CLASSES])
    names = list(mask_names or class_names)
    names += [name for name in class_names if name not in names]
    place = {k: names.index(name) for k, name in enumerate(class_names)}
    depth = predictor.model.depth
    rows = [(f"block {n}", f"{n} of {depth}", {"block": n}) for n in range(1, depth)]
    rows.append(("final", f"{depth}, last", {"block": depth}))
    if "auxiliary" in has:
        rows.append(("auxiliary", "aux.", {"block": AUXILIARY}))
    row = {AUXILIARY: len(rows) - 1}.get(wanted.get("block"), (wanted.get("block") or depth) - 1)

    views = {"scales": wanted.get("cam_scales"), "flip": wanted.get("flip", True)}

    def label_picture(label: np.ndarray) -> str:
        return _png(cv2.resize(label, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))

    segmentation = None
    if "decoder" in has:
        table = np.arange(256, dtype=np.uint8)
        table[: len(class_names)] = [place[k] for k in range(len(class_names))]
        segmentation = label_picture(table[predictor.segmentation()])
    native = predictor.native[0].permute(1, 2, 0).cpu().numpy()
    colours = (255 * mpl.colormaps["inferno"](np.arange(256) / 255.0)[:, :3]).round().astype(int)
    return {
        "title": title,
        "about": f"{model + ': ' if model else ''}class activation maps, labels and segmentation of one image",
        "names": names,
        "colours": voc_palette()[: len(names)].tolist(),
        "inferno": colours.tolist(),
        "classes": [
            {"name": class_names[k], "place": place[k], "score": float(scores[k - 1]), "on": k in begun} for k in stored
        ],
        "rows": [
            {"name": name, "title": words, "maps": [_png(_map(predictor, k, which | views, size)) for k in stored]}
            for name, words, which in rows
        ],
        "row": row,
        "size": size,
        "native": native.shape[:2],
        "image": _jpeg(native),
        "segmentation": segmentation,
        "mask": None if mask is None else label_picture(mask),
        "show": wanted.get("show") if wanted.get("show") in SHOWN else "CAM",
        "strength": wanted.get("strength", 0.65),
        **{name: wanted.get(name, getattr(labels, name)) for name in ("beta", "beta_l", "beta_h")},
        "par": {
            "size": small,
            "image": _png(_resized_image(predictor.unit, small)),
            "iterations": wanted.get("par_iterations", labels.par_iterations),
            "dilations": list(wanted.get("par_dilations", labels.par_dilations)),
            "colour_width": par.COLOUR_WIDTH,
            "position_width": par.POSITION_WIDTH,
            "position_weight": par.POSITION_WEIGHT,
            "eps": par.STD_EPS,
        },
    }


def _map(predictor: ImagePredictor, k: int, which: dict, size: tuple[int, int]) -> UInt8[np.ndarray, "h w"]:
    """A CAM in 256 steps."""
    cam = F.interpolate(predictor.class_cam(k, **which)[None, None].float(), size, mode="bilinear", align_corners=False)
    return (255 * cam[0, 0]).round().to(torch.uint8).cpu().numpy()


def _resized_image(unit: Float[Tensor, "1 3 H W"], size: tuple[int, int]) -> UInt8[np.ndarray, "h w 3"]:
    small = F.interpolate(unit.float(), size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0)
    return (255 * small).round().clamp(0, 255).to(torch.uint8).cpu().numpy()


def _jpeg(image: UInt8[np.ndarray, "H W 3"]) -> str:
    scale = PICTURE_SIDE / max(image.shape[:2])
    size = tuple(max(1, round(n * scale)) for n in image.shape[1::-1])
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    return _address("jpeg", picture_bytes(small, ".jpg", cv2.IMWRITE_JPEG_QUALITY, 90))


def _png(values: np.ndarray) -> str:
    return _address("png", picture_bytes(values, ".png", cv2.IMWRITE_PNG_COMPRESSION, 9))


def _address(kind: str, data: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
