"""The network as torch.export and onnxruntime compute it, at batches and sizes that it was not traced with."""

import sys

import jaxtyping
import pytest
import torch
from small_config import stirred_model
from torch.testing import assert_close

from toco_core.cam import multi_scale_cam
from toco_core.errors import ToCoError
from toco_core.predict import portable
from toco_core.predict.portable import OUTPUTS, Portable, exported, onnx_difference, write_onnx


@pytest.fixture(scope="module")
def model():
    return stirred_model(n_classes=3).float()


@pytest.fixture
def untyped():
    """Traced sizes are no numbers: shapes are not checked meanwhile."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def images(batch, height, width):
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(4))


@torch.no_grad()
def test_outputs_are_those_of_the_package(model):
    unit = images(2, 24, 40)
    scores, cam, segmentation = Portable(model)(unit)
    ours = model(model.normalise(unit))
    assert_close(scores, ours.class_logits.sigmoid())
    assert_close(cam, multi_scale_cam(model, model.normalise(unit), scales=(1.0,), flip=False).cam)
    size = {"size": (24, 40), "mode": "bilinear", "align_corners": False}
    assert_close(segmentation, torch.nn.functional.interpolate(ours.seg_logits, **size))
    assert cam.amax((-1, -2)).min() > 0.9 and cam.std() > 0.1


@torch.no_grad()
def test_torch_export_computes_other_batches_and_sizes(model, untyped):
    program = exported(model)
    for size in ((1, 16, 56), (3, 32, 32), (2, 40, 24)):  # 32 is the size of the position embeddings
        for ours, theirs in zip(Portable(model)(images(*size)), program.module()(images(*size)), strict=True):
            assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_onnxruntime_computes_the_same_and_a_wrong_file_is_found(model, untyped, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    if torch.__version__.startswith("2.6."):
        with pytest.raises(ToCoError, match=r"PyTorch 2\.6\..* cannot write this network as ONNX: take a newer one"):
            write_onnx(model, tmp_path / "model.onnx")
        return
    (tmp_path / "model.onnx").symlink_to(tmp_path.parent / "mine.onnx")
    path = write_onnx(model, tmp_path / "model.onnx")
    assert not path.is_symlink() and not (tmp_path.parent / "mine.onnx").exists()
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]  # weights inside
    assert onnx_difference(model, path.read_bytes()) < 1e-5
    graph = onnx.load(path).graph
    assert [value.name for value in graph.output] == list(OUTPUTS)
    axes = [axis.dim_param or axis.dim_value for axis in graph.input[0].type.tensor_type.shape.dim]
    assert axes[1] == 3 and not any(isinstance(axes[i], int) for i in (0, 2, 3))
    other = stirred_model(n_classes=3).float()
    other.classifier.weight.data *= -1
    assert onnx_difference(other, path.read_bytes()) > 0.1
    before = path.read_bytes()
    monkeypatch.setattr(portable, "onnx_difference", lambda *_: 1.0)
    with pytest.raises(ToCoError, match=r"differ by 1\.0e\+00"):
        write_onnx(model, path)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_missing_packages_and_folders_are_named(model, tmp_path, monkeypatch):
    with pytest.raises(ToCoError, match="no/model.onnx' is in no folder that exists"):
        write_onnx(model, tmp_path / "no" / "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    monkeypatch.setattr(torch.onnx, "export", None)  # what cannot be written is refused before the work
    for path in (tmp_path / "folder.onnx", ""):
        with pytest.raises(ToCoError, match="cannot write to .*: Is a directory"):
            write_onnx(model, path)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ToCoError, match=r"needs the package onnxscript: pip install 'toco_core\[onnx\]'"):
        write_onnx(model, tmp_path / "model.onnx")
