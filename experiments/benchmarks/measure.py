"""What the benchmarks share: models and batches, sides timed in turn, what a record says of the machine."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from toco_core.config import TrainConfig, override, voc
from toco_core.machine.writing import write_whole
from toco_core.model import ToCo, build_model
from toco_core.objective import StepInput

RECORDS = Path(__file__).resolve().parents[1] / "records"
WIDTHS = {
    "tiny": "plain_vit(image=224, patch=16, width=192, depth=12, heads=3, mlp=768)",
    "small": "plain_vit(image=224, patch=16, width=384, depth=12, heads=6, mlp=1536)",
    "base": "plain_vit(image=224, patch=16, width=768, depth=12, heads=12, mlp=3072)",
}
LATE = 10_000  # a step on which every term of the loss counts


def config_of(width: str, **changes) -> TrainConfig:
    """The published settings (crop 448, 2 + 8 views) with a ViT of this width, weights random."""
    return override(voc(), backbone=WIDTHS[width], pretrained=False, **changes)


def model_of(config: TrainConfig, n_classes: int) -> ToCo:
    torch.manual_seed(0)
    return build_model(config, n_classes).train()


def batch_of(model: ToCo, size: int, batch_size: int, seed: int = 0) -> StepInput:
    """Smooth random pictures with some noise; one or two classes each, and some padding in every second one."""
    generator = torch.Generator().manual_seed(seed)

    def pictures():
        coarse = torch.rand(batch_size, 3, size // 16, size // 16, generator=generator)
        fine = 0.03 * torch.randn(batch_size, 3, size, size, generator=generator)
        smooth = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
        return model.normalise((smooth + fine).clamp(0, 1))

    image_labels = torch.zeros(batch_size, model.n_classes)
    for b in range(batch_size):
        image_labels[b, torch.randperm(model.n_classes, generator=generator)[: 1 + b % 2]] = 1
    whole, padded = [0, size, 0, size], [size // 20, size, 0, size - size // 10]
    boxes = torch.tensor([padded if b % 2 else whole for b in range(batch_size)])
    return StepInput(pictures(), pictures(), pictures(), image_labels, boxes)


def clock_name() -> str:
    """On one thread the process's own time, which other processes on the machine do not lengthen by being there."""
    return "process time" if torch.get_num_threads() == 1 else "wall time"


def seconds_of(work: Callable) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    began = clock()
    work()
    return clock() - began


def alternate(sides: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each side, one after the other again and again, after one turn that does not count."""
    for work in sides.values():
        work()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, work in sides.items():
            seconds[name].append(seconds_of(work))
    return seconds


def ratio(seconds: dict[str, list[float]], slow: str, fast: str) -> float:
    """How many times faster: the median over the turns, since both sides of a turn saw the machine alike."""
    return statistics.median(s / f for s, f in zip(seconds[slow], seconds[fast], strict=True))


def machine() -> dict:
    """What a timing depends on."""
    model = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").is_file():
        named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        model = named[0].partition(":")[2].strip() if named else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "bf16": bool(torch.cpu._is_avx512_bf16_supported()),
        "gflops": {str(dtype).partition(".")[2]: round(gflops(dtype)) for dtype in (torch.float32, torch.bfloat16)},
        "clock": clock_name(),
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def gflops(dtype: torch.dtype, size: int = 1024) -> float:
    """Billions of multiplications and additions a second of a large square matrix product."""
    return 2e-9 * size**3 / min(alternate({"product": product(dtype, size)}, 5)["product"])


def product(dtype: torch.dtype, size: int) -> Callable:
    """A square matrix product, 2 * size**3 multiplications and additions."""
    one = torch.randn(size, size).to(dtype)
    return lambda: one @ one


def write_record(name: str, content: dict) -> Path:
    path = RECORDS / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")
    return path
