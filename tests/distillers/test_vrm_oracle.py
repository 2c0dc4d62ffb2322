"""VRM's losses against ``oracles/vrm.py``, where every edge is written out; and that file against numbers by hand.

Tolerances are relative to the largest entry. The oracle gets float32 inputs as the same numbers in float64, so that
what is measured is the arithmetic and not the rounding of the inputs.

Three choices jump: which side of the percentile or of ``edge_eps`` an edge is on, and the sign in L1's gradient. Within
float32's rounding of the jump both answers are right, and a whole edge apart. So every case draws its inputs anew until
no edge is that close (``jumps``, which asks the oracle alone), and the comparison stays strict.
"""

import itertools
import math
import zlib
from dataclasses import dataclass

import pytest
import torch
from oracles import vrm as oracle
from torch import Tensor

EPS = torch.finfo(torch.float32).eps
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
SHAPES = [(8, 5), (16, 10), (5, 32), (2, 3), (64, 100)]
SMALL = SHAPES[:-1]
KINDS = ["cross", "mixture", "sum"]


# ------------------------------------------------------------------------------------------------------ implementation
# Imported late, so that the tests of the oracle run without it.


def library_loss(*predictions: Tensor, **options) -> tuple[Tensor, Tensor]:
    from mdistiller.distillers.VRM import vrm_loss

    return vrm_loss(*predictions, **options)


def library_uncertainty(p_real: Tensor, p_virtual: Tensor, kind: str) -> Tensor:
    from mdistiller.distillers.VRM import edge_uncertainty

    return edge_uncertainty(p_real, p_virtual, kind)


# -------------------------------------------------------------------------------------------------------------- inputs


@dataclass(frozen=True)
class Case:
    """One row of the table: what the predictions look like, and the loss's options."""

    shape: tuple[int, int]
    sharp: bool = False
    noise: float = 0.5  # of the virtual view's logits; 0: both views predict the same
    same: bool = False  # student and teacher predict the same
    percentile: float = 95.0
    metric: str = "mse"
    reduction: str = "element"
    uncertainty: str = "cross"
    edge_eps: float = 1e-3
    huber_delta: float = 1.0

    def options(self) -> dict:
        return {
            "prune_percentile": self.percentile,
            "metric": self.metric,
            "reduction": self.reduction,
            "uncertainty": self.uncertainty,
            "edge_eps": self.edge_eps,
            "huber_delta": self.huber_delta,
        }

    def __str__(self) -> str:
        words = ["{}x{}".format(*self.shape), "sharp" if self.sharp else "flat"] + ["same"] * self.same
        words += [f"noise{self.noise:g}", f"P{self.percentile:g}", f"eps{self.edge_eps:g}"]
        words += [self.metric, self.reduction, self.uncertainty]
        return "-".join(words + [f"delta{self.huber_delta:g}"] * (self.metric == "huber"))


def probabilities(logits: Tensor, sharp: bool) -> Tensor:
    """Sharp: as they are. Flat: standardised over the classes, at temperature 4."""
    if sharp:
        return logits.softmax(dim=1)
    return ((logits - logits.mean(1, keepdim=True)) / (logits.std(1, keepdim=True) + 1e-7) / 4).softmax(dim=1)


def draw(case: Case, attempt: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Real and virtual of the student, then of the teacher: four ``(B, C)``, numbers of ``dtype`` held in float64.

    The teacher is sure of a class in most rows; the student is a noisy, flatter copy of it.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(f"{case} {attempt}".encode()))

    def noise() -> Tensor:
        return torch.randn(case.shape, generator=generator, dtype=torch.float64)

    label = torch.randint(case.shape[1], (case.shape[0],), generator=generator)
    teacher = noise() + 5 * torch.nn.functional.one_hot(label, case.shape[1])
    student = teacher if case.same else 0.5 * teacher + 0.7 * noise()
    shift = noise()
    shifts = (shift, shift if case.same else noise())
    logits = [x for z, d in zip((student, teacher), shifts, strict=True) for x in (z, z + case.noise * d)]
    return [probabilities(z, case.sharp).to(dtype).double() for z in logits]


def graphs(predictions: list[Tensor]) -> list[list[Tensor]]:
    """The vertices of both graphs, and what the uncertainties are taken of: real, virtual."""
    columns = [p.T for p in predictions]
    return [[*predictions, *predictions[:2]], [*columns, *map(oracle.sum_to_one, columns[:2])]]


def percentile_jumps(unsure: Tensor, percentile: float) -> bool:
    """Whether the last edge kept and the first one dropped are as good as equally uncertain.

    The quantile lies between ranks floor(r) and floor(r) + 1 for r = m / 100 (n - 1). This also takes out exact ties
    across it (with ``mixture`` and equal views, [i, j] and [j, i]), which rounding would break one way or the other.
    """
    ordered = unsure.flatten().sort().values
    rank = math.floor(percentile / 100 * (len(ordered) - 1))
    return rank + 1 < len(ordered) and bool(ordered[rank + 1] - ordered[rank] < 16 * EPS * ordered[rank])


def length_jumps(real: Tensor, virtual: Tensor, edge_eps: float) -> bool:
    """Whether an edge is as good as ``edge_eps`` mean lengths long."""
    length = oracle.lengths(oracle.differences(real, virtual))
    return edge_eps > 0 and bool(((length / (edge_eps * length.mean()) - 1).abs() < 1e-3).any())


def sign_jumps(real_s: Tensor, virtual_s: Tensor, real_t: Tensor, virtual_t: Tensor) -> bool:
    """Whether two edges as good as agree in an entry: L1's kink."""
    edges = [oracle.unit_edges(oracle.differences(r, v)) for r, v in ((real_s, virtual_s), (real_t, virtual_t))]
    return bool(((edges[0] - edges[1]).abs() < 32 * EPS).any())


def jumps(case: Case, predictions: list[Tensor]) -> bool:
    """Whether rounding could change which edges are kept, or a sign."""
    for real_s, virtual_s, real_t, virtual_t, *shares in graphs(predictions):
        if percentile_jumps(oracle.edge_uncertainty(*shares, case.uncertainty), case.percentile):
            return True
        if length_jumps(real_s, virtual_s, case.edge_eps) or length_jumps(real_t, virtual_t, case.edge_eps):
            return True
        if case.metric == "l1" and sign_jumps(real_s, virtual_s, real_t, virtual_t):
            return True
    return False


def inputs(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The first draw of ``case`` that nothing jumps in."""
    for attempt in range(100):
        predictions = draw(case, attempt, dtype)
        if not jumps(case, predictions):
            return tuple(predictions)
    raise AssertionError(f"no draw of {case} stays clear of the jumps")


# --------------------------------------------------------------------------------------------------------------- table


def table() -> list[Case]:
    """Each part crosses the factors that act on each other; no case twice."""
    cases = [
        Case(shape, sharp, noise, edge_eps=eps)
        for shape, sharp, noise, eps in itertools.product(SHAPES, (False, True), (0.5, 1e-3, 1e-5, 0.0), (0.0, 1e-3))
    ]
    # The alternating arguments below (sharp, eps) halve a cross product.
    metrics = [("mse", 1.0), ("l1", 1.0), ("huber", 1.0), ("huber", 0.1), ("cosine", 1.0)]
    crossed = itertools.product(SMALL, metrics, ("element", "edge", "sum"), (100.0, 95.0, 50.0))
    cases += [
        Case(shape, n % 2 == 0, 0.5, False, m, metric, reduction, edge_eps=(0.0, 1e-3)[n // 2 % 2], huber_delta=delta)
        for n, (shape, (metric, delta), reduction, m) in enumerate(crossed)
    ]
    crossed = itertools.product(SMALL, KINDS, (100.0, 95.0, 50.0), (0.5, 1e-3))
    cases += [
        Case(shape, n % 2 == 1, noise, percentile=m, uncertainty=kind)
        for n, (shape, kind, m, noise) in enumerate(crossed)
    ]
    # With equal views [i, j] and [j, i] tie exactly under two of the kinds; at these sizes m = 95 would split a pair.
    cases += [
        Case((16, 10), sharp, 0.0, percentile=90.0, uncertainty=kind) for sharp in (False, True) for kind in KINDS
    ]
    cases += [Case((64, 100), True, percentile=m, uncertainty=kind) for m in (50.0, 100.0) for kind in KINDS]
    cases += [Case((64, 100), metric=metric, huber_delta=0.1) for metric in ("huber", "cosine")]
    # With nearly equal views some metrics and reductions weigh the short edges differently.
    crossed = itertools.product(("l1", "huber", "cosine"), (1e-3, 1e-5), (0.0, 1e-3))
    cases += [Case((8, 5), noise=noise, metric=metric, edge_eps=eps) for metric, noise, eps in crossed]
    return list(dict.fromkeys(cases))


SAME = [
    Case(shape, sharp, noise, True, m, metric, edge_eps=eps)
    for shape, sharp, noise, m, metric, eps in itertools.product(
        [(8, 5), (5, 32), (2, 3)], (False, True), (0.5, 1e-5), (95.0,), ("mse", "huber", "cosine"), (0.0, 1e-3)
    )
] + [Case((64, 100), False, 0.5, True)]


# --------------------------------------------------------------------------------------------------------- comparisons


def values_and_gradients(loss, predictions, dtype: torch.dtype, options: dict) -> list[tuple[Tensor, Tensor]]:
    """For either graph: the loss, and its gradient to the student's two, ``(2, B, C)``, in float64."""
    student = [p.to(dtype).requires_grad_() for p in predictions[:2]]
    losses = loss(*student, *(p.to(dtype) for p in predictions[2:]), **options)
    gradients = [torch.autograd.grad(value, student, retain_graph=True) for value in losses]
    return [
        (value.detach().double(), torch.stack(gradient).double())
        for value, gradient in zip(losses, gradients, strict=True)
    ]


def assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str, scale: Tensor | None = None) -> None:
    """Within ``tolerance`` times ``scale``, or else times the largest entry expected; NaN is never close."""
    scale = expected.abs().max() if scale is None else scale
    error = (actual - expected).abs().max()
    assert error <= tolerance * scale, f"{what}: {error:.3g} off at a scale of {scale:.3g}"


def compare(case: Case, dtype: torch.dtype, scales=((None, None), (None, None))) -> None:
    predictions = inputs(case, dtype)
    expected = values_and_gradients(oracle.vrm_loss, predictions, torch.float64, case.options())
    actual = values_and_gradients(library_loss, predictions, dtype, case.options())
    for name, mine, theirs, scale in zip(("ISV", "ICV"), expected, actual, scales, strict=True):
        assert_close(theirs[0], mine[0], TOLERANCE[dtype], f"{name} value", scale[0])
        assert_close(theirs[1], mine[1], TOLERANCE[dtype], f"{name} gradient", scale[1])


DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=lambda dtype: str(dtype).removeprefix("torch."))


@DTYPES
@pytest.mark.parametrize("case", table(), ids=str)
def test_values_and_gradients(case, dtype):
    compare(case, dtype)


@DTYPES
@pytest.mark.parametrize("case", SAME, ids=str)
def test_student_equal_to_teacher(case, dtype):
    """Loss and gradient are 0 here: the tolerance is relative to those with an unrelated teacher, its rows rotated."""
    real, virtual, *_ = inputs(case, dtype)
    unrelated = (real, virtual, real.roll(1, 0), virtual.roll(1, 0))
    scales = values_and_gradients(oracle.vrm_loss, unrelated, torch.float64, case.options())
    compare(case, dtype, [(value, gradient.abs().max()) for value, gradient in scales])


@DTYPES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_edge_uncertainty(shape, sharp, kind, dtype):
    """Of rows and of columns. It only makes the mask, so its gradient is not compared."""
    for *_, real, virtual in graphs(draw(Case(shape, sharp), 0)):
        actual = library_uncertainty(real.to(dtype), virtual.to(dtype), kind)
        expected = oracle.edge_uncertainty(real.to(dtype), virtual.to(dtype), kind)
        assert actual.shape == expected.shape
        assert_close(actual.double(), expected, TOLERANCE[dtype], kind)


@pytest.mark.parametrize("metric", ["mse", "l1"])
def test_saturated_predictions(metric):
    """Probabilities that are 0 or 1 to the last bit: logarithms of 0, many equal edges, and lengths of 0."""
    case = Case((16, 10), True, percentile=100.0, metric=metric)
    predictions = [p.gt(p.amax(1, keepdim=True) * 0.5).float() for p in draw(case, 0)]
    for value, gradient in values_and_gradients(library_loss, predictions, torch.float32, case.options()):
        assert value.isfinite()
        assert gradient.isfinite().all()


@pytest.mark.parametrize("loss", [oracle.vrm_loss, library_loss], ids=["oracle", "library"])
def test_no_gradient_to_the_teacher(loss):
    predictions = [p.requires_grad_() for p in draw(Case((8, 5)), 0)]
    sum(loss(*predictions)).backward()
    assert [p.grad is not None and bool(p.grad.abs().max() > 0) for p in predictions] == [True, True, False, False]


# ------------------------------------------------------------------------------------------------------------- by hand
# B = C = 2. Student: real (.8 .2 / .3 .7), virtual (.5 .5 / .7 .3). Teacher: real (.1 .9 / .2 .8), virtual all .5.
#
# Inter-sample: a difference of two predictions is (d, -d), so its edge is +-(1, -1) / sqrt(2) by the sign of d. For the
# pairs 00, 01, 10, 11 d is .3, .1, -.2, -.4 (student) and -.4, -.4, -.3, -.3 (teacher): 00 and 01 are opposite, and
# differ by sqrt(2) in both entries: squares 2 + 2.
# Inter-class, columns: student real (.8 .3), (.2 .7), virtual (.5 .7), (.5 .3); differences (.3 -.4), (.3 0), (-.3 0),
# (-.3 .4), edges (.6 -.8), (1 0), (-1 0), (-.6 .8). Teacher: real (.1 .2), (.9 .8), virtual (.5 .5) twice; differences
# (-.4 -.3) twice, (.4 .3) twice, edges (-.8 -.6) twice, (.8 .6) twice. Edges less edges: (1.4 -.2), (1.8 .6),
# (-1.8 -.6), (-1.4 .2); their squares 2, 3.6, 3.6, 2.
#
# Cross entropies: rows, ln 2 = .6931 (00, 10), -.8 ln .7 - .2 ln .3 = .5261 (01), -.3 ln .7 - .7 ln .3 = .9498 (11);
# columns over their sums 1.1, .9, 1.2, .8: .7837, .6093, .6138, .8673. At m = 95 the threshold has rank 2.85 of 0 to 3:
# both graphs drop 11. edge_eps = .5 drops what is shorter than half the mean, here the student's inter-sample 01
# (.1 against a mean of .25, both times sqrt(2)); the inter-class lengths .5, .3, .3, .5 and .5 all stay.

HAND = [[[0.8, 0.2], [0.3, 0.7]], [[0.5, 0.5], [0.7, 0.3]], [[0.1, 0.9], [0.2, 0.8]], [[0.5, 0.5], [0.5, 0.5]]]
ROOT = math.sqrt(2)
BY_HAND = [
    ({}, 8 / 8, 11.2 / 8),
    ({"reduction": "edge"}, 8 / 4, 11.2 / 4),
    ({"reduction": "sum"}, 8, 11.2),
    ({"metric": "cosine"}, 4 / 8, 5.6 / 8),
    ({"metric": "l1"}, 4 * ROOT / 8, (1.6 + 2.4 + 2.4 + 1.6) / 8),
    # delta 1: d^2 / 2 up to 1, d - 1/2 above
    ({"metric": "huber"}, 4 * (ROOT - 0.5) / 8, (0.92 + 1.48 + 1.48 + 0.92) / 8),
    # delta 0.5: d^2 / 2 up to .5, (d - .25) / 2 above
    ({"metric": "huber", "huber_delta": 0.5}, 2 * (ROOT - 0.25) / 8, 2 * (0.575 + 0.02 + 0.775 + 0.175) / 8),
    ({"prune_percentile": 95.0}, 8 / 6, 9.2 / 6),
    ({"edge_eps": 0.5}, 4 / 6, 11.2 / 8),
    ({"edge_eps": 0.5, "reduction": "edge"}, 4 / 3, 11.2 / 4),
]


@pytest.mark.parametrize("loss", [oracle.vrm_loss, library_loss], ids=["oracle", "library"])
@pytest.mark.parametrize(("options", "isv", "icv"), BY_HAND, ids=[str(row[0]) for row in BY_HAND])
def test_by_hand(loss, options, isv, icv):
    options = {"prune_percentile": 100.0, "edge_eps": 0.0} | options
    values = loss(*torch.tensor(HAND, dtype=torch.float64), **options)
    assert [value.item() for value in values] == pytest.approx([isv, icv], rel=1e-9)


@pytest.mark.parametrize("uncertainty", [oracle.edge_uncertainty, library_uncertainty], ids=["oracle", "library"])
def test_uncertainties_by_hand(uncertainty):
    real, virtual = torch.tensor(HAND, dtype=torch.float64)[:2]
    # mixtures of 01 and 10: (.75 .25), (.4 .6); entropies of the rows: .5004, .6109 and .6931, .6109
    cross, mixture, total = (uncertainty(real, virtual, kind).flatten().tolist() for kind in KINDS)
    assert cross == pytest.approx([0.6931, 0.5261, 0.6931, 0.9498], abs=6e-5)
    assert mixture[1:3] == pytest.approx([0.5623, 0.6730], abs=6e-5)
    assert total == pytest.approx([1.1935, 1.1113, 1.3040, 1.2217], abs=6e-5)


@pytest.mark.parametrize("metric", ["mse", "l1", "huber", "cosine"])
def test_gradient_of_the_oracle(metric):
    student = [p.requires_grad_() for p in draw(Case((4, 3)), 0)[:2]]
    teacher = draw(Case((4, 3)), 1)[2:]
    assert torch.autograd.gradcheck(lambda *s: oracle.vrm_loss(*s, *teacher, metric=metric), student)


def test_oracle_without_an_edge():
    """Nothing but equal rows: no edge has a direction, and none of the results is NaN."""
    equal = [torch.full((3, 4), 0.25, dtype=torch.float64) for _ in range(4)]
    for eps in (0.0, 1e-3):
        for value, gradient in values_and_gradients(oracle.vrm_loss, equal, torch.float64, {"edge_eps": eps}):
            assert value == 0
            assert not gradient.any()
