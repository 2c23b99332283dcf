"""The lattice against a dictionary version and against the Gaussian; the energy and the dense CRF against loops."""

import dataclasses
import inspect
import pickle

import pytest
import reference_losses as slow
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from toco_core import lattice as lattices_module
from toco_core.conventions import IGNORE
from toco_core.errors import ToCoError
from toco_core.labels import refined_labels
from toco_core.lattice import Lattice, energy_lattices, image_lattice
from toco_core.losses import dense_energy_loss
from toco_core.refiners.crf import CRFSettings, crf_lattices, dense_crf, mean_field

B, C, H, W = 2, 4, 10, 14
# A pixel whose distance from the corner is exactly one standard deviation lies on the border of two simplices, where
# rounding decides which vertices of weight 0 take part in the blur: the standard deviation is no whole number of
# pixels, so that fast and slow must agree.
SETTINGS = {"weight": 0.01, "sigma_rgb": 60.0, "sigma_xy": 7.3, "scale": 0.5}
BOXES = torch.tensor([[0, H, 0, W], [2, 9, 3, 12]])


def batch(B=B, H=H, W=W, generator=None):
    logits = 2 * torch.randn(B, C, H, W, dtype=torch.float64, generator=generator)
    images = torch.rand(B, 3, H, W, dtype=torch.float64, generator=generator)
    label = torch.randint(0, C, (B, H, W), generator=generator)
    label[torch.rand(B, H, W, generator=generator) < 0.4] = IGNORE
    return logits.requires_grad_(), images, label


def agree(ours, theirs, logits):
    value, for_gradient = theirs
    assert_close(ours, value)
    assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(for_gradient, logits))


# lattice


@pytest.mark.parametrize("d", (1, 2, 3, 5))
def test_lattice_equals_the_dictionary(d):
    torch.manual_seed(d)
    features = 2 * torch.randn(41, d, dtype=torch.float64)
    features[3], features[5] = features[2], 0  # two points at one place; one exactly on a vertex
    values = torch.randn(41, 3, dtype=torch.float64)
    assert_close(Lattice.build(features).filter(values), slow.lattice_filter(features, values))


@pytest.mark.parametrize("groups", (False, True))
def test_neighbours_are_found_as_by_two_searches(groups):
    """One direction of each axis is searched for, the other is its inverse."""
    torch.manual_seed(6)
    features = 1.5 * torch.randn(300, 3, dtype=torch.float64)
    group = torch.randint(0, 2, (300,)) if groups else torch.zeros(300, dtype=torch.long)
    lattice = Lattice.build(features, group if groups else None)
    origin, rank, _ = lattices_module._enclosing_simplex(features)
    M = lattice.blur.shape[1] - 1
    vertex = {}  # (group, coordinates) -> number
    for p in range(300):
        for k in range(4):
            point = tuple((origin[:, p] + k - 4 * (rank[:, p] > 3 - k).long()).tolist())
            vertex[group[p].item(), point] = lattice.corners[p, k].item()
    assert sorted(vertex.values()) == list(range(M))
    assert lattice.blur[:, M].eq(M).all()
    for (its_group, point), number in vertex.items():
        for axis in range(4):
            steps = [tuple(x + sign * (4 * (j == axis) - 1) for j, x in enumerate(point)) for sign in (1, -1)]
            wanted = [number, *(vertex.get((its_group, step), M) for step in steps)]
            assert lattice.blur[axis, number].tolist() == wanted


def test_lattice_of_one_point():
    values = torch.ones(1, 1, dtype=torch.float64)
    features = torch.tensor([[0.3, -0.8, 1.1]], dtype=torch.float64)
    assert_close(Lattice.build(features).filter(values), slow.lattice_filter(features, values))


def test_lattice_follows_the_gaussian():
    """On a densely filled grid the filter is the Gaussian up to a constant."""
    positions = lattices_module._positions(24, 30, like=torch.zeros((), dtype=torch.float64)) / 3
    values = torch.zeros(24 * 30, 1, dtype=torch.float64)
    values[12 * 30 + 15] = 1
    ours, exact = Lattice.build(positions).filter(values), slow.gaussian_kernel(positions) @ values
    ours, exact = ours / ours.sum(), exact / exact.sum()
    assert (ours - exact).abs().max() < 0.15 * exact.max()
    centre = (ours * positions).sum(0)
    assert_close(centre, torch.tensor([15 / 3, 12 / 3], dtype=torch.float64), rtol=0, atol=0.01)
    spread = (ours * (positions - centre).square()).sum(0)
    assert_close(spread, torch.ones(2, dtype=torch.float64), rtol=0.1, atol=0)


def test_lattice_is_linear_and_keeps_columns_apart():
    torch.manual_seed(0)
    lattice = Lattice.build(torch.randn(50, 5, dtype=torch.float64))
    values = torch.randn(50, 3, dtype=torch.float64)
    for column in range(3):
        alone = lattice.filter(values[:, column : column + 1])
        assert_close(lattice.filter(values)[:, column : column + 1], alone)
    assert_close(lattice.filter(2 * values), 2 * lattice.filter(values))


def test_lattice_travels():
    """It can be made in another process and moved to a device."""
    torch.manual_seed(0)
    lattice, values = Lattice.build(torch.randn(20, 5)), torch.randn(20, 2)
    for other in (pickle.loads(pickle.dumps(lattice)), lattice.to("cpu")):
        assert_close(other.filter(values), lattice.filter(values), rtol=0, atol=0)
    assert all(tensor.device.type == "meta" for tensor in vars(lattice.to("meta")).values())


def test_lattice_float32_equals_float64():
    torch.manual_seed(1)
    image, values = torch.rand(3, 30, 40), torch.rand(1200, 3)
    single = image_lattice(image, sigma_xy=50.0, sigma_rgb=15.0).filter(values)
    double = image_lattice(image.double(), sigma_xy=50.0, sigma_rgb=15.0).filter(values.double())
    assert_close(single.double(), double, rtol=1e-4, atol=1e-4)


def test_lattice_refuses():
    with pytest.raises(ToCoError, match="NaN or infinity"):
        Lattice.build(torch.tensor([[0.0, torch.nan]]))
    with pytest.raises(ToCoError, match="too large"):
        Lattice.build(1e6 * torch.randn(9, 5))
    with pytest.raises(ToCoError, match="values has 3 points"):
        Lattice.build(torch.randn(4, 2)).filter(torch.randn(3, 1))


# dense energy


@pytest.mark.parametrize("boxes", (True, False))
def test_energy_equals_the_loops(boxes):
    torch.manual_seed(2)
    logits, images, label = batch()
    ours = dense_energy_loss(logits, images, label, BOXES if boxes else None, **SETTINGS)
    box_list = (BOXES if boxes else torch.tensor([[0, H, 0, W]] * B)).tolist()
    agree(ours, slow.dense_energy(logits, images, label, box_list, **SETTINGS), logits)


@pytest.mark.parametrize("seed", range(6))
def test_energy_fuzz(seed):
    """Odd sizes, scales, labels of one kind only, empty boxes."""
    g = torch.Generator().manual_seed(seed)
    b, rows, columns = (int(torch.randint(low, high, (), generator=g)) for low, high in ((1, 3), (4, 12), (4, 12)))
    logits, images, label = batch(b, rows, columns, g)
    if seed % 3 == 1:
        label.fill_(IGNORE)
    if seed % 3 == 2:
        label.fill_(1)
    box = torch.tensor([[1, rows, 0, columns - 1]] * b)
    if seed == 3:
        box[0] = 0
    settings = {**SETTINGS, "scale": (0.5, 1.0, 0.7)[seed // 2 % 3]}
    ours = dense_energy_loss(logits, images, label, box, **settings)
    agree(ours, slow.dense_energy(logits, images, label, box.tolist(), **settings), logits)


def test_energy_with_lattices_made_before():
    torch.manual_seed(3)
    logits, images, label = batch()
    lattices = energy_lattices(images, sigma_rgb=60.0, sigma_xy=7.3, scale=0.5)
    ours = dense_energy_loss(logits, images, label, BOXES, lattices=lattices, **SETTINGS)
    assert_close(ours, dense_energy_loss(logits, images, label, BOXES, **SETTINGS), rtol=0, atol=0)
    with pytest.raises(ToCoError, match=r"lattices has \d entries: allowed is one per image, \d, or one of all"):
        dense_energy_loss(logits, images, label, lattices=[*lattices, lattices[0]])


def test_energy_with_one_lattice_of_all_images():
    """As on a GPU. Two of the images are equal: their points meet in every vertex but for the group."""
    torch.manual_seed(3)
    logits, images, label = batch()
    images[1] = images[0]
    settings = {"sigma_rgb": 60.0, "sigma_xy": 7.3, "scale": 0.5}
    (lattice,) = energy_lattices(images, **settings, together=True)
    alone = energy_lattices(images, **settings)
    assert len(alone) == B and lattice.blur.shape[1] - 1 == sum(one.blur.shape[1] - 1 for one in alone)
    ours = dense_energy_loss(logits, images, label, BOXES, lattices=[lattice], **SETTINGS)
    wanted = dense_energy_loss(logits, images, label, BOXES, **SETTINGS)
    assert_close(ours, wanted)
    assert_close(torch.autograd.grad(ours, logits), torch.autograd.grad(wanted, logits))


def test_energy_outside_the_box_has_no_part():
    """Logits outside the box get no gradient, and their values do not matter."""
    torch.manual_seed(4)
    logits, images, label = batch()
    box = torch.tensor([[2, 8, 4, 10]] * B)
    loss = dense_energy_loss(logits, images, label, box, **SETTINGS)
    (grad,) = torch.autograd.grad(loss, logits)
    outside = torch.ones(H, W, dtype=torch.bool)
    outside[2:8, 4:10] = False
    assert not grad[:, :, outside].any() and grad[:, :, ~outside].all()
    with torch.no_grad():
        logits[:, :, outside] = torch.randn_like(logits[:, :, outside])
    assert_close(dense_energy_loss(logits, images, label, box, **SETTINGS), loss)


def test_energy_prefers_segments_that_follow_the_image():
    image = torch.zeros(1, 3, 16, 16)
    image[..., 8:] = 1
    along, across = torch.zeros(2, 1, 2, 16, 16)
    along[0, 0, :, :8], along[0, 1, :, 8:] = 9, 9
    across[0, 0, :8], across[0, 1, 8:] = 9, 9
    label = torch.full((1, 16, 16), IGNORE)
    assert dense_energy_loss(along, image, label) < dense_energy_loss(across, image, label) < 0


def test_energy_under_autocast_and_in_half():
    torch.manual_seed(5)
    logits, images, label = batch()
    logits = logits.detach().bfloat16()
    plain = dense_energy_loss(logits, images.float(), label, BOXES, **SETTINGS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = dense_energy_loss(logits, images.float(), label, BOXES, **SETTINGS)
    assert plain.dtype == torch.float32
    assert_close(lowered, plain, rtol=0, atol=0)


def test_energy_refuses():
    logits, images, label = batch()
    with pytest.raises(ToCoError, match="allowed is the size of the logits"):
        inspect.unwrap(dense_energy_loss)(logits, images[..., :-1], label)
    for scale in (0.0, 2.0):
        with pytest.raises(ToCoError, match="scale ="):
            dense_energy_loss(logits, images, label, scale=scale)


# dense CRF


def two_regions(H=9, W=13):
    """An image of two colours with a little noise, and probabilities that know it only roughly."""
    truth = (torch.arange(W) > W // 2).long().expand(H, W)
    image = 0.2 + 0.6 * truth.double().expand(3, H, W) + 0.01 * torch.randn(3, H, W, dtype=torch.float64)
    scores = torch.stack([1.0 - truth, truth, torch.zeros(H, W)]).double() + 0.7 * torch.randn(3, H, W).double()
    return image.clamp(0, 1), scores.softmax(0), truth


CRF = {"position_sigma": 1.5, "appearance_sigma_xy": 20.0, "appearance_sigma_rgb": 20.0}


def features_of(image):
    levels = 255 * image
    position = slow.bilateral_features(levels, CRF["position_sigma"], 1)[:, :2]
    return position, slow.bilateral_features(levels, CRF["appearance_sigma_xy"], CRF["appearance_sigma_rgb"])


def test_dense_crf_equals_the_loops_on_the_lattice():
    torch.manual_seed(6)
    image, probs, _ = two_regions(6, 7)
    kernels = list(zip((3.0, 4.0), map(slow.filter_matrix, features_of(image)), strict=True))
    ours = dense_crf(probs, image, iterations=3, position_weight=3.0, **CRF)
    theirs = slow.mean_field(probs.flatten(1).T, kernels, 3).T.view(probs.shape)
    assert_close(ours, theirs)


def test_mean_field_equals_the_loops_with_the_exact_gaussian():
    torch.manual_seed(7)
    image, probs, _ = two_regions(5, 6)
    kernels = list(zip((3.0, 4.0), map(slow.gaussian_kernel, features_of(image)), strict=True))
    ours = mean_field(probs.flatten(1).T, [(weight, kernel.matmul) for weight, kernel in kernels], 4)
    assert_close(ours, slow.mean_field(probs.flatten(1).T, kernels, 4))


def test_dense_crf_is_close_to_brute_force():
    """The lattice is an approximation of the Gaussian; the labels are those of the exact kernels."""
    torch.manual_seed(8)
    image, probs, truth = two_regions(20, 26)
    kernels = [(w, slow.gaussian_kernel(f).matmul) for w, f in zip((1.0, 4.0), features_of(image), strict=True)]
    exact = mean_field(probs.flatten(1).T, kernels, 10).T.view(probs.shape)
    ours = dense_crf(probs, image, **CRF)
    assert (ours.argmax(0) == exact.argmax(0)).double().mean() >= 0.99
    assert (ours - exact).abs().mean() < 0.02
    before, after = ((p.argmax(0) == truth).double().mean() for p in (probs, ours))
    assert before < 0.85 and after > 0.98


def test_dense_crf_without_iterations_or_weights_changes_nothing():
    torch.manual_seed(9)
    image, probs, _ = two_regions()
    assert_close(dense_crf(probs, image, iterations=0), probs)
    assert_close(dense_crf(probs, image, position_weight=0.0, appearance_weight=0.0), probs)


def test_dense_crf_with_certain_probabilities_is_finite():
    image, probs, _ = two_regions()
    probs = torch.zeros_like(probs)
    probs[0] = 1
    out = dense_crf(probs.float(), image.float())
    assert out.isfinite().all() and (out.argmax(0) == 0).all()
    assert_close(out.sum(0), torch.ones(9, 13))


def test_dense_crf_reuses_lattices():
    torch.manual_seed(10)
    image, probs, _ = two_regions()
    assert_close(dense_crf(probs, image, lattices=crf_lattices(image)), dense_crf(probs, image), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_labels_refined_by_the_crf_are_what_the_dense_crf_makes_of_cam_and_background(scale):
    g = torch.Generator().manual_seed(3)
    coarse = torch.rand(3, 4, 3, 4, generator=g, dtype=torch.float64)
    cam = torch.nn.functional.interpolate(coarse, size=(H, W), mode="bilinear")
    images = torch.nn.functional.interpolate(torch.rand(3, 3, 3, 5, generator=g), size=(H, W)).double()
    image_labels = torch.tensor([[0.0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 1, 0]])
    settings = {"iterations": 3, "scale": scale, "appearance_sigma_xy": 8.2, "appearance_sigma_rgb": 40.0}
    found = refined_labels(images, cam, image_labels, betas=(0.3, 0.6), refiner="crf", **settings)
    assert found.shape == (2, 3, H, W) and not found[:, 1].any()
    assert not torch.equal(found[0], found[1]) and set(found[0, 2].unique().tolist()) <= {0, 1, 2, 3}
    size = (int(H * scale), int(W * scale))

    def resized(maps, size):
        return torch.nn.functional.interpolate(maps[None], size=size, mode="bilinear")[0]

    for t, beta in enumerate((0.3, 0.6)):
        for b, classes in ((0, [1, 3]), (2, [0, 1, 2])):
            scores = torch.cat([torch.full((1, *size), beta).double(), resized(cam[b, classes], size)])
            powers = scores.exp()
            belief = dense_crf(
                powers / powers.sum(0), resized(images[b], size), iterations=3,
                appearance_sigma_xy=8.2 * scale, appearance_sigma_rgb=40.0,
            )  # fmt: skip
            winner = resized(belief, (H, W)).argmax(0)
            assert_close(found[t, b], torch.tensor([0] + [k + 1 for k in classes])[winner])


def test_dense_crf_refuses():
    image, probs, _ = two_regions()
    with pytest.raises(ToCoError, match="iterations = -1"):
        dense_crf(probs, image, iterations=-1)
    with pytest.raises(ToCoError, match="image has the size"):
        inspect.unwrap(dense_crf)(probs, image[:, 1:])


def test_only_building_waits_for_the_device():
    """With lattices at hand the energy turns no tensor into a number or a shape."""
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.name() not in waiting, function.name()
            return function(*args, **(kwargs or {}))

    logits, images, label = batch()
    lattices = energy_lattices(images)
    with Refuse():
        dense_energy_loss(logits, images, label, BOXES, lattices=lattices).backward()


def test_lattice_is_made_of_tensors_only():
    assert all(
        isinstance(getattr(Lattice.build(torch.randn(4, 2)), f.name), torch.Tensor) for f in dataclasses.fields(Lattice)
    )


def test_a_large_photograph_is_refined_at_fewer_pixels(monkeypatch):
    """One of 24 megapixels took 17 GB at its own size."""
    from toco_core.predict import segmentation

    generator = torch.Generator().manual_seed(5)
    logits = torch.nn.functional.interpolate(torch.randn(1, C, 6, 9, generator=generator), size=(48, 72))
    unit = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 9, generator=generator), size=(48, 72))
    options, refine, seen = dataclasses.asdict(CRFSettings(appearance_sigma_xy=9.5)), segmentation.dense_crf, []
    monkeypatch.setattr(segmentation, "dense_crf", lambda *a, **k: seen.append(tuple(a[0].shape)) or refine(*a, **k))
    whole = segmentation.crf_label(logits, unit, options)
    monkeypatch.setattr(segmentation, "CRF_PIXELS", 24 * 36)
    smaller = segmentation.crf_label(logits, unit, options)
    assert seen == [(C, 48, 72), (C, 24, 36)] and smaller.shape == whole.shape == (1, 48, 72)
    assert (smaller == whole).float().mean() > 0.9 and len(whole.unique()) == C
