"""The requirements, without a second OpenCV: `opencv-python` and `opencv-python-headless` write the same folder `cv2`.

Where another OpenCV is installed already it is used as it is, and none is required. Everything else is in
pyproject.toml.
"""

import importlib.metadata
import sysconfig
from pathlib import Path

from setuptools import setup

OTHER_OPENCV = ("opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")


def installed() -> set[str]:
    """Names of what is installed in the environment of this Python, also from within pip's isolated build."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    names = (found.metadata["Name"] for found in importlib.metadata.distributions(path=folders))
    return {name.lower().replace("_", "-") for name in names if name}


def requirements() -> list[str]:
    """The lines of requirements.txt, OpenCV only where there is no other one."""
    text = (Path(__file__).parent / "requirements.txt").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    if installed().intersection(OTHER_OPENCV):
        lines = [line for line in lines if not line.startswith("opencv-python-headless")]
    return lines


setup(install_requires=requirements())
