"""A notebook in a JupyterLab, or as an app of voila, driven by headless Chromium: for the explorer's benchmark, its
walk and its browser tests.

    with in_jupyterlab(folder, "some.ipynb") as page:
        run_all_cells(page)
        start_watch(page)
        page.keyboard.press("ArrowRight")
        delays(page)

Needs playwright and a Chromium or Chrome; `NoBrowser` says what is missing.
"""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # cells out of sight stay in the page
    "apputils-extension/notification": {"checkForUpdates": False, "fetchNews": "false"},
}
PATIENCE = 180_000  # ms: a busy machine is no fault

# Each key press opens an entry: when the key came, when the widget's message left, when the last of the pictures that
# it changes was loaded or its overlay became another, and when the frame with it was finished.
WATCH = """(() => {
    window.tocoDelays = []
    let now = null
    const send = WebSocket.prototype.send
    WebSocket.prototype.send = function (...words) {
        if (now && !now.sent) now.sent = performance.now()
        return send.apply(this, words)
    }
    document.addEventListener('keydown', () => { now = { pressed: performance.now() } }, true)
    const changed = picture => {
        const entry = now
        if (!entry || !entry.sent || !picture.closest('.toco-canvas')) return
        const loaded = performance.now()
        requestAnimationFrame(() => setTimeout(() => {
            if (!entry.loaded) window.tocoDelays.push(entry)
            entry.loaded = loaded
            entry.drawn = performance.now()
        }))
    }
    document.addEventListener('load', event => changed(event.target), true)
    const observer = new MutationObserver(changes => changes.forEach(change => changed(change.target)))
    for (const overlay of document.querySelectorAll('.toco-overlay'))
        observer.observe(overlay, { attributeFilter: ['style'] })
})()"""


class NoBrowser(Exception):
    """What is missing, in one line."""


@contextmanager
def in_jupyterlab(folder: Path, notebook: str, *, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """A server in `folder` and its notebook in a window of this size; errors of the console are in `page.errors`."""
    for name, settings in SETTINGS.items():
        path = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings))
    words = ["jupyterlab", "--allow-root", "--ServerApp.port_retries=0", "--IdentityProvider.token="]
    with _a_page(width, height) as page, _server(folder, [*words, f"--ServerApp.root_dir={folder}"]) as address:
        page.goto(f"{address}/lab/tree/{notebook}")
        yield page


@contextmanager
def in_voila(folder: Path, notebook: str, *, width: int = 1280, height: int = 1000) -> Iterator[Any]:
    """An empty page; each `page.goto(page.address + "/?image=3")` is a visit of the app, with a kernel of its own."""
    if importlib.util.find_spec("voila") is None:
        raise NoBrowser("voila is not installed")
    with _a_page(width, height) as page, _server(folder, ["voila", notebook]) as address:
        page.address = address
        yield page


@contextmanager
def _a_page(width: int, height: int) -> Iterator[Any]:
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        raise NoBrowser("playwright is not installed") from None
    with sync_playwright() as playwright:
        found = next(filter(None, map(shutil.which, BROWSERS)), None) or playwright.chromium.executable_path
        if not Path(found).is_file():
            raise NoBrowser(f"no browser: none of {', '.join(BROWSERS)} is on the PATH, and playwright has none")
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": height})
        page.errors = []
        page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.set_default_timeout(PATIENCE)
        yield page
        browser.close()


@contextmanager
def _server(folder: Path, words: list[str]) -> Iterator[str]:
    """A server, a module and its options, in a folder; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).resolve().parents[2])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")])),
        "JUPYTERLAB_SETTINGS_DIR": str(folder / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"),
        "JUPYTER_CONFIG_DIR": str(folder / "config"),
        "JUPYTER_DATA_DIR": str(folder / "data"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    with open(folder / "server.log", "w") as log:
        command = [sys.executable, "-m", *words, "--no-browser", f"--port={port}"]
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
    address, until = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE / 1000
    try:
        while not _answers(port):
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError(f"{words[0]} did not start: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait(30)


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
    except OSError:
        return False
    return True


def run_all_cells(page) -> None:
    """Run the notebook; every cell has its number when this returns, and none has written to stderr."""
    start_all_cells(page)
    n_cells = page.locator(".jp-CodeCell").count()
    numbered = "[...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].filter(p => /\\d/.test(p.textContent))"
    page.wait_for_function(f"{numbered}.length === {n_cells}")
    told = page.locator(".jp-OutputArea-output[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
    assert not told, told


def start_all_cells(page) -> None:
    """Let the notebook run."""
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function("!document.querySelector('.jp-SplashScreen, #jupyterlab-splash')")
    page.click(".jp-Notebook .jp-CodeCell >> nth=0")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()


def slider(page, name: str):
    """The handle of a slider, to be focused and moved with the arrow keys."""
    return page.locator(f".widget-slider:has-text('{name}') .noUi-handle")


def start_watch(page) -> None:
    """From now on every key press is timed. Once per page, with the explorer in it."""
    page.evaluate(WATCH)


def press(page, key: str) -> None:
    """Press a key and wait until the picture that it leads to was drawn and all has come to rest.

    The page is left alone at first: asking it at every frame whether it is done, as playwright does when it waits,
    costs as much as the answer.
    """
    before = page.evaluate("window.tocoDelays.length")
    page.keyboard.press(key)
    page.wait_for_timeout(300)
    page.wait_for_function(f"window.tocoDelays.length > {before}", polling=100)


def delays(page) -> list[dict[str, float]]:
    """Times of the key presses so far, each with `pressed`, `sent`, `loaded`, `drawn` in ms; forgets them."""
    return page.evaluate("window.tocoDelays.splice(0)")
