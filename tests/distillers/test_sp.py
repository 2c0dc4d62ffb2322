"""SP: its loss against ``oracles/sp.py``, its invariances, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from method_cases import build, make_batch
from oracles import sp as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.SP import similarity_loss, similarity_matrix, sp_loss

# The formula


@pytest.mark.parametrize("images", [1, 2, 5])
def test_equals_the_formula(images):
    assert_agree(similarity_loss, oracle.sp_loss, *maps(images=images, side=2), wrt=(0, 1))


def test_gradient():
    f_s, f_t = maps(side=2, images=3)
    assert torch.autograd.gradcheck(lambda x: sp_loss([x], [f_t]), (f_s.requires_grad_(),))


# The formula: what it does not depend on, and where it is simple


def test_blind_to_order_scale_rotation_and_shape():
    f_s, f_t = maps(images=5)
    expected, order = sp_loss([f_s], [f_t]), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(sp_loss([f_s[order]], [f_t[order]]), expected)
    torch.testing.assert_close(sp_loss([-30 * f_s], [0.01 * f_t]), expected)
    rotation = torch.linalg.qr(torch.randn(48, 48, dtype=torch.float64))[0]
    torch.testing.assert_close(sp_loss([f_s.flatten(1) @ rotation], [f_t.flip(2, 3)]), expected)
    assert sp_loss([f_s], [f_s]) == 0
    assert sp_loss([f_s], [f_t[order]]) != expected


def test_similarity_of_images_without_anything_in_common_is_the_identity():
    assert torch.equal(similarity_matrix(torch.eye(3)[:, :, None, None]), torch.eye(3))


def test_layers_are_summed_and_must_be_equally_many():
    f_s, f_t = maps()
    torch.testing.assert_close(sp_loss([f_s, f_s], [f_t, f_t]), 2 * sp_loss([f_s], [f_t]))
    with pytest.raises(ValueError, match="longer"):
        sp_loss([f_s], [f_t, f_t])


# At the edges


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_finite_for_equal_images(value):
    _, f_t = (x.float() for x in maps(images=4))
    assert_finite(lambda x: sp_loss([x], [f_t]), torch.full((4, 3, 4, 4), value), largest=1.0)


def test_an_image_of_zeros_does_not_blow_up_the_gradient():
    """In mdistiller it has a gradient of 10^10."""
    f_s, f_t = (x.float() for x in maps(images=4))
    f_s[2] = 0
    assert_finite(lambda x: sp_loss([x], [f_t]), f_s, largest=10.0)
    assert_finite(lambda x: sp_loss([x], [f_s]), f_t, largest=10.0)

    def as_in_mdistiller(x):
        gram = [F.normalize(y.flatten(1) @ y.flatten(1).T) for y in (x, f_t)]
        return (gram[0] - gram[1]).square().mean()

    torch.testing.assert_close(as_in_mdistiller(f_s), sp_loss([f_s], [f_t]))
    with pytest.raises(AssertionError):
        assert_finite(as_in_mdistiller, f_s, largest=1e9)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(lambda f_s, f_t: sp_loss([f_s], [f_t]), maps(images=5))


# The method


def test_losses_are_the_parts():
    distiller, batch = build("SP"), make_batch("SP")
    logits, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], 3000 * sp_loss(feats_s[-1:], feats_t[-1:]))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"), [({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})], ids=str
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("SP", values) == changed
