"""FitNet: its loss against ``oracles/fitnet.py``, one hint or many, and that building it leaves networks alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from method_cases import build, config, make_batch, total
from oracles import fitnet as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers._common import ConvReg
from mdistiller.distillers.FitNet import hint_loss, single_pair
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

# The formula


def test_equals_the_formula():
    assert_agree(hint_loss, oracle.hint_loss, *maps(channels=(3, 3)), wrt=(0, 1))


def test_gradient():
    f_s, f_t = maps(channels=(3, 3))
    assert torch.autograd.gradcheck(lambda x: hint_loss(x, f_t), (f_s.requires_grad_(),))


# At the edges


def test_zero_for_equal_maps_and_finite_for_large_ones():
    f_s, f_t = (x.float() for x in maps(channels=(3, 3)))
    assert hint_loss(f_t, f_t) == 0
    assert_finite(lambda x: hint_loss(x, f_t), torch.full_like(f_s, 1e4), largest=1e4)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(hint_loss, maps(channels=(3, 3)))


@pytest.mark.parametrize(("layer", "offset", "allowed"), [(4, 0, "0 to 3"), (-1, 0, "0 to 3"), (0, -1, "1 to 3")])
def test_a_layer_that_is_not_there_is_refused(layer, offset, allowed):
    with pytest.raises(InputError, match=rf"FITNET\.HINT_LAYER must be from {allowed}, got {layer}"):
        single_pair(layer, 4, 4, offset)


def test_images_of_another_size_than_the_regressor_was_built_for_are_refused():
    class Net(nn.Module):
        def __init__(self, side):
            super().__init__()
            self.conv, self.side = nn.Conv2d(3, 4, 3), side

        def forward(self, x):
            maps = [F.adaptive_avg_pool2d(x, self.side or x.shape[2] - 1)] * 3
            return x.mean((2, 3)), {"feats": maps}

    distiller = build_distiller(config("FITNET", {"DATASET.IMAGE_SIZE": 8}), Net(side=0), Net(side=5)).train()
    target = torch.tensor([0, 1])
    distiller(image=torch.randn(2, 3, 8, 8), target=target)
    with pytest.raises(InputError, match=r"the regressed map is 3x7x7, the teacher's 3x5x5; DATASET\.IMAGE_SIZE"):
        distiller(image=torch.randn(2, 3, 10, 10), target=target)


# The method: one hint


def networks(*names):
    return [cifar_model_dict[name][0](num_classes=10) for name in names]


def test_losses_are_the_parts():
    distiller, batch = build("FITNET"), make_batch("FITNET")
    _, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    (logits, feats_s), (_, feats_t) = (net(batch["image"]) for net in (distiller.student, distiller.teacher))
    hint = hint_loss(distiller.conv_reg(feats_s["feats"][2]), feats_t["feats"][2])
    torch.testing.assert_close(losses["loss_kd"], 100 * hint)
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"HINT_LAYER": 1}, {"loss_kd"}),
        ({"MULTI_STAGE": True}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
        ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("FITNET", values) == changed


@pytest.mark.parametrize("method", ["FITNET", "VID"])
def test_building_moves_no_statistics_and_no_random_state(method):
    """mdistiller sends noise through both networks in training mode: a tenth of the teacher's statistics is noise's."""
    student, teacher = networks("resnet8", "resnet14")
    before = [copy.deepcopy(net.state_dict()) for net in (student, teacher)]
    generator = torch.get_rng_state()
    build_distiller(config(method), student, teacher)
    assert torch.equal(torch.get_rng_state(), generator)
    for net, state in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())

    teacher.train()
    teacher(torch.randn(1, 3, 32, 32))  # what mdistiller does
    assert not torch.equal(teacher.state_dict()["bn1.running_mean"], before[1]["bn1.running_mean"])


def test_the_hint_of_networks_with_and_without_a_stems_map_is_of_the_same_stage():
    """mdistiller's number 2 is the second stage of resnet8 but the third of vgg8."""
    student, teacher = networks("vgg8", "resnet8")
    assert build_distiller(config("FITNET"), student, teacher).pairs == [(1, 2)]
    assert build_distiller(config("FITNET", {"FITNET.STAGES": "skip_first"}), student, teacher).pairs == [(2, 2)]
    assert build_distiller(config("FITNET"), teacher, student).pairs == [(3, 2)]


def test_one_hint_keeps_mdistillers_names_in_the_state_dict():
    extra = {key for key in build("FITNET").state_dict() if not key.startswith(("student.", "teacher."))}
    assert extra == {f"conv_reg.{key}" for key in ConvReg((1, 2, 4, 4), (1, 2, 4, 4)).state_dict()}


# The method: a hint in every stage


def test_every_stage_has_a_hint_and_a_regressor_that_is_trained():
    distiller, batch = build("FITNET", {"FITNET.MULTI_STAGE": True}), make_batch("FITNET")
    assert distiller.pairs == [(1, 1), (2, 2), (3, 3)]
    assert [regressor.bn.num_features for regressor in distiller.conv_reg] == [16, 32, 64]
    twin = copy.deepcopy(distiller)
    _, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (twin.student, twin.teacher))
    hints = [hint_loss(twin.conv_reg[i - 1](feats_s[i]), feats_t[i]) for i in (1, 2, 3)]
    torch.testing.assert_close(losses["loss_kd"], 100 * sum(hints))
    total(distiller, batch).backward()
    assert all(p.grad.any() for p in distiller.conv_reg.parameters() if p.ndim > 1)
    trained = {id(p) for p in distiller.get_learnable_parameters()}
    assert all(id(p) in trained for p in distiller.conv_reg.parameters())


def test_several_stages_of_networks_with_maps_of_other_sizes():
    student, teacher = networks("ShuffleV1", "resnet8")  # 16, 8, 4 and 32, 16, 8
    distiller = build_distiller(config("FITNET", {"FITNET.MULTI_STAGE": True}), student, teacher).train()
    assert all(isinstance(regressor.conv, nn.ConvTranspose2d) for regressor in distiller.conv_reg)
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    assert torch.isfinite(losses["loss_kd"])
