"""Small data sets in COCO's layout and as tagged photographs, in real file formats."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from voc_folder import smooth_image

CATEGORIES = [{"id": 3, "name": "dog"}, {"id": 1, "name": "cat"}, {"id": 90, "name": "sheep"}]  # 1..K: cat, dog, sheep
SIZES = [(20, 30), (33, 21), (16, 18)]


def rectangle(top, left, bottom, right):
    """A polygon along the edges of pixels."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def run_lengths(mask):
    """Uncompressed RLE of an H W mask: columns one after another, the first count is of 0."""
    flat = mask.T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *edges, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": ([0] if flat[0] else []) + counts}


def annotation(number, image, category, segmentation, **more):
    return {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation, "iscrowd": 0} | more


def coco_content(numbers, year_name="train2014"):
    """Image i has the size SIZES[i % 3]: a large dog, a small cat on it, and on image 2 a crowd of sheep; image 3 has
    nothing."""
    images, annotations = [], []
    for i in numbers:
        height, width = SIZES[i % 3]
        file_name = f"COCO_{year_name}_{i:012d}.jpg"
        images.append({"id": 100 + i, "file_name": file_name, "height": height, "width": width})
        if i == 3:
            continue
        annotations.append(annotation(10 * i + 1, 100 + i, 1, rectangle(6, 7, 9, 11)))  # before what it lies on
        annotations.append(annotation(10 * i + 2, 100 + i, 3, rectangle(2, 3, 12, 15)))
        if i == 2:
            crowd = np.zeros((height, width), bool)
            crowd[13:15, 4:17] = True
            annotations.append(annotation(10 * i + 3, 102, 90, run_lengths(crowd), iscrowd=1))
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_coco_folder(root: Path, splits=None) -> Path:
    (root / "annotations").mkdir(parents=True)
    for split, numbers in (splits or {"train": range(5), "val": range(5, 8)}).items():
        name = f"{split}2014"
        content = coco_content(numbers, name)
        (root / name).mkdir()
        for image in content["images"]:
            picture = smooth_image(image["height"], image["width"], image["id"])
            Image.fromarray(picture).save(root / name / image["file_name"], quality=95)
        write_json(root, split, content)
    return root


def write_json(root, split, content):
    path = root / "annotations" / f"instances_{split}2014.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read_json(root, split="train"):
    return json.loads((root / "annotations" / f"instances_{split}2014.json").read_text(encoding="utf-8"))


def write_images(root: Path, files) -> Path:
    """Images of three sizes under the given names below a folder."""
    for i, file in enumerate(files):
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(smooth_image(*SIZES[i % 3], i)).save(root / file)
    return root
