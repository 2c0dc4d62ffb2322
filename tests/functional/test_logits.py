"""Standardised logits."""

import torch

from mdistiller.functional import zs_norm


def test_mean_0_and_deviation_1_of_each_sample():
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 30 + 4
    expected = torch.stack([(row - row.mean()) / (row.std() + 1e-7) for row in logits])
    torch.testing.assert_close(zs_norm(logits), expected)
    assert torch.autograd.gradcheck(zs_norm, logits.requires_grad_())


def test_equal_logits_become_zeros_without_gradient_and_others_are_not_touched():
    logits = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with_constant = torch.cat([logits, torch.full((1, 4), 5.0, dtype=torch.float64)]).requires_grad_()
    alone = logits.clone().requires_grad_()
    weight = torch.arange(16.0, dtype=torch.float64).view(4, 4).square()
    (zs_norm(with_constant) * weight).sum().backward()
    (zs_norm(alone) * weight[:3]).sum().backward()
    assert not zs_norm(with_constant)[3].any() and not with_constant.grad[3].any()
    assert torch.equal(with_constant.grad[:3], alone.grad)


def test_half_precision_is_taken_to_float32():
    assert zs_norm(torch.randn(2, 3, dtype=torch.bfloat16)).dtype == torch.float32
