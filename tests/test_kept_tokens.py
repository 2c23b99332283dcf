"""Tokens of frozen blocks that are computed once: the same bits, whatever batch a picture comes in."""

import numpy as np
import pytest
import torch
from small_config import few_scenes, small_recipe, stir
from torch.testing import assert_close

from toco_core.cam import multi_scale_cam
from toco_core.config import override
from toco_core.data import training_batches
from toco_core.errors import ToCoError
from toco_core.model import ToCo
from toco_core.train.kept_tokens import KeptTokens, kept_blocks
from toco_core.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return few_scenes(tmp_path_factory.mktemp("cache"), seed=12, n_train=7, n_val=3, n_test=1)


def small(**changes):
    sizes = {
        "crop_size": 64,
        "batch_size": 3,
        "n_local": 2,
        "warmup_steps": 1,
        "seed": 4,
        "precision": "fp32",
        "log_interval": 1,
    }
    stages = {"ptc_start": 0, "ctc_start": 0, "seg_start": 1, "energy_start": 1, "eval_interval": 0}
    frozen = {"frozen_blocks": 8, "views_per_image": 2, "cam_scales": (1.0, 0.5), "steps": 6}
    return override(small_recipe(), **sizes | stages | frozen | changes)


def frozen_model(blocks=8, **changes):
    torch.manual_seed(3)
    model = ToCo(small(**changes).model, 5)
    stir(model, 0.2)
    model.freeze_blocks(blocks)
    return model


def images(n, side=48, seed=0):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("layer", [8, 9, 11])  # 8: the auxiliary classifier reads the kept tokens themselves
def test_tokens_and_gradients_are_those_of_the_whole_encoder(layer):
    model, pictures, kept = frozen_model(layer=layer), images(3), KeptTokens()

    def gradients():
        model.zero_grad()
        tokens = model.encode(pictures)
        (tokens.patch_tokens.square().sum() + tokens.aux_patch_tokens.abs().sum() + tokens.class_token.sum()).backward()
        return tokens, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    wanted, wanted_gradients = gradients()
    with kept.of(model, blocks=8):
        for _ in range(2):  # computed, then kept
            found, found_gradients = gradients()
            for one, other in zip(found[:3], wanted[:3], strict=True):
                assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert found.grid == wanted.grid and found_gradients.keys() == wanted_gradients.keys()
            for name, value in wanted_gradients.items():
                assert_close(found_gradients[name], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))
    assert (kept.computed, kept.found, len(kept)) == (3, 3, 3)
    assert kept.bytes == 3 * (36 + 1) * model.width * 4
    assert model.kept is None


def test_a_picture_has_the_same_bits_in_every_batch():
    model, pictures = frozen_model(), images(5)
    with KeptTokens().of(model, blocks=8) as kept:
        first = kept.tokens(model, pictures)[0]
        again = kept.tokens(model, pictures[[4, 1, 1]])[0]
    with KeptTokens().of(model, blocks=8) as fresh:
        others = fresh.tokens(model, pictures[[4, 1]])[0]
    assert torch.equal(again, first[[4, 1, 1]]) and torch.equal(others, first[[4, 1]])
    assert not torch.equal(first[4], first[1])


@pytest.mark.parametrize("slip", [0.0, 1e-6])
def test_pictures_go_together_where_they_have_the_bits_that_they_have_alone(slip):
    """A processor whose rounding depends on the number of rows adds `slip` to more than one picture."""
    model, pictures, passes = frozen_model(), images(9), []

    def round_otherwise(block, inputs, x):
        passes.append(len(x))
        return x + slip * (len(x) > 1)

    with torch.no_grad(), KeptTokens().of(model, blocks=8) as kept:
        alone = torch.cat([kept.tokens(model, picture[None])[0] for picture in pictures])
        together = not slip and torch.equal(kept._behind(model, pictures[:3])[0], alone[:3])  # on this processor
    model.encoder.blocks[4].register_forward_hook(round_otherwise)
    with KeptTokens().of(model, blocks=8) as kept:
        found = [kept.tokens(model, part)[0] for part in (pictures[:3], pictures[3:6], pictures[[6, 0, 7, 8, 7]])]
    assert torch.equal(torch.cat(found), alone[[*range(7), 0, 7, 8, 7]])
    assert passes == [1, 1, 1, 3] + ([3, 3] if together else [1] * 6) and (kept.computed, kept.found) == (9, 2)


def test_mirrored_and_scaled_pictures_are_kept_apart():
    model, pictures, kept = frozen_model(), images(2, side=64), KeptTokens()
    wanted = multi_scale_cam(model, pictures, scales=(1.0, 0.5))
    with kept.of(model, blocks=8):
        for _ in range(2):
            found = multi_scale_cam(model, pictures, scales=(1.0, 0.5))
            assert_close(found.cam, wanted.cam, rtol=1e-3, atol=1e-4)
            assert_close(found.aux_cam, wanted.aux_cam, rtol=1e-3, atol=1e-4)
    assert len(kept) == kept.computed == kept.found == 2 * 2 * 2


def test_what_is_asked_of_a_frozen_block_is_computed():
    model, pictures = frozen_model(), images(2)
    wanted = model.encode(pictures, attend=(7, 12))
    kept = KeptTokens()
    with kept.of(model, blocks=8):
        assert torch.equal(model.encode(pictures, attend=(7, 12)).attention, wanted.attention)
        assert kept.computed == 0
        model.encode(pictures, attend=(8, 12))  # the kept tokens lie behind the attention of block 8
        assert kept.computed == 0
        model.encode(pictures, attend=(9, 12))
        assert kept.computed == 2
        assert len(model.inside(pictures).blocks) == 12


def test_what_a_config_keeps():
    assert kept_blocks(small()) == 8
    assert kept_blocks(small(views_per_image=0)) == 0
    assert [kept_blocks(small(layer=layer)) for layer in (7, 8, 9)] == [7, 8, 8]
    assert kept_blocks(small(layer=11, attention_steps=1, attention_blocks=(12, 6))) == 5
    assert kept_blocks(small(layer=11, attention_steps=0, attention_blocks=(12, 6))) == 8


def test_other_weights_or_another_arithmetic_find_nothing():
    model, pictures, kept = frozen_model(), images(2), KeptTokens()
    with kept.of(model, blocks=8):
        model.encode(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            coarse = model.encode(pictures).patch_tokens
        assert kept.computed == 4 and not torch.equal(coarse, model.encode(pictures).patch_tokens)
    with torch.no_grad():
        model.encoder.blocks[7].mlp.fc2.bias[3] += 1
    with kept.of(model, blocks=8):
        assert len(kept) == 0
        changed = model.encode(pictures).patch_tokens
    assert_close(changed, model.encode(pictures).patch_tokens, rtol=1e-4, atol=1e-4)


def test_a_full_store_computes_the_rest():
    model, pictures = frozen_model(), images(3)
    kept = KeptTokens(gib=2.5 * 37 * model.width * 4 / 2**30)
    with kept.of(model, blocks=8):
        first, second = (kept.tokens(model, pictures)[0] for _ in range(2))
    assert torch.equal(first, second) and len(kept) == 2 and (kept.computed, kept.found) == (4, 2)


def test_blocks_that_change_are_refused():
    model = frozen_model(blocks=7)
    with (
        pytest.raises(ToCoError, match="first 8 blocks cannot be kept: .* is trained"),
        KeptTokens().of(model, blocks=8),
    ):
        pass
    model.encoder.blocks[2].mlp.drop1.p = 0.25
    with (
        pytest.raises(ToCoError, match="first 7 blocks cannot be kept: Dropout draws"),
        KeptTokens().of(model, blocks=7),
    ):
        pass
    with pytest.raises(ToCoError, match="gib = -1"):
        KeptTokens(gib=-1)


def test_variations_come_again():
    source = data_of_numbers(5)
    options = {"crop_size": 16, "batch_size": 5, "seed": 6, "views_per_image": 3}
    passes = [by_name(batch) for batch in training_batches(source, stop_step=7, **options)]
    for name in source.names:
        seen = [one[name] for one in passes]
        assert all(np.array_equal(seen[p], seen[p + 3]) for p in range(4))
        assert not any(np.array_equal(seen[p], seen[q]) for p, q in ((0, 1), (0, 2), (1, 2)))
    anew = [by_name(b) for b in training_batches(source, stop_step=4, **options | {"views_per_image": 0})]
    assert not np.array_equal(anew[0]["2"], anew[3]["2"])
    resumed = [by_name(b) for b in training_batches(source, start_step=5, stop_step=7, **options)]
    assert all(
        np.array_equal(one[name], other[name]) for one, other in zip(passes[5:], resumed, strict=True) for name in one
    )


def by_name(batch):
    return dict(zip(batch.names, batch.images.numpy(), strict=True))


def data_of_numbers(n):
    rng = np.random.default_rng(8)
    pixels = rng.integers(0, 255, (n, 20, 24, 3), dtype=np.uint8)

    class Source:
        names = [str(i) for i in range(n)]
        image_labels = np.ones((n, 2), np.float32)

        def __len__(self):
            return n

        def image(self, index):
            return pixels[index]

        def mask(self, index):
            return None

    return Source()


@pytest.mark.parametrize("autocast", [False, True])
def test_the_attention_that_is_asked_for_behind_them_changes_no_kept_token(autocast):
    """Blocks whose attention is wanted compute by matrix products, which is another kernel with other bits."""
    model, pictures = frozen_model(), images(2)
    found = []
    for attend in ((), (10, 11)):
        kept = KeptTokens()
        with kept.of(model, blocks=8), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            model.encode(pictures, attend=attend)
            found.append(kept.tokens(model, pictures)[0])
        assert (kept.computed, kept.found) == (2, 2)
    assert torch.equal(*found)


@pytest.mark.slow
def test_runs_share_what_they_keep_and_a_resumed_one_has_the_same_bits(data, tmp_path):
    def trained(name, kept, **options):
        config = small(out_dir=str(tmp_path / name), warm_start_steps=5, cam_scales=(1.0,))
        found = train(config, data=data, progress=False, kept=kept, **options)
        return {key: value.clone() for key, value in found.model.state_dict().items()}

    shared = KeptTokens()
    first = trained("first", shared)
    computed = shared.computed
    assert computed == 7 + 3 * 2 + 7 * 2 * 3  # warm start; validation; two variations: image, mirror, second view
    second = trained("second", shared)
    assert shared.computed == computed
    alone = trained("alone", KeptTokens(gib=0))

    class Stop(Exception):
        pass

    def stop(record):
        if record["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        train(
            small(out_dir=str(tmp_path / "cut"), warm_start_steps=5, cam_scales=(1.0,)),
            data=data,
            progress=False,
            save_every=1,
            on_record=stop,
        )
    resumed = trained("cut", KeptTokens())
    for key, value in first.items():
        assert (
            torch.equal(value, second[key]) and torch.equal(value, alone[key]) and torch.equal(value, resumed[key])
        ), key
