"""Trains the runs that come with the package and packs them into `toco_core/trained`.

    python experiments/shipped_runs.py --threads 1

Cost: three runs of `tiny()`, a minute or two each. They are scored as they are shipped, in half precision; the numbers
that notebooks show are these. Runs that are finished below --out-dir are not trained again.
"""

import argparse
import shutil
from pathlib import Path

import cv2
import torch

from toco_core.config import configured, tiny
from toco_core.evaluation.scores import score_run
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.runs.shipped import FOLDER, pack
from toco_core.train.loop import train

RUNS = {"full": {}, "classification": {"ptc": 0.0, "ctc": 0.0}, "ctc": {"ctc": 0.2}}
"""Name -> the fields of `tiny()` that it changes."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out-dir", type=Path, default=Path("runs/shipped"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cv2.setNumThreads(args.threads)
    for name in args.names:
        config = configured(tiny(), **RUNS[name], out_dir=str(args.out_dir))
        if not Run.of(config).finished:
            train(config)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        run = pack(Run.of(config), FOLDER / name)
        (run.folder / "scores.json").unlink(missing_ok=True)  # of full precision
        scores = score_run(open_run(run.folder))
        size = sum(path.stat().st_size for path in run.folder.iterdir()) / 1e6
        print(f"{name}: {scores.miou}, {size:.1f} MB")


if __name__ == "__main__":
    main()
