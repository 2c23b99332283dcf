"""Training over several processes: from a shell, over machines too, and from a notebook. One process is a special case.

    torchrun --nproc-per-node 4 -m toco_core train voc dataset=VOCdevkit/VOC2012 seed=1

In a notebook (or any module that is imported, not executed):

    from toco_core.train.launch import train_on
    opened = train_on(config, processes=4)

The run is that of the config wherever it was trained: the notebook that asks for it finds it finished. `batch_size` is
that of the whole, over all processes. Machines must share `out_dir` or, at least, the first one must keep its own.
"""

import os
import pickle
import sys
import tempfile
from collections.abc import Callable, Mapping
from multiprocessing.queues import SimpleQueue
from pathlib import Path

import torch
from torch import multiprocessing

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.machine import distributed
from toco_core.machine.device import resolve_device
from toco_core.objective import TERMS, Term
from toco_core.runs.folder import Run
from toco_core.runs.opened import Opened, open_run
from toco_core.runs.own_terms import variant
from toco_core.train.loop import train

ENDED = "a process of the training ended"
REFUSAL = "refusal-{}-{}"  # of a process, in the folder where they meet; 1-... of those that only saw another one go


def train_on(
    config: TrainConfig, *, processes: int, on_record: Callable[[dict], None] | None = None, **options
) -> Opened:
    """Train in new processes on this machine, one GPU each where training is on CUDA; the finished run.

    `on_record` and `options` as for `train.train`; what they hold must be importable by the new processes: a term of
    your own stands in a module. Records of a finished run are told again. A process that fails ends them all, with its
    message as ToCoError.
    """
    distributed.Share(0, processes).part(config.schedule.batch_size)  # these three refuse before anything starts
    config.check_parts(processes)
    _refuse_hidden(options.get("terms", TERMS), processes)
    run = Run.of(config, variant(options.get("terms", TERMS), config))
    records = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as meeting:
        workers = multiprocessing.start_processes(
            _train_one,
            (processes, Path(meeting), config.to_dict(), options | {"progress": False}, records),
            nprocs=processes,
            join=False,
            start_method="spawn",
        )
        told = 0
        try:
            while not workers.join(timeout=0.5):
                told += _tell(records, on_record)
        except (multiprocessing.ProcessRaisedException, multiprocessing.ProcessExitedException) as error:
            last = str(error).strip().splitlines()[-1]
            noted = sorted(Path(meeting).glob(REFUSAL.format("*", "*")))
            refusals = [path.read_text(encoding="utf-8") for path in noted]
            refusals.append(last.partition("ToCoError: ")[2] or f"{ENDED}: {last}")
            raise ToCoError(refusals[0]) from error
        finally:
            for process in workers.processes:
                process.kill()
        told += _tell(records, on_record)
    for record in run.records() if on_record and not told else []:  # it was finished before
        on_record(record)
    return open_run(run.folder, data=options.get("data"), device=config.device)


def _refuse_hidden(terms: Mapping[str, Term], processes: int) -> None:
    """Raise ToCoError for a term whose functions new processes cannot import: those of a notebook, and those without a
    name in a module."""
    main = sys.modules["__main__"]
    repeated = getattr(main, "__spec__", None) or getattr(main, "__file__", None)  # a script is run there once more
    for name, term in terms.items():
        try:
            seen = b"__main__" not in pickle.dumps(term) or repeated
        except (pickle.PicklingError, AttributeError, TypeError):
            seen = False
        if not seen:
            what = f"the term {name!r} with processes = {processes} is not allowed"
            raise ToCoError(f"{what}: functions of a module that is imported, new processes do not see a notebook's")


def _train_one(rank: int, n: int, meeting: Path, config: dict, options: dict, records: SimpleQueue) -> None:
    """Train as process `rank`. What ends it is noted in the folder where the processes meet, while they still do: the
    others only see that one has gone, and may end, with an error of the network, before it does."""
    config = TrainConfig.from_dict(config)
    os.environ["LOCAL_RANK"] = str(rank)
    if resolve_device(config.device).type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // n))
    store = Path(meeting, "store").as_uri()
    with distributed.joined(config.device, init_method=store, rank=rank, world_size=n):
        try:
            train(config, on_record=records.put, **options)
        except Exception as error:
            told = str(error) if isinstance(error, ToCoError) else f"{ENDED}: {type(error).__name__}: {error}"
            only_saw = int(bool(distributed.lost_process(error.__cause__ or error)))
            Path(meeting, REFUSAL.format(only_saw, rank)).write_text(" ".join(told.split()), encoding="utf-8")
            raise


def _tell(records: SimpleQueue, on_record: Callable | None) -> int:
    """Hand on what was logged since: how many records."""
    n = 0
    while not records.empty():
        record, n = records.get(), n + 1
        if on_record:
            on_record(record)
    return n
