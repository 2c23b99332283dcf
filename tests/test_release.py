"""Checkpoints of the release, with a small one made here in its key layout (see test_reference_network.py for a real
one)."""

import dataclasses
import types

import pytest
import torch
from torch.testing import assert_close

from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.runs.release import from_release, save_release, to_release

WIDTH, DEPTH, PATCH, SIDE, K = 12, 3, 4, 5, 6
HIDDEN, BOTTLENECK, P, DECODER, MLP = 10, 7, 9, 8, 20


def layout():
    """Key -> shape as the release writes them, without `module.`."""
    shapes = {
        "encoder.cls_token": (1, 1, WIDTH),
        "encoder.pos_embed": (1, SIDE**2 + 1, WIDTH),
        "encoder.patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        "encoder.patch_embed.proj.bias": (WIDTH,),
        "encoder.norm.weight": (WIDTH,),
        "encoder.norm.bias": (WIDTH,),
        "decoder.conv6.weight": (DECODER, WIDTH, 3, 3),
        "decoder.conv7.weight": (DECODER, DECODER, 3, 3),
        "decoder.conv8.weight": (K + 1, DECODER, 1, 1),
        "classifier.weight": (K, WIDTH, 1, 1),
        "aux_classifier.weight": (K, WIDTH, 1, 1),
    }
    for i in range(DEPTH):
        linear = {
            "attn.qkv": (3 * WIDTH, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "mlp.fc1": (MLP, WIDTH),
            "mlp.fc2": (WIDTH, MLP),
        }
        for name, shape in linear.items():
            shapes[f"encoder.blocks.{i}.{name}.weight"] = shape
            shapes[f"encoder.blocks.{i}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"encoder.blocks.{i}.{name}"] = (WIDTH,)
    for head in ("proj_head", "proj_head_t"):
        for i, shape in ((0, (HIDDEN, WIDTH)), (2, (HIDDEN, HIDDEN)), (4, (BOTTLENECK, HIDDEN))):
            shapes[f"{head}.mlp.{i}.weight"] = shape
            shapes[f"{head}.mlp.{i}.bias"] = shape[:1]
        shapes[f"{head}.last_layer.weight_g"] = (P, 1)
        shapes[f"{head}.last_layer.weight_v"] = (P, BOTTLENECK)
    return shapes


def checkpoint(prefix="module."):
    generator = torch.Generator().manual_seed(0)
    return {prefix + key: torch.randn(shape, generator=generator) for key, shape in layout().items()}


def saved(tmp_path, content):
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    return path


@pytest.mark.parametrize("prefix", ["module.", ""])
def test_everything_is_inferred_and_the_round_trip_is_exact(tmp_path, prefix):
    state = checkpoint(prefix)
    model = from_release(saved(tmp_path, state), heads=3, layer=2)
    config = model.config
    assert (model.n_classes, model.width, model.depth, model.patch_size, model.layer) == (
        K,
        WIDTH,
        DEPTH,
        (PATCH, PATCH),
        2,
    )
    assert (config.proj_hidden, config.proj_bottleneck, config.proj_dim, config.decoder_width) == (
        HIDDEN,
        BOTTLENECK,
        P,
        DECODER,
    )
    assert model.encoder.blocks[0].attn.num_heads == 3
    assert model.encoder.patch_embed.grid_size == (SIDE, SIDE)
    assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]))
    assert torch.equal(model.proj_head_ema.last_layer.weight_v, state[f"{prefix}proj_head_t.last_layer.weight_v"])

    again = to_release(model, module_prefix=bool(prefix))
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())
    save_release(model, tmp_path / "out.pth")
    assert torch.equal(
        from_release(tmp_path / "out.pth", heads=3, layer=2).aux_classifier.weight, model.aux_classifier.weight
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("pooling", "mean"),
        ("pooling", "topk"),
        ("pooling", "cam_topk"),
        ("aux_pooling", "mean"),
        ("aux_norm", True),
        ("class_tokens_after", 1),
    ],
)
def test_what_the_release_does_not_know_is_not_written_in_its_layout(tmp_path, name, value):
    model = from_release(saved(tmp_path, checkpoint()), heads=2, layer=3)
    assert model.config.pooling == "max"
    other = ToCo(dataclasses.replace(model.config, **{name: value}), K)
    with pytest.raises(ToCoError, match=f"{name} = {value!r} cannot be written in the release's layout"):
        save_release(other, tmp_path / "other.pth")
    assert not (tmp_path / "other.pth").exists()


def test_a_model_of_our_own_can_be_taken_to_the_release(tmp_path):
    model = from_release(saved(tmp_path, checkpoint()), heads=2, layer=3)
    fresh = ToCo(model.config, K)
    assert set(to_release(fresh)) == set(checkpoint())
    save_release(fresh, tmp_path / "fresh.pth")
    again = from_release(tmp_path / "fresh.pth", heads=2, layer=3, dropped_border=False)
    x = torch.randn(2, 3, 13, 22)
    assert torch.equal(again(x).seg_logits, fresh(x).seg_logits)


def test_the_classifier_of_the_pretraining_is_carried_along(tmp_path):
    state = checkpoint() | {
        "module.encoder.head.weight": torch.randn(1000, WIDTH),
        "module.encoder.head.bias": torch.randn(1000),
    }
    again = to_release(from_release(saved(tmp_path, state), layer=1))
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["vit", "deit"])
def test_base_backbones_have_twelve_heads(tmp_path, name):
    """heads = width / 64, here on one block of the width of ViT-B and DeiT-B."""
    state = {}
    for key, value in checkpoint().items():
        if ".blocks." in key and ".blocks.0." not in key:
            continue
        state[key] = torch.zeros([{WIDTH: 768, 3 * WIDTH: 2304}.get(n, n) for n in value.shape])
    assert from_release(saved(tmp_path, state), layer=1).encoder.blocks[0].attn.num_heads == 12


def test_wrong_checkpoints_are_reported_in_words(tmp_path):
    def refuse(state, message, **options):
        with pytest.raises(ToCoError, match=message) as error:
            from_release(saved(tmp_path, state), **({"layer": 1} | options))
        assert "\n" not in str(error.value)

    state = checkpoint()
    bias = "module.encoder.blocks.1.norm2.bias"
    refuse({k: v for k, v in state.items() if k != bias}, r"1 missing tensor \(encoder.blocks.1.norm2.bias\)")
    refuse(state | {"module.extra.weight": torch.ones(2)}, r"1 unexpected tensor \(extra.weight\)")
    refuse({k: v for k, v in state.items() if "classifier" not in k}, r"1 missing tensor \(classifier.weight\)")
    wrong = {"module.decoder.conv8.weight": torch.ones(K + 2, DECODER, 1, 1)}
    refuse(state | wrong, r"1 tensor of another shape \(decoder.conv8.weight is 8 x 8 x 1 x 1 and not 7 x 8 x 1 x 1\)")
    refuse(state | {"module.classifier.weight": torch.ones(K, WIDTH)}, "classifier.weight has 2 axes and not 4")
    refuse(
        state | {"module.encoder.pos_embed": torch.ones(1, 24, WIDTH)},
        "its 24 position embeddings are not one and a square grid",
    )
    refuse(state, "heads = 5 does not divide the width 12", heads=5)
    refuse(state, "layer = 4 is not allowed", layer=4)
    refuse({"weights": types.SimpleNamespace(a=1)}, "holds more than tensors")
    refuse(
        {"a": torch.ones(1)}, r"not a checkpoint of the release: 1 missing tensor \(encoder.patch_embed.proj.weight\)"
    )
    with pytest.raises(ToCoError, match="path = 'none.pth' is not a file"):
        from_release("none.pth")
