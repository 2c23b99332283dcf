"""CAM carried along attention, against loops written from the equations in float64."""

import math

import pytest
import torch
from test_model import K, images, small_model
from torch.testing import assert_close

from toco_core.cam import multi_scale_cam
from toco_core.errors import ToCoError
from toco_core.refiners.attention import carried, mean_attention, token_affinity


def slow_affinity(attention, kind):
    """Rows that sum to 1, one entry at a time."""
    n, a = len(attention), attention.tolist()
    s = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j in range(n):
            if kind == "attention":
                s[i][j] = a[i][j] + a[j][i]
            else:
                dot = sum(a[i][m] * a[j][m] for m in range(n))
                s[i][j] = dot / math.sqrt(sum(v * v for v in a[i])) / math.sqrt(sum(v * v for v in a[j]))
    return torch.tensor([[value / sum(row) for value in row] for row in s], dtype=torch.float64)


def slow_carried(activation, affinity, steps):
    """One map: negative values cut off, divided by its maximum, then each token gathers from all others."""
    values = [max(v, 0.0) for v in activation.flatten().tolist()]
    largest = max(values) + 1e-5
    values = [v / largest for v in values]
    for _ in range(steps):
        values = [sum(affinity[i, j].item() * values[j] for j in range(len(values))) for i in range(len(values))]
    return torch.tensor(values, dtype=torch.float64).view_as(activation)


@pytest.mark.parametrize("kind", ["attention", "pattern"])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_equals_the_slow_way(kind, steps):
    torch.manual_seed(steps)
    attention = torch.rand(2, 15, 15).softmax(-1) ** 3
    activation = torch.randn(2, 4, 3, 5)
    affinity = token_affinity(attention, kind)
    maps = carried(activation, affinity, steps)
    assert maps.shape == (2, 4, 3, 5) and 0 <= maps.min() <= maps.max() <= 1
    for b in range(2):
        wanted = slow_affinity(attention[b].double(), kind)
        assert_close(affinity[b].double(), wanted, rtol=1e-5, atol=1e-7)
        for k in range(4):
            assert_close(maps[b, k].double(), slow_carried(activation[b, k], wanted, steps), rtol=1e-5, atol=1e-7)


def test_evidence_of_a_head_reaches_the_body_that_attends_to_it_and_nothing_else():
    """Tokens 0 to 2 attend to each other and 3 to 5 do; the CAM fires on token 0 alone."""
    attention = torch.block_diag(torch.full((3, 3), 1 / 3), torch.full((3, 3), 1 / 3))[None]
    activation = torch.tensor([2.0, -1.0, -1.0, -3.0, -3.0, -3.0]).view(1, 1, 2, 3)
    for kind in ("attention", "pattern"):
        maps = carried(activation, token_affinity(attention, kind), 1).flatten()
        assert_close(maps, torch.tensor([1 / 3, 1 / 3, 1 / 3, 0.0, 0.0, 0.0]), rtol=1e-4, atol=0)


def test_tokens_that_attend_to_their_opposites_mislead_attention_and_not_patterns():
    """Bipartite: 0 and 1 attend to 2 and 3, and back. One step of A carries the object to the background."""
    attention = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])[None]
    activation = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    assert carried(activation, token_affinity(attention, "attention"), 1).flatten()[:2].max() == 0
    assert carried(activation, token_affinity(attention, "pattern"), 1).flatten()[2:].max() < 1e-6


def test_a_map_without_activation_stays_zero():
    affinity = token_affinity(torch.rand(1, 6, 6).softmax(-1))
    assert carried(torch.full((1, 2, 2, 3), -0.5), affinity, 2).abs().max() == 0


def test_another_kind_is_refused():
    with pytest.raises(ToCoError, match="attention_kind = 'cosine' is not allowed: one of attention, pattern"):
        token_affinity(torch.rand(1, 4, 4), "cosine")


def test_attention_that_encode_keeps_is_that_of_its_blocks():
    model, x = small_model().eval(), images(2, 24, 40)
    kept = model.encode(x, attend=(1, 3))
    maps = model.attention(x, blocks=[1, 3])
    n = model.encoder.num_prefix_tokens
    assert_close(kept.attention, torch.stack([m.mean(1) for m in maps]).mean(0)[:, n:, n:])
    assert_close(kept.attention, mean_attention(maps, n))
    assert kept.attention.shape == (2, 15, 15) and not kept.attention.requires_grad
    plain = model.encode(x)
    assert plain.attention is None
    assert_close(kept.patch_tokens, plain.patch_tokens)
    with pytest.raises(ToCoError, match=r"block = 5 is not allowed"):
        model.encode(x, attend=(5,))


@pytest.mark.parametrize("flip", [False, True])
def test_multi_scale_cam_carries_every_view_along_its_own_attention(flip):
    model, x = small_model().eval(), images(2, 24, 40)
    options = {"attention_steps": 2, "attention_blocks": (2, 3), "attention_kind": "pattern"}
    found = multi_scale_cam(model, x, scales=(1.0, 0.5), flip=flip, **options)
    total = torch.zeros(2, K, 24, 40, dtype=x.dtype)
    with torch.no_grad():
        for scale in (1.0, 0.5):
            size = (24, 40) if scale == 1 else (16, 24)  # 12 x 20, to whole patches of 8
            views = torch.nn.functional.interpolate(x, size=size, mode="bilinear") if scale != 1 else x
            maps = []
            for mirrored in (False, True)[: 1 + flip]:
                tokens = model.encode(views.flip(-1) if mirrored else views, attend=(2, 3))
                raw = torch.einsum("bdhw,kd->bkhw", tokens.patch_map, model.classifier.weight)
                maps.append(carried(raw, token_affinity(tokens.attention, "pattern"), 2))
                maps[-1] = torch.nn.functional.interpolate(maps[-1], size=(24, 40), mode="bilinear")
                maps[-1] = maps[-1].flip(-1) if mirrored else maps[-1]
            total += torch.stack(maps).amax(0)
    low, high = total.amin((-2, -1), keepdim=True), total.amax((-2, -1), keepdim=True)
    assert_close(found.cam, (total - low) / (high - low + 1e-5), rtol=1e-4, atol=1e-5)
    again = multi_scale_cam(model, x, scales=(1.0, 0.5), flip=flip, tokens=model.encode(x, attend=(2, 3)), **options)
    assert_close(again.aux_cam, found.aux_cam)
    unkept = multi_scale_cam(model, x, scales=(1.0, 0.5), flip=flip, tokens=model.encode(x), **options)
    assert_close(unkept.aux_cam, found.aux_cam)
