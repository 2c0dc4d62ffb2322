"""CC: its loss against ``oracles/cc.py`` and RepDistiller's values, what it depends on, and its edges."""

import pytest
import torch
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, embeddings
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, make_batch
from oracles import cc as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.CC import cc_loss


@pytest.mark.parametrize("images", [1, 2, 5])
def test_equals_the_formula(images):
    assert_agree(cc_loss, oracle.cc_loss, *embeddings((4, 4), images=images), wrt=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("cc"))
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    assert_golden(case, given, cc_loss(given["pooled_s"], given["pooled_t"]))


def test_zero_for_equal_embeddings_and_blind_to_signs_and_reversal():
    s, t = embeddings((4, 4))
    expected = cc_loss(s, t)
    assert cc_loss(s, s) == 0 and expected > 0
    torch.testing.assert_close(cc_loss(-s, -t), expected)
    torch.testing.assert_close(cc_loss(s.flip(0), t.flip(0)), expected)
    assert not torch.isclose(cc_loss(s[[1, 4, 0, 2, 3]], t[[1, 4, 0, 2, 3]]), expected)  # it compares neighbours


def test_half_precision_and_equal_embeddings_are_fine():
    assert_float32_under_autocast(cc_loss, embeddings((4, 4)))
    t = embeddings((4, 4))[1].float()
    assert_finite(lambda x: cc_loss(x, t), t, largest=1e-6)


def test_losses_are_the_parts():
    distiller, batch = build("CC"), make_batch("CC")
    _, losses = distiller(**batch, epoch=1)
    pooled = [net(batch["image"])[1]["pooled_feat"] for net in (distiller.student, distiller.teacher)]
    expected = 0.02 * cc_loss(distiller.embed_s(pooled[0]), distiller.embed_t(pooled[1]))
    torch.testing.assert_close(losses["loss_kd"], expected)
    assert distiller.embed_s.out_features == 128


@pytest.mark.parametrize("values", [{"DIM": 16}, {"LOSS.FEAT_WEIGHT": 2.0}], ids=str)
def test_keys_change_what_they_name(values):
    assert changed_by("CC", values) == {"loss_kd"}
