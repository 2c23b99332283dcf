"""Ideas of later papers: each loss beside a slow one written from its equation, and as a term in a step."""

import math

import pytest
import torch
from small_config import small_recipe, stirred_model
from torch.testing import assert_close

from toco_core.config import override
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.methods.consistency import consistency_label, consistency_loss
from toco_core.methods.exchange import exchange_label, exchange_loss
from toco_core.methods.prototypes import prototype_loss
from toco_core.objective import PAPER, TERMS, Step, StepInput, objective

K = 3


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def softmax(values):
    top = max(values)
    powers = [math.exp(value - top) for value in values]
    return [power / sum(powers) for power in powers]


def slow_exchange(z, s, y, sure):
    total, n = 0.0, 0
    for b in range(z.shape[0]):
        classes = [0] + [k + 1 for k in range(K) if y[b, k]]
        for i in range(z.shape[2]):
            for j in range(z.shape[3]):
                p = softmax([s[b, c, i, j].item() for c in classes])
                if max(p) <= sure:
                    continue
                chosen = classes[p.index(max(p))]
                for k in range(K):
                    if y[b, k]:
                        probability = 1 / (1 + math.exp(-z[b, k, i, j].item()))
                        total -= math.log(probability if chosen == k + 1 else 1 - probability)
                        n += 1
    return total / max(n, 1)


@pytest.mark.parametrize("sure", [0.0, 0.5, 0.7])
def test_exchange_equals_its_equation(sure):
    z, s = drawn(2, K, 3, 5).requires_grad_(), drawn(2, K + 1, 3, 5, seed=1).requires_grad_()
    y = torch.tensor([[1.0, 0, 1], [0, 1, 0]])
    loss = exchange_loss(z, exchange_label(2 * s, y, sure=sure))
    assert loss.item() == pytest.approx(slow_exchange(z, 2 * s, y, sure), rel=1e-6)
    loss.backward()
    assert s.grad is None and not z.grad[1, 0].any() and not z.grad[1, 2].any() and z.grad[1, 1].any()
    step = 1e-5
    moved = z.detach().clone()
    moved[0, 2, 1, 3] += step
    slope = (slow_exchange(moved, 2 * s, y, sure) - slow_exchange(z, 2 * s, y, sure)) / step
    assert float(z.grad[0, 2, 1, 3]) == pytest.approx(slope, abs=1e-5)


def test_exchange_of_nothing_sure_is_nothing():
    nothing = exchange_label(torch.zeros(1, K + 1, 2, 2), torch.ones(1, K), sure=0.5)
    assert float(exchange_loss(drawn(1, K, 2, 2), nothing)) == 0


def slow_consistency(weak, strong, label, sure):
    total, n = 0.0, 0
    for b in range(len(weak)):
        for i in range(weak.shape[2]):
            for j in range(weak.shape[3]):
                p = softmax(weak[b, :, i, j].tolist())
                if label[b, i, j] == IGNORE and max(p) > sure:
                    total -= math.log(softmax(strong[b, :, i, j].tolist())[p.index(max(p))])
                    n += 1
    return total / max(n, 1)


@pytest.mark.parametrize("sure", [0.0, 0.6])
def test_consistency_equals_its_equation(sure):
    weak, strong = drawn(2, K + 1, 3, 4).requires_grad_(), drawn(2, K + 1, 3, 4, seed=1).requires_grad_()
    label = torch.randint(0, 3, (2, 3, 4), generator=torch.Generator().manual_seed(2))
    label[label == 2] = IGNORE
    chosen = consistency_label(weak, label, sure=sure)
    loss = consistency_loss(strong, chosen)
    assert loss.item() == pytest.approx(slow_consistency(weak, strong, label, sure), rel=1e-6)
    loss.backward()
    assert weak.grad is None and not strong.grad.movedim(1, -1)[label != IGNORE].any()
    assert torch.autograd.gradcheck(lambda x: consistency_loss(x, chosen), strong)
    assert consistency_loss(strong, consistency_label(weak, torch.zeros_like(label), sure=sure)).item() == 0


def slow_prototypes(tokens, label, tau):
    sets = {}
    for b in range(len(tokens)):
        for n in range(tokens.shape[1]):
            if label[b, n] != IGNORE:
                f = tokens[b, n] / tokens[b, n].norm()
                sets.setdefault(int(label[b, n]), []).append(f)
    means = {c: sum(found) / len(found) for c, found in sets.items()}
    means = {c: mean / mean.norm() for c, mean in means.items()}
    total = 0.0
    for c, found in sets.items():
        for f in found:
            chances = softmax([float(f @ mean) / tau for mean in means.values()])
            total -= math.log(chances[list(means).index(c)]) / len(found)
    return total / max(len(sets), 1)


def test_prototypes_equal_their_equation():
    tokens = drawn(2, 6, 5).requires_grad_()
    label = torch.tensor([[0, 0, 2, IGNORE, 2, 0], [3, 0, IGNORE, 3, 3, 0]])
    loss = prototype_loss(tokens, label, K, tau=0.3)
    assert loss.item() == pytest.approx(slow_prototypes(tokens.detach(), label, 0.3), rel=1e-6)
    loss.backward()
    assert not tokens.grad[0, 3].any() and tokens.grad[1, 0].any()

    means = tokens.detach()

    def with_means_at_rest(x):
        """What the gradient belongs to: the tokens move, the means do not."""
        f, rest = torch.nn.functional.normalize(x, dim=-1), torch.nn.functional.normalize(means, dim=-1)
        classes = [0, 2, 3]
        mean = torch.stack([torch.nn.functional.normalize(rest[label == c].mean(0), dim=-1) for c in classes])
        costs = [-(f[label == c] @ mean.T / 0.3).log_softmax(-1)[:, i].mean() for i, c in enumerate(classes)]
        return sum(costs) / 3

    other = tokens.detach().clone().requires_grad_()
    with_means_at_rest(other).backward()
    assert_close(tokens.grad, other.grad)
    assert float(prototype_loss(tokens, torch.full_like(label, IGNORE), K)) == 0


def batch():
    views = [drawn(2, 3, 32, 48, seed=seed).float() for seed in range(3)]
    return StepInput(*views, torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41]]))


@pytest.mark.parametrize("name", ["exchange", "consistency", "prototypes"])
def test_as_a_term(name):
    model = stirred_model(K).float().train()
    config = override(small_recipe(), n_local=2, local_size=16, **{name: 0.5, f"{name}_start": 3, "seg_start": 0})
    for number, weight in ((2, 0.0), (3, 0.5)):
        step = Step(model, batch(), config, number, weights={"cls": 1.0, name: weight})
        found = objective(step)
        assert set(found.terms) == {*PAPER, name} and (found.terms[name] > 0) == (number == 3)
    found.total.backward()
    off = objective(Step(model, batch(), override(config, **{name: 0.0}), 5, weights={"cls": 1.0}))
    assert set(off.terms) == set(PAPER) and set(TERMS) > set(PAPER)


def test_prototypes_want_the_batch_in_one_piece():
    config = override(small_recipe(), prototypes=0.5)
    with pytest.raises(ToCoError, match="prototypes with a batch in 2 parts is not allowed"):
        objective(Step(stirred_model(K).float(), batch(), config, 200, weights={"prototypes": 1.0}, parts=2))
    with pytest.raises(ToCoError, match="accumulate = 2 with prototypes is not allowed: 1"):
        override(config, accumulate=2)
    with pytest.raises(ToCoError, match="processes = 2 with prototypes is not allowed: 1"):
        config.check_parts(2)
    override(config, prototypes=0.0, exchange=0.1, seg_start=0, consistency=0.1, accumulate=2).check_parts(2)


def test_consistency_leaves_out_padding():
    model = stirred_model(K).float()
    config = override(small_recipe(), consistency=1.0)
    whole = batch()
    changed = whole.images.clone()
    step = Step(model, whole, config, 200, weights={"consistency": 1.0})
    step.pseudo_label = torch.full((2, 32, 48), IGNORE)
    inside = torch.zeros(2, 32, 48, dtype=torch.bool)
    for b, (top, bottom, left, right) in enumerate(whole.valid_box.tolist()):
        inside[b, top:bottom, left:right] = True
    other = Step(model, whole._replace(images=changed), config, 200, weights={"consistency": 1.0})
    other.pseudo_label = torch.full((2, 32, 48), IGNORE).masked_fill(~inside, 0)
    first, second = (TERMS["consistency"].loss(one) for one in (step, other))
    assert float(first) > 0 and float(first) == float(second)
