"""FSP: its loss against ``oracles/fsp.py`` and RepDistiller's values, its stages, and pairs that it refuses."""

import contextlib

import pytest
import torch
from feature_maps import assert_float32_under_autocast, maps
from golden_data import assert_golden, case_leaves, listed, loss_cases
from method_cases import build, config, make_batch
from oracles import fsp as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.FSP import fsp_loss, fsp_matrix
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError


def of_two(loss):
    return lambda s1, s2, t1, t2: loss([s1, s2], [t1, t2])


def test_equals_the_formula():
    assert_agree(of_two(fsp_loss), of_two(oracle.fsp_loss), *maps((3, 2, 3, 2), side=2), wrt=(0, 1))
    assert_float32_under_autocast(of_two(fsp_loss), maps((3, 2, 3, 2)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("fsp"))
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    assert_golden(case, given, fsp_loss(listed(given, "feat_s_"), listed(given, "feat_t_")))


def test_blind_to_positions_and_zero_for_equal_maps():
    first, second = maps((3, 2))
    torch.testing.assert_close(fsp_matrix(first.flip(2), second.flip(2)), fsp_matrix(first, second))
    assert fsp_loss([first, second], [first, second]) == 0
    assert fsp_matrix(first.repeat_interleave(2, 2).repeat_interleave(2, 3), second).shape == (2, 3, 2)


def test_the_first_stage_lowers_the_distance_and_leaves_the_classifier():
    distiller, batch = build("FSP", {"FSP.PREPARE.EPOCHS": 8, "FSP.PREPARE.LR": 0.05}), make_batch("FSP")
    assert set(distiller(**batch, epoch=1)[1]) == {"loss_ce"}
    classifier = distiller.student.fc.weight.clone()
    with torch.no_grad():
        first = distiller.distance(*(net(batch["image"])[1] for net in (distiller.student, distiller.teacher)))
    facts = distiller.prepare(lambda epoch: iter([batch]), contextlib.nullcontext)
    assert facts["loss"] < 0.9 * first and torch.equal(distiller.student.fc.weight, classifier)


def test_networks_of_other_widths_are_refused():
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4"))
    with pytest.raises(InputError, match=r"equal widths; the student ResNet has \[16, 16, 32, 64\].*choose another"):
        build_distiller(config("FSP"), student, teacher)
