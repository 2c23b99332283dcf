import math

import numpy as np
import pytest
import scipy.stats

from toco_core.config import override, tiny, voc
from toco_core.errors import ToCoError
from toco_core.runs.comparison import (
    class_differences,
    config_differences,
    found_runs,
    manifest_differences,
    markdown_table,
    open_folders,
    paired_p_value,
    short_names,
    shown,
    within_noise,
)
from toco_core.runs.folder import Run


def run_of(folder, config):
    run = Run(folder)
    run.begin(config)
    return run


def test_differences_of_configs_name_the_fields():
    configs = {"a": tiny(), "b": override(tiny(), ptc=0.0, out_dir="elsewhere"), "c": override(tiny(), seed=3)}
    ptc, seed = tiny().loss.ptc, tiny().seed
    assert config_differences(configs) == {
        "ptc": {"a": ptc, "b": 0.0, "c": ptc},
        "seed": {"a": seed, "b": seed, "c": 3},
    }
    assert config_differences({"a": tiny(), "b": tiny()}) == {}
    found = config_differences({"tiny": tiny(), "voc": voc()})
    assert found["steps"] == {"tiny": tiny().schedule.steps, "voc": 20000}
    assert found["cam_scales"]["voc"] == [1.0, 0.5, 1.5] and "temperature" not in found


def test_differences_of_manifests():
    one = {"versions": {"torch": "2.13", "timm": "1"}, "git": {"commit": "a", "changed": False}, "gpu": None}
    two = {"versions": {"torch": "2.12", "timm": "1"}, "git": None, "gpu": None}
    assert manifest_differences({"x": one, "y": two}) == {
        "versions.torch": {"x": "2.13", "y": "2.12"},
        "git.commit": {"x": "a", "y": "-"},
        "git.changed": {"x": False, "y": "-"},
        "git": {"x": "-", "y": None},
    }
    assert manifest_differences({"x": one, "y": one}) == {}


def test_short_names_tell_runs_apart(tmp_path):
    runs = [run_of(tmp_path / "a", tiny()), run_of(tmp_path / "b", override(tiny(), ptc=0.0))]
    assert short_names(runs) == [f"ptc={tiny().loss.ptc:g}", "ptc=0"]
    runs.append(run_of(tmp_path / "c", override(tiny(), ptc=0.0, seed=1)))
    assert short_names(runs)[1:] == ["ptc=0 seed=0", "ptc=0 seed=1"]
    runs.append(run_of(tmp_path / "d", override(tiny(), ptc=0.0, seed=1)))  # the same again
    assert short_names(runs) == ["run 1", "run 2", "run 3", "run 4"]
    assert short_names([runs[0], run_of(tmp_path / "e", voc())]) == ["run 1", "run 2"]  # too many fields
    assert short_names(runs[:1]) == ["run 1"]


def test_found_runs_and_open_folders(tmp_path):
    assert found_runs(tmp_path / "nowhere") == []
    run_of(tmp_path / "b", tiny())
    run_of(tmp_path / "a", tiny())
    (tmp_path / "c").mkdir()
    assert [run.folder.name for run in found_runs(tmp_path)] == ["a", "b"]
    assert [run.folder for run in open_folders([tmp_path / "b", str(tmp_path / "a")])] == [
        tmp_path / "b",
        tmp_path / "a",
    ]
    with pytest.raises(ToCoError, match="c has no config.json"):
        open_folders([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ToCoError, match="b is named twice"):
        open_folders([tmp_path / "b", tmp_path / "a" / ".." / "b"])


def test_class_differences():
    found = class_differences([10.0, 20.0, math.nan], [13.0, 15.5, 1.0])
    assert found[:2] == [3.0, -4.5] and math.isnan(found[2])
    with pytest.raises(ToCoError, match="3 and of 2 classes"):
        class_differences([1.0, 2.0, 3.0], [1.0, 2.0])


def test_tables():
    table = markdown_table(["field", "a"], [["lr", 5e-4], ["names", ["x|y"]], ["gone", None], ["nan", math.nan]])
    assert table.splitlines() == [
        "| field | a |",
        "|---|---:|",
        "| lr | 0.0005 |",
        "| names | ['x/y'] |",
        "| gone | - |",
        "| nan | - |",
    ]
    assert shown("x" * 80) == "x" * 57 + "..." and shown(12.345678) == "12.346" and shown(True) == "True"


@pytest.mark.parametrize("n", [2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("shift", [0.03, -0.7, 2.5])
def test_p_values_are_those_of_the_paired_t_test(n, shift):
    values = np.random.default_rng(n).normal(shift, 1.3, n)
    wanted = scipy.stats.ttest_1samp(values, 0).pvalue
    assert paired_p_value(values) == pytest.approx(wanted, rel=1e-9)
    assert within_noise(values) == (wanted > 0.05)
    assert paired_p_value([*values, math.nan]) == paired_p_value(values)


def test_differences_without_a_spread():
    assert paired_p_value([]) == paired_p_value([3.0]) == paired_p_value([0.0, 0.0]) == 1
    assert paired_p_value([2.0, 2.0, 2.0]) == pytest.approx(0) and not within_noise([2.0, 2.0, 2.0])
