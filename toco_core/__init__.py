"""ToCo: Token Contrast for weakly supervised semantic segmentation (CVPR 2023), thin and readable.

Data flows one way: images -> tokens -> CAM -> labels -> losses.
"""

__version__ = "0.1.0"
