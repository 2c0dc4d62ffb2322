"""PKT: its loss against ``oracles/pkt.py``, its invariances, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, embeddings
from method_cases import build, make_batch
from oracles import pkt as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.PKT import neighbour_probabilities, pkt_loss

EPS = 1e-7


# The formula


@pytest.mark.parametrize("images", [1, 2, 5])
def test_equals_the_formula(images):
    """Times 1000: a loss of 1e-4 would drown in the comparison's rounding."""
    assert_agree(
        lambda s, t: 1000 * pkt_loss(s, t), lambda s, t: 1000 * oracle.pkt_loss(s, t), *embeddings(images=images),
        wrt=(0, 1),
    )  # fmt: skip


def test_gradient():
    f_s, f_t = embeddings()
    assert torch.autograd.gradcheck(lambda x: pkt_loss(x, f_t), (f_s.requires_grad_(),))


# The formula: what it does not depend on, and where it is simple


def test_rows_are_distributions_in_which_opposites_never_meet():
    p = neighbour_probabilities(torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]))
    expected = torch.tensor([[2.0, 0.0, 1.0], [0.0, 2.0, 1.0], [1.0, 1.0, 2.0]]) / torch.tensor([[3.0], [3.0], [4.0]])
    torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_blind_to_order_scale_and_rotation():
    f_s, f_t = embeddings()
    expected, order = pkt_loss(f_s, f_t), torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(pkt_loss(f_s[order], f_t[order]), expected)
    torch.testing.assert_close(pkt_loss(30 * f_s, 7 * f_t), expected, rtol=1e-5, atol=0)  # but for the lengths' eps
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    torch.testing.assert_close(pkt_loss(f_s @ rotation, f_t), expected)
    assert expected > 0
    assert pkt_loss(f_s, f_s) == 0


# At the edges


@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_finite_for_equal_images(value):
    _, f_t = (x.float() for x in embeddings())
    assert_finite(lambda x: pkt_loss(x, f_t), torch.full((5, 4), value), largest=1.0)


def test_an_embedding_of_zeros_has_a_finite_gradient():
    """NaN in mdistiller, which ends the training."""
    f_s, f_t = (x.float() for x in embeddings())
    f_s[2] = 0
    assert_finite(lambda x: pkt_loss(x, f_t), f_s, largest=1.0)
    assert_finite(lambda x: pkt_loss(x, f_s), f_t, largest=1.0)
    as_in_mdistiller = f_s.clone().requires_grad_()
    (as_in_mdistiller / (as_in_mdistiller.square().sum(1, keepdim=True).sqrt() + EPS)).sum().backward()
    assert as_in_mdistiller.grad[2].isnan().all()


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(pkt_loss, embeddings())


# The method


def test_losses_are_the_parts():
    distiller, batch = build("PKT"), make_batch("PKT")
    logits, losses = distiller(**batch, epoch=1)
    pooled = [net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher)]
    torch.testing.assert_close(losses["loss_kd"], 30000 * pkt_loss(*pooled))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"), [({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})], ids=str
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("PKT", values) == changed
