"""Where do better labels come from: what PTC learns from, or who is asked at the end?

    python experiments/votes.py --seeds 0 1 2 --threads 1

Rows are trainings of `tiny()`: ToCo, with token labels refined by PAR, with prototypes, with both, with class tokens
and their map, without and with the contrast of class tokens and patches, and this with refined token labels ("all of
it"). Columns are labels of one network: pseudo label (final CAM, two thresholds, what lies between them counts as
missed), final CAM + PAR and vote of both CAMs and the decoder, each cut at the row's one threshold. Expected: the heads
err in different places, so the vote is above the best of them; what PTC learns from matters less here, where the
auxiliary CAM is broad already. Cost: a run of `tiny()` for each row and seed. Writes experiments/records/votes.json;
scores the part "test". `--costs` measures instead what a training with each row takes, as multiples of ToCo's.
`photographs.py` measures the same on photographs.
"""

import torch
from common import RECORDS, command_line, mean_and_spread, use_threads
from methods import IDEAS, costs, costs_option
from photographs import keep_result, run_variant

from toco_core.config import configured, tiny
from toco_core.evaluation.scores import reported_part
from toco_core.train.kept_tokens import KeptTokens

REFINED = {"token_refiner": "par"}
VARIANTS = {
    "classification only": {"ptc": 0.0},
    "ToCo": {},
    "refined token labels": REFINED,
    "prototypes": {"prototypes": 0.3},
    "both": {"prototypes": 0.3} | REFINED,
    "class tokens, their map": IDEAS["class tokens, their map"],
    "class tokens, contrast": IDEAS["class tokens, contrast"],
    "all of it": IDEAS["class tokens, contrast"] | REFINED,
}
"""Name -> the fields of `tiny()` that it changes."""
KINDS = {"pseudo_label": "pseudo label", "refined": "final CAM + PAR", "vote": "vote", "seg": "segmentation"}


def gains(
    runs: dict[str, list[dict]], name: str, kind: str, *, over: str = "ToCo", over_kind: str = "pseudo_label"
) -> list[float]:
    """Points of a kind of label of one row above one of another row, seed by seed."""
    plain = {run["seed"]: run["miou"][over_kind] for run in runs.get(over, [])}
    return [run["miou"][kind] - plain[run["seed"]] for run in runs.get(name, []) if run["seed"] in plain]


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds, in percent."""
    lines = [f"| training | seeds | {' | '.join(KINDS.values())} | vote - ToCo's pseudo label |", "|---" * 7 + "|"]
    for name, found in runs.items():
        cells = [mean_and_spread([run["miou"][kind] for run in found]) for kind in KINDS]
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {mean_and_spread(gains(runs, name, 'vote'))} |")
    return "\n".join(lines)


def main() -> None:
    args = command_line(__doc__, VARIANTS, more=costs_option)
    use_threads(args.threads)
    record = RECORDS / "votes.json"
    if args.costs:
        costs(configured(tiny(), **args.common), args.variants, record)
        return
    for seed in args.seeds:
        kept = KeptTokens(gib=3)  # all rows see the same pictures
        for name, overrides in args.variants.items():
            config = configured(tiny(), **{**args.common, **overrides, "seed": seed, "out_dir": str(args.out_dir)})
            result = run_variant(config, part=lambda data: reported_part(data)[1], kept=kept)
            facts = {"part": "test", "thresholds": "the recipe's", "torch": torch.__version__}
            state = keep_result(record, name, result, table, facts, config)
            print(table(state["runs"]), flush=True)


if __name__ == "__main__":
    main()
