"""What is installed: one list of requirements everywhere, all modules and weights in the wheel, the README's lines."""

import ast
import os
import re
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
from voc_folder import write_voc_folder

import toco_core

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest there

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
IMPORTED_AS = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml", "rattler": "py-rattler"}
ALONGSIDE = ("README.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "constraints.txt", "environment.yml")
FOLDERS_ALONGSIDE = (".ci", "binder", "docs", "experiments", "notebooks", "tests")
IN_CONDA = {
    "torch": "pytorch",
    "opencv-python-headless": "py-opencv",
    "huggingface-hub": "huggingface_hub",
    "matplotlib": "matplotlib-base",
    "playwright": "playwright-python",
}


def required(*extras):
    """Requirements of the package, with those of extras: an extra that names others of this package includes them."""
    lines = list(PROJECT["dependencies"])
    for extra in extras:
        lines += PROJECT["optional-dependencies"][extra]
    found = {}
    for requirement in map(Requirement, lines):
        inner = required(*requirement.extras) if canonicalize_name(requirement.name) == "toco-core" else [requirement]
        found |= {canonicalize_name(r.name): r for r in inner}
    return list(found.values())


def everything():
    return required(*PROJECT["optional-dependencies"])


def in_conda():
    """Name -> clauses of environment.yml, as conda reads them."""
    rattler = pytest.importorskip("rattler")
    content = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    assert list(content) == ["name", "channels", "dependencies"]
    assert content["channels"] == ["conda-forge"]
    specs = {}
    for line in content["dependencies"]:
        spec = rattler.MatchSpec(line)  # raises where conda could not read it
        name = line.split(">")[0].split("=")[0]
        assert name not in specs
        specs[name] = set(str(spec.version or "").split(",")) - {""}
    return specs


def constrained():
    """Name -> pinned requirements of constraints.txt, one for each marker."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pins.setdefault(canonicalize_name(Requirement(line).name), []).append(Requirement(line))
    return pins


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
    wanted = {IN_CONDA.get(canonicalize_name(r.name), canonicalize_name(r.name)): clauses(r) for r in everything()}
    wanted["py-opencv"] = {">=4.10.0"}  # conda's versions have no fourth number
    assert clauses(Requirement(next(d for d in PROJECT["dependencies"] if "opencv" in d))) == {">=4.10.0.84"}
    found = in_conda()
    assert found.pop("python") == {PROJECT["requires-python"]}
    assert found.pop("pip") == set()
    assert found == wanted


def test_binder_has_what_the_notebooks_need():
    """The lines of environment.yml for the core and the notebooks, with PyTorch for the CPU; and its script."""
    lines = yaml.safe_load((ROOT / "binder" / "environment.yml").read_text(encoding="utf-8"))
    known = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    assert lines["channels"] == ["conda-forge"] and lines["dependencies"][0] == "python=3.12"
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["notebooks"]]
    names = [canonicalize_name(Requirement(text).name) for text in wanted]
    names = {"py-opencv" if "opencv" in name else IN_CONDA.get(name, name) for name in names} | {"pip"}
    cpu = [line.replace("pytorch-cpu", "pytorch") for line in lines["dependencies"][1:]]
    assert set(cpu) == {line for line in known if re.match(r"[\w-]+", line)[0] in names}
    script = ROOT / "binder" / "postBuild"
    assert os.access(script, os.X_OK) and "pip install --no-deps -e ." in script.read_text()
    subprocess.run(["bash", "-n", script], check=True)


def test_ranges_are_open_and_the_constraints_name_one_version_for_every_python():
    assert not [str(r) for r in everything() if any(clause.operator in ("==", "===") for clause in r.specifier)]
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "//" not in text and "--hash" not in text and " @ " not in text
    pins = constrained()
    assert {str(pin) for name in ("torch", "torchvision") for pin in pins[name]} == {
        "torch==2.13.0",
        "torchvision==0.28.0",
    }
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        for system in ("linux", "darwin", "win32"):
            where = {"python_version": python, "python_full_version": f"{python}.5", "sys_platform": system}
            for requirement in everything():
                fitting = [
                    pin
                    for pin in pins[canonicalize_name(requirement.name)]
                    if pin.marker is None or pin.marker.evaluate(where)
                ]
                assert len(fitting) == 1, (requirement.name, where)
                (clause,) = fitting[0].specifier
                assert clause.operator == "==" and requirement.specifier.contains(clause.version), fitting[0]


@pytest.mark.parametrize("folder", ["toco_core", "experiments", "notebooks"])
def test_everything_imported_is_required(folder):
    extras = {
        "toco_core": ["notebooks", "track", "onnx"],
        "experiments": ["notebooks", "sweep", "test"],
        "notebooks": ["test"],
    }[folder]
    known = {canonicalize_name(r.name) for r in required(*extras)} | {"jupyter-client"}  # part of nbclient
    if folder == "experiments":
        known |= {"pandas", "pyarrow"}  # sweep.py wants them for --parquet only, and says so
    if folder == "toco_core":
        known |= {"triton"}  # comes with PyTorch where there is a GPU for it; without it `par` does without it
    assert {canonicalize_name(IMPORTED_AS.get(name, name)) for name in imported(ROOT / folder)} - known == set()


def test_training_evaluating_and_exporting_need_the_core_requirements_only():
    """Modules that are imported without the extras' packages: those who train on a server install no JupyterLab."""
    core = {canonicalize_name(r.name) for r in required()} | {"setuptools", "packaging"}
    hidden = [r.name.lower() for r in everything() if canonicalize_name(r.name) not in core]
    code = f"""
import sys, importlib.abc
class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0].lower() in {hidden}: raise ModuleNotFoundError(name, name=name)
sys.meta_path[:0] = [Hide()]
import toco_core.train.launch, toco_core.evaluation.evaluate, toco_core.predict.export, toco_core.data, toco_core.viz"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_opencv_is_silent_and_two_are_named(tmp_path):
    def install(folder, name, version, files="cv2/__init__.py,,"):
        info = tmp_path / folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")
        (info / "RECORD").write_text(files)

    def warned(folder):
        code = f"import sys; sys.path[:] = [{str(ROOT)!r}, {str(tmp_path / folder)!r}] + {stdlib}; import toco_core"
        return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stderr

    stdlib = [path for path in sys.path if "site-packages" not in path and path != str(ROOT)]
    install("one", "opencv-python", "4.12.0")
    install("conda", "opencv-python", "4.12.0", files="")
    install("conda", "opencv-python-headless", "4.12.0")
    install("two", "opencv-python", "4.12.0")
    install("two", "opencv-python-headless", "5.0.0")
    assert warned("one") == warned("conda") == ""
    assert "opencv-python-headless 5.0.0 and opencv-python 4.12.0 are installed over each other" in warned("two")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel, sdist, and the names of the package's files that both must hold."""
    pytest.importorskip("setuptools", "77")
    folder = tmp_path_factory.mktemp("built")
    for name in ("pyproject.toml", "MANIFEST.in", *ALONGSIDE):
        shutil.copy(ROOT / name, folder)
    for name in ("toco_core", *FOLDERS_ALONGSIDE):
        for path in files_of(name):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, folder / path)
    package = folder / "toco_core"
    wanted = {p.relative_to(folder).as_posix() for p in package.rglob("*.py")}
    for pattern in (
        "py.typed",
        "weights/*.safetensors",
        "trained/*/*",
        "widgets/*.js",
        "widgets/*.css",
        "predict/page.*",
    ):
        wanted |= {p.relative_to(folder).as_posix() for p in package.glob(pattern)}
    assert {path.parent for path in package.rglob("*.py")} == {path.parent for path in package.rglob("__init__.py")}
    assert {path.rpartition(".")[2] for path in wanted} >= {"py", "js", "css", "typed"}
    wanted.add(stand_in_weights(package))
    build = "from setuptools import build_meta as b; b.build_sdist('dist'); b.build_wheel('dist')"
    subprocess.run([sys.executable, "-c", build], cwd=folder, check=True, capture_output=True)
    (wheel,), (sdist,) = (list((folder / "dist").glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
    return wheel, sdist, wanted


@pytest.mark.slow
def test_wheel_holds_every_module_the_weights_the_licence_and_the_notebooks(built):
    wheel, _, wanted = built
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA")]
    (data,) = {name.partition("/")[0] for name in names if ".data/" in name}
    assert {name for name in names if ".dist-info/" not in name and ".data/" not in name} == wanted
    shared = [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("experiments/*.py"), *ROOT.glob("experiments/records/*.json")]
    assert {name for name in names if ".data/" in name} == {
        f"{data}/data/share/toco_core/{path.relative_to(ROOT).as_posix()}" for path in shared
    }
    assert {"Requires-Dist: torch<3,>=2.6", "Provides-Extra: notebooks"} <= set(metadata.splitlines())
    assert "License-Expression: Apache-2.0" in metadata.splitlines()
    assert [name for name in names if name.endswith(".dist-info/licenses/LICENSE")]


def test_sdist_holds_what_its_own_tests_read(built):
    _, sdist, wanted = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    alongside = {path for folder in FOLDERS_ALONGSIDE for path in files_of(folder)}
    assert len(alongside) > 100
    assert wanted | alongside | set(ALONGSIDE) <= names


def test_citation_names_the_paper_and_this_version_and_licence():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == toco_core.__version__ and citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert paper["title"] == "Token Contrast for Weakly-Supervised Semantic Segmentation" and paper["year"] == 2023
    assert [author["family-names"] for author in paper["authors"]] == ["Ru", "Zheng", "Zhan", "Du"]
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in licence and "9. Accepting Warranty" in licence


@pytest.mark.slow
def test_the_installed_wheel_trains_and_hands_out_its_notebooks(built, tmp_path):
    """Away from the checkout, beside what this environment has of the requirements."""
    prefix = tmp_path / "prefix"
    options = ["-q", "--no-deps", "--no-index", "--no-compile", "--prefix", prefix]
    options += ["--ignore-installed"]  # or pip takes away the one that runs these tests
    subprocess.run([sys.executable, "-m", "pip", "install", *options, built[0]], check=True, capture_output=True)
    (site,) = prefix.glob("**/site-packages")
    (script,) = (path for name in ("bin", "Scripts") for path in prefix.glob(f"{name}/toco*"))
    environment = os.environ | {"PYTHONPATH": str(site)}

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import toco_core, sys; assert toco_core.__file__.startswith(sys.argv[1]), toco_core.__file__"
    run(sys.executable, "-c", where, str(site))
    run(script, "notebooks", "copies", "--cleared")
    assert {p.name for p in (tmp_path / "copies").iterdir()} == {p.name for p in (ROOT / "notebooks").glob("*.ipynb")}
    data = write_voc_folder(tmp_path / "data", splits={"train": range(4), "val": range(4, 6)})
    fields = [
        "steps=1",
        "warmup_steps=0",
        "ctc_start=0",
        "ptc_start=0",
        "batch_size=2",
        "device=cpu",
        f"dataset={data}",
    ]
    folder = run(sys.executable, "-m", "toco_core", "tiny", *fields).splitlines()[-1]
    assert (tmp_path / folder / "metrics.json").is_file()


def test_readme_has_the_line_that_ci_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = subprocess.run(["bash", ROOT / ".ci" / "run", "--line"], check=True, capture_output=True, text=True).stdout
    assert readme.count(f"\n{shown}") == 1
    assert "&& pip install -e '.[test]' -c constraints.txt &&" in shown.replace('"', "'")
    assert '.venv/bin/activate && pip install -e ".[notebooks]" -c constraints.txt && papermill notebooks/' in readme


def files_of(folder):
    """Names of a folder's files from the root on, without what runs and tools leave behind."""
    left = {"__pycache__", ".ipynb_checkpoints", ".pytest_cache", ".ruff_cache"}
    paths = [path.relative_to(ROOT) for path in sorted((ROOT / folder).rglob("*")) if path.is_file()]
    ours = [p for p in paths if not left & set(p.parts)]
    return [p.as_posix() for p in ours if p.parts[:2] not in (("notebooks", "runs"), ("experiments", "runs"))]


def stand_in_weights(package):
    """A file that only the pattern of package-data brings in."""
    (package / "weights").mkdir(exist_ok=True)
    (package / "weights" / "stand_in.safetensors").write_bytes(b"")
    return "toco_core/weights/stand_in.safetensors"
