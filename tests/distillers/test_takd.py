"""TAKD: its loss against ``oracles/takd.py`` and the reference's values; it is KD from another teacher."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, make_batch
from oracles import takd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.TAKD import takd_loss


def logits(images=4, classes=5):
    return [*torch.randn(2, images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("mean_over", ["batch", "elements"])
def test_equals_the_formula(mean_over):
    student, teacher = logits()
    assert_agree(
        lambda s: takd_loss(s, teacher.to(s.dtype), 4.0, mean_over),
        lambda s: oracle.takd_loss(s, teacher.tolist(), 4.0, mean_over == "elements"),
        student,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("takd"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    kd = takd_loss(given["logits_student"], given["logits_teacher"], options["T"], "elements")
    ce = F.cross_entropy(given["logits_student"], given["target"])
    share = options["lambda_student"]
    assert_golden(case, given, (1 - share) * ce + share * kd)


def test_it_is_kd_from_the_assistant():
    batch = make_batch("TAKD")
    _, expected = build("KD")(**batch, epoch=1)
    for values, divisor in (({}, 1), ({"TAKD.MEAN_OVER": "elements"}, 10)):
        _, found = build("TAKD", values)(**batch, epoch=1)
        torch.testing.assert_close(found["loss_ce"], expected["loss_ce"])
        torch.testing.assert_close(found["loss_kd"], expected["loss_kd"] / divisor)


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"TEMPERATURE": 1.0}, {"loss_kd"}),
        ({"LOSS.KD_WEIGHT": 0.5}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 1.0}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("TAKD", values) == changed
