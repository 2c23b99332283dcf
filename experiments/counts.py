"""How large the house is: modules, rooms, import arrows, lines, and how many files one more of a kind touches.

    python experiments/counts.py a936e8c HEAD     # columns: revisions of this repository
    python experiments/counts.py                  # the working tree

A room is a folder of the package or a module of its root; an arrow leads from one room to another that it imports from.
What one more of a kind touches is found by adding one to a copy of the package, as CONTRIBUTING.md says, and using it.
"""

import argparse
import ast
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TERM = """
def entropy(step):
    p = step.output.class_logits.float().sigmoid()
    return -(p * p.clamp(min=1e-6).log()).mean()


TERMS: dict[str, Term] = {
    "entropy": Term(entropy),
"""
REFINER = """
from dataclasses import dataclass

from toco_core.refiners.none import NoRefinement


@dataclass(frozen=True)
class Blur(NoRefinement):
    radius: int = 2
"""
LAYOUT = """
from pathlib import Path

from toco_core.data.files import read_mask
from toco_core.data.split import Split


class SideBySide(Split):
    def __init__(self, root, split, class_names=("cat",)):
        self.root, self.split, self.class_names = Path(root), split, ("background", *class_names)
        self._images = sorted((self.root / split).glob("*.bmp"))
        self._masks = [path.with_suffix(".png") for path in self._images]
        self.names = tuple(path.stem for path in self._images)
        self.class_source, self.label_source = "the caller", "masks"

    def mask(self, index):
        return read_mask(self._masks[index])
"""
FIELD = '    {0}: {1} = option({2}, "A new one.", added_later=True)\n'
ADDITIONS = {  # kind -> file -> (text, what takes its place; no text: a new file), and a use of what was added
    "term": (
        {
            "objective.py": [("TERMS: dict[str, Term] = {\n", TERM)],
            "config/losses.py": [
                (
                    "    ptc_start:",
                    FIELD.format("entropy", "float", 0.0) + FIELD.format("entropy_start", "int", 0) + "    ptc_start:",
                )
            ],
        },
        "from toco_core.config import override, tiny; from toco_core.objective import term_weights\n"
        "assert term_weights(override(tiny(), entropy=0.5, entropy_start=3), 3)['entropy'] == 0.5",
    ),
    "teacher": (
        {
            "train/teacher.py": [
                (
                    "multi_avg_fn=get_ema_multi_avg_fn(momentum)",
                    "multi_avg_fn=None if config.schedule.teacher_mean else 1",
                )
            ],
            "config/schedule.py": [
                ("    teacher_momentum:", FIELD.format("teacher_mean", "bool", False) + "    teacher_momentum:")
            ],
        },
        "from toco_core.config import override, tiny; from toco_core.train.teacher import build_teacher\n"
        "from torch import nn\n"
        "config = override(tiny(), teacher_momentum=0.5, teacher_mean=True)\n"
        "assert build_teacher(nn.Linear(1, 1), config).multi_avg_fn is None",
    ),
    "refiner": (
        {
            "refiners/blur.py": [("", REFINER)],
            "refiners/__init__.py": [
                (
                    "from toco_core.refiners.crf",
                    "from toco_core.refiners.blur import Blur\nfrom toco_core.refiners.crf",
                ),
                ('{"par": PAR,', '{"blur": Blur, "par": PAR,'),
            ],
            "config/labels.py": [("    refiner: str", FIELD.format("blur_radius", "int", 2) + "    refiner: str")],
        },
        "from toco_core.config import override, tiny; from toco_core.refiners import build_refiner\n"
        "options = override(tiny(), refiner='blur', blur_radius=3).labels.refiner_options()\n"
        "assert build_refiner(options.pop('refiner'), **options).radius == 3",
    ),
    "layout": (
        {
            "data/layouts/pairs.py": [("", LAYOUT)],
            "data/source.py": [
                ("from toco_core.data.layouts import coco,", "from toco_core.data.layouts import pairs, coco,"),
                ('    "VOC": voc.VOCFolder,\n', '    "VOC": voc.VOCFolder,\n    "pairs": pairs.SideBySide,\n'),
                (
                    "    if tags.is_class_folders(root):",
                    '    if any(root.glob("train/*.bmp")):\n        return "pairs", root\n'
                    "    if tags.is_class_folders(root):",
                ),
            ],
        },
        "import tempfile, numpy as np; from pathlib import Path; from PIL import Image\n"
        "from toco_core.data import open_source\n"
        "root = Path(tempfile.mkdtemp()); (root / 'train').mkdir()\n"
        "for name in ('a.bmp', 'a.png'): Image.fromarray(np.ones((5, 7), np.uint8)).save(root / 'train' / name)\n"
        "assert open_source(root).image_labels.tolist() == [[1]]",
    ),
}


def modules(package: Path) -> dict[str, Path]:
    """Dotted name below the package -> file; a package is its `__init__`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known: dict[str, Path]) -> set[str]:
    """The package's modules that a module imports, wherever in it."""
    found, package = set(), name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if not node.level and (node.module or "").split(".")[0] != "toco_core":
                continue
            base = package[: len(package) - node.level + 1] if node.level else []
            rest = (node.module or "").split(".")[0 if node.level else 1 :]
            base = ".".join(part for part in [*base, *rest] if part)
            found |= {whole if (whole := f"{base}.{alias.name}".strip(".")) in known else base for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("toco_core.")}
    return {target for target in found if target in known and target not in ("", name)}


def in_circles(arrows: dict[str, set[str]]) -> int:
    """Modules that import themselves by way of others."""

    def reached(start: str) -> set[str]:
        seen, todo = set(), [start]
        while todo:
            for target in arrows[todo.pop()] - seen:
                seen.add(target)
                todo.append(target)
        return seen

    return sum(name in reached(name) for name in arrows)


def code_of(path: Path) -> str:
    """A module without its docstrings and comments."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [n for n in body if not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))] or body
    return ast.unparse(tree)


def touched(package: Path, kind: str) -> str:
    """How many files one more of a kind touches, tried on a copy; "-" where this revision has it elsewhere."""
    edits, use = ADDITIONS[kind]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, package.name)
        shutil.copytree(package, copy, ignore=lambda _, names: [n for n in names if n.endswith(("safetensors", "pyc"))])
        for name, changes in edits.items():
            text = (copy / name).read_text(encoding="utf-8") if (copy / name).is_file() else ""
            if not (copy / name).parent.is_dir() or any(text.count(old) != 1 for old, _ in changes if old):
                return "-"
            for old, new in changes:
                text = text.replace(old, new) if old else new
            (copy / name).write_text(text, encoding="utf-8")
        subprocess.run([sys.executable, "-c", use], cwd=folder, env=os.environ | {"PYTHONPATH": folder}, check=True)
    return str(len(edits))


def counts(package: Path) -> dict[str, str]:
    """What there is to count -> the count."""
    known = modules(package)
    arrows = {name: imports(name, path, known) for name, path in known.items() if name}
    rooms = {name: name.split(".")[0] for name in arrows}
    between = {(rooms[a], rooms[b]) for a, targets in arrows.items() for b in targets if rooms[a] != rooms[b]}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in known.items()}
    root = {path.stem for path in package.glob("*.py")} - {"__init__", "__main__"}
    functions = {
        f"{name}.{node.name}": node.end_lineno - node.lineno + 1
        for name, path in known.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    longest, file = max(functions, key=functions.get), max(lines, key=lines.get)
    long_root = max(root, key=lines.get)
    code = {name: code_of(path) for name, path in known.items()}
    return {
        "modules in the root": str(len(root)),
        "rooms": str(len(set(rooms.values()))),
        "arrows between rooms": str(len(between)),
        "modules in circles": str(in_circles(arrows)),
        "lines in the root": str(sum(lines[name] for name in root)),
        "longest module in the root": f"{lines[long_root]} ({long_root})",
        "lines in all": str(sum(lines.values())),
        "lines of code in all": str(sum(len(text.splitlines()) for text in code.values())),
        "longest function": f"{functions[longest]} ({longest})",
        "longest file": f"{lines[file]} ({file})",
        **{f"files that one more {kind} touches": touched(package, kind) for kind in ADDITIONS},
    }


def at(revision: str) -> dict[str, str]:
    """`counts` of a revision of this repository."""
    packed = subprocess.run(["git", "archive", revision, "toco_core"], cwd=ROOT, check=True, capture_output=True).stdout
    with tempfile.TemporaryDirectory() as folder, tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
        return counts(Path(folder, "toco_core"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revisions", nargs="*")
    revisions = parser.parse_args().revisions
    columns = {name: at(name) for name in revisions} or {"working tree": counts(ROOT / "toco_core")}
    print(f"| | {' | '.join(columns)} |\n|---{'|---:' * len(columns)}|")
    for row in next(iter(columns.values())):
        print(f"| {row} | {' | '.join(column[row] for column in columns.values())} |")


if __name__ == "__main__":
    main()
