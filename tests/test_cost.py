"""The arithmetic of the cost table, by hand."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="module")
def cost():
    sys.path.insert(0, str(FOLDER))
    import cost

    yield cost
    sys.path.remove(str(FOLDER))


def test_the_published_step_time_on_two_gpus_gives_the_published_hours(cost):
    """20000 steps of 0.584 s are 3.24 h on two A100, that is 6.49 GPU-hours; without assumptions nothing is lost."""
    voc, coco, ablation = cost.works()
    assert (voc.steps, voc.batch, coco.steps, coco.batch, ablation.runs) == (20000, 4, 80000, 8, 40)
    assert cost.cost_of(voc, cost.PUBLISHED, 2, efficiency=1.0)[:2] == pytest.approx(
        (20000 * 0.584 / 3600, 6.48889), 1e-5
    )
    for efficiency in (0.5, 0.85, 1.0):  # the same two devices: whatever is assumed, it cancels out
        assert cost.cost_of(voc, cost.PUBLISHED, 2, efficiency).hours == pytest.approx(20000 * 0.584 / 3600)


def test_a_run_is_spread_over_as_many_as_divide_its_batch(cost):
    """One hour on one device: 3600 steps of 4 images of a quarter second."""
    step, work = cost.StepTime("x", 2, 1, 0.5), cost.Work("w", 1, 3600, 4)
    assert cost.cost_of(work, step, 1, 0.8) == (1.0, 1.0, 1, 1, 0)
    assert cost.cost_of(work, step, 3, 0.8) == pytest.approx((1 / 1.6, 1.25, 2, 1, 1))  # 3 do not divide 4
    eight = cost.cost_of(work, step, 8, 0.8)
    assert eight == pytest.approx((1 / 3.2, 1.25, 4, 1, 4)) and eight[:2] == cost.cost_of(work, step, 64, 0.8)[:2]
    assert cost.cost_of(work, step, 64, 0.8).idle == 60


def test_runs_side_by_side_cost_nothing_more(cost):
    step, work = cost.StepTime("x", 4, 1, 1.0), cost.Work("w", 40, 3600, 4)
    assert cost.cost_of(work, step, 1, 0.8) == (40.0, 40.0, 1, 1, 0)
    assert cost.cost_of(work, step, 8, 0.8) == (5.0, 40.0, 1, 8, 0)
    assert cost.cost_of(work, step, 64, 0.8) == (1.0, 40.0, 1, 40, 24)
    assert cost.cost_of(work, step, 80, 0.8) == pytest.approx((1 / 1.6, 50.0, 2, 40, 0))


def test_step_times_come_from_records(cost, tmp_path, capsys, monkeypatch):
    assert cost.known_step_times(tmp_path) == [cost.PUBLISHED]
    point = {"width": "base", "batch": 16, "way": "replayed", "ms_per_step": 800.0}
    points = [point, point | {"width": "tiny"}, point | {"way": "eager"}]
    record = {"machine": {"gpu": "H100"}, "speed": {"points": points}}
    (tmp_path / "benchmarks_gpu.json").write_text(json.dumps(record))
    own = {"source": "here", "images": 1, "devices": 1, "seconds": 50.0}
    (tmp_path / "cost.json").write_text(json.dumps({"measured": {"steps": [own], "machine": {}}}))
    found = cost.known_step_times(tmp_path)
    assert found[1:] == [cost.StepTime("measured, H100, batch 16", 16, 1, 0.8), cost.StepTime(**own)]
    monkeypatch.setattr(cost, "RECORDS", tmp_path)
    monkeypatch.setattr(cost, "known_step_times", lambda: found)
    cost.main(["--efficiency", "0.5"])
    text, written = capsys.readouterr().out, json.loads((tmp_path / "cost.json").read_text())
    assert "| VOC reproduction | here | 1 | 1111.1 | 1111.1 | 1 at once, 1 each |" in text
    assert "assumed: 50% efficiency" in text and written["assumed"] == {"efficiency": 0.5}
    assert len(written["rows"]) == 3 * 3 * 3 and written["measured"]["steps"] == [own]  # what was measured stays
    with pytest.raises(SystemExit):
        cost.main(["--efficiency", "1.5"])
    assert "above 0, at most 1" in capsys.readouterr().err


def test_the_record_is_what_the_arithmetic_gives(cost):
    record = json.loads((FOLDER / "records" / "cost.json").read_text(encoding="utf-8"))
    steps = [*cost.known_step_times(), *(cost.StepTime(**step) for step in record["measured"]["steps"])]
    rows = cost.rows_of(steps, record["assumed"]["efficiency"])
    assert all(row in record["rows"] for row in rows) and {"cpu", "threads", "torch"} <= set(
        record["measured"]["machine"]
    )
