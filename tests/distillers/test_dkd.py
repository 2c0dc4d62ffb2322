"""DKD: its loss against ``oracles/dkd.py`` and the references' values, where those overflow, and its settings."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import CLASSES, build, make_batch
from oracles import dkd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.DKD import dkd_loss, nckd_loss, tckd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.registry import InputError

# The formula


def logits(rows=5, classes=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    given = [scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)]
    return *given, torch.randint(classes, (rows,), generator=generator)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_equals_the_formula(rows, classes):
    student, teacher, target = logits(rows, classes)
    assert_agree(
        lambda s, t: dkd_loss(s, t, target, 1.5, 3.0, 4.0),
        lambda s, t: oracle.dkd_loss(s, t, target.tolist(), 1.5, 3.0, 4.0),
        student,
        teacher,
        wrt=(0, 1),
    )


def test_gradient():
    student, teacher, target = logits(3, 4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: dkd_loss(z, teacher, target, 1.0, 8.0, 2.0), (student,))


@pytest.mark.parametrize("case", loss_cases("dkd"))
def test_golden_values_and_gradients(case):
    given, options = case_tensors(case, "in"), case["hyperparameters"]
    student, teacher, target = (given[name] for name in ("logits_student", "logits_teacher", "target"))
    student.requires_grad_()
    if "CE_WEIGHT" in options:
        weights = (options["ALPHA"], options["BETA"], options["T"])
        rise = min(options["epoch"] / options["WARMUP"], 1.0)
        hard = options["CE_WEIGHT"] * F.cross_entropy(student, target)
        loss = hard + rise * dkd_loss(student, teacher, target, *weights)
    else:
        loss = dkd_loss(student, teacher, target, options["alpha"], options["beta"], options["temperature"])
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7)
    assert_golden_gradients(case, given)


@pytest.mark.parametrize("case", loss_cases("dkd"))
def test_golden_values_in_float32_where_the_reference_is_infinite_too(case):
    given, options = case_tensors(case, "in", torch.float32), case["hyperparameters"]
    if "alpha" not in options:
        return
    student = given["logits_student"].requires_grad_()
    weights = (options["alpha"], options["beta"], options["temperature"])
    found = dkd_loss(student, given["logits_teacher"], given["target"], *weights)
    found.backward()
    assert found.item() == pytest.approx(case["outputs"]["loss"], rel=1e-4)
    assert_golden_gradients(case, given, rel=1e-4)


# The formula: what it does not depend on, and where it is simple


def test_kd_is_the_two_terms_weighted_by_the_teachers_doubt():
    """Eq. 6, one image at a time."""
    for student, teacher, target in zip(*logits(), strict=True):
        student, teacher, target = student[None], teacher[None], target[None]
        doubt = 1 - teacher.softmax(1)[0, target].item()
        both = tckd_loss(student, teacher, target) + doubt * nckd_loss(student, teacher, target)
        torch.testing.assert_close(both, kd_loss(student, teacher, 1.0))


def test_zero_for_equal_logits_blind_to_a_shift_and_to_the_order_of_classes():
    student, teacher, target = logits()
    assert dkd_loss(student, student, target, 1.0, 8.0, 4.0).item() == pytest.approx(0.0, abs=1e-12)
    expected, order = dkd_loss(student, teacher, target, 1.0, 8.0, 4.0), torch.randperm(7)
    torch.testing.assert_close(dkd_loss(student + 9.0, teacher, target, 1.0, 8.0, 4.0), expected)
    moved = order.argsort()[target]
    torch.testing.assert_close(dkd_loss(student[:, order], teacher[:, order], moved, 1.0, 8.0, 4.0), expected)


def test_a_logit_above_1000_stays_out_of_the_others():
    student, teacher, target = logits()
    high = teacher.scatter(1, target[:, None], 5e3)
    torch.testing.assert_close(nckd_loss(student, high, target), nckd_loss(student, teacher, target))


def test_with_two_classes_the_others_say_nothing():
    student, teacher, target = logits(classes=2)
    student.requires_grad_()
    loss = nckd_loss(student, teacher, target)
    loss.backward()
    assert loss.item() == 0 and not student.grad.any()


# At the edges


@pytest.mark.parametrize("size", [200.0, 1e4])
def test_saturated_logits_do_not_overflow(size):
    """The reference takes the logarithm of a probability that is 0 in float32: loss infinite, gradient not a number.
    And it hides the target by subtracting 1000, behind which a logit of 1e4 does not disappear."""
    student = torch.tensor([[size, 0.0, 1.0], [0.0, size, -size]], requires_grad=True)
    teacher = torch.tensor([[0.0, size, 2.0], [size, 0.0, 0.0]])
    target = torch.tensor([0, 1])
    loss = dkd_loss(student, teacher, target, 1.0, 8.0, 1.0)
    loss.backward()
    exact = dkd_loss(student.detach().double(), teacher.double(), target, 1.0, 8.0, 1.0)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6) and 0 < loss.item() < 1e6
    assert torch.isfinite(student.grad).all() and student.grad.any()


def test_constant_logits():
    student, teacher, target = torch.zeros(2, 5, requires_grad=True), torch.full((2, 5), 3.0), torch.tensor([1, 4])
    loss = dkd_loss(student, teacher, target, 1.0, 8.0, 4.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher, target = logits()
    student, teacher = student.to(dtype), teacher.to(dtype)
    found = dkd_loss(student, teacher, target, 1.0, 8.0, 4.0)
    assert torch.equal(found, dkd_loss(student.float(), teacher.float(), target, 1.0, 8.0, 4.0))


@pytest.mark.parametrize(("values", "message"), [({"DKD.T": 0.0}, r"DKD\.T"), ({"DKD.WARMUP": -1}, r"DKD\.WARMUP")])
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("DKD", values)


# The method


def test_under_smoothed_labels_only_the_cross_entropy_changes():
    batch, values = make_batch("DKD"), {"DKD.WARMUP": 0}
    smoothed = 0.9 * F.one_hot(batch["target"], CLASSES).float() + 0.1 / CLASSES
    logits, hard = build("DKD", values)(**batch, epoch=1)
    _, soft = build("DKD", values)(**{**batch, "target": smoothed}, epoch=1)
    assert torch.equal(soft["loss_kd"], hard["loss_kd"])
    expected = F.cross_entropy(logits, batch["target"], label_smoothing=0.1)
    torch.testing.assert_close(soft["loss_ce"], expected)
    assert abs(soft["loss_ce"] - hard["loss_ce"]) > 1e-3


def test_the_weight_rises_over_the_warmup():
    batch = make_batch("DKD")
    losses = {epoch: build("DKD")(**batch, epoch=epoch)[1] for epoch in (1, 10, 20, 21)}
    whole = build("DKD", {"DKD.WARMUP": 0})(**batch, epoch=1)[1]["loss_kd"]
    for epoch, share in ((1, 0.05), (10, 0.5), (20, 1.0), (21, 1.0)):
        torch.testing.assert_close(losses[epoch]["loss_kd"], share * whole)
        torch.testing.assert_close(losses[epoch]["loss_ce"], losses[1]["loss_ce"])
