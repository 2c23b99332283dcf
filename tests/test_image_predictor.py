"""One predictor: its maps are those of `multi_scale_cam`, carried along attention where the config says so."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_config import small_recipe, stirred_model
from torch.testing import assert_close

from toco_core.cam import multi_scale_cam
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.labels import pseudo_label, refined_labels, seed_label
from toco_core.model import ToCo
from toco_core.predict.image import ImagePredictor
from toco_core.predict.tokens import class_token_attention, similarity_matrix, tokens_by_block
from toco_core.widgets.analysis import Analysis
from toco_core.widgets.settings import Settings
from toco_core.widgets.subjects import CLASSIFIER, Subject

K = 3
CARRIED = {"attention_steps": 2, "attention_blocks": (2, 3), "attention_kind": "pattern"}


@pytest.fixture(scope="module")
def model() -> ToCo:
    return stirred_model(K)


@pytest.fixture(scope="module")
def picture():
    coarse = torch.rand(1, 3, 5, 6, generator=torch.Generator().manual_seed(2))
    smooth = F.interpolate(coarse, size=(37, 52), mode="bicubic").clamp(0, 1)
    return (255 * smooth[0]).to(torch.uint8).permute(1, 2, 0).numpy()


def predictor(model, picture, **changes):
    fields = {"crop_size": 32, "local_size": 16, "beta_l": 0.3, "beta_h": 0.6, "par_iterations": 2}
    config = override(small_recipe(), **fields, par_dilations=(1, 2), **changes)
    found = ImagePredictor(model, config)
    found.set_image(picture, [1, 0, 1])
    return found


@pytest.mark.parametrize("changes", [{}, CARRIED, {"cam_scales": (0.5, 1.5)}])
def test_both_cams_have_the_bits_of_multi_scale_cam(model, picture, changes):
    found = predictor(model, picture, **changes)
    labels = found.config.labels
    images = found.images
    tokens = model.encode(images, attend=labels.attended())
    expected = multi_scale_cam(
        model, images, **labels.cam_options(), tokens=tokens, image_labels=torch.tensor([[1, 0, 1]])
    )
    assert torch.equal(found.cam(), expected.cam[:, [0, 2]])
    assert torch.equal(found.cam(auxiliary=True), expected.aux_cam[:, [0, 2]])
    present = torch.tensor([[1, 0, 1]])
    for kind, wanted in (
        ("seed_label", seed_label(expected.cam, present, **labels.thresholds())),
        ("pseudo_label", pseudo_label(found.unit, expected.cam, present, **labels.pseudo_label_options())),
    ):
        native = F.interpolate(wanted[None].double(), size=(37, 52), mode="nearest")[0, 0]
        np.testing.assert_array_equal(getattr(found, kind)(), native.numpy())


@pytest.mark.parametrize("changes", [{"cam_scales": (1.0,)}, CARRIED | {"cam_scales": (1.5, 0.5)}])
def test_three_heads_vote(model, picture, changes):
    """V_k = (CAM_k + auxiliary CAM_k + p_k) / 3; p is the softmax of the decoder's mean logits over scales and mirror
    images, among the background and the classes that are asked for."""
    found = predictor(model, picture, **changes)
    size, logits = found.images.shape[-2:], []
    for scale in found.config.labels.cam_scales:
        view = F.interpolate(found.images, scale_factor=scale, mode="bilinear", align_corners=False)
        for picture_ in (view, view.flip(-1)):
            with torch.no_grad():
                seen = model(picture_).seg_logits
            seen = F.interpolate(seen, size=size, mode="bilinear", align_corners=False)
            logits.append(seen if picture_ is view else seen.flip(-1))
    strength = (sum(logits) / len(logits))[0, [0, 3, 1]].exp()
    p = (strength / strength.sum(0))[1:]
    expected = torch.stack(
        [(found.class_cam(k) + found.class_cam(k, block=0) + p[i]) / 3 for i, k in enumerate((3, 1))]
    )
    assert_close(found.probabilities(classes=(3, 1))[0], p)
    assert_close(found.vote(classes=(3, 1))[0], expected)
    options = found.config.labels.refiner_options()
    (label,) = refined_labels(found.unit, expected[None], torch.ones(1, 2), betas=[0.4], **options)
    native = F.interpolate(label[None].double(), size=(37, 52), mode="nearest")[0, 0].long()
    np.testing.assert_array_equal(found.voted_label(0.4, classes=(3, 1)), np.array([0, 3, 1])[native])
    assert len(np.unique(native)) > 1


def test_the_widgets_carry_cams_where_the_config_says_so(model, picture):
    """They ignored it: the explorer showed another CAM than training and evaluation use."""
    config = predictor(model, picture, **CARRIED).config
    analysis = Analysis(Subject("one", model, config, ("background", *"abc"), frozenset({CLASSIFIER})), picture)
    settings = Settings(cam_scales=config.labels.cam_scales, flip=True)
    expected = multi_scale_cam(model, analysis.images, **config.labels.cam_options()).cam[0, 1]
    assert_close(analysis.cam(settings, 2), expected)
    plain = multi_scale_cam(model, analysis.images, scales=config.labels.cam_scales).cam[0, 1]
    assert (plain - expected).abs().max() > 0.05


def test_block_maps_tokens_and_attention(model, picture):
    found = predictor(model, picture, cam_scales=(1.0,))
    with torch.no_grad():
        blocks = tokens_by_block(model, found.images)
    assert found.grid == (4, 4)
    similarity = similarity_matrix(blocks[2][0])[5].reshape(4, 4)
    np.testing.assert_allclose(found.similarity(3, 5), similarity.numpy(), atol=1e-6)
    attention = 16 * class_token_attention(model, found.images, 2)[0]
    np.testing.assert_allclose(found.attention(2), attention.reshape(-1, 4, 4).detach().numpy(), atol=1e-6)
    assert torch.equal(found.cam(block=3), found.cam())
    assert not torch.allclose(found.cam(block=1), found.cam(), atol=0.05)
    with pytest.raises(ToCoError, match="block = 4 is not allowed"):
        found.cam(block=4)


def test_mixed_precision_gives_maps_of_numpy(model, picture):
    single = copy.deepcopy(model).float()
    plain = predictor(single, picture)
    mixed = ImagePredictor(single, plain.config, passes=lambda: torch.autocast("cpu", torch.bfloat16))
    mixed.set_image(picture, [1, 0, 1])
    assert_close(mixed.cam(), plain.cam(), rtol=0, atol=0.1)
    np.testing.assert_allclose(mixed.attention(2), plain.attention(2), rtol=0.3, atol=0.1)
    np.testing.assert_allclose(mixed.similarity(2, 5), plain.similarity(2, 5), rtol=0, atol=0.1)


@pytest.mark.parametrize("k", [-1, 0, K + 1])
def test_a_class_that_is_not_there_is_refused(model, picture, k):
    """-1 is not the last but one."""
    found = predictor(model, picture)
    for ask in (found.cam, found.probabilities, found.pseudo_label, found.voted_label, found.strongest):
        with pytest.raises(ToCoError, match=f"class = {k} is not allowed: the model has 1..3"):
            ask(classes=[1, k])
    with pytest.raises(ToCoError, match=f"class = {k} is not allowed"):
        found.class_cam(k)


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan")])
def test_a_scale_that_is_not_positive_is_refused(model, picture, scale):
    """It is not the scale that leaves one patch."""
    found = predictor(model, picture)
    for ask in (found.cam, found.vote, found.segmentation):
        with pytest.raises(ToCoError, match=f"scale = {scale} is not allowed: positive numbers"):
            ask(scales=(1.0, scale))


@pytest.mark.parametrize("labels", [[3], [1, 0], [0, 1, 0, 1]])
def test_image_labels_are_one_value_per_class(model, picture, labels):
    """[3] is not an image of class 1."""
    with pytest.raises(ToCoError, match=r"image_labels of shape \(.*\) is not allowed: 3 values, one per class"):
        predictor(model, picture).set_image(picture, labels)


def test_nothing_is_left_of_the_image_before(model, picture):
    found = predictor(model, picture)
    first = found.pseudo_label(), found.segmentation(), found.cam()
    found.set_image(picture[::-1, ::-1].copy(), [0, 1, 0])
    assert found.cam().shape[1] == 1 and set(np.unique(found.pseudo_label())) <= {0, 2, 255}
    found.set_image(picture, [1, 0, 1])
    np.testing.assert_array_equal(found.pseudo_label(), first[0])
    np.testing.assert_array_equal(found.segmentation(), first[1])
    assert torch.equal(found.cam(), first[2])
