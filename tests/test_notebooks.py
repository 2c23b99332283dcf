"""The form of the notebooks: executed, parameterised, short cells, nothing of one machine in them.

What they print is compared by nbval (see pyproject.toml); `python notebooks/refresh.py` executes and normalises them.
"""

import ast
import re
from pathlib import Path

import nbformat
import pytest
import refresh

from toco_core.config import field_sections
from toco_core.widgets.session import RESTORED
from toco_core.widgets.settings import Settings

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
FORMULA = re.compile(r"\$\$.+?\$\$|\$[^$\n]+\$", re.DOTALL)
MAX_LINES, MAX_DEF, MAX_BYTES = 25, 12, 1_800_000
MAX_PARAMETERS, MAX_IMPORTS = 40, 32  # lines: one for each; imports are out of the reader's sight


if PATHS:
    every_notebook = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
else:
    every_notebook = pytest.mark.parametrize("path", [pytest.param(None, marks=pytest.mark.skip("no notebook yet"))])


def read(path):
    return nbformat.read(path, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parsed(source):
    """The syntax tree of a cell, without its %magics and !commands."""
    return ast.parse(re.sub(r"^\s*[%!].*$", "", source, flags=re.MULTILINE))


def parameter_index(notebook):
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f"{len(tagged)} cells are tagged `parameters`, one is wanted"
    return tagged[0]


def assigned_names(source):
    """Names that the statements of a parameters cell assign, in order."""
    names = []
    for statement in parsed(source).body:
        targets = [statement.target] if isinstance(statement, ast.AnnAssign) else getattr(statement, "targets", None)
        assert targets, f"line {statement.lineno} of the parameters cell is no assignment"
        names += [target.id for target in targets]
    return names


@every_notebook
def test_every_cell_was_executed_in_order_without_error(path):
    cells = code_cells(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run notebooks/refresh.py"
    assert not [out for cell in cells for out in cell.outputs if out.output_type == "error"]


@every_notebook
def test_notebook_is_normalised(path):
    raw = path.read_text(encoding="utf-8")
    notebook = read(path)
    assert "widgets" not in notebook.metadata
    assert nbformat.writes(refresh.normalise(notebook)).strip() == raw.strip(), "run notebooks/refresh.py"


@every_notebook
def test_no_table_is_cut(path):
    outputs = [out for cell in code_cells(read(path)) for out in cell.outputs if "data" in out]
    tables = [out.data["text/markdown"] for out in outputs if "text/markdown" in out.data]
    assert not [line for table in tables for line in table.splitlines() if "... |" in line]


@every_notebook
def test_notebook_is_small_and_names_no_machine(path):
    assert path.stat().st_size < MAX_BYTES
    assert refresh.machine_paths(read(path)) == []


@every_notebook
def test_cells_are_short_and_hold_no_library_code(path):
    for number, cell in enumerate(read(path).cells):
        if cell.cell_type != "code":
            continue
        lines = cell.source.splitlines()
        assert lines, f"cell {number} is empty"
        hidden = cell.metadata.get("jupyter", {}).get("source_hidden") and number == 1
        allowed = (
            MAX_PARAMETERS if "parameters" in cell.metadata.get("tags", []) else MAX_IMPORTS if hidden else MAX_LINES
        )
        assert len(lines) <= allowed, f"cell {number} has {len(lines)} lines, at most {allowed} are wanted"
        for node in ast.walk(parsed(cell.source)):
            assert not isinstance(node, ast.ClassDef), f"cell {number} defines a class: it belongs in toco_core"
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= MAX_DEF, f"cell {number}: {node.name} has {length} lines, at most {MAX_DEF} are wanted"


@every_notebook
def test_formulas_have_commands(path):
    """A doubled backslash would begin a new line, and `mathcal` would be read as letters."""
    formulas = [
        found for cell in read(path).cells if cell.cell_type == "markdown" for found in FORMULA.findall(cell.source)
    ]
    assert [text for text in formulas if re.search(r"\\\\[A-Za-z|]", text)] == []


@every_notebook
def test_every_parameter_is_used_later(path):
    notebook = read(path)
    at = parameter_index(notebook)
    used = set()
    for cell in notebook.cells[at + 1 :]:
        for node in ast.walk(parsed(cell.source)) if cell.cell_type == "code" else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                used.add(node.id)
            elif isinstance(node, ast.keyword):
                used.add(node.arg)  # as in `parameters.changed(config, label_beta_l="beta_l")`
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                used.add(node.value)  # picked by name, as in `globals()["layer"]`
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "parameters.config":
                used |= {
                    "recipe",
                    *field_sections(),
                }  # reads every field of the config, see config.parameters
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "Settings.help":
                used |= set(Settings.help())  # picks every setting of the explorer by name
            elif isinstance(node, ast.Attribute) and ast.unparse(node) == "session.restore":
                used |= {*RESTORED, *Settings.help()}
    assert [name for name in assigned_names(notebook.cells[at].source) if name not in used] == []


@every_notebook
def test_papermill_shows_type_and_help_of_every_parameter(path):
    papermill = pytest.importorskip("papermill")
    notebook = read(path)
    shown = papermill.inspect_notebook(str(path))
    assert list(shown) == assigned_names(notebook.cells[parameter_index(notebook)].source)
    for name, parameter in shown.items():
        assert parameter["inferred_type_name"] not in ("None", ""), f"{name} has no type: `{name}: int = 1  # help`"
        assert parameter["help"], f"{name} has no help: `{name}: int = 1  # help`"


# ---- the tool itself -------------------------------------------------------------------------------------------------


def small_notebook():
    v4 = nbformat.v4
    stream = [v4.new_output("stream", name="stdout", text=text) for text in ("10%\r", "100%\n", "done\n")]
    gone = v4.new_output("stream", name="stderr", text="50%\r     \r")
    view = v4.new_output("display_data", data={refresh.WIDGET_VIEW: {"model_id": "1f"}, "text/plain": "Button()"})
    cell = v4.new_code_cell("print()", outputs=[stream[0], view, gone, *stream[1:]], execution_count=1)
    cell.metadata = {"tags": ["parameters"], "execution": {"iopub.execute_input": "2020"}, "papermill": {}}
    notebook = v4.new_notebook(cells=[cell, v4.new_code_cell("print()"), v4.new_markdown_cell("text")])
    notebook.metadata = {"widgets": {"state": {}}, "kernelspec": {"name": "mine"}, "language_info": {"version": "3.99"}}
    return notebook


def test_normalise_keeps_only_what_does_not_change():
    notebook = refresh.normalise(small_notebook())
    nbformat.validate(notebook)
    first = notebook.cells[0]
    assert dict(notebook.metadata) == {"kernelspec": refresh.KERNELSPEC, "language_info": {"name": "python"}}
    assert dict(first.metadata) == {"tags": ["parameters"]}
    assert [out.get("text") for out in first.outputs] == ["100%\ndone\n", None]
    assert dict(first.outputs[1].data) == {"text/plain": "Button()"}
    assert len({cell.id for cell in notebook.cells}) == 3
    assert [cell.id for cell in refresh.normalise(small_notebook()).cells] == [cell.id for cell in notebook.cells]


def test_text_is_refreshed_without_running_but_changed_code_is_refused(tmp_path):
    path = tmp_path / "small.ipynb"
    notebook = refresh.normalise(small_notebook())
    outputs = notebook.cells[0].outputs
    notebook.cells[2].source = "other text"
    notebook.cells.insert(1, nbformat.v4.new_markdown_cell("a cell between"))
    nbformat.write(notebook, path)
    refresh.refresh_text(path)
    after = read(path)
    assert [cell.source for cell in after.cells] == ["print()", "a cell between", "print()", "other text"]
    assert after.cells[0].outputs == outputs
    assert nbformat.writes(refresh.normalise(read(path))) == nbformat.writes(after)

    after.cells[2].source = "print(1)"
    nbformat.write(after, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="code changed in cells 2 of small.ipynb"):
        refresh.refresh_text(path)
    assert path.read_bytes() == before


def test_machine_paths_are_found_in_sources_and_texts_only():
    v4 = nbformat.v4
    picture = v4.new_output("display_data", data={"image/png": "abc /home/x", "text/plain": "<Figure>"})
    printed = v4.new_output("stream", text="saved to /home/me/runs\nor ../tmp/runs and a/tmp/b\n")
    notebook = v4.new_notebook(cells=[v4.new_code_cell("open('/root/x')", outputs=[picture, printed])])
    assert refresh.machine_paths(notebook) == ["cell 0: /root/x", "cell 0: /home/me/runs"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("train:  40%|##  | 160/400 [00:12<00:18, 13.1it/s]", "train:  41%|##1 | 164/400 [00:09<01:18,  8.7it/s]"),
        ("160it [00:12, 13.1it/s]", "160it [01:02,  1.32s/it]"),
        ("trained in 3.2 s", "trained in  13.4 s"),
        ("about 2 min 5 s, 13.1 images/s", "about 3 min 41 s, 9 images/s"),
        ("saved to <temp>", "saved to /tmp/toco-x1/runs"),
        ("<Tensor at 0x7f001122aa>", "<Tensor at 0x7e991122bb>"),
    ],
)
def test_sanitizer_hides_times_and_temporary_folders(one, other):
    assert sanitized(one) == sanitized(other)


@pytest.mark.parametrize(
    "text", ["mIoU 43.2", "CAM 0.512, auxiliary CAM 0.601", "layer 10 of 12", "K = 8, C = 9", "cat 51.2 % deer 40.1 %"]
)
def test_sanitizer_leaves_results_alone(text):
    assert sanitized(text) == text


def sanitized(text):
    from nbval.plugin import get_sanitize_patterns

    for pattern, replacement in get_sanitize_patterns((FOLDER / "sanitize.cfg").read_text(encoding="utf-8")):
        text = re.sub(pattern, replacement, text)
    return text
