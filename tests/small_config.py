"""A small config whose values belong to the tests: the recipe `tiny` may be tuned without moving them."""

from pathlib import Path

import pytest
import torch

from toco_core.config import (
    CropConfig,
    DataConfig,
    LabelConfig,
    LossConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    override,
)
from toco_core.data import TrainVal, open_train_val
from toco_core.data.scenes import ScenesConfig, scenes_folder
from toco_core.model import ToCo
from toco_core.predict.models import NamedModel
from toco_core.train.loop import train


def small_recipe() -> TrainConfig:
    return TrainConfig(
        model=ModelConfig(
            backbone="scenes_vit_nano", proj_hidden=256, proj_bottleneck=64, proj_dim=128, decoder_width=64
        ),
        labels=LabelConfig(par_dilations=(1, 2, 4, 8)),
        loss=LossConfig(seg_start=100, energy_start=100),
        crops=CropConfig(local_size=32, positive_threshold=1.0),
        data=DataConfig(crop_size=96),
        schedule=ScheduleConfig(steps=400, batch_size=8, lr=0.0001, warmup_steps=30),
        eval_interval=100,
    )


def labelling_config() -> TrainConfig:
    """For networks that are stirred and asked for labels: two scales, thresholds between which something lies."""
    return override(
        small_recipe(), backbone="plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)", pretrained=False,
        layer=2, proj_hidden=8, proj_bottleneck=6, proj_dim=5, decoder_width=7, crop_size=32, local_size=16,
        cam_scales=(1.0, 0.5), par_iterations=3, par_dilations=(1, 2), beta_l=0.35, beta_h=0.6, beta=0.4,
        device="cpu", precision="fp32",
    )  # fmt: skip


def stirred_named(class_names: tuple[str, ...]) -> NamedModel:
    """A stirred network of `labelling_config` as `open_model` gives one."""
    config = labelling_config()
    torch.manual_seed(2)
    model = ToCo(config.model, len(class_names) - 1)
    stir(model, 0.3)
    return NamedModel("mine", model.eval(), config, class_names)


def few_scenes(cache: Path, **numbers: int) -> TrainVal:
    """A drawing of its own of the embedded data set, in a cache folder of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOCO_CACHE", str(cache))
        return open_train_val(scenes_folder(ScenesConfig(**numbers), progress=False))


def stir(model: torch.nn.Module, spread: float) -> None:
    """Every parameter random, norms and biases around 1: far from its start, so that CAMs are not flat.

    The same numbers whatever timm drew before: they follow from the last seed.
    """
    torch.manual_seed(torch.initial_seed())
    for parameter in model.parameters():
        parameter.data = spread * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0)


def stirred_model(n_classes: int) -> ToCo:
    """A stirred network of three blocks in float64, patches of 8 x 8."""
    torch.manual_seed(1)
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    backbone = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
    model = ToCo(ModelConfig(backbone=backbone, pretrained=False, layer=2, **sizes), n_classes).double()
    stir(model, 0.3)
    return model.eval()


def short_run(out_dir: Path, seed: int) -> Path:
    """The folder of a finished run of two steps: enough for maps that differ from one seed to the other."""
    config = override(small_recipe(), steps=2, warmup_steps=1, batch_size=2, n_local=2, seed=seed, eval_interval=0)
    config = override(config, crop_size=64, cam_scales=(1.0,), seg_start=1, energy_start=1, out_dir=str(out_dir))
    return train(config, progress=False).run.folder
