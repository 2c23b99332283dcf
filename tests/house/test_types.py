"""Types and names, read by ty in seconds: every rule in the method and the config, undefined names everywhere."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ty")
ROOT = Path(__file__).resolve().parents[2]
UNDEFINED = ("--ignore", "all", "--error", "unresolved-reference")


def complaints(*what, options=()) -> str:
    command = [sys.executable, "-m", "ty", "check", *map(str, what), "--output-format", "concise", *options]
    found = subprocess.run([*command, "--python", sys.prefix], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode in (0, 1), found.stderr
    return found.stdout if found.returncode else ""


def test_types_of_the_package():
    assert not (found := complaints("toco_core")), found


def test_no_undefined_names():
    """ruff cannot tell: axis letters in annotations (`"B K h w"`) look to it like names."""
    assert not (found := complaints("toco_core", "tests", "experiments", options=UNDEFINED)), found


def test_what_is_wrong_is_found(tmp_path):
    """An undefined name beside axis letters, which are none."""
    module = tmp_path / "module.py"
    module.write_text(
        "from jaxtyping import Float\nfrom torch import Tensor\n\n\n"
        'def f(x: Float[Tensor, "B K h w"]) -> Float[Tensor, "B K"]:\n    return x.mean((2, 3)) + missing\n'
    )
    found = complaints(module, options=UNDEFINED)
    assert "module.py:6:" in found and "`missing`" in found and "Found 1 diagnostic" in found


def test_a_wrong_type_in_the_root_is_found(tmp_path):
    """The rules of pyproject.toml hold for the method: a copy of the package with one wrong call."""
    package = tmp_path / "toco_core"
    package.mkdir()
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (package / "conventions.py").write_text("def f(x: int) -> int:\n    return x\n\n\nf('a')\n")
    (package / "widgets").mkdir()
    (package / "widgets" / "draw.py").write_text("def f(x: int) -> int:\n    return x\n\n\nf('a')\n")
    found = complaints(package, options=("--project", str(tmp_path)))
    assert "conventions.py:5:" in found and "draw.py" not in found
