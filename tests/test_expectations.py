"""What the explorer's sliders make one expect, counted by hand; and work that leaves the kernel free."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from test_widgets import folder, make_subject, session, subject  # noqa: F401

from toco_core.conventions import IGNORE
from toco_core.widgets import Background, Expectations, measure_expectations


def test_expectations_are_those_of_the_labels_by_hand(session):  # noqa: F811
    name, thresholds = session.pictures.names[1], (0.3, 0.6)
    start = session.sides[0].settings
    found = measure_expectations(session, [name], thresholds=thresholds)

    session.go(name)
    truth = session.picture.mask
    for t, beta_h in enumerate(thresholds):
        session.set(show="seed label", beta_l=start.beta_l, beta_h=beta_h)
        label = session.label(0)
        pairs = [(a, b) for a, b in zip(label.flatten(), truth.flatten()) if 0 < a < IGNORE and b < IGNORE]
        assert found.kept[0, t] == len(pairs) and found.right[0, t] == sum(a == b for a, b in pairs)
    np.testing.assert_allclose(found.precision, found.right[0] / np.maximum(found.kept[0], 1))
    session.set(beta_l=start.beta_l, beta_h=start.beta_h, show="pseudo label")
    for column, n in enumerate((0, start.par_iterations)):
        session.set(par_iterations=n)
        inside = np.isin(session.label(0), session.picture.labels)
        grey = session.picture.image.astype(float).mean(-1)
        down, across = np.gradient(grey)
        border = [
            np.hypot(down[y, x], across[y, x])
            for y, x in np.argwhere(inside)
            if not (inside[y - 1, x] and inside[y, x - 1])
        ]
        assert found.gradient[0, column] == pytest.approx(np.mean(border) if border else np.nan, nan_ok=True)
    assert (np.abs(found.similarity) <= 1).all() and found.similarity.shape == (1, 2)


def test_findings_are_told_with_their_spread():
    found = Expectations(
        (0.4, 0.9),
        np.array([[100.0, 20.0], [300.0, 80.0]]),
        np.array([[50.0, 19.0], [190.0, 76.0]]),
        np.array([[4.0, 6.0], [2.0, 8.0]]),
        np.array([[0.9, 0.5], [0.7, 0.1]]),
    )
    text = str(found)
    assert "shrinks to 25 %; 60 % of it were right, now 95 %" in text
    assert "by 3.0 grey levels per pixel without PAR, with it by 4.0 ± 2.0 more" in text
    assert "cosine of 0.80 to its object, to the ground one that is 0.50 ± 0.10 lower" in text
    none = np.full((0, 2), np.nan)
    assert "nothing to measure" in str(Expectations((0.4, 0.9), none, none, none, none))


def test_without_a_classifier_only_patches_are_measured(session):  # noqa: F811
    session.subjects.add(replace(make_subject("bare", has=frozenset()), class_names=("background",)))
    session.use("bare")
    found = measure_expectations(session, session.pictures.names[:2], thresholds=(0.5,))
    assert "1." not in str(found) and "3. A patch" in str(found)
    assert np.isnan(found.kept).all() and np.isnan(found.gradient).all() and np.isfinite(found.similarity).all()


def test_live_work_leaves_the_kernel_free_and_tells_its_result_or_its_error():
    may_end = threading.Event()

    def work():
        assert may_end.wait(10)
        return 3

    answer = Background(work, "found <{}>".format, live=True)
    assert repr(answer) == "measuring ..." and answer.result is None  # it came back before the work was done
    may_end.set()
    answer.settle()
    assert answer.result == 3 and repr(answer) == "found <3>" and "found &lt;3&gt;" in answer.children[0].value
    failed = Background(lambda: 1 / 0, str, live=True)
    failed.settle()
    assert repr(failed).startswith("ZeroDivisionError") and failed.result is None


def test_work_without_a_browser_is_done_at_once_and_its_text_is_kept():
    answer = Background(lambda: 4, "found {}".format, live=False)
    assert answer.result == 4
    data = answer._repr_mimebundle_()[0]
    assert data["text/plain"] == "found 4"
    with pytest.raises(ZeroDivisionError):
        Background(lambda: 1 / 0, str, live=False)
