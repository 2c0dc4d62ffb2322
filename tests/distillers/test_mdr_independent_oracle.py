"""MDR against ``oracles/mdr.py``, its equations written out in loops; and that file against numbers by hand.

Two choices jump: the rank of a pair, where similarities tie, and the sign of a difference of lengths. Inputs either
keep clear of a tie in every precision or tie exactly.
"""

import contextlib
import math

import numpy as np
import pytest
import torch
from method_cases import config
from oracles import mdr as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, numbers
from oracles.kd import kd_loss
from oracles.stubs import Outputs
from torch import nn

from mdistiller.distillers.MDR import (
    angle_matrix,
    distance_matrix,
    length_loss,
    length_matrix,
    pair_ranks,
    relation_kl,
    select_stages,
)
from mdistiller.engine.build import build_distiller

SHAPES = [(1, 1, 3), (3, 1, 4), (2, 2, 1), (6, 2, 3), (9, 3, 5), (12, 4, 2)]  # positives, anchors, entries
MATRICES = {
    angle_matrix: oracle.angle_matrix,
    length_matrix: oracle.length_matrix,
    distance_matrix: oracle.distance_matrix,
}


def embeddings(kind: str, positives: int, anchors: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
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
    if kind == "near":
        z_pos = own + 1e-2 * z_pos
    if kind == "one_point":
        z_pos[:], z_anchor[:] = 0.5, 0.5
    return z_pos, z_anchor


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("kind", ["random", "large", "small", "zero", "near", "copies", "one_point"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_relations_and_their_gradients(shape, kind, matrix):
    z_pos, z_anchor = embeddings(kind, *shape)
    if kind in ("large", "small") and matrix is angle_matrix:
        z_anchor = z_anchor * 3  # cosines keep, lengths don't
    weight = np.random.default_rng(5).normal(size=shape[:2])

    def loops(p, a):
        rows = MATRICES[matrix](p, a)
        return sum(w * x for ws, xs in zip(weight, rows, strict=True) for w, x in zip(ws, xs, strict=True))

    assert_agree(lambda p, a: (torch.as_tensor(weight).to(p) * matrix(p, a)).sum(), loops, z_pos, z_anchor, wrt=(0, 1))


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


def stages(count: int, kind: str, seed: int, positives: int = 6, anchors: int = 2) -> list[np.ndarray]:
    """Of each stage the embeddings of positives and anchors, one after the other, stages of different width."""
    pairs = [embeddings(kind, positives, anchors, 3 - k % 2, seed + k) for k in range(count)]
    return [z for pair in pairs for z in pair]


def paired(arrays) -> list[tuple]:
    return list(zip(arrays[::2], arrays[1::2], strict=True))


LOSSES = [
    {},
    {"temperature": 2.0},
    {"relation_dim": "positive"},
    {"reduction": "sum"},
    {"stage_reduction": "mean"},
    {"relation_dim": "positive", "reduction": "sum", "stage_reduction": "mean"},
]


@pytest.mark.parametrize("kind", ["random", "equal", "near", "zero", "one_point"])
@pytest.mark.parametrize("options", LOSSES, ids=str)
def test_losses_at_given_stages(options, kind):
    """Any choice of stages, also one that no rank would make; the teacher's relations are constants."""
    count, split = 3, 6
    teacher = stages(count, "random" if kind in ("equal", "near") else kind, 10)
    student = stages(count, kind if kind != "equal" else "random", 20)
    if kind in ("equal", "near"):
        student = [z + (1e-3 if kind == "near" else 0.0) * x for z, x in zip(teacher, student, strict=True)]
    chosen = np.random.default_rng(3).permuted(np.tile(np.arange(count)[:, None], (1, 6)), axis=0)[:2]
    sums = 2 if options.get("stage_reduction") == "mean" else 1
    loops = {"tau" if key == "temperature" else key: x for key, x in options.items() if key != "stage_reduction"}
    both = {key: x for key, x in options.items() if key in ("reduction", "stage_reduction")}
    reduction = {key: x for key, x in loops.items() if key == "reduction"}

    def library(matrix, loss, **given):
        def total(*z):
            relations = [torch.stack([matrix(*pair) for pair in paired(part)]) for part in (z[:split], z[split:])]
            sign = -1 if matrix is distance_matrix else 1
            return loss(sign * relations[0], sign * relations[1], torch.as_tensor(chosen), **given)

        return total

    def loop(loss, **given):
        return lambda *z: (
            loss(paired(z[:split]), paired([constant(x) for x in z[split:]]), chosen.tolist(), **given) / sums
        )

    inputs, wrt = [*student, *teacher], range(2 * split)
    assert_agree(library(angle_matrix, relation_kl, **options), loop(oracle.angle_loss, **loops), *inputs, wrt=wrt)
    assert_agree(
        library(distance_matrix, relation_kl, **options), loop(oracle.distance_loss, **loops), *inputs, wrt=wrt
    )
    if both == options:
        assert_agree(
            library(length_matrix, length_loss, **both), loop(oracle.length_loss, **reduction), *inputs, wrt=wrt
        )


METHOD = [
    {},
    {"RELATION_DIM": "positive"},
    {"RANK_DIM": "positive"},
    {"TIES": "shallow"},
    {"REDUCTION": "sum"},
    {"ANGLE_STAGES": 2, "LENGTH_STAGES": 3},
    {"ANGLE_STAGES": 0, "LENGTH_STAGES": 2, "STAGE_REDUCTION": "mean"},
    {"RANK_BY": "student"},
    {"MU_GRADIENT": False, "TEMPERATURE": 1.5},
    {"DISTANCE_WEIGHT": 3.0, "ANGLE_WEIGHT": 0.0},
    {"DISTANCE_WEIGHT": 2.0, "DISTANCE_STAGES": 1, "MU_GRADIENT": False, "RELATION_DIM": "positive"},
    {"KD_TEMPERATURE": 4.0, "KD_TEMPERATURE_POSITIVE": 2.0, "CE_WEIGHT": 0.5, "LENGTH_WEIGHT": 0.0},
    {"SM_TRAINING": "none"},
    {"SM_HIDDEN": 2, "AUGMENT": "rotation"},
]


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("values", METHOD, ids=str)
def test_the_methods_losses_from_given_outputs(values, anchors):
    """From logits and feature maps to the weighted losses; the first map is no stage."""
    classes, width, count, rows = 3, 2, 3, 4 * anchors
    target, anchor_of = [2, 0][:anchors], [*range(anchors)] * 3
    torch.manual_seed(0)
    student, teacher = Outputs(classes, [1, 2, 1, 2]), Outputs(classes, [1, 2, 2, 3])
    cfg = config("MDR", {"MDR.SM_WIDTH": width} | {f"MDR.{key}": value for key, value in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    own = cfg.MDR
    layers = [
        [[tuple(numbers(p.detach()) for p in layer.parameters()) for layer in sm if not isinstance(layer, nn.ReLU)]
         if isinstance(sm, nn.Sequential) else [] for sm in modules]
        for modules in (distiller.student_modules, distiller.teacher_modules)
    ]  # fmt: skip
    keys = {"KD": "kd", "ANGLE": "angle", "LENGTH": "length", "DISTANCE": "distance"}
    weights = {"loss_ce": own.CE_WEIGHT} | {f"loss_{name}": own[f"{key}_WEIGHT"] for key, name in keys.items()}
    weights = {name: weight for name, weight in weights.items() if weight}

    def library(name):
        def loss(logits_s, logits_t, *maps):
            dtype = torch.promote_types(logits_s.dtype, torch.float32)
            distiller.to(dtype)
            student.give(logits_s, [torch.zeros(rows, 1, 1, 1, dtype=dtype), *maps[:count]])
            teacher.give(logits_t, [torch.zeros(rows, 1, 1, 1, dtype=dtype), *maps[count:]])
            _, losses = distiller(image=torch.zeros(anchors, 3, 4, 4), target=torch.tensor(target), epoch=1)
            assert set(losses) == set(weights)
            return losses[name]

        return loss

    def embedded(modules, maps):
        z = [oracle.self_supervised_module(x, *module) for x, module in zip(maps, modules, strict=True)]
        return [(stage[anchors:], stage[:anchors]) for stage in z]

    def loops(name):
        def loss(logits_s, logits_t, *maps):
            if name == "loss_ce":
                return cross_entropy(logits_s[:anchors], target)
            if name == "loss_kd":
                on_anchors = kd_loss(logits_s[:anchors], constant(logits_t[:anchors]), own.KD_TEMPERATURE)
                rest = logits_s[anchors:], constant(logits_t[anchors:])
                return on_anchors + kd_loss(*rest, own.KD_TEMPERATURE_POSITIVE)
            kind = name.removeprefix("loss_")
            z_s = embedded(layers[0], maps[:count])
            z_t = embedded(layers[1], [constant(x) for x in maps[count:]])
            n = own[f"{kind.upper()}_STAGES"] or count
            ranked = z_t if own.RANK_BY == "teacher" else z_s
            selected = oracle.selection(ranked, anchor_of, kind, n, rank_dim=own.RANK_DIM, ties=own.TIES)
            options = {"reduction": own.REDUCTION}
            if kind != "length":
                options |= {"tau": own.TEMPERATURE, "relation_dim": own.RELATION_DIM}
            if kind != "angle":
                options |= {"mu_gradient": own.MU_GRADIENT}
            function = {"angle": oracle.angle_loss, "length": oracle.length_loss, "distance": oracle.distance_loss}[
                kind
            ]
            return function(z_s, z_t, selected, **options) / (n if own.STAGE_REDUCTION == "mean" else 1)

        return loss

    random = np.random.default_rng(anchors)
    shapes = [(rows, classes)] * 2 + [(rows, c, 2, 1) for net in (student, teacher) for c in net.widths[1:]]
    given = [random.normal(size=shape) for shape in shapes]
    for name, weight in weights.items():
        loop = loops(name)
        assert_agree(library(name), lambda *x, f=loop, w=weight: w * f(*x), *given, wrt=range(len(given)))


@pytest.mark.parametrize("augment", ["mixup", "rotation"])
@pytest.mark.parametrize("training", ["ce", "contrastive"])
def test_the_first_phase_from_given_outputs(training, augment):
    """The figures of a first batch, before its step: Sec. 3.3's classifier behind each module, or Eq. 5."""
    classes, anchors, count = 3, 3, 2
    target, anchor_of = [2, 0, 1], [*range(anchors)] * 3
    torch.manual_seed(0)
    student, teacher = (Outputs(classes, [1, 2, 3]) for _ in range(2))
    values = {"SM_WIDTH": 4, "SM_TRAINING": training, "AUGMENT": augment, "SM_EPOCHS": 1, "TEMPERATURE": 0.3}
    cfg = config("MDR", {f"MDR.{key}": value for key, value in values.items()})
    distiller = build_distiller(cfg, student, teacher).double().train()
    _, classifiers = distiller._fresh_teacher_modules()
    modules, classifiers = (
        [[tuple(numbers(p.detach()) for p in layer.parameters()) for layer in found] for found in nets]
        for nets in ([[sm[0], sm[2]] for sm in distiller.teacher_modules], [[layer] for layer in classifiers])
    )
    random = np.random.default_rng(4)
    logits, *maps = (random.normal(size=(4 * anchors, width, 1, 2)) for width in (classes, 1, 2, 3))
    teacher.give(torch.as_tensor(logits[..., 0, 0]), [torch.as_tensor(x) for x in maps])
    image, index = torch.as_tensor(random.normal(size=(anchors, 3, 4, 4))), torch.tensor([5, 0, 9])
    positives = distiller.positives(image, index, 1)
    labels = np.zeros((4 * anchors, classes))
    for row, (own, other, share) in enumerate(
        [(j, j, 1.0) for j in range(anchors)]
        + list(zip(anchor_of, positives.partner.tolist(), positives.share.tolist(), strict=True))
    ):
        labels[row, target[own]] += share
        labels[row, target[other]] += 1 - share
    facts = distiller.prepare(
        lambda epoch: [{"image": image, "target": torch.tensor(target), "index": index}], contextlib.nullcontext
    )
    z = [oracle.self_supervised_module(x.tolist(), *module) for x, module in zip(maps[1:], modules, strict=True)]
    pairs = [(stage[anchors:], stage[:anchors]) for stage in z]
    assert facts["smp"] == pytest.approx([oracle.smp_accuracy(*pair, anchor_of) for pair in pairs], rel=1e-6)
    if training == "contrastive":
        expected = sum(oracle.contrastive_loss(*pair, anchor_of, 0.3) for pair in pairs)
    else:
        scores = [
            [
                [sum(w * x for w, x in zip(line, row, strict=True)) + b for line, b in zip(*layer, strict=True)]
                for row in stage
            ]
            for stage, (layer,) in zip(z, classifiers, strict=True)
        ]
        expected = sum(oracle.mixed_cross_entropy(rows, labels.tolist()) for rows in scores)
        right = [np.mean(np.argmax(rows[:anchors], axis=1) == target) for rows in scores]
        assert facts["accuracy"] == pytest.approx(right, rel=1e-6)
    assert facts["loss"] == pytest.approx(expected, rel=1e-6)
    assert len(facts["smp"]) == count


def test_the_oracle_by_hand():
    assert oracle.angle_matrix([[3.0, 4.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, -2.0]]) == [
        pytest.approx([0.6, -0.8]),
        [0, 0],
    ]
    # Lengths 5 and 1 against 1 and 2: differences 4, 3, 0, 1, mean 2.
    assert oracle.length_matrix([[3.0, 4.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -2.0]]) == [[2.0, 1.5], [0.0, 0.5]]
    assert oracle.distance_matrix([[0.0], [6.0]], [[0.0], [2.0]]) == [
        pytest.approx([0, 2 / 3]),
        pytest.approx([2, 4 / 3]),
    ]
    similar = [[0.9, 0.1, 0.9], [0.2, 0.1, 0.3], [0.5, 0.5, 0.5]]
    assert oracle.pair_ranks(similar, [0, 1, 2], descending=True) == [0, 2, 0]  # equals are not better
    assert oracle.pair_ranks(similar, [0, 1, 2], descending=False) == [1, 0, 0]
    assert oracle.pair_ranks(similar, [0, 1, 2], descending=True, dim="positive") == [0, 1, 1]
    ranks = [[0, 3, 1], [2, 1, 1], [0, 2, 1]]  # three stages, three positives
    assert oracle.select_stages(ranks) == [[2, 1, 2]]
    assert oracle.select_stages(ranks, 2) == [[2, 1, 2], [0, 2, 1]]
    assert oracle.select_stages(ranks, 2, "shallow") == [[0, 1, 0], [2, 2, 1]]
    # Cosines (1, 0) of the teacher and (0, 1) of the student: p (1 - 0) / tau + (1 - p) (0 - 1) / tau.
    p = 1 / (1 + math.exp(-2))
    teacher, student = [([[1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]])], [([[0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])]
    assert oracle.angle_loss(student, teacher, [[0]]) == pytest.approx(0.25 * (2 * p - 1) / 0.5, rel=1e-12)
    # Differences of lengths over their mean: (2, 0) and (1/2, 3/2); squares 9/4 and 9/4.
    teacher, student = [([[1.0]], [[5.0], [1.0]])], [([[1.0]], [[2.0], [4.0]])]
    assert oracle.length_loss(student, teacher, [[0]]) == pytest.approx(9 / 4, rel=1e-12)
    assert oracle.length_loss(student, teacher, [[0], [0]], reduction="sum") == pytest.approx(9, rel=1e-12)
