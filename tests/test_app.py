"""The explorer as an app: a real voila, and its visitor in headless Chromium.

Skipped, with the reason, where voila, playwright or a browser is not found.
"""

from pathlib import Path

import numpy as np
import pytest
from browser import NoBrowser, in_voila
from PIL import Image
from small_config import short_run
from test_browser import CHOSEN, HARMLESS, PICTURE, SHAPE, WIDER, changed, write_notebook


@pytest.mark.slow
def test_a_visitor_of_the_app(tmp_path):
    """What a visitor of the notebook does where voila serves it; nothing is written beside it."""
    photograph = tmp_path / "photographs" / "mine.png"
    photograph.parent.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)).save(photograph)
    folder = tmp_path / "app"
    folder.mkdir()
    write_notebook(folder / "explore.ipynb", model=str(short_run(tmp_path / "runs", 0)), n_images=2)
    try:
        with in_voila(folder, "explore.ipynb") as page:
            page.goto(f"{page.address}/?image=3&show=seed+label&views=image,seed+label&contours=false")
            page.wait_for_selector(".toco-row img.toco-picture")
            before = sorted(path.name for path in folder.iterdir())
            picture = changed(page, PICTURE, None)
            assert page.evaluate(CHOSEN) == "val_00003" and page.locator(".toco-row .toco-canvas").count() == 2
            assert page.locator(".toco-notes").count() == 0

            page.locator(".toco-chips button[aria-pressed=false]").first.click()
            picture, pinned = changed(page, PICTURE, picture), page.locator(".toco-why").inner_text()
            page.locator(".toco-row .toco-frame").first.click(position={"x": 30, "y": 40})
            changed(page, PICTURE, picture)
            page.wait_for_function("before => document.querySelector('.toco-why').innerText !== before", arg=pinned)

            page.get_by_role("tab", name="keep").click()
            for button, end in (("label PNG", "-label.png"), ("figure SVG", ".svg")):
                with page.expect_download() as waiting:
                    page.get_by_role("button", name=button).click()
                assert waiting.value.suggested_filename == f"val_00003-seed_label{end}"
                assert Path(waiting.value.path()).stat().st_size > 100
            page.get_by_role("button", name="play", exact=True).click()
            page.wait_for_selector(".toco-played")
            with page.expect_download() as waiting:
                page.get_by_role("button", name="GIF", exact=True).click()
            with Image.open(waiting.value.path()) as movie:
                assert movie.n_frames > 1

            page.locator("input[type=file]").set_input_files(photograph)
            page.wait_for_function(f"{CHOSEN} === 'mine'")
            page.wait_for_function(f"Math.abs({SHAPE} - 90 / 60) < 0.01")
            page.screenshot(path=tmp_path / "app.png")
            page.set_viewport_size({"width": 390, "height": 900})
            page.wait_for_timeout(400)
            assert page.evaluate(WIDER) == []
            page.goto(f"{page.address}/?image=nowhere")
            page.wait_for_function(
                "/image = 'nowhere' is not in/.test(document.querySelector('.toco-notes')?.innerText)"
            )
            assert [error for error in page.errors if not HARMLESS.search(error)] == []
            assert sorted(path.name for path in folder.iterdir()) == before
    except NoBrowser as error:
        pytest.skip(str(error))
