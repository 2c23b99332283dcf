"""What no weakly supervised method could pass: the same network taught by the true masks of the training part.

    python experiments/ceiling.py --seeds 0 1 2

The decoder and the blocks that `tiny()` trains learn from masks, in as many steps and batches as in the recipe; scored
on the test part as its segmentation is. The rates are those that suit masks best on the validation part (`RATES`): a
ceiling that the recipe's own rates lower would flatter it. Cost: about a minute a seed. Writes
experiments/records/ceiling.json.
"""

import argparse
import json

import torch
from common import RECORDS, mean_and_spread

from toco_core.analysis.second_stage import train_segmentation
from toco_core.config import override, tiny
from toco_core.data import open_data
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.evaluation.scores import reported_part
from toco_core.machine.writing import write_whole

RATES = {"lr": 1e-3, "head_lr_scale": 8.0}


def supervised(seed: int, steps: int | None) -> dict:
    """Segmentation in percent on the test part: mIoU, and the IoU of every class."""
    config = override(tiny(), seed=seed, **RATES)
    data = open_data(config.data)
    model = train_segmentation(config, data.train, steps=steps)
    scores = evaluate_as(config, model, reported_part(data)[1], progress=False).seg
    return {
        "seed": seed,
        "steps": steps or config.schedule.steps,
        "seg_miou": round(100 * float(scores.miou), 2),
        "iou": [round(100 * float(value), 2) for value in scores.iou],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="training steps; by default the recipe's")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    runs = [supervised(seed, args.steps) for seed in args.seeds]
    record = {"question": "what would true masks give?", "part": "test", "rates": RATES, "runs": runs}
    record |= {"torch": torch.__version__}
    write_whole(RECORDS / "ceiling.json", json.dumps(record, indent=1) + "\n")
    print(f"taught by true masks: {mean_and_spread([run['seg_miou'] for run in runs])} mIoU")


if __name__ == "__main__":
    main()
