"""The notebooks that come with the package: from a checkout here; from the wheel in test_packaging.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from toco_core.__main__ import main
from toco_core.commands.notebooks import copy_notebooks, notebooks_folder, open_lab
from toco_core.errors import ToCoError

ROOT = Path(__file__).resolve().parents[1]


def code_cells(path):
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


def test_a_checkout_has_all_its_notebooks():
    assert notebooks_folder() == ROOT / "notebooks"


def test_executed_copies_are_the_same_files(tmp_path):
    written = copy_notebooks(tmp_path / "new" / "folder")
    assert {path.name for path in written} == {path.name for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert all(path.read_bytes() == (ROOT / "notebooks" / path.name).read_bytes() for path in written)


def test_cleared_copies_have_the_same_cells_and_no_outputs(tmp_path, capsys):
    assert main(["notebooks", str(tmp_path), "train", "ctc_crops", "--cleared"]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: train.ipynb, ctc_crops.ipynb\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ctc_crops.ipynb", "train.ipynb"]
    for path in tmp_path.iterdir():
        kept, original = code_cells(path), code_cells(ROOT / "notebooks" / path.name)
        assert any(cell["outputs"] for cell in original)
        assert [(c["source"], c["metadata"], c["id"]) for c in kept] == [
            (c["source"], c["metadata"], c["id"]) for c in original
        ]
        assert not any(cell["outputs"] or cell["execution_count"] for cell in kept)


def test_files_that_are_there_stay_unless_told(tmp_path):
    (tmp_path / "train.ipynb").write_text("mine")
    with pytest.raises(SystemExit, match=r"error: '.*train\.ipynb' is there already: .* --overwrite"):
        main(["notebooks", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["train.ipynb"]
    main(["notebooks", str(tmp_path), "train", "--overwrite"])
    assert code_cells(tmp_path / "train.ipynb")
    (tmp_path / "start.ipynb").symlink_to("nowhere")
    with pytest.raises(ToCoError, match=r"start\.ipynb' is there already"):
        copy_notebooks(tmp_path, ("start",))
    assert not (tmp_path / "nowhere").exists()


def test_refusals_name_what_is_allowed(tmp_path):
    with pytest.raises(ToCoError, match="no notebook 'trian': allowed are ablation, .*your_data"):
        copy_notebooks(tmp_path, ("trian",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ToCoError, match="file' is not a folder"):
        copy_notebooks(tmp_path / "file")


@pytest.mark.slow
def test_lab_copies_what_is_missing_and_runs_jupyterlab_in_the_folder(tmp_path, capfd):
    (tmp_path / "train.ipynb").write_text("mine")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "toco_core", "lab", str(tmp_path), "--version"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.split(".")[0].isdigit(), done.stderr
    assert (tmp_path / "train.ipynb").read_text() == "mine" and len(code_cells(tmp_path / "start.ipynb")) > 5


def test_lab_without_jupyterlab_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ToCoError, match=r"pip install 'toco_core\[notebooks\]'"):
        open_lab(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_another_first_word_is_a_recipe():
    with pytest.raises(SystemExit, match="error: .*layr.*layer"):
        main(["tiny", "layr=9"])
