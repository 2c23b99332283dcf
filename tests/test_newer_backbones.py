"""DINOv2 and DINOv3 (registers, rotary positions, LayerScale, patch 14 and 16) the whole way, with random weights."""

import jaxtyping
import numpy as np
import pytest
import torch
from small_config import few_scenes
from torch.testing import assert_close

from toco_core.cam import multi_scale_cam
from toco_core.config import override, photographs
from toco_core.data import evaluation_items, to_unit
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.predict.portable import Portable, exported
from toco_core.train.loop import train

SMALL = {"proj_hidden": 16, "proj_bottleneck": 8, "proj_dim": 8, "decoder_width": 8, "pretrained": False}
STEPS = {"steps": 2, "warmup_steps": 0, "batch_size": 2, "warm_start_steps": 5, "eval_interval": 0, "lr": 1e-4}
STARTS = {"ptc_start": 0, "ctc_start": 0, "seg_start": 1, "energy_start": 1, "ctc": 0.1, "n_local": 2, "local_size": 32}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=5, n_train=4, n_val=2, n_test=1)


@pytest.fixture
def untyped():
    """Traced sizes are no numbers: shapes are not checked meanwhile."""
    yield lambda: jaxtyping.config.update("jaxtyping_disable", True)
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "patch", "prefix"), [("vit_small_patch14_reg4_dinov2", 14, 5), ("vit_small_patch16_dinov3", 16, 5)]
)
def test_the_whole_way(backbone, patch, prefix, data, tmp_path, untyped):
    """60 pixels are no multiple of the patch: 4 x 4 tokens."""
    config = override(
        photographs(), backbone=backbone, crop_size=60, frozen_blocks=8, attention_steps=1, attention_blocks=(9, 12),
        layer=10, out_dir=str(tmp_path), cam_scales=(1.0,), views_per_image=1, seed=1, **SMALL, **STEPS, **STARTS,
    )  # fmt: skip
    trained = train(config, data=data, progress=False)
    model = trained.model
    assert model.encoder.num_prefix_tokens == prefix and model.patch_size == (patch, patch)
    assert np.isfinite(trained.validation.seg.miou)

    unit = to_unit(next(evaluation_items(data.val, size=60)).image)
    images = model.normalise(unit)
    tokens = model.encode(images, attend=(9, 12))
    assert tokens.grid == (4, 4) and tokens.attention.shape == (1, 16, 16)
    by_hand = torch.stack([a[:, :, prefix:, prefix:].mean(1) for a in model.attention(images, blocks=[9, 12])]).mean(0)
    assert_close(tokens.attention, by_hand.detach())
    cams = multi_scale_cam(model, images, **config.labels.cam_options())
    assert cams.cam.shape == (1, data.val.n_classes, 60, 60) and cams.cam.std() > 0.01
    assert evaluate_as(config, model, data.val, progress=False).n_images == 2

    untyped()
    program = exported(model)
    size = (1, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        for ours, theirs in zip(
            Portable(model)(torch.ones(size) / 3), program.module()(torch.ones(size) / 3), strict=True
        ):
            assert_close(theirs, ours, rtol=1e-3, atol=1e-4)
