"""Files that are written whole or not at all, and what the system says about writing as one ToCoError.

A new file gets a name of its own beside its place (`<name>-<random>.part`, which follows no link and is nobody
else's), is flushed to the disk, and then takes its name; the folder is flushed, too. Whatever goes wrong, the part is
removed and the file of before stays.
"""

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, TextIO

from toco_core.errors import ToCoError

PART = ".part"


@contextlib.contextmanager
def writing(place: Path | str, what: str = "") -> Iterator[None]:
    """Raise what the system says about writing (no space, no right, too long a name) as ToCoError with the place, after
    `what`."""
    try:
        yield
    except OSError as error:
        raise ToCoError(f"{what}cannot write to {place}: {error.strerror or error}") from error


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file so that a reader sees the old one or the new one, never a part. Text is written as UTF-8.

    Raises OSError, which `writing` translates, where the disk is full or the folder cannot be written.
    """
    with whole_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_file(path: Path | str, content: str | bytes) -> Path:
    """Write a whole file into its folder, which is made if missing; the path. Raises ToCoError where that fails."""
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return path


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes the place of `path` at the end of the block, unless the block raises."""
    with new_part(path) as part:
        with open(os.open(part, os.O_WRONLY), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        flush_folder(path.parent)


@contextlib.contextmanager
def new_part(path: Path) -> Iterator[Path]:
    """An empty file beside `path` that nobody else has; what is left of it at the end of the block is removed.

    Raises OSError where it cannot be made, and where it could not take the place of `path`.
    """
    if path.is_dir() and not path.is_symlink():  # of the names, "" and "..", too
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    part = _part_of(path)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    try:
        os.close(os.open(part, flags, 0o666))  # the umask decides who may read it, as for any file
    except ValueError as error:  # a name with NUL or half of a character
        raise OSError(errno.EINVAL, str(error)) from error
    try:
        yield part
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # on a full disk its space is wanted


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` that takes its place at the end of the block, unless the block raises; then it is
    removed. `folder` may be there already, empty. Whoever may read new files of this user may read it."""
    folder = folder.absolute()  # "" and "." have no name
    part = folder.with_name(f".{folder.name[:60]}-{secrets.token_hex(4)}{PART}")
    os.mkdir(part)
    try:
        yield part
        with contextlib.suppress(OSError):
            folder.rmdir()
        os.rename(part, folder)
        flush_folder(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def place_file(original: Path, path: Path, *, link: bool = True) -> None:
    """Put a file, or what a link leads to, at another place at once: under a second name where `link` is wanted and the
    file system has such names, else as a copy."""
    original = original.resolve()
    if link:
        part = _part_of(path)
        try:
            os.link(original, part)
        except OSError:
            pass
        else:
            try:
                os.replace(part, path)
            finally:
                with contextlib.suppress(OSError):
                    part.unlink(missing_ok=True)  # it stays where both names are of the same file already
            return flush_folder(path.parent)
    with open(original, "rb") as old, whole_file(path) as new:
        shutil.copyfileobj(old, new)


def open_to_append(path: Path) -> TextIO:
    """A text file that gets lines at its end; where there is a link or a pipe of that name, OSError is raised."""
    flags = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    return open(path, "a", encoding="utf-8", opener=lambda name, mode: os.open(name, mode | flags, 0o666))


def refuse_links(folder: Path) -> None:
    """Raise ToCoError where a folder in `folder` is a link: what is written or removed there would be elsewhere."""
    inner = (Path(place, name) for place, names, _ in os.walk(folder) for name in names)
    if link := next(filter(Path.is_symlink, inner), None):
        raise ToCoError(f"{link} is a link to a folder: nothing is written or removed behind a link, remove the link")


def remove_parts(folder: Path, pattern: str = "*") -> None:
    """Remove what killed processes of this user left half-written; only for who holds the folder alone."""
    for part in folder.glob(pattern + PART):
        with contextlib.suppress(OSError):
            if hasattr(os, "getuid") and part.lstat().st_uid != os.getuid():
                continue  # another user has locks of their own, and may be writing it
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part, ignore_errors=True)
            else:
                part.unlink()


def flush_folder(folder: Path) -> None:
    """Let names reach the disk, too; Windows has no such call."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _part_of(path: Path) -> Path:
    return path.with_name(f"{path.stem[:40]}-{secrets.token_hex(4)}{PART}")
