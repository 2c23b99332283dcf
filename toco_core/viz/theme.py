"""The look that all figures share: colours of terms, methods and kinds of labels, fonts, and text as it stands."""

import functools
import os
from collections.abc import Callable, Iterable
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
from matplotlib.text import Text

OWN_TERM_COLOURS = ("#8c564b", "#7f7f7f", "#17becf", "#6a3d9a", "#bcbd22", "#e377c2")
IGNORE_GREYS = (225, 225, 225), (150, 150, 150)  # ground and lines of the hatching
TERM_COLOURS = {
    "total": "#222222",
    "cls": "#0072b2",
    "aux_cls": "#56b4e9",
    "ptc": "#d55e00",
    "ctc": "#cc79a7",
    "seg": "#009e73",
    "energy": "#b8860b",
}
METHOD_COLOURS = {  # a method has the colour of the term that it adds
    "backbone": "#666666",
    "classification only": TERM_COLOURS["cls"],
    "PTC": TERM_COLOURS["ptc"],
    "CTC": TERM_COLOURS["ctc"],
    "PTC + CTC": "#88264d",
}
METHODS = {  # other names of the methods: of shipped runs, and as figures put them
    "pretrained": "backbone",
    "before training": "backbone",
    "classification": "classification only",
    "without PTC": "classification only",
    "with PTC": "PTC",
    "full": "PTC",
    "ctc": "PTC + CTC",
}
KIND_NAMES = {
    "cam": "final CAM",
    "aux_cam": "auxiliary CAM",
    "refined": "final CAM + PAR",
    "pseudo_label": "pseudo label (PAR)",
    "vote": "vote of both CAMs and decoder",
    "seg": "segmentation",
    "seg_ms": "segmentation, scales + flip",
    "seg_crf": "segmentation, scales + flip + CRF",
}
KIND_COLOURS = {
    "cam": "#e69f00",
    "aux_cam": "#56b4e9",
    "refined": "#b15928",
    "pseudo_label": "#6a3d9a",
    "vote": "#e377c2",
    "seg": "#009e73",
    "seg_ms": "#7fce9b",
    "seg_crf": "#b8860b",
}
RUN_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#6a3d9a", "#666666")
SCORE_COLOURS = {f"{kind}_miou": KIND_COLOURS[kind] for kind in ("cam", "aux_cam", "seg")}
NAMES = {
    "cam_miou": "final CAM",
    "aux_cam_miou": "auxiliary CAM",
    "seg_miou": "segmentation",
    "map": "image labels (mAP)",
}


def name_colours(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour: a method or a kind of label keeps its own in every figure; others take those of `RUN_COLOURS`
    that are left, in turn."""
    names = list(names)
    own = METHOD_COLOURS | {name: METHOD_COLOURS[method] for name, method in METHODS.items()}
    own |= {KIND_NAMES[kind]: colour for kind, colour in KIND_COLOURS.items()}
    known = {name: own[name.removeprefix("+ ")] for name in names if name.removeprefix("+ ") in own}
    free = [colour for colour in RUN_COLOURS if colour not in known.values()] or list(RUN_COLOURS)
    others = [name for name in dict.fromkeys(names) if name not in known]
    return known | {name: free[i % len(free)] for i, name in enumerate(others)}


def use_theme() -> None:
    """One look for all figures: white ground, dark text, a light grid below what is drawn."""
    plt.rcParams.update(
        {
            "text.parse_math": False,  # names of files and classes are no formulas
            "figure.facecolor": "white",
            "savefig.facecolor": "white",
            "axes.facecolor": "white",
            "text.color": "#222222",
            "axes.labelcolor": "#222222",
            "xtick.color": "#222222",
            "ytick.color": "#222222",
            "axes.edgecolor": "#999999",
            "axes.grid": True,
            "axes.axisbelow": True,
            "grid.color": "#e4e4e4",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": 10,
            "axes.labelsize": 9,
            "legend.fontsize": 8,
            "legend.frameon": False,
            "figure.dpi": 90,
            "font.size": 9,
        }
    )


def plain_text(drawn: plt.Figure | plt.Axes) -> None:
    """Let every text stand as it is: names of files and classes are no formulas, whatever `$` they hold, and what no
    font can show is replaced."""
    for text in drawn.findobj(Text):
        if r"\mathdefault" not in text.get_text():  # numbers that matplotlib has set itself
            text.set_parse_math(False)
            text.set_text(showable(text.get_text()))


def showable(value: Any) -> Any:
    """Texts, in lists and dictionaries too, with what no font can show replaced: labels of ticks are made anew by each
    drawing."""
    if isinstance(value, str):
        return value.encode(errors="replace").decode()
    if type(value) in (list, tuple):
        return type(value)(map(showable, value))
    if type(value) is dict:
        return {showable(key): showable(item) for key, item in value.items()}
    return value


def with_plain_text(function: Callable) -> Callable:
    """A function that draws names into the axes or the figure that it returns."""

    @functools.wraps(function)
    def draws(*args, **options):
        parse_math = mpl.rcParams["text.parse_math"]
        mpl.rcParams["text.parse_math"] = False  # not rc_context, which also undoes what a backend sets as it is loaded
        try:
            drawn = function(*showable(args), **showable(options))
        finally:
            mpl.rcParams["text.parse_math"] = parse_math
        plain_text(drawn)
        return drawn

    return draws


def bare(ax: plt.Axes, title: str) -> plt.Axes:
    """Axes of a picture: a small title, and no axes."""
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()
    return ax


def is_live() -> bool:
    """Whether a JupyterLab shows this kernel's outputs, so that what reacts to the pointer is worth its bytes."""
    return "JPY_SESSION_NAME" in os.environ


FLAG_COLOURS = {True: "#009e73", False: "#d55e00"}  # positive crops, negative crops
