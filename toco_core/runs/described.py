"""What a function of one's own computes, as a text that is the same in every process: functions of equal texts may be
taken for each other.

Followed are its source, its default values, what it closes over, the globals that it reads, what a partial function or
a method is bound to, and all that is one's own from there on: an edited helper or a changed constant gives another
text. What is installed is told by name, its objects by type; but arrays, networks and frozen dataclasses by value.
"""

import dataclasses
import dis
import enum
import functools
import hashlib
import inspect
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

PLAIN = (type(None), bool, int, float, complex, str, bytes, np.generic, enum.Enum, torch.dtype, torch.device, Path)
UNTOLD = ("__dict__", "__weakref__", "__doc__", "__module__", "__firstlineno__", "__static_attributes__")
"""Of a class: what says nothing about what it computes."""


def described(value: Any) -> str:
    """The text of a value, a function most often."""
    return "\n".join(_parts(value, {}))


def _parts(value: Any, seen: dict[int, tuple[int, Any]]) -> Iterator[str]:
    """`seen`: by id the number of everything told so far, and itself, so that its id is not given away."""
    if isinstance(value, PLAIN):
        yield repr(value)
        return
    if id(value) in seen:
        yield f"number {seen[id(value)][0]} again"
        return
    seen[id(value)] = len(seen), value
    if isinstance(value, (types.FunctionType, type)):
        yield _name(value)
        if _is_own(value):
            yield from _class(value, seen) if isinstance(value, type) else _function(value, seen)
    elif isinstance(value, (types.MethodType, functools.partial, property, staticmethod, classmethod)):
        yield from _parts([getattr(value, name, None) for name in ("__func__", "__self__", "func", "fget")], seen)
        yield from _parts([getattr(value, "args", ()), getattr(value, "keywords", {})], seen)
    elif isinstance(value, (torch.Tensor, np.ndarray)):
        yield f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(_bytes(value)).hexdigest()}"
    elif isinstance(value, torch.nn.Module):
        yield from _parts([type(value), dict(value.state_dict())], seen)
    elif isinstance(value, dict):
        yield from _parts(list(value.items()), seen)
    elif isinstance(value, (set, frozenset)):
        yield repr(sorted(map(described, value)))
    elif isinstance(value, (list, tuple)):
        yield f"{len(value)} values:"
        for item in value:
            yield from _parts(item, seen)
    elif isinstance(value, types.ModuleType):
        yield value.__name__
    elif hasattr(value, "__wrapped__"):  # by functools.cache, say
        yield from _parts(value.__wrapped__, seen)
    elif _is_own(type(value)) or dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen:
        slots = {name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())}
        given = {name: getattr(value, name, None) for name in sorted(slots)}
        yield from _parts([type(value), getattr(value, "__dict__", None), given], seen)
    else:
        yield _name(value if callable(value) and hasattr(value, "__name__") else type(value))


def _function(function: types.FunctionType, seen: dict) -> Iterator[str]:
    try:
        yield inspect.getsource(function)
    except (OSError, TypeError):
        yield from _code(function.__code__)
    yield from _parts([function.__defaults__, function.__kwdefaults__, getattr(function, "__wrapped__", None)], seen)
    for cell in function.__closure__ or ():
        try:
            yield from _parts(cell.cell_contents, seen)
        except ValueError:
            yield "a name without a value"
    for name in sorted(set(_globals(function.__code__)) & set(function.__globals__)):
        yield name
        yield from _parts(function.__globals__[name], seen)


def _class(kind: type, seen: dict) -> Iterator[str]:
    yield from _parts([kind.__bases__, {name: v for name, v in vars(kind).items() if name not in UNTOLD}], seen)


def _code(code: types.CodeType) -> Iterator[str]:
    """Byte code, where there is no source."""
    yield repr((code.co_code, code.co_names))
    for constant in code.co_consts:
        yield from _code(constant) if isinstance(constant, types.CodeType) else [repr(constant)]


def _globals(code: types.CodeType) -> Iterator[str]:
    """Names that are read from the module, by functions within, too."""
    yield from (found.argval for found in dis.get_instructions(code) if found.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _globals(constant)


def _bytes(array: torch.Tensor | np.ndarray) -> bytes:
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return repr(array.tolist()).encode() if array.dtype.hasobject else np.ascontiguousarray(array).tobytes()


def _is_own(value: types.FunctionType | type) -> bool:
    """Whether a function or a class comes neither from this package nor from an installed one."""
    module = value.__module__ or "builtins"
    if module == "builtins":  # a function without a module, of `exec`, claims to be
        return isinstance(value, types.FunctionType)
    root = module.partition(".")[0]
    if root == "toco_core" or root in sys.stdlib_module_names:
        return False
    file = Path(getattr(sys.modules.get(module), "__file__", None) or "")
    installed = {"site-packages", "dist-packages"} & set(file.parts)
    return not installed and not file.is_relative_to(sysconfig.get_path("stdlib"))


def _name(value: Any) -> str:
    module = getattr(value, "__module__", "")
    module = "__main__" if module == "__mp_main__" else module  # the script that runs, as a spawned process calls it
    return f"{module}.{getattr(value, '__qualname__', value.__name__)}"
