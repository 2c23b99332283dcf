"""The classifiers fitted to frozen tokens, and blocks that are left as they are."""

import numpy as np
import pytest
import torch
from small_config import few_scenes, small_recipe
from torch.testing import assert_close

from toco_core.config import override
from toco_core.data import evaluation_items, to_unit
from toco_core.errors import ToCoError
from toco_core.heads import class_scores, pooled
from toco_core.model import ToCo
from toco_core.train.loop import train
from toco_core.train.warm_start import fit_classifier, pooled_tokens, warm_start


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=11, n_train=21, n_val=4, n_test=1)


def small(**changes):
    return override(small_recipe(), crop_size=64, batch_size=2, n_local=2, steps=2, warmup_steps=1, seed=3, **changes)


def slow_fit(weight, tokens, labels, steps, picks):
    """AdamW with decoupled decay on the mean binary cross-entropy, written out in float64."""
    w, m, v = weight.double(), 0.0, 0.0
    for step, pick in enumerate(picks):
        rate = 1e-2 * (1 - step / steps)
        x, y = tokens[pick].double(), labels[pick].double()
        gradient = ((x @ w.T).sigmoid() - y).T @ x / y.numel()
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        w = w * (1 - rate * 1e-2)
        w = w - rate * (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    return w


def test_fitting_equals_the_slow_way():
    torch.manual_seed(0)
    tokens, labels = torch.randn(13, 7), (torch.rand(13, 3) < 0.4).float()
    classifier = torch.nn.Linear(7, 3, bias=False)
    before = classifier.weight.detach().clone()
    drawn = torch.Generator().manual_seed(5)
    picks = [torch.randint(13, (64,), generator=drawn) for _ in range(6)]
    fit_classifier(classifier, tokens, labels, steps=6, generator=torch.Generator().manual_seed(5))
    assert_close(classifier.weight.double(), slow_fit(before, tokens, labels, 6, picks), rtol=1e-4, atol=1e-6)


def test_fitting_scores_at_tokens_equals_the_slow_way():
    """By automatic differentiation of a sorted sum, with torch's plain AdamW."""
    torch.manual_seed(0)
    tokens, labels = torch.randn(13, 11, 7).bfloat16(), (torch.rand(13, 3) < 0.4).float()
    classifier = torch.nn.Linear(7, 3, bias=False)
    weight = classifier.weight.detach().clone().requires_grad_()
    drawn = torch.Generator().manual_seed(5)
    slow = torch.optim.AdamW([weight], lr=1e-2, weight_decay=1e-2, foreach=False)
    for step in range(6):
        slow.param_groups[0]["lr"] = 1e-2 * (1 - step / 6)
        pick = torch.randint(13, (64,), generator=drawn)
        cam = torch.einsum("bnd,kd->bkn", tokens[pick].float(), weight)
        p = cam.sort(descending=True).values[..., :3].mean(-1).sigmoid()  # a fifth of 11 tokens, rounded up
        slow.zero_grad()
        torch.nn.functional.binary_cross_entropy(p, labels[pick]).backward()
        slow.step()
    options = {"steps": 6, "generator": torch.Generator().manual_seed(5), "pooling": "cam_topk"}
    fit_classifier(classifier, tokens, labels, **options)
    assert_close(classifier.weight, weight, rtol=1e-4, atol=1e-6)


def test_pooled_tokens_are_those_of_every_image_in_order(data):
    config = small()
    torch.manual_seed(1)
    model = ToCo(config.model, data.train.n_classes)
    final, aux = pooled_tokens(model, data.train, config, progress=False)
    assert final.shape == aux.shape == (21, model.width) and model.training

    item = list(evaluation_items(data.train, size=64))[19]
    with torch.no_grad():
        tokens = model.eval().encode(model.normalise(to_unit(item.image)))
    assert_close(final[19:20], pooled(tokens.patch_tokens, "max"), rtol=1e-4, atol=1e-4)
    assert_close(aux[19:20], pooled(tokens.aux_patch_tokens, "max"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "pooling, aux_pooling", [("max", None), ("cam_topk", None), ("max", "mean"), ("max", "cam_topk")]
)
def test_a_warm_start_moves_the_classifiers_only_and_lowers_their_loss(data, pooling, aux_pooling):
    config = small(warm_start_steps=40, pooling=pooling, aux_pooling=aux_pooling)
    torch.manual_seed(1)
    model = ToCo(config.model, data.train.n_classes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    labels = torch.as_tensor(np.asarray(data.train.image_labels), dtype=torch.float32)

    @torch.no_grad()
    def loss():
        final, aux = pooled_tokens(model, data.train, config, progress=False)
        cost = torch.nn.functional.binary_cross_entropy_with_logits
        parts = ((final, model.classifier), (aux, model.aux_classifier))
        return [float(cost(c(t) if t.ndim == 2 else class_scores(t.float(), c, "cam_topk"), labels)) for t, c in parts]

    high = loss()
    warm_start(model, data.train, config, progress=False)
    assert all(now < 0.85 * before for now, before in zip(loss(), high, strict=True))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"classifier.weight", "aux_classifier.weight"}


def test_frozen_blocks_stay_and_the_others_move(data, tmp_path, monkeypatch):
    monkeypatch.setenv("TOCO_RUNS", str(tmp_path))
    config = small(frozen_blocks=8, warm_start_steps=5, lr=1e-3)
    fresh = ToCo(config.model, data.train.n_classes).state_dict()
    trained = train(config, data=data, progress=False).model.state_dict()
    moved = {name for name, value in trained.items() if not torch.equal(value, fresh[name])}
    upper = tuple(f"encoder.blocks.{n}." for n in range(8, 12))
    assert {name for name in moved if name.startswith("encoder.")} == {
        name for name in trained if name.startswith((*upper, "encoder.norm."))
    }
    assert {"classifier.weight", "aux_classifier.weight"} <= moved


def test_a_backbone_without_a_block_left_to_train_is_refused(data):
    model = ToCo(small().model, 3)
    with pytest.raises(ToCoError, match="frozen_blocks = 12 is not allowed: scenes_vit_nano has 12 blocks"):
        model.freeze_blocks(12)
