"""Tokens of frozen blocks, computed once for every picture.

Where the first blocks of the encoder are not trained (`frozen_blocks`) and the images come again in the same variation
(`views_per_image`), what those blocks say about a picture is the same in every step, and in every run with the same
weights. It is kept by the picture's pixels: main images, their mirrored and scaled copies, the images that a warm start
and a validation see. A step then runs the trained blocks alone.

    kept = KeptTokens()
    for weight in (0.0, 0.5, 1.0, 2.0):
        train(override(tiny(), ptc=weight, views_per_image=2), kept=kept)  # the frozen blocks run in the first run only

The tokens of a picture are the bits that it has by itself, whatever batch it is first seen in: kept or computed again
they are the same, and a resumed run equals the uninterrupted one. Pictures go through the frozen blocks together, in
half the time, where that gives these bits: the first ones of each number and size go both ways, and decide. (For some
numbers, on some processors, rounding depends on how many go together.)
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.machine.memory import GIB
from toco_core.model import ToCo


class KeptTokens:
    """A store of tokens by their picture; `with kept.of(model, blocks=8)` a model's `encode` takes them from it.

    `gib`: how much is kept at most; pictures that come when it is full are computed each time. For a picture of N
    tokens of width D it is 4 N D bytes: 131 KB at 16 x 16 tokens of width 128.
    """

    def __init__(self, *, gib: float = 2.0):
        if not 0 <= gib < float("inf"):
            raise ToCoError(f"gib = {gib} is not allowed: a number of GiB from 0 on")
        self.limit = int(gib * GIB)
        self.blocks = 0
        self.computed = self.found = 0
        """How many pictures went through the frozen blocks, and how many did not need to."""
        self._tokens: dict[tuple, tuple[Tensor, tuple[int, int]]] = {}
        self._same_bits: dict[tuple, bool] = {}  # arithmetic, number and size of pictures -> together as alone
        self._held, self._weights = 0, b""

    def __len__(self) -> int:
        return len(self._tokens)

    @property
    def bytes(self) -> int:
        """What is kept."""
        return self._held

    @contextlib.contextmanager
    def of(self, model: ToCo, *, blocks: int) -> Iterator["KeptTokens"]:
        """Within this context `model.encode` begins behind its first `blocks` blocks; 0: nothing changes.

        What was kept of other weights, or behind another block, is given up. Raises ToCoError where these blocks are
        trained, or draw at random.
        """
        if not blocks:
            yield self
            return
        _refuse_changing(model, blocks)
        weights = _digest(model, blocks)
        if (weights, blocks) != (self._weights, self.blocks):
            self._tokens.clear()
            self._same_bits.clear()
            self._held, self._weights, self.blocks = 0, weights, blocks
        before, model.kept = model.kept, self
        try:
            yield self
        finally:
            model.kept = before

    def serves(self, layer: int, attended: Iterable[int]) -> bool:
        """Whether the tokens after block `layer` and the attention inside the others lie behind the kept ones."""
        return layer >= self.blocks and all(block > self.blocks for block in attended)

    @torch.no_grad()
    def tokens(self, model: ToCo, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B T D"], tuple[int, int]]:
        """All tokens after the kept blocks, prefix tokens first, and the grid."""
        arithmetic = (*_arithmetic(images.device), tuple(images.shape[1:]))
        keys = [(*arithmetic, _pixels(image)) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._tokens}
        found = {key: self._tokens[key] for key in keys if key not in new}
        self.found += len(keys) - len(new)
        self.computed += len(new)
        if new:
            tokens, grid = self._computed(model, torch.stack([*new.values()]), arithmetic)
            for key, x in zip(new, tokens.split(1), strict=True):
                found[key] = (x.clone(), grid)  # of its own, or one that is kept would keep all of them
                size = x.numel() * x.element_size()
                if self._held + size <= self.limit:
                    self._tokens[key] = found[key]
                    self._held += size
        return torch.cat([found[key][0] for key in keys]), found[keys[0]][1]

    def _computed(self, model: ToCo, images: Tensor, arithmetic: tuple) -> tuple[Tensor, tuple[int, int]]:
        """The tokens that each picture has by itself, and the grid."""
        shape = (*arithmetic, len(images))
        if self._same_bits.get(shape, len(images) == 1):
            return self._behind(model, images)
        alone = [self._behind(model, image[None]) for image in images]
        tokens, grid = torch.cat([x for x, _ in alone]), alone[0][1]
        if shape not in self._same_bits:
            self._same_bits[shape] = torch.equal(tokens, self._behind(model, images)[0])
        return tokens, grid

    def _behind(self, model: ToCo, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """All tokens after the frozen blocks, and the grid."""
        for number, x, grid in model._run_blocks(model._embedded(images)):
            if number == self.blocks:
                break
        return x, grid


def kept_blocks(config: TrainConfig) -> int:
    """Behind how many blocks a config keeps tokens: the frozen ones up to that of the auxiliary classifier and that
    after which class tokens branch off, and before the first whose attention is asked for; 0 where images are varied
    anew in every pass."""
    model, before = config.model, [block - 1 for block in config.attended()]
    before += [model.class_tokens_after] if model.class_tokens_after else []
    return min(config.schedule.frozen_blocks, model.layer, *before) if config.data.views_per_image else 0


def _pixels(image: Tensor) -> bytes:
    return hashlib.sha1(image.contiguous().cpu().numpy(), usedforsecurity=False).digest()


def _arithmetic(device: torch.device) -> tuple:
    """What the numbers of a pass depend on besides weights and picture."""
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else None
    return device, dtype, torch.get_float32_matmul_precision()


def _frozen_parts(model: ToCo, blocks: int) -> list[torch.nn.Module]:
    return [model.encoder.patch_embed, model.encoder.norm_pre, *model.encoder.blocks[:blocks]]


def _frozen_tensors(model: ToCo, blocks: int) -> Iterator[tuple[str, Tensor]]:
    for number, part in enumerate(_frozen_parts(model, blocks)):
        for name, tensor in part.state_dict(keep_vars=True).items():
            yield f"{number}.{name}", tensor
    for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
        if isinstance(getattr(model.encoder, name, None), Tensor):
            yield name, getattr(model.encoder, name)


def _digest(model: ToCo, blocks: int) -> bytes:
    digest = hashlib.sha256(repr((model.config.pos_embed_antialias, model.dropped_border)).encode())
    for name, tensor in _frozen_tensors(model, blocks):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy())
    return digest.digest()


def _refuse_changing(model: ToCo, blocks: int) -> None:
    for name, tensor in _frozen_tensors(model, blocks):
        if tensor.requires_grad:
            raise ToCoError(
                f"tokens of the first {blocks} blocks cannot be kept: {name} is trained (see freeze_blocks)"
            )
    for part in _frozen_parts(model, blocks):
        for module in part.modules():
            chance = getattr(module, "drop_prob", None) or (module.p if isinstance(module, torch.nn.Dropout) else 0)
            if chance:
                raise ToCoError(
                    f"tokens of the first {blocks} blocks cannot be kept: {type(module).__name__} draws at random"
                )
