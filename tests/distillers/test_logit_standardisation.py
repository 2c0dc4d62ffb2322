"""LSKD: logits standardised before they are compared, its switch and its settings."""

import pytest
import torch
from cli_runner import ROOT, run_tool
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import build, config, make_batch

from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import load_config
from mdistiller.functional import zs_norm
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError, distiller_dict

STANDARDISING = sorted(name for name, cls in distiller_dict.items() if cls.standardises_logits)
each_method = pytest.mark.parametrize("method", STANDARDISING)


@pytest.mark.parametrize("case", loss_cases("lskd"))
def test_golden_values_and_gradients(case):
    given, options = case_tensors(case, "in"), case["hyperparameters"]
    student, teacher, target = (given[name] for name in ("logits_student", "logits_teacher", "target"))
    student.requires_grad_()
    if "beta" in options:
        loss = dkd_loss(student, teacher, target, options["alpha"], options["beta"], options["temperature"], True)
    else:
        loss = kd_loss(student, teacher, options["temperature"], logit_stand=True)
    if "torchdistill" in case["source"]:  # it leaves the factor T^2 out
        loss = loss / options["temperature"] ** 2
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-6)
    assert_golden_gradients(case, given)


def test_mean_zero_and_unbiased_deviation_one():
    z = zs_norm(3 * torch.randn(4, 7, dtype=torch.float64) + 2)
    torch.testing.assert_close(z.mean(1), torch.zeros(4, dtype=torch.float64))
    torch.testing.assert_close(z.std(1), torch.ones(4, dtype=torch.float64), rtol=1e-6, atol=0)


def test_blind_to_scale_and_shift_of_an_image():
    student, teacher = torch.randn(2, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    factor, shift = torch.rand(2, 5, 1, dtype=torch.float64) + 0.5
    expected = kd_loss(student, teacher, 2.0, True)
    torch.testing.assert_close(kd_loss(student * factor + shift, teacher, 2.0, True), expected, rtol=1e-5, atol=0)
    assert not torch.isclose(kd_loss(student * factor + shift, teacher, 2.0), kd_loss(student, teacher, 2.0))


def test_gradient_flows_through_mean_and_deviation():
    student, teacher = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda z: kd_loss(z, teacher, 2.0, True), (student,))
    kd_loss(student, teacher, 2.0, True).backward()
    torch.testing.assert_close(student.grad.sum(1), torch.zeros(3, dtype=torch.float64))
    assert (student.grad * student.detach()).sum(1).abs().max() < 1e-6  # along the logits nothing changes


@pytest.mark.parametrize("row", [[0.0, 0.0, 0.0], [1e4, -1e4, 0.0], [7.0, 7.0, 7.0]])
def test_finite_at_the_ends(row):
    student = torch.tensor([row], requires_grad=True)
    loss = kd_loss(student, torch.tensor([[3.0, 1.0, 2.0]]), 2.0, True)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(student.grad).all()


def test_half_precision_is_computed_in_float32():
    student, teacher = torch.randn(2, 5, 8).bfloat16()
    assert torch.equal(kd_loss(student, teacher, 2.0, True), kd_loss(student.float(), teacher.float(), 2.0, True))


@each_method
def test_the_switch_makes_a_method_blind_to_the_students_scale(method):
    def own_terms(standardise, factor):
        distiller = build(method, {"EXPERIMENT.LOGIT_STAND": standardise})
        with torch.no_grad():
            for p in list(distiller.student.parameters())[-2:]:  # the classifier
                p.mul_(factor)
        _, losses = distiller(**make_batch(method), epoch=1)
        return losses["loss_kd"]

    torch.testing.assert_close(own_terms(True, 3.0), own_terms(True, 1.0), rtol=1e-4, atol=0)
    assert not torch.isclose(own_terms(False, 3.0), own_terms(False, 1.0), rtol=1e-2)


@each_method
def test_two_classes_are_refused(method):
    networks = [cifar_model_dict["resnet8"][0](num_classes=2) for _ in range(2)]
    with pytest.raises(InputError, match=r"EXPERIMENT\.LOGIT_STAND.*2 classes"):
        build_distiller(config(method, {"EXPERIMENT.LOGIT_STAND": True}), *networks)


@pytest.mark.parametrize("pair", ["res32x4_res8x4", "res56_res20"])
def test_the_forks_settings_are_configs(pair):
    cfg = load_config(ROOT / "configs" / "cifar100" / "lskd" / f"{pair}.yaml")
    assert (cfg.DISTILLER.TYPE, cfg.EXPERIMENT.LOGIT_STAND) == ("KD", True)
    assert cfg.KD.LOSS.KD_WEIGHT == 9.0 and cfg.KD.TEMPERATURE == 2.0


def test_where_the_switch_would_do_nothing_it_is_refused():
    outcome = run_tool("train", ["DISTILLER.TYPE", "DIST", "EXPERIMENT.LOGIT_STAND", "True"])
    words = "EXPERIMENT.LOGIT_STAND: DIST does not standardise logits; CTKD, DKD, KD, KD_TWO_VIEWS, KD_ours, MLKD do"
    assert outcome.code == 2 and words in outcome.err, outcome.err
