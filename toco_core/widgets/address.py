"""The part of an address behind its question mark, as parameters of the explorer.

http://localhost:8866/?model=full&dataset=scenes&image=12&show=seed+label&beta_h=0.5
"""

from dataclasses import fields
from typing import Any
from urllib.parse import parse_qsl

from toco_core.config import did_you_mean
from toco_core.errors import ToCoError
from toco_core.widgets.session import RESTORED
from toco_core.widgets.settings import Settings

OWN = ("model", "dataset")
LONGEST = 4000  # characters
WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def address_parameters(query: str) -> dict[str, Any]:
    """Name -> value, of the type that the parameter has.

    Raises ToCoError for a name that is no parameter, a value of another type, and an address that is too long.
    """
    if len(query) > LONGEST:
        raise ToCoError(f"the address has {len(query)} characters behind its question mark: at most {LONGEST}")
    kinds: dict[str, type] = {field.name: type(field.default) for field in fields(Settings)} | {"linked": bool}
    known, found = (*OWN, *RESTORED, *kinds), {}
    for name, text in parse_qsl(query, keep_blank_values=False):
        if name not in known:
            raise ToCoError(f"the address names {name!r:.60}: there is no such parameter{did_you_mean(name, known)}")
        found[name] = _value(name, text, kinds.get(name, str))
    return found


def _value(name: str, text: str, kind: type) -> Any:
    try:
        if kind is bool:
            return WORDS[text.lower()]
        return kind(text) if kind in (int, float) else text  # tuples are read by `changed`
    except (KeyError, ValueError):
        raise ToCoError(f"{name} = {text!r:.60} of the address is not allowed: {kind.__name__} is wanted") from None
