"""ToCo: Token Contrast for weakly supervised semantic segmentation (CVPR 2023), thin and readable.

Data flows one way: images -> tokens -> CAM -> labels -> losses.
"""

from .machine.opencv import warn_of_two
from .machine.threads import let_waiting_threads_sleep

let_waiting_threads_sleep()  # before anything imports torch
warn_of_two()

__version__ = "0.1.0"
