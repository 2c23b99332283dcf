"""Copy the notebooks that come with the package, and open JupyterLab on the copies.

    toco notebooks my_notebooks                       # all of them, with their figures
    toco notebooks my_notebooks train explore --cleared
    toco lab my_notebooks                             # copies those that are missing, then opens JupyterLab there

`python -m toco_core` stands for `toco` where the scripts' folder is not on the path.
"""

import importlib.util
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import toco_core
from toco_core.commands import command_parser
from toco_core.errors import ToCoError
from toco_core.machine.writing import write_file


def notebooks_folder() -> Path:
    """Return the folder of the notebooks: the checkout's, or the one that the wheel installed.

    Raises ToCoError where an installation has none.
    """
    checkout = Path(toco_core.__file__).resolve().parents[1]
    if (checkout / "pyproject.toml").is_file() and (checkout / "notebooks" / "start.ipynb").is_file():
        return checkout / "notebooks"
    try:
        files = metadata.files("toco_core") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "start.ipynb" and Path(file.locate()).is_file():
            return Path(file.locate()).resolve().parent
    raise ToCoError(
        f"the notebooks are not beside {checkout / 'toco_core'}: install toco_core from its wheel or a clone"
    )


def copy_notebooks(
    folder: str | Path, names: tuple[str, ...] = (), *, cleared: bool = False, overwrite: bool = False
) -> list[Path]:
    """Copy the notebooks called `names` (all of them by default) into `folder`, made if missing; the written files.

    `cleared` leaves out outputs and execution counts. Raises ToCoError for an unknown name, and for a file that is
    there already unless `overwrite`; nothing is written then.
    """
    shipped = {path.stem: path for path in sorted(notebooks_folder().glob("*.ipynb"))}
    if unknown := [name for name in names if name not in shipped]:
        raise ToCoError(f"there is no notebook {unknown[0]!r}: allowed are {', '.join(shipped)}")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ToCoError(f"folder = {str(folder)!r} is not a folder: a new or an existing folder is allowed")
    targets = {folder / shipped[name].name: shipped[name] for name in names or shipped}
    if not overwrite and (there := [target for target in targets if os.path.lexists(target)]):
        raise ToCoError(f"{str(there[0])!r} is there already: choose another folder, or overwrite it with --overwrite")
    for target, source in targets.items():
        text = source.read_text(encoding="utf-8")
        write_file(target, _cleared(text) if cleared else text)
    return list(targets)


def open_lab(folder: str | Path, *, options: tuple[str, ...] = ()) -> int:
    """Copy the notebooks that `folder` lacks, run JupyterLab in it until it is closed; its exit status.

    `options` go to JupyterLab. Raises ToCoError without JupyterLab.
    """
    if importlib.util.find_spec("jupyterlab") is None:
        raise ToCoError("toco lab needs JupyterLab: pip install 'toco_core[notebooks]'")
    missing = tuple(
        path.stem for path in sorted(notebooks_folder().glob("*.ipynb")) if not Path(folder, path.name).exists()
    )
    if missing:
        copy_notebooks(folder, missing)
    return subprocess.call([sys.executable, "-m", "jupyterlab", *options], cwd=folder)


def copy_command(arguments: list[str]) -> int:
    """Run `toco notebooks`."""
    parser = command_parser("notebooks", __doc__)
    parser.add_argument("folder", help="folder that receives the notebooks")
    parser.add_argument("names", nargs="*", default=[], help="which ones (default: all)")
    parser.add_argument("--cleared", action="store_true", help="without outputs")
    parser.add_argument("--overwrite", action="store_true", help="replace files of the same names")
    chosen = parser.parse_args(arguments)
    written = copy_notebooks(chosen.folder, tuple(chosen.names), cleared=chosen.cleared, overwrite=chosen.overwrite)
    print(f"{chosen.folder}: {', '.join(path.name for path in written)}")
    return 0


def lab_command(arguments: list[str]) -> int:
    """Run `toco lab`."""
    parser = command_parser("lab", __doc__)
    parser.add_argument("folder", nargs="?", default="toco_notebooks", help="default: toco_notebooks")
    chosen, options = parser.parse_known_args(arguments)
    return open_lab(chosen.folder, options=tuple(options))


def _cleared(text: str) -> str:
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"
