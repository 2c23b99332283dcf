"""The encoder: a plain vision transformer of timm, one that is shipped, or one spelled out; one way to build it."""

import pathlib
import re
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from toco_core.config import ModelConfig, did_you_mean
from toco_core.errors import ToCoError
from toco_core.machine.files import read_tensors, refuse_wrong_keys
from toco_core.machine.hub import hub_reason, quick_hub
from toco_core.machine.torchvision_shim import make_importable

WEIGHTS_FOLDER = pathlib.Path(__file__).parent / "weights"
MOST = {"image": 8192, "patch": 1024, "width": 16384, "depth": 64, "heads": 1024, "mlp": 131072}  # of a plain_vit
FAMILIES = ("timm.models.vision_transformer", "timm.models.deit", "timm.models.eva")


def rotary_positions(rope: Any, grid: tuple[int, int]) -> Tensor:
    """Sine and cosine of the rotary positions of a grid, as timm makes them.

    For DINOv3 timm makes Python numbers of the grid's sides, which torch.export would take for constants: in a graph
    that is traced for every size the same coordinates, from -1 to 1 at the tokens' centres, are made of tensors.
    """
    if not torch.compiler.is_compiling() or getattr(rope, "normalize_coords", None) != "separate":
        return rope.get_embed(shape=grid)
    axes = [(torch.arange(n, device=rope.periods.device) + 0.5 + rope.grid_offset) / n for n in grid]
    coords = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 1)
    return torch.cat(rope._get_pos_embed_from_coords(2 * coords - 1), dim=-1)


def embed_patches(patch_embed: Any, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B h w D"]:
    """Patch embeddings as timm makes them; on a GPU by one product instead of the convolution, which is several times
    as slow there."""
    proj = patch_embed.proj
    if not images.is_cuda or not isinstance(proj, nn.Conv2d) or proj.kernel_size != proj.stride:
        return patch_embed(images)
    height, width = proj.kernel_size
    return patch_embed.norm(F.linear(as_patches(images, (height, width)), proj.weight.flatten(1), proj.bias))


def as_patches(images: Float[Tensor, "B 3 H W"], size: tuple[int, int]) -> Float[Tensor, "B h w P"]:
    """Each patch's 3 x size numbers, in the order of a convolution's weights. Sides are multiples of the patch's."""
    patches = images.unflatten(3, (-1, size[1])).unflatten(2, (-1, size[0]))  # B 3 h y w x
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3)


def resize_positions(
    pos_embed: Float[Tensor, "1 T D"], old: tuple[int, int], new: tuple[int, int], n_prefix: int, *, antialias: bool
) -> Float[Tensor, "1 T2 D"]:
    """Position embeddings of an `old` (h, w) grid for a `new` one, bicubic; the first `n_prefix` belong to prefix
    tokens and stay."""
    if not torch.compiler.is_compiling() and tuple(old) == tuple(new):
        return pos_embed  # bicubic interpolation at the same size changes nothing either
    prefix, patches = pos_embed[:, :n_prefix], pos_embed[:, n_prefix:]
    as_map = patches.unflatten(1, old).permute(0, 3, 1, 2)
    as_map = F.interpolate(as_map, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    return torch.cat([prefix, as_map.flatten(2).transpose(1, 2)], dim=1)


class PlainViT(NamedTuple):
    """A vision transformer without a name of its own, written as a backbone name: `plain_vit(image=64, patch=8,
    ...)`."""

    image: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp: int

    def __str__(self):
        return f"plain_vit({', '.join(f'{k}={v}' for k, v in self._asdict().items())})"

    @classmethod
    def parse(cls, name: str) -> "PlainViT":
        """The inverse of `str`."""
        values = {k: int(v) for k, v in re.findall(r"(\w+) *= *(\d{1,12})(?!\d)", name)}
        if sorted(values) != sorted(cls._fields) or min(values.values()) < 1:
            raise ToCoError(
                f"backbone = {name!r} is not understood: wanted is {cls(64, 8, 128, 12, 4, 512)} with your numbers"
            )
        spec = cls(**values)
        for name_, most in MOST.items():
            if values[name_] > most:
                raise ToCoError(f"backbone = {name!r} is not allowed: {name_} at most {most}")
        if spec.width % spec.heads or spec.image % spec.patch:
            raise ToCoError(f"backbone = {name!r} is not allowed: width must be a multiple of heads, image of patch")
        return spec


SHIPPED = {"scenes_vit_nano": PlainViT(image=128, patch=8, width=128, depth=12, heads=4, mlp=512)}


def build_encoder(config: ModelConfig) -> Any:
    """The encoder that `config` names, with its weights: a timm `VisionTransformer` or `Eva` for images of any size,
    with a class token."""
    if config.backbone in SHIPPED or config.backbone.startswith("plain_vit"):
        encoder = _plain_encoder(SHIPPED.get(config.backbone) or PlainViT.parse(config.backbone))
        shipped = WEIGHTS_FOLDER / f"{config.backbone}.safetensors"
        if config.pretrained and not config.weights and config.backbone not in SHIPPED:
            raise ToCoError(
                f"backbone = {config.backbone!r} has no pretrained weights: "
                "give a file as `weights`, or pretrained=False"
            )
        if config.pretrained and not config.weights and not shipped.is_file():
            raise ToCoError(
                f"the weights of {config.backbone} are not in this installation ({shipped} is missing): "
                "reinstall, or set pretrained=False"
            )
        if config.pretrained:
            load_weights(encoder, config.weights or shipped, antialias=config.pos_embed_antialias)
        return encoder
    encoder = build_timm(config.backbone, download=config.pretrained and not config.weights)
    if config.pretrained and config.weights:
        load_weights(encoder, config.weights, antialias=config.pos_embed_antialias)
    return encoder


def _plain_encoder(spec: PlainViT) -> nn.Module:
    make_importable()
    from timm.models.vision_transformer import VisionTransformer

    encoder: Any = VisionTransformer(
        img_size=spec.image, patch_size=spec.patch, embed_dim=spec.width, depth=spec.depth, num_heads=spec.heads,
        mlp_ratio=spec.mlp / spec.width, num_classes=0, class_token=True, dynamic_img_size=True,
    )  # fmt: skip
    encoder.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return encoder


def build_timm(name: str, *, download: bool, head: bool = False) -> nn.Module:
    """One of timm's plain vision transformers for images of any size; with `head` it keeps its own classifier.

    Raises ToCoError for a name that is none of them, and where its weights cannot be fetched.
    """
    make_importable()
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        known = [*SHIPPED, *(n for family in FAMILIES for n in timm.list_models(module=family.rpartition(".")[2]))]
        near = did_you_mean(
            architecture, known, otherwise=": allowed are scenes_vit_nano and timm's plain vision transformers"
        )
        raise ToCoError(f"backbone = {name!r} is not known{near}")
    if timm.model_entrypoint(architecture).__module__ not in FAMILIES:
        raise ToCoError(
            f"backbone = {name!r} is not a plain vision transformer: "
            "allowed are timm's vit, deit, dino, dinov2 and eva models"
        )
    tagged = timm.list_models(f"{architecture}*", pretrained=True)
    if name != architecture and name not in tagged:
        raise ToCoError(f"backbone = {name!r} is not known{did_you_mean(name, tagged)}")
    try:
        options: dict[str, Any] = {} if head else {"num_classes": 0}
        with quick_hub():
            encoder: Any = timm.create_model(name, pretrained=download, dynamic_img_size=True, **options)
    except Exception as error:
        reason = hub_reason(error)
        if not download:
            raise ToCoError(f"backbone = {name!r} could not be built ({reason})") from error
        source = timm.models.get_pretrained_cfg(name)
        where = f" (model.safetensors of {source.hf_hub_id})" if source and source.hf_hub_id else ""
        raise ToCoError(
            f"backbone = {name!r}: its pretrained weights{where} could not be fetched ({reason}): "
            "copy the file to this machine and give its path as `weights`, or set pretrained=False"
        ) from error
    if getattr(encoder, "cls_token", None) is None:
        raise ToCoError(
            f"backbone = {name!r} has no class token, which class token contrast needs: "
            "choose one that pools by its class token"
        )
    if not all(hasattr(block, "attn") for block in encoder.blocks):
        raise ToCoError(
            f"backbone = {name!r} has blocks without one attention before one MLP, as a plain vision transformer has: "
            "choose another"
        )
    return encoder


def load_weights(encoder: Any, path: str | pathlib.Path, *, antialias: bool = False) -> None:
    """Load an encoder's weights from a file with timm's key names.

    Keys of the pretraining classifier are ignored; position embeddings of another size are resized. Any other missing,
    unexpected or misshapen key is an error that names it.
    """
    found = {k: v.float() if v.is_floating_point() else v for k, v in read_tensors(path, "weights").items()}
    wanted = encoder.state_dict()
    found = {
        k: v
        for k, v in found.items()
        if k in wanted or not k.startswith(("head.", "head_dist.", "fc_norm.", "pre_logits."))
    }
    positions = found.get("pos_embed")
    resizable = positions is not None and positions.ndim == 3 and positions.is_floating_point()
    if resizable and "pos_embed" in wanted and positions.shape[1] != wanted["pos_embed"].shape[1]:
        n_prefix = 0 if encoder.no_embed_class else encoder.num_prefix_tokens
        side = round(max(found["pos_embed"].shape[1] - n_prefix, 0) ** 0.5)
        if side < 1 or side**2 + n_prefix != found["pos_embed"].shape[1]:
            raise ToCoError(
                f"weights = {str(path)!r}: its {found['pos_embed'].shape[1]} position embeddings "
                f"are not {n_prefix} and a square grid"
            )
        grid = tuple(encoder.patch_embed.grid_size)
        found["pos_embed"] = resize_positions(found["pos_embed"], (side, side), grid, n_prefix, antialias=antialias)
    refuse_wrong_keys(f"weights = {str(path)!r} does not fit the backbone", found, wanted)
    encoder.load_state_dict(found)
