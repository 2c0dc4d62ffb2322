"""MixUp against its formula written out, and its draws against their distributions."""

import pytest
import torch

from mdistiller.dataset.mixing import draw_partners, draw_shares, mixup
from mdistiller.dataset.views import Draws

IMAGES = torch.randn(16, 3, 5, 4, generator=torch.Generator().manual_seed(0))


def rng_of(count, epoch=1, seed=0):
    return Draws.of_view("mixup", seed, epoch, torch.arange(count))


@pytest.mark.parametrize("count", [1, 2, 3, 16, 257])
def test_partners_are_a_permutation_without_fixed_points(count):
    partner = draw_partners(rng_of(count))
    assert partner.sort().values.tolist() == list(range(count))
    assert count == 1 or (partner != torch.arange(count)).all()


def test_every_other_image_is_equally_often_the_partner():
    found = torch.stack([draw_partners(rng_of(4, epoch)) for epoch in range(3000)])
    for position in range(4):
        count = found[:, position].bincount(minlength=4).tolist()
        assert count.pop(position) == 0
        assert all(abs(c - 1000) < 130 for c in count)  # 5 standard deviations


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 1.0])
def test_shares_are_beta_distributed(alpha):
    share = draw_shares(rng_of(40_000), alpha).double()
    assert share.min() >= 0 and share.max() <= 1
    variance = 1 / (4 * (2 * alpha + 1))
    assert share.mean().item() == pytest.approx(0.5, abs=5 * (variance / 40_000) ** 0.5)
    assert share.var().item() == pytest.approx(variance, rel=0.03)
    expected = torch.distributions.Beta(*torch.full((2,), alpha).double())
    torch.manual_seed(0)
    points = torch.linspace(0.05, 0.95, 10).double()
    sampled = expected.sample((40_000,))
    found, wanted = ((values[:, None] < points).double().mean(0) for values in (share, sampled))
    assert (found - wanted).abs().max() < 0.018  # 5 standard deviations of the difference


@pytest.mark.parametrize("alpha", [0, -1, 1.01])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=f"alpha must be above 0 and at most 1, got {alpha}"):
        draw_shares(rng_of(2), alpha)


def test_mixed_by_the_formula():
    before = IMAGES.clone()
    mixed, partner, share = mixup(IMAGES, rng_of(16), 0.5)
    for i in range(16):
        torch.testing.assert_close(mixed[i], share[i] * IMAGES[i] + (1 - share[i]) * IMAGES[partner[i]])
    assert torch.equal(IMAGES, before)
    assert len(share.unique()) == 16


def test_draws_follow_their_keys():
    first, same = mixup(IMAGES, rng_of(16)), mixup(IMAGES, rng_of(16))
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    for other in (rng_of(16, epoch=2), rng_of(16, seed=1)):
        found = mixup(IMAGES, other)
        assert not torch.equal(found.partner, first.partner) and not torch.equal(found.share, first.share)


def test_layout_and_type_are_kept():
    images = IMAGES.to(torch.bfloat16, memory_format=torch.channels_last)
    mixed = mixup(images, rng_of(16)).images
    assert mixed.dtype == torch.bfloat16
    assert mixed.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_same_draws_on_the_gpu():
    here = mixup(IMAGES, rng_of(16))
    there = mixup(IMAGES.cuda(), Draws.of_view("mixup", 0, 1, torch.arange(16).cuda()))
    assert torch.equal(there.partner.cpu(), here.partner)
    torch.testing.assert_close(there.share.cpu(), here.share)  # logarithms round differently
