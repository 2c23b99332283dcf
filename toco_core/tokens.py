"""What the encoder and the heads say about a batch of images."""

from collections.abc import Iterable
from typing import NamedTuple, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor, nn


class Tokens(NamedTuple):
    """What the encoder says about a batch. `h w` is the patch grid, N = h * w, row by row."""

    class_token: Float[Tensor, "B D"]
    """After the final norm."""
    patch_tokens: Float[Tensor, "B N D"]
    """After the final norm."""
    aux_patch_tokens: Float[Tensor, "B N D"]
    """Of block `layer`, through `ToCo.aux_norm`."""
    grid: tuple[int, int]
    """(h, w)."""
    attention: Float[Tensor, "B N N"] | None = None
    """Between patch tokens, mean over heads and the blocks that `encode` was asked for; no gradient."""

    def part(self, images: slice) -> "Tokens":
        """Those of some images of the batch."""
        attention = None if self.attention is None else self.attention[images]
        own = (self.class_token[images], self.patch_tokens[images], self.aux_patch_tokens[images])
        return Tokens(*own, self.grid, attention)

    @property
    def patch_map(self) -> Float[Tensor, "B D h w"]:
        return self.patch_tokens.transpose(1, 2).unflatten(2, self.grid)

    @property
    def aux_patch_map(self) -> Float[Tensor, "B D h w"]:
        return self.aux_patch_tokens.transpose(1, 2).unflatten(2, self.grid)


class Output(NamedTuple):
    """Heads applied to the tokens of a batch. C = K + 1, background first."""

    class_logits: Float[Tensor, "B K"]
    aux_class_logits: Float[Tensor, "B K"]
    seg_logits: Float[Tensor, "B C h w"] | None
    tokens: Tokens


class BlockTokens(NamedTuple):
    """The patch tokens after every block, to look at."""

    blocks: list[Float[Tensor, "B N D"]]
    """As each block leaves them."""
    normed: list[Float[Tensor, "B N D"]]
    """The same through the final norm, as the classifier would see them were the block the last one."""
    tokens: Tokens
    """What `encode` gives."""

    def images(self) -> "list[BlockTokens]":
        """Each image of the batch by itself."""
        return [
            BlockTokens([x[one] for x in self.blocks], [x[one] for x in self.normed], self.tokens.part(one))
            for one in (slice(b, b + 1) for b in range(len(self.tokens.class_token)))
        ]


@runtime_checkable
class Kept(Protocol):
    """What has the tokens of the first blocks at hand (see `train.kept_tokens`)."""

    blocks: int

    def serves(self, wanted: Iterable[int]) -> bool:
        """Whether all of these blocks lie behind the kept ones."""

    def tokens(self, model: nn.Module, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All tokens after the kept blocks, B T D, and the grid."""
