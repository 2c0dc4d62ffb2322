"""Means over positions with a backward pass of their own: values, gradients, precision, memory layout."""

import pytest
import torch

from mdistiller.functional import channel_mean_square, gradient_in_layout, spatial_mean

LAYOUTS = [torch.contiguous_format, torch.channels_last]
PLAIN = {
    spatial_mean: lambda x: x.to(torch.promote_types(x.dtype, torch.float32)).mean((2, 3)),
    channel_mean_square: lambda x: x.square().mean((0, 2, 3)),
}
CASES = [(spatial_mean, dtype) for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)]
CASES += [(channel_mean_square, dtype) for dtype in (torch.float64, torch.float32)]


def maps(dtype, layout=torch.contiguous_format):
    values = torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return values.to(dtype, memory_format=layout).requires_grad_()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("mean", "dtype"), CASES)
def test_equals_the_plain_form_and_so_does_the_gradient(mean, dtype, layout):
    x, y = maps(dtype, layout), maps(dtype, layout)
    found, expected = mean(x), PLAIN[mean](y)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view_as(found)
    ((found * weights).sum() + x.square().sum()).backward()
    ((expected * weights).sum() + y.square().sum()).backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_of_squares_lies_in_memory_as_the_maps_do(layout):
    x = maps(torch.float32, layout)
    (gradient,) = torch.autograd.grad(channel_mean_square(x).mean(), x)
    assert gradient.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_of_rows_comes_back_in_the_layout_of_the_maps(layout):
    x, plain = maps(torch.float32, layout), maps(torch.float32, layout)
    weights = torch.linspace(-1, 1, x.numel()).view(3, 4, 30)
    (gradient,) = torch.autograd.grad((gradient_in_layout(x).flatten(2) * weights).sum(), x)
    assert gradient.is_contiguous(memory_format=layout)
    assert torch.equal(gradient, torch.autograd.grad((plain.flatten(2) * weights).sum(), plain)[0])


@pytest.mark.parametrize("mean", PLAIN)
def test_gradient(mean):
    assert torch.autograd.gradcheck(mean, (maps(torch.float64),))


@pytest.mark.parametrize("mean", PLAIN)
def test_twice_is_refused_rather_than_wrong(mean):
    x = maps(torch.float64)
    (gradient,) = torch.autograd.grad(mean(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        gradient.sum().backward()
