"""How long is a new user's way from a folder of 40 tagged photographs to edited labels in a second network?

    python experiments/benchmarks/fresh_user.py [folder]

Draws 40 JPEGs of the embedded data set with a table of tags, no masks, and 12 new ones, and runs the documented
commands, one after the other, each with its time: look the folder over, train on the tags, export label maps, edit one
of them, train a second network on them, label the new photographs with it. Expected: five minutes on one core, and no
command needs anything that the command before did not print. Writes experiments/records/benchmarks_fresh_user.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import machine, write_record
from PIL import Image

from toco_core.data import open_source
from toco_core.data.files import palette_png, read_mask

PHOTOGRAPHS, NEW = 40, 12
STEPS = 60  # of each training: enough to see labels that are right more often than not


def write_photographs(folder: Path) -> None:
    """`photos/*.jpg`, `photos/tags.csv` and `new/*.jpg`."""
    source = open_source("scenes", "train")
    rows = ["file,tags"]
    for part in ("photos", "new"):
        (folder / part).mkdir(parents=True)
    for i in range(PHOTOGRAPHS + NEW):
        name = f"{source.names[i]}.jpg"
        part = "photos" if i < PHOTOGRAPHS else "new"
        Image.fromarray(source.image(i)).save(folder / part / name, quality=90)
        if i < PHOTOGRAPHS:
            tags = [source.class_names[k + 1] for k in np.flatnonzero(source.image_labels[i])]
            rows.append(f"{name},{';'.join(tags)}")
    (folder / "photos" / "tags.csv").write_text("\n".join(rows) + "\n")


def edit_a_label(folder: Path) -> str:
    """What a paint program would do: paint one class over uncertain pixels and save."""
    path = sorted((folder / "labels" / "SegmentationClass").glob("*.png"))[0]
    label = read_mask(path).copy()
    classes = [k for k in np.unique(label) if k not in (0, 255)] or [1]
    label[label == 255] = classes[0]
    path.write_bytes(palette_png(label))
    return path.name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, help="new folder; none: a temporary one")
    folder = parser.parse_args().folder or Path(tempfile.mkdtemp(prefix="toco-"))
    write_photographs(folder)
    seconds, environment = {}, os.environ | {"TOCO_RUNS": "runs"}

    def run(what: str, *words: str) -> str:
        print(f"\n$ {' '.join(words)}", flush=True)
        began = time.perf_counter()
        command = (
            [sys.executable, "-m", "toco_core", *words[1:]] if words[0] == "toco" else [sys.executable, *words[1:]]
        )
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        seconds[what] = round(time.perf_counter() - began, 1)
        print(f"{done.stdout[-700:]}({seconds[what]} s)", flush=True)
        if done.returncode:
            raise SystemExit(f"{what} failed: {done.stderr[-2000:]}")
        return done.stdout.strip().splitlines()[-1]

    run("look over", "toco", "check", "photos/tags.csv")
    trained = run("train", "toco", "tiny", "dataset=photos/tags.csv", f"steps={STEPS}")
    run("export", "toco", "export", trained, "labels", "--split", "all")
    print("edited", edit_a_label(folder))
    run("second network", "toco", "second", trained, "labels", "second", "--split", "all", "--steps", str(STEPS))
    run("label new ones", "toco", "label", "second", "new", "new_labels", "--method", "seg")
    print(f"\n{sum(seconds.values()):.0f} s in all, of commands alone")
    record = {"machine": machine(), "photographs": PHOTOGRAPHS, "steps": STEPS, "seconds": seconds}
    write_record("benchmarks_fresh_user.json", record)


if __name__ == "__main__":
    main()
