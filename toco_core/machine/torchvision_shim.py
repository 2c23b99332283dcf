"""Let a torchvision that was built for CUDA be imported beside a CPU build of torch.

timm imports torchvision, and torchvision's registration code dies with "operator torchvision::nms does not exist" where
its compiled library cannot be loaded. Nothing that a vision transformer needs is in that library, so it is enough that
the two operators are *declared*. Where the library can be loaded, nothing is declared and torchvision is left alone.
"""

import importlib.util
import pathlib

_kept = []  # a torch.library.Library withdraws its declarations when it is freed

_SCHEMAS = {
    "nms": "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms": "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def make_importable() -> None:
    """Run before the first import of torchvision or timm; more than once is harmless."""
    import sys

    if _kept or "torchvision" in sys.modules:
        return
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    import torch

    if _library_loads(torch, pathlib.Path(spec.origin).parent):
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name):
            library.define(schema)
    _kept.append(library)


def _library_loads(torch, folder: pathlib.Path) -> bool:
    """Whether torchvision's compiled operators can be registered, by loading them as torchvision itself will."""
    for library in sorted(folder.glob("_C.*")):
        try:
            torch.ops.load_library(str(library))
            return True
        except OSError:
            continue
    return False
