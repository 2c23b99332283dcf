"""Warn of two OpenCV distributions in one environment: each of them writes the folder `cv2`."""

import warnings
from importlib import metadata

DISTRIBUTIONS = (
    "opencv-python-headless",
    "opencv-python",
    "opencv-contrib-python-headless",
    "opencv-contrib-python",
)


def installed_opencv() -> list[str]:
    """Names and versions of the distributions whose files include `cv2/__init__.py`.

    conda's package carries the names of two of them in its metadata and only one folder `cv2`: it lists no files.
    """
    found = []
    for name in DISTRIBUTIONS:
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if "cv2/__init__.py" in (distribution.read_text("RECORD") or ""):
            found.append(f"{name} {distribution.version}")
    return found


def warn_of_two() -> None:
    """Warn with a line that names the distributions and how one of them is kept."""
    found = installed_opencv()
    if len(found) > 1:
        names = [name.partition(" ")[0] for name in found]
        warnings.warn(
            f"{' and '.join(found)} are installed over each other in the folder cv2: keep one, with "
            f"`pip uninstall {' '.join(names)}` and then `pip install {names[0]}`",
            stacklevel=3,
        )
