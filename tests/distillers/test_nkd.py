"""NKD: its loss against ``oracles/nkd.py`` and the authors' values, its minimum, and its edges."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_float32_under_autocast, changed_by
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, make_batch
from oracles import nkd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.NKD import nkd_loss

TARGET = torch.tensor([0, 2, 1, 4])


def logits(classes=5):
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(4, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(("gamma", "temperature"), [(1.5, 1.0), (3.5, 3.0), (0.0, 2.0)])
def test_equals_the_formula(gamma, temperature, whole):
    assert_agree(
        lambda s, t: nkd_loss(s, t, TARGET, gamma, temperature, whole),
        lambda s, t: oracle.nkd_loss(s, t, TARGET.tolist(), gamma, temperature, whole),
        *logits(), wrt=(0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("nkd"))
def test_golden_losses_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    loss = nkd_loss(
        given["logits_student"], given["logits_teacher"], given["target"], options["gamma"], options["temp"],
        target_among_others="SDD" in case["source"],
    )  # fmt: skip
    assert_golden(case, given, loss)


def test_parts():
    """A teacher that is sure of the label leaves the cross-entropy; the others' part has its minimum at q_t."""
    student, teacher = logits()
    sure = 100.0 * F.one_hot(TARGET, 5)
    torch.testing.assert_close(nkd_loss(student, sure, TARGET, 0.0, 1.0), F.cross_entropy(student, TARGET))
    same = teacher.clone().requires_grad_()
    (nkd_loss(same, teacher, TARGET, 1.0, 2.0) - nkd_loss(same, teacher, TARGET, 0.0, 2.0)).backward()
    assert same.grad.abs().max() < 1e-12
    two = [z[:, :2] for z in logits()]
    assert nkd_loss(*two, TARGET % 2, 9.0, 1.0) == nkd_loss(*two, TARGET % 2, 0.0, 1.0)  # no other classes to compare


def test_each_image_and_half_precision():
    each = nkd_loss(*logits(), TARGET, 1.5, 1.0, reduce=False)
    assert each.shape == (4,)
    torch.testing.assert_close(each.mean(), nkd_loss(*logits(), TARGET, 1.5, 1.0))
    assert_float32_under_autocast(lambda s, t: nkd_loss(s, t, TARGET, 1.5, 1.0), logits())


@pytest.mark.parametrize("values", [{"GAMMA": 3.5}, {"T": 3.0}, {"LOSS.KD_WEIGHT": 2.0}], ids=str)
def test_keys_change_what_they_name(values):
    assert changed_by("NKD", values) == {"loss_kd"}


def test_losses_are_the_parts():
    distiller, batch = build("NKD"), make_batch("NKD")
    student, losses = distiller(**batch, epoch=1)
    teacher = distiller.teacher(batch["image"])[0]
    torch.testing.assert_close(losses["loss_kd"], nkd_loss(student, teacher, batch["target"], 1.5, 1.0))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(student, batch["target"]))
