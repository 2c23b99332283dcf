"""The products that a GPU makes instead of torch's resizing and of the patch embedding's convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from toco_core.backbone import as_patches
from toco_core.machine.resizing import linear_weights, resized


@pytest.mark.parametrize("size", [(12, 20), (3, 41), (7, 5)])
def test_two_products_resize_as_torch_does(size):
    maps = torch.randn(2, 3, 7, 5, dtype=torch.float32, generator=torch.Generator().manual_seed(2), requires_grad=True)
    rows, columns = (linear_weights(n, m, maps.device) for n, m in zip((7, 5), size, strict=True))
    found, wanted = rows @ maps @ columns.T, F.interpolate(maps, size, mode="bilinear", align_corners=False)
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(3))
    gradients = [torch.autograd.grad(output, maps, weights)[0] for output in (found, wanted)]
    assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_on_a_cpu_torch_resizes():
    maps = torch.randn(1, 2, 4, 6, generator=torch.Generator().manual_seed(4))
    assert torch.equal(resized(maps, (9, 8)), F.interpolate(maps, (9, 8), mode="bilinear", align_corners=False))


def test_a_product_embeds_patches_as_a_convolution_does():
    generator = torch.Generator().manual_seed(5)
    images, bias = torch.randn(2, 3, 12, 20, generator=generator), torch.randn(7, generator=generator)
    kernel = torch.randn(7, 3, 4, 5, generator=generator)
    wanted = F.conv2d(images, kernel, bias, stride=(4, 5)).permute(0, 2, 3, 1)
    assert_close(F.linear(as_patches(images, (4, 5)), kernel.flatten(1), bias), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_gpu_resizes_by_products():
    maps = torch.randn(2, 3, 7, 5, generator=torch.Generator().manual_seed(6))
    with torch.autocast("cuda", torch.bfloat16):
        found = resized(maps.cuda(), (12, 20))
    assert_close(found.cpu(), resized(maps, (12, 20)), rtol=1e-5, atol=1e-6)
