"""One process at a time: who writes a run, an export or a kept evaluation has its folder alone.

The lock lies among the temporary files and is gone when it is released; each user has locks of their own. The folder
itself need not exist, and what is refused before anything is written leaves nothing behind.
"""

import contextlib
import hashlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import filelock

from toco_core.errors import ToCoError
from toco_core.machine.intake import real_path
from toco_core.machine.writing import refuse_links

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_held = threading.local()


@contextlib.contextmanager
def alone(folder: Path, does: str, *, wait: bool = True, tell: bool = True) -> Iterator[None]:
    """Hold a folder; who comes second waits, and with `tell` says so: "another process `does` <folder>".

    Without `wait` ToCoError is raised where another process has it, and always where no lock can be made or a folder in
    it is a link: who holds a folder writes and removes in all of it.
    """
    busy = f"another process {does} {folder.name}"
    path = _lock_path(folder)
    if wait and path in _mine():  # this thread has it: it would wait for itself
        yield
        return
    refuse_links(folder)
    try:
        handle = _hold(path, block=False)
        if handle is None:
            if not wait:
                raise ToCoError(f"{busy}: start again when it is done")
            if tell:
                print(f"{busy}: waiting until it is done", flush=True)
            handle = _hold(path, block=True)
    except OSError as error:
        raise ToCoError(
            f"the lock {path} cannot be made: {error.strerror or error}; remove it, or set TMPDIR to a folder of yours"
        ) from error
    _mine().add(path)
    try:
        yield
    finally:
        _mine().discard(path)
        _let_go(path, handle)


def _mine() -> set[Path]:
    """The locks that this thread holds."""
    if not hasattr(_held, "paths"):
        _held.paths = set()
    return _held.paths


def _lock_path(folder: Path) -> Path:
    name = hashlib.sha256(str(real_path(folder)).encode(errors="surrogateescape")).hexdigest()[:20]
    user = os.getuid() if hasattr(os, "getuid") else "user"
    return Path(tempfile.gettempdir()) / f"toco-{user}-{name}.lock"


def _hold(path: Path, *, block: bool):
    """The held lock; None where another process has it and `block` is False."""
    if fcntl is None:
        lock = filelock.FileLock(path)
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=-1 if block else 0)
            return lock
        return None
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if block else fcntl.LOCK_NB))
            if _is_there(path, handle):
                return handle
        except BlockingIOError:
            os.close(handle)
            return None
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # whoever held it before has removed it: it keeps nobody out


def _is_there(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(handle))
    except FileNotFoundError:
        return False


def _let_go(path: Path, handle) -> None:
    if fcntl is None:
        return handle.release()
    with contextlib.suppress(OSError):
        path.unlink()  # while it is held: `_hold` sees that it is gone
    fcntl.flock(handle, fcntl.LOCK_UN)  # a loader process that lives on has the handle, too
    os.close(handle)
