"""What is below the explorer: opened when asked for, and tied to its image."""

import base64
import re

import pytest
from test_widgets import make_subject
from voc_folder import write_voc_folder

from toco_core.widgets import Session, Subjects, open_pictures
from toco_core.widgets.extras import Extras


@pytest.fixture
def session(tmp_path):
    subjects = Subjects()
    subjects.add(make_subject())
    return Session(open_pictures(write_voc_folder(tmp_path / "photos", splits={"val": range(6)})), subjects)


def test_each_part_is_made_when_it_is_opened(session, tmp_path):
    opened = []
    extras = Extras(session, folder=tmp_path / "explored", may_save=True, on_open=opened.append)
    assert extras.gallery is extras.player is None and len(extras.children) == 1
    extras.show_gallery.value = True
    extras.settle()
    extras.gallery.grid.wanted = [2, 1]
    assert opened == [2] and len(extras.children) == 2 and extras.gallery.survey.found
    extras.show_gallery.value, extras.show_player.value = False, True
    extras.settle()
    assert extras.children[1] is extras.player and extras.player.movie.title.startswith("img_0")
    extras.show_player.value = False
    session.go(3)
    extras.show_player.value = True
    extras.settle()
    assert extras.player.movie.title.startswith("img_3")


@pytest.mark.parametrize("may_save", [True, False])
def test_page_is_a_download_and_a_file_where_it_may_be(session, tmp_path, may_save):
    extras = Extras(session, folder=tmp_path / "explored", may_save=may_save)
    session.go(1)
    extras.make_page.click()
    data = re.search('href="data:text/html;base64,([^"]+)" download="img_1.html"', extras.made.value)[1]
    path = tmp_path / "explored" / "img_1.html"
    assert path.is_file() == may_save
    assert b"<title>img_1</title>" in base64.b64decode(data)
    assert not may_save or path.read_bytes() == base64.b64decode(data)


def test_pages_of_two_sides_are_two_files(session, tmp_path):
    extras = Extras(session, folder=tmp_path / "explored", may_save=True)
    session.compare(True)
    session.use(session.subjects.add(make_subject("b/<other>", seed=1)), side=1)
    for session.active in (0, 1):
        extras.make_page.click()
    assert sorted(path.name for path in (tmp_path / "explored").iterdir()) == [
        "img_0-A-model.html",
        "img_0-B-b_other_.html",
    ]


def test_what_cannot_be_made_is_told(tmp_path):
    subjects = Subjects()
    subjects.add(make_subject(has=frozenset()))
    folder = write_voc_folder(tmp_path / "photos", splits={"val": range(2)})
    extras = Extras(Session(open_pictures(folder), subjects), folder=tmp_path, may_save=True)
    extras.make_page.click()
    assert "no trained classifier" in extras.made.value
    extras.show_gallery.value = True
    extras.settle()
    assert "no trained classifier" in extras.gallery.grid.items[0]["words"]
