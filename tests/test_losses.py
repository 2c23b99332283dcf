"""The loss terms against slow versions written from the equations, and at the edges of what a batch can hold."""

import inspect

import pytest
import reference_losses as slow
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from toco_core import losses
from toco_core.errors import ToCoError
from toco_core.losses import IGNORE, classification_loss, ctc_loss, ptc_loss, segmentation_loss

B, K, D, h, w = 2, 5, 7, 3, 4
V, P = 6, 8
LABELS = ("random", "single class", "all ignore", "one valid token", "every token its own class", "one image ignored")
FLAGS = ("random", "one positive", "no negative", "none positive")


def random(*shape, generator=None, grad=True):
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_(grad)


def agree(ours, theirs, *inputs):
    """Values and gradients, float64."""
    assert_close(ours, theirs)
    grads = torch.autograd.grad(ours, inputs)
    assert_close(grads, torch.autograd.grad(theirs, inputs))
    assert all(g.isfinite().all() for g in grads)


def make_label(kind, shape, generator=None):
    label = torch.randint(0, 4, shape, generator=generator)
    label[torch.rand(shape, generator=generator) < 0.3] = IGNORE
    if kind == "single class":
        label = torch.where(label == IGNORE, IGNORE, 2)
    elif kind == "all ignore":
        label.fill_(IGNORE)
    elif kind == "one valid token":
        label.fill_(IGNORE)[0, -1, 0] = 3
    elif kind == "every token its own class":
        label = torch.arange(label[0].numel()).view(shape[1:]).expand(shape).clone()
    elif kind == "one image ignored":
        label[0] = IGNORE
    return label


def make_flags(kind, shape, generator=None):
    flags = torch.rand(shape, generator=generator) < 0.6
    flags[:, :2] = True
    if kind == "one positive":
        flags[:] = False
        flags[:, 0] = True
    elif kind == "no negative":
        flags[:] = True
    elif kind == "none positive":
        flags[0] = False
    return flags


def unit(*shape, generator=None):
    return F.normalize(random(*shape, generator=generator, grad=False), dim=-1).requires_grad_()


# classification


def test_classification_equals_the_equation():
    torch.manual_seed(0)
    logits = random(B, K)
    image_labels = torch.tensor([[1.0, 0, 0, 1, 0], [0, 0, 1, 0, 0]])
    agree(classification_loss(logits, image_labels), slow.classification_loss(logits, image_labels), logits)


def test_classification_is_finite_for_extreme_logits():
    logits = torch.tensor([[-1e4, 1e4]], requires_grad=True)
    loss = classification_loss(logits, torch.tensor([[1.0, 1.0]]))
    assert_close(loss, torch.tensor(5e3))


# patch token contrast


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("keep_constant", (False, True))
def test_ptc_equals_the_mask_version(kind, keep_constant):
    torch.manual_seed(1)
    patch_map, label = random(B, D, h, w), make_label(kind, (B, h, w))
    theirs = slow.ptc_loss(patch_map, slow.affinity_of(label), keep_constant)
    agree(ptc_loss(patch_map, label, keep_constant=keep_constant), theirs, patch_map)


def test_ptc_in_blocks_of_any_size(monkeypatch):
    torch.manual_seed(2)
    patch_map, label = random(B, D, h, w), make_label("random", (B, h, w))
    theirs = slow.ptc_loss(patch_map, slow.affinity_of(label))
    for rows in (1, 5, h * w, 1000):
        monkeypatch.setattr(losses, "PTC_ROWS", rows)
        agree(ptc_loss(patch_map, label), theirs, patch_map)
        theirs = slow.ptc_loss(patch_map, slow.affinity_of(label))


def test_ptc_pair_epsilon_and_absolute_value():
    """Two opposite tokens of one class: 2 pairs with |cos| 1, divided by 2 + 1."""
    patch_map = torch.tensor([[[[1.0, -2.0]]]])
    assert_close(ptc_loss(patch_map, torch.tensor([[[1, 1]]])), torch.tensor(0.5 * (1 - 2 / 3)))
    assert_close(ptc_loss(patch_map, torch.tensor([[[1, 0]]])), torch.tensor(0.5 * 2 / 3))


def test_ptc_zero_token_and_nothing_valid():
    patch_map = torch.zeros(1, D, 1, 3, requires_grad=True)
    loss = ptc_loss(patch_map, torch.tensor([[[1, 1, 0]]]))
    loss.backward()
    assert_close(loss, torch.tensor(0.5))
    assert patch_map.grad.isfinite().all()
    patch_map = torch.randn(1, D, 1, 3, requires_grad=True)
    loss = ptc_loss(patch_map, torch.full((1, 1, 3), IGNORE))
    loss.backward()
    assert loss.item() == 0 and not patch_map.grad.any()


def test_ptc_numerical_gradient():
    torch.manual_seed(3)
    label = make_label("random", (B, h, w))
    assert torch.autograd.gradcheck(lambda x: 3 * ptc_loss(x, label), random(B, D, h, w))


def test_ptc_memory_is_linear_in_the_tokens(monkeypatch):
    """The largest tensor of forward and backward, from its shapes: a block of rows, never N x N."""

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.elements = max(self.elements, out.numel())
            return out

    monkeypatch.setattr(losses, "PTC_ROWS", 4)
    largest = []
    for n in (100, 200):
        patch_map = torch.randn(1, 3, 1, n, requires_grad=True)
        with Largest() as mode:
            ptc_loss(patch_map, torch.randint(0, 4, (1, 1, n))).backward()
        largest.append(mode.elements)
    assert largest == [4 * 100, 4 * 200]


def test_ptc_refuses_another_grid():
    """Also where shapes are not checked, as in use; the transposed grid has the same number of tokens."""
    with pytest.raises(ToCoError, match=r"label has the grid \(4, 3\)"):
        inspect.unwrap(ptc_loss)(torch.randn(B, D, h, w), torch.zeros(B, w, h, dtype=torch.long))
    with pytest.raises(ToCoError, match=r"label has the size \(4, 3\)"):
        inspect.unwrap(segmentation_loss)(torch.randn(B, D, h, w), torch.zeros(B, w, h, dtype=torch.long))


# class token contrast


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("negatives_only_term", (True, False))
@pytest.mark.parametrize("temperature", (0.5, 1.0))
def test_ctc_equals_the_loops(kind, negatives_only_term, temperature):
    torch.manual_seed(4)
    student, teacher, flags = unit(B, V, P), unit(B, 2, P), make_flags(kind, (B, V))
    options = {"temperature": temperature, "negatives_only_term": negatives_only_term}
    agree(ctc_loss(student, teacher, flags, **options), slow.ctc_loss(student, teacher, flags, **options), student)


CLASSES = ({0, 3}, {1}, {3}, set())
UNRELATED = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 0]]) == 1


@pytest.mark.parametrize("kind", FLAGS)
@pytest.mark.parametrize("cosine", (False, True))
@pytest.mark.parametrize("classes", (None, CLASSES))
def test_variants_of_ctc_equal_the_loops(kind, cosine, classes):
    torch.manual_seed(14)
    student, teacher, flags = random(4, V, P), random(4, 3, P), make_flags(kind, (4, V))
    unrelated = None if classes is None else UNRELATED
    ours = ctc_loss(student, teacher, flags, temperature=0.7, cosine=cosine, unrelated=unrelated)
    agree(ours, slow.ctc_loss(student, teacher, flags, 0.7, True, cosine, classes), student)
    assert teacher.grad is None
    plain = ctc_loss(student, teacher, flags, temperature=0.7)
    assert (cosine or classes is not None) == (not torch.equal(ours, plain))


def test_cosine_ctc_forgets_lengths_and_survives_a_zero_vector():
    torch.manual_seed(15)
    student, teacher, flags = random(2, V, P), random(2, 2, P), make_flags("random", (2, V))
    longer = ctc_loss(5 * student, 0.2 * teacher, flags, cosine=True)
    assert_close(longer, ctc_loss(student, teacher, flags, cosine=True))
    zero = torch.zeros(2, V, P, requires_grad=True)
    (gradient,) = torch.autograd.grad(ctc_loss(zero, teacher.float(), flags, cosine=True), zero)
    assert gradient.isfinite().all()


def test_ctc_teacher_gets_no_gradient():
    torch.manual_seed(5)
    teacher = unit(B, 2, P)
    ctc_loss(unit(B, V, P), teacher, make_flags("random", (B, V))).backward()
    assert teacher.grad is None


def test_ctc_is_finite_at_a_small_temperature():
    """exp(1 / 0.005) is beyond float32."""
    torch.manual_seed(6)
    student = unit(B, V, P).detach().float().requires_grad_()
    loss = ctc_loss(student, student.detach()[:, :2], make_flags("random", (B, V)), temperature=0.005)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_ctc_refuses_a_temperature_of_zero():
    with pytest.raises(ToCoError, match="temperature = 0"):
        ctc_loss(unit(B, V, P), unit(B, 2, P), make_flags("random", (B, V)), temperature=0.0)


# segmentation


@pytest.mark.parametrize("kind", ("random", "all ignore", "single class", "only background"))
def test_segmentation_equals_the_loops(kind):
    torch.manual_seed(7)
    logits, label = random(B, K, h, w), make_label(kind, (B, h, w))
    if kind == "only background":
        label.zero_()
    agree(segmentation_loss(logits, label), slow.segmentation_loss(logits, label), logits)


def test_segmentation_of_nothing_is_zero_and_the_release_is_nan():
    logits = torch.randn(B, K, h, w, requires_grad=True)
    for label in (
        torch.full((B, h, w), IGNORE),
        torch.zeros(B, h, w, dtype=torch.long),
        torch.ones(B, h, w, dtype=torch.long),
    ):
        assert segmentation_loss(logits, label, nan_when_empty=True).isnan()
        loss = segmentation_loss(logits, label)
        (0 * loss).backward()
        assert loss.isfinite() and not logits.grad.any()


# all of them


@pytest.mark.parametrize("seed", range(25))
def test_fuzz(seed):
    """Random odd sizes and every special case, values and gradients in float64."""
    g = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=g))

    b, c, d, rows, columns, views = pick(1, 4), pick(2, 6), pick(1, 9), pick(1, 6), pick(1, 7), pick(2, 8)
    c = max(c, 4)
    patch_map = random(b, d, rows, columns, generator=g)
    label = make_label(LABELS[seed % len(LABELS)], (b, rows, columns), g)
    agree(ptc_loss(patch_map, label), slow.ptc_loss(patch_map, slow.affinity_of(label)), patch_map)

    label = make_label(("random", "single class", "all ignore")[seed % 3], (b, rows, columns), g)
    logits = random(b, c, rows, columns, generator=g)
    agree(segmentation_loss(logits, label), slow.segmentation_loss(logits, label), logits)

    student, teacher = unit(b, views, d, generator=g), unit(b, pick(1, 4), d, generator=g)
    flags = make_flags(FLAGS[seed % len(FLAGS)], (b, views), g)
    agree(ctc_loss(student, teacher, flags, temperature=0.7), slow.ctc_loss(student, teacher, flags, 0.7), student)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_autocast_does_not_lower_the_precision(dtype):
    torch.manual_seed(8)
    patch_map, label = torch.randn(B, D, h, w, dtype=dtype), make_label("random", (B, h, w))
    logits = torch.randn(B, K, h, w, dtype=dtype)
    student = F.normalize(torch.randn(B, V, P), dim=-1).to(dtype)
    flags = make_flags("random", (B, V))

    def all_terms():
        return torch.stack(
            [
                classification_loss(logits[:, :, 0, 0], torch.ones(B, K)),
                ptc_loss(patch_map, label),
                ctc_loss(student, student[:, :2], flags),
                segmentation_loss(logits, label),
            ]
        )

    plain = all_terms()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = all_terms()
    assert plain.dtype == lowered.dtype == torch.float32
    assert_close(lowered, plain, rtol=0, atol=0)


def test_label_types():
    """Labels may be stored in any whole-number type."""
    torch.manual_seed(9)
    patch_map, logits, label = torch.randn(B, D, h, w), torch.randn(B, K, h, w), make_label("random", (B, h, w))
    for dtype in (torch.uint8, torch.int16, torch.int32):
        assert_close(ptc_loss(patch_map, label.to(dtype)), ptc_loss(patch_map, label))
        assert_close(segmentation_loss(logits, label.to(dtype)), segmentation_loss(logits, label))


def test_no_value_is_read_back_on_the_way():
    """Nothing in forward and backward turns a tensor into a number or a shape, so nothing waits for an accelerator."""
    waiting = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::equal"}

    class Refuse(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert function.name() not in waiting, function.name()
            return function(*args, **(kwargs or {}))

    torch.manual_seed(10)
    patch_map, logits = torch.randn(B, D, h, w, requires_grad=True), torch.randn(B, K, h, w, requires_grad=True)
    student = torch.randn(B, V, P, requires_grad=True)
    label, flags = make_label("random", (B, h, w)), make_flags("random", (B, V))
    with Refuse():
        for loss in (
            ptc_loss(patch_map, label),
            segmentation_loss(logits, label),
            ctc_loss(student, student[:, :2], flags),
        ):
            loss.backward()


def test_every_epsilon_is_named():
    source = inspect.getsource(losses).split("def classification_loss")[1].split('"""')
    code = "".join(source[::2])  # without docstrings
    assert "1e-" not in code
