"""What each part of the method is worth, and how much its numbers matter: the paper's tables 4 and 5, on `tiny()`.

    python experiments/ablation.py --groups "loss terms" "weight of PTC" --seeds 0 1 2 --threads 1
    python experiments/ablation.py --variants ptc=1.0 warm_start_steps=0

Without --groups or --variants: everything. Expected: PTC matters most, then the warm start and the frozen blocks,
which keep what the backbone knows (seen: frozen blocks matter most); weights of PTC within a factor of two matter
little. CTC and its numbers move a final CAM by about what seeds do. Cost: a run of `tiny()` for each variant and
seed; what --out-dir holds is not trained again.
Writes experiments/records/ablation.json. `notebooks/ablation.ipynb` shows the tables from all records together.
"""

import argparse

from common import RECORDS, command_line, run_all, table
from layer_ablation import LAYERS
from loss_terms import CTC

SWEEPS = {
    "weight of PTC": ("ptc", (0.5, 1.0, 2.0, 4.0)),
    "auxiliary block": ("layer", LAYERS),
    "warm start": ("warm_start_steps", (0, 50, 100, 200, 400)),
    "frozen blocks": ("frozen_blocks", (0, 4, 8, 10)),
    "scales of the CAM": ("cam_scales", ((1.0,), (1.0, 0.5), (1.0, 1.5), (1.0, 0.5, 1.5))),
    "attention": ("attention_steps", (0, 1)),
    "pooling": ("pooling", ("max", "mean", "topk")),
    "auxiliary pooling": ("aux_pooling", ("max", "mean", "topk")),
    "upper threshold": ("beta_h", (0.4, 0.5, 0.6)),
    "dilation of the decoder": ("decoder_dilation", (1, 2, 5)),
    "precision": ("precision", ("fp32", "bf16")),
}
"""Group -> the field that is varied, and its values; the recipe's own is among them or is the row `full`."""

CTC_SWEEPS = {
    "temperature": ("temperature", (0.1, 0.25, 1.0)),
    "momentum": ("momentum", (0.5, 0.99, 0.999)),
    "local views": ("n_local", (2, 8)),
    "local size": ("local_size", (32, 64)),
    "flag threshold": ("positive_threshold", (0.2, 0.6, 1.4)),
}
"""The same for what only CTC reads. CTC is on in these rows; the recipe's own values are the row `+ CTC`."""

GROUPS = {
    "loss terms": {
        "classification only": {"ptc": 0.0},
        "full": {},
        "+ CTC": {"ctc": CTC},
        "CTC, no PTC": {"ptc": 0.0, "ctc": CTC},
        "no segmentation": {"seg": 0.0},
        "+ energy": {"energy": 0.05},
    },
    **{group: {f"{field}={value}": {field: value} for value in values} for group, (field, values) in SWEEPS.items()},
    "weight of CTC": {f"ctc={weight}": {"ctc": weight} for weight in (0.05, 0.5, 1.0)},
    **{
        f"CTC: {group}": {f"{field}={value}": {"ctc": CTC, field: value} for value in values}
        for group, (field, values) in CTC_SWEEPS.items()
    },
}
"""Group -> variant -> the fields of `tiny()` that it changes. `full` is the recipe: classification, PTC, segmentation.
"""

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
