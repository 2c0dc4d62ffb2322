"""DCD against ``oracles/dcd.py``, its listing written out in loops; and that file against numbers by hand."""

import math

import numpy as np
import pytest
import torch
from method_cases import config
from oracles import dcd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, kd_loss, mean, numbers
from oracles.stubs import Outputs

from mdistiller.distillers.DCD import dcd_loss
from mdistiller.engine.build import build_distiller


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def embeddings(kind: str, batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Student's and teacher's, ``(batch, width)``, normalised."""
    random = np.random.default_rng(batch * 100 + width)
    student, teacher = random.normal(size=(2, batch, width))
    if kind == "near":
        student = teacher + 1e-6 * student
    if kind == "equal":
        student = teacher
    if kind == "opposite":
        student = -teacher
    if kind == "repeated":  # every image the same: all rows tie
        student, teacher = (np.tile(x[:1], (batch, 1)) for x in (student, teacher))
    return unit(student), unit(teacher)


KINDS = ["random", "near", "equal", "opposite", "repeated"]
SHAPES = [(1, 3), (2, 1), (2, 5), (3, 2), (7, 4)]


@pytest.mark.parametrize("detach", [False, True], ids=["both", "detached"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_loss_and_all_gradients_are_the_listings(shape, kind, detach):
    student, teacher = embeddings(kind, *shape)
    for tau, b, alpha in ((math.e, 0.0, 0.5), (10.0, 0.3, 2.0), (0.07, -50.0, 0.0)):
        assert_agree(
            lambda s, t, tau, b, alpha=alpha: dcd_loss(s, t, tau, b, alpha, detach_target=detach),
            lambda s, t, tau, b, alpha=alpha: oracle.dcd_loss(s, t, tau, b, alpha, detach_target=detach),
            student,
            teacher,
            tau,
            b,
            wrt=(0, 1, 2, 3),
        )


def test_extreme_scales_stay_on_the_oracle():
    student, teacher = embeddings("random", 4, 3)
    for tau in (1e3, 1e-6):
        assert_agree(
            lambda s, t, tau: dcd_loss(s, t, tau, 0.0), lambda s, t, tau: oracle.dcd_loss(s, t, tau, 0.0),
            student, teacher, tau, wrt=(0, 1, 2),
        )  # fmt: skip


METHOD = [
    {},
    {"LAMBDA": 1.0},
    {"LAMBDA": 0.5, "TEMPERATURE": 2.0, "CE_WEIGHT": 0.1, "BETA": 3.0},
    {"ALPHA": 0.0},
    {"DETACH_TARGET": True, "ALPHA": 2.0},
    {"INIT_THETA": 2.0, "INIT_B": 0.5},
    {"INIT_THETA": 3.0, "LEARN_TEMPERATURE": False},  # above the clamp
    {"INIT_THETA": 1.0, "MAX_TAU": 2.0, "LEARN_TEMPERATURE": False},
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("values", METHOD, ids=str)
def test_the_methods_losses_from_given_outputs(values, batch):
    classes, target = 4, [1, 3, 0][:batch]
    torch.manual_seed(0)
    student, teacher = Outputs(classes, [3]), Outputs(classes, [5])
    cfg = config("DCD", {"DCD.FEAT_DIM": 3} | {f"DCD.{key}": value for key, value in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    own, random = cfg.DCD, np.random.default_rng(0)
    layers = [[numbers(p.detach()) for p in layer.parameters()] for layer in (distiller.embed_s, distiller.embed_t)]
    parts = {"loss_ce": own.CE_WEIGHT, "loss_dcd": own.BETA} | ({"loss_kd": own.LAMBDA} if own.LAMBDA else {})

    def library(name):
        def loss(logits_s, logits_t, map_s, map_t):
            distiller.to(torch.promote_types(logits_s.dtype, torch.float32))
            student.give(logits_s, [map_s])
            teacher.give(logits_t, [map_t])
            _, losses = distiller(image=torch.zeros(batch, 3, 1, 1), target=torch.tensor(target))
            assert set(losses) == set(parts)
            return losses[name]

        return loss

    def loops(name):
        def loss(logits_s, logits_t, map_s, map_t):
            if name == "loss_ce":
                return cross_entropy(logits_s, target)
            if name == "loss_kd":
                return kd_loss(logits_s, constant(logits_t), own.TEMPERATURE)
            pooled = ([[mean(line[0]) for line in image] for image in maps] for maps in (map_s, constant(map_t)))
            embedded = [oracle.embed(x, *layer) for x, layer in zip(pooled, layers, strict=True)]
            tau = oracle.scale(own.INIT_THETA, own.MAX_TAU)
            return oracle.dcd_loss(*embedded, tau, own.INIT_B, own.ALPHA, own.DETACH_TARGET)

        return loss

    given = [random.normal(size=shape) for shape in [(batch, classes)] * 2 + [(batch, 3, 1, 2), (batch, 5, 1, 2)]]
    for name, weight in parts.items():
        assert_agree(library(name), lambda *x, n=name, w=weight: w * loops(n)(*x), *given, wrt=(0, 1, 2, 3))


def test_the_oracle_by_hand():
    # A perfect match of two orthogonal pairs: rows and columns are both softmax(tau, 0), so the second term is 0.
    eye = [[1.0, 0.0], [0.0, 1.0]]
    assert oracle.dcd_loss(eye, eye, 2.0, 0.7) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)
    # One student for both teachers: rows (1, 0), columns (1/2, 1/2).
    p = 1 / (1 + math.exp(-1))
    consistency = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    contrastive = -(math.log(p) + math.log(1 - p)) / 2
    one = [[1.0, 0.0], [1.0, 0.0]]
    assert oracle.dcd_loss(one, eye, 1.0, 0.0, alpha=3.0) == pytest.approx(contrastive + 3 * consistency, rel=1e-12)
    assert oracle.scale(1.0) == pytest.approx(math.e)
    assert oracle.scale(2.4) == 10.0
    assert oracle.embed([[1.0, 2.0]], [[1.0, 1.0], [0.0, 2.0]], [0.0, 0.0]) == [pytest.approx([0.6, 0.8])]


def test_the_sheets_figures_for_a_perfect_match():
    """64 images, 1 on the diagonal and 0 off it: 1.64 at tau 2.718, 0.003 at 10."""
    eye = torch.eye(64, dtype=torch.float64)
    assert dcd_loss(eye, eye, math.e, 0.0).item() == pytest.approx(1.64, abs=0.01)
    assert dcd_loss(eye, eye, 10.0, 0.0).item() == pytest.approx(0.003, abs=2e-4)
