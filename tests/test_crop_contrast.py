import math

import numpy as np
import pytest
import torch
from small_config import stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.analysis.crop_contrast import CropContrast, crop_contrast, object_share
from toco_core.config import ModelConfig, override, tiny
from toco_core.crops import CropBoxes, sample_crops
from toco_core.data import VOCFolder, evaluation_items, to_unit
from toco_core.model import ToCo

BACKBONE = "plain_vit(image=24, patch=8, width=12, depth=3, heads=3, mlp=20)"
CONFIG = override(tiny(), crop_size=32, local_size=16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, proj_hidden=8, proj_bottleneck=6), 3)
    stir(model, 0.3)
    return model.eval()


def test_share_of_object_by_counting():
    mask = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 2, 3, 255], (14, 19)))
    mask[8:, 12:] = 255
    boxes = CropBoxes(torch.tensor([[0, 3, 9, 8]]), torch.tensor([[2, 14, 0, 13]]))
    found = object_share(mask, boxes, 5)
    for v, (top, left) in enumerate(zip(boxes.top[0].tolist(), boxes.left[0].tolist(), strict=True)):
        values = mask[top : top + 5, left : left + 5].flatten().tolist()
        seen = [value for value in values if value != 255]
        wanted = sum(value > 0 for value in seen) / len(seen) if seen else math.nan
        assert_close(found[v], torch.tensor(wanted), equal_nan=True)
    assert found[:3].std() > 0.01 and torch.isnan(found[3])


def test_equals_crop_by_crop(model, tmp_path):
    source = VOCFolder(write_voc_folder(tmp_path / "voc"), "train")
    found = crop_contrast(model, source, CONFIG, n_images=3, n_crops=4, seed=7)
    generator = torch.Generator().manual_seed(7)
    for b, item in enumerate(evaluation_items(source.subset(range(3)), size=32)):
        boxes = sample_crops(torch.zeros(1, 32, 32, dtype=torch.long), n_crops=4, crop_size=16, generator=generator)
        image = model.normalise(to_unit(item.image))
        with torch.no_grad():
            whole = model.encode(image).class_token[0]
            for v, (top, left) in enumerate(zip(boxes.top[0], boxes.left[0], strict=True)):
                part = model.encode(image[:, :, top : top + 16, left : left + 16]).class_token[0]
                mine, other = model.proj_head(part), model.proj_head_ema(whole)
                assert_close(found.class_token[b, v], part @ whole / part.norm() / whole.norm())
                assert_close(found.projected[b, v], mine @ other / mine.norm() / other.norm())
    assert found.object_share.shape == (3, 4) and found.object_share.std() > 0.01


def test_gap():
    share = torch.tensor([[0.0, 0.1, 0.3], [0.9, 0.0, math.nan]])
    values = torch.tensor([[1.0, 50.0, 4.0], [6.0, 2.0, 70.0]])
    contrast = CropContrast(share, values, values)
    assert contrast.gap(values) == pytest.approx(5.0 - 1.5)
    assert contrast.gap(values, at_least=0.5) == pytest.approx(6.0 - 1.5)
    assert math.isnan(contrast.gap(values, at_least=0.95))
