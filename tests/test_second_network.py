"""The second network from a shell: edited label maps in, a folder out that `toco label` takes."""

import numpy as np
import pytest
import torch
from killed_training import config_of
from voc_folder import CLASSES, write_voc_folder

from toco_core.__main__ import main
from toco_core.analysis.second_stage import train_segmentation
from toco_core.commands.export import export_command as export
from toco_core.config import override
from toco_core.data import VOCFolder, read_mask
from toco_core.data.files import palette_png
from toco_core.predict.models import open_model
from toco_core.train.loop import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("second")
    data = write_voc_folder(folder / "data", n=6)
    return train(override(config_of(str(data), folder / "runs"), steps=3, eval_interval=0), progress=False).run


def test_edited_labels_reach_the_second_network(run, tmp_path, capsys):
    labels = tmp_path / "labels"
    assert export([str(run.folder), str(labels), "--method", "cam", "--beta", "0.4"]) == 0
    before = train_segmentation(run.config(), VOCFolder(labels, "train"), steps=2, progress=False)
    for path in (labels / "SegmentationClass").glob("*.png"):  # all of it a dog
        path.write_bytes(palette_png(np.full_like(read_mask(path), 2)))
    command = ["second", str(run.folder), str(labels), str(tmp_path / "second"), "--steps", "2"]
    assert main(command) == 0
    opened = open_model(tmp_path / "second")
    expected = train_segmentation(run.config(), VOCFolder(labels, "train"), steps=2, progress=False)
    assert opened.class_names == CLASSES and opened.name == "second"
    for name, value in expected.state_dict().items():
        assert torch.equal(value, opened.model.state_dict()[name]), name
    assert any(not torch.equal(v, before.state_dict()[n]) for n, v in expected.state_dict().items())
    command = ["label", str(tmp_path / "second"), str(labels / "JPEGImages"), str(tmp_path / "new"), "--method", "seg"]
    assert main(command) == 0
    assert len(list((tmp_path / "new" / "SegmentationClass").glob("*.png"))) == 6


def test_wrong_use_ends_in_one_line(run, tmp_path):
    data = run.config().data.dataset
    with pytest.raises(SystemExit, match="error: steps = 0 is not allowed: 1 or more"):
        main(["second", str(run.folder), data, str(tmp_path / "x"), "--steps", "0"])
    with pytest.raises(SystemExit, match="error: .*none is not there|error: run = "):
        main(["second", str(tmp_path / "none"), data, str(tmp_path / "x")])
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="error: folder = .* holds other files"):
        main(["second", str(run.folder), data, str(tmp_path / "x"), "--steps", "1"])
