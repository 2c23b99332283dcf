"""What the contrasts do for a folder of photographs and an ImageNet backbone, from one warm start.

    python experiments/photographs.py --dataset <VOC folder> --weights vit_tiny.safetensors --name voc_six --seeds 0 1 2

Scores the split `val`, or a fixed fifth of the images where there is none (`data.holdout`): the images are looked at
once, with the recipe's thresholds, which were chosen on parts of the training images. The pseudo label (final CAM, two
thresholds, PAR) leaves pixels open; they count as missed. "final CAM + PAR" is cut at one threshold and leaves none.
`--multi-scale` adds the segmentation over three scales and after a dense CRF. `--confused person horse` also tells
which share of the one class's pixels is given to the other. `--costs` measures instead what a training with a variant
takes, in time and memory, as a multiple of ToCo's with token labels as published.

A class's CAM lies on the object by this share: pixels that the final CAM gives to the class (labels of the image known)
and that show it, of all that it gives to the class, void pixels left out.

Cost: a training of the recipe `photographs` for each variant and seed, some minutes on a CPU core. Finished runs are
not trained again, and what the record knows is not scored again. Writes
experiments/records/photographs_<name>.json.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import RECORDS, mean_and_spread, read_record, refuse_late, use_threads
from loss_terms import VARIANTS as LOSS_TERMS
from methods import costs, costs_option

from toco_core.config import TrainConfig, configured, override, photographs
from toco_core.data import Split, TrainVal
from toco_core.errors import ToCoError
from toco_core.evaluation.protocols import assess
from toco_core.machine.writing import write_whole
from toco_core.train.kept_tokens import KeptTokens
from toco_core.train.loop import trained_run

KINDS = {
    "cam": "final CAM",
    "aux_cam": "auxiliary CAM",
    "refined": "final CAM + PAR",
    "pseudo_label": "pseudo label",
    "vote": "vote",
    "seg": "segmentation",
}
PLAIN = "+ PTC, token labels as published"
CLASS_TOKENS = {"class_tokens_after": 8, "class_tokens": 1.0, "class_attention": 0.25}
IDEAS = {
    "prototypes": {"prototypes": 0.3, "prototypes_start": 100},
    "exchange": {"exchange": 0.05, "exchange_start": 100},
    "consistency": {"consistency": 0.1, "consistency_start": 150},
    "discrepancy": {"discrepancy": 0.1},
    "progressive threshold": {"beta_h_first": 0.55},
    "dynamic thresholds": {"dynamic_thresholds": True},
    "noise filter": {"seg_noise": 0.2, "seg_noise_start": 200},
    "growing regions": {"growing_start": 0.3},
    "class tokens, their map": CLASS_TOKENS,
    "class tokens, contrast": CLASS_TOKENS | {"class_contrast": 0.1, "class_contrast_start": 100},
    "frequency": {"frequency": 1.0},
    "reliable": {"reliable": 0.05, "reliable_start": 200},
    "affinity": {"affinity": 0.1, "attention_kind": "learned", "affinity_walk_start": 100},
}
VARIANTS = (
    LOSS_TERMS
    | {PLAIN: {"token_refiner": "none"}, "+ frequency": {"frequency": 1.0, "ptc": 0.0}}
    | {f"+ PTC + {name}": overrides for name, overrides in IDEAS.items()}
)
"""Name -> the fields of `photographs()` that it changes; first steps are those of 400."""
SEVERAL = {"seg_ms": "segmentation, scales 0.75, 1, 1.25 + flip", "seg_crf": "the same + dense CRF"}


def run_variant(
    config: TrainConfig,
    *,
    several: bool = False,
    confused: Sequence[str] = (),
    part: Callable[[TrainVal], Split] = lambda data: data.val,
    kept: KeptTokens | None = None,
) -> dict:
    """Train, and score on a part of the images held apart: everything in percent."""
    model, _, _, data = trained_run(config, kept=kept)
    source = part(data)
    names = source.class_names
    options = {} if several else {"scales": (1.0,), "crf": False}
    thresholds = dict.fromkeys(("beta", "aux_beta", "refined_beta"), config.labels.beta)
    found = assess(model, source, config, **thresholds, part="held out", chosen_on="parts of train", **options)
    kinds = [*KINDS, *(SEVERAL if several else ())]
    result = {
        "seed": config.seed,
        "miou": {kind: round(100 * float(found.scores(kind).miou), 2) for kind in kinds},
        "iou": {kind: by_class(found.scores(kind).iou, names) for kind in kinds},
        "cam_on_object": by_class(found.scores("cam").precision, names),
        "images": len(source),
        "run": config.short_hash(),
    }
    if confused:
        one, other = (names.index(name) for name in confused)
        counts = {kind: found.total(kind) for kind in kinds}
        result["confused"] = {
            kind: {
                f"{names[a]} labelled {names[b]}": round(100 * float(n[a, b] / n[a].sum()), 2)
                for a, b in ((one, other), (other, one))
            }
            for kind, n in counts.items()
        }
    return result


def by_class(scores, names) -> dict[str, float]:
    """Class -> percent."""
    return {name: round(100 * float(score), 1) for name, score in zip(names, scores, strict=True)}


def known_results(record: Path, kinds) -> dict[str, dict]:
    """Hash of the config -> its result in the record, if that has these kinds of label."""
    runs = read(record)["runs"].values()
    return {run["run"]: run for results in runs for run in results if set(kinds) <= set(run["miou"])}


def read(record: Path) -> dict:
    """What the record says."""
    return {"runs": {}} | read_record(record)


def keep_result(
    record: Path, name: str, result: dict, table: Callable[[dict], str], facts: dict, config: TrainConfig
) -> dict:
    """Put the result of a row's seed into a record file; returns the whole. Other seeds may be computed beside it;
    those of another config than the row's of today are given up."""
    state = read(record)
    known = [run for run in state["runs"].get(name, []) if run["seed"] != result["seed"]]
    others = [run for run in known if run["run"] == override(config, seed=run["seed"]).short_hash()]
    state["runs"][name] = sorted([*others, result], key=lambda run: run["seed"])
    state |= facts | {"table": table(state["runs"]).splitlines()}
    write_whole(record, json.dumps(state, indent=1) + "\n")
    return state


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds, in percent."""
    lines = [f"| variant | seeds | {' | '.join(KINDS.values())} |", "|---" * (2 + len(KINDS)) + "|"]
    for name, results in runs.items():
        cells = [
            mean_and_spread([result["miou"][kind] for result in results if kind in result["miou"]]) for kind in KINDS
        ]
        lines.append(f"| {name} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weights", required=True, help="file of vit_tiny_patch16_224's ImageNet weights")
    parser.add_argument("--name", required=True, help="of the data set, in the record's name")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=photographs().schedule.steps)
    parser.add_argument("--multi-scale", action="store_true")
    costs_option(parser)
    parser.add_argument("--confused", nargs=2, default=[], metavar="CLASS")
    parser.add_argument("--precision", default="auto", help="as in the config; bf16 halves the time on many CPUs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    use_threads(args.threads)
    common = {"weights": args.weights, "steps": args.steps, "out_dir": str(args.out_dir), "eval_interval": 0}
    common |= {"precision": args.precision}
    record_file = RECORDS / f"photographs_{args.name}.json"
    if args.costs:
        plain = configured(photographs(args.dataset), **common, **VARIANTS[PLAIN])
        costs(plain, {name: {"token_refiner": "par"} | VARIANTS[name] for name in args.variants}, record_file)
        return
    try:
        for name in args.variants:
            refuse_late(VARIANTS[name], args.steps)
    except ToCoError as error:
        parser.error(str(error))
    if (steps := read(record_file).get("steps", args.steps)) != args.steps:
        parser.error(f"{record_file} holds runs of {steps} steps: another --name, or --steps {steps}")
    kinds = [*KINDS, *(SEVERAL if args.multi_scale else ())]
    for seed in args.seeds:
        kept = KeptTokens(gib=3)  # all variants see the same pictures
        for name in args.variants:
            config = configured(photographs(args.dataset), **common, seed=seed, **VARIANTS[name])
            result = known_results(record_file, kinds).get(config.short_hash()) or run_variant(
                config, several=args.multi_scale, confused=args.confused, kept=kept
            )
            facts = {"steps": args.steps, "thresholds": "the recipe's", "torch": torch.__version__}
            state = keep_result(record_file, name, result, table, facts, config)
            print(table(state["runs"]), flush=True)


if __name__ == "__main__":
    main()
