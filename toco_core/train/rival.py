"""A rival: a second network that learns beside the first one, from the same batches, and shall not agree with it.

After "DuPL: Dual Student with Trustworthy Progressive Learning" (CVPR 2024). What a network's CAM takes for an object
its decoder learns, whether it is one or not. With `loss.discrepancy` > 0 there are two networks, which begin with the
same encoder and other heads; each decoder learns from the pseudo label of the other network, and
`methods.discrepancy` holds their tokens apart. All other terms are of one network alone.

One optimizer moves both. The first is logged, validated and exported; the rival is in the checkpoints, under "rival".
"""

from collections.abc import Sequence

from toco_core.config import TrainConfig
from toco_core.data import TrainVal
from toco_core.errors import ToCoError
from toco_core.model import ToCo, build_model
from toco_core.objective import Objective, Step, objective
from toco_core.runs.folder import Run
from toco_core.runs.opened import load_model_state


def build_rival(model: ToCo, config: TrainConfig) -> ToCo | None:
    """Build the rival of a network that training begins with, on its device; None where a config has none.

    Its heads are drawn by torch's random numbers as they stand: after the network's own these are others.
    """
    if not config.loss.discrepancy:
        return None
    rival = build_model(config, model.n_classes, pretrained=False).to(model.mean.device)
    rival.encoder.load_state_dict(model.encoder.state_dict())
    rival.freeze_blocks(config.schedule.frozen_blocks)
    return rival


def load_rival(rival: ToCo, state: dict, run: Run, data: TrainVal) -> None:
    """Fill the rival from a checkpoint. Raises ToCoError where that has none, or another one."""
    if "rival" not in state:
        raise ToCoError(f"{run.folder}: the checkpoint has no rival, which this config's discrepancy asks for")
    load_model_state(rival, state["rival"], run, data)


def oppose(steps: Sequence[Step], rival: ToCo) -> None:
    """Give every step the rival's on its batch as `step.rival`, and that one this one as its.

    The rival cuts local views by the same random numbers; a step's own are as they would be without one.
    """
    drawn = steps[0].generator
    again = drawn and drawn.clone_state()
    for step in steps:
        options = {"terms": step.terms, "weights": step.weights, "autocast": step.autocast, "share": step.share}
        options |= {"generator": again, "boxes": vars(step).get("boxes"), "parts": step.parts // step.share.n}
        step.rival = Step(rival, step.batch, step.config, step.number, **options)
        step.rival.rival = step


def of_both(step: Step) -> Objective:
    """The objective of a step whose total also gives the rival its gradient.

    The rival adds its own total less the same number: 0, and nan where it is not finite. Without a rival it is
    `objective`.
    """
    own = objective(step)
    if step.rival is None:
        return own
    rivals = objective(step.rival).total
    return own._replace(total=own.total + (rivals - rivals.detach()))
