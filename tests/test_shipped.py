"""Runs that come with the package: packed, opened as any run is, and held against their scores."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from small_config import few_scenes, small_recipe
from torch.testing import assert_close

import toco_core.runs.shipped as shipped
from toco_core.__main__ import main
from toco_core.config import override
from toco_core.data import open_data
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.evaluation.scores import read_scores, scored_run
from toco_core.predict.models import open_model
from toco_core.runs.comparison import open_folders
from toco_core.runs.folder import Run
from toco_core.runs.hub import from_pretrained
from toco_core.runs.opened import open_run
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.loop import train, trained_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=12, n_train=6, n_val=4, n_test=2)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    config = override(
        small_recipe(), crop_size=64, batch_size=2, n_local=2, steps=2, warmup_steps=1, lr=1e-3, frozen_blocks=8,
        eval_interval=0, dataset=str(data.train.root), out_dir=str(tmp_path_factory.mktemp("runs")),
    )  # fmt: skip
    return train(config, data=data, progress=False).run


def test_a_packed_run_opens_as_it_was_to_half_precision(run, data, tmp_path, monkeypatch):
    packed = shipped.pack(run, tmp_path / "trained" / "one")
    was, found = run.load()["model"], packed.load()["model"]
    assert set(found) == set(was)
    for name, value in was.items():
        assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        if name.startswith("encoder.blocks.3."):  # frozen: taken from the backbone's file
            assert torch.equal(found[name], value)
    assert (packed.folder / "model.safetensors").stat().st_size < 0.6 * sum(v.numel() for v in was.values()) * 2
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "trained")
    monkeypatch.setattr("toco_core.train.loop.train", lambda *_, **__: pytest.fail("a shipped run is trained again"))
    assert list(shipped.shipped_runs()) == ["one"]
    opened = trained_run(override(run.config(), workers=1, log_interval=3), data=data)
    assert opened.run.folder == packed.folder
    assert_close(opened.model.decoder.conv8.weight, was["decoder.conv8.weight"], rtol=1e-3, atol=1e-4)
    assert shipped.shipped_run(override(run.config(), seed=5)) is None


def test_every_command_takes_a_shipped_run_by_its_name(run, data, tmp_path, monkeypatch, capsys):
    shipped.pack(run, tmp_path / "trained" / "one")
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "trained")
    monkeypatch.chdir(tmp_path)
    assert main(["export", "one", "labels", "--method", "cam"]) == 0 and "6 label maps" in capsys.readouterr().out
    assert main(["share", "one", "shared"]) == 0 and from_pretrained("shared").class_names == data.train.class_names
    monkeypatch.setattr("toco_core.commands.onnx.write_onnx", lambda model, file: f"{model.n_classes} to {file}")
    assert main(["onnx", "one", "one.onnx"]) == 0 and capsys.readouterr().out.endswith("8 to one.onnx\n")
    assert open_model("one").name == "one" and [found.folder.name for found in open_folders(["one"])] == ["one"]
    shutil.copytree(run.folder, "one")  # a folder of that name comes first
    assert open_run("one").run.folder == Path("one") and open_model("one").step == 2


def test_an_unfinished_run_and_another_backbone_cannot_be_shipped(run, tmp_path):
    begun = Run(tmp_path / "begun")
    begun.begin(run.config())
    with pytest.raises(ToCoError, match="begun is not finished: only a finished run can be shipped"):
        shipped.pack(begun, tmp_path / "x")
    with pytest.raises(ToCoError, match="backbone = 'vit_tiny_patch16_224' is not shipped"):
        shipped.backbone_state(override(run.config(), backbone="vit_tiny_patch16_224"))


@pytest.fixture(scope="module")
def kept():
    """The frozen blocks are those of the backbone in all shipped runs."""
    return KeptTokens()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(shipped.shipped_runs()))
def test_a_shipped_run_has_the_scores_that_come_with_it(name, kept):
    """The validation part, scored anew: the same counts to a rounding's worth of pixels."""
    run = shipped.shipped_runs()[name]
    opened = open_run(run.folder)
    assert opened.config.short_hash() == run.config().short_hash()
    scores = read_scores(run)
    assert scores.part == "test" and scored_run(opened.config, data=opened.data, progress=False).scores == scores
    val = opened.data.val
    opened.model.freeze_blocks(opened.config.schedule.frozen_blocks)
    with kept.of(opened.model, blocks=kept_blocks(opened.config)):
        found = evaluate_as(opened.config, opened.model, val, progress=False)
    assert abs(100 * found.cam.scores(scores.beta).miou - scores.val["cam"]) < 0.5
    assert abs(100 * found.seg.miou - scores.val["seg"]) < 0.5


def test_shipped_runs_are_small_and_know_todays_drawing_and_backbone():
    total = 0
    for run in shipped.shipped_runs().values():
        total += sum(path.stat().st_size for path in run.folder.iterdir())
        run.refuse_other_data(open_data(run.config().data))
        assert json.loads((run.folder / "config.json").read_text())["device"] == "auto"
    assert 0 < total < 15e6
