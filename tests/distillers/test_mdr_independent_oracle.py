"""MDR against ``oracles/mdr.py``, its equations written out in loops; and that file against numbers by hand.

Two choices jump: the rank of a pair, where similarities tie, and the sign of a difference of lengths. Inputs either
keep clear of a tie in every precision or tie exactly.
"""

import math

import numpy as np
import pytest
import torch
from oracles import mdr as oracle
from oracles.compare import assert_agree
from oracles.complex_step import numbers

from mdistiller.distillers.MDR import (
    angle_matrix,
    distance_matrix,
    length_loss,
    length_matrix,
    pair_ranks,
    relation_kl,
    select_stages,
)

SHAPES = [(1, 1, 3), (3, 1, 4), (2, 2, 1), (6, 2, 3), (9, 3, 5), (12, 4, 2)]  # positives, anchors, entries
MATRICES = {
    angle_matrix: oracle.angle_matrix,
    length_matrix: oracle.length_matrix,
    distance_matrix: oracle.distance_matrix,
}


def outputs(kind: str, positives: int, anchors: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A self-supervised module's outputs for positives and anchors."""
    random = np.random.default_rng([seed, positives, anchors, width])
    z_anchor = random.normal(size=(anchors, width))
    own = z_anchor[np.arange(positives) % anchors]
    z_pos = own + 0.7 * random.normal(size=(positives, width))
    if kind == "large":
        z_pos, z_anchor = 1e5 * z_pos, 1e5 * z_anchor
    if kind == "small":
        z_pos, z_anchor = 1e-5 * z_pos, 1e-5 * z_anchor
    if kind == "zero":
        z_pos[0], z_anchor[-1] = 0.0, 0.0
    if kind == "copies":
        z_pos = own.copy()
    if kind == "one_point":
        z_pos[:], z_anchor[:] = 0.5, 0.5
    return z_pos, z_anchor


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["random", "large", "small", "zero", "copies", "one_point"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relations_and_their_gradients(shape, kind, matrix):
    z_pos, z_anchor = outputs(kind, *shape)
    if kind in ("large", "small") and matrix is angle_matrix:
        z_anchor = z_anchor * 3  # cosines keep, lengths don't
    weight = np.random.default_rng(5).normal(size=shape[:2])

    def loops(p, a):
        rows = MATRICES[matrix](p, a)
        return sum(w * x for ws, xs in zip(weight, rows, strict=True) for w, x in zip(ws, xs, strict=True))

    assert_agree(
        lambda p, a: (torch.as_tensor(weight).to(p) * matrix(p, a)).sum(), loops, z_pos, z_anchor, wrt=(0, 1)
    )


@pytest.mark.parametrize("dim", ["anchor", "positive"])
@pytest.mark.parametrize("descending", [True, False])
def test_ranks_with_and_without_ties(descending, dim):
    random = np.random.default_rng(0)
    for positives, anchors, levels in ((1, 1, 2), (3, 1, 2), (6, 2, 3), (9, 3, 2), (12, 4, 4), (15, 5, 1000)):
        matrix = random.integers(levels, size=(positives, anchors)) / 7
        anchor_of = np.arange(positives) % anchors
        expected = oracle.pair_ranks(matrix.tolist(), anchor_of.tolist(), descending=descending, dim=dim)
        got = pair_ranks(torch.as_tensor(matrix), torch.as_tensor(anchor_of), descending=descending, dim=dim)
        assert got.tolist() == expected


@pytest.mark.parametrize("ties", ["deep", "shallow"])
def test_selected_stages_with_and_without_ties(ties):
    random = np.random.default_rng(1)
    for stages, positives, levels in ((1, 3, 2), (2, 12, 2), (3, 30, 3), (4, 30, 2), (5, 8, 100)):
        ranks = random.integers(levels, size=(stages, positives))
        for n in range(1, stages + 1):
            expected = oracle.select_stages(ranks.tolist(), n, ties)
            assert select_stages(torch.as_tensor(ranks), n, ties).tolist() == expected
