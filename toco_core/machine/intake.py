"""Read files from outside through one gate: kind, size and what a file claims are checked before memory is taken.

A file is opened without blocking, must be a regular file (no pipe, no device, no folder), and must not be larger than
the limit of its kind. Whatever is wrong becomes one ToCoError that names the file, the value and the limit.

The limits are `DEFAULTS`. The environment variable TOCO_LIMITS raises them by name, also in processes that are started:

    TOCO_LIMITS="image_bytes=2e9,image_pixels=5e8" toco check scans
    set_limits(image_pixels=500_000_000)                       # the same from Python
"""

import functools
import io
import json
import os
import stat
import zipfile
from pathlib import Path
from typing import Any

from toco_core.errors import ToCoError

VARIABLE = "TOCO_LIMITS"
DEFAULTS = {
    "image_bytes": 2**29,  # a BMP of `image_pixels` in colour is smaller
    "image_pixels": 2**27,  # 134 million: a larger image is taken for a decompression bomb
    "image_side": 65_500,  # what JPEG holds
    "jpeg_scans": 100,  # a progressive JPEG has about ten; each costs as much as a whole decoding
    "scanned_pixels": 2**32,  # scans times pixels
    "mat_bytes": 2**24,  # of a MATLAB file, packed and unpacked
    "npy_bytes": 2**30,
    "text_bytes": 2**24,  # lists of names, of classes, of tags; one annotation in XML
    "json_bytes": 2**26,  # tags, configs, records, logs
    "annotation_bytes": 2**30,  # COCO's JSON; that of 2017 has 450 MB
    "outline_pixels": 2**23,  # length of all outlines of one image
    "painted_pixels": 2**31,  # area of all objects of one image
    "counts_bytes": 2**28,  # what a kept evaluation unpacks for one image
    "checkpoint_bytes": 2**35,
    "archive_bytes": 2**33,
    "archive_list_bytes": 2**24,  # the list of files at an archive's end: a hundred for each
    "pickle_bytes": 2**24,  # names and shapes of a checkpoint's tensors
    "folder_entries": 5_000_000,
}


def limit(name: str) -> int:
    """Return a limit, as TOCO_LIMITS or `DEFAULTS` has it. Raises ToCoError for a variable that is not understood."""
    return _raised(os.environ.get(VARIABLE, "")).get(name, DEFAULTS[name])


def set_limits(**limits: int) -> None:
    """Raise (or lower) limits by name, here and in processes started from now on. Raises ToCoError for others."""
    words = [word for word in os.environ.get(VARIABLE, "").split(",") if word.partition("=")[0].strip() not in limits]
    words = [word for word in words if word.strip()] + [f"{name}={value}" for name, value in limits.items()]
    _raised(",".join(words))
    os.environ[VARIABLE] = ",".join(words)


@functools.lru_cache(8)
def _raised(text: str) -> dict[str, int]:
    found = {}
    for word in filter(str.strip, text.split(",")):
        name, _, value = (part.strip() for part in word.partition("="))
        if name not in DEFAULTS:
            raise ToCoError(f"{VARIABLE} names {name!r}: known are {', '.join(DEFAULTS)}")
        try:
            found[name] = int(float(value))
        except (ValueError, OverflowError):
            found[name] = 0
        if found[name] < 1:
            raise ToCoError(f"{VARIABLE}: {name} = {value!r} is not allowed: a number of at least 1 is wanted")
    return found


def refuse_above(name: str, value: int, where: Path | str, unit: str) -> None:
    """Raise ToCoError that says how to raise the limit, where `value` is above it."""
    if value > limit(name):
        raise ToCoError(
            f"{where} has {value} {unit}: at most {limit(name)} are read "
            f"(to raise this limit: {VARIABLE}={name}={value})"
        )


def real_path(path: Path | str) -> Path:
    """A path without links. One that leads to itself stays: whoever opens it is told."""
    return Path(os.path.realpath(path))


def open_file(path: Path | str, limit_name: str) -> io.BufferedReader:
    """Open a regular file of at most that size, for reading. Raises ToCoError, naming the file, for all others."""
    try:
        _refuse_other_kinds(path, os.stat(path))  # before it is opened: opening some devices does something
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        handle = os.open(path, flags)
        try:
            facts = os.fstat(handle)
            _refuse_other_kinds(path, facts)
            refuse_above(limit_name, facts.st_size, path, "bytes")
            return os.fdopen(handle, "rb")
        except BaseException:
            os.close(handle)
            raise
    except OSError as error:
        raise ToCoError(f"{path} cannot be read: {error.strerror or error}") from error
    except ToCoError:
        raise
    except ValueError as error:  # a name with NUL
        raise ToCoError(f"{str(path)!r} cannot be read: {error}") from error


def _refuse_other_kinds(path: Path | str, facts: os.stat_result) -> None:
    if stat.S_ISREG(facts.st_mode):
        return
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(facts.st_mode), "a device")
    raise ToCoError(f"{path} cannot be read: it is {kind}, a file is wanted")


def read_bytes(path: Path | str, limit_name: str) -> bytes:
    """Return all of a file. Raises ToCoError, naming the file, as `open_file` and where it grows or does not fit."""
    try:
        with open_file(path, limit_name) as file:
            data = file.read(os.fstat(file.fileno()).st_size)
            while block := file.read(2**20):  # of a file that grows, or that does not say its size
                data += block
                refuse_above(limit_name, len(data), path, "bytes or more")
            return data
    except OSError as error:
        raise ToCoError(f"{path} cannot be read: {error.strerror or error}") from error
    except MemoryError as error:
        raise ToCoError(f"{path} does not fit into the memory") from error


def open_archive(path: Path | str, file: io.BufferedIOBase) -> zipfile.ZipFile:
    """A ZIP archive in an open file, whose list of files is of a size that can be held.

    Raises ToCoError, naming the file, for a longer list, and zipfile.BadZipFile for what is no archive.
    """
    try:
        end = zipfile._EndRecData(file)  # as ZipFile finds it, which then reads the whole list
    except (OSError, ValueError) as error:
        raise zipfile.BadZipFile(str(error)) from error
    if not end:
        raise zipfile.BadZipFile("it is no ZIP archive")
    refuse_above("archive_list_bytes", end[zipfile._ECD_SIZE], f"{path}: its list of files", "bytes")
    try:
        return zipfile.ZipFile(file)
    except (NotImplementedError, ValueError) as error:  # an entry of a later ZIP version; a name that is no text
        raise zipfile.BadZipFile(str(error)) from error


def read_text(path: Path | str, what: str, limit_name: str = "text_bytes") -> str:
    """Return a UTF-8 text, with or without a mark at its beginning; `what` says in the message what it should be."""
    data = read_bytes(path, limit_name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ToCoError(f"{path} cannot be read as {what}: {error}") from error


def read_json(path: Path | str, limit_name: str = "json_bytes") -> Any:
    """Return what a JSON file holds. Raises ToCoError, naming the file, for what is no JSON."""
    data = read_bytes(path, limit_name)
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ToCoError(f"{path} is not valid JSON: {error}") from error
    except MemoryError as error:
        raise ToCoError(f"{path} does not fit into the memory") from error
