"""Import a torchvision that was built for another PyTorch, so that timm can be imported.

timm imports torchvision. A torchvision whose compiled library does not load beside the installed torch (one for CUDA
beside a torch for the CPU) ends its import with "operator torchvision::nms does not exist". A vision transformer needs
nothing from that library: a *declaration* of the two operators is enough. A torchvision that can be imported is left
alone; to declare its operators before it does would end the process.
"""

import importlib
import sys

MISSING_OPERATOR = "operator torchvision::nms does not exist"

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_declared = []  # keeps the torch.library.Library alive: a freed one withdraws its declarations


def make_importable() -> None:
    """Import torchvision, with its operators declared where its library does not load.

    Call it before the first import of timm; a second call does nothing. A missing torchvision is left to timm's own
    message; any other error of its import is passed on.
    """
    if "torchvision" in sys.modules:
        return
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
    except RuntimeError as error:
        if MISSING_OPERATOR not in str(error):
            raise
        _drop_half_imported()
        if not _declared:
            _declare_operators()
        importlib.import_module("torchvision")


def _drop_half_imported() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


def _declare_operators() -> None:
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    _declared.append(library)
