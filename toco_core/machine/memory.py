"""Memory that is not there: one line that says what to make smaller, on a GPU and on a CPU."""

import contextlib
from collections.abc import Iterator

import torch

from toco_core.errors import ToCoError


def out_of_memory(error: Exception) -> str:
    """What an error says about memory that is not there, on a GPU or a CPU, in one line; "" for any other error."""
    text = next(iter(str(error).splitlines()), "")
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return text or type(error).__name__
    words = ("can't allocate memory", "not enough memory", "std::bad_alloc")
    return text if isinstance(error, RuntimeError) and any(word in str(error) for word in words) else ""


@contextlib.contextmanager
def memory_errors(advice: str) -> Iterator[None]:
    """Raise what says that memory is not there as ToCoError with what to make smaller."""
    try:
        yield
    except Exception as error:
        reason = out_of_memory(error)
        if isinstance(error, ToCoError) or not reason:
            raise
        raise ToCoError(f"out of memory, {advice} is needed ({reason})") from error
