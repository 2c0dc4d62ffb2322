"""MDR's relations, ranks, stages and losses against loops; what each key changes; the first phase."""

import contextlib
import math

import pytest
import torch
import torch.nn.functional as F
from method_cases import CLASSES, SIZE, build, config, make_batch, total

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
    probe,
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


# Relations


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def test_angles_equal_the_loop():
    z = embeddings()[0]
    found = angle_matrix(z[N:], z[:N])
    for i, positive in enumerate(z[N:].tolist()):
        for j, anchor in enumerate(z[:N].tolist()):
            dot = sum(a * b for a, b in zip(positive, anchor, strict=True))
            assert found[i, j].item() == pytest.approx(dot / length(positive) / length(anchor), rel=1e-12)


def loop_of_differences(z, difference):
    found = [[difference(positive, anchor) for anchor in z[:N].tolist()] for positive in z[N:].tolist()]
    mu = sum(map(sum, found)) / (M * N)
    return torch.tensor([[entry / mu for entry in row] for row in found], dtype=torch.float64)


def test_lengths_equal_the_loop():
    z = embeddings()[0]
    expected = loop_of_differences(z, lambda p, a: abs(length(p) - length(a)))
    torch.testing.assert_close(length_matrix(z[N:], z[:N]), expected, rtol=1e-12, atol=1e-12)


def test_distances_equal_the_loop():
    z = embeddings()[0]
    expected = loop_of_differences(z, lambda p, a: length([x - y for x, y in zip(p, a, strict=True)]))
    torch.testing.assert_close(distance_matrix(z[N:], z[:N]), expected, rtol=1e-12, atol=1e-12)


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


# Ranks and stages


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("dim", ["anchor", "positive"])
@pytest.mark.parametrize("ties", [False, True])
def test_ranks_equal_the_loop(descending, dim, ties):
    matrix = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    if ties:
        matrix = matrix.round()
    expected = []
    for i, own in enumerate(ANCHOR_OF.tolist()):
        others = matrix[i].tolist() if dim == "anchor" else matrix[:, own].tolist()
        mine = matrix[i, own].item()
        expected.append(sum(x > mine if descending else x < mine for x in others))
    assert pair_ranks(matrix, ANCHOR_OF, descending=descending, dim=dim).tolist() == expected


@pytest.mark.parametrize("ties", ["deep", "shallow"])
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_stages_equal_the_loop(ties, n):
    ranks = torch.randint(3, (5, 40), generator=torch.Generator().manual_seed(0))
    found = select_stages(ranks, n, ties)
    for i, column in enumerate(ranks.T.tolist()):
        order = sorted(range(5), key=lambda k: (column[k], -k if ties == "deep" else k))
        assert found[:, i].tolist() == order[:n]


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: select_stages(torch.zeros(3, 2), n=4), "cannot select 4 of 3 stages"),
        (lambda: select_stages(torch.zeros(3, 2), n=0), "cannot select 0 of 3 stages"),
        (lambda: select_stages(torch.zeros(3, 2), ties="dep"), "MDR.TIES: no 'dep'; closest: deep"),
        (lambda: pair_ranks(torch.zeros(3, 1), torch.zeros(3).long(), descending=True, dim="row"), "MDR.RANK_DIM"),
    ],
)
def test_what_cannot_be_selected_is_refused(call, message):
    with pytest.raises(InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (relation_kl, {"relation_dim": "anchors"}, r"MDR\.RELATION_DIM: no 'anchors'; closest: anchor"),
        (relation_kl, {"reduction": "batchmean"}, r"MDR\.REDUCTION: no 'batchmean'"),
        (relation_kl, {"stage_reduction": "none"}, r"MDR\.STAGE_REDUCTION"),
        (length_loss, {"reduction": "batchmean"}, r"MDR\.REDUCTION"),
        (length_loss, {"stage_reduction": "none"}, r"MDR\.STAGE_REDUCTION"),
    ],
)
def test_unknown_reductions_are_refused(loss, options, message):
    """They used to count as sums."""
    with pytest.raises(InputError, match=message):
        loss(torch.zeros(2, 6, 2), torch.zeros(2, 6, 2), torch.zeros(1, 6, dtype=torch.int64), **options)


# Losses


def softmax(row):
    powers = [math.exp(x) for x in row]
    return [p / sum(powers) for p in powers]


def loop_of_kl(student, teacher, chosen, temperature, relation_dim):
    """Eq. 12, one entry after the other."""
    value = 0.0
    for row in chosen.tolist():
        for i, k in enumerate(row):
            for j in range(N):
                if relation_dim == "anchor":
                    s, t = ([x / temperature for x in side[k, i].tolist()] for side in (student, teacher))
                    p_s, p_t = softmax(s)[j], softmax(t)[j]
                else:
                    s, t = ([x / temperature for x in side[k, :, j].tolist()] for side in (student, teacher))
                    p_s, p_t = softmax(s)[i], softmax(t)[i]
                value += temperature**2 * p_t * math.log(p_t / p_s)
    return value


@pytest.mark.parametrize("relation_dim", ["anchor", "positive"])
@pytest.mark.parametrize(
    ("n", "reduction", "stage_reduction"), [(1, "mean", "sum"), (2, "sum", "sum"), (3, "mean", "mean")]
)
def test_angle_loss_equals_the_loop(relation_dim, n, reduction, stage_reduction):
    student, teacher = (relations(angle_matrix, embeddings(seed)) for seed in (0, 1))
    chosen = select_stages(torch.randint(4, (K, M), generator=torch.Generator().manual_seed(2)), n)
    options = {"relation_dim": relation_dim, "reduction": reduction, "stage_reduction": stage_reduction}
    expected = loop_of_kl(student, teacher, chosen, 0.5, relation_dim)
    expected /= (M if reduction == "mean" else 1) * (n if stage_reduction == "mean" else 1)
    assert relation_kl(student, teacher, chosen, **options).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("n", "reduction", "stage_reduction"), [(1, "mean", "sum"), (2, "sum", "sum"), (3, "mean", "mean")]
)
def test_length_loss_equals_the_loop(n, reduction, stage_reduction):
    student, teacher = (relations(length_matrix, embeddings(seed)) for seed in (0, 1))
    chosen = select_stages(torch.randint(4, (K, M), generator=torch.Generator().manual_seed(2)), n)
    expected = 0.0
    for row in chosen.tolist():
        for i, k in enumerate(row):
            expected += sum((student[k, i, j] - teacher[k, i, j]).item() ** 2 for j in range(N))
    expected /= (M * N if reduction == "mean" else 1) * (n if stage_reduction == "mean" else 1)
    found = length_loss(student, teacher, chosen, reduction=reduction, stage_reduction=stage_reduction)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def losses_of(z, teacher):
    chosen = torch.arange(M)[None] % K
    angle = relation_kl(relations(angle_matrix, z), relations(angle_matrix, teacher), chosen)
    distance = relation_kl(-relations(distance_matrix, z), -relations(distance_matrix, teacher), chosen)
    return angle, length_loss(relations(length_matrix, z), relations(length_matrix, teacher), chosen), distance


@pytest.mark.parametrize("which", range(3))
def test_gradient_of_losses(which):
    teacher = embeddings(1)
    z = [stage.requires_grad_() for stage in embeddings()]
    assert torch.autograd.gradcheck(lambda *x: losses_of(x, teacher)[which], z)


@pytest.mark.parametrize("which", range(3))
def test_zero_and_flat_at_the_teacher_whatever_the_scale_of_a_stage(which):
    teacher = embeddings()
    z = [(7 * stage).requires_grad_() for stage in teacher]
    loss = losses_of(z, teacher)[which]
    loss.backward()
    assert abs(loss.item()) < 1e-15
    for stage in z:
        assert stage.grad is None or stage.grad.abs().max() < 1e-12


def test_over_the_positives_there_is_a_gradient_at_the_teacher():
    """Why ``RELATION_DIM`` positive is not the default."""
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


# Positives


def test_rotations_are_the_anchors_turned():
    image = torch.randn(2, 3, 8, 8)
    found = rotated(image)
    for p in range(3):
        for j in range(2):
            row = 2 * p + j
            assert torch.equal(found.images[row], torch.rot90(image[j], p + 1, (1, 2)))
            assert (found.anchor[row], found.partner[row], found.share[row]) == (j, j, 1)


def test_rotating_needs_squares():
    with pytest.raises(InputError, match="square"):
        rotated(torch.zeros(1, 3, 8, 6))


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


def test_an_image_alone_is_mixed_with_itself():
    image = torch.randn(1, 3, 4, 4)
    torch.testing.assert_close(mix(image).images, image.expand(3, -1, -1, -1))


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


# The method


def test_it_is_the_sum_of_its_parts():
    """A step written out on the networks' own outputs, in float64."""
    mdr = build("MDR").double()
    batch = make_batch("MDR", images=4, dtype=torch.float64)
    positives = mdr.positives(batch["image"], batch["index"], 3)
    images = torch.cat([batch["image"], positives.images])
    with torch.no_grad():
        state = {k: v.clone() for k, v in mdr.student.state_dict().items()}
        (logits_s, features_s), (logits_t, features_t) = mdr.student(images), mdr.teacher(images)
        mdr.student.load_state_dict(state)
        z_s = [m(f.mean((2, 3))) for m, f in zip(mdr.student_modules, features_s["feats"][1:], strict=True)]
        z_t = [m(f.mean((2, 3))) for m, f in zip(mdr.teacher_modules, features_t["feats"][1:], strict=True)]
    _, losses = mdr(**batch, epoch=3)
    expected = {"loss_ce": F.cross_entropy(logits_s[:4], batch["target"])}
    expected["loss_kd"] = 2 * (kd_loss(logits_s[:4], logits_t[:4], 1) + kd_loss(logits_s[4:], logits_t[4:], 1))
    for name, matrix in (("loss_angle", angle_matrix), ("loss_length", length_matrix)):
        student, teacher = relations(matrix, z_s), relations(matrix, z_t)
        ranks = torch.stack([pair_ranks(m, ANCHOR_OF, descending=name == "loss_angle") for m in teacher])
        chosen = select_stages(ranks)
        if name == "loss_angle":
            expected[name] = torch.tensor(
                300 / M * loop_of_kl(student, teacher, chosen, 0.5, "anchor"), dtype=torch.float64
            )
        else:
            rows = torch.arange(M)
            expected[name] = (student[chosen[0], rows] - teacher[chosen[0], rows]).square().mean()
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss.detach(), expected[name], rtol=1e-10, atol=1e-10)


# For each key a value that must change the loss; beside it what the key needs to have an effect.
CHANGES = {
    "CE_WEIGHT": (0.5, {}),
    "KD_WEIGHT": (1.0, {}),
    "ANGLE_WEIGHT": (30.0, {}),
    "LENGTH_WEIGHT": (0.5, {}),
    "DISTANCE_WEIGHT": (300.0, {}),
    "KD_TEMPERATURE": (4.0, {}),
    "KD_TEMPERATURE_POSITIVE": (4.0, {}),
    "TEMPERATURE": (1.0, {}),
    "ANGLE_STAGES": (0, {}),
    "LENGTH_STAGES": (0, {}),
    "DISTANCE_STAGES": (1, {"DISTANCE_WEIGHT": 1.0}),
    "AUGMENT": ("rotation", {}),
    "MIXUP_ALPHA": (0.3, {}),
    "RELATION_DIM": ("positive", {}),
    "RANK_BY": ("student", {}),
    "RANK_DIM": ("positive", {}),
    "TIES": ("shallow", {}),
    "STAGE_REDUCTION": ("mean", {"ANGLE_STAGES": 2}),
    "REDUCTION": ("sum", {}),
    "SM_WIDTH": (32, {}),
    "SM_HIDDEN": (64, {}),
    "SM_TRAINING": ("none", {}),
}
IN_PREPARATION = {"SM_EPOCHS", "SM_LR", "SM_LR_DECAY_STAGES", "SM_LR_DECAY_RATE", "SM_MOMENTUM", "SM_WEIGHT_DECAY"}
IN_GRADIENT = {"MU_GRADIENT"}
BY_NETWORK = {"STAGES"}


def test_every_key_is_covered():
    assert set(CHANGES) | IN_PREPARATION | IN_GRADIENT | BY_NETWORK == set(config("MDR").MDR)


def with_keys(**values):
    return build("MDR", {f"MDR.{key}": value for key, value in values.items()})


@pytest.mark.parametrize("key", CHANGES)
def test_each_key_changes_the_loss(key):
    value, needed = CHANGES[key]
    batch = make_batch("MDR")
    before, after = total(with_keys(**needed), batch), total(with_keys(**needed, **{key: value}), batch)
    assert abs(before - after) > 1e-6 * abs(before)


def test_mu_gradient_changes_the_gradient_alone():
    losses, gradients = [], []
    for passing in (True, False):
        mdr = with_keys(MU_GRADIENT=passing, ANGLE_WEIGHT=0.0, KD_WEIGHT=0.0)
        loss = total(mdr, make_batch("MDR"))
        loss.backward()
        losses.append(loss.item())
        gradients.append(mdr.student_modules[0][0].weight.grad)
    assert losses[0] == losses[1]
    assert not torch.allclose(*gradients)


def test_stages_as_declared():
    """vgg has no map of a stem: all five maps are stages, or the first is skipped."""
    net = cifar_model_dict["vgg8"][0](num_classes=CLASSES)
    assert probe(net, 32, "skip_first").widths == [128, 256, 512, 512]
    assert probe(net, 32, "declared").widths == [64, 128, 256, 512, 512]
    for way, stages in (("skip_first", 4), ("declared", 5)):
        assert build_distiller(config("MDR", {"MDR.STAGES": way}), net, net).stages == stages


def test_probing_leaves_the_network_as_it_was():
    net = cifar_model_dict["resnet8"][0](num_classes=CLASSES).train()
    net.bn1.eval()
    before, generator = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    assert probe(net, SIZE, "skip_first").classes == CLASSES
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert net.training and not net.bn1.training
    assert torch.equal(generator, torch.get_rng_state())


def test_different_stage_counts_are_refused_by_name():
    student, teacher = (cifar_model_dict[name][0](num_classes=CLASSES) for name in ("resnet8", "vgg8"))
    cfg = config("MDR", {"DISTILLER.STUDENT": "resnet8", "DISTILLER.TEACHER": "vgg13"})
    with pytest.raises(InputError, match=r"student resnet8 has 3 .* teacher vgg13 4"):
        build_distiller(cfg, student, teacher)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("ANGLE_STAGES", 4, "from 0 \\(all\\) to 3"),
        ("LENGTH_STAGES", -1, "from 0"),
        ("TEMPERATURE", 0.0, "above 0"),
        ("KD_TEMPERATURE", -1.0, "above 0"),
        ("MIXUP_ALPHA", 0.0, "above 0"),
        ("SM_WIDTH", 0, "at least 1"),
        ("SM_EPOCHS", -1, "0 or more"),
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


def test_a_single_image():
    """Its own anchor is the only one: nothing to tell apart, and no number that isn't finite."""
    mdr = build("MDR")
    _, losses = mdr(**make_batch("MDR", images=1), epoch=1)
    sum(losses.values()).backward()
    assert losses["loss_angle"].item() == 0
    assert all(torch.isfinite(p.grad).all() for p in mdr.get_learnable_parameters() if p.grad is not None)


def test_monitors_are_shares():
    mdr = with_keys(ANGLE_STAGES=1, LENGTH_STAGES=2)
    mdr(**make_batch("MDR"), epoch=1)
    for name, expected in (("angle_share", 1), ("length_share", 2)):
        assert sum(mdr.monitors[f"{name}_{k}"] for k in (1, 2, 3)).item() == pytest.approx(expected)
    for name in ("smp_student", "smp_teacher"):
        assert all(0 <= mdr.monitors[f"{name}_{k}"] <= 1 for k in (1, 2, 3))


def test_relations_are_computed_in_full_precision_under_autocast():
    mdr = build("MDR")
    features = {"feats": [torch.randn(16, c, 2, 2).bfloat16() for c in (16, 16, 32, 64)]}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = embed(mdr.teacher_modules, pooled_stages(features, (1, 2, 3)))
    for k, (stage, module) in enumerate(zip(z, mdr.teacher_modules, strict=True), 1):
        assert stage.dtype == torch.float32
        assert torch.equal(stage, module(features["feats"][k].float().mean((2, 3))))


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


@pytest.mark.parametrize(
    ("key", "value"),
    [("SM_EPOCHS", 4), ("SM_LR", 0.1), ("SM_LR_DECAY_STAGES", [1]), ("SM_LR_DECAY_RATE", 0.5), ("SM_MOMENTUM", 0.0),
     ("SM_WEIGHT_DECAY", 0.1), ("SM_TRAINING", "contrastive"), ("AUGMENT", "rotation"), ("MIXUP_ALPHA", 0.2),
     ("SM_HIDDEN", 64), ("SM_WIDTH", 64)],
)  # fmt: skip
def test_each_key_of_the_first_phase_changes_its_result_and_its_file(key, value):
    common = {"SM_EPOCHS": 3, "SM_LR_DECAY_STAGES": [2]}
    one, other = with_keys(**common), with_keys(**{**common, key: value})
    prepare(one), prepare(other)
    a, b = one.teacher_modules[0][0].weight, other.teacher_modules[0][0].weight
    assert a.shape != b.shape or not torch.equal(a, b)
    assert one.preparation()[1] != other.preparation()[1]


@pytest.mark.parametrize("training", ["ce", "contrastive"])
def test_the_first_phase_depends_on_the_temperature_where_it_uses_it(training):
    before, after = (with_keys(SM_TRAINING=training, TEMPERATURE=t).preparation()[1] for t in (0.5, 1.0))
    assert (before != after) == (training == "contrastive")


def test_a_step_of_the_first_phase_written_out():
    """The loss of one epoch of one batch: sum over stages of the mean cross-entropy, at the initial weights."""
    mdr = with_keys(SM_EPOCHS=1)
    modules, classifiers = mdr._fresh_teacher_modules()
    batch = make_batch("MDR", images=4)
    positives = mdr.positives(batch["image"], batch["index"], 1)
    with torch.no_grad():
        _, features = mdr.teacher(torch.cat([batch["image"], positives.images]))
        expected = sum(
            mixed_cross_entropy(
                classifiers[k](modules[k](features["feats"][k + 1].mean((2, 3)))), batch["target"], positives
            )
            for k in range(3)
        )
    facts = mdr.prepare(lambda epoch: [batch], contextlib.nullcontext)
    assert facts["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_without_modules_there_is_nothing_to_prepare():
    mdr = with_keys(SM_TRAINING="none")
    assert prepare(mdr) == {}
    assert not mdr.teacher_modules.state_dict()
