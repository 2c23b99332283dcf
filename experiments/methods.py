"""Do ideas of later papers beat ToCo here, on the same network, data and number of steps?

    python experiments/methods.py --seeds 0 1 2 --threads 1

Each row adds one idea to `tiny()`. Expected: an idea that makes better labels (attention, the decoder's answer to the
CAM) helps the pseudo label most, one that contrasts tokens once more helps little beside PTC. Found: exchange moves the
map and the segmentation by a point, prototypes the pseudo label by two, attention takes ten away. Cost: a run of
`tiny()` for each variant and seed. Writes experiments/records/methods.json, which `notebooks/methods.ipynb` shows.
"""

from common import RECORDS, command_line, run_all, table

IDEAS = {
    "ToCo": {},
    "exchange": {"exchange": 0.05, "exchange_start": 200},
    "consistency": {"consistency": 0.1, "consistency_start": 150},
    "prototypes": {"prototypes": 0.3},
    "frequency": {"frequency": 1.0},
    "frequency for PTC": {"frequency": 1.0, "ptc": 0.0},
    "reliable": {"reliable": 0.05, "reliable_start": 100},
    "attention": {"attention_steps": 1, "attention_kind": "pattern"},
}
"""Name -> the fields of `tiny()` that it changes."""


def main() -> None:
    args = command_line(__doc__, IDEAS)
    state = run_all(args, "do ideas of later papers beat ToCo here?", RECORDS / "methods.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
