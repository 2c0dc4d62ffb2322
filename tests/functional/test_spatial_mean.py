"""The mean over positions, its gradient, and its precision."""

import pytest
import torch

from mdistiller.functional import spatial_mean

LAYOUTS = [torch.contiguous_format, torch.channels_last]


def maps(dtype, layout=torch.contiguous_format):
    values = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(dtype, memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_plain_form_and_so_does_the_gradient(dtype, layout):
    x, y = maps(dtype, layout), maps(dtype, layout)
    wide = dtype if dtype is torch.float64 else torch.float32
    found, expected = spatial_mean(x), y.to(wide).mean((2, 3))
    assert found.dtype == wide and torch.equal(found, expected)
    weights = torch.linspace(-1, 1, 12, dtype=wide).view(3, 4)
    ((found * weights).sum() + x.square().sum()).backward()
    ((expected * weights).sum() + y.square().sum()).backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, y.grad)


def test_gradient():
    assert torch.autograd.gradcheck(spatial_mean, (maps(torch.float64),))


def test_twice_is_refused_rather_than_wrong():
    x = maps(torch.float64)
    (gradient,) = torch.autograd.grad(spatial_mean(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
