import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reference_losses import reduced_bilinearly
from small_config import stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.analysis.crop_audit import foreground_share
from toco_core.analysis.crop_contrast import CropContrast, crop_contrast
from toco_core.config import ModelConfig, override, tiny
from toco_core.crops import CropBoxes, sample_crops
from toco_core.data import VOCFolder, evaluation_items, to_unit
from toco_core.model import ToCo

BACKBONE = "plain_vit(image=24, patch=8, width=12, depth=3, heads=3, mlp=20)"
CONFIG = override(tiny(), crop_size=32, local_size=16, temperature=0.7)


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
    found = foreground_share(mask[None], *boxes, 5)[0]
    for v, (top, left) in enumerate(zip(boxes.top[0].tolist(), boxes.left[0].tolist(), strict=True)):
        values = mask[top : top + 5, left : left + 5].flatten().tolist()
        seen = [value for value in values if value != 255]
        wanted = sum(value > 0 for value in seen) / len(seen) if seen else math.nan
        assert_close(found[v], torch.tensor(wanted), equal_nan=True)
    assert found[:3].std() > 0.01 and torch.isnan(found[3])


@pytest.mark.parametrize("variant", [{}, {"local_resized": True}, {"ctc_cosine": True}])
def test_equals_crop_by_crop(model, tmp_path, variant):
    source, config = VOCFolder(write_voc_folder(tmp_path / "voc"), "train"), override(CONFIG, **variant)
    found = crop_contrast(model, source, config, n_images=3, n_crops=4, seed=7)
    generator = torch.Generator().manual_seed(7)
    for b, item in enumerate(evaluation_items(source.subset(range(3)), size=32)):
        boxes = sample_crops(torch.zeros(1, 32, 32, dtype=torch.long), n_crops=4, crop_size=16, generator=generator)
        image = model.normalise(to_unit(item.image))
        with torch.no_grad():
            whole = model.encode(image).class_token[0]
            for v, (top, left) in enumerate(zip(boxes.top[0], boxes.left[0], strict=True)):
                crop = image[:, :, top : top + 16, left : left + 16]
                if "local_resized" in variant:
                    crop = reduced_bilinearly(crop[0], 32, 32)[None]
                part = model.encode(crop).class_token[0]
                mine, other = model.proj_head(part), model.proj_head_ema(whole)
                assert_close(found.class_token[b, v], part @ whole / part.norm() / whole.norm())
                cosine = mine @ other / mine.norm() / other.norm()
                assert_close(found.projected[b, v], cosine, rtol=1e-4, atol=1e-5)
                logit = (cosine if "ctc_cosine" in variant else mine @ other) / 0.7
                assert_close(found.logit[b, v], logit, rtol=1e-4, atol=1e-5)
                assert_close(found.direction[b, v], mine / mine.norm(), rtol=1e-4, atol=1e-5)
    assert found.object_share.shape == (3, 4) and found.object_share.std() > 0.01


def planted(share: list[list[float]], direction: torch.Tensor, along: int = 0) -> CropContrast:
    """Crops whose projections are known; the whole image's is the axis `along`."""
    share, value = torch.tensor(share), direction[..., along]
    return CropContrast(share, value, value, value / 0.5, direction)


def test_gap_and_auc():
    share = torch.tensor([[0.0, 0.1, 0.3], [0.9, 0.0, math.nan]])
    values = torch.tensor([[1.0, 50.0, 4.0], [6.0, 2.0, 70.0]])
    contrast = CropContrast(share, values, values, values, values[..., None])
    assert contrast.gap(values) == pytest.approx(5.0 - 1.5)
    assert contrast.gap(values, at_least=0.5) == pytest.approx(6.0 - 1.5)
    assert contrast.gap(values, at_least=0.5, at_most=0.2) == pytest.approx(6.0 - 53 / 3)
    assert math.isnan(contrast.gap(values, at_least=0.95)) and math.isnan(contrast.auc(values, at_least=0.95))
    assert contrast.auc(values) == 1.0 and contrast.auc(-values) == 0.0
    assert contrast.auc(values, at_least=0.2, at_most=0.2) == pytest.approx(4 / 6)


def test_the_gauge_tells_apart_what_is_planted():
    """Crops of objects along the image, those of background across it; the same turned round; and a collapse."""
    generator = torch.Generator().manual_seed(0)
    share = (torch.rand(40, 6, generator=generator) < 0.5).float()
    noise = 0.1 * torch.randn(40, 6, 8, generator=generator)
    axes = torch.eye(8)

    def features(full, empty):
        return F.normalize(torch.where(share[..., None] > 0, full, empty) + noise, dim=-1)

    right = planted(share.tolist(), features(axes[0], axes[1]))
    assert right.gap(right.projected) > 0.8 and right.auc(right.logit) > 0.99 and 0.4 < right.likeness() < 0.6
    wrong = planted(share.tolist(), features(axes[1], axes[0]))
    assert wrong.gap(wrong.projected) < -0.8 and wrong.auc(wrong.logit) < 0.01
    collapsed = planted(share.tolist(), features(axes[2], axes[2]))
    assert collapsed.likeness() > 0.9 and abs(collapsed.gap(collapsed.projected)) < 0.1
    assert 0.3 < collapsed.auc(collapsed.projected) < 0.7


def test_likeness_pair_by_pair():
    generator = torch.Generator().manual_seed(1)
    direction = F.normalize(torch.randn(3, 2, 5, generator=generator) + 0.5, dim=-1)
    pairs = [
        direction[a, v] @ direction[b, w] for a in range(3) for b in range(3) if a != b for v in (0, 1) for w in (0, 1)
    ]
    contrast = planted([[0.0, 1.0]] * 3, direction)
    assert contrast.likeness() == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert math.isnan(planted([[0.0, 1.0]], direction[:1]).likeness())
