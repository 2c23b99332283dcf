"""Terms over a step: what a term of one's own may do, and what a step computes once or never."""

import functools
from dataclasses import dataclass

import matplotlib.pyplot as plt
import pytest
import reference_losses as slow
import torch
import torch.nn.functional as F
from small_config import small_recipe, stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core import losses, viz
from toco_core import objective as objectives
from toco_core.config import ReleaseBehaviour, override, tiny
from toco_core.crops import CropBoxes
from toco_core.data import open_data
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.objective import TERMS, Step, StepInput, Term, objective, stage_starts
from toco_core.refiners import REFINERS
from toco_core.refiners.none import NoRefinement
from toco_core.refiners.par import PAR
from toco_core.runs.folder import Run
from toco_core.runs.own_terms import own_terms, variant
from toco_core.train.backward import backward, crop_generator
from toco_core.train.budget import estimate_seconds, step_memory
from toco_core.train.loop import train

BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
SMALL = {
    "backbone": BACKBONE, "pretrained": False, "layer": 2, "proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10,
    "decoder_width": 14, "par_iterations": 2, "par_dilations": (1, 2), "local_size": 16, "n_local": 3, "crop_size": 32,
    "cam_scales": (1.0,), "seg_start": 0, "energy_start": 0, "device": "cpu", "precision": "fp32",
}  # fmt: skip
B, K = 4, 3


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = ToCo(override(small_recipe(), **SMALL).model, K).double()
    stir(model, 0.2)
    return model


@pytest.fixture(scope="module")
def batch(model):
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, B, 3, 5, 6, generator=generator, dtype=torch.float64)
    views = [model.normalise(F.interpolate(part, size=(32, 48), mode="bicubic").clamp(0, 1)) for part in coarse]
    image_labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    boxes = torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41], [8, 17, 9, 30], [0, 32, 20, 48]])
    return StepInput(*views, image_labels, boxes)


def entropy(step, sharpness=1.0):
    """Of the class probabilities."""
    p = (sharpness * step.output.class_logits.float()).sigmoid()
    return -(p * p.clamp(min=1e-6).log()).mean()


# ---- what is computed


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("order", ["as they are", "backwards"])
def test_the_encoder_sees_every_picture_once(model, batch, monkeypatch, accumulate, order):
    """Per image: the image, its mirror image for the CAM, the second view, three local views; in parts, the first two
    once more, for the labels of all. The order of the terms changes nothing."""
    seen, plain = [], ToCo._embedded

    def embedded(model, images, kept=None):
        seen.append(tuple(images.shape))
        return plain(model, images, kept)

    monkeypatch.setattr(ToCo, "_embedded", embedded)
    config = override(small_recipe(), **SMALL, batch_size=B, accumulate=accumulate)
    terms = TERMS if order == "as they are" else dict(reversed(TERMS.items()))
    model.zero_grad()
    backward(objective, model, batch, config, 5, terms=terms, generator=crop_generator(config, 5))
    part = B // accumulate
    main, local = (part, 3, 32, 48), (3 * part, 3, 16, 16)
    twice = 2 if accumulate > 1 else 1
    # main images and second view in the step, mirrored images with the labels
    assert seen.count(local) == accumulate and seen.count(main) == accumulate * (3 if twice == 1 else 4)
    assert len(seen) == seen.count(local) + seen.count(main)


def test_a_label_is_made_once_and_without_a_graph(model, batch):
    calls = []

    def confident(step):
        calls.append(step)
        return step.token_label.masked_fill(step.output.class_logits.amax() < -1e9, 255)

    def loss(step):
        assert not step.made(confident).requires_grad
        return step.tokens.patch_map.square().mean() + 0 * step.count("own").sum()

    config = override(small_recipe(), **SMALL, batch_size=B)
    terms = {"own": Term(loss, label=confident, count=losses.count_pairs, weight=1.0)}
    step = Step(model, batch, config, terms=terms)
    assert objective(step).total.requires_grad and len(calls) == 1
    assert set(vars(step)) >= {"tokens", "output"} and "pseudo_label" not in vars(step)
    assert torch.equal(step.counts["own"], losses.count_pairs(step.token_label))


def test_nothing_is_kept_for_the_backward_pass_without_gradients(model, batch):
    with torch.no_grad():
        assert not objective(Step(model, batch, override(small_recipe(), **SMALL))).total.requires_grad


def test_labels_asked_for_first_leave_the_graph_whole(model, batch):
    """A label needs the tokens, and the losses need them with their graph."""
    config = override(small_recipe(), **SMALL, release=ReleaseBehaviour())
    gradients = []
    for first in ((), ("pseudo_label", "is_positive")):
        step = Step(model, batch, config, generator=torch.Generator().manual_seed(0))
        _ = [getattr(step, name) for name in first]
        model.zero_grad()
        objective(step).total.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert_close(gradients[0], gradients[1], rtol=0, atol=0)


# ---- variants of class token contrast


@pytest.mark.parametrize("fields", [{}, {"local_resized": True}, {"ctc_cosine": True}, {"ctc_batch_negatives": True}])
def test_ctc_equals_view_by_view(model, batch, fields):
    """Every view cut, resized and encoded by itself, and the loss from loops; values and gradients."""
    config = override(small_recipe(), **SMALL, **fields)
    is_positive = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 1, 0], [1, 1, 0, 0, 1], [1, 1, 0, 0, 0]]) == 1
    boxes = CropBoxes(
        torch.tensor([[0, 16, 3], [7, 1, 9], [2, 5, 11], [13, 8, 4]]),
        torch.tensor([[32, 0, 5], [20, 11, 2], [31, 9, 14], [1, 25, 17]]),
    )
    step = Step(model, batch, config, boxes=boxes)
    step.is_positive = is_positive
    student, teacher = [], []
    for b in range(B):
        views = [batch.images[b], batch.global_view[b]]
        for top, left in zip(boxes.top[b].tolist(), boxes.left[b].tolist(), strict=True):
            crop = batch.local_image[b, :, top : top + 16, left : left + 16]
            views.append(slow.reduced_bilinearly(crop, 32, 48) if "local_resized" in fields else crop)
        tokens = [model.encode(view[None]).class_token[0] for view in views]
        student.append(torch.stack([model.proj_head(token) for token in tokens]))
        teacher.append(torch.stack([model.proj_head_ema(token) for token in tokens[:2]]).detach())
    classes = [{0, 2}, {0, 1}, {1}, {0, 1, 2}] if "ctc_batch_negatives" in fields else None
    options = {"cosine": "ctc_cosine" in fields, "classes": classes}
    theirs = slow.ctc_loss(
        torch.stack(student), torch.stack(teacher), is_positive, config.loss.temperature, True, **options
    )
    ours = TERMS["ctc"].loss(step)
    assert_close(ours, theirs.to(ours), rtol=1e-5, atol=1e-6)
    parts = [
        model.proj_head.mlp[0].weight,
        model.encoder.blocks[1].attn.qkv.weight,
        model.encoder.patch_embed.proj.bias,
    ]
    for mine, other in zip(torch.autograd.grad(ours, parts), torch.autograd.grad(theirs, parts), strict=True):
        assert_close(mine, other, rtol=1e-4, atol=1e-5 * other.abs().max().item())


def test_batch_negatives_want_the_batch_in_one_piece(model, batch):
    config = override(small_recipe(), **SMALL, ctc_batch_negatives=True)
    with pytest.raises(ToCoError, match="ctc_batch_negatives with a batch in 2 parts is not allowed"):
        objective(Step(model, batch, config, parts=2, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(ToCoError, match="accumulate = 2 with ctc_batch_negatives is not allowed"):
        override(config, accumulate=2, batch_size=B)


# ---- weights, names, digests


def test_weights_come_from_the_config_or_from_the_term():
    config = override(small_recipe(), ptc=0.3, ptc_start=7)
    terms = TERMS | {"own": Term(entropy, weight=0.5, start=9)}
    assert objectives.term_weights(config, 6, terms)["ptc"] == 0.0
    assert objectives.term_weights(config, 7, terms) | {"own": 0.5} == objectives.term_weights(config, 9, terms)
    found = objectives.term_weights(config, 500)
    assert all(found[name] == getattr(config.loss, name) for name in objectives.PAPER)
    assert not any(found[name] for name in found if name not in objectives.PAPER)
    assert stage_starts(config, terms) == [0, 7, 9, 100]


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        ({"own": Term(entropy)}, "the term 'own' has no weight"),
        ({"total": Term(entropy, weight=1.0)}, "cannot be called 'total'"),
        ({"my term": Term(entropy, weight=1.0)}, "cannot be called 'my term'"),
        ({"own": entropy}, "the term 'own' is <function entropy"),
        ({"own": Term(entropy, label="token_labels", weight=1.0)}, "learns from 'token_labels': it is no property"),
        ({"own": Term(entropy, weight=-1.0)}, "has weight -1.0 from step 0"),
        ({"own": Term(entropy, weight=float("nan"))}, "has weight nan from step 0"),
    ],
)
def test_what_is_no_term_is_refused_before_anything_is_written(tmp_path, terms, words):
    with pytest.raises(ToCoError, match=words):
        train(override(small_recipe(), out_dir=str(tmp_path / "runs")), terms=TERMS | terms)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (lambda step: step.output.class_logits.mean(1), rf"torch.float64 of shape \({B},\)"),
        (lambda step: step.output.class_logits.mean().reshape(1), r"torch.float64 of shape \(1,\)"),
        (lambda step: step.batch.valid_box.sum(), r"torch.int64 of shape \(\)"),
        (lambda step: 0.5, "0.5"),
        (lambda step: None, "None"),
    ],
)
def test_a_term_that_is_not_one_number_is_named(model, batch, loss, found):
    terms = TERMS | {"own": Term(loss, weight=0.1)}
    step = Step(model, batch, override(small_recipe(), **SMALL), terms=terms, weights={"cls": 1.0, "own": 0.1})
    with pytest.raises(ToCoError, match=f"^the term 'own' is {found}: a floating-point tensor of shape \\(\\) is"):
        objective(step)


@pytest.mark.parametrize("field", ["refiner", "token_refiner"])
def test_a_refiner_that_is_not_there_is_refused_before_anything_is_written(tmp_path, field):
    """It was told on the first step that asked for it, which may be the thousandth."""
    with pytest.raises(ToCoError, match=f"{field} = 'parr' is not allowed: one of par, crf, masks, none"):
        train(override(small_recipe(), out_dir=str(tmp_path / "runs"), **{field: "parr"}))
    assert not (tmp_path / "runs").exists()


def test_the_digest_follows_the_source_and_what_is_bound_to_it():
    def own(loss, **options):
        return variant(TERMS | {"own": Term(loss, weight=1.0, **options)}, tiny())

    def other(step, sharpness=1.0):
        """Of the class probabilities."""
        p = (sharpness * step.output.class_logits.float()).sigmoid()
        return -(p * p.clamp(min=1e-5).log()).mean()

    def around(value):
        return lambda step: value * entropy(step)

    assert variant(TERMS, tiny()) == variant(dict(TERMS), tiny()) == "" and own_terms(TERMS, tiny()) == {}
    digests = [own(entropy), own(other), own(functools.partial(entropy, sharpness=2.0)), own(around(1.0))]
    digests += [own(functools.partial(entropy, sharpness=3.0)), own(around(2.0)), own(entropy, start=1)]
    digests += [variant({name: term for name, term in TERMS.items() if name != "energy"}, tiny())]
    no_exchange = {name: term for name, term in TERMS.items() if name != "exchange"}
    digests += [variant(no_exchange, override(tiny(), exchange=0.1, seg_start=0))]
    assert variant(no_exchange, tiny()) == ""  # it has no weight: nothing is left out
    assert len(set(digests)) == len(digests)
    assert own(entropy) == digests[0] and len(digests[0]) == 10


@pytest.mark.parametrize("field", ["refiner", "token_refiner"])
def test_the_digest_follows_a_refiner_that_the_config_names(monkeypatch, field):
    """An edited refiner was answered with the finished run of the one before."""

    def blur(radius, power):
        @dataclass(frozen=True)
        class Blur:
            size: int = radius
            scale: float = 0.5

            def __call__(self, images, classes):
                return [part**power for part in classes]

        return Blur

    config = override(tiny(), **{field: "blur"})
    assert variant(TERMS, config) == ""  # there is none of that name: `check_terms` says so
    digests = []
    for row in (blur(1, 1), blur(2, 1), blur(1, 2), functools.partial(PAR, iterations=3), lambda: NoRefinement()):
        monkeypatch.setitem(REFINERS, "blur", row)
        assert own_terms(TERMS, config).keys() == {"refiner blur"} and own_terms(TERMS, tiny()) == {}
        digests.append(variant(TERMS, config))
    assert len(set(digests)) == len(digests) and "" not in digests
    monkeypatch.setitem(REFINERS, "blur", blur(1, 1))
    assert variant(TERMS, config) == digests[0]
    monkeypatch.setitem(REFINERS, "blur", PAR)
    assert variant(TERMS, config) == ""


# ---- a whole run


def test_a_term_of_ones_own_trains_is_written_down_and_shown(tmp_path):
    data = write_voc_folder(tmp_path / "data", n=4)
    config = override(
        small_recipe(), **SMALL | {"seg_start": 1, "energy_start": 1}, dataset=str(data), out_dir=str(tmp_path),
        steps=3, warmup_steps=1, batch_size=2, eval_interval=0, log_interval=1, val_split="train",
    )  # fmt: skip
    terms = TERMS | {"entropy": Term(entropy, weight=0.5, start=1)}
    trained = train(config, terms=terms, progress=False)
    plain = train(config, progress=False)
    assert trained.run.folder == Run.of(config, variant(terms, config)).folder != plain.run.folder
    assert trained.run.folder.name.startswith(plain.run.folder.name + "-")
    assert trained.run.manifest()["own_terms"] == own_terms(terms, config) and plain.run.manifest()["own_terms"] == {}
    lines = [r for r in trained.run.records() if "total" in r]
    assert [r["entropy"] > 0 for r in lines] == [False, True, True]
    of_plain = [r for r in plain.run.records() if "total" in r]
    assert lines[0]["total"] == of_plain[0]["total"] and "entropy" not in of_plain[0]
    assert lines[1]["total"] - of_plain[1]["total"] == pytest.approx(0.5 * lines[1]["entropy"], rel=1e-4)
    _, ax = plt.subplots()
    drawn = {line.get_label(): line.get_color() for line in viz.loss_curves(ax, lines).lines}
    plt.close("all")
    assert list(drawn)[-1] == "entropy" and drawn["entropy"] not in viz.TERM_COLOURS.values()
    calls = []

    def counted(step):
        calls.append(step.number)
        return entropy(step)

    terms = TERMS | {"entropy": Term(counted, weight=0.5, start=2)}
    assert estimate_seconds(config, open_data(config.data), terms=terms) > 0
    assert calls == [2, 2, 2]
    assert step_memory(config, open_data(config.data), terms=terms).step > 0 and calls == [2] * 4
