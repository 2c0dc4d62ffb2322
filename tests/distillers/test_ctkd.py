"""CTKD: its temperature, reversed gradient and curriculum against ``oracles/ctkd.py`` and the reference's values."""

import pytest
import torch
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import build, make_batch, total
from oracles import ctkd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.CTKD import learned_temperature, reversal
from mdistiller.distillers.KD import kd_loss
from mdistiller.registry import InputError

# The formula


@pytest.mark.parametrize("reversal", [-1.0, -0.3, 0.0, 1.0])
def test_equals_the_formula(reversal):
    """Both logits' gradients and that of the parameter, which counts ``reversal`` times."""
    student, teacher = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert_agree(
        lambda s, t, g: kd_loss(s, t, learned_temperature(g, 1.0, 20.0, reversal)).sum(),
        lambda s, t, g: oracle.ctkd_loss(s, t, g[0], 1.0, 20.0, reversal),
        student,
        teacher,
        [0.7],
        wrt=(0, 1, 2),
    )


@pytest.mark.parametrize(("highest", "lowest", "loops"), [(0.0, -1.0, 10), (1.0, -2.0, 7), (0.5, -0.5, 0)])
def test_the_curriculum_is_the_formula(highest, lowest, loops):
    for epoch in range(1, 15):
        expected = oracle.reversal(epoch, highest, lowest, loops)
        assert reversal(epoch, highest, lowest, loops) == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("case", loss_cases("ctkd"))
def test_golden_values_and_gradients(case):
    given, options = case_tensors(case, "in"), case["hyperparameters"]
    ramp = [options[f"decay_{key}"] for key in ("max", "min", "loops")]
    if "epochs" in given:
        found = torch.tensor([reversal(int(epoch), *ramp) for epoch in given["epochs"]], dtype=torch.float64)
        torch.testing.assert_close(found, case_tensors(case, "out")["value"])
        return
    assert reversal(options["epoch"], *ramp) == pytest.approx(options["lambda"], rel=1e-9)
    given["logits_student"].requires_grad_()
    given["global_T"].requires_grad_()
    temperature = learned_temperature(given["global_T"], options["t_start"], options["t_end"], options["lambda"])
    loss = kd_loss(given["logits_student"], given["logits_teacher"], temperature, options["logit_stand"])
    loss.backward()
    assert temperature.item() == pytest.approx(case["outputs"]["temperature"], rel=1e-6)  # kept in float32 there
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-5)
    assert_golden_gradients(case, given, rel=1e-5)


# The formula: what it does not depend on, and where it is simple


def test_the_temperature_rises_against_the_loss_and_the_student_goes_down_it():
    """The same parameter without the reversal would fall."""
    student, teacher = torch.randn(2, 6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    slopes = {}
    for lambda_ in (1.0, -1.0, 0.0):
        g = torch.ones(1, dtype=torch.float64, requires_grad=True)
        kd_loss(student, teacher, learned_temperature(g, 1.0, 20.0, lambda_)).backward()
        slopes[lambda_] = g.grad.item()
    assert slopes[-1.0] == -slopes[1.0] != 0 and slopes[0.0] == 0
    g = torch.ones(1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: kd_loss(student, teacher, learned_temperature(g, 1.0, 20.0, 1.0)), (g,))


def test_the_curriculum():
    ramp = [reversal(epoch, 0.0, -1.0, 10) for epoch in range(1, 30)]
    assert ramp[:10] == sorted(ramp[:10], reverse=True) and set(ramp[9:]) == {-1.0}
    assert ramp[4] == pytest.approx(-0.5) and -0.03 < ramp[0] < 0
    assert reversal(1, 0.0, -1.0, 0) == -1.0


# At the edges


@pytest.mark.parametrize("g", [-1e4, -100.0, 100.0, 1e4])
def test_finite_at_extreme_parameters(g):
    """There the temperature is at an end of its range, and has no slope."""
    g = torch.full((1,), g, requires_grad=True)
    temperature = learned_temperature(g, 1.0, 20.0, -1.0)
    temperature.backward()
    assert temperature.item() == pytest.approx(1.0 if g < 0 else 21.0) and abs(g.grad.item()) < 1e-6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"CTKD.T_START": 0.0}, r"CTKD\.T_START"),
        ({"CTKD.T_END": -1.0}, r"CTKD\.T_END"),
        ({"CTKD.DECAY_LOOPS": -1}, r"CTKD\.DECAY_LOOPS"),
    ],
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("CTKD", values)


# The method


def test_the_temperature_is_learned_saved_and_watched():
    distiller, batch = build("CTKD"), make_batch("CTKD")
    assert distiller.get_extra_parameters() == 1 and "global_T" in distiller.state_dict()
    total(distiller, batch, epoch=10).backward()
    assert distiller.global_T.grad.item() != 0
    assert distiller.monitors["temperature"].item() == pytest.approx(1 + 20 * torch.sigmoid(torch.ones(())).item())


def test_keys_change_what_they_name():
    def facts(values, epoch=5):
        distiller = build("CTKD", {f"CTKD.{key}": value for key, value in values.items()})
        _, losses = distiller(**make_batch("CTKD"), epoch=epoch)
        sum(losses.values()).backward()
        return {**{k: v.item() for k, v in losses.items()}, "slope": distiller.global_T.grad.item()}

    before = facts({})
    for values, changed in (
        ({"T_START": 2.0}, {"loss_kd", "slope"}),
        ({"T_END": 10.0}, {"loss_kd", "slope"}),
        ({"DECAY_MAX": 1.0}, {"slope"}),
        ({"DECAY_MIN": -2.0}, {"slope"}),
        ({"DECAY_LOOPS": 20}, {"slope"}),
        ({"LOSS.CE_WEIGHT": 1.0}, {"loss_ce"}),
        ({"LOSS.KD_WEIGHT": 1.0}, {"loss_kd", "slope"}),
    ):
        after = facts(values)
        assert {key for key in before if before[key] != pytest.approx(after[key], rel=1e-6)} == changed, values
