"""Consistencies and correlations of two networks' predictions, against scipy and against loops."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

from mdistiller.analysis import consistency
from mdistiller.analysis.consistency import (
    nontarget_class_consistency,
    prediction_correlation,
    target_class_consistency,
)
from mdistiller.registry import InputError

SCIPY = {"pearson": stats.pearsonr, "spearman": stats.spearmanr, "kendall": stats.kendalltau}


def pair(images=40, classes=7, seed=0, ties=False):
    generator = torch.Generator().manual_seed(seed)
    shared, a, b = torch.randn(3, images, classes, generator=generator, dtype=torch.float64)
    a, b = (shared + a) * 2, (shared + b) * 2
    return (a.round(), b.round()) if ties else (a, b)


def targets(images=40, classes=7):
    return torch.arange(images) * 5 % classes


@pytest.fixture(params=[2**18, 64], ids=["one slice", "many slices"], autouse=True)
def slices(request, monkeypatch):
    monkeypatch.setattr(consistency, "SLICE", request.param)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("axis", ["inter", "intra"])
@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_correlation_equals_scipys(kind, axis, ties):
    a, b = pair(ties=ties)
    if axis == "intra" and ties:  # the softmax unties columns, but for equal images
        a, b = a[torch.arange(40) // 2], b[torch.arange(40) // 3]
    p, q = (z.softmax(1).numpy() for z in (a, b))
    if kind != "pearson":  # scipy would rank differences of rounding
        p, q = p.round(12), q.round(12)
    rows = zip(p.T, q.T, strict=True) if axis == "intra" else zip(p, q, strict=True)
    expected = np.nanmean([SCIPY[kind](x, y).statistic for x, y in rows])
    assert prediction_correlation(a, b, kind, axis) == pytest.approx(expected, rel=1e-10)


def rank_loop(row):
    """Average ranks, written out."""
    return [sum(y < x for y in row) + (sum(y == x for y in row) + 1) / 2 for x in row]


def pearson_loop(x, y):
    x, y = ([v - sum(z) / len(z) for v in z] for z in (x, y))
    return sum(v * w for v, w in zip(x, y, strict=True)) / math.sqrt(sum(v * v for v in x) * sum(w * w for w in y))


@pytest.mark.parametrize("ties", [False, True])
def test_nontarget_consistency_equals_a_loop(ties):
    a, b = pair(ties=ties)
    target = targets()
    found = []
    for row_a, row_b, own in zip(a.tolist(), b.tolist(), target.tolist(), strict=True):
        others = [[x for i, x in enumerate(row) if i != own] for row in (row_a, row_b)]
        found.append(pearson_loop(*map(rank_loop, others)))
    assert nontarget_class_consistency(a, b, target) == pytest.approx(sum(found) / len(found), rel=1e-10)


@pytest.mark.parametrize("ties", [False, True])
def test_target_consistency_equals_a_loop(ties):
    a, b = pair(ties=ties)
    target = targets()
    same = 0
    for row_a, row_b, own in zip(a.tolist(), b.tolist(), target.tolist(), strict=True):
        same += sum(x > row_a[own] for x in row_a) == sum(x > row_b[own] for x in row_b)
    assert 0 < same < len(target)
    assert target_class_consistency(a, b, target) == pytest.approx(same / len(target))


@pytest.mark.parametrize("length", [2, 3, 16, 17])
def test_inversions_equal_a_loop(length):
    ranks = torch.randint(length, (50, length), generator=torch.Generator().manual_seed(length))
    expected = [sum(x > y for x, y in itertools.combinations(row, 2)) for row in ranks.tolist()]
    assert consistency._inversions(ranks).tolist() == expected


def test_the_target_does_not_count_among_the_others_and_nothing_else_among_the_targets():
    a, b = pair()
    target = targets()
    own = torch.nn.functional.one_hot(target, 7).bool()
    moved = b.masked_fill(own, 50.0)
    assert nontarget_class_consistency(a, moved, target) == nontarget_class_consistency(a, b, target)
    assert target_class_consistency(a.masked_fill(own, 50.0), moved, target) == 1.0


@pytest.mark.parametrize("axis", ["inter", "intra"])
@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_ends(kind, axis):
    a, b = pair()
    assert prediction_correlation(a, a, kind, axis) == pytest.approx(1.0)
    assert prediction_correlation(b, a, kind, axis) == pytest.approx(prediction_correlation(a, b, kind, axis))
    shifted = a + torch.randn(len(a), 1)  # the softmax does not see it
    assert prediction_correlation(shifted, b, kind, axis) == pytest.approx(prediction_correlation(a, b, kind, axis))
    if kind != "pearson" and axis == "inter":  # ranks fall where logits rise
        assert prediction_correlation(a, -a, kind, axis) == pytest.approx(-1.0)
    assert prediction_correlation(a.float(), b.bfloat16(), kind, axis) == pytest.approx(
        prediction_correlation(a, b, kind, axis), abs=0.01
    )


@pytest.mark.parametrize("kind", ["pearson", "spearman", "kendall"])
def test_constant_rows_are_left_out(kind):
    a, b = pair()
    expected = prediction_correlation(a[5:], b[5:], kind)
    a[:3], b[3:5] = 1.7, -40.0
    assert prediction_correlation(a, b, kind) == pytest.approx(expected)
    assert math.isnan(prediction_correlation(torch.ones(3, 4), b[:3, :4], kind))
    assert math.isnan(nontarget_class_consistency(torch.ones(3, 4), b[:3, :4], torch.zeros(3, dtype=torch.long)))


def test_confident_networks_have_ranks():
    """In float32 the softmax would say 1 and nothing but 0, and all ranks would be tied."""
    a, b = (z * 200 for z in pair())
    assert prediction_correlation(a.float(), b.float(), "spearman") == pytest.approx(
        prediction_correlation(*pair(), "spearman")
    )


def test_what_is_refused():
    a, b = pair()
    with pytest.raises(InputError, match="of one shape"):
        prediction_correlation(a, b[:5])
    with pytest.raises(InputError, match="not empty"):
        prediction_correlation(a[:0], b[:0])
    with pytest.raises(InputError, match="kind: no 'tau'; known: "):
        prediction_correlation(a, b, "tau")
    with pytest.raises(InputError, match="axis: no 'rows'; known: "):
        prediction_correlation(a, b, axis="rows")
    with pytest.raises(InputError, match="a class number for each of 40 images"):
        target_class_consistency(a, b, targets()[:5])
    with pytest.raises(InputError, match="at least 3"):
        nontarget_class_consistency(a[:, :2], b[:, :2], targets() % 2)
    with pytest.raises(InputError, match="only one"):
        prediction_correlation(a[:1], b[:1], axis="intra")
