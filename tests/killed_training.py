"""Trains a small run again and again in child processes that are killed; run by test_interruptions.py.

    python killed_training.py <data folder> <folder for runs> <number of kills> <seed>

Prints one JSON line: kills, those of them while a checkpoint was saved, those that left half a file, runs, and whether
each ended as the uninterrupted one.
"""

import io
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from small_config import small_recipe

from toco_core.config import override
from toco_core.model import build_model
from toco_core.runs import folder as runs
from toco_core.runs.folder import Run
from toco_core.train.loop import train

SMALL = {
    "backbone": "plain_vit(image=32, patch=8, width=32, depth=2, heads=2, mlp=64)", "pretrained": False, "layer": 1,
    "proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10, "decoder_width": 14, "par_iterations": 2,
    "par_dilations": (1, 2), "local_size": 16, "n_local": 2, "cam_scales": (1.0,), "crop_size": 32, "steps": 12,
    "warmup_steps": 1, "batch_size": 2, "lr": 1e-3, "eval_interval": 5, "log_interval": 1, "seg_start": 3,
    "energy_start": 3, "device": "cpu", "precision": "fp32", "val_split": "train",
}  # fmt: skip


def config_of(data: str, out_dir: Path):
    return override(small_recipe(), **SMALL, dataset=data, out_dir=str(out_dir))


def start(config, chance: random.Random | None = None) -> int:
    """A child process that trains; it inherits all imports. With `chance` it is killed while it saves."""
    child = os.fork()
    if not child:
        status = 1
        try:
            if chance:
                kill_while_saving(chance)
            train(config, progress=False, save_every=1, keep_every=4)
            status = 0
        finally:
            os._exit(status)
    return child


def kill_while_saving(chance: random.Random) -> None:
    """This process dies in one of the coming saves: in the middle of the file, or at one of the calls around it."""
    place, left = chance.choice(("file", "fsync", "replace", "link")), [chance.randrange(1, 8)]

    def dies(plain, half=None):
        def call(*args):
            left[0] -= 1
            if left[0]:
                return plain(*args)
            if half:
                half(*args)
            elif chance.random() < 0.5:
                plain(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        return call

    def half_of_the_file(state, file):
        whole = io.BytesIO()
        torch.save(state, whole)
        file.write(whole.getvalue()[: chance.randrange(len(whole.getvalue()))])
        file.flush()

    if place == "file":
        runs._save = dies(runs._save, half_of_the_file)
    else:
        setattr(os, place, dies(getattr(os, place)))


def killed(child: int, delay: float) -> bool:
    """Kill after `delay` seconds; False: it ended before."""
    time.sleep(delay)
    if os.waitpid(child, os.WNOHANG)[0]:
        return False
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def main() -> None:
    data, out_dir, wanted, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
    torch.set_num_threads(1)
    chance = random.Random(seed)
    whole = config_of(data, out_dir / "whole")
    build_model(whole, 3)  # imports here, once, what every child would import by itself
    began = time.monotonic()
    _, status = os.waitpid(start(whole), 0)
    assert status == 0, "the uninterrupted run failed"
    duration = time.monotonic() - began

    kills = saving = halves = rounds = 0
    equal = []
    while kills < wanted:
        rounds += 1
        config = config_of(data, out_dir / f"killed {rounds}")
        run = Run.of(config)
        for number in range(10):
            if number % 2:
                chance.random()  # another number for each child
                dead = os.WIFSIGNALED(os.waitpid(start(config, chance), 0)[1])
                saving += dead
            else:
                dead = killed(start(config), chance.random() * 0.5 * duration)
            if not dead:
                break
            kills += 1
            halves += bool(list(run.folder.glob("*.part")))
        _, status = os.waitpid(start(config), 0)
        assert status == 0, "the resumed run failed"
        equal.append(same(Run.of(whole), run))
    print(json.dumps({"kills": kills, "saving": saving, "halves": halves, "rounds": rounds, "equal": equal}))


def same(one: Run, other: Run) -> bool:
    """Weights, averages, log and final numbers, bit for bit; in every checkpoint."""
    for which in ("last", "best", "4", "8", "12"):
        a, b = one.load(which), other.load(which)
        if a["step"] != b["step"] or a["best"] != b["best"]:
            return False
        tensors = [(a["model"][name], b["model"][name]) for name in a["model"]]
        for number, values in a["optimizer"]["state"].items():
            tensors += [(value, b["optimizer"]["state"][number][name]) for name, value in values.items()]
        if not all(torch.equal(x, y) for x, y in tensors):
            return False
    return one.records() == other.records() and one.metrics() == other.metrics()


if __name__ == "__main__":
    main()
