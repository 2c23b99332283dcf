"""Label maps to be corrected by hand, out to Label Studio or CVAT, and back in as a data set.

    toco export runs/<run> my_labels --format label-studio       label_studio.json, label_studio.xml in my_labels
    toco export runs/<run> my_labels --format cvat               cvat.zip in my_labels
    toco label runs/<run> my_photographs new_labels --format cvat      the same of new photographs
    toco corrected my_labels <what the tool exported> my_corrected

The new folder is a data set in VOC layout, as `export` writes it: corrected label maps where there are some, else
those of before; the list corrected.txt names the former.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from toco_core.data import VOCFolder
from toco_core.data.files import image_size
from toco_core.data.layouts import cvat, label_studio
from toco_core.data.layouts.voc import split_names
from toco_core.errors import ToCoError, refuse_other
from toco_core.machine.intake import open_file, read_json
from toco_core.machine.locks import alone
from toco_core.machine.writing import place_file, remove_parts, whole_file, write_whole, writing
from toco_core.predict.export import IMAGES, label_path, place_image, write_label, write_lists
from toco_core.runs.folder import claim_folder

FORMATS = {
    "label-studio": "Label Studio's tasks with brush labels as predictions, and the labelling interface",
    "cvat": "CVAT's 'Segmentation mask 1.1'",
}
FILES = {"label-studio": "label_studio.json", "cvat": "cvat.zip"}


class Corrected(NamedTuple):
    """What `write_corrected` wrote."""

    folder: Path
    n_images: int
    corrected: tuple[str, ...]  # names of the images whose label map was corrected


def write_for_annotation(folder: Path | str, kind: str, *, split: str | None = None) -> Path:
    """Write the label maps of an exported folder for a tool of `FORMATS`, into that folder; the file for the tool.

    Label Studio finds the images where its local file storage has the folder that holds `folder` as its root
    (LABEL_STUDIO_LOCAL_FILES_DOCUMENT_ROOT). Raises ToCoError for an unknown tool, for a folder without labels, and for
    a class called "ignored", as pixels of 255 are.
    """
    refuse_other(FORMATS, format=kind)
    source = _exported(folder, split)
    path = Path(folder) / FILES[kind]
    labels = ((name, source.mask(i)) for i, name in enumerate(source.names))
    with writing(path):
        if kind == "cvat":
            with whole_file(path) as file:
                cvat.write_archive(file, labels, source.class_names)
            return path
        place = Path(folder).resolve()
        images = [
            quote(f"{place.name}/{source.image_path(i).relative_to(folder).as_posix()}") for i in range(len(source))
        ]
        tasks = ((name, f"/data/local-files/?d={images[i]}", label) for i, (name, label) in enumerate(labels))
        write_whole(path, label_studio.tasks_json(tasks, source.class_names, model="toco_core"))
        write_whole(path.with_suffix(".xml"), label_studio.config_xml(source.class_names))
    return path


def write_corrected(
    labels: Path | str, exported: Path | str, folder: Path | str, *, split: str | None = None, images: str = "copy"
) -> Corrected:
    """Write a data set with the label maps of `labels`, an exported folder, and over them those that a tool exported.

    exported: Label Studio's JSON, or CVAT's archive or its unpacked folder.
    images: "copy", "link" or "none", see `export`.

    Raises ToCoError as the readers of `label_studio` and `cvat` do, where nothing was corrected, and for a folder that
    holds something else.
    """
    refuse_other(IMAGES, images=images)
    if not str(exported):  # `Path` would take it for this folder
        raise ToCoError("exported = '' is not allowed: what Label Studio or CVAT exported is wanted")
    source, exported, folder = _exported(labels, split), Path(exported), Path(folder)
    sizes = {name: image_size(label_path(Path(labels), name)) for name in source.names}
    read = label_studio.read_tasks if exported.suffix.lower() == ".json" else cvat.read_archive
    settings = {"labels": _digest(Path(labels) / "manifest.json"), "corrections": _digest(exported)}
    with alone(folder, "writes"), writing(folder):
        done = []
        for name, label in read(exported, source.class_names, sizes):
            if not done:
                claim_folder(folder, settings, "set of corrections")
                remove_parts(folder, "**/*")
            write_label(label_path(folder, name), label)
            done.append(name)
        if not done:
            raise ToCoError(f"{exported} has no annotation: nothing was corrected")
        for i, name in enumerate(source.names):
            if name not in done:
                label_path(folder, name).parent.mkdir(parents=True, exist_ok=True)
                place_file(label_path(Path(labels), name), label_path(folder, name), link=False)
            if images != "none":
                place_image(source.image_path(i), folder / "JPEGImages", name, link=images == "link", replace=True)
        write_lists(folder, source, source.split, settings, len(done), parts={"corrected": done})
    return Corrected(folder, len(source), tuple(done))


def _exported(folder: Path | str, split: str | None) -> VOCFolder:
    """The label maps of a folder that `export` or `toco label` wrote."""
    manifest = Path(folder) / "manifest.json"
    if not manifest.is_file():
        raise ToCoError(f"{folder} holds no labels: a folder that `toco export` or `toco label` wrote is wanted")
    facts = read_json(manifest)
    split = split or (facts.get("split") if isinstance(facts, dict) else None)
    if split not in split_names(Path(folder)):
        raise ToCoError(f"split = {split!r:.60} is not in {folder}: there is {', '.join(split_names(Path(folder)))}")
    return VOCFolder(folder, split, require_masks=True)


def _digest(path: Path) -> str:
    """Of a file, or of the names, sizes and times of those that are read of a folder."""
    if path.is_dir():
        found = ((name, p) for name, p in cvat.files_of(path).items() if os.path.exists(p))  # a link may lead nowhere
        facts = [(name, p.stat().st_size, p.stat().st_mtime_ns) for name, p in found]
        return hashlib.sha256(json.dumps(sorted(facts)).encode()).hexdigest()
    digest = hashlib.sha256()
    with open_file(path, "archive_bytes") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
