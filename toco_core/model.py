"""The network: one plain vision transformer, two classifiers, a projection head with its moving average, and a decoder.

Paper, figure 3: an image gives patch tokens and one class token. The class logits are a linear function of the maximum
over the patch tokens (or of another `pooled`), and the same weights applied at every token give CAM (see `cam.py`). The
patch tokens of an earlier block, `layer`, feed an auxiliary classifier of the same form. The class token feeds the
projection head that class token contrast compares.

The encoder runs once per batch (`encode`); heads are applied to its tokens (`heads`, `project`), so nothing is computed
twice.
"""

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toco_core.backbone import build_encoder, embed_patches, resize_positions, rotary_positions

from .config import ModelConfig, TrainConfig
from .errors import ToCoError
from .heads import AffinityHead, BlockTokens, Kept, LargeFOV, Output, ProjectionHead, Tokens, class_scores
from .machine.files import refuse_wrong_keys
from .machine.graphs import BlockGraphs
from .machine.meta_device import without_numbers
from .methods.class_tokens import branch_of, build_class_tokens
from .refiners.attention import attention_maps, mean_attention, plain_attention


class ToCo(nn.Module):
    """The network of Token Contrast.

    `n_classes` is K, the number of foreground classes. `dropped_border`: ignore what remains at the right and at the
    bottom of an image whose size is not a multiple of the patch, as the release does. By default such an image is
    resized to the nearest multiple instead, because the ignored border is never seen and the maps, stretched back over
    the whole image, are shifted by up to a patch.

    `affinity_blocks`: those whose attention an affinity head reads; by default there is no such head.

    `mean` and `std` are the normalisation that the encoder expects, for images in [0, 1] (see `normalise`).

    Errors: `ToCoError` for an unknown or unsuitable backbone, a block that it lacks, or weights that cannot be had or
    do not fit.
    """

    encoder: Any  # one of timm's plain vision transformers
    mean: Tensor
    std: Tensor

    def __init__(
        self, config: ModelConfig, n_classes: int, *, dropped_border: bool = False, affinity_blocks: Sequence[int] = ()
    ):
        super().__init__()
        if n_classes < 1:
            raise ToCoError(f"n_classes = {n_classes} is not allowed: at least 1 foreground class")
        self.config = config
        self.n_classes = n_classes
        self.dropped_border = dropped_border
        self.release_extras: dict[str, Tensor] = {}  # see release.py

        self.encoder = build_encoder(config)
        self.depth = len(self.encoder.blocks)
        if config.layer > self.depth:
            raise ToCoError(f"layer = {config.layer} is not allowed: {config.backbone} has blocks 1..{self.depth}")
        self.layer = config.layer
        self.patch_size: tuple[int, int] = tuple(self.encoder.patch_embed.patch_size)
        self.width: int = self.encoder.embed_dim
        if self.encoder.pos_embed is not None and config.freeze_pos_embed:
            self.encoder.pos_embed.requires_grad_(False)
        self._positions: dict = {}
        self.kept: Kept | None = None
        self.graphs: BlockGraphs | None = None

        self.classifier = nn.Linear(self.width, n_classes, bias=False)
        self.aux_classifier = nn.Linear(self.width, n_classes, bias=False)
        self.proj_head = ProjectionHead(self.width, config.proj_hidden, config.proj_bottleneck, config.proj_dim)
        self.proj_head_ema = ProjectionHead(self.width, config.proj_hidden, config.proj_bottleneck, config.proj_dim)
        self.proj_head_ema.load_state_dict(self.proj_head.state_dict())
        self.proj_head_ema.requires_grad_(False)
        self.decoder = LargeFOV(self.width, config.decoder_width, n_classes + 1, dilation=config.decoder_dilation)
        self.class_tokens: Any = build_class_tokens(self.encoder, config, n_classes)
        self._refuse_missing(affinity_blocks)
        heads = self.encoder.blocks[-1].attn.num_heads
        self.affinity = AffinityHead(affinity_blocks, heads) if affinity_blocks else None

        default = self.encoder.pretrained_cfg
        for name in ("mean", "std"):
            values = getattr(config, name) or default[name]
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(3, 1, 1), persistent=False)

    # ---- images

    def normalise(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """[0, 1] -> what the encoder expects."""
        return (images - self.mean) / self.std

    def denormalise(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 H W"]:
        """The inverse of `normalise`, not rounded."""
        return images * self.std + self.mean

    def fitted_size(self, height: int, width: int) -> tuple[int, int]:
        """The size at which the encoder sees an image of this size: whole patches, at least one."""
        ph, pw = self.patch_size
        if self.dropped_border:
            if height < ph or width < pw:
                raise ToCoError(f"image size {height} x {width} is smaller than a patch, {ph} x {pw}")
            return height // ph * ph, width // pw * pw
        return max(1, int(height / ph + 0.5)) * ph, max(1, int(width / pw + 0.5)) * pw

    def _fitted(self, images: Tensor) -> Tensor:
        height, width = images.shape[-2:]
        if height % self.patch_size[0] == 0 and width % self.patch_size[1] == 0:
            return images
        size = self.fitted_size(height, width)
        if self.dropped_border:
            return images[..., : size[0], : size[1]]
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False)

    # ---- encoder

    def encode(
        self, images: Float[Tensor, "B 3 H W"], *, attend: Sequence[int] = (), keep: bool = True, classes: bool = False
    ) -> Tokens:
        """One pass through the encoder. Images are normalised (see `normalise`) and of any size.

        `attend`: blocks (from 1) whose mean attention the tokens shall carry; their attention is then computed by
        matrix products. Raises ToCoError for a block that is not there.
        `keep`: False for pictures that nobody will ask for again, whose tokens need not be `kept`.
        `classes`: with class tokens and their attention. Raises ToCoError for a model without them.
        """
        first = min(self.layer, branch_of(self)) if classes else self.layer
        serves = keep and self.kept is not None and self.kept.serves(first, attend)
        kept = self.kept if serves else None
        before: list[Tensor] = []
        begun = self._embedded(images, kept)  # kept tokens are the same whatever attention is asked for behind them
        with self._attention_of(attend) as maps:
            x, grid, done = begun
            if self.graphs is not None and self.training and not attend and not classes and self.layer > done:
                aux, x = self.graphs(x, done, self.layer - 1)
            else:
                for number, x, grid in self._run_blocks(begun):
                    if number == self.layer:
                        aux = x
                    if classes and branch_of(self) <= number < self.depth:
                        before.append(x)
        return self._tokens(self.final_norm(x), aux, grid, attend, maps, before)

    def _tokens(
        self, last: Tensor, aux: Tensor, grid: tuple[int, int], attend: Sequence[int], maps: list, before: list[Tensor]
    ) -> Tokens:
        """From all tokens after the final norm and after block `layer`, the attention of the blocks `attend` and, where
        class tokens are wanted, all tokens in front of every block that they go through."""
        n_prefix, head = self.encoder.num_prefix_tokens, self.affinity
        tokens = Tokens(last[:, 0], last[:, n_prefix:], self.aux_norm(aux[:, n_prefix:]), grid)
        if maps:
            affinity = head(maps, n_prefix) if head is not None and {*attend} == {*head.blocks} else None
            tokens = tokens._replace(attention=mean_attention(maps, n_prefix), affinity=affinity)
        if not before:
            return tokens
        found, looks = self.class_tokens(self.encoder.blocks[branch_of(self) :], before, n_prefix)
        return tokens._replace(class_tokens=self.final_norm(found), class_attention=looks)

    def _run_blocks(self, begun: tuple[Tensor, tuple[int, int], int]):
        """Yield (block number from 1, all tokens after it, grid), block by block, from what `_embedded` gives; behind
        kept tokens from the last of the kept blocks on."""
        encoder = self.encoder
        x, grid, done = begun
        if done:
            yield done, x, grid
        rope = getattr(encoder, "rope", None)
        rope = None if rope is None else rotary_positions(rope, grid)
        for number, block in enumerate(encoder.blocks[done:], done + 1):
            if rope is None:
                x = block(x)
            else:
                x = block(x, rope=rope[number - 1] if encoder.rope_mixed else rope)
            yield number, x, grid

    def _embedded(self, images: Tensor, kept: Kept | None = None) -> tuple[Tensor, tuple[int, int], int]:
        """All tokens before the first block, or after the kept ones; the grid; how many blocks are done."""
        if kept is not None:
            return *kept.tokens(self, images), kept.blocks
        encoder = self.encoder
        x = embed_patches(encoder.patch_embed, self._fitted(images))
        grid = (x.shape[1], x.shape[2])
        return encoder.norm_pre(encoder.pos_drop(self._with_positions(x.flatten(1, 2), grid))), grid, 0

    def _with_positions(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prepend the prefix tokens (class, distillation, register) and add position embeddings."""
        encoder = self.encoder
        prefix = [getattr(encoder, name, None) for name in ("cls_token", "dist_token", "reg_token")]
        prefix = [token.expand(patches.shape[0], -1, -1) for token in prefix if token is not None]
        if encoder.pos_embed is None:
            return torch.cat([*prefix, patches], dim=1)
        positions = self._resized_positions(grid)
        if encoder.no_embed_class:
            return torch.cat([*prefix, patches + positions], dim=1)
        return torch.cat([*prefix, patches], dim=1) + positions

    def _resized_positions(self, grid: tuple[int, int]) -> Tensor:
        """Position embeddings of a grid; kept per size while they are frozen and unchanged, but not in a graph that is
        traced for every size."""
        pos_embed = self.encoder.pos_embed
        n_prefix = 0 if self.encoder.no_embed_class else self.encoder.num_prefix_tokens
        old = tuple(self.encoder.patch_embed.grid_size)
        if pos_embed.requires_grad or torch.compiler.is_compiling():
            return resize_positions(pos_embed, old, grid, n_prefix, antialias=self.config.pos_embed_antialias)
        state = (pos_embed.data_ptr(), pos_embed._version, pos_embed.device, pos_embed.dtype)
        if self._positions.get("state") != state:
            self._positions = {"state": state}
        if grid not in self._positions:
            resized = resize_positions(
                pos_embed.detach(), old, grid, n_prefix, antialias=self.config.pos_embed_antialias
            )
            self._positions[grid] = resized
        return self._positions[grid]

    def final_norm(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """The norm between the last block and the heads, token by token. (Backbones that pool by the mean keep it
        behind the pooling; it is the same norm.)"""
        norm = self.encoder.norm
        return self.encoder.fc_norm(x) if isinstance(norm, nn.Identity) else norm(x)

    def aux_norm(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """What the auxiliary classifier sees of block `layer`'s tokens: they themselves, or without mean and variance
        where `config.aux_norm`."""
        return F.layer_norm(x, x.shape[-1:], eps=1e-6) if self.config.aux_norm else x

    # ---- heads

    def heads(self, tokens: Tokens, *, segmentation: bool = True) -> Output:
        """Class logits (`class_scores` of the patch tokens) and, unless left out, segmentation logits."""
        pooling, aux_pooling = self.config.poolings
        return Output(
            class_logits=class_scores(tokens.patch_tokens, self.classifier, pooling),
            aux_class_logits=class_scores(tokens.aux_patch_tokens, self.aux_classifier, aux_pooling),
            # contiguous: channel by channel the maps are resized twice as fast as pixel by pixel
            seg_logits=self.decoder(tokens.patch_map).contiguous() if segmentation else None,
            tokens=tokens,
        )

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Output:
        """`heads(encode(images))`."""
        return self.heads(self.encode(images))

    def project(self, class_token: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        """The student's head of class token contrast."""
        return self.proj_head(class_token)

    @torch.no_grad()
    def project_ema(self, class_token: Float[Tensor, "*B D"]) -> Float[Tensor, "*B P"]:
        """The teacher's head. The teacher shares the encoder; only the head is averaged. No gradient."""
        return self.proj_head_ema(class_token)

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """Teacher's head <- momentum * teacher's head + (1 - momentum) * student's head."""
        teacher: list[Tensor] = list(self.proj_head_ema.parameters())
        student: list[Tensor] = list(self.proj_head.parameters())
        torch._foreach_mul_(teacher, momentum)
        torch._foreach_add_(teacher, student, alpha=1 - momentum)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context the network is in evaluation mode."""
        was_training = self.training
        self.eval()
        try:
            yield
        finally:
            self.train(was_training)

    def compile_blocks(self) -> None:
        """Let torch.compile make the encoder's blocks, at their first call with each size of batch and view."""
        for block in self.encoder.blocks:
            block.compile(dynamic=False)

    @contextlib.contextmanager
    def recorded_blocks(self) -> Iterator[None]:
        """Within this context a GPU replays the encoder's blocks, in training mode, as graphs (see `machine.graphs`).
        Networks on other devices, and encoders with rotary positions, go on as they do."""
        if self.mean.is_cuda and getattr(self.encoder, "rope", None) is None:
            self.graphs = BlockGraphs(self.encoder.blocks)
        try:
            yield
        finally:
            self.graphs = None

    def freeze_blocks(self, n: int) -> None:
        """Leave the patch embedding, the prefix tokens and the first `n` blocks untrained; 0: nothing is frozen.

        Raises ToCoError where the encoder has no block left to train.
        """
        if n >= self.depth:
            raise ToCoError(f"frozen_blocks = {n} is not allowed: {self.config.backbone} has {self.depth} blocks")
        if not n:
            return
        for part in (self.encoder.patch_embed, self.encoder.norm_pre, *self.encoder.blocks[:n]):
            part.requires_grad_(False)
        for name in ("cls_token", "dist_token", "reg_token", "pos_embed"):
            if isinstance(getattr(self.encoder, name, None), nn.Parameter):
                getattr(self.encoder, name).requires_grad_(False)

    # ---- looking inside

    def block_tokens(self, images: Float[Tensor, "B 3 H W"]) -> list[Float[Tensor, "B N D"]]:
        """Patch tokens after each block, without norm: `block_tokens(images)[layer - 1]`, through `aux_norm`, feeds the
        auxiliary classifier."""
        n_prefix = self.encoder.num_prefix_tokens
        return [x[:, n_prefix:] for _, x, _ in self._run_blocks(self._embedded(images))]

    @torch.no_grad()
    def inside(
        self, images: Float[Tensor, "B 3 H W"], *, attend: Sequence[int] = (), classes: bool = False
    ) -> "BlockTokens":
        """Everything that one pass can tell: `block_tokens`, the same through the final norm, and `encode` with the
        same `attend` and `classes`."""
        n_prefix = self.encoder.num_prefix_tokens
        blocks, normed = [], []
        with self._attention_of(attend) as maps:
            for _, x, grid in self._run_blocks(self._embedded(images)):
                blocks.append(x)
                normed.append(self.final_norm(x))
        before = blocks[branch_of(self) - 1 : -1] if classes else []
        tokens = self._tokens(normed[-1], blocks[self.layer - 1], grid, attend, maps, before)
        return BlockTokens([x[:, n_prefix:] for x in blocks], [x[:, n_prefix:] for x in normed], tokens)

    @torch.no_grad()
    def attention(
        self, images: Float[Tensor, "B 3 H W"], *, blocks: Sequence[int] | None = None
    ) -> list[Float[Tensor, "B heads T T"]]:
        """Attention probabilities, rows sum to 1, of the given `blocks` (from 1; None: of all), in the encoder's order.
        The first `encoder.num_prefix_tokens` of the T tokens are not patches.

        The fused attention, which never forms these matrices, is switched off for this call only. Blocks behind the
        last wanted one are not run. Raises ToCoError for a block that is not there.
        """
        wanted = range(1, self.depth + 1) if blocks is None else blocks
        with self._attention_of(wanted) as maps:
            for number, _, _ in self._run_blocks(self._embedded(images)):
                if number >= max(wanted, default=0):
                    break
        return maps

    def _attention_of(self, blocks: Sequence[int]) -> contextlib.AbstractContextManager[list[Tensor]]:
        """Yield a list to which every pass within this context appends the attention probabilities of `blocks`."""
        self._refuse_missing(blocks)
        return attention_maps([block.attn for block in self.encoder.blocks], blocks)

    def _refuse_missing(self, blocks: Iterable[int]) -> None:
        for number in sorted(set(blocks) - set(range(1, self.depth + 1))):
            raise ToCoError(f"block = {number} is not allowed: {self.config.backbone} has blocks 1..{self.depth}")

    def plain_attention(self, *, fused_without_gradient: bool = False) -> contextlib.AbstractContextManager[None]:
        """Within this context attention is computed by matrix products and a softmax, not by the fused kernel.

        Then every token equals the release's bit for bit (on the same processor); also some processors are faster so in
        bf16. `fused_without_gradient`: only passes that keep a graph are computed so. The innermost context counts.
        """
        attentions = [block.attn for block in self.encoder.blocks]
        return plain_attention(attentions, fused_without_gradient=fused_without_gradient)


def build_model(config: TrainConfig, n_classes: int, *, pretrained: bool | None = None) -> ToCo:
    """Build the network of a config, as training begins with it. `pretrained`: None as configured; False for one whose
    weights are loaded next.

    The one way from a `TrainConfig` to a model: the sections `model` and `release` both shape it, and it has an
    affinity head where the loss `affinity` counts.
    """
    model = config.model if pretrained is None else dataclasses.replace(config.model, pretrained=pretrained)
    border, blocks = config.release.dropped_border, config.affinity_blocks()
    return ToCo(model, n_classes, dropped_border=border, affinity_blocks=blocks)


def skeleton(config: ModelConfig, n_classes: int, *, affinity_blocks: Sequence[int] = ()) -> ToCo:
    """A network without its numbers, which takes no memory: what a file's tensors are compared with before a model is
    built for them."""
    with without_numbers():
        return ToCo(dataclasses.replace(config, pretrained=False), n_classes, affinity_blocks=affinity_blocks)


def loaded_model(what: str, found: Mapping[str, Tensor], config: TrainConfig, n_classes: int) -> ToCo:
    """Build the network of a config with the tensors of a file, `what` in messages. Raises ToCoError, before memory is
    taken, where they are not the config's."""
    wanted = skeleton(config.model, n_classes, affinity_blocks=config.affinity_blocks())
    refuse_wrong_keys(what, found, wanted.state_dict())
    model = build_model(config, n_classes, pretrained=False)
    model.load_state_dict(found)
    return model
