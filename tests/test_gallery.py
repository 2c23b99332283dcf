"""The gallery without a browser: its numbers are those of the explorer, its orders and filters those that are named."""

import io
import threading

import numpy as np
import pytest
from PIL import Image
from test_widgets import make_subject
from voc_folder import write_voc_folder

from toco_core.analysis.errors import KINDS, pixel_errors, total_errors
from toco_core.widgets import Session, Subjects, open_pictures
from toco_core.widgets.gallery import ANY_CLASS, ANY_KIND, ORDERS, OVERLAYS, Gallery, overlaid
from toco_core.widgets.survey import LabelSurvey, disagreement, unpacked

N = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_voc_folder(
        tmp_path_factory.mktemp("gallery") / "photos", N, splits={"train": range(6), "val": range(N)}
    )


@pytest.fixture
def session(folder):
    subjects = Subjects()
    subjects.add(make_subject())
    subjects.add("other", lambda: make_subject("other", seed=1))
    return Session(open_pictures(folder), subjects)


@pytest.fixture
def gallery(session):
    gallery = Gallery(session, per_page=4)
    gallery.settle()
    return gallery


def judged(gallery):
    gallery.measure.click()
    gallery.settle()
    return gallery


def test_only_the_page_on_the_screen_is_worked_out(gallery):
    assert sorted(gallery.survey.found) == [0, 1, 2, 3] and gallery.progress.layout.visibility == "hidden"
    assert all(item["source"] for item in gallery.grid.items)
    gallery.forth.click()
    gallery.settle()
    assert sorted(gallery.survey.found) == list(range(8)) and [i["index"] for i in gallery.grid.items] == [4, 5, 6, 7]
    gallery.forth.click()
    gallery.forth.click()
    gallery.settle()
    assert [i["index"] for i in gallery.grid.items] == [8] and "page 3 of 3" in gallery.position.value


def test_what_is_found_while_the_page_is_drawn_is_seen(gallery, monkeypatch):
    item, tellers, found = gallery._item, [], gallery.survey.found

    def slow_item(index):
        drawn = item(index)
        if not tellers:  # behind the reading of the first image: another thread finds that it has a problem, and tells
            found[0] = found[0]._replace(problem="unreadable")
            tellers.append(threading.Thread(target=gallery._told))
            tellers[0].start()
            tellers[0].join(0.3)
        return drawn

    monkeypatch.setattr(gallery, "_item", slow_item)
    gallery._show(ask=False)
    tellers[0].join(10)
    assert gallery.grid.items[0]["words"] == "unreadable"


def test_numbers_are_those_of_the_explorer(gallery, session):
    judged(gallery)
    for index in range(N):
        session.go(index)
        session.set(show="pseudo label")
        found, label, mask = gallery.survey.found[index], session.label(0), session.picture.mask
        np.testing.assert_array_equal(unpacked(found.label), label)
        np.testing.assert_equal(found.iou, session.view(0).numbers.scores.miou)
        assert found.errors.counts.tolist() == pixel_errors(label, mask).counts.tolist()
    whole = total_errors([found.errors for found in gallery.survey.found.values()])
    assert gallery.errors().counts.tolist() == whole.counts.tolist()
    assert f"{100 * whole.rate:.1f} %" in gallery.summary.value and whole.counts.any()


def test_orders(gallery):
    gallery.sort.value = ORDERS[1]
    gallery.settle()
    assert len(gallery.survey.found) == N
    iou = [gallery.survey.found[i].iou for i in gallery.order]
    assert iou == sorted(iou) and len(set(iou)) > 3
    gallery.sort.value = ORDERS[2]
    assert [gallery.survey.found[i].iou for i in gallery.order] == iou[::-1]
    gallery.sort.value = ORDERS[3]
    names = [gallery._class_names(i) for i in gallery.order]
    assert names == sorted(names) and len(set(names)) > 1


def test_disagreement_needs_and_compares_a_second_model(gallery):
    gallery.sort.value = ORDERS[4]
    assert "needs a second model" in gallery.notes.value
    gallery.other.value = "other"
    gallery.sort.value = ORDERS[0]
    gallery.sort.value = ORDERS[4]
    gallery.settle()
    found = []
    for i in range(N):
        one, two = gallery.survey.label(i), gallery.against.label(i)
        both = (one != 255) & (two != 255)
        found.append(((one != two) & both).sum() / both.sum())
    assert gallery.order == sorted(range(N), key=lambda i: -found[i]) and len(set(found)) > 3
    assert "≠" in gallery.grid.items[0]["mark"]


def test_a_model_that_was_opened_later_can_be_the_second(gallery, session):
    gallery.other.value, gallery.overlay.value = "other", "second model's label"
    session.subjects.add(make_subject("third", seed=2))
    gallery.renew.click()
    assert "third" in gallery.other.options
    assert (gallery.other.value, gallery.overlay.value) == ("other", "second model's label")
    gallery.other.value = "third"
    gallery.settle()
    assert gallery.against.subject.name == "third" and "≠" in gallery.grid.items[0]["mark"]


def test_classes_that_only_one_model_knows_never_agree(folder):
    pictures = open_pictures(folder)
    names = ("background", *pictures.class_names[1:-1], "griffin")
    one, two = (
        LabelSurvey(pictures, make_subject(class_names=n), _settings("all")) for n in (pictures.class_names, names)
    )
    for survey in (one, two):
        survey.look(0)
    a, b = one.label(0), two.label(0)
    both = (a != 255) & (b != 255)
    named = [[s.found[0].names[k] if k < 255 else "?" for k in m.ravel()] for s, m in ((one, a), (two, b))]
    differ = (np.array(named[0]) != np.array(named[1])).reshape(a.shape) & both
    assert disagreement(one, two, 0) == differ.sum() / both.sum()
    assert np.isnan(disagreement(one, two, 1))


def _settings(classes):
    from toco_core.widgets.settings import Settings

    return Settings(show="CAM label", classes=classes, block=3, beta=0.4)


def test_filters(gallery):
    judged(gallery)
    mains = {i: found.errors.main for i, found in gallery.survey.found.items()}
    for kind in KINDS:
        gallery.kind.value = kind
        gallery.settle()
        assert gallery.order == [i for i in range(N) if mains[i] == kind]
        assert ("no image is left" in gallery.notes.value) == (not gallery.order)
    assert sum(main is not None for main in mains.values()) == N
    gallery.kind.value = ANY_KIND
    name = gallery.of_class.options[2]
    gallery.of_class.value = name
    expected = [i for i in range(N) if name in gallery._class_names(i)]
    assert gallery.order == expected and 0 < len(expected) < N
    gallery.of_class.value = ANY_CLASS
    assert len(gallery.order) == N


def test_overlays(gallery, session):
    gallery.other.value = "other"
    gallery.settle()
    pictures = {}
    for overlay in OVERLAYS:
        gallery.overlay.value = overlay
        pictures[overlay] = gallery.grid.items[0]["source"]
    assert all(pictures.values()) and len(set(pictures.values())) == len(OVERLAYS)
    found = gallery.survey.found[0]
    size = np.asarray(Image.open(io.BytesIO(found.image))).shape
    assert all(overlaid(found, overlay, gallery.against.found[0]).shape == size for overlay in OVERLAYS)
    gallery.other.value = "no second model"
    assert gallery.overlay.value == OVERLAYS[3] or all(item["source"] for item in gallery.grid.items)


def test_click_opens_the_image(session):
    opened = []
    gallery = Gallery(session, on_open=opened.append, per_page=4)
    gallery.grid.wanted = [2, 1]
    assert opened == [2] and gallery.grid.chosen == 2
    gallery = Gallery(session, per_page=4)
    gallery.grid.wanted = [3, 1]
    assert session.index == 3
    gallery.on_open = lambda index: session.go("nothing")
    gallery.grid.wanted = [1, 2]
    assert "image = " in gallery.notes.value and gallery.grid.chosen == 3


def test_settings_follow_when_asked(gallery, session):
    before = gallery.survey
    session.set(beta_h=0.9, beta_l=0.1)
    gallery.forth.click()
    assert "settings have changed" in gallery.notes.value and gallery.survey is before
    gallery.renew.click()
    gallery.settle()
    assert gallery.survey.settings.beta_h == 0.9 and "settings have changed" not in gallery.notes.value
    assert gallery.survey is not before
    gallery.label.value = "CAM label"
    gallery.settle()
    assert gallery.survey.settings.show == "CAM label" and gallery.survey.found


def test_other_images_and_another_model_follow_when_asked(gallery, session, tmp_path):
    session.pictures = open_pictures(write_voc_folder(tmp_path / "others", 5, splits={"val": range(2, 5)}))
    session._decoded.clear()
    session._analyses.clear()
    session.go(0)
    gallery.grid.wanted = [1, 1]
    assert "other images by now" in gallery.notes.value and session.index == 0
    session.use("other", side=0)
    gallery.renew.click()
    gallery.settle()
    assert [item["name"] for item in gallery.grid.items] == ["img_2", "img_3", "img_4"]
    assert gallery.survey.subject.name == "other" and sorted(gallery.survey.found) == [0, 1, 2]
    assert "have changed" not in gallery.notes.value


def test_stop_keeps_what_was_found_and_the_kernel_answers_meanwhile(session):
    gate, waiting = threading.Event(), threading.Event()

    def give_way():
        waiting.set()
        gate.wait(20)

    gallery = Gallery(session, per_page=4, give_way=give_way)
    assert waiting.wait(20) and gallery.grid.items[0]["words"] == "..."
    gallery.measure.click()
    assert not gallery.stop.disabled and gallery.progress.layout.visibility == "visible"
    gallery.stop.click()
    gate.set()
    gallery.settle()
    assert len(gallery.survey.found) < N and gallery.stop.disabled
    assert gallery.progress.layout.visibility == "hidden"


def test_one_unreadable_image_does_not_end_it(folder, tmp_path):
    copy = write_voc_folder(tmp_path / "photos", splits={"train": range(6), "val": range(5)})
    source = open_pictures(copy)
    source._files[1].write_bytes(b"no image")
    subjects = Subjects()
    subjects.add(make_subject())
    gallery = judged(Gallery(Session(open_pictures(copy), subjects), per_page=4))
    assert gallery.survey.found[1].problem and gallery.grid.items[1]["words"] and not gallery.grid.items[1]["source"]
    assert len(gallery.survey.found) == 5 and gallery.survey.found[2].iou >= 0


def test_what_breaks_in_the_thread_is_told(gallery, monkeypatch):
    def broken(self, index):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(LabelSurvey, "look", broken)
    gallery.forth.click()
    gallery.settle()
    assert "RuntimeError: no memory left" in gallery.notes.value


def test_without_masks_labels_are_shown_and_nothing_is_scored(folder, tmp_path):
    files = sorted((folder / "JPEGImages").iterdir())[:3]
    for file in files:
        (tmp_path / file.name).write_bytes(file.read_bytes())
    subjects = Subjects()
    subjects.add(make_subject())
    gallery = judged(Gallery(Session(open_pictures(tmp_path), subjects)))
    assert all(item["source"] for item in gallery.grid.items) and gallery.summary.value == ""
    for item in gallery.grid.items:  # no score: the classes that are seen
        assert item["mark"] == ", ".join(gallery.survey.found[item["index"]].classes[:3] or ["background"])
    gallery.kind.value = KINDS[0]
    gallery.settle()
    assert gallery.order == []
