"""Why do two ideas of later papers not help here?

    python experiments/methods_why.py --out-dir runs

Noise filter: of what it would leave out of the pseudo labels of the shipped run, how much is labelled wrong, and how
much lies within four pixels of a border of the mask? Expected: if it finds noise, most of it is wrong. Affinity: what
do CAM and segmentation of the same network score with and without the walk? Expected: if what it learns spoils the
tokens, both are below ToCo's. Needs the finished runs of `methods.py --variants affinity "affinity, also in labels"
--seeds 0` in --out-dir. 60 images of val, a minute. Writes experiments/records/methods_why.json.
"""

import argparse
import json
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from common import RECORDS, use_threads
from methods import IDEAS

from toco_core.config import configured, override, tiny
from toco_core.conventions import IGNORE
from toco_core.data import evaluation_items, open_data
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.evaluation.protocols import evenly
from toco_core.machine.writing import write_whole
from toco_core.methods.surest import without_noise
from toco_core.predict.image import ImagePredictor
from toco_core.runs.folder import Run
from toco_core.runs.opened import Opened, open_run
from toco_core.runs.shipped import shipped_runs

N_IMAGES = 60
NEAR = 9  # side of the square in which a border is near, pixels


def noise(opened: Opened, split) -> dict[str, dict[str, float]]:
    """Percent wrong and percent near a border, of the labelled pixels that the filter keeps and of those that it leaves
    out; void is not counted."""
    share = IDEAS["noise filter"]["seg_noise"]
    predictor = ImagePredictor(opened.model, opened.config)
    counts = {part: np.zeros(3) for part in ("kept", "left out")}
    for item in evaluation_items(split, size=tiny().data.crop_size, native=True):
        predictor.set_item(item)
        label = torch.from_numpy(predictor.pseudo_label()).long()[None]
        logits = F.interpolate(predictor.seg_logits.float(), size=label.shape[1:], mode="bilinear", align_corners=False)
        kept = (without_noise(logits, label, share)[0] != IGNORE).numpy()
        label, known = label[0].numpy(), item.mask != IGNORE
        objects = np.where(known, item.mask, 0).astype(np.uint8)
        near = cv2.morphologyEx(objects, cv2.MORPH_GRADIENT, np.ones((NEAR, NEAR), np.uint8)) > 0
        for part, where in (("kept", kept), ("left out", ~kept)):
            where = where & known & (label != IGNORE)
            counts[part] += [where.sum(), (where & (label != item.mask)).sum(), (where & near).sum()]
    return {
        part: {"wrong": round(100 * wrong / n, 1), "near a border": round(100 * near / n, 1)}
        for part, (n, wrong, near) in counts.items()
    }


def scores(opened: Opened, split, **changes) -> dict[str, float]:
    """mIoU in percent, CAMs at the threshold that is best on these images."""
    found = evaluate_as(override(opened.config, **changes), opened.model, split, progress=False)
    kinds = {"cam": np.nanmax(found.cam.miou), "aux_cam": np.nanmax(found.aux_cam.miou), "seg": found.seg.miou}
    return {kind: round(100 * float(value), 1) for kind, value in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    use_threads(args.threads)
    data = open_data(tiny().data)
    split = evenly(data.val, N_IMAGES)
    full = open_run(shipped_runs()["full"].folder, data=data)
    state = {
        "part": f"val, {N_IMAGES} images",
        "noise filter": noise(full, split),
        "walk": {"ToCo": scores(full, split)},
    }
    for name in ("affinity", "affinity, also in labels"):
        config = configured(tiny(), **IDEAS[name], seed=0, out_dir=str(args.out_dir))
        opened = open_run(Run.of(config).folder, data=data)
        state["walk"] |= {name: scores(opened, split), f"{name}, not carried": scores(opened, split, attention_steps=0)}
    print(json.dumps(state, indent=1))
    write_whole(RECORDS / "methods_why.json", json.dumps(state, indent=1) + "\n")


if __name__ == "__main__":
    main()
