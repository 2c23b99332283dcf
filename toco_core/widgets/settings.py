"""What is shown of an image, as one frozen record that refuses impossible values, and as a line for papermill."""

import functools
import numbers
import shlex
from dataclasses import dataclass, fields, replace
from typing import Any

from toco_core.config import Config, LabelConfig, TrainConfig, did_you_mean, option
from toco_core.errors import ToCoError

SHOWN = ("image", "CAM", "CAM label", "seed label", "pseudo label", "vote", "segmentation", "ground truth")
LABELS = SHOWN[2:]  # what can be scored against ground truth, or is it
ARRANGEMENTS = ("side by side", "one", "curtain")
VIEWS = ("image", "CAM", "pseudo label", "ground truth")  # side by side to begin with
CAMS = ("final", "auxiliary", "block")
CLASS_CHOICES = ("labelled", "predicted", "all", "none")
MAP_FIELDS = ("cam", "block", "cam_scales", "flip")
LABEL_FIELDS = {
    "image": (),
    "CAM": MAP_FIELDS,
    "CAM label": (*MAP_FIELDS, "beta"),
    "seed label": (*MAP_FIELDS, "beta_l", "beta_h"),
    "pseudo label": (*MAP_FIELDS, "beta_l", "beta_h", "par_iterations", "par_dilations", "par_scale"),
    "vote": ("cam_scales", "flip", "beta", "par_iterations", "par_dilations", "par_scale"),
    "segmentation": ("crf",),
    "ground truth": (),
}  # what each view is made by


@dataclass(frozen=True, kw_only=True)
class Settings(Config):
    """What is shown of an image, and by which numbers. Fields of the same name as in `LabelConfig` mean the same."""

    show: str = option("CAM", "What is laid over the image.", one_of=SHOWN)
    cam: str = option(
        "final",
        """Which CAM is shown and becomes labels: final, auxiliary, or `block`: the final norm and classifier on the
        tokens of block `block`, as if that block were the last.""",
        one_of=CAMS,
    )
    block: int = option(12, "Block of the block CAM, of token similarity and of attention, from 1.", at_least=1)
    classes: str = option(
        "labelled", "Classes of CAM and labels: labelled, predicted, all, none, or names separated by commas."
    )
    strength: float = option(0.65, "Overlay: 0 shows the image only, 1 the overlay only.", at_least=0, at_most=1)
    class_colours: bool = option(
        True, "CAMs of several classes, each in the colour of its label; otherwise the strongest of them in one scale."
    )
    contours: bool = option(True, "Lines where the CAM crosses the two thresholds, or around each region of a label.")
    outline: bool = option(False, "A white line around the ground truth.")
    beta: float = option(0.5, "Threshold of the CAM label, with which a CAM is scored.", at_least=0, at_most=1)
    beta_l: float = option(0.25, "CAM at most this: background.", at_least=0, at_most=1)
    beta_h: float = option(0.7, "CAM at least this: foreground; uncertain between the two.", at_least=0, at_most=1)
    par_iterations: int = option(10, "Iterations of PAR.", at_least=0, at_most=50)
    par_dilations: tuple[int, ...] = option(
        (1, 2, 4, 8, 12, 24), "Distances of PAR's neighbours.", at_least=1, at_most=10000
    )
    par_scale: float = option(0.5, "PAR refines at this fraction of the size.", above=0, at_most=1)
    cam_scales: tuple[float, ...] = option((1.0,), "Image scales over which CAM is summed.", above=0, at_most=16)
    flip: bool = option(True, "CAM also of the mirrored image.")
    crf: bool = option(False, "Segmentation through the dense CRF.")
    head: int = option(0, "Attention head, from 1; 0: the mean of all.", at_least=0)
    crop_size: int = option(32, "Side of a local view in pixels of the model's image.", at_least=8, at_most=16384)
    n_crops: int = option(4, "Local views to sample.", at_least=0, at_most=32)
    crop_seed: int = option(0, "Seed of the sampled views.", at_least=0, at_most=9 * 10**12)

    def check(self):
        if self.beta_l >= self.beta_h:
            raise ToCoError(f"beta_l = {self.beta_l:g} must be below beta_h = {self.beta_h:g}")
        if not self.classes.strip():
            raise ToCoError(f"classes = '' is not allowed: {', '.join(CLASS_CHOICES)}, or names separated by commas")


def fields_seen(settings: Settings) -> tuple[str, ...]:
    """The settings that change the picture of what is shown, beside classes and outline."""
    found = LABEL_FIELDS[settings.show]
    if settings.show == "CAM":
        found += ("strength", "contours", "class_colours", *(("beta_l", "beta_h") if settings.contours else ()))
    elif settings.show in LABELS:
        found += ("strength", "contours")
    return tuple(name for name in found if name != "block" or settings.cam == "block")


def settings_of(config: TrainConfig, depth: int) -> Settings:
    """What a model was trained with, as settings to begin with."""
    known = {f.name for f in fields(Settings)}
    shared = {f.name: getattr(config.labels, f.name) for f in fields(LabelConfig) if f.name in known}
    crops = {"crop_size": config.crops.local_size, "n_crops": config.crops.n_local or 4}
    return Settings(**shared, **crops, block=depth)


@functools.lru_cache(maxsize=64)
def showing(settings: Settings, show: str) -> Settings:
    """The same with another `show`; kept, as every tile of every picture asks for it."""
    return replace(settings, show=show)


def within(settings: Settings, depth: int) -> Settings:
    """The same for a model with `depth` blocks: a block beyond them comes down."""
    return replace(settings, block=min(settings.block, depth))


def changed(settings: Settings, **values: Any) -> Settings:
    """A copy with some fields changed; texts of numbers separated by commas become tuples.

    A threshold that is moved past the other one pushes it along. Raises ToCoError for unknown names and wrong values.
    """
    known = {f.name: f for f in fields(Settings)}
    now = {name: getattr(settings, name) for name in known}
    for name, value in values.items():
        if name not in known:
            raise ToCoError(f"there is no setting {name!r}{did_you_mean(name, known)}")
        wants_several = isinstance(now[name], tuple) and not isinstance(value, (tuple, list))
        now[name] = _numbers(name, str(value)) if wants_several else value
    for name in ("beta_l", "beta_h"):
        if not isinstance(now[name], numbers.Real) or not 0 <= now[name] <= 1:
            raise ToCoError(f"{name} = {now[name]!r:.60} is not allowed: a number from 0 to 1 is wanted")
    if "beta_l" in values and "beta_h" not in values and now["beta_l"] >= now["beta_h"]:
        now["beta_h"] = min(1.0, round(now["beta_l"] + 0.01, 2))
        now["beta_l"] = min(now["beta_l"], 0.99)
    if "beta_h" in values and "beta_l" not in values and now["beta_l"] >= now["beta_h"]:
        now["beta_l"] = max(0.0, round(now["beta_h"] - 0.01, 2))
        now["beta_h"] = max(now["beta_h"], 0.01)
    return Settings(**now)


def differences(settings: Settings, start: Settings) -> dict[str, Any]:
    """The fields in which `settings` differ from `start`: `changed(start, **these)` is `settings` again."""
    values = {f.name: getattr(settings, f.name) for f in fields(Settings)}
    return {name: value for name, value in values.items() if value != getattr(start, name)}


def papermill_line(notebook: str, parameters: dict[str, Any]) -> str:
    """The command that runs the notebook with these parameters; values are quoted for a Unix shell."""
    words = ["papermill", notebook, "out.ipynb"]
    for name, value in parameters.items():
        raw = isinstance(value, str) and _looks_like_a_number(value)  # 2007_000033 is a name, and one for Python
        words += ["-r" if raw else "-p", name, shlex.quote(_text(value))]
    return " ".join(words)


def _looks_like_a_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text in ("True", "False", "None")
    return True


def _text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in value) + ("," if len(value) == 1 else "")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _numbers(name: str, text: str) -> tuple:
    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        raise ToCoError(f"{name} = {text!r} is not allowed: numbers separated by commas") from None
    return tuple(int(v) if name == "par_dilations" and v.is_integer() else v for v in values)
