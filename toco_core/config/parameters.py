"""Parameters as text, from papermill and from a shell, that are checked.

papermill writes `-p name value` into a cell of its own behind the cell tagged `parameters` and only warns about names
that this cell does not have. So a notebook begins with

    parameters = Parameters(globals())     # before the parameters cell
    ...
    config = parameters.config()           # behind it
"""

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from toco_core.config import RECIPES, TrainConfig, changed_batch, configured, did_you_mean, field_sections, override
from toco_core.errors import ToCoError, refuse_other


class Parameters:
    """The names that a notebook gets between now and the call of `config` or `values`."""

    def __init__(self, namespace: dict[str, Any], *, own: tuple[str, ...] = ()):
        """`namespace` is `globals()`; `own` are parameters of the notebook that are no fields of a TrainConfig.

        Parameters that are there already, from a first run of the cells in the same kernel, are forgotten.
        """
        self.namespace, self.own = namespace, ("recipe", *own)
        for name in self._known():
            namespace.pop(name, None)
        self.before = set(namespace)

    def _known(self) -> list[str]:
        sections = field_sections()
        return [*(name for name in sections if name not in sections.values()), *self.own]

    def values(self) -> dict[str, Any]:
        """Name -> value. Raises ToCoError for a name that is no parameter, with the nearest one that is."""
        known, found = self._known(), {}
        for name, value in self.namespace.items():
            if name in self.before or name.startswith("_") or value is self:
                continue
            if name not in known:
                raise ToCoError(f"there is no parameter {name!r}{did_you_mean(name, known)}")
            found[name] = value
        return found

    def config(self) -> TrainConfig:
        """The recipe with the parameters that are not None.

        Where `steps` is named, the stages that are not keep their share of the schedule (`configured`). `recipe` "auto"
        is `tiny` for the embedded data set and `photographs` for a folder. Says so where the images per
        step are not the recipe's.
        """
        values = {k: v for k, v in self.values().items() if v is not None and (k == "recipe" or k not in self.own)}
        recipe = values.pop("recipe", "auto")
        if recipe == "auto":
            recipe = "tiny" if values.get("dataset", "scenes") == "scenes" else "photographs"
        refuse_other(("auto", *RECIPES), recipe=recipe)
        config = configured(RECIPES[recipe](), **values)
        if changed := changed_batch(config, RECIPES[recipe]()):
            print(changed)
        return config

    def changed(self, config: TrainConfig, **fields: str) -> TrainConfig:
        """A copy of the config whose fields have the values of own parameters: `label_beta_l="beta_l"` gives `beta_l`
        that of `label_beta_l`, None leaves it. A value that is refused is named by its parameter, not by its field."""
        values = {field: self.namespace[name] for name, field in fields.items() if self.namespace[name] is not None}
        try:
            return override(config, **values)
        except ToCoError as error:
            message = str(error)
            for name, field in fields.items():
                message = re.sub(rf"(?<!\w){re.escape(field)}(?= = )", name, message)
            raise ToCoError(message) from error


def named_values(texts: Iterable[str]) -> dict[str, Any]:
    """Read texts such as "layer=9": name -> `literal`. Raises ToCoError for what is no NAME=VALUE."""
    return {name: literal(value) for name, value in named_texts(texts).items()}


def named_texts(texts: Iterable[str]) -> dict[str, str]:
    """The same with the values as they are written."""
    parts = {text: text.partition("=") for text in texts}
    for text, (_, sign, _) in parts.items():
        if not sign:
            raise ToCoError(f"{text!r} is not allowed: NAME=VALUE is wanted")
    return {name: value for name, _, value in parts.values()}


def literal(text: str) -> Any:
    """Read a Python literal; a text that is none stands for itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def as_list(name: str, value: Any, kind: type = str) -> list:
    """A parameter that is a list: `-y "layers: [7, 10]"` gives one, `-p layers 7,10` a text with commas, `-p layers 7`
    a number. Raises ToCoError for an item that is not of `kind`, for one that is named twice, and for an empty list."""
    items = [item.strip() for item in value.split(",")] if isinstance(value, str) else value
    items = list(items) if isinstance(items, (list, tuple)) else [items]
    try:
        found = [kind(item) for item in items if item is not None]
    except (ArithmeticError, TypeError, ValueError):
        found = []
    cut = kind is int and any(isinstance(item, float) and item % 1 for item in items)  # 7.5 is no 7
    if not found or "" in found or cut or len(set(found)) < len(found):
        raise ToCoError(f"{name} = {value!r} is not allowed: a list of different {kind.__name__} values is wanted")
    return found


def questions(folder: Path | str) -> dict[str, str]:
    """Name -> the paragraph behind **Question.** in the first cell of every notebook of a folder, in order of names."""
    found = {}
    for path in sorted(Path(folder).glob("*.ipynb")):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        opening = "".join(cells[0]["source"]) if cells else ""
        asked = re.search(r"\*\*Question\.?\*\*\s*(.+)", opening)
        if asked:
            found[path.stem] = asked[1].strip()
    return found
