"""When and how surely labels teach: each option beside a slow one written from its equation, and in a step."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from small_config import small_recipe, stirred_model
from torch.testing import assert_close

from toco_core import labels
from toco_core.config import LabelConfig, override, shortened, tiny
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.methods.surest import certainty, surest, without_noise
from toco_core.methods.thresholds import moved_thresholds, otsu_threshold
from toco_core.objective import Step, StepInput, objective
from toco_core.predict.image import ImagePredictor
from toco_core.train.backward import backward, crop_generator
from toco_core.widgets.settings import settings_of

K, STEPS = 3, 40
BOX = torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41]])


def drawn(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def model():
    return stirred_model(K)


def batch(image_labels=((1.0, 0, 1), (0, 1, 0))):
    """Smooth images, so that their CAMs are no noise."""
    views = [F.interpolate(drawn(2, 3, 5, 6, seed=seed), size=(32, 48), mode="bicubic") for seed in range(3)]
    return StepInput(*(2 * view - 1 for view in views), torch.tensor(image_labels), BOX)


def config_with(**changes):
    fields = {"beta_l": 0.3, "beta_h": 0.6, "cam_scales": (1.0,), "par_iterations": 2, "par_dilations": (1, 2)}
    fields |= {"steps": STEPS, "batch_size": 2, "n_local": 2, "local_size": 16, "crop_size": 32, "device": "cpu"}
    return override(small_recipe(), **fields | {"seg_start": 0, "energy_start": 0} | changes)


def step_of(model, number=0, given=None, weights=None, **changes):
    generator = torch.Generator().manual_seed(0)
    return Step(
        model, batch() if given is None else given, config_with(**changes), number, weights=weights, generator=generator
    )


def labels_by(step, betas, token_refiner="none"):
    """The three labels of a step, from its CAMs of all classes and two thresholds for each CAM, aux_cam first."""
    cams, y, box = step.cams, step.batch.image_labels, step.batch.valid_box
    (aux, final), settings = betas, {"iterations": 2, "dilations": (1, 2), "scale": 0.5}
    names = ("beta_l", "beta_h")
    aux, final = dict(zip(names, aux, strict=True)), dict(zip(names, final, strict=True))
    if token_refiner == "none":
        token = labels.token_label(cams.aux_cam, y, (4, 6), valid_box=box, **aux)
    else:
        token = labels.refined_token_label(step.unit, cams.aux_cam, y, (4, 6), valid_box=box, **aux, **settings)
    pseudo = labels.pseudo_label(step.unit, cams.cam, y, valid_box=box, **final, **settings)
    return {"token_label": token, "region_mask": labels.region_mask(cams.aux_cam, y, **aux), "pseudo_label": pseudo}


def assert_labels(step, wanted):
    for name, label in wanted.items():
        assert torch.equal(getattr(step, name), label), name


# ---- the upper threshold by a schedule


@pytest.mark.parametrize("end", [0.45, 0.9])
def test_the_upper_threshold_goes_by_half_a_cosine(end):
    config = config_with(beta_h_first=0.6, beta_h=end)
    for t in (0, 1, 13, 20, 39, 40, 55):
        found = config.labels.thresholds(config.schedule.progress(t))
        angle = math.pi * min(t, STEPS) / STEPS
        assert found == {"beta_l": 0.3, "beta_h": pytest.approx(end + (0.6 - end) * (1 + math.cos(angle)) / 2)}
    assert config.labels.thresholds() == {"beta_l": 0.3, "beta_h": end}
    assert config.labels.pseudo_label_options()["beta_h"] == end
    assert LabelConfig(beta_h=0.6).thresholds(0.3)["beta_h"] == 0.6  # it stays


def test_an_upper_threshold_that_begins_below_the_lower_one_is_refused():
    for first in (0.3, 0.1):
        with pytest.raises(ToCoError, match=f"^beta_l = 0.3 must be below beta_h_first = {first}$"):
            config_with(beta_h_first=first)
    with pytest.raises(ToCoError, match="beta_h_first = 1.5 is not allowed: at least 0, at most 1"):
        config_with(beta_h_first=1.5)


@pytest.mark.parametrize("token_refiner", ["none", "par"])
def test_a_step_makes_its_labels_with_its_upper_threshold(model, token_refiner):
    found = {}
    for number in (0, 10, 400):
        step = step_of(model, number, beta_h_first=0.6, beta_h=0.8, token_refiner=token_refiner)
        upper = 0.8 - 0.2 * (1 + math.cos(math.pi * min(number, STEPS) / STEPS)) / 2
        assert_labels(step, labels_by(step, [(0.3, upper)] * 2, token_refiner))
        found[number] = step
    for name in ("token_label", "region_mask", "pseudo_label"):  # 0.6 and 0.8 make a difference
        assert not torch.equal(getattr(found[0], name), getattr(found[400], name)), name


def test_after_training_nothing_is_left_of_the_first_upper_threshold(model):
    config, image = config_with(beta_h_first=0.6, beta_h=0.8), (255 * drawn(37, 52, 3)).to(torch.uint8).numpy()
    fixed, first = (config_with(beta_h=beta) for beta in (0.8, 0.6))
    made = []
    for one in (config, fixed, first):
        predictor = ImagePredictor(model, one)
        predictor.set_image(image, [1, 0, 1])
        made.append((predictor.pseudo_label(), predictor.seed_label()))
    for now, wanted, before in zip(*made, strict=True):
        assert (now == wanted).all() and (now != before).any()
    assert settings_of(config, 3) == settings_of(fixed, 3)


# ---- thresholds that follow the CAM values


def slow_otsu(values):
    """The variance between the classes below and above each of 255 thresholds, from the lists of their bins."""
    bins = [min(int(value * 256), 255) for value in values]
    best, chosen = 0.0, None
    for k in range(255):
        low, high = [i for i in bins if i <= k], [i for i in bins if i > k]
        if low and high:
            gap = sum(low) / len(low) - sum(high) / len(high)
            between = len(low) * len(high) * gap**2
            if between > best * (1 + 1e-12):
                best, chosen = between, (k + 1) / 256
    return chosen


@pytest.mark.parametrize("seed", range(4))
def test_otsu_equals_its_equation(seed):
    low, high = 0.3 * drawn(41 + seed, seed=seed), 0.5 + 0.5 * drawn(13, seed=seed + 9)
    values = torch.cat([low, high, torch.tensor([0.0, 1.0])]) ** (1 + seed / 2)
    found = otsu_threshold(values)
    assert found == slow_otsu(values.tolist()) == otsu_threshold(values.flip(0).float())
    assert 0.1 < found < 0.9


def test_without_two_values_there_is_nothing_to_part():
    assert otsu_threshold(torch.zeros(0)) is None and otsu_threshold(torch.full((7,), 0.4)) is None
    assert otsu_threshold(torch.tensor([0.0, 0.0, 1.0])) == 1 / 256
    assert moved_thresholds(None, beta_l=0.3, beta_h=0.7) == {"beta_l": 0.3, "beta_h": 0.7}


@pytest.mark.parametrize(("centre", "low", "high"), [(0.4, 0.175, 0.625), (0.1, 0.0, 0.45), (0.9, 0.55, 1.0)])
def test_the_interval_moves_and_keeps_its_width(centre, low, high):
    found = moved_thresholds(centre, beta_l=0.25, beta_h=0.7)
    assert found == pytest.approx({"beta_l": low, "beta_h": high}) and 0 <= found["beta_l"] < found["beta_h"] <= 1


def test_a_step_moves_its_thresholds_to_the_cam_values(model):
    step = step_of(model, 10, dynamic_thresholds=True, beta_h_first=0.6, beta_h=0.5)
    upper, betas = 0.5 + 0.1 * (1 + math.cos(math.pi / 4)) / 2, []
    for cam in (step.cams.aux_cam, step.cams.cam):
        values = []
        for b, (top, bottom, left, right) in enumerate(BOX.tolist()):
            values += labels.valid_cam(cam, step.batch.image_labels)[b].amax(0)[top:bottom, left:right].flatten()
        centre = slow_otsu([float(value) for value in values])
        betas.append((centre - (upper - 0.3) / 2, centre + (upper - 0.3) / 2))
    assert 0 < betas[0][0] and betas[0] != betas[1] != (0.3, upper)
    assert_labels(step, labels_by(step, betas))
    still = step_of(model, 10, beta_h_first=0.6, beta_h=0.5)
    assert not torch.equal(step.token_label, still.token_label)
    assert step.config.labels.thresholds() == {"beta_l": 0.3, "beta_h": 0.5}  # with which it is evaluated


def test_dynamic_thresholds_want_the_batch_in_one_piece(model):
    config = config_with(dynamic_thresholds=True)
    with pytest.raises(ToCoError, match="dynamic_thresholds with a batch in 2 parts is not allowed"):
        _ = Step(model, batch(), config, parts=2).token_label
    with pytest.raises(ToCoError, match="accumulate = 2 with dynamic_thresholds is not allowed: 1"):
        override(config, accumulate=2)
    with pytest.raises(ToCoError, match="processes = 2 with dynamic_thresholds is not allowed: 1"):
        config.check_parts(2)


# ---- the surest share


def slow_surest(label, score, share):
    """Class by class of each image, from the list of its scores in falling order."""
    kept = [[[IGNORE] * label.shape[2] for _ in range(label.shape[1])] for _ in range(label.shape[0])]
    for b, (classes, scores) in enumerate(zip(label.tolist(), score.tolist(), strict=True)):
        own = {}
        for row, score_row in zip(classes, scores, strict=True):
            for c, s in zip(row, score_row, strict=True):
                own.setdefault(c, []).append(s)
        falling = {c: sorted(found, reverse=True) for c, found in own.items()}
        for i, row in enumerate(classes):
            for j, c in enumerate(row):
                surer = falling[c].index(scores[i][j])
                if c != IGNORE and surer < share * len(own[c]):
                    kept[b][i][j] = c
    return torch.tensor(kept)


def labelled(*shape, seed=0):
    """With classes that only one image has, and 255."""
    label = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(seed))
    label[label == 3] = IGNORE
    label[0][label[0] == 2] = 3
    return label


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.8125])
@pytest.mark.parametrize("steps", [4, 10**6])
def test_the_surest_share_equals_its_equation(share, steps):
    """With and without equal scores."""
    label, score = labelled(3, 5, 7), (drawn(3, 5, 7, seed=1) * steps).round() / steps
    found = surest(label, score, share)
    assert torch.equal(found, slow_surest(label, score, share))
    assert [len(one.unique()) for one in found] == [len(one.unique()) for one in label]  # every class keeps a place
    if steps > 4:
        sizes = [[int((one == c).sum()) for c in range(4)] for one in label]
        assert [[int((one == c).sum()) for c in range(4)] for one in found] == [
            [math.ceil(share * n) for n in of_image] for of_image in sizes
        ]


@pytest.mark.parametrize(("share", "n"), [(0.6, 25), (0.3, 50), (0.15, 100)])
def test_a_share_that_is_a_whole_number_of_places_keeps_so_many(share, n):
    label, score = torch.zeros(1, 1, n, dtype=torch.long), drawn(1, 1, n)
    assert int((surest(label, score, share) == 0).sum()) == round(share * n)


def test_the_whole_share_and_a_label_without_anything():
    label, score = labelled(2, 3, 5), drawn(2, 3, 5)
    assert surest(label, score, 1.0) is label
    nothing = torch.full_like(label, IGNORE)
    assert torch.equal(surest(nothing, score, 0.5), nothing)
    one = nothing.clone()
    one[1, 2, 4] = 2
    assert torch.equal(surest(one, score, 0.01), one)


def test_equal_scores_stay_together():
    label, score = torch.zeros(1, 2, 3, dtype=torch.long), torch.tensor([[[0.5, 0.5, 0.2], [0.5, 0.1, 0.5]]])
    assert surest(label, score, 0.5).tolist() == [[[0, 0, IGNORE], [0, IGNORE, 0]]]


def slow_certainty(label, cam, y):
    """From the CAMs of all classes at the label's size."""
    found = torch.zeros(label.shape, dtype=cam.dtype)
    for b in range(label.shape[0]):
        for i in range(label.shape[1]):
            for j in range(label.shape[2]):
                values = [float(cam[b, k, i, j]) for k in range(K) if y[b, k]]
                c = int(label[b, i, j])
                if c != IGNORE:
                    found[b, i, j] = float(cam[b, c - 1, i, j]) if c else 1 - max([0.0, *values])
    return found


def test_the_share_that_teaches_grows_to_all_at_half_of_the_training():
    config = config_with(growing_start=0.3)
    found = [config.labels.taught_share(config.schedule.progress(t)) for t in (0, 5, 10, 20, 40, 99)]
    assert found == pytest.approx([0.3, 0.475, 0.65, 1, 1, 1]) and found[3] == 1
    assert LabelConfig().taught_share(0.0) == 1
    for wrong in (0.0, 1.5):
        with pytest.raises(ToCoError, match=f"growing_start = {wrong} is not allowed: above 0, at most 1"):
            config_with(growing_start=wrong)


@pytest.mark.parametrize("token_refiner", ["none", "par"])
def test_the_surest_regions_of_a_step_teach_first(model, token_refiner):
    step = step_of(model, 10, growing_start=0.25, token_refiner=token_refiner)  # share 0.625
    y, whole = step.batch.image_labels, labels_by(step, [(0.3, 0.6)] * 2, token_refiner)
    coarse = F.interpolate(step.cams.aux_cam, size=(4, 6), mode="bilinear", align_corners=False)
    wanted = {"region_mask": whole["region_mask"]}
    for name, cam in (("token_label", coarse), ("pseudo_label", step.cams.cam)):
        wanted[name] = slow_surest(whole[name], slow_certainty(whole[name], cam, y), 0.625)
        assert not torch.equal(wanted[name], whole[name]) and (wanted[name] > 0).any()
    assert_labels(step, wanted)
    assert_labels(step_of(model, 20, growing_start=0.25, token_refiner=token_refiner), whole)


def test_certainty_of_images_without_a_class():
    label = torch.tensor([[[0, IGNORE, 0]]])
    assert certainty(label, torch.zeros(1, 0, 4, 6)).tolist() == [[[1.0, 1.0, 1.0]]]


# ---- the filter of noise


def slow_without_noise(logits, label, noise):
    score = torch.zeros(label.shape, dtype=torch.float64)
    for b in range(label.shape[0]):
        for i in range(label.shape[1]):
            for j in range(label.shape[2]):
                if (c := int(label[b, i, j])) != IGNORE:
                    powers = [math.exp(value) for value in logits[b, :, i, j].tolist()]
                    score[b, i, j] = math.log(powers[c] / sum(powers))
    return slow_surest(label, score, 1 - noise)


@pytest.mark.parametrize("noise", [0.125, 0.5, 0.96875])
def test_the_filter_of_noise_equals_its_equation(noise):
    logits, label = 4 * drawn(2, K + 1, 5, 7).requires_grad_(), labelled(2, 5, 7, seed=3)
    found = without_noise(logits, label, noise)
    assert torch.equal(found, slow_without_noise(logits, label, noise)) and not torch.equal(found, label)
    assert without_noise(logits, label, 0.0) is label


def test_the_decoder_does_not_learn_from_noise(model):
    """Value and gradient of the segmentation loss in a step; the dense energy sees the whole pseudo label."""
    fields = {"seg_noise": 0.25, "seg_noise_start": 3}
    step = step_of(model, 3, weights={"seg": 1.0, "energy": 0.1}, **fields)
    logits = step.seg_logits
    logits.retain_grad()
    found = objective(step)
    label = slow_without_noise(logits, step.pseudo_label, 0.25)
    chances = logits.detach().softmax(1)
    halves = [[], []]
    for b, i, j in torch.nonzero(label != IGNORE).tolist():
        c = int(label[b, i, j])
        halves[c > 0].append(-math.log(chances[b, c, i, j]))
    assert all(halves)
    assert_close(found.terms["seg"].item(), 0.5 * sum(sum(half) / len(half) for half in halves))
    found.terms["seg"].backward()
    assert torch.equal(logits.grad.abs().sum(1) > 0, label != IGNORE)

    early = objective(step_of(model, 2, weights={"seg": 1.0, "energy": 0.1}, **fields))
    plain = objective(step_of(model, 2, weights={"seg": 1.0, "energy": 0.1}))
    assert torch.equal(early.total, plain.total) and found.terms["seg"] < plain.terms["seg"]
    assert torch.equal(found.terms["energy"], plain.terms["energy"])


def test_the_filter_keeps_its_share_of_a_shorter_training():
    config = override(tiny(), seg_noise=0.2, seg_noise_start=100)
    assert shortened(config, 40).loss.seg_noise_start == 10
    with pytest.raises(ToCoError, match="seg_noise = 1.0 is not allowed: at least 0, below 1"):
        override(tiny(), seg_noise=1.0)


# ---- all of them


def test_parts_one_after_the_other_are_the_whole(model):
    """What counts pixels and pairs counts those that are left, over all parts."""
    fields = {"seg_noise": 0.25, "growing_start": 0.25, "beta_h_first": 0.6, "beta_h": 0.5, "ctc": 0.0}
    found = []
    for accumulate in (1, 2):
        config = config_with(accumulate=accumulate, **fields)
        model.zero_grad()
        made = backward(objective, model, batch(), config, 5, generator=crop_generator(config, 5))
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found.append(({name: float(value) for name, value in made.terms.items()}, gradients))
    model.zero_grad()
    assert found[0][0]["seg"] > 0 and found[0][0]["ptc"] > 0
    assert_close(found[0], found[1])


def test_images_without_a_class(model):
    fields = {"dynamic_thresholds": True, "seg_noise": 0.25, "growing_start": 0.25, "beta_h_first": 0.6, "beta_h": 0.5}
    step = step_of(model, 1, batch(((0.0, 0, 0), (0, 0, 0))), **fields)
    found = objective(step)
    assert torch.isfinite(found.total) and not step.region_mask.any()
    assert set(step.token_label.unique().tolist()) == {0, IGNORE}


def test_off_is_not_computed(model, monkeypatch):
    costly = {"surest": ("surest", "certainty", "without_noise"), "thresholds": ("otsu_threshold", "moved_thresholds")}
    for module, names in costly.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"toco_core.methods.{module}"), name, None)
    step = step_of(model, 5)
    assert objective(step).terms["seg"] > 0
    assert_labels(step, labels_by(step, [(0.3, 0.6)] * 2))
