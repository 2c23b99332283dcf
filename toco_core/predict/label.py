"""Label new photographs with a trained model.

    toco label runs/<run> my_photographs my_labels
    toco label full holiday labels --threshold 0.3 --method crf

    my_labels/SegmentationClass/<name>.png       label maps, and what else makes a data set in VOC layout of the folder,
                                                 with COCO's RLE: see `export`
    my_labels/overlays/<name>.jpg                each label map over its photograph, the classes named below it
    my_labels/photographs.csv                    file, classes, who chose them, a trained classifier's probabilities
    my_labels/skipped.txt                        photographs that cannot be used, and why

Which classes a photograph shows is known from its tags, in a list of tags or a folder per class (see
`data.layouts.tags`). Of a photograph without tags the classifier chooses: the classes with a probability above
`threshold`. A label map has no other classes than these, but for the methods "seg" and "seg_crf", which need none. Of a
second network only these two are allowed, and there a photograph without tags has the classes that its label map shows.

Any folder will do, with folders in it. An interrupted call goes on where it stopped; a later one labels what is new or
has changed, and puts its picture in the place of the one of before.
"""

import csv
import io
import json
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image
from tqdm import tqdm

from toco_core.config import TrainConfig
from toco_core.conventions import classes_in
from toco_core.data import Split, read_image
from toco_core.data.files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, index_files, named_files, why_unused
from toco_core.data.layouts import tags as tagged
from toco_core.data.source import reading
from toco_core.data.split import BACKGROUND_NAMES, split_name, utf8
from toco_core.errors import ToCoError, one_line, refuse_other
from toco_core.machine.intake import read_text, real_path
from toco_core.machine.memory import memory_errors
from toco_core.machine.precision import passes_of
from toco_core.machine.writing import open_to_append, write_whole, writing
from toco_core.predict.export import (
    IMAGES,
    LabelMethod,
    label_path,
    place_image,
    remove_image,
    with_thresholds,
    write_label,
    write_lists,
)
from toco_core.predict.image import ImagePredictor, NotFinite
from toco_core.predict.models import NamedModel, open_model
from toco_core.runs.folder import claimed
from toco_core.viz import label_over_image

TAGS = {
    "auto": "those in a list of tags or of a folder per class, where there are some",
    "none": "the classifier chooses the classes of every photograph",
}
LOG = "photographs.jsonl"
AHEAD = 4  # photographs that are read before their turn


class Photograph(NamedTuple):
    """A photograph to be labelled. `classes` are the model's, 1..K, where tags name them; None: nothing is known."""

    name: str
    path: Path
    classes: tuple[int, ...] | None


class PhotographFolder(NamedTuple):
    """The photographs of a folder, and what is wrong with those that cannot be used."""

    photographs: tuple[Photograph, ...]
    skipped: dict[str, str]
    """File -> reason."""


class Labelled(NamedTuple):
    """What `label_photographs` wrote."""

    folder: Path
    n_photographs: int
    n_new: int  # labelled by this call; the others were there
    skipped: dict[str, str]
    """File -> why it has no label."""
    images_per_class: dict[str, int]
    """Photographs in which each class was chosen, by tags or by the classifier."""


@memory_errors("a smaller crop_size or fewer cam_scales")
def label_photographs(
    model: NamedModel | str | Path,
    photographs: Path | str,
    folder: Path | str,
    *,
    method: str | None = None,
    threshold: float = 0.5,
    tags: str = "auto",
    crf: Mapping | bool = True,
    images: str = "copy",
    overlays: bool = True,
    split: str = "train",
    progress: bool = True,
    **thresholds: float | None,
) -> Labelled:
    """Write label maps of all photographs in a folder, into `folder`.

    Args:
        model: what `open_model` takes, or gives.
        photographs: a folder, with folders in it; a list of tags; or one photograph.
        method: one of `export.METHODS`; None: par, or seg for a second network, whose classifier was not trained.
        threshold: of the classifier's probability, above which a photograph without tags has a class.
        tags: "auto" or "none", see `TAGS`.
        images, thresholds: as for `export`.
        split: name of the list that is written.

    Raises ToCoError for a tag that is no class of the model, where no photograph can be used, for a folder that holds
    something else or labels of other settings, and as `export` does.
    """
    refuse_other(TAGS, tags=tags)
    refuse_other(IMAGES, images=images)
    split_name(split, "split")
    if not 0 <= threshold <= 1:
        raise ToCoError(f"threshold = {threshold} is not allowed: 0 to 1")
    opened = model if isinstance(model, NamedModel) else open_model(model)
    how = LabelMethod.of(method, opened.config, crf)
    config = with_thresholds(opened.config, how, **thresholds)
    folder = Path(folder)
    with reading(photographs):
        found = find_photographs(photographs, opened.class_names, tags=tags, apart_from=folder)
    if not found.photographs:
        reasons = "; ".join(f"{file}: {reason}" for file, reason in list(found.skipped.items())[:1])
        raise ToCoError(f"{photographs} holds no photograph ({', '.join(IMAGE_SUFFIXES)}){reasons and '; ' + reasons}")
    settings = how.settings(opened.model, config) | {"threshold": threshold, "classes": list(opened.class_names)}
    with claimed(folder, settings, "set of labels", "labels into"):
        (folder / "SegmentationClass").mkdir(exist_ok=True)
        pictures, log = folder / "JPEGImages", _Log(folder / LOG, opened.model.n_classes)
        todo = [p for p in found.photographs if not (log.has(p) and label_path(folder, p.name).is_file())]
        skipped = dict(found.skipped)
        bar = tqdm(total=len(todo), desc="labelling", unit="photo", disable=not progress, leave=False)
        labels = _labels(opened, config, todo, how, threshold)
        try:
            with bar, log:
                for photograph, image, outcome in labels:
                    bar.update()
                    if isinstance(outcome, ToCoError):
                        skipped[str(photograph.path)] = str(outcome)
                        continue
                    label, classes, scores = outcome
                    write_label(label_path(folder, photograph.name), label)
                    if overlays:
                        names = {k: opened.class_names[k] for k in classes}
                        if scores is not None:
                            names = {k: f"{name} {scores[k - 1]:.2f}" for k, name in names.items()}
                        _write_overlay(folder / "overlays" / f"{photograph.name}.jpg", image, label, names, opened)
                    if images == "none":
                        remove_image(pictures, photograph.name)
                    else:
                        place_image(photograph.path, pictures, photograph.name, link=images == "link", replace=True)
                    log.add(photograph, classes, scores)
        except KeyboardInterrupt:
            done = len(found.photographs) - len(todo) + log.n_new
            raise KeyboardInterrupt(
                f"labelling was stopped: {done} of {len(found.photographs)} photographs are in {folder}, and the same "
                "call goes on from there"
            ) from None
        done = [p for p in found.photographs if log.has(p)]
        if not done:
            reason = list(skipped.values())[len(found.skipped)]
            raise ToCoError(f"none of the photographs of {photographs} can be used: {reason}")
        source = _Labelled(Path(photographs), split, opened.class_names, done, [log.classes(p) for p in done])
        if images != "none":
            for photograph in done:
                place_image(photograph.path, pictures, photograph.name, link=images == "link")
        _write_tables(folder, done, log, opened.class_names, skipped)
        write_lists(folder, source, split, settings, log.n_new, progress=progress)
    counts = source.image_labels.sum(0).tolist()
    return Labelled(folder, len(done), log.n_new, skipped, dict(zip(opened.class_names[1:], counts, strict=True)))


# ---- which photographs there are, and what is known of them


def find_photographs(
    place: Path | str, class_names: Sequence[str], *, tags: str = "auto", apart_from: Path | None = None
) -> PhotographFolder:
    """The photographs at a place by name, with the classes that tags name; nothing is decoded.

    The pictures in `apart_from`, and in folders that this module wrote, are none, nor are hidden ones. Raises ToCoError
    where `place` is not there or another kind of file, and for a tag that is no class.
    """
    place = Path(place)
    if place.is_file() and place.suffix.lower() in IMAGE_SUFFIXES:
        return PhotographFolder((Photograph(place.stem, place, None),), {})
    if not place.is_file() and not place.is_dir():
        what = "is a pipe or a device" if place.exists() else "is not there"
        raise ToCoError(f"photographs = {str(place)!r} {what}: a folder of photographs is wanted")
    if place.is_file() and place.suffix.lower() not in tagged.LIST_SUFFIXES:
        raise ToCoError(
            f"photographs = {str(place)!r} is not read: {', '.join(IMAGE_SUFFIXES)} are, and "
            f"{', '.join(tagged.LIST_SUFFIXES)} as a list of tags"
        )
    root = place.parent if place.is_file() else place
    root = root / "JPEGImages" if (root / "JPEGImages").is_dir() else root
    ours = [path.parent for path in index_files(root, (Path(LOG).suffix,)).values() if path.name == LOG]
    apart = [real_path(path) for path in (*ours, apart_from) if path is not None]
    known = _known_classes(place, root, class_names, apart) if tags == "auto" else {}
    photographs, skipped = {}, {}
    for name, path in named_files(root, (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES), hidden=False):
        if _is_below(path, apart) or Path(name).parts[0] == "masks":
            continue
        reason = _unusable(name, path, photographs)
        if reason:
            skipped[str(path)] = reason
        else:
            photographs[name] = Photograph(name, path, known.get(real_path(path)))
    return PhotographFolder(tuple(photographs[name] for name in sorted(photographs)), skipped)


def _unusable(name: str, path: Path, before: Mapping[str, Photograph]) -> str:
    """Why a file has no label, as far as its name tells."""
    reason = why_unused(path, before[name].path if name in before else None)
    if reason:
        return reason
    if not name.isprintable() or name != name.strip():
        return "its name has characters that a list of names cannot hold: rename it"
    try:
        utf8(name, "its name")
    except ToCoError as error:
        return str(error)
    return ""


def _known_classes(place: Path, root: Path, class_names: Sequence[str], apart: list[Path]) -> dict[Path, tuple]:
    """Photograph -> its classes, of those that have tags.

    Folders of which none has the name of a class are folders, not tags.
    """
    listed = place if place.is_file() else tagged.tag_file(root)
    if listed is not None:
        found = _listed_tags(listed)
    elif tagged.is_class_folders(root):
        entries = [(root / entry.file, entry.tags) for entry in tagged.folder_entries(root)]
        found = {real_path(path): tags for path, tags in entries if not _is_below(path, apart)}
    else:
        return {}
    number = {name: k for k, name in enumerate(class_names)} | dict.fromkeys(BACKGROUND_NAMES, 0)
    used = sorted({tag for tags in found.values() for tag in tags})
    unknown = [tag for tag in used if tag not in number]
    if listed is None and unknown == used:
        return {}
    if unknown:
        raise ToCoError(
            f"{listed or root}: the {'tag' if listed else 'folder'} {unknown[0]!r} is no class of the model, which has "
            f'{", ".join(class_names[1:])}; tags = "none" lets its classifier choose'
        )
    return {path: tuple(sorted({number[tag] for tag in tags} - {0})) for path, tags in found.items()}


def _listed_tags(path: Path) -> dict[Path, tuple[str, ...]]:
    """Photograph -> its tags, in all splits of a list of tags."""
    found = {}
    for split in tagged.split_names(path):
        source = tagged.TagList(path, split)
        for i, row in enumerate(source.image_labels):
            tags = tuple(source.class_names[k + 1] for k in np.flatnonzero(row))
            found[real_path(source.image_path(i))] = tags
    return found


def _is_below(path: Path, folders: Sequence[Path]) -> bool:
    return any(real_path(path).is_relative_to(folder) for folder in folders)


# ---- labels


def _labels(
    opened: NamedModel, config: TrainConfig, photographs: Sequence[Photograph], how: LabelMethod, threshold: float
) -> Iterator[tuple]:
    """(photograph, image, ToCoError) or (photograph, image, (label map, the classes that it may have, the classifier's
    probability of each of the K, None where it was not trained)), in order."""
    predictor = ImagePredictor(opened.model, config, passes=passes_of(opened.model, config))
    for photograph, image in _read_ahead(photographs):
        if isinstance(image, ToCoError):
            yield photograph, None, image
            continue
        try:
            predictor.set_image(image)
            scores, classes = predictor.class_scores() if config.loss.cls else None, photograph.classes
            if classes is None and scores is not None:
                classes = tuple(int(k) + 1 for k in np.flatnonzero(scores > threshold))
            label = how.label(predictor, classes)
            yield photograph, image, (label, tuple(classes_in(label)) if classes is None else classes, scores)
        except NotFinite:
            raise
        except ToCoError as error:
            yield photograph, image, error


def _read_ahead(photographs: Sequence[Photograph]) -> Iterator[tuple]:
    """(photograph, image or ToCoError); the next few are decoded meanwhile."""

    def read(photograph: Photograph):
        try:
            return read_image(photograph.path)
        except ToCoError as error:
            return error

    waiting: deque[tuple[Photograph, Future]] = deque()
    with ThreadPoolExecutor(1) as pool:
        try:
            for photograph in photographs:
                waiting.append((photograph, pool.submit(read, photograph)))
                if len(waiting) > AHEAD:
                    first, image = waiting.popleft()
                    yield first, image.result()
            while waiting:
                first, image = waiting.popleft()
                yield first, image.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


# ---- the folder


class _Log:
    """A line of JSON for each photograph that is labelled: what a later call need not do again."""

    def __init__(self, path: Path, n_classes: int):
        self._path, self.n_new = path, 0
        text = read_text(path, "the log of a set of labels", "json_bytes") if os.path.lexists(path) else ""
        self._entries: dict[str, dict] = dict(filter(None, (_log_entry(line, n_classes) for line in text.split("\n"))))

    def __enter__(self) -> "_Log":
        with writing(self._path):
            self._file = open_to_append(self._path)
        self._file.write("\n" if self._entries else "")  # ends a line that was cut
        return self

    def __exit__(self, *_) -> None:
        self._file.close()

    def has(self, photograph: Photograph) -> bool:
        """Whether the same file with the same tags is labelled."""
        entry = self._entries.get(photograph.name)
        there = entry is not None and photograph.path.is_file()  # else a link that leads nowhere now
        return there and (entry["file"], entry["tags"]) == _state(photograph)

    def add(self, photograph: Photograph, classes: Sequence[int], scores: Float[np.ndarray, " K"] | None) -> None:
        file, known = _state(photograph)
        rounded = None if scores is None else [round(float(score), 4) for score in scores]
        entry = {"file": file, "tags": known, "classes": list(classes), "scores": rounded}
        self._file.write(json.dumps({"name": photograph.name} | entry) + "\n")
        self._file.flush()
        self._entries[photograph.name] = entry
        self.n_new += 1

    def classes(self, photograph: Photograph) -> tuple[int, ...]:
        return tuple(self._entries[photograph.name]["classes"])

    def scores(self, photograph: Photograph) -> list[float] | None:
        return self._entries[photograph.name]["scores"]


def _log_entry(line: str, n_classes: int) -> tuple[str, dict] | None:
    """A photograph's name, and what the log says of it; None for a line that was cut or does not fit a model of so many
    classes: its photograph is labelled again."""
    try:
        entry = json.loads(line)
        name, known = entry["name"], {key: entry[key] for key in ("file", "tags", "classes", "scores")}
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    classes, scores = known["classes"], [0.0] * n_classes if known["scores"] is None else known["scores"]
    fits = isinstance(name, str) and isinstance(classes, list) and isinstance(scores, list) and len(scores) == n_classes
    fits = fits and all(type(k) is int and 1 <= k <= n_classes for k in classes)
    return (name, known) if fits and all(type(score) is float for score in scores) else None


def _state(photograph: Photograph) -> tuple[list, list | None]:
    """What tells whether a photograph or its tags have changed, as JSON holds it."""
    facts = photograph.path.stat()
    known = None if photograph.classes is None else list(photograph.classes)
    return [photograph.path.name, facts.st_size, facts.st_mtime_ns], known


class _Labelled(Split):
    """The photographs that have labels, as a split."""

    def __init__(self, root: Path, split: str, class_names: tuple[str, ...], done: Sequence[Photograph], classes):
        self.root, self.split, self.class_names = root, split, class_names
        self.class_source, self.label_source = "the model", "tags, or the classifier"
        self.names = tuple(photograph.name for photograph in done)
        self._images, self._masks = [photograph.path for photograph in done], [None] * len(done)
        self._image_labels = np.zeros((len(done), len(class_names) - 1), np.uint8)
        for row, present in zip(self._image_labels, classes, strict=True):
            row[[k - 1 for k in present]] = 1

    def mask(self, index: int) -> None:
        return None


def _write_overlay(path: Path, image: np.ndarray, label: np.ndarray, names: dict[int, str], opened: NamedModel) -> None:
    """The label map over its photograph; `names` are those of its classes with their probabilities."""
    shown = {*names, *classes_in(label)}
    picture = label_over_image(image, label, {k: names.get(k, opened.class_names[k]) for k in shown})
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as file:
        Image.fromarray(picture).save(file, "JPEG", quality=90)
        write_whole(path, file.getvalue())


def _write_tables(
    folder: Path, done: Sequence[Photograph], log: _Log, class_names: Sequence[str], skipped: Mapping[str, str]
) -> None:
    """photographs.csv and skipped.txt."""
    with io.StringIO() as text:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(["file", "tags", "chosen by", *class_names[1:]])
        for photograph in done:
            names = ";".join(class_names[k] for k in log.classes(photograph))
            scores, file = log.scores(photograph), f"{photograph.name}{photograph.path.suffix}"
            chosen = "tags" if photograph.classes is not None else "segmentation" if scores is None else "classifier"
            rows.writerow([file, names, chosen, *(scores or [""] * (len(class_names) - 1))])
        write_whole(folder / "photographs.csv", text.getvalue())
    lines = [one_line(f"{file}: {reason}") for file, reason in skipped.items()]  # names may hold anything
    write_whole(folder / "skipped.txt", "".join(f"{line}\n" for line in lines))
