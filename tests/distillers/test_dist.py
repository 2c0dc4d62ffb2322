"""DIST and DIST+: their losses against ``oracles/dist.py``, at the ends, and what trains what."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases, rounding
from method_cases import build, config, make_batch, total
from oracles import dist as oracle
from oracles.cases import each_and_some, named
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, numbers
from oracles.stubs import Outputs

from mdistiller.distillers.DIST import (
    acclimation_loss,
    channel_relation_loss,
    cosine_distance,
    dist_loss,
    feature_relation_loss,
    pearson_distance,
    same_size,
    spatial_relation_loss,
)
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.engine.solver import build_optimizer
from mdistiller.functional import at_least_float32
from mdistiller.models import cifar_model_dict, imagenet_model_dict
from mdistiller.registry import InputError, distiller_dict


def logits(rows=5, classes=7, seed=0, scale=3.0, shape=()):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, *shape, generator=generator, dtype=torch.float64) for _ in range(2)]


# The formula: by hand, and the reference's values


def test_the_oracle_by_hand():
    assert oracle.pearson_distance([1.0, 2.0, 3.0], [5.0, 3.0, 1.0], 0.0) == pytest.approx(2.0, rel=1e-12)
    assert oracle.pearson_distance([1.0, 2.0, 3.0], [2.0, 9.0, 4.0], 0.0) == pytest.approx(
        1 - 2 / math.sqrt(2 * 26), rel=1e-12
    )
    assert oracle.pearson_distance([2.0, 2.0], [0.0, 1.0]) == 1.0
    # With two classes a row's correlation is a sign, with one image a column has none.
    inter, intra = oracle.dist_loss([[0.0, 3.0]], [[0.0, 1.0]], 1.0, eps=0.0)
    assert inter == pytest.approx(0.0, abs=1e-12)
    assert intra == 1.0
    # Without class 2 the rows are (0, 1) and (1, 0), up to scale and shift.
    assert oracle.acclimation_loss([[0.0, 1.0, 9.0]], [[1.0, 0.0, 5.0]], [2], eps=0.0) == pytest.approx(2.0, rel=1e-12)
    maps = [[[[1.0, 2.0]], [[3.0, 8.0]]]], [[[[2.0, 1.0]], [[4.0, 0.0]]]]  # one image, two channels, 1 x 2 pixels
    assert oracle.channel_relation_loss(*maps, eps=0.0) == pytest.approx(1.0, rel=1e-12)  # +1 and -1
    assert oracle.spatial_relation_loss(*maps, eps=0.0) == pytest.approx(2.0, rel=1e-12)  # (4, 10) and (6, 1)


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"),
    [(torch.float64, 1e-7, 1e-6), (torch.float32, 1e-4, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", loss_cases("dist"))
def test_golden_values_and_gradients(case, dtype, of_value, of_gradient):
    given, options = case_tensors(case, "in", dtype), case["hyperparameters"]
    tau, student = options.get("tau", 1.0), given["logits_student"].requires_grad_()
    inter, intra = dist_loss(student, given["logits_teacher"], tau)
    loss = tau**2 * (options["beta"] * inter + options["gamma"] * intra)
    loss.backward()
    size = tau**2 * (options["beta"] + options["gamma"])  # of what cancels: 1 - 1, where a correlation is perfect
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=of_value, abs=rounding(dtype, size))
    assert_golden_gradients(case, given, rel=of_gradient, size=size)


# The formula: the logits' losses against the oracle

RELATIONS = {"pearson": oracle.pearson_distance, "cosine": oracle.cosine_distance, "kl": oracle.kl_relation}
KINDS = ["random", "confident", "near", "flat_row", "flat_student", "one_image", "ties"]


SHAPES = [(6, 4), (1, 2), (1, 5), (2, 2), (2, 3), (3, 7), (2, 10)]


def pair(kind: str, batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of student and teacher, ``(batch, classes)``."""
    random = np.random.default_rng(batch * 100 + classes)
    student, teacher = random.normal(size=(2, batch, classes))
    if kind == "confident":
        student, teacher = 4 * student, 8 * teacher
    if kind == "extreme":
        student, teacher = 300 * student, 300 * teacher
    if kind == "near":
        student = teacher + 1e-3 * student
    if kind == "flat_row":
        student[0], teacher[-1] = 0.3, 0.0
    if kind == "flat_student":  # a zero-initialised classifier
        student[:] = 0.0
    if kind == "one_image":  # every column is constant
        student, teacher = (np.tile(x[:1], (batch, 1)) for x in (student, teacher))
    if kind == "ties":
        student, teacher = np.round(student), np.round(teacher)
    return student, teacher


@pytest.mark.parametrize(
    "case", each_and_some(20, shape=SHAPES, kind=KINDS, relation=list(RELATIONS), tau=[1.0, 4.0]), ids=named
)
def test_both_relations_are_equations_8_and_9(case):
    tau, relation = case["tau"], case["relation"]
    assert_agree(
        lambda s, t: dist_loss(s, t, tau, relation),
        lambda s, t: oracle.dist_loss(s, t, tau, relation=RELATIONS[relation]),
        *pair(case["kind"], *case["shape"]),
    )


@pytest.mark.parametrize("relation", ["pearson", "cosine", "kl"])
def test_gradient(relation):
    student, teacher = logits(3, 4, scale=1.0)
    assert torch.autograd.gradcheck(lambda z: dist_loss(z, teacher, 2.0, relation), (student.requires_grad_(),))


def test_gradient_of_the_distances():
    a, b = (x.requires_grad_() for x in logits(3, 4))
    for distance in (pearson_distance, cosine_distance):
        for dim in (0, 1):
            assert torch.autograd.gradcheck(lambda x, y: distance(x, y, dim), (a, b))  # noqa: B023


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
def test_eps_is_added_to_the_product_of_the_norms(eps):
    """At 1e-4 each the product of the norms is eps, and half the correlation is left."""
    for scale in (1e-6, 1e-4, 1e-3, 1.0, 1e6):
        u, v = scale * np.random.default_rng(3).normal(size=(2, 6))
        for library, loops in ((pearson_distance, oracle.pearson_distance), (cosine_distance, oracle.cosine_distance)):
            assert_agree(lambda a, b, f=library: f(a, b, eps=eps), lambda a, b, f=loops: f(a, b, eps), u, v, wrt=(0, 1))


# The formula: acclimation and feature maps against the oracle

ACCLIMATIONS = {
    "nontarget": oracle.acclimation_loss,
    "all": lambda s, t, target, *options: oracle.acclimation_pearson(s, t, *options),
    "kl": lambda s, t, target, tau, eps=0.0: oracle.acclimation_kl(s, t, tau),
}


@pytest.mark.parametrize(
    "case",
    each_and_some(10, shape=SHAPES, logits=[*KINDS, "extreme"], acclimation=list(ACCLIMATIONS), tau=[2.0, 1.0, 4.0]),
    ids=named,
)
def test_acclimation_is_equation_14(case):
    """The teacher's gradient; the student's are constants."""
    images, classes = case["shape"]
    target, kind, tau = np.arange(images) % classes, case["acclimation"], case["tau"]
    assert_agree(
        lambda s, t: acclimation_loss(s, t, torch.as_tensor(target), tau, kind),
        lambda s, t: ACCLIMATIONS[kind](s, t, target.tolist(), tau),
        *pair(case["logits"], images, classes),
        wrt=(0, 1),
    )


@pytest.mark.parametrize("kind", ["nontarget", "all", "kl"])
def test_acclimation_moves_the_teacher_only(kind):
    student, teacher = (z.requires_grad_() for z in logits(3, 5, scale=1.0))
    target = torch.tensor([4, 0, 1])
    assert torch.autograd.gradcheck(lambda z: acclimation_loss(student, z, target, 2.0, kind), (teacher,))
    acclimation_loss(student, teacher, target, 2.0, kind).backward()
    assert student.grad is None and teacher.grad.any()


FEATURE_RELATIONS = {
    "pearson": oracle.pearson_distance,
    "cosine": oracle.cosine_distance,
    "mse": oracle.squared_distance,
}


@pytest.mark.parametrize(
    "case",
    each_and_some(
        10,
        shape=[(2, 4, 3, 2), (1, 1, 2, 2), (2, 3, 1, 1), (1, 2, 2, 3)],
        maps=["random", "near", "large", "constant", "relu"],
        relation=list(FEATURE_RELATIONS),
    ),
    ids=named,
)
def test_feature_relations_are_equations_15_and_16(case):
    shape, maps, relation = case.values()
    student, teacher = np.random.default_rng(sum(shape)).normal(size=(2, *shape))
    if maps == "near":
        student = teacher + 1e-3 * student
    if maps == "large":
        student, teacher = 1e4 * student, 1e3 * teacher + 5e3
    if maps == "constant":
        student[0], teacher[-1] = 0.7, -2.0
    if maps == "relu":
        student, teacher = np.maximum(student, 0), np.maximum(teacher - 0.5, 0)
    # A squared distance is that of the channels' mean, not of their sum.
    distance, channels = FEATURE_RELATIONS[relation], shape[1] if relation == "mse" else 1

    def loops(s, t):
        t = constant(t)
        spatial = oracle.spatial_relation_loss(s, t, relation=distance)
        return oracle.channel_relation_loss(s, t, relation=distance), spatial / channels**2

    assert_agree(lambda s, t: feature_relation_loss(s, t, relation), loops, student, teacher, wrt=(0, 1))


def test_each_feature_relation_by_its_name():
    student, teacher = logits(2, 3, shape=(2, 2))
    for relation in FEATURE_RELATIONS:
        given = student, teacher, relation, 0.1
        assert (channel_relation_loss(*given), spatial_relation_loss(*given)) == feature_relation_loss(*given)


@pytest.mark.parametrize("eps", [1e-8, 0.0, 0.3])
@pytest.mark.parametrize("relation", ["pearson", "cosine", "mse"])
def test_feature_relations_gradient(relation, eps):
    student, teacher = (f.requires_grad_() for f in logits(2, 3, shape=(2, 2)))
    assert torch.autograd.gradcheck(lambda f: feature_relation_loss(f, teacher, relation, eps), (student,))
    sum(feature_relation_loss(student, teacher, relation, eps)).backward()
    assert teacher.grad is None


def plain_feature_relations(f_s, f_t, eps=1e-8):
    """What the closed form stands for, differentiated by autograd."""
    f_s, f_t = at_least_float32(f_s), at_least_float32(f_t)
    sums = f_s.sum(1).flatten(1), f_t.sum(1).flatten(1)
    return pearson_distance(f_s, f_t, 1, eps).mean(), pearson_distance(*sums, 1, eps).mean()


TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 1e-2}


@pytest.mark.parametrize(
    "case",
    each_and_some(
        8,
        kind=["random", "near", "relu", "shifted", "tiny", "partly constant"],
        dtype=list(TOLERANCE),
        eps=[1e-8, 0.0, 0.3],
        layout=[torch.contiguous_format, torch.channels_last],
    ),
    ids=named,
)
def test_the_closed_form_is_the_plain_one(case):
    kind, dtype, eps, layout = case.values()
    tolerance = TOLERANCE[dtype]
    student, teacher = logits(4, 24, shape=(3, 5), scale=1.0)
    if kind == "near":
        student = teacher + 0.1 * student
    if kind == "relu":
        student, teacher = student - 1, teacher.relu()
    if kind == "shifted":
        student, teacher = student + 20, teacher - 30
    if kind == "tiny":
        student, teacher = 1e-4 * student, 1e-3 * teacher
    if kind == "partly constant":
        student[0], student[1, :, 0], teacher[2], teacher[3, :, 1, 1] = 0.7, -30.1, 0.0, 0.3
    student, teacher = (f.to(dtype, memory_format=layout) for f in (student, teacher))
    results = []
    for function in (feature_relation_loss, plain_feature_relations):
        for weights in ((1.0, 0.0), (0.0, 1.0), (2.0, -3.0)):
            f = student.detach().requires_grad_()
            losses = function(f, teacher, eps=eps)
            gradient = torch.autograd.grad(sum(w * loss for w, loss in zip(weights, losses, strict=True)), f)[0]
            assert gradient.dtype == dtype
            results.append((torch.stack(losses), gradient.to(losses[0].dtype)))
    for (losses, gradient), (expected, wanted) in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(losses, expected, rtol=0, atol=min(tolerance, 2e-5))
        assert (gradient - wanted).abs().max() <= tolerance * wanted.abs().max()
        if kind == "partly constant":
            assert not gradient[wanted == 0].any()


# The formula: what it does not depend on, and where it is simple


def test_kl_of_rows_is_kd_and_of_columns_the_same_sum_per_class():
    student, teacher = logits(6, 9)
    inter, intra = dist_loss(student, teacher, 4.0, "kl")
    torch.testing.assert_close(16 * inter, kd_loss(student, teacher, 4.0))
    torch.testing.assert_close(intra, inter * 6 / 9)


def test_pearson_is_blind_to_scale_and_shift_and_cosine_to_scale():
    a, b = logits()
    torch.testing.assert_close(pearson_distance(5 * a + 3, 0.1 * b - 2), pearson_distance(a, b))
    torch.testing.assert_close(pearson_distance(-a, b), 2 - pearson_distance(a, b))
    torch.testing.assert_close(cosine_distance(5 * a, 0.1 * b), cosine_distance(a, b))
    assert not torch.allclose(cosine_distance(a + 3, b), cosine_distance(a, b))


def test_range_and_shape():
    a, b = logits(4, 6, shape=(2, 3))
    assert pearson_distance(a, b, dim=1).shape == (4, 2, 3)
    torch.testing.assert_close(pearson_distance(a, a, eps=0.0), torch.zeros(4, 6, 2, dtype=torch.float64))
    torch.testing.assert_close(pearson_distance(a, -a, eps=0.0), torch.full((4, 6, 2), 2.0, dtype=torch.float64))


def test_blind_to_a_shift_of_the_logits_and_to_the_order_of_images_and_classes():
    student, teacher = logits()
    expected = dist_loss(student, teacher, 4.0)
    torch.testing.assert_close(dist_loss(student + 5.0, teacher - 1.0, 4.0), expected)
    rows, columns = torch.randperm(5), torch.randperm(7)
    torch.testing.assert_close(dist_loss(student[rows][:, columns], teacher[rows][:, columns], 4.0), expected)


def test_every_position_is_a_sample():
    student, teacher = logits(2, 6, shape=(3, 4))
    flat = [
        torch.stack([z[i, :, y, x] for i in range(2) for x in range(4) for y in range(3)]) for z in (student, teacher)
    ]
    torch.testing.assert_close(dist_loss(student, teacher, 1.0), dist_loss(*flat, 1.0))


def test_no_gradient_to_the_teacher():
    student, teacher = (z.requires_grad_() for z in logits())
    for relation in ("pearson", "cosine", "kl"):
        sum(dist_loss(student, teacher, 4.0, relation)).backward()
    assert student.grad.any() and teacher.grad is None


def test_two_classes_agree_or_not():
    student, teacher = torch.tensor([[2.0, 1.0], [3.0, 0.0]]), torch.tensor([[5.0, 1.0], [0.0, 1.0]])
    inter, intra = dist_loss(student.requires_grad_(), teacher, 1.0, eps=0.0)
    assert inter.item() == pytest.approx(1.0, abs=1e-6) and intra.item() == pytest.approx(2.0, abs=1e-6)
    inter.backward()
    assert student.grad.abs().max() < 1e-5  # a correlation of two entries is 1 or -1


def test_one_constant_row_leaves_the_others_alone():
    student, teacher = logits()
    student[2] = 0.3
    student.requires_grad_()
    inter, _ = dist_loss(student, teacher, 1.0)
    inter.backward()
    kept = [0, 1, 3, 4]
    assert not student.grad[2].any() and all(student.grad[i].any() for i in kept)
    assert inter.item() == pytest.approx((4 * dist_loss(student[kept], teacher[kept], 1.0)[0].item() + 1) / 5)


def test_a_batch_of_one_has_no_columns():
    student, teacher = logits(1, 7)
    inter, intra = dist_loss(student.requires_grad_(), teacher, 4.0)
    intra.backward(retain_graph=True)
    assert intra.item() == 1 and not student.grad.any()
    inter.backward()
    assert student.grad.any()


def test_acclimation_ignores_the_target():
    """Raising the target's logit scales the others' probabilities alike."""
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 6])
    raised = teacher + 2.0 * F.one_hot(target, 7)
    torch.testing.assert_close(
        acclimation_loss(student, raised, target), acclimation_loss(student, teacher, target), rtol=1e-5, atol=0
    )


def test_acclimation_does_not_depend_on_the_targets_logit():
    """As they stand in the softmax over all classes, rows of networks that are sure are tiny beside EPS."""
    student, teacher = logits(5, 100)
    target, rows = torch.arange(5), torch.arange(5)
    teacher.requires_grad_()
    expected = acclimation_loss(student, teacher, target)
    gradient = torch.autograd.grad(expected, teacher)[0]
    assert not gradient[rows, target].any()
    for logit in (-1e3, 0.0, 30.0, 1e3):
        sure = teacher.detach().index_put((rows, target), torch.full((5,), logit).double()).requires_grad_()
        loss = acclimation_loss(student, sure, target)
        assert loss == expected and torch.equal(torch.autograd.grad(loss, sure)[0], gradient)
        assert acclimation_loss(student.index_put((rows, target), sure[rows, target]), teacher, target) == expected
    exact = acclimation_loss(student, teacher, target, eps=0.0)
    torch.testing.assert_close(expected, exact, rtol=1e-6, atol=0)


def test_acclimation_with_mixed_labels_and_at_the_ends():
    student, teacher = logits()
    target = torch.tensor([0, 1, 2, 3, 6])
    mixed = 0.7 * F.one_hot(target, 7) + 0.3 * F.one_hot(target.roll(1), 7)
    assert acclimation_loss(student, teacher, mixed) == acclimation_loss(student, teacher, target)
    two = logits(4, 2)[0].requires_grad_()
    loss = acclimation_loss(logits(4, 2)[1], two, torch.tensor([0, 1, 1, 0]))
    loss.backward()
    assert loss.item() == 1 and not two.grad.any()
    assert torch.isfinite(acclimation_loss(1e5 * student, teacher.requires_grad_(), target))


def test_same_size_pools_to_the_smaller():
    a, b = torch.randn(2, 3, 8, 4), torch.randn(2, 5, 4, 8)
    small_a, small_b = same_size(a, b)
    assert small_a.shape == (2, 3, 4, 4) and small_b.shape == (2, 5, 4, 4)
    torch.testing.assert_close(small_a[0, 0, 0, 0], a[0, 0, :2, 0].mean())
    assert same_size(a, a)[0] is a


# At the edges: extreme inputs, precisions, refusals


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
def test_constant_rows_and_columns_have_distance_1_and_no_gradient(classes):
    """A classifier of zeros gives them; their rounding has a correlation, with a gradient of 7e5."""
    for eps, dtype in itertools.product((1e-8, 0.0), (torch.float32, torch.float64)):
        student, teacher = torch.zeros(6, classes, dtype=dtype), logits(6, classes)[1].to(dtype)
        student = (student + 0.1).requires_grad_()
        for relation in ("pearson", "cosine"):
            inter, intra = dist_loss(student, teacher, 3.0, relation, eps)
            (inter + intra).backward()
            if relation == "pearson":
                assert inter.item() == pytest.approx(1.0) and intra.item() == pytest.approx(1.0)
                assert not student.grad.any()
        assert torch.isfinite(student.grad).all() and student.grad.abs().max() < 1
        teacher = teacher.requires_grad_()
        pearson_distance(student.softmax(1), teacher, eps=eps).sum().backward()
        assert not teacher.grad.any()


@pytest.mark.parametrize("scale", [1e2, 1e4, 1e30])
@pytest.mark.parametrize("relation", ["pearson", "cosine", "kl"])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_finite_at_extreme_logits(scale, relation, eps):
    student, teacher = (z.float() for z in logits(scale=scale))
    losses = dist_loss(student.requires_grad_(), teacher, 1.0, relation, eps)
    sum(losses).backward()
    assert all(torch.isfinite(loss) for loss in losses) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("value", [0.0, 0.1, 1e-30, -7e3, 1e18])  # whose square float32 still holds
def test_constant_maps_have_distance_1_and_no_gradient(value):
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        flat = torch.full((2, 37, 3, 3), min(value, torch.finfo(dtype).max), dtype=dtype)
        other = torch.randn(2, 37, 3, 3).to(dtype)
        for eps, (student, teacher) in itertools.product((1e-8, 0.0), ((flat, other), (other, flat), (flat, flat))):
            student = student.clone().requires_grad_()
            losses = feature_relation_loss(student, teacher, eps=eps)
            sum(losses).backward()
            assert all(loss.item() == 1 for loss in losses) and not student.grad.any()


def test_maps_that_are_no_numbers_are_not_taken_for_constant():
    student, teacher = (f.float() for f in logits(2, 6, shape=(2, 2)))
    student[0, 1, 1, 1] = math.nan
    assert feature_relation_loss(student, teacher)[0].isnan()


def test_feature_relations_without_anything_to_relate():
    """Dead maps, one channel, one position."""
    for shape in ((2, 3, 2, 2), (2, 1, 2, 2), (2, 3, 1, 1)):
        for student in (torch.zeros(shape), torch.full(shape, 0.7)):
            student.requires_grad_()
            losses = feature_relation_loss(student, torch.randn(shape))
            sum(losses).backward()
            assert all(loss.item() == 1 for loss in losses) and not student.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (z.to(dtype) for z in logits())
    target = torch.arange(5)
    maps = [z.to(dtype) for z in logits(2, 6, shape=(3, 3))]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = [*dist_loss(student, teacher, 4.0), acclimation_loss(student, teacher, target, 4.0)]
        found += feature_relation_loss(*maps)
    student, teacher, *maps = (z.float() for z in (student, teacher, *maps))
    expected = [*dist_loss(student, teacher, 4.0), acclimation_loss(student, teacher, target, 4.0)]
    expected += feature_relation_loss(*maps)
    assert all(loss.dtype == torch.float32 for loss in found)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_unknown_relations():
    student, teacher = logits()
    with pytest.raises(InputError, match="relation: no 'pearsson'; closest: pearson"):
        dist_loss(student, teacher, 1.0, "pearsson")
    with pytest.raises(InputError, match="relation"):
        feature_relation_loss(*logits(shape=(2, 2)), relation="kl")
    with pytest.raises(InputError, match="kind"):
        acclimation_loss(student, teacher, torch.arange(5), kind="target")


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("DIST", {"DIST.RELATION": "spearman"}, r"DIST\.RELATION: no choice named 'spearman'"),
        ("DIST", {"DIST.TAU": 0.0}, r"DIST\.TAU must be above 0"),
        ("DIST", {"DIST.EPS": -1.0}, r"DIST\.EPS"),
        ("DIST", {"DIST.INTER_WEIGHT": -1.0}, r"DIST\.INTER_WEIGHT must be at least 0, got -1"),
        ("DIST_PLUS", {"DIST_PLUS.TAU": -1.0}, r"DIST_PLUS\.TAU must be above 0"),
        ("DIST_PLUS", {"DIST_PLUS.FEATURE_RELATION": "kl"}, r"DIST_PLUS\.FEATURE_RELATION"),
        (
            "DIST_PLUS",
            {"DIST_PLUS.FEATURE_RELATION": "mse", "DIST_PLUS.CHANNEL_WEIGHT": 0.0, "DIST_PLUS.SPATIAL_WEIGHT": 0.0},
            "has no effect",
        ),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE": "off"}, r"DIST_PLUS\.ACCLIMATE: no choice named 'off'"),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_LR": -0.1}, r"DIST_PLUS\.ACCLIMATE_LR"),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_MODULES": ["fcc"]}, r"ACCLIMATE_MODULES: no 'fcc'; closest: fc"),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_MODULES": ["bn1"]}, "only BatchNorm's parameters"),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE": "none", "DIST_PLUS.ACCLIMATE_MODULES": ["fc"]}, "must be empty"),
        ("DIST_PLUS", {"DIST_PLUS.ACCLIMATE": "none", "DIST_PLUS.ACCLIMATE_LR": 0.1}, "ACCLIMATE_LR 0"),
    ],
    ids=lambda part: str(sorted(part) if isinstance(part, set) else part),  # a set has no fixed order
)
def test_wrong_configurations(method, values, message):
    with pytest.raises(InputError, match=message):
        build(method, values)


def test_two_classes_have_nothing_to_acclimate():
    networks = [cifar_model_dict[name][0](num_classes=2) for name in ("resnet8", "resnet14")]
    with pytest.raises(InputError, match="ACCLIMATE none"):
        build_distiller(config("DIST_PLUS"), *networks)
    distiller = build_distiller(config("DIST_PLUS", {"DIST_PLUS.ACCLIMATE": "none"}), *networks).train()
    batch = make_batch("DIST_PLUS")
    batch["target"] %= 2
    loss = total(distiller, batch)
    loss.backward()
    assert torch.isfinite(loss)


def test_a_teacher_without_a_convolution_needs_names():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.head = torch.nn.Linear(3, 10)

        def forward(self, x):
            return self.head(x.mean((2, 3))), {"feats": [x]}

    with pytest.raises(InputError, match=r"the teacher Net has no nn\.Conv2d; name .*ACCLIMATE_MODULES"):
        build_distiller(config("DIST_PLUS"), Net(), Net())
    named = config("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_MODULES": ["head"]})
    assert torch.isfinite(total(build_distiller(named, Net(), Net()).train(), make_batch("DIST_PLUS")))


# The methods: their losses from given outputs


def assert_losses_are_the_oracles(method, values, batch=3, maps=((2, 2, 1), (3, 2, 1))):
    """All named losses, from given logits and last maps, of the shapes ``maps``; returns their names."""
    classes, target = 4, [1, 3, 0, 2, 1, 1, 3][:batch]
    torch.manual_seed(0)
    student, teacher = (Outputs(classes, [shape[0]]) for shape in maps)
    if method == "DIST_PLUS" and values.get("ACCLIMATE") != "none":
        values = {**values, "ACCLIMATE_MODULES": ["conv", "fc"]}
    cfg = config(method, {f"{method}.{key}": entry for key, entry in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    options, plus = cfg[method], method == "DIST_PLUS"

    def library(logits_s, logits_t, map_s, map_t):
        distiller.to(torch.promote_types(logits_s.dtype, torch.float32))
        student.give(logits_s, [map_s])
        teacher.give(logits_t, [map_t])
        return distiller(image=torch.zeros(batch, 3, 1, 1), target=torch.tensor(target))[1]

    def loops(logits_s, logits_t, map_s, map_t):
        relation, factor = RELATIONS[options.RELATION], options.TAU**2 if options.TAU_SQUARED else 1
        given = options.TAU, options.EPS, relation, options.COLUMN_GROUP
        inter, intra = oracle.dist_loss(logits_s, constant(logits_t), *given)
        losses = {
            "loss_ce": options.CE_WEIGHT * cross_entropy(logits_s, target),
            "loss_inter": options.INTER_WEIGHT * factor * inter,
            "loss_intra": options.INTRA_WEIGHT * factor * intra,
        }
        if plus and distiller.align is not None:
            if maps[0][1] > maps[1][1]:
                map_s = oracle.halved(map_s)
            if maps[0][1] < maps[1][1]:
                map_t = oracle.halved(map_t)
            weight, bias = (numbers(p.detach()) for p in distiller.align.parameters())
            aligned = oracle.convolution_1x1(map_s, [[w[0][0] for w in line] for line in weight], bias)
            given = aligned, constant(map_t), options.EPS, FEATURE_RELATIONS[options.FEATURE_RELATION]
            # A squared distance is that of the channels' mean, not of their sum.
            channels = len(bias) ** 2 if options.FEATURE_RELATION == "mse" else 1
            losses["loss_channel"] = options.CHANNEL_WEIGHT * oracle.channel_relation_loss(*given)
            losses["loss_spatial"] = options.SPATIAL_WEIGHT * oracle.spatial_relation_loss(*given) / channels
        if plus and options.ACCLIMATE != "none":
            acclimation = ACCLIMATIONS[options.ACCLIMATE](logits_s, logits_t, target, options.TAU, options.EPS)
            losses["loss_acclimation"] = options.ACCLIMATE_WEIGHT * acclimation
        return losses

    random = np.random.default_rng(1)
    given = [2 * random.normal(size=(batch, classes)) for _ in range(2)]
    given += [random.normal(size=(batch, *shape)) for shape in maps]
    assert_agree(library, loops, *given, wrt=(0, 1, 2, 3) if plus else (0,))
    return set(loops(*map(numbers, given)))


OF_LOGITS = [
    {},
    {"TAU": 1.0, "CE_WEIGHT": 0.3, "INTER_WEIGHT": 1.5, "INTRA_WEIGHT": 0.7},
    {"TAU": 3.0, "TAU_SQUARED": False, "EPS": 1e-3},
    {"RELATION": "cosine"},
    {"RELATION": "kl"},
    {"COLUMN_GROUP": 3},
    {"COLUMN_GROUP": 3, "RELATION": "kl"},
    {"COLUMN_GROUP": 64},
]
OF_ALL = [
    ({"CHANNEL_WEIGHT": 0.3, "SPATIAL_WEIGHT": 4.0, "ACCLIMATE_WEIGHT": 2.0}, "channel spatial acclimation"),
    ({"FEATURE_RELATION": "cosine", "ACCLIMATE": "all", "EPS": 1e-3}, "channel spatial acclimation"),
    ({"FEATURE_RELATION": "mse", "ACCLIMATE": "kl", "TAU": 2.0}, "channel spatial acclimation"),
    ({"ACCLIMATE": "none"}, "channel spatial"),
    ({"CHANNEL_WEIGHT": 0.0, "SPATIAL_WEIGHT": 0.0}, "acclimation"),
]


@pytest.mark.parametrize("method", ["DIST", "DIST_PLUS"])
@pytest.mark.parametrize("values", OF_LOGITS, ids=str)
def test_losses_from_given_outputs(values, method):
    for batch in (1, 3, 7):
        assert_losses_are_the_oracles(method, values, batch)


@pytest.mark.parametrize(("values", "more"), OF_ALL, ids=str)
def test_losses_of_dist_plus_from_given_outputs(values, more):
    names = assert_losses_are_the_oracles("DIST_PLUS", values)
    assert names == {f"loss_{name}" for name in ["ce", "inter", "intra", *more.split()]}


def test_every_key_is_among_those():
    tested = {key for values in OF_LOGITS + [values for values, _ in OF_ALL] for key in values}
    elsewhere = {"GATHER"} | {f"ACCLIMATE_{name}" for name in ("LR", "RADIUS", "MODULES")}
    assert tested | elsewhere == set(distiller_dict["DIST_PLUS"].defaults)


@pytest.mark.parametrize("maps", [((2, 4, 2), (2, 2, 1)), ((3, 2, 1), (2, 4, 2))], ids=str)
def test_maps_of_different_size_are_pooled_to_the_smaller(maps):
    assert_losses_are_the_oracles("DIST_PLUS", {}, 2, maps)


def test_losses_are_the_parts():
    distiller, batch = build("DIST"), make_batch("DIST")
    logits_s, losses = distiller(**batch, epoch=1)
    inter, intra = dist_loss(logits_s, distiller.teacher(batch["image"])[0], 4.0)
    torch.testing.assert_close(losses["loss_inter"], 32 * inter)
    torch.testing.assert_close(losses["loss_intra"], 32 * intra)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits_s, batch["target"]))


def test_dist_plus_without_its_additions_is_dist():
    off = {"DIST_PLUS.CHANNEL_WEIGHT": 0.0, "DIST_PLUS.SPATIAL_WEIGHT": 0.0, "DIST_PLUS.ACCLIMATE": "none"}
    plus, dist = build("DIST_PLUS", off), build("DIST")
    dist.load_state_dict(plus.state_dict())
    assert plus.get_extra_parameters() == 0 and plus.teacher_parameters() == []
    batch = make_batch("DIST")
    for _ in range(2):
        found, expected = (d(**batch, epoch=1)[1] for d in (plus, dist))
        assert {name: loss.item() for name, loss in found.items()} == {k: v.item() for k, v in expected.items()}


# The methods: who learns from what


def moved(distiller, before):
    after = distiller.teacher.state_dict()
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.parametrize(
    ("modules", "expected"),
    [
        ([], {"layer3.1.conv2.weight", "fc.weight", "fc.bias"}),
        (["fc"], {"fc.weight", "fc.bias"}),
        (["layer3.1"], {"layer3.1.conv1.weight", "layer3.1.conv2.weight"}),  # but its batch norms
        (["layer3.1", "layer3.1.conv1"], {"layer3.1.conv1.weight", "layer3.1.conv2.weight"}),
    ],
)
def test_acclimation_moves_what_it_names_and_nothing_else(modules, expected):
    cfg = config("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_MODULES": modules})
    distiller = build("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_MODULES": modules})
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = build_optimizer(cfg, distiller)
    for _ in range(2):
        optimizer.zero_grad()
        total(distiller, make_batch("DIST_PLUS")).backward()
        optimizer.step()
    assert moved(distiller, before) == expected
    assert {id(p) for p in distiller.teacher_parameters()} == {
        id(p) for name, p in distiller.teacher.named_parameters() if name in expected
    }


def test_who_learns_from_which_loss():
    distiller = build("DIST_PLUS")
    _, losses = distiller(**make_batch("DIST_PLUS"), epoch=1)
    student, teacher = list(distiller.student.parameters()), distiller.teacher_parameters()

    def gradient(loss, parameters):
        return [g for g in torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) if g is not None]

    assert len(gradient(losses["loss_acclimation"], teacher)) == len(teacher)
    assert not gradient(losses["loss_acclimation"], student + list(distiller.align.parameters()))
    for name in ("loss_inter", "loss_intra", "loss_channel", "loss_spatial"):
        assert gradient(losses[name], student) and not gradient(losses[name], teacher)
    assert len(gradient(losses["loss_channel"], list(distiller.align.parameters()))) == 2


def test_the_student_learns_from_the_acclimated_teacher():
    distiller, batch = build("DIST_PLUS"), make_batch("DIST_PLUS")
    _, before = distiller(**batch, epoch=1)
    with torch.no_grad():
        distiller.teacher.fc.weight.add_(0.1 * torch.randn_like(distiller.teacher.fc.weight))
        distiller.teacher.layer3[1].conv2.weight.mul_(torch.rand_like(distiller.teacher.layer3[1].conv2.weight))
    _, after = distiller(**batch, epoch=1)
    assert {name for name in before if before[name] != after[name]} == set(before) - {"loss_ce"}


def test_nothing_of_the_frozen_trunk_is_kept_for_the_backward_pass():
    distiller, calls = build("DIST_PLUS"), {}
    for name, module in distiller.teacher.named_modules():
        module.register_forward_hook(
            lambda m, i, out, name=name: calls.update({name: out}) if isinstance(out, torch.Tensor) else None
        )
    distiller(**make_batch("DIST_PLUS"), epoch=1)
    assert not calls["layer3.1.bn1"].requires_grad and calls["layer3.1.conv2"].requires_grad


def test_own_rate_and_no_weight_decay():
    def groups(**values):
        cfg = config("DIST_PLUS", {"SOLVER.LR": 0.02, "SOLVER.WEIGHT_DECAY": 5e-4, **values})
        distiller = build("DIST_PLUS", values)
        found = build_optimizer(cfg, distiller).param_groups
        assert sum(len(g["params"]) for g in found) == len(distiller.get_learnable_parameters())
        return [(g["lr"], g["weight_decay"], g["lr_scale"]) for g in found]

    assert groups() == [(0.02, 5e-4, 1.0), (pytest.approx(0.0002), 0.0, pytest.approx(0.01))]
    assert groups(**{"DIST_PLUS.ACCLIMATE_LR": 0.005})[1] == (0.005, 0.0, 0.25)
    assert groups(**{"DIST_PLUS.ACCLIMATE": "none"}) == [(0.02, 5e-4, 1.0)]


@pytest.mark.parametrize("steps", [4, 16])
@pytest.mark.parametrize("kind", ["nontarget", "all", "kl"])
def test_the_teacher_stays_near_its_start_however_long_it_learns(kind, steps):
    def furthest(radius):
        """The largest way of a weight tensor, as a share of the tensor's length; what the rate would make large."""
        values = {"DIST_PLUS.ACCLIMATE": kind, "DIST_PLUS.ACCLIMATE_LR": 10.0, "DIST_PLUS.ACCLIMATE_RADIUS": radius}
        distiller, batch = build("DIST_PLUS", values), make_batch("DIST_PLUS")
        before = [parameter.detach().clone() for parameter in distiller.teacher_parameters()]
        optimizer = build_optimizer(config("DIST_PLUS", values), distiller)
        for _ in range(steps):
            optimizer.zero_grad()
            total(distiller, batch).backward()
            optimizer.step()
        distiller.hold_teacher()
        after = distiller.teacher_parameters()
        return max(((p - start).norm() / start.norm()).item() for p, start in zip(after, before, strict=True))

    assert furthest(0.0) > 0.1
    assert furthest(0.02) == pytest.approx(0.02, rel=1e-4)


def test_within_the_radius_the_teacher_is_left_alone():
    """To the bit; and one that starts at zero stays there."""
    distiller = build("DIST_PLUS", {"DIST_PLUS.ACCLIMATE_RADIUS": 0.5})
    *weights, bias = distiller.teacher_parameters()
    with torch.no_grad():
        for parameter in weights:
            parameter.mul_(1 + 0.4 * torch.rand_like(parameter))
        bias.zero_()
    moved = [parameter.clone() for parameter in (*weights, bias)]
    distiller.hold_teacher()
    assert all(torch.equal(a, b) for a, b in zip(weights, moved, strict=False))
    assert bias.norm().item() == pytest.approx(0.5 * distiller.start_2.norm().item(), rel=1e-5)
    distiller.start_2.zero_()
    distiller.hold_teacher()
    assert not bias.any()


def test_without_gradient_the_teacher_stays():
    """No weight decay erodes it, and momentum starts from nothing."""
    values = {"DIST_PLUS.ACCLIMATE_WEIGHT": 0.0}
    distiller = build("DIST_PLUS", values)
    before = copy.deepcopy(distiller.teacher.state_dict())
    optimizer = build_optimizer(config("DIST_PLUS", {"SOLVER.WEIGHT_DECAY": 0.1, **values}), distiller)
    total(distiller, make_batch("DIST_PLUS")).backward()
    optimizer.step()
    assert not moved(distiller, before)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ("resnet8", "resnet8x4"), ("resnet8x4", "resnet14"), ("resnet8", "vgg8"), ("vgg8", "resnet8"),
        ("ShuffleV2", "wrn_16_1"), ("MobileNetV2", "vgg8"),
    ],
)  # fmt: skip
def test_other_widths_and_sizes(student, teacher):
    networks = [cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)]
    distiller = build_distiller(config("DIST_PLUS"), *networks).train()
    _, losses = distiller(image=torch.randn(4, 3, 32, 32), target=torch.arange(4), epoch=1)
    sum(losses.values()).backward()
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert distiller.align.weight.grad.any() and all(p.grad is not None for p in distiller.teacher_parameters())


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(table[name], id=f"{table.kind.split()[0]}-{name}")
        for table in (cifar_model_dict, imagenet_model_dict)
        for name in sorted(table)
    ],
)
def test_the_layers_called_last_are_acclimated(make):
    network, calls = make(num_classes=10).eval(), []
    for module in network.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            module.register_forward_hook(lambda module, *_: calls.append(module))
    with torch.no_grad():
        network(torch.zeros(1, 3, 32, 32))
    distiller = build_distiller(config("DIST_PLUS"), cifar_model_dict["resnet8"][0](num_classes=10), network)
    expected = {id(p) for module in calls[-2:] for p in module.parameters()}
    assert isinstance(calls[-2], torch.nn.Conv2d) and isinstance(calls[-1], torch.nn.Linear)
    assert {id(p) for p in distiller.teacher_parameters()} == expected


def test_building_leaves_random_states_alone():
    networks = [cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet14")]
    state = torch.get_rng_state()
    build_distiller(config("DIST_PLUS"), *networks)
    assert torch.equal(torch.get_rng_state(), state)
