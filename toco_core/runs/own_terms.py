"""Terms of one's own in a run's name: a config does not hold them, so a digest of their source does."""

import hashlib
import inspect
from collections.abc import Mapping

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError
from toco_core.objective import PAPER, TERMS, Step, Term

RESERVED = ("step", "total", "skipped")  # in a run's records


def check_terms(terms: Mapping[str, Term], config: TrainConfig) -> None:
    """Raise ToCoError for a term that cannot be trained with."""
    for name, term in terms.items():
        if not str(name).isidentifier() or name in RESERVED:
            raise ToCoError(f"a term cannot be called {name!r}: a name of letters, not one of {', '.join(RESERVED)}")
        if not isinstance(term, Term) or not callable(term.loss):
            raise ToCoError(f"the term {name!r} is {term!r:.60}: Term(function of a step, ...) is wanted")
        if isinstance(term.label, str) and not hasattr(Step, term.label):
            raise ToCoError(f"the term {name!r} learns from {term.label!r}: it is no property of Step")
        weight, start = term.schedule(name, config)
        if not 0 <= weight < float("inf") or start < 0:
            raise ToCoError(f"the term {name!r} has weight {weight} from step {start}: allowed are numbers from 0 on")


def own_terms(terms: Mapping[str, Term]) -> dict[str, str]:
    """Name -> digest of the source, weight and start of every term that is not the package's, and "absent" for those of
    the package that are left out: what a run's config does not say."""
    found = {name: _digest(term) for name, term in terms.items() if TERMS.get(name) != term}
    return found | {name: "absent" for name in PAPER if name not in terms}


def variant(terms: Mapping[str, Term]) -> str:
    """What the terms add to a run's name: "" for the package's, else ten digits of `own_terms`."""
    found = own_terms(terms)
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()[:10] if found else ""


def _digest(term: Term) -> str:
    """Of the functions' source (their byte code, where there is none), defaults, and plain values around them."""
    digest = hashlib.sha256(repr((term.weight, term.start)).encode())
    for part in (term.loss, term.label, term.count):
        digest.update(_text(part).encode())
    return digest.hexdigest()[:10]


def _text(part: object) -> str:
    if part is None or isinstance(part, str):
        return repr(part)
    function = inspect.unwrap(getattr(part, "func", part))  # of functools.partial, too
    given = [getattr(part, "args", ()), sorted(getattr(part, "keywords", {}).items())]
    try:
        source = inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        source = repr((code.co_code, code.co_consts, code.co_names)) if code else repr(type(function))
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    given += [getattr(function, "__defaults__", None), cells]
    return source + repr(
        [value if isinstance(value, (bool, int, float, str)) else type(value) for value in _flat(given)]
    )


def _flat(value):
    if isinstance(value, (tuple, list)):
        for item in value:
            yield from _flat(item)
    else:
        yield value
