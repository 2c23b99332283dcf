import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_config import small_recipe, stir
from voc_folder import write_voc_folder

from toco_core import labels, viz
from toco_core.cam import multi_scale_cam
from toco_core.config import ModelConfig, override
from toco_core.data import VOCFolder, open_train_val
from toco_core.data.augment import resize
from toco_core.errors import ToCoError
from toco_core.evaluation import protocols as assess
from toco_core.evaluation.evaluate import evaluate
from toco_core.evaluation.metrics import OpenCounts
from toco_core.model import ToCo
from toco_core.refiners.crf import dense_crf
from toco_core.refiners.par import PAR
from toco_core.runs.release import save_release

plt.switch_backend("Agg")

K = 3
BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
BETAS = {"beta": 0.45, "aux_beta": 0.3, "refined_beta": 0.35}
SCALES = (0.75, 1.5)
SIZES = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}


@pytest.fixture(scope="module")
def model():
    """Far from its start, so that CAMs are not flat and the decoder has opinions."""
    torch.manual_seed(5)
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, **SIZES), K)
    stir(model, 0.3)
    return model.eval()


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_voc_folder(tmp_path_factory.mktemp("voc") / "voc", n=5)


@pytest.fixture(scope="module")
def source(root):
    return VOCFolder(root, "train")


@pytest.fixture(scope="module")
def config(root):
    return override(
        small_recipe(),
        dataset=root,
        crop_size=40,
        local_size=24,
        cam_scales=(1.0, 0.5),
        par_iterations=2,
        par_dilations=(1, 3),
        beta_l=0.2,
        beta_h=0.6,
        beta=0.4,
        precision="fp32",
        **{"backbone": BACKBONE, "layer": 2, "pretrained": False} | SIZES,
    )


@pytest.fixture(scope="module")
def assessed(model, source, config):
    options = {"part": "train", "chosen_on": "val", "scales": SCALES, "progress": False}
    return assess.assess(model, source, config, **BETAS, **options)


def slow_counts(mask, label):
    """Pixel by pixel."""
    counts = np.zeros((K + 1, K + 2), np.int64)
    for truth, said in zip(mask.ravel(), label.ravel(), strict=True):
        if truth != 255:
            counts[truth, K + 1 if said == 255 else said] += 1
    return counts


def slow_iou(counts):
    """Mean over the classes that the mask shows; an open pixel is a missed one."""
    values = []
    for c in range(K + 1):
        if counts[c].sum():
            right = counts[c, c]
            values.append(right / (counts[c].sum() + sum(counts[other, c] for other in range(K + 1)) - right))
    return sum(values) / len(values)


def random_pair(seed, height=7, width=11, open_share=0.2):
    rng = np.random.default_rng(seed)
    mask = rng.choice([0, 1, 3, 255], (height, width), p=[0.5, 0.2, 0.2, 0.1]).astype(np.uint8)
    label = rng.integers(0, K + 1, (height, width)).astype(np.uint8)
    label[rng.random((height, width)) < open_share] = 255
    return mask, label


# ---- counts


def image_counts(mask, label, n_classes):
    found = OpenCounts(n_classes)
    found.update(mask, label)
    return found.counts


def counted_scores(counts):
    return OpenCounts(len(counts) - 1, counts).scores()


def test_counts_of_an_image_are_those_of_its_pixels():
    for seed in range(5):
        mask, label = random_pair(seed)
        counts = image_counts(mask, label, K)
        np.testing.assert_array_equal(counts, slow_counts(mask, label))
        scores = counted_scores(counts)
        assert scores.miou == pytest.approx(slow_iou(counts))
        assert scores.iou.shape == scores.precision.shape == scores.recall.shape == (K + 1,)
        assert scores.recall[1] == pytest.approx(((label == 1) & (mask == 1)).sum() / (mask == 1).sum())
        assert np.isnan(scores.recall[2]) and scores.precision[2] == 0  # predicted, never shown


def test_open_pixels_cost_recall_and_no_precision():
    mask = np.array([[0, 0, 1, 1, 1, 1]], np.uint8)
    sure, open_ = mask.copy(), mask.copy()
    open_[0, 2:5] = 255
    whole, part = (counted_scores(image_counts(mask, label, K)) for label in (sure, open_))
    assert whole.miou == 1 and part.precision[1] == 1 and part.recall[1] == 0.25
    assert part.miou == pytest.approx((1 + 0.25) / 2)


def test_scores_follow_from_the_images():
    pairs = [random_pair(seed, open_share=0.0 if seed == 1 else 0.3) for seed in range(4)]
    counts = np.stack([image_counts(*pair, K) for pair in pairs])
    assessed = assess.Assessment(("a", "b", "c", "d"), {"seg": counts}, {"seg": "made up for this test"})
    iou = [slow_iou(slow_counts(*pair)) for pair in pairs]
    np.testing.assert_allclose(assessed.image_iou("seg"), iou)
    assert assessed.worst("seg", 2) == sorted(range(4), key=iou.__getitem__)[:2]
    assert assessed.scores("seg").miou == pytest.approx(slow_iou(sum(slow_counts(*pair) for pair in pairs)))
    shown = sum((mask != 255).sum() for mask, _ in pairs)
    assert assessed.decided("seg") == pytest.approx(
        sum(((mask != 255) & (label != 255)).sum() for mask, label in pairs) / shown
    )


def test_groups_take_every_image_once_and_score_like_loops():
    pairs = [random_pair(seed) for seed in range(5)]
    counts = np.stack([image_counts(*pair, K) for pair in pairs])
    assessed = assess.Assessment(tuple("abcde"), {"seg": counts}, {"seg": ""})
    wanted = [slow_iou(sum(slow_counts(*pairs[i]) for i in group)) for group in ((0, 3), (1, 4), (2,))]
    np.testing.assert_allclose(assessed.group_miou("seg", 3), wanted)
    for groups in (0, 6):
        with pytest.raises(ToCoError, match=f"groups = {groups} is not allowed: 1 to 5"):
            assessed.group_miou("seg", groups)


def test_an_image_without_a_valid_pixel_has_no_score_and_is_no_worst_one():
    void, label = np.full((3, 5), 255, np.uint8), np.zeros((3, 5), np.uint8)
    counts = np.stack([image_counts(void, label, K), image_counts(*random_pair(0), K)])
    assessed = assess.Assessment(("void", "other"), {"seg": counts}, {"seg": ""})
    assert np.isnan(assessed.image_iou("seg")[0]) and assessed.worst("seg", 5) == [1]


# ---- labels


def test_every_kind_of_label_is_made_as_it_says(model, source, config):
    index = 3
    found = assess.labels_of(model, source, index, config, **BETAS, scales=SCALES)
    picture, size = source.image(index), source.mask(index).shape
    unit = torch.from_numpy(resize(picture, 40, 40).copy()).permute(2, 0, 1)[None] / 255
    images, present = model.normalise(unit), torch.from_numpy(source.image_labels[index])[None]
    with torch.no_grad():
        cams = multi_scale_cam(model, images, scales=(1.0, 0.5))
        output = model(images)
        merged = []
        for scale in SCALES:
            views = F.interpolate(images, size=model.fitted_size(int(40 * scale), int(40 * scale)), mode="bilinear")
            both = model(views).seg_logits + model(views.flip(-1)).seg_logits.flip(-1)
            merged.append(F.interpolate(both, size=size, mode="bilinear"))
    merged = torch.stack(merged).max(0).values[0]

    for kind, maps, beta in (("cam", cams.cam, BETAS["beta"]), ("aux_cam", cams.aux_cam, BETAS["aux_beta"])):
        resized = F.interpolate(maps, size=size, mode="bilinear")
        agree(found[kind], labels.eval_label(resized, present, beta=beta)[0])
    against, classes = torch.tensor([0.35]).exp(), present[0].nonzero()[:, 0]
    half = tuple(round(length * config.labels.par_scale) for length in unit.shape[2:])
    small, cam = (F.interpolate(maps, size=half, mode="bilinear") for maps in (unit, cams.cam[:, classes]))
    strength = torch.cat([against.view(1, 1, 1, 1).expand_as(cam[:, :1]), cam.exp()], dim=1)
    slow = PAR(iterations=2, dilations=(1, 3))(small, [strength[:, 1:] / strength.sum(1, keepdim=True)])[0]
    slot = F.interpolate(slow, size=unit.shape[2:], mode="bilinear").argmax(1)
    one = torch.cat([torch.zeros(1, dtype=torch.long), classes + 1])[slot]
    agree(found["refined"], F.interpolate(one[None].float(), size=size)[0, 0].to(torch.uint8))
    refined = labels.pseudo_label(
        unit, cams.cam, present, beta_l=0.2, beta_h=0.6, iterations=2, dilations=(1, 3), scale=config.labels.par_scale
    )
    agree(found["pseudo_label"], F.interpolate(refined[None].float(), size=size)[0, 0].to(torch.uint8))
    with torch.no_grad():
        decoded = [model(F.interpolate(images, scale_factor=s, mode="bilinear")) for s in (1.0, 0.5)]
        decoded += [model(F.interpolate(images.flip(-1), scale_factor=s, mode="bilinear")) for s in (1.0, 0.5)]
    resized = [F.interpolate(one.seg_logits, size=unit.shape[2:], mode="bilinear") for one in decoded]
    mean = (resized[0] + resized[1] + resized[2].flip(-1) + resized[3].flip(-1)) / 4
    p = mean[:, [0, *(classes + 1).tolist()]].softmax(1)[:, 1:]
    vote = (cams.cam[:, classes] + cams.aux_cam[:, classes] + p) / 3
    options = {"iterations": 2, "dilations": (1, 3), "scale": config.labels.par_scale}
    (slot,) = labels.refined_labels(unit, vote, torch.ones(1, len(classes)), betas=[0.4], **options)
    one = torch.cat([torch.zeros(1, dtype=torch.long), classes + 1])[slot]
    agree(found["vote"], F.interpolate(one[None].float(), size=size)[0, 0].to(torch.uint8))
    agree(found["seg"], F.interpolate(output.seg_logits, size=size, mode="bilinear")[0].argmax(0))
    agree(found["seg_ms"], merged.argmax(0))
    native = torch.from_numpy(picture.copy()).permute(2, 0, 1) / 255
    agree(found["seg_crf"], dense_crf(merged.softmax(0), native).argmax(0))
    assert len({label.tobytes() for label in found.values()}) == len(assess.KINDS), "two kinds are the same"


def agree(found, wanted):
    """Up to a pixel in a hundred, which another order of summation may move."""
    assert found.dtype == np.uint8 and found.shape == tuple(wanted.shape)
    assert (found == wanted.numpy()).mean() > 0.99


def test_an_assessment_agrees_with_evaluate(model, source, config, assessed):
    seen = evaluate(model, source, size=40, scales=(1.0, 0.5), progress=False)
    assert assessed.scores("cam").miou == pytest.approx(seen.cam.scores(BETAS["beta"]).miou, abs=0.01)
    assert assessed.scores("aux_cam").miou == pytest.approx(seen.aux_cam.scores(BETAS["aux_beta"]).miou, abs=0.01)
    assert assessed.scores("seg").miou == pytest.approx(seen.seg.miou, abs=0.01)


def test_every_number_carries_its_protocol(source, assessed):
    assert tuple(assessed.counts) == tuple(assessed.protocol) == assess.KINDS
    assert assessed.names == source.names
    assert "5 images of train at 40 x 40" in assessed.protocol["seg"]
    assert "threshold 0.3 chosen on val" in assessed.protocol["aux_cam"]
    assert "PAR 2 iterations, threshold 0.35 chosen on val" in assessed.protocol["refined"]
    assert "PAR 2 iterations, thresholds 0.2 and 0.6, open pixels" in assessed.protocol["pseudo_label"]
    assert "scales 0.75, 1.5 + flip, no CRF" in assessed.protocol["seg_ms"]
    assert "dense CRF (10 iterations" in assessed.protocol["seg_crf"]


def test_the_summary_is_plain_json(source, assessed):
    summary = assessed.summary(source.class_names)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["seg"]["miou"] == round(100 * assessed.scores("seg").miou, 2)
    assert list(summary["cam"]["classes"]) == list(source.class_names)
    assert summary["seg"]["decided"] == 100 and summary["pseudo_label"]["decided"] < 100


def test_without_crf_nothing_of_it_is_there(model, source, config):
    part = assess.evenly(source, 2)
    found = assess.assess(
        model, part, config, **BETAS, part="train", chosen_on="val", scales=(1.0,), crf=False, progress=False
    )
    assert tuple(found.counts) == assess.KINDS[:-1]
    with pytest.raises(ToCoError, match="crf has no setting 'iteration'"):
        assess.labels_of(model, part, 0, config, **BETAS, crf={"iteration": 3})


def test_images_are_spread_evenly(source):
    assert assess.evenly(source, 0) is assess.evenly(source, 5) is assess.evenly(source, 99) is source
    assert assess.evenly(source, 2).names == (source.names[0], source.names[2])
    with pytest.raises(ToCoError, match="n_images = -1"):
        assess.evenly(source, -1)


def test_the_test_part_is_reported_where_there_is_one(root, tmp_path):
    held_out = assess.part_of(open_train_val(root))
    assert held_out.name == "val (held out of train)" and held_out.source.names == open_train_val(root).val.names
    assert assess.part_of(open_train_val(root), "train").source.names == VOCFolder(root, "train").names
    other = write_voc_folder(tmp_path / "other", n=3)
    (other / "ImageSets" / "Segmentation" / "test.txt").write_text("img_1\n")
    name, source = assess.part_of(open_train_val(other))
    assert name == "test" and source.names == ("img_1",)


# ---- where the model comes from


def test_a_release_checkpoint_is_opened_for_its_data(model, root, config, tmp_path):
    save_release(model, tmp_path / "toco.pth")
    opened = assess.open_assessed(config, checkpoint=str(tmp_path / "toco.pth"), heads=2)
    image = torch.rand(1, 3, 40, 40)
    torch.testing.assert_close(opened.model.encode(image).patch_tokens, model.encode(image).patch_tokens)
    assert opened.data.val.root == root and not opened.model.training
    parts = {"train": [0], "val": [0]}
    other = write_voc_folder(tmp_path / "other", n=1, splits=parts, classes=("background", "cat"))
    with pytest.raises(ToCoError, match="3 classes apart, other has 1"):
        assess.open_assessed(override(config, dataset=other), checkpoint=str(tmp_path / "toco.pth"), heads=2)
    with pytest.raises(ToCoError, match="one of them is allowed"):
        assess.open_assessed(config, run="a", checkpoint="b")


# ---- figures


def test_bars_show_every_class_of_every_kind(source, assessed):
    summary = assessed.summary(source.class_names)
    ax = viz.iou_bars(plt.figure().add_subplot(), summary, source.class_names)
    widths = [bar.get_width() for bar in ax.patches]
    wanted = [s["classes"][name]["iou"] or 0 for s in summary.values() for name in source.class_names]
    assert widths == pytest.approx(wanted)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(source.class_names)


def test_a_confusion_matrix_is_in_percent_of_the_class():
    counts = np.array([[6, 2, 0], [1, 3, 0]])
    ax = viz.confusion_matrix(plt.figure().add_subplot(), counts, ["background", "cat"])
    np.testing.assert_allclose(ax.images[0].get_array(), [[75, 25], [25, 75]])
    counts[1, 2] = 4
    ax = viz.confusion_matrix(plt.figure().add_subplot(), counts, ["background", "cat"])
    np.testing.assert_allclose(ax.images[0].get_array(), [[75, 25, 0], [12.5, 37.5, 50]])
    assert [text.get_text() for text in ax.get_xticklabels()] == ["background", "cat", "open"]


def test_threshold_curves_mark_what_was_chosen():
    betas, miou = np.array([0.0, 0.5, 1.0]), np.array([0.1, 0.4, 0.2])
    ax = viz.threshold_curves(plt.figure().add_subplot(), {"val": (betas, miou)}, chosen={"chosen on val": 0.5})
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [10, 40, 20])
    assert set(ax.lines[1].get_xdata()) == {0.5}
    assert ax.get_legend().get_texts()[1].get_text() == "chosen on val: 0.5"


def test_a_poster_keeps_the_shapes_of_its_pictures():
    rng = np.random.default_rng(0)
    rows = [[rng.integers(0, 256, (*size, 3), dtype=np.uint8)] * 3 for size in ((6, 9), (12, 8))]
    figure = viz.poster(rows, ["image", "CAM", "mask"], ["background", "cat", "dog"], [1], cams=[1])
    figure.canvas.draw()
    pictures = [ax for ax in figure.axes if ax.images and ax.images[0].get_array().ndim == 3]
    assert len(pictures) == 6
    boxes = [ax.get_window_extent() for ax in pictures]
    assert [box.height / box.width for box in boxes] == pytest.approx([6 / 9] * 3 + [12 / 8] * 3, rel=0.01)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["cat", "uncertain / void"]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    plt.close("all")
