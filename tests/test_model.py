import types

import pytest
import reference_model as slow
import timm
import torch
from safetensors.torch import save_file
from small_config import stir
from torch.testing import assert_close

import toco_core.model
from toco_core.backbone import PlainViT, build_encoder, load_weights
from toco_core.cam import class_activation
from toco_core.config import ModelConfig, override, tiny
from toco_core.errors import ToCoError
from toco_core.heads import pooled
from toco_core.model import ToCo, build_model
from toco_core.train.optimizer import parameter_groups

SPEC = PlainViT(image=24, patch=8, width=12, depth=4, heads=3, mlp=20)
K = 5
SIZES = {"proj_hidden": 14, "proj_bottleneck": 9, "proj_dim": 7, "decoder_width": 11}


def small_config(**changes):
    return ModelConfig(**({"backbone": str(SPEC), "pretrained": False, "layer": 2} | SIZES | changes))


def small_model(seed=0, dropped_border=False, **changes):
    """A ToCo in float64 with every parameter random, also norms and biases."""
    torch.manual_seed(seed)
    model = ToCo(small_config(**changes), K, dropped_border=dropped_border).double()
    stir(model, 0.3)
    return model


def images(batch=2, height=16, width=32, seed=1):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_tokens(model, image):
    weights = dict(model.encoder.named_parameters())
    return slow.encode_one(weights, image, patch=8, heads=3, depth=4, layer=model.layer)


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("size", [(16, 32), (24, 24), (40, 16)])
def test_values_and_gradients_equal_the_slow_network(size):
    model = small_model()
    x = images(2, *size)
    torch.manual_seed(2)
    fast = model(x)
    projected = model.project(fast.tokens.class_token)
    found = [fast.class_logits, fast.aux_class_logits, fast.seg_logits, projected, *fast.tokens[:3]]

    wanted = [[] for _ in found]
    for image in x:
        class_token, patches, aux, grid = slow_tokens(model, image)
        assert grid == fast.tokens.grid == (size[0] // 8, size[1] // 8)
        results = (
            slow.class_logits(patches, model.classifier.weight),
            slow.class_logits(aux, model.aux_classifier.weight),
            slow.decode(dict(model.decoder.named_parameters()), patches, grid),
            slow.project(dict(model.proj_head.named_parameters()), class_token),
            class_token,
            patches,
            aux,
        )
        for collected, result in zip(wanted, results, strict=True):
            collected.append(result)
    wanted = [torch.stack(w) for w in wanted]
    assert_close(found, wanted)

    directions = [torch.randn_like(w) for w in wanted]
    fast_grads, slow_grads = (
        torch.autograd.grad(
            sum((v * d).sum() for v, d in zip(values, directions, strict=True)), trained(model).values()
        )
        for values in (found, wanted)
    )
    for name, a, b in zip(trained(model), fast_grads, slow_grads, strict=True):
        assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


def test_maps_hold_the_tokens_row_by_row():
    tokens = small_model().encode(images(2, 16, 40))
    assert_close(tokens.patch_map[1, :, 1, 3], tokens.patch_tokens[1, 1 * 5 + 3])
    assert_close(tokens.aux_patch_map[0, :, 0, 4], tokens.aux_patch_tokens[0, 4])


def test_a_size_that_is_no_multiple_is_resized_or_loses_its_border():
    x = images(1, 21, 30)
    model = small_model()
    assert model.encode(x).grid == (3, 4)
    resized = torch.stack([slow.resize(image, (24, 32), "bilinear") for image in x])
    assert_close(model.encode(x).patch_tokens, model.encode(resized).patch_tokens)
    model = small_model(dropped_border=True)
    assert model.encode(x).grid == (2, 3)
    assert_close(model.encode(x).patch_tokens, model.encode(x[..., :16, :24]).patch_tokens)
    with pytest.raises(ToCoError, match="7 x 30 is smaller than a patch"):
        model.encode(images(1, 7, 30))


def test_heads_can_leave_out_the_decoder():
    model = small_model()
    assert model.heads(model.encode(images()), segmentation=False).seg_logits is None


# ---- position embeddings


@pytest.mark.parametrize("new", [(2, 3), (3, 3), (7, 4)])
def test_position_embeddings_are_resized_as_the_slow_way_does(new):
    pos = torch.randn(1, 2 + 3 * 3, 5, dtype=torch.float64)
    found = toco_core.backbone.resize_positions(pos, (3, 3), new, 2, antialias=False)
    grid = slow.resize(pos[0, 2:].reshape(3, 3, 5).permute(2, 0, 1), new, "bicubic")
    assert_close(found[0, :2], pos[0, :2])
    assert_close(found[0, 2:], grid.permute(1, 2, 0).reshape(-1, 5))


def test_frozen_positions_are_kept_per_size_until_they_change():
    model = small_model()
    first = model.encode(images()).patch_tokens
    kept = model._positions[(2, 4)]
    model.encode(images())
    assert model._positions[(2, 4)] is kept
    state = model.state_dict()
    state["encoder.pos_embed"] = state["encoder.pos_embed"] * 2
    model.load_state_dict(state)
    assert not torch.allclose(model.encode(images()).patch_tokens, first)
    assert model.float().encode(images().float()).patch_tokens.dtype == torch.float32


def test_positions_are_trained_only_on_request():
    assert "encoder.pos_embed" not in trained(small_model())
    model = small_model(freeze_pos_embed=False)
    model.encode(images()).patch_tokens.sum().backward()
    assert model.encoder.pos_embed.grad.abs().sum() > 0


# ---- other backbones


@pytest.mark.parametrize(
    ("name", "n_prefix"),
    [
        ("vit_tiny_patch16_224", 1),
        ("deit_tiny_distilled_patch16_224", 2),
        ("deit3_small_patch16_224", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("eva02_tiny_patch14_224", 1),
    ],
)
def test_plain_transformers_of_timm(name, n_prefix):
    """With timm's antialiasing, tokens are those of timm's own forward pass, prefix tokens counted."""
    config = ModelConfig(backbone=name, pretrained=False, layer=3, pos_embed_antialias=True, **SIZES)
    model = ToCo(config, K).eval()
    patch = model.patch_size[0]
    x = torch.randn(1, 3, 3 * patch, 5 * patch)
    with torch.no_grad():
        tokens = model.encode(x)
        wanted = model.encoder.forward_features(x)
        if isinstance(model.encoder.norm, torch.nn.Identity):
            wanted = model.encoder.fc_norm(wanted)
        aux = model.encoder.forward_intermediates(x, indices=[2], intermediates_only=True)[0]
    assert model.encoder.num_prefix_tokens == n_prefix
    assert_close(tokens.class_token, wanted[:, 0])
    assert_close(tokens.patch_tokens, wanted[:, n_prefix:])
    assert_close(tokens.aux_patch_map, aux)
    attention = model.attention(x)
    assert len(attention) == 12
    assert attention[5].shape[-2:] == (15 + n_prefix, 15 + n_prefix)
    assert_close(attention[5].sum(-1), torch.ones_like(attention[5].sum(-1)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backbone": "vit_tny_patch16_224"}, "'vit_tny_patch16_224' is not known: did you mean vit_tiny_patch16_224"),
        ({"backbone": "zzz"}, "'zzz' is not known: allowed are scenes_vit_nano and timm's plain"),
        ({"backbone": "vit_tiny_patch16_224.augre"}, "did you mean vit_tiny_patch16_224.augreg"),
        ({"backbone": "resnet50"}, "'resnet50' is not a plain vision transformer"),
        ({"backbone": "vit_base_patch16_siglip_224"}, "has no class token"),
        ({"backbone": "vit_small_patch16_18x2_224"}, "has blocks without one attention before one MLP"),
        ({"layer": 5}, r"layer = 5 is not allowed: plain_vit.* has blocks 1\.\.4"),
        ({"backbone": "plain_vit(patch=8)"}, "is not understood"),
        ({"backbone": str(SPEC._replace(heads=5))}, "width must be a multiple of heads"),
        ({"pretrained": True}, "has no pretrained weights: give a file as `weights`"),
        ({"pretrained": True, "weights": "nowhere.pth"}, "weights = 'nowhere.pth' is not a file"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(changes, message):
    with pytest.raises(ToCoError, match=message) as error:
        ToCo(small_config(**changes), K)
    assert "\n" not in str(error.value)


def test_no_class_is_refused():
    with pytest.raises(ToCoError, match="n_classes = 0"):
        ToCo(small_config(), 0)


def test_weights_that_cannot_be_fetched(monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr(timm, "create_model", no_network)
    message = (
        r"backbone = 'vit_base_patch16_224': its pretrained weights "
        r"\(model.safetensors of timm/vit_base_patch16_224\..*\) "
        r"could not be fetched \(OSError: no route to host\): copy the file .* give its path as `weights`"
    )
    with pytest.raises(ToCoError, match=message):
        ToCo(ModelConfig(backbone="vit_base_patch16_224"), K)


def test_shipped_weights_are_half_precision_and_their_absence_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(toco_core.backbone, "WEIGHTS_FOLDER", tmp_path)
    config = ModelConfig(backbone="scenes_vit_nano", **SIZES)
    with pytest.raises(ToCoError, match="weights of scenes_vit_nano are not in this installation"):
        ToCo(config, K)
    encoder = build_encoder(ModelConfig(backbone="scenes_vit_nano", pretrained=False))
    save_file({k: v.half() for k, v in encoder.state_dict().items()}, tmp_path / "scenes_vit_nano.safetensors")
    model = ToCo(config, K)
    assert_close(model.encoder.blocks[3].mlp.fc1.weight, encoder.blocks[3].mlp.fc1.weight.half().float())
    assert len(model.encoder.blocks) == 12
    assert model.patch_size == (8, 8)


# ---- weights from files


def saved(tmp_path, state, name="w.safetensors"):
    path = tmp_path / name
    if name.endswith(".pth"):
        torch.save(state, path)
    else:
        save_file(state, path)
    return path


@pytest.mark.parametrize("name", ["w.safetensors", "w.pth"])
def test_weights_from_a_file(tmp_path, name):
    state = build_encoder(small_config()).state_dict()
    extra = {"head.weight": torch.ones(3, 12), "fc_norm.bias": torch.ones(12)}
    path = saved(tmp_path, state | extra, name)
    model = ToCo(small_config(pretrained=True, weights=str(path)), K)
    for key, value in model.encoder.state_dict().items():
        assert torch.equal(value, state[key])


def test_weights_inside_a_training_checkpoint(tmp_path):
    state = build_encoder(small_config()).state_dict()
    path = saved(tmp_path, {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, "w.pth")
    encoder = build_encoder(small_config(pretrained=True, weights=str(path)))
    assert torch.equal(encoder.cls_token, state["cls_token"])


def test_weights_of_another_image_size(tmp_path):
    other = build_encoder(small_config(backbone=str(SPEC._replace(image=40)))).state_dict()
    path = saved(tmp_path, other)
    encoder = build_encoder(small_config(pretrained=True, weights=str(path)))
    grid = slow.resize(other["pos_embed"][0, 1:].double().reshape(5, 5, 12).permute(2, 0, 1), (3, 3), "bicubic")
    assert_close(encoder.pos_embed[0, 1:].double(), grid.permute(1, 2, 0).reshape(9, 12), rtol=1e-5, atol=1e-6)


def test_weights_that_do_not_fit_are_reported_in_words(tmp_path):
    encoder = build_encoder(small_config())
    state = encoder.state_dict()

    def refuse(changed, message):
        with pytest.raises(ToCoError, match=message) as error:
            load_weights(encoder, saved(tmp_path, changed))
        assert "\n" not in str(error.value)

    refuse({k: v for k, v in state.items() if k != "norm.bias"}, r"1 missing tensor \(norm.bias\)")
    refuse(state | {"strange": torch.ones(1)}, r"1 unexpected tensor \(strange\)")
    refuse(state | {"norm.bias": torch.ones(13)}, r"1 tensor of another shape \(norm.bias is 13 and not 12\)")
    refuse({k: v for k, v in state.items() if "blocks.0" not in k}, r"12 missing tensors \(blocks.0.*, \.\.\.\)")
    refuse(state | {"pos_embed": torch.ones(1, 9, 12)}, "its 9 position embeddings are not 1 and a square grid")


def test_files_that_are_damaged_or_hold_code_are_refused(tmp_path):
    for name in ("w.safetensors", "w.pth"):
        path = tmp_path / name
        path.write_bytes(b"nonsense")
        with pytest.raises(ToCoError, match=f"{name}' cannot be read"):
            load_weights(build_encoder(small_config()), path)
    path = saved(tmp_path, {"a": types.SimpleNamespace(b=1)}, "w.pth")
    with pytest.raises(ToCoError, match="holds more than tensors"):
        load_weights(build_encoder(small_config()), path)
    path = saved(tmp_path, {"a": 1}, "w.pth")
    with pytest.raises(ToCoError, match="holds no dictionary of tensors"):
        load_weights(build_encoder(small_config()), path)


# ---- normalisation, moving average, groups


def test_normalisation_belongs_to_the_backbone():
    model = ToCo(small_config(), K)
    x = torch.rand(2, 3, 4, 5)
    assert_close(model.normalise(x), x * 2 - 1)
    assert_close(model.denormalise(model.normalise(x)), x)
    deit = ToCo(ModelConfig(backbone="deit_tiny_patch16_224", pretrained=False, **SIZES), K)
    assert_close(deit.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    chosen = ToCo(small_config(mean=(0.1, 0.2, 0.3), std=(1, 0.5, 0.2)), K)
    assert_close(chosen.normalise(torch.ones(1, 3, 1, 1)).flatten(), torch.tensor([0.9, 1.6, 3.5]))
    assert not {"mean", "std"} & set(chosen.state_dict())


def test_the_teacher_begins_as_the_student_and_follows_it():
    torch.manual_seed(0)
    model = ToCo(small_config(), K)
    token = torch.randn(3, 12)
    assert torch.equal(model.project(token), model.project_ema(token))
    before = {k: v.clone() for k, v in model.proj_head_ema.state_dict().items()}
    for parameter in model.proj_head.parameters():
        parameter.data += torch.randn_like(parameter)
    model.update_ema(0.75)
    student = model.proj_head.state_dict()
    for key, value in model.proj_head_ema.state_dict().items():
        assert_close(value, 0.75 * before[key] + 0.25 * student[key])
    assert not model.project_ema(token).requires_grad
    assert model.project(token).requires_grad


def test_fresh_projection_has_unit_rows_that_stay():
    model = ToCo(small_config(), K)
    assert "proj_head.last_layer.weight_g" not in trained(model)
    assert (model.project(torch.randn(4, 12)).abs() <= 1).all()


def test_parameter_groups():
    model = small_model()
    settings = {"lr": 0.5, "head_lr_scale": 10.0, "weight_decay": 0.1}
    encoder, heads = parameter_groups(model, **settings)
    assert (encoder["name"], encoder["lr"], encoder["weight_decay"]) == ("encoder", 0.5, 0.1)
    assert (heads["name"], heads["lr"], heads["base_lr"]) == ("heads", 5.0, 5.0)
    assert len(encoder["params"]) + len(heads["params"]) == len(trained(model))
    assert sum(p is model.classifier.weight for p in heads["params"]) == 1

    groups = parameter_groups(model, **settings, decay_all=False)
    free = [p for g in groups if g["weight_decay"] == 0 for p in g["params"]]
    assert len([p for g in groups for p in g["params"]]) == len(trained(model))
    assert all(p.ndim == 1 or p is model.encoder.cls_token for p in free)
    assert any(p is model.encoder.cls_token for p in free)
    torch.optim.AdamW(groups)


def test_classifiers_may_have_a_rate_of_their_own():
    model = small_model()
    groups = parameter_groups(model, lr=0.5, head_lr_scale=10.0, weight_decay=0.1, classifier_lr_scale=400.0)
    assert [(g["name"], g["base_lr"]) for g in groups] == [("encoder", 0.5), ("heads", 5.0), ("classifiers", 200.0)]
    assert [id(p) for p in groups[2]["params"]] == [id(model.classifier.weight), id(model.aux_classifier.weight)]
    assert sum(len(g["params"]) for g in groups) == len(trained(model))


# ---- looking inside


def test_aux_norm():
    plain, normed = small_model(), small_model(aux_norm=True)
    ones, zeros = torch.ones(plain.width).double(), torch.zeros(plain.width).double()
    tokens, found = plain.encode(images(2, 16, 40)), normed.encode(images(2, 16, 40))
    assert_close(found.aux_patch_tokens, slow.layer_norm(tokens.aux_patch_tokens, ones, zeros))
    assert_close(found.patch_tokens, tokens.patch_tokens)
    long = tokens.aux_patch_tokens.clone()
    long[0, 3] *= 25  # a token many times longer than the others is not what the maximum picks any more
    assert_close(slow.layer_norm(long, ones, zeros)[0, 3], found.aux_patch_tokens[0, 3])


@pytest.mark.parametrize("size, n, k", [((16, 32), 8, 2), ((24, 40), 15, 3), ((8, 16), 2, 1)])
def test_poolings_equal_the_slow_ones_in_values_and_gradients(size, n, k):
    x = images(2, *size)
    for pooling, taken in {"max": 1, "mean": n, "topk": k, "cam_topk": k}.items():
        model = small_model(pooling=pooling)
        found = model(x)
        parts = [(model.classifier, found.tokens.patch_tokens), (model.aux_classifier, found.tokens.aux_patch_tokens)]
        for (head, tokens), logits in zip(parts, (found.class_logits, found.aux_class_logits), strict=True):
            assert tokens.shape[1] == n
            if pooling == "cam_topk":
                wanted = torch.stack([slow.scores_at_tokens(image, head.weight, taken) for image in tokens])
            else:
                wanted = torch.stack([head.weight @ slow.pooled(image, taken) for image in tokens])
            assert_close(logits, wanted)
            upstream = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
            inputs = (tokens, head.weight)
            assert_close(
                torch.autograd.grad((logits * upstream).sum(), inputs, retain_graph=True),
                torch.autograd.grad((wanted * upstream).sum(), inputs, retain_graph=True),
            )
            if pooling == "max":
                assert torch.equal(logits, head(tokens.max(dim=1).values))


def test_pooling_is_all_that_the_option_changes():
    x, models = images(2, 24, 40), [small_model(pooling=p) for p in ("max", "mean", "topk", "cam_topk")]
    maximum, mean, topk, cam_topk = (model(x) for model in models)
    for other in (mean, topk, cam_topk):
        assert torch.equal(other.tokens.patch_tokens, maximum.tokens.patch_tokens)
        assert torch.equal(other.seg_logits, maximum.seg_logits)
        assert (other.class_logits - maximum.class_logits).abs().min() > 1e-3
        assert (other.aux_class_logits - maximum.aux_class_logits).abs().min() > 1e-3
    raw = class_activation(mean.tokens.patch_map, models[1].classifier.weight)
    assert_close(mean.class_logits, raw.mean(dim=(-2, -1)))
    assert_close(cam_topk.class_logits, raw.flatten(2).sort(descending=True).values[..., :3].mean(-1))  # of 15 tokens
    with pytest.raises(ToCoError, match="pooling = 'sum' is not allowed: one of max, mean, topk"):
        pooled(mean.tokens.patch_tokens, "sum")
    with pytest.raises(ToCoError, match="pooling = 'avg'"):
        small_config(pooling="avg")


@pytest.mark.parametrize("pooling, aux_pooling, taken", [("max", "mean", (1, 15)), ("topk", "max", (3, 1))])
def test_the_auxiliary_classifier_may_read_its_tokens_in_a_way_of_its_own(pooling, aux_pooling, taken):
    model = small_model(pooling=pooling, aux_pooling=aux_pooling)
    assert model.config.poolings == (pooling, aux_pooling) and small_config(pooling=pooling).poolings == (pooling,) * 2
    found = model(images(2, 24, 40))
    parts = [(model.classifier, found.tokens.patch_tokens), (model.aux_classifier, found.tokens.aux_patch_tokens)]
    for (head, tokens), k, logits in zip(parts, taken, (found.class_logits, found.aux_class_logits), strict=True):
        assert_close(logits, torch.stack([head.weight @ slow.pooled(image, k) for image in tokens]))
    with pytest.raises(ToCoError, match="aux_pooling = 'avg' is not allowed: one of max, mean, topk, cam_topk"):
        small_config(aux_pooling="avg")


@pytest.mark.parametrize("pooling", ["max", "mean", "topk"])
def test_the_gradient_of_pooling_is_that_of_finite_differences(pooling):
    tokens = torch.randn(2, 7, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: pooled(t, pooling), tokens)


def test_block_tokens():
    model = small_model()
    blocks = model.block_tokens(images())
    tokens = model.encode(images())
    assert len(blocks) == 4
    assert_close(blocks[1], tokens.aux_patch_tokens)
    last = slow.layer_norm(blocks[3], model.encoder.norm.weight, model.encoder.norm.bias)
    assert_close(last, tokens.patch_tokens)


def test_attention_leaves_the_model_as_it_was():
    model = small_model()
    before = [block.attn.fused_attn for block in model.encoder.blocks]
    tokens = model.encode(images()).patch_tokens
    maps = model.attention(images())
    assert [m.shape for m in maps] == [(2, 3, 9, 9)] * 4
    assert_close(maps[0].sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
    assert [block.attn.fused_attn for block in model.encoder.blocks] == before
    assert not any(block.attn.attn_drop._forward_pre_hooks for block in model.encoder.blocks)
    assert torch.equal(model.encode(images()).patch_tokens, tokens)
    with model.plain_attention():
        assert_close(model.encode(images()).patch_tokens, tokens)


def test_mixed_precision_trains():
    model = small_model().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(images().float())
        loss = output.class_logits.float().sum() + output.seg_logits.float().sum()
    loss.backward()
    assert_close(output.class_logits.float(), model(images().float()).class_logits, rtol=0.1, atol=0.1)
    assert all(torch.isfinite(p.grad).all() for p in trained(model).values() if p.grad is not None)


def test_compiled_blocks_are_those_of_the_checkpoint():
    """The blocks are compiled in place: names and values of the weights stay, and what a block returns."""
    torch.manual_seed(0)
    model = ToCo(ModelConfig(backbone="plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)",
                             pretrained=False, layer=2, proj_hidden=8, proj_bottleneck=6, proj_dim=5), 2)  # fmt: skip
    images, before = torch.rand(1, 3, 32, 40), dict(model.state_dict())
    wanted = model.encode(images)
    model.compile_blocks()
    assert all(block._compiled_call_impl is not None for block in model.encoder.blocks)
    assert list(model.state_dict()) == list(before)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(model.encode(images).patch_tokens, wanted.patch_tokens)


@pytest.mark.parametrize("dropped", [False, True])
def test_a_config_builds_its_model(dropped):
    """Four notebooks built the model "before" training from one section only, and it kept the border."""
    backbone = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
    config = override(tiny(), backbone=backbone, pretrained=False, layer=2, dropped_border=dropped, proj_hidden=8)
    built = build_model(config, 5)
    assert built.dropped_border is dropped and built.n_classes == 5 and built.layer == 2
    assert built.encode(torch.zeros(1, 3, 30, 47)).grid == ((3, 5) if dropped else (4, 6))
    assert not build_model(override(config, pretrained=True), 2, pretrained=False).config.pretrained
