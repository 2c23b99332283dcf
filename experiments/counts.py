"""How large the house is: modules, rooms, import arrows, lines, and how many files one more of a kind touches.

    python experiments/counts.py a936e8c HEAD     # columns: revisions of this repository
    python experiments/counts.py                  # the working tree

A room is a folder of the package or a module of its root; an arrow leads from one room to another that it imports from.
Files that name the last addition of a kind stand for those that the next one touches.
"""

import argparse
import ast
import io
import re
import subprocess
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ADDED = {  # what one more of a kind touches: files whose code has the words of one that exists
    "a term (energy)": r"\benergy\b|\benergy_start\b",
    "a teacher (the averaged head)": r"\bproj_head_ema\b|\bproject_ema\b|\bupdate_ema\b",
    "a refiner (PAR)": r"\bPAR\b(?!')|\bpar_iterations\b|\bpar\.refine\b",
    "a layout (folder per class)": r"\bClassFolders\b|\bis_class_folders\b",
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
        **{
            f"files that know {what}": str(sum(bool(re.search(words, text)) for text in code.values()))
            for what, words in ADDED.items()
        },
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
