"""A run to look into: its checkpoint in its model, with its config and its data."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.data import TrainVal, open_data
from toco_core.errors import ToCoError
from toco_core.machine.device import resolve_device
from toco_core.machine.files import are_tensors, refuse_wrong_keys
from toco_core.model import ToCo, build_model, skeleton
from toco_core.runs.folder import Run
from toco_core.runs.shipped import named_run


class Opened(NamedTuple):
    """A run to look into: its model in evaluation mode, its config, its folder, its data."""

    model: ToCo
    config: TrainConfig
    run: Run
    data: TrainVal


def open_run(
    folder: Path | str,
    *,
    data: TrainVal | None = None,
    device: str = "auto",
    checkpoint: str = "last",
    teacher: bool = False,
) -> Opened:
    """A checkpoint in a run's folder, or of a shipped run by its name: the "last", the "best", or that of a kept step
    ("500"). Raises ToCoError where there is none, or it is of another layout, where its data set has other classes
    today, and where `data` are given that it was not trained on. What the run left out of its data, as broken, is left
    out.

    teacher: open the averaged network of a run with `teacher_momentum` instead."""
    run = named_run(folder)
    config, state = run.config(), run.load(checkpoint)
    if state is None:
        run.newest()  # without one there is no other
        kept = ", ".join(map(str, run.kept_steps())) or "no steps"
        raise ToCoError(f"{run.folder} has no checkpoint {checkpoint!r}: it has the last one and kept {kept}")
    if teacher and "teacher" not in state:
        raise ToCoError(f"{run.folder} has no teacher: its teacher_momentum is {config.schedule.teacher_momentum}")
    weights = state["teacher" if teacher else "model"]
    given, data = data is not None, data or _data_of(run, config)
    if not given:
        run.refuse_other_classes(data.train.class_names, data.train.root)
    wanted = skeleton(config.model, data.train.n_classes, affinity_blocks=config.affinity_blocks())
    refuse_other_model(wanted, weights, run, data)
    model = build_model(config, data.train.n_classes, pretrained=False)
    model.load_state_dict(weights)
    if given:
        run.refuse_other_data(data)
    return Opened(model.to(resolve_device(device)).eval(), config, run, data)


def _data_of(run: Run, config: TrainConfig) -> TrainVal:
    """The data set of a run, without the images that the run left out."""
    data, left_out = open_data(config.data), run.left_out()
    return data._replace(train=data.train.without(left_out), val=data.val.without(left_out)) if left_out else data


def load_model_state(model: ToCo, found: dict[str, Tensor], run: Run, data: TrainVal) -> None:
    """Raises ToCoError that says what differs, where a checkpoint is of other classes or of another model."""
    refuse_other_model(model, found, run, data)
    model.load_state_dict(found)


def refuse_other_model(model: ToCo, found: dict[str, Tensor], run: Run, data: TrainVal) -> None:
    """What `load_model_state` raises; the model may be a `skeleton`."""
    wanted, name = model.state_dict(), "classifier.weight"
    if not are_tensors(found):
        raise ToCoError(f"{run.folder}: the checkpoint holds no tensors by name")
    if name in found and found[name].ndim == 2 and len(found[name]) != len(wanted[name]):
        raise ToCoError(
            f"{run.folder}: the checkpoint is of a model for {len(found[name])} classes, but {data.train.root} has "
            f"{len(wanted[name])}: it needs the data set that it was trained on"
        )
    refuse_wrong_keys(f"{run.folder}: the checkpoint is of another model", found, wanted)
