"""TTM and WTTM: their losses against ``oracles/ttm.py`` and the authors' values, and where they are KD."""

import math

import pytest
import torch
from feature_maps import assert_float32_under_autocast, changed_by
from golden_data import assert_golden, case_leaves, loss_cases
from oracles import ttm as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.TTM import ttm_loss, wttm_loss

LOSSES = {"ttm": ttm_loss, "wttm": wttm_loss}
each_loss = pytest.mark.parametrize("name", LOSSES)


def logits(classes=5):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


@each_loss
@pytest.mark.parametrize("power", [0.1, 0.5, 1.0])
def test_equals_the_formula(name, power):
    plain = getattr(oracle, f"{name}_loss")
    assert_agree(lambda s, t: LOSSES[name](s, t, power), lambda s, t: plain(s, t, power), *logits(), wrt=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("ttm", "wttm"))
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    loss = LOSSES[case["method"]](given["logits_student"], given["logits_teacher"], case["hyperparameters"]["l"])
    assert_golden(case, given, loss)


@each_loss
def test_power_1_is_kd_at_temperature_1(name):
    student, teacher = logits()
    torch.testing.assert_close(LOSSES[name](student, teacher, 1.0), kd_loss(student, teacher, 1.0))
    assert LOSSES[name](teacher, teacher, 1.0).abs() < 1e-12
    assert_float32_under_autocast(lambda s, t: LOSSES[name](s, t, 0.3), [student, teacher])


def test_the_weight_of_an_image_is_what_the_teacher_does_not_know():
    student, teacher = logits()
    for given, weight in ((0 * teacher, math.sqrt(5)), (torch.eye(5)[:4].double() * 1e4, 1.0)):
        torch.testing.assert_close(wttm_loss(student, given, 0.5), weight * ttm_loss(student, given, 0.5))


@pytest.mark.parametrize("method", ["TTM", "WTTM"])
def test_keys_change_what_they_name(method):
    assert changed_by(method, {"POWER": 0.7}) == changed_by(method, {"LOSS.KD_WEIGHT": 2.0}) == {"loss_kd"}
