"""What stops a training: the state between two steps is saved first, and the message ends with what is left of it."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from toco_core.data.loader import loader_errors
from toco_core.errors import BrokenFile, ToCoError
from toco_core.machine.distributed import lost_process
from toco_core.machine.memory import out_of_memory
from toco_core.runs.folder import Run


class StepGuard:
    """Knows whether the weights are whole: between two steps they are, and can be saved; within one they are not.

    While it is entered, Ctrl-C within a step waits for the step's end; a second one does not wait. With `patient` False
    (several processes would stop at different steps), outside of the main thread, and where somebody else handles the
    signal, Ctrl-C stops at once as ever.
    """

    def __init__(self, done: int, *, patient: bool = True):
        self.done: int | None = done
        """Steps that are in the weights; None within a step."""
        self.patient, self._asked, self._before = patient, False, None

    def begin(self) -> None:
        """A step changes the weights from here on."""
        self.done = None

    def end(self, done: int) -> None:
        """The step is in the weights, and in the log. Raises KeyboardInterrupt where it was waited for."""
        self.done = done
        if self._asked:
            raise KeyboardInterrupt

    def __enter__(self) -> "StepGuard":
        here = threading.current_thread() is threading.main_thread()
        if self.patient and here and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._before = signal.signal(signal.SIGINT, self._interrupted)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupted(self, *_) -> None:
        if self.done is not None or self._asked:
            raise KeyboardInterrupt
        self._asked = True


@contextlib.contextmanager
def saved_when_stopped(guard: StepGuard, run: Run, save: Callable[[int], None]) -> Iterator[None]:
    """Where the block ends between two steps, whatever the reason, save what the newest checkpoint does not have.

    What goes wrong in saving is left to the reason.
    """
    try:
        yield
    except BaseException:
        if guard.done is not None and guard.done > (run.saved or 0):
            with contextlib.suppress(ToCoError):
                save(guard.done)
        raise


def tell_terminal(message: str) -> None:
    """Write a line to the terminal that started this kernel, where this is a kernel.

    papermill, when it is stopped, ends with a traceback of its own and drops what the cell still says.
    """
    terminal = getattr(sys.stderr, "_original_stdstream_copy", None)  # ipykernel's, before it took the stream
    if isinstance(terminal, int):
        with contextlib.suppress(OSError):
            os.write(terminal, f"\n{message}\n".encode(errors="replace"))


@contextlib.contextmanager
def with_resume_hint(run: Run, mended: str = "") -> Iterator[None]:
    """Whatever stops the training: end the message with what is left of it. A file that cannot be used stops the same
    call, too: `mended` says what goes on once it has other contents."""

    def left(when: str = "") -> str:
        there = (run.folder / "checkpoint.pt").is_file()
        if run.saved is None and not there:
            return f"there is no checkpoint in {run.folder} yet, the same call begins anew"
        if not there:
            return f"the checkpoint in {run.folder} is gone, the same call begins anew"
        which = "" if run.saved is None else f" after step {run.saved}"  # of several processes the first one knows
        return f"the checkpoint{which} is in {run.folder}, and the same call goes on from there{when}"

    try:
        with loader_errors():
            yield
    except KeyboardInterrupt:
        message = f"training was stopped; {left()}"
        tell_terminal(message)
        raise KeyboardInterrupt(message) from None
    except BrokenFile as error:
        raise BrokenFile(f"{error}; {left(' once the file is as it was' + (mended and f'; {mended}'))}") from error
    except ToCoError as error:
        raise ToCoError(f"{error}; {left()}") from error
    except Exception as error:
        if lost := lost_process(error):
            raise ToCoError(f"another process of this training has ended ({lost}); {left()}") from error
        reason = out_of_memory(error)
        if not reason:
            raise
        raise ToCoError(
            f"out of memory, a larger accumulate or a smaller batch_size or crop_size is needed ({reason}); {left()}"
        ) from error
