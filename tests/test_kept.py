"""A long evaluation: the CRF in processes of its own, and a folder from which an interrupted one goes on."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from growth import memory_growth
from small_config import stir
from voc_folder import write_voc_folder

import toco_core.evaluation.evaluate as evaluation
from toco_core.config import ModelConfig
from toco_core.data import VOCFolder, read_mask
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate
from toco_core.evaluation.metrics import ConfusionMatrix
from toco_core.evaluation.resume import KeptEvaluation
from toco_core.model import ToCo

K, N, BATCH = 3, 7, 2
BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
OPTIONS = {
    "size": 24, "scales": (1.0, 0.5), "seg_scales": (1.0, 1.5), "crf": {"iterations": 2}, "batch_size": BATCH,
    "progress": False,
}  # fmt: skip


def some_model(seed=0, **fields) -> ToCo:
    torch.manual_seed(seed)
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, **sizes, **fields), K)
    stir(model, 0.3)
    return model


@pytest.fixture(scope="module")
def model():
    return some_model()


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Seven images of four sizes; image 4 has no mask."""
    root = write_voc_folder(tmp_path_factory.mktemp("voc") / "voc", n=N)
    labels = {f"img_{i}": np.array([i % 2, 1, i // 2 % 2]) for i in range(N)}
    (root / "SegmentationClass" / "img_4.png").unlink()
    return VOCFolder(root, "train", labels=labels, require_masks=False)


@pytest.fixture(scope="module")
def plain(model, source):
    found = evaluate(model, source, **OPTIONS)
    assert 0 < found.seg.miou < 1 and len({*found.cam.miou}) > 5  # there is something to differ in
    return found


def equal(one, other) -> None:
    np.testing.assert_array_equal(one.cam.counts, other.cam.counts)
    np.testing.assert_array_equal(one.aux_cam.counts, other.aux_cam.counts)
    np.testing.assert_array_equal(one.seg.iou, other.seg.iou)
    assert one.seg.pixel_accuracy == other.seg.pixel_accuracy
    for scores in ("classes", "aux_classes"):
        np.testing.assert_array_equal(getattr(one, scores).average_precision, getattr(other, scores).average_precision)
    assert (one.protocol, one.n_images, one.n_masks) == (other.protocol, other.n_images, other.n_masks)


def refuse(*args, **kwargs):
    raise AssertionError("the network was asked again")


def scores_of_label_maps(folder, source):
    """Every image with a mask has its label map, and no other."""
    matrix = ConfusionMatrix(K)
    for i, name in enumerate(source.names):
        path = folder / "SegmentationClass" / f"{name}.png"
        assert path.is_file() == (i != 4)
        if i != 4:
            matrix.update(source.mask(i), read_mask(path))
    return matrix.scores()


class Stop(Exception):
    pass


def stopping_after(calls: int, function):
    """The function, which ends everything on the call after so many."""
    left = [calls]

    def stops(*args, **kwargs):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return function(*args, **kwargs)

    return stops


@pytest.mark.slow
def test_workers_move_no_bit(model, source, plain, tmp_path):
    equal(evaluate(model, source, **OPTIONS, crf_workers=2, keep=tmp_path / "kept"), plain)
    np.testing.assert_array_equal(scores_of_label_maps(tmp_path / "kept", source).iou, plain.seg.iou)
    with pytest.raises(ToCoError, match="crf_workers = -1 must be at least 0"):
        evaluate(model, source, **OPTIONS, crf_workers=-1)


def test_a_worker_that_dies_is_told_of():
    with pytest.raises(ToCoError, match="a process of the CRF ended: too little memory, or a script"):
        with evaluation.CRFWorkers(1, {}) as workers:
            workers.pool.submit(os._exit, 1).result()


def test_a_finished_evaluation_is_read(model, source, plain, tmp_path, monkeypatch):
    equal(evaluate(model, source, **OPTIONS, keep=tmp_path / "kept"), plain)
    monkeypatch.setattr(model, "encode", refuse)
    equal(evaluate(model, source, **OPTIONS, keep=tmp_path / "kept"), plain)
    manifest = json.loads((tmp_path / "kept" / "manifest.json").read_text())
    assert manifest["finished"] and manifest["protocol"] == plain.protocol
    assert manifest["settings"]["crf"]["iterations"] == 2


@pytest.mark.parametrize(("label_maps", "finished"), [(0, 0), (1, 0), (3, 2), (5, 6)])
def test_an_interrupted_evaluation_goes_on(model, source, plain, tmp_path, monkeypatch, label_maps, finished):
    """Finished batches are skipped, the one that was cut is made anew as a whole. Image 4 has no label map."""
    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(evaluation.CRFWorkers, "submit", stopping_after(label_maps, evaluation.CRFWorkers.submit))
        evaluate(model, source, **OPTIONS, keep=tmp_path)
    assert not json.loads((tmp_path / "manifest.json").read_text())["finished"]
    names, seen = [], evaluation._seen

    def watched(model, items, *rest):
        names.extend(item.name for item in items)
        return seen(model, items, *rest)

    monkeypatch.setattr(evaluation, "_seen", watched)
    equal(evaluate(model, source, **OPTIONS, keep=tmp_path), plain)
    assert names == [f"img_{i}" for i in range(finished, N)]


def test_the_label_maps_are_what_was_scored(model, source, plain, tmp_path):
    evaluate(model, source, **OPTIONS, keep=tmp_path)
    np.testing.assert_array_equal(scores_of_label_maps(tmp_path, source).iou, plain.seg.iou)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"crf": {"iterations": 3}}, "crf, protocol"),
        ({"scales": (1.0,)}, "protocol, scales"),
        ({"batch_size": 3}, "batch_size"),
        ({"max_over_scales": False}, "max_over_scales"),
        ({"autocast": lambda: torch.autocast("cpu", torch.bfloat16)}, "precision"),
    ],
)
def test_another_protocol_is_refused(model, source, tmp_path, changes, named):
    evaluate(model, source.subset([0]), **OPTIONS, keep=tmp_path)
    with pytest.raises(ToCoError, match=f"holds an evaluation with another {named}: choose a new folder"):
        evaluate(model, source.subset([0]), **OPTIONS | changes, keep=tmp_path)


def test_another_model_or_split_or_folder_is_refused(model, source, tmp_path):
    part, options = source.subset([0]), OPTIONS | {"crf": False}
    evaluate(model, part, **options, keep=tmp_path / "kept")
    with pytest.raises(ToCoError, match="another weights: choose"):
        evaluate(some_model(1), part, **options, keep=tmp_path / "kept")
    with pytest.raises(ToCoError, match="another network: choose"):
        evaluate(some_model(aux_pooling="mean"), part, **options, keep=tmp_path / "kept")
    with pytest.raises(ToCoError, match="another decoder_dilation: choose"):
        evaluate(some_model(decoder_dilation=2), part, **options, keep=tmp_path / "kept")
    with pytest.raises(ToCoError, match="another image_files, image_labels, images, mask_files: choose"):
        evaluate(model, source.subset([1]), **options, keep=tmp_path / "kept")
    with pytest.raises(ToCoError, match="is not empty and holds no evaluation"):
        evaluate(model, part, **options, keep=tmp_path)
    with pytest.raises(ToCoError, match="keep and on_batch: one of them"):
        evaluate(model, part, **options, keep=tmp_path / "new", on_batch=refuse)
    path = tmp_path / "kept" / "counts" / "img_0.npz"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ToCoError, match=r"img_0\.npz is damaged: delete it"):
        evaluate(model, part, **options, keep=tmp_path / "kept")
    path.unlink()
    equal(evaluate(model, part, **options, keep=tmp_path / "kept"), evaluate(model, part, **options))


def npz(**changes):
    """A kept image of `K` classes, changed."""
    maps = np.zeros((21, K + 1, K + 1), np.int64)
    rows = dict.fromkeys(("logits", "aux_logits", "image_labels"), np.zeros(K, np.float32))
    values = {"cam": maps, "aux_cam": maps, "seg": maps[0], **rows, "has_mask": np.array(True)} | changes
    file = io.BytesIO()
    np.savez_compressed(file, **values)
    return file.getvalue()


@pytest.mark.parametrize(
    "change",
    [
        {"cam": np.zeros((2, 2))}, {"seg": np.zeros((K + 1, K + 1))}, {"seg": -np.ones((K + 1, K + 1), np.int64)},
        {"has_mask": np.zeros(3, bool)}, {"has_mask": np.array(1)}, {"logits": np.array(["a", "b", "c"])},
        {"logits": np.zeros(K + 1, np.float32)}, {"cam": np.zeros((21, 3, 3), np.int64)},
        {"cam": np.zeros((20, K + 1, K + 1), np.int64)}, {"logits": np.zeros((K, 1), np.float32)},
        {"cam": np.zeros(2**29, np.uint8)},
    ],
)  # fmt: skip
def test_kept_images_of_another_shape_or_type(tmp_path, change):
    """They were added up in UFuncTypeError and ValueError; three megabytes unpacked to gigabytes."""
    kept = KeptEvaluation(tmp_path / "kept", {"a": 1})
    (tmp_path / "kept" / "counts").mkdir()
    (tmp_path / "kept" / "counts" / "a.npz").write_bytes(npz())
    assert evaluation._Counted(K).add_finished(kept, ["a"], [0], 8) == []
    (tmp_path / "kept" / "counts" / "a.npz").write_bytes(npz(**change))
    growth = memory_growth()
    with pytest.raises(ToCoError, match="kept.*(is damaged: delete it|delete the folder)"):
        evaluation._Counted(K).add_finished(kept, ["a"], [0], 8)
    assert growth() < 100


PARENT = """
import sys, time
from toco_core.predict.crf_workers import CRFWorkers
if __name__ == "__main__":
    import torch
    with CRFWorkers(2, {"iterations": 1}) as workers:
        maps, image = [torch.zeros(1, 3, 4, 5)], torch.zeros(1, 3, 8, 10, dtype=torch.uint8)
        for job in [workers.submit(maps, image) for _ in range(2)]:
            job.result()
        print(*[process.pid for process in workers.pool._processes.values()], flush=True)
        time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "kill"), reason="processes of POSIX")
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], stdout=subprocess.PIPE, text=True)
    workers = [int(pid) for pid in parent.stdout.readline().split()]
    assert workers and all(is_alive(pid) for pid in workers)
    parent.kill()
    parent.wait()
    until = time.monotonic() + 20
    while any(is_alive(pid) for pid in workers) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(is_alive(pid) for pid in workers)


def is_alive(pid):
    """Whether a process runs; one that has ended and that nobody asked about does not."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
