"""A step that is not finite: it ends the run or is left out, and comes back in a notebook."""

import math

import pytest
import torch
from killed_training import config_of
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core import losses
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.runs.folder import Run
from toco_core.train.failures import load_failure, replay
from toco_core.train.loop import train


@pytest.fixture
def config(tmp_path):
    folder = write_voc_folder(tmp_path / "data", n=4)
    return override(config_of(str(folder), tmp_path / "runs"), steps=4, eval_interval=2)


class Overflow(torch.autograd.Function):
    """The identity, whose gradient is not finite."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * math.inf


def spoilt(monkeypatch, call, change):
    """CTC changed in its call of that number, counted from 1."""
    calls, plain = [], losses.ctc_loss

    def ctc_loss(*args, **kwargs):
        calls.append(plain(*args, **kwargs))
        return change(calls[-1]) if len(calls) == call else calls[-1]

    monkeypatch.setattr(losses, "ctc_loss", ctc_loss)
    return calls


@pytest.mark.parametrize(
    ("change", "words"),
    [(lambda x: x * math.nan, "the loss is nan on step 2"), (Overflow.apply, "the gradient's length is (inf|nan) on")],
)
def test_the_step_comes_back(config, monkeypatch, change, words):
    calls = spoilt(monkeypatch, 3, change)
    with pytest.raises(ToCoError, match=f"{words}.*load_failure.*brings it back; the checkpoint after step 2 is in"):
        train(config, progress=False)
    run = Run.of(config)
    failure = load_failure(run)
    assert (failure.step, failure.config) == (2, config) and failure.message.startswith("the ")
    assert all(name in failure.message for name in failure.batch.names) and failure.model.training
    monkeypatch.undo()
    found = replay(failure)
    assert all(torch.isfinite(value) for value in found.objective.terms.values())  # without the fault that was planted
    assert_close(found.objective.terms["ctc"], calls[2], rtol=0, atol=0)  # the very same step
    assert replay(failure, config=override(config, ctc=0.0)).objective.terms["ctc"] == 0


def test_as_many_steps_as_allowed_are_left_out(config, monkeypatch):
    """The weights are those of a run without that step's update."""
    calls = spoilt(monkeypatch, 3, lambda x: x * math.nan)
    config = override(config, steps=3, eval_interval=2)
    trained = train(config, progress=False, skip_nonfinite=1)
    assert len(calls) == 3 and trained.run.metrics()["skipped"] == 1
    records = [r for r in trained.run.records() if "total" in r]
    assert records[2]["total"] is None and records[2]["skipped"] == 1 and "skipped" not in records[1]
    after, before = trained.model.state_dict(), trained.run.load("last")["model"]
    assert all(torch.isfinite(value).all() for value in after.values()) and after.keys() == before.keys()
    spoilt(monkeypatch, 1, lambda x: x * math.nan)
    with pytest.raises(ToCoError, match="the loss is nan on step 0"):
        train(override(config, seed=1), progress=False, skip_nonfinite=0)


def test_a_part_that_fails_leaves_the_whole_step_out(config, monkeypatch):
    """Step 1's second part; and where no step may be left out, the whole batch comes back."""
    config = override(config, steps=3, eval_interval=0, accumulate=2)
    calls = spoilt(monkeypatch, 4, lambda x: x * math.nan)
    trained = train(config, progress=False, skip_nonfinite=1)
    assert len(calls) == 6 and trained.run.metrics()["skipped"] == 1
    assert all(torch.isfinite(value).all() for value in trained.model.state_dict().values())
    spoilt(monkeypatch, 4, lambda x: x * math.nan)
    with pytest.raises(ToCoError, match="the loss is nan on step 1"):
        train(override(config, seed=1), progress=False)
    failure = load_failure(Run.of(override(config, seed=1)))
    assert len(failure.batch.names) == 2
    monkeypatch.undo()
    assert torch.isfinite(replay(failure).objective.total)


def test_what_is_no_failure_is_refused(tmp_path):
    with pytest.raises(ToCoError, match=r"has no failure\.pt: no step of this run failed"):
        load_failure(tmp_path)
    (tmp_path / "failure.pt").write_bytes(b"nothing")
    with pytest.raises(ToCoError, match="cannot be read as a checkpoint"):
        load_failure(str(tmp_path))
    state = {"step": 1, "message": "", "config": {"layr": 1}, "model": {}, "batch": {}, "names": []}
    torch.save(state, tmp_path / "failure.pt")
    with pytest.raises(ToCoError, match="has no field 'layr'"):
        load_failure(tmp_path)
