"""Small folders in VOC layout for tests, in real file formats."""

from pathlib import Path

import cv2
import numpy as np
from PIL import Image

CLASSES = ("background", "cat", "dog", "sheep")
SIZES = [(20, 30), (33, 21), (16, 16), (25, 40)]  # H, W, taken in turn


def smooth_image(height, width, seed):
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)


def rectangle_mask(height, width, label):
    """`label` in the middle, a rim of 255 around it, background outside."""
    mask = np.zeros((height, width), dtype=np.uint8)
    mask[3:-3, 4:-4] = 255
    mask[4:-4, 5:-5] = label
    return mask


def save_palette_mask(mask, path):
    """A palette PNG whose colours have nothing to do with its indices."""
    image = Image.fromarray(mask).convert("P")
    image.putdata(mask.ravel().tolist())
    image.putpalette(np.random.default_rng(9).integers(0, 256, 768).tolist())
    image.save(path)


def write_voc_folder(root: Path, n: int = 6, splits: dict | None = None, classes=CLASSES) -> Path:
    """Image i has the size SIZES[i % 4] and shows class 1 + i % 3; `splits` maps names to image numbers."""
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    for i in range(n):
        height, width = SIZES[i % len(SIZES)]
        Image.fromarray(smooth_image(height, width, i)).save(
            root / "JPEGImages" / f"img_{i}.jpg", quality=95, subsampling=0
        )
        save_palette_mask(rectangle_mask(height, width, 1 + i % 3), root / "SegmentationClass" / f"img_{i}.png")
    for split, numbers in (splits or {"train": range(n)}).items():
        write_list(root, split, [f"img_{i}" for i in numbers])
    if classes:
        (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return root


def write_list(root: Path, split: str, lines) -> Path:
    path = root / "ImageSets" / "Segmentation" / f"{split}.txt"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
