"""The models to look into, and what each of them can be asked.

A subject is a finished run, what `toco share` or `toco second` wrote, a checkpoint of the published release, or a
pretrained backbone. Of the last, tokens and attention can be seen; where its weights hold an ImageNet head, also maps
of the classes that the head knows.
"""

import os
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from toco_core.backbone import SHIPPED
from toco_core.config import ModelConfig, TrainConfig, override, photographs, tiny, voc
from toco_core.data import VOC_CLASSES
from toco_core.errors import ToCoError
from toco_core.machine.torchvision_shim import make_importable
from toco_core.model import ToCo
from toco_core.predict.class_maps import Classifier, open_classifier
from toco_core.predict.head import head_model
from toco_core.predict.models import open_model
from toco_core.runs.folder import Run
from toco_core.runs.opened import Opened, open_run
from toco_core.runs.packed import MODEL
from toco_core.runs.release import from_release
from toco_core.runs.shipped import named_run

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
    origin: tuple = ()  # `origin_of` it; empty where it was made by hand
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False)  # one pass at a time


def of_run(opened: Opened, *, spec: str = "") -> Subject:
    """A run; a head whose loss had weight 0 counts as not there."""
    names, folder, has = opened.data.train.class_names, opened.run.folder, trained_heads(opened.config)
    return Subject(folder.name, opened.model, opened.config, names, has, spec=spec, origin=origin_of(folder))


def of_shared(folder: str | Path) -> Subject:
    """A folder that `toco share` or `toco second` wrote."""
    name, model, config, names, _ = open_model(folder)
    return Subject(name, model, config, names, trained_heads(config), spec=str(folder), origin=origin_of(folder))


def trained_heads(config: TrainConfig) -> frozenset[str]:
    """The heads whose loss has a weight."""
    loss = config.loss
    weights = {CLASSIFIER: loss.cls, AUXILIARY: loss.aux_cls, DECODER: loss.seg, PROJECTION: loss.ctc}
    return frozenset(head for head, weight in weights.items() if weight > 0)


def of_release(path: str | Path) -> Subject:
    """A checkpoint in the published release's layout, looked at as the release evaluates; VOC's classes where there
    are 20."""
    model = from_release(path).eval()
    config = override(voc(), layer=model.layer, dropped_border=True)
    names = VOC_CLASSES if model.n_classes == 20 else _numbered(model.n_classes)
    every = frozenset((CLASSIFIER, AUXILIARY, DECODER, PROJECTION))
    return Subject(Path(path).name, model, config, names, every, spec=str(path), origin=origin_of(path))


def of_backbone(backbone: str, *, weights: str | None = None, layer: int | None = None) -> Subject:
    """A pretrained backbone as it is: tokens and attention, no trained head."""
    recipe = tiny() if backbone in SHIPPED else photographs()
    config = override(recipe, backbone=backbone, weights=weights, attention_steps=0)  # without heads there is no CAM
    model = ToCo(ModelConfig(backbone=backbone, weights=weights, layer=1), n_classes=1).eval()
    layer = min(layer or config.model.layer, model.depth)
    model.layer = layer
    config = override(config, layer=layer)
    name, origin = f"{backbone} (pretrained)", origin_of(backbone, weights)
    return Subject(name, model, config, ("background",), frozenset(), spec=backbone, origin=origin)


def of_head(backbone: str, *, weights: str | None = None) -> Subject:
    """A timm model with its own ImageNet head. Raises ToCoError where it has none."""
    classifier = open_classifier(backbone, weights=weights, device="cpu")
    model, config = head_model(classifier)
    names = ("background", *(f"rank {k}" for k in range(1, model.n_classes + 1)))
    known, origin = frozenset((CLASSIFIER,)), origin_of(backbone, weights)
    return Subject(backbone, model, config, names, known, classifier, backbone, origin)


def open_subject(spec: str | Path, *, weights: str | None = None) -> Subject:
    """A run's folder, one of `toco share` or `toco second`, a checkpoint file of the release, or the name of a shipped
    run or of a backbone.

    Raises ToCoError where `spec` is none of them, with what is allowed.
    """
    path = named_run(spec).folder
    if (path / "config.json").is_file():
        return of_run(open_run(path), spec=str(spec)) if Run(path).begun else of_shared(path)
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


def origin_of(spec: str | Path, weights: str | Path | None = None) -> tuple[str, str, tuple[int, ...]]:
    """Tell one model from another: its place or name, its file of weights, and when its files were written."""
    spec, weights = str(named_run(spec).folder), str(weights or "")
    files = [spec, *(os.path.join(spec, name) for name in ("checkpoint.pt", MODEL)), weights]
    written = tuple(os.stat(file).st_mtime_ns for file in files if os.path.isfile(file))
    return os.path.realpath(spec) if os.path.exists(spec) else spec, weights, written


def own_name(name: str, folder: str, taken: Collection[str]) -> str:
    """The name; where it is taken with its folder's behind it, or with a number."""
    numbered = (f"{name} ({number})" for number in range(2, len(taken) + 3))
    return next(free for free in (name, *([f"{name} ({folder})"] if folder else []), *numbered) if free not in taken)


class Subjects:
    """Models by name, opened when they are first asked for."""

    def __init__(self):
        self._makers: dict[str, Callable[[], Subject]] = {}
        self._open: dict[str, Subject] = {}
        self._origins: dict[str, tuple] = {}

    def add(self, subject: Subject | str, maker: Callable[[], Subject] | None = None) -> str:
        """An open model, or a name and how to open it; returns the name that it has here. A model that is there stays,
        another one of the same name gets a name of its own.

        What a maker opens is its argument's default, as in `lambda spec=spec: open_subject(spec)`, else the name.
        """
        if isinstance(subject, str):
            name, origin = subject, origin_of(next(iter(maker.__defaults__ or ()), subject))
        else:
            name, origin, maker = subject.name, subject.origin, lambda: subject
        if name in self._makers:
            known = [other for other in self._makers if origin and self._origin(other) == origin]
            if known or self._open.get(name) is subject:
                return (known or [name])[0]
            place = Path(origin[0] if origin else "")
            elsewhere = place.is_absolute() and self._origin(name)[:1] != origin[:1]
            name = own_name(name, place.parent.name if elsewhere else "", self._makers)
            maker = partial(_renamed, maker, name)
        self._makers[name], self._origins[name] = maker, origin
        if isinstance(subject, Subject):
            self.get(name)
        return name

    def find(self, spec: str) -> str:
        """The name of the model that `spec` opens; where none is known to, `spec` as a name or its last part."""
        place, last = origin_of(spec)[:1], Path(spec).name
        for name in self._makers:
            if self._origin(name)[:1] == place:
                return name
        alike = [name for name in self._makers if name == last or name.startswith(f"{last} (")]
        for name in alike if len(alike) > 1 else ():  # what they are is known once they are open
            if self.get(name).origin[:1] == place:
                return name
        return spec if spec in self._makers else last

    def _origin(self, name: str) -> tuple:
        return self._open[name].origin if name in self._open else self._origins[name]

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


def _renamed(maker: Callable[[], Subject], name: str) -> Subject:
    return replace(maker(), name=name)


def _numbered(n_classes: int) -> tuple[str, ...]:
    return ("background", *(f"class {k}" for k in range(1, n_classes + 1)))
