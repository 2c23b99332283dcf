"""The moving picture of the README: a walk through the explorer in a real browser, on the embedded data set.

    python experiments/walk.py                     # docs/explorer.gif, two to five minutes
    python experiments/walk.py --frames FOLDER     # the frames too, as PNG, to be looked at

Opens a notebook with the shipped run in headless Chromium, moves its controls as a person would, and photographs it
after each step. Nothing is staged: what is seen is what the widgets drew. Expected: a file of at most 2.5 MB. Needs
playwright and a browser.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import nbformat
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))
from browser import NoBrowser, in_jupyterlab, run_all_cells, slider  # noqa: E402

from toco_core.data import open_source  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "explorer.gif"
IMAGE = "val_00080"
PHOTOGRAPH = 4  # of the validation part, whose labels are left out: the reader's own
WINDOW = 1240, 900
TOP = 100  # of the notebook in the window, pixels: menu and tools are above
WIDTH = 860  # of the moving picture, pixels
MOST_BYTES = 2_500_000
CELL = """\
from toco_core.runs.shipped import shipped_runs
from toco_core.widgets import Explorer, Session, Subjects, open_pictures, open_subject

subjects = Subjects()
for run in shipped_runs().values():
    subjects.add(run.folder.name, lambda folder=run.folder: open_subject(folder))
session = Session(open_pictures("scenes", "val"), subjects, first="full")
session.go("{image}")
explorer = Explorer(session, folder="explored")
explorer
"""


JUDGED = "/ (\\d+) of \\1 judged/.test(document.querySelector('.toco-explorer').innerText)"


class Recorder:
    """Photographs of the explorer with a line of words below, and how long each stays."""

    def __init__(self, page):
        self.page, self.frames, self.seconds = page, [], []

    def shoot(self, words: str, seconds: float = 0.9) -> None:
        """Wait until the page rests, and photograph it."""
        self.page.wait_for_timeout(250)
        self._rest()
        photograph = Image.open(io.BytesIO(self.page.screenshot(clip=self._clip()))).convert("RGB")
        height = round(photograph.height * WIDTH / photograph.width)
        frame = Image.new("RGB", (WIDTH, height + 30), "white")
        frame.paste(photograph.resize((WIDTH, height), Image.Resampling.LANCZOS), (0, 0))
        ImageDraw.Draw(frame).text((10, height + 6), words, fill=(30, 30, 30), font=ImageFont.load_default(16))
        self.frames.append(frame)
        self.seconds.append(seconds)

    def _clip(self) -> dict[str, float]:
        box = self.page.locator(".jp-OutputArea-output:has(.toco-explorer)").first.bounding_box()
        return {
            "x": box["x"],
            "y": TOP,
            "width": min(box["width"], WINDOW[0] - box["x"]),
            "height": WINDOW[1] - TOP - 30,
        }

    def _rest(self) -> None:
        """Until the pictures have not changed for a while, and the kernel is idle."""
        look, before = (
            "[...document.querySelectorAll('.toco-explorer img')].map(i => i.src.length).join()",
            None,
        )
        for _ in range(60):
            now = self.page.evaluate(look)
            if now == before:
                return
            before = now
            self.page.wait_for_timeout(200)


def press(page, handle, key: str, times: int) -> None:
    """Move a slider by keys."""
    handle.focus()
    for _ in range(times):
        page.keyboard.press(key)


def top_of(page, selector: str, above: int = TOP + 8) -> None:
    """Scroll so that something is near the top of the window."""
    page.evaluate(
        "([selector, above]) => { const e = document.querySelector(selector);"
        "const s = e.closest('.jp-WindowedPanel-outer') || e.closest('.jp-Notebook');"
        "s.scrollTop += e.getBoundingClientRect().top - above; }",
        [selector, above],
    )


def walk(page, recorder: Recorder, photograph: Path) -> None:
    """The steps, in the order of a person's questions."""
    shoot: Callable = recorder.shoot
    choose = ".widget-dropdown:has(label:text-is('{}')) select"
    top_of(page, ".toco-row")
    shoot("One image: its class map, the pseudo label made of it, and the ground truth, which training never saw.", 2.4)
    page.locator(choose.format("CAM")).select_option("block")
    for block in (10, 8, 6):
        press(page, slider(page, "block"), "ArrowLeft", 2)
        shoot(f"What would block {block} light up?", 0.8)
    page.locator(choose.format("CAM")).select_option("final")
    press(page, slider(page, "block"), "ArrowRight", 6)
    shoot("The last block again.", 0.9)
    page.get_by_role("tab", name="labels").click()
    for _ in range(3):
        press(page, slider(page, "beta_h"), "ArrowRight", 9)
        shoot("A stricter threshold: less of the animal is sure.", 0.6)
    press(page, slider(page, "beta_h"), "ArrowLeft", 27)
    press(page, slider(page, "PAR iterations"), "ArrowLeft", 10)
    shoot("Without refinement the label is as coarse as the patches,", 1.3)
    press(page, slider(page, "PAR iterations"), "ArrowRight", 10)
    shoot("with it, it ends where the colours change.", 1.5)
    click_at(page, 1, 0.55, 0.45)
    shoot("Why this pixel? Its values against the thresholds, through PAR, and who voted.", 2.6)
    page.get_by_role("button", name="compare").click()
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 6")
    page.locator(".widget-toggle-button:text-is('B')").click()
    page.locator(choose.format("model")).select_option("classification")
    top_of(page, ".toco-row")
    shoot("The same network trained without token contrast, below.", 2.4)
    page.get_by_role("button", name="compare").click()
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 4")
    page.get_by_role("button", name="curtain").first.click()
    page.wait_for_function("document.querySelector('.toco-row img.toco-under')?.naturalWidth > 0")
    top_of(page, ".toco-row")
    box = page.locator(".toco-row .toco-frame").bounding_box()
    page.mouse.move(box["x"] + 0.5 * box["width"], box["y"] + 0.9 * box["height"])
    page.mouse.down()
    for share in (0.4, 0.3, 0.2):
        page.mouse.move(box["x"] + share * box["width"], box["y"] + 0.9 * box["height"], steps=4)
        shoot("A curtain between any two views.", 0.7)
    page.mouse.up()
    page.get_by_role("button", name="side by side").click()
    top_of(page, ".toco-film")
    page.locator(".toco-film button").nth(2).click()
    shoot("Another image: each class in its colour, with the classifier's probability.", 1.8)
    page.locator(".toco-chips button[aria-pressed=true]:has(b)").first.click()
    shoot("A click switches a class off.", 1.4)
    page.get_by_role("tab", name="look").click()
    page.locator(choose.format("which")).select_option("labelled")
    page.locator("input[type=file]").set_input_files(photograph)
    page.wait_for_function(f"document.querySelector('.toco-film [aria-selected=true]')?.title === {photograph.stem!r}")
    top_of(page, ".toco-film")
    shoot("A photograph of your own, chosen, dropped or pasted: the classes are those that the model sees.", 2.2)
    page.get_by_role("button", name="play", exact=True).click()
    page.wait_for_function("document.querySelector('.toco-played')?.naturalWidth > 0")
    top_of(page, ".toco-played-caption")
    handle = page.locator(".widget-hbox:has(> .widget-play) .noUi-handle")
    press(page, handle, "Home", 1)
    for step in range(5):
        press(page, handle, "ArrowRight", 2 if step else 1)
        shoot("Play it over the blocks, over PAR's iterations, over a training.", 0.5)
    page.get_by_role("button", name="play", exact=True).click()
    page.wait_for_function("!document.querySelector('.toco-played')")
    page.get_by_role("button", name="gallery of the split").click()
    page.wait_for_selector(".toco-gallery img")
    page.locator(choose.format("order")).last.select_option("lowest IoU first")
    top_of(page, ".toco-gallery", TOP + 120)
    page.wait_for_function(JUDGED)
    top_of(page, ".toco-gallery", TOP + 120)
    shoot("All images of the split, the worst labels first.", 2.6)


def click_at(page, number: int, down: float, across: float) -> None:
    """Click one of the views, at a place in fractions of it."""
    picture = page.locator(".toco-row .toco-canvas img.toco-picture").nth(number)
    box = picture.bounding_box()
    picture.click(position={"x": across * box["width"], "y": down * box["height"]})


def write_gif(recorder: Recorder, path: Path) -> int:
    """One palette for all frames; what stays the same from one frame to the next costs nothing. Returns the bytes."""
    frames = recorder.frames
    height = max(frame.height for frame in frames)
    mosaic = Image.new("RGB", (WIDTH, height * min(6, len(frames))))
    for i, frame in enumerate(frames[:: max(1, len(frames) // 6)][:6]):
        mosaic.paste(frame, (0, i * height))
    palette = mosaic.quantize(256, method=Image.Quantize.MEDIANCUT)
    pictures = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    options = {
        "duration": [round(1000 * s) for s in recorder.seconds],
        "loop": 0,
        "optimize": True,
    }
    pictures[0].save(path, save_all=True, append_images=pictures[1:], **options)
    return path.stat().st_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FILE, help="the moving picture (docs/explorer.gif)")
    parser.add_argument("--frames", type=Path, help="folder for the frames, too")
    arguments = parser.parse_args()
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cell = nbformat.v4.new_code_cell(CELL.format(image=IMAGE))
    with tempfile.TemporaryDirectory(prefix="toco-") as folder:
        notebook = nbformat.v4.new_notebook(cells=[cell], metadata={"kernelspec": kernel})
        nbformat.write(notebook, f"{folder}/walk.ipynb")
        photograph = Path(folder) / "mine.png"
        Image.fromarray(open_source("scenes", "val").image(PHOTOGRAPH)).save(photograph)
        try:
            with in_jupyterlab(Path(folder), "walk.ipynb", width=WINDOW[0], height=WINDOW[1]) as page:
                run_all_cells(page)
                page.wait_for_function('document.querySelector(".toco-canvas img:not(.toco-under)")?.naturalWidth > 0')
                page.keyboard.press("Control+b")  # the list of files goes
                recorder = Recorder(page)
                try:
                    walk(page, recorder, photograph)
                finally:
                    if arguments.frames:
                        arguments.frames.mkdir(parents=True, exist_ok=True)
                        for i, frame in enumerate(recorder.frames):
                            frame.save(arguments.frames / f"{i:03d}.png")
                if page.errors:
                    print("\n".join(page.errors))
        except NoBrowser as error:
            raise SystemExit(str(error)) from error
    size = write_gif(recorder, arguments.out)
    print(f"{arguments.out}: {len(recorder.frames)} frames, {size / 1e6:.2f} MB")
    if size > MOST_BYTES:
        raise SystemExit(f"{size} bytes: at most {MOST_BYTES} are allowed")


if __name__ == "__main__":
    main()
