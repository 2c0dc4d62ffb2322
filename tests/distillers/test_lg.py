"""LG: its loss against ``oracles/lg.py`` and the reference's values, and its stages."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, maps
from golden_data import assert_golden, case_leaves, listed, load_case, loss_cases
from method_cases import build, make_batch
from oracles import lg as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.LG import lg_loss, resized

CASES = loss_cases("lg")
OF_LOGITS = [case for case in CASES if "logits_student" in case.values[0]["inputs"]]


@pytest.mark.parametrize("side", [2, 4])
def test_equals_the_formula(side):
    (f_s,), (f_t,) = maps((2,), side=side), maps((2,), side=4, seed=1)
    assert_agree(lambda s: lg_loss([s], [f_t.to(s.dtype)]), lambda s: oracle.lg_loss(s, f_t.tolist()), f_s)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case not in OF_LOGITS])
def test_golden_values_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    maps_s, maps_t = listed(given, "feat_s_"), listed(given, "feat_t_")
    found = [
        load_case(nn.Conv2d(f_s.shape[1], f_t.shape[1], 1), given, f"param.feature_transforms.{number}.")(f_s)
        for number, (f_s, f_t) in enumerate(zip(maps_s, maps_t, strict=True))
    ]
    for number, pair in enumerate(zip(found, maps_t, strict=True)):
        value = lg_loss(*([f] for f in pair)).item()
        assert value == pytest.approx(case["outputs"][f"loss_{number}"], rel=1e-7 if dtype == torch.float64 else 1e-4)
    assert_golden(case, given, case["hyperparameters"]["INTER_WEIGHT"] * lg_loss(found, maps_t))


@pytest.mark.parametrize("case", OF_LOGITS)
def test_golden_values_of_the_recipes_kd(case):
    """The KD of the transformers' recipe is KD's loss, by the batch or, in the original, by all logits."""
    given, options = case_leaves(case), case["hyperparameters"]
    student, teacher = given["logits_student"], given["logits_teacher"]
    loss = options["extra_weight"] * kd_loss(student, teacher, options["T"], options["logit_standard"])
    assert_golden(case, given, loss / (student.shape[1] if options["divided_by"] == "B*C" else 1))


def test_both_maps_take_the_larger_size():
    (f_s,), (f_t,) = maps((3,), side=7), maps((3,), side=8)
    torch.testing.assert_close(lg_loss([f_s], [f_t]), F.mse_loss(resized(f_s, (8, 8)), f_t))
    torch.testing.assert_close(lg_loss([f_t], [f_s]), F.mse_loss(f_t, resized(f_s, (8, 8))))
    assert lg_loss([f_s], [f_s]) == 0 and resized(f_s, (7, 7)) is f_s


def test_losses_are_the_parts():
    distiller, batch = build("LG"), make_batch("LG")
    logits, losses = distiller(**batch, epoch=1)
    maps_s, maps_t = (net(batch["image"])[1]["feats"][1:] for net in (distiller.student, distiller.teacher))
    guided = [layer(f) for layer, f in zip(distiller.transforms, maps_s, strict=True)]
    torch.testing.assert_close(losses["loss_kd"], 2.5 * lg_loss(guided, maps_t))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [({"LOSS.FEAT_WEIGHT": 1.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("LG", values) == changed
