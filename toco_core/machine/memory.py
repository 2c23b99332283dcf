"""Memory: how much is free, and where it is not there, one line that says what to make smaller; GPU and CPU."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from toco_core.errors import ToCoError

GIB = 2**30


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


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still get on a device; None where the system does not say."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if not sys.platform.startswith("linux"):
        return None
    return _free_on_linux(Path("/proc/meminfo"), Path("/sys/fs/cgroup"))


def _free_on_linux(meminfo: Path, group: Path) -> int | None:
    """What the machine has available, or less where a container's limit leaves less."""
    found = []
    try:
        facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        found.append(1024 * int(facts["MemAvailable"].split()[0]))
    except (OSError, KeyError, ValueError):
        pass
    try:
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(stat["inactive_file"]))  # pages of files are given back when asked for
    except (OSError, KeyError, ValueError):  # no limit reads "max"
        pass
    return max(0, min(found)) if found else None
