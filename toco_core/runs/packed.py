"""The weights of a shipped run: only what differs from the shipped backbone, in half precision."""

from pathlib import Path

from torch import Tensor

from toco_core.backbone import WEIGHTS_FOLDER
from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.machine.files import load_tensors, read_tensors

MODEL = "model.safetensors"


def packed_state(folder: Path, config: TrainConfig) -> dict:
    """What `Run.load` gives of a shipped run: the model in float32, and no optimizer."""
    changed = {name: value.float() for name, value in read_tensors(folder / MODEL, "run").items()}
    return {"model": backbone_state(config) | changed, "optimizer": {}, "step": config.schedule.steps}


def backbone_state(config: TrainConfig) -> dict[str, Tensor]:
    """The shipped backbone's tensors by their names in a model. Raises ToCoError for a config with another backbone."""
    path = WEIGHTS_FOLDER / f"{config.model.backbone}.safetensors"
    if config.model.weights or not config.model.pretrained or not path.is_file():
        raise ToCoError(f"backbone = {config.model.backbone!r} is not shipped: neither can runs on it be")
    return {f"encoder.{name}": value.float() for name, value in load_tensors(path).items()}
