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

    def forward(self, blocks: Iterable[nn.Module], before: Sequence[Float[Tensor, "B T D"]]) -> Float[Tensor, "B K D"]:
        """The class tokens after the last of the `blocks`; `before`: all tokens in front of each, class token first.

        Every block sees the class tokens and its own tokens together; of what it says the class tokens' part is taken.
        """
        tokens = before[0][:, :1] + self.offset
        for block, x in zip(blocks, before, strict=True):
            tokens = block(torch.cat([tokens, x], dim=1))[:, : len(self.offset)]
        return tokens

    def scores(self, class_tokens: Float[Tensor, "B K D"]) -> Float[Tensor, "B K"]:
        """Class logits: every class's token, after the final norm, through the one read-out."""
        return self.readout(class_tokens).squeeze(-1)


def build_class_tokens(encoder: Any, config: ModelConfig, n_classes: int) -> ClassTokens | None:
    """The class tokens of a config's network; None where it has none.

    Raises ToCoError where no block is left for them, and for rotary positions, which give every token a place.
    """
    after, depth = config.class_tokens_after, len(encoder.blocks)
    if not after:
        return None
    if after >= depth:
        raise ToCoError(
            f"class_tokens_after = {after} is not allowed: {config.backbone} has {depth} blocks, at most {depth - 1}"
        )
    if getattr(encoder, "rope", None) is not None:
        raise ToCoError(
            f"class_tokens_after = {after} is not allowed: 0 with the rotary positions of {config.backbone}"
        )
    return ClassTokens(n_classes, encoder.embed_dim)


def branch_of(model) -> int:
    """The block after which a network's class tokens branch off. Raises ToCoError where it has none."""
    if model.class_tokens is None:
        raise ToCoError("class tokens of a model with class_tokens_after = 0 are not to be had: above 0 is wanted")
    return model.config.class_tokens_after


def class_to_patch(
    maps: Sequence[Float[Tensor, "B heads T T"]], n_classes: int, n_prefix: int
) -> Float[Tensor, "B K N"]:
    """Average the attention of the class tokens to the patches over heads and blocks; no gradient.

    Of the T tokens the first `n_classes` are the class tokens, then come `n_prefix` that are no patches. Rows sum to at
    most 1.
    """
    rows = [full_precision(attention.detach()[:, :, :n_classes, n_classes + n_prefix :]).mean(1) for attention in maps]
    return torch.stack(rows).mean(0)


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
