"""ToCo: Token Contrast for weakly supervised semantic segmentation (CVPR 2023), thin and readable.

Data flows one way: images -> tokens -> CAM -> labels -> losses.
"""

from toco_core.machine.torchvision_shim import make_importable

make_importable()

__version__ = "0.1.0"
