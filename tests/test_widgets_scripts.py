"""The browser's side of single widgets, each with a model made by hand; `test_browser.py` has the whole."""

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
window.model = {
  get: (name) => values[name],
  set: (name, value) => { values[name] = value; window.sent.push([name, JSON.stringify(value)]); },
  send: (content) => window.sent.push(["message", content.name]),
  save_changes() {}, on() {}, off() {},
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
