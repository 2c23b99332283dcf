"""Fields that say what they mean and what they allow, and records that refuse everything else."""

import dataclasses
import difflib
import numbers
import os
import sys
import typing
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from toco_core.errors import ToCoError

LARGEST = 10**9


def option(
    default: Any,
    help: str,
    *,
    at_least=None,
    above=None,
    at_most=None,
    below=None,
    one_of=None,
    length=None,
    added_later: bool = False,
):
    """A field with its help text and the values that it allows (bounds also hold for each item of a tuple).

    A whole number has an upper bound, `LARGEST` unless `at_most` says otherwise: a config may come from a stranger.

    `added_later`: configs without this field name runs already. At its default it is left out of `short_hash`, so that
    a newer version of the package finds the runs of an older one.
    """
    if type(default) is int and at_most is None:
        at_most = LARGEST
    allowed = {
        "at_least": at_least,
        "above": above,
        "at_most": at_most,
        "below": below,
        "one_of": one_of,
        "length": length,
    }
    allowed = {name: limit for name, limit in allowed.items() if limit is not None}
    facts = {"help": " ".join(help.split()), "allowed": allowed, "added_later": added_later}
    return field(default=default, metadata=facts)


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all records share: conversion, refusal of wrong values, dictionaries."""

    __no_type_check__ = (
        True  # jaxtyping's import hook leaves __init__ alone: wrong values get a ToCoError, lists become tuples
    )

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value = _converted(f, getattr(self, f.name))
            _check_bounds(f, value)
            object.__setattr__(self, f.name, value)
        self.check()

    def check(self):
        """Conditions between fields."""

    def to_dict(self) -> dict:
        """Plain dictionaries, lists, numbers and strings: what JSON can hold."""
        return {f.name: _plain(getattr(self, f.name)) for f in dataclasses.fields(self)}

    def without_later_defaults(self) -> dict:
        """`to_dict` without the fields that were added later and are at their defaults."""
        plain = self.to_dict()
        for f in dataclasses.fields(self):
            if f.metadata["added_later"] and getattr(self, f.name) == f.default:
                del plain[f.name]
        return plain

    @classmethod
    def from_dict(cls, values: Any):
        """The inverse of `to_dict`. A missing field takes its default; an unknown one is refused, with the nearest
        name."""
        if not isinstance(values, dict):
            raise ToCoError(f"{cls.__name__} = {values!r:.60} is not allowed: a mapping of its fields")
        known = {f.name: f for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise ToCoError(f"{cls.__name__} has no field {name!r}{did_you_mean(name, known)}")
        kinds = {name: f.type for name, f in known.items()}
        nested = {
            name: kind.from_dict(value)
            for name, value in values.items()
            if is_config(kind := kinds[name]) and isinstance(value, dict)
        }
        return cls(**values | nested)

    @classmethod
    def help(cls) -> dict[str, str]:
        """Field name -> what it means."""
        return {f.name: f.metadata["help"] for f in dataclasses.fields(cls)}


def did_you_mean(name: str, known, otherwise: str | None = None) -> str:
    """': did you mean ...?' with the nearest known names; where none is near, `otherwise` or the list of all."""
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.6)
    if near:
        return f": did you mean {' or '.join(near)}?"
    return f": known are {', '.join(sorted(known))}" if otherwise is None else otherwise


def is_config(kind: Any) -> TypeGuard[type[Config]]:
    return isinstance(kind, type) and issubclass(kind, Config)


def _plain(value):
    if isinstance(value, Config):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value


def _converted(f, value):
    """The value in the type of its field, or an error that says which type is wanted."""
    kinds = typing.get_args(f.type) if type(None) in typing.get_args(f.type) else (f.type,)
    empty = value is None or (isinstance(value, (str, tuple, list)) and len(value) == 0)
    if type(None) in kinds and empty:
        return None
    kind = kinds[0]
    if typing.get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)) or not value:
            raise ToCoError(f"{f.name} = {value!r} is not allowed: a tuple of numbers is wanted")
        return tuple(_scalar(f.name, typing.get_args(kind)[0], v) for v in value)
    return _scalar(f.name, kind, value)


def _scalar(name, kind, value):
    if kind is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if kind is float and _is_finite(value):
        return float(value)
    if kind is str and isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    if (kind is bool or is_config(kind)) and isinstance(value, kind):
        return value
    wanted = {int: "a whole number", float: "a finite number", str: "a text", bool: "True or False"}.get(
        kind, f"a {kind.__name__}"
    )
    raise ToCoError(f"{name} = {value!r} is not allowed: {wanted} is wanted")


def _is_finite(value) -> bool:
    """Whether it is a number that a float can hold; a whole number may be too large for one."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return real and abs(value) <= sys.float_info.max  # ty: ignore[unsupported-operator]


def _check_bounds(f, value):
    allowed = f.metadata.get("allowed")
    if value is None or not allowed:
        return
    items = value if isinstance(value, tuple) else (value,)
    bad = "length" in allowed and len(items) != allowed["length"]
    for item in items:
        bad |= "one_of" in allowed and item not in allowed["one_of"]
        bad |= "at_least" in allowed and not item >= allowed["at_least"]
        bad |= "above" in allowed and not item > allowed["above"]
        bad |= "at_most" in allowed and not item <= allowed["at_most"]
        bad |= "below" in allowed and not item < allowed["below"]
    if bad:
        raise ToCoError(f"{f.name} = {value!r} is not allowed: {limits(allowed)}")


def limits(allowed: dict[str, Any]) -> str:
    """Put what a field allows into words; "" where it allows everything of its type."""
    words = []
    if "length" in allowed:
        words.append(f"{allowed['length']} numbers")
    if "one_of" in allowed:
        words.append("one of " + ", ".join(str(word) or "''" for word in allowed["one_of"]))
    words += [f"{k.replace('_', ' ')} {allowed[k]}" for k in ("at_least", "above", "at_most", "below") if k in allowed]
    return ", ".join(words)
