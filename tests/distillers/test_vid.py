"""VID: its loss against ``oracles/vid.py``, its edges, and that its variances are learned, saved and found again."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from method_cases import build, config, make_batch, total
from oracles import vid as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.VID import inverse_softplus, predicted_variance, vid_loss
from mdistiller.engine.build import build_distiller
from mdistiller.engine.solver import build_optimizer
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

EPS = 1e-5


# The formula


def test_equals_the_formula():
    """The map that is regressed, its target, and the variances."""
    f_s, f_t = maps(channels=(5, 5), side=2)
    assert_agree(
        lambda s, scale, t: vid_loss(nn.Identity(), scale, s, t, EPS),
        lambda s, scale, t: oracle.vid_loss(s, scale, t, EPS),
        f_s,
        [-3.0, -1.0, 0.0, 1.0, 5.0],
        f_t,
        wrt=(0, 1, 2),
    )


def test_gradient():
    f_s, f_t = maps(side=2)
    log_scale = torch.linspace(-2, 2, 5, dtype=torch.float64, requires_grad=True)
    regressor = nn.Conv2d(3, 5, 1).double()
    assert torch.autograd.gradcheck(lambda x, v: vid_loss(regressor, v, x, f_t), (f_s.requires_grad_(), log_scale))


# The formula: what it does not depend on, and where it is simple


def test_the_best_variance_is_the_mean_squared_error():
    """There the gradient of every channel's log-scale vanishes; above it is positive, below negative."""
    f_s, f_t = maps(channels=(5, 5))
    errors = (f_s - f_t).square().mean((0, 2, 3))
    for factor, sign in ((1.0, 0), (2.0, 1), (0.5, -1)):
        log_scale = (
            torch.tensor([inverse_softplus(factor * v - EPS) for v in errors.tolist()]).double().requires_grad_()
        )
        vid_loss(nn.Identity(), log_scale, f_s, f_t, EPS).backward()
        assert (log_scale.grad.abs() < 1e-7).all() if sign == 0 else (log_scale.grad.sign() == sign).all()


def test_of_two_maps_the_larger_is_pooled():
    f_s, f_t = maps(channels=(5, 5))
    small, log_scale = maps(channels=(5,), side=2, seed=3)[0], torch.zeros(5)
    for student, teacher, pooled in (
        (f_s, small, (F.avg_pool2d(f_s, 2), small)),
        (small, f_t, (small, F.avg_pool2d(f_t, 2))),
    ):
        torch.testing.assert_close(
            vid_loss(nn.Identity(), log_scale, student, teacher), vid_loss(nn.Identity(), log_scale, *pooled)
        )


@pytest.mark.parametrize("x", [1e-6, 0.1, 5.0, 1e3])
def test_inverse_softplus(x):
    assert F.softplus(torch.tensor(inverse_softplus(x), dtype=torch.float64)).item() == pytest.approx(x, rel=1e-9)


# At the edges


@pytest.mark.parametrize("log_scale", [-100.0, 0.0, 100.0, 1e4])
def test_finite_at_extreme_variances(log_scale):
    """mdistiller's log(1 + exp(x)) is infinite from 89 on."""
    _, f_t = (x.float() for x in maps())
    scale = torch.full((5,), log_scale)
    assert_finite(lambda x: vid_loss(nn.Identity(), scale, x, f_t), torch.zeros(2, 5, 4, 4), largest=1e5)
    assert_finite(lambda v: vid_loss(nn.Identity(), v, torch.zeros(2, 5, 4, 4), f_t), scale, largest=1e5)
    assert predicted_variance(scale, EPS).min() >= EPS


def test_half_precision_is_computed_in_float32():
    scale = torch.zeros(5)
    assert_float32_under_autocast(lambda f_s, f_t: vid_loss(nn.Identity(), scale, f_s, f_t), maps(channels=(5, 5)))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"VID.EPS": 0.0}, r"VID\.EPS must be above 0, got 0"),
        ({"VID.INIT_PRED_VAR": 1e-6}, r"VID\.INIT_PRED_VAR must be above VID\.EPS 1e-05, got 1e-06"),
        ({"VID.STAGES": "x"}, r"VID\.STAGES: no choice named 'x'"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("VID", values)


# The method


def test_losses_are_the_parts():
    distiller, batch = build("VID"), make_batch("VID")
    logits, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (distiller.student, distiller.teacher))
    stages = zip(distiller.regressors, distiller.log_scales, feats_s[1:], feats_t[1:], strict=True)
    torch.testing.assert_close(losses["loss_kd"], sum(vid_loss(*stage, EPS) for stage in stages))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert [value.item() for value in distiller.monitors.values()] == pytest.approx([5.0] * 3)


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"INIT_PRED_VAR": 1.0}, {"loss_kd"}),
        ({"EPS": 0.5, "INIT_PRED_VAR": 0.6}, {"loss_kd"}),
        ({"LEARN_VARIANCE": False}, set()),  # at the first step
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("VID", values) == changed


def steps(values, count=5):
    cfg, distiller = config("VID", values), build("VID", values)
    optimizer = build_optimizer(cfg, distiller)
    for _ in range(count):
        optimizer.zero_grad()
        total(distiller, make_batch("VID")).backward()
        optimizer.step()
    return distiller


def test_variances_are_learned_saved_and_found_again():
    """In mdistiller they stand in a plain list: not optimised, not in the state dict, not on the GPU."""
    trained, start = steps({}), build("VID")
    for before, after in zip(start.log_scales, trained.log_scales, strict=True):
        assert (after < before).all()  # all variances are too large at 5
    total(trained, make_batch("VID"))
    assert all(value < 5 for value in trained.monitors.values())
    assert {f"log_scales.{i}" for i in range(3)} <= set(trained.state_dict())
    start.load_state_dict(trained.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(start.log_scales, trained.log_scales, strict=True))
    assert all(scale.dtype == torch.float64 for scale in copy.deepcopy(start).double().log_scales)
    of_regressors = sum(p.numel() for p in start.regressors.parameters())
    assert start.get_extra_parameters() == of_regressors + 16 + 32 + 64


def test_variances_can_be_left_at_their_start_as_mdistiller_leaves_them():
    distiller = steps({"VID.LEARN_VARIANCE": False})
    for scale in distiller.log_scales:
        torch.testing.assert_close(predicted_variance(scale, EPS), torch.full_like(scale, 5.0))
    assert distiller.get_extra_parameters() == sum(p.numel() for p in distiller.regressors.parameters())


def test_a_student_with_more_stages_than_its_teacher():
    """IndexError in mdistiller."""
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("MobileNetV2", "resnet8"))
    distiller = build_distiller(config("VID"), student, teacher).train()
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    assert torch.isfinite(losses["loss_kd"]) and len(distiller.regressors) == 3
