import math

import pytest
import reference_model as slow
import torch
from small_config import stir
from torch.testing import assert_close

from toco_core.config import ModelConfig
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.predict.tokens import class_token_attention, class_token_attention_by_block

HEADS, WIDTH = 3, 12
BACKBONE = f"plain_vit(image=24, patch=8, width={WIDTH}, depth=4, heads={HEADS}, mlp=20)"
SIZES = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, **SIZES), 5).double()
    stir(model, 0.4)
    return model.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 16, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def slow_attention(block, x):
    """What token 0 of one image's tokens `x` (T D) gives to each of the others: a list of T - 1 numbers per head."""
    weights = {name: value.tolist() for name, value in block.attn.qkv.named_parameters()}
    x = slow.layer_norm(x, block.norm1.weight, block.norm1.bias).tolist()

    def part(token, which, head):
        first = which * WIDTH + head * WIDTH // HEADS
        rows = range(first, first + WIDTH // HEADS)
        return [sum(w * v for w, v in zip(weights["weight"][r], token, strict=True)) + weights["bias"][r] for r in rows]

    found = []
    for head in range(HEADS):
        query = part(x[0], 0, head)
        scores = [sum(a * b for a, b in zip(query, part(key, 1, head), strict=True)) for key in x]
        scores = [math.exp(score / math.sqrt(WIDTH / HEADS)) for score in scores]
        found.append([score / sum(scores) for score in scores[1:]])
    return found


@pytest.mark.parametrize("block", [1, 3, 4])
def test_equals_the_softmax_of_queries_and_keys(model, images, block):
    seen = []
    hook = model.encoder.blocks[block - 1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    found = class_token_attention(model, images, block)
    hook.remove()
    wanted = [slow_attention(model.encoder.blocks[block - 1], tokens.detach()) for tokens in seen[0]]
    assert found.shape == (2, HEADS, 10)
    assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert found.std() > 0.01


def test_by_block_is_each_block(model, images):
    for number, found in enumerate(class_token_attention_by_block(model, images), 1):
        assert_close(found, class_token_attention(model, images, number))
    assert number == 4


def test_only_what_is_needed_is_run(model, images):
    ran = []
    hooks = [b.register_forward_hook(lambda *_, n=n: ran.append(n)) for n, b in enumerate(model.encoder.blocks, 1)]
    maps = model.attention(images, blocks=[2, 1])
    for hook in hooks:
        hook.remove()
    assert ran == [1, 2] and len(maps) == 2
    for found, wanted in zip(maps, model.attention(images), strict=False):
        assert_close(found, wanted)


@pytest.mark.parametrize("block", [0, 5])
def test_a_block_that_is_not_there_is_named(model, images, block):
    with pytest.raises(ToCoError, match=rf"block = {block} is not allowed: .* has blocks 1\.\.4"):
        class_token_attention(model, images, block)


@pytest.mark.parametrize(
    ("backbone", "size"), [("deit_tiny_distilled_patch16_224", (32, 48)), ("vit_small_patch14_reg4_dinov2", (28, 42))]
)
def test_other_prefix_tokens_are_left_out(backbone, size):
    """Distillation and register tokens are no patches, of which there are six here."""
    model = ToCo(ModelConfig(backbone=backbone, pretrained=False, layer=2, **SIZES), 2).eval()
    images = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(2))
    found, whole = class_token_attention(model, images, 1), model.attention(images, blocks=[1])[0]
    assert found.shape[2] == 6 and (found.sum(-1) < 0.99).all()
    assert_close(found, whole[:, :, 0, -6:])
