"""Where the class token looks: its attention to the patches, per head and block.

Class token contrast makes the class token of an image and those of its crops alike, and the class token is made of what
it attends to; so the effect of the contrast can be looked for here.
"""

from jaxtyping import Float
from torch import Tensor

from .model import ToCo


def class_token_attention(model: ToCo, images: Float[Tensor, "B 3 H W"], block: int) -> Float[Tensor, "B heads N"]:
    """Attention probabilities of the class token to the patches in one block (from 1), per head; images are normalised.

    In [0, 1]. They sum to less than 1, since the class token attends to itself and to other prefix tokens, too; N times
    a value tells how many times the attention is that of an even spread. No gradient. Raises ToCoError for a block
    that is not there.
    """
    (attention,) = model.attention(images, blocks=[block])
    return attention[:, :, 0, model.encoder.num_prefix_tokens :]


def class_token_attention_by_block(model: ToCo, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B heads N"]]:
    """`class_token_attention` of every block, from one pass."""
    n_prefix = model.encoder.num_prefix_tokens
    return [attention[:, :, 0, n_prefix:] for attention in model.attention(images)]
