"""Class tokens: what they see and say, against loops over single tokens; their map, from the term to the labels."""

import math

import numpy as np
import pytest
import reference_model as slow
import torch
from small_config import few_scenes, small_recipe, stir
from test_kept_tokens import small
from test_methods import batch
from test_model import K, images, small_config, small_model
from torch.testing import assert_close

from toco_core.cam import CAMViews, fused, multi_scale_cam
from toco_core.config import ModelConfig, override, tiny
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import cam_named, evaluate_as
from toco_core.methods.class_tokens import class_contrast_loss, count_shown, is_plain, through_block
from toco_core.model import ToCo
from toco_core.objective import PAPER, Step, objective
from toco_core.predict.image import ImagePredictor
from toco_core.refiners.attention import carried, token_affinity
from toco_core.runs.opened import open_run
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.loop import train

HEADS, AFTER = 3, 2  # of the four blocks of `small_model`


def with_class_tokens(**changes) -> ToCo:
    return small_model(class_tokens_after=AFTER, **changes).eval()


def slow_class_tokens(model, image):
    """One image's class tokens, K D, and their attention, K N: each token asks every head of every block by itself."""
    w = dict(model.encoder.named_parameters())
    states = [x[0] for _, x, _ in model._run_blocks(model._embedded(image[None]))]
    offset = model.class_tokens.offset
    tokens = [states[AFTER - 1][0] + offset[k] for k in range(K)]
    n_patches = len(states[0]) - model.encoder.num_prefix_tokens
    looks, asked = [[0.0] * n_patches for _ in range(K)], HEADS * (model.depth - AFTER)
    for number in range(AFTER, model.depth):
        b = {k.removeprefix(f"blocks.{number}."): v for k, v in w.items() if k.startswith(f"blocks.{number}.")}
        y = [slow.layer_norm(t, b["norm1.weight"], b["norm1.bias"]) for t in [*tokens, *states[number - 1]]]
        qkv = [b["attn.qkv.weight"] @ one + b["attn.qkv.bias"] for one in y]
        width, found = len(y[0]), []
        for k in range(K):
            said = []
            for head in range(HEADS):
                s = slice(head * width // HEADS, (head + 1) * width // HEADS)
                q, keys, values = qkv[k][s], [one[width:][s] for one in qkv], [one[2 * width :][s] for one in qkv]
                strength = [math.exp(float(q @ key) / math.sqrt(width // HEADS)) for key in keys]
                chances = [one / sum(strength) for one in strength]
                said.append(sum(p * value for p, value in zip(chances, values, strict=True)))
                for n in range(n_patches):
                    looks[k][n] += chances[len(chances) - n_patches + n] / asked
            x = tokens[k] + b["attn.proj.weight"] @ torch.cat(said) + b["attn.proj.bias"]
            y2 = slow.layer_norm(x, b["norm2.weight"], b["norm2.bias"])
            hidden = slow.gelu(b["mlp.fc1.weight"] @ y2 + b["mlp.fc1.bias"])
            found.append(x + b["mlp.fc2.weight"] @ hidden + b["mlp.fc2.bias"])
        tokens = found
    normed = [slow.layer_norm(t, w["norm.weight"], w["norm.bias"]) for t in tokens]
    return torch.stack(normed), torch.tensor(looks, dtype=torch.float64)


@torch.no_grad()
def test_they_see_what_the_slow_way_sees():
    model, x = with_class_tokens(), images(2, 24, 40)
    tokens = model.encode(x, classes=True)
    assert tokens.class_tokens.shape == (2, K, 12) and tokens.class_attention.shape == (2, K, 15)
    for b in range(2):
        found, looks = slow_class_tokens(model, x[b])
        assert_close(tokens.class_tokens[b], found)
        assert_close(tokens.class_attention[b], looks)
    inside = model.inside(x, classes=True).images()[1].tokens
    assert_close(inside.class_tokens, tokens.class_tokens[1:])
    assert_close(inside.class_attention, tokens.class_attention[1:])
    v = model.class_tokens.readout.weight[0]
    wanted = [[sum(float(v[d] * token[d]) for d in range(12)) for token in one] for one in tokens.class_tokens]
    assert_close(model.class_tokens.scores(tokens.class_tokens), torch.tensor(wanted, dtype=torch.float64))


def test_they_are_not_seen():
    model, x = with_class_tokens(), images(2, 24, 40)
    plain = ToCo(small_config(), K).double().eval()
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("class_tokens.")}
    assert set(model.state_dict()) - set(own) == {"class_tokens.offset", "class_tokens.readout.weight"}
    plain.load_state_dict(own)
    wanted = plain.encode(x, attend=(2, 4))
    for found in (model.encode(x, attend=(2, 4), classes=True), model.encode(x, attend=(2, 4))):
        assert all(torch.equal(one, other) for one, other in zip(found[:3], wanted[:3], strict=True))
        assert torch.equal(found.attention, wanted.attention)
    assert found.class_tokens is None and found.class_attention is None
    torch.manual_seed(5)
    first = ToCo(small_config(), K).state_dict()
    torch.manual_seed(5)
    again = ToCo(small_config(class_tokens_after=1), K).state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())  # drawn after all others


def test_their_gradient_reaches_what_they_see():
    model = with_class_tokens().train()
    tokens = model.encode(images(2, 24, 40), classes=True)
    assert not tokens.class_attention.requires_grad
    model.class_tokens.scores(tokens.class_tokens).square().sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {"class_tokens.offset", "class_tokens.readout.weight"} < reached
    assert {f"encoder.blocks.{number}.mlp.fc1.weight" for number in range(4)} < reached
    assert not any(name.startswith(("classifier", "decoder", "proj_head")) for name in reached)


def slow_contrast(t, f, label, tau):
    total, pairs = 0.0, 0
    for b in range(len(t)):
        sure = [n for n in range(f.shape[1]) if label[b, n] != IGNORE]
        for k in range(t.shape[1]):
            own = [n for n in sure if label[b, n] == k + 1]
            if own:
                cosines = {n: float(t[b, k] @ f[b, n] / t[b, k].norm() / f[b, n].norm()) for n in sure}
                whole = sum(math.exp(c / tau) for c in cosines.values())
                total -= sum(math.log(math.exp(cosines[n] / tau) / whole) for n in own) / len(own)
                pairs += 1
    return total / max(pairs, 1)


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrast_equals_its_equation():
    t, f = drawn(3, 4, 5, seed=0).requires_grad_(), drawn(3, 6, 5, seed=1).requires_grad_()
    label = torch.tensor([[0, 2, IGNORE, 2, 4, 0], [0, 0, 3, IGNORE, IGNORE, 0], [IGNORE] * 6])
    loss = class_contrast_loss(t, f, label, tau=0.3)
    assert loss.item() == pytest.approx(slow_contrast(t.detach(), f.detach(), label, 0.3), rel=1e-9)
    assert count_shown(label).tolist() == [3] == count_shown(label.view(3, 2, 3)).tolist()
    assert torch.autograd.gradcheck(lambda t, f: class_contrast_loss(t, f, label, tau=0.3), (t, f))
    loss.backward()
    assert not f.grad[0, 2].any() and f.grad[0, 0].any()  # uncertain tokens are left out, the background is not
    assert not t.grad[0, 0].any() and t.grad[0, 1].any() and not t.grad[2].any()
    parts = [class_contrast_loss(t[i], f[i], label[i], tau=0.3, pairs=count_shown(label), parts=3) for i in ONE_BY_ONE]
    assert_close(sum(parts) / 3, loss)
    for nothing in (IGNORE, 0):
        loss = class_contrast_loss(t, f, torch.full_like(label, nothing))
        assert loss.item() == 0 and not any(g.any() for g in torch.autograd.grad(loss, (t, f)))
    one = class_contrast_loss(t[:, :1], f, torch.ones_like(label), tau=0.3)
    assert one.item() == pytest.approx(slow_contrast(t[:, :1].detach(), f.detach(), torch.ones_like(label), 0.3))


ONE_BY_ONE = [slice(b, b + 1) for b in range(3)]


def stirred_network(n_classes=3, after=1) -> ToCo:
    torch.manual_seed(1)
    backbone = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    config = ModelConfig(backbone=backbone, pretrained=False, layer=2, class_tokens_after=after, **sizes)
    model = ToCo(config, n_classes).double()
    stir(model, 0.3)
    return model.eval()


def test_as_terms():
    model = stirred_network().float().train()
    weights = {"class_tokens": 0.5, "class_contrast": 0.25}
    config = override(small_recipe(), class_tokens_after=1, class_tokens_start=3, class_contrast_start=4, **weights)
    for number, on in ((2, set()), (3, {"class_tokens"}), (4, set(weights))):
        counts = {name: weight for name, weight in weights.items() if name in on}
        found = objective(Step(model, batch(), config, number, weights={"cls": 1.0, **counts}))
        assert set(found.terms) == {*PAPER, *weights} and {n for n in weights if found.terms[n] > 0} == on
    step = Step(model, batch(), config, 4, weights=weights)
    scores = model.class_tokens.scores(model.encode(batch().images, classes=True).class_tokens)
    wanted = torch.nn.functional.binary_cross_entropy_with_logits(scores, batch().image_labels)
    found = objective(step)
    assert_close(found.terms["class_tokens"], wanted)
    assert_close(found.total, 0.5 * found.terms["class_tokens"] + 0.25 * found.terms["class_contrast"])
    found.total.backward()
    assert model.class_tokens.offset.grad.any()
    plain = Step(stirred_network(after=0).float(), batch(), small_recipe(), 4, weights={"cls": 1.0})
    assert set(objective(plain).terms) == set(PAPER) and plain.tokens.class_tokens is None


def test_fused_is_the_product_with_the_map_brought_to_one():
    activation, attention = drawn(2, 4, 3, 5, seed=3), drawn(2, 4, 15, seed=4).softmax(-1)
    found, evened = fused(activation, attention), fused(activation, attention, 0.25)
    for b in range(2):
        for k in range(4):
            low, high = float(attention[b, k].min()), float(attention[b, k].max())
            for n in range(15):
                m, looks = float(activation[b, k, n // 5, n % 5]), (float(attention[b, k, n]) - low) / (high - low)
                assert float(found[b, k, n // 5, n % 5]) == pytest.approx(m * looks, rel=1e-4)
                assert float(evened[b, k, n // 5, n % 5]) == pytest.approx(m * looks**0.25, rel=1e-4)
    assert not fused(activation, torch.full_like(attention, 1 / 15)).any()  # looks everywhere alike: names no place


@torch.no_grad()
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("steps", [0, 1])
def test_every_view_is_fused_with_its_own_attention(flip, steps):
    model, x = with_class_tokens(), images(2, 24, 40)
    along = {"attention_steps": 1, "attention_blocks": (2, 3), "attention_kind": "pattern"} if steps else {}
    options = {"scales": (1.0, 0.5), "flip": flip, "class_attention": 0.5, **along}
    totals = {"cam": 0, "aux_cam": 0}
    for scale in (1.0, 0.5):
        size = (24, 40) if scale == 1 else (16, 24)  # 12 x 20, to whole patches of 8
        views = torch.nn.functional.interpolate(x, size=size, mode="bilinear") if scale != 1 else x
        maps = {name: [] for name in totals}
        for mirrored in (False, True)[: 1 + flip]:
            tokens = model.encode(views.flip(-1) if mirrored else views, attend=(2, 3), classes=True)
            looks = tokens.class_attention.unflatten(2, tokens.grid)
            low, high = looks.amin((-2, -1), keepdim=True), looks.amax((-2, -1), keepdim=True)
            for name, patch_map, head in (
                ("cam", tokens.patch_map, model.classifier),
                ("aux_cam", tokens.aux_patch_map, model.aux_classifier),
            ):
                raw = torch.einsum("bdhw,kd->bkhw", patch_map, head.weight) * ((looks - low) / (high - low)).sqrt()
                if steps:
                    raw = carried(raw, token_affinity(tokens.attention, "pattern"), 1)
                raw = torch.nn.functional.interpolate(raw, size=(24, 40), mode="bilinear")
                maps[name].append(raw.flip(-1) if mirrored else raw)
        for name in totals:
            totals[name] = totals[name] + torch.stack(maps[name]).amax(0).relu()
    given = {"none": None, "without": model.encode(x), "with": model.encode(x, attend=(2, 3), classes=True)}
    for tokens in given.values():
        found = multi_scale_cam(model, x, tokens=tokens, **options)
        for name, total in totals.items():
            low, high = total.amin((-2, -1), keepdim=True), total.amax((-2, -1), keepdim=True)
            assert_close(getattr(found, name), (total - low) / (high - low + 1e-5), rtol=1e-3, atol=1e-4)
    without = multi_scale_cam(model, x, tokens=given["with"], **options | {"class_attention": 0.0})
    assert (without.cam - found.cam).abs().max() > 0.1


def test_the_predictor_and_the_step_see_the_same_maps():
    model = stirred_network()
    sizes = {"crop_size": 32, "local_size": 16, "par_iterations": 2, "par_dilations": (1, 2), "cam_scales": (1.0, 0.5)}
    config = override(
        small_recipe(), class_tokens_after=1, class_tokens=1.0, class_attention=0.5, beta_l=0.3, beta_h=0.6, **sizes
    )
    predictor = ImagePredictor(model, config)
    picture = np.random.default_rng(3).integers(0, 255, (37, 52, 3), dtype=np.uint8)
    predictor.set_image(picture, [1, 0, 1])
    options, present = config.labels.cam_options(), torch.tensor([[1, 0, 1]])
    assert options["class_attention"] == 0.5
    expected = multi_scale_cam(model, predictor.images, **options, image_labels=present)
    assert_close(predictor.cam(), expected.cam[:, [0, 2]])
    assert_close(predictor.cam(auxiliary=True), expected.aux_cam[:, [0, 2]])

    model = model.float()
    step = Step(model, batch(), config, 4, weights={"cls": 1.0})
    wanted = multi_scale_cam(model, batch().images, **options, image_labels=batch().image_labels)
    assert_close(step.cams.aux_cam, wanted.aux_cam)
    named = [cam_named(CAMViews(scales=(1.0,), class_attention=p)) for p in (0.5, 0.0)]
    assert named == ["scales 1 + flip, times the class tokens' attention to the power of 0.5", "scales 1 + flip"]


def test_behind_kept_tokens():
    assert kept_blocks(small(class_tokens_after=8)) == 8 and kept_blocks(small(class_tokens_after=6)) == 6
    for after, computed in ((8, 2), (7, 0)):
        torch.manual_seed(3)
        model = ToCo(small(class_tokens_after=after).model, 5)
        stir(model, 0.2)
        model.freeze_blocks(8)
        x, kept = torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)), KeptTokens()
        wanted = model.encode(x, classes=True)
        with kept.of(model, blocks=8):
            for _ in range(2):
                found = model.encode(x, classes=True)
                assert_close(found.class_tokens, wanted.class_tokens, rtol=1e-4, atol=1e-4)
                assert_close(found.class_attention, wanted.class_attention, rtol=1e-3, atol=1e-5)
        assert kept.computed == computed


def test_what_cannot_be_is_refused():
    for name, value in {"class_tokens": 1.0, "class_contrast": 0.5, "class_attention": 0.5}.items():
        with pytest.raises(ToCoError, match=f"{name} = {value} with class_tokens_after = 0 is not allowed: above 0"):
            override(tiny(), **{name: value})
    with pytest.raises(ToCoError, match="class_tokens_after = 4 is not allowed: .* has 4 blocks, at most 3"):
        ToCo(small_config(class_tokens_after=4), K)
    rotary = small_config(class_tokens_after=2, backbone="vit_small_patch16_dinov3")
    with pytest.raises(ToCoError, match="class_tokens_after = 2 is not allowed: 0 with the rotary positions of vit_sm"):
        ToCo(rotary, K)


@torch.no_grad()
@pytest.mark.parametrize("kind", [{}, {"qkv_bias": False, "qk_norm": True}, {"qkv_bias": True, "init_values": 0.3}])
def test_a_block_says_the_same_of_them_alone(kind):
    """Whatever kind of timm's block: what it says of the first tokens of a sequence, without the others' part."""
    from timm.models.vision_transformer import Block, ResPostBlock

    block = Block(12, HEADS, **kind).double().eval()
    stir(block, 0.4)
    assert not is_plain(ResPostBlock(12, HEADS))
    x = torch.randn(2, 9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    assert is_plain(block)
    found, chances = through_block(block, x[:, :5], x[:, 5:])
    assert_close(found, block(x)[:, :5])
    assert chances.shape == (2, HEADS, 5, 9) and (chances.sum(-1) - 1).abs().max() < 1e-9
    for encode in (small_model().encode, small_model().inside):
        with pytest.raises(ToCoError, match="class tokens of a model with class_tokens_after = 0"):
            encode(images(), classes=True)


def test_a_run_with_them_trains_and_opens(tmp_path):
    data = few_scenes(tmp_path / "cache", seed=12, n_train=4, n_val=2, n_test=1)
    config = small(
        steps=2, batch_size=2, accumulate=2, cam_scales=(1.0,), class_tokens_after=8, class_tokens=1.0,
        class_contrast=0.1, class_attention=0.25, out_dir=str(tmp_path / "runs"),
    )  # fmt: skip
    trained = train(config, data=data, progress=False)
    records = [record for record in trained.run.records() if "class_tokens" in record]
    assert len(records) == 2 and all(record["class_tokens"] > 0 for record in records)
    opened = open_run(trained.run.folder, data=data, device="cpu")
    for name, value in trained.model.state_dict().items():
        assert torch.equal(opened.model.state_dict()[name], value)
    torch.manual_seed(config.seed)
    assert (
        opened.model.class_tokens.offset - ToCo(config.model, data.train.n_classes).class_tokens.offset
    ).abs().max() > 1e-5
    found = evaluate_as(opened.config, opened.model, data.val, progress=False)
    assert found.protocol.count("times the class tokens' attention") == 1
    assert found.cam.miou.shape == trained.validation.cam.miou.shape
