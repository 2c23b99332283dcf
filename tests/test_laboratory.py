"""Trials of seconds: the first fills the store, later ones find it; the widget shows and refuses without a browser."""

import re
import threading

import numpy as np
import pytest
import torch
from small_config import few_scenes
from test_kept_tokens import small

from toco_core.analysis.trials import Frame, Trials
from toco_core.config import LabelConfig, LossConfig, ModelConfig, ScheduleConfig, override, tiny
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.train.loop import train
from toco_core.viz import RUN_COLOURS, label_colours
from toco_core.widgets.laboratory import FIELDS, Laboratory, frame_picture, loss_svg, row_texts


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=12, n_train=7, n_val=5, n_test=1)


def trials(data, **changes):
    config = small(warm_start_steps=4, cam_scales=(1.0,), seg_start=3, **changes)
    return Trials(config, n_train=5, n_val=4, steps=6, every=2, data=data)


@pytest.fixture(scope="module")
def bench(data):
    """A laboratory in which two runs were made."""
    found = Laboratory(trials(data))
    found.run()
    found.run(ptc=1.5, beta_h=0.6)
    return found


def test_the_first_fills_the_store_and_later_ones_find_it(bench):
    first, second = bench.trials.done
    # warm start: 5; image, mirror and second view of each: 15; 4 validation images and their mirrors
    assert (first.computed, second.computed) == (5 + 15 + 8, 0)
    assert second.found > first.found > 0
    assert first.changed == {} and second.changed == {"ptc": 1.5, "beta_h": 0.6}
    assert (first.number, second.number, first.steps, first.stopped) == (1, 2, 6, False)
    assert [r["step"] for r in first.records] == [0, 2, 4, 5]
    assert first.records[0]["total"] != second.records[0]["total"]
    assert not np.array_equal(first.frame.cam, second.frame.cam)


def test_a_trial_is_the_run_of_its_config(data, bench, tmp_path):
    trial, made = bench.trials.done[1], bench.trials
    plain = train(override(trial.config, out_dir=str(tmp_path)), data=made.data, progress=False)
    found = evaluate_as(trial.config, plain.model, made.data.val, progress=False)
    assert trial.scores["cam"] == 100 * np.nanmax(found.cam.miou) and trial.beta == found.cam.best_beta
    assert (
        trial.scores["aux_cam"] == 100 * np.nanmax(found.aux_cam.miou) and trial.scores["seg"] == 100 * found.seg.miou
    )
    assert len({*trial.scores.values()}) == 3
    records = [r for r in plain.run.records() if "total" in r]
    assert [(r["step"], r["total"]) for r in records] == [(r["step"], r["total"]) for r in trial.records]
    with torch.no_grad():
        images = torch.cat([item.image for item in made.shown]).float() / 255
        output = plain.model.heads(plain.model.encode(plain.model.normalise(images)))
    size = trial.frame.segmentation.shape[1:]
    wanted = torch.nn.functional.interpolate(output.seg_logits, size, mode="bilinear").argmax(1)
    assert (wanted.numpy() == trial.frame.segmentation).mean() > 0.99


def test_what_a_frame_holds(bench):
    frame, shown = bench.trials.done[0].frame, bench.trials.shown
    assert frame.step == 6 and frame.cam.shape == (4, 64, 64) and frame.token_label.shape == (4, 8, 8)
    assert 0 <= frame.cam.min() < 0.1 and 0.9 < frame.cam.max() <= 1
    for b, item in enumerate(shown):
        allowed = {0, 255, *(np.flatnonzero(item.image_labels[0]) + 1).tolist()}
        assert set(np.unique(frame.token_label[b]).tolist()) <= allowed


def test_a_frame_moves_no_bit(data):
    records = []
    for every in (1, 100):
        made = Trials(small(), n_train=5, n_val=2, steps=3, every=every, data=data)
        records.append(made.run().records)
    assert records[0] == records[1]


def test_a_stopped_trial_is_scored_as_it_is(data):
    made, frames = trials(data), []
    trial = made.run(on_frame=frames.append, stop=lambda: len(frames) == 1, steps=8)
    assert trial.stopped and trial.steps == trial.frame.step == 3 and [f.step for f in frames] == [2, 3]
    assert trial.changed == {"steps": 8} and 0 < trial.scores["cam"] < 100 and -1 < trial.token_similarity < 1
    assert row_texts(trial)[1:3] == ["nothing", "3 of 8"]
    whole = made.run(steps=8)
    assert [r["total"] for r in whole.records][:2] == [r["total"] for r in trial.records][:2]


def test_what_cannot_be_is_refused_in_one_line_and_leaves_no_row(bench, data):
    for values, words in {
        (("beta_l", 0.9),): "beta_l = 0.9 must be below beta_h = 0.7",
        (("layer", 13),): "layer = 13 is not allowed: .* has 1..12",
        (("ptc", -1.0),): "ptc = -1.0 is not allowed: at least 0",
        (("pct", 1.0),): "there is no parameter 'pct': did you mean ptc",
    }.items():
        with pytest.raises(ToCoError, match=words):
            bench.run(**dict(values))
    assert len(bench.trials.done) == len(bench.table.rows) == 2
    with pytest.raises(ToCoError, match="frozen_blocks = 0"):
        Trials(small(frozen_blocks=0), data=data)
    with pytest.raises(ToCoError, match="n_val = 0 is not allowed"):
        Trials(small(), n_val=0, data=data)
    bench.controls["beta_l"].value = 0.95
    assert "must be below" in bench.notes.value
    bench.train.click()
    assert "must be below" in bench.notes.value and not bench.train.disabled
    bench.controls["beta_l"].value = 0.25
    assert bench.notes.value == ""
    bench.table.wanted = [7, 1]
    assert "run = 8 is not allowed: 1..2" in bench.notes.value


def test_controls_are_the_configs_fields(bench):
    helps = LossConfig.help() | LabelConfig.help() | ScheduleConfig.help() | ModelConfig.help()
    assert tuple(bench.controls) == FIELDS and bench.values() == {}
    for name in FIELDS:
        assert bench.controls[name].tooltip == helps[name]
    assert bench.controls["layer"].options == (9, 10, 11, 12)
    assert bench.controls["beta_h"].options[:3] == (0, 0.05, 0.1) and bench.controls["beta_h"].options[-1] == 1
    bench.controls["ptc"].value = 1.25
    assert bench.values() == {"ptc": 1.25}
    bench.controls["ptc"].value = bench.trials.config.loss.ptc
    assert Trials(data=bench.trials.data, steps=20).config.loss.ptc == tiny().loss.ptc


def test_a_value_between_the_steps_stays(data):
    """A browser moves a slider of numbers to its nearest step: each slider chooses among values, the config's too."""
    values = {"ptc": 0.3, "seg": 0.07, "beta_h": 0.555, "lr": 3.3e-4}
    found = Laboratory(Trials(override(small(), **values), n_train=5, n_val=4, steps=25, data=data))
    for name, value in (values | {"steps": 25}).items():
        control = found.controls[name]
        choices = [option[1] if isinstance(option, tuple) else option for option in control.options]
        assert choices[control.index] == value and choices == sorted(choices), name
        assert len(choices) > 10, name
    assert found.values() == {}
    found.controls["lr"].index += 1
    assert found.values() == {"lr": 4e-4}


def test_a_row_brings_its_pictures_back(bench):
    bench.table.wanted = [0, 2]
    first = bench.picture.value
    assert bench.table.chosen == 0 and "thick: run 1" in bench.curves.value
    bench.table.wanted = [1, 3]
    assert bench.table.chosen == 1 and bench.picture.value != first
    bench.table.wanted = [0, 4]
    assert bench.picture.value == first
    assert bench.table.colours == list(RUN_COLOURS[:2])
    assert [row[1] for row in bench.table.rows] == ["nothing", "beta_h 0.6, ptc 1.5"]
    assert len({len(row) for row in bench.table.rows} | {len(bench.table.head)}) == 1
    text = bench._repr_mimebundle_()[0]["text/plain"]
    assert len(text.splitlines()) == 3 and "ptc 1.5" in text


def test_the_button_trains_behind_and_stop_ends_it(data):
    found = Laboratory(trials(data))
    found.term.value = "total"
    assert found.picture.layout.display == "none"  # browsers show an empty picture as a broken one
    started, states = threading.Event(), []
    found.state.observe(lambda change: (states.append(change["new"]), started.set()), "value")
    found.controls["steps"].value = 120
    found.train.click()
    assert started.wait(60) and found.train.disabled and not found.halt.disabled
    with pytest.raises(ToCoError, match="a run is in progress"):
        found.run()
    found.halt.click()
    found.settle()
    (trial,) = found.trials.done
    assert trial.stopped and not found.train.disabled and found.halt.disabled and len(found.table.rows) == 1
    assert found.picture.layout.display is None
    assert found.picture.value and re.search(r"run 1: \d+\.\d s", found.state.value) and "stopped" in found.state.value
    assert found.notes.value == ""


def test_pictures_stand_where_they_belong(bench):
    items = bench.trials.shown[:3]
    cam = np.zeros((3, 64, 64), np.float32)
    cam[1, :32, 32:] = 1
    token_label = np.zeros((3, 8, 8), np.uint8)
    token_label[2, 4:, :4] = 3
    picture = frame_picture(items, Frame(0, cam, token_label, np.full((3, 64, 64), 5, np.uint8)))
    assert picture.shape == (22 + 3 * 100, 5 * 96 + 4 * 6, 3)

    def cell(row, column):
        return picture[22 + 100 * row : 118 + 100 * row, 102 * column : 102 * column + 96].astype(float)

    top = cell(1, 1)
    assert top[4:44, 52:92].mean() > top[52:92, 4:44].mean() + 40
    blue = label_colours(np.full((1, 1), 3, np.uint8))[0, 0].astype(float)
    label, image = cell(2, 2), cell(2, 0)
    np.testing.assert_allclose(label[:44], image[:44])
    np.testing.assert_allclose(label[52:, :44], 0.75 * blue + 0.25 * image[52:, :44], atol=1.5)


def test_curves_of_all_runs():
    runs = [(1, [{"step": 0, "total": 4.0}, {"step": 9, "total": 1.0}]), (9, [{"step": 0, "total": 2.0}])]
    svg = str(loss_svg(runs, "total", chosen=9))
    lines = re.findall(r'points="([^"]+)" fill="none" stroke="([^"]+)" stroke-width="([^"]+)"', svg)
    assert [(stroke, thick) for _, stroke, thick in lines] == [(RUN_COLOURS[0], "1.5"), (RUN_COLOURS[0], "3")]
    (x1, y1), (x2, y2) = ([float(v) for v in point.split(",")] for point in lines[0][0].split())
    assert x1 < x2 and y1 < y2 and y1 == 14  # falls; the highest value is at the top
    assert "polyline" not in str(loss_svg([], "total", chosen=0))
