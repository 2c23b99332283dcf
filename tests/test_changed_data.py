"""Files that are broken or mended: told before the first step, and a run goes on where its data changed by consent."""

import json

import numpy as np
import pytest
import torch
from killed_training import SMALL, config_of
from PIL import Image
from test_interruptions import raise_interrupt, stop_at
from voc_folder import rectangle_mask, save_palette_mask, write_list, write_voc_folder

import toco_core.train.loop as training
from toco_core.__main__ import main
from toco_core.config import override
from toco_core.data import open_data
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine.distributed import Share
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.train.changes import refuse_broken
from toco_core.train.loop import train, trained_run

MENDED = r"once the file is as it was; with other contents, changed_data=True \(toco train --changed-data\) goes on"


def write_tags(root):
    """A list of tags over the images of a VOC folder; masks only score."""
    lines = [f"JPEGImages/img_{i}.jpg,{('cat', 'dog')[i % 2]},train,SegmentationClass/img_{i}.png" for i in range(5)]
    lines += [f"JPEGImages/img_{i}.jpg,{('cat', 'dog')[i % 2]},val,SegmentationClass/img_{i}.png" for i in (5, 6)]
    (root / "classes.txt").write_text("background\ncat\ndog\nsheep\n")
    (root / "tags.csv").write_text("\n".join(["file,tags,split,mask", *lines]) + "\n")
    return root / "tags.csv"


@pytest.fixture
def root(tmp_path):
    return write_voc_folder(tmp_path / "data", n=7, splits={"train": range(5), "val": (5, 6)})


@pytest.fixture(params=["tags", "masks"])
def labelled_by(request):
    return request.param


@pytest.fixture
def config(root, tmp_path, labelled_by):
    dataset = str(write_tags(root) if labelled_by == "tags" else root)
    fields = {"steps": 4, "eval_interval": 2, "seg_start": 1, "energy_start": 1, "val_split": "val"}
    return override(config_of(dataset, tmp_path / "runs"), **fields)


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def repaint(root, number):
    path = root / "JPEGImages" / f"img_{number}.jpg"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path, quality=95)


def score_anew(root, number, shown):
    """Another mask of the same classes."""
    path = root / "SegmentationClass" / f"img_{number}.png"
    mask = np.asarray(Image.open(path)).copy()
    mask[mask == 0] = shown
    mask[0, 0] = 0
    save_palette_mask(mask, path)


def interrupted(config, **options):
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=stop_at(3, raise_interrupt), progress=False, **options)
    return Run.of(config)


# ---- before the first step


@pytest.mark.parametrize("number", [4, 6])
def test_a_broken_image_is_told_before_the_first_step(config, root, number, monkeypatch):
    """Whether it is trained on or validated on, and before what an earlier run has left is removed."""
    run = train(config, progress=False).run
    before = {path.name: path.read_bytes() for path in run.folder.iterdir()}
    cut(root / "JPEGImages" / f"img_{number}.jpg")
    monkeypatch.setattr(training, "backward", lambda *_, **__: pytest.fail("a step"))
    words = (
        rf"img_{number}\.jpg is truncated.*; open_data\(\.\.\., broken='leave out'\) or toco train --leave-out-broken"
    )
    with pytest.raises(BrokenFile, match=words):
        train(config, resume=False, progress=False)
    assert {path.name: path.read_bytes() for path in run.folder.iterdir()} == before


def test_a_mask_of_another_size_is_told_before_the_first_step_where_it_is_read(config, root, monkeypatch):
    small = np.asarray(Image.open(root / "SegmentationClass" / "img_1.png"))[1:]
    save_palette_mask(small, root / "SegmentationClass" / "img_1.png")
    train(override(config, steps=1, warmup_steps=0), progress=False)  # of train no mask is scored
    monkeypatch.setattr(training, "backward", lambda *_, **__: pytest.fail("a step"))
    save_palette_mask(small, root / "SegmentationClass" / "img_6.png")
    with pytest.raises(BrokenFile, match=r"img_6\.png is .* but its image img_6\.jpg is"):
        train(config, progress=False)


@pytest.mark.parametrize("labelled_by", ["tags"], indirect=True)
def test_broken_files_can_be_left_out_from_a_shell(config, root, capsys):
    cut(root / "JPEGImages" / "img_4.jpg")
    fields = {**SMALL, "dataset": config.data.dataset, "out_dir": config.out_dir, "steps": 2, "val_split": "val"}
    fields |= {"frozen_blocks": 0, "warm_start_steps": 0, "affinity": 0.0}
    command = ["tiny", *(f"{name}={value!r}" for name, value in fields.items())]
    with pytest.raises(SystemExit, match=r"img_4\.jpg is truncated.*--leave-out-broken"):
        main(command)
    with pytest.warns(UserWarning, match=r"1 of 5 images are left out: .*img_4\.jpg is truncated"):
        assert main([*command, "--leave-out-broken"]) == 0
    run = Run(capsys.readouterr().out.splitlines()[-1])
    assert run.manifest()["data"]["train"] == 4 and run.left_out() == {"JPEGImages/img_4"}
    export = ["export", str(run.folder), str(root.parent / "labels"), "--split", "all"]
    assert main(export) == main(["evaluate", str(run.folder)]) == 0  # the broken file is not asked for again
    assert "6 label maps" in capsys.readouterr().out and len(open_run(run.folder).data.train) == 4


# ---- in the middle


def test_a_file_that_breaks_in_between_goes_on_by_consent(config, root):
    """The same call is promised for the file as it was only."""
    path, whole = root / "JPEGImages" / "img_6.jpg", override(config, out_dir=config.out_dir + " whole")
    was, whole = path.read_bytes(), train(whole, progress=False)
    words = rf"img_6\.jpg is truncated.*; the checkpoint after step 2 is in .*, and the same call goes on .* {MENDED}"
    with pytest.raises(BrokenFile, match=words):
        train(config, on_record=stop_at(1, lambda: cut(path)), progress=False)
    path.write_bytes(was)
    repaint(root, 6)
    with pytest.raises(
        ToCoError, match=r"val has other contents of image files; .*\(toco train --changed-data\) goes on"
    ):
        train(config, progress=False)
    path.write_bytes(was)
    train(config, progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(Run.of(config).load()["model"][name], value), name


CHANGES = {
    "an image": (lambda root: repaint(root, 1), ["train has other contents of image files"]),
    "an image of val": (lambda root: repaint(root, 5), ["val has other contents of image files"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_goes_on_with_changed_data_and_says_so(config, root, change, capsys):
    act, words = CHANGES[change]
    run = interrupted(config)
    act(root)
    with pytest.raises(ToCoError, match=f"was trained on something else: {words[0]}; .*changed_data=True"):
        train(config, progress=False)
    assert "data_changes" not in run.manifest()
    seen = []
    train(config, changed_data=True, on_record=seen.append)
    assert seen[0]["step"] == 2 and f"goes on after step 2 with changed data: {words[0]}" in capsys.readouterr().out
    (noted,) = run.manifest()["data_changes"]
    assert (noted["step"], noted["changes"]) == (2, words) and noted["time"].endswith("+00:00")
    trained_run(config, progress=False)  # it is of these data now
    act(root)
    with pytest.raises(ToCoError, match=r"other contents of image files; train\(.*resume=False\).* keeps both$"):
        train(config, changed_data=True, progress=False)  # a finished run goes nowhere


@pytest.mark.parametrize("labelled_by", ["masks"], indirect=True)
def test_a_row_may_be_removed_and_twice_is_noted_twice(config, root):
    run = interrupted(config)
    write_list(root, "train", ["img_0", "img_1", "img_2"])
    with pytest.raises(KeyboardInterrupt):
        train(config, changed_data=True, on_record=stop_at(2, raise_interrupt), progress=False)
    repaint(root, 0)
    train(config, changed_data=True, progress=False)
    notes = [(note["step"], note["changes"]) for note in run.manifest()["data_changes"]]
    assert notes == [(2, ["train has 3 images, not 5"]), (2, ["train has other contents of image files"])]
    assert run.manifest()["data"]["train"] == 3


def test_what_it_goes_on_with_is_looked_at_first(config, root):
    run = interrupted(config)
    cut(root / "JPEGImages" / "img_1.jpg")
    with pytest.raises(BrokenFile, match=r"img_1\.jpg is truncated"):
        train(config, changed_data=True, progress=False)
    assert "data_changes" not in run.manifest()


def test_no_score_of_other_data_is_the_best(config, root):
    """That of step 2 was perfect, on masks that were wrong."""
    run = interrupted(config)
    run.save(run.load() | {"best": 200.0}, best=True)
    score_anew(root, 5, 3)
    train(config, progress=False)
    assert run.load("best")["step"] == 4 and run.load()["best"] <= 100


# ---- masks that only score


def test_other_masks_of_val_refuse_no_run(config, root, capsys, labelled_by):
    """The mended mask of an interrupted run, and a finished one, which is scored anew."""
    run = interrupted(config)
    score_anew(root, 5, 3)
    train(config)
    told = capsys.readouterr().out.replace("\r", "\n").splitlines()
    assert sum(line.endswith("goes on after step 2 with changed data: val has other masks") for line in told) == 1
    (noted,) = run.manifest()["data_changes"]
    assert (noted["step"], noted["changes"]) == (2, ["val has other masks"])
    before, weights = run.metrics(), run.load()["model"]
    trained_run(config, progress=False)
    save_palette_mask(rectangle_mask(*np.asarray(Image.open(root / "SegmentationClass" / "img_5.png")).shape, 3),
                      root / "SegmentationClass" / "img_5.png")  # fmt: skip
    train(config, progress=False)
    assert run.metrics() != before and all(torch.equal(run.load()["model"][n], v) for n, v in weights.items())
    assert len(run.manifest()["data_changes"]) == 2


def test_masks_of_train_count_where_labels_come_from_them(config, root, labelled_by):
    interrupted(config)
    score_anew(root, 1, 2)
    if labelled_by == "masks":
        with pytest.raises(ToCoError, match="train has other masks; .*changed_data=True"):
            train(config, progress=False)
    else:
        train(config, progress=False)


def test_a_wrong_mask_that_is_mended_costs_no_step(config, root, monkeypatch):
    """As a version left it that did not look before the first step."""
    path = root / "SegmentationClass" / "img_6.png"
    right = np.asarray(Image.open(path))
    save_palette_mask(right[1:], path)
    with monkeypatch.context() as patch:
        patch.setattr(training, "refuse_broken", lambda *_, **__: None)
        with pytest.raises(ToCoError, match=r"img_6\.png is .*the checkpoint after step 2 is in"):
            train(config, progress=False)
    save_palette_mask(right, path)
    seen = []
    train(config, on_record=seen.append, progress=False)
    assert seen[0]["step"] == 1 and "map" in seen[0]  # the validation that failed comes first


def test_a_manifest_of_others_is_no_trap(config, root):
    """What it says of changes may be anything."""
    run = interrupted(config)
    path = run.folder / "manifest.json"
    path.write_text(json.dumps(run.manifest() | {"data_changes": "none"}))
    score_anew(root, 5, 3)
    train(config, progress=False)
    assert len(run.manifest()["data_changes"]) == 1


def test_open_data_leaves_out(config, root):
    cut(root / "JPEGImages" / "img_4.jpg")
    with pytest.warns(UserWarning, match="left out"):
        assert len(open_data(config.data, broken="leave out").train) == 4
    assert len(open_data(config.data).train) == 5


def test_every_process_is_told_of_a_file_that_one_has_found(config, root):
    """So that the first one removes nothing of an earlier run."""
    cut(root / "JPEGImages" / "img_1.jpg")
    told = []

    class OneOfTwo(Share):
        def gathered(self, value):
            told.append(value)
            return ["", "b.jpg is truncated"]

    for rank in (0, 1):
        with pytest.raises(BrokenFile, match=r"^b\.jpg is truncated; open_data"):
            refuse_broken(open_data(config.data), OneOfTwo(rank, 2), progress=False)
    assert told[0] == "" and "img_1.jpg is truncated" in told[1]
