"""The fields of a config as a help text, from where they are declared."""

import dataclasses
import textwrap
import typing
from typing import Any

from toco_core.config import TrainConfig
from toco_core.config.fields import is_config, limits


def field_help(config: TrainConfig, *, width: int = 100) -> str:
    """List every field, section by section: name, type, the config's value, allowed values, and what it means."""
    lines = ["fields, with the values of the recipe that is named before --help (else the defaults):"]
    for section in dataclasses.fields(config):
        if is_config(section.type):
            lines += ["", f"{section.name}: {section.metadata['help']}"]
            values = getattr(config, section.name)
            for field in dataclasses.fields(values):
                lines += _entry(field, getattr(values, field.name), width)
    lines += ["", "the experiment:"]
    for field in dataclasses.fields(config):
        if not is_config(field.type):
            lines += _entry(field, getattr(config, field.name), width)
    return "\n".join(lines)


def type_name(kind: Any) -> str:
    """Name a field's type as one writes it: `int`, `tuple[float, ...]`, `str | None`."""
    parts = typing.get_args(kind)
    if type(None) in parts:
        return " | ".join(type_name(part) for part in parts if part is not type(None)) + " | None"
    if typing.get_origin(kind) is tuple:
        return f"tuple[{type_name(parts[0])}, ...]"
    return kind.__name__


def _entry(field: dataclasses.Field, value: Any, width: int) -> list[str]:
    allowed = limits(field.metadata["allowed"])
    head = f"  {field.name}={value!r}  [{type_name(field.type)}{'; ' + allowed if allowed else ''}]"
    said = textwrap.wrap(field.metadata["help"], width, break_on_hyphens=False, break_long_words=False)
    return [head, *(f"      {line}" for line in said)]
