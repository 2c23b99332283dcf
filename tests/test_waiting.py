"""A training step never waits for its device: every kernel can be queued without knowing what the ones before gave.

The step runs on the device `meta`, whose tensors have no values: looking at one, copying it to the host, or an output
whose size depends on it (nonzero, a mask as an index) ends in an error there, as it would end in a wait on a GPU.
"""

import pytest
import torch
from small_config import small_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from toco_core import objective as objectives
from toco_core.cam import multi_scale_cam
from toco_core.config import ReleaseBehaviour, TrainConfig, override
from toco_core.data import Batch
from toco_core.errors import ToCoError
from toco_core.lattice import energy_lattices
from toco_core.machine import device as float64
from toco_core.model import ToCo
from toco_core.objective import TERMS, Step, objective
from toco_core.train.backward import backward
from toco_core.train.batches import to_device
from toco_core.train.failures import gradient_length

B, K, SIZE, LATE = 3, 4, 48, 10**6
BACKBONE = "plain_vit(image=32, patch=8, width=32, depth=3, heads=2, mlp=64)"
META = torch.device("meta")


def meta_knows_weight_norm() -> bool:
    """PyTorch 2.6 computes what is behind the last layer of CTC's head with numbers only."""
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3, device=META))
    try:
        layer(torch.zeros(1, 2, device=META)).sum().backward()
    except NotImplementedError:
        return False
    return True


whole_step = pytest.mark.skipif(not meta_knows_weight_norm(), reason="this PyTorch has no weight norm without numbers")


class Waits(TorchDispatchMode):
    """Notes what `meta` itself lets pass but a GPU's host waits for: copies from the host that are not queued, and
    several values put where a mask says."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.ops.aten._to_copy.default:
            if args[0].device != result.device and not kwargs.get("non_blocking"):
                self.found.append(f"a copy of {tuple(args[0].shape)} from {args[0].device} to {result.device}")
        if func is torch.ops.aten.copy_.default and args[0].device != args[1].device:
            if not (len(args) > 2 and args[2] or kwargs.get("non_blocking")):
                self.found.append(f"a copy of {tuple(args[1].shape)} into {tuple(args[0].shape)}")
        if func is torch.ops.aten.index_put_.default and args[2].numel() > 1:
            if any(index is not None and index.dtype == torch.bool for index in args[1]):
                self.found.append("several values put where a mask says")
        return result


def config_of(**changes) -> TrainConfig:
    small = {"backbone": BACKBONE, "pretrained": False, "layer": 2, "crop_size": SIZE, "n_local": 3, "local_size": 16}
    small |= {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7, "seg_start": 0}
    return override(small_recipe(), **small, **changes)


def on_meta(config: TrainConfig, row=(1.0, 0.0, 1.0, 0.0)):
    """A model and a batch there; the third image has no class."""
    model = ToCo(config.model, K, dropped_border=config.release.dropped_border).to(META)
    views = [torch.zeros(B, 3, SIZE, SIZE, dtype=torch.uint8) for _ in range(3)]
    image_labels = torch.tensor([row, [1.0, 1, 1, 0], [0, 0, 0, 0]])
    box = torch.tensor([[0, SIZE, 0, SIZE], [3, 40, 6, 41], [0, 48, 0, 30]])
    return model, to_device(Batch(("a", "b", "c"), *views, image_labels, box), model, META)


@pytest.fixture(autouse=True)
def autocast_on_meta(monkeypatch):
    """Autocast does not know the device: there the CPU's stands for it."""
    plain = torch.autocast
    monkeypatch.setattr(
        torch, "autocast", lambda device, *a, **k: plain("cpu" if device == "meta" else device, *a, **k)
    )


def waits_of(config: TrainConfig) -> list[str]:
    """Of a late step, forward and backward, with all that follows up to the question whether it may count."""
    model, batch = on_meta(config)
    weights, generator = objectives.term_weights(config, LATE), torch.Generator().manual_seed(0)
    steps = []

    def watched(step):
        steps.append(step)
        return objective(step)

    with Waits() as waits:
        result = backward(watched, model, batch, config, LATE, generator=generator)
        gradient_length(model)
        model.update_ema(0.9)
    assert {result.terms[name].device.type for name in TERMS if weights.get(name, 0) > 0} == {"meta"}
    assert all({"token_label", "is_positive", "pseudo_label"} <= set(vars(step)) for step in steps)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return waits.found


@pytest.mark.slow
@whole_step
@pytest.mark.parametrize("release", [ReleaseBehaviour(), ReleaseBehaviour.release_exact()], ids=["ours", "release"])
def test_a_step_waits_for_nothing(release):
    """All terms but the dense energy."""
    assert waits_of(override(config_of(energy=0.0), release=release)) == []


@pytest.mark.slow
@whole_step
def test_a_step_in_parts_waits_for_nothing():
    assert waits_of(config_of(energy=0.0, batch_size=B, accumulate=B)) == []


@pytest.mark.slow
@whole_step
def test_the_dense_energy_waits_for_its_lattices_only(monkeypatch):
    """How many vertices a lattice has depends on the image."""
    config = config_of()
    assert objectives.term_weights(config, LATE)["energy"] > 0
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        waits_of(config)
    made = [lattice.to(META) for lattice in energy_lattices(torch.rand(B, 3, SIZE, SIZE), together=True)]
    monkeypatch.setattr(objectives, "energy_lattices", lambda *args, **kwargs: made)
    assert waits_of(config) == []


@pytest.mark.slow
def test_the_lattices_come_first(monkeypatch):
    """Where a device has nothing to do yet there is little to wait for."""
    queued, encode = [], ToCo.encode
    monkeypatch.setattr(
        ToCo, "encode", lambda model, images, **how: queued.append("encoder") or encode(model, images, **how)
    )
    monkeypatch.setattr(objectives, "energy_lattices", lambda images: queued.append("lattices") or [])
    with pytest.raises(ToCoError, match="lattices has 0 entries"):
        waits_of(config_of())
    assert queued[0] == "lattices" and queued.count("lattices") == 1


def test_what_waits_is_seen():
    """Labels on the device, a look at a value, a copy, a mask as an index."""
    config = config_of(energy=0.0)
    model, batch = on_meta(config)
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        multi_scale_cam(model, batch.images, image_labels=batch.image_labels.to(META))
    with Waits() as waits:
        torch.ones(3).to(META, non_blocking=True)
        x = torch.zeros(3, device=META)
        x[x > 0] = 1.0
        assert waits.found == []
        torch.ones(3).to(META)
        x[x > 0] = x
        x.copy_(torch.ones(3))
    assert len(waits.found) == 3


class Doubles(TorchDispatchMode):
    """Notes every float64 tensor on `meta`."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == META and tensor.dtype == torch.float64:
                self.found += 1
        return result


@pytest.mark.slow
@whole_step
def test_a_device_without_float64_can_train(monkeypatch):
    """As on Apple's MPS. All terms but the dense energy, which `meta` has no lattice for."""
    config = config_of(energy=0.0)
    model, batch = on_meta(config)
    generator = torch.Generator().manual_seed(0)
    found = []
    for lacking in ((), ("meta",)):
        monkeypatch.setattr(float64, "WITHOUT_FLOAT64", lacking)
        with Doubles() as doubles:
            objective(Step(model, batch, config, LATE, generator=generator)).total.backward()
        found.append(doubles.found)
    assert found[0] > 0
    assert found[1] == 0
