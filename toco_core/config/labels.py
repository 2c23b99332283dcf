"""From CAM to labels."""

import dataclasses
from dataclasses import dataclass

from toco_core.config.fields import Config, option
from toco_core.errors import ToCoError


@dataclass(frozen=True, kw_only=True)
class LabelConfig(Config):
    """From CAM to labels ("Patch Token Contrast" in the paper) and their refinement."""

    beta_l: float = option(
        0.25, "A pixel whose largest CAM value is at most this is background.", at_least=0, at_most=1
    )
    beta_h: float = option(
        0.7,
        "A pixel whose largest CAM value is at least this is foreground; between the two it is uncertain.",
        at_least=0,
        at_most=1,
    )
    beta: float = option(0.5, "The one threshold with which a CAM is scored.", at_least=0, at_most=1)
    cam_scales: tuple[float, ...] = option(
        (1.0, 0.5, 1.5), "Image scales over which CAM is summed, each also mirrored.", above=0, at_most=16
    )
    par_iterations: int = option(
        10, "Iterations of pixel-adaptive refinement; 0 leaves the CAM as it is.", at_least=0, at_most=1000
    )
    attention_steps: int = option(
        0,
        """How often CAMs are carried along the encoder's own attention before anything is made of them (see
        `refiners.attention`). 0: never, as published.""",
        at_least=0,
        at_most=16,
        added_later=True,
    )
    attention_blocks: tuple[int, ...] = option(
        (9, 10, 11, 12),
        "Blocks, from 1, whose attention is averaged for that.",
        at_least=1,
        at_most=1000,
        added_later=True,
    )
    attention_kind: str = option(
        "attention",
        """`attention`: tokens go together where they attend to each other. `pattern`: where they attend to the same
        tokens, for backbones whose tokens attend to what they are not.""",
        one_of=("attention", "pattern"),
        added_later=True,
    )
    class_attention: float = option(
        0.0,
        """Multiply every CAM by this power of its class token's attention to the patches (`cam.fused`), before it is
        carried along attention. 1: the product of MCTformer (CVPR 2022), a map of few high places; smaller ones leave
        it broader. Thresholds must be lower than for plain CAMs. For models with `class_tokens_after`. 0: not, as
        published.""",
        at_least=0,
        at_most=1,
        added_later=True,
    )
    par_dilations: tuple[int, ...] = option(
        (1, 2, 4, 8, 12, 24), "Distances of the eight neighbours that PAR compares with.", at_least=1, at_most=10000
    )
    par_scale: float = option(0.5, "PAR refines at this fraction of the image's size.", above=0, at_most=1)
    refiner: str = option(
        "par",
        """What refines pseudo labels along the image's edges: `par`, as published; `crf`, the dense CRF; `none`; or
        another row of `refiners.REFINERS`.""",
        added_later=True,
    )

    token_refiner: str = option(
        "none",
        """What refines the auxiliary CAM before patch token contrast learns from it: `par`, `crf` or another row of
        `refiners.REFINERS`; `none`, as published: the CAM is cut at the tokens.""",
        added_later=True,
    )

    def check(self):
        if self.beta_l >= self.beta_h:
            raise ToCoError(f"beta_l = {self.beta_l} must be below beta_h = {self.beta_h}")

    def attended(self) -> tuple[int, ...]:
        """The blocks whose attention a pass must keep for its CAMs."""
        return self.attention_blocks if self.attention_steps else ()

    def cam_options(self) -> dict:
        """The keywords of `cam.multi_scale_cam`: its scales, and how CAMs are carried along attention and multiplied by
        that of the class tokens."""
        carried = {name: getattr(self, name) for name in ("attention_steps", "attention_blocks", "attention_kind")}
        fused = {"class_attention": self.class_attention} if self.class_attention else {}
        return {"scales": self.cam_scales, **(carried if self.attention_steps else {}), **fused}

    def thresholds(self) -> dict:
        """The keywords `beta_l` and `beta_h`."""
        return {"beta_l": self.beta_l, "beta_h": self.beta_h}

    def refiner_options(self, refiner: str | None = None) -> dict:
        """The keywords of `labels.refined_labels`: the refiner's name and the fields that begin with it, by the rest of
        their names (`par_iterations` as `iterations`). None: the configured one."""
        refiner = refiner or self.refiner
        start = f"{refiner}_"
        fields = [f.name for f in dataclasses.fields(self) if f.name.startswith(start)]
        return {"refiner": refiner, **{name.removeprefix(start): getattr(self, name) for name in fields}}

    def pseudo_label_options(self, refiner: str | None = None) -> dict:
        """The keywords of `labels.pseudo_label`: both thresholds and those of the refiner."""
        return {**self.thresholds(), **self.refiner_options(refiner)}
