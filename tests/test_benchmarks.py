"""The slow baseline of experiments/benchmarks does the same work as toco_core: losses, gradients, labels, counts."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from small_config import small_recipe, stir
from torch.testing import assert_close

from toco_core import crops, labels, losses
from toco_core.cam import multi_scale_cam
from toco_core.config import override
from toco_core.evaluation.evaluate import CAMCounts, evaluate
from toco_core.evaluation.metrics import ConfusionMatrix
from toco_core.model import ToCo
from toco_core.objective import Step, StepInput, objective, term_weights

FOLDER = Path(__file__).parent.parent / "experiments" / "benchmarks"
SMALL = {
    "backbone": "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)", "pretrained": False, "layer": 2,
    "proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10, "decoder_width": 14, "par_iterations": 2,
    "par_dilations": (1, 2), "local_size": 16, "n_local": 3, "positive_threshold": 0.6, "cam_scales": (1.0, 0.5, 1.5),
}  # fmt: skip
K = 3
BETAS = {"beta_l": 0.25, "beta_h": 0.7}
BOXES = torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41]])
IMAGE_LABELS = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])


@pytest.fixture(scope="module", autouse=True)
def folder():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def baseline(folder):
    import baseline

    return baseline


@pytest.fixture(scope="module")
def model():
    """In float64, so that another order of summation moves no label; far from its start, so that CAMs are not flat."""
    torch.manual_seed(0)
    model = ToCo(override(small_recipe(), **SMALL).model, K).double()
    stir(model, 0.2)
    return model


@pytest.fixture(scope="module")
def batch(model):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, 2, 3, 5, 6, generator=generator, dtype=torch.float64)
    resized = [torch.nn.functional.interpolate(part, size=(32, 48), mode="bicubic").clamp(0, 1) for part in coarse]
    return StepInput(*(model.normalise(part) for part in resized), IMAGE_LABELS, BOXES)


@pytest.fixture
def cam():
    coarse = torch.rand(2, K, 6, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    coarse[..., 4:] *= 0.1  # the right half is background
    return torch.nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")


def test_a_whole_step(baseline, model, batch):
    config = override(small_recipe(), **SMALL)
    weights = term_weights(config, 10_000)
    region = torch.ones(2, 32, 48, dtype=torch.int8)
    boxes = crops.sample_crops(region, n_crops=3, crop_size=16, generator=torch.Generator().manual_seed(0))
    step = Step(model, batch, config, 10_000, boxes=boxes)
    found = objective(step)
    wanted = baseline.step_losses(model, batch, config, weights, tuple(boxes))
    assert set(found.terms) == set(wanted.terms)
    for name, term in wanted.terms.items():
        assert term != 0
        assert_close(found.terms[name].double(), term.double(), rtol=1e-6, atol=1e-9)
    for name in ("token_label", "pseudo_label", "is_positive"):
        assert len(getattr(wanted, name).unique()) > 1
        assert_close(getattr(step, name), getattr(wanted, name), check_dtype=False)
    gradients = []
    for total in (found.total, wanted.total):
        model.zero_grad()
        total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_cams(baseline, model, batch):
    found = multi_scale_cam(model, batch.images, scales=(1.0, 0.5, 1.5))
    assert_close(tuple(found), baseline.multi_scale_cam(model, batch.images, (1.0, 0.5, 1.5)), check_dtype=False)


def test_par_and_labels(baseline, batch, model, cam):
    images = model.denormalise(batch.images).clamp(0, 1)
    found = labels.pseudo_label(images, cam, IMAGE_LABELS, valid_box=BOXES, **BETAS)
    wanted = baseline.pseudo_label(images, cam, IMAGE_LABELS, BOXES, **BETAS)
    assert set(wanted.unique().tolist()) >= {0, 1, 255}
    assert_close(found, wanted)
    region = labels.region_mask(cam, IMAGE_LABELS, **BETAS)
    assert_close(region, baseline.region_of(cam, IMAGE_LABELS, *BETAS.values()), check_dtype=False)


def test_crops_and_flags(baseline, batch, cam):
    region = labels.region_mask(cam, IMAGE_LABELS, **BETAS)
    drawn = baseline.draw_boxes(region, BOXES, 5, 16)
    views, flags = baseline.cut_and_flag(batch.local_image, region, *drawn, 16, 0.6)
    assert flags.any() and not flags.all()
    assert_close(crops.cut_crops(batch.local_image, *drawn, 16), views)
    assert_close(crops.crop_flags(region, *drawn, 16, threshold=0.6), flags)
    for b, (top, bottom, left, right) in enumerate(BOXES.tolist()):
        y, x = drawn[0][b] + 8, drawn[1][b] + 8
        assert ((y >= top) & (y < bottom) & (x >= left) & (x < right)).all() and (region[b, y, x] <= 1).all()


def test_contrasts(baseline):
    generator = torch.Generator().manual_seed(3)
    patch_map = torch.randn(2, 7, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    label = torch.tensor([0, 1, 3, 255])[torch.randint(0, 4, (2, 4, 5), generator=generator)]
    both = losses.ptc_loss(patch_map, label), baseline.ptc_loss(patch_map, baseline.affinity_mask(label))
    assert_close(*both)
    assert_close(*(torch.autograd.grad(loss, patch_map) for loss in both))
    assert_close(baseline.affinity_mask(label), labels.affinity_mask(label), check_dtype=False)
    alone = torch.tensor([0, 255, 255, 255]).view(1, 2, 2)  # no pair at all
    tokens = patch_map[:1, :, :2, :2].detach()
    assert baseline.ptc_loss(tokens, baseline.affinity_mask(alone)) == losses.ptc_loss(tokens, alone) == 0

    student = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(2, 2, 5, generator=generator, dtype=torch.float64)
    flags = torch.tensor([[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 1]]).bool()
    both = losses.ctc_loss(student, teacher, flags, temperature=0.3), baseline.ctc_loss(student, teacher, flags, 0.3)
    assert_close(*both)
    assert_close(*(torch.autograd.grad(loss, student) for loss in both))


def test_evaluation_and_confusion(baseline, folder):
    from step import confusion_at

    from toco_core.data import evaluation_items, to_unit

    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, K + 1, (2, 30, 40)).astype(np.uint8)
    truth[3:9] = 255
    matrix = ConfusionMatrix(K)
    matrix.update(truth, guess)
    assert_close(matrix.counts, baseline.confusion(truth, guess, K + 1))

    class Two:
        names, image_labels = ["a", "b"], np.array([[0, 1, 1], [1, 0, 0]], np.float32)
        images = rng.integers(0, 256, (2, 30, 40, 3)).astype(np.uint8)

        def __len__(self):
            return 2

        def image(self, index):
            return self.images[index]

        def mask(self, index):
            return truth if index else guess

    torch.manual_seed(0)
    model = ToCo(override(small_recipe(), **SMALL).model, K)
    found = evaluate(model, Two(), size=32, scales=(1.0, 0.5), progress=False)
    items = [(model.normalise(to_unit(i.image)), i.image_labels, i.mask) for i in evaluation_items(Two(), size=32)]
    cam, aux_cam, seg = baseline.evaluate(model, items, (1.0, 0.5), CAMCounts.betas)
    for ours, slow in ((found.cam, cam), (found.aux_cam, aux_cam)):
        counted = np.stack([confusion_at(ours, i) for i in range(len(slow))])
        assert np.abs(counted - slow).sum() <= 0.002 * slow.sum()  # a value at a threshold may round to either side
    slow_seg = ConfusionMatrix(K)
    slow_seg.counts = seg.astype(np.int64)
    assert_close(found.seg.miou, slow_seg.scores().miou)


def test_sides_are_timed_in_turn_and_compared_turn_by_turn(folder):
    from measure import alternate, ratio

    calls = []
    seconds = alternate({"slow": lambda: calls.append("s"), "fast": lambda: calls.append("f")}, 3)
    assert calls == ["s", "f"] * 4  # the first turn does not count
    assert {name: len(values) for name, values in seconds.items()} == {"slow": 3, "fast": 3}
    assert ratio({"slow": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 1.0]}, "slow", "fast") == 3.0


def test_what_is_not_a_number_does_not_pass_as_agreement(folder):
    from step import agreement_of

    one, nan = torch.ones(3), torch.full((3,), float("nan"))
    assert agreement_of(one, one) == {"error": 0.0}
    assert np.isnan(agreement_of((one, one), (one, nan))["error"])
    assert agreement_of(torch.tensor([1, 2]), torch.tensor([1, 3])) == {"equal": 0.5}


@pytest.mark.parametrize("path", sorted((FOLDER.parent / "records").glob("benchmarks_*.json")), ids=lambda p: p.stem)
def test_records_name_the_machine(path):
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"cpu", "threads", "torch"} <= set(record["machine"])


def test_without_a_gpu_nothing_is_measured(folder, monkeypatch, tmp_path):
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no GPU here .*: nothing was measured"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_gpu_script_rehearsed(folder, tmp_path):
    """Every section runs, on the CPU at tiny sizes: no error, and the differences from itself are 0."""
    import gpu

    gpu.main(["--out", str(tmp_path), "--rehearse"])
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert list(record) == ["machine", "correctness", "speed", "pieces", "evaluation", "loader", "recipe", "compiled"]
    errors = {name: part["error"] for name, part in record.items() if "error" in part}
    assert errors == {}
    assert max(record["correctness"]["reference"].values()) < 2e-3
    for name in ("ViT-Tiny", "embedded"):
        same, rounded = (record["correctness"][f"{name}, {precision}"] for precision in ("fp32", "bf16"))
        assert same["gradients"] == 0 and set(same["labels_equal"].values()) == {1.0}
        assert all(error == 0 for errors in same["terms"].values() for error in errors)
        assert 1e-4 < rounded["gradients"] < 0.5
    assert [point["way"] for point in record["speed"]["points"]] == ["eager", "replayed"]
    for point in record["speed"]["points"]:
        assert point["images_per_second"] > 0 and point["tflop_per_step"] > 0 and point["kernels"]
    for part in ("pieces", "evaluation", "loader", "recipe"):
        assert min(value for value in record[part].values()) > 0
    assert "images_per_second" in (tmp_path / "gpu.log").read_text(encoding="utf-8")


def test_a_section_of_the_gpu_script_that_fails_leaves_the_others(folder, tmp_path, monkeypatch):
    import gpu

    for name in ("speed", "pieces", "evaluation", "loader", "recipe"):
        monkeypatch.setattr(gpu, name, lambda *_: {"done": 1})

    def fails(_):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu, "correctness", fails)
    gpu.main(["--out", str(tmp_path), "--rehearse"])
    record = json.loads((tmp_path / "gpu.json").read_text(encoding="utf-8"))
    assert record["correctness"]["error"] == "RuntimeError: no kernel image"
    assert all(record[name]["done"] for name in ("speed", "pieces", "evaluation", "loader", "recipe"))
