"""Ten training steps on seeded random images: numbers that a rearrangement of the code must not move.

    python tests/golden_curve.py          # two digests: losses, and weights after the last step, in float32
    python tests/golden_curve.py --store  # rewrite golden_curve.json after an intended change of the numbers

The two digests are equal on one machine before and after a change that moves code only. Between machines the last bits
differ, and a pixel may cross a threshold: `test_golden_curve.py` compares in float64, with a tolerance.
"""

import argparse
import hashlib
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from small_config import stir

from toco_core.config import (
    CropConfig,
    DataConfig,
    LabelConfig,
    LossConfig,
    ModelConfig,
    ScheduleConfig,
    TrainConfig,
    lr_at,
)
from toco_core.model import ToCo, build_model
from toco_core.objective import StepInput, objective
from toco_core.train.backward import backward, crop_generator
from toco_core.train.optimizer import parameter_groups

STORED = Path(__file__).with_suffix(".json")
STEPS, B, K, SIZE = 10, 4, 3, 48
BOX = [[0, SIZE, 0, SIZE], [4, 44, 0, SIZE], [0, SIZE, 6, 40], [2, 46, 3, 45]]


def config(accumulate: int = 1) -> TrainConfig:
    """All six terms; three begin after the first step, and the final CAM labels from step 6 on. Every field that the
    numbers depend on is written here: no recipe moves them."""
    return TrainConfig(
        model=ModelConfig(
            backbone="plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)", pretrained=False, layer=2,
            proj_hidden=24, proj_bottleneck=12, proj_dim=10, decoder_width=14,
        ),
        labels=LabelConfig(beta_l=0.3, beta_h=0.6, cam_scales=(1.0, 0.5), par_iterations=3, par_dilations=(1, 2)),
        loss=LossConfig(
            ptc=0.2, ctc=0.5, seg=0.1, energy=0.05, temperature=0.5,
            ptc_start=1, ctc_start=2, seg_start=3, energy_start=4, final_cam_start=6,
        ),
        crops=CropConfig(n_local=3, local_size=16, positive_threshold=0.6),
        data=DataConfig(crop_size=SIZE),
        schedule=ScheduleConfig(steps=STEPS, batch_size=B, accumulate=accumulate, lr=2e-3, warmup_steps=3),
        seed=7, device="cpu", precision="fp32",
    )  # fmt: skip


def batch(model: ToCo, step: int, dtype: torch.dtype) -> StepInput:
    """Smooth random images; the labels of image b are the binary digits of b + step + 1, no image without a class."""
    generator = torch.Generator().manual_seed(1000 + step)
    coarse = torch.rand(3, B, 3, 7, 6, generator=generator, dtype=torch.float64)
    images = [F.interpolate(part, size=(SIZE, SIZE), mode="bicubic").clamp(0, 1) for part in coarse]
    numbers = [(b + step) % (2**K - 1) + 1 for b in range(B)]
    image_labels = torch.tensor([[float(number >> k & 1) for k in range(K)] for number in numbers])
    return StepInput(*(model.normalise(part.to(dtype)) for part in images), image_labels, torch.tensor(BOX))


def curve(dtype: torch.dtype = torch.float32, accumulate: int = 1) -> tuple[list[dict[str, float]], ToCo]:
    """The losses of every step, and the model after the last one."""
    settings = config(accumulate)
    schedule = settings.schedule
    torch.manual_seed(settings.seed)
    model = build_model(settings, K)
    stir(model, 0.2)
    model = model.to(dtype).train()
    groups = parameter_groups(model, lr=schedule.lr, head_lr_scale=schedule.head_lr_scale, weight_decay=0.01)
    optimizer = torch.optim.AdamW(groups, betas=schedule.betas)
    records = []
    for step in range(STEPS):
        rate = {"steps": STEPS, "warmup_steps": schedule.warmup_steps, "warmup_ratio": 1e-6, "power": 0.9}
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, base_lr=group["base_lr"], **rate)
        model.update_ema(schedule.momentum)
        optimizer.zero_grad(set_to_none=True)
        result = _backward(model, batch(model, step, dtype), settings, step)
        optimizer.step()
        records.append({"total": result.total.item()} | {name: value.item() for name, value in result.terms.items()})
    return records, model


def _backward(model, loaded, settings, step):
    """The step under test, the one place that follows its names."""

    return backward(objective, model, loaded, settings, step, generator=crop_generator(settings, step))


def digests(accumulate: int = 1) -> dict[str, str]:
    """SHA-256 of the losses and of the weights in float32, with one thread."""
    torch.set_num_threads(1)
    records, model = curve(accumulate=accumulate)
    weights = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        weights.update(name.encode() + value.contiguous().numpy().tobytes())
    return {"losses": hashlib.sha256(json.dumps(records).encode()).hexdigest(), "weights": weights.hexdigest()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", action="store_true", help="rewrite the stored numbers")
    if parser.parse_args().store:
        stored = {"losses": curve(torch.float64)[0]}
        STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    for accumulate in (1, 2):
        print(f"accumulate={accumulate}", *(f"{name} {digest}" for name, digest in digests(accumulate).items()))


if __name__ == "__main__":
    main()
