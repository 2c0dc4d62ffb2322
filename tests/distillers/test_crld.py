"""CRLD: its losses against ``oracles/crld.py`` and the reference's values, and its masks."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden, case_leaves, case_tensors, loss_cases
from method_cases import FALLING, build, make_batch
from oracles import crld as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.CRLD import crld_losses, sure
from mdistiller.distillers.KD import kd_loss


def views(images=6, classes=4, scale=2.0):
    return [*(scale * torch.randn(4, images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))]


@pytest.mark.parametrize("by", ["term", "view"])
@pytest.mark.parametrize("taus", [(0.0, 0.0), (0.8, 0.6), (1.0, 0.5)])
def test_equals_the_formula(taus, by):
    assert_agree(
        lambda *z: crld_losses(z[:2], z[2:], 4.0, *taus, mask_by=by),
        lambda *z: oracle.crld_losses(z[:2], z[2:], 4.0, taus, by == "view"),
        *views(),
        wrt=range(4),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("crld"))
def test_golden_values_masks_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    student, teacher = (
        [given[f"logits_{net}_{view}"] for view in ("weak", "strong")] for net in ("student", "teacher")
    )
    taus = options["TAU_W"], options["TAU_S"]
    for name, z, tau in zip(("mask_weak", "mask_strong"), teacher, taus, strict=True):
        assert torch.equal(sure(z, tau), case_tensors(case, "out", dtype)[name].to(dtype))
    within, across = crld_losses(student, teacher, options["TEMPERATURE"], *taus)
    kd = options["WV_WEIGHT"] * within + options["CV_WEIGHT"] * across
    assert kd.item() == pytest.approx(case["outputs"]["loss_kd"], rel=1e-7 if dtype == torch.float64 else 1e-4)
    ce = sum(F.cross_entropy(z, given["target"]) for z in student)
    assert_golden(case, given, options["CE_WEIGHT"] * ce + kd)


def test_special_cases():
    """Without thresholds the terms are KD; a teacher that is never sure teaches nothing."""
    s_weak, s_strong, t_weak, t_strong = views()
    pairs = (s_weak, s_strong), (t_weak, t_strong)
    within, across = crld_losses(*pairs, 4.0, 0.0, 0.0)
    torch.testing.assert_close(within, kd_loss(s_weak, t_weak, 4.0) + kd_loss(s_strong, t_strong, 4.0))
    torch.testing.assert_close(across, kd_loss(s_strong, t_weak, 4.0) + kd_loss(s_weak, t_strong, 4.0))
    assert all(loss == 0 for loss in crld_losses(*pairs, 4.0, 1.0, 1.0))
    assert all(loss.abs() < 1e-12 for loss in crld_losses((t_weak, t_weak), (t_weak, t_weak)))


def test_who_masks_a_term():
    """By the term: within views the weak view, across views the strong one. By the view: each its own teacher's."""
    s_weak, s_strong, t_weak, t_strong = views()
    pairs = (s_weak, s_strong), (t_weak, t_strong)
    assert [loss > 0 for loss in crld_losses(*pairs, 4.0, 0.0, 1.0)] == [True, False]
    within, across = crld_losses(*pairs, 4.0, 0.0, 1.0, "view")
    torch.testing.assert_close(within, kd_loss(s_weak, t_weak, 4.0))
    torch.testing.assert_close(across, kd_loss(s_strong, t_weak, 4.0))


def test_losses_are_the_parts():
    distiller, batch = build("CRLD", {"CRLD.TAU_WEAK": 0.2}), make_batch("CRLD")
    logits, losses = distiller(**batch, epoch=1)
    strong, _ = distiller.student(batch["image_strong"])
    teacher = [distiller.teacher(batch[f"image_{view}"])[0] for view in ("weak", "strong")]
    within, across = crld_losses((logits, strong), teacher, 4.0, 0.2, 0.2)
    torch.testing.assert_close(losses["loss_within"], 2 * within, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["loss_across"], 0.5 * across, rtol=1e-4, atol=1e-5)
    ce = F.cross_entropy(logits, batch["target"]) + F.cross_entropy(strong, batch["target"])
    torch.testing.assert_close(losses["loss_ce"], ce)


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"TEMPERATURE": 1.0}, {"loss_within", "loss_across"}),
        ({"TAU_WEAK": 1.0}, {"loss_within"}),
        ({"TAU_STRONG": 1.0}, {"loss_across"}),
        ({"TAU_STRONG": 1.0, "MASK_BY": "view"}, {"loss_within", "loss_across"}),
        ({"CE_WEIGHT": 2.0}, {"loss_ce"}),
    ],
)
def test_keys_change_what_they_name(values, changed):
    found = []
    for given in (FALLING["CRLD"], FALLING["CRLD"] | {f"CRLD.{key}": value for key, value in values.items()}):
        found.append(build("CRLD", given)(**make_batch("CRLD"), epoch=1)[1])
    assert {name for name in found[0] if not torch.isclose(found[0][name], found[1][name], rtol=1e-6)} == changed
