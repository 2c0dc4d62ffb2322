"""The losses on maps and boxes against plain formulas, number by number in float64."""

import math

import pytest
import torch

from mdistiller.functional.dense import cwd_loss, fgfi_loss, fgfi_masks, fkd_attention, masked_distance, pkd_loss
from mdistiller.registry import InputError


def maps(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)]


def softmax(values):
    total = sum(math.exp(v) for v in values)
    return [math.exp(v) / total for v in values]


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_cwd(tau):
    f_s, f_t = maps(2, 3, 2, 4)
    expected = 0.0
    for b in range(2):
        for d in range(3):
            p_s, p_t = (softmax([v / tau for v in f[b, d].flatten().tolist()]) for f in (f_s, f_t))
            expected += sum(t * math.log(t / s) for s, t in zip(p_s, p_t, strict=True))
    assert cwd_loss(f_s, f_t, tau).item() == pytest.approx(tau**2 * expected / 6, rel=1e-12)
    assert torch.autograd.gradcheck(lambda f: cwd_loss(f, f_t, tau), f_s.requires_grad_())
    assert cwd_loss(f_t + 3, f_t).item() == pytest.approx(0, abs=1e-12)
    assert cwd_loss(1e4 * f_t, -1e4 * f_t).isfinite()  # where the softmax underflows


def test_pkd():
    f_s, f_t = maps(2, 3, 2, 2)
    expected = 0.0
    for d in range(3):
        columns = []
        for f in (f_s, f_t):
            values = f[:, d].flatten().tolist()
            mean = sum(values) / 8
            std = math.sqrt(sum((v - mean) ** 2 for v in values) / 7)
            columns.append([(v - mean) / (std + 1e-6) for v in values])
        expected += sum((s - t) ** 2 for s, t in zip(*columns, strict=True))
    assert pkd_loss(f_s, f_t).item() == pytest.approx(expected / 24 / 2, rel=1e-12)
    assert torch.autograd.gradcheck(lambda f: pkd_loss(f, f_t), f_s.requires_grad_())
    assert pkd_loss(5 * f_t + 3, f_t).item() == pytest.approx(0, abs=1e-9)
    one = torch.ones(1, 3, 1, 1, requires_grad=True)
    (gradient,) = torch.autograd.grad(pkd_loss(one, 2 * one.detach()), one)
    assert not gradient.any()


def iou(a, b):
    sides = [max(min(a[i + 2], b[i + 2]) - max(a[i], b[i]), 0) for i in (0, 1)]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    both = sides[0] * sides[1]
    return both / (sum(areas) - both)


def test_fgfi_masks_near_objects():
    """Two levels of 3x4 and 1x2 positions with two anchors each."""
    sizes, anchors = [(3, 4), (1, 2)], []
    for (height, width), stride in zip(sizes, (8, 16), strict=True):
        level = []
        for y in range(height):
            for x in range(width):
                for side in (stride, 2 * stride):
                    level.append(
                        [x * stride - side / 2, y * stride - side / 2, x * stride + side / 2, y * stride + side / 2]
                    )
        anchors.append(level)
    boxes = [[[1.0, 2, 12, 14], [0, 0, 24, 20]], [], [[20.0, 1, 30, 9]]]
    masks = fgfi_masks([torch.tensor(a) for a in anchors], sizes, [torch.tensor(b).reshape(-1, 4) for b in boxes], 0.6)
    for picture, own in enumerate(boxes):
        best = [max(iou(box, a) for level in anchors for a in level) for box in own]
        for (height, width), level, mask in zip(sizes, anchors, masks, strict=True):
            for place in range(height * width):
                near = any(
                    iou(box, a) > 0.6 * b
                    for box, b in zip(own, best, strict=True)
                    for a in level[2 * place : 2 * place + 2]
                )
                assert mask[picture].flatten()[place].item() == near
    assert masks[0].any() and masks[1].any() and not masks[0][1].any()


def test_fgfi_loss():
    pairs = [maps(2, 3, 2, 2), maps(2, 3, 1, 1, seed=1)]
    masks = [torch.tensor([[[True, False], [True, True]], 2 * [[False, False]]]), torch.tensor([[[False]], [[True]]])]
    total = sum(
        (f_s - f_t)[b, d, y, x].item() ** 2
        for (f_s, f_t), mask in zip(pairs, masks, strict=True)
        for b, y, x in mask.nonzero().tolist()
        for d in range(3)
    )
    maps_s, maps_t = zip(*pairs, strict=True)
    assert fgfi_loss(maps_s, maps_t, masks).item() == pytest.approx(total / (2 * 4), rel=1e-12)
    nothing = fgfi_loss(maps_s, maps_t, [mask & False for mask in masks])
    assert nothing.item() == 0


def test_fkd_attention_and_distance():
    f, g = maps(2, 3, 2, 2)
    spatial, channel = fkd_attention(f, 0.5)
    for b in range(2):
        means = [sum(abs(f[b, d, y, x].item()) for d in range(3)) / 3 for y in range(2) for x in range(2)]
        assert spatial[b].flatten().tolist() == pytest.approx([4 * p for p in softmax([2 * m for m in means])])
        means = [f[b, d].abs().sum().item() / 4 for d in range(3)]
        assert channel[b].flatten().tolist() == pytest.approx([3 * p for p in softmax([2 * m for m in means])])
    expected = sum(
        spatial[b, 0, y, x].item() * (f - g)[b, d, y, x].item() ** 2
        for b in range(2)
        for d in range(3)
        for y in range(2)
        for x in range(2)
    )
    assert masked_distance(f, g, spatial).item() == pytest.approx(math.sqrt(expected), rel=1e-12)
    f = g.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_distance(f, g), f)
    assert not gradient.any()


@pytest.mark.parametrize("loss", [cwd_loss, pkd_loss, masked_distance])
def test_other_shapes_are_refused(loss):
    with pytest.raises(InputError, match="one shape"):
        loss(torch.ones(1, 2, 2, 2), torch.ones(1, 1, 2, 2))
