"""What each contrast adds: classification alone, with PTC, with CTC, with both.

    python experiments/loss_terms.py --seeds 0 1 2 --threads 2

Expected, as in the paper's ablation: each contrast raises the CAM over classification alone, and both together are
best; PTC mostly through the final CAM, which without it falls behind the auxiliary one. Segmentation and energy terms
are on in every variant. Cost: twelve runs of `tiny()`. Writes experiments/records/loss_terms.json; results of variants
that are not run again stay in it.
"""

from common import RECORDS, command_line, run_all, table

VARIANTS = {
    "classification only": {"ptc": 0.0, "ctc": 0.0},
    "+ PTC": {"ctc": 0.0},
    "+ CTC": {"ptc": 0.0},
    "full": {},
}


def main() -> None:
    args = command_line(__doc__, VARIANTS)
    state = run_all(args, "what does each contrast add?", RECORDS / "loss_terms.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
