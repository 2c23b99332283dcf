"""From CAM to labels."""

import dataclasses
import math
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
        tokens, for backbones whose tokens attend to what they are not. `learned`: where the loss `affinity` has taught
        the model that they do (AFA, CVPR 2022).""",
        one_of=("attention", "pattern", "learned"),
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

    beta_h_first: float | None = option(
        None,
        """What `beta_h` is on step 0; it goes from there to `beta_h` by half a cosine over the training (DuPL, CVPR
        2024). None: `beta_h` from the beginning, as published.""",
        at_least=0,
        at_most=1,
        added_later=True,
    )
    dynamic_thresholds: bool = option(
        False,
        """In training, move `beta_l` and `beta_h` together so that the middle between them is Otsu's threshold of the
        batch's CAM values (after CoSA, ECCV 2024; `methods.thresholds`). The batch must be in one piece: no
        `accumulate`, one process. Evaluation, export and predictors keep the config's. Off: as published.""",
        added_later=True,
    )
    growing_start: float = option(
        1.0,
        """Share of the token label and of the pseudo label that teaches on step 0: the surest of every class of every
        image, by CAM value. It grows linearly to 1 in the middle of the training (after PCRE, CVPR 2025;
        `methods.surest`). 1: all of it from the beginning, as published.""",
        above=0,
        at_most=1,
        added_later=True,
    )

    def check(self):
        for name in ("beta_h", "beta_h_first"):
            upper = getattr(self, name)
            if upper is not None and self.beta_l >= upper:
                raise ToCoError(f"beta_l = {self.beta_l} must be below {name} = {upper}")

    def attended(self) -> tuple[int, ...]:
        """The blocks whose attention a pass must keep for its CAMs."""
        return self.attention_blocks if self.attention_steps else ()

    def cam_options(self, *, carried: bool = True) -> dict:
        """The keywords of `cam.multi_scale_cam`: its scales, how CAMs are multiplied by the attention of the class
        tokens, and how they are carried along that of patches, unless they are not to be."""
        along = {name: getattr(self, name) for name in ("attention_steps", "attention_blocks", "attention_kind")}
        fused = {"class_attention": self.class_attention} if self.class_attention else {}
        return {"scales": self.cam_scales, **(along if self.attention_steps and carried else {}), **fused}

    def thresholds(self, progress: float = 1.0) -> dict:
        """The keywords `beta_l` and `beta_h`: after training, or where a share of it, `progress` in [0, 1], is done.

        beta_h(t) = beta_h + (beta_h_first - beta_h) (1 + cos(pi t)) / 2 with t the progress.
        """
        beta_h = self.beta_h
        if self.beta_h_first is not None:
            beta_h += (self.beta_h_first - beta_h) * (1 + math.cos(math.pi * progress)) / 2
        return {"beta_l": self.beta_l, "beta_h": beta_h}

    def taught_share(self, progress: float) -> float:
        """Share of a label's surest places that teach where a share `progress` of the training is done: `growing_start`
        at 0, linearly to 1 at one half."""
        return min(self.growing_start + (1 - self.growing_start) * 2 * progress, 1.0)

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
