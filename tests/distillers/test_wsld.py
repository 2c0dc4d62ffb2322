"""WSLD: its loss against ``oracles/wsld.py`` and the references' values, its weights, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by
from golden_data import assert_golden, case_leaves, loss_cases
from oracles import wsld as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.WSLD import weights_of_images, wsld_loss

TARGET = torch.tensor([0, 2, 1, 4])


def logits(classes=5):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_equals_the_formula(temperature):
    assert_agree(
        lambda s, t: wsld_loss(s, t, TARGET, temperature),
        lambda s, t: oracle.wsld_loss(s, t, TARGET.tolist(), temperature),
        *logits(), wrt=(0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("wsld"))
def test_golden_losses_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    student, teacher, target = given["logits_student"], given["logits_teacher"], given["target"]
    loss = options["alpha"] * wsld_loss(student, teacher, target, options.get("T") or options["temp"])
    if "giakoumoglou" in case["source"]:
        loss = loss + F.cross_entropy(student, target)
    assert_golden(case, given, loss)


def test_weights():
    """0 for a perfect student, 1 - 1/e where both are equal, 1 for a perfect teacher."""
    student, teacher = logits()
    perfect = 1e4 * F.one_hot(TARGET, 5).double()
    for s, t, expected in ((perfect, teacher, 0.0), (teacher, teacher, 0.6321205588), (student, perfect, 1.0)):
        torch.testing.assert_close(
            weights_of_images(s, t, TARGET), torch.full((4,), expected, dtype=torch.float64), rtol=1e-5, atol=1e-6
        )


def test_with_a_perfect_teacher_it_has_the_gradient_of_kd():
    student, teacher = logits()
    teacher = teacher + 1e3 * F.one_hot(TARGET, 5)
    gradients = []
    for loss in (wsld_loss(student.requires_grad_(), teacher, TARGET, 4.0), kd_loss(student, teacher, 4.0)):
        gradients.append(torch.autograd.grad(loss, student)[0])
    torch.testing.assert_close(*gradients)


def test_edges():
    student, teacher = (z.float() for z in logits())
    for scale in (0.0, 1e4):
        assert_finite(lambda z: wsld_loss(z, 1e4 * teacher, TARGET, 4.0), scale * student, largest=100.0)
    assert_float32_under_autocast(lambda s, t: wsld_loss(s, t, TARGET, 4.0), logits())


@pytest.mark.parametrize("values", [{"T": 2.0}, {"LOSS.KD_WEIGHT": 2.0}], ids=str)
def test_keys_change_what_they_name(values):
    assert changed_by("WSLD", values) == {"loss_kd"}
