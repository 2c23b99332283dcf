"""The published training curve: what a run on PASCAL VOC can be held against while it is still training.

Source: the training log of the authors' release, `logs/toco_vit-b_voc_20k.log` in github.com/rulixiang/ToCo, which
begins on 4 November 2022: ViT-B (`vit_base_patch16_224`), 20000 steps of 4 images on `train_aug`, hyper-parameters as
in `config.voc`. Every 2000 steps it gives mIoU in percent on VOC val (1449 images at 448 x 448): CAMs over the scales
1, 0.5, 1.5 and mirrored at threshold 0.5, and the decoder's segmentation without CRF. Rounded to one decimal here.
"""

from collections.abc import Sequence

import numpy as np

from toco_core.data import VOC_CLASSES

VOC_STEPS = 20000
VOC_CURVE = (
    {"step": 2000, "cam_miou": 24.2, "aux_cam_miou": 51.5, "seg_miou": 0.4},
    {"step": 4000, "cam_miou": 58.2, "aux_cam_miou": 60.8, "seg_miou": 50.6},
    {"step": 6000, "cam_miou": 63.1, "aux_cam_miou": 64.3, "seg_miou": 57.1},
    {"step": 8000, "cam_miou": 66.6, "aux_cam_miou": 67.5, "seg_miou": 62.4},
    {"step": 10000, "cam_miou": 69.1, "aux_cam_miou": 68.1, "seg_miou": 64.8},
    {"step": 12000, "cam_miou": 69.9, "aux_cam_miou": 67.8, "seg_miou": 65.4},
    {"step": 14000, "cam_miou": 71.7, "aux_cam_miou": 66.8, "seg_miou": 67.6},
    {"step": 16000, "cam_miou": 71.7, "aux_cam_miou": 67.8, "seg_miou": 68.0},
    {"step": 18000, "cam_miou": 72.1, "aux_cam_miou": 68.1, "seg_miou": 68.5},
    {"step": 20000, "cam_miou": 72.3, "aux_cam_miou": 68.4, "seg_miou": 69.2},
)
SCORES = ("cam_miou", "aux_cam_miou", "seg_miou")


def is_voc(class_names: Sequence[str]) -> bool:
    """Whether these are the 21 classes of VOC, background first: other data cannot be held against the curve."""
    return tuple(class_names)[1:] == VOC_CLASSES[1:]


def published_at(share: float) -> dict[str, float]:
    """The published scores at a share of the schedule in (0, 1], linear between two validations; NaN before the first,
    at a tenth of the schedule."""
    shares = [point["step"] / VOC_STEPS for point in VOC_CURVE]
    if not shares[0] <= share <= 1:
        return dict.fromkeys(SCORES, float("nan"))
    return {score: float(np.interp(share, shares, [point[score] for point in VOC_CURVE])) for score in SCORES}


def ahead_of_published(records: Sequence[dict], steps: int) -> list[dict]:
    """For every validation among a run's records: steps done, and its scores minus the published ones in points.

    Compared at the same share of the schedule, which at 20000 `steps` is the same step: the learning rate falls with
    the share. A score that the run or the curve lacks there is NaN.
    """
    rows = []
    for record in records:
        if "cam_miou" in record:
            done = record["step"] + 1
            there = published_at(done / steps)
            own = {score: record[score] if record[score] is not None else float("nan") for score in SCORES}
            rows.append({"step": done} | {score: own[score] - there[score] for score in SCORES})
    return rows
