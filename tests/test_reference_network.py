"""The network, its CAMs and one whole training step against the published release: its checkpoint, its numbers.

Everything runs within `plain_attention()`, as the release computes attention. The checkpoint is the
`official_layout*.pth` beside the arrays; it is too large for tests/reference_values, where these cases are skipped.
"""

import pytest
import torch
from reference_files import ATOL, RTOL, assert_labels_agree, load_reference, reference_folder
from torch.testing import assert_close

from toco_core.cam import class_activation, multi_scale_cam
from toco_core.config import ReleaseBehaviour, override, voc
from toco_core.crops import CropBoxes
from toco_core.labels import valid_cam
from toco_core.objective import TERMS, Step, StepInput, objective
from toco_core.runs.release import from_release, to_release

WHOLE = 1e-5  # of the largest value
WEIGHTS = {"cls": 1.0, "aux_cls": 1.0, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "energy": 0.05}  # of `total`


def checkpoint_path():
    """The checkpoint of the reference folder, or the test is skipped."""
    found = sorted(reference_folder().glob("official_layout*.pth"))
    if not found:
        pytest.skip("no official_layout*.pth there; set TOCO_REFERENCE to a folder that has one")
    return found[0]


def agree(ours, theirs, name):
    """Values of the whole network agree relative to the largest of them: what twelve blocks of float32 round differs by
    a few millionths of it from processor to processor, also where a value is near 0."""
    atol = WHOLE * theirs.abs().max().item()
    assert_close(ours, theirs.reshape(ours.shape), rtol=RTOL, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.fixture
def model():
    model = from_release(checkpoint_path())
    with model.plain_attention():
        yield model


@pytest.fixture(scope="module")
def step():
    """The arrays of the step, the model with its gradients after it, what the step gave, and the step."""
    model, arrays = from_release(checkpoint_path()), load_reference("train_step.npz")
    config = override(
        voc(),
        release=ReleaseBehaviour.release_exact(),
        n_local=arrays["top"].shape[1],
        local_size=int(arrays["crop_size"]),
        crop_size=max(arrays["images"].shape[2:]),
    )
    assert {name: getattr(config.loss, name) for name in WEIGHTS} == WEIGHTS
    batch = StepInput(*(arrays[name] for name in ("images", "global_view", "local_image", "image_labels", "boxes")))
    model.update_ema(config.schedule.momentum)  # as the release does before it uses the teacher's head
    with model.plain_attention():
        made = Step(model, batch, config, weights=WEIGHTS, boxes=CropBoxes(arrays["top"], arrays["left"]))
        result = objective(made)
        result.total.backward()
    return arrays, model, result, made


def test_network(model):
    arrays = load_reference("network.npz")
    sizes = [name.removeprefix("images_") for name in arrays if name.startswith("images_")]  # of small views
    with torch.no_grad():
        output = model(arrays["images"])
        tokens = output.tokens
        cams = multi_scale_cam(model, arrays["images"], tokens=tokens)
        found = {
            "class_token": tokens.class_token,
            "patch_tokens": tokens.patch_map,
            "class_logits": output.class_logits,
            "aux_class_logits": output.aux_class_logits,
            "seg_logits": output.seg_logits,
            "cam_single": class_activation(tokens.patch_map, model.classifier.weight),
            "aux_cam_single": class_activation(tokens.aux_patch_map, model.aux_classifier.weight),
            "cam": cams.cam,
            "aux_cam": cams.aux_cam,
        }
        for size in sizes:
            class_token = model.encode(arrays[f"images_{size}"]).class_token
            found |= {f"class_token_{size}": class_token, f"projection_{size}": model.project(class_token)}
    assert set(found) == {name for name in arrays if not name.startswith("images")}
    for name, ours in found.items():
        agree(ours, arrays[name], name)


def test_checkpoint_goes_back_unchanged(model):
    state = torch.load(checkpoint_path(), weights_only=True)
    again = to_release(model, module_prefix=all(key.startswith("module.") for key in state))
    assert set(again) == set(state)
    assert all(torch.equal(again[key], value) for key, value in state.items())


def test_losses_of_a_step(step):
    arrays, _, result, _ = step
    assert set(TERMS) == {name.removeprefix("loss_") for name in arrays if name.startswith("loss_")}
    ours = {f"loss_{term}": value.detach() for term, value in result.terms.items()} | {"total": result.total.detach()}
    for name, value in ours.items():  # the energy is small: ATOL would be 1 % of it
        theirs = arrays[name]
        assert_close(value, theirs, rtol=RTOL, atol=1e-8, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}")


def test_maps_and_labels_of_a_step(step):
    arrays, model, _, made = step
    for name in ("cam", "aux_cam"):  # the step makes the maps of labelled classes only
        agree(getattr(made.cams, name), valid_cam(arrays[name], arrays["image_labels"]), name)
    with model.plain_attention():
        all_classes = multi_scale_cam(model, arrays["images"])
    agree(all_classes.cam, arrays["cam"], "cam")
    agree(all_classes.aux_cam, arrays["aux_cam"], "aux_cam")

    assert_labels_agree(made.region_mask, arrays["roi_mask"])
    assert_labels_agree(made.pseudo_label, arrays["par_label"])
    assert torch.equal(made.token_label, arrays["aux_label"].to(made.token_label))
    assert torch.equal(made.is_positive, arrays["positive"] > 0)


def test_gradients_of_a_step(step):
    arrays, model, *_ = step
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    wanted = {key[2:].replace("__", "."): norm for key, norm in arrays.items() if key.startswith("g_")}
    assert wanted
    for name, norm in wanted.items():
        assert_close(gradients[name].norm(), norm, rtol=RTOL, atol=ATOL, msg=lambda text, name=name: f"{name}: {text}")
