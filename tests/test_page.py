"""A page for one image without a kernel: what its script works out is what Python does, and text stays text."""

import base64
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from browser import BROWSERS
from test_widgets import make_subject
from voc_folder import CLASSES, smooth_image, write_voc_folder

from toco_core.__main__ import main
from toco_core.errors import ToCoError
from toco_core.predict import page as pages
from toco_core.predict.image import AUXILIARY, ImagePredictor
from toco_core.predict.page import page_html, write_page
from toco_core.widgets import Session, Subjects, open_pictures
from toco_core.widgets.page import session_page

HOSTILE = '</script><img src=x onerror="window.hurt = 1">\u2028 & \'"'


@pytest.fixture(scope="module")
def subject():
    return make_subject(class_names=("background", "cat", HOSTILE, "sheep"))


@pytest.fixture(scope="module")
def predictor(subject):
    found = ImagePredictor(subject.model, subject.config)
    found.set_image(smooth_image(61, 83, 3), [1, 0, 1])
    return found


@pytest.fixture(scope="module")
def mask():
    mask = np.zeros((61, 83), np.uint8)
    mask[10:40, 20:70], mask[45:, :9], mask[:4] = 1, 3, 255
    return mask


@pytest.fixture(scope="module")
def browser():
    """A headless browser; skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as started:
        path = next(filter(None, map(shutil.which, BROWSERS)), None) or started.chromium.executable_path
        if not Path(path).is_file():
            pytest.skip("no browser is installed")
        browser = started.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def content(text):
    return json.loads(re.search('id="data">(.*?)</script>', text, re.DOTALL)[1])


def picture(address):
    data = base64.b64decode(address.partition(",")[2])
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)


def test_maps_are_those_of_the_predictor(predictor, subject, mask):
    found = content(page_html(predictor, title="one", class_names=subject.class_names, mask=mask))
    assert [row["name"] for row in found["rows"]] == ["block 1", "block 2", "final", "auxiliary"]
    assert found["native"] == [61, 83] and found["size"] == [48, 48] and found["par"]["size"] == [24, 24]
    names = [one["name"] for one in found["classes"]]
    assert {"cat", "sheep"} <= set(names)
    for row, block in zip(found["rows"], (1, 2, 3, AUXILIARY), strict=True):
        for name, address in zip(names, row["maps"], strict=True):
            expected = predictor.class_cam(subject.class_names.index(name), block=block).numpy()
            assert np.abs(picture(address) / 255 - expected).max() <= 0.5 / 255 + 1e-6
    assert {one["name"] for one in found["classes"] if one["on"]} == {"cat", "sheep"}
    assert max(picture(found["image"]).shape) == 448


def test_a_page_stays_small(predictor, subject, monkeypatch):
    options = {"title": "one", "class_names": subject.class_names}
    whole = len(page_html(predictor, **options))
    assert whole < pages.MOST_BYTES
    monkeypatch.setattr(pages, "SIDES", (40, 16))
    monkeypatch.setattr(pages, "MOST_BYTES", len(page_html(predictor, **options)) - 1)
    assert max(content(page_html(predictor, **options))["size"]) == 16
    monkeypatch.setattr(pages, "MOST_BYTES", 10)
    with pytest.raises(ToCoError, match="at most 10 are allowed"):
        page_html(predictor, **options)


def test_a_model_without_a_classifier_has_no_page(predictor):
    with pytest.raises(ToCoError, match="no trained classifier"):
        page_html(predictor, title="one", class_names=("background",))


def test_text_is_never_markup(predictor, subject):
    text = page_html(predictor, title=HOSTILE, class_names=subject.class_names)
    assert text.count("<script") == text.count("</script>") == 2 and "<img" not in text
    assert content(text)["title"] == HOSTILE and HOSTILE in content(text)["names"]
    assert "http" not in text.replace("http-equiv", "")


@pytest.fixture(scope="module")
def page(browser, predictor, subject, mask, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "one.html"
    names = ("background", "sheep", "cat", HOSTILE)  # the data set counts in another order
    table = np.array([0, 2, 3, 1], np.uint8)
    of_data = np.where(mask == 255, 255, table[np.minimum(mask, 3)]).astype(np.uint8)
    options = {"title": HOSTILE, "class_names": subject.class_names, "mask": of_data, "mask_names": names}
    settings = {"beta_l": 0.35, "beta_h": 0.55, "par_iterations": 4}
    write_page(predictor, path, settings=settings, model="model", **options)
    page = browser.new_page(viewport={"width": 1100, "height": 800}, offline=True)
    page.errors = []
    page.on("console", lambda m: page.errors.append(m.text) if m.type == "error" else None)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(path.as_uri())
    page.wait_for_selector("body[data-drawn]", timeout=60_000)
    return page


def until(page, expression):
    """Ask until it is true: the page's policy allows no script that would wait inside of it."""
    for _ in range(400):
        if page.evaluate(expression):
            return
        time.sleep(0.05)
    raise AssertionError(expression[:200])


def test_a_moved_slider_changes_the_picture(page):
    look = "document.getElementById('picture').toDataURL()"
    seen = [page.evaluate(look)]
    for name in ("strength", "block", "beta_h"):
        page.focus(f"#{name}")
        for _ in range(2):
            page.keyboard.press("ArrowLeft")
        until(page, f"{look} !== {json.dumps(seen[-1])}")
        seen.append(page.evaluate(look))
    assert page.input_value("#beta_h") == "0.53" and len(set(seen)) == 4
    page.evaluate("byId('block').value = 2; byId('beta_h').value = 0.55; draw()")
    page.hover("#picture", position={"x": 50, "y": 50})
    assert re.match(r"row \d+, column \d+ · cat 0\.\d\d", page.inner_text("#words"))
    assert page.inner_text("#title") == HOSTILE.replace("\u2028", "\u2028")
    assert page.evaluate("window.hurt") is None and page.errors == []


@pytest.mark.parametrize("show", ["CAM label", "seed label", "pseudo label", "segmentation"])
def test_labels_are_those_of_python(page, predictor, show):
    page.check(f"input[value='{show}']")
    found = np.array(page.evaluate(f"Array.from(labelOf('{show}'))"), np.uint8).reshape(48, 48)
    thresholds = {"beta_l": 0.35, "beta_h": 0.55}
    label = {
        "CAM label": lambda: predictor.cam_label(predictor.config.labels.beta),
        "seed label": lambda: predictor.seed_label(thresholds=thresholds),
        "pseudo label": lambda: predictor.pseudo_label("par", settings={"iterations": 4, **thresholds}),
        "segmentation": predictor.segmentation,
    }[show]()
    expected = cv2.resize(label, (48, 48), interpolation=cv2.INTER_NEAREST_EXACT)
    table = np.arange(256, dtype=np.uint8)
    table[:4] = 0, 2, 3, 1
    expected = table[expected]
    assert len(np.unique(expected)) > 1
    around = np.ones((3, 3), np.uint8)  # the page cuts maps of another size: borders may move by a pixel
    calm = cv2.erode(expected, around) == cv2.dilate(expected, around)
    assert calm.mean() > 0.5 and (found == expected)[calm].mean() > 0.995


def test_scores_in_the_page(page, predictor, mask):
    page.check("input[value='segmentation']")
    until(page, "document.querySelectorAll('#numbers td').length > 2")
    rows = dict(zip(*[iter(page.locator("#numbers td").all_inner_texts())] * 2, strict=True))
    label, small = (
        cv2.resize(values, (48, 48), interpolation=cv2.INTER_NEAREST_EXACT)
        for values in (predictor.segmentation(), mask)
    )
    valid = small != 255
    for name, k in (("background", 0), ("cat", 1), ("sheep", 3)):
        hit = ((label == k) & (small == k) & valid).sum()
        either = (((label == k) | (small == k)) & valid).sum()
        assert abs(float(rows[name]) - 100 * hit / either) < 0.06


def test_words_follow_the_settings_and_a_finger(page):
    """They tell of what is shown now, not of what was when the pointer moved."""
    page.check("input[value='seed label']")
    page.hover("#picture", position={"x": 50, "y": 50})
    assert "seed label: " in page.inner_text("#words")
    page.check("input[value='segmentation']")
    until(page, "byId('words').textContent.includes('segmentation: ')")
    assert "seed label: " not in page.inner_text("#words")
    touch = "byId('picture').dispatchEvent(new PointerEvent('pointerdown', { clientX: 0, clientY: 0 }))"
    page.evaluate(touch)
    assert page.inner_text("#words").startswith("row 0, column 0 ")


def test_the_threshold_of_a_cams_score_is_no_idle_control(page):
    page.check("input[value='CAM']")
    until(page, "byId('numbers').textContent.includes('CAM label')")
    before = page.inner_text("#numbers")
    assert not page.evaluate("byId('beta').closest('.row').classList.contains('idle')")
    page.evaluate("byId('beta').value = 0.9; draw()")
    assert page.inner_text("#numbers") != before


def test_a_tall_picture_is_no_higher_than_the_window(browser, predictor, subject, tmp_path):
    tall = ImagePredictor(predictor.model, predictor.config)
    tall.set_image(smooth_image(300, 30, 3), [1, 0, 1])
    write_page(tall, tmp_path / "tall.html", title="tall", class_names=subject.class_names)
    page = browser.new_page(viewport={"width": 900, "height": 700})
    page.goto((tmp_path / "tall.html").as_uri())
    page.wait_for_selector("body[data-drawn]")
    box = page.locator("#picture").bounding_box()
    assert 600 < box["height"] <= 632 and box["width"] == pytest.approx(box["height"] / 10, abs=2)
    page.close()


def test_thresholds_push_each_other(page):
    page.evaluate("byId('beta_l').value = 0.9; byId('beta_l').dispatchEvent(new Event('input', { bubbles: true }))")
    assert (page.input_value("#beta_l"), page.input_value("#beta_h")) == ("0.9", "0.91")
    page.evaluate("byId('beta_h').value = 0; byId('beta_h').dispatchEvent(new Event('input', { bubbles: true }))")
    assert (page.input_value("#beta_l"), page.input_value("#beta_h")) == ("0", "0.01")


def test_page_of_a_session(tmp_path):
    subjects = Subjects()
    subjects.add(make_subject())
    session = Session(open_pictures(write_voc_folder(tmp_path / "photos", splits={"val": range(3)})), subjects)
    session.set(show="seed label", beta_h=0.6, cam="block", block=2)
    found = content(session_page(session))
    assert (found["show"], found["beta_h"], found["row"], found["title"]) == ("seed label", 0.6, 1, "img_0")
    assert found["names"] == list(CLASSES) and found["mask"] and found["segmentation"]
    plain = Subjects()
    plain.add(make_subject(class_names=CLASSES, has=frozenset(("a classifier",))))
    found = content(session_page(Session(session.pictures, plain)))
    assert found["segmentation"] is None and found["rows"][-1]["name"] == "final"


def test_page_from_a_shell(tmp_path, capsys):
    cv2.imwrite(str(tmp_path / "a b.png"), smooth_image(40, 60, 1))
    assert main(["page", "full", str(tmp_path / "a b.png"), str(tmp_path / "out" / "page.html")]) == 0
    assert content((tmp_path / "out" / "page.html").read_text())["title"] == "a b.png"
    with pytest.raises(SystemExit, match="error: "):
        main(["page", "full", str(tmp_path / "none.png"), str(tmp_path / "page.html")])


@pytest.mark.skipif(sys.platform != "linux", reason="names are text here")
def test_page_of_a_name_that_is_no_text(tmp_path, monkeypatch):
    photo, page = (tmp_path / os.fsdecode(name) for name in (b"caf\xe9.png", b"caf\xe9.html"))
    cv2.imwrite(str(tmp_path / "a.png"), smooth_image(40, 60, 1))
    os.rename(tmp_path / "a.png", photo)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "utf-8"))
    assert main(["page", "full", str(photo), str(page)]) == 0
    assert content(page.read_text())["title"] == photo.name and r">caf\udce9.png<" in page.read_text()
