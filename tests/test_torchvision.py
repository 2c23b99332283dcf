"""torchvision beside any PyTorch: the installed one is really imported; stand-ins register as other releases do."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

# What torchvision's compiled library does when it loads: the operators are declared once, a second time is an error.
LOADS = """
import torch
library = torch.library.Library("torchvision", "FRAGMENT")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
DOES_NOT_LOAD = """
import torch
from . import extension
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
"""


def run(code, *path):
    """Standard output of `code` in a new process, with folders put before everything that is installed."""
    code = f"import sys; sys.path[:0] = {[str(folder) for folder in path]}\n" + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def stand_in(folder, init):
    """A package called torchvision whose compiled library is called as in torchvision 0.29."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(init)
    (package / "extension.py").write_text("tried = True")
    (package / "_C_stable.so").write_bytes(b"")
    return folder


def test_importing_the_package_imports_nothing_heavy():
    heavy = ("torch", "timm", "torchvision", "matplotlib", "cv2")
    assert run(f"import toco_core; print(*set({heavy}) & set(sys.modules), toco_core.__version__)") == ["0.1.0"]


def test_a_backbone_is_built_beside_the_installed_torchvision():
    """Nothing is declared where the installed torchvision has its operators, and they compute."""
    out = run("""
from toco_core.config import override, tiny
from toco_core.model import build_encoder
from toco_core.machine.torchvision_shim import _declared
encoder = build_encoder(override(tiny(), backbone="vit_tiny_patch16_224", pretrained=False).model)
import torch, torchvision
has_operators = torchvision.extension._has_ops()
if has_operators:
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 2.0, 1.9], [5.0, 5.0, 6.0, 7.0]])
    assert torchvision.ops.nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5).tolist() == [0, 2]
print(len(encoder.blocks), bool(_declared) != has_operators)""")
    assert out == ["12", "True"]


def test_a_torchvision_whose_library_loads_is_left_alone(tmp_path):
    """With operators declared before it, this import ends in an error, and with a compiled library the process dies."""
    folder = stand_in(tmp_path, LOADS)
    code = """
from toco_core.machine.torchvision_shim import make_importable, _declared
make_importable()
import torchvision
print(torchvision.__file__, len(_declared))"""
    assert run(code, folder) == [str(folder / "torchvision" / "__init__.py"), "0"]


def test_a_torchvision_whose_library_does_not_load_is_imported_whole_even_where_that_was_tried_before(tmp_path):
    code = """
from toco_core.machine.torchvision_shim import make_importable, _declared
try: import torchvision
except RuntimeError: print("failed before")
make_importable()
import torchvision
print(torchvision.extension is sys.modules["torchvision.extension"], len(_declared))"""
    assert run(code, stand_in(tmp_path, DOES_NOT_LOAD)) == ["failed", "before", "True", "1"]


def test_another_error_of_torchvision_is_passed_on_and_a_missing_one_is_not_ours(tmp_path):
    code = """
from toco_core.machine.torchvision_shim import make_importable, _declared
try:
    make_importable()
except Exception as error:
    print(type(error).__name__, error)
print(len(_declared))"""
    assert run(code, stand_in(tmp_path, "raise RuntimeError('other')")) == ["RuntimeError", "other", "0"]
    (tmp_path / "torchvision" / "__init__.py").write_text("import no_such_module_here")
    assert run(code, tmp_path)[0] == "ModuleNotFoundError"
    without = "import importlib.abc\nclass Hide(importlib.abc.MetaPathFinder):\n def find_spec(self, name, *_):\n"
    without += "  if name == 'torchvision': raise ModuleNotFoundError(name, name=name)\nsys.meta_path[:0] = [Hide()]\n"
    assert run(without + code) == ["0"]


def test_nothing_is_imported_while_tensors_have_no_numbers():
    """torchvision imports a part of PyTorch 2.6 that computes with numbers, which there are none of on `meta`."""
    code = """
import sys, torch

class Watch:
    seen = {}
    def find_spec(self, name, path=None, target=None):
        self.seen.setdefault(name, torch.empty(0).device.type)

sys.meta_path.insert(0, Watch())
from toco_core.config import tiny
from toco_core.model import skeleton
skeleton(tiny().model, 3)
print(Watch.seen["torchvision"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout.strip() == "cpu", done.stderr[-2000:]
