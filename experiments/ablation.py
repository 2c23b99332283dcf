"""What each part of the method is worth, and how much its numbers matter: the paper's tables 4 and 5, on `tiny()`.

    python experiments/ablation.py --groups temperature momentum --seeds 0 1 2 --threads 1
    python experiments/ablation.py --variants ptc=0.1 ptc=1.0

Without --groups or --variants: everything. Expected: losses matter most (PTC above all), weights within a factor of two
matter little, temperature and momentum hardly at all in so short a schedule; more and larger local views help CTC up to
a point, a higher flag threshold as long as enough views are positive; half scale blurs a CAM of 12 x 12 tokens.
Cost: a run of `tiny()` for each variant and seed; what a folder's results.jsonl knows is not run again. Writes
experiments/records/ablation.json. `notebooks/ablation.ipynb` shows the tables from all records together.
"""

import argparse

from common import RECORDS, command_line, run_all, table

SWEEPS = {
    "weight of PTC": ("ptc", (0.1, 0.2, 0.5, 1.0)),
    "weight of CTC": ("ctc", (0.1, 0.2, 0.5, 1.0)),
    "temperature": ("temperature", (0.1, 0.25, 0.5, 1.0)),
    "momentum": ("momentum", (0.5, 0.9, 0.99, 0.999)),
    "local views": ("n_local", (2, 4, 8)),
    "local size": ("local_size", (16, 32, 48, 64)),
    "flag threshold": ("positive_threshold", (0.2, 0.6, 1.0, 1.4)),
    "scales of the CAM": ("cam_scales", ((1.0,), (1.0, 0.5), (1.0, 1.5), (1.0, 0.5, 1.5))),
    "pooling": ("pooling", ("max", "mean", "topk")),
    "auxiliary block": ("layer", (7, 8, 9, 10, 11, 12)),
    "precision": ("precision", ("fp32", "bf16")),
}
"""Group -> the field that is varied, and its values. The recipe's own value is among them or is the row `full`."""

GROUPS = {
    "loss terms": {
        "classification only": {"ptc": 0.0, "ctc": 0.0},
        "+ PTC": {"ctc": 0.0},
        "+ CTC": {"ptc": 0.0},
        "full": {},
        "full, no energy": {"energy": 0.0},
        "full, no segmentation": {"seg": 0.0, "energy": 0.0},
    },
    **{group: {f"{field}={value}": {field: value} for value in values} for group, (field, values) in SWEEPS.items()},
}
"""Group -> variant -> the fields of `tiny()` that it changes. Segmentation and energy are on but where it says so."""

VARIANTS = {name: overrides for group in GROUPS.values() for name, overrides in group.items()}
QUESTION = "what is each part worth, and how much do its numbers matter?"


def main() -> None:
    groups = argparse.ArgumentParser(add_help=False)
    groups.add_argument("--groups", nargs="+", choices=list(GROUPS), default=list(GROUPS))
    chosen, rest = groups.parse_known_args()
    variants = {name: overrides for group in chosen.groups for name, overrides in GROUPS[group].items()}
    args = command_line(f"{__doc__}\n--groups: {', '.join(GROUPS)}", variants, rest)
    state = run_all(args, QUESTION, RECORDS / "ablation.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
