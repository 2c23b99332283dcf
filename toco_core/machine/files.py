"""Files of tensors from strangers: nothing in them is executed, and they take no more memory than their size says.

What a file of `torch.save` describes is read twice. First with stand-ins for everything that it may name, by an
unpickler that takes no memory for sizes that are only claimed: unknown names, tensors larger than their storage and
storages larger than the file are refused here. Only then torch reads it, restricted to tensors and plain values.
"""

import contextlib
import io
import math
import pathlib
import pickle
import tarfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from toco_core.errors import ToCoError
from toco_core.machine.intake import limit, open_archive, open_file, refuse_above

MAX_DEPTH = 100
LEGACY = 0x1950A86A20F9469CFC6C  # the number with which files of old versions of torch begin
REFUSED = (
    *(pickle.BYTEARRAY8, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER, pickle.EXT1, pickle.EXT2, pickle.EXT4),
    *(pickle.PERSID, pickle.INST, pickle.OBJ, pickle.NEWOBJ, pickle.NEWOBJ_EX, pickle.STACK_GLOBAL),
)  # what torch does not write for tensors and plain values
SIZES = {
    f"{name}Storage": size
    for size, names in ((1, "Byte Char Bool"), (2, "Half BFloat16 Short"), (4, "Float Int"), (8, "Double Long"))
    for name in names.split()
} | {"ComplexFloatStorage": 8, "ComplexDoubleStorage": 16}


def load_tensors(path: Path | str) -> Any:
    """What `torch.save` or safetensors wrote: tensors and plain values, on the CPU.

    Raises ToCoError for a file that is none or beyond a limit, and ValueError, or whatever torch raises, for one that
    is damaged, that holds more than that, or whose content is larger than the file: packed, or a tensor that repeats
    its numbers.
    """
    path = Path(path)
    with open_file(path, "checkpoint_bytes") as file:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        if file.read(4) == b"PK\x03\x04":
            _inspect_archive(path, file)
        else:
            _inspect_legacy(file)
    content = torch.load(path, map_location="cpu", weights_only=True)
    _refuse_repeated(content)
    return content


class _Storage(NamedTuple):
    """The numbers that tensors are views of, as a file claims them."""

    key: str
    n_bytes: int
    item: int


class _Tensor(NamedTuple):
    """The place of a tensor."""

    shape: tuple[int, ...]


class _Kind(NamedTuple):
    """A type of numbers; calling it would take memory."""

    item: int


def _tensor(storage: _Storage, offset: int, shape: tuple, stride: tuple, *_: Any) -> _Tensor:
    numbers = (offset, *shape, *stride)
    if type(storage) is not _Storage or not all(type(n) is int and n >= 0 for n in numbers) or len(shape) > 25:
        raise ValueError("a tensor of no known form")
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if math.prod(shape) and max(last + 1, math.prod(shape)) * storage.item > storage.n_bytes:
        raise ValueError("a tensor claims more numbers than the file holds")
    return _Tensor(shape)


def _parameter(tensor: _Tensor, *_: Any) -> _Tensor:
    return tensor


def _dictionary(*parts: Any) -> OrderedDict:
    if parts:
        raise ValueError("a dictionary of no known form")
    return OrderedDict()


def _size(numbers: tuple = ()) -> tuple:
    return tuple(numbers)


def _set(values: list = []) -> set:  # noqa: B006  not changed
    return set(values)


class _Inspector(pickle._Unpickler):
    """The unpickler that is written in Python: the other one takes memory for whatever size a file claims."""

    KNOWN = {
        ("collections", "OrderedDict"): _dictionary,
        ("torch._utils", "_rebuild_tensor_v2"): _tensor,
        ("torch._utils", "_rebuild_tensor"): _tensor,
        ("torch._utils", "_rebuild_parameter"): _parameter,
        ("torch", "Size"): _size,
        ("__builtin__", "set"): _set,
        ("builtins", "set"): _set,
    } | {("torch", name): _Kind(size) for name, size in SIZES.items()}
    dispatch = {code: f for code, f in pickle._Unpickler.dispatch.items() if bytes([code]) not in REFUSED}

    def __init__(self, file: io.BufferedIOBase):
        super().__init__(file, encoding="utf-8")
        self.storages: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.KNOWN:
            return self.KNOWN[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise ValueError(f"it would load {module}.{name}")

    def load_build(self) -> None:
        """Attributes of a dictionary, which nobody asks for; nothing else has any."""
        state = self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict or type(state) is not dict:
            raise ValueError("an object of no known form")

    dispatch[pickle.BUILD[0]] = load_build

    def persistent_load(self, claim: Any) -> _Storage:
        kind, storage, key, _, n = claim[:5]
        if kind != "storage" or type(storage) is not _Kind or type(key) is not str or type(n) is not int or n < 0:
            raise ValueError("a storage of no known form")
        if len(claim) > 5 and claim[5] is not None:  # a view, in files of old versions
            raise ValueError("a storage within a storage")
        if self.storages.setdefault(key, n * storage.item) != n * storage.item:
            raise ValueError("a storage of two sizes")
        return _Storage(key, n * storage.item, storage.item)


def _inspect_archive(path: Path, file: io.BufferedReader) -> None:
    size = file.seek(0, io.SEEK_END)
    with open_archive(path, file) as archive:
        listed = archive.infolist()
        parts = {part.filename.lower(): part for part in listed}  # torch finds them whatever their case
        if sum(part.file_size for part in listed) > size or len(parts) < len(listed):
            raise ValueError("its parts are larger than the file, or one comes twice")
        folder = listed[0].filename.lower().partition("/")[0] + "/"
        described = parts.get(f"{folder}data.pkl")
        if described is None:
            raise ValueError("it has no description of its tensors")
        refuse_above("pickle_bytes", described.file_size, "the description of its tensors", "bytes")
        inspector = _Inspector(io.BytesIO(archive.read(described)))
        inspector.load()
        for key, n_bytes in inspector.storages.items():
            stored = parts.get(f"{folder}data/{key}".lower())
            if stored is None or stored.file_size < n_bytes:
                raise ValueError("a storage claims more numbers than the file holds")


def _inspect_legacy(file: io.BufferedReader) -> None:
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = io.BytesIO(file.read(min(size, limit("pickle_bytes"))))
    with contextlib.suppress(tarfile.HeaderError):
        tarfile.TarInfo.frombuf(start.getvalue()[:512], "utf-8", "surrogateescape")
        raise ValueError("it is an archive of a form that torch has long left")
    if _Inspector(start).load() != LEGACY:
        raise ValueError("it does not begin as a file of torch")
    _Inspector(start).load()
    _Inspector(start).load()
    content = _Inspector(start)
    content.load()
    if sum(content.storages.values()) > size:
        raise ValueError("its storages are larger than the file")


def _refuse_repeated(content: Any) -> None:
    for value in values_of(content):
        if isinstance(value, Tensor):
            plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
            if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor claims more numbers than the file holds")


def values_of(content: Any) -> Iterator[Any]:
    """Everything in a nested content, containers too, each once. Raises ValueError where it goes too deep."""
    seen, left = set(), [(content, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        yield value
        if isinstance(value, (dict, list, tuple, set)) and id(value) not in seen:
            seen.add(id(value))
            parts = [*value.keys(), *value.values()] if isinstance(value, dict) else value
            left += [(part, depth + 1) for part in parts]


def read_tensors(path: str | pathlib.Path, what: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors or torch file by name; nothing in the file is executed. `what` names the parameter
    in errors."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise ToCoError(f"{what} = {str(path)!r} is not a file")
    try:
        content = load_tensors(path)
    except ToCoError:
        raise
    except Exception as error:
        raise ToCoError(
            f"{what} = {str(path)!r} cannot be read ({type(error).__name__}): "
            "it is damaged, or it holds more than tensors, which is refused because reading it would run code"
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not content or not are_tensors(content):
        raise ToCoError(f"{what} = {str(path)!r} holds no dictionary of tensors")
    return {key.removeprefix("module."): value for key, value in content.items()}


def are_tensors(content: object) -> bool:
    """Whether it is a dictionary of tensors by name."""
    return isinstance(content, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())


def refuse_wrong_keys(what: str, found: Any, wanted: dict) -> None:
    """An error in words where the names or the shapes of tensors differ from what is wanted."""
    if not are_tensors(found):
        raise ToCoError(f"{what}: it holds no tensors by name")
    missing = [k for k in wanted if k not in found]
    unexpected = [k for k in found if k not in wanted]
    misshapen = [
        f"{k} is {_shape_text(found[k])} and not {_shape_text(wanted[k])}"
        for k in found
        if k in wanted and found[k].shape != wanted[k].shape
    ]
    kinds = [
        f"{k} holds {found[k].dtype} and not {wanted[k].dtype}".replace("torch.", "")
        for k in found
        if k in wanted and found[k].dtype.is_floating_point != wanted[k].dtype.is_floating_point
    ]
    words = [
        f"{len(keys)} {word}{'' if len(keys) == 1 else 's'} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
        for keys, word in (
            (missing, "missing tensor"),
            (unexpected, "unexpected tensor"),
            (misshapen, "tensor of another shape"),
            (kinds, "tensor of other numbers"),
        )
        if keys
    ]
    if words:
        text = f"{what}: {'; '.join(words)}".replace("tensor of another shapes", "tensors of another shape")
        raise ToCoError(text.replace("tensor of other numberss", "tensors of other numbers"))


def _shape_text(tensor: Tensor) -> str:
    return " x ".join(map(str, tensor.shape))
