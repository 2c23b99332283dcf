"""What do a full reproduction on VOC and on COCO, and an ablation of 8 layers x 5 seeds, cost on 1, 8 and 64 GPUs?

    python experiments/cost.py               # the table, from the step times that are known
    python experiments/cost.py --measure     # and from a step that is measured here first, one to two minutes on a CPU

Arithmetic on step times, no training: steps x seconds of a late step, in which every term counts; validation and
loading are not counted, and devices that stay idle neither. The step times are those of records/benchmarks_gpu.json
where somebody has run benchmarks/gpu.py; the one that the authors' log shows for their own program (0.584 s for a step
of 4 images on two A100); and one of ViT-B at 448 pixels on one thread of a CPU. Each row says which.

How far one run can be spread follows from its batch: 4 images cannot use more than 4 GPUs. Runs of an ablation do not
wait for each other. ASSUMED, not measured: a step of one run on n GPUs takes 1 / (n x efficiency) of its time on one
GPU, with the --efficiency given, and a batch's time is proportional to its images. A larger batch would use more GPUs
but is another experiment. Writes experiments/records/cost.json.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from toco_core.config import coco, voc
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.machine.writing import write_whole
from toco_core.objective import Step, objective

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))
from measure import LATE, batch_of, config_of, machine, model_of, seconds_of  # noqa: E402

RECORDS = Path(__file__).parent / "records"
GPUS = (1, 8, 64)
EFFICIENCY = 0.85


class StepTime(NamedTuple):
    """A step of `images` images, on `devices` devices together, takes `seconds`."""

    source: str
    images: int
    devices: int
    seconds: float

    def device_seconds(self, efficiency: float) -> float:
        """Of one device for one image: sharing among several has cost `1 - efficiency` of their time."""
        useful = efficiency if self.devices > 1 else 1.0
        return self.seconds * self.devices * useful / self.images


class Work(NamedTuple):
    """`runs` independent runs of `steps` steps of `batch` images."""

    name: str
    runs: int
    steps: int
    batch: int


class Cost(NamedTuple):
    """What some work takes."""

    hours: float
    gpu_hours: float
    gpus_per_run: int
    runs_at_once: int
    idle: int
    """Devices that nothing can be given to."""


PUBLISHED = StepTime("published log, two A100", 4, 2, 0.584)


def works() -> list[Work]:
    """The recipes' own steps and batches; the ablation on VOC."""
    plans = {"VOC": voc().schedule, "COCO": coco().schedule}
    full = [Work(f"{name} reproduction", 1, plan.steps, plan.batch_size) for name, plan in plans.items()]
    return [*full, Work("VOC ablation, 8 layers x 5 seeds", 40, plans["VOC"].steps, plans["VOC"].batch_size)]


def cost_of(work: Work, step: StepTime, gpus: int, efficiency: float = EFFICIENCY) -> Cost:
    """Runs side by side first, which is free; then each over as many devices as divide its batch, which is not."""
    at_once = min(work.runs, gpus)
    per_run = max(n for n in range(1, min(work.batch, gpus // at_once) + 1) if work.batch % n == 0)
    alone = work.steps * work.batch * step.device_seconds(efficiency) / 3600
    one_run = alone / (per_run * efficiency if per_run > 1 else 1)
    rounds = math.ceil(work.runs / at_once)
    return Cost(rounds * one_run, work.runs * one_run * per_run, per_run, at_once, gpus - at_once * per_run)


def known_step_times(records: Path = RECORDS) -> list[StepTime]:
    """The published one, those on a GPU (ViT-B) if there are any, that on a CPU if there is one."""
    found, gpu, own = [PUBLISHED], records / "benchmarks_gpu.json", records / "cost.json"
    if gpu.is_file():
        record = json.loads(gpu.read_text(encoding="utf-8"))
        points = [p for p in record["speed"]["points"] if p["width"] == "base" and p["way"] == "replayed"]
        for p in points:
            name = f"measured, {record['machine']['gpu']}, batch {p['batch']}"
            found.append(StepTime(name, p["batch"], 1, p["ms_per_step"] / 1000))
    if own.is_file():
        measured = json.loads(own.read_text(encoding="utf-8")).get("measured", {})
        found += [StepTime(**step) for step in measured.get("steps", [])]
    return found


def measured_here(images: int, precisions: list[str]) -> dict:
    """A late step of `voc` with ViT-B at 448 pixels, forward, backward and update, on this machine's CPU."""
    steps, cpu = [], torch.device("cpu")
    for precision in precisions:
        config = config_of("base", precision=precision)
        model = model_of(config, 20)
        batch, optimizer = (
            batch_of(model, config.data.crop_size, images),
            torch.optim.AdamW(model.parameters(), lr=0.0, fused=True),
        )
        began = time.monotonic()

        def step():
            autocast = autocast_of(config, cpu)
            with attention_of(model, config, cpu):
                total = objective(Step(model, batch, config, LATE, autocast=autocast)).total
                optimizer.zero_grad(set_to_none=True)
                total.backward()
            optimizer.step()

        seconds = [seconds_of(step) for _ in range(2)]  # the first one sets things up
        name = f"measured, CPU, {torch.get_num_threads()} thread, {precision}"
        steps.append(StepTime(name, images, 1, round(seconds[-1], 2))._asdict())
        print(steps[-1], f"({time.monotonic() - began:.0f} s)", flush=True)
    return {"machine": machine(), "steps": steps}


def rows_of(steps: list[StepTime], efficiency: float) -> list[dict]:
    """Every work, from every step time, on every number of devices."""
    rows = []
    for step in steps:
        for work in works():
            for gpus in GPUS:
                cost = cost_of(work, step, gpus, efficiency)
                numbers = {"hours": round(cost.hours, 2), "gpu_hours": round(cost.gpu_hours, 1)}
                rows.append({"work": work.name, "from": step.source, "gpus": gpus} | cost._asdict() | numbers)
    return rows


def table(rows: list[dict]) -> str:
    """Markdown."""
    lines = ["| work | step time from | devices | hours | device hours | spread |", "|---" * 6 + "|"]
    for r in rows:
        spread = f"{r['runs_at_once']} at once, {r['gpus_per_run']} each" + (f", {r['idle']} idle" if r["idle"] else "")
        lines.append(
            f"| {r['work']} | {r['from']} | {r['gpus']} | {r['hours']:.1f} | {r['gpu_hours']:.1f} | {spread} |"
        )
    return "\n".join(lines)


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", action="store_true", help="measure a step on this machine's CPU first")
    parser.add_argument("--images", type=int, default=1, help="of the measured step")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--efficiency", type=float, default=EFFICIENCY, help="ASSUMED for one run on several GPUs")
    args = parser.parse_args(argv)
    if not 0 < args.efficiency <= 1:
        parser.error(f"--efficiency {args.efficiency}: numbers above 0, at most 1, are allowed")
    path, record = RECORDS / "cost.json", {}
    if args.measure:
        torch.set_num_threads(args.threads)
        record["measured"] = measured_here(args.images, args.precisions)
        write_whole(path, json.dumps(record) + "\n")
    elif path.is_file():
        record["measured"] = json.loads(path.read_text(encoding="utf-8")).get("measured", {})
    rows = rows_of(known_step_times(), args.efficiency)
    record |= {"question": __doc__.splitlines()[0], "assumed": {"efficiency": args.efficiency}, "rows": rows}
    write_whole(path, json.dumps(record, indent=1) + "\n")
    print(table(rows))
    print(f"assumed: {args.efficiency:.0%} efficiency where one run is spread over several GPUs; written: {path.name}")


if __name__ == "__main__":
    main()
