import pytest
import reference_model as slow
import torch
from small_config import small_recipe, stirred_model
from test_model import K, images, slow_tokens, small_model
from torch.testing import assert_close

from toco_core import labels
from toco_core.cam import class_activation, labelled_cams, multi_scale_cam, normalise_cam, on_all_classes
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.objective import Step, StepInput


def fitted(model, x, scales):
    """Size of the view at each scale, written out: whole patches of 8, or what the release takes."""
    sizes = {}
    for scale in scales:
        h, w = int(scale * x.shape[2]), int(scale * x.shape[3])
        sizes[scale] = (h, w) if model.dropped_border else (max(8, (h + 4) // 8 * 8), max(8, (w + 4) // 8 * 8))
    return sizes


def slow_cams(model, x, scales, flip):
    def crop(image):
        return image[:, : image.shape[1] // 8 * 8, : image.shape[2] // 8 * 8]

    def final(image):
        _, patches, _, grid = slow_tokens(model, crop(image))
        return patches, grid

    def auxiliary(image):
        _, _, aux, grid = slow_tokens(model, crop(image))
        return aux, grid

    sizes = fitted(model, x, scales)
    with torch.no_grad():
        return (
            slow.multi_scale_cam(final, model.classifier.weight, x, scales, flip, sizes),
            slow.multi_scale_cam(auxiliary, model.aux_classifier.weight, x, scales, flip, sizes),
        )


@pytest.mark.parametrize("dropped_border", [False, True])
@pytest.mark.parametrize(("scales", "flip"), [((1.0, 0.5, 1.5), True), ((1.25,), True), ((0.75, 1.0), False)])
def test_equals_the_slow_way(scales, flip, dropped_border):
    model = small_model(dropped_border=dropped_border)
    x = images(2, 24, 40)
    cams = multi_scale_cam(model, x, scales=scales, flip=flip)
    cam, aux_cam = slow_cams(model, x, scales, flip)
    assert_close(cams.cam, cam)
    assert_close(cams.aux_cam, aux_cam)
    assert 0 <= cams.cam.min() <= cams.cam.max() < 1


def test_tokens_of_the_main_pass_are_reused():
    model = small_model()
    x = images(3, 16, 32)
    wanted = multi_scale_cam(model, x)
    tokens = model.encode(x)
    seen = []
    encode = model.encode
    model.encode = lambda views, **options: (seen.append(tuple(views.shape)), encode(views, **options))[1]
    found = multi_scale_cam(model, x, tokens=tokens)
    assert_close(tuple(found), tuple(wanted))
    assert seen == [(3, 3, 16, 32), (6, 3, 8, 16), (6, 3, 24, 48)]
    assert not found.cam.requires_grad


def test_only_labelled_classes_are_made():
    model = small_model()
    x = images(3, 16, 32)
    labels = torch.tensor([[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    wanted = multi_scale_cam(model, x)
    for given in (labels, labels.float(), labels.double()):
        found = multi_scale_cam(model, x, image_labels=given)
        assert_close(found.cam, wanted.cam * labels[:, :, None, None])
        assert_close(found.aux_cam, wanted.aux_cam * labels[:, :, None, None])


def test_no_label_at_all():
    model = small_model()
    found = multi_scale_cam(model, images(), image_labels=torch.zeros(2, K))
    assert found.cam.shape == (2, K, 16, 32)
    assert not found.cam.any()


def test_a_map_without_activation_is_zero():
    assert torch.equal(normalise_cam(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))
    assert torch.equal(normalise_cam(torch.full((1, 3, 4), 7.0)), torch.zeros(1, 3, 4))
    assert_close(normalise_cam(torch.tensor([[[1.0, 3.0]]])), torch.tensor([[[0.0, 2 / (2 + 1e-5)]]]))


def test_raw_maps_keep_their_sign():
    patch_map, weight = torch.randn(2, 3, 4, 5), torch.randn(6, 3)
    found = class_activation(patch_map, weight)
    assert_close(found[1, 2, 3, 4], (patch_map[1, :, 3, 4] * weight[2]).sum())
    assert found.min() < 0


def test_mirrored_images_have_mirrored_maps():
    model = small_model()
    x = images(1, 16, 32)
    assert_close(multi_scale_cam(model, x.flip(-1)).cam, multi_scale_cam(model, x).cam.flip(-1))


def test_mixed_precision_gives_full_precision_maps():
    model = small_model().float()
    x = images().float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = multi_scale_cam(model, x)
    assert found.cam.dtype == torch.float32
    assert (found.cam - multi_scale_cam(model, x).cam).abs().mean() < 0.05


@pytest.mark.parametrize("scales", [(), (1.0, 0.0), (-1.0,)])
def test_wrong_scales_are_refused(scales):
    with pytest.raises(ToCoError, match="scales"):
        multi_scale_cam(small_model(), images(), scales=scales)


def test_a_scale_that_leaves_less_than_a_patch_is_refused():
    model = small_model(0, dropped_border=True)
    with pytest.raises(ToCoError, match="scale = 0.001 of an image of 24 x 32 leaves less than a patch"):
        multi_scale_cam(model, torch.zeros(1, 3, 24, 32, dtype=torch.float64), scales=(0.001,))


@pytest.mark.parametrize("tags", [[[1, 0, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]], [[0, 0, 0, 0]] * 3])
def test_labelled_maps_are_those_of_all_classes_without_the_empty_ones(tags):
    torch.manual_seed(2)
    model = stirred_model(4).float()
    images, image_labels = torch.randn(3, 3, 32, 48), torch.tensor(tags)
    options = {"scales": (1.0, 0.5), "attention_steps": 1, "attention_blocks": (2, 3)}
    whole = multi_scale_cam(model, images, **options, image_labels=image_labels)
    found = labelled_cams(model, images, image_labels, **options)
    k = int(image_labels.sum(1).max())
    assert found.cams.cam.shape == found.cams.aux_cam.shape == (3, k, 32, 48)
    for maps, wanted in zip(found.cams, whole, strict=True):
        for b in range(3):
            classes = [i for i in range(4) if image_labels[b, i]]
            assert found.classes[b, : len(classes)].tolist() == classes
            assert found.present[b].tolist() == [True] * len(classes) + [False] * (k - len(classes))
            assert torch.equal(maps[b, : len(classes)], wanted[b, classes]) and not maps[b, len(classes) :].any()
    for one, other in zip(on_all_classes(found, 4), whole, strict=True):
        assert torch.equal(one, other)


def test_a_step_makes_maps_of_its_labelled_classes_only():
    torch.manual_seed(3)
    model = stirred_model(60).float()
    views = [torch.randn(2, 3, 32, 48) for _ in range(3)]
    image_labels = torch.zeros(2, 60)
    image_labels[0, [7, 51]] = image_labels[1, 33] = 1
    config = override(small_recipe(), beta_l=0.2, beta_h=0.4, par_dilations=(1, 2))
    step = Step(model, StepInput(*views, image_labels, torch.tensor([[0, 32, 0, 48], [2, 30, 0, 48]])), config, 300)
    whole, options = step.cams, config.labels.thresholds()
    assert step.labelled.cams.cam.shape[1] == 2 and whole.cam.shape[1] == 60
    wanted = labels.token_label(whole.aux_cam, image_labels, (4, 6), **options, valid_box=step.batch.valid_box)
    assert torch.equal(step.token_label, wanted) and {8, 34, 52} & set(wanted.unique().tolist())
    assert torch.equal(step.region_mask, labels.region_mask(whole.aux_cam, image_labels, **options))
    options = config.labels.pseudo_label_options()
    wanted = labels.pseudo_label(step.unit, whole.cam, image_labels, **options, valid_box=step.batch.valid_box)
    assert torch.equal(step.pseudo_label, wanted) and set(wanted.unique().tolist()) <= {0, 8, 34, 52, 255}
    config = override(config, token_refiner="par", par_iterations=3)
    refined = Step(model, step.batch, config, 300)
    options = config.labels.pseudo_label_options("par") | {"valid_box": step.batch.valid_box}
    wanted = labels.refined_token_label(step.unit, whole.aux_cam, image_labels, (4, 6), **options)
    assert torch.equal(refined.token_label, wanted) and not torch.equal(wanted, step.token_label)
    assert {8, 34, 52} & set(wanted.unique().tolist())
