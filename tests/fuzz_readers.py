"""Every reader, the files it reads, and a process that feeds it mutated ones.

python fuzz_readers.py <reader> <cases> <seed>            prints outcomes and faults as JSON
python fuzz_readers.py all <cases> <seed,...> <file>      every reader in a process of its own, a line of the file each;
                                                          called again, it goes on, and ends with a table
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from coco_folder import coco_content, write_coco_folder
from mutators import mutated, restored, special
from PIL import Image
from safetensors.torch import save
from sbd_files import sbd_bytes
from voc_folder import CLASSES, rectangle_mask, smooth_image, write_voc_folder

from toco_core.commands.check import check_command as look_over
from toco_core.config import ModelConfig, TrainConfig, configured, override, tiny
from toco_core.config.parameters import named_values
from toco_core.data import COCOFolder, TagList, VOCFolder, open_train_val, read_image, read_mask
from toco_core.data.layouts.cvat import read_archive, write_archive
from toco_core.data.layouts.label_studio import read_tasks, tasks_json
from toco_core.data.layouts.sbd import read_sbd_mask
from toco_core.data.survey import inventory
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import _Counted
from toco_core.evaluation.resume import ImageCounts, KeptEvaluation
from toco_core.evaluation.scores import RunScores, read_scores
from toco_core.machine.files import are_tensors, read_tensors, refuse_wrong_keys
from toco_core.machine.intake import read_bytes, read_json
from toco_core.model import ToCo
from toco_core.predict.label import _Log, label_photographs
from toco_core.predict.models import NamedModel
from toco_core.runs.folder import Run
from toco_core.runs.hub import from_pretrained, save_pretrained, write_pretrained
from toco_core.runs.release import from_release, to_release
from toco_core.train.failures import load_failure
from toco_core.train.film import Film, read_film
from toco_core.train.optimizer import load_optimizer_state
from toco_core.widgets import Session, Subject, Subjects, open_pictures
from toco_core.widgets.subjects import AUXILIARY, CLASSIFIER, DECODER, PROJECTION

SECONDS = 20  # of computing for one input; a hang takes longer
WAITING = 600  # for one input that computes nothing; more than a crowded machine takes for SECONDS
MEGABYTES = 2000  # by which a process may grow


class Hang(BaseException):
    """The time for one input is over."""


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def ends_well(read, what: str) -> bool:
    """Whether there was a result; an error of another kind than ours passes on."""

    def over(*_):
        raise Hang(what)

    before = [signal.signal(number, over) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(WAITING)
    try:
        read()
        return True
    except ToCoError as error:
        assert str(error) and "Traceback" not in str(error)
        return False
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        signal.signal(signal.SIGPROF, before[0])
        signal.signal(signal.SIGALRM, before[1])


def encoded(array, kind, **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind, **options)
    return file.getvalue()


def saved(state, **options) -> bytes:
    file = io.BytesIO()
    torch.save(state, file, **options)
    return file.getvalue()


def npy(content) -> bytes:
    file = io.BytesIO()
    np.save(file, content, allow_pickle=True)
    return file.getvalue()


MODEL = ModelConfig(
    backbone="plain_vit(image=16, patch=8, width=8, depth=1, heads=1, mlp=8)",
    pretrained=False, layer=1, proj_hidden=4, proj_bottleneck=3, proj_dim=3, decoder_width=3,
)  # fmt: skip
MAPS, ROW = np.zeros((21, 4, 4), np.int64), np.zeros(3, np.float32)
COUNTS = ImageCounts(MAPS, MAPS, MAPS[0], ROW, ROW, ROW, True)
STATE = {
    "model": {"weight": torch.ones(3, 2), "bias": torch.zeros(3)},
    "optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2)}}, "param_groups": []},
    "step": 3, "config": tiny().to_dict(), "best": 3.5, "skipped": 0,
}  # fmt: skip
FAILURE = {"step": 1, "message": "m", "config": tiny().to_dict(), "model": {}, "batch": {}, "names": ["a"]}
SCORES = RunScores("val", "p", 0.5, 0.4, 0.3, {"cam": 1.0}, {"cam": 1.0}, {"cam": [1.0, None]}, 1.0, [0.5])._asdict()
ROWS = {"img_0": np.array([1, 0, 1], np.uint8), "img_1": np.array([0, 1, 0], np.float32)}


def training_state() -> dict:
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return {"model": layer.state_dict(), "optimizer": optimizer.state_dict(), "step": 3, "best": 1.5, "skipped": 0}


def resumed(state, run) -> None:
    """As an interrupted training goes on."""
    if state is None:  # there is no such file
        return
    layer = torch.nn.Linear(2, 3)
    optimizer = torch.optim.AdamW(layer.parameters())
    if are_tensors(state["model"]):
        refuse_wrong_keys("checkpoint", state["model"], layer.state_dict())
        layer.load_state_dict(state["model"])
        load_optimizer_state(optimizer, state["optimizer"], run)
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        max(state.get("best", 0.0), 1.0)


def build_folders(root: Path) -> tuple:
    """A VOC folder, a COCO folder, tags and a run: what the readers of lists need around the damaged file."""
    voc, coco = write_voc_folder(root / "voc", n=2), write_coco_folder(root / "coco")
    (voc / "Annotations").mkdir()
    for i in range(2):
        objects = "<object><name>cat</name></object>"
        (voc / "Annotations" / f"img_{i}.xml").write_text(f"<annotation>{objects}</annotation>")
    tags = root / "tags"
    tags.mkdir()
    for name in ("a.png", "b.png"):
        (tags / name).write_bytes(encoded(smooth_image(12, 16, 1), "PNG"))
    (tags / "tags.csv").write_text("file,tags,split\na.png,cat;dog,train\nb.png,dog,val\n")
    (tags / "tags.json").write_text(json.dumps([{"file": "a.png", "tags": ["cat"]}, {"file": "b.png", "tags": []}]))
    run = Run(root / "run")
    run.begin(tiny())
    run.log({"step": 0, "total": 1.5})
    run.finish({"cam_miou": 20.5})
    run.keep_scores(SCORES)
    for name, content in {"checkpoint.pt": saved(STATE), "failure.pt": saved(FAILURE)}.items():
        (run.folder / name).write_bytes(content)
    (run.folder / "best.pt").write_bytes(saved(training_state()))
    (root / "point.json").write_text(json.dumps({"state": "failed", "parameters": {"a": 1}, "error": "e", "cell": 3}))
    for name, content in FILES.items():
        (root / name).write_bytes(content)
    kept = KeptEvaluation(root / "kept", {"a": 1})
    kept.write("a", COUNTS, None)
    handed_on(root, voc)
    return root, voc, coco, tags, run


def handed_on(root: Path, voc: Path) -> None:
    """What people hand on: a finished run with a film, a shared folder, and a set of labels."""
    torch.manual_seed(0)
    model, source = ToCo(MODEL, len(CLASSES) - 1).eval(), VOCFolder(voc, "train")
    config = override(dataclasses.replace(tiny(), model=MODEL), **SMALL)
    run = Run(root / "finished")
    run.begin(config, data={"classes": list(CLASSES), "train": 2, "val": 2})
    Film(run, source, config, every=1).take(model, 1)
    run.save({"model": model.state_dict(), "config": config.to_dict(), "optimizer": {}, "step": 1, "best": 3.5})
    run.finish({"cam_miou": 20.5, "seg_miou": 1.5, "map": 60.5, "protocol": "p"})
    run.keep_scores(SCORES)
    write_pretrained(root / "shared", model.state_dict(), config, CLASSES, "card")
    named = NamedModel("mine", model, config, CLASSES)
    label_photographs(named, voc / "JPEGImages", root / "labels", method="cam", progress=False)


GREY = rectangle_mask(16, 20, 2)
PARTS = frozenset((CLASSIFIER, AUXILIARY, DECODER, PROJECTION))
SMALL = {
    "crop_size": 16,
    "cam_scales": (1.0,),
    "local_size": 8,
    "layer": 1,
    "par_iterations": 2,
    "par_dilations": (1, 2),
}
FIELDS = """layer=2
steps=100
lr=6e-5
ptc=0.3
cam_scales=(1.0, 0.5)
dataset=my photographs/a
train_split=train
par_dilations=[1,2,4]
temperature=0.5
precision=fp32
seed=7
backbone=plain_vit(image=32, patch=8, width=32, depth=2, heads=2, mlp=64)
pretrained=False
local_size=64"""
EXPLORED = {
    "image": "img_1", "show": "seed label", "cam": "block", "block": 1, "classes": "cat,dog", "beta_l": 0.2,
    "beta_h": 0.6, "par_iterations": 2, "par_dilations": "1,2", "par_scale": 1.0, "cam_scales": "1,0.5", "flip": False,
    "head": 1, "crop_size": 8, "crop_seed": 3, "patch": "0.25,0.7", "crop_places": "0.5,0.5 0.2,0.9",
    "compare": "runs/other", "other": '{"beta_h": 0.5, "show": "CAM"}', "linked": False,
}  # fmt: skip
CONTENTS = {
    "photo": encoded(smooth_image(16, 20, 0), "JPEG"), "mask": encoded(GREY, "PNG"), "empty": b"",
    "tiny": encoded(smooth_image(1, 1, 0), "PNG"), "noise": bytes(range(256)), "hole": b"[", "locked": b"x",
}  # fmt: skip
COCO = json.dumps(coco_content(range(2)) | {"images": [
    {"id": 100 + i, "file_name": f"{i}.jpg", "height": 16, "width": 20} for i in range(2)
]})  # fmt: skip
TREES = {
    "VOC": [
        *([f"JPEGImages/{name}.jpg", "photo", ""] for name in "ab"), ["SegmentationClass/a.png", "mask", ""],
        ["ImageSets/Segmentation/train.txt", "text", "a\nb\n"], ["ImageSets/Segmentation/val.txt", "text", "b\n"],
        ["Annotations/a.xml", "text", "<annotation><object><name>cat</name></object></annotation>"],
        ["Annotations/b.xml", "text", "<annotation/>"], ["classes.txt", "text", "background\ncat\ndog\n"],
    ],
    "COCO": [
        *([f"{split}2014/{i}.jpg", "photo", ""] for split in ("train", "val") for i in range(2)),
        *([f"annotations/instances_{split}2014.json", "text", COCO] for split in ("train", "val")),
    ],
    "table": [
        ["a.jpg", "photo", ""], ["b/c.jpg", "photo", ""], ["masks/a.png", "mask", ""],
        ["tags.csv", "text", "file,tags,split,mask\na.jpg,cat;dog,train,masks/a.png\nb/c.jpg,dog,val,\n"],
    ],
    "classes": [
        *([f"train/{k}/{i}.jpg", "photo", ""] for k in ("cat", "dog") for i in range(2)),
        ["val/cat/x.png", "tiny", ""], ["train/background/z.jpg", "photo", ""], ["masks/cat/0.png", "mask", ""],
    ],
    "photographs": [["a.jpg", "photo", ""], ["b.JPG", "photo", ""], ["sub/c.png", "tiny", ""]],
}  # fmt: skip
BOTH = {"a": GREY.shape, "b": GREY.shape}


def tasks() -> bytes:
    """Label Studio's export of two tasks."""
    made = json.loads(tasks_json([(name, f"/data/{name}.jpg", GREY) for name in BOTH], CLASSES, model="m"))
    for task in made:
        task["annotations"] = [{"result": task["predictions"][0]["result"], "was_cancelled": False, "updated_at": "2"}]
    return json.dumps(made).encode()


def cvat_archive() -> bytes:
    file = io.BytesIO()
    write_archive(file, [(name, GREY) for name in BOTH], CLASSES)
    return file.getvalue()


FILES = {
    "tasks.json": tasks(),
    "masks.zip": cvat_archive(),
    "photo.jpg": encoded(smooth_image(24, 32, 0), "JPEG"),
    "photo.png": encoded(smooth_image(24, 32, 0), "PNG"),
    "photo.bmp": encoded(smooth_image(8, 12, 0), "BMP"),
    "mask.png": encoded(GREY, "PNG"),
    "mask16.png": encoded(GREY.astype(np.uint16), "PNG"),
    "packed.mat": sbd_bytes(rectangle_mask(16, 20, 2)),
    "plain.mat": sbd_bytes(rectangle_mask(16, 20, 2), compressed=False),
    "mapping.npy": npy(np.array(ROWS, dtype=object)),
    "array.npy": npy(np.eye(2, 3, dtype=np.uint8)),
    "weights.pth": saved(STATE["model"]),
    "weights.safetensors": save(STATE["model"]),
    "mask.bmp": encoded(GREY, "BMP"),
    "weights.old": saved(STATE["model"], _use_new_zipfile_serialization=False),
    "fields.words": FIELDS.encode(),
    "state.json": json.dumps(EXPLORED).encode(),
    "folder.tree": json.dumps(TREES).encode(),
    "release.pth": saved(to_release(ToCo(MODEL, 3), module_prefix=False)),
}


def kept_counts(folder):
    return _Counted(3).add_finished(KeptEvaluation(folder, {"a": 1}), ["a"], [0], 1)


def claimed(folder):
    return KeptEvaluation(folder, {"a": 1}).has("a")


def sweep_record(path):
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "experiments"))
    import sweep

    point = sweep.Point(path, path.parent, {}, tiny(), path.stem)
    return sweep.table([point], [point.record])


def labelled(voc, path):
    return VOCFolder(voc, "train", labels=path).image_labels


def command_line(path):
    """Words of a command line, a line each, up to the name of the run that they ask for."""
    fields = read_bytes(path, "text_bytes").decode("utf-8", "surrogateescape").split("\n")
    config = configured(tiny(), **named_values(fields))
    return Run.of(TrainConfig.from_dict(json.loads(json.dumps(config.to_dict())))).folder


@functools.lru_cache(1)
def shown(voc):
    """What the explorer shows of a folder."""
    subjects = Subjects()
    for name in ("one", "other"):
        subjects.add(Subject(name, ToCo(MODEL, 3).eval(), override(tiny(), **SMALL), CLASSES, PARTS))
    return open_pictures(voc, "train"), subjects


def explored(voc, path):
    """Parameters that lead to a state of the explorer, and its numbers there."""
    session = Session(*shown(voc))
    values = read_json(path)
    session.restore(values if isinstance(values, dict) else {"image": values})
    return session.describe(), session.papermill_line()


def built(path) -> tuple[Path, list]:
    """A folder as a file describes it: [name, kind, content] of each entry; what the disk cannot hold is left out."""
    entries = read_json(path)
    root = Path(tempfile.mkdtemp(dir=path.parent, prefix="tree-")).resolve()
    for name, kind, content in next(iter(entries.values()), []) if isinstance(entries, dict) else entries:
        place = root / "set" / name.lstrip("/")
        if ".." in place.parts:
            continue
        with contextlib.suppress(OSError, ValueError):
            if root not in (place.parent.resolve(), *place.parent.resolve().parents):
                continue  # it would be written through a link
            place.parent.mkdir(parents=True, exist_ok=True)
            if kind == "link":
                place.symlink_to(content)
            elif kind == "folder":
                place.mkdir()
            elif kind == "pipe":
                os.mkfifo(place)
            else:
                with open(place, "xb") as file:
                    file.write(CONTENTS[kind] if kind in CONTENTS else content.encode("utf-8", "surrogateescape"))
            if kind == "hole":
                os.truncate(place, 100 << 30)
            if kind == "locked":
                place.chmod(0)
    return root, root / "set"


def looked_over(path):
    """A folder as `toco check`, a training and the explorer open it."""
    root, folder = built(path)
    try:
        print_to = io.StringIO()
        for words in ([str(folder)], [str(folder), "--names-only"]):
            with contextlib.redirect_stdout(print_to):
                look_over(words)
        for opens in (open_pictures, open_train_val):
            with contextlib.suppress(ToCoError):
                opens(folder)
        return open_train_val(folder, broken="leave out").val.image_labels
    finally:
        shutil.rmtree(root)


READERS = {
    "photo.jpg": lambda f: (f[0] / "photo.jpg", read_image),
    "photo.png": lambda f: (f[0] / "photo.png", read_image),
    "photo.bmp": lambda f: (f[0] / "photo.bmp", read_image),
    "mask.png": lambda f: (f[0] / "mask.png", read_mask),
    "mask16.png": lambda f: (f[0] / "mask16.png", read_mask),
    "packed.mat": lambda f: (f[0] / "packed.mat", read_sbd_mask),
    "plain.mat": lambda f: (f[0] / "plain.mat", read_sbd_mask),
    "mapping.npy": lambda f: (f[0] / "mapping.npy", lambda path: labelled(f[1], path)),
    "array.npy": lambda f: (f[0] / "array.npy", lambda path: labelled(f[1], path)),
    "list": lambda f: (f[1] / "ImageSets/Segmentation/train.txt", lambda _: len(VOCFolder(f[1], "train"))),
    "classes": lambda f: (f[1] / "classes.txt", lambda _: VOCFolder(f[1], "train").image_labels),
    "xml": lambda f: (
        f[1] / "Annotations/img_0.xml",
        lambda _: VOCFolder(f[1], "train", labels="xml").image_labels,
    ),
    "coco": lambda f: (
        next((f[2] / "annotations").glob("*train*.json")),
        lambda path: [COCOFolder(path).mask(0), COCOFolder(path).image_labels],
    ),
    "csv": lambda f: (f[3] / "tags.csv", lambda path: TagList(path, "train").image_labels),
    "json": lambda f: (f[3] / "tags.json", lambda path: TagList(path, "train").image_labels),
    "config": lambda f: (f[4].folder / "config.json", lambda _: f[4].config()),
    "manifest": lambda f: (f[4].folder / "manifest.json", lambda _: f[4].manifest()),
    "log": lambda f: (f[4].folder / "metrics.jsonl", lambda _: f[4].records()),
    "scores": lambda f: (f[4].folder / "scores.json", lambda _: read_scores(f[4])),
    "checkpoint": lambda f: (f[4].folder / "checkpoint.pt", lambda _: f[4].load()),
    "failure": lambda f: (f[4].folder / "failure.pt", lambda _: load_failure(f[4])),
    "weights.pth": lambda f: (f[0] / "weights.pth", lambda path: read_tensors(path, "weights")),
    "weights.safetensors": lambda f: (f[0] / "weights.safetensors", lambda path: read_tensors(path, "weights")),
    "weights.old": lambda f: (f[0] / "weights.old", lambda path: read_tensors(path, "weights")),
    "mask.bmp": lambda f: (f[0] / "mask.bmp", read_mask),
    "release": lambda f: (f[0] / "release.pth", lambda path: from_release(path, heads=1, layer=1)),
    "inventory": lambda f: (next((f[2] / "annotations").glob("*val*.json")), lambda _: str(inventory(f[2]))),
    "optimizer": lambda f: (f[4].folder / "best.pt", lambda _: resumed(f[4].load("best"), f[4])),
    "kept": lambda f: (f[0] / "kept" / "counts" / "a.npz", lambda _: kept_counts(f[0] / "kept")),
    "kept manifest": lambda f: (f[0] / "kept" / "manifest.json", lambda _: claimed(f[0] / "kept")),
    "sweep record": lambda f: (f[0] / "point.json", sweep_record),
    "command line": lambda f: (f[0] / "fields.words", command_line),
    "explorer": lambda f: (f[0] / "state.json", lambda path: explored(f[1], path)),
    "folder": lambda f: (f[0] / "folder.tree", looked_over),
    "film": lambda f: (f[0] / "finished/film/film.json", lambda _: read_film(f[0] / "finished").picture(0)),
    "frame": lambda f: (f[0] / "finished/film/00000001.png", lambda _: read_film(f[0] / "finished").picture(0)),
    "shared config": lambda f: (f[0] / "shared/config.json", lambda path: from_pretrained(path.parent)),
    "shared weights": lambda f: (f[0] / "shared/model.safetensors", lambda path: from_pretrained(path.parent)),
    "card": lambda f: (f[0] / "finished/manifest.json", lambda path: save_pretrained(path.parent, f[0] / "again")),
    "metrics": lambda f: (f[0] / "finished/metrics.json", lambda path: save_pretrained(path.parent, f[0] / "again")),
    "labels": lambda f: (f[0] / "labels/photographs.jsonl", lambda path: _Log(path, len(CLASSES) - 1)),
    "label studio": lambda f: (f[0] / "tasks.json", lambda path: list(read_tasks(path, CLASSES, BOTH))),
    "cvat": lambda f: (f[0] / "masks.zip", lambda path: list(read_archive(path, CLASSES, BOTH))),
}


def suffix_of(path: Path) -> str:
    """Which mutators suit a file."""
    return path.suffix.lower()


def attempt(path: Path, read, whole: bytes, chance: random.Random, what: str) -> bool:
    """One mutated or special file in the place of `path`; whether there was a result. The file is whole afterwards."""
    if chance.random() < 0.03:
        special(path, chance)
    else:
        try:
            path.write_bytes(mutated(whole, suffix_of(path), chance))
        except (UnicodeEncodeError, ValueError):  # a tree that JSON cannot hold
            path.write_bytes(b"{}")
    try:
        return ends_well(lambda: read(path), what)
    finally:
        restored(path, whole)


def feed(name: str, cases: int, seed: int) -> Counter:
    """Outcomes of a reader: ok, ToCoError, slow (10 seconds of computing), and one kind per place of a fault."""
    outcomes: Counter = Counter()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path, read = READERS[name](build_folders(Path(folder)))
        whole = path.read_bytes()
        if name != "failure":
            ends_well(lambda: read(path), name)
        for number in range(cases):
            chance, began = random.Random(f"{name} {seed} {number}"), time.process_time()
            try:
                outcome = "ok" if attempt(path, read, whole, chance, f"{name} {number}") else "ToCoError"
            except BaseException as error:  # noqa: BLE001  it is counted
                frames = [f for f in traceback.extract_tb(error.__traceback__) if "toco_core" in f.filename]
                where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
                outcome = f"FAULT {type(error).__name__} {where} (case {number}: {error!s:.80})"
            outcomes[outcome] += 1
            outcomes["slow"] += time.process_time() - began > 10
    return outcomes


def feed_all(cases: int, seeds: list[int], path: Path) -> None:
    """Every reader with every seed that the file has no line of yet."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for seed in seeds:
        for name in READERS:
            if any((row["reader"], row["cases"], row["seed"]) == (name, cases, seed) for row in done):
                continue
            command, began = [sys.executable, __file__, name, str(cases), str(seed)], time.monotonic()
            try:
                process = subprocess.run(command, capture_output=True, text=True, timeout=10 * cases)
                died = f"FAULT the process died: {process.returncode} {process.stderr[-300:]}"
                row = {died: 1, "reader": name} if process.returncode else json.loads(process.stdout.splitlines()[-1])
            except subprocess.TimeoutExpired:
                row = {"FAULT the process hangs": 1, "reader": name}
            row |= {"cases": cases, "seed": seed, "seconds": round(time.monotonic() - began)}
            done.append(row)
            with open(path, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)
    print(table(done))


def table(rows: list[dict]) -> str:
    """The outcomes of each reader over all seeds, in Markdown."""
    lines = ["| reader | cases | result | ToCoError | slow | fault | memory |", "|---|---:|---:|---:|---:|---:|---:|"]
    names = dict.fromkeys(row["reader"] for row in rows)
    kinds = {name: [row for row in rows if row["reader"] == name] for name in names} | {"all": rows}
    for name, own in kinds.items():
        faults = sum(n for row in own for kind, n in row.items() if kind.startswith("FAULT"))
        count = [sum(row.get(kind, 0) for row in own) for kind in ("cases", "ok", "ToCoError", "slow")]
        lines.append(
            f"| {name} | {' | '.join(map(str, count))} | {faults} | +{max(r.get('grew', 0) for r in own)} MB |"
        )
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1] == "all":
        return feed_all(int(sys.argv[2]), [int(seed) for seed in sys.argv[3].split(",")], Path(sys.argv[4]))
    name, cases, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(1)
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    most = 1024 * int(lines["VmSize"].split()[0]) + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    before = peak_megabytes()
    outcomes = +feed(name, cases, seed)
    print(json.dumps({"reader": name, "grew": round(peak_megabytes() - before), **outcomes}))


if __name__ == "__main__":
    main()
