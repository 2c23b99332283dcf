"""What is handed on is the run's model, readable without its data; the Hub itself is out of reach here."""

import json
import os
import shutil

import pytest
import torch
import yaml
from safetensors.torch import save_file
from small_config import small_recipe
from voc_folder import write_voc_folder

from toco_core.__main__ import main
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.runs import hub
from toco_core.runs.folder import Run
from toco_core.train.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("here")
    data = write_voc_folder(root / "animals", splits={"train": range(4), "val": range(4, 6)})
    small = {"crop_size": 32, "local_size": 16, "n_local": 2, "cam_scales": (1.0,), "batch_size": 2, "layer": 7}
    short = {"steps": 2, "warmup_steps": 1, "eval_interval": 0, "device": "cpu", "dropped_border": True}
    config = override(small_recipe(), dataset=str(data), out_dir=str(root / "runs"), **small, **short)
    return train(config, progress=False)


@torch.no_grad()
def test_a_folder_gives_back_the_same_model_without_the_data(trained, tmp_path, capsys):
    folder = tmp_path / "shared"
    assert main(["share", str(trained.run.folder), str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert {path.name for path in folder.iterdir()} == set(hub.FILES)
    model, config, class_names = hub.from_pretrained(folder)
    images = torch.rand(2, 3, 40, 27, generator=torch.Generator().manual_seed(0))
    for ours, theirs in zip(trained.model(images)[:3], model(images)[:3], strict=True):
        assert torch.equal(ours, theirs)
    assert not model.training and model.dropped_border and model.layer == 7
    assert class_names == ("background", "cat", "dog", "sheep")
    assert config == override(trained.run.config(), dataset="animals", out_dir="runs")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    hub.save_pretrained(trained.run, folder)  # once more over it


def test_the_card_has_scores_with_protocol_data_and_versions_and_no_path(trained, tmp_path):
    folder = hub.save_pretrained(trained.run, tmp_path / "shared")
    card = (folder / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "toco_core"
    metrics = trained.run.metrics()
    for name in ("cam_miou", "seg_miou"):
        assert f"| {metrics[name]:.1f} | {metrics['protocol']} |" in card
    assert "`animals`: 4 images to train on, 2 to validate on. Classes: cat, dog, sheep." in card
    assert f"torch {torch.__version__.partition('+')[0]}" in card and "block\n7, seed 0" in card
    root = str(trained.run.folder.parents[1])
    assert root not in card and root not in (folder / "config.json").read_text()


def test_scores_that_were_kept_are_on_the_card(trained):
    scores = {"protocol": "test: as told", "miou": {"cam": 33.33, "aux_cam": None, "pseudo_label": 41.0, "seg": 20.0}}
    card = hub.model_card(trained.run.config(), trained.run.manifest(), trained.run.metrics(), scores)
    assert "| final CAM | 33.3 | test: as told |" in card and "| pseudo label | 41.0 | test: as told |" in card
    assert "auxiliary CAM |" not in card


def test_what_cannot_be_handed_on_or_read_is_named(trained, tmp_path):
    with pytest.raises(ToCoError, match="none has no config.json: it is not the folder of a run"):
        hub.save_pretrained(Run(tmp_path / "none"), tmp_path / "shared")
    begun = Run(tmp_path / "begun")
    begun.begin(trained.run.config())
    with pytest.raises(ToCoError, match="begun is not a finished run: train it to its end first"):
        hub.save_pretrained(begun, tmp_path / "shared")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    with pytest.raises(ToCoError, match="full' holds other files"):
        hub.save_pretrained(trained.run, tmp_path / "full")
    with pytest.raises(ToCoError, match="full' has no config.json of this package"):
        hub.from_pretrained(tmp_path / "full")
    folder = hub.save_pretrained(trained.run, tmp_path / "shared")
    facts = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(facts | {"class_names": ["background", "cat", "dog"]}))
    with pytest.raises(ToCoError, match=r"shared'.*classifier.weight is 3 x \d+ and not 2"):
        hub.from_pretrained(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("kind", ["pipe", "device", "holes", "deep", "list", "text"])
def test_a_shared_config_passes_the_gate(trained, tmp_path, kind):
    path = hub.save_pretrained(trained.run, tmp_path / "shared") / "config.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "list":
        path.write_text(json.dumps({"class_names": ["background", "a"], "config": []}))
    elif kind == "text":  # of as many letters as there are classes
        path.write_text(json.dumps({"class_names": "cat", "config": trained.run.config().to_dict()}))
    else:
        path.write_text("[" * 100_000)
        os.truncate(path, (100 << 30) if kind == "holes" else 100_000)
    with pytest.raises(ToCoError, match="shared' has no config.json of this package"):
        hub.from_pretrained(path.parent)


def test_a_shared_card_passes_the_gate(trained, tmp_path):
    card = hub.save_pretrained(trained.run, tmp_path / "shared") / "README.md"
    os.truncate(card, 100 << 30)
    with pytest.raises(ToCoError, match="README.md has .* bytes: at most"):
        hub.from_pretrained(card.parent)


def test_half_of_a_character_is_a_question_mark_on_the_card(trained, tmp_path):
    run = copied(trained, tmp_path / "run", "manifest.json", {"python": "3.\ud800"})
    assert "Python 3.?," in (hub.save_pretrained(run, tmp_path / "shared") / "README.md").read_text()


def copied(trained, folder, name=None, values=None):
    """The run at another place, where a file of records has other values."""
    shutil.copytree(trained.run.folder, folder)
    if name:
        known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
        (folder / name).write_text(json.dumps(known | values))
    return folder


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *(("manifest.json", {"data": data}) for data in ([1], {}, {"classes": 5}, {"classes": [["a"], {}, None, 3]})),
        ("manifest.json", {"versions": None}),
        *(("metrics.json", {"map": score}) for score in ("high", None, [1], 10**400)),
        ("metrics.json", {"cam_miou": [1]}),
        *(("scores.json", scores) for scores in ({"miou": {"cam": 1.0}}, {"protocol": "p", "miou": [1]})),
        *(("scores.json", {"protocol": "p", "miou": miou}) for miou in ({"other": 1.0}, {"cam": "x"})),
    ],
)
def test_records_that_make_no_card_are_named(trained, tmp_path, name, values):
    run = copied(trained, tmp_path / "run", name, values)
    with pytest.raises(ToCoError, match="run: no card can be made of manifest.json, metrics.json and scores.json"):
        hub.save_pretrained(run, tmp_path / "shared")
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("none", "run has no checkpoint yet"),
        ("damaged", "model.safetensors' cannot be read"),
        ("other tensors", r"run: \d+ missing tensors .*1 unexpected tensor"),
        ("more classes", r"run: .*classifier.weight is 3 x \d+ and not 8"),
    ],
)
def test_a_run_without_its_weights_is_not_shared(trained, tmp_path, kind, message):
    classes = {"data": {"classes": list("abcdefghi"), "train": 4, "val": 2}} if kind == "more classes" else {}
    run = copied(trained, tmp_path / "run", "manifest.json", classes)
    if kind != "more classes":
        (run / "checkpoint.pt").unlink()
        config = json.loads((run / "config.json").read_text())
        config["model"] |= {"backbone": "scenes_vit_nano", "pretrained": True}
        (run / "config.json").write_text(json.dumps(config))
    if kind == "damaged":
        (run / "model.safetensors").write_bytes(b"x" * 40)
    if kind == "other tensors":
        save_file({"a": torch.ones(3)}, run / "model.safetensors")
    with pytest.raises(ToCoError, match=message):
        hub.save_pretrained(run, tmp_path / "shared")


def test_a_folder_that_cannot_be_written_is_named(trained, tmp_path):
    folder = hub.save_pretrained(trained.run, tmp_path / "shared")
    before = (folder / "model.safetensors").read_bytes()
    (folder / "README.md").unlink()
    (folder / "README.md").mkdir()
    with pytest.raises(ToCoError, match="shared' holds other files"):  # before the weights are replaced
        hub.write_pretrained(folder, {"a": torch.ones(3)}, trained.run.config(), ["x"], "card")
    assert (folder / "model.safetensors").read_bytes() == before
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ToCoError, match=f"cannot write to {place}: Not a directory"):
            hub.save_pretrained(trained.run, place)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "model-0123abcd.part").write_text("half")
    hub.save_pretrained(trained.run, tmp_path / "killed")
    assert {path.name for path in (tmp_path / "killed").iterdir()} == set(hub.FILES)


def test_a_hub_out_of_reach_is_one_line(trained, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        ToCoError, match="source = 'no/such-model' is no folder, and no repository of the Hub"
    ) as raised:
        hub.from_pretrained("no/such-model")
    assert "\n" not in str(raised.value)
    with pytest.raises(ToCoError, match="repository = 'no/such-model' could not be written"):
        hub.push_to_hub(trained.run, "no/such-model")
