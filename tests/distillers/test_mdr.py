"""MDR: its relations, ranks, stages and losses against ``oracles/mdr.py``, written out in loops; the ends; the method.

Two choices jump: the rank of a pair, where similarities tie, and the sign of a difference of lengths. Inputs either
keep clear of a tie in every precision or tie exactly.
"""

import contextlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import rounding
from method_cases import CLASSES, build, config, make_batch, total
from oracles import mdr as oracle
from oracles.cases import each_and_some, named
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, numbers
from oracles.kd import kd_loss as kd_oracle
from oracles.stubs import Outputs
from torch import nn

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.MDR import (
    angle_matrix,
    distance_matrix,
    embed,
    length_loss,
    length_matrix,
    mixed,
    mixed_cross_entropy,
    pair_ranks,
    pooled_stages,
    relation_kl,
    rotated,
    select_stages,
)
from mdistiller.engine.build import build_distiller
from mdistiller.functional.mixing import GRID, share_quantiles
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

N, M, D, K = 4, 12, 6, 3
ANCHOR_OF = torch.arange(N).repeat(3)


def embeddings(seed=0, rows=N + M, stages=K, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [
        (stage + 1) * torch.randn(rows, D + stage, generator=generator, dtype=torch.float64).to(dtype)
        for stage in range(stages)
    ]


def relations(matrix, z, **options):
    return torch.stack([matrix(stage[N:], stage[:N], **options) for stage in z])


# The formula: relations, ranks, stages


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


MATRICES = {
    angle_matrix: oracle.angle_matrix,
    length_matrix: oracle.length_matrix,
    distance_matrix: oracle.distance_matrix,
}


def positives_and_anchors(
    kind: str, positives: int, anchors: int, width: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """A self-supervised module's outputs."""
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
@pytest.mark.parametrize(
    "case",
    each_and_some(
        6,
        shape=[(9, 3, 5), (1, 1, 3), (3, 1, 4), (2, 2, 1), (12, 4, 2)],  # positives, anchors, entries
        kind=["random", "large", "small", "zero", "near", "copies", "one_point"],
    ),
    ids=named,
)
def test_relations_and_their_gradients(case, matrix):
    shape, kind = case.values()
    z_pos, z_anchor = positives_and_anchors(kind, *shape)
    if kind in ("large", "small") and matrix is angle_matrix:
        z_anchor = z_anchor * 3  # cosines keep, lengths don't
    weight = np.random.default_rng(5).normal(size=shape[:2])

    def loops(p, a):
        rows = MATRICES[matrix](p, a)
        return sum(w * x for ws, xs in zip(weight, rows, strict=True) for w, x in zip(ws, xs, strict=True))

    assert_agree(lambda p, a: (torch.as_tensor(weight).to(p) * matrix(p, a)).sum(), loops, z_pos, z_anchor, wrt=(0, 1))


@pytest.mark.parametrize("matrix", [angle_matrix, length_matrix, distance_matrix])
def test_gradient_of_relations(matrix):
    z = embeddings()[0].requires_grad_()
    assert torch.autograd.gradcheck(lambda x: matrix(x[N:], x[:N]), (z,))


@pytest.mark.parametrize("matrix", [length_matrix, distance_matrix])
def test_mu_without_gradient(matrix):
    """The gradient is then that of the differences, over a constant."""
    z = embeddings()[0]
    mu = 1 / matrix(z[N:], z[:N])[0, 0]
    with_mu, without, plain = (z.clone().requires_grad_() for _ in range(3))
    (matrix(with_mu[N:], with_mu[:N]) ** 2).sum().backward()
    (matrix(without[N:], without[:N], mu_gradient=False) ** 2).sum().backward()
    assert not torch.allclose(with_mu.grad, without.grad)
    if matrix is length_matrix:
        difference = (plain[N:].norm(dim=1)[:, None] - plain[:N].norm(dim=1)).abs()
    else:
        difference = (plain[N:, None] - plain[None, :N]).norm(dim=2)
    ((difference / difference.mean().item()) ** 2).sum().backward()
    torch.testing.assert_close(without.grad, plain.grad)
    assert mu > 0


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


def test_ties_by_default_go_to_the_deepest():
    assert select_stages(torch.zeros(4, 2, dtype=torch.long)).tolist() == [[3, 3]]
    assert select_stages(torch.zeros(4, 2, dtype=torch.long), ties="shallow").tolist() == [[0, 0]]


@pytest.mark.parametrize("matrix", [angle_matrix, length_matrix])
def test_the_scale_of_a_stage_does_not_move_the_choice(matrix):
    z = embeddings()
    scaled = [stage * factor for stage, factor in zip(z, (1e-6, 1e3, 7.0), strict=True)]
    choices = []
    for given in (z, scaled):
        ranks = [pair_ranks(m, ANCHOR_OF, descending=matrix is angle_matrix) for m in relations(matrix, given)]
        choices.append(select_stages(torch.stack(ranks)))
    assert torch.equal(*choices)
    assert len(choices[0].unique()) > 1


# The formula: losses


def stages(count: int, kind: str, seed: int, positives: int = 6, anchors: int = 2) -> list[np.ndarray]:
    """Of each stage the embeddings of positives and anchors, one after the other, stages of different width."""
    pairs = [positives_and_anchors(kind, positives, anchors, 3 - k % 2, seed + k) for k in range(count)]
    return [z for pair in pairs for z in pair]


def paired(arrays) -> list[tuple]:
    return list(zip(arrays[::2], arrays[1::2], strict=True))


@pytest.mark.parametrize(
    "case",
    each_and_some(
        8,
        kind=["random", "equal", "near", "zero", "one_point"],
        temperature=[0.5, 2.0],
        relation_dim=["anchor", "positive"],
        reduction=["mean", "sum"],
        stage_reduction=["sum", "mean"],
    ),
    ids=named,
)
def test_losses_at_given_stages(case):
    """Any choice of stages, also one that no rank would make; the teacher's relations are constants."""
    kind, temperature, relation_dim, reduction, stage_reduction = case.values()
    count, split = 3, 6
    teacher = stages(count, "random" if kind in ("equal", "near") else kind, 10)
    student = stages(count, kind if kind != "equal" else "random", 20)
    if kind in ("equal", "near"):
        student = [z + (1e-3 if kind == "near" else 0.0) * x for z, x in zip(teacher, student, strict=True)]
    chosen = np.random.default_rng(3).permuted(np.tile(np.arange(count)[:, None], (1, 6)), axis=0)[:2]
    reductions = {"reduction": reduction, "stage_reduction": stage_reduction}
    softened = {"temperature": temperature, "relation_dim": relation_dim, **reductions}

    def library(*z):
        def of(matrix):
            return [torch.stack([matrix(*pair) for pair in paired(part)]) for part in (z[:split], z[split:])]

        at, distances = torch.as_tensor(chosen), of(distance_matrix)
        return {
            "angle": relation_kl(*of(angle_matrix), at, **softened),
            "length": length_loss(*of(length_matrix), at, **reductions),
            "distance": relation_kl(-distances[0], -distances[1], at, **softened),
        }

    def loops(*z):
        given = paired(z[:split]), paired([constant(x) for x in z[split:]]), chosen.tolist()
        options = {"tau": temperature, "relation_dim": relation_dim, "reduction": reduction}
        losses = {
            "angle": oracle.angle_loss(*given, **options),
            "length": oracle.length_loss(*given, reduction=reduction),
            "distance": oracle.distance_loss(*given, **options),
        }
        return {name: loss / (len(chosen) if stage_reduction == "mean" else 1) for name, loss in losses.items()}

    assert_agree(library, loops, *student, *teacher, wrt=range(2 * split))


def losses_of(z, teacher):
    chosen = torch.arange(M)[None] % K
    angle = relation_kl(relations(angle_matrix, z), relations(angle_matrix, teacher), chosen)
    distance = relation_kl(-relations(distance_matrix, z), -relations(distance_matrix, teacher), chosen)
    return angle, length_loss(relations(length_matrix, z), relations(length_matrix, teacher), chosen), distance


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_losses(which):
    teacher = embeddings(1)
    z = [stage.requires_grad_() for stage in embeddings()]
    assert torch.autograd.gradcheck(lambda *x: losses_of(x, teacher)[which], z, fast_mode=True)


@pytest.mark.parametrize("which", range(3))
def test_zero_and_flat_at_the_teacher_whatever_the_scale_of_a_stage(which):
    teacher = embeddings()
    z = [(7 * stage).requires_grad_() for stage in teacher]
    loss = losses_of(z, teacher)[which]
    loss.backward()
    assert abs(loss.item()) < rounding(loss.dtype)
    for stage in z:
        assert stage.grad is None or stage.grad.abs().max() < 1e-12


def test_over_the_positives_there_is_a_gradient_at_the_teacher():
    """Why the softmax of a positive runs over the anchors."""
    teacher = embeddings()
    z = [stage.clone().requires_grad_() for stage in teacher]
    chosen = torch.arange(M)[None] % K
    options = {"relation_dim": "positive"}
    relation_kl(relations(angle_matrix, z), relations(angle_matrix, teacher), chosen, **options).backward()
    assert max(stage.grad.abs().max() for stage in z) > 1e-3


def test_the_order_of_images_does_not_matter():
    student, teacher = embeddings(0), embeddings(1)
    order = torch.tensor([2, 0, 3, 1])
    rows = torch.cat([order + N * part for part in range(4)])
    results = []
    for pick in (torch.arange(N + M), rows):
        s, t = ([stage[pick] for stage in z] for z in (student, teacher))
        ranks = torch.stack([pair_ranks(m, ANCHOR_OF, descending=True) for m in relations(angle_matrix, t)])
        chosen = select_stages(ranks)
        angle = relation_kl(relations(angle_matrix, s), relations(angle_matrix, t), chosen)
        results.append(
            torch.stack([angle, length_loss(relations(length_matrix, s), relations(length_matrix, t), chosen)])
        )
    torch.testing.assert_close(*results)


# The formula: positives


def test_rotations_are_the_anchors_turned():
    image = torch.randn(2, 3, 8, 8)
    found = rotated(image)
    for p in range(3):
        for j in range(2):
            row = 2 * p + j
            assert torch.equal(found.images[row], torch.rot90(image[j], p + 1, (1, 2)))
            assert (found.anchor[row], found.partner[row], found.share[row]) == (j, j, 1)


def mix(image, index=None, epoch=1, seed=0, alpha=1.0):
    index = torch.arange(len(image)) if index is None else index
    return mixed(image, index, epoch, seed, share_quantiles(alpha), alpha)


def test_mixtures_are_of_anchor_and_partner():
    image = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    found = mix(image)
    assert found.anchor.tolist() == [*range(5)] * 3
    assert (found.partner != found.anchor).all()
    assert ((found.share >= 0.5) & (found.share <= 1)).all()
    for row in range(15):
        own, other, share = image[found.anchor[row]], image[found.partner[row]], found.share[row]
        torch.testing.assert_close(found.images[row], share * own + (1 - share) * other)


def test_draws_follow_from_seed_epoch_and_index():
    image, index = torch.randn(6, 3, 4, 4), torch.tensor([9, 3, 7, 1, 0, 5])
    first = mix(image, index)
    assert torch.equal(first.images, mix(image, index).images)
    for other in (mix(image, index + 1), mix(image, index, epoch=2), mix(image, index, seed=1)):
        assert not torch.equal(first.share, other.share)
    assert len(first.share.unique()) == 18  # anew for each positive
    assert len({tuple(part) for part in first.partner.view(3, 6).tolist()}) > 1


@pytest.mark.parametrize("alpha", [0.2, 0.5, 1.0, 2.0, 10.0])
def test_shares_are_folded_beta(alpha):
    """Against the smaller of two gammas over their sum; 4 sigma of a Kolmogorov-Smirnov distance is about 0.01."""
    image = torch.zeros(1, 3, 1, 1).expand(20000, 3, 1, 1)
    minor = (1 - mix(image, alpha=alpha).share.double()).sort().values
    assert minor.min() >= 0 and minor.max() <= 0.5
    torch.manual_seed(0)
    x = torch.distributions.Beta(torch.tensor(alpha).double(), alpha).sample((60000,))
    x = torch.minimum(x, 1 - x).sort().values
    at = torch.linspace(0, 0.5, 500, dtype=torch.float64)
    distance = (torch.searchsorted(minor, at) - torch.searchsorted(x, at)).abs().max() / 60000
    assert distance < 0.012


def test_quantiles_of_the_uniform_are_a_line():
    torch.testing.assert_close(share_quantiles(1.0), torch.linspace(0, 0.5, GRID + 1))


def test_labels_are_mixed_as_the_images():
    image, target = torch.randn(4, 3, 2, 2), torch.tensor([2, 0, 1, 2])
    positives, logits = mix(image), torch.randn(16, 3, generator=torch.Generator().manual_seed(0)).double()
    rows = [F.cross_entropy(logits[j : j + 1], target[j : j + 1]) for j in range(4)]
    for row in range(12):
        share = torch.zeros(3, dtype=torch.float64)
        share[target[positives.anchor[row]]] += positives.share[row].double()
        share[target[positives.partner[row]]] += 1 - positives.share[row].double()
        rows.append(-(share * logits[4 + row].log_softmax(0)).sum())
    torch.testing.assert_close(mixed_cross_entropy(logits, target, positives), sum(rows) / 16, rtol=1e-6, atol=1e-6)
    shares = F.one_hot(target, 3).double()
    torch.testing.assert_close(mixed_cross_entropy(logits, shares, positives), sum(rows) / 16, rtol=1e-6, atol=1e-6)


# At the edges


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_constant_features_give_finite_relations_and_gradients(value, dtype):
    z = torch.full((N + M, D), value, dtype=dtype, requires_grad=True)
    matrices = [matrix(z[N:], z[:N]) for matrix in (angle_matrix, length_matrix, distance_matrix)]
    torch.testing.assert_close(matrices[0], torch.full_like(matrices[0], value))
    assert not matrices[1].any() and not matrices[2].any()
    sum((m * torch.arange(N)).sum() for m in matrices).backward()
    assert torch.isfinite(z.grad).all()
    for matrix, descending in zip(matrices, (True, False, False), strict=True):
        assert not pair_ranks(matrix, ANCHOR_OF, descending=descending).any()


def test_an_image_alone_is_mixed_with_itself():
    image = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(mix(image).images, image.expand(3, -1, -1, -1))


def test_a_single_image():
    """Its own anchor is the only one: nothing to tell apart, and no number that isn't finite."""
    mdr = build("MDR")
    _, losses = mdr(**make_batch("MDR", images=1), epoch=1)
    sum(losses.values()).backward()
    assert losses["loss_angle"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in mdr.get_learnable_parameters() if p.grad is not None)


def test_relations_are_computed_in_full_precision_under_autocast():
    mdr = build("MDR")
    features = {"feats": [torch.randn(16, c, 2, 2).bfloat16() for c in (16, 16, 32, 64)]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = embed(mdr.teacher_modules, pooled_stages(features, (1, 2, 3)))
    for k, (stage, module) in enumerate(zip(z, mdr.teacher_modules, strict=True), 1):
        assert stage.dtype == torch.float32
        assert torch.equal(stage, module(features["feats"][k].float().mean((2, 3))))


def test_rotating_needs_squares():
    with pytest.raises(InputError, match="square"):
        rotated(torch.zeros(1, 3, 8, 6))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_stages(torch.zeros(3, 2), n=4), "cannot select 4 of 3 stages"),
        (lambda: select_stages(torch.zeros(3, 2), n=0), "cannot select 0 of 3 stages"),
        (lambda: select_stages(torch.zeros(3, 2), ties="dep"), "ties: no 'dep'; closest: deep"),
        (lambda: pair_ranks(torch.zeros(3, 1), torch.zeros(3).long(), descending=True, dim="row"), "dim: no 'row'"),
    ],
)
def test_what_cannot_be_selected_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (relation_kl, {"relation_dim": "anchors"}, "relation_dim: no 'anchors'; closest: anchor"),
        (relation_kl, {"reduction": "batchmean"}, "reduction: no 'batchmean'"),
        (relation_kl, {"stage_reduction": "none"}, "stage_reduction: no 'none'"),
        (length_loss, {"reduction": "batchmean"}, "reduction: no 'batchmean'"),
        (length_loss, {"stage_reduction": "none"}, "stage_reduction: no 'none'"),
    ],
)
def test_unknown_reductions_are_refused(loss, options, message):
    """They used to count as sums."""
    with pytest.raises(InputError, match=message):
        loss(torch.zeros(2, 6, 2), torch.zeros(2, 6, 2), torch.zeros(1, 6, dtype=torch.int64), **options)


def test_different_stage_counts_are_refused_by_name():
    student, teacher = (cifar_model_dict[name][0](num_classes=CLASSES) for name in ("resnet8", "vgg8"))
    with pytest.raises(InputError, match=r"the student ResNet has 3 .* the teacher VGG 4"):
        build_distiller(config("MDR"), student, teacher)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ANGLE_STAGES", 4, "from 0 \\(all\\) to 3"),
        ("LENGTH_STAGES", -1, "at least 0"),
        ("TEMPERATURE", 0.0, "above 0"),
        ("KD_TEMPERATURE", -1.0, "above 0"),
        ("MIXUP_ALPHA", 0.0, "above 0"),
        ("SM_WIDTH", 0, "at least 1"),
        ("SM_EPOCHS", -1, "at least 0"),
        ("AUGMENT", "mixupp", "closest: mixup"),
        ("TIES", "random", "known: deep, shallow"),
        ("DISTANCE_STAGES", 1, "DISTANCE_WEIGHT, which is 0"),
    ],
)
def test_values_out_of_range_are_refused(key, value, message):
    with pytest.raises(InputError, match=f"MDR.{key}.*{message}"):
        with_keys(**{key: value})


def test_a_share_for_rotations_is_refused():
    with pytest.raises(InputError, match=r"MDR\.MIXUP_ALPHA 0\.3 belongs to MDR\.AUGMENT mixup, got rotation"):
        with_keys(AUGMENT="rotation", MIXUP_ALPHA=0.3)


# The method


def with_keys(**values):
    return build("MDR", {f"MDR.{key}": value for key, value in values.items()})


FROM_OUTPUTS = [
    {},
    {"RANK_DIM": "positive"},
    {"TIES": "shallow"},
    {"ANGLE_STAGES": 2, "LENGTH_STAGES": 3},
    {"ANGLE_STAGES": 0, "LENGTH_STAGES": 2, "STAGE_REDUCTION": "mean"},
    {"RANK_BY": "student"},
    {"MU_GRADIENT": False, "TEMPERATURE": 1.5},
    {"DISTANCE_WEIGHT": 3.0, "ANGLE_WEIGHT": 0.0},
    {"DISTANCE_WEIGHT": 2.0, "DISTANCE_STAGES": 1, "MU_GRADIENT": False},
    {"KD_TEMPERATURE": 4.0, "KD_TEMPERATURE_POSITIVE": 2.0, "KD_WEIGHT": 0.3, "CE_WEIGHT": 0.5, "LENGTH_WEIGHT": 0.0},
    {"SM_TRAINING": "none"},
    {"SM_HIDDEN": 2, "AUGMENT": "rotation"},
]


@pytest.mark.parametrize("anchors", [1, 2])
@pytest.mark.parametrize("values", FROM_OUTPUTS, ids=str)
def test_losses_from_given_outputs(values, anchors):
    """From logits and feature maps to the weighted losses; the first map is no stage."""
    classes, width, count, rows = 3, 2, 3, 4 * anchors
    target, anchor_of = [2, 0][:anchors], [*range(anchors)] * 3
    torch.manual_seed(0)
    student, teacher = Outputs(classes, [1, 2, 1, 2]), Outputs(classes, [1, 2, 2, 3])
    cfg = config("MDR", {"MDR.SM_WIDTH": width} | {f"MDR.{key}": value for key, value in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    options = cfg.MDR
    layers = [
        [[tuple(numbers(p.detach()) for p in layer.parameters()) for layer in sm if not isinstance(layer, nn.ReLU)]
         if isinstance(sm, nn.Sequential) else [] for sm in modules]
        for modules in (distiller.student_modules, distiller.teacher_modules)
    ]  # fmt: skip

    def library(logits_s, logits_t, *maps):
        dtype = torch.promote_types(logits_s.dtype, torch.float32)
        distiller.to(dtype)
        student.give(logits_s, [torch.zeros(rows, 1, 1, 1, dtype=dtype), *maps[:count]])
        teacher.give(logits_t, [torch.zeros(rows, 1, 1, 1, dtype=dtype), *maps[count:]])
        return distiller(image=torch.zeros(anchors, 3, 4, 4), target=torch.tensor(target), epoch=1)[1]

    def embedded(modules, maps):
        z = [oracle.self_supervised_module(x, *module) for x, module in zip(maps, modules, strict=True)]
        return [(stage[anchors:], stage[:anchors]) for stage in z]

    def loops(logits_s, logits_t, *maps):
        logits_t = constant(logits_t)
        kd = kd_oracle(logits_s[:anchors], logits_t[:anchors], options.KD_TEMPERATURE)
        kd = kd + kd_oracle(logits_s[anchors:], logits_t[anchors:], options.KD_TEMPERATURE_POSITIVE)
        losses = {
            "loss_ce": options.CE_WEIGHT * cross_entropy(logits_s[:anchors], target),
            "loss_kd": options.KD_WEIGHT * kd,
        }
        z_s = embedded(layers[0], maps[:count])
        z_t = embedded(layers[1], [constant(x) for x in maps[count:]])
        ranked = z_t if options.RANK_BY == "teacher" else z_s
        softened = {"tau": options.TEMPERATURE}
        mu = {"mu_gradient": options.MU_GRADIENT}
        for kind, loss, given in (
            ("angle", oracle.angle_loss, softened),
            ("length", oracle.length_loss, mu),
            ("distance", oracle.distance_loss, softened | mu),
        ):
            weight, n = (options[f"{kind.upper()}_{key}"] for key in ("WEIGHT", "STAGES"))
            n = n or count
            selected = oracle.selection(ranked, anchor_of, kind, n, rank_dim=options.RANK_DIM, ties=options.TIES)
            if weight:
                found = loss(z_s, z_t, selected, **given)
                losses[f"loss_{kind}"] = weight * found / (n if options.STAGE_REDUCTION == "mean" else 1)
        return losses

    random = np.random.default_rng(anchors)
    shapes = [(rows, classes)] * 2 + [(rows, c, 2, 1) for net in (student, teacher) for c in net.widths[1:]]
    given = [random.normal(size=shape) for shape in shapes]
    assert_agree(library, loops, *given, wrt=range(len(given)))


# What images and modules decide, given outputs cannot show.
CHANGES = {"AUGMENT": "rotation", "MIXUP_ALPHA": 0.3, "SM_WIDTH": 32, "SM_HIDDEN": 64, "SM_TRAINING": "none"}


@pytest.mark.parametrize("key", CHANGES)
def test_each_key_changes_the_loss(key):
    batch = make_batch("MDR")
    before, after = total(with_keys(), batch), total(with_keys(**{key: CHANGES[key]}), batch)
    assert abs(before - after) > 1e-6 * abs(before)


def test_every_key_is_among_those():
    tested = {key for values in FROM_OUTPUTS for key in values} | set(CHANGES) | {"STAGES"}
    of_first_phase = {key for key in config("MDR").MDR if key.startswith("SM_")}
    assert tested | of_first_phase == set(config("MDR").MDR)


def test_it_is_the_sum_of_its_parts():
    """A step of whole networks, in float64: what they return, taken through the oracle."""
    mdr = build("MDR").double()
    batch = make_batch("MDR", images=N, dtype=torch.float64)
    positives = mdr.positives(batch["image"], batch["index"], 3)
    images = torch.cat([batch["image"], positives.images])
    with torch.no_grad():
        state = {k: v.clone() for k, v in mdr.student.state_dict().items()}
        (logits_s, features_s), (logits_t, features_t) = mdr.student(images), mdr.teacher(images)
        mdr.student.load_state_dict(state)
        z_s, z_t = (
            [m(f.mean((2, 3))).tolist() for m, f in zip(modules, features["feats"][1:], strict=True)]
            for modules, features in ((mdr.student_modules, features_s), (mdr.teacher_modules, features_t))
        )
    given = [[(stage[N:], stage[:N]) for stage in z] for z in (z_s, z_t)]
    selected = {kind: oracle.selection(given[1], ANCHOR_OF.tolist(), kind, 1) for kind in ("angle", "length")}
    expected = {
        "loss_ce": F.cross_entropy(logits_s[:N], batch["target"]).item(),
        "loss_kd": 2 * (kd_loss(logits_s[:N], logits_t[:N], 1) + kd_loss(logits_s[N:], logits_t[N:], 1)).item(),
        "loss_angle": 300 * oracle.angle_loss(*given, selected["angle"]),
        "loss_length": oracle.length_loss(*given, selected["length"]),
    }
    _, losses = mdr(**batch, epoch=3)
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-9)


def test_stages_as_declared():
    """vgg has no map of a stem: all five maps are stages, or the first is skipped."""
    net = cifar_model_dict["vgg8"][0](num_classes=CLASSES)
    for way, widths in (("skip_first", [128, 256, 512, 512]), ("declared", [64, 128, 256, 512, 512])):
        mdr = build_distiller(config("MDR", {"MDR.STAGES": way}), net, net)
        assert mdr.stages == len(widths)
        assert [module[0].in_features for module in mdr.teacher_modules] == widths


def test_monitors_are_shares():
    mdr = with_keys(ANGLE_STAGES=1, LENGTH_STAGES=2)
    mdr(**make_batch("MDR"), epoch=1)
    for name, expected in (("angle_share", 1), ("length_share", 2)):
        assert sum(mdr.monitors[f"{name}_{k}"] for k in (1, 2, 3)).item() == pytest.approx(expected)
    for name in ("smp_student", "smp_teacher"):
        assert all(0 <= mdr.monitors[f"{name}_{k}"] <= 1 for k in (1, 2, 3))


def test_modules_do_not_touch_the_generator_and_follow_from_the_seed():
    student, teacher = (cifar_model_dict[name][0](num_classes=CLASSES) for name in ("resnet8", "resnet14"))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(3)
        mdr = build_distiller(config("MDR", {"EXPERIMENT.SEED": seed}), student, teacher)
        found.append((torch.rand(1), mdr.teacher_modules[0][0].weight, mdr.student_modules[0][0].weight))
    assert len({draw.item() for draw, *_ in found}) == 1
    assert torch.equal(found[0][1], found[1][1]) and torch.equal(found[0][2], found[1][2])
    assert not torch.equal(found[0][1], found[2][1]) and not torch.equal(found[0][2], found[2][2])
    assert not torch.equal(found[0][1], found[0][2])


# The first phase


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


def prepare(mdr, images=32, steps=1):
    """Train on images that differ in colour."""
    batches = [make_batch("MDR", images, seed=seed) for seed in range(steps)]
    for batch in batches:
        batch["image"] += 2 * batch["image"][:, :, :1, :1]
    return mdr.prepare(lambda epoch: batches, contextlib.nullcontext)


FAST = {"SM_EPOCHS": 30, "SM_LR_DECAY_STAGES": [20]}


@pytest.mark.parametrize("training", ["ce", "contrastive"])
@pytest.mark.parametrize("augment", ["mixup", "rotation"])
def test_the_first_phase_learns_what_it_is_trained_on(training, augment):
    mdr = with_keys(SM_TRAINING=training, AUGMENT=augment, **FAST)
    before = {k: v.clone() for k, v in mdr.teacher.state_dict().items()}
    start = prepare(with_keys(SM_TRAINING=training, AUGMENT=augment, SM_EPOCHS=1))
    end = prepare(mdr)
    assert end["loss"] < 0.95 * start["loss"]
    assert ("accuracy" in end) == (training == "ce")
    assert all(torch.equal(before[k], v) for k, v in mdr.teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in mdr.teacher_modules.parameters())
    assert not any(p.grad is not None for p in mdr.student.parameters())


def test_the_first_phase_takes_shares_of_classes():
    numbers, shares = with_keys(SM_EPOCHS=1), with_keys(SM_EPOCHS=1)
    batch = make_batch("MDR")
    facts = []
    for mdr, target in ((numbers, batch["target"]), (shares, F.one_hot(batch["target"], CLASSES).float())):
        facts.append(mdr.prepare(lambda epoch, target=target: [{**batch, "target": target}], contextlib.nullcontext))
    assert facts[0]["accuracy"] == facts[1]["accuracy"]
    assert facts[0]["loss"] == pytest.approx(facts[1]["loss"])


def test_the_first_phase_repeats_itself_and_does_not_depend_on_the_student():
    first = with_keys(SM_EPOCHS=3)
    prepare(first)
    torch.manual_seed(0)
    student = cifar_model_dict["resnet20"][0](num_classes=CLASSES)
    second = build_distiller(config("MDR", {"MDR.SM_EPOCHS": 3}), student, first.teacher)
    prepare(second)
    prepare(second)  # starts anew, not from where it was
    for a, b in zip(first.teacher_modules.parameters(), second.teacher_modules.parameters(), strict=True):
        assert torch.equal(a, b)


FEW_EPOCHS = {"SM_EPOCHS": 3, "SM_LR_DECAY_STAGES": [2]}


@pytest.fixture(scope="module")
def usual_first_phase():
    mdr = with_keys(**FEW_EPOCHS)
    prepare(mdr)
    return mdr


@pytest.mark.parametrize(
    ("key", "value"),
    [("SM_EPOCHS", 4), ("SM_LR", 0.1), ("SM_LR_DECAY_STAGES", [1]), ("SM_LR_DECAY_RATE", 0.5), ("SM_MOMENTUM", 0.0),
     ("SM_WEIGHT_DECAY", 0.1), ("SM_TRAINING", "contrastive"), ("AUGMENT", "rotation"), ("MIXUP_ALPHA", 0.2),
     ("SM_HIDDEN", 64), ("SM_WIDTH", 64)],
)  # fmt: skip
def test_each_key_of_the_first_phase_changes_its_result_and_its_file(key, value, usual_first_phase):
    usual, other = usual_first_phase, with_keys(**{**FEW_EPOCHS, key: value})
    prepare(other)
    a, b = usual.teacher_modules[0][0].weight, other.teacher_modules[0][0].weight
    assert a.shape != b.shape or not torch.equal(a, b)
    assert usual.preparation()[1] != other.preparation()[1]


@pytest.mark.parametrize("training", ["ce", "contrastive"])
def test_the_first_phase_depends_on_the_temperature_where_it_uses_it(training):
    before, after = (with_keys(SM_TRAINING=training, TEMPERATURE=t).preparation()[1] for t in (0.5, 1.0))
    assert (before != after) == (training == "contrastive")


def test_without_modules_there_is_nothing_to_prepare():
    mdr = with_keys(SM_TRAINING="none")
    assert prepare(mdr) == {}
    assert not mdr.teacher_modules.state_dict()
