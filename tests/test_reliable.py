"""Contrast of the decoder's features at sure tokens: beside slow versions from its equations, and as a term."""

import math

import pytest
import torch
from small_config import small_recipe, stirred_model
from test_methods import K, batch, drawn
from torch.testing import assert_close

from toco_core.config import override
from toco_core.conventions import IGNORE
from toco_core.methods.reliable import reliable_label, reliable_loss
from toco_core.objective import PAPER, Step, objective
from toco_core.train.backward import backward

LABEL = torch.tensor([[0, 2, 0, IGNORE, 2, 0, 2, 0, 0], [3, 1, IGNORE, 3, 0, IGNORE, IGNORE, 0, 0]])


def slow_label(tokens, label, share):
    kept = torch.full_like(label, IGNORE)
    for b in range(len(label)):
        for c in set(label[b].tolist()) - {IGNORE}:
            members = [n for n in range(label.shape[1]) if label[b, n] == c]
            f = {n: tokens[b, n] / tokens[b, n].norm() for n in members}
            mean = sum(f.values())
            nearest = sorted(members, key=lambda n: -float(f[n] @ mean))  # stable: the lower number first
            if len(members) > 1:
                for n in nearest[: max(2, math.ceil(share * len(members)))]:
                    kept[b, n] = c
    return kept


def slow_loss(features, label, tau):
    total, n = 0.0, 0
    for g, y in zip(features, label.tolist(), strict=True):
        pool = [i for i, c in enumerate(y) if c != IGNORE]
        for i in pool:
            n += 1
            power = {j: math.exp(float(torch.cosine_similarity(g[i], g[j], dim=0)) / tau) for j in pool if j != i}
            alike = sum(value for j, value in power.items() if y[j] == y[i])
            total -= math.log(alike / sum(power.values())) if alike else 0.0
    return total / max(n, 1)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 1.0])
def test_label_keeps_the_nearest(share):
    tokens = drawn(2, 9, 5)
    found = reliable_label(tokens, LABEL, share=share)
    assert torch.equal(found, slow_label(tokens, LABEL, share))
    assert found[1, 1] == IGNORE  # alone
    assert torch.equal(
        reliable_label(torch.ones_like(tokens), LABEL, share=share), slow_label(tokens * 0 + 1, LABEL, share)
    )


def test_label_knows_what_does_not_belong():
    tokens = torch.tensor([1.0, 0]).expand(1, 9, 2).clone()
    tokens[0, 4] = torch.tensor([0.0, 1])  # one of the three that are labelled 2
    assert reliable_label(tokens, LABEL[:1]).tolist() == [[0, 2, 0, IGNORE, IGNORE, 0, 2, IGNORE, IGNORE]]
    assert (reliable_label(tokens, torch.full((1, 9), IGNORE)) == IGNORE).all()


def test_loss_equals_its_equation():
    features = drawn(2, 9, 4).requires_grad_()
    loss = reliable_loss(features, LABEL, tau=0.3)
    assert loss.item() == pytest.approx(slow_loss(features.detach(), LABEL, 0.3))
    assert torch.autograd.gradcheck(lambda x: reliable_loss(x, LABEL, tau=0.3), features)
    loss.backward()
    assert not features.grad[LABEL == IGNORE].any() and features.grad[1, 0].any()
    parts = [
        reliable_loss(f[None], y[None], tau=0.3, tokens=(LABEL != IGNORE).sum()[None], parts=2)
        for f, y in zip(features, LABEL, strict=True)
    ]
    assert_close(torch.stack(parts).mean(), loss)


def test_loss_of_one_class_or_of_nothing_is_nothing():
    features = drawn(2, 9, 4).requires_grad_()
    for value in (IGNORE, 0):
        loss = reliable_loss(features, torch.full((2, 9), value))
        (gradient,) = torch.autograd.grad(loss, features)
        assert loss.item() == pytest.approx(0, abs=1e-12) and gradient.abs().max() < 1e-12
    blank = torch.zeros(2, 9, 4, requires_grad=True)  # no ReLU is above 0
    loss = reliable_loss(blank.relu(), LABEL)
    loss.backward()
    assert loss.isfinite() and not blank.grad.any()


def labelled_step(model, config, weights, pixels, **options):
    step = Step(model, batch(), config, 3, weights=weights, **options)
    step.pseudo_label = pixels
    return step


def test_as_a_term():
    model = stirred_model(K).float().train()
    config = override(small_recipe(), reliable=0.5, reliable_start=3)
    pixels = torch.randint(0, 3, (2, 4, 6), generator=torch.Generator().manual_seed(1))
    pixels[pixels == 2] = IGNORE
    pixels = pixels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    step = labelled_step(model, config, {"cls": 1.0, "reliable": 0.5}, pixels)
    found = objective(step)
    assert set(found.terms) == {*PAPER, "reliable"}

    tokens, (h, w) = step.tokens, step.tokens.grid
    at_tokens = pixels[:, 32 // h // 2 :: 32 // h, 48 // w // 2 :: 48 // w].flatten(1)
    label = slow_label(tokens.patch_tokens.detach(), at_tokens, 0.5)
    inputs = []
    hook = model.decoder.conv8.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    model.decoder(tokens.patch_map)
    hook.remove()
    wanted = slow_loss(inputs[0].flatten(2).transpose(1, 2), label, 0.1)
    assert wanted > 0 and found.terms["reliable"].item() == pytest.approx(wanted, rel=1e-4)
    found.total.backward()
    assert model.decoder.conv7.weight.grad.any() and model.decoder.conv8.weight.grad is None

    off = Step(model, batch(), override(config, reliable=0.0), 5, weights={"cls": 1.0})
    assert set(objective(off).terms) == set(PAPER) and "pseudo_label" not in off.__dict__


def test_a_batch_in_parts_is_the_whole():
    config = override(small_recipe(), reliable=1.0, frequency=1.0, beta_l=0.3, beta_h=0.5, cls=0.0, aux_cls=0.0)
    config = override(config, ptc=0.0, ctc=0.0, batch_size=2)
    found = {}
    for n in (1, 2):
        model = stirred_model(K).float().train()
        result = backward(objective, model, batch(), override(config, accumulate=n), 3)
        found[n] = result.terms, model.decoder.conv6.weight.grad
    for name in ("reliable", "frequency"):
        assert_close(found[1][0][name], found[2][0][name])
    assert found[1][0]["reliable"] > 0 and found[1][1].any()
    assert_close(found[1][1], found[2][1])
