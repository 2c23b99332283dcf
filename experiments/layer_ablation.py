"""Which block should feed the auxiliary classifier, from whose CAM PTC learns what belongs together?

    python experiments/layer_ablation.py --seeds 0 1 2 --threads 1

Expected: a teacher at a block between, late enough to know the classes and early enough for its tokens to differ; the
last block teaches itself. `tiny()` trains the blocks from 9 on: blocks 7 and 8 read tokens that stay as the backbone
left them, so that only the auxiliary classifier learns there. Cost: a run of `tiny()` for each block and seed. Writes
experiments/records/layer_ablation.json, which `notebooks/layer_ablation.ipynb` shows.
"""

from common import RECORDS, command_line, run_all, table

LAYERS = (7, 8, 9, 10, 11, 12)
VARIANTS = {f"layer={layer}": {"layer": layer} for layer in LAYERS}


def main() -> None:
    args = command_line(__doc__, VARIANTS)
    state = run_all(args, "which block should feed the auxiliary classifier?", RECORDS / "layer_ablation.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
