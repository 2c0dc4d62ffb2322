"""DIST and DIST+ against ``oracles/dist.py``, their equations written out in loops; and that file by hand."""

import math

import numpy as np
import pytest
import torch
from method_cases import config
from oracles import dist as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, numbers
from oracles.stubs import Outputs

from mdistiller.distillers.DIST import (
    acclimation_loss,
    channel_relation_loss,
    cosine_distance,
    dist_loss,
    pearson_distance,
    spatial_relation_loss,
)
from mdistiller.engine.build import build_distiller

RELATIONS = {"pearson": oracle.pearson_distance, "cosine": oracle.cosine_distance, "kl": oracle.kl_relation}


def logits(kind: str, batch: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's and teacher's, ``(batch, classes)``."""
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


KINDS = ["random", "confident", "near", "flat_row", "flat_student", "one_image", "ties"]
SHAPES = [(1, 2), (1, 5), (2, 2), (2, 3), (3, 7), (6, 4)]


@pytest.mark.parametrize("tau", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_both_relations_are_equations_8_and_9(shape, kind, tau):
    student, teacher = logits(kind, *shape)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert_agree(
            lambda s, t, w=weights: sum(a * x for a, x in zip(w, dist_loss(s, t, tau), strict=True)),
            lambda s, t, w=weights: sum(a * x for a, x in zip(w, oracle.dist_loss(s, t, tau), strict=True)),
            student,
            teacher,
        )


@pytest.mark.parametrize("relation", ["cosine", "kl"])
@pytest.mark.parametrize("kind", ["random", "confident", "flat_row", "ties"])
def test_the_ablations_relations(relation, kind):
    student, teacher = logits(kind, 4, 5)
    for weights in ((1.0, 0.0), (0.0, 1.0)):
        assert_agree(
            lambda s, t, w=weights: sum(a * x for a, x in zip(w, dist_loss(s, t, 2.0, relation), strict=True)),
            lambda s, t, w=weights: sum(
                a * x for a, x in zip(w, oracle.dist_loss(s, t, 2.0, relation=RELATIONS[relation]), strict=True)
            ),
            student,
            teacher,
        )


@pytest.mark.parametrize("kind", [*KINDS, "extreme"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_acclimation_is_equation_14(shape, kind):
    student, teacher = logits(kind, *shape)
    target = np.arange(shape[0]) % shape[1]
    assert_agree(
        lambda s, t: acclimation_loss(s, t, torch.as_tensor(target), 2.0),
        lambda s, t: oracle.acclimation_loss(s, t, target.tolist(), 2.0),
        student,
        teacher,
        wrt=(0, 1),
    )


@pytest.mark.parametrize("kind", ["all", "kl"])
def test_the_ablations_of_acclimation(kind):
    student, teacher = logits("confident", 3, 5)
    expected = {"all": oracle.acclimation_pearson, "kl": oracle.acclimation_kl}[kind]
    assert_agree(
        lambda s, t: acclimation_loss(s, t, torch.arange(3), 2.0, kind), lambda s, t: expected(s, t, 2.0),
        student, teacher, wrt=(0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["random", "near", "large", "constant", "relu"])
@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (2, 3, 1, 1), (1, 2, 2, 3), (2, 4, 3, 2)], ids=str)
def test_feature_relations_are_equations_15_and_16(shape, kind):
    random = np.random.default_rng(sum(shape))
    student, teacher = random.normal(size=(2, *shape))
    if kind == "near":
        student = teacher + 1e-3 * student
    if kind == "large":
        student, teacher = 1e4 * student, 1e3 * teacher + 5e3
    if kind == "constant":
        student[0], teacher[-1] = 0.7, -2.0
    if kind == "relu":
        student, teacher = np.maximum(student, 0), np.maximum(teacher - 0.5, 0)
    pairs = (channel_relation_loss, oracle.channel_relation_loss), (spatial_relation_loss, oracle.spatial_relation_loss)
    for function, loops in pairs:
        assert_agree(
            function,
            lambda s, t, f=loops: f(s, constant(t)),
            student,
            teacher,
            wrt=(0, 1),
        )


@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-2])
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 1e6])
def test_eps_is_added_to_the_product_of_the_norms(scale, eps):
    """At 1e-4 each the product of the norms is eps, and half the correlation is left."""
    u, v = scale * np.random.default_rng(3).normal(size=(2, 6))
    for library, loops in ((pearson_distance, oracle.pearson_distance), (cosine_distance, oracle.cosine_distance)):
        assert_agree(lambda a, b, f=library: f(a, b, eps=eps), lambda a, b, f=loops: f(a, b, eps), u, v, wrt=(0, 1))


def method_loss(method, values, batch, maps):
    """Library's and loops' sum of the method's named losses, of (logits_s, logits_t, map_s, map_t); its terms' names.

    ``maps`` are the shapes of the last maps, student's and teacher's, without the batch.
    """
    classes, target = 4, [1, 3, 0][:batch]
    torch.manual_seed(0)
    student, teacher = (Outputs(classes, [shape[0]]) for shape in maps)
    cfg = config(method, {f"{method}.{key}": entry for key, entry in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    own, plus = cfg[method], method == "DIST_PLUS"

    def library(name):
        def loss(logits_s, logits_t, map_s, map_t):
            distiller.to(torch.promote_types(logits_s.dtype, torch.float32))
            student.give(logits_s, [map_s])
            teacher.give(logits_t, [map_t])
            _, losses = distiller(image=torch.zeros(batch, 3, 1, 1), target=torch.tensor(target))
            assert set(losses) == set(loops)
            return losses[name]

        return loss

    factor = own.TAU**2 if own.TAU_SQUARED else 1

    def logit_loss(which, weight):
        def loss(logits_s, logits_t, map_s, map_t):
            both = oracle.dist_loss(logits_s, constant(logits_t), own.TAU, own.EPS, RELATIONS[own.RELATION])
            return weight * factor * both[which]

        return loss

    loops = {
        "loss_ce": lambda s, t, *_: own.CE_WEIGHT * cross_entropy(s, target, own.LABEL_SMOOTHING),
        "loss_inter": logit_loss(0, own.INTER_WEIGHT),
        "loss_intra": logit_loss(1, own.INTRA_WEIGHT),
    }
    if plus and distiller.align is not None:
        weight, bias = (numbers(p.detach()) for p in distiller.align.parameters())
        weight = [[w[0][0] for w in line] for line in weight]

        def feature_loss(function, scale):
            def loss(logits_s, logits_t, map_s, map_t):
                if maps[0][1] > maps[1][1]:
                    map_s = oracle.halved(map_s)
                if maps[0][1] < maps[1][1]:
                    map_t = oracle.halved(map_t)
                map_t = constant(map_t)
                aligned = oracle.convolution_1x1(map_s, weight, bias)
                return scale * function(aligned, map_t, own.EPS, FEATURE_RELATIONS[own.FEATURE_RELATION])

            return loss

        # A squared distance is that of the channels' mean, not of their sum.
        channels = len(bias) ** 2 if own.FEATURE_RELATION == "mse" else 1
        loops["loss_channel"] = feature_loss(oracle.channel_relation_loss, own.CHANNEL_WEIGHT)
        loops["loss_spatial"] = feature_loss(oracle.spatial_relation_loss, own.SPATIAL_WEIGHT / channels)
    if plus and own.ACCLIMATE != "none":
        acclimation = {
            "nontarget": lambda s, t, *_: oracle.acclimation_loss(s, t, target, own.TAU, own.EPS),
            "all": lambda s, t, *_: oracle.acclimation_pearson(s, t, own.TAU, own.EPS),
            "kl": lambda s, t, *_: oracle.acclimation_kl(s, t, own.TAU),
        }[own.ACCLIMATE]
        loops["loss_acclimation"] = lambda *x: own.ACCLIMATE_WEIGHT * acclimation(*x)
    return library, loops


def check_method(method, values, batch=3, maps=((2, 2, 1), (3, 2, 1))):
    library, loops = method_loss(method, values, batch, maps)
    random = np.random.default_rng(1)
    given = [2 * random.normal(size=(batch, 4)) for _ in range(2)]
    given += [random.normal(size=(batch, *shape)) for shape in maps]
    for name, loop in loops.items():
        assert_agree(library(name), loop, *given, wrt=(0, 1, 2, 3) if method == "DIST_PLUS" else (0,))
    return loops


FEATURE_RELATIONS = RELATIONS | {"mse": oracle.squared_distance}
LOGIT_KEYS = [
    {},
    {"TAU": 1.0, "CE_WEIGHT": 0.3, "INTER_WEIGHT": 1.5, "INTRA_WEIGHT": 0.7},
    {"TAU": 3.0, "TAU_SQUARED": False, "EPS": 1e-3},
    {"RELATION": "cosine", "LABEL_SMOOTHING": 0.1},
    {"RELATION": "kl"},
]


@pytest.mark.parametrize("method", ["DIST", "DIST_PLUS"])
@pytest.mark.parametrize("values", LOGIT_KEYS, ids=str)
def test_the_methods_losses_from_given_outputs(values, method):
    for batch in (1, 3):
        check_method(method, values, batch)


@pytest.mark.parametrize(
    ("values", "terms"),
    [
        ({"CHANNEL_WEIGHT": 0.3, "SPATIAL_WEIGHT": 4.0, "ACCLIMATE_WEIGHT": 2.0}, 6),
        ({"FEATURE_RELATION": "cosine", "ACCLIMATE": "all"}, 6),
        ({"FEATURE_RELATION": "mse", "ACCLIMATE": "kl", "TAU": 2.0}, 6),
        ({"ACCLIMATE": "none"}, 5),
        ({"CHANNEL_WEIGHT": 0.0, "SPATIAL_WEIGHT": 0.0}, 4),
    ],
    ids=str,
)
def test_the_terms_of_dist_plus(values, terms):
    assert len(check_method("DIST_PLUS", values)) == terms


@pytest.mark.parametrize("maps", [((2, 4, 2), (2, 2, 1)), ((3, 2, 1), (2, 4, 2))], ids=str)
def test_maps_of_different_size_are_pooled_to_the_smaller(maps):
    check_method("DIST_PLUS", {}, 2, maps)


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
