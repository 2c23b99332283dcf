"""Scores against counts made pixel by pixel."""

import numpy as np
import pytest
import reference_labels as slow
import torch
from torch.testing import assert_close

from toco_core.errors import ToCoError
from toco_core.evaluation import metrics
from toco_core.evaluation.evaluate import CAMCounts


def maps(n_classes, size=(13, 21), seed=0, absent=()):
    rng = np.random.default_rng(seed)
    truth, prediction = rng.integers(0, n_classes, (2, *size)).astype(np.uint8)
    for c in absent:
        truth[truth == c] = 0
    truth[rng.random(size) < 0.1] = 255
    return truth, prediction


@pytest.mark.parametrize("n_classes", [2, 7, 8, 21, 32, 81, 128, 129, 200, 255])
def test_counts_and_scores_equal_the_slow_way(n_classes):
    truth, prediction = maps(n_classes, absent=(3,))
    matrix = metrics.ConfusionMatrix(n_classes - 1)
    matrix.update(truth, prediction)
    expected = slow.confusion(truth, prediction, n_classes)
    np.testing.assert_array_equal(matrix.counts, expected)
    scores = matrix.scores()
    for name, value in slow.scores(expected).items():
        ours = torch.as_tensor(getattr(scores, name), dtype=torch.float64)
        assert_close(ours, torch.tensor(value, dtype=torch.float64), rtol=1e-12, atol=0, equal_nan=True)


def test_a_class_that_is_not_in_the_ground_truth():
    matrix = metrics.ConfusionMatrix(3)
    matrix.update(np.array([0, 0, 1, 1], np.uint8), np.array([0, 2, 1, 1], np.uint8))  # 2 is predicted only, 3 nowhere
    scores = matrix.scores()
    assert_close(scores.iou, np.array([0.5, 1.0, 0.0, np.nan]), equal_nan=True)
    assert_close(scores.precision, np.array([1.0, 1.0, 0.0, np.nan]), equal_nan=True)
    assert_close(scores.recall, np.array([0.5, 1.0, np.nan, np.nan]), equal_nan=True)
    assert scores.miou == 0.75 and scores.mean_accuracy == 0.75 and scores.pixel_accuracy == 0.75


def test_numpy_and_torch_of_any_whole_type_count_the_same():
    truth, prediction = maps(21)
    prediction[truth == 255] = 255  # void may be predicted where it is ignored
    expected = metrics.ConfusionMatrix(20)
    expected.update(truth, prediction)
    for kind in (torch.uint8, torch.int16, torch.int64):
        matrix = metrics.ConfusionMatrix(20)
        matrix.update(torch.from_numpy(truth).to(kind), torch.from_numpy(prediction).to(kind))
        np.testing.assert_array_equal(matrix.counts, expected.counts)
    for kind in (np.uint16, np.int32, np.int64):
        matrix = metrics.ConfusionMatrix(20)
        matrix.update(truth.astype(kind), prediction.astype(kind))
        np.testing.assert_array_equal(matrix.counts, expected.counts)


@pytest.mark.filterwarnings("error")
def test_arrays_that_are_read_only_transposed_or_mirrored():
    truth, prediction = maps(21)
    expected = metrics.ConfusionMatrix(20)
    expected.update(truth, prediction)
    truth.flags.writeable = prediction.flags.writeable = False
    mirrored = metrics.ConfusionMatrix(20)
    mirrored.update(truth[:, ::-1], prediction[:, ::-1])
    np.testing.assert_array_equal(mirrored.counts, expected.counts)
    transposed = metrics.ConfusionMatrix(20)
    transposed.update(truth.T, prediction.T.astype(np.int64))
    np.testing.assert_array_equal(transposed.counts, expected.counts)


def test_parts_merge_to_the_whole():
    (a, b), (c, d) = maps(7, seed=1), maps(7, seed=2)
    whole, part = metrics.ConfusionMatrix(6), metrics.ConfusionMatrix(6)
    whole.update(np.stack([a, c]), np.stack([b, d]))
    part.update(a, b)
    other = metrics.ConfusionMatrix(6)
    other.update(c, d)
    part.merge(other)
    np.testing.assert_array_equal(part.counts, whole.counts)


@pytest.mark.filterwarnings("error")
def test_nothing_counted_is_not_a_number_and_not_a_warning():
    matrix = metrics.ConfusionMatrix(2)
    matrix.update(np.full((2, 5), 255, np.uint8), np.zeros((2, 5), np.uint8))
    matrix.update(np.zeros((0, 5), np.uint8), np.zeros((0, 5), np.uint8))
    scores = matrix.scores()
    assert np.isnan([scores.miou, scores.pixel_accuracy, scores.mean_accuracy]).all() and np.isnan(scores.iou).all()


@pytest.mark.parametrize("n_classes", [3, 8, 129, 21])
def test_values_outside_the_classes_are_named_and_not_counted(n_classes):
    matrix = metrics.ConfusionMatrix(n_classes - 1)
    good = np.zeros((4, 6), np.uint8)
    for value in {n_classes, n_classes + 1, 254}:
        bad = good.copy()
        bad[2, 3] = value
        with pytest.raises(ToCoError, match=f"ground truth with the value {value}: 0 to {n_classes - 1} and 255"):
            matrix.update(bad, good)
        with pytest.raises(ToCoError, match=f"prediction with the value {value}: 0 to {n_classes - 1} are"):
            matrix.update(good, bad)
    with pytest.raises(ToCoError, match="prediction with the value 255"):
        matrix.update(good, good + 255)
    with pytest.raises(ToCoError, match="prediction with values from -1 to 0"):
        matrix.update(good, np.where(bad > 0, -1, 0))
    with pytest.raises(ToCoError, match="float"):
        matrix.update(good, torch.zeros(4, 6))
    with pytest.raises(ToCoError, match=r"shape \(6, 4\)"):
        matrix.update(good, good.T)
    with pytest.raises(ToCoError, match="cannot be merged"):
        matrix.merge(metrics.ConfusionMatrix(n_classes))
    assert matrix.counts.sum() == 0


@pytest.mark.parametrize("n_classes", [0, 255])
def test_impossible_numbers_of_classes(n_classes):
    with pytest.raises(ToCoError, match=f"n_classes = {n_classes} is not allowed: 1 to 254"):
        metrics.ConfusionMatrix(n_classes)


def test_n_classes_is_the_number_of_foreground_classes_in_every_counter():
    """One K for all: labels 0..K are counted, K + 1 is refused."""
    K, last = 4, np.full((2, 3), 4, np.uint8)
    counters = [metrics.ConfusionMatrix(K), metrics.OpenCounts(K)]
    for counter in counters:
        counter.update(last, last)
        with pytest.raises(ToCoError, match="value 5"):
            counter.update(last + 1, last)
    assert counters[0].counts.shape == (5, 5) and counters[1].counts.shape == (5, 6)
    assert [len(counter.scores().iou) for counter in counters] == [5, 5] and CAMCounts(K).counts.shape == (21, 5, 5)


def test_labels_with_open_pixels_are_counted_with_as_many_classes_as_bytes_name():
    """254 is the most that a data set may have: then 254 is a class, too, and 255 is open or ignored."""
    counts = metrics.OpenCounts(254)
    counts.update(np.array([[254, 254, 254, 0, 255]], np.uint8), np.array([[254, 255, 0, 255, 254]], np.uint8))
    assert counts.counts.sum() == 4 and counts.decided == 0.5
    assert counts.counts[254, [254, 255, 0]].tolist() == [1, 1, 1] and counts.counts[0, 255] == 1
    assert_close(counts.scores().miou, (0 / 2 + 1 / 3) / 2)
    assert_close(counts.decided_scores().iou[[0, 254]], np.array([0 / 1, 1 / 2]))


def test_average_precision_equals_the_slow_way():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 5, generator=g).mul(2).round() / 2  # with ties
    wanted = (torch.rand(40, 5, generator=g) < torch.tensor([0.1, 0.5, 0.9, 0.3, 0.0])).float()
    scores = metrics.multi_label_scores(logits, wanted)
    expected = [slow.average_precision(logits[:, k].tolist(), wanted[:, k].tolist()) for k in range(4)]
    assert_close(scores.average_precision, np.array([*expected, np.nan]), equal_nan=True)
    assert_close(scores.mean_average_precision, float(np.mean(expected)))


def test_f1_is_the_mean_over_images():
    logits = torch.tensor([[2.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, 3.0, -2.0], [-1.0, -0.5, 0.0]])
    wanted = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 0], [0, 0, 1]])
    # one of two found and one of two wanted; rightly nothing; right; nothing found (0 is no prediction)
    assert_close(metrics.multi_label_scores(logits, wanted).f1, (0.5 + 1 + 1 + 0) / 4)


@pytest.mark.filterwarnings("error")
def test_no_class_at_all():
    scores = metrics.multi_label_scores(torch.full((2, 3), -1.0), torch.zeros(2, 3))
    assert np.isnan(scores.mean_average_precision) and scores.f1 == 1.0


def test_more_pixels_than_are_counted_at_a_time(monkeypatch):
    monkeypatch.setattr(metrics, "EXACT_COUNTS", 100)
    rng = np.random.default_rng(11)
    truth, guess = rng.integers(0, 5, (23, 31)), rng.integers(0, 5, (23, 31))
    matrix = metrics.ConfusionMatrix(4)
    matrix.update(truth, guess)
    wanted = np.zeros((5, 5), np.int64)
    np.add.at(wanted, (truth, guess), 1)
    assert (matrix.counts == wanted).all()
