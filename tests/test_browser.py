"""The explorer as a person uses it: a real JupyterLab in headless Chromium; `test_app.py` has it as an app.

Skipped, with the reason, where playwright or a browser is not found. Screenshots are left in pytest's temporary folder.
"""

import base64
import re
import statistics
from contextlib import contextmanager
from pathlib import Path

import nbformat
import numpy as np
import pytest
from browser import PATIENCE, NoBrowser, delays, in_jupyterlab, press, run_all_cells, slider, start_watch
from PIL import Image
from small_config import short_run

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "notebooks" / "explore.ipynb"
HARMLESS = re.compile(r"favicon|ResizeObserver|net::ERR_|status of 404|Failed to load resource")


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The notebook, open in JupyterLab in a window of 1280 x 1000, with the errors of its console in `page.errors`."""
    folder = tmp_path_factory.mktemp("lab")
    models = [short_run(folder / "runs", seed) for seed in (0, 1)]
    write_notebook(folder / "explore.ipynb", model=str(models[0]), image="0", n_images=2, show="seed label")
    try:
        with in_jupyterlab(folder, "explore.ipynb") as page:
            page.folder, page.models = folder, models
            yield page
    except NoBrowser as error:
        pytest.skip(str(error))


def write_notebook(path, **parameters):
    """The committed notebook without outputs, with other parameters, and with every source shown."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    at = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    lines = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
    notebook.cells.insert(at + 1, nbformat.v4.new_code_cell(lines))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("jupyter", None)
    nbformat.write(notebook, path)


def changed(page, what, before):
    """Wait until an expression in the page is no longer what it was; returns the new value."""
    page.wait_for_function(f"before => {{ const now = {what}; return now && now !== before }}", arg=before)
    return page.evaluate(what)


PICTURE = """[...document.querySelectorAll('.toco-row .toco-layer:has(> .toco-picture)')].map(layer => {
    const mix = layer.querySelector('.toco-mix'), overlay = layer.querySelector('.toco-overlay')
    return mix.hidden ? layer.querySelector('.toco-picture').src : overlay.style.opacity + overlay.src
}).join('|')"""
PLACES = """Object.fromEntries([...document.querySelectorAll('.toco-row .toco-canvas')].map(canvas => {
    const box = canvas.getBoundingClientRect()
    return [canvas.innerText.split(' · ')[0].split('\\n')[0], [Math.round(box.left), Math.round(box.top)]]
}))"""
NUMBERS = "document.querySelector('.toco-table')?.textContent"
CURVE = "document.querySelector(`.toco-explorer svg[aria-label='similarity by block']`)?.outerHTML"


def shoot(page, name):
    page.locator(".toco-explorer").first.scroll_into_view_if_needed()
    page.evaluate("document.querySelector('.toco-explorer').scrollIntoView()")
    page.screenshot(path=page.folder / f"{name}.png")


def test_a_person_explores(page):
    run_all_cells(page)
    page.wait_for_selector(".toco-row img.toco-picture")
    first = changed(page, PICTURE, None)
    page.locator(".toco-explorer").first.scroll_into_view_if_needed()
    numbers = page.evaluate(NUMBERS)
    shoot(page, "first")

    slider(page, "overlay").focus()
    start_watch(page)
    for _ in range(8):
        press(page, "ArrowRight")
    times = [t["loaded"] - t["sent"] for t in delays(page)]
    print(f"\nslider message to picture: median {statistics.median(times):.0f} ms of {len(times)}")
    assert len(times) == 8
    moved = changed(page, PICTURE, first)
    page.get_by_role("tab", name="labels").click()
    slider(page, "beta_h").focus()
    for _ in range(25):
        page.keyboard.press("ArrowLeft")
    moved = changed(page, PICTURE, moved)
    numbers = changed(page, NUMBERS, numbers)
    shoot(page, "slider")

    curve, picture = page.evaluate(CURVE), page.locator(".toco-row img.toco-picture").first
    box = picture.bounding_box()
    picture.click(position={"x": 0.2 * box["width"], "y": 0.8 * box["height"]})
    curve = changed(page, CURVE, curve)
    clicked = changed(page, PICTURE, moved)
    picture.hover(position={"x": 0.5 * box["width"], "y": 0.5 * box["height"]})
    page.wait_for_function("/row \\d+, column \\d+ · /.test(document.querySelector('.toco-reading').textContent)")
    picture.focus()
    page.keyboard.press("ArrowUp")
    changed(page, CURVE, curve)
    shoot(page, "patch")
    page.locator(".toco-explorer svg").last.scroll_into_view_if_needed()
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
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 8")  # 3 views of each side
    places = page.evaluate(PLACES)
    for view in ("CAM", "seed label", "pseudo label"):  # one side below the other
        (left, top), (left_b, top_b) = (places[f"{side}: {view}"] for side in "AB")
        assert left == left_b and top < top_b, (view, places)
    shoot(page, "compare")

    page.locator(".widget-dropdown:has-text('model') select").select_option("scenes_vit_nano")
    page.wait_for_function("/no trained classifier/.test(document.querySelector('.toco-notes')?.textContent)")
    shoot(page, "message")
    assert [error for error in page.errors if not HARMLESS.search(error)] == []


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


WIDER = """() => {
    const out = document.querySelector('.toco-explorer')
    const right = (out.closest('.jp-OutputArea-output') ?? document.documentElement).getBoundingClientRect().right
    const beyond = element => element.getBoundingClientRect().right > right + 1
    return [...out.querySelectorAll('*')].filter(element => !element.closest('.toco-film') && beyond(element))
        .map(element => `${element.tagName} ${element.getAttribute('class')} ${element.textContent.slice(0, 60)}`)
}"""
CUT = """() => [...document.querySelectorAll('.toco-explorer svg')].flatMap(chart => {
    const edge = chart.getBoundingClientRect()
    return [...chart.querySelectorAll('text')].filter(text => {
        const box = text.getBoundingClientRect()
        return box.left < edge.left - 1 || box.right > edge.right + 1 || box.bottom > edge.bottom + 2
    }).map(text => text.textContent)
})"""


FILES = "document.querySelector('#jp-left-stack')?.offsetWidth > 0"


@contextmanager
def window(page, width, height=1000):
    """The page at another width, without JupyterLab's list of files where that would leave no room."""
    before, hidden = page.viewport_size, width < 600 and page.evaluate(FILES)
    if hidden:
        page.keyboard.press("Control+b")
    page.set_viewport_size({"width": width, "height": height})
    page.wait_for_timeout(400)
    try:
        yield
    finally:  # the tests behind one that fails see the page as they should
        page.set_viewport_size(before)
        if hidden:
            page.keyboard.press("Control+b")


ZOOM = "[...document.querySelectorAll('.toco-row img.toco-picture')].map(image => image.style.transform)"
DRAWN = """async ({ name, kind }) => {
    const canvas = Object.assign(document.createElement('canvas'), { width: 120, height: 80 })
    const pen = canvas.getContext('2d')
    for (let x = 0; x < 120; x += 10) { pen.fillStyle = `hsl(${3 * x} 80% 50%)`; pen.fillRect(x, 0, 10, 80) }
    const blob = await new Promise(done => canvas.toBlob(done, kind))"""
DROP = (
    DRAWN
    + """
    const transfer = new DataTransfer()
    transfer.items.add(new File([blob], name, {type: blob.type }))
    const target = document.querySelector('.toco-row')
    for (const event of ['dragover', 'drop'])
        target.dispatchEvent(new DragEvent(event, { dataTransfer: transfer, bubbles: true, cancelable: true }))
}"""
)
COPY = (
    DRAWN
    + """
    await navigator.clipboard.write([new ClipboardItem({ [kind]: blob })])
}"""
)


def test_views_chips_why_and_a_photograph(page):
    """Everything that the views side by side can do, in the dark theme and at the width of a phone."""
    page.set_viewport_size({"width": 1280, "height": 1000})
    page.locator(".widget-dropdown:has-text('model') select").select_option(page.models[0].name)
    page.wait_for_function("!/no trained classifier/.test(document.querySelector('.toco-notes')?.textContent ?? '')")
    page.get_by_role("button", name="compare").click()
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 5")

    tiles, picture = page.locator(".toco-row .toco-canvas"), page.evaluate(PICTURE)
    chip = page.locator(".toco-chips button[aria-pressed=false]").first  # a class that is not shown
    assert re.search(r"\d\.\d\d$", chip.inner_text())
    chip.click()
    picture = changed(page, PICTURE, picture)

    tiles.nth(1).hover()
    for _ in range(2):
        tiles.nth(1).locator(".toco-tool:has-text('+')").click()
    zoomed = page.evaluate(ZOOM)
    assert len(zoomed) == 5 and len(set(zoomed)) == 1 and "scale(2.25)" in zoomed[0]
    box = tiles.nth(2).locator(".toco-frame").bounding_box()
    pinned = page.locator(".toco-why").inner_text()
    page.mouse.move(box["x"] + 60, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 20, box["y"] + 80, steps=4)
    page.mouse.up()
    moved = page.evaluate(ZOOM)
    assert len(set(moved)) == 1 and moved != zoomed and page.locator(".toco-why").inner_text() == pinned
    shoot(page, "zoomed")
    tiles.nth(0).locator(".toco-frame").click(position={"x": 30, "y": 40})
    page.wait_for_function("before => document.querySelector('.toco-why').innerText !== before", arg=pinned)
    assert "CAM: " in page.locator(".toco-why").inner_text() and "PTC: " in page.locator(".toco-why").inner_text()
    page.keyboard.press("0")
    assert "scale(1)" in page.evaluate(ZOOM)[4]

    places = "['.toco-row', '.toco-tokens'].map(s => document.querySelector(s).getBoundingClientRect().top).join()"
    before = page.evaluate(places)
    for tab in ("look", "scales", "crops", "keep", "open", "labels"):
        page.get_by_role("tab", name=tab).click()
        assert page.evaluate(places) == before, f"the tab {tab} moves the page"

    tiles.nth(2).locator("img.toco-picture").focus()
    page.keyboard.press("e")
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 1")
    page.get_by_role("button", name="curtain").click()
    page.wait_for_function("document.querySelector('.toco-row img.toco-under')?.naturalWidth > 0")
    page.locator(".toco-row .toco-curtain").focus()
    page.keyboard.press("ArrowLeft")
    assert page.locator(".toco-row .toco-curtain").get_attribute("aria-valuenow") == "45"
    assert "55%" in page.evaluate("document.querySelector('.toco-row .toco-layer:nth-child(2)').style.clipPath")
    shoot(page, "curtain")
    page.get_by_role("button", name="side by side").click()

    name = "<b>mine.webp"  # which Python does not read: the browser makes a JPEG of it
    page.evaluate(DROP, {"name": name, "kind": "image/webp"})
    page.wait_for_function("document.querySelector('.toco-film [aria-selected=true]')?.title === '<b>mine'")
    page.wait_for_function("document.querySelectorAll('.toco-row .toco-canvas').length === 4")  # there is no truth
    with window(page, 390):
        shoot(page, "phone")
        assert page.evaluate(WIDER) == []
    assert [error for error in page.errors if not HARMLESS.search(error)] == []


@pytest.mark.parametrize("width", [390, 1280, 1920])
def test_nothing_is_wider_than_the_window(page, width):
    with window(page, width, 1600):
        for tab in ("labels", "crops", "keep", "open", "look"):
            page.get_by_role("tab", name=tab).click()
            assert page.evaluate(WIDER) == [], f"the tab {tab}"
        assert page.locator(".toco-explorer svg").count() > 1 and page.evaluate(CUT) == []
        shoot(page, f"width-{width}")


SHAPE = "(image => image.naturalWidth / image.naturalHeight)(document.querySelector('.toco-row img.toco-picture'))"
CHOSEN = "document.querySelector('.toco-film [aria-selected=true]')?.title"


def test_a_pasted_photograph(page):
    """From the clipboard of the browser, by its own keys."""
    before = page.evaluate(CHOSEN)
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.evaluate(COPY, {"name": "", "kind": "image/png"})
    page.locator(".toco-row img.toco-picture").first.focus()
    page.keyboard.press("Control+v")
    name = changed(page, CHOSEN, before)
    assert name != "<b>mine" and "image" in name  # as browsers call what has no name
    page.wait_for_function(f"Math.abs({SHAPE} - 120 / 80) < 0.01")
    assert page.locator(".jp-CodeCell").count() == n_code_cells(page.folder / "explore.ipynb")  # no cell was pasted


def n_code_cells(path):
    return sum(cell.cell_type == "code" for cell in nbformat.read(path, as_version=4).cells)


RECORD = """() => {
    const [picture, caption] = ['.toco-played', '.toco-played-caption'].map(part => document.querySelector(part))
    window.tocoPlayed = []
    picture.addEventListener('load', () => window.tocoPlayed.push([caption.innerText.trim(), picture.src]))
}"""


def test_player(page):
    """Played over the blocks by its button, moved over PAR's iterations by keys, saved."""
    page.locator(".toco-film button").first.click()
    page.get_by_role("button", name="play", exact=True).click()
    page.wait_for_function("document.querySelector('.toco-played')?.naturalWidth > 0")
    caption = page.locator(".toco-played-caption")
    last = caption.inner_text().strip()
    _, depth = map(int, re.fullmatch(r"block (\d+) of (\d+)", last).groups())
    assert last == f"block {depth} of {depth}"  # it begins with what the explorer shows
    page.evaluate(RECORD)
    page.locator(".widget-play button").first.click()
    page.wait_for_function(f"window.tocoPlayed.length > 1 && window.tocoPlayed.at(-1)[0] === '{last}'")
    played = page.evaluate("window.tocoPlayed")
    numbers = [int(words.split()[1]) for words, _ in played]
    assert numbers == sorted(numbers) and numbers[0] < depth  # a busy machine may leave some out
    assert len({source for _, source in played}) == len(played)
    shoot(page, "player")

    page.locator(".widget-dropdown:has(label:text-is('play')) select").select_option("over PAR's iterations")
    page.wait_for_function("document.querySelector('.toco-played-caption').innerText.trim() === '0 iterations of PAR'")
    slider_at = "document.querySelector('.widget-hbox:has(> .widget-play) .noUi-handle').ariaValueNow"
    page.wait_for_function(f"parseFloat({slider_at}) === 0")  # it is told its new range after the picture
    page.locator(".widget-hbox:has(> .widget-play) .noUi-handle").focus()
    for n in (1, 2, 3):
        page.keyboard.press("ArrowRight")
        page.wait_for_function(f"window.tocoPlayed.at(-1)[0] === '{n} iterations of PAR'")
    page.get_by_role("button", name="GIF", exact=True).click()
    page.wait_for_function("/saved explored.*gif/.test(document.querySelector('.toco-explorer').innerText)")
    (saved,) = (page.folder / "explored").glob("*.gif")
    with Image.open(saved) as movie:
        assert movie.n_frames > 10
    page.get_by_role("button", name="play", exact=True).click()
    page.wait_for_function("!document.querySelector('.toco-played')")


def test_gallery(page):
    """Opened below the views, which stay as they are; a picture of it is chosen and shown above."""
    widths = "[...document.querySelectorAll('.toco-row .toco-frame')].map(frame => frame.offsetWidth).join()"
    before, shown = page.evaluate(widths), page.evaluate(CHOSEN)
    page.get_by_role("button", name="gallery of the split").click()
    page.wait_for_function("document.querySelectorAll('.toco-gallery img').length > 4")
    assert page.evaluate(widths) == before
    for width in (390, 1920):
        with window(page, width):
            assert page.evaluate(WIDER) == []
    page.locator(".toco-gallery button").nth(2).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    assert changed(page, CHOSEN, shown) == "val_00003"
    page.locator(".toco-gallery").scroll_into_view_if_needed()
    page.screenshot(path=page.folder / "gallery.png")
    page.get_by_role("button", name="gallery of the split").click()
    page.wait_for_function("!document.querySelector('.toco-gallery')")
    assert [error for error in page.errors if not HARMLESS.search(error)] == []


SCRIPT = "window.pwned = 1; fetch('/api/contents', {method: 'POST', body: '{}'})"


def test_a_hostile_name_runs_nothing(page):
    """A photograph and its class whose names are HTML with a script, which created a notebook with the reader's cookie.

    No dialog, no request for the script's image, no element of it, no new file.
    """
    code = base64.b64encode(SCRIPT.encode()).decode()
    assert "/" not in code  # which no file name can hold
    evil = f"<img src=x onerror=eval(atob('{code}'))>"
    data = page.folder / "photographs"
    for name in (evil, "dog"):
        (data / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((48, 64, 3), 60 * i + 40, np.uint8)).save(data / name / f"{evil}{i}.jpg")
    write_notebook(page.folder / "hostile.ipynb", model=str(page.models[0]), dataset=str(data), image="", n_images=2)
    before, dialogs, requests = sorted(page.folder.glob("*.ipynb")), [], []
    address = page.url.partition("/lab/")[0]
    with page.context.browser.new_page(viewport=page.viewport_size) as other:  # on the server of the tests before
        other.set_default_timeout(PATIENCE)
        other.on("dialog", lambda dialog: dialogs.append(dialog.message) or dialog.dismiss())
        other.on("request", lambda request: requests.append((request.method, request.url.partition("?")[0])))
        other.goto(f"{address}/lab/workspaces/other/tree/hostile.ipynb")
        run_all_cells(other)
        other.wait_for_selector(".toco-row img.toco-picture")
        other.locator(".toco-film button").nth(1).click()
        text = "text => document.querySelector('.toco-explorer').textContent.includes(text)"
        other.wait_for_function(text, arg=f"{evil}1")  # the name stands there, letter by letter
        assert other.evaluate("document.querySelectorAll('img[src=x], [onerror]').length") == 0
        assert other.evaluate("window.pwned") is None and dialogs == []
    assert [url for _, url in requests if url.rsplit("/", 1)[-1] == "x"] == []
    assert [url for method, url in requests if method == "POST" and url.endswith("/api/contents")] == []
    assert sorted(page.folder.glob("*.ipynb")) == before
