"""The detail that final tokens lack: the loss beside a slow one from its equation, and as a term in a step."""

import cmath
import math

import pytest
import torch
from small_config import small_recipe, stirred_model
from test_methods import K, batch, drawn
from torch.testing import assert_close

from toco_core.config import override
from toco_core.methods.frequency import CUTOFF, detail_share, frequency_loss
from toco_core.objective import PAPER, TERMS, Step, objective
from toco_core.predict.tokens import band_energy


def slow_share(tokens, grid, cutoff):
    """Of one image, N D: the Fourier sum at every frequency, term by term."""
    h, w = grid
    f = [[float(x) / float(token.norm()) for x in token] for token in tokens]
    high = total = 0.0
    for u in range(h):
        for v in range(w):
            energy = 0.0
            for d in range(tokens.shape[1]):
                wave = (
                    f[i * w + j][d] * cmath.exp(-2j * cmath.pi * (u * i / h + v * j / w))
                    for i in range(h)
                    for j in range(w)
                )
                energy += abs(sum(wave)) ** 2
            total += energy
            if math.hypot(min(u, h - u) / h, min(v, w - v) / w) > cutoff:
                high += energy
    return high / total


def slow_loss(final, aux, grid):
    shares = [(slow_share(f, grid, CUTOFF), slow_share(a, grid, CUTOFF)) for f, a in zip(final, aux, strict=True)]
    return sum(max(0.0, target - share) / target for share, target in shares) / len(shares)


@pytest.mark.parametrize("cutoff", [0.0, 0.22, 0.3])
def test_share_equals_its_equation(cutoff):
    tokens = drawn(2, 15, 4)
    found = detail_share(tokens, (3, 5), cutoff=cutoff)
    assert_close(found.tolist(), [slow_share(one, (3, 5), cutoff) for one in tokens])
    assert_close(detail_share(3 * tokens, (3, 5), cutoff=cutoff), found)


def test_share_in_the_words_of_the_analysis():
    tokens = torch.nn.functional.normalize(drawn(2, 48, 5) + 1, dim=-1)
    assert_close(detail_share(tokens, (6, 8), cutoff=0.0), 1 - (tokens @ tokens.transpose(1, 2)).mean((1, 2)))
    bands = band_energy(tokens, (6, 8), n_bands=4)
    assert_close(detail_share(tokens, (6, 8), cutoff=0.5**0.5 / 4 + 1e-6), bands[:, 2:].sum(1))


@pytest.mark.parametrize("period", [4, 16])
def test_only_waves_within_eight_patches_are_detail(period):
    phase = 2 * math.pi * torch.arange(16, dtype=torch.float64) / period
    row = torch.stack([phase.cos(), phase.sin()], dim=-1)
    share = detail_share(row.expand(3, 16, 2).flatten(0, 1)[None], (3, 16))
    assert_close(share.item(), 1.0 if period == 4 else 0.0)


def test_loss_equals_its_equation():
    grid = (3, 5)
    smooth = drawn(1, 1, 4, seed=2).expand(1, 15, 4)
    final = torch.cat([smooth + 0.3 * drawn(1, 15, 4), 2 * drawn(1, 15, 4, seed=3)]).requires_grad_()
    aux = torch.cat([drawn(1, 15, 4, seed=1), smooth + 0.3 * drawn(1, 15, 4, seed=4)]).requires_grad_()
    loss = frequency_loss(final, aux, grid)
    assert loss.item() == pytest.approx(slow_loss(final.detach(), aux.detach(), grid))
    assert 0 < loss.item() < 0.5  # the second image has more than it must
    loss.backward()
    assert aux.grad is None and final.grad[0].any() and not final.grad[1].any()
    assert torch.autograd.gradcheck(lambda x: frequency_loss(x, aux.detach(), grid), final)


def test_where_there_is_no_detail_nothing_is_lacking():
    flat = torch.ones(1, 6, 3, dtype=torch.float64)
    assert frequency_loss(flat, flat, (2, 3)).item() == pytest.approx(0, abs=1e-9)
    assert frequency_loss(flat, drawn(1, 6, 3), (2, 3)).item() == pytest.approx(1)
    assert frequency_loss(torch.zeros(1, 6, 3), torch.zeros(1, 6, 3), (2, 3)).item() == 0
    assert frequency_loss(drawn(1, 1, 3), drawn(1, 1, 3), (1, 1)).item() == 0


def test_as_a_term():
    model = stirred_model(K).float().train()
    config = override(small_recipe(), frequency=0.5, frequency_start=3)
    for number in (2, 3):
        step = Step(model, batch(), config, number, weights={"cls": 1.0, "frequency": 0.5 * (number == 3)})
        found = objective(step)
    assert set(found.terms) == {*PAPER, "frequency"}
    tokens = step.tokens
    wanted = slow_loss(tokens.patch_tokens.detach(), tokens.aux_patch_tokens.detach(), tokens.grid)
    assert found.terms["frequency"].item() == pytest.approx(wanted, rel=1e-4, abs=1e-6)
    assert TERMS["frequency"].schedule("frequency", config) == (0.5, 3)
    off = Step(model, batch(), override(config, frequency=0.0), 5, weights={"cls": 1.0})
    assert set(objective(off).terms) == set(PAPER)
