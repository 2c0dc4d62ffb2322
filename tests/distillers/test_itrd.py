"""ITRD: its losses against ``oracles/itrd.py`` and the references' values, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, changed_by, embeddings
from golden_data import assert_golden, case_leaves, load_case, loss_cases
from method_cases import build, make_batch
from oracles import itrd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.ITRD import correlation_loss, mutual_loss, standardised


@pytest.mark.parametrize(("images", "alpha"), [(2, 1.5), (5, 1.01), (4, 2.0)])
def test_equals_the_formula(images, alpha):
    z_s, z_t = embeddings((4, 4), images)
    assert_agree(
        lambda s: (correlation_loss(s, z_t.to(s.dtype), alpha), mutual_loss(s, z_t.to(s.dtype))),
        lambda s: (oracle.correlation_loss(s, z_t.tolist(), alpha), oracle.mutual_loss(s, z_t.tolist())),
        z_s,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("itrd"))
def test_golden_values_and_gradients(case, dtype):
    """Of the code of DCD's authors, which forgets the weights; of TTM's repository; of the authors' own."""
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    pooled, z_t = given["pooled_s"], given["pooled_t"]
    embedded = load_case(nn.Linear(pooled.shape[1], z_t.shape[1]), given, "param.embed.linear.")(pooled)
    corr = correlation_loss(embedded, z_t, options["alpha_it"])
    mutual = mutual_loss(pooled if pooled.shape == z_t.shape else embedded, z_t)
    if "giakoumoglou" in case["source"]:
        options = {"lambda_corr": 1.0, "lambda_mutual": 1.0}
    for name, found in {"corr": corr, "mutual": mutual}.items():
        if name in case["outputs"]:
            assert found.item() == pytest.approx(case["outputs"][name], rel=1e-7 if dtype == torch.float64 else 1e-4)
    assert_golden(case, given, options["lambda_corr"] * corr + options["lambda_mutual"] * mutual)


def test_standardised_entries():
    (z,) = embeddings((4,))
    torch.testing.assert_close(standardised(z), (z - z.mean(0)) / z.std(0))


def test_blind_to_order_and_scale():
    z_s, z_t = embeddings((4, 4))
    order = torch.tensor([3, 0, 4, 1, 2])
    for loss in (correlation_loss, mutual_loss):
        expected = loss(z_s, z_t)
        torch.testing.assert_close(loss(z_s[order], z_t[order]), expected)
        torch.testing.assert_close(loss(3 * z_s, 0.1 * z_t), expected)
    torch.testing.assert_close(correlation_loss(z_s + 5, z_t - 1), correlation_loss(z_s, z_t))
    # Equal features: every correlation is (B - 1) / B.
    assert correlation_loss(z_t, z_t).exp2().item() == pytest.approx(4 * (1 / 5) ** 3)
    assert mutual_loss(z_s, torch.ones_like(z_t)).item() == pytest.approx(0, abs=1e-12)


def test_an_entry_that_is_constant_correlates_with_nothing():
    """A dead unit of the teacher: the authors' code divides by zero."""
    z_s, z_t = (z.float() for z in embeddings((4, 4)))
    z_t[:, 1] = 0
    assert_finite(lambda z: correlation_loss(z, z_t), z_s, largest=10.0)
    assert_finite(lambda z: correlation_loss(z, z_t), torch.zeros(5, 4), largest=100.0)
    assert_finite(lambda z: mutual_loss(z, torch.zeros(5, 4)), z_s, largest=10.0)


def test_losses_are_the_parts():
    distiller, batch = build("ITRD"), make_batch("ITRD")
    logits, losses = distiller(**batch, epoch=1)
    z_s, z_t = (net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher))
    expected = 2 * correlation_loss(distiller.embed(z_s), z_t) + 0.05 * mutual_loss(z_s, z_t)
    torch.testing.assert_close(losses["loss_kd"], expected)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"ALPHA": 1.01}, {"loss_kd"}),
        ({"CORR_WEIGHT": 1.0}, {"loss_kd"}),
        ({"MUTUAL_WEIGHT": 1.0}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("ITRD", values) == changed
