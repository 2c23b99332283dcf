"""What is installed: one list of requirements everywhere, all modules and weights in the wheel, the README's lines."""

import ast
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import toco_core

ROOT = Path(__file__).resolve().parents[1]
IMPORTED_AS = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "rattler": "py-rattler"}


def required():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def required_for_tests():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    start = text.index("\ntest = [")
    listed = ast.literal_eval(text[start + len("\ntest = ") : text.index("\n]", start) + 2])  # no tomllib on 3.10
    return [Requirement(line) for line in listed]


def environment():
    """Name -> specifier of environment.yml: conda's specs as rattler reads them, pip's as packaging does."""
    rattler = pytest.importorskip("rattler")
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert list(content) == ["name", "channels", "dependencies"]
    assert content["channels"] == ["conda-forge"]
    conda = [line for line in content["dependencies"] if isinstance(line, str)]
    (pip,) = [line["pip"] for line in content["dependencies"] if not isinstance(line, str)]
    assert pip[-1] == "-e .[test]"
    specs = {}
    for line in conda:
        spec = rattler.MatchSpec(line)  # raises where conda could not read it
        specs[line.split(">")[0].split("=")[0]] = set(str(spec.version or "").split(",")) - {""}
    return specs | {r.name: clauses(r) for r in map(Requirement, pip[:-1])}


def clauses(requirement):
    return {str(clause) for clause in requirement.specifier}


def imported(folder):
    """Top-level names of the third-party modules that the Python files of a folder import."""
    names = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names.add(node.module.split(".")[0])
    ours = {"toco_core"} | {path.stem for path in folder.rglob("*.py")} | {path.stem for path in ROOT.glob("*/*.py")}
    return names - ours - set(sys.stdlib_module_names)


def test_environment_and_requirements_are_in_step():
    wanted = {r.name: clauses(r) for r in required() + required_for_tests()}
    found = environment()
    assert found.pop("python") == {">=3.10"} and 'requires-python = ">=3.10"' in (ROOT / "pyproject.toml").read_text()
    assert found.pop("pip") == set()
    assert found == wanted


@pytest.mark.parametrize("folder", ["toco_core", "experiments", "notebooks"])
def test_everything_imported_is_required(folder):
    known = {canonicalize_name(r.name) for r in required()}
    if folder != "toco_core":
        known |= {canonicalize_name(r.name) for r in required_for_tests()} | {"jupyter-client"}  # part of nbclient
    if folder == "experiments":
        known |= {"pandas", "pyarrow"}  # sweep.py wants them for --parquet only, and says so
    assert {canonicalize_name(IMPORTED_AS.get(name, name)) for name in imported(ROOT / folder)} - known == set()


def test_torch_and_torchvision_are_pinned_together():
    pins = {r.name: str(r.specifier) for r in required()}
    assert pins["torch"].startswith("==2.") and pins["torchvision"].startswith("==0.")
    torch_minor, vision_minor = (int(pins[name].split(".")[1]) for name in ("torch", "torchvision"))
    assert vision_minor == torch_minor + 15  # torchvision 0.N belongs to torch 2.(N - 15)


def test_another_opencv_is_kept(monkeypatch):
    setup = load_setup(monkeypatch)
    monkeypatch.setattr(setup, "installed", lambda: {"numpy", "opencv-python"})
    without = setup.requirements()
    assert not [line for line in without if "opencv" in line]
    monkeypatch.setattr(setup, "installed", lambda: {"numpy", "opencv-python-headless"})
    assert set(setup.requirements()) - set(without) == {str_line("opencv-python-headless")}


def test_installed_packages_are_seen(monkeypatch):
    assert {"numpy", "torch", "pytest"} <= load_setup(monkeypatch).installed()


def test_wheel_and_sdist_hold_every_module_and_the_weights(tmp_path):
    pytest.importorskip("setuptools", "77")
    for name in ("pyproject.toml", "setup.py", "requirements.txt", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "toco_core", tmp_path / "toco_core", ignore=ignore)
    package = tmp_path / "toco_core"
    wanted = {p.relative_to(tmp_path).as_posix() for p in package.rglob("*.py")}
    for pattern in ("py.typed", "weights/*.safetensors", "widgets/*.js", "widgets/*.css"):
        wanted |= {p.relative_to(tmp_path).as_posix() for p in package.glob(pattern)}
    assert {path.rpartition(".")[2] for path in wanted} >= {"py", "js", "css", "typed"}
    wanted.add(stand_in_weights(package))

    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=tmp_path, check=True, capture_output=True)
    (wheel,), (sdist,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert "Requires-Dist: torch==2" in metadata
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]
    with tarfile.open(sdist) as archive:
        assert wanted | {"requirements.txt", "setup.py"} <= {name.partition("/")[2] for name in archive.getnames()}


def test_citation_names_the_paper_and_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == toco_core.__version__ and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Token Contrast for Weakly-Supervised Semantic Segmentation" and paper["year"] == 2023
    assert [author["family-names"] for author in paper["authors"]] == ["Ru", "Zheng", "Zhan", "Du"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in licence and "9. Accepting Warranty" in licence


def test_readme_has_the_line_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = subprocess.run(["bash", ROOT / ".ci" / "run", "--line"], check=True, capture_output=True, text=True).stdout
    assert readme.count(f"\n{shown}") == 1
    assert 'pip install -e ".[test]"' in shown
    assert "\npython -m venv .venv && . .venv/bin/activate && pip install -e . && papermill notebooks/" in readme


def str_line(name):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return next(line for line in lines if line.startswith(name))


def stand_in_weights(package):
    """A file that only the pattern of package-data brings in."""
    (package / "weights").mkdir(exist_ok=True)
    (package / "weights" / "stand_in.safetensors").write_bytes(b"")
    return "toco_core/weights/stand_in.safetensors"


def load_setup(monkeypatch):
    """setup.py as a module, without installing anything."""
    import setuptools

    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("toco_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
