"""How do the time and the memory of a training step grow with crop size, batch, classes and image size?

    python experiments/benchmarks/scaling.py                    # about five minutes; one process per point

Expected: linear in the batch; a little more than quadratic in the crop's side, where attention takes over; flat in the
number of classes, because only labelled classes get maps, except for the segmentation logits, which have all classes at
the crop's size; PTC and PAR a small share everywhere. The size of the image on disk matters to the loader only.
Writes experiments/records/benchmarks_scaling.json and .png.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time

import numpy as np
import torch
from measure import LATE, RECORDS, alternate, batch_of, config_of, machine, model_of, seconds_of, write_record

from toco_core import labels, losses
from toco_core.data.augment import training_views
from toco_core.machine.device import keep_freed_memory
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.objective import Step, objective

POINT = {"crop": 448, "batch": 2, "classes": 20}
POINTS = {
    "crop": (224, 320, 448, 576),
    "batch": (1, 2, 4),
    "classes": (20, 80, 300),
}
SIDES = (250, 500, 1000, 2000)


def peak_mib() -> float:
    """The most memory that this process ever held; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def one_point(crop: int, batch: int, classes: int, repeats: int) -> dict:
    """A step of ViT-Tiny as it is trained by default here (bf16 where the processor has it), and its labels and PTC."""
    keep_freed_memory()
    config = config_of("tiny", crop_size=crop, local_size=min(96, crop))
    model = model_of(config, classes)
    images = batch_of(model, crop, batch)
    before = peak_mib()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    cpu = torch.device("cpu")
    found = None

    def step():
        nonlocal found
        with attention_of(model, config, cpu):
            autocast = autocast_of(config, cpu)
            found = Step(model, images, config, LATE, autocast=autocast)
            total = objective(found).total
            model.zero_grad(set_to_none=True)
            total.backward()
        optimizer.step()

    seconds = statistics.median(alternate({"step": step}, repeats)["step"])
    peak = peak_mib()
    betas = config.labels.thresholds()
    unit = model.denormalise(images.images).clamp(0, 1)
    par = seconds_of(lambda: labels.pseudo_label(unit, found.cams.cam, images.image_labels, **betas))
    patch_map = torch.randn(batch, model.width, crop // 16, crop // 16, requires_grad=True)
    ptc = seconds_of(lambda: losses.ptc_loss(patch_map, found.token_label).backward())
    return {
        "crop": crop,
        "batch": batch,
        "classes": classes,
        "seconds": round(seconds, 3),
        "par_seconds": round(par, 4),
        "ptc_seconds": round(ptc, 4),
        "peak_mib": round(peak),
        "mib_before": round(before),
    }


def loader_point(side: int) -> dict:
    """Milliseconds in which one image of this side, decoded, becomes the three views of a training step."""
    image = np.random.default_rng(0).integers(0, 256, (side * 3 // 4, side, 3), np.uint8)
    rng = np.random.default_rng(1)
    seconds = alternate({"views": lambda: training_views(image, crop_size=448, rng=rng)}, 15)["views"]
    return {"side": side, "views_ms": round(1000 * statistics.median(seconds), 2)}


def draw(record: dict) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 4, figsize=(13, 3.2), layout="constrained")
    names = {"crop": "side of the crop, pixels", "batch": "images per step", "classes": "classes K"}
    for ax, (axis, points) in zip(axes, record["steps"].items(), strict=False):
        x = [p[axis] for p in points]
        for key, label in (("seconds", "whole step"), ("par_seconds", "PAR"), ("ptc_seconds", "PTC")):
            ax.plot(x, [p[key] for p in points], "o-", label=label)
        ax.set(xscale="log", yscale="log", xlabel=names[axis], ylabel="seconds", ylim=(0.001, 30))
        ax.margins(x=0.15)  # for the labels of the outer points
        ax.set_xticks(x, [str(v) for v in x])
        ax.minorticks_off()
        for p, at in zip(points, x, strict=True):
            ax.annotate(f"{p['peak_mib'] / 1024:.1f} GiB", (at, p["seconds"]), (0, 5), textcoords="offset points",
                        ha="center", fontsize=7)  # fmt: skip
        ax.set_title(f"Step against {names[axis].split(',')[0]}", fontsize=9)
    axes[0].legend(fontsize=7, loc="lower right")
    axes[3].plot([p["side"] for p in record["loader"]], [p["views_ms"] for p in record["loader"]], "o-", color="C3")
    axes[3].set(xlabel="longer side of the image, pixels", ylabel="milliseconds", ylim=(0, None))
    axes[3].set_title("Views of one image (loader)", fontsize=9)
    figure.suptitle("ViT-Tiny, late step, one thread; labels: peak memory of the process", fontsize=10)
    figure.savefig(RECORDS / "benchmarks_scaling.png", dpi=90, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)  # what a process of its own measures
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.point:
        print(json.dumps(one_point(**args.point, repeats=args.repeats)))
        return
    record = {"machine": machine(), "steps": {}, "loader": []}
    began = time.monotonic()
    measured: dict[tuple, dict] = {}
    for axis, values in POINTS.items():
        record["steps"][axis] = []
        for value in values:
            point = POINT | {axis: value}
            key = tuple(point.values())
            if key not in measured:  # the middle point lies on every axis
                options = ["--threads", str(args.threads), "--repeats", str(args.repeats), "--point", json.dumps(point)]
                command = [sys.executable, __file__, *options]
                output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                measured[key] = json.loads(output.splitlines()[-1])
                print(measured[key], flush=True)
            record["steps"][axis].append(measured[key])
    for side in SIDES:
        record["loader"].append(loader_point(side))
        print(record["loader"][-1], flush=True)
    record["minutes"] = round((time.monotonic() - began) / 60, 1)
    print("written:", write_record("benchmarks_scaling.json", record).name)
    draw(record)


if __name__ == "__main__":
    main()
