"""Terms and refiners of one's own in a run's name: a config does not hold them, so a digest of what is one's own in
them does."""

import hashlib
from collections.abc import Mapping

from toco_core.config import TrainConfig
from toco_core.errors import ToCoError, refuse_other
from toco_core.objective import PAPER, TERMS, Step, Term
from toco_core.refiners import REFINERS
from toco_core.runs.described import described

RESERVED = ("step", "total", "skipped")  # in a run's records


def check_terms(terms: Mapping[str, Term], config: TrainConfig) -> None:
    """Raise ToCoError for a term that cannot be trained with, and for a refiner of labels that is not there."""
    refuse_other(REFINERS, refiner=config.labels.refiner, token_refiner=config.labels.token_refiner)
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


def own_terms(terms: Mapping[str, Term], config: TrainConfig) -> dict[str, str]:
    """Name -> digest of every term that is not the package's, and "absent" for those of the package that are left out
    though they are the paper's or have a weight in `config`; "refiner <name>" -> digest of one that `config` names and
    that is not the package's: what a run's config does not say."""
    found = {name: _digest(term) for name, term in terms.items() if TERMS.get(name) != term}
    out = [name for name in TERMS if name not in terms]
    found |= {name: "absent" for name in out if name in PAPER or TERMS[name].schedule(name, config)[0] > 0}
    rows = {name: REFINERS.get(name) for name in (config.labels.refiner, config.labels.token_refiner)}
    own = {name: row for name, row in rows.items() if row is not None and not _of_package(row)}
    return found | {f"refiner {name}": _digits(described(row)) for name, row in own.items()}


def variant(terms: Mapping[str, Term], config: TrainConfig) -> str:
    """What terms and refiners add to a run's name: "" for the package's, else ten digits of `own_terms`."""
    found = own_terms(terms, config)
    return _digits(repr(sorted(found.items()))) if found else ""


def _digest(term: Term) -> str:
    """Of weight and start, and of all that is one's own in its functions: see `described`."""
    parts = [described(part) for part in (term.loss, term.label, term.count)]
    return _digits(repr((term.weight, term.start, parts)))


def _of_package(refiner: object) -> bool:
    return isinstance(refiner, type) and refiner.__module__.partition(".")[0] == "toco_core"


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:10]
