"""The order of the rooms, read from the imports: none runs up, none in a circle, and the root stays small."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "toco_core"
FLOORS = [  # a room imports from its own floor and from those above in this list
    {"errors", "conventions"},
    {"config"},
    {"machine", "viz"},
    {"data"},
    {"the method"},
    {"runs"},
    {"predict", "evaluation", "train"},
    {"analysis"},
    {"widgets"},
    {"commands"},
    {"__main__"},
]
METHOD = "methods backbone heads model cam par refiners labels crops lattice losses objective".split()
MOST_IN_ROOT = 14


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; a package is its `__init__`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str, path: Path, known) -> set[str]:
    """The package's modules that a module imports, wherever in it, with the packages that they lie in."""
    found = set()
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [part for part in package[: len(package) - node.level + 1] if part]
            elif (node.module or "").split(".")[0] == "toco_core":
                base = []
            else:
                continue
            rest = (node.module or "").split(".")
            base = ".".join(base + [part for part in (rest if node.level else rest[1:]) if part])
            for alias in node.names:
                whole = f"{base}.{alias.name}".strip(".")
                found.add(whole if whole in known else base)
        elif isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("toco_core.")}
    return {target for target in found if target in known and target not in ("", name)}


def room(module: str) -> str:
    first = module.split(".")[0]
    return "the method" if first in METHOD else first


@pytest.fixture(scope="module")
def arrows() -> dict[str, set[str]]:
    known = modules()
    return {name: imports(name, path, known) for name, path in known.items() if name}


def test_imports_are_found(arrows):
    """What the other tests stand on."""
    assert {"losses", "labels", "machine.distributed", "config"} <= arrows["objective"]
    assert {"data.split", "errors"} <= arrows["data.layouts.voc"] and "objective" in arrows["train.loop"]


def test_no_import_runs_up(arrows):
    floor = {name: number for number, rooms in enumerate(FLOORS) for name in rooms}
    assert {room(module) for module in arrows} == set(floor), "a new room needs its place in FLOORS"
    up = [
        f"{module} imports {target}"
        for module, targets in arrows.items()
        for target in sorted(targets)
        if floor[room(target)] > floor[room(module)]
    ]
    assert not up, "; ".join(up)


def test_no_circle(arrows):
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for target in sorted(arrows[module]):
                visit(target)
            done.add(path.pop())

    for module in arrows:
        visit(module)


def test_the_root_is_the_method():
    root = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert root <= {*METHOD, "errors", "conventions"}
    assert len(root) <= MOST_IN_ROOT


def test_no_module_of_the_root_is_long():
    long = {path.name: n for path in PACKAGE.glob("*.py") if (n := len(path.read_text().splitlines())) > 400}
    assert not long, long


def test_packages_say_what_they_are_for():
    for path in PACKAGE.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "files"), [("term", 2), ("teacher", 2), ("refiner", 3), ("layout", 2)])
def test_one_more_of_a_kind_touches_few_files(kind, files):
    """Tried on a copy of the package, where it is then used."""
    import counts

    assert counts.touched(PACKAGE, kind) == str(files)
