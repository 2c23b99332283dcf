"""Runs side by side: which fields of their configs differ, which facts about machine and versions, which classes."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from toco_core.config import TrainConfig
from toco_core.data import TrainVal
from toco_core.errors import ToCoError
from toco_core.runs.folder import Run
from toco_core.runs.shipped import named_run

MISSING = "-"
PLACES = ("dataset", "weights")  # fields that may be written in several ways; what is there is compared


def found_runs(folder: Path | str) -> list[Run]:
    """The runs in a folder, finished or not, by name; none where there is no such folder."""
    return [Run(path.parent) for path in sorted(Path(folder).glob("*/config.json"))]


def open_folders(folders: Iterable[Path | str]) -> list[Run]:
    """The runs in these folders, or shipped runs by name. Raises ToCoError for a folder that holds no run, or for one
    named twice."""
    runs = [named_run(folder) for folder in folders]
    seen = set()
    for run in runs:
        run.config()  # says what is missing
        if run.folder.resolve() in seen:
            raise ToCoError(f"{run.folder} is named twice: each run once is allowed")
        seen.add(run.folder.resolve())
    return runs


def config_differences(configs: Mapping[str, TrainConfig]) -> dict[str, dict[str, Any]]:
    """Field -> run -> value, for every field in which the runs' configs differ. `out_dir` does not count: where a run
    is written is no part of the experiment."""
    found = _differences({name: _flat(config.to_dict()) for name, config in configs.items()})
    return {field.rpartition(".")[2]: values for field, values in found.items() if field != "out_dir"}


def refuse_other_run(run: Run, config: TrainConfig, data: TrainVal) -> None:
    """Raise ToCoError where a run that was found by a config is not its: trained on other data or weights (see
    `Run.refuse_other_data`), or with other values in its config.json (see `refuse_edited`)."""
    refuse_edited(run, config)
    run.refuse_other_data(data, config.model.weights_file)


def refuse_edited(run: Run, config: TrainConfig) -> None:
    """Raise ToCoError where the config.json of a run that was found by a config has other values. A run without one
    cannot be compared."""
    if (run.folder / "config.json").is_file():
        differs = config_differences({"found": run.config().named(), "wanted": config.named()})
        words = [f"{f} = {v['found']!r} is not {v['wanted']!r}" for f, v in differs.items() if f not in PLACES]
        if words:
            raise ToCoError(
                f"{run.folder / 'config.json'} was edited: {', '.join(words)}; train(..., resume=False) replaces that "
                f"run, another out_dir keeps both"
            )


def manifest_differences(manifests: Mapping[str, Mapping]) -> dict[str, dict[str, Any]]:
    """The same of what `Run.manifest` tells: versions, machine, git state, data. Nested names are joined by dots; what
    a manifest lacks is `MISSING`."""
    return _differences({name: _flat(manifest) for name, manifest in manifests.items()})


def short_names(runs: Sequence[Run]) -> list[str]:
    """A name for each run that tells it from the others: the fields that differ, as in "ptc=0.0 seed=1".

    Where that is long, or the same for two runs, the run's number stands for it: "run 1", "run 2".
    """
    differing = config_differences({str(i): run.config() for i, run in enumerate(runs)})
    names = [" ".join(f"{f}={shown(v[str(i)])}" for f, v in differing.items()) for i in range(len(runs))]
    if len(set(names)) < len(names) or max(map(len, names)) > 28:
        return [f"run {i + 1}" for i in range(len(runs))]
    return names if names != [""] else ["run 1"]


def class_differences(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Second minus first, class by class; NaN where either is."""
    if len(first) != len(second):
        raise ToCoError(f"scores of {len(first)} and of {len(second)} classes cannot be compared class by class")
    return [b - a for a, b in zip(first, second, strict=True)]


def paired_p_value(differences: Iterable[float]) -> float:
    """Probability that differences of pairs (seeds, images, classes) come out as far from 0 by chance, in [0, 1].

    The two-sided t test of pairs: t is the mean over its standard error, with one degree of freedom n less than there
    are differences; for whole n its distribution is a finite sum (Abramowitz and Stegun, 26.7.3 and 26.7.4). NaN is
    left out; 1 for fewer than two differences, which have no spread.
    """
    values = [float(value) for value in differences if not math.isnan(value)]
    n, mean = len(values) - 1, statistics.fmean(values) if values else 0.0
    if n < 1 or mean == 0:
        return 1.0
    angle = math.atan2(abs(mean) * math.sqrt(n + 1), statistics.stdev(values) * math.sqrt(n))
    term = math.cos(angle) if n % 2 else 1.0
    inside = angle if n % 2 else 0.0  # inside: the probability of a smaller t
    for i in range(2 + n % 2, n + 1, 2):
        inside += math.sin(angle) * term
        term *= math.cos(angle) ** 2 * (i - 1) / i
    return 1 - inside * (2 / math.pi if n % 2 else 1)


def within_noise(differences: Iterable[float]) -> bool:
    """Whether differences as large for their spread come by chance more than once in twenty (`paired_p_value`): at
    three seeds all with a mean below 2.5 times their standard deviation."""
    return paired_p_value(differences) > 0.05


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown; numbers stand on the right."""
    rows = [[shown(cell) for cell in row] for row in rows]
    lines = ["| " + " | ".join(columns) + " |", "|---" + "|---:" * (len(columns) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def shown(value: Any) -> str:
    """A value in a table: a float in as few digits as tell it, NaN and None as a dash, a long text cut."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return MISSING
    text = f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "/")
    return text if len(text) <= 60 else text[:57] + "..."


def _differences(flat: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    fields = dict.fromkeys(field for values in flat.values() for field in values)
    table = {field: {name: values.get(field, MISSING) for name, values in flat.items()} for field in fields}
    return {field: row for field, row in table.items() if any(v != w for v in row.values() for w in row.values())}


def _flat(values: Mapping, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one, names joined by dots."""
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + str(name): value}
    return found
