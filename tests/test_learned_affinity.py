"""The affinity that attention learns (AFA): head, pairs, loss and walk beside loops written from their equations, and
the whole in a model, a step and a run."""

import math

import pytest
import torch
from small_config import labelling_config, small_recipe, stir, stirred_model
from torch.testing import assert_close

from toco_core.cam import labelled_cams, multi_scale_cam
from toco_core.config import ModelConfig, override, tiny, voc
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.evaluation.evaluate import evaluate_as
from toco_core.heads import AffinityHead
from toco_core.methods.affinity import affinity_loss, affinity_pairs, count_affinity_pairs
from toco_core.model import ToCo, build_model, loaded_model, skeleton
from toco_core.objective import PAPER, Step, StepInput, objective
from toco_core.predict.image import ImagePredictor
from toco_core.refiners.attention import carried, learned_walk, near, token_affinity, walk
from toco_core.runs.opened import open_run
from toco_core.runs.release import to_release
from toco_core.train.backward import backward
from toco_core.train.kept_tokens import kept_blocks
from toco_core.train.loop import train

K, BLOCKS = 3, (2, 3)
CUT = {"beta_l": 0.15, "beta_h": 0.25, "par_iterations": 0, "seg_start": 0, "n_local": 2}
"""So that tokens of the drawn images show several classes."""
LEARNED = {"affinity": 0.5, "attention_kind": "learned", "attention_blocks": BLOCKS, "attention_steps": 2}


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_pairs(label, radius):
    """{(b, i, j): 1 or 0} of the pairs that count."""
    found, width = {}, label.shape[2]
    for b, flat in enumerate(label.flatten(1).tolist()):
        for i, one in enumerate(flat):
            for j, other in enumerate(flat):
                apart = max(abs(i // width - j // width), abs(i % width - j % width))
                if i != j and apart <= radius and IGNORE not in (one, other):
                    found[b, i, j] = int(one == other)
    return found


LABEL = torch.tensor([
    [[0, 0, 2, 2, 1], [0, IGNORE, 2, 2, 1], [0, 0, 0, IGNORE, 1]],
    [[3, 0, 0, 0, 0], [3, 3, 0, 0, IGNORE], [3, 3, 3, 0, 0]],
])  # fmt: skip


@pytest.mark.parametrize("radius", [1, 2, 8])
def test_pairs_and_loss_equal_their_equation(radius):
    pairs, wanted = affinity_pairs(LABEL, radius=radius), slow_pairs(LABEL, radius)
    known = {tuple(place): int(pairs[tuple(place)]) for place in torch.nonzero(pairs != IGNORE).tolist()}
    assert known == wanted
    s = drawn(2, 15, 15).requires_grad_()
    same = [float(1 - s.detach()[place]) for place, value in wanted.items() if value == 1]
    different = [float(s.detach()[place]) for place, value in wanted.items() if value == 0]
    assert count_affinity_pairs(pairs).tolist() == [len(same), len(different)]
    loss = affinity_loss(s, pairs)
    assert loss.item() == pytest.approx(sum(same) / len(same) + sum(different) / len(different))
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, pairs), s)
    loss.backward()
    assert not s.grad[pairs == IGNORE].any() and (s.grad[pairs == 1] < 0).all() and (s.grad[pairs == 0] > 0).all()


def test_parts_are_the_whole():
    s, pairs = drawn(2, 15, 15), affinity_pairs(LABEL)
    counts = count_affinity_pairs(pairs)
    parts = [affinity_loss(s[b : b + 1], pairs[b : b + 1], counts=counts, parts=2) for b in range(2)]
    assert_close(sum(parts) / 2, affinity_loss(s, pairs))
    assert abs(parts[0] - parts[1]) > 0.01


def test_a_half_without_pairs_is_nothing():
    s = drawn(1, 6, 6)
    assert affinity_loss(s, affinity_pairs(torch.full((1, 2, 3), IGNORE))).item() == 0
    off_diagonal = ~torch.eye(6, dtype=torch.bool)
    assert_close(affinity_loss(s, affinity_pairs(torch.zeros(1, 2, 3).int())), (1 - s[0][off_diagonal]).mean())


def stirred_head(seed=0):
    torch.manual_seed(seed)
    head = AffinityHead([7, 4, 7], 3).double()
    for parameter in head.parameters():
        parameter.data.normal_()
    return head


def test_head_equals_its_equation():
    head, n, prefix = stirred_head(), 6, 2
    maps = [drawn(2, 3, n + prefix, n + prefix, seed=seed).softmax(-1) for seed in (1, 2)]
    found = head(maps, prefix)
    assert head.blocks == (4, 7) and found.shape == (2, n, n)
    for b in range(2):
        for i in range(n):
            for j in range(n):
                z = head.bias.item()
                for a, weights in zip(maps, head.weight.tolist(), strict=True):
                    for h, w in enumerate(weights):
                        z += n * w * float(a[b, h, i + prefix, j + prefix] + a[b, h, j + prefix, i + prefix])
                assert found[b, i, j].item() == pytest.approx(1 / (1 + math.exp(-z)), rel=1e-9)
    moving = [a[:1, :, :4, :4].clone().requires_grad_() for a in maps]
    assert torch.autograd.gradcheck(lambda w, x, y: torch.func.functional_call(head, {"weight": w}, ([x, y], 1)),
                                    (head.weight.detach().requires_grad_(), *moving))  # fmt: skip
    assert (AffinityHead([1], 3)([maps[0].float()], prefix) == 0.5).all()


def test_walk_equals_its_equation_and_stays_in_the_window():
    grid = (2, 11)
    s = drawn(3, 22, 22)
    p = learned_walk(s, grid)
    for b in range(3):
        for i in range(22):
            row = []
            for j in range(22):
                far = max(abs(i // 11 - j // 11), abs(i % 11 - j % 11)) > 8
                assert bool(near(grid)[i, j]) != far
                row.append(1.0 if i == j else 0.0 if far else float(s[b, i, j]) ** 2)
            assert_close(p[b, i], torch.tensor([v / sum(row) for v in row], dtype=torch.float64))
    assert_close(learned_walk(torch.zeros(1, 22, 22), grid)[0], torch.eye(22))
    assert near((3, 2), 1).sum() == 16 + 12  # each row meets itself and its neighbours: 7 of 9 pairs of rows, times 4


def test_learned_affinity_undoes_attention_that_goes_to_opposites():
    """Bipartite: 0 and 1 attend to 2 and 3, and back. A fixed walk leaves the object, a learned one stays on it."""
    attention = torch.tensor([[0, 0, 0.5, 0.5], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0], [0.5, 0.5, 0, 0]])[None]
    head, pairs = AffinityHead([1], 1), affinity_pairs(torch.tensor([[[1, 1, 0, 0]]]))
    optimizer = torch.optim.SGD(head.parameters(), lr=1.0)
    for _ in range(100):
        optimizer.zero_grad()
        affinity_loss(head([attention[:, None]], 0), pairs).backward()
        optimizer.step()
    assert head.weight.item() < 0 < head.bias.item()
    activation = torch.tensor([1.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 4)
    fixed = carried(activation, token_affinity(attention), 1).flatten()
    learned = carried(activation, learned_walk(head([attention[:, None]], 0), (1, 4)), 1).flatten()
    assert fixed[:2].max() == 0 and learned[:2].min() > 0.4 and learned[2:].max() < 0.01


# ---- in a model


def with_head(dtype=torch.float32, **fields):
    config = override(labelling_config(), **LEARNED, **fields)
    torch.manual_seed(3)
    model = build_model(config, K)
    stir(model, 0.3)
    return model.to(dtype).train(), config


def test_tokens_carry_the_affinity_of_their_blocks_with_its_gradient():
    model, _ = with_head(torch.float64)
    x = drawn(2, 3, 24, 40)
    tokens, maps = model.encode(x, attend=(3, 2)), model.attention(x, blocks=[2, 3])
    assert_close(tokens.affinity, model.affinity(maps, 1))
    assert tokens.affinity.shape == (2, 15, 15) and 0.01 < tokens.affinity.std()
    assert_close(tokens.part(slice(1, 2)).affinity, tokens.affinity[1:])
    assert_close(model.inside(x, attend=(2, 3)).tokens.affinity, tokens.affinity.detach())
    tokens.affinity.sum().backward()
    assert model.encoder.blocks[2].attn.qkv.weight.grad.any() and model.affinity.weight.grad.all()
    assert model.encode(x).affinity is None and model.encode(x, attend=(3,)).affinity is None


def test_another_model_or_other_blocks_are_refused():
    options = {"attention_steps": 1, "attention_kind": "learned"}
    for model, blocks in ((stirred_model(K), (2, 3)), (with_head(torch.float64)[0], (3,))):
        with pytest.raises(
            ToCoError, match="attention_kind = 'learned' is not allowed: this model has no affinity head"
        ):
            multi_scale_cam(model, drawn(1, 3, 16, 24), attention_blocks=blocks, **options)
    with pytest.raises(ToCoError, match="block = 9 is not allowed"):
        build_model(override(labelling_config(), affinity=0.1), K)
    with pytest.raises(ToCoError, match="an affinity head cannot be written in the release's layout"):
        to_release(model)


def test_the_head_is_there_where_its_loss_counts_and_changes_nothing_else():
    off = labelling_config()
    on = override(off, affinity=0.1, attention_blocks=(1, 3))
    states = []
    for config in (off, on):
        torch.manual_seed(0)
        states.append(build_model(config, K).state_dict())
    assert {*states[1]} - {*states[0]} == {"affinity.weight", "affinity.bias"}
    assert states[1]["affinity.weight"].shape == (2, 2) and all(
        torch.equal(states[1][n], v) for n, v in states[0].items()
    )
    assert {*skeleton(on.model, K, affinity_blocks=(1, 3)).state_dict()} == {*states[1]}
    assert loaded_model("it", states[1], on, K).affinity.blocks == (1, 3)
    with pytest.raises(ToCoError, match=r"it: 2 unexpected tensors \(affinity"):
        loaded_model("it", states[1], off, K)


@pytest.mark.parametrize(
    ("backbone", "size"), [("vit_small_patch14_reg4_dinov2", (28, 42)), ("eva02_tiny_patch14_224", (28, 42))]
)
def test_backbones_of_timm(backbone, size):
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    model = ToCo(ModelConfig(backbone=backbone, pretrained=False, layer=2, **sizes), K, affinity_blocks=(11, 12)).eval()
    tokens = model.encode(torch.rand(1, 3, *size), attend=(11, 12))
    assert tokens.affinity.shape == (1, 6, 6) and walk(tokens, "learned").shape == (1, 6, 6)


# ---- in a step


def batch():
    views = [torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return StepInput(*views, torch.tensor([[1.0, 0, 1], [0, 1, 0]]), torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41]]))


def test_as_a_term():
    model, config = with_head(affinity_start=3, **CUT)
    for number in (2, 3):
        found = objective(Step(model, batch(), config, number, weights={"cls": 1.0, "affinity": 0.5 * (number == 3)}))
        assert set(found.terms) == {*PAPER, "affinity"} and (found.terms["affinity"] > 0) == (number == 3)
    step = Step(model, batch(), config, 3, weights={"affinity": 1.0})
    wanted = slow_pairs(labels_at_tokens(step.pseudo_label, (4, 6)), 8)
    assert {0, 1} == {*wanted.values()}
    s = step.tokens.affinity.detach()
    halves = [[float(s[p]) for p, v in wanted.items() if v == value] for value in (1, 0)]
    same, different = (sum(half) / len(half) for half in halves)
    found = objective(step)
    assert found.terms["affinity"].item() == pytest.approx(1 - same + different, rel=1e-5)
    found.total.backward()
    assert model.affinity.weight.grad.all() and model.encoder.blocks[1].attn.qkv.weight.grad.any()
    assert model.classifier.weight.grad is None  # labels have no graph
    plain = override(config, affinity=0.0, attention_kind="pattern")
    off = objective(Step(model, batch(), plain, 5, weights={"cls": 1.0}))
    assert set(off.terms) == set(PAPER)
    with pytest.raises(ToCoError, match="the term affinity needs an affinity head"):
        objective(Step(stirred_model(K).float(), batch(), config, 3, weights={"affinity": 1.0}))


def labels_at_tokens(label, grid):
    """What half of the 8 x 8 pixels of a token show."""
    found = torch.full((len(label), *grid), IGNORE)
    for b in range(len(label)):
        for i in range(grid[0]):
            for j in range(grid[1]):
                pixels = label[b, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten().tolist()
                most = max(sorted(set(pixels) - {IGNORE}), key=pixels.count, default=IGNORE)
                found[b, i, j] = most if pixels.count(most) >= 32 else IGNORE
    return found


def test_labels_come_from_carried_cams_from_their_step_on():
    model, config = with_head(affinity_walk_start=7)
    along = {"scales": (1.0, 0.5), "attention_steps": 2, "attention_blocks": BLOCKS, "attention_kind": "learned"}
    x, image_labels = batch().images, batch().image_labels
    for number, options in ((6, {"scales": (1.0, 0.5)}), (7, along)):
        found = Step(model, batch(), config, number).labelled
        assert_close(found.cams, labelled_cams(model, x, image_labels, **options).cams, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found.cams.cam, Step(model, batch(), config, 6).labelled.cams.cam)
    never = override(config, affinity_walk_start=0)
    assert never.label_cam_options(10**6) == {"scales": (1.0, 0.5)} and never.labels.cam_options() == along
    assert override(config, attention_kind="pattern").label_cam_options(0) == along | {"attention_kind": "pattern"}


def test_a_batch_in_parts_has_the_gradients_of_the_whole():
    found = []
    for parts in (1, 2):
        model, config = with_head(torch.float64, batch_size=2, accumulate=parts, energy_start=0, ctc=0.0, **CUT)
        double = StepInput(*(v.double() if v.is_floating_point() else v for v in batch()))
        result = backward(objective, model, double, config, 3)
        found.append((result.terms["affinity"], {n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
    assert_close(found[0], found[1], rtol=1e-6, atol=1e-9)
    assert found[0][1]["affinity.weight"].any() and 0 < found[0][0] < 2


def test_fields():
    with pytest.raises(ToCoError, match="attention_kind = 'learned' with affinity = 0 is not allowed: above 0"):
        override(voc(), attention_kind="learned")
    config = override(tiny(), affinity=0.1, views_per_image=2, attention_blocks=(7, 12))
    assert config.affinity_blocks() == config.attended() == (7, 12) and config.labels.attended() == ()
    assert kept_blocks(config) == 6 and kept_blocks(override(config, affinity=0.0)) == 8
    assert voc().affinity_blocks() == voc().attended() == ()


# ---- in a run


def test_a_run_opens_and_scores_along_what_it_has_learned(tmp_path):
    config = override(
        small_recipe(), **(LEARNED | {"attention_blocks": (11, 12)}), steps=3, warmup_steps=1, batch_size=2, n_local=2,
        eval_interval=0, crop_size=64, cam_scales=(1.0, 0.5), seg_start=1, energy_start=1, affinity_walk_start=2,
        teacher_momentum=0.5, frozen_blocks=9, beta_h=0.4, out_dir=str(tmp_path),
    )  # fmt: skip
    trained = train(config, progress=False)
    assert trained.model.affinity.weight.any()
    opened = open_run(trained.run.folder)
    assert torch.equal(opened.model.affinity.weight, trained.model.affinity.weight)
    assert open_run(trained.run.folder, teacher=True).model.affinity.weight.any()
    scores = evaluate_as(config, opened.model, opened.data.val.subset([0, 1]), progress=False)
    assert "carried 2 x along the attention of blocks 11, 12 (learned)" in scores.protocol

    predictor = ImagePredictor(opened.model, config)
    stir(opened.model.affinity, 0.5)
    predictor.set_image(opened.data.val.image(0), opened.data.val.image_labels[0].tolist())
    cams = multi_scale_cam(opened.model, predictor.images, **config.labels.cam_options()).cam
    k = predictor.labelled[0]
    assert_close(predictor.class_cam(k), cams[0, k - 1], rtol=1e-4, atol=1e-5)
