"""KDSVD: its loss against ``oracles/kdsvd.py``, where its gradient is sound and torch's is not, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from method_cases import build, config, make_batch
from oracles import kdsvd as oracle
from torch import nn

from mdistiller.distillers.KDSVD import aligned, directions, kdsvd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

# The formula


def stages(count=3, images=2, seed=0):
    """Maps of several stages, of student and teacher."""
    given = [maps(channels=(2 + i, 3 + i), side=5 if i < 2 else 4, images=images, seed=seed + i) for i in range(count)]
    return [list(side) for side in zip(*given, strict=True)]


@pytest.mark.parametrize("k", [1, 2, 4])
def test_equals_the_formula(k):
    g_s, g_t = stages()
    assert kdsvd_loss(g_s, g_t, k).item() == pytest.approx(oracle.kdsvd_loss(g_s, g_t, k), rel=1e-9)


@pytest.mark.parametrize("k", [1, 3])
def test_directions_are_torchs_right_singular_vectors(k):
    feat, _ = maps(channels=(4, 4), side=6)
    vectors, share = directions(feat, k)
    _, values, expected = torch.linalg.svd(feat.flatten(1, 2), full_matrices=False)
    expected = expected[:, :k].mT
    torch.testing.assert_close(vectors, expected * expected.sum(1, keepdim=True).sign())
    torch.testing.assert_close(share, F.normalize(values[:, :k]))
    assert (vectors.sum(1) > 0).all()


@pytest.mark.parametrize("k", [1, 2])
def test_gradient(k):
    (f_s, g_s), (f_t, g_t) = stages(2, images=1)
    given = f_s.requires_grad_(), g_s.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: kdsvd_loss(x, [f_t, g_t], k), given)


def test_gradient_is_that_of_torchs_decomposition():
    feat, _ = maps(channels=(4, 4), side=6)
    weight = torch.randn(2, 6, 2, dtype=torch.float64)
    ours, theirs = feat.clone().requires_grad_(), feat.clone().requires_grad_()
    (directions(ours, 2)[0] * weight).sum().backward()
    right = torch.linalg.svd(theirs.flatten(1, 2), full_matrices=False)[2][:, :2].mT
    (right * right.detach().sum(1, keepdim=True).sign() * weight).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


# The formula: what it does not depend on, and where it is simple


def test_the_teacher_is_constant():
    g_s, g_t = stages()
    for x in (*g_s, *g_t):
        x.requires_grad_()
    kdsvd_loss(g_s, g_t, 1).backward()
    assert all(x.grad is None for x in g_t) and all(x.grad.any() for x in g_s)


def test_blind_to_order_and_to_what_turns_the_rows():
    g_s, g_t = stages(images=3)
    expected, order = kdsvd_loss(g_s, g_t, 2), torch.tensor([2, 0, 1])
    torch.testing.assert_close(kdsvd_loss([x[order] for x in g_s], [x[order] for x in g_t], 2), expected)
    turned = [[-3 * x.flip(1, 2) for x in side] for side in (g_s, g_t)]  # channels, rows of the image, sign and scale
    torch.testing.assert_close(kdsvd_loss(*turned, 2), expected)
    assert kdsvd_loss(g_s, g_s, 2).item() == pytest.approx(0, abs=1e-20)


def test_the_sign_that_a_decomposition_returns_does_not_matter():
    """In mdistiller the loss is another where the signs of one stage's vectors are turned, as other libraries do."""
    (f, g), _ = stages(2)
    (v_f, _), (v_g, _) = directions(f, 1), directions(g, 1)
    relation = [torch.exp(-(v_g[:, :, None] - sign * v_f[:, None]).square() / 8) for sign in (1, -1)]
    assert not torch.allclose(*relation)
    for sign in (1, -1):  # whatever sign a map has, its directions' is ours
        torch.testing.assert_close(directions(sign * f, 1)[0], v_f)


def test_alignment_finds_order_and_sign():
    v_t = torch.linalg.qr(torch.randn(2, 5, 5))[0]
    shuffled = v_t[:, :, [3, 1, 0, 2]] * torch.tensor([1.0, -1.0, -1.0, 1.0])
    torch.testing.assert_close(aligned(shuffled, v_t[:, :, :3]), v_t[:, :, :3])


def test_maps_of_different_width_are_pooled():
    """mdistiller fails at the shapes."""
    g_s, g_t = stages(2)
    wide = [x.repeat_interleave(2, 2).repeat_interleave(2, 3) for x in g_t]
    torch.testing.assert_close(kdsvd_loss(g_s, wide, 1), kdsvd_loss(g_s, g_t, 1))
    torch.testing.assert_close(kdsvd_loss(wide, g_s, 1), kdsvd_loss(g_t, g_s, 1))


# At the edges


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
@pytest.mark.parametrize("k", [1, 2])
def test_finite_for_maps_of_one_value(k, value):
    _, g_t = stages(2)
    g_t = [x.float() for x in g_t]
    other = g_t[1].clone()
    feat, same = torch.full((2, 3, 4, 4), value), torch.ones(2, 3, 4, 4)
    assert_finite(lambda x: kdsvd_loss([x, other], g_t, k), feat, largest=1e6)
    assert_finite(lambda x: kdsvd_loss([x, x], [same, same], k), feat, largest=1e6)


@pytest.mark.parametrize("feat", [torch.zeros(1, 2, 4, 4), torch.eye(4)[None, None]], ids=["zeros", "identity"])
def test_equal_singular_values_where_torchs_gradient_is_not_finite(feat):
    """mdistiller takes that gradient."""
    _, g_t = stages(2, images=1)
    g_t = [x.float() for x in g_t]
    assert_finite(lambda x: kdsvd_loss([x, g_t[1].clone()], g_t, 1), feat, largest=10.0)
    feat = feat.clone().requires_grad_()
    right = torch.linalg.svd(feat.flatten(1, 2), full_matrices=False)[2]
    (right[:, 0] * torch.arange(4)).sum().backward()
    assert not torch.isfinite(feat.grad).all()


def test_two_equal_singular_values():
    feat = torch.zeros(1, 1, 4, 4)
    feat[0, 0] = torch.diag(torch.tensor([3.0, 3.0, 1.0, 0.5]))
    g_s, g_t = stages(2, images=1)
    assert_finite(lambda x: kdsvd_loss([x, g_s[1].float()], [x.float() for x in g_t], 2), feat, largest=10.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_map_that_is_not_finite_gives_nan_not_an_exception(value):
    """The trainer then says which step and which loss it was."""
    g_s, g_t = stages(2)
    g_s[0][0, 0, 0, 0] = value
    assert kdsvd_loss(g_s, g_t, 1).isnan()


def test_half_precision_is_computed_in_float32():
    g_s, g_t = stages(2)
    assert_float32_under_autocast(lambda a, b, c, d: kdsvd_loss([a, b], [c, d], 1), [*g_s, *g_t])


def test_more_directions_than_columns_are_refused():
    with pytest.raises(InputError, match=r"KDSVD\.K must be at most 4, the width of the smallest map, got 5"):
        kdsvd_loss(*stages(), 5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"KDSVD.K": 0}, r"KDSVD\.K must be at least 1"),
        ({"KDSVD.STAGES": "x"}, r"KDSVD\.STAGES: no choice named 'x'"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("KDSVD", values)


class OneStage(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return x.mean((2, 3)), {"feats": [x, self.conv(x)]}


def test_networks_of_one_stage_are_refused():
    with pytest.raises(InputError, match="the student OneStage and the teacher OneStage have 1 in common"):
        build_distiller(config("KDSVD"), OneStage(), OneStage())


# The method


def test_losses_are_the_parts():
    distiller, batch = build("KDSVD"), make_batch("KDSVD")
    logits, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], kdsvd_loss(feats_s[1:], feats_t[1:], 1))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [({"K": 2}, {"loss_kd"}), ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("KDSVD", values) == changed


def test_networks_whose_maps_have_different_sizes():
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("ShuffleV1", "resnet8"))
    distiller = build_distiller(config("KDSVD"), student, teacher).train()
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    losses["loss_kd"].backward()
    assert torch.isfinite(losses["loss_kd"]) and torch.isfinite(student.conv1.weight.grad).all()
