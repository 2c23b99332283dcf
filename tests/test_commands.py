"""The one command line."""

import dataclasses
import json
import math
import re
import subprocess
import sys

import pytest
from voc_folder import write_voc_folder

from toco_core.__main__ import COMMANDS, UNREAD, main
from toco_core.commands.evaluate import scores_table
from toco_core.commands.fields import field_help
from toco_core.config import configured, field_sections, tiny, voc
from toco_core.config.parameters import named_values
from toco_core.errors import ToCoError
from toco_core.evaluation.scores import SCORED, RunScores
from toco_core.runs.folder import as_json
from toco_core.runs.shipped import shipped_runs


def test_help_lists_every_field_with_its_value_and_what_it_allows(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["train", "tiny", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    config, n = tiny(), 0
    for name, section in field_sections().items():
        record = getattr(config, section) if section else config
        field = next(f for f in dataclasses.fields(record) if f.name == name)
        if not section and dataclasses.is_dataclass(getattr(config, name)):
            assert f"{name}: {field.metadata['help']}" in said
            continue
        n += 1
        assert f" {name}={getattr(record, name)!r} [" in said and field.metadata["help"] in said, name
    assert n > 60
    for entry in (
        "layer=9 [int; at least 1, at most 1000]",
        "pooling='max' [str; one of max, mean, topk, cam_topk]",
        "mean=None [tuple[float, ...] | None; 3 numbers, at least 0, at most 1]",
        "cam_scales=(1.0,) [tuple[float, ...]; above 0, at most 16]",
        "device='auto' [str]",
    ):
        assert f" {entry} " in said, entry


def test_help_shows_the_values_of_the_recipe():
    assert "  batch_size=8  [" in field_help(tiny()) and "  batch_size=4  [" in field_help(voc())


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_says_how_it_is_called(name, capsys):
    main(["--help"])
    assert re.search(rf"^  toco {name} +\S", capsys.readouterr().out, re.MULTILINE)
    with pytest.raises(SystemExit, match="0"):
        main([name, "-h"])
    assert f"usage: toco {name}" in capsys.readouterr().out


def test_no_command_at_all_lists_them(capsys):
    assert main([]) == 0 and "toco export" in capsys.readouterr().out


def test_fields_are_read_as_literals():
    texts = ["layer=9", "cam_scales=(1.0, 0.5)", "dataset=my data", "out_dir=x=y"]
    config = configured(tiny(), **named_values(texts))
    assert (config.model.layer, config.labels.cam_scales) == (9, (1.0, 0.5))
    assert (config.data.dataset, config.out_dir) == ("my data", "x=y")
    with pytest.raises(ToCoError, match="'layer' is not allowed: NAME=VALUE is wanted"):
        named_values(["seed=1", "layer"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tiny", "layr=9"], "there is no parameter 'layr': did you mean layer"),
        (["train", "tiny", "layer=0"], "layer = 0 is not allowed: at least 1, at most 1000"),
        (["train", "tiny", "--layer", "9"], "--layer is not allowed: fields are given as NAME=VALUE"),
        (["train", "--layer", "9"], "--layer is not allowed: fields are given as NAME=VALUE"),
        (["train", "--save-every", "9", "layer=9"], "'layer=9' is not a recipe: one of coco, photographs, tiny, voc"),
        (["paint"], "'paint' is not a recipe"),
        (["paint", "--help"], "`toco --help` lists the other commands"),
        (["evaluate", "nowhere"], "nowhere"),
        (["train", "tiny", "recipe=tiny"], "there is no parameter 'recipe'"),
        (["train", "tiny", "config=tiny"], "there is no parameter 'config'"),
        (["train", "tiny", "layer"], "'layer' is not allowed: NAME=VALUE is wanted"),
        (["train", "tiny", "--film", "2", "layr=9"], "there is no parameter 'layr': did you mean layer"),
        (["export", "nowhere", "out"], "nowhere"),
        (["label", "nowhere", "photos", "out"], "nowhere"),
        (["label", "full", "photos", "out", "--images", "none", "--format", "cvat"], "with format = 'cvat'"),
        (["export", "full", "out", "--images", "none", "--format", "label-studio"], "images = 'none' is not allowed"),
        (["tiny", "log_to=wandb"], "log_to = 'wandb' is not allowed: one of '', tensorboard, trackio"),
    ],
)
def test_refusals_are_one_line(words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert str(stopped.value).startswith("error: ") and message in str(stopped.value)
    assert "\n" not in str(stopped.value)


@pytest.mark.parametrize(("name", "wanted"), [("train", "voc}"), ("notebooks", "folder")])
def test_what_may_be_left_out_is_not_asked_for(name, wanted, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([name])
    assert capsys.readouterr().err.rstrip().endswith(wanted)


def test_a_pipe_that_is_closed_ends_a_command_without_a_word(tmp_path):
    """`toco check photos | head` ended in a traceback."""
    words = [sys.executable, "-m", "toco_core", "check", write_voc_folder(tmp_path / "voc", n=2)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b"" and process.wait() == UNREAD


def test_a_run_is_scored_class_by_class(tmp_path, capsys):
    """A shipped run, whose scores come with it: nothing is computed."""
    out = tmp_path / "scores.json"
    assert main(["evaluate", "full", "--out", str(out)]) == 0
    protocol, heads, mean, *classes = capsys.readouterr().out.splitlines()
    kept = shipped_runs()["full"].scores()
    assert protocol == kept["protocol"] and heads.split("  ")[-1] == "segmentation"
    assert mean.split() == ["mIoU", *(f"{kept['miou'][kind]:.1f}" for kind in SCORED)]
    assert classes[1].split() == ["cat", *(f"{kept['iou'][kind][1]:.1f}" for kind in SCORED)]
    written = json.loads(out.read_text())
    assert written["miou"] == kept["miou"] and written["classes"][1] == "cat" and len(classes) == 9
    assert {len(line) for line in (heads, mean, *classes)} == {len(heads)}


def test_a_class_that_nobody_shows_has_a_dash_and_a_null():
    one = {kind: [50.0, math.nan] for kind in SCORED}
    scores = RunScores("val", "val: 1 image", 0.1, 0.2, 0.3, {}, dict.fromkeys(SCORED, 50.0), one, 90.0, [])
    *_, row, last = scores_table(scores, ("background", "cat")).splitlines()
    assert row.split() == ["cat"] + ["-"] * len(SCORED)
    assert last == "no mask of val shows a class, each mIoU is the background's IoU: see `toco check`"
    shown = scores._replace(iou={kind: [50.0, 40.0] for kind in SCORED}, miou=dict.fromkeys(SCORED, 45.0))
    assert scores_table(shown, ("background", "cat")).splitlines()[-1].startswith("cat")
    assert json.loads(as_json(scores._asdict()))["iou"]["cam"] == [50.0, None]
