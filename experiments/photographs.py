"""What the contrasts do for a small folder of photographs and an ImageNet backbone.

    python experiments/photographs.py --dataset <folder> --weights vit_tiny.safetensors --seeds 0 1 2

A fixed fifth of the images is held out (`data.holdout`) and only scored; the threshold of each CAM is the one that is
best on the images that were trained on. The pseudo label (final CAM, the recipe's two thresholds, PAR) leaves pixels
open; they count as missed. Expected: with classification only the final CAM stays behind the auxiliary one; PTC lifts
it. Cost: a training of the recipe `photographs` for each variant and seed, five minutes or more on a CPU core, then one
pass over all images. Finished runs are not trained again, and what the record knows is not scored again. Writes
experiments/records/photographs.json.
"""

import argparse
import json
from pathlib import Path

import torch
from common import RECORDS, mean_and_spread
from loss_terms import VARIANTS

from toco_core.config import override, photographs
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.evaluation.protocols import assess
from toco_core.machine.writing import write_whole
from toco_core.train.loop import trained_run

RECORD = RECORDS / "photographs.json"
KINDS = {"cam": "final CAM", "aux_cam": "auxiliary CAM", "pseudo_label": "pseudo label", "seg": "segmentation"}


def run_variant(config) -> dict:
    """mIoU in percent on the held-out images."""
    model, _, _, data = trained_run(config)
    chosen = evaluate_as(config, model, data.train, what="choosing thresholds")
    thresholds = {"beta": chosen.cam.best_beta, "aux_beta": chosen.aux_cam.best_beta}
    found = assess(model, data.val, config, **thresholds, part="held out", chosen_on="train", scales=(1.0,), crf=False)
    miou = {kind: round(100 * float(found.scores(kind).miou), 2) for kind in KINDS}
    return {"seed": config.seed, **thresholds, "miou": miou, "run": config.short_hash()}


def known_results() -> dict[str, dict]:
    """Hash of the config -> its result in the record, if that has every kind of label."""
    runs = json.loads(RECORD.read_text(encoding="utf-8"))["runs"] if RECORD.is_file() else {}
    return {
        result["run"]: result for results in runs.values() for result in results if set(result["miou"]) == set(KINDS)
    }


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
    runs, known = {}, known_results()
    for seed in args.seeds:
        for name in args.variants:
            config = override(recipe, seed=seed, **VARIANTS[name])
            runs.setdefault(name, []).append(known.get(config.short_hash()) or run_variant(config))
            lines = table(runs)
            record = {"steps": args.steps, "thresholds": "chosen on the training images", "runs": runs}
            record["table"] = lines.splitlines()
            write_whole(RECORD, json.dumps(record, indent=1) + "\n")
            print(lines, flush=True)


if __name__ == "__main__":
    main()
