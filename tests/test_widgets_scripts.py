"""The browser's side of single widgets, each with a model made by hand; `test_browser.py` has the whole."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_page import browser  # noqa: F401

import toco_core.widgets

WIDGETS = Path(toco_core.widgets.__file__).parent
MODEL = """
const values = VALUES;
window.sent = [];
const heard = {};
const bytes = (value) => Array.isArray(value) ? value.map(bytes)
  : typeof value === "string" && value.startsWith("base64,")
    ? new DataView(Uint8Array.from(atob(value.slice(7)), (c) => c.charCodeAt(0)).buffer) : value;
for (const name in values) values[name] = bytes(values[name]);
window.change = (given) => {
  for (const name in given) values[name] = bytes(given[name]);
  for (const name in given) heard["change:" + name]?.();
};
window.model = {
  get: (name) => values[name],
  set: (name, value) => { values[name] = value; window.sent.push([name, JSON.stringify(value)]); },
  send: (content) => window.sent.push(["message", content.name]),
  on: (event, action) => { heard[event] = action; },
  save_changes() {}, off() {},
};
window.show = () => {
  document.body.replaceChildren(document.createElement("div"));
  widget.render({ model: window.model, el: document.body.firstChild });
};
window.show();
"""


@pytest.fixture
def page(browser, tmp_path):  # noqa: F811
    """`page.widget(script, values)` shows a widget; `page.sent()` is what it told Python, `show()` shows it anew."""
    page = browser.new_page()
    page.set_default_timeout(10_000)

    def widget(script, **values):
        code = (WIDGETS / script).read_text(encoding="utf-8").replace("export default {", "const widget = {")
        code += MODEL.replace("VALUES", json.dumps(values))
        (tmp_path / "page.html").write_text(f"<meta charset=utf-8><body><script type=module>{code}</script>")
        page.goto((tmp_path / "page.html").as_uri())
        page.wait_for_function("() => !!window.show")

    page.widget, page.sent = widget, lambda: page.evaluate("window.sent")
    yield page
    page.close()


def test_all_photographs_that_are_chosen_are_sent(page, tmp_path):
    page.widget("door.js", clipboard=["", 0])
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        Image.fromarray(np.full((8, 8, 3), 60 * i, np.uint8)).save(file)
    page.locator("input[type=file]").set_input_files(files)
    page.wait_for_function("window.sent.length === 3")
    assert page.sent() == [["message", f"{i}.png"] for i in range(3)]


ITEMS = [{"name": "cat", "on": True, "index": 0, "title": "cat", "source": "", "words": "cat"}]


@pytest.mark.parametrize(
    ("script", "values", "action"),
    [
        ("canvas.js", {"turn": [], "pin": []}, lambda page: page.press("img.toco-picture", "n")),
        ("canvas.js", {"step": [], "pin": []}, lambda page: page.press("img.toco-picture", "ArrowUp")),
        ("canvas.js", {"enlarge": 0, "pin": [], "group": "g"}, lambda page: page.press("img.toco-picture", "e")),
        ("chips.js", {"toggled": [], "items": ITEMS}, lambda page: page.click("button")),
        ("thumbnails.js", {"wanted": [], "items": ITEMS}, lambda page: page.click("button")),
        ("rows.js", {"wanted": [], "head": ["a"], "rows": [["b"]], "colours": ["red"]}, lambda page: page.click("td")),
    ],
)
def test_a_widget_that_is_shown_again_is_heard_at_once(page, script, values, action):
    """What is told must differ from what was told before, or Python does not notice."""
    page.widget(script, **values)
    for _ in range(2):
        action(page)
    page.evaluate("window.show()")
    action(page)
    name = next(iter(values))
    told = [value for trait, value in page.sent() if trait == name]
    assert len(told) == len(set(told)) == 3


def jpeg(value, size=(24, 40)):
    """A grey picture, as the model of `MODEL` takes bytes."""
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), value, np.uint8)).save(file, format="JPEG", quality=95)
    return "base64," + base64.b64encode(file.getvalue()).decode()


def grey_of(page):
    """What is seen in the middle of the canvas."""
    seen = np.asarray(Image.open(io.BytesIO(page.locator(".toco-frame").screenshot())).convert("L"))
    return int(seen[seen.shape[0] // 2, seen.shape[1] // 3])


def test_an_overlay_is_mixed_from_its_two_ends(page):
    page.widget("canvas.js", picture=jpeg(77), under="", pin=[], ends=[], strength=0.0, group="g")
    page.add_style_tag(path=WIDGETS / "look.css")
    page.wait_for_function("document.querySelector('.toco-picture').complete")
    assert abs(grey_of(page) - 77) <= 1
    page.evaluate("given => change(given)", {"ends": [jpeg(40), jpeg(200)], "strength": 0.25})
    page.wait_for_selector(".toco-mix:not([hidden])")
    assert abs(grey_of(page) - 80) <= 2
    page.evaluate("change({strength: 0.75})")
    assert abs(grey_of(page) - 160) <= 2
    page.keyboard.press("+")
    page.press("img.toco-picture", "+")
    low, high, picture = (page.locator(f".toco-{name}").bounding_box() for name in ("without", "overlay", "picture"))
    assert low == high == picture and picture["width"] > page.locator(".toco-frame").bounding_box()["width"]
    page.evaluate("given => change(given)", {"ends": [], "picture": jpeg(120)})
    page.wait_for_selector(".toco-mix", state="hidden")
    assert abs(grey_of(page) - 120) <= 1


def test_ends_go_although_the_picture_is_the_same_as_before(page):
    page.widget("canvas.js", picture=jpeg(77), under="", pin=[], ends=[jpeg(40), jpeg(200)], strength=0.5, group="")
    page.add_style_tag(path=WIDGETS / "look.css")
    page.wait_for_selector(".toco-mix:not([hidden])")
    page.evaluate("change({ends: []})")
    page.wait_for_selector(".toco-mix", state="hidden")
    assert abs(grey_of(page) - 77) <= 1


def test_what_comes_late_does_not_hide_what_is_newer(page):
    page.widget("canvas.js", picture=jpeg(77), under="", pin=[], ends=[], strength=0.5, group="")
    page.add_style_tag(path=WIDGETS / "look.css")
    new = {"ends": [jpeg(40), jpeg(200)]}
    page.evaluate("([a, b, c]) => { change(a); change(b); change(c) }", [new, {"ends": []}, new])
    page.wait_for_selector(".toco-mix:not([hidden])")
    page.wait_for_timeout(200)
    assert page.locator(".toco-mix").is_visible() and abs(grey_of(page) - 120) <= 2


def test_a_tall_picture_is_no_higher_than_the_window(page):
    page.set_viewport_size({"width": 900, "height": 600})
    tall = jpeg(77, (400, 20))
    page.widget("canvas.js", picture=tall, under="", pin=[], ends=[], strength=0.0, group="g", width=640)
    page.add_style_tag(path=WIDGETS / "look.css")
    page.wait_for_function("document.querySelector('.toco-picture').naturalWidth > 0")
    box = page.locator(".toco-frame").bounding_box()
    assert (round(box["width"]), round(box["height"])) == (27, 540)
    page.locator(".toco-frame").click(position={"x": 26, "y": 1})
    y, x = json.loads(dict(page.sent())["click"])[:2]
    assert y < 0.01 and x > 0.9


def test_who_enlarges_a_picture_keeps_the_keys(page):
    """The picture that stays has the focus: else the next key would go to the notebook."""
    page.widget("canvas.js", picture=jpeg(77), under="", pin=[], ends=[], strength=0.0, group="g")
    page.evaluate("""() => {
        const first = document.body.firstChild.cloneNode(true);
        document.body.firstChild.before(first);
        document.body.className = "toco-row";
    }""")
    page.locator("img.toco-picture").last.focus()
    page.keyboard.press("e")
    assert dict(page.sent()) == {"enlarge": "1"}
    assert page.evaluate("document.activeElement === document.querySelectorAll('img.toco-picture')[0]")
