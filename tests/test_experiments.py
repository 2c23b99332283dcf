"""What experiments on variants share: options, records that keep what is not run again, runs that are not repeated."""

import importlib.util
import json
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "experiments" / "common.py"
RESULT = {"variant": "a", "run": "0123456789", "minutes": 1.0}


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("common", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(seed, value):
    return RESULT | {"seed": seed} | dict.fromkeys(("cam_miou", "aux_cam_miou", "seg_miou"), value)


def test_a_record_keeps_other_variants_and_other_seeds_of_the_same_settings(common, tmp_path):
    record = tmp_path / "records" / "x.json"
    common.add_result(record, "why?", "a", {"par_dilations": (1, 2)}, result(1, 40.0))
    common.add_result(record, "why?", "b", {}, result(0, 10.0))
    state = common.add_result(record, "why?", "a", {"par_dilations": (1, 2)}, result(0, 50.0))
    assert json.loads(record.read_text()) == state
    assert [run["seed"] for run in state["variants"]["a"]["runs"]] == [0, 1]
    assert "| a | 320 | 2 | 45.0 ± 7.1 |" in state["table"][2]
    assert "| b | 320 | 1 | 10.0 | 10.0 | 10.0 |" == state["table"][3]
    state = common.add_result(record, "why?", "a", {"steps": 9}, result(2, 60.0))
    assert [run["seed"] for run in state["variants"]["a"]["runs"]] == [2]  # other settings: nothing to average with


def test_options_become_fields_and_wrong_ones_are_refused(common, capsys):
    variants = {"plain": {}, "no ptc": {"ptc": 0.0}}
    words = ["--variants", "no ptc", "--steps", "70", "--seeds", "4"]
    words += ["--set", "lr=1e-3", "cam_scales=1.0,0.5", "device=cpu"]
    args = common.command_line("x", variants, words)
    assert args.variants == {"no ptc": {"ptc": 0.0}} and args.seeds == [4]
    assert args.common == {"steps": 70, "lr": 1e-3, "cam_scales": (1.0, 0.5), "device": "cpu"}
    for wrong, message in (("layr=3", "did you mean layer"), ("layer", "NAME=VALUE is wanted")):
        with pytest.raises(SystemExit):
            common.command_line("x", variants, ["--set", wrong])
        assert message in capsys.readouterr().err


def test_a_finished_run_is_answered_from_its_line(common, tmp_path, monkeypatch):
    from toco_core.config import override, tiny

    known = result(3, 33.0) | {"run": override(tiny(), steps=50, seed=3).short_hash()}
    (tmp_path / "results.jsonl").write_text(json.dumps(known) + "\n" + '{"run": "cut sho')
    monkeypatch.setattr(common, "train", lambda *_, **__: pytest.fail("the run is repeated"))
    assert common.run_variant("renamed", {"steps": 50}, 3, tmp_path) == known | {"variant": "renamed"}
