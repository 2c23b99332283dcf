"""Execute the notebooks and write them back with nothing in them that changes without need.

    python notebooks/refresh.py                  # all of them
    python notebooks/refresh.py train explore    # some
    python notebooks/refresh.py --text start     # nothing is executed: after a change of text cells only

A notebook runs in its own folder with the Python that runs this script, as under `pytest`. It is written only when
every cell has run; otherwise the file stays as it was, the failing cell is shown, and the exit code is 1.
"""

import argparse
import hashlib
import os
import re
import sys
import tempfile
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

FOLDER = Path(__file__).resolve().parent
KERNELSPEC = {"display_name": "Python 3", "language": "python", "name": "python3"}
KEPT_CELL_METADATA = ("tags", "jupyter")
WIDGET_VIEW = "application/vnd.jupyter.widget-view+json"
MACHINE_PATH = re.compile(r"(?<![\w+/=.])(?:file://)?/(?:home|root|tmp|work|opt|usr|Users|private|var|mnt)/[^\s'\"]*")
OVERWRITTEN = re.compile(r"^[^\n]*\r(?=[^\n])", re.MULTILINE)


class ThisPython(AsyncKernelManager):
    """A kernel of the Python that runs this script, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=argv, display_name=KERNELSPEC["display_name"], language="python")


def execute(notebook: NotebookNode, folder: Path, *, timeout: float) -> NotebookNode:
    """The notebook with new outputs; `folder` is where it runs."""
    client = NotebookClient(
        notebook,
        timeout=timeout,
        kernel_manager_class=ThisPython,
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
        store_widget_state=False,
    )
    return client.execute()


def normalise(notebook: NotebookNode) -> NotebookNode:
    """In place: metadata that is the same everywhere, ids that follow from the content, one stream per name.

    Idempotent. Sources, tags and figures are kept.
    """
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    notebook.metadata = NotebookNode(kernelspec=NotebookNode(KERNELSPEC), language_info=NotebookNode(name="python"))
    seen = set()
    for cell in notebook.cells:
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k in KEPT_CELL_METADATA and v})
        cell.id = _cell_id(cell, seen)
        if cell.cell_type == "code":
            outputs = [_normal_output(output) for output in _joined_streams(cell.outputs)]
            cell.outputs = [o for o in outputs if o.output_type != "stream" or o.text.strip()]  # a bar that is gone
    return notebook


def machine_paths(notebook: NotebookNode) -> list[str]:
    """'cell 3: /home/...' for every path of some machine in a source or in a text that was printed."""
    found = []
    for number, cell in enumerate(notebook.cells):
        texts = [cell.source]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            texts += [output.get("text", ""), *output.get("traceback", [])]
            texts += [value for kind, value in data.items() if kind.startswith("text/") and isinstance(value, str)]
        found += [f"cell {number}: {match[0]}" for text in texts for match in MACHINE_PATH.finditer(text)]
    return found


def refresh(path: Path, *, timeout: float) -> None:
    """Execute, normalise and rewrite one notebook; the file changes only when all of that went well."""
    _write(path, normalise(execute(nbformat.read(path, as_version=4), path.parent, timeout=timeout)))


def refresh_text(path: Path) -> None:
    """Normalise and rewrite one notebook with the outputs it has.

    ValueError when a code cell was changed since (its id no longer follows from its content): it has to be executed.
    """
    notebook = nbformat.read(path, as_version=4)
    before = [cell.get("id") for cell in notebook.cells]
    normalise(notebook)
    pairs = zip(before, notebook.cells, strict=True)
    changed = [str(i) for i, (old, cell) in enumerate(pairs) if cell.cell_type == "code" and cell.id != old]
    if changed:
        raise ValueError(f"code changed in cells {', '.join(changed)} of {path.name}: without --text they are executed")
    _write(path, notebook)


def _write(path: Path, notebook: NotebookNode) -> None:
    """Replace the file at once; ValueError when the notebook shows a path of this machine."""
    paths = machine_paths(notebook)
    if paths:
        raise ValueError(f"{path.name} shows paths of this machine, which differ elsewhere: {'; '.join(paths)}")
    nbformat.validate(notebook)
    unfinished = path.with_suffix(".ipynb.new")
    nbformat.write(notebook, unfinished)
    os.replace(unfinished, path)


def _cell_id(cell: NotebookNode, seen: set[str]) -> str:
    """Eight digits of the cell's content, so that a notebook written by a script gets the same ids every time."""
    copies = 0
    while True:
        content = f"{cell.cell_type}\n{copies}\n{cell.source}"
        digits = hashlib.sha256(content.encode()).hexdigest()[:8]
        if digits not in seen:
            seen.add(digits)
            return digits
        copies += 1


def _joined_streams(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """All of stdout in one output and all of stderr in another, each at the place of its first piece."""
    joined, streams = [], {}
    for output in outputs:
        if output.output_type == "stream" and output.name in streams:
            streams[output.name].text += output.text
            continue
        if output.output_type == "stream":
            streams[output.name] = output
        joined.append(output)
    return joined


def _normal_output(output: NotebookNode) -> NotebookNode:
    """Without lines that a carriage return has overwritten, temporary paths, and views of widgets that are gone."""
    if output.output_type == "stream":
        output.text = _without_temp(OVERWRITTEN.sub("", output.text))
    for kind, value in list(output.get("data", {}).items()):
        if kind == WIDGET_VIEW:
            del output.data[kind]
        elif isinstance(value, str) and kind.startswith("text/"):
            output.data[kind] = _without_temp(value)
    return output


def _without_temp(text: str) -> str:
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[^\s'\",)\]]*", "<temp>", text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="notebooks without .ipynb; none means all")
    parser.add_argument("--text", action="store_true", help="keep the outputs: only text cells were changed")
    parser.add_argument("--timeout", type=float, default=900, help="seconds that one cell may take (default 900)")
    arguments = parser.parse_args()
    known = {path.stem: path for path in sorted(FOLDER.glob("*.ipynb"))}
    names = [Path(name).stem for name in arguments.names] or list(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        parser.error(f"no notebook named {', '.join(unknown)}: known are {', '.join(known) or 'none yet'}")
    failed = []
    fresh = tempfile.TemporaryDirectory(prefix="toco-runs-")  # what an older version trained is not shown
    os.environ.setdefault("TOCO_RUNS", fresh.name)
    for name in names:
        print(f"{name} ...", flush=True)
        try:
            if arguments.text:
                refresh_text(known[name])
            else:
                refresh(known[name], timeout=arguments.timeout)
        except (CellExecutionError, TimeoutError, ValueError) as error:
            print(f"{name} was left as it was: {error}", file=sys.stderr)
            failed.append(name)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
