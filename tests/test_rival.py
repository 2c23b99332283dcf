"""The rival: a second network that learns beside the first, each decoder from the other's pseudo label."""

import gc
import math
import weakref

import pytest
import torch
from small_config import few_scenes, small_recipe, stir
from torch.testing import assert_close

import toco_core.train.loop as training
from toco_core import losses
from toco_core.config import override, tiny
from toco_core.errors import ToCoError
from toco_core.machine import distributed
from toco_core.machine.distributed import ALONE
from toco_core.methods.discrepancy import discrepancy_loss
from toco_core.model import ToCo
from toco_core.objective import PAPER, TERMS, Step, StepInput, objective
from toco_core.train import rival as rivals
from toco_core.train.backward import backward, crop_generator
from toco_core.train.budget import estimate_seconds, step_memory
from toco_core.train.failures import load_failure, replay
from toco_core.train.kept_tokens import KeptTokens
from toco_core.train.loop import train
from toco_core.train.optimizer import build_training
from toco_core.train.rival import build_rival, of_both, oppose

BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
CPU = torch.device("cpu")
K, B = 3, 4


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=16, n_train=5, n_val=2, n_test=1)


def small(out_dir="unused", **changes):
    sizes = {"crop_size": 64, "local_size": 32, "batch_size": 2, "n_local": 2, "seed": 4, "precision": "fp32"}
    sizes |= {"proj_hidden": 24, "proj_bottleneck": 12, "proj_dim": 10, "decoder_width": 14, "layer": 2}
    stages = {"warmup_steps": 1, "ptc_start": 0, "ctc_start": 0, "seg_start": 1, "energy_start": 1, "eval_interval": 0}
    network = {"backbone": BACKBONE, "pretrained": False, "cam_scales": (1.0,), "steps": 4, "lr": 0.01}
    whole = sizes | stages | network | {"discrepancy": 0.1, "device": "cpu", "out_dir": str(out_dir)}
    return override(small_recipe(), **whole | changes)


# ---- the loss


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_discrepancy(f, g):
    total, n = 0.0, 0
    for images in zip(f.tolist(), g.tolist(), strict=True):
        for one, other in zip(*images, strict=True):
            product = sum(x * y for x, y in zip(one, other, strict=True))
            total += product / math.sqrt(sum(x * x for x in one)) / math.sqrt(sum(y * y for y in other))
            n += 1
    return 1 + total / n


def test_discrepancy_equals_its_equation():
    f, g = drawn(2, 5, 3, seed=0).requires_grad_(), drawn(2, 5, 3, seed=1).requires_grad_()
    loss = discrepancy_loss(f, g)
    assert loss.item() == pytest.approx(slow_discrepancy(f.detach(), g.detach()), rel=1e-9)
    loss.backward()
    assert g.grad is None and torch.autograd.gradcheck(lambda x: discrepancy_loss(x, g), f)
    step, moved = 1e-6, f.detach().clone()
    moved[1, 3, 2] += step
    slope = (slow_discrepancy(moved, g.detach()) - slow_discrepancy(f.detach(), g.detach())) / step
    assert float(f.grad[1, 3, 2]) == pytest.approx(slope, abs=1e-5)


def test_discrepancy_runs_from_opposite_to_parallel():
    f = drawn(2, 5, 3, seed=2).requires_grad_()
    parallel = discrepancy_loss(f, 3 * f)
    assert parallel.item() == pytest.approx(2) and discrepancy_loss(f, -0.5 * f).item() == pytest.approx(0, abs=1e-9)
    parallel.backward()
    assert_close(f.grad, torch.zeros_like(f), rtol=0, atol=1e-9)  # two equal networks are not parted by it


# ---- in a step


def networks(config):
    """Far from their start and from each other, in float64; decoders are sure of some pixels."""
    found = [ToCo(config.model, K).double(), ToCo(config.model, K).double()]
    for seed, model in enumerate(found, 1):
        torch.manual_seed(seed)
        stir(model, 0.2)
        model.decoder.conv8.weight.data *= 30
    return found


def step_input():
    """Four images that differ in how much of them is real, as in test_distributed.py."""
    generator = torch.Generator().manual_seed(1)
    views = [torch.randn(B, 3, 32, 48, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.tensor([[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    return StepInput(*views, labels, torch.tensor([[0, 32, 0, 48], [3, 30, 6, 41], [8, 17, 9, 30], [0, 32, 20, 48]]))


ALL = {"cls": 1.0, "aux_cls": 0.9, "ptc": 0.2, "ctc": 0.5, "seg": 0.1, "energy": 0.05, "exchange": 0.4}
ALL |= {"consistency": 0.3, "discrepancy": 0.6}


def in_step(**changes):
    return small(crop_size=32, local_size=16, batch_size=B, beta_l=0.35, beta_h=0.6, **changes)


def both_steps(config, weights):
    """A step and its rival's; both networks."""
    first, second = networks(config)
    step = Step(first, step_input(), config, 5, weights=weights, generator=torch.Generator().manual_seed(0))
    oppose([step], second)
    return step, step.rival, first, second


def gradients(*models):
    return [{name: p.grad for name, p in model.named_parameters() if p.grad is not None} for model in models]


def test_each_decoder_learns_from_the_others_label():
    step, other, *_ = both_steps(in_step(), {"seg": 1.0})
    found = objective(step).terms["seg"], objective(other).terms["seg"]
    assert (step.pseudo_label != other.pseudo_label).any()
    for value, one, label in zip(found, (step, other), (other.pseudo_label, step.pseudo_label), strict=True):
        assert_close(value, losses.segmentation_loss(one.seg_logits, label))
        own = losses.segmentation_loss(one.seg_logits, one.pseudo_label)
        assert abs((value - own).item()) > 1e-3


def test_all_other_terms_are_of_one_network():
    """A rival changes none of them, nor where views are cut; and its own are what it would find alone."""
    weights = {name: weight for name, weight in ALL.items() if name not in ("seg", "discrepancy")}
    config = override(in_step(), exchange=0.4, exchange_start=1, consistency=0.3)
    step, other, first, second = both_steps(config, weights)
    for one, model in ((step, first), (other, second)):
        found = objective(one)
        generator = torch.Generator().manual_seed(0)
        alone = objective(Step(model, step_input(), config, 5, weights=weights, generator=generator))
        assert_close(found.terms, alone.terms, rtol=0, atol=0)
        assert all(found.terms[name] != 0 for name in weights)


def test_discrepancy_of_a_step():
    step, other, first, second = both_steps(in_step(), {"discrepancy": 1.0})
    found, others = objective(step), objective(other)
    wanted = slow_discrepancy(*(one.tokens.patch_tokens.detach() for one in (step, other)))
    assert float(found.total) == pytest.approx(wanted, rel=1e-5) == float(others.total)
    assert found.total.dtype == torch.float32 and set(found.terms) == {*PAPER, "discrepancy"}
    found.total.backward()
    own, none = gradients(first, second)
    assert own["encoder.blocks.0.mlp.fc1.weight"].abs().max() > 0 and not none
    others.total.backward()
    assert gradients(second)[0]["encoder.blocks.0.mlp.fc1.weight"].abs().max() > 0


def test_both_networks_get_the_gradient_of_their_own_total():
    step, other, first, second = both_steps(in_step(), ALL)
    objective(step).total.backward(retain_graph=True)
    (alone,) = gradients(first)
    assert gradients(second) == [{}]
    objective(other).total.backward()
    wanted = [{name: g.clone() for name, g in alone.items()}, gradients(second)[0]]
    step, other, first, second = both_steps(in_step(), ALL)
    found = of_both(step)
    found.total.backward()
    assert_close(gradients(first, second), wanted)
    assert float(found.total) == pytest.approx(sum(ALL[name] * float(v) for name, v in found.terms.items() if v), 1e-6)


def test_a_rival_that_is_not_finite_is_noticed():
    step, _, _, second = both_steps(in_step(), {"cls": 1.0})
    second.classifier.weight.data.fill_(math.inf)
    found = of_both(step)
    assert torch.isfinite(found.terms["cls"]) and torch.isnan(found.total)


def test_a_step_without_a_rival_is_refused():
    config = in_step()
    with pytest.raises(ToCoError, match="the term discrepancy in a step without a rival is not allowed: two networks"):
        objective(Step(networks(config)[0], step_input(), config, 5, weights={"discrepancy": 1.0}))


def one_step(config, share=ALONE):
    """Terms of the whole batch and gradients of both networks after a step's backward pass."""
    (first, second), part = networks(config), share.part(B)
    batch = StepInput(*(value[part] for value in step_input()))
    options = {"weights": ALL, "generator": crop_generator(config, 20, part.start), "share": share}
    compute = distributed.shared_step(of_both, torch.nn.ModuleList([first, second]), share)
    result = backward(compute, first, batch, config, 20, rival=second, **options)
    terms = {"total": result.total, **result.terms}
    return {name: share.mean(value.detach()) for name, value in terms.items()}, gradients(first, second)


def assert_same_step(found, wanted):
    assert_close(found[0], wanted[0], rtol=1e-6, atol=1e-9)
    for network, gradient in zip(found[1], wanted[1], strict=True):
        assert network.keys() == gradient.keys()
        for name, value in gradient.items():
            assert_close(network[name], value, rtol=1e-5, atol=1e-6 * float(value.abs().max()), msg=name)


@pytest.mark.parametrize("parts", [2, 4])
def test_parts_one_after_the_other_are_the_whole(parts):
    config = in_step(exchange=0.4, exchange_start=1, consistency=0.3)
    wanted = one_step(config)
    assert_same_step(one_step(override(config, accumulate=parts)), wanted)
    assert all(value != 0 for value in wanted[0].values())


def in_one_of_two(rank, meeting, folder):
    torch.set_num_threads(1)
    with distributed.joined("cpu", init_method=meeting, rank=rank, world_size=2) as share:
        config = in_step(exchange=0.4, exchange_start=1, consistency=0.3)
        found = [one_step(override(config, accumulate=n), share) for n in (1, 2)]
        torch.save(found, f"{folder}/{rank}.pt")


@pytest.mark.slow
def test_two_processes_are_the_whole(tmp_path):
    """Each with its two images at once, and with one after the other."""
    arguments = ((tmp_path / "store").as_uri(), str(tmp_path))
    torch.multiprocessing.start_processes(in_one_of_two, arguments, nprocs=2, start_method="spawn")
    wanted = one_step(in_step(exchange=0.4, exchange_start=1, consistency=0.3))
    for rank in range(2):
        for found in torch.load(tmp_path / f"{rank}.pt"):
            assert_same_step(found, wanted)


def test_a_step_leaves_nothing_in_memory():
    """Steps that hold each other would wait for the garbage collector, with their graphs."""
    config, seen = in_step(), []

    def watched(step):
        seen.extend(map(weakref.ref, (step, step.rival)))
        return of_both(step)

    first, second = networks(config)
    gc.disable()
    try:
        backward(watched, first, step_input(), config, 20, rival=second, generator=crop_generator(config, 20))
        assert len(seen) == 2 and not any(one() for one in seen)
    finally:
        gc.enable()


# ---- a training


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    config = small(tmp_path_factory.mktemp("runs"), log_interval=1)
    return train(config, data=data, progress=False, keep_every=1).run


def test_both_begin_with_one_encoder_and_other_heads():
    config = small(frozen_blocks=1)
    model, _ = build_training(config, K, CPU)
    rival = build_rival(model, config)
    assert rival.training and {n for n, p in rival.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    other = rival.state_dict()
    same = {name for name, value in model.state_dict().items() if torch.equal(value, other[name])}
    assert {name for name in other if name.startswith("encoder.")} <= same
    assert {"classifier.weight", "aux_classifier.weight", "decoder.conv8.weight"}.isdisjoint(same)
    assert_close(rival.proj_head.state_dict(), rival.proj_head_ema.state_dict(), rtol=0, atol=0)


def slow_training(config, data, batches):
    """Two networks and an optimizer for each, two steps that hold each other, a total for each."""
    model, optimizer = build_training(config, data.train.n_classes, CPU, fused=True)
    rival = build_rival(model, config)
    names = [[name for name, p in m.named_parameters() if p.requires_grad] for m in (model, rival)]
    heads = ("classifier", "aux_classifier", "proj_head", "decoder")
    second = torch.optim.AdamW(
        [
            {"params": [p for n, p in rival.named_parameters() if p.requires_grad and n.startswith(heads) == is_head]}
            for is_head in (False, True)
        ],
        lr=0.0, betas=config.schedule.betas, weight_decay=config.schedule.weight_decay, fused=True,
    )  # fmt: skip
    assert names[0] == names[1]
    for number, batch in enumerate(batches):
        training.set_rates(optimizer, config, number)
        rate = {group["name"]: group["lr"] for group in optimizer.param_groups}
        for group, name in zip(second.param_groups, ("encoder", "heads"), strict=True):
            group["lr"] = rate[name]
        for network in (model, rival):
            network.update_ema(config.schedule.momentum)
            network.zero_grad()
        steps = [Step(m, batch, config, number, generator=crop_generator(config, number)) for m in (model, rival)]
        steps[0].rival, steps[1].rival = steps[1], steps[0]
        sum(objective(step).total for step in steps).backward()
        optimizer.step()
        second.step()
    return model.state_dict(), rival.state_dict()


def test_a_training_equals_a_slow_one(run, data, monkeypatch, tmp_path):
    config, batches = run.config(), []
    plain = training.to_device
    monkeypatch.setattr(training, "to_device", lambda *args: batches.append(plain(*args)) or batches[-1])
    again = train(override(config, out_dir=str(tmp_path)), data=data, progress=False).run
    found = again.load()
    for name, wanted in zip(("model", "rival"), slow_training(config, data, batches), strict=True):
        assert_close(found[name], wanted, rtol=1e-4, atol=1e-5)
    weight = "encoder.blocks.2.mlp.fc1.weight"
    assert (
        len({float(state[name][weight].sum()) for state in (run.load("1"), found) for name in ("model", "rival")}) == 4
    )


def test_a_resumed_run_equals_the_uninterrupted_one(run, data, tmp_path):
    def stop(record):
        if record["step"] == 1:
            raise KeyboardInterrupt

    config = override(run.config(), out_dir=str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        train(config, data=data, progress=False, on_record=stop)
    resumed = train(config, data=data, progress=False).run
    wanted, found = run.load(), resumed.load()
    assert wanted["step"] == found["step"] == 4
    for part in ("model", "rival"):
        assert wanted[part].keys() == found[part].keys()
        assert all(torch.equal(wanted[part][name], found[part][name]) for name in wanted[part])
    numbers = wanted["optimizer"]["state"], found["optimizer"]["state"]
    n = sum(p.requires_grad for p in ToCo(config.model, data.train.n_classes).parameters())
    assert len(numbers[0]) == 2 * n
    assert_close(*numbers, rtol=0, atol=0)
    assert [r for r in run.records() if "cls" in r] == [r for r in resumed.records() if "cls" in r]


def test_records_and_scores_are_the_first_ones(run, data):
    for record in (found := [r for r in run.records() if "cls" in r]):
        weights = {name: term.at(name, run.config(), record["step"]) for name, term in TERMS.items()}
        total = sum(weight * record[name] for name, weight in weights.items() if weight)
        assert record["total"] == pytest.approx(total, rel=1e-5)
    parted = [record["discrepancy"] for record in found]
    assert parted[0] == pytest.approx(2) and len(parted) == 4  # one encoder, until the heads have moved it
    assert 0 < parted[-1] < parted[-2] < 1.99


def test_a_checkpoint_without_its_rival_is_refused(data, tmp_path):
    run = train(small(tmp_path, steps=2), data=data, progress=False, keep_every=1).run
    state = run.load("1")
    del state["rival"]
    torch.save(state, run.folder / "checkpoint.pt")
    (run.folder / "result.json").unlink(missing_ok=True)
    with pytest.raises(ToCoError, match="the checkpoint has no rival, which this config's discrepancy asks for"):
        train(run.config(), data=data, progress=False)


def test_off_costs_nothing(data, tmp_path, monkeypatch):
    monkeypatch.setattr(rivals, "build_model", pytest.fail)
    config = small(tmp_path, discrepancy=0.0, steps=1)
    run = train(config, data=data, progress=False).run
    assert "rival" not in run.load() and not {"discrepancy", "discrepancy_start"} & {*run.records()[0]}
    assert not {"discrepancy", "discrepancy_start"} & {*config.loss.without_later_defaults()}


def test_a_rival_and_a_teacher_are_refused():
    with pytest.raises(ToCoError, match="discrepancy = 0.1 with teacher_momentum = 0.9 is not allowed: one of them"):
        override(tiny(), discrepancy=0.1, teacher_momentum=0.9)


def test_kept_tokens_and_the_warm_start_are_shared(data, tmp_path):
    """The frozen blocks say the same to both; the rival's classifiers are fitted by other draws."""
    frozen = {"frozen_blocks": 1, "views_per_image": 2, "warm_start_steps": 3, "ctc": 0.0, "steps": 3}
    alone, both = KeptTokens(), KeptTokens()
    train(small(tmp_path, discrepancy=0.0, **frozen), data=data, progress=False, kept=alone)
    train(small(tmp_path, **frozen), data=data, progress=False, kept=both)
    assert both.computed == alone.computed > 0 and both.found > alone.found


def test_a_failed_step_keeps_its_rival(data, tmp_path, monkeypatch):
    """The rival alone breaks; the step comes back with it, and without it where the config has none."""
    plain, moved = torch.optim.AdamW.step, []

    def breaks(self, *args, **options):
        found = plain(self, *args, **options)
        moved.append(len(self.param_groups))
        self.param_groups[-1]["params"][0].data.fill_(float("nan"))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", breaks)
        with pytest.raises(ToCoError, match="the loss is nan on step 1"):
            train(small(tmp_path), data=data, progress=False)
    (folder,) = tmp_path.iterdir()
    failure = load_failure(folder)
    assert moved == [4] and failure.rival.training and failure.teacher is None
    found = replay(failure)
    assert found.step.rival.model is failure.rival and torch.isnan(found.objective.total)
    alone = replay(failure, config=override(failure.config, discrepancy=0.0))
    assert alone.step.rival is None and torch.isfinite(alone.objective.total)


def test_what_it_costs_is_estimated(data):
    """Twice the parameters, and about twice of what a step holds."""
    config = small(energy=0.0, device="cpu")
    one, two = (step_memory(override(config, discrepancy=w), data) for w in (0.0, 0.1))
    assert (two.gradients, two.fixed) == (2 * one.gradients, 2 * one.fixed)
    assert 1.6 < two.step / one.step < 2.4
    assert estimate_seconds(override(config, warm_start_steps=2), data) > 0


def test_the_run_is_named_by_it():
    assert override(tiny(), discrepancy=0.1).short_hash() != tiny().short_hash()
    assert override(tiny(), discrepancy=0.0, discrepancy_start=0).short_hash() == tiny().short_hash()
