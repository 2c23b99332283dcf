"""How much a training's process grows, beside what was estimated; run by test_budget.py in a process of its own.

    python peak_memory.py <data folder> <folder for runs> <crop size> <batch size> <accumulate>

Prints one JSON line of bytes. The growth is that of the resident memory's peak, which Linux lets a process reset.
"""

import ctypes
import gc
import json
import sys
from pathlib import Path

import torch
from small_config import small_recipe

from toco_core.config import override
from toco_core.data import open_data
from toco_core.train.budget import step_memory
from toco_core.train.loop import train

SHAPE = {
    "backbone": "plain_vit(image=224, patch=16, width=192, depth=6, heads=3, mlp=768)", "pretrained": False,
    "layer": 5, "proj_hidden": 64, "proj_bottleneck": 32, "proj_dim": 32, "decoder_width": 64, "par_iterations": 2,
    "cam_scales": (1.0,), "n_local": 2, "seg_start": 0, "energy_start": 0, "steps": 1, "warmup_steps": 0,
    "eval_interval": 0, "device": "cpu", "precision": "fp32", "val_split": "train",
}  # fmt: skip


def status(name: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def main() -> None:
    data, out_dir, crop_size, batch_size, accumulate = sys.argv[1:]
    torch.set_num_threads(1)
    config = override(small_recipe(), **SHAPE, dataset=data, out_dir=out_dir)
    train(override(config, crop_size=32, local_size=16, batch_size=1), progress=False)  # libraries are loaded
    config = override(config, crop_size=int(crop_size), local_size=48, batch_size=int(batch_size))
    config = override(config, accumulate=int(accumulate))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed is kept otherwise, and would not have to be got again
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status("VmRSS")
    train(config, progress=False)
    growth = status("VmHWM") - before
    estimate = step_memory(config, open_data(config.data))
    print(json.dumps({"growth": growth, "fixed": estimate.fixed, "step": estimate.step, "total": estimate.total}))


if __name__ == "__main__":
    main()
