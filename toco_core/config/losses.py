"""The total loss and its stages."""

from dataclasses import dataclass

from toco_core.config.fields import Config, option


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    """Weights of the terms of the total loss ("Training Objective") and the step from which each counts."""

    cls: float = option(1.0, "Weight of the multi-label classification loss.", at_least=0)
    aux_cls: float = option(1.0, "Weight of the same loss on the auxiliary classifier.", at_least=0)
    ptc: float = option(0.2, "Weight of patch token contrast.", at_least=0)
    ctc: float = option(0.5, "Weight of class token contrast.", at_least=0)
    seg: float = option(0.1, "Weight of the segmentation loss.", at_least=0)
    energy: float = option(0.05, "Weight of the dense energy loss.", at_least=0)
    temperature: float = option(0.5, "Tau of class token contrast.", above=0)
    ctc_cosine: bool = option(
        False,
        """Bring both projections to length 1 before they are compared, so that the logits of class token contrast are
        cosines over tau. Off: of any length, as in the release; then the loss can also shrink or grow them all.""",
        added_later=True,
    )
    ctc_batch_negatives: bool = option(
        False,
        """Count all views of those images of the batch that share no class with an image among its negatives. Off: its
        own views alone, as published. The batch must be in one piece: no `accumulate`, one process.""",
        added_later=True,
    )
    ctc_whole_teacher: bool = option(
        False,
        """Compare with the global views as the averaged network sees them (`teacher_momentum`), encoder and head. Off:
        the teacher shares the encoder, only its head is averaged, as published.""",
        added_later=True,
    )
    ptc_start: int = option(0, "First step with patch token contrast.", at_least=0)
    ctc_start: int = option(0, "First step with class token contrast.", at_least=0)
    seg_start: int = option(
        2001, "First step with the segmentation loss. The release warms up on VOC for the steps 0..2000.", at_least=0
    )
    energy_start: int = option(2001, "First step with the dense energy loss.", at_least=0)
    final_cam_start: int = option(
        0,
        """First step whose segmentation labels come from the final CAM; until then they come from the auxiliary CAM,
        which is usable earlier (COCO).""",
        at_least=0,
    )

    seg_noise: float = option(
        0.0,
        """Share of the labelled pixels of every class of every image, those with the highest segmentation loss, that
        the decoder does not learn from (DuPL, CVPR 2024; `methods.surest`). 0: it learns from all, as published.""",
        at_least=0,
        below=1,
        added_later=True,
    )
    seg_noise_start: int = option(
        0,
        "First step on which they are left out: before the decoder knows anything its losses tell nothing of labels.",
        at_least=0,
        added_later=True,
    )

    exchange: float = option(
        0.0,
        """Weight of the segmentation's answer to the CAM (CoSA, ECCV 2024; `methods.exchange`). 0: as published.""",
        at_least=0,
        added_later=True,
    )
    exchange_start: int = option(
        0, "First step with it; at least `seg_start`, the decoder knows nothing before.", at_least=0, added_later=True
    )
    consistency: float = option(
        0.0,
        """Weight of the decoder's agreement with itself on a recoloured crop, where the pseudo label is uncertain
        (DuPL, CVPR 2024; `methods.consistency`). 0: as published.""",
        at_least=0,
        added_later=True,
    )
    consistency_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    prototypes: float = option(
        0.0,
        """Weight of the contrast of patch tokens with the mean tokens of the batch's classes (SeCo, CVPR 2024;
        `methods.prototypes`). The batch must be in one piece: no `accumulate`, one process. 0: as published.""",
        at_least=0,
        added_later=True,
    )
    prototypes_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    discrepancy: float = option(
        0.0,
        """Weight of the cosine between the tokens of two networks that learn beside each other, each decoder from the
        other's pseudo label (DuPL, CVPR 2024; `train.rival`). Twice the time and memory of a step; a GPU replays the
        blocks of the first alone. Not with `teacher_momentum`. 0: one network, as published.""",
        at_least=0,
        added_later=True,
    )
    discrepancy_start: int = option(
        0, "First step with it; the second network learns from step 0 on.", at_least=0, added_later=True
    )
    class_tokens: float = option(
        0.0,
        """Weight of the classification by class tokens (MCTformer, CVPR 2022; `methods.class_tokens`), which the model
        has with `class_tokens_after`. 0: as published.""",
        at_least=0,
        added_later=True,
    )
    class_tokens_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    class_contrast: float = option(
        0.0,
        """Weight of the contrast of class tokens with the patch tokens of their class (MoRe, AAAI 2025;
        `methods.class_tokens`). 0: as published.""",
        at_least=0,
        added_later=True,
    )
    class_contrast_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    affinity: float = option(
        0.0,
        """Weight of the affinity that is learned from the attention of `attention_blocks` (AFA, CVPR 2022;
        `methods.affinity`). Above 0 the model has an affinity head. 0: as published.""",
        at_least=0,
        added_later=True,
    )
    affinity_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    affinity_walk_start: int = option(
        0,
        """First step whose labels come from CAMs carried along that affinity, where `attention_kind` is `learned` and
        `attention_steps` above 0; 0: none, so that what is not learned yet spoils no label (AFA on VOC: 6001 of 20000).
        Scores and exported labels always come from carried CAMs.""",
        at_least=0,
        added_later=True,
    )
    frequency: float = option(
        0.0,
        """Weight of what the final tokens lack of the fine detail of block `layer` (after FFR, CVPR 2025;
        `methods.frequency`). 0: as published.""",
        at_least=0,
        added_later=True,
    )
    frequency_start: int = option(0, "First step with it.", at_least=0, added_later=True)
    reliable: float = option(
        0.0,
        """Weight of the contrast of the decoder's features at tokens whose pseudo label is sure (UGRL, AAAI 2026;
        `methods.reliable`). 0: as published.""",
        at_least=0,
        added_later=True,
    )
    reliable_start: int = option(0, "First step with it.", at_least=0, added_later=True)
