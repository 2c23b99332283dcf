"""The models to look into, and what each of them can be asked.

A subject is a finished run, a checkpoint of the published release, or a pretrained backbone. Of the last, tokens and
attention can be seen; where its weights hold an ImageNet head, also maps of the classes that the head knows.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from toco_core.backbone import SHIPPED
from toco_core.config import ModelConfig, TrainConfig, override, photographs, tiny, voc
from toco_core.data import VOC_CLASSES
from toco_core.errors import ToCoError
from toco_core.machine.torchvision_shim import make_importable
from toco_core.model import ToCo
from toco_core.predict.class_maps import Classifier, open_classifier
from toco_core.predict.head import head_model
from toco_core.runs.folder import Run
from toco_core.runs.opened import Opened, open_run
from toco_core.runs.release import from_release

CLASSIFIER, AUXILIARY, DECODER, PROJECTION = "a classifier", "an auxiliary classifier", "a decoder", "a projection head"


@dataclass(frozen=True)
class Subject:
    """A model in evaluation mode. `has` tells which of its heads were trained; `class_names` has background first."""

    name: str
    model: ToCo
    config: TrainConfig
    class_names: tuple[str, ...]
    has: frozenset[str]
    head: Classifier | None = None  # of ImageNet, whose classes are ranked per image (`predict.head`)
    spec: str = ""  # what `open_subject` was given; the parameter of the notebook
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)  # one pass at a time


def of_run(opened: Opened, *, spec: str = "") -> Subject:
    """A run; a head whose loss had weight 0 counts as not there."""
    loss = opened.config.loss
    has = {CLASSIFIER: loss.cls, AUXILIARY: loss.aux_cls, DECODER: loss.seg, PROJECTION: loss.ctc}
    trained = frozenset(head for head, weight in has.items() if weight > 0)
    names = opened.data.train.class_names
    return Subject(opened.run.folder.name, opened.model, opened.config, names, trained, spec=spec)


def of_release(path: str | Path) -> Subject:
    """A checkpoint in the published release's layout, looked at as the release evaluates; VOC's classes where there
    are 20."""
    model = from_release(path).eval()
    config = override(voc(), layer=model.layer, dropped_border=True)
    names = VOC_CLASSES if model.n_classes == 20 else _numbered(model.n_classes)
    every = frozenset((CLASSIFIER, AUXILIARY, DECODER, PROJECTION))
    return Subject(Path(path).name, model, config, names, every, spec=str(path))


def of_backbone(backbone: str, *, weights: str | None = None, layer: int | None = None) -> Subject:
    """A pretrained backbone as it is: tokens and attention, no trained head."""
    recipe = tiny() if backbone in SHIPPED else photographs()
    config = override(recipe, backbone=backbone, weights=weights, attention_steps=0)  # without heads there is no CAM
    model = ToCo(ModelConfig(backbone=backbone, weights=weights, layer=1), n_classes=1).eval()
    layer = min(layer or config.model.layer, model.depth)
    model.layer = layer
    config = override(config, layer=layer)
    return Subject(f"{backbone} (pretrained)", model, config, ("background",), frozenset(), spec=backbone)


def of_head(backbone: str, *, weights: str | None = None) -> Subject:
    """A timm model with its own ImageNet head. Raises ToCoError where it has none."""
    classifier = open_classifier(backbone, weights=weights, device="cpu")
    model, config = head_model(classifier)
    names = ("background", *(f"rank {k}" for k in range(1, model.n_classes + 1)))
    return Subject(backbone, model, config, names, frozenset((CLASSIFIER,)), classifier, backbone)


def open_subject(spec: str | Path, *, weights: str | None = None) -> Subject:
    """A run's folder, a checkpoint file of the release, or the name of a backbone.

    Raises ToCoError where `spec` is none of them, with what is allowed.
    """
    path = Path(spec)
    if (path / "config.json").is_file():
        return of_run(open_run(path), spec=str(spec))
    if path.is_dir():
        raise ToCoError(f"model = {str(spec)!r} is a folder without config.json: not the folder of a run")
    if path.is_file():
        return of_release(path)
    if path.suffix in (".pth", ".pt", ".safetensors") or len(path.parts) > 1:
        raise ToCoError(f"model = {str(spec)!r} is not there: give a run's folder, a checkpoint file, or a backbone")
    if weights is None and (str(spec) in SHIPPED or str(spec).startswith("plain_vit")):
        return of_backbone(str(spec))
    if has_head(str(spec)):
        try:
            return of_head(str(spec), weights=weights)
        except ToCoError as error:
            if "has no head" not in str(error) and "head." not in str(error):
                raise
    return of_backbone(str(spec), weights=weights)


def has_head(backbone: str) -> bool:
    """Whether timm's weights of this name come with a head, as far as timm tells before they are there."""
    make_importable()
    import timm

    cfg = timm.models.get_pretrained_cfg(backbone) if timm.is_model(backbone.partition(".")[0]) else None
    return cfg is not None and cfg.num_classes > 0


def finished_runs(folder: str | Path) -> list[Path]:
    """The folders of finished runs in a folder, by name."""
    folder = Path(folder)
    found = [path for path in folder.iterdir() if (path / "config.json").is_file()] if folder.is_dir() else []
    return sorted(path for path in found if Run(path).finished and (path / "checkpoint.pt").is_file())


class Subjects:
    """Models by name, opened when they are first asked for."""

    def __init__(self):
        self._makers: dict[str, Callable[[], Subject]] = {}
        self._open: dict[str, Subject] = {}

    def add(self, subject: Subject | str, maker: Callable[[], Subject] | None = None) -> str:
        """An open model, or a name and how to open it; returns the name. What has the name already stays."""
        name = subject if isinstance(subject, str) else subject.name
        if name not in self._makers:
            self._makers[name] = maker or (lambda: subject)
        return name

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._makers)

    def get(self, name: str) -> Subject:
        """Raises ToCoError for an unknown name, and what `open_subject` raises."""
        if name not in self._makers:
            raise ToCoError(f"model = {name!r} is not known here: known are {', '.join(self.names)}")
        if name not in self._open:
            self._open[name] = self._makers[name]()
        return self._open[name]


def _numbered(n_classes: int) -> tuple[str, ...]:
    return ("background", *(f"class {k}" for k in range(1, n_classes + 1)))
