"""A teacher of the whole network: the moving average of all its weights, whose CAMs make the labels.

Published ToCo averages the projection head alone, and the network learns from its own CAMs. With
`schedule.teacher_momentum` m > 0 a second network follows it (mean teacher, Tarvainen and Valpola, NeurIPS 2017):

    teacher_0 = student_0,    teacher_n = m teacher_(n-1) + (1 - m) student_n    after each step n

It is not trained. The student is what is validated and exported; `open_run(folder, teacher=True)` opens the average.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from toco_core.config import TrainConfig
from toco_core.data import TrainVal
from toco_core.errors import ToCoError
from toco_core.machine.precision import attention_of
from toco_core.model import ToCo
from toco_core.runs.folder import Run
from toco_core.runs.opened import load_model_state
from toco_core.train.kept_tokens import KeptTokens, kept_blocks


def build_teacher(student: ToCo, config: TrainConfig) -> AveragedModel | None:
    """Build the teacher of a config, in evaluation mode and without gradient; None where it has none.

    Its first `update_parameters` copies the student.
    """
    momentum = config.schedule.teacher_momentum
    if not momentum:
        return None
    teacher = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(momentum))
    teacher.eval().requires_grad_(False)
    return teacher


def load_teacher(teacher: AveragedModel, state: dict, run: Run, data: TrainVal) -> None:
    """Fill the teacher from a checkpoint, to be averaged on. Raises ToCoError where that has none, or another one."""
    if "teacher" not in state:
        raise ToCoError(f"{run.folder}: the checkpoint has no teacher, which this config's teacher_momentum asks for")
    load_model_state(teacher.module, state["teacher"], run, data)
    teacher.n_averaged.fill_(1)


def teacher_of(teacher: AveragedModel | None) -> ToCo | None:
    """Take the network out of its average."""
    return None if teacher is None else teacher.module


@contextlib.contextmanager
def teaching(teacher: ToCo | None, config: TrainConfig, device: torch.device, kept: KeptTokens) -> Iterator[None]:
    """Within this context a second network, the teacher or the rival, computes with the student's kernels, and shares
    its kept tokens: frozen blocks are the same in both, as an average of equal weights is these weights, bit for bit.
    """
    with contextlib.ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(attention_of(teacher, config, device))
            stack.enter_context(kept.of(teacher, blocks=kept_blocks(config)))
        yield
