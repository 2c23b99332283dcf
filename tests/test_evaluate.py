import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_config import small_recipe, stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

import toco_core.evaluation.evaluate as evaluation
from toco_core import labels
from toco_core.config import ModelConfig, override
from toco_core.data import EvalItem, VOCFolder
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import CAMCounts, evaluate, look, strongest
from toco_core.evaluation.metrics import ConfusionMatrix, multi_label_scores
from toco_core.model import ToCo
from toco_core.refiners.crf import dense_crf

K = 3
BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
IMAGE_LABELS = {"img_0": [1, 0, 1], "img_1": [0, 1, 0], "img_2": [1, 1, 1], "img_3": [0, 0, 0], "img_4": [0, 1, 1]}


@pytest.fixture(scope="module")
def model(source):
    """In float64, so that another order of summation moves no label; far from its start, so that CAMs are not flat.

    Its decoder answers to how features differ from their mean, so that it does not see the same class everywhere.
    """
    torch.manual_seed(0)
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, **sizes), K).double()
    stir(model, 0.3)
    features = []
    hook = model.decoder.conv8.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].mean((0, 2, 3))))
    with torch.no_grad():
        for i in range(len(source)):
            images, _ = encoded(model, source, i, 24)
            model(images)
        mean = F.normalize(torch.stack(features).mean(0), dim=0)
        weight = model.decoder.conv8.weight[:, :, 0, 0]
        model.decoder.conv8.weight[:, :, 0, 0] = 3 * (weight - (weight @ mean)[:, None] * mean)
    hook.remove()
    return model.train()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_voc_folder(tmp_path_factory.mktemp("voc") / "voc", n=5)


@pytest.fixture(scope="module")
def source(root):
    return VOCFolder(root, "train", labels=IMAGE_LABELS)


# ---- the slow way: one image, one view, one class at a time


def encoded(model, source, index, size):
    image = source.image(index)
    image = resize(image, size, size) if size else image
    images = model.normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float() / 255)
    return images, model.encode(images)


def view_of(model, images, scale, mirrored):
    view = images
    if scale != 1:
        height, width = images.shape[2:]
        fitted = model.fitted_size(int(scale * height), int(scale * width))
        view = F.interpolate(view, size=fitted, mode="bilinear", align_corners=False)
    return view.flip(-1) if mirrored else view


def slow_cam(model, images, which, image_labels, scales, flip):
    """The K maps in [0, 1] of one image, of the final ("cam") or the auxiliary classifier."""
    total = torch.zeros(K, *images.shape[2:], dtype=torch.float64)
    for scale in scales:
        maps = []
        for mirrored in (False, True) if flip else (False,):
            tokens = model.encode(view_of(model, images, scale, mirrored))
            patches = tokens.patch_tokens if which == "cam" else tokens.aux_patch_tokens
            weight = (model.classifier if which == "cam" else model.aux_classifier).weight
            raw = torch.stack([(patches[0] @ w).view(tokens.grid) for w in weight])
            raw = F.interpolate(raw[None], size=images.shape[2:], mode="bilinear", align_corners=False)[0]
            maps.append(raw.flip(-1) if mirrored else raw)
        total += torch.stack(maps).max(0).values.clamp(min=0)
    for k in range(K):
        total[k] -= total[k].min()
        total[k] = total[k] / (total[k].max() + 1e-5) * image_labels[k]
    return total


def slow_strongest(cam, image_labels, size):
    """Largest value and its class at native size, pixel by pixel; the lower class wins, unlabelled ones never do."""
    cam = F.interpolate(cam[None].float(), size=size, mode="bilinear", align_corners=False)[0].numpy()
    value, label = np.zeros(size, np.float32), np.zeros(size, np.int64)
    for y, x in np.ndindex(*size):
        for k in range(K):
            if image_labels[k] and (label[y, x] == 0 or cam[k, y, x] > value[y, x]):
                value[y, x], label[y, x] = cam[k, y, x], k + 1
    return value, label


def slow_segmentation(model, images, tokens, size, seg_scales, use_max, crf_image=None):
    if tuple(seg_scales) == (1.0,):
        logits = [model.decoder(tokens.patch_map)]
    else:
        logits = []
        for scale in seg_scales:
            straight, mirrored = (model(view_of(model, images, scale, m)).seg_logits for m in (False, True))
            logits.append(straight + mirrored.flip(-1))
    logits = [F.interpolate(m.float(), size=size, mode="bilinear", align_corners=False)[0] for m in logits]
    merged = torch.stack(logits).max(0).values if use_max else sum(logits) / len(logits)
    if crf_image is not None:
        unit = torch.from_numpy(crf_image.copy()).permute(2, 0, 1).float() / 255
        merged = dense_crf(merged.softmax(0), unit)
    return merged.argmax(0).numpy().astype(np.uint8)


@torch.no_grad()
def slow_evaluate(model, source, size, scales, flip, seg_scales=(1.0,), use_max=True, seg_size="same", crf=False):
    cams = {which: [ConfusionMatrix(K) for _ in range(21)] for which in ("cam", "aux_cam")}
    seg, logits = ConfusionMatrix(K), {"cam": [], "aux_cam": []}
    for i in range(len(source)):
        mask, image_labels = source.mask(i), source.image_labels[i]
        images, tokens = encoded(model, source, i, size)
        for which, matrices in cams.items():
            value, label = slow_strongest(
                slow_cam(model, images, which, image_labels, scales, flip), image_labels, mask.shape
            )
            for step, matrix in enumerate(matrices):
                matrix.update(mask, np.where(value <= np.float32(step / 20), 0, label))
        seen = (images, tokens) if seg_size == "same" else encoded(model, source, i, seg_size)
        crf_image = source.image(i) if crf else None
        seg.update(mask, slow_segmentation(model, *seen, mask.shape, seg_scales, use_max, crf_image))
        logits["cam"].append(model.classifier(tokens.patch_tokens[0].max(0).values))
        logits["aux_cam"].append(model.aux_classifier(tokens.aux_patch_tokens[0].max(0).values))
    return cams, seg, {which: torch.stack(rows) for which, rows in logits.items()}


# ---- counts of a CAM


def test_counts_equal_one_matrix_per_threshold():
    rng = np.random.default_rng(0)
    grid = np.float32(np.arange(21) / 20)
    values = [*grid, *np.nextafter(grid, np.float32(2)).clip(max=1), *np.nextafter(grid, np.float32(-1)).clip(min=0)]
    counts, matrices = CAMCounts(K), [ConfusionMatrix(K) for _ in grid]
    for shape in ((30, 40), (7, 50)):
        truth = rng.choice([0, 1, 2, 3, 255], shape).astype(np.uint8)
        value = rng.choice([*values, *rng.random(20, np.float32)], shape).astype(np.float32)
        label = rng.integers(1, K + 1, shape)
        counts.update(truth, value, label)
        for beta, matrix in zip(grid, matrices, strict=True):
            matrix.update(truth, np.where(value <= beta, 0, label))
    for step, matrix in enumerate(matrices):
        found, wanted = counts.scores(step / 20), matrix.scores()
        assert_close(found.miou, wanted.miou)
        assert_close(found.iou, wanted.iou)
        assert_close(found.precision, wanted.precision, equal_nan=True)
    assert_close(counts.miou, np.array([matrix.scores().miou for matrix in matrices]))
    assert len(set(counts.miou)) > 10


def test_a_value_exactly_at_the_threshold_is_background():
    """As in `eval_label`, for every threshold and the numbers next to it."""
    for step, beta in enumerate(CAMCounts.betas):
        for value in (np.float32(beta), np.nextafter(np.float32(beta), np.float32(2))):
            counts = CAMCounts(1)
            counts.update(np.ones((1, 1), np.uint8), np.full((1, 1), min(value, 1), np.float32), np.ones((1, 1), int))
            cam = torch.full((1, 1, 1, 1), float(min(value, 1)))
            label = labels.eval_label(cam, torch.ones(1, 1), beta=float(beta))
            assert_close(counts.scores(step / 20).recall[1], float(label.item()))


def test_void_pixels_do_not_count():
    counts = CAMCounts(K)
    counts.update(np.full((3, 4), 255, np.uint8), np.full((3, 4), 0.5, np.float32), np.ones((3, 4), int))
    assert counts.counts.sum() == 0


def test_a_threshold_is_rounded_to_the_nearest():
    counts = CAMCounts(K)
    rng = np.random.default_rng(1)
    counts.update(rng.integers(0, 4, (9, 9)).astype(np.uint8), rng.random((9, 9), np.float32), np.full((9, 9), 2))
    assert_close(counts.scores(0.26).miou, counts.scores(0.25).miou)
    assert_close(counts.scores(0.29).miou, counts.scores(0.3).miou)


def test_the_best_threshold():
    """Class 1 where the value is above 0.42, and a class that is never shown: mIoU is highest at 0.4."""
    value = np.linspace(0, 1, 101, dtype=np.float32)[None]
    counts = CAMCounts(K)
    counts.update((value > 0.42).astype(np.uint8), value, np.ones_like(value, dtype=int))
    assert counts.best_beta == 0.4 and counts.miou.argmax() == 8


# ---- a whole split


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (32, {"scales": (1.0, 0.5, 1.5)}),
        (None, {"scales": (1.0, 0.5), "seg_scales": (1.0, 1.5)}),
        (24, {"scales": (0.75,), "flip": False, "seg_scales": (0.5, 1.0), "max_over_scales": False}),
        (24, {"scales": (0.75,), "flip": False, "seg_size": None, "seg_scales": (1.0, 1.5), "crf": True}),
        (24, {"scales": (0.75,), "flip": False, "seg_size": 32}),
        (24, {"scales": (0.75,), "flip": False, "crf": True}),
    ],
)
def test_equals_the_slow_way(model, source, size, options):
    found = evaluate(model, source, size=size, batch_size=2, progress=False, **options)
    seg_options = options.get("seg_scales", (1.0,)), options.get("max_over_scales", True)
    extra = {"seg_size": options.get("seg_size", "same"), "crf": options.get("crf", False)}
    flip = options.get("flip", True)
    cams, seg, logits = slow_evaluate(model, source, size, options["scales"], flip, *seg_options, **extra)
    for which, matrices in cams.items():
        counts = getattr(found, which)
        miou = np.array([matrix.scores().miou for matrix in matrices])
        assert_close(counts.miou[1:], miou[1:])
        assert_close(counts.miou[0], miou[0], rtol=0, atol=1e-3)  # rounding decides which zero is above zero
        for step in (1, 5, 14):
            assert_close(counts.scores(step / 20).iou, matrices[step].scores().iou, equal_nan=True)
        assert len(set(np.round(counts.miou, 6))) > 5
    if extra != {"seg_size": "same", "crf": False}:
        assert (found.seg.recall > 0).sum() > 1
        assert not np.array_equal(found.seg.iou, evaluate(model, source, size=size, progress=False).seg.iou)
    assert_close(found.seg.iou, seg.scores().iou, equal_nan=True)
    assert_close(found.seg.miou, seg.scores().miou)
    truth = torch.tensor(source.image_labels)
    for classes, which in ((found.classes, "cam"), (found.aux_classes, "aux_cam")):
        wanted = multi_label_scores(logits[which].float(), truth)
        assert_close(classes.mean_average_precision, wanted.mean_average_precision)
        assert_close(classes.f1, wanted.f1)
    assert found.n_images == 5
    assert model.training  # as before


def test_the_protocol_is_told(model, source):
    options = {"size": 16, "scales": (1.0, 0.5), "progress": False}
    assert evaluate(model, source, **options).protocol == (
        "5 images at 16 x 16, CAM scales 1, 0.5 + flip, segmentation once, no CRF"
    )
    found = evaluate(model, source, **options, seg_size=None, crf={"iterations": 3, "appearance_weight": 2.5})
    assert found.protocol == (
        "5 images at 16 x 16, CAM scales 1, 0.5 + flip, segmentation at native size once, "
        "dense CRF (3 iterations, position 1 of 1 px, appearance 2.5 of 121 px and 5 levels)"
    )
    options |= {"size": None, "flip": False, "seg_scales": (1.0, 0.5)}
    assert evaluate(model, source, **options).protocol == (
        "5 images at native size, CAM scales 1, 0.5, segmentation scales 1, 0.5 + flip, no CRF"
    )


def test_a_summary_is_in_percent(model, source):
    found = evaluate(model, source, size=16, scales=(1.0,), progress=False)
    summary = found.summary(0.25)
    assert list(summary) == ["cam_miou", "aux_cam_miou", "seg_miou", "map", "aux_map"]
    assert all(type(value) is float for value in summary.values())
    assert summary["cam_miou"] == round(100 * found.cam.scores(0.25).miou, 3)
    assert summary["map"] == round(100 * found.classes.mean_average_precision, 3)


def test_the_precision_context_is_entered(model, source):
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append(True)
        yield

    evaluate(model, source, size=16, scales=(1.0,), autocast=context, batch_size=2, progress=False)
    assert len(entered) == 3


def test_images_without_mask_count_for_the_image_labels_only(model, tmp_path):
    bare = write_voc_folder(tmp_path / "voc", n=3)
    labelled = {name: row for name, row in IMAGE_LABELS.items() if name < "img_3"}
    options = {"size": 16, "scales": (1.0,), "progress": False}
    whole = VOCFolder(bare, "train", labels=labelled)
    with_masks = evaluate(model, whole.subset([0, 2]), **options)
    everything = evaluate(model, whole, **options)
    (bare / "SegmentationClass" / "img_1.png").unlink()
    some = evaluate(model, VOCFolder(bare, "train", labels=labelled, require_masks=False), **options)
    assert (some.n_images, some.n_masks) == (3, 2) and some.protocol.endswith("no CRF, masks of 2 images")
    np.testing.assert_array_equal(some.cam.counts, with_masks.cam.counts)
    assert some.seg.miou == with_masks.seg.miou != everything.seg.miou
    assert some.classes.mean_average_precision == everything.classes.mean_average_precision


def wholly_void(path):
    label = Image.open(path)
    Image.fromarray(np.full(label.size[::-1], 255, np.uint8)).save(path)


@pytest.mark.parametrize("change", [Path.unlink, wholly_void])
def test_without_any_mask_there_is_no_miou(model, tmp_path, change):
    bare = write_voc_folder(tmp_path / "voc", n=3)
    for path in (bare / "SegmentationClass").iterdir():
        change(path)
    source = VOCFolder(bare, "train", labels=IMAGE_LABELS, require_masks=False)
    found = evaluate(model, source, size=16, scales=(1.0,), crf=True, progress=False)
    assert found.n_masks == 0 and found.protocol.endswith("no masks: no mIoU")
    assert list(found.summary(0.5)) == ["map", "aux_map"]


@pytest.mark.parametrize(
    ("crf", "message"),
    [
        ({"iteration": 3}, "crf has no setting 'iteration': did you mean iterations"),
        ({"appearance_sigma_xy": 0}, "crf: appearance_sigma_xy = 0 must be above 0"),
        ({"position_weight": -1}, "crf: position_weight = -1 must be at least 0"),
    ],
)
def test_settings_of_the_crf_are_checked(model, source, crf, message):
    with pytest.raises(ToCoError, match=message):
        evaluate(model, source, size=16, crf=crf, progress=False)


def test_a_mask_value_beyond_the_classes_is_refused(model, source):
    class Strange:
        names, image_labels, __len__, image = source.names, source.image_labels, source.__len__, source.image

        def mask(self, index):
            return np.full((20, 30), 200, np.uint8)

    with pytest.raises(ToCoError, match="ground truth with the value 200: 0 to 3 and 255"):
        evaluate(model, Strange(), size=16, scales=(1.0,), progress=False)


@pytest.mark.parametrize("value", [-1, 4])
def test_a_count_refuses_a_value_that_is_no_class(value):
    counts = CAMCounts(3)
    with pytest.raises(ToCoError, match=f"ground truth with the value {value}: 0 to 3 and 255 are allowed"):
        counts.update(np.array([[255, value]]), np.array([[0.5, 0.5]], np.float32), np.array([[1, 1]]))
    assert not counts.counts.any()


def test_batches_hold_neighbours_of_equal_shape():
    """None crosses a multiple of the batch size, so that processes that share a list make the same batches."""
    shapes = [(8, 8)] * 5 + [(8, 16)] + [(8, 8)] * 2 + [(16, 8)] * 2
    items = [
        EvalItem(str(i), torch.zeros(1, 3, *shape, dtype=torch.uint8), None, torch.zeros(1, K))
        for i, shape in enumerate(shapes)
    ]
    batches = list(evaluation._batches(iter(items), 3))
    assert [[item.name for item in batch] for batch in batches] == [
        ["0", "1", "2"], ["3", "4"], ["5"], ["6", "7"], ["8"], ["9"],
    ]  # fmt: skip
    assert list(evaluation._batches(iter([]), 3)) == []


def test_strongest_takes_labelled_classes_only():
    cam = torch.rand(1, K, 5, 7, generator=torch.Generator().manual_seed(0))
    cam[:, 1] += 1
    for row in ([1, 0, 1], [0, 1, 0], [1, 1, 1]):
        value, label = strongest(cam, torch.tensor([row]), (10, 9))
        wanted_value, wanted_label = slow_strongest(cam[0], row, (10, 9))
        np.testing.assert_allclose(value, wanted_value, rtol=1e-6)
        np.testing.assert_array_equal(label, wanted_label)
    value, label = strongest(cam, torch.zeros(1, K), (10, 9))
    assert not value.any() and not label.any()


# ---- one image


@pytest.mark.parametrize("index", [0, 2, 3])
def test_look(model, source, index):
    """img_2 is 16 x 16, the size it is looked at; img_3 has no labelled class."""
    config = override(small_recipe(), crop_size=16, local_size=16, beta_l=0.3, beta_h=0.6)
    config = override(config, par_iterations=3, par_dilations=(1, 2))
    found = look(model, source, index, config)
    image_labels = source.image_labels[index]
    size = source.image(index).shape[:2]
    assert found.name == f"img_{index}"
    assert found.classes == tuple(k + 1 for k in range(K) if image_labels[k])
    np.testing.assert_array_equal(found.image, source.image(index))
    np.testing.assert_array_equal(found.mask, source.mask(index))
    with torch.no_grad():
        images, tokens = encoded(model, source, index, 16)
        cam = slow_cam(model, images, "cam", image_labels, (1.0, 0.5, 1.5), True)
        aux_cam = slow_cam(model, images, "aux_cam", image_labels, (1.0, 0.5, 1.5), True)
        segmentation = slow_segmentation(model, images, tokens, size, (1.0,), True)
    np.testing.assert_allclose(found.cam, slow_strongest(cam, image_labels, size)[0], atol=1e-6)
    np.testing.assert_allclose(found.aux_cam, slow_strongest(aux_cam, image_labels, size)[0], atol=1e-6)
    np.testing.assert_array_equal(found.segmentation, segmentation)
    for label in (found.seed_label, found.pseudo_label, found.segmentation):
        assert label.shape == size and label.dtype == np.uint8

    thresholds = {"beta_l": 0.3, "beta_h": 0.6}
    truth = torch.tensor(image_labels[None])
    refined = labels.pseudo_label(
        model.denormalise(images), cam[None], truth, iterations=3, dilations=(1, 2), **thresholds
    )
    if size == (16, 16):
        value, label = slow_strongest(cam, image_labels, size)
        seed = np.where(value <= np.float32(0.3), 0, np.where(value >= np.float32(0.6), label, 255))
        np.testing.assert_array_equal(found.seed_label, seed)
        np.testing.assert_array_equal(found.pseudo_label, refined[0].numpy())
        assert len(np.unique(found.seed_label)) > 2
    assert set(np.unique(found.seed_label)) <= {0, 255, *found.classes}
    assert set(np.unique(found.pseudo_label)) <= set(refined.unique().tolist())
    shown = {int(k) for k in np.unique(segmentation)} | {int(k) for k in np.unique(source.mask(index))}
    shown |= {int(k) for label in (found.seed_label, found.pseudo_label) for k in np.unique(label)}
    assert set(found.drawn) == shown - {0, 255} and list(found.drawn) == sorted(found.drawn)
    assert index != 3 or found.drawn  # no class is labelled, the decoder shows some


def test_look_without_a_mask(model, tmp_path):
    bare = write_voc_folder(tmp_path / "voc", n=2)
    (bare / "SegmentationClass" / "img_1.png").unlink()
    some = VOCFolder(bare, "train", labels={n: IMAGE_LABELS[n] for n in ("img_0", "img_1")}, require_masks=False)
    config = override(small_recipe(), crop_size=16, local_size=16, par_iterations=0)
    bare = look(model, some, 1, config)
    assert bare.mask is None and set(np.unique(bare.segmentation)) - {0} <= set(bare.drawn)


def test_what_is_called_with_each_batch_sees_every_image_once(model, source):
    seen = []
    plain = evaluate(model, source, size=32, scales=(1.0,), batch_size=2, progress=False)
    found = evaluate(
        model, source, size=32, scales=(1.0,), batch_size=2, progress=False, on_batch=lambda *b: seen.append(b)
    )
    assert [item.name for items, *_ in seen for item in items] == list(source.names)
    assert_close(found.cam.miou, plain.cam.miou)
    for items, unit, cams, image_labels in seen:
        assert_close(unit, torch.cat([item.image for item in items]).to(unit) / 255)
        assert_close(image_labels, torch.cat([item.image_labels for item in items]))
        assert cams.cam.shape == cams.aux_cam.shape == (len(items), K, 32, 32)
