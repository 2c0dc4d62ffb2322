"""Every way to compare two graphs, against ``oracles/vrm.py``, all edges written out; at the ends, and what it costs.

Differences of unit length, VRM's own, are tested through ``vrm_loss`` in tests/distillers/test_vrm.py.
"""

import itertools
from dataclasses import asdict

import pytest
import torch
from oracles import vrm as oracle
from torch.profiler import ProfilerActivity, profile

from mdistiller.functional import graphs
from mdistiller.functional.graphs import Rules, compare_graphs, edge_uncertainty
from mdistiller.registry import InputError

VARIANTS = [
    {"relation": "gram"},
    {"relation": "gram", "edge_norm": False},
    {"relation": "gram", "metric": "l1"},
    {"relation": "gram", "metric": "huber", "huber_delta": 0.01},
    {"edge_norm": False},
    {"edge_norm": False, "metric": "l1"},
    {"edge_norm": False, "metric": "huber", "huber_delta": 0.05},
    {"edge_norm": False, "metric": "huber", "huber_delta": 5.0},
    {"relation": "angle"},
    {"relation": "angle", "metric": "l1"},
    {"relation": "angle", "metric": "huber", "huber_delta": 0.3},
    {},
    {"metric": "cosine"},
    {"metric": "l1"},
    {"metric": "huber", "huber_delta": 0.3},
]
DIFFERENTIABLE_TWICE = [{"relation": "gram"}, {"relation": "gram", "edge_norm": False}, {"edge_norm": False}]


def vertices(count=6, width=5, seed=0, noise=0.4):
    """Student's and teacher's, ``(2, N, D)``: probabilities, the virtual view's near the real one's."""
    generator = torch.Generator().manual_seed(seed)

    def draw(spread):
        return spread * torch.randn(count, width, generator=generator, dtype=torch.float64)

    base = draw(1.5)
    networks = []
    for _ in range(2):
        real = base + draw(0.5)
        networks.append(torch.stack([real, real + draw(noise)]).softmax(2))
    return networks


def assert_equals_written_out(student, teacher, rules, beliefs=None, tolerance=1e-9):
    ours, theirs = student.clone().requires_grad_(), student.clone().requires_grad_()
    beliefs = student if beliefs is None else beliefs
    found = compare_graphs(ours, teacher, beliefs, rules)
    expected, kept = oracle.graph_loss(theirs, teacher, beliefs, **asdict(rules))
    assert found.kept.item() == pytest.approx(kept.item())
    assert found.loss.item() == pytest.approx(expected.item(), rel=tolerance)
    found.loss.backward()
    expected.backward()
    assert (ours.grad - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_equals_written_out(options):
    for percentile in (100.0, 80.0):
        assert_equals_written_out(*vertices(), Rules(percentile, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_reductions(options):
    for reduction in ("element", "edge", "sum"):
        assert_equals_written_out(*vertices(4, 7), Rules(90.0, reduction=reduction, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_within_one_view(options):
    """Every edge is there twice; those of length zero on the diagonal have no direction and are dropped."""
    student, teacher = (x[:1].repeat(2, 1, 1) for x in vertices())
    assert_equals_written_out(student, teacher, Rules(100.0, **options))


@pytest.mark.parametrize(
    "options", [{"metric": "l1"}, {"relation": "angle"}, {"edge_norm": False, "metric": "l1"}], ids=str
)
def test_edges_of_length_zero(options):
    """With ``edge_eps`` 0 they are kept, as zero vectors without gradient."""
    student, teacher = vertices(noise=0.0)
    assert_equals_written_out(student, teacher, Rules(100.0, edge_eps=0.0, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_beliefs_that_are_not_the_vertices(options):
    """As with features: other entries, and what is pruned goes by them."""
    student, teacher = vertices()
    beliefs = vertices(width=3, seed=5)[0]
    assert_equals_written_out(student, teacher, Rules(70.0, **options), beliefs)
    own, other = (compare_graphs(student, teacher, b, Rules(70.0, **options)).loss for b in (student, beliefs))
    assert own != other


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_vertices_that_are_no_distributions(options):
    """Features: any size, any sign, entries that differ by more than 2."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    assert_equals_written_out(student, teacher, Rules(90.0, **options), student.softmax(2))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_chunks_do_not_matter(options, monkeypatch):
    monkeypatch.setattr(graphs, "CHUNK", 7)
    assert_equals_written_out(*vertices(), Rules(90.0, **options))


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_gradient(options):
    student, teacher = vertices(3, 4)
    rules = Rules(100.0, **options)
    logits = student.log().requires_grad_()
    assert torch.autograd.gradcheck(lambda z: compare_graphs(z.softmax(2), teacher, student, rules).loss, (logits,))


@pytest.mark.parametrize("options", DIFFERENTIABLE_TWICE, ids=str)
def test_gradient_of_the_gradient(options):
    student, teacher = vertices(3, 4)
    rules = Rules(100.0, **options)
    logits = student.log().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: compare_graphs(z.softmax(2), teacher, student, rules).loss, (logits,))


@pytest.mark.parametrize("options", [{}, {"metric": "l1"}, {"relation": "angle"}], ids=str)
def test_refuses_the_gradient_of_the_gradient(options):
    """It is no function of the vertices for autograd, so a second one would silently lack a part."""
    student, teacher = vertices(3, 4)
    student.requires_grad_()
    loss = compare_graphs(student, teacher, student, Rules(100.0, **options)).loss
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(loss, student, create_graph=True)


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_zero_and_no_gradient_for_equal_networks(options):
    student = vertices()[0].requires_grad_()
    found = compare_graphs(student, student.detach(), student, Rules(**options))
    found.loss.backward()
    assert 0 <= found.loss.item() < 1e-12
    assert student.grad.abs().max() < 1e-6


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_finite_at_the_extremes(options):
    one_hot = torch.eye(4, dtype=torch.float64)[torch.tensor([0, 0, 1, 2])]
    flat = torch.full((4, 4), 0.25, dtype=torch.float64)
    for real, virtual, edge_eps in itertools.product((one_hot, flat), (one_hot, flat), (0.0, 1e-3)):
        student = torch.stack([real, virtual]).requires_grad_()
        for teacher in (torch.stack([one_hot, one_hot.flip(0)]), torch.stack([flat, flat]), vertices(4, 4)[1]):
            found = compare_graphs(student, teacher, student, Rules(edge_eps=edge_eps, **options))
            (gradient,) = torch.autograd.grad(found.loss, student)
            assert torch.isfinite(found.loss) and torch.isfinite(gradient).all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_numbers_that_are_none_are_not_hidden(options):
    """A run is stopped by them; a graph that dropped them would let it go on."""
    student, teacher = vertices()
    student[0, 0, 0] = torch.nan
    beliefs = vertices()[0]
    assert compare_graphs(student, teacher, beliefs, Rules(100.0, **options)).loss.isnan()


# Uncertainty


@pytest.mark.parametrize("count", [5, 10, 13, 64])
@pytest.mark.parametrize("columns", [False, True])
@pytest.mark.parametrize("kind", ["mixture", "sum"])
def test_equal_views_have_equal_uncertainties_both_ways(count, columns, kind):
    """[i, j] and [j, i] are one number, which rounding once made two: a percentile could drop one half of a tie."""
    p = vertices(count, 9, seed=count)[0][0].float()
    p = (p.T / p.T.sum(1, keepdim=True)) if columns else p
    h = edge_uncertainty(p, p.clone(), kind)
    assert torch.equal(h, h.T)


@pytest.mark.parametrize("percentile", [10.0, 37.0, 50.0, 83.0, 95.0])
def test_ties_are_kept_or_dropped_together(percentile):
    p = vertices(40, 10)[0][0].T.contiguous()
    p = p / p.sum(1, keepdim=True)
    dropped, _ = graphs.unreliable_edges(p, p.clone(), Rules(percentile, uncertainty="mixture"))
    assert torch.equal(dropped, dropped.T)


# Options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relation": "distance"}, "RELATION: no 'distance'; closest: difference"),
        ({"metric": "cosine", "edge_norm": False}, "METRIC cosine .* EDGE_NORM True, got difference and False"),
        ({"metric": "cosine", "relation": "gram"}, "METRIC cosine .* RELATION difference .* got gram"),
        ({"relation": "angle", "edge_norm": False}, "RELATION angle .* EDGE_NORM must be True"),
    ],
)
def test_options_without_sense(options, message):
    with pytest.raises(InputError, match=message):
        Rules(**options)


# What it costs


@pytest.mark.parametrize(("options", "limit"), [({"metric": "l1"}, 30), ({"relation": "angle"}, 48)], ids=str)
def test_memory_of_what_does_not_factor(options, limit):
    """Megabytes alive at once, where the edges of one network have 31 and its angles 97."""
    student, teacher = vertices(100, 400) if "metric" in options else vertices(230, 20)
    student.requires_grad_()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compare_graphs(student, teacher, student, Rules(**options)).loss.backward()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    peak = max(itertools.accumulate(sizes)) / 2**20
    print(f"{peak:.1f} MB")
    assert 1 < peak < limit
