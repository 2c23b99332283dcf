"""The explorer's panel about one pixel: it says what the label maps show, and its numbers are the library's."""

import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from test_widgets import EVERY, Elements, folder, hostile_explorer, make_subject, session, subject  # noqa: F401

from toco_core.labels import token_label
from toco_core.predict.pixel import Vote
from toco_core.widgets import Explorer, Session, Subjects, draw, open_pictures, why
from toco_core.widgets.subjects import AUXILIARY, DECODER


def all_places(session):  # noqa: F811
    H, W = session.picture.image.shape[:2]
    for row in range(0, H, 5):
        for column in range(0, W, 4):
            session.click((row + 0.5) / H, (column + 0.5) / W)
            yield row, column, session.why(0)


@pytest.mark.parametrize("index", [0, 1])
def test_the_panel_agrees_with_the_labels(session, index):  # noqa: F811
    session.go(index)
    session.set(classes="cat,sheep", beta_l=0.3, beta_h=0.42, par_iterations=3)
    seed, pseudo = session.label(0, "seed label"), session.label(0, "pseudo label")
    segmentation = session.label(0, "segmentation")
    settings, words = session.sides[0].settings, set()
    for row, column, found in all_places(session):
        assert found.pixel == (row, column)
        said = why.seed_sentence(found, settings).rsplit(": ", 1)[1]
        assert said == session.class_word(0, int(seed[row, column]))
        slot = found.trace.slot(3)
        assert (255 if slot == 255 else found.places[slot]) == pseudo[row, column]
        assert found.decoder[0][1] == segmentation[row, column]
        assert sum(value for _, _, value in found.decoder) == pytest.approx(1, abs=1e-5)  # all four
        words.add(said)
    assert words >= {"background", "uncertain"}


def test_token_contrast_is_that_of_the_loss(session):  # noqa: F811
    session.set(classes="cat,dog", beta_l=0.3, beta_h=0.4)
    session.go(1)
    analysis, seen = session.analysis(0), set()
    cam = analysis.predictor.cam(classes=(1, 2), auxiliary=True, scales=(1.0, 0.5))
    label = token_label(cam, torch.ones(1, 2), (6, 6), beta_l=0.3, beta_h=0.4)[0]
    tokens = torch.nn.functional.normalize(analysis.inside.tokens.patch_tokens[0].double(), dim=1)
    for _, _, found in all_places(session):
        patch = analysis.patch_at(*session.place)
        here = int(label.flatten()[patch])
        assert found.pairs.label == here
        for other, relation in enumerate(found.pairs.relation.flatten().tolist()):
            there = int(label.flatten()[other])
            wanted = 255 if 255 in (here, there) or other == patch else int(here == there)
            assert relation == wanted
            assert float(found.pairs.cosine.flatten()[other]) == pytest.approx(
                float(tokens[other] @ tokens[patch]), abs=1e-5
            )
        seen.add(here)
    assert len(seen) >= 2
    pulled = int((found.pairs.relation == 1).sum())
    assert found.pairs.label == 255 or f"pulled together with {pulled} patches" in why.pairs_sentence(found)


def test_the_panel_is_pinned_by_a_click_and_follows(session):  # noqa: F811
    explorer = Explorer(session)
    assert explorer.why.layout.display == "none" and explorer.why.words.value == ""
    explorer.tiles.canvases[0].click = [0.5, 0.5, 1]
    first = explorer.why.words.value
    assert explorer.why.layout.display is None and "row 10, column 15" in first and first.count("<svg") == 2
    assert "decoder" in first and "PTC" in first and explorer.why.votes.value.count("<tr>") == 7
    pictures = [canvas.picture for canvas in explorer.why.maps]
    assert all(np.asarray(Image.open(io.BytesIO(p))).shape[1] == why.SIDE for p in pictures)
    explorer.tiles.canvases[0].step = [2, 0, 2]
    assert explorer.why.words.value != first and explorer.why.maps[0].picture != pictures[0]
    second = explorer.why.words.value
    explorer.controls.of["beta_h"].value = 0.9
    assert explorer.why.words.value != second and "beta_h" in explorer.why.words.value
    explorer.controls.of["par_iterations"].value = 2
    assert explorer.why.maps[1].title == "after 2 steps"


def test_a_line_has_a_rim_in_the_colour_of_the_text(session):  # noqa: F811
    """Else navy and maroon would be lost on a dark page."""
    explorer = Explorer(session)
    explorer.tiles.canvases[0].click = [0.5, 0.5, 1]
    lines = re.findall(r'<polyline points="([^"]*)".*? stroke="([^"]*)"', explorer.why.words.value)
    assert lines and len(lines) % 2 == 0
    for (under, rim), (over, colour) in zip(lines[::2], lines[1::2], strict=True):
        assert under == over and rim == "currentColor" != colour


def test_what_the_model_lacks_is_left_out(folder):  # noqa: F811
    subjects = Subjects()
    subjects.add(make_subject(has=EVERY - {AUXILIARY, DECODER}))
    explorer = Explorer(Session(open_pictures(folder), subjects))
    explorer.tiles.canvases[0].click = [0.5, 0.5, 1]
    assert "decoder" not in explorer.why.words.value and "PTC" not in explorer.why.words.value
    assert explorer.why.maps[2].layout.display == "none" and explorer.why.maps[0].picture
    explorer.set(classes="none")
    assert "no class is chosen" in explorer.why.words.value and explorer.why.votes.value == ""
    explorer.controls.of["cam"].value = "auxiliary"
    explorer.controls.class_choice.value = "all"
    assert explorer.why.layout.display == "none" and "no auxiliary CAM" in explorer.notes.value


def test_votes_picture_shows_the_heaviest_largest():
    """Two neighbours on either side: a circle of the class's colour each, area by weight."""
    starts = torch.zeros(2, 41, 41, dtype=torch.float64)
    starts[0], starts[1, :, 25:] = 0.4, 0.9
    votes = (Vote(0, 12, 20, 32, 0.8), Vote(0, -12, 20, 8, 0.2))
    trace = why.PARTrace((41, 41), (20, 20), None, None, None, votes, starts)
    found = why.Reasons((20, 20), ("background", "b"), (0, 5), None, trace, None, [])
    picture = why.votes_picture(found, np.zeros((41, 41, 3), np.uint8))
    right = (picture == draw.LABEL_COLOURS[5]).all(-1)
    left = (picture == 160).all(-1)
    assert right[:, :112].sum() == 0 and left[:, 112:].sum() == 0
    assert 2.5 < right.sum() / left.sum() < 6


def test_no_name_becomes_html_in_the_panel(tmp_path):
    explorer = hostile_explorer(tmp_path)
    explorer.tiles.canvases[0].click = [0.5, 0.5, 1]
    for panel in (explorer.why.words, explorer.why.votes):
        found = Elements(panel.value)
        assert not found.tags & {"img", "script"} and not {a for a in found.attributes if a.startswith("on")}
    assert "class<img" in Elements(explorer.why.words.value).text


def test_names_of_a_chart_do_not_cover_each_other_or_what_is_below():
    assert why._apart([10, 12, 60], 11, most=100) == [10, 21, 60]
    assert why._apart([90, 95, 96, 97], 11, most=100) == [67, 78, 89, 100]
    assert why._apart([], 11, most=100) == []
