"""A grid of executions of one notebook: on this machine, several at a time, or on a Slurm cluster.

    python experiments/sweep.py notebooks/train.ipynb --grid layer=9,10 seed=0,1 --set steps=160 --out sweeps/layers
    python experiments/sweep.py ... --slurm --slurm-options timeout_min=120 gpus_per_node=1 slurm_partition=gpu

Every combination becomes an executed notebook in the --out folder, and a row of its results.csv: parameters, state,
seconds, the run's final numbers, and for a failure the cell and the error. A failure does not stop the others. The same
command again goes on where it was interrupted: what is done is kept, by the hash of its config; what failed is tried
again, and a training that was cut short goes on from its checkpoint. Expected cost: that of the notebook, times
combinations, by --jobs at a time.
"""

import argparse
import ast
import csv
import hashlib
import io
import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import papermill
import submitit

from toco_core.config import RECIPES, TrainConfig, configured, did_you_mean, field_sections
from toco_core.config.parameters import literal, named_texts, named_values
from toco_core.errors import ToCoError
from toco_core.machine.intake import read_json
from toco_core.machine.writing import write_whole
from toco_core.runs.folder import Run

STATES = ("waiting", "running", "done", "failed")
POLL_SECONDS = 1.0


class Point(NamedTuple):
    """One execution: what the notebook is given, and the files it leaves, `<folder>/<name>.ipynb` and `.json`."""

    notebook: Path
    folder: Path
    parameters: dict
    config: TrainConfig  # that the notebook makes of them
    name: str

    @property
    def record(self) -> dict:
        """What is known of it; {"state": "waiting"} before it began."""
        path = self.folder / f"{self.name}.json"
        if not path.is_file():
            return {"state": "waiting"}
        record = read_json(path)
        if not isinstance(record, dict) or record.get("state") not in STATES or not _is_record(record):
            raise ToCoError(f"{path} is no record of a sweep: delete it, and this point is executed again")
        return record

    def note(self, **record) -> None:
        """Replace what is known."""
        write_whole(self.folder / f"{self.name}.json", json.dumps(record, indent=1) + "\n")


def _is_record(record: dict) -> bool:
    """Whether the values of a record have the types that `note` is given."""
    kinds = {"parameters": dict, "numbers": dict, "seconds": (int, float), "run": str, "error": str, "source": str}
    known = all(isinstance(record[name], kind) for name, kind in (kinds | {"cell": int}).items() if name in record)
    return known and (record["state"] != "failed" or "error" in record)


def points_of(notebook: Path, folder: Path, grid: dict[str, list], common: dict) -> list[Point]:
    """Every combination of the grid's values. Raises ToCoError for a parameter that the notebook does not have, and for
    a config that is refused."""
    known = defaults_of(notebook)
    fields = {name for name, section in field_sections().items() if section}
    for name in [*common, *grid]:
        if name not in known and name not in fields | {"recipe"}:
            raise ToCoError(f"{notebook} has no parameter {name!r}{did_you_mean(name, known)}")
    points = []
    for values in itertools.product(*grid.values()):
        parameters = common | dict(zip(grid, values, strict=True))
        config = _config(known, parameters)
        label = "-".join(f"{name}={parameters[name]}" for name in grid) or "defaults"
        own = json.dumps({k: v for k, v in parameters.items() if k not in field_sections()}, sort_keys=True)
        key = hashlib.sha256(f"{notebook.name} {config.short_hash()} {own}".encode()).hexdigest()[:10]
        clean = "".join(c if c.isalnum() or c in "=-._" else "_" for c in label)[:80]
        points.append(Point(notebook, folder, parameters, config, f"{clean}-{key}"))
    return points


def defaults_of(notebook: Path) -> dict[str, Any]:
    """The parameters of a notebook and their defaults, as Python reads the tagged cell: papermill's own reader leaves
    out or cuts what it cannot parse (a text with "=" in it), and the config would be another one than the notebook's.

    Raises ToCoError for a default that is no literal.
    """
    cells = nbformat.read(notebook, as_version=4).cells
    source = next((cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())), "")
    found = {}
    for line in ast.parse(source).body:
        names = line.targets if isinstance(line, ast.Assign) else [getattr(line, "target", None)]
        for name in (name.id for name in names if isinstance(name, ast.Name)):
            try:
                found[name] = ast.literal_eval(line.value)
            except (ValueError, TypeError) as error:
                text = ast.unparse(line.value) if line.value else "nothing"
                raise ToCoError(f"{notebook}: the default of {name} is {text}: a literal is wanted") from error
    return found


def _config(known: dict[str, Any], parameters: dict) -> TrainConfig:
    """The config that the notebook will make of these parameters and its own defaults."""
    values = known | parameters
    recipe = values.get("recipe", "auto")
    if recipe == "auto":
        recipe = "tiny" if values.get("dataset", "scenes") == "scenes" else "photographs"
    if recipe not in RECIPES:
        raise ToCoError(f"recipe = {recipe!r} is not allowed: one of auto, {', '.join(RECIPES)}")
    fields = {k: v for k, v in values.items() if k in field_sections() and v is not None}
    return configured(RECIPES[recipe](), **fields)


def execute(point: Point) -> None:
    """Run the notebook and note what came out; never raises for what the notebook did."""
    began = time.monotonic()
    point.note(state="running", parameters=point.parameters)

    def took() -> float:
        return round(time.monotonic() - began, 1)

    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                str(point.notebook),
                str(point.folder / f"{point.name}.ipynb"),
                parameters=point.parameters,
                progress_bar=False,
            )
        except papermill.PapermillExecutionError as error:
            point.note(
                state="failed",
                parameters=point.parameters,
                seconds=took(),
                cell=error.cell_index,
                source=error.source.strip().splitlines()[0][:100] if error.source.strip() else "",
                error=f"{error.ename}: {error.evalue}"[:500],
            )
            return
        except Exception as error:  # noqa: BLE001  a kernel that did not start: ports can collide, once
            if attempt == 2:
                message = f"{type(error).__name__}: {error}"
                point.note(state="failed", parameters=point.parameters, seconds=took(), error=message)
                return
        else:
            break
    point.note(state="done", parameters=point.parameters, seconds=took(), **_numbers(point))


def _numbers(point: Point) -> dict:
    """The final numbers of the run that the notebook trained, if it trained one."""
    run = Run.of(point.config)
    if not run.finished:
        return {}
    numbers = {k: v for k, v in run.metrics().items() if isinstance(v, (int, float))}
    scores = run.scores() or {}
    numbers |= {f"{scores['part']}_{name}": value for name, value in scores.get("miou", {}).items()}
    return {"run": run.folder.name, "numbers": numbers}


def run_sweep(points: list[Point], *, jobs: int, cluster: str = "local", options: dict | None = None) -> list[dict]:
    """Execute what is not done, at most `jobs` at a time; the records of all points. The table is shown as it changes,
    and results.csv is written with it."""
    folder = points[0].folder
    executor = submitit.AutoExecutor(folder=str(folder / "logs"), cluster=cluster)
    executor.update_parameters(**{"timeout_min": 7 * 24 * 60, "name": "toco", **(options or {})})
    waiting = [point for point in points if point.record["state"] != "done"]
    for point in waiting:
        point.note(state="waiting", parameters=point.parameters)
    running: dict[str, tuple[Point, submitit.Job]] = {}
    shown = None
    try:
        while True:
            while waiting and len(running) < jobs:
                point = waiting.pop(0)
                command = [sys.executable, str(Path(__file__).resolve()), "--execute", str(_written(point))]
                running[point.name] = point, executor.submit(submitit.helpers.CommandFunction(command, verbose=False))
            for name, (point, job) in list(running.items()):
                if job.done():
                    del running[name]
                    if point.record["state"] not in ("done", "failed"):  # killed, or no memory
                        error = f"the process ended ({job.state}); its output is in {job.paths.stderr}"
                        point.note(state="failed", parameters=point.parameters, error=error)
            records = [point.record for point in points]
            if [r["state"] for r in records] != shown:
                shown = [r["state"] for r in records]
                write_results(folder / "results.csv", points, records)
                print(table(points, records), flush=True)
            if not running and not waiting:
                return records
            time.sleep(POLL_SECONDS)
    finally:
        for _, job in running.values():  # after Ctrl-C
            job.cancel()


def _written(point: Point) -> Path:
    """The point as a file, for the process that executes it."""
    path = point.folder / "logs" / f"{point.name}.point.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {"notebook": str(point.notebook.resolve()), "folder": str(point.folder.resolve()), "name": point.name}
    write_whole(path, json.dumps(values | {"parameters": point.parameters, "config": point.config.to_dict()}) + "\n")
    return path


def read_point(path: Path) -> Point:
    """The inverse of what the sweep wrote for a process."""
    values = read_json(path)
    config = TrainConfig.from_dict(values["config"])
    return Point(Path(values["notebook"]), Path(values["folder"]), values["parameters"], config, values["name"])


def rows_of(points: list[Point], records: list[dict]) -> list[dict]:
    """One tidy row per point: parameters, then state, run, seconds, numbers, cell and error."""
    rows = []
    for point, record in zip(points, records, strict=True):
        row = dict(point.parameters) | {name: record.get(name, "") for name in ("state", "run", "seconds")}
        rows.append(row | record.get("numbers", {}) | {name: record.get(name, "") for name in ("cell", "error")})
    return rows


def write_results(path: Path, points: list[Point], records: list[dict]) -> None:
    """results.csv, as a whole."""
    rows = rows_of(points, records)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


def parquet_library():
    """pandas, which writes parquet with pyarrow. Raises ToCoError where one of them is not installed."""
    try:
        import pandas
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise ToCoError("--parquet needs two more packages: pip install pandas pyarrow") from error
    return pandas


def write_parquet(path: Path, points: list[Point], records: list[dict]) -> None:
    """The rows of results.csv, columns with types; what is empty there is missing here."""
    rows = [{name: None if v == "" else v for name, v in row.items()} for row in rows_of(points, records)]
    parquet_library().DataFrame(rows).to_parquet(path, index=False)


def table(points: list[Point], records: list[dict]) -> str:
    """States, counted and one by one, with the failing cell of a failure."""
    counts = {state: sum(record["state"] == state for record in records) for state in STATES}
    lines = [", ".join(f"{n} {state}" for state, n in counts.items() if n)]
    for point, record in zip(points, records, strict=True):
        line = f"  {record['state']:8}{point.name}"
        if "seconds" in record:
            line += f"  {record['seconds']} s"
        if record["state"] == "failed":
            where = f"cell {record['cell']} ({record.get('source', '')}): " if "cell" in record else ""
            line += f"\n           {where}{(record['error'].splitlines() or [''])[0][:160]}"
        lines.append(line)
    return "\n".join(lines)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook", type=Path, nargs="?")
    parser.add_argument("--grid", nargs="+", action="extend", default=[], metavar="NAME=VALUE,VALUE")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="the same for all")
    parser.add_argument("--out", type=Path, default=Path("sweeps/sweep"))
    parser.add_argument("--parquet", action="store_true", help="write results.parquet, too (pandas and pyarrow)")
    parser.add_argument("--jobs", type=int, help="at a time; by default 1 here, and all on Slurm")
    parser.add_argument("--slurm", action="store_true", help="submit to Slurm instead of running here")
    parser.add_argument(
        "--slurm-options", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="of submitit's executor"
    )
    parser.add_argument("--execute", type=Path, help=argparse.SUPPRESS)  # one point, in a process of the sweep
    args = parser.parse_args(argv)
    if args.execute:
        try:
            execute(read_point(args.execute))
        except ToCoError as error:
            raise SystemExit(f"error: {error}") from error
        return 0
    if not args.notebook or not args.notebook.is_file():
        parser.error(f"notebook {args.notebook} is not a file")
    try:
        if args.parquet:
            parquet_library()  # refused before hours of work
        grid = {name: [literal(v) for v in values.split(",")] for name, values in named_texts(args.grid).items()}
        common = named_values(args.set)
        points = points_of(args.notebook, args.out, grid, common)
        options = named_values(args.slurm_options)
    except ToCoError as error:
        parser.error(str(error))
    jobs = args.jobs or (len(points) if args.slurm else 1)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        records = run_sweep(points, jobs=jobs, cluster="slurm" if args.slurm else "local", options=options)
    except ToCoError as error:
        raise SystemExit(f"error: {error}") from error
    if args.parquet:
        write_parquet(args.out / "results.parquet", points, records)
    print(args.out / "results.csv")
    return int(any(record["state"] != "done" for record in records))


if __name__ == "__main__":
    sys.exit(main())
