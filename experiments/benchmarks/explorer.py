"""How soon does the explorer answer? From a moved control to the new picture, at 448 x 448.

    python experiments/benchmarks/explorer.py        # about a minute

Python's side is everything between the browser's message and the bytes that go back: settings, label, picture, numbers,
JPEG; on one thread (OMP_NUM_THREADS=1) it is the process's own time. `pytest -s tests/test_browser.py` prints what a
browser sees, from the key press to the loaded picture. Targets: 60 ms in the median for thresholds, overlay and a
change to an image that was seen before; 250 ms for ten iterations of PAR at half resolution on two cores. Writes
experiments/records/benchmarks_explorer.json.
"""

import argparse
import statistics
import tempfile
from pathlib import Path

import cv2
import numpy as np
import torch
from measure import WIDTHS, clock_name, machine, seconds_of, write_record

from toco_core.config import override, voc
from toco_core.data import VOC_CLASSES
from toco_core.model import ToCo
from toco_core.widgets import Explorer, Session, Subject, Subjects, open_pictures
from toco_core.widgets.subjects import AUXILIARY, CLASSIFIER, DECODER, PROJECTION

SIZE, K = 448, len(VOC_CLASSES) - 1
TARGETS = {"threshold": 60, "overlay": 60, "PAR": 250, "image": 60}  # ms


def explorer_of(folder: Path, width: str) -> Explorer:
    """Two smooth pictures with masks of two classes, in VOC layout, seen by a ViT with random weights."""
    rng = np.random.default_rng(0)
    for part in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (folder / part).mkdir(parents=True)
    for name in ("one", "two"):
        coarse = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / "JPEGImages" / f"{name}.jpg"), cv2.resize(coarse, (SIZE, SIZE)))
        mask = np.zeros((SIZE, SIZE), np.uint8)
        mask[40:220, 60:400], mask[250:420, 100:300] = 8, 12
        cv2.imwrite(str(folder / "SegmentationClass" / f"{name}.png"), mask)
    (folder / "ImageSets/Segmentation/val.txt").write_text("one\ntwo\n")
    (folder / "classes.txt").write_text("\n".join(VOC_CLASSES))
    torch.manual_seed(0)
    config = override(voc(), backbone=WIDTHS[width], pretrained=False, cam_scales=(1.0, 0.5))
    subjects = Subjects()
    has = frozenset((CLASSIFIER, AUXILIARY, DECODER, PROJECTION))
    subjects.add(Subject("random", ToCo(config.model, K).eval(), config, VOC_CLASSES, has))
    return Explorer(Session(open_pictures(folder), subjects))


def median_ms(action, repeats: int) -> float:
    """Median time of `action(i)` in milliseconds, by the clock of `measure`, after two calls that do not count."""
    times = [1000 * seconds_of(lambda i=i: action(i)) for i in range(repeats + 2)]
    return statistics.median(times[2:])


def python_side(explorer: Explorer, repeats: int) -> dict[str, float]:
    """Median milliseconds per kind of change. Every call must change the picture: checked here."""

    def move(name, values):
        def action(i):
            before = explorer.canvases[0].picture
            explorer.controls[name].value = values[i % len(values)]
            assert explorer.canvases[0].picture != before, f"{name} changed nothing"

        return action

    found = {}
    explorer.set(show="seed label", beta_l=0.2)
    found["threshold"] = median_ms(move("beta_h", np.linspace(0.4, 0.8, 41).round(2).tolist()), repeats)
    explorer.set(show="CAM")
    found["overlay"] = median_ms(move("strength", np.linspace(0.1, 0.9, 41).round(2).tolist()), repeats)
    explorer.set(show="pseudo label", par_iterations=10, par_scale=0.5)
    found["PAR"] = median_ms(move("beta_h", [0.5, 0.55, 0.6, 0.65]), max(repeats // 4, 3))
    explorer.set(show="CAM")
    found["image"] = median_ms(lambda i: explorer.go(i % 2), repeats)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="tiny", help="of the vision transformer")
    parser.add_argument("--repeats", type=int, default=40)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = python_side(explorer_of(Path(folder) / "photos", arguments.width), arguments.repeats)
    for what, value in found.items():
        print(f"{what:12}{value:8.1f} ms   target {TARGETS[what]} ms   ({clock_name()})")
    record = {"machine": machine(), "width": arguments.width, "median_ms": {k: round(v, 1) for k, v in found.items()}}
    write_record("benchmarks_explorer.json", record)


if __name__ == "__main__":
    main()
