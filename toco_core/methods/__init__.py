"""Ideas of later papers as terms of the objective, off unless their weight in `config.LossConfig` is above 0.

A file holds one idea: its loss, a function of tensors with the equation, and its term, a function of a step, with what
it learns from. Its row stands in `objective.TERMS`, its weight in `LossConfig`. What each does is measured in
`docs/methods.md`.
"""

from toco_core.methods.consistency import consistency, unsure_choice
from toco_core.methods.exchange import exchange, exchanged
from toco_core.methods.frequency import frequency
from toco_core.methods.prototypes import prototypes
from toco_core.methods.reliable import reliable, surest

__all__ = [
    "consistency",
    "exchange",
    "exchanged",
    "frequency",
    "prototypes",
    "reliable",
    "surest",
    "unsure_choice",
]
