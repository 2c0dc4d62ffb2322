"""AT: its loss against ``oracles/at.py``, at the edges, and what its keys do."""

import math

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from method_cases import build, config, make_batch
from oracles import at as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.AT import at_loss, attention_map, single_stage_at_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

# The formula


@pytest.mark.parametrize("p", [1, 2, 3, 4])
def test_equals_the_formula(p):
    assert_agree(lambda s, t: single_stage_at_loss(s, t, p), lambda s, t: oracle.at_loss(s, t, p), *maps(), wrt=(0, 1))


@pytest.mark.parametrize("p", [1, 2, 3])
def test_gradient(p):
    f_s, f_t = maps(channels=(2, 3), side=3)
    assert torch.autograd.gradcheck(lambda x: at_loss([x], [f_t], p), (f_s.requires_grad_(),))


def test_gradient_through_pooling_on_either_side():
    f_s, _ = maps(side=4)
    f_t, _ = maps(side=2, seed=1)
    assert torch.autograd.gradcheck(lambda x: at_loss([x], [f_t], 2), (f_s.requires_grad_(),))
    assert torch.autograd.gradcheck(lambda x: at_loss([x], [f_s.detach()], 2), (f_t.requires_grad_(),))


# The formula: what it does not depend on, and where it is simple


def test_blind_to_the_order_and_number_of_channels_and_to_scale():
    f_s, f_t = maps()
    expected = at_loss([f_s], [f_t], 2)
    torch.testing.assert_close(at_loss([f_s[:, [2, 0, 1]]], [f_t], 2), expected)
    torch.testing.assert_close(at_loss([torch.cat([f_s, f_s], 1)], [1e-3 * f_t], 2), expected)
    torch.testing.assert_close(at_loss([-7 * f_s], [f_t], 2), expected)
    assert at_loss([f_s], [f_s], 2) == 0


def test_signed_maps_with_odd_p_count_by_size():
    """mdistiller raises them as they are, so that channels of opposite sign cancel."""
    feat = torch.tensor([[1.0, 2.0], [-1.0, 3.0]]).view(1, 2, 1, 2)
    assert attention_map(feat, 1).tolist() == [pytest.approx([2 / math.sqrt(29), 5 / math.sqrt(29)])]
    assert attention_map(feat, 3).tolist() == [pytest.approx([2 / math.hypot(2, 35), 35 / math.hypot(2, 35)])]
    as_in_mdistiller = F.normalize(feat.pow(1).mean(1).flatten(1))
    assert as_in_mdistiller.tolist() == [[0.0, 1.0]]


def test_of_two_maps_the_larger_is_pooled_before_attention_is_taken():
    f_s, f_t = maps(side=4)
    small, _ = maps(side=2, seed=3)
    torch.testing.assert_close(at_loss([f_s], [small], 2), at_loss([F.avg_pool2d(f_s, 2)], [small], 2))
    torch.testing.assert_close(at_loss([small], [f_t], 2), at_loss([small], [F.avg_pool2d(f_t, 2)], 2))
    wide = f_s[:, :, :2]  # 2x4 and 4x2
    torch.testing.assert_close(
        at_loss([wide], [f_t[:, :, :, :2]], 2),
        at_loss([F.avg_pool2d(wide, (1, 2))], [F.avg_pool2d(f_t[:, :, :, :2], (2, 1))], 2),
    )


def test_stages_are_summed_and_must_be_equally_many():
    f_s, f_t = maps()
    torch.testing.assert_close(at_loss([f_s, f_s], [f_t, f_t], 2), 2 * at_loss([f_s], [f_t], 2))
    with pytest.raises(ValueError, match="shorter"):
        at_loss([f_s, f_s], [f_t], 2)


# At the edges


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("value", [0.0, 1.0, 1e-20, 1e4])
def test_finite_for_maps_of_one_value(value, p):
    _, f_t = (x.float() for x in maps())
    f_s = torch.full((2, 3, 4, 4), value)
    assert_finite(lambda x: at_loss([x], [f_t], p), f_s, largest=torch.inf if value == 1e-20 else 100.0)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(lambda f_s, f_t: at_loss([f_s], [f_t], 2), maps())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"AT.P": 0}, r"AT\.P must be at least 1 .*, got 0"),
        ({"AT.STAGES": "all"}, r"AT\.STAGES: no choice named 'all'"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("AT", values)


# The method


def test_losses_are_the_parts():
    distiller, batch = build("AT"), make_batch("AT")
    logits, losses = distiller(**batch, epoch=1)
    feats_s, feats_t = (net(batch["image"])[1]["feats"] for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(losses["loss_kd"], 1000 * at_loss(feats_s[1:], feats_t[1:], 2))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert distiller.get_extra_parameters() == 0


@pytest.mark.parametrize(
    ("values", "changed"),
    [({"P": 1}, {"loss_kd"}), ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}), ({"LOSS.CE_WEIGHT": 0.5}, {"loss_ce"})],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("AT", values) == changed


class TwoStages(nn.Module):
    """A network without a map of its stem: two stages."""

    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)])

    def get_stage_indices(self):
        return 0, 1

    def forward(self, x):
        feats = []
        for stage in self.stages:
            feats.append(x := stage(x).relu())
        return x.mean((2, 3)), {"feats": feats, "pooled_feat": x.mean((2, 3))}


class StemAndTwoStages(TwoStages):
    def get_stage_indices(self):
        return 1, 2

    def forward(self, x):
        logits, features = super().forward(x)
        return logits, {**features, "feats": [x, *features["feats"]]}


def test_the_same_stages_are_compared_with_or_without_a_map_of_the_stem():
    """Student and teacher are the same network but for the stem's map: there is nothing to learn. By mdistiller's
    pairs there is, since each stage is compared with the next."""
    student, teacher = TwoStages(), StemAndTwoStages()
    teacher.load_state_dict(student.state_dict())
    batch = {"image": torch.randn(2, 3, 8, 8), "target": torch.tensor([0, 1])}
    found = {
        rule: build_distiller(config("AT", {"AT.STAGES": rule}), student, teacher).train()(**batch)[1]["loss_kd"].item()
        for rule in ("matched", "skip_first")
    }
    assert found["matched"] == 0
    assert found["skip_first"] > 0.01


def test_networks_of_different_depth_and_map_size():
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("vgg8", "resnet8"))
    distiller = build_distiller(config("AT"), student, teacher).train()
    assert distiller.pairs == [(0, 1), (1, 2), (2, 3)]
    _, losses = distiller(image=torch.randn(2, 3, 32, 32), target=torch.tensor([0, 1]))
    assert torch.isfinite(losses["loss_kd"])
