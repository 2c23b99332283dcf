import cmath
import copy
import math

import pytest
import torch
from small_config import stir
from torch.testing import assert_close
from voc_folder import write_voc_folder

from toco_core.config import ModelConfig, override, tiny
from toco_core.data import VOCFolder
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.predict.tokens import (
    band_energy,
    class_token_similarity,
    high_frequency_energy,
    measured_by_block,
    similarity_by_block,
    similarity_map,
    similarity_matrix,
    similarity_of_split,
    token_similarity,
    tokens_by_block,
)

BACKBONE = "plain_vit(image=24, patch=8, width=12, depth=4, heads=3, mlp=20)"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"proj_hidden": 8, "proj_bottleneck": 6, "proj_dim": 5, "decoder_width": 7}
    model = ToCo(ModelConfig(backbone=BACKBONE, pretrained=False, layer=2, **sizes), 3).double()
    stir(model, 0.3)
    return model.eval()


def slow_cosine(one, other):
    return sum(a * b for a, b in zip(one, other, strict=True)) / math.hypot(*one) / math.hypot(*other)


def slow_similarity(tokens):
    """Pair by pair, over ordered pairs of different tokens of one image (N D)."""
    tokens = tokens.tolist()
    cosines = [slow_cosine(a, b) for i, a in enumerate(tokens) for j, b in enumerate(tokens) if i != j]
    return sum(cosines) / len(cosines)


def test_equals_the_mean_over_pairs():
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 0.4
    found = token_similarity(tokens)
    assert_close(found, torch.tensor([slow_similarity(image) for image in tokens], dtype=torch.float64))
    assert found.std() > 0.01


def test_known_values():
    same = torch.tensor([[2.0, 1.0]]).repeat(6, 1) * torch.arange(1, 7)[:, None]
    opposite = torch.tensor([[1.0, 2.0], [-3.0, -6.0]])
    square = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for tokens, wanted in ((same, 1.0), (opposite, -1.0), (square, -1 / 3)):
        assert_close(token_similarity(tokens[None]), torch.tensor([wanted]))


def test_one_token_and_zero_tokens():
    assert_close(token_similarity(torch.randn(2, 1, 4)), torch.ones(2))
    assert torch.isfinite(token_similarity(torch.zeros(2, 3, 4))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_precision_of_its_input(dtype):
    tokens = torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(1)) + 0.5
    found = token_similarity(tokens.to(dtype))
    assert found.dtype == dtype
    assert_close(found.float(), token_similarity(tokens), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_matrix_and_map_equal_the_cosines():
    tokens = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64) + 0.4
    found = similarity_matrix(tokens)
    wanted = [[[slow_cosine(a, b) for b in image] for a in image] for image in tokens.tolist()]
    assert_close(found, torch.tensor(wanted, dtype=torch.float64))
    assert_close(similarity_matrix(tokens[1]), found[1])
    for patch in range(7):
        assert_close(similarity_map(tokens[1], patch), found[1, patch])
    assert_close(token_similarity(tokens), (found.sum((1, 2)) - 7) / 42)


def test_similarities_stay_in_range():
    tokens = torch.randn(1, 3, generator=torch.Generator().manual_seed(4)).repeat(9, 1)
    assert similarity_matrix(tokens).max() <= 1 and similarity_map(-tokens, 2).max() <= 1
    assert_close(similarity_map(torch.zeros(4, 3), 1), torch.zeros(4))


@pytest.mark.parametrize("patch", [-1, 7])
def test_a_patch_that_is_not_there_is_named(patch):
    with pytest.raises(ToCoError, match=rf"patch = {patch} is not allowed: 0\.\.6, row by row"):
        similarity_map(torch.ones(7, 5), patch)


def test_tokens_by_block(model):
    images = torch.randn(2, 3, 24, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, raw = tokens_by_block(model, images), model.block_tokens(images)
    for number in (1, 2, 3):
        assert_close(found[number - 1], raw[number - 1])
    assert_close(found[3], model.encode(images).patch_tokens)


def test_by_block(model):
    images = torch.randn(2, 3, 16, 32, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    found = similarity_by_block(model, images)
    wanted = []
    for number in range(1, 5):
        after = [model.block_tokens(image[None])[number - 1] for image in images]
        if number == 4:
            after = [model.encode(image[None]).patch_tokens for image in images]
        wanted.append(sum(slow_similarity(tokens[0].detach()) for tokens in after) / 2)
    assert_close(torch.tensor(found), torch.tensor(wanted))


def slow_spectrum(tokens, grid):
    """Frequency (u, v) -> energy of one image's tokens (N D), from the definition of the Fourier transform."""
    h, w = grid
    energy = {}
    for u in range(h):
        for v in range(w):
            total = 0.0
            for d in range(tokens.shape[1]):
                coefficient = 0
                for y in range(h):
                    for x in range(w):
                        wave = cmath.exp(-2j * math.pi * (u * y / h + v * x / w))
                        coefficient += float(tokens[y * w + x, d]) * wave
                total += abs(coefficient) ** 2
            energy[u, v] = total
    return energy


def test_high_frequencies_are_all_but_the_mean():
    tokens = torch.randn(2, 12, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64) + 0.5
    found = high_frequency_energy(tokens)
    for b in range(2):
        energy = slow_spectrum(tokens[b], (3, 4))
        assert_close(float(found[b]), 1 - energy[0, 0] / sum(energy.values()))
    assert_close(high_frequency_energy(tokens - tokens.mean(1, keepdim=True)), torch.ones(2, dtype=torch.float64))
    assert_close(high_frequency_energy(torch.ones(1, 5, 3)), torch.zeros(1))
    assert_close(high_frequency_energy(torch.zeros(1, 5, 3)), torch.zeros(1))


def test_pairs_and_frequencies_say_the_same_of_unit_tokens():
    tokens = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64) + 0.4
    f = high_frequency_energy(torch.nn.functional.normalize(tokens, dim=-1))
    assert_close(token_similarity(tokens), (7 * (1 - f) - 1) / 6)


@pytest.mark.parametrize("n_bands", [1, 3, 4])
def test_bands_equal_the_sums_over_frequencies(n_bands):
    grid = (4, 6)
    tokens = torch.randn(2, 24, 2, generator=torch.Generator().manual_seed(8), dtype=torch.float64) + 0.2
    found = band_energy(tokens, grid, n_bands)
    for b in range(2):
        energy, wanted = slow_spectrum(tokens[b], grid), [0.0] * (n_bands + 1)
        for (u, v), value in energy.items():
            radius = math.hypot(min(u, 4 - u) / 4, min(v, 6 - v) / 6)  # cycles per patch
            ring = next(i for i in range(1, n_bands + 1) if radius <= i / n_bands * 0.5**0.5 + 1e-12)
            wanted[0 if u == v == 0 else ring] += value / sum(energy.values())
        assert_close(found[b].tolist(), wanted)
    assert_close(found.sum(1), torch.ones(2, dtype=torch.float64))
    assert_close(1 - found[:, 0], high_frequency_energy(tokens))


def test_a_checkerboard_is_the_highest_frequency():
    board = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(2, 3).reshape(1, 24, 1)
    assert_close(band_energy(board, (4, 6), 5)[0], torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 1.0]))
    assert_close(band_energy(torch.zeros(1, 24, 1), (4, 6), 5), torch.zeros(1, 6))
    with pytest.raises(ToCoError, match="grid = 4 x 5 is not allowed: there are 24 patch tokens"):
        band_energy(board, (4, 5))


def test_class_token_similarity():
    generator = torch.Generator().manual_seed(9)
    one, many = torch.randn(2, 5, generator=generator), torch.randn(2, 7, 5, generator=generator)
    wanted = [[slow_cosine(one[b].tolist(), many[b, n].tolist()) for n in range(7)] for b in range(2)]
    assert_close(class_token_similarity(one, many), torch.tensor(wanted))


def test_measured_by_block(model, tmp_path):
    source = VOCFolder(write_voc_folder(tmp_path / "voc"), "train")
    config, model = override(tiny(), crop_size=32, local_size=16), copy.deepcopy(model).float()
    bands = measured_by_block(model, source, config, lambda t: band_energy(t, (4, 4), 3), n_images=3)
    high = measured_by_block(model, source, config, high_frequency_energy, n_images=3)
    assert bands.shape == (4, 4) and high.shape == (4,)
    assert_close(1 - bands[:, 0], high)
    assert high.std() > 0.01


def test_of_a_split(model, tmp_path):
    source = VOCFolder(write_voc_folder(tmp_path / "voc"), "train")
    config = override(tiny(), crop_size=32, local_size=16)
    model = copy.deepcopy(model).float()
    found = similarity_of_split(model, source, config, n_images=2)
    each = [similarity_of_split(model, source.subset([i]), config) for i in range(2)]
    assert_close(torch.tensor(found), torch.tensor(each).mean(0))
    assert len(similarity_of_split(model, source, config, n_images=100)) == 4
