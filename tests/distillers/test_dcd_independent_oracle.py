"""DCD against ``oracles/dcd.py``, its listing written out in loops; and that file against numbers by hand."""

import math

import numpy as np
import pytest
import torch
from oracles import dcd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.DCD import dcd_loss


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
