"""A photograph of one's own in the explorer, an ImageNet head that names what is on it, and the explorer as an app."""

import html
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_widgets import files_below, folder, make_subject, session, subject  # noqa: F401

from toco_core.errors import ToCoError
from toco_core.predict.class_maps import cams, open_classifier
from toco_core.predict.head import short_names
from toco_core.widgets import Explorer, Session, Subjects, open_pictures, open_subject
from toco_core.widgets.address import address_parameters
from toco_core.widgets.gallery import Gallery
from toco_core.widgets.pictures import MOST_OWN
from toco_core.widgets.survey import unpacked

VIT = "vit_tiny_patch16_224"


def photograph(height=60, width=90, seed=5, kind="JPEG"):
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    with io.BytesIO() as file:
        Image.fromarray(coarse).resize((width, height), Image.BICUBIC).save(file, kind)
        return file.getvalue()


def brought(explorer, name, data):
    """As the browser sends it."""
    explorer.door._handle_custom_msg({"name": name}, [memoryview(data)])


# ---- a photograph


def test_a_photograph_is_seen_at_once(session):  # noqa: F811
    explorer, data = Explorer(session), photograph()
    brought(explorer, "C:\\photos\\my cat.jpg", data)
    assert (
        session.picture.name == "my cat"
        and explorer.finder.film.chosen == 6
        and explorer.finder.film.items[-1]["source"]
    )
    with Image.open(io.BytesIO(data)) as image:
        np.testing.assert_array_equal(session.picture.image, np.asarray(image))
    assert [tile.show for tile in session.tiles()] == ["image", "CAM", "pseudo label"]
    assert "this image has no labels: the predicted classes are shown" in explorer.notes.value
    assert "no ground truth" in explorer.numbers.value
    brought(explorer, "my cat.png", photograph(seed=6, kind="PNG"))
    assert session.picture.name == "my cat (2)" and len(session.pictures) == 8
    explorer.tiles.canvases[0].turn = [-1, 1]
    assert session.picture.name == "my cat"
    explorer.keeping.copy.click()
    assert "put it in one, and open that with -p dataset" in explorer.notes.value and explorer.keeping.line.value == ""
    explorer.score.click()  # the data set alone is scored
    explorer.settle()
    assert "6 of 6 images" in explorer.split_numbers.value and "skipped" not in explorer.split_numbers.value


def test_large_photographs_are_reduced(session):  # noqa: F811
    session.bring("wide.png", photograph(300, 2048, kind="PNG"))
    assert session.picture.image.shape == (150, 1024, 3)


@pytest.mark.parametrize(
    ("content", "buffers", "words"),
    [
        ({"name": "a.jpg"}, [b"no picture"], "a.jpg is not a readable JPEG or PNG or BMP file"),
        ({"name": "a.jpg"}, [photograph()[:900]], "a.jpg is truncated"),
        ({"name": "a.jpg"}, [b""], "a.jpg is not a readable"),
        ({"name": "a.jpg"}, [], "one file with a name"),
        ({"name": 3}, [photograph()], "one file with a name"),
        ("name", [photograph()], "one file with a name"),
        ({"name": "../../etc/<b>x.jpg"}, [b"x"], "&lt;b&gt;x.jpg is not"),
    ],
)
def test_what_is_no_photograph_is_told(session, content, buffers, words):  # noqa: F811
    explorer = Explorer(session)
    explorer.door._handle_custom_msg(content, buffers)
    assert words in explorer.notes.value and session.picture.name == "img_0" and len(session.pictures) == 6


def test_photographs_go_through_the_gate(session, monkeypatch):  # noqa: F811
    monkeypatch.setenv("TOCO_LIMITS", "image_pixels=5000")
    with pytest.raises(ToCoError, match="at most 5000 are read"):
        session.bring("large.jpg", photograph())
    monkeypatch.setenv("TOCO_LIMITS", "image_bytes=500")
    with pytest.raises(ToCoError, match="at most 500 are read"):
        session.bring("large.jpg", photograph())
    monkeypatch.delenv("TOCO_LIMITS")
    for i in range(MOST_OWN):
        session.pictures.bring(f"{i}.png", photograph(4, 4, kind="PNG"))
    with pytest.raises(ToCoError, match=f"{MOST_OWN} photographs of yours"):
        session.bring("one more.png", photograph())


# ---- another data set


def test_another_data_set_is_chosen_and_own_photographs_stay(session, tmp_path):  # noqa: F811
    loose = tmp_path / "loose"
    loose.mkdir()
    Image.open(io.BytesIO(photograph(seed=8))).save(loose / "a.png")
    explorer = Explorer(session, datasets={"loose": lambda: open_pictures(loose)})
    brought(explorer, "mine.jpg", photograph())
    before = explorer.tiles.canvases[0].picture
    explorer.data.value = "loose"
    assert session.pictures.names == ("a", "mine") and session.picture.name == "a" and session.place is None
    assert explorer.tiles.canvases[0].picture != before and len(explorer.finder.film.items) == 2
    explorer.finder.film.wanted = [1, 1]
    assert explorer.tiles.canvases[0].picture == before
    explorer.data.value = "photos [val]"
    assert len(session.pictures) == 7 and session.picture.mask is not None
    explorer.open_data.value = str(tmp_path / "nothing")
    explorer.open.click()
    assert "is not a folder" in explorer.notes.value and explorer.data.value == "photos [val]"
    explorer.open_data.value = str(loose)
    explorer.open_model.value = "scenes_vit_nano"
    explorer.open.click()
    assert f"-p dataset {loose}" in explorer.parameters_line()
    assert explorer.data.value == "loose" and explorer.model.value == "scenes_vit_nano (pretrained)"


# ---- an ImageNet head


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    classifier = open_classifier(VIT, pretrained=False)
    with torch.no_grad():
        for parameter in classifier.model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    path = tmp_path_factory.mktemp("vit") / "model.safetensors"
    save_file({k: v.contiguous() for k, v in classifier.model.state_dict().items()}, path)
    return classifier, open_subject(VIT, weights=str(path))


def test_a_bare_vit_names_what_it_sees(folder, vit):  # noqa: F811
    classifier, opened = vit
    subjects = Subjects()
    subjects.add(opened)
    explorer = Explorer(Session(open_pictures(folder), subjects))
    brought(explorer, "mine.jpg", photograph())
    session = explorer.session  # noqa: F811
    wanted = cams(session.picture.image, classifier)
    analysis, (chosen, _) = session.analysis(0), session.classes(0)
    best = short_names(classifier.class_names[1:])
    top = [best[classifier.class_names.index(name) - 1] for name in list(wanted.scores)[: len(chosen)]]
    assert list(analysis.class_names[1 : len(chosen) + 1]) == top and len(analysis.class_names) == 101
    np.testing.assert_allclose(analysis.class_scores, list(wanted.scores.values())[:100], atol=1e-6)
    size = session.picture.image.shape[:2]
    found = F.interpolate(analysis.cams(session.sides[0].settings, chosen), size=size, mode="bilinear")[0].numpy()
    np.testing.assert_allclose(
        found, np.stack([wanted.maps[name] for name in list(wanted.maps)[: len(found)]]), atol=1e-5
    )
    items = explorer.controls.classes.items
    assert len(items) == 12 and items[0]["name"] == top[0] and items[0]["on"] and items[0]["number"]
    explorer.controls.classes.toggled = [items[4]["name"], 1]
    assert len(session.classes(0)[0]) == len(chosen) + 1 and "no class" not in explorer.notes.value
    assert {"cam", "cam_scales", "flip"} <= {name for name, c in explorer.controls.of.items() if c.disabled}
    explorer.tiles.canvases[0].click = [0.4, 0.6, 1]
    assert "why this pixel" in explorer.why.words.value
    explorer.set(classes="labelled")
    explorer.finder.film.wanted = [0, 1]  # an image of the data set: its classes are not the head's
    assert session.classes(0)[0] == session.analysis(0).predicted
    explorer.score.click()
    assert "a split cannot be scored" in explorer.notes.value


def test_gallery_of_a_head_names_classes(folder, vit):  # noqa: F811
    """The head ranks its classes for each image: a number of a label map means another class in another image."""
    _, opened = vit
    subjects = Subjects()
    subjects.add(opened)
    session = Session(open_pictures(folder), subjects)  # noqa: F811
    session.set(beta_h=0.3, beta_l=0.1, classes="predicted")
    session.bring("mine.jpg", photograph())
    gallery = Gallery(session, per_page=7)
    gallery.settle()
    for index in (0, 6):
        session.go(index)
        found, names = gallery.survey.found[index], session.joint(0).names
        label = session.label(0, "pseudo label")
        np.testing.assert_array_equal(unpacked(found.label), label)
        assert found.classes == tuple(names[k] for k in np.unique(label) if 0 < k < 255) and found.classes
        assert not any(name.startswith("rank ") for name in found.names)
    assert gallery.survey.found[0].names != gallery.survey.found[6].names
    assert gallery.of_class.options == ("any class", *session.pictures.class_names[1:])
    item = gallery.grid.items[6]
    assert item["mark"] == ", ".join(gallery.survey.found[6].classes[:3]) and f"seen: {item['mark']}" in item["title"]


def test_synonyms_are_shortened_where_that_is_clear():
    names = ["tench, Tinca tinca", "crane, bird", "crane, machine", "pug"]
    assert short_names(names) == ["tench", "crane or bird", "crane or machine", "pug"]


# ---- as an app


def test_an_address_leads_to_a_state(session, monkeypatch):  # noqa: F811
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    query = "model=other&image=img_2&show=seed+label&beta_h=0.55&contours=false"
    query += "&cam_scales=0.5,1&views=image,CAM&patch=.2,.3"
    monkeypatch.setenv("QUERY_STRING", query)
    explorer = Explorer(session)
    assert explorer.notes.value == "" and explorer.model.value == "other" and session.picture.name == "img_2"
    settings = session.sides[0].settings
    assert (settings.show, settings.beta_h, settings.contours) == ("seed label", 0.55, False)
    assert settings.cam_scales == (0.5, 1.0) and session.views == ("image", "CAM") and session.place == (0.2, 0.3)
    assert explorer.controls.of["beta_h"].value == 0.55 and explorer.finder.film.chosen == 2


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("modle=other", "no such parameter: did you mean model"),
        ("beta_h=high", "beta_h = 'high' of the address is not allowed: float is wanted"),
        ("contours=perhaps", "bool is wanted"),
        ("model=/etc/passwd", "known are model, other"),
        ("dataset=/etc", "is not offered here: one of photos"),
        ("image=%3Cscript%3E", "is not in photos"),
        ("image=" + "a" * 5000, "at most 4000"),
    ],
)
def test_wrong_addresses_are_told(session, monkeypatch, query, words):  # noqa: F811
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    monkeypatch.setenv("QUERY_STRING", query)
    explorer = Explorer(session)
    assert html.escape(words) in explorer.notes.value and "<script" not in explorer.notes.value
    assert session.picture.name == "img_0" and explorer.tiles.canvases[0].picture


def test_data_set_of_an_address(session, tmp_path):  # noqa: F811
    Image.open(io.BytesIO(photograph(seed=8))).save(tmp_path / "a.png")
    explorer = Explorer(session, datasets={"mine [val]": lambda: open_pictures(tmp_path)})
    explorer.visit("dataset=mine&image=a")
    assert session.picture.name == "a"
    explorer.visit("dataset=photos&image=img_5")
    assert session.picture.name == "img_5"


def test_types_of_an_address():
    assert address_parameters("block=3&strength=.5&linked=0&par_dilations=1,2&classes=cat") == {
        "block": 3, "strength": 0.5, "linked": False, "par_dilations": "1,2", "classes": "cat",
    }  # fmt: skip
    assert address_parameters("") == {}


def test_files_are_downloads_where_voila_serves(session, tmp_path, monkeypatch):  # noqa: F811
    """Nothing is written on the server; the same bytes go to the browser."""
    here = Explorer(session, folder=tmp_path / "here")
    here.keeping.label.click()
    here.keeping.svg.click()
    monkeypatch.setenv("SERVER_SOFTWARE", "voila/0.5.13")
    served, sent = Explorer(session, folder=tmp_path / "served"), []
    monkeypatch.setattr(served.door, "send", lambda content, buffers: sent.append((content, bytes(buffers[0]))))
    for button in (served.keeping.label, served.keeping.png, served.keeping.svg):
        assert not button.disabled
        button.click()
    assert [content["name"] for content, _ in sent] == ["img_0-CAM-label.png", "img_0-CAM.png", "img_0-CAM.svg"]
    assert sent[0][1] == (tmp_path / "here" / "img_0-CAM-label.png").read_bytes()
    assert sent[2][1] == (tmp_path / "here" / "img_0-CAM.svg").read_bytes()
    assert not (tmp_path / "served").exists() and "downloaded img_0-CAM.svg" in served.keeping.saved.value
    assert served.keeping.to.options == ("browser",) and served.open.disabled
    served.open_data.value = str(tmp_path)
    served.open.click()  # as a message of a visitor's browser may do
    assert "nothing is opened where the notebook is served" in served.notes.value
    here.keeping.to.value = "browser"
    assert here.keeping.name.disabled and files_below(tmp_path / "here") == ["img_0-CAM-label.png", "img_0-CAM.svg"]
