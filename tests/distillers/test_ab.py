"""AB: its loss against ``oracles/ab.py`` and RepDistiller's values, its two stages, and its edges."""

import contextlib

import pytest
import torch
from feature_maps import assert_float32_under_autocast, maps
from golden_data import assert_golden, case_leaves, listed, loss_cases
from method_cases import build, make_batch
from oracles import ab as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers._common import preact_maps
from mdistiller.distillers.AB import ab_loss, single_stage_ab_loss

PREPARE = {"AB.PREPARE.EPOCHS": 8, "AB.PREPARE.LR": 0.01}


@pytest.mark.parametrize("margin", [0.5, 1.0])
def test_equals_the_formula(margin):
    for ours, plain in ((single_stage_ab_loss, oracle.single_stage_ab_loss), (twice(ab_loss), twice(oracle.ab_loss))):
        assert_agree(lambda s, t, f=ours: f(s, t, margin), lambda s, t, f=plain: f(s, t, margin), *maps((3, 3)))


def twice(loss):
    return lambda s, t, margin: loss([s, s], [t, t], margin)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("ab"))
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    loss = ab_loss(listed(given, "feat_s_"), listed(given, "feat_t_"), case["hyperparameters"]["margin"])
    assert_golden(case, given, loss)


def test_zero_beyond_the_margin_on_the_teachers_side():
    _, f_t = maps((3, 3))
    assert single_stage_ab_loss(1.01 * f_t.sign(), f_t) == 0 < single_stage_ab_loss(-f_t.sign(), f_t)
    assert_float32_under_autocast(single_stage_ab_loss, maps((3, 3)))


def test_the_first_stage_starts_the_student_by_its_maps():
    """Also the batch norms' statistics move; the classifier and the teacher do not."""
    distiller, batch = build("AB", PREPARE), make_batch("AB")
    before = {name: value.clone() for name, value in distiller.state_dict().items()}

    def distance():
        with torch.no_grad():
            return distiller.distance(*(net(batch["image"])[1] for net in (distiller.student, distiller.teacher)))

    first = distance()
    facts = distiller.prepare(lambda epoch: iter([batch]), contextlib.nullcontext)
    assert facts["loss"] < 0.9 * first and distance() < 0.9 * first
    moved = {name for name, value in distiller.state_dict().items() if not torch.equal(value, before[name])}
    assert {"student.conv1.weight", "student.bn1.running_mean"} < moved
    assert not [name for name in moved if name.startswith(("teacher", "student.fc"))]
    assert all(p.grad is None for p in distiller.parameters())


def test_then_the_labels_alone_train_it_by_default():
    batch = make_batch("AB")
    assert set(build("AB")(**batch, epoch=1)[1]) == {"loss_ce"}
    distiller = build("AB", {"AB.LOSS.FEAT_WEIGHT": 2.0})
    _, losses = distiller(**batch, epoch=1)
    maps_s, maps_t = (preact_maps(net(batch["image"])[1])[1:] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], 2 * ab_loss(maps_s, maps_t))  # of one shape: no connectors
    assert all(isinstance(connect, nn.Identity) for connect in distiller.connectors)


def test_the_margin_is_the_option():
    batch = make_batch("AB")
    losses = [build("AB", {"AB.LOSS.FEAT_WEIGHT": 1.0, "AB.MARGIN": m})(**batch, epoch=1)[1] for m in (0.5, 1.0)]
    assert losses[0]["loss_kd"] < losses[1]["loss_kd"]
