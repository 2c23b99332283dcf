"""Image labels from an `.npy` file: an N K array, or the pickled mapping name -> row that this field passes around.

Of a pickle nothing is executed: the few names that NumPy writes stand for plain functions here, everything else is
refused, and only bytes that are in the file become arrays. So a file from a stranger can be wrong, but neither run code
nor take more memory than a few times its size.
"""

import io
import math
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from toco_core.errors import ToCoError
from toco_core.machine.intake import read_bytes

REFUSED = (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.BINPERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX),
)  # what no file of labels needs, and what takes memory for sizes that are only claimed


def read_npy_labels(path: Path) -> Mapping[str, Any] | np.ndarray:
    """The mapping or the array. Raises ToCoError, naming the file."""
    try:
        file = io.BytesIO(read_bytes(path, "npy_bytes"))
        shape, by_column, dtype = _header(file)
        if dtype.hasobject:
            content = _plain(_ArrayUnpickler(file).load())
        else:
            content = _array(file.read(), dtype, shape, by_column)
    except ToCoError:
        raise
    except Exception as error:  # a damaged pickle raises almost any type
        raise ToCoError(f"labels {path} is not a NumPy file of image labels: {error}") from error
    if not isinstance(content, Mapping) and not (isinstance(content, np.ndarray) and content.ndim == 2):
        raise ToCoError(f"labels {path} holds a {type(content).__name__}: a mapping name -> labels or N K is needed")
    return content


def plain_array(data: bytes) -> np.ndarray:
    """The array of an `.npy` file's bytes. Raises ValueError, or what NumPy raises, for one that is damaged, holds
    objects, or claims more numbers than there are bytes."""
    file = io.BytesIO(data)
    shape, by_column, dtype = _header(file)
    return _array(file.read(), dtype, shape, by_column)


def _header(file: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(file)


def _array(data: bytes, dtype: np.dtype, shape: tuple[int, ...], by_column: bool) -> np.ndarray:
    if dtype.names or not re.fullmatch("[biufSU]", dtype.kind) or dtype.itemsize > 4096:
        raise ValueError(f"an array of {dtype}")
    if math.prod(shape) * dtype.itemsize > len(data):
        raise ValueError(f"{len(data)} bytes for an array of {shape}")
    flat = np.frombuffer(data, dtype, math.prod(shape))
    return flat.reshape(shape, order="F" if by_column else "C").copy()


class _DType:
    """What a pickle says of an array's type."""

    def __init__(self, name: Any, align: Any = False, copy: Any = True):
        if not isinstance(name, str) or not re.fullmatch(r"[biuf]\d{1,2}|[SU]\d{1,4}|O\d?", name):
            raise ValueError(f"an array of {name!r:.40}")
        self.name, self.order = name, "="

    def __setstate__(self, state: tuple) -> None:
        if state[1] in ("<", ">"):
            self.order = state[1]

    @property
    def is_object(self) -> bool:
        return self.name.startswith("O")

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.order + self.name)


class _Array:
    """What a pickle says of an array; `value` is the array, or the list of its objects, or its only one."""

    value: Any = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, by_column, data = state
        if dtype.is_object:
            self.value = list(data) if shape else data[0]
        else:
            data = data.encode("latin1") if isinstance(data, str) else data  # as Python 2 wrote it
            self.value = _array(data, dtype.dtype, shape, by_column)


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    return _Array()


def _scalar(dtype: _DType, data: bytes) -> Any:
    return _array(data, dtype.dtype, (1,), False)[0]


def _encode(text: str, code: str = "latin1") -> bytes:
    return text.encode("latin1")


def _plain(content: Any) -> Any:
    """Arrays in the place of their descriptions, in a mapping and its entries and no deeper."""
    content = content.value if isinstance(content, _Array) else content
    if not isinstance(content, Mapping):
        return content
    found = {}
    for name, entry in content.items():
        entry = entry.value if isinstance(entry, _Array) else entry
        flat = isinstance(entry, (list, tuple, set)) and all(
            isinstance(v, (str, int, float, np.generic)) for v in entry
        )
        if not flat and not isinstance(entry, np.ndarray):
            raise ValueError(f"{name!r:.40} has no row of labels")
        found[name] = entry
    return found


class _ArrayUnpickler(pickle._Unpickler):
    """The unpickler that is written in Python: the other one takes memory for whatever size a file claims."""

    KNOWN = {("numpy", "ndarray"): _Array, ("numpy", "dtype"): _DType, ("_codecs", "encode"): _encode} | {
        (f"{package}.multiarray", name): function
        for package in ("numpy.core", "numpy._core")
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    }
    dispatch = {code: f for code, f in pickle._Unpickler.dispatch.items() if bytes([code]) not in REFUSED}

    def load_build(self) -> None:
        """The state of an array or of its type; functions have none to be changed."""
        state = self.stack.pop()
        if type(self.stack[-1]) not in (_Array, _DType):
            raise ValueError("an object of no known form")
        self.stack[-1].__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def find_class(self, module: str, name: str):
        if (module, name) not in self.KNOWN:
            raise ToCoError(f"refused: it would load {module}.{name}")
        return self.KNOWN[module, name]
