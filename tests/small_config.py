"""A small config whose values belong to the tests: the recipe `tiny` may be tuned without moving them."""

import torch

from toco_core.config import TrainConfig, override, tiny


def small_recipe() -> TrainConfig:
    return override(
        tiny(),
        beta_l=0.25,
        beta_h=0.7,
        cam_scales=(1.0, 0.5, 1.5),
        ptc=0.2,
        ctc=0.5,
        ptc_start=0,
        ctc_start=0,
        seg_start=100,
        energy_start=100,
        n_local=8,
        scale_range=(0.5, 2.0),
        blur_sigma=(0.1, 2.0),
        cache=False,
        steps=400,
        lr=1e-4,
        warmup_steps=30,
        eval_interval=100,
    )


def stir(model: torch.nn.Module, spread: float) -> None:
    """Every parameter random, norms and biases around 1: far from its start, so that CAMs are not flat."""
    for parameter in model.parameters():
        parameter.data = spread * torch.randn_like(parameter) + (1.0 if parameter.ndim == 1 else 0.0)
