"""A grid of notebooks, executed by real processes: results, failures, and going on."""

import csv
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import sweep

from toco_core.config import override, tiny
from toco_core.config.parameters import Parameters
from toco_core.errors import ToCoError

ROOT = Path(__file__).resolve().parents[1]

CELLS = [
    "layer: int = 10  # block\nseed: int = 0\ndivisor: int = 1  # own parameter\nsteps: int = None",
    "print(layer / divisor)",
]


@pytest.fixture
def notebook(tmp_path):
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    cells[0].metadata["tags"] = ["parameters"]
    content = nbformat.v4.new_notebook(
        cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "p", "language": "python"}}
    )
    nbformat.write(content, tmp_path / "small.ipynb")
    return tmp_path / "small.ipynb"


def rows(folder):
    with open(folder / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_sweep_lists_what_failed_and_goes_on(notebook, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "POLL_SECONDS", 0.1)
    out = tmp_path / "out"
    command = [str(notebook), "--grid", "divisor=1,0", "--set", "layer=7", "--out", str(out), "--jobs", "2"]
    assert sweep.main(command) == 1
    good, bad = rows(out)
    assert (good["layer"], good["divisor"], good["state"], good["error"]) == ("7", "1", "done", "")
    assert (bad["state"], bad["cell"]) == ("failed", "2") and bad["error"] == "ZeroDivisionError: division by zero"
    text = capsys.readouterr().out
    assert "1 done, 1 failed" in text and "cell 2 (print(layer / divisor)): ZeroDivisionError" in text
    (done,) = [path for path in out.glob("divisor=1*.ipynb")]
    written = nbformat.read(done, 4)
    assert written.cells[-1].outputs[0]["text"] == "7.0\n"

    before = done.stat().st_mtime_ns
    points = sweep.points_of(notebook, out, {"divisor": [1, 0]}, {"layer": 7})
    started = []
    monkeypatch.setattr(sweep, "_written", lambda point: started.append(point.name) or (_ for _ in ()).throw(KeyError))
    with pytest.raises(KeyError):
        sweep.run_sweep(points, jobs=1)
    assert started == [points[1].name] and done.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_sweep_killed_at_any_moment_goes_on(notebook, tmp_path):
    """SIGKILL of the sweep alone: its jobs live on, or not; the same command again ends with every row."""
    out, chance = tmp_path / "out", random.Random(4)
    script, grid = ROOT / "experiments" / "sweep.py", ["--grid", "divisor=1,2,0", "seed=0,1", "--jobs", "2"]
    command, kills = [sys.executable, str(script), str(notebook), *grid, "--out", str(out)], 0
    for _ in range(2):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        try:
            process.wait(2 + 8 * chance.random())
        except subprocess.TimeoutExpired:
            kills += 1
            if kills % 2:
                process.kill()
            else:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert kills
    subprocess.run(command, stdout=subprocess.DEVNULL, timeout=300)
    found = [(row["divisor"], row["seed"], row["state"], row["error"]) for row in rows(out)]
    failed = ("failed", "ZeroDivisionError: division by zero")
    assert found == [(d, s, *(failed if d == "0" else ("done", ""))) for d in "120" for s in "01"]
    assert not list(out.glob("**/*.part"))


def test_points(notebook, tmp_path):
    points = sweep.points_of(notebook, tmp_path, {"layer": [9, 10], "seed": [0, 1]}, {"steps": 50})
    assert [p.parameters for p in points][1] == {"steps": 50, "layer": 9, "seed": 1}
    cells = {}
    parameters = Parameters(cells)
    cells |= points[3].parameters
    assert points[3].config == parameters.config()  # the notebook's: stages keep their share of the steps
    assert len({p.name for p in points}) == 4 and points[0].name.startswith("layer=9-seed=0-")
    assert sweep.points_of(notebook, tmp_path, {"layer": [9]}, {"seed": 0})[0].config == override(tiny(), layer=9)
    with pytest.raises(ToCoError, match=r"small\.ipynb has no parameter 'layr': did you mean layer"):
        sweep.points_of(notebook, tmp_path, {"layr": [9]}, {})
    with pytest.raises(ToCoError, match="layer = 13 is not allowed|layer"):
        sweep.points_of(notebook, tmp_path, {"layer": [0]}, {})


def test_a_point_comes_back(notebook, tmp_path):
    (point,) = sweep.points_of(notebook, tmp_path / "out", {"divisor": [2]}, {})
    assert point.record == {"state": "waiting"}
    assert sweep.read_point(sweep._written(point)) == point
    point.note(state="done", seconds=1.5, numbers={"cam_miou": 30.0})
    (tmp_path / "mine").write_text("precious")
    (point.folder / "results.part").symlink_to(tmp_path / "mine")  # what comes from a stranger is not written through
    sweep.write_results(point.folder / "results.csv", [point], [point.record])
    assert rows(point.folder) == [
        {"divisor": "2", "state": "done", "run": "", "seconds": "1.5", "cam_miou": "30.0", "cell": "", "error": ""}
    ]
    assert json.loads((point.folder / f"{point.name}.json").read_text())["state"] == "done"
    assert (tmp_path / "mine").read_text() == "precious"


def test_parquet_where_its_packages_are_installed(notebook, tmp_path, monkeypatch, capsys):
    """Mixed columns: seconds and cell are missing in some rows."""
    points = sweep.points_of(notebook, tmp_path / "out", {"divisor": [2, 0]}, {})
    records = [{"state": "done", "seconds": 1.5, "numbers": {"cam_miou": 30.0}}, {"state": "failed", "cell": 2}]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(SystemExit):
            sweep.main([str(notebook), "--parquet", "--out", str(tmp_path / "out")])
        assert "--parquet needs two more packages: pip install pandas pyarrow" in capsys.readouterr().err
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    sweep.write_parquet(tmp_path / "results.parquet", points, records)
    found = pandas.read_parquet(tmp_path / "results.parquet")
    assert list(found["divisor"]) == [2, 0] and found["seconds"][0] == 1.5 and found["cell"][1] == 2
    assert found["seconds"].isna()[1] and found["cam_miou"].isna()[1] and found["state"][1] == "failed"


def test_wrong_options_are_refused(notebook, capsys):
    for command, words in (
        (["nowhere.ipynb"], "notebook nowhere.ipynb is not a file"),
        ([str(notebook), "--grid", "layer"], "'layer' is not allowed: NAME=VALUE is wanted"),
        ([str(notebook), "--set", "stepps=3"], "has no parameter 'stepps'"),
    ):
        with pytest.raises(SystemExit):
            sweep.main(command)
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        b"[1]", b"{}", b'{"state": "asleep"}', b'{"state": []}', b"{", b"\xff", b"[" * 100_000, b'{"state": "failed"}',
        b'{"state": "done", "numbers": [1]}', b'{"state": "failed", "error": 3}', b'{"state": "done", "run": 3}',
        b'{"state": "failed", "error": "", "cell": "x"}',
    ],
)  # fmt: skip
def test_records_that_are_none(notebook, tmp_path, content):
    """KeyError, JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError."""
    (point,) = sweep.points_of(notebook, tmp_path / "out", {}, {})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / f"{point.name}.json").write_bytes(content)
    with pytest.raises(ToCoError, match=r"\.json is (no record of a sweep: delete it|not valid JSON)"):
        sweep.table([point], [point.record])
    point.note(state="failed", parameters={}, error="", cell=3)
    assert "failed" in sweep.table([point], [point.record])


def test_defaults_are_read_as_python_reads_them(tmp_path):
    """Papermill's reader leaves out the text with "="; the sweep then looked for the numbers of another run."""
    cell = nbformat.v4.new_code_cell(
        'layer: int = 9  # of 12\nweights = "a=b, c"  # where from = there\nscale_range = (0.5,\n    1.5)\nseed = -0\n'
    )
    cell.metadata["tags"] = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    known = {"layer": 9, "weights": "a=b, c", "scale_range": (0.5, 1.5), "seed": 0}
    assert sweep.defaults_of(tmp_path / "n.ipynb") == known
    (point,) = sweep.points_of(tmp_path / "n.ipynb", tmp_path, {}, {})
    assert point.config == override(tiny(), **known)
    cell.source = "layer = 3 + x\n"
    nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / "n.ipynb")
    with pytest.raises(ToCoError, match=r"n.ipynb: the default of layer is 3 \+ x: a literal is wanted"):
        sweep.defaults_of(tmp_path / "n.ipynb")
