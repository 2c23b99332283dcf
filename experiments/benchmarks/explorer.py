"""How soon does the explorer answer? From a moved control to the new picture, at 448 x 448.

    python experiments/benchmarks/explorer.py                 # about two minutes
    python experiments/benchmarks/explorer.py --no-browser    # Python's side only

Python's side is everything between the browser's message and the bytes that go back: settings, labels, numbers, the
JPEGs of the views side by side; on one thread (OMP_NUM_THREADS=1) it is the process's own time. The browser's side is a
JupyterLab in headless Chromium, by the clock on the wall: from the message that leaves the browser to the new picture,
loaded and drawn, and the same from the key press; of several pictures the last one counts. Targets, from message to
loaded picture: 40 ms in the median for thresholds and overlay; 60 ms for a class that is switched on or off and for an
image that was seen before; 250 ms for ten iterations of PAR at half resolution, and for another pixel with the panel
about it, on two cores. 3 s from a photograph of one's own to its first map by the ImageNet head of a ViT-Tiny, 10 s
from *Run All Cells* of the notebook to its picture. Writes
experiments/records/benchmarks_explorer.json.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import cv2
import nbformat
import numpy as np
import torch
from browser import NoBrowser, delays, in_jupyterlab, press, run_all_cells, slider, start_all_cells, start_watch
from measure import WIDTHS, clock_name, machine, seconds_of, write_record
from safetensors.torch import save_file

from toco_core.config import override, voc
from toco_core.data import VOC_CLASSES
from toco_core.model import ToCo
from toco_core.predict.class_maps import open_classifier
from toco_core.widgets import Explorer, Session, Subject, Subjects, open_pictures, open_subject
from toco_core.widgets.subjects import AUXILIARY, CLASSIFIER, DECODER, PROJECTION

SIZE, K = 448, len(VOC_CLASSES) - 1
TARGETS = {"threshold": 40, "overlay": 40, "PAR": 250, "image": 60, "class": 60, "pixel": 250}  # ms
VIEWS = ("image", "CAM", "seed label", "ground truth")
SHOWN = {"threshold": "seed label", "PAR": "pseudo label"} | dict.fromkeys(
    ("overlay", "image", "class", "pixel"), "CAM"
)
KEYS = {"image": ("n", "p"), "pixel": ("ArrowUp", "ArrowDown"), "class": ("Enter", "Enter")}
NOTEBOOK = Path(__file__).resolve().parents[2] / "notebooks" / "explore.ipynb"
SPANS = {"message to picture": ("sent", "loaded"), "message to frame": ("sent", "drawn"),
         "key to picture": ("pressed", "loaded"), "key to frame": ("pressed", "drawn")}  # fmt: skip
CELL = """\
import sys
sys.path.insert(0, {here!r})
from pathlib import Path
from explorer import explorer_of

explorer = explorer_of(Path("photos"), {width!r})
explorer.set(beta_l=0.0, beta_h=0.6, par_iterations=10, par_scale=0.5)
explorer
"""


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
    session = Session(open_pictures(folder), subjects)
    session.arrange_views(views=VIEWS)
    return Explorer(session)


def photograph_seconds(folder: Path) -> float:
    """From the bytes of a photograph to the first maps of a ViT-Tiny with an ImageNet head (random weights)."""
    name, model = "vit_tiny_patch16_224", folder / "model.safetensors"
    save_file(dict(open_classifier(name, pretrained=False).model.state_dict()), model)
    explorer = explorer_of(folder / "photographs", "tiny")
    explorer.model.options = (*explorer.model.options, explorer.session.subjects.add(open_subject(name, weights=model)))
    explorer.model.value = name
    coarse = np.random.default_rng(1).integers(0, 256, (9, 12, 3), dtype=np.uint8)
    data = cv2.imencode(".jpg", cv2.resize(coarse, (1600, 1200)))[1].tobytes()
    begun = time.monotonic()
    explorer.door._handle_custom_msg({"name": "mine.jpg"}, [data])
    assert explorer.session.picture.name == "mine" and explorer.notes.value.count("predicted classes")
    return time.monotonic() - begun


def median_ms(action, repeats: int) -> float:
    """Median time of `action(i)` in milliseconds, by the clock of `measure`, after two calls that do not count."""
    times = [1000 * seconds_of(lambda i=i: action(i)) for i in range(repeats + 2)]
    return statistics.median(times[2:])


def python_side(explorer: Explorer, repeats: int) -> dict[str, float]:
    """Median milliseconds per kind of change. Every call must change the picture: checked here."""

    def move(name, values):
        def action(i):
            before = [(canvas.picture, canvas.strength) for canvas in explorer.tiles.canvases]
            explorer.controls.of[name].value = values[i % len(values)]
            after = [(canvas.picture, canvas.strength) for canvas in explorer.tiles.canvases]
            assert after != before, f"{name} changed nothing"

        return action

    found = {}
    explorer.set(show="seed label", beta_l=0.2)
    found["threshold"] = median_ms(move("beta_h", np.linspace(0.4, 0.8, 41).round(2).tolist()), repeats)
    explorer.set(show="CAM")
    found["overlay"] = median_ms(move("strength", np.linspace(0.1, 0.9, 41).round(2).tolist()), repeats)
    explorer.set(show="pseudo label", beta_h=0.9, par_iterations=10, par_scale=0.5)
    found["PAR"] = median_ms(move("beta_h", np.linspace(0.4, 0.8, 41).round(2).tolist()), max(repeats // 4, 3))
    explorer.set(show="CAM")
    found["image"] = median_ms(lambda i: explorer.go(i % 2), repeats)
    found["class"] = median_ms(lambda i: setattr(explorer.controls.classes, "toggled", ["dog", i]), repeats)
    middle = explorer.tiles.canvases[0]
    found["pixel"] = median_ms(lambda i: setattr(middle, "click", [0.3 + 0.4 * (i % 2), 0.5, i]), max(repeats // 4, 3))
    return found


def browser_side(width: str, repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds per kind of change, from message or key press to the picture loaded or drawn."""
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = nbformat.v4.new_code_cell(CELL.format(here=str(Path(__file__).resolve().parent), width=width))
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel}), f"{folder}/one.ipynb")
        with in_jupyterlab(Path(folder), "one.ipynb") as page:
            run_all_cells(page)
            page.wait_for_function("document.querySelector('.toco-row img.toco-picture')?.naturalWidth > 0")
            start_watch(page)
            for what, show in SHOWN.items():
                page.get_by_role("tab", name="look").click()
                page.locator(".widget-dropdown:has-text('show') select").select_option(show)
                page.wait_for_timeout(1500)
                if what in ("threshold", "PAR"):
                    page.get_by_role("tab", name="labels").click()
                if what == "class":
                    page.locator(".toco-chips button:has-text('dog')").focus()
                elif what in KEYS:
                    page.locator(".toco-row img.toco-picture").first.focus()
                else:
                    slider(page, "overlay" if what == "overlay" else "beta_h").focus()
                for i in range(repeats + 3):
                    if i == 3:  # what came before does not count: images seen for the first time
                        delays(page)
                    back = i % 20 >= 10  # up and down again
                    press(page, KEYS.get(what, ("ArrowRight", "ArrowLeft"))[back])
                times = delays(page)
                assert len(times) == repeats, f"{what}: {len(times)} pictures of {repeats}"
                found[what] = {
                    name: statistics.median(t[end] - t[begin] for t in times) for name, (begin, end) in SPANS.items()
                }
    return found


def start_seconds() -> float:
    """From *Run All Cells* of the explorer's notebook to its first picture, in a JupyterLab that is open."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copy(NOTEBOOK, folder)
        with in_jupyterlab(Path(folder), NOTEBOOK.name) as page:
            idle = "document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status === 'idle'"
            page.wait_for_function(idle)
            start_all_cells(page)
            begun = time.monotonic()
            page.wait_for_function("document.querySelector('.toco-row img.toco-picture')?.naturalWidth > 0")
            return time.monotonic() - begun


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", choices=WIDTHS, default="tiny", help="of the vision transformer")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--no-browser", action="store_true", help="Python's side only")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = python_side(explorer_of(Path(folder) / "photos", arguments.width), arguments.repeats)
        own = photograph_seconds(Path(folder))
    print(f"own photograph to its maps {own:8.1f} s   target 3 s")
    for what, value in found.items():
        print(f"Python's side, {what:12}{value:8.1f} ms   ({clock_name()})")
    seen, begin = {}, None
    if not arguments.no_browser:
        try:
            seen, begin = browser_side(arguments.width, arguments.repeats), start_seconds()
            print(f"Run All Cells to the first picture {begin:.1f} s   target 10 s")
        except NoBrowser as error:
            print(error)
    for what, spans in seen.items():
        words = "   ".join(f"{name} {value:.0f}" for name, value in spans.items())
        print(f"browser, {what:10} {words} ms   target {TARGETS[what]} ms, message to picture")

    def rounded(values: dict[str, float]) -> dict[str, float]:
        return {name: round(value, 1) for name, value in values.items()}

    record = {"machine": machine(), "width": arguments.width, "repeats": arguments.repeats, "median_ms": rounded(found)}
    record["photograph_s"], record["start_s"] = round(own, 2), begin and round(begin, 1)
    record["browser_median_ms"] = {what: rounded(spans) for what, spans in seen.items()}
    write_record("benchmarks_explorer.json", record)


if __name__ == "__main__":
    main()
