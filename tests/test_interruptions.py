"""What happens to a run overnight: it is killed, the data vanish, a loader dies, somebody presses the button."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from killed_training import SMALL, config_of
from PIL import Image
from voc_folder import write_voc_folder

import toco_core.train.loop as training
from toco_core.config import override
from toco_core.data import loader
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.model import ToCo
from toco_core.predict.export import export
from toco_core.runs import folder as runs_folder
from toco_core.runs.folder import Run
from toco_core.runs.opened import open_run
from toco_core.train.interruptions import with_resume_hint
from toco_core.train.loop import train

HERE = Path(__file__).parent
KILLS = int(os.environ.get("TOCO_KILLS", "20"))


@pytest.fixture
def config(tmp_path):
    folder = write_voc_folder(tmp_path / "data", n=4)
    return override(config_of(str(folder), tmp_path / "runs"), steps=4, eval_interval=2)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    data = write_voc_folder(tmp_path / "data", n=4)
    command = [sys.executable, str(HERE / "killed_training.py"), str(data), str(tmp_path), str(KILLS), "0"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= KILLS and found["saving"] >= 3 and found["halves"] >= 1 and all(found["equal"]), found


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="children are made by fork")
@pytest.mark.parametrize(("what", "n_files"), [("export", 18), ("drawing", 33)])
def test_killed_at_any_moment_a_folder_becomes_whole(tmp_path, what, n_files):
    """Exports, and the first drawing of the data: the next call leaves every file as if nothing had happened."""
    command = [sys.executable, str(HERE / "killed_writing.py"), what, str(tmp_path), str(KILLS // 3), "0"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills"] >= KILLS // 3 and found["files"] == n_files and all(found["equal"]), found


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


def press_ctrl_c(times=1):
    for _ in range(times):
        signal.raise_signal(signal.SIGINT)


@pytest.fixture
def terminal():
    """Ctrl-C raises KeyboardInterrupt, as in a terminal; a background job ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def in_step(monkeypatch, number, action):
    """`action` in the middle of a step: after the moving average was updated, before the weights are."""
    plain, calls = training.backward, []

    def watched(*args, **options):
        calls.append(1)
        if len(calls) == number:
            action()
        return plain(*args, **options)

    monkeypatch.setattr(training, "backward", watched)


def assert_same_run(one, other):
    for which in ("last", "best"):
        a, b = one.load(which), other.load(which)
        assert (a["step"], a["best"]) == (b["step"], b["best"]) and "unvalidated" not in a
        for name, value in a["model"].items():
            assert torch.equal(b["model"][name], value), name
        for number, values in a["optimizer"]["state"].items():
            assert all(torch.equal(b["optimizer"]["state"][number][name], value) for name, value in values.items())
    assert one.records() == other.records() and one.metrics() == other.metrics()


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("step", [1, 2, 3, 4])
def test_ctrl_c_saves_the_step_that_it_interrupts(config, monkeypatch, step):
    with monkeypatch.context() as patch:
        in_step(patch, step, press_ctrl_c)
        with pytest.raises(KeyboardInterrupt, match=f"the checkpoint after step {step} is in .* goes on from there"):
            train(config, progress=False)
    assert Run.of(config).load()["step"] == step
    resumed = train(config, progress=False)
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False)
    assert_same_run(resumed.run, whole.run)


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_loses_no_kept_checkpoint_and_no_frame(config, monkeypatch):
    """In the step whose checkpoint is kept for good, and in the last one, with which the film ends."""
    steps, options = config.schedule.steps, {"progress": False, "keep_every": 2, "film": 2}
    whole = train(override(config, out_dir=config.out_dir + " whole"), **options).run
    for step in (2, steps):
        with monkeypatch.context() as patch:
            in_step(patch, step if step == 2 else steps - 2, press_ctrl_c)
            with pytest.raises(KeyboardInterrupt, match=f"the checkpoint after step {step} is in"):
                train(config, **options)
    resumed = train(config, **options).run
    assert_same_run(resumed, whole)
    files = [{path.relative_to(run.folder) for path in run.folder.rglob("*")} for run in (resumed, whole)]
    assert files[0] == files[1] and resumed.kept_steps() == list(range(2, steps + 1, 2))


@pytest.mark.usefixtures("terminal")
def test_ctrl_c_while_the_best_checkpoint_is_written_leaves_it(config, monkeypatch):
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False).run
    best, calls, plain = whole.load("best")["step"], [], runs_folder._save

    def saving(state, file):
        calls.append(state["step"])
        if calls.count(best) == 1 and state["step"] == best:
            press_ctrl_c()
        plain(state, file)

    monkeypatch.setattr(runs_folder, "_save", saving)
    with pytest.raises(KeyboardInterrupt):
        train(config, progress=False)
    assert_same_run(train(config, progress=False).run, whole)


@pytest.mark.usefixtures("terminal")
def test_a_second_ctrl_c_does_not_wait(config, monkeypatch):
    in_step(monkeypatch, 3, lambda: press_ctrl_c(2))
    with pytest.raises(KeyboardInterrupt, match="the checkpoint after step 2 is in"):
        train(config, progress=False)


def test_masks_without_a_valid_pixel_stop_no_training(config):
    """They are as no masks: the same call would have failed again."""
    for path in Path(config.data.dataset, "SegmentationClass").iterdir():
        Image.fromarray(np.full(Image.open(path).size[::-1], 255, np.uint8)).save(path)
    run = train(config, progress=False).run
    assert run.finished and {"map", "steps"} <= set(run.metrics()) and "best_beta" not in run.metrics()


@pytest.mark.parametrize("last", [False, True])
def test_a_validation_that_fails_costs_no_step(config, monkeypatch, last):
    """Neither that of step 2, nor that at the end."""
    plain, calls = training.evaluate_as, []

    def broken(*args, **options):
        calls.append(1)
        if len(calls) == 1 + last:
            raise ToCoError("val.jpg is broken")
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(training, "evaluate_as", broken)
        words = f"val.jpg is broken; the checkpoint after step {4 if last else 2} is in .* goes on from there"
        with pytest.raises(ToCoError, match=words):
            train(config, progress=False)
    state = Run.of(config).load()
    assert state["step"] == (4 if last else 2) and state["unvalidated"] is True
    with monkeypatch.context() as patch:  # and again, without a step
        patch.setattr(training, "evaluate_as", lambda *_, **__: press_no_button())
        with pytest.raises(Interrupted):
            train(config, progress=False)
    resumed = train(config, progress=False)
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False)
    assert_same_run(resumed.run, whole.run)


def press_no_button():
    raise Interrupted


def test_a_validation_that_was_half_told_is_told_once(config):
    told = []

    def stop(record):
        told.append(record)
        if "map" in record and len(told) < 4:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, on_record=stop, progress=False)
    resumed = train(config, progress=False)
    whole = train(override(config, out_dir=config.out_dir + " whole"), progress=False)
    assert_same_run(resumed.run, whole.run)


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
import toco_core.train.loop as training
from toco_core.__main__ import main
plain, calls = training.backward, []
def watched(*args, **options):
    calls.append(1)
    if len(calls) == 3:
        signal.raise_signal(signal.SIGINT)
    return plain(*args, **options)
training.backward = watched
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ctrl_c_on_the_command_line_is_one_line(config):
    fields = {
        **SMALL,
        "dataset": config.data.dataset,
        "out_dir": config.out_dir,
        "eval_interval": 0,
        "frozen_blocks": 0,
    }
    command = [sys.executable, "-c", COMMAND, "tiny", *(f"{name}={value!r}" for name, value in fields.items())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 130
    assert "Traceback" not in done.stderr and "the checkpoint after step 3 is in" in done.stderr.splitlines()[-1]


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


class Killer(threading.Thread):
    """Ends a loader process of this one at any moment, some time after the first one is there."""

    def __init__(self, delay):
        super().__init__(daemon=True)
        self.delay, self.over, self.killed = delay, threading.Event(), 0

    def run(self):
        while not self.over.wait(0.01):
            for child in multiprocessing.active_children():
                self.over.wait(self.delay)
                os.kill(child.pid, signal.SIGKILL)
                self.killed = child.pid
                return

    def __enter__(self):
        self.start()
        return self

    def __exit__(self, *_):
        self.over.set()
        self.join()


TOLD = r"a loader process ended \(.*\): too little memory, or /dev/shm too small; try workers=0"

LEFT = r"(there is no checkpoint .* begins anew|the checkpoint after step \d+ is in .* goes on from there)"


@pytest.fixture
def looks_often(monkeypatch):
    """Torch asks every half second, not every five, whether a loader process that is silent is alive."""
    iterator = torch.utils.data.dataloader._MultiProcessingDataLoaderIter
    monkeypatch.setattr(iterator._try_get_data, "__defaults__", (0.5,))


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("torchs_own", [False, True])
def test_a_loader_killed_at_any_moment_is_told(config, torchs_own, monkeypatch):
    """In the middle of a step, too, and where another part of the program has set torch's handler of the signal."""
    config = override(config, workers=1, steps=100000, eval_interval=0)
    if torchs_own:
        monkeypatch.setattr(loader, "_started", iter)
        monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)
    before = signal.getsignal(signal.SIGCHLD)
    try:
        with Killer(0.37) as killer, pytest.raises(ToCoError, match=f"{TOLD}; {LEFT}"):
            train(config, progress=False)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert killer.killed


def test_torchs_handler_does_not_stay(config):
    before = signal.getsignal(signal.SIGCHLD)
    batches = loader.evaluation_items(training.open_data(config.data).val, workers=1)
    assert next(batches).name == "img_0" and signal.getsignal(signal.SIGCHLD) is before
    batches.close()


@pytest.mark.usefixtures("looks_often")
def test_a_killed_loader_goes_on_as_advised(config):
    config = override(config, workers=1, steps=8, eval_interval=2)

    def kill():
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    endless = override(config, steps=300)
    with pytest.raises(ToCoError, match=f"{TOLD}; the checkpoint after step .* and the same call goes on from there"):
        train(endless, on_record=stop_at(3, kill), progress=False)
    again = []

    def stop_after(record):
        again.append(record["step"])
        raise Interrupted

    with pytest.raises(Interrupted):
        train(override(endless, workers=0), on_record=stop_after, progress=False)
    assert again[0] >= 2


class Interrupted(Exception):
    """Enough was seen."""


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("what", ["evaluate", "export"])
def test_a_loader_killed_elsewhere_is_told(config, tmp_path, what):
    config = override(config, workers=1, crop_size=64)
    data = training.open_data(config.data).train
    assert data.image_labels.any()  # read once, not for each of the many
    many = data.subset([i % 4 for i in range(3000)])
    many.names = tuple(f"{i}" for i in range(3000))
    model = ToCo(config.model, 3).eval()
    with Killer(0.3) as killer, pytest.raises(ToCoError, match=f"^{TOLD}$"):
        if what == "evaluate":
            evaluate_as(config, model, many, progress=False)
        else:
            export(model, many, tmp_path / "out", config, method="cam", images="none", progress=False)
    assert killer.killed


def test_a_vanished_run_folder_is_named(config):
    run = Run.of(config)
    with pytest.raises(ToCoError, match="out_dir: cannot write to .*: No such file or directory"):
        train(config, on_record=stop_at(1, lambda: shutil.rmtree(run.folder)), progress=False)
    words = "out_dir: cannot write to .*: No such file .*; the checkpoint in .* is gone, the same call begins anew"
    with pytest.raises(ToCoError, match=words):  # nor is a checkpoint promised that went with it
        train(config, on_record=stop_at(3, lambda: shutil.rmtree(run.folder)), progress=False)


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

    monkeypatch.setattr(training, "of_both", too_much)
    with pytest.raises(
        ToCoError, match="out of memory, a larger accumulate or a smaller batch_size or crop_size .*2 GiB"
    ):
        train(config, progress=False)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        MemoryError("std::bad_alloc"),
        MemoryError(),
    ],
)
def test_out_of_memory_on_a_cpu_is_told(config, monkeypatch, tmp_path, error):
    def too_much(*args, **kwargs):
        raise error

    monkeypatch.setattr(training, "backward", too_much)
    with pytest.raises(ToCoError, match="^out of memory, a larger accumulate .* is needed .*no checkpoint in"):
        train(config, progress=False)
    data, model = training.open_data(config.data).train, ToCo(config.model, 3)
    monkeypatch.setattr(ToCo, "_run_blocks", too_much)
    with pytest.raises(ToCoError, match="^out of memory, a smaller batch_size or size is needed"):
        evaluate_as(config, model, data, progress=False)
    with pytest.raises(ToCoError, match="^out of memory, a smaller crop_size or fewer cam_scales is needed"):
        export(model, data, tmp_path / "out", config, method="cam", progress=False)


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


def test_a_stopped_kernel_tells_its_terminal(tmp_path, monkeypatch):
    """papermill ends with a traceback of its own, in which nothing says what is left."""
    reading, writing_end = os.pipe()
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(_original_stdstream_copy=writing_end))
    with pytest.raises(KeyboardInterrupt), with_resume_hint(Run(tmp_path / "run")):
        raise KeyboardInterrupt
    os.close(writing_end)
    with os.fdopen(reading) as terminal:
        lines = terminal.read().strip().splitlines()
    left = f"there is no checkpoint in {tmp_path / 'run'} yet, the same call begins anew"
    assert lines == [f"training was stopped; {left}"]
