"""The part of the explorer that changes settings: a control for each, the classes, and local views."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w

from toco_core.widgets import draw, report
from toco_core.widgets.canvas import Chips
from toco_core.widgets.markup import Panel, button
from toco_core.widgets.session import Session, Tile
from toco_core.widgets.settings import CAMS, CLASS_CHOICES, LABEL_FIELDS, MAP_FIELDS, SHOWN, Settings, fields_seen

MANY = 24  # classes; of more, chips show the most probable ones
SCALES = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
CLICKS = ("compares a patch", "places a crop")
WIDENED = ("par_iterations", "crop_size", "n_crops", "crop_seed")  # sliders that reach a value from elsewhere
ALWAYS = {"show", "block", "head", "crop_size", "n_crops", "crop_seed"}  # have an effect whatever is shown


class Controls:
    """`of["beta_h"]` is the control of a setting. `do(action)` runs an action of the reader's; after a change
    `on_change(tokens)` is called, with whether the maps of tokens change too."""

    def __init__(
        self,
        session: Session,
        do: Callable[[Callable[[], None]], None],
        *,
        fill: Callable[[], None],
        on_change: Callable[[bool], None],
    ):
        self.session, self._fill, self._on_change = session, fill, on_change
        full = {"layout": w.Layout(width="auto"), "style": {"description_width": "92px"}}
        slider = {**full, "continuous_update": True}
        small = {**slider, "style": {"description_width": "36px"}}
        unit = {"min": 0.0, "max": 1.0, "step": 0.01, "readout_format": ".2f", **slider}
        self.of: dict[str, w.Widget] = {
            "show": w.Dropdown(options=SHOWN, description="show", **full),
            "cam": w.Dropdown(options=CAMS, description="CAM", **full),
            "block": w.IntSlider(min=1, max=12, description="block", **slider),
            "strength": w.FloatSlider(description="overlay", **unit),
            "class_colours": w.Checkbox(description="each class in its colour", indent=False),
            "contours": w.Checkbox(description="contours", indent=False),
            "outline": w.Checkbox(description="outline of ground truth", indent=False),
            "beta_l": w.FloatSlider(description="beta_l", **unit),
            "beta_h": w.FloatSlider(description="beta_h", **unit),
            "beta": w.FloatSlider(description="beta (score)", **unit),
            "par_iterations": w.IntSlider(min=0, max=30, description="PAR iterations", **slider),
            "par_dilations": w.Text(description="PAR dilations", continuous_update=False, **full),
            "crf": w.Checkbox(description="segmentation through the dense CRF", indent=False),
            "cam_scales": w.SelectMultiple(options=SCALES, rows=4, description="scales", **full),
            "flip": w.Checkbox(description="also mirrored", indent=False),
            "head": w.IntSlider(min=0, max=12, description="head", **small),
            "crop_size": w.IntSlider(min=8, max=224, description="crop size", **slider),
            "n_crops": w.IntSlider(min=1, max=16, description="crops", **slider),
            "crop_seed": w.IntSlider(min=0, max=20, description="seed", **slider),
        }
        for field in dataclasses.fields(Settings):
            if field.name in self.of:
                self.of[field.name].tooltip = " ".join(field.metadata["help"].split())
        self.classes = Chips(label="classes of CAM and labels, with the classifier's probability")
        self.class_choice = w.Dropdown(options=[*CLASS_CHOICES, "chosen"], description="which", **full)
        self.class_names = w.SelectMultiple(rows=4, description="classes", **full)
        self.click_means = w.ToggleButtons(options=CLICKS, description="click", style={"button_width": "125px"})
        self.sample, self.clear = button("sample crops", "draw crops as in training"), button("clear", "no crops")
        self.crop_table = Panel()
        for name, control in self.of.items():
            control.observe(lambda change, name=name: do(lambda: self._change(name, change["new"])), "value")
        for widget, action in (
            (self.class_choice, self._choose_classes),
            (self.class_names, self._name_classes),
        ):
            widget.observe(lambda change, action=action: do(lambda: action(change["new"])), "value")
        self.classes.observe(lambda change: do(lambda: self._toggle_class(change["new"][0])), "toggled")
        self.sample.on_click(lambda _: do(self._sample))
        self.clear.on_click(lambda _: do(self._clear))

    def tabs(self) -> dict[str, list[w.Widget]]:
        """The controls by what they are for."""
        c, wrap = self.of, w.Layout(flex_flow="row wrap", align_items="center")
        both = w.HBox([c["contours"], c["outline"], c["class_colours"]], layout=wrap)
        sizes = [c["crop_size"], c["n_crops"], c["crop_seed"]]
        return {
            "look": [c["show"], c["cam"], c["block"], c["strength"], both, self.class_choice, self.class_names],
            "labels": [c["beta_l"], c["beta_h"], c["beta"], c["par_iterations"], c["par_dilations"], c["crf"]],
            "scales": [c["cam_scales"], c["flip"]],
            "crops": [self.click_means, *sizes, w.HBox([self.sample, self.clear], layout=wrap), self.crop_table],
        }

    # ---- controls follow the session

    def fill(self) -> None:
        """Set all to what the session says of its active side."""
        session = self.session
        side, subject = session.sides[session.active], session.subject(session.active)
        self.of["block"].max = subject.model.depth
        self.of["head"].max = subject.model.encoder.blocks[0].attn.num_heads
        self.of["crop_size"].max = min(session.analysis(session.active).images.shape[-2:])
        for name, control in self.of.items():
            value = getattr(side.settings, name)
            if name == "par_dilations":
                value = ", ".join(map(str, value))
            if name == "cam_scales":
                control.options = sorted({*control.options, *value})
            if name in WIDENED:
                control.min, control.max = min(control.min, value), max(control.max, value)
            if isinstance(control, w.FloatSlider):  # the browser moves a value that is no step to the nearest
                decimals = next((n for n in (2, 3) if round(value, n) == value), 4)
                control.step, control.readout_format = 10.0**-decimals, f".{decimals}f"
            control.value = value
        joint, classes = session.joint(session.active), side.settings.classes
        self.class_names.options = joint.names[1:]
        if classes in CLASS_CHOICES:
            self.class_choice.value = classes
            chosen, _ = session.classes(session.active)
            self.class_names.value = tuple(joint.names[joint.of_model[k]] for k in chosen)
        else:
            self.class_choice.value = "chosen"
            wanted = [name.strip() for name in classes.split(",")]
            self.class_names.value = tuple(name for name in joint.names[1:] if name in wanted)
        self._fill_classes()

    def disable(self, tiles: Sequence[Tile]) -> None:
        """Disable those that change nothing of what is shown; crops are drawn from the CAM, whatever is shown."""
        session = self.session
        sides = range(len(session.sides)) if session.linked else [session.active]
        seen = {n for t in tiles if t.side in sides for n in fields_seen(session.settings(t.side, t.show))}
        if session.crops(session.active)[0]:
            seen |= {*MAP_FIELDS, "beta_l", "beta_h"}
        shown = {session.sides[side].settings.show for side in sides}
        if session.picture.mask is not None and shown & {"image", "CAM", "CAM label"}:
            seen |= {*LABEL_FIELDS["CAM label"]}
        if all(len(session.classes(side)[0]) < 2 for side in sides):
            seen -= {"class_colours"}
        if all(session.subject(side).head for side in sides):
            seen -= {"cam", "cam_scales", "flip"}
        always = ALWAYS | ({"outline"} if session.picture.mask is not None else set())
        for name, control in self.of.items():
            control.disabled = name not in seen | always

    def tell_crops(self) -> None:
        """Show the table of the local views."""
        crops, _ = self.session.crops(self.session.active)
        threshold = self.session.subject(self.session.active).config.crops.positive_threshold
        self.crop_table.put(report.crops_html(crops, threshold))

    def _fill_classes(self) -> None:
        """A chip per class; of very many the labelled, the chosen and the most probable ones."""
        session = self.session
        side, joint = session.active, session.joint(session.active)
        score = session.class_scores(side)
        on = {int(joint.of_model[k]) for k in session.classes(side)[0]}
        known, labelled = range(1, len(joint.names)), session.picture.labels or ()
        if len(joint.names) > MANY:
            ranked = sorted(known, key=lambda k: (k in on or k in labelled, score.get(k, 0.0)), reverse=True)
            known = ranked[: MANY // 2]
        tips = {True: "in the image's labels", False: "not in the image's labels"}
        self.classes.items = [
            {
                "name": joint.names[k],
                "on": k in on,
                "colour": draw.class_colour(k),
                "number": f"{score[k]:.2f}" if k in score else "",
                "tip": ("" if session.picture.labels is None else tips[k in labelled])
                + ("" if k in score else "; the model does not know it"),
            }
            for k in known
        ]

    # ---- what the reader does

    def _change(self, name: str, value: Any) -> None:
        self.session.set(**{name: value})
        if name in ("beta_l", "beta_h"):
            self._fill()  # one may have pushed the other
        self._on_change(name in ("block", "head"))

    def _choose_classes(self, choice: str) -> None:
        if choice == "chosen":
            self._name_classes(self.class_names.value)
        else:
            self._change_classes(choice)

    def _name_classes(self, names: tuple[str, ...]) -> None:
        self._change_classes(",".join(names) if names else "none")

    def _toggle_class(self, name: str) -> None:
        session = self.session
        joint, (chosen, _) = session.joint(session.active), session.classes(session.active)
        on = {joint.names[joint.of_model[k]] for k in chosen} ^ {name}
        self._name_classes(tuple(known for known in joint.names if known in on))

    def _change_classes(self, classes: str) -> None:
        self.session.set(classes=classes)
        self._fill()
        self._on_change(False)

    def _sample(self) -> None:
        self.session.sample_crops()
        self._on_change(False)

    def _clear(self) -> None:
        self.session.clear_crops()
        self._on_change(False)
