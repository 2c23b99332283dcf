"""What happens to a run overnight: it is killed, the data vanish, a loader dies, somebody presses the button."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_training import config_of
from voc_folder import write_voc_folder

import toco_core.train.loop as training
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.runs.folder import Run
from toco_core.train.loop import open_run, train

HERE = Path(__file__).parent
KILLS = int(os.environ.get("TOCO_KILLS", "20"))


@pytest.fixture
def config(tmp_path):
    folder = write_voc_folder(tmp_path / "data", n=4)
    return override(config_of(str(folder), tmp_path / "runs"), steps=4, eval_interval=2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    data = write_voc_folder(tmp_path / "data", n=4)
    command = [sys.executable, str(HERE / "killed_training.py"), str(data), str(tmp_path), str(KILLS), "0"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= KILLS and found["saving"] >= 3 and found["halves"] >= 1 and all(found["equal"]), found


def stop_at(step, action):
    def on_record(record):
        if record["step"] == step and "total" in record:
            action()

    return on_record


def raise_interrupt():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_the_stop_button_says_how_to_go_on(config):
    with pytest.raises(KeyboardInterrupt, match="training was stopped; there is no checkpoint in .* yet"):
        train(config, on_record=stop_at(1, raise_interrupt), progress=False)
    with pytest.raises(KeyboardInterrupt, match="the checkpoint after step 2 is in .* goes on from there"):
        train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    assert Run.of(config).load()["step"] == 2


def test_a_run_in_parts_goes_on_with_the_same_bits(config):
    config = override(config, accumulate=2)
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    resumed = train(config, progress=False)
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name
    assert resumed.run.records() == whole.run.records()
    in_one = train(override(config, accumulate=1, out_dir=config.out_dir + " one"), progress=False).run.records()
    assert whole.run.records()[0]["total"] == pytest.approx(in_one[0]["total"], rel=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_vanished_data_are_named(config, workers):
    config = override(config, workers=workers, steps=40, eval_interval=2)
    images = Path(config.data.dataset) / "JPEGImages"
    words = r"img_\d\.jpg cannot be read: No such file or directory; the checkpoint after step \d+ is in .* goes on"
    with pytest.raises(ToCoError, match=words):
        train(config, on_record=stop_at(3, lambda: shutil.rmtree(images)), progress=False)
    assert Run.of(config).load()["step"] >= 2


def test_a_killed_loader_is_told(config):
    config = override(config, workers=1, steps=200, eval_interval=2)

    def kill():
        for child in torch.multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)

    with pytest.raises(ToCoError, match="a loader process ended .*try workers=0; the checkpoint after step .* goes on"):
        train(config, on_record=stop_at(3, kill), progress=False)


def test_a_vanished_run_folder_is_named(config):
    run = Run.of(config)
    with pytest.raises(ToCoError, match="out_dir: cannot write to .*: No such file or directory"):
        train(config, on_record=stop_at(1, lambda: shutil.rmtree(run.folder)), progress=False)


def test_checkpoints_between_validations(config, monkeypatch):
    saved, plain = [], Run.save

    def save(run, state, **which):
        saved.append((state["step"], which["keep"]))
        plain(run, state, **which)

    monkeypatch.setattr(Run, "save", save)
    config = override(config, steps=6, eval_interval=0)
    train(config, progress=False, save_every=4, keep_every=3)
    assert saved == [(3, True), (4, False), (6, True)]
    assert Run.of(config).kept_steps() == [3, 6]
    assert open_run(Run.of(config).folder, checkpoint="3").model.training is False
    with pytest.raises(ToCoError, match="has no checkpoint '5': it has the last one and kept 3, 6"):
        open_run(Run.of(config).folder, checkpoint="5")
    saved.clear()
    train(override(config, seed=1, steps=2), progress=False, save_minutes=1e-9)
    assert saved == [(1, False), (2, False)]


def test_out_of_memory_says_what_to_make_smaller(config, monkeypatch):
    def too_much(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore lines")

    monkeypatch.setattr(training, "objective", too_much)
    with pytest.raises(
        ToCoError, match="out of memory, a larger accumulate or a smaller batch_size or crop_size .*2 GiB"
    ):
        train(config, progress=False)


def test_a_checkpoint_of_before_is_read(config):
    """Of versions that kept three entries only."""
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    run = Run.of(config)
    run.save({name: run.load()[name] for name in ("model", "optimizer", "step")})
    trained = train(config, progress=False)
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(trained.model.state_dict()[name], value), name


def test_a_checkpoint_for_other_classes_is_explained(config, tmp_path):
    trained = train(override(config, steps=1, warmup_steps=0), progress=False)
    other = write_voc_folder(tmp_path / "other", classes=("background", "cat", "dog", "sheep", "cow"))
    data = training.open_data(override(config, dataset=str(other)).data)
    with pytest.raises(ToCoError, match="the checkpoint is of a model for 3 classes, but .*other has 4"):
        open_run(trained.run.folder, data=data)
    state = trained.run.load()
    state["model"]["extra"] = state["model"].pop("decoder.conv6.weight")
    trained.run.save(state)
    with pytest.raises(ToCoError, match=r"checkpoint is of another model: 1 missing tensor \(decoder\.conv6\.weight\)"):
        open_run(trained.run.folder)


def test_an_optimizer_of_another_shape_is_explained(config):
    with pytest.raises(KeyboardInterrupt):
        train(config, on_record=stop_at(3, raise_interrupt), progress=False)
    run = Run.of(config)
    state = run.load()
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    run.save(state)
    with pytest.raises(ToCoError, match="optimizer does not fit: the averages of parameter 0 have another shape"):
        train(config, progress=False)
