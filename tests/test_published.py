import math

import pytest
from torch.testing import assert_close

from toco_core.config import voc
from toco_core.data import VOC_CLASSES
from toco_core.runs.published import SCORES, VOC_CURVE, VOC_STEPS, ahead_of_published, is_voc, published_at


def test_the_curve_belongs_to_the_recipe():
    assert voc().schedule.steps == VOC_STEPS == VOC_CURVE[-1]["step"]
    assert [point["step"] for point in VOC_CURVE] == list(range(2000, 20001, voc().eval_interval))
    assert voc().labels.beta == 0.5 and voc().labels.cam_scales == (1.0, 0.5, 1.5)  # its protocol
    assert VOC_CURVE[-1] == {"step": 20000, "cam_miou": 72.3, "aux_cam_miou": 68.4, "seg_miou": 69.2}


def test_between_two_validations_the_curve_is_linear():
    for a, b in zip(VOC_CURVE, VOC_CURVE[1:], strict=False):
        for weight in (0.0, 0.25, 1.0):
            share = (a["step"] + weight * (b["step"] - a["step"])) / VOC_STEPS
            wanted = {score: a[score] + weight * (b[score] - a[score]) for score in SCORES}
            assert_close(published_at(share), wanted)
    assert all(math.isnan(value) for value in published_at(0.05).values())
    assert all(math.isnan(value) for value in published_at(1.1).values())


@pytest.mark.parametrize("steps", [20000, 10000])
def test_a_run_is_compared_at_its_share_of_the_schedule(steps):
    records = [{"step": 0, "total": 3.0}]
    for point, gain in zip(VOC_CURVE, range(10), strict=True):
        done = point["step"] * steps // VOC_STEPS
        records.append({"step": done - 1} | {score: point[score] + gain for score in SCORES})
    rows = ahead_of_published(records, steps)
    assert [row["step"] for row in rows] == [point["step"] * steps // VOC_STEPS for point in VOC_CURVE]
    for gain, row in enumerate(rows):
        assert_close({score: row[score] for score in SCORES}, dict.fromkeys(SCORES, float(gain)))


def test_a_score_that_is_not_there():
    (row,) = ahead_of_published([{"step": 1999, "cam_miou": 30.0, "aux_cam_miou": None, "seg_miou": 0.4}], VOC_STEPS)
    assert_close(row["cam_miou"], 5.8)
    assert math.isnan(row["aux_cam_miou"])


def test_only_voc_is_voc():
    assert is_voc(VOC_CLASSES) and is_voc(("_background_", *VOC_CLASSES[1:]))
    assert not is_voc(VOC_CLASSES[:-1]) and not is_voc(("background", "cat", "dog"))
