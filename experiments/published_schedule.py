"""The published schedule in small beside the small recipe: how the CAMs of both grow on photographs.

    python experiments/published_schedule.py --dataset <VOC folder> --weights vit_tiny.safetensors --precision bf16

The release's recipe `voc()` in fewer steps and with a smaller backbone, everything else in its proportion: crops of
448 pixels, batch 4, all blocks trained, CAMs over scales 1, 0.5 and 1.5, thresholds 0.25 and 0.7, PTC and CTC from the
first step, 7.5 % of the steps for the warm-up, segmentation after a tenth. Expected, as in the published log: the
auxiliary CAM leads first, the final CAM overtakes it, segmentation comes last. `photographs()` runs beside it; nothing
is chosen here. A ViT-Tiny has a few tokens in its middle blocks that are thirty times longer than the others, and the
auxiliary classifier's maximum reads these (docs/backbones.md): the second row is the same with normalised auxiliary
tokens.

`compare_runs.ipynb -p runs <one>,<other> -p published always` draws the curves of both over the published one. Cost:
about five seconds a step of the published recipe on one CPU core, hours in all; an interrupted call goes on where it
was. Writes experiments/records/published_schedule.json.
"""

import argparse
from pathlib import Path

import torch
from common import RECORDS, use_threads
from photographs import KINDS, keep_result, known_results, run_variant, table

from toco_core.config import TrainConfig, configured, photographs, voc
from toco_core.data import open_source
from toco_core.runs.folder import Run

PUBLISHED = "published schedule"
RECORD = RECORDS / "published_schedule.json"
CURVE = ("cam_miou", "aux_cam_miou", "seg_miou", "map", "aux_map", "best_beta")


def recipes(dataset: str, steps: int, small_steps: int, validations: int) -> dict[str, TrainConfig]:
    """The recipes with so many validations each; the warm-up of the published one keeps its share of the steps."""
    published = voc(dataset)
    published = configured(
        published,
        backbone="vit_tiny_patch16_224",
        train_split="train",
        steps=steps,
        warmup_steps=round(published.schedule.warmup_steps * steps / published.schedule.steps),
        eval_interval=steps // validations,
        workers=0,
    )
    return {
        PUBLISHED: published,
        f"{PUBLISHED}, auxiliary tokens normalised": configured(published, aux_norm=True),
        "photographs": configured(photographs(dataset), steps=small_steps, eval_interval=small_steps // validations),
    }


def curve(config: TrainConfig) -> list[dict]:
    """The validations of a run: step and scores."""
    records = [record for record in Run.of(config).records() if record.get("cam_miou") is not None]
    return [
        {"step": record["step"] + 1} | {name: round(record[name], 2) for name in CURVE if record.get(name) is not None}
        for record in records
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--weights", required=True, help="file of vit_tiny_patch16_224's ImageNet weights")
    parser.add_argument("--steps", type=int, default=1000, help="of the published recipe")
    parser.add_argument("--small-steps", type=int, default=400, help="of the recipe `photographs`")
    parser.add_argument("--rows", nargs="+", type=int, default=[0, 1, 2], choices=[0, 1, 2], help="of the table")
    parser.add_argument("--curve-on", default="val", help="list of images for the validations of a run")
    parser.add_argument("--validations", type=int, default=10, help="in a run")
    parser.add_argument("--precision", default="auto", help="as in the config; bf16 halves the time on many CPUs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out-dir", type=Path, default=Path("runs"))
    args = parser.parse_args()
    use_threads(args.threads)
    common = {"weights": args.weights, "out_dir": str(args.out_dir), "precision": args.precision}
    found = list(recipes(args.dataset, args.steps, args.small_steps, args.validations).items())
    for name, config in (found[i] for i in args.rows):
        config = configured(config, **common, val_split=args.curve_on)
        result = known_results(RECORD, KINDS).get(config.short_hash())
        if result is None:
            result = run_variant(config, part=lambda data: open_source(data.val.root, "val"))
            result |= {"steps": config.schedule.steps, "curve": curve(config)}
        print(name, Run.of(config).folder, flush=True)
        facts = {"thresholds": "the recipes'", "curve_on": args.curve_on, "torch": torch.__version__}
        print(table(keep_result(RECORD, name, result, table, facts, config)["runs"]), flush=True)


if __name__ == "__main__":
    main()
