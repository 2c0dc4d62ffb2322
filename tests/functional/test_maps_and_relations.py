"""Pooling two maps to one size, and vectors of length 1."""

import pytest
import torch
import torch.nn.functional as F

from mdistiller.functional import pool_to_common, unit


@pytest.mark.parametrize(
    ("student", "teacher", "common"),
    [((8, 8), (4, 4), (4, 4)), ((4, 4), (8, 8), (4, 4)), ((5, 5), (5, 5), (5, 5)), ((8, 3), (4, 6), (4, 3))],
)
def test_both_maps_get_the_smaller_height_and_width(student, teacher, common):
    maps = [torch.randn(2, channels, *size) for channels, size in ((3, student), (5, teacher))]
    for before, after in zip(maps, pool_to_common(*maps), strict=True):
        torch.testing.assert_close(after, F.adaptive_avg_pool2d(before, common))
        assert (after is before) == (before.shape[2:] == common)


def test_half_precision_is_pooled_in_float32():
    found = pool_to_common(torch.ones(1, 1, 4, 4, dtype=torch.bfloat16), torch.ones(1, 1, 2, 2, dtype=torch.float64))
    assert [x.dtype for x in found] == [torch.float32, torch.float64]


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_unit_vectors(dim):
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(unit(x, dim), F.normalize(x, dim=dim))
    assert torch.autograd.gradcheck(lambda y: unit(y, dim), (x,))


def test_a_zero_vector_stays_and_has_a_gradient_of_size_one():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
    unit(x)[0].sum().backward()
    assert torch.equal(unit(x)[0], torch.zeros(2))
    assert torch.equal(x.grad, torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
