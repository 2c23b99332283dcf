"""Trained runs that come with the package: a notebook opens on one in seconds and shows the same numbers anywhere.

A shipped run is a run's folder without checkpoints: config, manifest, log, final numbers and scores, and beside them
`model.safetensors` with those tensors, in half precision, that differ from the shipped backbone's. A test holds every
one against its scores; `experiments/shipped_runs.py` trains and packs them.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.machine.writing import write_whole

from .folder import Run
from .packed import MODEL, backbone_state

FOLDER = Path(__file__).parent.parent / "trained"


def shipped_runs() -> dict[str, Run]:
    """Name -> run, of those that come with this installation."""
    return {path.parent.name: Run(path.parent) for path in sorted(FOLDER.glob(f"*/{MODEL}"))}


def named_run(name: Path | str) -> Run:
    """The run in a folder; where no run or model lies there, the shipped run of that name, if there is one."""
    run = Run(name)
    taken = run.begun or (run.folder / "config.json").is_file()
    return run if taken else shipped_runs().get(str(name), run)


def shipped_run(config: TrainConfig) -> Run | None:
    """The shipped run of a config, None where there is none; what moves no bit of a run does not count."""
    name = config.short_hash()
    return next((run for run in shipped_runs().values() if run.config().short_hash() == name), None)


def pack(run: Run, folder: Path) -> Run:
    """Copy a finished run to `folder` in the form in which runs are shipped. Raises ToCoError for an unfinished one."""
    if not run.finished:
        raise ToCoError(f"{run.folder} is not finished: only a finished run can be shipped")
    from safetensors.torch import save

    backbone, state = backbone_state(run.config()), run.newest()["model"]
    changed = {name: value for name, value in state.items() if not _equal(backbone.get(name), value)}
    folder.mkdir(parents=True, exist_ok=True)
    config = run.config().to_dict() | {"out_dir": TrainConfig().out_dir}  # not a path of the machine that trained it
    write_whole(folder / "config.json", json.dumps(config, indent=1) + "\n")
    for name in ("manifest.json", "metrics.json", "metrics.jsonl", "scores.json"):
        if (run.folder / name).is_file():
            write_whole(folder / name, (run.folder / name).read_text(encoding="utf-8"))
    write_whole(folder / MODEL, save({name: value.half().contiguous() for name, value in changed.items()}))
    return Run(folder)


def _equal(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and one.shape == other.shape and torch.equal(one, other.float())
