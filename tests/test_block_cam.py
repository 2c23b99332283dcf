import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from reference_model import resize
from small_config import stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.analysis.layer_probe import (
    fitted_classifier,
    own_classifiers,
    probe_classifiers,
    score_block_cams,
    token_cam,
)
from toco_core.cam import multi_scale_cam
from toco_core.config import ModelConfig, override, tiny
from toco_core.data import VOCFolder, evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.evaluation.metrics import ConfusionMatrix
from toco_core.model import ToCo
from toco_core.predict.tokens import tokens_by_block

BACKBONE = "plain_vit(image=24, patch=8, width=12, depth=4, heads=3, mlp=20)"
CONFIG = override(
    tiny(), backbone=BACKBONE, pretrained=False, layer=2, crop_size=32, local_size=16, precision="fp32", device="cpu"
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, proj_hidden=8), 3)
    stir(model, 0.3)
    return model.eval()


@pytest.fixture
def source(tmp_path):
    return VOCFolder(write_voc_folder(tmp_path / "voc"), "train")


# ---- one map


def test_a_token_cam_by_hand():
    tokens = torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weight = torch.randn(3, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = token_cam(tokens, weight, (2, 3), (11, 9))
    for b in range(2):
        for k in range(3):
            raw = torch.stack([tokens[b, n] @ weight[k] for n in range(6)]).reshape(2, 3)
            wanted = resize(raw, (11, 9), "bilinear").clamp(min=0)
            wanted = (wanted - wanted.min()) / (wanted.max() - wanted.min() + 1e-5)
            assert_close(found[b, k], wanted)
    assert found.std() > 0.1


@pytest.mark.parametrize("aux_norm", [False, True])
def test_the_networks_own_maps(model, aux_norm):
    """Its tokens under its classifiers are its CAMs, at one scale: block `layer` feeds the auxiliary one."""
    model = copy.deepcopy(model)
    model.config = dataclasses.replace(model.config, aux_norm=aux_norm)
    images = torch.randn(2, 3, 16, 40, generator=torch.Generator().manual_seed(3))
    cams = multi_scale_cam(model, images, scales=(1.0,), flip=False)
    tokens, own = tokens_by_block(model, images), own_classifiers(model)
    assert sorted(own) == [2, 4]
    assert_close(token_cam(tokens[3], own[4], (2, 5), (16, 40)), cams.cam)
    assert_close(token_cam(tokens[1], own[2], (2, 5), (16, 40)), cams.aux_cam)
    assert (cams.cam - cams.aux_cam).abs().max() > 0.1


# ---- fitting


def slow_gradient(weight, features, labels, decay):
    """Of the mean over images and classes of log(1 + exp(-+ logit)), plus decay / 2 of the squared scaled weight."""
    M, K = labels.shape
    spread = [np.std([row[d] for row in features], ddof=1) for d in range(features.shape[1])]
    gradient = np.zeros(weight.shape)
    for k in range(K):
        for d in range(features.shape[1]):
            for m in range(M):
                p = 1 / (1 + math.exp(-sum(weight[k, j] * features[m, j] for j in range(features.shape[1]))))
                gradient[k, d] += (p - labels[m, k]) * features[m, d] / (M * K)
            gradient[k, d] += decay * weight[k, d] * spread[d] ** 2
    return gradient


def test_the_fitted_classifier_is_where_the_gradient_is_zero():
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(17, 4, generator=generator, dtype=torch.float64) * torch.tensor([1, 5, 0.2, 3.0]) + 1
    labels = (features[:, :3] + torch.randn(17, 3, generator=generator) > 1).double()
    for decay in (0.01, 0.3):
        weight = fitted_classifier(features, labels, decay=decay)
        gradient = slow_gradient(weight.numpy(), features.numpy(), labels.numpy(), decay)
        scale = slow_gradient(np.zeros((3, 4)), features.numpy(), labels.numpy(), decay)
        assert np.abs(gradient).max() < 1e-4 * np.abs(scale).max()
    assert fitted_classifier(features, labels, decay=3.0).abs().max() < weight.abs().max()


def test_units_of_the_features_do_not_matter():
    generator = torch.Generator().manual_seed(5)
    features, labels = torch.rand(20, 5, generator=generator), (torch.rand(20, 2, generator=generator) > 0.5).float()
    units = torch.tensor([1.0, 100.0, 0.01, 7.0, 2.0])
    assert_close(
        fitted_classifier(features * units, labels) * units, fitted_classifier(features, labels), rtol=1e-3, atol=1e-4
    )
    constant = torch.cat([features, torch.zeros(20, 1)], dim=1)
    assert torch.isfinite(fitted_classifier(constant, labels)).all()


@pytest.mark.filterwarnings("error")
def test_one_image_has_a_classifier():
    """Its features have no deviation, as constant ones have none."""
    features, labels = torch.tensor([[1.0, -2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    one, many = fitted_classifier(features, labels), fitted_classifier(features.expand(7, 3), labels.expand(7, 2))
    assert_close(one, many, rtol=1e-3, atol=1e-4)
    assert ((features @ one.T > 0) == (labels > 0)).all()


@pytest.mark.parametrize("decay", [0.0, -1.0, float("nan")])
def test_a_problem_without_a_solution_is_refused(decay):
    with pytest.raises(ToCoError, match="decay = .* is not allowed"):
        fitted_classifier(torch.rand(4, 3), torch.ones(4, 2), decay=decay)


# ---- over a split


def test_probes_are_fitted_to_each_blocks_maxima(model, source):
    found = probe_classifiers(model, source, CONFIG, n_images=5)
    items = list(evaluation_items(source.subset(range(5)), size=32))
    images = model.normalise(to_unit(torch.cat([item.image for item in items])))
    labels = torch.cat([item.image_labels for item in items])
    with torch.no_grad():
        tokens = tokens_by_block(model, images)
    assert sorted(found) == [1, 2, 3, 4]
    for number, weight in found.items():
        highest = torch.stack([image.max(dim=0).values for image in tokens[number - 1]])
        assert_close(weight, fitted_classifier(highest, labels), rtol=1e-3, atol=1e-4)


def test_probes_pool_as_the_model_does(model, source):
    model.config = dataclasses.replace(model.config, pooling="mean")
    found = probe_classifiers(model, source, CONFIG, n_images=5)
    items = list(evaluation_items(source.subset(range(5)), size=32))
    with torch.no_grad():
        tokens = tokens_by_block(model, model.normalise(to_unit(torch.cat([item.image for item in items]))))
    labels = torch.cat([item.image_labels for item in items])
    assert_close(found[2], fitted_classifier(tokens[1].mean(dim=1), labels), rtol=1e-3, atol=1e-4)
    assert (found[2] - fitted_classifier(tokens[1].amax(dim=1), labels)).abs().max() > 0.01


def test_scores_are_those_of_each_map(model, source):
    """Thresholds one by one, an image at a time, against the confusion matrix."""
    own, other = own_classifiers(model), {3: torch.randn(3, 12, generator=torch.Generator().manual_seed(6))}
    found = score_block_cams(model, source, CONFIG, {"own": own, "other": other}, n_images=4)
    assert {name: sorted(blocks) for name, blocks in found.items()} == {"own": [2, 4], "other": [3]}
    for name, number, weight in (("own", 2, own[2]), ("own", 4, own[4]), ("other", 3, other[3])):
        for beta in (0.2, 0.55):
            matrix = ConfusionMatrix(3)
            for item in evaluation_items(source.subset(range(4)), size=32):
                images = model.normalise(to_unit(item.image))
                with torch.no_grad():
                    tokens = tokens_by_block(model, images)[number - 1]
                cam = resize(token_cam(tokens, weight, (4, 4), (32, 32))[0].double(), item.mask.shape, "bilinear")
                k = int(item.image_labels[0].argmax())  # these images have one class each
                matrix.update(item.mask, np.where(cam[k].numpy() > beta, k + 1, 0))
            assert_close(found[name][number].scores(beta).miou, matrix.scores().miou, rtol=0.02, atol=0)


def test_what_cannot_be_scored(model, source):
    with pytest.raises(ToCoError, match=r"block = 5 is not allowed: the backbone has blocks 1\.\.4"):
        score_block_cams(model, source, CONFIG, {"x": {5: torch.zeros(3, 12)}})
