"""Ideas of later papers, each off unless its field of the config says otherwise.

A term of the objective is a file: its loss, a function of tensors with the equation, and its term, a function of a
step, with what it learns from. Its row stands in `objective.TERMS`, its weight in `LossConfig`. When and how surely
labels teach (`thresholds`, `surest`) are functions of tensors, too, and what a step asks of them. What each does is
measured in `docs/methods.md`.
"""

from toco_core.methods.affinity import affinity, count_affinity_pairs, token_pairs
from toco_core.methods.class_tokens import class_contrast, class_tokens, count_shown
from toco_core.methods.consistency import consistency, unsure_choice
from toco_core.methods.discrepancy import discrepancy
from toco_core.methods.exchange import exchange, exchanged
from toco_core.methods.frequency import frequency
from toco_core.methods.prototypes import prototypes
from toco_core.methods.reliable import reliable, reliable_tokens
from toco_core.methods.surest import grown, seg_label
from toco_core.methods.thresholds import thresholds
from toco_core.methods.unrelated import unrelated_images

__all__ = [
    "affinity",
    "class_contrast",
    "class_tokens",
    "consistency",
    "count_affinity_pairs",
    "count_shown",
    "discrepancy",
    "exchange",
    "exchanged",
    "frequency",
    "grown",
    "prototypes",
    "reliable",
    "reliable_tokens",
    "seg_label",
    "thresholds",
    "token_pairs",
    "unrelated_images",
    "unsure_choice",
]
