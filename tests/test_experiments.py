"""What experiments on variants share: options, records that keep what is not run again, runs that are not repeated."""

import importlib.util
import json
from pathlib import Path

import pytest
from voc_folder import write_voc_folder

from toco_core.config import override, tiny

FOLDER = Path(__file__).parent.parent / "experiments"
SOURCE = FOLDER / "common.py"
RESULT = {"variant": "a", "run": "0123456789", "minutes": 1.0}


@pytest.fixture(scope="module")
def common():
    spec = importlib.util.spec_from_file_location("common", SOURCE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def result(seed, value):
    return (
        RESULT
        | {"seed": seed}
        | dict.fromkeys(("cam_miou", "aux_cam_miou", "refined_miou", "pseudo_miou", "seg_miou"), value)
    )


def test_a_record_keeps_other_variants_and_other_seeds_of_the_same_settings(common, tmp_path):
    record = tmp_path / "records" / "x.json"

    def put(name, fields, seed, value):
        run = override(tiny(), **fields, seed=seed).short_hash()
        return common.add_result(record, "why?", name, fields, result(seed, value) | {"run": run})

    put("a", {"par_dilations": (1, 2)}, 1, 40.0)
    put("b", {}, 0, 10.0)
    state = put("a", {"par_dilations": (1, 2)}, 0, 50.0)
    assert json.loads(record.read_text()) == state
    assert [run["seed"] for run in state["variants"]["a"]["runs"]] == [0, 1]
    steps = tiny().schedule.steps
    assert f"| a | {steps} | 2 | 45.0 ± 7.1 |" in state["table"][2]
    assert f"| b | {steps} | 1 | 10.0 | 10.0 | 10.0 | 10.0 | 10.0 |" == state["table"][3]
    state = put("a", {"lr": 1e-3}, 2, 60.0)
    assert [run["seed"] for run in state["variants"]["a"]["runs"]] == [2]  # other settings: nothing to average with


def test_options_become_fields_and_wrong_ones_are_refused(common, capsys):
    variants = {"plain": {}, "no ptc": {"ptc": 0.0}}
    words = ["--variants", "no ptc", "--steps", "70", "--seeds", "4"]
    words += ["--set", "lr=1e-3", "cam_scales=1.0,0.5", "--set", "device=cpu"]
    args = common.command_line("x", variants, words)
    assert args.variants == {"no ptc": {"ptc": 0.0}} and args.seeds == [4]
    assert args.common == {"steps": 70, "lr": 1e-3, "cam_scales": (1.0, 0.5), "device": "cpu"}
    for wrong, message in (("layr=3", "did you mean layer"), ("layer", "NAME=VALUE is wanted")):
        with pytest.raises(SystemExit):
            common.command_line("x", variants, ["--set", wrong])
        assert message in capsys.readouterr().err
    walk = {"affinity": 0.1, "attention_steps": 1, "attention_kind": "learned", "affinity_walk_start": 200}
    for late in ({"exchange": 0.1, "exchange_start": 200}, walk):
        with pytest.raises(SystemExit):
            common.command_line("x", {"late": late}, ["--steps", "200"])
        assert f"{[*late][-1]} = 200 with steps = 200 is not allowed: less" in capsys.readouterr().err


def test_a_row_of_photographs_holds_runs_of_one_config(tmp_path):
    import photographs

    record, config = tmp_path / "x.json", override(tiny(), ptc=0.5)

    def put(config, seed, value):
        config = override(config, seed=seed)
        result = {"seed": seed, "miou": dict.fromkeys(photographs.KINDS, value), "run": config.short_hash()}
        return photographs.keep_result(record, "row", result, photographs.table, {"steps": 3}, config)

    put(config, 1, 40.0)
    state = put(config, 0, 50.0)
    assert [run["seed"] for run in state["runs"]["row"]] == [0, 1] and "| row | 2 | 45.0 ± 7.1 |" in state["table"][2]
    state = put(override(config, lr=1e-3), 2, 60.0)
    assert [run["seed"] for run in state["runs"]["row"]] == [2]  # other settings: nothing to average with


@pytest.mark.slow
def test_a_variant_is_trained_and_scored_once(common, tmp_path, monkeypatch):
    data = write_voc_folder(tmp_path / "voc", n=7, splits={"train": range(4), "val": (4, 5), "test": (6,)})
    fields = {
        "dataset": str(data), "backbone": "plain_vit(image=32, patch=8, width=16, depth=2, heads=2, mlp=24)",
        "pretrained": False, "layer": 1, "frozen_blocks": 0, "attention_blocks": (1, 2), "crop_size": 32,
        "local_size": 16, "batch_size": 2, "steps": 2, "par_dilations": (1,), "warm_start_steps": 3,
    }  # fmt: skip
    first = common.run_variant("first", fields, 3, tmp_path, progress=False)
    assert set(common.METRICS.values()) < set(first) and first["seed"] == 3 and first["minutes"] >= 0
    monkeypatch.setattr("toco_core.evaluation.scores.train", lambda *_, **__: pytest.fail("the run is repeated"))
    again = common.run_variant("renamed", fields, 3, tmp_path, progress=False)
    assert again == {k: v for k, v in first.items() if k != "minutes"} | {"variant": "renamed"}


def test_a_run_is_known_by_what_was_run_and_not_by_its_variants_name(common, tmp_path):
    def put(record, name, overrides, seed, value, of=None):
        known = override(tiny(), **(overrides if of is None else of), seed=seed).short_hash()
        common.add_result(tmp_path / record, "?", name, overrides, result(seed, value) | {"run": known})

    other = tiny().loss.temperature / 2
    put("one.json", "full", {}, 0, 50.0)
    put("one.json", "full", {}, 1, 52.0)
    put("one.json", "old", {"temperature": other}, 0, 40.0, of={"lr": 1.0})  # the recipe has changed since
    put("two.json", "cold", {"temperature": other}, 1, 49.0)
    put("two.json", "no ptc", {"ptc": 0.0}, 5, 30.0)
    (tmp_path / "pretrain.json").write_text('{"question": "something else"}')
    known = common.known_runs(tmp_path)
    assert [run["cam_miou"] for run in common.runs_of({}, known)] == [50.0, 52.0]
    assert [run["cam_miou"] for run in common.runs_of({"temperature": other}, known)] == [49.0]
    variants = {
        "today's value": {"temperature": tiny().loss.temperature},
        "half": {"temperature": other},
        "no ptc": {"ptc": 0.0},
        "never": {"momentum": 0.123},
    }
    put("one.json", "old", {"temperature": other}, 1, 49.0)  # a row mixes no recipes
    record = json.loads((tmp_path / "one.json").read_text())
    assert [run["cam_miou"] for run in record["variants"]["old"]["runs"]] == [49.0]
    lines = common.table_with_gaps(variants, known, command="python x.py").splitlines()
    assert lines[2:] == [
        "| today's value | 2 | 51.0 ± 1.4 | 51.0 ± 1.4 | 51.0 ± 1.4 | 51.0 ± 1.4 | 51.0 ± 1.4 | the recipe |",
        "| half | 1 | 49.0 | 49.0 | 49.0 | 49.0 | 49.0 | -3.0 |",
        "| no ptc | 1 | 30.0 | 30.0 | 30.0 | 30.0 | 30.0 | - |",
        "| never | not run | `python x.py --variants 'never'` | | | | | |",
    ]
    assert {line.count("|") for line in lines} == {9}


def test_the_ablation_declares_what_can_be_run(common, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    ablation = importlib.import_module("ablation")
    assert sum(len(group) for group in ablation.GROUPS.values()) == len(ablation.VARIANTS)  # no name stands twice
    configs = {name: override(tiny(), **overrides) for name, overrides in ablation.VARIANTS.items()}
    assert {name for name, config in configs.items() if config == tiny()} >= {"full"}
    assert len({config.short_hash() for config in configs.values() if config != tiny()}) == sum(
        config != tiny() for config in configs.values()
    )
    assert all(override(tiny(), **values).loss.ctc > 0 for name, values in ablation.VARIANTS.items() if "temp" in name)


def test_fields_that_a_later_record_lacks_are_kept(common, tmp_path):
    known = override(tiny(), seed=4).short_hash()
    run = result(4, 50.0) | {"run": known, "token_similarity": [0.1, 0.9]}
    common.add_result(tmp_path / "a.json", "?", "x", {}, run)
    common.add_result(tmp_path / "b.json", "?", "y", {}, result(4, 50.0) | {"run": known})
    [run] = common.runs_of({}, common.known_runs(tmp_path))
    assert run["token_similarity"] == [0.1, 0.9] and run["seed"] == 4


def test_the_layer_ablation_has_six_blocks_that_the_backbone_has(common, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    layers = importlib.import_module("layer_ablation")
    configs = [override(tiny(), **overrides) for overrides in layers.VARIANTS.values()]
    assert [config.model.layer for config in configs] == list(layers.LAYERS) == [7, 8, 9, 10, 11, 12]
    assert tiny() in configs


def test_variants_of_ctc_differ_in_what_they_name(common, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    variants = importlib.import_module("ctc_variants").VARIANTS
    configs = [override(tiny(), **overrides) for overrides in variants.values()]
    assert len({config.short_hash() for config in configs}) == len(variants) and "PTC alone" in variants
    later = [(c.crops.local_resized, c.loss.ctc_cosine, c.loss.ctc_batch_negatives) for c in configs]
    assert later[1] == (False, False, False) and later[-1] == (True, True, True)


def test_shipped_runs_are_results_too(common):
    shipped = common.shipped_runs()
    found = common.shipped_results()
    assert set(found) == {run.config().short_hash() for run in shipped.values()}
    for run in shipped.values():
        result, scores = found[run.config().short_hash()], run.scores()
        assert result["seg_miou"] == round(scores["miou"]["seg"], 2) and result["seed"] == run.config().seed
        weights = {"ptc": run.config().loss.ptc, "ctc": run.config().loss.ctc}
        assert common.runs_of(weights, found) == [result]
