"""A laboratory of seconds: change a number, train, and watch what it does; every run stays in a table for comparison.

    laboratory = Laboratory(n_train=64, n_val=32)
    laboratory.run(ptc=0.5, steps=60)     # without a browser: the row
    laboratory                            # with one: sliders, a button, curves and pictures

Training runs in a thread, step by step, so that the kernel keeps answering; `Trials` holds what runs share.
"""

import atexit
import dataclasses
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
import numpy as np

from toco_core.analysis.trials import Frame, Trial, Trials
from toco_core.config import TrainConfig, field_sections
from toco_core.errors import ToCoError, in_a_line
from toco_core.viz import RUN_COLOURS, titled_row
from toco_core.widgets import draw
from toco_core.widgets.canvas import RowTable
from toco_core.widgets.markup import Markup, Panel, drawing, element

RANGES = {  # what sliders offer: lowest, highest, step; never beyond what the field allows
    "ptc": (0.0, 4.0, 0.25),
    "seg": (0.0, 0.5, 0.05),
    "beta_l": (0.0, 1.0, 0.05),
    "beta_h": (0.0, 1.0, 0.05),
    "lr": (-5.0, -2.0, 0.1),  # powers of ten
    "steps": (20, 120, 10),
}
FIELDS = ("ptc", "seg", "beta_l", "beta_h", "layer", "lr", "steps")
HEAD = ("run", "changed", "steps", "seconds", "frozen blocks: computed", "found")
HEAD += ("final CAM (at)", "auxiliary CAM (at)", "segmentation", "similarity of tokens")
BREATH = 0.005  # s after each step in which the kernel comes first
SIDE = 96  # pixels of a picture


class Laboratory(w.VBox):
    """`Trials` with sliders. `run` works without a browser; so do `start`, `stop` and `settle`, what the buttons do."""

    def __init__(self, trials: Trials | None = None, **options: Any):
        """`options` are those of `Trials` where none are given."""
        super().__init__()
        self.trials = Trials(**options) if trials is None else trials
        self.controls = _controls(self.trials)
        self.train, self.halt = _button("train", "with these values"), _button("stop", "after the step at hand")
        self.halt.disabled = True
        self.term = w.Dropdown(options=["total"], description="loss", layout=w.Layout(width="190px"))
        self.state, self.notes, self.curves, self.key = Panel(), Panel(), Panel(), Panel()
        self.picture = w.Image(format="jpeg", layout=w.Layout(max_width="100%", display="none"))
        self.table = RowTable(head=list(HEAD))
        self.chosen: Trial | None = None
        self.thread: threading.Thread | None = None
        self._stopped, self._busy, self._growing = threading.Event(), threading.Lock(), []
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        self.children = [
            w.HBox(list(self.controls.values()), layout=wrap),
            w.HBox([self.train, self.halt, self.state], layout=wrap),
            self.notes,
            w.HBox(
                [w.VBox([self.picture, self.key]), w.VBox([self.term, self.curves])],
                layout=w.Layout(flex_flow="row wrap"),
            ),
            self.table,
        ]
        self.add_class("toco-explorer")
        self.train.on_click(lambda _: self._do(lambda: self.start(**self.values())))
        self.halt.on_click(lambda _: self.stop())
        self.term.observe(lambda _: self._draw_curves(), "value")
        self.table.observe(lambda change: self._do(lambda: self.show(change["new"][0] + 1)), "wanted")
        for control in self.controls.values():
            control.observe(lambda _: self._do(lambda: self.trials.configured(**self.values())), "value")
        self.state.put(f"{len(self.trials.data.train)} training images, {len(self.trials.data.val)} to score")
        self._draw_curves()

    # ---- for Python

    def values(self) -> dict[str, Any]:
        """What the controls say, without what is as in the config of the trials."""
        now = {name: control.value for name, control in self.controls.items()}
        return {name: value for name, value in now.items() if value != _value(self.trials.config, name)}

    def run(self, **values: Any) -> Trial:
        """Train here and now, and return the row. Raises ToCoError for what cannot be, and while another run trains."""
        if not self._busy.acquire(blocking=False):
            raise ToCoError("a run is in progress: stop it, or wait until it is done")
        try:
            return self._run(values)
        finally:
            self._busy.release()

    def start(self, **values: Any) -> None:
        """The same in a thread; `settle` waits for it. Raises ToCoError before anything is begun."""
        self.trials.configured(**values)
        if not self._busy.acquire(blocking=False):
            raise ToCoError("a run is in progress: stop it, or wait until it is done")
        self.train.disabled, self.halt.disabled = True, False
        self.thread = threading.Thread(target=self._run_behind, args=(values,), name="laboratory", daemon=True)
        atexit.register(self._end)  # a step must not outlive the interpreter
        self.thread.start()

    def stop(self) -> None:
        """End after the step at hand, and score what is there; returns at once."""
        self._stopped.set()

    def settle(self, timeout: float = 600.0) -> None:
        """Wait until the run is done."""
        if self.thread:
            self.thread.join(timeout)

    def show(self, number: int) -> None:
        """The pictures of a run that is done, by its number from 1."""
        known = self.trials.done
        if not 1 <= number <= len(known):
            raise ToCoError(f"run = {number} is not allowed: 1..{len(known)}")
        self.chosen = known[number - 1]
        self.table.chosen = number - 1
        self._draw_frame(self.chosen.frame)
        self._draw_curves()

    def __repr__(self) -> str:
        return "\n".join([" | ".join(HEAD), *(" | ".join(row_texts(trial)) for trial in self.trials.done)])

    def _repr_mimebundle_(self, **kwargs):
        bundle = super()._repr_mimebundle_(**kwargs) or {}
        data, metadata = bundle if isinstance(bundle, tuple) else (bundle, {})
        return {**data, "text/plain": repr(self)}, metadata

    # ---- within

    def _do(self, action: Callable[[], None]) -> None:
        """Run an action of the reader's; what is refused is told in the widget."""
        try:
            action()
            told = ""
        except ToCoError as error:
            told = str(error)
        self._tell(told)

    def _tell(self, text: str) -> None:
        self.notes.put(element("div", text, class_="toco-notes", role="status") if text else Markup())

    def _run(self, values: dict[str, Any]) -> Trial:
        self._stopped.clear()
        began, kept = time.perf_counter(), self.trials.kept
        steps, number = self.trials.configured(**values).schedule.steps, len(self.trials.done) + 1
        self._growing = []
        self.state.put(f"run {number}: tokens of the frozen blocks, and the warm start ...")

        def note(record: dict) -> None:
            self._growing.append(record)
            words = f"run {number}: step {record['step'] + 1} of {steps}, {time.perf_counter() - began:.0f} s; frozen "
            self.state.put(f"{words} blocks of {kept.computed} pictures computed, found {kept.found} times")
            self._draw_curves()

        def stop() -> bool:
            if threading.current_thread() is self.thread:
                time.sleep(BREATH)
            return self._stopped.is_set()

        try:
            trial = self.trials.run(on_record=note, on_frame=self._draw_frame, stop=stop, **values)
        finally:
            self._growing = []
            self.state.put("")
        words = f"run {trial.number}: {trial.seconds:.1f} s; frozen blocks of {trial.computed} pictures computed"
        self.state.put(f"{words}, found {trial.found} times" + (", stopped" if trial.stopped else ""))
        self.table.colours = [colour(t.number) for t in self.trials.done]
        self.table.rows = [row_texts(t) for t in self.trials.done]
        self.show(trial.number)
        return trial

    def _run_behind(self, values: dict[str, Any]) -> None:
        try:
            self._do(lambda: self._run(values))
        except Exception as error:  # noqa: BLE001  a thread's error is told where its result would be
            self._tell(in_a_line(error))
        finally:
            atexit.unregister(self._end)
            self.train.disabled, self.halt.disabled = False, True
            self._busy.release()

    def _end(self) -> None:
        self.stop()
        self.thread.join()

    def _draw_frame(self, frame: Frame) -> None:
        picture = frame_picture(self.trials.shown, frame)
        self.picture.value = draw.encoded(picture)
        self.picture.width, self.picture.layout.display = str(picture.shape[1]), None
        names = self.trials.data.val.class_names
        present = sorted({int(k) + 1 for item in self.trials.shown for k in np.flatnonzero(item.image_labels[0])})
        self.key.put(draw.label_key({k: names[k] for k in present}, ignored=True))

    def _draw_curves(self) -> None:
        runs = [(trial.number, trial.records) for trial in self.trials.done]
        runs += [(len(runs) + 1, list(self._growing))] if self._growing else []
        terms = list(dict.fromkeys(name for _, records in runs for r in records for name in r if name != "step"))
        if terms and tuple(terms) != tuple(self.term.options):
            now = self.term.value
            self.term.options = terms
            self.term.value = now if now in terms else "total"
        chosen = self.chosen.number if self.chosen and not self._growing else len(runs)
        self.curves.put(loss_svg(runs, self.term.value, chosen=chosen))


def colour(number: int) -> str:
    """Of a run, from 1."""
    return RUN_COLOURS[(number - 1) % len(RUN_COLOURS)]


def row_texts(trial: Trial) -> list[str]:
    """One trial as texts under `HEAD`."""
    changed = ", ".join(f"{name} {_short(value)}" for name, value in trial.changed.items() if name != "steps")
    scores = trial.scores
    return [
        str(trial.number),
        changed or "nothing",
        f"{trial.steps}" + (f" of {trial.config.schedule.steps}" if trial.stopped else ""),
        f"{trial.seconds:.1f} s",
        str(trial.computed),
        str(trial.found),
        f"{scores['cam']:.1f} ({trial.beta:g})",
        f"{scores['aux_cam']:.1f} ({trial.aux_beta:g})",
        f"{scores['seg']:.1f}",
        f"{trial.token_similarity:.2f}",
    ]


def frame_picture(items: Sequence, frame: Frame) -> np.ndarray:
    """The shown images below each other: image, CAM, token label, segmentation and ground truth; uint8 RGB."""
    columns: dict[str, list[np.ndarray]] = {"image": [], "final CAM": [], "token label": [], "segmentation": []}
    size = (SIDE, SIDE)
    for b, item in enumerate(items):
        image = draw.enlarged(item.image[0].permute(1, 2, 0).numpy(), size)
        value = draw.resized(frame.cam[b], size, smooth=True)
        columns["image"].append(image)
        columns["final CAM"].append(draw.cam_picture(draw.ground(image), value, strength=0.65))
        labels = {"token label": frame.token_label[b], "segmentation": frame.segmentation[b]}
        labels |= {} if item.mask is None else {"ground truth": item.mask}
        for name, label in labels.items():
            shown = draw.resized(label, size)
            columns.setdefault(name, []).append(draw.label_picture(image, shown, strength=0.75))
    blank = np.full((*size, 3), 255, np.uint8)
    columns = {name: [*found, *[blank] * (len(items) - len(found))] for name, found in columns.items()}
    return titled_row(
        [
            np.vstack([np.pad(p, ((0, 4), (0, 0), (0, 0)), constant_values=255) for p in found])
            for found in columns.values()
        ],
        list(columns),
    )


def loss_svg(
    runs: Sequence[tuple[int, Sequence[dict]]], term: str, *, chosen: int, width: int = 310, height: int = 330
) -> Markup:
    """A loss against the step, one colour per run, the chosen run thick; takes the page's text colour, light or dark.

    runs: number and logged records.
    """
    left, right, top, bottom = 44, 12, 14, 40
    lines = {n: [(r["step"] + 1, r[term]) for r in records if r.get(term) is not None] for n, records in runs}
    points = [point for line in lines.values() for point in line] or [(1, 0.0), (60, 1.0)]
    most = max(step for step, _ in points)
    low, high = min(0.0, *(value for _, value in points)), max(1e-6, *(value for _, value in points))

    def place(step: float, value: float) -> tuple[str, str]:
        x = left + step / most * (width - left - right)
        return f"{x:.1f}", f"{top + (high - value) / (high - low) * (height - top - bottom):.1f}"

    parts = []
    for tick in np.linspace(low, high, 5):
        y = place(0, tick)[1]
        parts.append(element("line", x1=left, x2=width - right, y1=y, y2=y, stroke="currentColor", opacity=".15"))
        parts.append(element("text", f"{tick:.3g}", x=left - 6, y=float(y) + 4, text_anchor="end"))
    for tick in range(0, most + 1, max(10, -(-most // 60) * 10)):
        parts.append(element("text", str(tick), x=place(tick, low)[0], y=height - bottom + 15, text_anchor="middle"))
    for number, line in sorted(lines.items(), key=lambda pair: pair[0] == chosen):
        drawn = " ".join(",".join(place(*point)) for point in line)
        thick = 3 if number == chosen else 1.5
        parts.append(element("polyline", points=drawn, fill="none", stroke=colour(number), stroke_width=thick))
    below = f"step ({term}, thick: run {chosen})" if lines else "step"
    parts.append(element("text", below, x=(left + width - right) / 2, y=height - 8, text_anchor="middle"))
    return drawing(*parts, width=width, height=height, label=f"{term} loss of {len(lines)} runs")


def _value(config: TrainConfig, name: str) -> Any:
    section = field_sections()[name]
    return getattr(getattr(config, section) if section else config, name)


def _field(config: TrainConfig, name: str) -> dataclasses.Field:
    section = field_sections()[name]
    record = getattr(config, section) if section else config
    return next(f for f in dataclasses.fields(record) if f.name == name)


def _controls(trials: Trials) -> dict[str, w.Widget]:
    """A slider for each of `FIELDS`, that of `layer` over the trained blocks; the field's help is the tooltip.

    Each chooses among values, of which the config's is one: a slider of numbers is moved to its nearest step by the
    browser as soon as it is shown.
    """
    found = {}
    for name in FIELDS:
        field, value = _field(trials.config, name), _value(trials.config, name)
        if name == "layer":
            choices = range(min(trials.config.schedule.frozen_blocks + 1, value), trials.depth + 1)
        else:
            choices = _steps(name, field.metadata["allowed"])
        choices = sorted({*choices, value})
        found[name] = w.SelectionSlider(
            options=[(f"{v:.1e}", v) for v in choices] if name == "lr" else choices,
            value=value,
            description=name,
            tooltip=field.metadata["help"],
            layout=w.Layout(width="270px"),
            style={"description_width": "48px"},
        )
    return found


def _steps(name: str, allowed: dict[str, float]) -> list[float]:
    """The values of `RANGES` that a field allows, rounded as they are written."""
    low, high, step = RANGES[name]
    values = [low + i * step for i in range(round((high - low) / step) + 1)]
    if name == "lr":
        values = [float(f"{10**v:.1e}") for v in values]
    elif not isinstance(low, int):
        values = [round(v, 6) for v in values]
    return [v for v in values if allowed.get("at_least", v) <= v <= allowed.get("at_most", v)]


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _button(word: str, tip: str) -> w.Button:
    return w.Button(description=word, tooltip=tip, layout=w.Layout(width="auto"))
