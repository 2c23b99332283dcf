"""Ten steps give the stored numbers (see `golden_curve.py`): a rearrangement of the code moves none of them."""

import json

import pytest
import torch
from golden_curve import STEPS, STORED, curve


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ten_steps_give_the_stored_losses(accumulate):
    stored = json.loads(STORED.read_text(encoding="utf-8"))["losses"]
    found, _ = curve(torch.float64, accumulate)
    assert len(stored) == STEPS
    for step, (was, now) in enumerate(zip(stored, found, strict=True)):
        assert now == pytest.approx(was, rel=1e-5, abs=1e-10), f"step {step}"


def test_every_term_counts_in_the_stored_losses():
    last = json.loads(STORED.read_text(encoding="utf-8"))["losses"][-1]
    assert set(last) == {"total", "cls", "aux_cls", "ptc", "ctc", "seg", "energy"}
    assert min(map(abs, last.values())) > 1e-6
