"""The network."""

from dataclasses import dataclass

from toco_core.config.fields import Config, option
from toco_core.errors import ToCoError


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The network: an encoder of plain ViT blocks and the heads of the paper's figure 3."""

    backbone: str = option(
        "deit_base_patch16_224", "Name of a plain vision transformer of timm, or `scenes_vit_nano`, which is shipped."
    )
    weights: str | None = option(
        None,
        """File with the encoder's weights (.safetensors or .pth, timm's key names). None or '': those that are
        shipped with `scenes_vit_nano` or that timm downloads.""",
    )
    pretrained: bool = option(
        True, "Begin with pretrained weights. False begins with random ones and ignores `weights`."
    )
    layer: int = option(
        10,
        "Block that feeds the auxiliary classifier, counted from 1 as in the paper (10 of 12).",
        at_least=1,
        at_most=1000,
    )
    aux_norm: bool = option(
        False,
        """Bring the tokens of block `layer` to mean 0 and variance 1 each before the auxiliary classifier. Off: as
        published. On: for backbones in which single tokens of the middle blocks are many times longer than the others
        (small ViTs pretrained on ImageNet have them in the corners): the maximum over tokens would pick these.""",
        added_later=True,
    )
    pooling: str = option(
        "max",
        """How a classifier reads an image's patch tokens. Channel by channel, as one vector: their maximum (`max`, as
        published), their mean (`mean`) or the mean of the largest fifth (`topk`). Or class by class: its scores at the
        tokens, which are its CAM, and of these the mean of the largest fifth (`cam_topk`).""",
        one_of=("max", "mean", "topk", "cam_topk"),
        added_later=True,
    )
    aux_pooling: str | None = option(
        None,
        """How the auxiliary classifier reads its block's tokens, where that is another way than `pooling`. None: the
        same one, as published.""",
        one_of=("max", "mean", "topk", "cam_topk"),
        added_later=True,
    )
    class_tokens_after: int = option(
        0,
        """Block, from 1, after which K class tokens branch off the image's class token and look at the patches from
        there on (MCTformer, CVPR 2022; `methods.class_tokens`). The terms `class_tokens` and `class_contrast` teach
        them, `class_attention` uses their maps. 0: no class tokens, as published.""",
        at_least=0,
        at_most=1000,
        added_later=True,
    )
    proj_hidden: int = option(2048, "Width of the two hidden layers of the projection head.", at_least=1, at_most=65536)
    proj_bottleneck: int = option(
        256, "Width of the projection head before its last, weight-normalised layer.", at_least=1, at_most=65536
    )
    proj_dim: int = option(1024, "P, the width in which crops are compared by CTC.", at_least=1, at_most=65536)
    decoder_width: int = option(512, "Channels of the LargeFOV decoder.", at_least=1, at_most=65536)
    decoder_dilation: int = option(
        5,
        """Dilation of the LargeFOV decoder. 5: as published, for 28 x 28 tokens. On a grid of 16 x 16 its outer taps
        lie beyond the border for many tokens.""",
        at_least=1,
        at_most=1000,
        added_later=True,
    )
    pos_embed_antialias: bool = option(
        False,
        """Antialias when position embeddings are resized, as timm does. Off: the release does not, and its
        checkpoints expect that.""",
    )
    freeze_pos_embed: bool = option(
        True, "Do not train the position embeddings, as in the release: they are resized for every view size."
    )
    mean: tuple[float, ...] | None = option(
        None,
        """Mean of the images that the encoder expects, per RGB channel in [0, 1]. None: what the backbone was
        pretrained with. (The release always takes ImageNet's, also for backbones pretrained with 0.5.)""",
        length=3,
        at_least=0,
        at_most=1,
    )
    std: tuple[float, ...] | None = option(
        None, "Standard deviation that belongs to `mean`. None: the backbone's.", length=3, above=0, at_most=1
    )

    @property
    def weights_file(self) -> str | None:
        """The file that the encoder begins with; None where it begins with others or at random."""
        return self.weights if self.pretrained else None

    @property
    def poolings(self) -> tuple[str, str]:
        """How the final classifier reads its tokens, and how the auxiliary one does."""
        return self.pooling, self.aux_pooling or self.pooling

    def check(self):
        if not self.backbone:
            raise ToCoError("backbone = '' is empty: name a plain vision transformer of timm, or 'scenes_vit_nano'")
