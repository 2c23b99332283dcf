"""Open a model by one word, without the data set that it was trained on.

runs/<run>               a run's folder
full                     a run that comes with the package (`runs.shipped`)
my_model                 a folder that `toco share` or `toco second` wrote
official.pth             a checkpoint of the published release
"""

from pathlib import Path
from typing import NamedTuple

from toco_core.config import TrainConfig, override, voc
from toco_core.data import VOC_CLASSES, open_data
from toco_core.data.split import class_names_of
from toco_core.errors import ToCoError
from toco_core.machine.device import resolve_device
from toco_core.model import ToCo, loaded_model
from toco_core.runs.folder import Run
from toco_core.runs.hub import from_pretrained
from toco_core.runs.release import from_release
from toco_core.runs.shipped import named_run, shipped_runs


class NamedModel(NamedTuple):
    """A model in evaluation mode, the config that it was trained with, and the names of its classes."""

    name: str
    model: ToCo
    config: TrainConfig
    class_names: tuple[str, ...]
    """Background first."""
    step: int | None = None
    """Steps of training that are in the weights, where a run tells."""


def open_model(name: str | Path, *, device: str = "auto") -> NamedModel:
    """Open a run's folder, a shipped run, a folder of `toco share`, or a checkpoint of the release.

    Raises ToCoError where `name` is none of them, naming what is allowed, where its tensors are not its config's,
    and for a class whose name is no line of text.
    """
    opened = _opened(name)
    names = class_names_of(opened.class_names, f"run = {str(name)!r}")
    return opened._replace(model=opened.model.to(resolve_device(device)).eval(), class_names=names)


def is_model(name: str | Path) -> bool:
    """Whether `open_model` would look for a model here: a shipped run's name, a folder, or a file."""
    return str(name) in shipped_runs() or Path(name).exists()


def _opened(name: str | Path) -> NamedModel:
    path, run = Path(name), named_run(name)
    if run.begun:
        return _of_run(run)
    if (path / "config.json").is_file():
        found = from_pretrained(path)
        return NamedModel(path.resolve().name, *found)
    if path.is_file():
        model = from_release(path)
        names = VOC_CLASSES if model.n_classes == 20 else _numbered(model.n_classes)
        return NamedModel(path.name, model, override(voc(), layer=model.layer, dropped_border=True), names)
    shipped = ", ".join(shipped_runs()) or "none in this installation"
    what = "holds no config.json" if path.is_dir() else "is not there"
    raise ToCoError(
        f"run = {str(name)!r} {what}: allowed are a run's folder, a shipped run ({shipped}), a folder of `toco share`, "
        "and a checkpoint of the release"
    )


def _of_run(run: Run) -> NamedModel:
    """The last checkpoint of a run; its classes are in its manifest, else in its data set."""
    config, state = run.config(), run.newest()
    names = run.class_names() or open_data(config.data).train.class_names
    model = loaded_model(f"run = {str(run.folder)!r}", state["model"], config, len(names) - 1)
    return NamedModel(run.folder.resolve().name, model, config, names, state.get("step"))


def _numbered(n_classes: int) -> tuple[str, ...]:
    return ("background", *(f"class {k}" for k in range(1, n_classes + 1)))
