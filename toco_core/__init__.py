"""ToCo: Token Contrast for weakly supervised semantic segmentation (CVPR 2023), thin and readable.

Data flows one way: images -> tokens -> CAM -> labels -> losses.

    from toco_core import cams
    cams("sheep.jpg")         # named maps, a label and a picture: see `predict.class_maps`
"""

from .machine.opencv import warn_of_two
from .machine.threads import let_waiting_threads_sleep

let_waiting_threads_sleep()  # before anything imports torch
warn_of_two()

__version__ = "0.1.0"


def __getattr__(name: str):
    """`cams`, imported when it is asked for: the package itself stays light."""
    if name == "cams":
        from .predict.class_maps import cams

        return cams
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
