"""Does class token contrast in any form help on top of PTC, and does it collapse?

    python experiments/ctc_variants.py --seeds 0 --threads 1
    python experiments/ctc_variants.py --seeds 1 --threads 2 --out-dir runs/two_threads --variants "paper's form"

The paper's form and what takes its shortcut away: crops resized to the image's size, cosines for logits, negatives from
images of other classes, all three together. Besides the scores each run is held against the gauge of
`analysis.crop_contrast` on validation images: crops with more than 60 % of object against crops with less than 5 %, by
the masks. Expected: the paper's form tells crops from whole images by their size and lets all projections of crops come
together (likeness near 1); the variants do not; none moves the CAM by more than seeds do. Found: all collapse. Cost: a
run of `tiny()` for each variant and seed, with resized crops about twice as long. Shipped runs (seed 0 of the first
two) are not trained again, whatever the threads. `--costs` measures instead what a training with each takes. Writes
experiments/records/ctc_variants.json.
"""

from common import RECORDS, add_result, command_line, run_variant, table, use_threads
from methods import costs, costs_option

from toco_core.analysis.crop_contrast import crop_contrast
from toco_core.config import TrainConfig, configured, tiny
from toco_core.train.loop import trained_run

CTC = {"ctc": 0.2}
VARIANTS = {
    "PTC alone": {"ctc": 0.0},
    "paper's form": CTC,
    "resized crops": CTC | {"local_resized": True},
    "cosine": CTC | {"ctc_cosine": True},
    "batch negatives": CTC | {"ctc_batch_negatives": True},
    "all three": CTC | {"local_resized": True, "ctc_cosine": True, "ctc_batch_negatives": True},
}
RECORD = RECORDS / "ctc_variants.json"
MOST, LEAST = 0.6, 0.05
"""Share of object from which a crop shows one, and up to which it shows background."""


def main() -> None:
    args = command_line(__doc__, VARIANTS, more=costs_option)
    use_threads(args.threads)
    if args.costs:
        costs(configured(tiny(), **args.common), args.variants, RECORD)
        return
    state = {"variants": {}}
    for seed in args.seeds:
        for name, overrides in args.variants.items():
            overrides = {**args.common, **overrides}
            result = run_variant(name, overrides, seed, args.out_dir)
            config = configured(tiny(), **overrides, seed=seed, out_dir=str(args.out_dir))
            result |= {"threads": args.threads, "crops": gauge(config)}
            print(" ".join(f"{key}={value}" for key, value in result.items()), flush=True)
            shown = name if args.threads == 1 else f"{name}, {args.threads} threads"
            question = "does class token contrast help on top of PTC, and does it collapse?"
            state = add_result(RECORD, question, shown, overrides, result)
    print(table(state["variants"]))


def gauge(config: TrainConfig, *, n_crops: int = 8) -> dict[str, float]:
    """What a finished run makes of crops of all validation images: how full ones lie to those of background.

    `gap_...` and `auc_...` of the class token, the projected cosine and the logit, against the whole image; `likeness`
    of the projections of crops of different images; `to_image`, the mean projected cosine of full crops.
    """
    opened = trained_run(config)
    found = crop_contrast(opened.model, opened.data.val, opened.config, n_images=len(opened.data.val), n_crops=n_crops)
    limits = {"at_least": MOST, "at_most": LEAST}
    values = {name: getattr(found, name) for name in ("class_token", "projected", "logit")}
    numbers = {f"gap_{name}": found.gap(value, **limits) for name, value in values.items()}
    numbers |= {f"auc_{name}": found.auc(value, **limits) for name, value in values.items()}
    full = found.object_share >= MOST
    numbers |= {"likeness": found.likeness(), "to_image": float(found.projected[full].mean())}
    counts = {"full": int(full.sum()), "empty": int((found.object_share <= LEAST).sum())}
    return {name: round(value, 4) for name, value in numbers.items()} | counts


if __name__ == "__main__":
    main()
