"""Moving pictures from frames: GIF, and MP4 where OpenCV can write it."""

import io
import tempfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from toco_core.errors import ToCoError
from toco_core.machine.writing import write_file
from toco_core.viz.pictures import titled_row

LAST = 4  # the last frame stays so many times as long
SUFFIXES = (".gif", ".mp4")


def captioned(picture: UInt8[np.ndarray, "H W 3"], caption: str) -> UInt8[np.ndarray, "h W 3"]:
    """The picture under a line of text on white."""
    return titled_row([picture], [caption])


def write_movie(frames: Sequence[UInt8[np.ndarray, "H W 3"]], path: Path | str, *, seconds: float = 0.3) -> Path:
    """Write frames of one size as GIF or MP4, by the file's suffix; a GIF begins again when it has ended.

    Args:
        seconds: that each frame stays; the last one stays four times as long.

    Raises ToCoError for another suffix, for no frame, for frames of different sizes, where OpenCV has no codec, and
    where the file cannot be written.
    """
    path, sizes = Path(path), {frame.shape for frame in frames}
    if path.suffix.lower() not in SUFFIXES:
        raise ToCoError(f"{path}: a moving picture ends in {' or '.join(SUFFIXES)}")
    if len(sizes) != 1:
        raise ToCoError(f"{path}: a moving picture needs frames of one size, these have {sorted(sizes) or 'none'}")
    if not 0.02 <= seconds <= 60:
        raise ToCoError(f"seconds = {seconds} is not allowed: 0.02 to 60")
    return write_file(path, (_gif if path.suffix.lower() == ".gif" else _mp4)(frames, seconds))


def _gif(frames: Sequence[np.ndarray], seconds: float) -> bytes:
    pictures = [Image.fromarray(frame).quantize(256, dither=Image.Dither.FLOYDSTEINBERG) for frame in frames]
    durations = [round(1000 * seconds)] * (len(frames) - 1) + [round(1000 * seconds * LAST)]
    with io.BytesIO() as file:
        options = {"duration": durations, "loop": 0, "optimize": False}
        pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], **options)
        return file.getvalue()


def _mp4(frames: Sequence[np.ndarray], seconds: float) -> bytes:
    height, width = (n + n % 2 for n in frames[0].shape[:2])  # codecs want even sides
    with tempfile.TemporaryDirectory(prefix="toco-") as folder:
        path = Path(folder) / "movie.mp4"
        writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 1 / seconds, (width, height))
        if not writer.isOpened():
            raise ToCoError("this OpenCV has no codec for MP4: write a GIF")
        for frame in [*frames, *[frames[-1]] * (LAST - 1)]:
            pad = ((0, height - frame.shape[0]), (0, width - frame.shape[1]), (0, 0))
            writer.write(np.ascontiguousarray(np.pad(frame, pad, mode="edge")[..., ::-1]))
        writer.release()
        return path.read_bytes()
