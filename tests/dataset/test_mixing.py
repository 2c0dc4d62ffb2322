"""MixUp, CutMix and smoothing against their formulas, and their draws against their distributions."""

import pytest
import torch
import torch.nn.functional as F

from mdistiller.dataset.mixing import LabelMixing, cutmix, draw_partners, draw_shares, mixup
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


@pytest.mark.parametrize("alpha", [0.01, 0.2, 0.5, 1.0, 3.0])
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


def test_cutmix_pastes_one_rectangle_of_the_partner():
    images = torch.randn(200, 3, 12, 9, generator=torch.Generator().manual_seed(0))
    found, partner, share = cutmix(images, rng_of(200))
    for i in range(200):
        inside = (found[i] != images[i]).any(0)
        assert torch.equal(found[i][:, inside], images[partner[i]][:, inside])
        rows, columns = inside.any(1), inside.any(0)
        assert torch.equal(inside, rows[:, None] & columns)
        for side in (rows, columns):  # in one piece
            assert (side.int().diff().abs().sum() + side[0].int() + side[-1].int()).item() in (0, 2)
        assert share[i].item() == pytest.approx(1 - inside.sum().item() / 108, abs=1e-6)


def test_cutmix_takes_the_area_that_was_drawn_where_nothing_is_cut_off():
    images = torch.zeros(4000, 1, 64, 64)
    rng = rng_of(4000)
    _, _, share = cutmix(images, rng)
    drawn = draw_shares(rng.skip(1), 1.0)
    side = (64 * (1 - drawn).sqrt()).floor()
    whole = ((1 - share) * 64 * 64).round()
    assert (whole <= side**2 + 0.5).all()
    assert (whole == side**2).float().mean().item() == pytest.approx(1 / 6, abs=0.03)  # mean of (1 - side)^2


def batch_of(images=64):
    generator = torch.Generator().manual_seed(0)
    weak, strong = torch.randn(2, images, 3, 8, 8, generator=generator)
    return {
        "image_weak": weak,
        "image_strong": strong,
        "target": torch.arange(images) % 5,
        "index": torch.arange(images),
    }


def mixed_batch(images=64, **settings):
    batch = batch_of(images)
    given = {"mixup": 0.0, "cutmix": 0.0, "smoothing": 0.0, **settings}
    return LabelMixing(5, seed=3, **given)(batch, 1, batch["index"])


def test_smoothed_labels_are_torchs_label_smoothing():
    logits, before = torch.randn(64, 5), batch_of()
    batch = mixed_batch(smoothing=0.1)
    expected = F.cross_entropy(logits, before["target"], label_smoothing=0.1)
    torch.testing.assert_close(F.cross_entropy(logits, batch["target"]), expected)
    assert torch.equal(batch["image_weak"], before["image_weak"]) and "index" in batch


@pytest.mark.parametrize("settings", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_views_and_labels_are_mixed_alike(settings, smoothing):
    before, batch = batch_of(), mixed_batch(**settings, smoothing=smoothing)
    own = (1 - smoothing) * F.one_hot(before["target"], 5) + smoothing / 5
    cut = 0
    for i in range(64):
        difference = batch["image_weak"][i] - before["image_weak"][i]
        if not difference.any():
            continue  # a rectangle of no area
        for j in range(64):  # the partner is whose pixels are found, blended or pasted
            weight = difference / (before["image_weak"][j] - before["image_weak"][i])
            if j != i and (weight.std() < 1e-3 or ((weight - 1).abs() < 1e-5)[difference != 0].all()):
                break
        else:
            raise AssertionError(f"image {i} has no partner")
        expected = before["image_strong"][i] + weight * (before["image_strong"][j] - before["image_strong"][i])
        torch.testing.assert_close(batch["image_strong"][i], expected, rtol=1e-3, atol=1e-3)
        share = weight.mean()
        torch.testing.assert_close(batch["target"][i], (1 - share) * own[i] + share * own[j], rtol=1e-3, atol=1e-3)
        cut += (weight == 0).any().item()
    assert batch["target"].sum(1) == pytest.approx(torch.ones(64), abs=1e-5)
    assert {"mixup": cut == 0, "cutmix": cut > 45, "mixupcutmix": 15 < cut < 50}["".join(settings)]


def test_mixing_follows_its_keys_and_leaves_its_input_alone():
    before = batch_of()
    first, same = mixed_batch(mixup=1.0, cutmix=1.0), mixed_batch(mixup=1.0, cutmix=1.0)
    assert all(torch.equal(first[name], same[name]) for name in first)
    other = LabelMixing(5, 1.0, 1.0, 0.0, seed=4)(before, 1, before["index"])
    assert not torch.equal(other["target"], first["target"])
    assert all(torch.equal(value, batch_of()[name]) for name, value in before.items())


@pytest.mark.gpu
def test_same_draws_on_the_gpu():
    here = mixup(IMAGES, rng_of(16))
    there = mixup(IMAGES.cuda(), Draws.of_view("mixup", 0, 1, torch.arange(16).cuda()))
    assert torch.equal(there.partner.cpu(), here.partner)
    torch.testing.assert_close(there.share.cpu(), here.share)  # logarithms round differently
