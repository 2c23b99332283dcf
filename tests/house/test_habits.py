"""Habits that were broken before: lint and format, one home for a name, one command line, classes called by nouns."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "toco_core"
EVERYDAY = {"Entry", "Found", "Inside", "Kept", "Look", "Made", "Part", "Same", "Seen", "Side", "Thing", "Told"}
NOUNS = {"Kept": "heads", "Part": "data.world.shapes"}  # where such a word is meant: a protocol; a part of a body


def definitions() -> list[tuple[str, ast.AST]]:
    """(module, class or function) of everything at the top of a module."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        body = ast.parse(path.read_text(encoding="utf-8")).body
        found += [(module, node) for node in body if isinstance(node, (ast.ClassDef, ast.FunctionDef))]
    return found


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=" ".join)
def test_ruff_has_nothing_to_say(command):
    pytest.importorskip("ruff")
    found = subprocess.run([sys.executable, "-m", "ruff", *command, "--quiet", ROOT], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


def test_no_class_and_no_way_in_has_two_homes():
    homes = defaultdict(list)
    for module, node in definitions():
        if not node.name.startswith("_") and (isinstance(node, ast.ClassDef) or node.name.startswith("open_")):
            homes[node.name].append(module)
    assert len(homes) > 100 and not (twice := {name: found for name, found in homes.items() if len(found) > 1}), twice


def test_there_is_one_command_line():
    """A parser of arguments elsewhere is a second one."""
    with_parser = [path for path in PACKAGE.rglob("*.py") if "ArgumentParser(" in path.read_text(encoding="utf-8")]
    assert with_parser == [PACKAGE / "commands" / "__init__.py"]


def test_name_value_is_read_in_one_place():
    readers = ("toco_core", "experiments", "notebooks")
    found = [
        path.relative_to(ROOT).as_posix()
        for folder in readers
        for path in sorted((ROOT / folder).rglob("*.py"))
        if re.search(r"""(partition|split)\(["']=["']""", path.read_text(encoding="utf-8"))
    ]
    assert found == ["toco_core/config/parameters.py", "toco_core/machine/intake.py"]  # the second: TOCO_LIMITS


def test_classes_are_called_by_nouns():
    found = []
    for module, node in definitions():
        if isinstance(node, ast.ClassDef):
            last = re.findall(r"[A-Z]+[a-z]*", node.name)[-1:]
            if EVERYDAY & {*last} and NOUNS.get(node.name) != module:
                found.append(f"{module}.{node.name}")
    assert not found, found
