"""What the contrasts do for a small folder of photographs and an ImageNet backbone.

    python experiments/photographs.py --dataset <folder> --weights vit_tiny.safetensors --seeds 0 1 2

A fixed fifth of the images is held out (`data.holdout`) and only scored; the threshold of each CAM is the one that is
best on the images that were trained on. Expected: with classification only the final CAM stays behind the auxiliary
one; PTC and CTC lift it. Cost: a training of the recipe `photographs` for each variant and seed, then one pass over all
images. Finished runs are not repeated. Writes experiments/records/photographs.json.
"""

import argparse
import json
from pathlib import Path

import torch
from common import RECORDS, mean_and_spread
from loss_terms import VARIANTS

from toco_core.config import override, photographs
from toco_core.runs import write_whole
from toco_core.train import evaluate_as, trained_run

KINDS = {"cam": "final CAM", "aux_cam": "auxiliary CAM", "seg": "segmentation"}


def run_variant(config) -> dict:
    """mIoU in percent on the held-out images."""
    model, _, _, data = trained_run(config)
    chosen = evaluate_as(config, model, data.train, what="choosing thresholds")
    found = evaluate_as(config, model, data.val, what="scoring")
    beta, aux_beta = chosen.cam.best_beta, chosen.aux_cam.best_beta
    scores = {"cam": found.cam.scores(beta), "aux_cam": found.aux_cam.scores(aux_beta), "seg": found.seg}
    miou = {kind: round(100 * float(score.miou), 2) for kind, score in scores.items()}
    return {"seed": config.seed, "beta": beta, "aux_beta": aux_beta, "miou": miou, "run": config.short_hash()}


def table(runs: dict[str, list[dict]]) -> str:
    """Markdown: mean and sample standard deviation over the seeds, in percent."""
    lines = [f"| variant | seeds | {' | '.join(KINDS.values())} |", "|---" * (2 + len(KINDS)) + "|"]
    for name, results in runs.items():
        cells = [mean_and_spread([result["miou"][kind] for result in results]) for kind in KINDS]
        lines.append(f"| {name} | {len(results)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weights", required=True, help="file of vit_tiny_patch16_224's ImageNet weights")
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=photographs().schedule.steps)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    recipe = override(photographs(args.dataset), weights=args.weights, steps=args.steps, out_dir=str(args.out_dir))
    runs: dict[str, list[dict]] = {}
    for seed in args.seeds:
        for name in args.variants:
            runs.setdefault(name, []).append(run_variant(override(recipe, seed=seed, **VARIANTS[name])))
            lines = table(runs)
            record = {"steps": args.steps, "thresholds": "chosen on the training images", "runs": runs}
            record["table"] = lines.splitlines()
            write_whole(RECORDS / "photographs.json", json.dumps(record, indent=1) + "\n")
            print(lines, flush=True)


if __name__ == "__main__":
    main()
