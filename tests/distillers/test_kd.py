"""KD: its loss against ``oracles/kd.py`` and the references' values, and what it must be at the ends."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import build, make_batch
from oracles import kd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss

# The formula


def logits(rows=5, classes=7, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [scale * torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(2)]


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 20.0])
def test_equals_the_formula(temperature, standardise):
    assert_agree(
        lambda s, t: kd_loss(s, t, temperature, standardise),
        lambda s, t: oracle.kd_loss(s, t, temperature, standardise),
        *logits(),
        wrt=(0, 1),
    )


def test_gradient_of_the_temperature():
    assert_agree(kd_loss, oracle.kd_loss, *logits(), 4.0, wrt=(2,))


def test_gradient():
    student, teacher = logits(rows=3, classes=4)
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, teacher, 2.0), (student,))


def test_gradient_is_scaled_difference_of_probabilities():
    student, teacher = logits()
    student.requires_grad_()
    kd_loss(student, teacher, 4.0).backward()
    expected = 4.0 * ((student / 4).softmax(1) - (teacher / 4).softmax(1)) / len(student)
    torch.testing.assert_close(student.grad, expected.detach())


def golden_total(given, options):
    """What the case's reference computes, out of our function."""
    student, teacher = given["logits_student"], given["logits_teacher"]
    if "alpha" in options:  # soft cross-entropy: the KL plus the teacher's entropy, without cross-entropy on labels
        soft = (teacher / options["temp"]).softmax(1)
        entropy = -(soft * soft.log()).sum(1).mean()
        return options["alpha"] * (kd_loss(student, teacher, options["temp"]) + options["temp"] ** 2 * entropy)
    if "KD_WEIGHT" in options:
        hard = options["CE_WEIGHT"] * F.cross_entropy(student, given["target"])
        return hard + options["KD_WEIGHT"] * kd_loss(student, teacher, options["TEMPERATURE"])
    return kd_loss(student, teacher, options["T"] if "T" in options else options["temperature"])


@pytest.mark.parametrize("case", loss_cases("kd"))
def test_golden_values_and_gradients(case):
    given = case_tensors(case, "in")
    given["logits_student"].requires_grad_()
    loss = golden_total(given, case["hyperparameters"])
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7)
    assert_golden_gradients(case, given)


def test_zero_for_equal_logits_and_blind_to_a_shift():
    student, teacher = logits()
    assert kd_loss(student, student, 4.0).item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(kd_loss(student + 5.0, teacher, 4.0), kd_loss(student, teacher, 4.0))


# At the edges


def test_finite_at_extreme_logits():
    student = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = kd_loss(student, -student.detach(), 1.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    student, teacher = (z.to(dtype) for z in logits())
    assert torch.equal(kd_loss(student, teacher, 4.0), kd_loss(student.float(), teacher.float(), 4.0))


# The method


def test_two_views_sum_both_views():
    two, one = build("KD_TWO_VIEWS"), build("KD")
    one.load_state_dict(two.state_dict())
    batch = make_batch("KD_TWO_VIEWS")
    _, both = two(**batch, epoch=1)
    singly = [one(image=batch[f"image_{view}"], target=batch["target"])[1] for view in ("weak", "strong")]
    for name, loss in both.items():
        torch.testing.assert_close(loss, singly[0][name] + singly[1][name])
