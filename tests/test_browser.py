"""The explorer as a person uses it: a real JupyterLab in headless Chromium.

Skipped, with the reason, where playwright or a browser is not found. Screenshots are left in pytest's temporary folder.
"""

import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from small_config import small_recipe

from toco_core.config import override
from toco_core.train import train

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "explore.ipynb"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTINGS = {
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension:notification": {"checkForUpdates": False, "fetchNews": "false"},
}
PATIENCE = 180_000  # ms: a busy machine is no fault
HARMLESS = re.compile(r"favicon|ResizeObserver|net::ERR_|status of 404|Failed to load resource")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook, open in JupyterLab in a window of 1280 x 1000, with the errors of its console in `page.errors`."""
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with sync.sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(found).is_file():
            pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the PATH, and playwright has none of its own")
        folder = tmp_path_factory.mktemp("lab")
        models = [short_run(folder / "runs", seed) for seed in (0, 1)]
        write_notebook(folder / "explore.ipynb", model=str(models[0]), image="0", n_images=2, show="seed label")
        for name, settings in SETTINGS.items():
            path = folder / "settings" / name.replace(":", "/").replace("/tracker", "/tracker.jupyterlab-settings")
            path = path if path.suffix else path.with_suffix(".jupyterlab-settings")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings))
        server, address = start_lab(folder)
        try:
            browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1280, "height": 1000})
            page.errors = []
            page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
            page.on("pageerror", lambda error: page.errors.append(str(error)))
            page.set_default_timeout(PATIENCE)
            page.goto(f"{address}/lab/tree/explore.ipynb")
            page.folder, page.models = folder, models
            yield page
            browser.close()
        finally:
            server.terminate()
            server.wait(30)


def short_run(out_dir, seed):
    """A run of a few steps: enough for maps that differ from one seed to the other."""
    config = override(small_recipe(), steps=2, warmup_steps=1, batch_size=2, n_local=2, seed=seed, eval_interval=0)
    config = override(config, crop_size=64, cam_scales=(1.0,), seg_start=1, energy_start=1, out_dir=str(out_dir))
    return train(config, progress=False).run.folder


def write_notebook(path, **parameters):
    """The committed notebook without outputs, with other parameters."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, path)


def start_lab(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(NOTEBOOK.parents[1]), os.environ.get("PYTHONPATH", "")]),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"]
    words += ["--IdentityProvider.token=", f"--ServerApp.root_dir={folder}"]
    with open(folder / "lab.log", "w") as log:
        command = [sys.executable, "-m", "jupyterlab", *words]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(f"{address}/api/status", timeout=5)
            return server, address
        except OSError:
            time.sleep(0.3)
    server.kill()
    raise AssertionError(f"JupyterLab did not start: {(folder / 'lab.log').read_text()[-2000:]}")


def changed(page, what, before):
    """Wait until an expression in the page is no longer what it was; returns the new value."""
    page.wait_for_function(f"before => {{ const now = {what}; return now && now !== before }}", arg=before)
    return page.evaluate(what)


STOP_WATCH = """(() => {  // from the key press to the loaded picture, in ms
    let began = null
    window.tocoDelays = []
    document.addEventListener('keydown', () => { began = performance.now() }, true)
    document.querySelector('.toco-canvas img').addEventListener('load', () => {
        if (began !== null) window.tocoDelays.push(performance.now() - began)
        began = null
    })
})()"""
PICTURE = "document.querySelector('.toco-canvas img')?.src"
NUMBERS = "document.querySelector('.toco-table')?.textContent"
CURVE = "document.querySelector('.toco-explorer svg')?.outerHTML"


def slider(page, name):
    return page.locator(f".widget-slider:has-text('{name}') .noUi-handle")


def shoot(page, name):
    page.locator(".toco-explorer").scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.toco-explorer').scrollIntoView()")
    page.screenshot(path=page.folder / f"{name}.png")


def test_a_person_explores(page):
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("!document.querySelector('.jp-SplashScreen, #jupyterlab-splash')")
    page.click(".jp-Notebook .jp-CodeCell >> nth=0")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    n_cells = page.locator(".jp-CodeCell").count()
    numbered = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].filter(p => /\\d/.test(p.textContent))"
    page.wait_for_function(f"{numbered}.length === {n_cells}")
    assert page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").count() == 0
    page.wait_for_selector(".toco-canvas img")
    first = changed(page, PICTURE, None)
    page.locator(".toco-explorer").scroll_into_view_if_needed()
    numbers = page.evaluate(NUMBERS)
    shoot(page, "first")

    slider(page, "overlay").focus()
    page.evaluate(STOP_WATCH)
    moved = first
    for _ in range(12):
        page.keyboard.press("ArrowRight")
        moved = changed(page, PICTURE, moved)
    delays = page.evaluate("window.tocoDelays")
    print(f"\nkey press to picture: median {statistics.median(delays):.0f} ms of {len(delays)} (target 60 ms)")
    assert len(delays) >= 10
    page.get_by_role("tab", name="labels").click()
    slider(page, "beta_h").focus()
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    moved = changed(page, PICTURE, moved)
    numbers = changed(page, NUMBERS, numbers)
    shoot(page, "slider")

    curve, picture = page.evaluate(CURVE), page.locator(".toco-canvas img").first
    box = picture.bounding_box()
    picture.click(position={"x": 0.2 * box["width"], "y": 0.8 * box["height"]})
    curve = changed(page, CURVE, curve)
    clicked = changed(page, PICTURE, moved)
    picture.hover(position={"x": 0.5 * box["width"], "y": 0.5 * box["height"]})
    page.wait_for_function("/row \\d+, column \\d+ · /.test(document.querySelector('.toco-words').textContent)")
    picture.focus()
    page.keyboard.press("ArrowUp")
    changed(page, CURVE, curve)
    shoot(page, "patch")
    page.locator(".toco-explorer svg").scroll_into_view_if_needed()
    page.screenshot(path=page.folder / "tokens.png")

    page.keyboard.press("n")
    other = changed(page, PICTURE, clicked)
    page.wait_for_function("document.querySelector('.toco-film [aria-selected=true]').title === 'val_00001'")
    page.locator(".toco-film button").nth(4).click()
    page.wait_for_function("document.querySelector('.toco-film [aria-selected=true]').title === 'val_00004'")
    image_4 = changed(page, PICTURE, other)
    numbers = changed(page, NUMBERS, numbers)

    page.locator(".widget-dropdown:has-text('model') select").select_option(page.models[1].name)
    changed(page, PICTURE, image_4)
    changed(page, NUMBERS, numbers)
    page.get_by_role("button", name="compare").click()
    page.wait_for_function("document.querySelectorAll('.toco-canvas').length >= 4")
    page.wait_for_function("getComputedStyle(document.querySelectorAll('.toco-canvas')[1]).width !== 'auto'")
    shoot(page, "compare")

    page.locator(".widget-dropdown:has-text('model') select").select_option("scenes_vit_nano")
    page.wait_for_function("/no trained classifier/.test(document.querySelector('.toco-notes')?.textContent)")
    shoot(page, "message")
    assert [error for error in page.errors if not HARMLESS.search(error)] == []


def test_page_is_not_wider_than_the_window(page):
    inside = page.evaluate(
        "(() => { const out = document.querySelector('.toco-explorer');"
        "const right = out.closest('.jp-OutputArea-output').getBoundingClientRect().right;"
        "return [...out.querySelectorAll('img, .widget-tab, table, svg')]"
        ".filter(e => e.getBoundingClientRect().right > right + 1).length })()"
    )
    assert inside == 0


def test_dark_theme_is_legible(page):
    page.get_by_role("menuitem", name="Settings", exact=True).click()
    page.get_by_text("Theme", exact=True).hover()
    page.get_by_text("JupyterLab Dark", exact=True).click()
    page.wait_for_function("document.body.dataset.jpThemeLight === 'false'")
    page.wait_for_timeout(500)
    shoot(page, "dark")
    dim = page.evaluate(
        "[...document.querySelectorAll('.toco-explorer label, .toco-words, .toco-heading, .toco-table td')]"
        ".filter(e => e.textContent.trim() && e.offsetParent)"
        ".filter(e => { const c = getComputedStyle(e).color.match(/[\\d.]+/g).map(Number);"
        "return c[0] + c[1] + c[2] < 300 }).map(e => e.className + e.textContent)"
    )
    assert dim == []
