"""Class tokens: one token per class, and where it looks.

After "Multi-class Token Transformer for Weakly Supervised Semantic Segmentation" (MCTformer, CVPR 2022), whose class
tokens' attention to the patches is a second map beside CAM, and "MoRe: Class Patch Attention Needs Regularization"
(AAAI 2025), which draws class tokens to the patches that a label names.

There class tokens are part of the sequence, and every patch attends to them. Here they branch off the image's class
token after block `class_tokens_after`, x_0 its value there,

    t_k = x_0 + e_k,   e_k learned and small at first,   k = 1..K,

and go through the blocks above: they see each other and all tokens, and are not seen. So patch tokens and class token
are what they are without them, to the last bit: no pretrained attention is spread over K tokens more, and tokens of
frozen blocks stay kept. Gradients reach the blocks and the patches through what the class tokens see.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from toco_core.config import ModelConfig
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.losses import classification_loss
from toco_core.par import full_precision

SPREAD = 0.02  # of the offsets at first
TEMPERATURE = 0.5


class ClassTokens(nn.Module):
    """K tokens that go through an encoder's upper blocks beside its own, and the read-out that all of them share."""

    def __init__(self, n_classes: int, width: int):
        super().__init__()
        self.offset = nn.Parameter(SPREAD * torch.randn(n_classes, width))
        self.readout = nn.Linear(width, 1, bias=False)

    def forward(
        self, blocks: Iterable[Any], before: Sequence[Float[Tensor, "B T D"]], n_prefix: int
    ) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B K N"]]:
        """The class tokens after the last of the `blocks`, and their attention to the N patches, averaged over heads
        and blocks: rows sum to at most 1, no gradient.

        `before`: all tokens in front of each block, the first `n_prefix` of which are no patches, class token first.
        """
        tokens, looks = before[0][:, :1] + self.offset, []
        for block, others in zip(blocks, before, strict=True):
            tokens, chances = through_block(block, tokens, others)
            looks.append(full_precision(chances.detach()[..., len(self.offset) + n_prefix :]).mean(1))
        return tokens, torch.stack(looks).mean(0)

    def scores(self, class_tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K"]:
        """Class logits: every class's token, after the final norm, through the one read-out."""
        return self.readout(class_tokens).squeeze(-1)


def through_block(
    block: Any, tokens: Float[Tensor, "B K D"], others: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B heads K K+T"]]:
    """What a block makes of some tokens that see themselves and others, and where they look.

    The others are only seen: they ask nothing and go through no MLP, which is most of a block's work.
    """
    seen = block.norm1(torch.cat([tokens, others], dim=1))
    said, chances = ask(block.attn, seen[:, : tokens.shape[1]], seen)
    tokens = tokens + block.drop_path1(block.ls1(said))
    return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens)))), chances


def ask(
    attention: Any, asking: Float[Tensor, "B K D"], seen: Float[Tensor, "B T D"]
) -> tuple[Float[Tensor, "B K D"], Float[Tensor, "B heads K T"]]:
    """Attend by a timm module's weights, where not all of the tokens that are `seen` ask; with the probabilities."""
    weight, bias, width = attention.qkv.weight, attention.qkv.bias, attention.num_heads * attention.head_dim
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    of_heads = (attention.num_heads, attention.head_dim)
    queries = F.linear(asking, weight[:width], bias[:width]).unflatten(-1, of_heads).transpose(1, 2)
    keys, values = F.linear(seen, weight[width:], bias[width:]).unflatten(-1, (2, *of_heads)).permute(2, 0, 3, 1, 4)
    chances = attention.scale * attention.q_norm(queries) @ attention.k_norm(keys).transpose(-2, -1)
    chances = attention.attn_drop(chances.softmax(-1))
    said = attention.norm((chances @ values).transpose(1, 2).flatten(2))
    return attention.proj_drop(attention.proj(said)), chances


def build_class_tokens(encoder: Any, config: ModelConfig, n_classes: int) -> ClassTokens | None:
    """The class tokens of a config's network; None where it has none.

    Raises ToCoError where no block is left for them, for rotary positions, which give every token a place, and for
    blocks that are not a plain attention before a plain MLP.
    """
    after, depth = config.class_tokens_after, len(encoder.blocks)
    if not after:
        return None
    if after >= depth:
        raise ToCoError(
            f"class_tokens_after = {after} is not allowed: {config.backbone} has {depth} blocks, at most {depth - 1}"
        )
    wrong = "rotary positions" if getattr(encoder, "rope", None) is not None else ""
    if not wrong and not all(is_plain(block) for block in encoder.blocks[after:]):
        wrong = "blocks"
    if wrong:
        raise ToCoError(f"class_tokens_after = {after} is not allowed: 0 with the {wrong} of {config.backbone}")
    return ClassTokens(n_classes, encoder.embed_dim)


def is_plain(block: Any) -> bool:
    """Whether `through_block` computes what a block of timm's does."""
    kinds = (type(block).__name__, type(block.attn).__name__)
    return kinds == ("Block", "Attention") and getattr(block.attn, "gate", None) is None


def branch_of(model) -> int:
    """The block after which a network's class tokens branch off. Raises ToCoError where it has none."""
    if model.class_tokens is None:
        raise ToCoError("class tokens of a model with class_tokens_after = 0 are not to be had: above 0 is wanted")
    return model.config.class_tokens_after


def class_tokens(step) -> Float[Tensor, ""]:
    """Multi-label classification by the class tokens, each of which says whether its own class is there."""
    with torch.autocast(step.batch.images.device.type, enabled=False):
        head = step.model.class_tokens
        logits = head.scores(step.tokens.class_tokens.to(head.offset.dtype))
    return classification_loss(logits, step.batch.image_labels)


def class_contrast_loss(
    class_tokens: Float[Tensor, "B K D"],
    patch_tokens: Float[Tensor, "B N D"],
    token_label: Int[Tensor, "B N"],
    *,
    tau: float = TEMPERATURE,
    pairs: Int[Tensor, "1"] | None = None,
    parts: int = 1,
) -> Float[Tensor, ""]:
    """A class's token chooses, among an image's sure patches, those that are labelled with the class.

    With t_c and f_i the class and patch tokens of length 1, S the tokens of an image that are not labelled 255, S(c)
    those labelled c in 1..K, and P the pairs of an image and a class of which S(c) is not empty,

        L = 1/|P| sum over (b, c) in P of 1/|S(c)| sum over i in S(c) of - log softmax_j(t_c . f_j / tau)[i],  j in S.

    0 where P is empty. Where this is one of `parts` equal parts of a batch, `pairs` is |P| of the whole batch, and the
    mean of the parts' results is that of the whole batch.
    """
    cosines = F.normalize(class_tokens, dim=-1) @ F.normalize(patch_tokens, dim=-1).transpose(1, 2)
    unsure = token_label[:, None] == IGNORE
    chances = (cosines / tau).masked_fill(unsure, torch.finfo(cosines.dtype).min).log_softmax(-1)
    classes = torch.arange(1, class_tokens.shape[1] + 1, device=token_label.device)
    member = token_label[:, None] == classes[:, None]
    cost = -chances.where(member, 0).sum(-1) / member.sum(-1).clamp(min=1)
    (n,) = count_shown(token_label) if pairs is None else pairs
    return parts * cost.sum() / n.clamp(min=1)


def count_shown(label: Int[Tensor, "B *rest"]) -> Int[Tensor, "1"]:
    """Pairs of an image and a class, 1..K, that its label shows."""
    label = label.flatten(1)
    shown = label.new_zeros(len(label), IGNORE + 1).scatter_(1, label, 1)
    return shown[:, 1:IGNORE].sum()[None]


def class_contrast(step) -> Float[Tensor, ""]:
    """By the token label of patch token contrast."""
    tokens = step.tokens
    with torch.autocast(step.batch.images.device.type, enabled=False):
        return class_contrast_loss(
            tokens.class_tokens.float(),
            tokens.patch_tokens.float(),
            step.token_label.flatten(1).long(),
            pairs=step.count("class_contrast"),
            parts=step.parts,
        )
