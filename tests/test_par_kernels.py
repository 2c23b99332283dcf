"""PAR's kernels for a GPU give what tensor operations give. Without a GPU Triton interprets them on the CPU."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from toco_core import par

DILATIONS = (1, 3, 6)


@pytest.fixture
def kernels():
    pytest.importorskip("triton", reason="Triton comes with PyTorch's builds for CUDA")
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("there is no GPU, and Triton does not interpret")
    path = Path(par.__file__).parent / "machine" / "par_kernels.py"  # not through the hook that checks shapes
    spec = importlib.util.spec_from_file_location("kernels_as_written", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def given(device):
    """What the kernels read besides images and masks."""
    offsets = par.neighbour_offsets(DILATIONS)
    positions = par._position_weights(offsets, torch.empty(()))
    return torch.tensor(offsets, dtype=torch.int32, device=device), positions.to(device)


def test_the_affinity(kernels, device):
    images = torch.rand(2, 3, 9, 17, generator=torch.Generator().manual_seed(3))
    images[1, :, 2:8, 3:12] = 0.25  # where all neighbours are equal, all get the same weight
    wanted = par.affinity(images, dilations=DILATIONS).weights
    found = kernels.affinity(images.to(device), *given(device), par.COLOUR_WIDTH, par.STD_EPS)
    assert found.shape == (24, 2, 9, 17) and not wanted[0].allclose(wanted[5])
    assert_close(found.cpu(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("n_masks", "rounds"), [(1, 1), (5, 4), (19, 2)])
def test_the_rounds(kernels, device, n_masks, rounds):
    generator = torch.Generator().manual_seed(4)
    affinity = par.affinity(torch.rand(2, 3, 9, 17, generator=generator), dilations=DILATIONS)
    masks = torch.rand(2, n_masks, 9, 17, generator=generator)
    found = kernels.rounds(affinity.weights.to(device), masks.to(device), given(device)[0], rounds)
    assert_close(found.cpu(), par.apply(affinity, masks, iterations=rounds), rtol=1e-5, atol=1e-6)


def test_rounds_leave_the_masks_alone(kernels, device):
    masks = torch.rand(1, 2, 6, 7, generator=torch.Generator().manual_seed(5)).to(device)
    affinity, before = par.affinity(torch.rand(1, 3, 6, 7), dilations=DILATIONS), masks.clone()
    kernels.rounds(affinity.weights.to(device), masks, given(device)[0], 3)
    assert torch.equal(masks, before)
    assert torch.equal(kernels.rounds(affinity.weights.to(device), masks, given(device)[0], 0), before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_takes_them(device):
    """The same labels as on the CPU, in float32; float64 goes the other way."""
    generator = torch.Generator().manual_seed(6)
    images, masks = torch.rand(2, 3, 40, 33, generator=generator), torch.rand(2, 4, 20, 17, generator=generator)
    wanted = par.refine(images, masks)
    assert par.gpu_kernels(images.to(device)) and not par.gpu_kernels(images.double().to(device))
    found = par.refine(images.to(device), masks.to(device)).cpu()
    assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.argmax(1), wanted.argmax(1))
    assert_close(par.refine(images.double().to(device), masks.double().to(device)).cpu().float(), wanted)
