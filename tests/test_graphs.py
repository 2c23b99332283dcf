"""Replayed blocks give what blocks give. On a CPU, where there are no CUDA graphs, a recording does its work again into
the memory of the first time: what it computes is then checked, but not that a GPU can record it."""

import contextlib

import pytest
import torch

from toco_core.config import ModelConfig, override, tiny
from toco_core.machine import graphs
from toco_core.model import ToCo
from toco_core.train.backward import recorded_blocks


@pytest.fixture
def device(monkeypatch):
    """A GPU where there is one; else the CPU, with recordings that repeat their work."""
    if torch.cuda.is_available():
        return torch.device("cuda")

    def captured(work, pool):
        results, graph = work(), torch.is_grad_enabled()

        def again():
            with torch.set_grad_enabled(graph):
                found = work()
            for old, new in zip(results, found, strict=True):
                old.copy_(new)

        return again, results

    monkeypatch.setattr(graphs, "captured", captured)
    monkeypatch.setattr(graphs, "new_pool", lambda: None)
    monkeypatch.setattr(graphs, "side_stream", contextlib.nullcontext)
    return torch.device("cpu")


def model_on(device, layer: int = 3) -> ToCo:
    torch.manual_seed(5)
    config = ModelConfig(backbone="plain_vit(image=32, patch=8, width=24, depth=4, heads=2, mlp=40)", layer=layer,
                         pretrained=False, proj_hidden=8, proj_bottleneck=6, proj_dim=5)  # fmt: skip
    return ToCo(config, 2).to(device).train()


def three_steps(model: ToCo, *, replayed: bool, bf16: bool = False) -> list[dict[str, torch.Tensor]]:
    """Losses and gradients of steps with two views of one size, a smaller one, and passes without a gradient."""
    device = model.mean.device
    if replayed:
        model.graphs = graphs.BlockGraphs(model.encoder.blocks)
    optimizer, generator, found = torch.optim.SGD(model.parameters(), lr=0.5), torch.Generator().manual_seed(7), []
    for _ in range(3):
        views = [torch.rand(n, 3, *size, generator=generator).to(device)
                 for n, size in ((3, (32, 40)), (3, (32, 40)), (5, (16, 24)))]  # fmt: skip
        if replayed:
            model.graphs.begin_step()
        tokens = []
        for view in views:  # one context each: within one, weights are rounded once, and their gradients added rounded
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                tokens.append(model.encode(view))
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            without = [model.encode(view.flip(-1)) for view in views[1:]]
        loss = sum((number + 1) * t.patch_tokens.float().square().mean() for number, t in enumerate(tokens))
        loss = loss + tokens[0].aux_patch_tokens.float().mean() + tokens[2].class_token.float()[:, 3].mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        values = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        values |= {f"without {number}": t.class_token.clone() for number, t in enumerate(without)}
        found.append(values | {"loss": loss.detach(), "aux": tokens[1].aux_patch_tokens.detach().clone()})
        optimizer.step()
    return found


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize(("layer", "frozen"), [(3, 0), (4, 0), (3, 2), (2, 3)])
def test_replayed_blocks_give_what_blocks_give(device, layer, frozen, bf16):
    models = [model_on(device, layer) for _ in range(2)]
    for model in models:
        model.freeze_blocks(frozen)
    eager, replayed = (
        three_steps(models[0], replayed=False, bf16=bf16),
        three_steps(models[1], replayed=True, bf16=bf16),
    )
    assert not torch.equal(eager[0]["loss"], eager[2]["loss"])
    for one, other in zip(eager, replayed, strict=True):
        assert set(one) == set(other)
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    kinds = [kind for kind, _ in models[1].graphs._recorded]
    assert len(kinds) == 5 and len(set(kinds)) == 4  # two views of one size have a recording each


def test_only_a_gpu_records_and_only_in_training(device):
    model = model_on(device)
    with model.recorded_blocks():
        assert (model.graphs is None) == (device.type == "cpu")
        model.graphs = graphs.BlockGraphs(model.encoder.blocks)
        images = torch.rand(2, 3, 32, 32, device=device)
        with model.evaluating():
            model.encode(images)
        model.encode(images, attend=(2,))
        assert not model.graphs._recorded
        model.encode(images)
        assert len(model.graphs._recorded) == 1
    assert model.graphs is None


def test_only_whole_batches_of_one_process_are_replayed(device, monkeypatch):
    """A replay writes gradients where it wrote the last ones: parts of a batch would lose theirs."""
    model, entered = model_on(device), []
    monkeypatch.setattr(ToCo, "recorded_blocks", lambda _: entered.append(1) or contextlib.nullcontext())
    for changes, processes in (({}, 1), ({"cuda_graphs": False}, 1), ({"accumulate": 2}, 1), ({}, 2)):
        with recorded_blocks(model, override(tiny(), **changes), processes):
            pass
    assert len(entered) == 1
