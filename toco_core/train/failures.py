"""A training step whose loss was not finite, brought back from its run's folder: to look into, in a notebook.

failure = load_failure(run.folder)
print(failure.message)
found = replay(failure)                         # found.objective.terms, found.step.pseudo_label, ...
replay(failure, config=override(failure.config, precision="fp32", ptc=0.0))
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from toco_core.config import TrainConfig
from toco_core.data import Batch
from toco_core.errors import ToCoError
from toco_core.machine.files import are_tensors, refuse_wrong_keys
from toco_core.model import ToCo, build_model, skeleton
from toco_core.objective import TERMS, Objective, Step, Term, crop_generator, objective
from toco_core.runs.folder import Run, read_state
from toco_core.train.loop import (
    attention_of,
    autocast_of,
    resolve_device,
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
        model = build_model(config, batch.image_labels.shape[1], pretrained=False)
        model.load_state_dict(state["model"])
    except ToCoError:
        raise
    except Exception as error:  # noqa: BLE001  what a foreign file holds may fail anywhere
        raise ToCoError(f"{path} cannot be read as a failed step: {type(error).__name__}: {error}") from error
    return Failure(model.train(), config, state["step"], batch, state["message"])


class Replay(NamedTuple):
    """A step computed again."""

    step: Step
    """Tokens, CAMs and labels, as they are asked for."""
    objective: Objective


def replay(
    failure: Failure,
    *,
    config: TrainConfig | None = None,
    device: str | None = None,
    terms: Mapping[str, Term] = TERMS,
) -> Replay:
    """The failed step again, with its graph: the same images, weights and random numbers; nothing is changed.

    The batch is computed in one piece, also where the run cuts it into parts (`accumulate`): that rounds otherwise, and
    needs the memory. device="cpu" helps where it is short.

    `config`: another one, to find out what helps. `device`: another one than the config's. `terms`: those of the run.
    """
    config = config or failure.config
    device = resolve_device(device or config.device)
    model = failure.model.to(device)
    batch, generator = to_device(failure.batch, model, device), crop_generator(config, failure.step)
    with attention_of(model, config, device):
        autocast = autocast_of(config, device)
        step = Step(model, batch, config, failure.step, terms=terms, generator=generator, autocast=autocast)
        return Replay(step, objective(step))


def is_finite(found: Replay) -> dict[str, bool]:
    """Whether the total and each term of a step is finite."""
    values = {"total": found.objective.total, **found.objective.terms}
    return {name: bool(torch.isfinite(value)) for name, value in values.items()}
