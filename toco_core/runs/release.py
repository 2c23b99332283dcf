"""Checkpoints of the published release, in and out.

The release names its tensors `encoder.*` (timm's names), `classifier`, `aux_classifier` (1 x 1 convolutions),
`decoder.conv6|7|8`, `proj_head.*` and `proj_head_t.*` (the moving average), all behind `module.` where the checkpoint
was written under distributed training.
"""

import io
import math
import pathlib

import torch
from torch import Tensor

from toco_core.backbone import PlainViT
from toco_core.config import ModelConfig
from toco_core.errors import ToCoError
from toco_core.machine.files import read_tensors, refuse_wrong_keys
from toco_core.machine.writing import write_file
from toco_core.model import ToCo, skeleton

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
HEAD_WIDTH = 64  # channels per attention head in every backbone of the release
UNUSED = ("encoder.head.", "encoder.head_dist.")  # the classifier of the pretraining, carried along


def from_release(
    path: str | pathlib.Path, *, heads: int | None = None, layer: int = 10, dropped_border: bool = True
) -> ToCo:
    """A model from a checkpoint of the release's layout, with or without `module.`.

    Width, depth, patch size, image size, K, and the widths of the heads are inferred from the shapes. The number of
    attention heads leaves no trace in the shapes: it is width / 64 unless given. `layer` leaves none either; the
    release uses 10. `dropped_border` follows the release by default, so that its checkpoints give its numbers at any
    image size. Images are normalised by ImageNet's mean, as the release does for every backbone,
    and class logits come from the maximum over tokens, the only pooling that it has.

    The file is read without executing anything in it. Errors: `ToCoError` that names missing, unexpected or misshapen
    tensors.
    """
    found = read_tensors(path, "path")
    what = f"path = {str(path)!r} is not a checkpoint of the release"
    extras = {k: v for k, v in found.items() if k.startswith(UNUSED)}
    found = {k: v for k, v in found.items() if k not in extras}
    config, n_classes = _inferred(what, found, heads, layer)
    refuse_wrong_keys(what, found, _to_layout(skeleton(config, n_classes).state_dict()))
    model = ToCo(config, n_classes, dropped_border=dropped_border)  # now, as it is as large as the file's tensors
    model.load_state_dict(_from_layout(found))
    model.release_extras = extras
    return model


def to_release(model: ToCo, *, module_prefix: bool = True) -> dict[str, Tensor]:
    """The model's tensors in the release's layout, for `torch.save`. After `from_release` the round trip is exact, bit
    for bit, tensors that nobody uses included.

    Errors: `ToCoError` for a model with class tokens, with an affinity head, with `aux_norm` or with another pooling
    than the maximum: the layout has no place for these, and the release's tools would compute other maps from the same
    tensors.
    """
    if model.affinity is not None:
        raise ToCoError("an affinity head cannot be written in the release's layout: a model trained with affinity = 0")
    refused = (("pooling", "max"), ("aux_pooling", "max"), ("aux_norm", False), ("class_tokens_after", 0))
    for name, known in refused:
        value = getattr(model.config, name)
        if value not in (None, known):  # an auxiliary pooling of None is the final one's
            raise ToCoError(f"{name} = {value!r} cannot be written in the release's layout: it knows {known!r} only")
    tensors = _to_layout(model.state_dict()) | model.release_extras
    return {("module." if module_prefix else "") + k: v.detach().cpu().clone() for k, v in tensors.items()}


def save_release(model: ToCo, path: str | pathlib.Path, *, module_prefix: bool = True) -> None:
    """Write `to_release(model)` where the release's tools can read it. Raises ToCoError where it cannot be written."""
    with io.BytesIO() as file:
        torch.save(to_release(model, module_prefix=module_prefix), file)
        write_file(path, file.getvalue())


def _to_layout(state: dict[str, Tensor]) -> dict[str, Tensor]:
    layout = {}
    for key, value in state.items():
        if key in ("classifier.weight", "aux_classifier.weight"):
            value = value[:, :, None, None]
        layout[key.replace("proj_head_ema.", "proj_head_t.")] = value
    return layout


def _from_layout(layout: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for key, value in layout.items():
        if key in ("classifier.weight", "aux_classifier.weight"):
            value = value[:, :, 0, 0]
        state[key.replace("proj_head_t.", "proj_head_ema.")] = value
    return state


def _inferred(what: str, found: dict[str, Tensor], heads: int | None, layer: int) -> tuple[ModelConfig, int]:
    """The configuration and K that the shapes imply."""

    def shape(key: str, n_axes: int) -> tuple[int, ...]:
        if key not in found:
            raise ToCoError(f"{what}: 1 missing tensor ({key})")
        if found[key].ndim != n_axes:
            raise ToCoError(f"{what}: {key} has {found[key].ndim} axes and not {n_axes}")
        return tuple(found[key].shape)

    width, _, patch, _ = shape("encoder.patch_embed.proj.weight", 4)
    side = math.isqrt(max(shape("encoder.pos_embed", 3)[1] - 1, 0))
    if side < 1 or side**2 + 1 != found["encoder.pos_embed"].shape[1]:
        raise ToCoError(
            f"{what}: its {found['encoder.pos_embed'].shape[1]} position embeddings are not one and a square grid"
        )
    blocks = {k.split(".")[2] for k in found if k.startswith("encoder.blocks.")}
    for number in range(len(blocks)):
        if str(number) not in blocks:
            raise ToCoError(f"{what}: it has {len(blocks)} blocks, none of which is number {number}")
    n_classes = shape("classifier.weight", 4)[0]
    if heads is None:
        heads = max(width // HEAD_WIDTH, 1)
    if heads < 1 or width % heads:
        raise ToCoError(
            f"heads = {heads} does not divide the width {width} of {what.split(' is ')[0]}: give a number that does"
        )
    spec = PlainViT(
        image=side * patch,
        patch=patch,
        width=width,
        depth=max(len(blocks), 1),
        heads=heads,
        mlp=shape("encoder.blocks.0.mlp.fc1.weight", 2)[0],
    )
    config = ModelConfig(
        backbone=str(spec),
        pretrained=False,
        layer=layer,
        proj_hidden=shape("proj_head.mlp.0.weight", 2)[0],
        proj_bottleneck=shape("proj_head.mlp.4.weight", 2)[0],
        proj_dim=shape("proj_head.last_layer.weight_v", 2)[0],
        decoder_width=shape("decoder.conv6.weight", 4)[0],
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )
    return config, n_classes
