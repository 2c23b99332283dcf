"""What everything shares: the letters of axes, the label that is ignored, the regions, the colours of label images.

B images, H W pixels, h w the grid of patch tokens, N = h w tokens, D width of a token, K classes without the
background, C = K + 1 with it, P width of a projection, V views, G global views among them
"""

import numpy as np

IGNORE = 255
IGNORED = "ignored"  # what pixels of this value are called where labels have names
BACKGROUND, UNCERTAIN, FOREGROUND = 0, 1, 2


def classes_in(*labels: np.ndarray) -> list[int]:
    """The classes, from 1 and in order, that label maps of any shapes show; not the background, nor what is ignored."""
    return sorted({int(k) for label in labels for k in np.unique(label)} - {BACKGROUND, IGNORE})


def voc_palette() -> np.ndarray:
    """PASCAL VOC's colours: uint8 256 3."""
    index = np.arange(256)
    rgb = np.zeros((256, 3), np.uint8)
    for bit in range(8):
        for channel in range(3):
            rgb[:, channel] |= (((index >> (3 * bit + channel)) & 1) << (7 - bit)).astype(np.uint8)
    return rgb
