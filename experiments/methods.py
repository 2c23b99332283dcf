"""Do ideas of later papers beat ToCo here, on the same network, data and number of steps?

    python experiments/methods.py --seeds 0 1 2 --threads 1
    python experiments/methods.py --costs --threads 1
    python experiments/methods.py --pictures

Each row adds one idea to `tiny()`. Expected: an idea that makes better labels (attention, the decoder's answer to the
CAM) helps the pseudo label most, one that contrasts tokens once more helps little beside PTC. Cost: a run of `tiny()`
for each variant and seed. `--costs` measures instead what a training with each idea takes, in time and memory, as a
multiple of ToCo's: half a minute for each, on a machine that does nothing else. Writes
experiments/records/methods.json, which `notebooks/methods.ipynb` shows.

`--pictures` keeps what finished runs of seed 0 make of some images of the part "test" that show two classes or more,
evenly spread: records/methods/<idea>.png, their pseudo labels side by side, indices of VOC's palette.
"""

import argparse
import json
import statistics
from pathlib import Path

import cv2
import numpy as np
from common import RECORDS, command_line, read_record, run_all, table, use_threads

from toco_core.config import TrainConfig, configured, tiny
from toco_core.data import Split, TrainVal, evaluation_items, open_data
from toco_core.data.files import palette_png
from toco_core.evaluation.protocols import evenly
from toco_core.evaluation.scores import reported_part
from toco_core.machine.writing import write_whole
from toco_core.predict.image import ImagePredictor
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.runs.shipped import shipped_runs
from toco_core.train.budget import estimate_seconds, step_memory

CLASS_TOKENS = {"class_tokens_after": 8, "class_tokens": 1.0}
CLASS_MAP = {"class_attention": 0.25, "beta_l": 0.2, "beta_h": 0.35, "beta": 0.3}
AFFINITY = {"affinity": 0.1, "attention_steps": 1, "attention_kind": "learned"}
IDEAS = {
    "ToCo": {},
    "exchange": {"exchange": 0.05, "exchange_start": 200},
    "consistency": {"consistency": 0.1, "consistency_start": 150},
    "prototypes": {"prototypes": 0.3},
    "discrepancy": {"discrepancy": 0.1},
    "progressive threshold": {"beta_h_first": 0.65},
    "dynamic thresholds": {"dynamic_thresholds": True},
    "noise filter": {"seg_noise": 0.2, "seg_noise_start": 150},
    "growing regions": {"growing_start": 0.3},
    "class tokens": CLASS_TOKENS,
    "class tokens, their map": CLASS_TOKENS | CLASS_MAP,
    "class tokens, contrast": CLASS_TOKENS | CLASS_MAP | {"class_contrast": 0.1, "class_contrast_start": 100},
    "frequency": {"frequency": 1.0},
    "frequency for PTC": {"frequency": 1.0, "ptc": 0.0},
    "reliable": {"reliable": 0.05, "reliable_start": 100},
    "attention": {"attention_steps": 1, "attention_kind": "pattern"},
    "affinity": AFFINITY,
    "affinity, also in labels": AFFINITY | {"affinity_walk_start": 250},
}
"""Name -> the fields of `tiny()` that it changes."""


ROUNDS = 5
N_SHOWN = 6


def shown_images(data: TrainVal) -> Split:
    """The images of `--pictures`."""
    test = reported_part(data)[1]
    several = [i for i, labels in enumerate(test.image_labels) if labels.sum() > 1]
    return evenly(test.subset(several), N_SHOWN)


def picture_file(name: str) -> Path:
    """Of an idea."""
    return RECORDS / "methods" / f"{name.replace(', ', '_').replace(' ', '_').lower()}.png"


def keep_pictures(variants: dict[str, dict], out_dir: Path) -> None:
    """What is there of finished runs is drawn; others are named."""
    data = open_data(tiny().data)
    shown = list(evaluation_items(shown_images(data), size=tiny().data.crop_size, native=True))
    shipped = {run.config().short_hash(): run for run in shipped_runs().values()}
    picture_file("").parent.mkdir(exist_ok=True)
    for name, overrides in variants.items():
        config = configured(tiny(), **overrides, seed=0, out_dir=str(out_dir))
        run = shipped.get(config.short_hash()) or Run.of(config)
        if not run.finished:
            print(f"{name}: not trained, {run.folder} is missing", flush=True)
            continue
        opened, labels = open_run(run.folder, data=data), []
        predictor = ImagePredictor(opened.model, opened.config)
        for item in shown:
            predictor.set_item(item)
            size = item.image.shape[-2:]
            labels.append(cv2.resize(predictor.pseudo_label(), size[::-1], interpolation=cv2.INTER_NEAREST_EXACT))
        write_whole(picture_file(name), palette_png(np.concatenate(labels, axis=1)))


def costs(plain: TrainConfig, variants: dict[str, dict], record: Path) -> dict[str, dict]:
    """Time and memory of a training with each variant's fields over those of `plain`, each time measured just before
    it; median of some rounds. Kept in the record beside what is known of other variants."""
    data, state = open_data(plain.data), read_record(record)
    memory = step_memory(plain, data).total
    for name, overrides in variants.items():
        config, ratios = configured(plain, **overrides), []
        for _ in range(ROUNDS):
            before = estimate_seconds(plain, data)
            ratios.append(estimate_seconds(config, data) / before)
        found = {
            "time": round(statistics.median(ratios), 2),
            "memory": round(step_memory(config, data).total / memory, 2),
        }
        print(name, found, flush=True)
        state["costs"] = state.get("costs", {}) | {name: found}
        write_whole(record, json.dumps(state, indent=1) + "\n")
    return state["costs"]


def costs_option(parser: argparse.ArgumentParser) -> None:
    """`--costs`, which can be asked for instead of trainings (see `costs`)."""
    parser.add_argument("--costs", action="store_true", help="measure what a training with each takes instead")


def other_work(parser: argparse.ArgumentParser) -> None:
    """What can be asked for instead of trainings."""
    costs_option(parser)
    parser.add_argument("--pictures", action="store_true", help="keep labels of some images, of finished runs")


def main() -> None:
    args = command_line(__doc__, IDEAS, more=other_work)
    use_threads(args.threads)
    if args.costs:
        costs(configured(tiny(), **args.common), args.variants, RECORDS / "methods.json")
    if args.pictures:
        keep_pictures({name: args.common | overrides for name, overrides in args.variants.items()}, args.out_dir)
    if not (args.costs or args.pictures):
        state = run_all(args, "do ideas of later papers beat ToCo here?", RECORDS / "methods.json")
        print(table(state["variants"]))


if __name__ == "__main__":
    main()
