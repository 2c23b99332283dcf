"""A training step whose loss was not finite, brought back from its run's folder: to look into, in a notebook.

failure = load_failure(run.folder)
print(failure.message)
result = replay(failure)                        # every loss and label of that step
replay(failure, config=override(failure.config, precision="fp32", ptc=0.0))
"""

import dataclasses
from pathlib import Path
from typing import NamedTuple

import torch

from toco_core.config import TrainConfig
from toco_core.data import Batch
from toco_core.errors import ToCoError
from toco_core.model import ToCo, are_tensors, refuse_wrong_keys, skeleton
from toco_core.runs.folder import Run, read_state
from toco_core.train.loop import (
    StepResult,
    attention_of,
    autocast_of,
    crop_generator,
    resolve_device,
    step_losses,
    to_device,
)


class Failure(NamedTuple):
    """The state in which a step failed: its model, in training mode and before the step, and its images."""

    model: ToCo
    config: TrainConfig
    step: int
    batch: Batch
    message: str
    """What was not finite, every term, the names of the images."""


def load_failure(run: Run | Path | str) -> Failure:
    """The failed step of a run, on the CPU. Loading it runs no code of the file's.

    Raises ToCoError where the run had none, or the file is damaged.
    """
    path = (run.folder if isinstance(run, Run) else Path(run)) / "failure.pt"
    if not path.is_file():
        raise ToCoError(f"{path.parent} has no failure.pt: no step of this run failed")
    state = read_state(path, ("step", "message", "config", "model", "batch", "names"))
    try:
        config, batch = TrainConfig.from_dict(state["config"]), Batch(names=tuple(state["names"]), **state["batch"])
        if not are_tensors(state["model"]):
            raise ToCoError(f"{path}: it holds no tensors by name")
        refuse_wrong_keys(str(path), state["model"], skeleton(config.model, batch.image_labels.shape[1]).state_dict())
        model = ToCo(
            dataclasses.replace(config.model, pretrained=False),
            batch.image_labels.shape[1],
            dropped_border=config.release.dropped_border,
        )
        model.load_state_dict(state["model"])
    except ToCoError:
        raise
    except Exception as error:  # noqa: BLE001  what a foreign file holds may fail anywhere
        raise ToCoError(f"{path} cannot be read as a failed step: {type(error).__name__}: {error}") from error
    return Failure(model.train(), config, state["step"], batch, state["message"])


def replay(failure: Failure, *, config: TrainConfig | None = None, device: str | None = None) -> StepResult:
    """The failed step again, with its graph: the same images, weights and random numbers; nothing is changed.

    The batch is computed in one piece, also where the run cuts it into parts (`accumulate`): that rounds otherwise, and
    needs the memory. device="cpu" helps where it is short.

    `config`: another one, to find out what helps. `device`: another one than the config's.
    """
    config = config or failure.config
    device = resolve_device(device or config.device)
    model = failure.model.to(device)
    with attention_of(model, config, device):
        return step_losses(
            model,
            to_device(failure.batch, model, device),
            config,
            config.loss.at(failure.step),
            step=failure.step,
            generator=crop_generator(config, failure.step),
            autocast=autocast_of(config, device),
        )


def is_finite(result: StepResult) -> dict[str, bool]:
    """Whether the total and each term of a step is finite."""
    return {name: bool(torch.isfinite(value)) for name, value in {"total": result.total, **result.terms}.items()}
