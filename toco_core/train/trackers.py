"""Send the numbers and pictures of a run to a tracker while it trains: `log_to` of the config.

| `log_to`      | Where it goes, how it is seen |
|---------------|-------------------------------|
| `tensorboard` | event files in the run's folder; `tensorboard --logdir runs` |
| `trackio`     | its store on this machine; `trackio show --project toco_core` |

Tags: `loss/<term>`, `rate/<group of parameters>`, `val/<score>`, and at each validation `picture/<image>`: the image,
its final CAM, pseudo label and segmentation side by side. Steps are those of the run's log. A resumed run continues its
curves; what was logged before a tracker was asked for is sent when it is.
"""

import functools
import importlib
from collections.abc import Mapping
from numbers import Real
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import look
from toco_core.runs.folder import Run, write_whole

PROJECT = "toco_core"
PICTURES = 4
"""Validation images that are shown, evenly spaced over the split."""


class NoTracker:
    """Log nothing; the trackers override what they send."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log numbers by tag."""

    def picture(self, step: int, tag: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        """Log an RGB picture."""

    def close(self, *, whole: bool = True) -> None:
        """Write what is left and end. `whole`: nothing more belongs to the last step."""


class TensorBoard(NoTracker):
    """Write event files into `<run>/tensorboard`."""

    def __init__(self, run: Run, config: TrainConfig, start: int):
        """`start`: the run's next step. TensorBoard drops events of this and later steps: they are logged again."""
        self.make_writer = required("tensorboard").SummaryWriter
        self.folder, self.start = run.folder / "tensorboard", start
        if not any(self.folder.glob("events.*")):
            _send_earlier(self, run)

    @functools.cached_property
    def writer(self):
        """The writer; a run that logs nothing more gets no new file."""
        return self.make_writer(str(self.folder), purge_step=self.start)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    def picture(self, step: int, tag: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self.writer.add_image(tag, picture, step, dataformats="HWC")

    def close(self, *, whole: bool = True) -> None:
        if "writer" in self.__dict__:
            self.writer.close()


class Trackio(NoTracker):
    """Write to trackio's store on this machine, in a run called as the run's folder.

    The store takes nothing back. `<run>/trackio.txt` has the last step that was sent whole; a resumed run, which
    repeats the steps since its checkpoint bit for bit, sends later ones.
    """

    def __init__(self, run: Run, config: TrainConfig, start: int):
        """`start`: the run's next step; 0 begins a new run in the store."""
        self.trackio = required("trackio")
        self.run, self.config, self.file = run, config, run.folder / "trackio.txt"
        if start == 0:
            self.file.unlink(missing_ok=True)
        self.sent = self.step = int(self.file.read_text()) if self.file.is_file() else -1
        if self.sent < 0:
            _send_earlier(self, run)

    @functools.cached_property
    def opened(self):
        """The run in the store; a run that logs nothing more does not open it."""
        return self.trackio.init(
            project=PROJECT,
            name=self.run.folder.name,
            config=self.config.to_dict(),
            resume="allow" if self.sent >= 0 else "never",
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._send(step, dict(values))

    def picture(self, step: int, tag: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self._send(step, {tag: self.trackio.Image(picture)})

    def close(self, *, whole: bool = True) -> None:
        if "opened" in self.__dict__:
            self.opened.finish()
            write_whole(self.file, str(self.step if whole else self.step - 1))

    def _send(self, step: int, values: dict) -> None:
        if step <= self.sent:
            return
        if step > self.step >= 0:
            write_whole(self.file, str(self.step))
        self.step = step
        self.opened.log(values, step=step)


TRACKERS = {"tensorboard": TensorBoard, "trackio": Trackio}
_MODULES = {"tensorboard": "torch.utils.tensorboard", "trackio": "trackio"}


def open_tracker(config: TrainConfig, run: Run, start: int) -> NoTracker:
    """Open the tracker that `config.log_to` names, for a run whose next step is `start`."""
    return TRACKERS[config.log_to](run, config, start) if config.log_to else NoTracker()


def required(name: str) -> ModuleType | None:
    """Import the package of a tracker; None for no tracker. Raises ToCoError where it is not installed."""
    try:
        return importlib.import_module(_MODULES[name]) if name else None
    except ImportError as error:
        raise ToCoError(f"log_to = {name!r} needs the package {name}: pip install {name}") from error


def _send_earlier(tracker: NoTracker, run: Run) -> None:
    for record in run.records():
        tracker.log(record["step"], tagged(record))


def tagged(record: Mapping[str, Any]) -> dict[str, float]:
    """Give each number of a record of the run's log its tag: `loss/...` beside a "total", `val/...` otherwise."""
    group = "loss" if "total" in record else "val"
    numbers = {name: value for name, value in record.items() if name != "step" and isinstance(value, Real)}
    return {f"{group}/{name}": float(value) for name, value in numbers.items()}


def validation_pictures(model, source, config: TrainConfig) -> dict[str, UInt8[np.ndarray, "H W 3"]]:
    """Return tag -> image, final CAM, pseudo label and segmentation side by side, for `PICTURES` images of a split."""
    from toco_core import viz  # matplotlib takes a while to load

    found = {}
    for index in sorted({int(i) for i in np.linspace(0, len(source) - 1, PICTURES)}):
        with model.evaluating():
            seen = look(model, source, index, config)
        cam = np.rint(255 * viz.overlay(seen.image, seen.cam)).astype(np.uint8)
        labels = (viz.label_colours(seen.pseudo_label), viz.label_colours(seen.segmentation))
        found[f"picture/{seen.name}"] = np.concatenate([seen.image, cam, *labels], axis=1)
    return found
