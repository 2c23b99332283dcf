"""Pseudo labels out: label maps of a split, in a folder that any trainer of segmentation reads.

    folder/SegmentationClass/<name>.png              palette PNG with VOC's colours, at the image's own size
    folder/JPEGImages/<name>.<suffix>                the images, copied or linked, so that the folder is a data set
    folder/ImageSets/Segmentation/<split>.txt        the names
    folder/classes.txt                               the classes, background first
    folder/annotations/instances_<split>.json        the same labels as COCO's RLE
    folder/manifest.json                             what made them, and a hash of every file

Only label maps touch the disk, each file is written whole or not at all, and an interrupted export goes on where it
stopped. From a shell:

    toco export <folder of a run> <new folder> --split train --method par
"""

import gzip
import hashlib
import io
import json
import tarfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from toco_core.config import TrainConfig, override
from toco_core.conventions import IGNORE, classes_in
from toco_core.data import VOC_CLASSES, Split, evaluation_items, open_source, read_image, read_mask
from toco_core.data.files import IMAGE_SUFFIXES, PROGRESS_FROM, is_upright, palette_png
from toco_core.data.fingerprint import file_digests
from toco_core.data.loader import loader_errors
from toco_core.data.split import split_name
from toco_core.errors import ToCoError, refuse_other
from toco_core.machine.memory import memory_errors
from toco_core.machine.precision import passes_of
from toco_core.machine.writing import PART, place_file, whole_file, write_whole, writing
from toco_core.model import ToCo
from toco_core.predict.image import ImagePredictor, computed_by, eval_size
from toco_core.predict.segmentation import checked_crf
from toco_core.runs.folder import claimed

METHODS = {
    "cam": "the labelled class with the largest CAM, background where that is at most beta",
    "par": "two thresholds and pixel-adaptive refinement, 255 between them: what training teaches the decoder",
    "crf": "two thresholds and a dense CRF in the place of PAR, 255 between them",
    "vote": "the mean of both CAMs and the decoder's probabilities, PAR, background where that is at most beta",
    "seg": "the decoder's segmentation; needs no image-level labels",
    "seg_crf": "the decoder's segmentation, refined by a dense CRF; needs no image-level labels",
}
IMAGES = ("copy", "link", "none")
HEADS = {"cls": "classifier", "aux_cls": "auxiliary classifier", "seg": "decoder"}
"""The loss that trains a head, and the head."""


class Exported(NamedTuple):
    """A finished export."""

    folder: Path
    n_images: int
    n_new: int  # label maps made by this call; the others were there
    pixels: dict[str, float]  # share of all pixels per class name
    ignored: float  # share of those that are 255


@loader_errors()
@memory_errors("a smaller crop_size or fewer cam_scales")
def export(
    model: ToCo,
    source: Split,
    folder: Path | str,
    config: TrainConfig,
    *,
    method: str | None = None,
    crf: Mapping | bool = True,
    split: str | None = None,
    parts: Mapping[str, Sequence[str]] | None = None,
    images: str = "copy",
    progress: bool = True,
    **thresholds: float | None,
) -> Exported:
    """Write label maps of every image of a split in VOC layout.

    Args:
        method: one of `METHODS`; None: par, or seg where the classifier was not trained. Sizes, scales and thresholds
            are those of `config`, as `look` and `evaluate_as` use them.
        crf: True, or fields of `refiners.crf.CRFSettings`, for the two methods with a CRF.
        split: name of the list that is written; None: the split's own name.
        parts: name -> images, of further lists.
        images: "copy", "link" (hard links where the disk allows it, else copies: who edits such a file edits the data
            set's), or "none", which leaves a folder of masks alone. A picture that its camera wants turned is stored
            upright, as PNG.
        thresholds: `beta` of "cam" and "vote", `beta_l` and `beta_h` of "par" and "crf"; None: those of
            `config.labels`.

    Raises ToCoError for an unknown method, for one whose head was not trained, for a threshold that it does not have,
    and for a folder that holds something else or an export of other settings.
    """
    refuse_other(IMAGES, images=images)
    how = LabelMethod.of(method, config, crf)
    config = with_thresholds(config, how, **thresholds)
    folder, split = Path(folder), split or source.split
    for name in (split, *(parts or {})):
        split_name(name, "split")
    settings = _settings(model, source, config, how)
    with claimed(folder, settings, "export", "exports to"):
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        missing = [i for i, name in enumerate(source.names) if not label_path(folder, name).is_file()]
        if missing:
            made = label_maps(model, source.subset(missing), config, how)
            with ThreadPoolExecutor(2) as pool:
                bar = tqdm(made, total=len(missing), desc="exporting", unit="image", disable=not progress, leave=False)
                for done in pool.map(lambda item: write_label(label_path(folder, item[0]), item[1]), bar):
                    assert done is None
        if images != "none":
            tell_outside(source)
            for i, name in enumerate(_bar(source.names, "placing images", progress)):
                place_image(source.image_path(i), folder / "JPEGImages", name, link=images == "link")
        return write_lists(folder, source, split, settings, len(missing), parts=parts, progress=progress)


def tell_outside(source: Split) -> None:
    """Warn where images are links out of their data set: who gives the export away gives those files away."""
    outside = source.outside()
    if outside:
        path = source.image_path(outside[0])
        warnings.warn(
            f"{len(outside)} of {len(source)} images are links to files outside of {source.root}, and the export has "
            f"those files (the first: {path.name} is {path.resolve()}); images = 'none' leaves them out",
            stacklevel=3,
        )


class LabelMethod(NamedTuple):
    """How the label map of an image is made, with the sizes, scales and thresholds of a config."""

    name: str
    """One of `METHODS`."""
    crf: dict | None
    """`CRFSettings`, where the method has a CRF."""

    @classmethod
    def of(cls, name: str | None, config: TrainConfig, crf: Mapping | bool = True) -> "LabelMethod":
        """Check a method, or choose that of a model: par, or seg where the classifier's loss has weight 0.

        Raises ToCoError for an unknown name, one with a CRF without it, and one that asks a head whose loss has weight
        0: a second network has a trained decoder only.
        """
        name = name or ("par" if config.loss.cls else "seg")
        refuse_other(METHODS, method=name)
        untrained = {n: [loss for loss in _needed(n) if not getattr(config.loss, loss)] for n in METHODS}
        if untrained[name]:
            loss = untrained[name][0]
            allowed = " or ".join(f"--method {n}" for n, missing in untrained.items() if not missing) or "none"
            raise ToCoError(
                f"method = {name!r} needs the {HEADS[loss]}, whose loss ({loss}) has weight 0 in this model: "
                f"allowed is {allowed}"
            )
        options = checked_crf(crf) if name.endswith("crf") else None
        if name.endswith("crf") and options is None:
            raise ToCoError(f"method = {name!r} needs a CRF: crf = False is not allowed")
        return cls(name, options)

    @property
    def needs_labels(self) -> bool:
        """Whether image-level labels choose the classes."""
        return not self.name.startswith("seg")

    @property
    def thresholds(self) -> tuple[str, ...]:
        """The thresholds of a config that it asks."""
        if not self.needs_labels:
            return ()
        return ("beta",) if self.name in ("cam", "vote") else ("beta_l", "beta_h")

    def label(self, predictor: ImagePredictor, classes: Sequence[int] | None = None) -> UInt8[np.ndarray, "H W"]:
        """The label map at native size of the image that was set, of `classes` (None: the labelled ones)."""
        if self.name == "cam":
            return predictor.cam_label(predictor.config.labels.beta, classes=classes)
        if self.name == "vote":
            return predictor.voted_label(refiner="par", classes=classes)
        if self.needs_labels:
            return predictor.pseudo_label(self.name, settings=self.crf, classes=classes)
        return predictor.segmentation(scales=predictor.config.seg_scales, crf=self.crf)

    def settings(self, model: ToCo, config: TrainConfig) -> dict:
        """All that a label map depends on besides its image and its classes."""
        labels, used = config.labels, {"method": self.name, "size": eval_size(config), "crf": self.crf}
        if self.needs_labels:
            names = {"scales": "cam_scales"}
            used |= {names.get(name, name): value for name, value in labels.cam_options().items()}
            used |= {name: getattr(labels, name) for name in self.thresholds}
        else:
            used |= {"seg_scales": config.seg_scales, "max_over_scales": config.release.max_over_scales}
        if self.name in ("par", "vote"):
            used |= {name: getattr(labels, name) for name in ("par_iterations", "par_dilations", "par_scale")}
        with passes_of(model, config)():
            return used | computed_by(model)


def with_thresholds(config: TrainConfig, how: LabelMethod, **thresholds: float | None) -> TrainConfig:
    """The config with those thresholds that are not None. Raises ToCoError for one that the method does not have."""
    given = {name: value for name, value in thresholds.items() if value is not None}
    known = f"its thresholds are {' and '.join(how.thresholds)}" if how.thresholds else "it has no thresholds"
    for name, value in given.items():
        if name not in how.thresholds:
            raise ToCoError(f"{name} = {value} is not allowed with method = {how.name!r}: {known}")
    return override(config, **given)


def _needed(method: str) -> tuple[str, ...]:
    """The losses whose heads a method asks."""
    if method == "vote":
        return tuple(HEADS)
    return ("seg",) if method.startswith("seg") else ("cls",)


def label_maps(
    model: ToCo, source: Split, config: TrainConfig, how: LabelMethod
) -> Iterator[tuple[str, UInt8[np.ndarray, "H W"]]]:
    """(name, label map at native size) of every image, in order; one image in memory at a time."""
    known = source if how.needs_labels else _Unlabelled(source)
    predictor = ImagePredictor(model, config, passes=passes_of(model, config))
    with model.evaluating():
        for item in evaluation_items(
            known, size=eval_size(config), workers=config.data.workers, native=True, masks=False
        ):
            predictor.set_item(item)
            yield item.name, how.label(predictor)


class _Unlabelled:
    """A split whose image-level labels are not asked for: a test split may have none."""

    def __init__(self, source: Split):
        self.names, self.image, self.n = source.names, source.image, len(source)
        self.image_labels = np.zeros((self.n, source.n_classes), np.uint8)

    def __len__(self) -> int:
        return self.n

    def mask(self, index: int) -> None:
        return None


# ---- the folder


def _settings(model: ToCo, source: Split, config: TrainConfig, how: LabelMethod) -> dict:
    """All that the label maps depend on, as JSON holds it."""
    settings = how.settings(model, config) | {"classes": list(source.class_names)}
    if how.needs_labels:
        settings |= {"image_labels": _sha256(source.image_labels.tobytes())}
    settings |= {"images": _sha256("\n".join(source.names).encode()), **file_digests(source, masks=False)}
    return json.loads(json.dumps(settings))


def label_path(folder: Path, name: str) -> Path:
    return folder / "SegmentationClass" / f"{name}.png"


def write_label(path: Path, label: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, palette_png(label))


def place_image(original: Path, folder: Path, name: str, *, link: bool, replace: bool = False) -> None:
    """Place the image beside its label: the same file, or upright where the file only says how to turn it.

    A picture of that name that is there stays, or, with `replace`, goes once the new one is written.
    """
    upright = is_upright(original)
    target = folder / f"{name}{original.suffix.lower() if upright else '.png'}"
    if target.is_file() and not replace:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if upright:
        place_file(original, target, link=link)
    else:
        with io.BytesIO() as file:
            Image.fromarray(read_image(original)).save(file, "PNG")
            write_whole(target, file.getvalue())
    if replace:
        remove_image(folder, name, but=target)


def remove_image(folder: Path, name: str, *, but: Path | None = None) -> None:
    """Remove the pictures of that name, with whatever suffix, but one."""
    for suffix in IMAGE_SUFFIXES:
        path = folder / f"{name}{suffix}"
        if path != but:
            path.unlink(missing_ok=True)


def write_lists(
    folder: Path,
    source: Split,
    split: str,
    settings: dict,
    n_new: int,
    *,
    parts: Mapping[str, Sequence[str]] | None = None,
    progress: bool = False,
) -> Exported:
    """Lists, classes, COCO's JSON and the manifest, from the label maps that are there now.

    `parts` are further lists: name -> names of images of `source`.
    """
    counts, files = np.zeros(256, np.int64), {}
    entries, annotations = [], []
    pictures = {p.relative_to(folder / "JPEGImages").with_suffix("").as_posix(): p for p in _pictures(folder)}
    for number, name in enumerate(_bar(source.names, "writing lists", progress), start=1):
        path = label_path(folder, name)
        label = read_mask(path)
        counts += np.bincount(label.ravel(), minlength=256)
        files[name] = _sha256(path.read_bytes())
        file_name = pictures[name].relative_to(folder / "JPEGImages").as_posix() if name in pictures else f"{name}.jpg"
        entry = {"id": number, "file_name": file_name, "height": label.shape[0], "width": label.shape[1]}
        if (label == IGNORE).any():
            entry["ignore"] = _rle(label == IGNORE)
        entries.append(entry)
        annotations += _annotations(label, number, len(annotations) + 1)
    for below in ("ImageSets/Segmentation", "annotations"):
        (folder / below).mkdir(parents=True, exist_ok=True)
    categories = [{"id": k, "name": name} for k, name in enumerate(source.class_names) if k]
    for part, names in {**(parts or {}), split: source.names}.items():
        wanted = set(names)
        numbers = {number for number, name in enumerate(source.names, start=1) if name in wanted}
        content = {
            "images": [entry for entry in entries if entry["id"] in numbers],
            "annotations": [entry for entry in annotations if entry["image_id"] in numbers],
            "categories": categories,
        }
        write_whole(folder / "ImageSets" / "Segmentation" / f"{part}.txt", "".join(f"{name}\n" for name in names))
        write_whole(folder / "annotations" / f"instances_{part}.json", json.dumps(content))
    write_whole(folder / "classes.txt", "".join(f"{name}\n" for name in source.class_names))
    total = counts.sum()
    pixels = {name: float(counts[k] / total) for k, name in enumerate(source.class_names)}
    shares = {"pixels": pixels, "ignored": float(counts[IGNORE] / total)}
    manifest = {"finished": True, "split": split, "settings": settings, **shares, "sha256": files}
    write_whole(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")
    return Exported(folder, len(source), n_new, **shares)


def _bar(names: Sequence[str], what: str, progress: bool) -> tqdm:
    """The names, with a bar where there are so many that it takes a while."""
    quiet = not progress or len(names) <= PROGRESS_FROM
    return tqdm(names, desc=what, unit="image", disable=quiet, leave=False)


def _pictures(folder: Path) -> Iterator[Path]:
    return (p for p in (folder / "JPEGImages").rglob("*") if p.is_file() and p.suffix != PART)


def _annotations(label: np.ndarray, image: int, first: int) -> list[dict]:
    """One annotation per class of a label map."""
    found = []
    for k in classes_in(label):
        inside = label == k
        (top, bottom), (left, right) = (np.flatnonzero(inside.any(axis))[[0, -1]].tolist() for axis in (1, 0))
        found.append(
            {
                "id": first + len(found),
                "image_id": image,
                "category_id": k,
                "segmentation": _rle(inside),
                "bbox": [left, top, right - left + 1, bottom - top + 1],
                "area": int(np.count_nonzero(inside)),
                "iscrowd": 0,
            }
        )
    return found


def _rle(mask: np.ndarray) -> dict:
    from pycocotools import mask as rle

    packed = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in packed["size"]], "counts": packed["counts"].decode()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def voc_archive(
    folder: Path | str, archive: Path | str, *, split: str = "test", competition: str = "comp6", year: int = 2012
) -> int:
    """The archive (.tgz) that PASCAL VOC's evaluation server takes, from an exported folder; returns the number of
    label maps in it.

    results/VOC2012/Segmentation/comp6_test_cls/<name>.png; "comp5" is for models that saw VOC's own data only, "comp6"
    for all others. The same folder gives the same bytes. Raises ToCoError where the classes are not VOC's 20 or a label
    map holds 255, which the server does not take.
    """
    folder, archive = Path(folder), Path(archive)
    if competition not in ("comp5", "comp6"):
        raise ToCoError(f"competition = {competition!r} is not allowed: comp5 or comp6")
    source = open_source(folder, split, require_masks=True)
    if source.class_names != VOC_CLASSES:
        raise ToCoError(f"{folder} has the classes {', '.join(source.class_names[1:])}: VOC's 20 are wanted")
    below = f"results/VOC{year}/Segmentation/{competition}_{split}_cls"
    with writing(archive), whole_file(archive) as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
        with tarfile.open(fileobj=packed, mode="w") as tar:
            for index, name in enumerate(source.names):
                if (source.mask(index) == IGNORE).any():
                    raise ToCoError(f"{label_path(folder, name)} holds 255: the server takes 0..20 only, as method seg")
                data = label_path(folder, name).read_bytes()
                entry = tarfile.TarInfo(f"{below}/{name}.png")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return len(source)
