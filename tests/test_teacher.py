"""The teacher of the whole network: a moving average of all weights, whose CAMs make the labels."""

import pytest
import torch
from reference_losses import ctc_loss
from small_config import few_scenes, small_recipe, stir
from torch.testing import assert_close

import toco_core.train.teacher as teaching
from toco_core import crops
from toco_core.cam import multi_scale_cam
from toco_core.config import override
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.objective import Step, StepInput, objective
from toco_core.runs.opened import open_run
from toco_core.train.failures import load_failure, replay
from toco_core.train.loop import train
from toco_core.train.optimizer import build_training

MOMENTUM = 0.7
BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=15, n_train=5, n_val=2, n_test=1)


def small(out_dir, **changes):
    sizes = {"crop_size": 64, "local_size": 32, "batch_size": 2, "n_local": 2, "seed": 4, "precision": "fp32"}
    sizes |= {"proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10, "decoder_width": 14, "layer": 2}
    stages = {"warmup_steps": 1, "ptc_start": 0, "ctc_start": 0, "seg_start": 1, "energy_start": 1, "eval_interval": 0}
    network = {"backbone": BACKBONE, "pretrained": False, "cam_scales": (1.0,), "steps": 4, "lr": 0.01}
    whole = sizes | stages | network | {"teacher_momentum": MOMENTUM, "device": "cpu", "out_dir": str(out_dir)}
    return override(small_recipe(), **whole | changes)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    return train(small(tmp_path_factory.mktemp("runs")), data=data, progress=False, keep_every=1).run


def test_the_teacher_is_the_average_of_all_weights(run, data):
    start, _ = build_training(run.config(), data.train.n_classes, torch.device("cpu"))
    average = {name: value.double().flatten().tolist() for name, value in start.state_dict().items()}
    moved = 0.0
    for step in range(1, 5):
        state = run.load(str(step))
        for name, weights in state["model"].items():
            for i, weight in enumerate(weights.double().flatten().tolist()):
                average[name][i] = MOMENTUM * average[name][i] + (1 - MOMENTUM) * weight
            found = state["teacher"][name].double().flatten()
            assert_close(found, torch.tensor(average[name], dtype=torch.float64), rtol=1e-5, atol=1e-6)
            moved = max(moved, float((state["teacher"][name] - weights).abs().max()))
    assert moved > 0.01  # it is another network than the student


def test_a_resumed_run_equals_the_uninterrupted_one(run, data, tmp_path):
    def stop(record):
        if record["step"] == 1:
            raise KeyboardInterrupt

    config = small(tmp_path, log_interval=1)
    with pytest.raises(KeyboardInterrupt):
        train(config, data=data, progress=False, on_record=stop)
    resumed = train(config, data=data, progress=False).run
    assert 0 < resumed.load()["step"] == run.load()["step"] == 4
    for part in ("model", "teacher"):
        wanted, found = run.load()[part], resumed.load()[part]
        assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_a_checkpoint_without_its_teacher_is_refused(data, tmp_path):
    config = small(tmp_path, steps=2)
    run = train(config, data=data, progress=False, keep_every=1).run
    state = run.load("1")
    del state["teacher"]
    torch.save(state, run.folder / "checkpoint.pt")
    (run.folder / "result.json").unlink(missing_ok=True)
    with pytest.raises(ToCoError, match="the checkpoint has no teacher, which"):
        train(config, data=data, progress=False)


def test_the_teacher_is_opened(run, data):
    student, teacher = (open_run(run.folder, data=data, device="cpu", teacher=t).model for t in (False, True))
    state = run.load()
    assert torch.equal(teacher.classifier.weight, state["teacher"]["classifier.weight"])
    assert torch.equal(student.classifier.weight, state["model"]["classifier.weight"])


def test_off_costs_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(teaching, "AveragedModel", pytest.fail)
    encoded, encode = [], ToCo.encode
    monkeypatch.setattr(ToCo, "encode", lambda *args, **options: encoded.append(1) or encode(*args, **options))
    config = small(tmp_path, teacher_momentum=0.0, steps=1)
    run = train(config, data=data, progress=False).run
    assert "teacher" not in run.load() and "teacher_momentum" not in config.schedule.without_later_defaults()
    with pytest.raises(ToCoError, match="has no teacher: its teacher_momentum is 0.0"):
        open_run(run.folder, data=data, device="cpu", teacher=True)


# ---- in a step


def networks(config, k=3):
    found = [ToCo(config.model, k), ToCo(config.model, k)]
    for seed, model in enumerate(found, 1):
        torch.manual_seed(seed)
        stir(model, 0.3)
    return found


def step_input(k=3, b=2, side=64):
    generator = torch.Generator().manual_seed(2)
    views = [torch.randn(b, 3, side, side, generator=generator) for _ in range(3)]
    labels = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    return StepInput(*views, labels, torch.tensor([[0, side, 0, side]] * b))


def test_labels_are_the_teachers_and_gradients_the_students(tmp_path):
    config, batch = small(tmp_path), step_input()
    student, teacher = networks(config)
    teacher.requires_grad_(False)
    step = Step(student, batch, config, 3, teacher=teacher, generator=torch.Generator().manual_seed(0))
    alone = Step(student, batch, config, 3, generator=torch.Generator().manual_seed(0))
    wanted = multi_scale_cam(teacher, batch.images, scales=(1.0,), image_labels=batch.image_labels)
    assert_close(step.cams.aux_cam, wanted.aux_cam)
    assert_close(step.cams.cam, wanted.cam)
    assert (step.pseudo_label != alone.pseudo_label).any() and (step.token_label != alone.token_label).any()
    objective(step).total.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert student.encoder.blocks[0].mlp.fc1.weight.grad.abs().max() > 0


def test_ctc_with_the_whole_teacher(tmp_path):
    config, batch = small(tmp_path, ctc_whole_teacher=True), step_input()
    student, teacher = networks(config)
    boxes = crops.CropBoxes(torch.tensor([[0, 8], [16, 32]]), torch.tensor([[4, 20], [9, 30]]))
    step = Step(student, batch, config, 3, teacher=teacher, boxes=boxes)
    found = objective(step).terms["ctc"]
    local = crops.local_views(batch.local_image, boxes, 32).flatten(0, 1)
    with torch.no_grad():
        tokens = [student.encode(view).class_token for view in (batch.images, batch.global_view)]
        locals_ = student.encode(local).class_token.unflatten(0, (2, 2))
        ours = student.proj_head(torch.cat([torch.stack(tokens, 1), locals_], 1))
        seen = [teacher.encode(view).class_token for view in (batch.images, batch.global_view)]
        theirs = teacher.proj_head(torch.stack(seen, 1))
    wanted = ctc_loss(ours, theirs, step.is_positive, temperature=config.loss.temperature)
    assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    head = Step(student, batch, override(config, ctc_whole_teacher=False), 3, teacher=teacher, boxes=boxes)
    assert (objective(head).terms["ctc"] - found).abs() > 1e-4


def test_ctc_with_the_whole_teacher_needs_one():
    with pytest.raises(ToCoError, match="ctc_whole_teacher = True with teacher_momentum = 0 is not allowed"):
        override(small_recipe(), ctc_whole_teacher=True)


def test_a_failed_step_keeps_its_teacher(data, tmp_path, monkeypatch):
    config = small(tmp_path, steps=3)
    step_of = torch.optim.AdamW.step

    def breaks(self, *args, **options):
        found = step_of(self, *args, **options)
        self.param_groups[0]["params"][0].data.fill_(float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", breaks)
        with pytest.raises(ToCoError, match="is nan on step 1"):
            train(config, data=data, progress=False)
    (folder,) = tmp_path.iterdir()
    failure = load_failure(folder)
    assert failure.teacher is not None and not failure.teacher.training
    assert replay(failure).step.teacher is failure.teacher
