"""An evaluation's folder: every finished image stays, so that a long evaluation that was interrupted goes on.

    folder/manifest.json                     what the numbers depend on: protocol, weights, images, image-level labels
    folder/counts/<name>.npz                 what the image adds to the scores
    folder/SegmentationClass/<name>.png      the segmentation that was scored, palette PNG with VOC's colours

Each file is written whole or not at all, the counts last.
"""

import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int64, UInt8

from toco_core.data.files import palette_png
from toco_core.data.layouts.npy import plain_array
from toco_core.errors import ToCoError
from toco_core.machine.intake import limit, open_archive, read_bytes
from toco_core.machine.writing import remove_parts, write_whole, writing
from toco_core.runs.folder import claim_folder


class ImageCounts(NamedTuple):
    """What one image adds to an evaluation; without a mask the counts are 0."""

    cam: Int64[np.ndarray, "T C C"]
    aux_cam: Int64[np.ndarray, "T C C"]
    seg: Int64[np.ndarray, "C C"]
    logits: Float[np.ndarray, " K"]
    aux_logits: Float[np.ndarray, " K"]
    image_labels: Float[np.ndarray, " K"]
    has_mask: bool


class KeptEvaluation:
    """The folder, for the evaluation that `settings` describe. Raises ToCoError where it holds another one, or
    something else, or cannot be written."""

    def __init__(self, folder: Path | str, settings: dict):
        self.folder, self.settings = Path(folder), settings
        claim_folder(self.folder, settings, "evaluation")
        remove_parts(self.folder, "**/*")

    def has(self, name: str) -> bool:
        """Whether an image is finished."""
        return self._counts(name).is_file()

    def read(self, name: str, *, like: ImageCounts) -> ImageCounts:
        """A finished image. Raises ToCoError for a damaged file, and for one whose parts have other shapes or types
        than those of `like`."""
        path = self._counts(name)
        data = read_bytes(path, "counts_bytes")
        try:
            with open_archive(path, io.BytesIO(data)) as archive:
                parts = [archive.getinfo(f"{field}.npy") for field in ImageCounts._fields]
                if sum(part.file_size for part in parts) > limit("counts_bytes"):
                    raise ValueError("its parts are too large")
                values = [plain_array(archive.read(part)) for part in parts]
            found = dict(zip(ImageCounts._fields, values, strict=True))
            for field, value in found.items():
                wanted, kind = np.asarray(getattr(like, field)), value.dtype.kind
                if (value.shape, kind) != (wanted.shape, wanted.dtype.kind) or (kind == "i" and value.min() < 0):
                    raise ValueError(f"{field} is no such array")
        except Exception as error:  # noqa: BLE001  a damaged archive raises many kinds
            raise ToCoError(f"{path} is damaged: delete it, and the image is evaluated again") from error
        return ImageCounts(**found | {"has_mask": bool(found["has_mask"])})

    def write(self, name: str, counts: ImageCounts, label: UInt8[np.ndarray, "H W"] | None) -> None:
        """Keep a finished image, and its label map where it was scored."""
        if label is not None:
            self._put(self.folder / "SegmentationClass" / f"{name}.png", palette_png(label))
        with io.BytesIO() as file:
            np.savez_compressed(file, **counts._asdict())
            self._put(self._counts(name), file.getvalue())

    def finish(self, protocol: str) -> None:
        """All images are there, and this is what to write beside their scores: the manifest says so."""
        content = {"finished": True, "protocol": protocol, "settings": self.settings}
        self._put(self.folder / "manifest.json", (json.dumps(content, indent=1) + "\n").encode())

    def _put(self, path: Path, content: bytes) -> None:
        with writing(self.folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, content)

    def _counts(self, name: str) -> Path:
        return self.folder / "counts" / f"{name}.npz"
