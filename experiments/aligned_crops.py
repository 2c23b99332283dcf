"""What two slips of the release cost: local views cut from an image flipped on its own, boxes in pixels on token maps.

    python experiments/aligned_crops.py --seeds 0 1 2 --threads 2

With `independent_local_image` half of the local views come from the mirrored place and carry the flag of another one;
with `pixel_box_on_tokens` PTC sees no token of an image whose padding at the top or left exceeds the token grid.
Expected: wrong flags cost some CAM through CTC; the boxes cost little, since only images scaled down are padded.
Cost: twelve runs of `tiny()`. Writes experiments/records/aligned_crops.json.
"""

from common import RECORDS, command_line, run_all, table

CTC = {"ctc": 0.2}  # off in the recipe; it is what most of the slips would hurt
VARIANTS = {
    "aligned, boxes at token scale": CTC,
    "independent local image": CTC | {"independent_local_image": True},
    "boxes in pixels on tokens": CTC | {"pixel_box_on_tokens": True},
    "both as in the release": CTC | {"independent_local_image": True, "pixel_box_on_tokens": True},
}


def main() -> None:
    args = command_line(__doc__, VARIANTS)
    state = run_all(args, "what do misplaced crops and misplaced boxes cost?", RECORDS / "aligned_crops.json")
    print(table(state["variants"]))


if __name__ == "__main__":
    main()
