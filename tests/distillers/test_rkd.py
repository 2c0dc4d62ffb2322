"""RKD: its loss against ``oracles/rkd.py``, its invariances, near and equal images, and what its keys do."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, embeddings
from method_cases import build, make_batch
from oracles import rkd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant

from mdistiller.distillers.RKD import angles, differences, relative_distances, rkd_loss
from mdistiller.registry import InputError

# The formula


def test_a_triangle():
    """3, 4, 5: the mean is 4; the cosines are 0, 3/5, 4/5, and 1 where two of the three are one image."""
    gap = differences(torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]))
    torch.testing.assert_close(
        relative_distances(gap), torch.tensor([[0.0, 3.0, 4.0], [3.0, 0.0, 5.0], [4.0, 5.0, 0.0]]) / 4
    )
    torch.testing.assert_close(angles(gap)[0], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]))
    torch.testing.assert_close(angles(gap)[1], torch.tensor([[1.0, 0.0, 0.6], [0.0, 0.0, 0.0], [0.6, 0.0, 1.0]]))


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0), (25.0, 50.0)], ids=str)
@pytest.mark.parametrize("images", [2, 5])
def test_equals_the_formula(images, weights, squared):
    f_s, f_t = embeddings(images=images)
    f_s[0] *= 5  # so that both branches of the Huber loss are met
    assert_agree(
        lambda s, t: rkd_loss(s, t, squared, 1e-12, *weights),
        lambda s, t: oracle.rkd_loss(s, constant(t), squared, *weights),
        f_s,
        f_t,
        wrt=(0, 1),
    )


@pytest.mark.parametrize("squared", [False, True])
def test_gradient(squared):
    f_s, f_t = embeddings(images=4)
    assert torch.autograd.gradcheck(lambda x: rkd_loss(x, f_t, squared), (f_s.requires_grad_(),))


# The formula: what it does not depend on, and where it is simple


def test_the_teacher_is_constant():
    f_s, f_t = (x.requires_grad_() for x in embeddings())
    rkd_loss(f_s, f_t).backward()
    assert f_t.grad is None and f_s.grad.any()


@pytest.mark.parametrize("squared", [False, True])
def test_blind_to_order_and_to_moving_turning_and_scaling(squared):
    f_s, f_t = embeddings()
    expected, order = rkd_loss(f_s, f_t, squared), torch.tensor([3, 0, 4, 1, 2])
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    for same in (
        rkd_loss(f_s[order], f_t[order], squared),
        rkd_loss(30 * f_s @ rotation + 3.0, 0.1 * f_t - 1.0, squared),
        rkd_loss(f_s.unsqueeze(2), f_t, squared),
    ):
        torch.testing.assert_close(same, expected)
    assert rkd_loss(f_s, f_s, squared) == 0


# At the edges


def as_in_mdistiller(embed, eps=1e-12):
    """Distances by |a|^2 + |b|^2 - 2ab."""
    squares = embed.square().sum(1)
    distance = (squares[:, None] + squares - 2 * embed @ embed.T).clamp(min=eps).sqrt()
    distance = distance * (1 - torch.eye(len(embed)))
    return distance / distance[distance > 0].mean()


def test_near_images_are_told_apart_in_float32():
    """Far from the origin and near each other, as the features of an untrained network are."""
    f_s, _ = embeddings(widths=(64, 64))
    f_s = 100 + 1e-3 * f_s
    exact = relative_distances(differences(f_s))
    rough = relative_distances(differences(f_s.float()))
    torch.testing.assert_close(rough.double(), exact, rtol=0.01, atol=0)
    assert (as_in_mdistiller(f_s.float()) - exact).abs().max() > 0.5


@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_finite_where_all_images_are_equal(value, squared):
    _, f_t = (x.float() for x in embeddings())
    assert_finite(lambda x: rkd_loss(x, f_t, squared), torch.full((5, 4), value), largest=100.0)
    assert_finite(lambda x: rkd_loss(x, torch.full((5, 4), value), squared), f_t, largest=100.0)


def test_two_equal_images_do_not_blow_up_the_gradient():
    """In mdistiller the direction from one to the other, which does not exist, has a gradient of 10^11."""
    f_s, f_t = (x.float() for x in embeddings())
    f_s[3] = f_s[1]
    assert_finite(lambda x: rkd_loss(x, f_t), f_s, largest=100.0)
    f_s.requires_grad_()
    direction = F.normalize(differences(f_s), dim=2)
    with torch.no_grad():
        target = angles(differences(f_t))
    F.smooth_l1_loss(direction @ direction.mT, target).backward()
    assert f_s.grad.abs().max() > 1e6


def test_one_image_has_no_relations():
    """NaN in mdistiller: the mean of no distance."""
    f_s, f_t = embeddings(images=1)
    assert_finite(lambda x: rkd_loss(x, f_t), f_s, largest=0.0)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(rkd_loss, embeddings())


def test_wrong_configurations():
    with pytest.raises(InputError, match=r"RKD\.PDIST\.EPSILON must be above 0, got 0"):
        build("RKD", {"RKD.PDIST.EPSILON": 0.0})


# The method


def test_losses_are_the_parts():
    distiller, batch = build("RKD"), make_batch("RKD")
    logits, losses = distiller(**batch, epoch=1)
    pooled = [net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher)]
    torch.testing.assert_close(losses["loss_kd"], rkd_loss(*pooled, False, 1e-12, 25, 50))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"DISTANCE_WEIGHT": 1.0}, {"loss_kd"}),
        ({"ANGLE_WEIGHT": 1.0}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"}),
        ({"PDIST.SQUARED": True}, {"loss_kd"}),
        ({"PDIST.EPSILON": 10.0}, {"loss_kd"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("RKD", values) == changed
