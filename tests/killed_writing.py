"""Exports, or draws the embedded data set, again and again in child processes that are killed; run by
test_interruptions.py.

    python killed_writing.py <export or drawing> <folder> <number of kills> <seed>

Prints one JSON line: kills, those that left something half-written, rounds, and whether each round ended as the
uninterrupted one, every file of it, with nothing left beside.
"""

import hashlib
import json
import os
import random
import sys
import time
from pathlib import Path

import torch
from killed_training import config_of, killed
from small_config import stir
from voc_folder import write_voc_folder

from toco_core.data import open_source
from toco_core.data.scenes import ScenesConfig, scenes_folder
from toco_core.machine.writing import PART
from toco_core.model import ToCo
from toco_core.predict.export import export

SCENES = ScenesConfig(n_train=9, n_val=2, n_test=3, seed=5)


def exporting(root: Path):
    """The call that exports to a folder; image 4 is turned by its camera, and images are copied."""
    source = open_source(write_voc_folder(root / "data", n=7), "train")
    config = config_of(str(root / "data"), root / "runs")
    torch.manual_seed(0)
    model = ToCo(config.model, source.n_classes)
    stir(model, 0.3)
    return lambda folder: export(model, source, folder, config, method="par", progress=False)


def drawing(_: Path):
    """The call that draws into a folder as its cache."""

    def draw(folder):
        os.environ["TOCO_CACHE"] = str(folder)
        scenes_folder(SCENES, progress=False)

    return draw


def start(call, folder: Path) -> int:
    child = os.fork()
    if not child:
        status = 1
        try:
            call(folder)
            status = 0
        finally:
            os._exit(status)
    return child


def files(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too, by the hash of its bytes."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def main() -> None:
    what, root, wanted, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    chance, call = random.Random(seed), {"export": exporting, "drawing": drawing}[what](root)
    began = time.monotonic()
    assert os.waitpid(start(call, root / "whole"), 0)[1] == 0, "the uninterrupted call failed"
    duration, whole = time.monotonic() - began, files(root / "whole")
    kills = halves = rounds = 0
    equal = []
    while kills < wanted:
        rounds += 1
        folder = root / f"killed {rounds}"
        for _ in range(6):
            if not killed(start(call, folder), chance.random() * duration):
                break
            kills += 1
            halves += any(PART in str(path) for path in folder.rglob("*"))
        assert os.waitpid(start(call, folder), 0)[1] == 0, "the call after the kills failed"
        equal.append(files(folder) == whole)
    print(json.dumps({"kills": kills, "halves": halves, "rounds": rounds, "files": len(whole), "equal": equal}))


if __name__ == "__main__":
    main()
