"""What a step will take, against what it takes; what is said where that is not free."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed_training import config_of
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.config import override
from toco_core.data import open_data
from toco_core.machine import memory as machine_memory
from toco_core.machine.memory import GIB, free_memory
from toco_core.model import ToCo
from toco_core.train import budget
from toco_core.train.budget import Allocations, StepMemory, step_memory

HERE = Path(__file__).parent


@pytest.fixture
def config(tmp_path):
    folder = write_voc_folder(tmp_path / "data", n=4)
    return override(config_of(str(folder), tmp_path / "runs"), crop_size=64, batch_size=8)


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the peak cannot be reset here")
def test_the_estimate_is_near_what_the_process_grows_by(tmp_path):
    """More than a quarter off is wrong."""
    data = write_voc_folder(tmp_path / "data", n=4)
    command = [sys.executable, str(HERE / "peak_memory.py"), str(data), str(tmp_path), "224", "8", "1"]
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["growth"] > 2e8 and 0.8 < found["total"] / found["growth"] < 1.25, found


def test_two_images_tell_of_more(config, monkeypatch):
    """Without the dense energy, whose lattice depends on the picture: a tenth of so small a network's memory."""
    config = override(config, energy=0.0)
    data = open_data(config.data)
    told = step_memory(config, data)
    monkeypatch.setattr(budget, "MEASURED", 8)
    measured = step_memory(config, data)
    assert measured.fixed == told.fixed
    assert_close(float(told.step), float(measured.step), rtol=0.05, atol=0)


def test_what_is_fixed_is_counted_exactly(config):
    data = open_data(config.data)
    model = ToCo(config.model, data.train.n_classes)
    one = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    weights = sum(value.nbytes for value in (*model.parameters(), *model.buffers()))
    whole, parts = step_memory(config, data), step_memory(override(config, accumulate=4), data)
    shared = step_memory(config, data, processes=2)
    assert (whole.gradients, whole.fixed, parts.fixed, shared.fixed) == (
        one, weights + 2 * one, weights + 3 * one, weights + 3 * one,
    )  # fmt: skip
    assert (whole.images, parts.images, shared.images) == (8, 2, 4)
    assert whole.equal_parts == (1, 2, 4, 8) and parts.equal_parts == (4, 8) and shared.equal_parts == (1, 2, 4)
    assert parts.step < 0.4 * whole.step
    assert not Path(config.out_dir).exists()


def test_frozen_blocks_take_no_gradients_and_less_of_a_step(config):
    data = open_data(config.data)
    whole, frozen = (step_memory(override(config, frozen_blocks=n), data) for n in (0, config.model.layer))
    assert frozen.gradients < whole.gradients and frozen.step < 0.9 * whole.step


def test_allocations_are_counted_while_they_live():
    weights = torch.ones(1000)
    with Allocations() as counted:
        one = weights + 1  # 4000 bytes
        view = one[:10]
        view += weights[:10]
        assert (counted.now, counted.most) == (4000, 4000)
        two = torch.cat([one, one])
        del one
        assert counted.now == 12000  # the view keeps it
        del view, two
        assert (counted.now, counted.most) == (0, 12000)


def memory(**changes):
    facts = {"device": "cuda:0", "batch_size": 8, "images": 8, "equal_parts": (1, 2, 4, 8), "gradients": GIB // 2}
    return StepMemory(**facts | {"fixed": GIB, "step": 8 * GIB, "free": 20 * GIB, "precision": "fp32"} | changes)


def test_what_does_not_fit_is_said_with_what_helps():
    assert str(memory()) == "a step takes about 9.00 GiB on cuda:0 (8 of 8 images at once, fp32); 20.0 GiB are free"
    assert str(memory(free=None)).endswith("(8 of 8 images at once, fp32)") and memory(free=None).fits
    assert not memory(free=9 * GIB).fits  # the margin
    for free, parts in ((6.06, 2), (6.04, 4), (3.9, 4), (2.8, 8), (2.7, None)):
        found = memory(free=int(free * GIB))
        assert found.parts_that_fit() == parts, free
        assert f"and may not fit: {free:.2f} GiB are free; what helps: " in str(found)
        assert ("accumulate = " in str(found)) == (parts is not None)
    text = str(memory(free=7 * GIB))
    assert text.endswith("accumulate = 2 (the same losses), a smaller crop_size, precision = 'bf16'")
    assert str(memory(free=7 * GIB, precision="bf16")).endswith("a smaller crop_size")
    today = memory(images=4, equal_parts=(2, 4, 8), fixed=GIB, step=4 * GIB, free=int(3.4 * GIB))
    assert today.parts_that_fit() == 4  # the sum of gradients is in what is fixed already


def test_free_memory_is_the_machines_or_the_containers(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       4000 kB\nMemAvailable:   3000 kB\n")
    assert machine_memory._free_on_linux(meminfo, tmp_path) == 3000 * 1024
    for name, text in (("max", "1000000\n"), ("current", "600000\n"), ("stat", "anon 500000\ninactive_file 50000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine_memory._free_on_linux(meminfo, tmp_path) == 450000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory._free_on_linux(meminfo, tmp_path) == 3000 * 1024
    assert machine_memory._free_on_linux(tmp_path / "none", tmp_path) is None
    if sys.platform.startswith("linux"):
        assert 2**20 < free_memory(torch.device("cpu")) < 2**50
