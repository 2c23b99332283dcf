"""A step whose loss is not finite: found, kept in its run's folder, and brought back, to look into in a notebook.

failure = load_failure(run.folder)
print(failure.message)
found = replay(failure)                         # found.objective.terms, found.step.pseudo_label, ...
replay(failure, config=override(failure.config, precision="fp32", ptc=0.0))
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.data import Batch
from toco_core.errors import ToCoError
from toco_core.machine.device import resolve_device
from toco_core.machine.distributed import ALONE, Share
from toco_core.machine.precision import attention_of, autocast_of
from toco_core.model import ToCo, loaded_model
from toco_core.objective import TERMS, Objective, Step, Term
from toco_core.runs.folder import Run, read_state
from toco_core.train.backward import crop_generator
from toco_core.train.batches import to_device
from toco_core.train.rival import of_both, oppose


def not_finite(values: dict[str, Tensor], share: Share = ALONE) -> str:
    """ "the loss is nan", of the first whose mean over the processes is not finite; "" where all are.

    Here a step waits for the device, and, where it makes the dense energy's lattices, at its beginning. It must:
    whether the weights change, and whether the run goes on, hangs on the answer. All kernels of the step are queued by
    then, so that little more than the launch of the optimizer's is not hidden behind them.
    """
    found = share.numbers(values)
    return next((f"the {what} is {value}" for what, value in found.items() if not math.isfinite(value)), "")


def gradient_length(*models: ToCo) -> Tensor:
    """Euclidean length of all gradients together."""
    found = [p.grad for model in models for p in model.parameters() if p.grad is not None]
    return torch.nn.utils.get_total_norm(found)


def failed_step(
    fault: str,
    run: Run,
    model: ToCo,
    beside: Mapping[str, ToCo],
    parts: list[Batch],
    result: Objective,
    config: TrainConfig,
    step: int,
    share: Share,
) -> ToCoError:
    """Saves the step that failed, over all processes, and tells of it. `beside`: further networks by their names."""
    names = [name for part in parts for name in part.names]
    tensors = {name: torch.cat([getattr(part, name) for part in parts]) for name in Batch._fields if name != "names"}
    terms = share.numbers(result.terms)
    message = f"{fault} on step {step}: {terms}; images {', '.join(names)}"
    if share.first:
        run.save_failure(
            {
                "step": step,
                "message": message,
                "config": config.to_dict(),
                "model": model.state_dict(),
                **{name: network.state_dict() for name, network in beside.items()},
                "batch": tensors,
                "names": names,
            }
        )
    return ToCoError(f"{message}; failures.load_failure({str(run.folder)!r}) brings it back")


class Failure(NamedTuple):
    """The state in which a step failed: its model, in training mode and before the step, and its images."""

    model: ToCo
    config: TrainConfig
    step: int
    batch: Batch
    message: str
    """What was not finite, every term, the names of the images."""
    teacher: ToCo | None = None
    """The averaged network, where the config has one."""
    rival: ToCo | None = None
    """The second network, in training mode, where the config has one."""


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
        wanted = {"model": True, "teacher": config.schedule.teacher_momentum, "rival": config.loss.discrepancy}
        names, n_classes = [name for name, there in wanted.items() if there], batch.image_labels.shape[1]
        nets = {name: loaded_model(str(path), state.get(name), config, n_classes).train() for name in names}
    except ToCoError:
        raise
    except Exception as error:  # noqa: BLE001  what a foreign file holds may fail anywhere
        raise ToCoError(f"{path} cannot be read as a failed step: {type(error).__name__}: {error}") from error
    if "teacher" in nets:
        nets["teacher"].eval().requires_grad_(False)
    return Failure(config=config, step=state["step"], batch=batch, message=state["message"], **nets)


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
        options = {"terms": terms, "generator": generator, "autocast": autocast}
        teacher = None if failure.teacher is None else failure.teacher.to(device)
        step = Step(model, batch, config, failure.step, teacher=teacher, **options)
        if failure.rival is not None and config.loss.discrepancy:
            oppose([step], failure.rival.to(device))
        return Replay(step, of_both(step))
