import json
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from small_config import small_recipe, stir
from torch.testing import assert_close

import toco_core.data.scenes as scenes
import toco_core.objective as objectives
import toco_core.train.loop as training
from toco_core import crops, labels, losses
from toco_core.cam import multi_scale_cam
from toco_core.config import DataConfig, ReleaseBehaviour, TrainConfig, lr_at, override
from toco_core.data import VOCFolder, open_data, open_train_val, training_batches
from toco_core.errors import ToCoError
from toco_core.losses import dense_energy_loss
from toco_core.machine.device import resolve_device
from toco_core.machine.precision import attention_of, autocast_of, resolve_precision
from toco_core.model import ToCo
from toco_core.objective import PAPER, Step, StepInput, objective
from toco_core.runs.folder import Run, data_digest
from toco_core.train.batches import to_device, view_options
from toco_core.train.budget import estimate_seconds
from toco_core.train.loop import train, trained_run
from toco_core.train.rival import of_both

BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
SMALL = {
    "backbone": BACKBONE, "pretrained": False, "layer": 2, "proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10,
    "decoder_width": 14, "par_iterations": 2, "par_dilations": (1, 2), "local_size": 16, "n_local": 3,
    "positive_threshold": 0.6,
}  # fmt: skip
K = 3
ALL = {"cls": 1.0, "aux_cls": 0.9, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "energy": 0.05}


# ---- one step


@pytest.fixture(scope="module")
def model():
    """In float64, so that another order of summation moves no label; far from its start, so that CAMs are not flat."""
    model = ToCo(override(small_recipe(), **SMALL).model, K).double()
    torch.manual_seed(0)  # here: how many numbers it takes to make a network is timm's business
    stir(model, 0.2)
    return model


@pytest.fixture(scope="module")
def batch(model):
    """Two images of 32 x 48, the second one padded."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(3, 2, 3, 5, 6, generator=generator, dtype=torch.float64)
    views = [model.normalise(F.interpolate(part, size=(32, 48), mode="bicubic").clamp(0, 1)) for part in coarse]
    image_labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0]])
    return StepInput(*views, image_labels, torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41]]))


BOXES = crops.CropBoxes(torch.tensor([[0, 5, 16], [9, 2, 13]]), torch.tensor([[32, 4, 17], [1, 30, 20]]))


def slow_step(model, batch, config, weights, step):
    """Every view of every image through the encoder on its own; nothing is shared between the terms."""
    B, size = len(batch.images), config.crops.local_size
    thresholds = {"beta_l": config.labels.beta_l, "beta_h": config.labels.beta_h}
    release, image_labels = config.release, batch.image_labels

    def outputs():
        return [model(image[None]) for image in batch.images]

    def cams():
        found = [
            multi_scale_cam(model, image[None], scales=config.labels.cam_scales, image_labels=row[None])
            for image, row in zip(batch.images, image_labels, strict=True)
        ]
        return torch.cat([c.cam for c in found]), torch.cat([c.aux_cam for c in found])

    def class_token(view):
        return model.encode(view[None]).class_token[0]

    terms = {
        "cls": losses.classification_loss(torch.cat([o.class_logits for o in outputs()]), image_labels),
        "aux_cls": losses.classification_loss(torch.cat([o.aux_class_logits for o in outputs()]), image_labels),
    }

    label = labels.token_label(
        cams()[1], image_labels, (4, 6), valid_box=batch.valid_box, **thresholds,
        pixel_box_on_tokens=release.pixel_box_on_tokens,
    )  # fmt: skip
    patch_map = torch.cat([o.tokens.patch_map for o in outputs()])
    terms["ptc"] = losses.ptc_loss(patch_map, label, keep_constant=release.ptc_constant)

    region = labels.region_mask(cams()[1], image_labels, **thresholds)
    student, teacher, flags = [], [], []
    for b in range(B):
        views, positive = [batch.images[b], batch.global_view[b]], [True, True]
        for top, left in zip(BOXES.top[b].tolist(), BOXES.left[b].tolist(), strict=True):
            window = slice(top, top + size), slice(left, left + size)
            views.append(batch.local_image[b][(slice(None), *window)])
            values = region[b][window].double()
            if not release.foreground_counts_double:
                values = (values > 0).double()
            positive.append(bool(values.mean() > config.crops.positive_threshold))
        student.append(torch.stack([model.proj_head(class_token(view)) for view in views]))
        with torch.no_grad():
            teacher.append(torch.stack([model.proj_head_ema(class_token(view)) for view in views[:2]]))
        flags.append(positive)
    terms["ctc"] = losses.ctc_loss(
        torch.stack(student), torch.stack(teacher), torch.tensor(flags), temperature=config.loss.temperature,
        negatives_only_term=release.ctc_negatives_only_term,
    )  # fmt: skip

    unit = (batch.images * model.std + model.mean).clamp(0, 1)
    refined = labels.pseudo_label(
        (unit * 255).floor() / 255 if release.truncated_denormalisation else unit,
        cams()[0] if step >= config.loss.final_cam_start else cams()[1],
        image_labels, valid_box=batch.valid_box, iterations=2, dilations=(1, 2), scale=config.labels.par_scale,
        **thresholds,
    )  # fmt: skip
    seg_logits = torch.cat([o.seg_logits for o in outputs()])
    seg_logits = F.interpolate(seg_logits, size=(32, 48), mode="bilinear", align_corners=False)
    terms["seg"] = losses.segmentation_loss(seg_logits, refined)
    terms["energy"] = dense_energy_loss(seg_logits, unit, refined, batch.valid_box)
    total = sum(weights[name] * terms[name] for name in terms if weights[name])
    return total, terms, (label, region, torch.tensor(flags), refined)


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


EXACT = {
    "ctc_negatives_only_term": False, "foreground_counts_double": False, "truncated_denormalisation": True,
    "ptc_constant": True, "pixel_box_on_tokens": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("step", "changes", "release"),
    [(200, {}, {}), (200, {"beta_l": 0.4, "beta_h": 0.5, "temperature": 0.3}, EXACT), (7, {"final_cam_start": 8}, {})],
)
def test_a_step_equals_its_parts(model, batch, step, changes, release):
    config = override(small_recipe(), **SMALL, **changes, release=ReleaseBehaviour(**release))
    made = Step(model, batch, config, step, weights=ALL, boxes=BOXES)
    found = objective(made)
    total, terms, (token_label, region, flags, refined) = slow_step(model, batch, config, ALL, step)
    assert list(found.terms) == list(terms) == list(PAPER)
    for name, wanted in terms.items():
        assert_close(found.terms[name].double(), wanted.double(), rtol=1e-5, atol=1e-8)
        assert wanted != 0
    assert_close(found.total.double(), total.double(), rtol=1e-5, atol=0)
    assert_close(made.token_label, token_label)
    assert_close(made.region_mask, region)
    assert_close(made.is_positive, flags)
    assert_close(made.pseudo_label, refined)
    assert {False, True} == set(flags[:, 2:].flatten().tolist()) and len(token_label.unique()) > 2

    slow = gradients(model, total)
    fast = gradients(model, found.total)
    assert fast.keys() == slow.keys() and not [name for name in fast if "ema" in name]
    for name, wanted in slow.items():
        assert_close(fast[name], wanted, rtol=1e-4, atol=1e-6 * float(wanted.abs().max()), msg=name)


def test_the_final_cam_teaches_from_its_step_on(model, batch):
    config = override(small_recipe(), **SMALL, final_cam_start=8)
    before, after = (Step(model, batch, config, step) for step in (7, 8))
    assert (before.pseudo_label != after.pseudo_label).any()


def test_crops_are_drawn_from_the_generator(model, batch):
    config = override(small_recipe(), **SMALL)

    def ctc(**where):
        return objective(Step(model, batch, config, weights=ALL, **where)).terms["ctc"]

    found = Step(model, batch, config)
    boxes = crops.sample_crops(
        found.region_mask, n_crops=3, crop_size=16, generator=torch.Generator().manual_seed(5),
        valid_box=batch.valid_box,
    )  # fmt: skip
    drawn = ctc(generator=torch.Generator().manual_seed(5))
    assert_close(drawn, ctc(boxes=boxes), rtol=0, atol=0)
    assert drawn != ctc(generator=torch.Generator().manual_seed(6))


def test_no_local_view_at_all(model, batch):
    step = Step(model, batch, override(small_recipe(), **{**SMALL, "n_local": 0}), weights=ALL)
    assert torch.isfinite(objective(step).terms["ctc"]) and step.is_positive.shape == (2, 2)


@pytest.mark.parametrize(
    ("off", "made"),
    [
        (("ptc",), {"labelled", "region_mask", "is_positive", "pseudo_label"}),
        (("ctc",), {"labelled", "token_label", "pseudo_label"}),
        (("seg",), {"labelled", "region_mask", "is_positive", "token_label", "pseudo_label"}),
        (("seg", "energy"), {"labelled", "region_mask", "is_positive", "token_label"}),
        (("ptc", "ctc", "seg", "energy"), set()),
        (("cls", "aux_cls"), {"labelled", "region_mask", "is_positive", "token_label", "pseudo_label"}),
    ],
)
def test_a_weight_of_0_leaves_a_term_out(model, batch, monkeypatch, off, made):
    config, weights = override(small_recipe(), **SMALL), ALL | dict.fromkeys(off, 0.0)
    functions = {
        "ptc": (losses, "ptc_loss"), "ctc": (losses, "ctc_loss"), "seg": (losses, "segmentation_loss"),
        "energy": (objectives, "dense_energy_loss"), "cls": (losses, "classification_loss"),
        "aux_cls": (losses, "classification_loss"),
    }  # fmt: skip
    for name in off:
        monkeypatch.setattr(*functions[name], None)
    if {"seg", "energy"} <= set(off):
        monkeypatch.setattr(model.decoder, "forward", None)
    if not made:
        monkeypatch.setattr(objectives, "labelled_cams", None)
    step = Step(model, batch, config, weights=weights, boxes=BOXES)
    found = objective(step)
    assert {name for name in off if found.terms[name] != 0} == set()
    pieces = ("labelled", "region_mask", "is_positive", "token_label", "pseudo_label")
    assert {name for name in pieces if name in vars(step)} == made
    assert_close(found.total, sum(weights[name] * found.terms[name] for name in weights if weights[name]))


def test_a_loss_without_any_weight_is_refused(model, batch):
    with pytest.raises(ToCoError, match="all weights of the loss are 0 on step 4: one of cls, aux_cls, ptc"):
        objective(Step(model, batch, override(small_recipe(), **SMALL), 4, weights=dict.fromkeys(ALL, 0.0)))


def test_a_step_changes_nothing(model, batch):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.zero_grad()
    objective(Step(model, batch, override(small_recipe(), **SMALL), weights=ALL, boxes=BOXES))
    assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


# ---- the loop


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TOCO_CACHE", str(tmp_path_factory.mktemp("cache")))
        return scenes.scenes_folder(scenes.ScenesConfig(seed=1, n_train=24, n_val=3, n_test=1), progress=False)


def small_run(folder, out_dir):
    """Four steps, all terms from the second one on, a checkpoint after two."""
    return override(
        small_recipe(), **SMALL, dataset=str(folder), out_dir=str(out_dir), crop_size=32, cam_scales=(1.0,), steps=4,
        warmup_steps=1, batch_size=2, lr=1e-3, eval_interval=2, log_interval=1, seg_start=1, energy_start=1,
        device="cpu", precision="fp32",
    )  # fmt: skip


@pytest.fixture
def config(folder, tmp_path):
    return small_run(folder, tmp_path / "runs")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run, and what it told on the way."""
    told = []
    return train(small_run(folder, tmp_path_factory.mktemp("whole")), on_record=told.append, progress=False), told


class Interrupted(Exception):
    """Somebody pressed the button."""


def interrupt_at(step):
    def on_record(record):
        if record["step"] == step and "total" in record:
            raise Interrupted

    return on_record


def assert_same_weights(one, other):
    assert_close(dict(one.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


@pytest.mark.slow
def test_a_run_is_the_same_bits_again(config, whole):
    told = []
    again = train(config, on_record=told.append, progress=False)
    assert_same_weights(again.model, whole[0].model)
    assert told == whole[1]
    assert again.run.folder.name == whole[0].run.folder.name and again.run.folder != whole[0].run.folder


@pytest.mark.slow
def test_no_step_keeps_the_maps_of_the_one_before(config, whole, monkeypatch):
    """They are as large as the images, times two per class."""
    cams, before = objectives.labelled_cams, []

    def watched(*args, **kwargs):
        assert before.pop()() is None if before else True
        result = cams(*args, **kwargs)
        before.append(weakref.ref(result.cams.cam))
        return result

    monkeypatch.setattr(objectives, "labelled_cams", watched)
    assert_same_weights(train(config, progress=False).model, whole[0].model)
    assert len(before) == 1


def test_another_seed_is_another_run(config, whole):
    other = train(override(config, seed=1, steps=1, eval_interval=0), progress=False)
    assert other.run.records()[0]["total"] != whole[1][0]["total"]


def test_what_a_run_tells_and_leaves(whole):
    trained, told = whole
    kinds = [(record["step"], "losses" if "total" in record else "scores") for record in told]
    assert kinds == [(step, "losses") for step in (0, 1)] + [(1, "scores")] + [
        (2, "losses"), (3, "losses"), (3, "scores"),
    ]  # fmt: skip
    for record in told:
        if "total" in record:
            wanted = {term: weight if record["step"] else 0.0 for term, weight in ALL.items()}
            wanted |= {"cls": 1.0, "aux_cls": 1.0, "ptc": 0.2, "ctc": 0.5}
            assert_close(record["total"], sum(w * record[term] for term, w in wanted.items()), rtol=1e-5, atol=0)
            assert (record["seg"] == 0) == (record["step"] == 0)
        else:
            assert {"cam_miou", "aux_cam_miou", "seg_miou", "map", "aux_map", "best_beta"} < set(record)
    assert trained.run.records() == told and trained.run.finished
    scores = {name: value for name, value in told[-1].items() if name != "step"}
    assert trained.run.metrics() == scores | {"steps": 4, "protocol": f"val: {trained.validation.protocol}"}
    assert sorted(path.name for path in trained.run.folder.iterdir()) == [
        "best.pt", "checkpoint.pt", "config.json", "manifest.json", "metrics.json", "metrics.jsonl",
    ]  # fmt: skip
    written = json.loads((trained.run.folder / "manifest.json").read_text())
    assert written["data"] == {"train": 24, "val": 3, "classes": list(scenes.CLASS_NAMES)}
    assert (written["processes"], written["device"], written["precision"]) == (1, "cpu", "fp32")
    other = trained.data._replace(val=trained.data.val.subset([1, 0, 2]))
    assert written["data_sha256"] == data_digest(trained.data) != data_digest(other)
    assert not trained.model.training
    assert (len(trained.data.train), len(trained.data.val)) == (24, 3)


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 3])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(config, whole, step):
    """Step 1: before the first checkpoint; 2 and 3: after it."""
    with pytest.raises(Interrupted):
        train(config, on_record=interrupt_at(step), progress=False)
    run = Run.of(config)
    assert not run.finished and (run.load() is None) == (step == 1)
    told = []
    resumed = train(config, on_record=told.append, progress=False)
    assert_same_weights(resumed.model, whole[0].model)
    assert resumed.run.records() == whole[1]
    assert resumed.run.metrics() == whole[0].run.metrics()
    assert told[0]["step"] == (0 if step == 1 else 2)


def test_a_finished_run_is_loaded_and_not_repeated(config, whole, monkeypatch):
    monkeypatch.setattr(training, "of_both", pytest.fail)
    told = []
    config = override(config, out_dir=str(whole[0].run.folder.parent))
    loaded = train(config, on_record=told.append, progress=False)
    assert told == []
    assert_same_weights(loaded.model, whole[0].model)
    assert loaded.run.metrics() == whole[0].run.metrics() and loaded.run.records() == whole[1]
    assert not loaded.model.training


@pytest.mark.slow
def test_a_run_can_be_started_anew(config):
    config = override(config, steps=1, eval_interval=0, warmup_steps=0)
    first = train(config, progress=False)
    with pytest.raises(Interrupted):
        train(config, resume=False, on_record=interrupt_at(0), progress=False)
    assert not first.run.finished and first.run.load() is None
    told = []
    assert_same_weights(train(config, on_record=told.append, progress=False).model, first.model)
    assert told[0]["step"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_the_teachers_head_is_averaged_in_the_loop(config, monkeypatch, before):
    """Once a step, before the teacher is used, as published, or after it."""
    order, plain, heads = [], ToCo.update_ema, []

    def update_ema(model, momentum):
        order.append(momentum)
        heads.append([p.detach().clone() for p in model.proj_head.parameters()])
        plain(model, momentum)

    def losses_of_a_step(*args, **kwargs):
        order.append("losses")
        return of_both(*args, **kwargs)

    monkeypatch.setattr(ToCo, "update_ema", update_ema)
    monkeypatch.setattr(training, "of_both", losses_of_a_step)
    release = ReleaseBehaviour(average_before_teacher=before)
    config = override(config, steps=3, eval_interval=0, momentum=0.7, release=release)
    torch.manual_seed(config.seed)
    teacher = [p.clone() for p in ToCo(config.model, 8).proj_head_ema.parameters()]
    model = train(config, progress=False).model
    assert order == ([0.7, "losses"] if before else ["losses", 0.7]) * 3
    for head in heads:
        teacher = [0.7 * t + 0.3 * p for t, p in zip(teacher, head, strict=True)]
    assert_close(list(model.proj_head_ema.parameters()), teacher, rtol=1e-6, atol=1e-7)
    assert any((p != q).any() for p, q in zip(teacher, model.proj_head.parameters(), strict=True))


def test_rates_follow_the_schedule(config, monkeypatch):
    rates, plain = [], torch.optim.AdamW.step

    def step(optimizer, *args, **kwargs):
        rates.append({group["name"]: group["lr"] for group in optimizer.param_groups})
        return plain(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    train(override(config, eval_interval=0, warmup_steps=2, ptc=0.0, ctc=0.0, seg=0.0, energy=0.0), progress=False)
    schedule = {"steps": 4, "warmup_steps": 2, "warmup_ratio": 1e-6, "power": 0.9}
    wanted = [lr_at(step, base_lr=1e-3, **schedule) for step in range(4)]
    assert_close([rate["encoder"] for rate in rates], wanted)
    assert_close([rate["heads"] for rate in rates], [10 * rate for rate in wanted])


@pytest.mark.slow
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_images(config, monkeypatch):
    """On step 2, which is not logged; the checkpoint of step 1 stays a healthy one."""
    calls, plain = [], losses.ptc_loss

    def ptc_loss(patch_map, *args, **kwargs):
        calls.append(True)
        return plain(patch_map, *args, **kwargs) * (math.nan if len(calls) == 3 else 1.0)

    config = override(config, log_interval=10)
    batches = list(training_batches(open_data(config.data).train, crop_size=32, batch_size=2, seed=0, stop_step=3))
    monkeypatch.setattr(losses, "ptc_loss", ptc_loss)
    names = ", ".join(batches[2].names)
    with pytest.raises(ToCoError, match=f"the loss is nan on step 2: .*'ptc': nan.*images {names}; "):
        train(config, progress=False)
    state = Run.of(config).load()
    assert state["step"] == 2 and all(torch.isfinite(value).all() for value in state["model"].values())


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"layer": 13}, r"layer = 13 is not allowed: .* has blocks 1\.\.3"),
        ({"backbone": "vit_smal_patch16_224"}, "backbone = 'vit_smal_patch16_224' is not known: did you mean"),
        ({"dataset": "/nowhere/at/all"}, "dataset folder /nowhere/at/all does not exist"),
        ({"train_split": "trian"}, "trian"),
    ],
)
def test_what_cannot_work_is_refused_before_training(config, wrong, words):
    config = override(config, **wrong)
    with pytest.raises(ToCoError, match=words):
        train(config, progress=False)
    assert not Run.of(config).folder.parent.exists()


@pytest.mark.parametrize(
    ("name", "value"),
    [*((name, -1) for name in ("save_every", "keep_every", "skip_nonfinite", "film")), ("save_minutes", math.nan)],
)
def test_less_than_none_is_refused_before_training(config, monkeypatch, name, value):
    monkeypatch.setattr(training, "of_both", pytest.fail)
    with pytest.raises(ToCoError, match=f"^{name} = {value} is not allowed: 0 or more$"):
        train(config, progress=False, **{name: value})


def test_an_out_dir_that_cannot_be_written_is_named(config, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(training, "of_both", pytest.fail)
    with pytest.raises(ToCoError, match="out_dir: cannot write to .*file/runs"):
        train(override(config, out_dir=str(tmp_path / "file" / "runs")), progress=False)


@pytest.mark.slow
def test_mixed_precision(config):
    """bf16 where asked for: the weights stay float32, the losses stay near."""
    config = override(config, steps=2, eval_interval=0)
    exact, mixed = (train(override(config, precision=p), progress=False) for p in ("fp32", "bf16"))
    assert {value.dtype for value in mixed.model.state_dict().values()} == {torch.float32}
    one, other = (trained.run.records()[0] for trained in (exact, mixed))
    assert one["total"] != other["total"]
    assert_close(other["cls"], one["cls"], rtol=0.02, atol=0)


# ---- around it


@pytest.mark.slow
def test_the_estimate_leaves_nothing_behind(config):
    seconds = estimate_seconds(config, open_data(config.data))
    assert 0 < seconds < 600
    assert not Run.of(config).folder.parent.exists()
    longer = estimate_seconds(override(config, steps=400, eval_interval=0), open_data(config.data))
    assert longer > 10 * seconds


def test_open_data(folder, monkeypatch):
    found = open_data(DataConfig(dataset=str(folder), train_split="val", val_split="test"))
    assert (found.train.split, len(found.train), found.val.split, len(found.val)) == ("val", 3, "test", 1)
    monkeypatch.setattr(scenes, "scenes_folder", lambda: folder)
    assert open_data(DataConfig()).train.root == folder
    held = open_data(DataConfig(dataset=str(folder), val_split="nightly"))
    assert held.held_out and len(held.train) + len(held.val) == 24


@pytest.mark.slow
def test_photographs_without_masks_are_trained_on(folder, config, tmp_path):
    """A folder per class: no mIoU anywhere, image-level scores everywhere."""
    own = VOCFolder(folder, "train")
    for i in range(6):
        target = tmp_path / "own" / own.class_names[1 + int(own.image_labels[i].argmax())] / f"{i}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(own.image(i)).save(target)
    found = train(override(config, dataset=str(tmp_path / "own"), out_dir=str(tmp_path)), progress=False)
    assert found.validation.n_masks == 0 and found.data.held_out
    metrics = found.run.metrics()
    assert {"map", "aux_map"} < set(metrics) and not [name for name in metrics if "miou" in name or "beta" in name]
    assert metrics["protocol"].endswith("no masks: no mIoU")
    assert trained_run(found.run.config(), progress=False).run.folder == found.run.folder


def test_a_batch_on_the_device(folder, model):
    source = open_train_val(folder).train
    (loaded,) = training_batches(source, crop_size=32, batch_size=2, seed=0, stop_step=1)
    ready = to_device(loaded, model, torch.device("cpu"))
    for name in ("images", "global_view", "local_image"):
        assert_close(model.denormalise(getattr(ready, name)), getattr(loaded, name).double() / 255, rtol=0, atol=1e-6)
    assert_close(ready.image_labels, loaded.image_labels)
    assert_close(ready.valid_box, loaded.valid_box)


def test_options_of_the_views(folder, model):
    source = open_train_val(folder).train

    def one(**changes):
        options = view_options(override(small_recipe(), scale_range=(0.3, 0.3), **changes), model)
        return next(training_batches(source, crop_size=64, batch_size=2, seed=0, **options))

    corner = (slice(None), slice(None), 0, 0)
    black, grey = one(), one(release=ReleaseBehaviour(black_padding=False))
    assert (black.images[corner] == 0).all() and (grey.images[corner] == 128).all()
    sharp = one(release=ReleaseBehaviour(always_blurred=False))
    assert (sharp.images != black.images).any()
    assert one(blur_sigma=(3.0, 3.0)).images.float().var() < black.images.float().var()
    independent = one(release=ReleaseBehaviour(independent_local_image=True))
    assert (independent.local_image != black.local_image).any()


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ToCoError, match="device = 'cuda:99' is not on this machine; there is .*cpu"):
        resolve_device("cuda:99")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(ToCoError, match=f"device = '{name}' is not on this machine; there is .*cpu"):
                resolve_device(name)
    with pytest.raises(ToCoError, match="device = 'tpu' is not on this machine"):
        resolve_device("tpu")


def test_a_numbered_gpu_becomes_the_current_one(monkeypatch):
    """And float32 convolutions are float32 there. No GPU is needed: what the driver would be told is looked at."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", told.append)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert resolve_device("cuda").index is None and told == []
    assert not torch.backends.cudnn.allow_tf32
    assert [resolve_device("cuda:2")] == told == [torch.device("cuda", 2)]


def test_precisions(monkeypatch):
    cpu = torch.device("cpu")
    assert resolve_precision("fp32", cpu) == "fp32" and resolve_precision("bf16", cpu) == "bf16"
    with pytest.raises(ToCoError, match="precision = 'fp16' is not allowed: one of auto, fp32, medium, bf16"):
        TrainConfig(precision="fp16")
    for instructions, wanted in ((True, "bf16"), (False, "fp32")):
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, name, lambda answer=instructions: answer, raising=False)
        assert resolve_precision("auto", cpu) == wanted


@pytest.mark.parametrize("precision", ["fp32", "medium", "bf16"])
@pytest.mark.parametrize("engines", [False, True])
def test_precision_contexts(model, monkeypatch, precision, engines):
    """Attention is plain in bf16; beside matrix engines fused without a gradient, as `F.scaled_dot_product_attention`
    is called."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: engines, raising=False)
    config, cpu, calls = override(small_recipe(), precision=precision), torch.device("cpu"), []
    with autocast_of(config, cpu)():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (torch.bfloat16 if precision == "bf16" else torch.float32)
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or fused(*a, **k))
    images, blocks, products = (
        torch.rand(1, 3, 32, 32).double(),
        len(model.encoder.blocks),
        torch.get_float32_matmul_precision(),
    )
    with attention_of(model, config, cpu):
        assert torch.get_float32_matmul_precision() == ("medium" if precision == "medium" else products)
        with_graph = model.encode(images)
        assert len(calls) == (0 if precision == "bf16" else blocks)
        calls.clear()
        with torch.no_grad():
            without = model.encode(images)
        assert len(calls) == (0 if precision == "bf16" and not engines else blocks)
        assert_close(with_graph.patch_tokens, without.patch_tokens)
        assert len(model.attention(images)) == blocks  # which needs the matrices, and takes them
    calls.clear()
    model.encode(images)
    assert len(calls) == blocks
    assert torch.get_float32_matmul_precision() == products
