"""What each contrast adds to classification with the same warm start.

    python experiments/loss_terms.py --seeds 0 1 2 --threads 1

Expected, as in the paper's ablation: PTC raises the final CAM far over classification alone, where its tokens are
over-smoothed, and with it the pseudo label and the segmentation. Segmentation is trained in every variant. Cost: a run
of `tiny()` for each variant and seed. Writes experiments/records/loss_terms.json; results of variants that are not run
again stay in it. `ceiling.py` tells what true masks would give.
"""

from common import RECORDS, command_line, run_all, table

CTC = 0.2
VARIANTS = {
    "classification only": {"ptc": 0.0, "ctc": 0.0},
    "+ PTC": {"ctc": 0.0},
    "+ CTC": {"ptc": 0.0, "ctc": CTC},
    "+ PTC + CTC": {"ctc": CTC},
}


def main() -> None:
    args = command_line(__doc__, VARIANTS)
    state = run_all(args, "what does each contrast add?", RECORDS / "loss_terms.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
