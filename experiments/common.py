"""What experiments on variants share: train each variant on each seed, score it on the test part, keep a record.

The thresholds of the CAMs are chosen on the validation part; the test part is looked at once, with them. Runs that are
finished are not repeated, interrupted ones go on (`runs.Run`); both are told by the hash of the whole config. It does
not cover the file of the backbone's weights: with new weights give another --out-dir.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import torch

from toco_core.config import TrainConfig, configured, tiny
from toco_core.config.parameters import named_values
from toco_core.errors import ToCoError
from toco_core.evaluation.scores import RunScores, read_scores, scored_run
from toco_core.machine.writing import write_whole
from toco_core.runs.folder import Run
from toco_core.runs.shipped import shipped_runs
from toco_core.train.kept_tokens import KeptTokens

METRICS = {
    "cam": "cam_miou",
    "aux_cam": "aux_cam_miou",
    "refined": "refined_miou",
    "pseudo_label": "pseudo_miou",
    "seg": "seg_miou",
}
"""Kind of score (see `scores`) -> its name in a record."""
TITLES = ("final CAM", "auxiliary CAM", "final CAM + PAR", "pseudo label", "segmentation")
RECORDS = Path(__file__).parent / "records"


def run_variant(
    name: str, overrides: dict, seed: int, out_dir: Path | str, *, progress: bool = True, kept: KeptTokens | None = None
) -> dict:
    """One run of `tiny()` with `overrides`: mIoU in percent on the part "test", and what was run.

    It is scored as every run is (`scores.scored_run`); a finished run is answered from its folder. `kept`: see `train`.
    """
    config = configured(tiny(), **{**overrides, "seed": seed, "out_dir": str(out_dir)})
    began, known = time.monotonic(), Run.of(config).finished
    scored = scored_run(config, progress=progress, kept=kept)
    minutes = {} if known else {"minutes": round((time.monotonic() - began) / 60, 2)}
    return {"variant": name, "seed": seed, **result_of(config, scored.scores), **minutes}


def result_of(config: TrainConfig, scores: RunScores) -> dict:
    """What a record tells of a run, in percent; the CAMs at the thresholds `beta` and `aux_beta`."""
    return {
        **{metric: round(scores.miou[kind], 2) for kind, metric in METRICS.items()},
        "worst_class": {kind: round(min(scores.iou[kind][1:]), 2) for kind in METRICS},
        "beta": scores.beta,
        "aux_beta": scores.aux_beta,
        "refined_beta": scores.refined_beta,
        "val_cam_miou": round(scores.val["cam"], 2),
        "token_similarity": scores.token_similarity,
        "run": config.short_hash(),
    }


def command_line(
    doc: str, variants: dict[str, dict], argv=None, *, more: Callable[[argparse.ArgumentParser], object] | None = None
) -> argparse.Namespace:
    """Options that every experiment on variants has, and `more` that it adds to the parser; `variants` and `common` of
    the answer hold the overrides."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=list(variants), choices=list(variants), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps; by default the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the one process that trains")
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="fields of the config, for all"
    )
    parser.add_argument("--out-dir", type=Path, default=Path("runs"))
    if more is not None:
        more(parser)
    args = parser.parse_args(argv)
    args.variants = {name: variants[name] for name in args.variants}
    args.common = {} if args.steps is None else {"steps": args.steps}
    try:
        args.common |= named_values(args.set)
        for overrides in args.variants.values():  # a wrong field is refused before the first run
            config = configured(tiny(), **{**args.common, **overrides})
            refuse_late(overrides, config.schedule.steps)
    except ToCoError as error:
        parser.error(str(error))
    return args


def refuse_late(overrides: dict, steps: int) -> None:
    """Raise ToCoError for a first step that a variant names and the schedule never reaches: it would be a run without
    what the variant is called after."""
    for name, value in overrides.items():
        named = any(name.startswith(f"{other}_") for other in overrides)  # affinity_walk_start beside affinity
        if name.endswith("_start") and named and value >= steps:
            raise ToCoError(f"{name} = {value} with steps = {steps} is not allowed: less, or it never begins")


def run_all(args: argparse.Namespace, question: str, record: Path) -> dict:
    """Every variant on every seed, seed by seed; the record is written after each run."""
    use_threads(args.threads)
    state = {}
    for seed in args.seeds:
        kept = KeptTokens(gib=3)  # all variants see the same pictures
        for name, overrides in args.variants.items():
            overrides = {**args.common, **overrides}
            result = run_variant(name, overrides, seed, args.out_dir, kept=kept)
            print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
            state = add_result(record, question, name, overrides, result)
    return state


def use_threads(n: int) -> None:
    """Let everything that computes in this process use so many threads."""
    torch.set_num_threads(n)
    cv2.setNumThreads(n)


def read_record(record: Path) -> dict:
    """What a record says; nothing where there is none yet."""
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def add_result(record: Path, question: str, name: str, overrides: dict, result: dict) -> dict:
    """Put one result into a record file: other variants stay, as do this one's other seeds of today's recipe."""
    state = {"variants": {}} | read_record(record)
    overrides = json.loads(json.dumps(overrides))  # tuples as the record gives them back
    others = runs_of(overrides, {run["run"]: run for run in state["variants"].get(name, {}).get("runs", [])})
    others = [run for run in others if run["seed"] != result["seed"]]
    runs = sorted([*others, {k: v for k, v in result.items() if k != "variant"}], key=lambda run: run["seed"])
    state["variants"][name] = {"overrides": overrides, "runs": runs}
    state |= {"question": question, "part": "test, thresholds chosen on val", "torch": torch.__version__}
    state["table"] = table(state["variants"]).splitlines()
    record.parent.mkdir(parents=True, exist_ok=True)
    write_whole(record, json.dumps(state, indent=1) + "\n")
    return state


def table(variants: dict[str, dict]) -> str:
    """Markdown: mean and sample standard deviation over the seeds, in percent."""
    lines = [f"| variant | steps | seeds | {' | '.join(TITLES)} |", "|---" * (3 + len(METRICS)) + "|"]
    for name, variant in variants.items():
        runs = variant["runs"]
        steps = variant["overrides"].get("steps", tiny().schedule.steps)
        cells = [mean_and_spread([run[metric] for run in runs if metric in run]) for metric in METRICS.values()]
        lines.append(f"| {name} | {steps} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def known_runs(records: Path = RECORDS) -> dict[str, dict]:
    """Hash of the config -> its result, over all records in a folder.

    The hash and not the variant's name tells what was run: one run serves every table that asks for it, and a run of an
    older recipe serves none.
    """
    known = {}
    for path in sorted(records.glob("*.json")):
        for variant in json.loads(path.read_text(encoding="utf-8")).get("variants", {}).values():
            for run in variant["runs"]:
                known[run["run"]] = known.get(run["run"], {}) | run
    return known


def shipped_results() -> dict[str, dict]:
    """The same of the runs that come with the package."""
    configs = {run.config().short_hash(): (run.config(), read_scores(run)) for run in shipped_runs().values()}
    return {
        name: {"seed": config.seed, **result_of(config, scores)}
        for name, (config, scores) in configs.items()
        if scores is not None
    }


def runs_of(overrides: dict, known: dict[str, dict]) -> list[dict]:
    """The known runs of `tiny()` with `overrides`, by seed; of today's recipe only."""
    seeds = sorted({run["seed"] for run in known.values()})
    hashes = [configured(tiny(), **{**overrides, "seed": seed}).short_hash() for seed in seeds]
    return [known[name] for name in hashes if name in known]


def table_with_gaps(variants: dict[str, dict], known: dict[str, dict], *, command: str) -> str:
    """Markdown of every variant, mean and sample standard deviation over the seeds in percent, and the difference of
    the final CAM from today's recipe over the seeds that both have. A variant without a run names the command."""
    lines = [f"| variant | seeds | {' | '.join(TITLES)} | final CAM - recipe's |", "|---" * (3 + len(METRICS)) + "|"]
    recipe = runs_of({}, known)
    for name, overrides in variants.items():
        runs = runs_of(overrides, known)
        if not runs:
            lines.append(f"| {name} | not run | `{command} --variants '{name}'` |{' |' * len(METRICS)}")
            continue
        cells = [mean_and_spread([run[metric] for run in runs if metric in run]) for metric in METRICS.values()]
        gains = gains_over(recipe, runs)
        same = configured(tiny(), **overrides) == tiny()
        gain = "the recipe" if same else mean_and_spread(gains) if gains else "-"
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {gain} |")
    return "\n".join(lines)


def gains_over(recipe: list[dict], runs: list[dict], metric: str = "cam_miou") -> list[float]:
    """Points of a metric by which runs are above those of the recipe, for the seeds that both have."""
    own = {run["seed"]: run[metric] for run in recipe if metric in run}
    return [run[metric] - own[run["seed"]] for run in runs if run["seed"] in own and metric in run]


def mean_and_spread(values: list[float], digits: int = 1, *, signed: bool = False) -> str:
    """`61.3 ± 0.8`: mean and sample standard deviation, which one value alone does not have; `-` for none. `signed`:
    `+61.3 ± 0.8`."""
    if not values:
        return "-"
    mean = f"{statistics.mean(values):{'+' if signed else ''}.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
