"""The data of a run: files that cannot be used are found before its first step, and it goes on with data that changed
only where that is allowed."""

import functools

from toco_core.config import TrainConfig
from toco_core.data import Split, TrainVal
from toco_core.data.files import map_files
from toco_core.data.scenes import drawing_of
from toco_core.errors import BrokenFile
from toco_core.machine.distributed import Share
from toco_core.runs.comparison import refuse_edited
from toco_core.runs.folder import Run

GOES_ON = "with other contents, changed_data=True (toco train --changed-data) goes on"


def refuse_broken(data: TrainVal, share: Share, *, progress: bool = True) -> None:
    """Decode every image, and every mask that validation reads, each process its part of them. What this package has
    drawn is whole. Raises BrokenFile, in every process, that names the first one that cannot be used."""
    found = ""
    for split, masks in ((data.train, False), (data.val, True)):
        if not isinstance(split, Split) or drawing_of(split.root):
            continue
        look, part = functools.partial(split.look_at, masks=masks), range(share.rank, len(split), share.n)
        try:
            map_files(look, part, what=f"checking {split.split}", progress=progress)
        except BrokenFile as error:
            found = found or str(error)
    if told := next(filter(None, share.gathered(found)), None):
        ways = "open_data(..., broken='leave out') or toco train --leave-out-broken"
        raise BrokenFile(f"{told}; {ways} leaves out what cannot be used")


def allowed_changes(run: Run, config: TrainConfig, data: TrainVal, *, changed_data: bool) -> list[str]:
    """What changed in the data, in words, since a run began that goes on with these.

    Raises ToCoError where its training depends on it, unless it is to go on with `changed_data`; a finished run does
    not go on, so that it is not of any data but its own. Raises it also as `refuse_other_run` does.
    """
    refuse_edited(run, config)
    changes, allowed = run.data_changes(data), changed_data and not run.finished
    run.refuse_changes([what for what, counts in changes.items() if counts and not allowed], config.model.weights_file)
    return [*changes]
