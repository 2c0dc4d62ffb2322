"""OFD: its parts against ``oracles/ofd.py`` and the reference's values, and what it leaves alone in the teacher."""

import copy
import math

import pytest
import torch
from golden_data import assert_golden_gradients, case_tensors, listed, loss_cases
from method_cases import build, config, make_batch, total
from networks_stub import GivenNet
from oracles import ofd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant
from torch import nn

from mdistiller.distillers.OFD import DEFAULTS, margins, ofd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict, imagenet_model_dict
from mdistiller.registry import InputError

# The formula


def inputs(seed=0):
    generator = torch.Generator().manual_seed(seed)
    f_s, f_t = torch.randn(2, 3, 4, 2, 2, dtype=torch.float64, generator=generator)
    return f_s, f_t, -torch.rand(1, 4, 1, 1, dtype=torch.float64, generator=generator)


def test_equals_the_formula():
    """The teacher and its margins are constants."""
    f_s, f_t, margin = inputs()
    assert_agree(
        lambda s, t, m: ofd_loss(s, t, m.detach()[None, :, None, None]),
        lambda s, t, m: oracle.ofd_loss(s, constant(t), constant(m)),
        f_s,
        f_t,
        margin.flatten(),
        wrt=(0, 1),
    )


def test_gradient():
    f_s, f_t, margin = inputs()
    assert torch.autograd.gradcheck(lambda f: ofd_loss(f, f_t, margin), (f_s.requires_grad_(),))
    assert ofd_loss(f_t.clamp(min=0), f_t.clamp(min=0), margin).item() == 0


def test_margins_are_the_formula():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 1.0, 1.0, 0.1]), torch.tensor([0.0, 1.0, -1.0, 5.0, 3.0, -2.0])
    expected = [oracle.margin(w, b) for w, b in zip(weight.tolist(), bias.tolist(), strict=True)]
    assert margins(weight, bias).tolist() == pytest.approx(expected, rel=1e-6)


def test_margin_is_the_mean_of_the_negative_part():
    weight, bias = torch.tensor([1.0, -2.0, 0.5, 1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, -1.0, 5.0, 0.7, -0.7])
    found = margins(weight, bias).tolist()
    for w, b, margin in list(zip(weight.tolist(), bias.tolist(), found, strict=True))[:3]:
        draws = b + abs(w) * torch.randn(10**6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert margin == pytest.approx(draws[draws < 0].mean().item(), rel=5e-3)
    assert found[0] == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-6)
    assert found[3] == -3.0  # negative with a probability of 3e-7
    assert found[4] == 0.0 and found[5] == pytest.approx(-0.7)  # channels that are constant


def of_case(case, given):
    norms = []
    for weight, bias in zip(listed(given, "bn_weight_"), listed(given, "bn_bias_"), strict=True):
        norm = nn.BatchNorm2d(len(weight))
        norm.weight.data, norm.bias.data = weight.float(), bias.float()
        norms.append(norm)
    nets = []
    for maps, logits in (
        (listed(given, "feat_s_"), given["logits_student"]),
        (listed(given, "feat_t_"), given["logits_teacher"]),
    ):
        nets.append(GivenNet(logits, {"preact_feats": maps}, norms))
    values = {
        f"OFD.{'LOSS' if key in DEFAULTS['LOSS'] else 'CONNECTOR'}.{key}": value
        for key, value in case["hyperparameters"].items()
    }
    distiller = build_distiller(config("OFD", values), *nets).double().train()
    state = {name.removeprefix("param."): value for name, value in given.items() if name.startswith("param.")}
    _, unknown = distiller.load_state_dict(state, strict=False)
    assert not unknown
    return distiller


@pytest.mark.parametrize("case", loss_cases("ofd"))
def test_golden_values_and_gradients(case):
    given = case_tensors(case, "in")
    for name in case["gradients"]:
        if name in given and not name.startswith("param."):
            given[name].requires_grad_()
    if "margin" in given:
        loss = ofd_loss(given["feat_s_0"], given["feat_t_0"], given["margin"])
    else:
        distiller = of_case(case, given)
        for i, margin in enumerate(listed(case_tensors(case, "out"), "margin_")):
            torch.testing.assert_close(getattr(distiller, f"margin_{i}"), margin, rtol=1e-6, atol=0)
        _, losses = distiller(image=None, target=given["target"])
        loss = sum(losses.values())
        given |= {f"param.{name}": p for name, p in distiller.named_parameters()}
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-6)  # margins were kept in float32
    assert_golden_gradients(case, given, rel=2e-6)


def test_nothing_is_asked_below_a_teacher_that_is_below_zero():
    f_t = torch.full((1, 1, 1, 4), -0.3)
    f_s = torch.tensor([[[[-9.0, -0.3, 0.0, 1.0]]]], requires_grad=True)
    ofd_loss(f_s, f_t, torch.tensor([[[[-0.8]]]])).backward()
    assert f_s.grad.flatten().tolist() == pytest.approx([0.0, 0.0, 0.6, 2.6])


# At the edges


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_the_ends(scale):
    f_s, f_t, margin = (scale * x.float() for x in inputs())
    assert torch.isfinite(ofd_loss(f_s, f_t, margin))


def test_half_precision_is_computed_in_float32():
    f_s, f_t, margin = (x.bfloat16() for x in inputs())
    assert torch.equal(ofd_loss(f_s, f_t, margin), ofd_loss(f_s.float(), f_t.float(), margin))


def test_a_teacher_without_such_batch_norms_is_refused():
    nets = [cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "ShuffleV2")]
    with pytest.raises(InputError, match=r"the teacher ShuffleNetV2 does not say by get_bn_before_relu\(\)"):
        build_distiller(config("OFD"), *nets)


# The method


def test_the_teacher_gives_the_batchs_statistics_and_keeps_its_own():
    """mdistiller runs the teacher in training mode: its running statistics move in every step, and what it would answer
    in evaluation with them."""
    distiller, batch = build("OFD"), make_batch("OFD")
    image, before = batch["image"], copy.deepcopy(distiller.teacher.state_dict())
    settled = copy.deepcopy(distiller.teacher)(image)[0]
    losses = {
        mode: build("OFD", {"OFD.TEACHER_BATCH_STATISTICS": mode})(**batch)[1]["loss_kd"] for mode in (True, False)
    }
    for _ in range(3):
        total(distiller, batch)
    assert all(torch.equal(value, before[name]) for name, value in distiller.teacher.state_dict().items())
    assert torch.equal(distiller.teacher(image)[0], settled)
    assert not any(m.training for m in distiller.teacher.modules())

    published = copy.deepcopy(distiller.teacher).train()
    published(image)
    drifted = {name for name, value in published.state_dict().items() if not torch.equal(value, before[name])}
    assert any("running_mean" in name for name in drifted)  # the fault
    again = build("OFD")
    again.teacher = published
    published.train = lambda mode=True: published  # as mdistiller's OFD keeps it
    torch.testing.assert_close(again(**batch)[1]["loss_kd"], losses[True])
    assert not torch.isclose(losses[True], losses[False], rtol=1e-3)


PAIRS = [
    ("resnet32x4", "resnet8x4", 3), ("wrn_40_2", "wrn_16_2", 3), ("vgg13", "vgg8", 4), ("vgg13", "MobileNetV2", 4),
    ("ResNet50", "MobileNetV2", 4), ("ResNet50", "vgg8", 4), ("resnet32x4", "ShuffleV1", 3),
    ("wrn_40_2", "ShuffleV1", 3),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "student", "stages"), PAIRS)
def test_usual_pairs(teacher, student, stages):
    """mdistiller's fails on those with MobileNetV2, ShuffleV1 and the teacher ResNet50."""
    with torch.device("meta"):
        nets = [cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)]
        distiller = build_distiller(config("OFD"), *nets)
        _, losses = distiller(image=torch.zeros(2, 3, 32, 32), target=torch.zeros(2, dtype=torch.long))
    assert distiller.stages == stages and losses["loss_kd"].shape == ()


def test_the_pair_on_imagenet_has_three_stages():
    with torch.device("meta"):
        nets = [imagenet_model_dict[name](num_classes=10) for name in ("MobileNetV1", "ResNet50")]
        distiller = build_distiller(config("OFD"), *nets)
    shapes = [tuple(m[0].weight.shape[:2]) for m in distiller.connectors.connectors]
    assert shapes == [(512, 256), (1024, 512), (2048, 1024)]


def test_margins_are_not_saved_and_follow_the_device_and_type():
    distiller = build("OFD")
    assert not [name for name in distiller.state_dict() if "margin" in name]
    assert distiller.double().margin_0.dtype == torch.float64


def test_a_larger_connector():
    distiller = build("OFD", {"OFD.CONNECTOR.KERNEL_SIZE": 3})
    assert distiller.connectors.connectors[0][0].kernel_size == (3, 3)
    total(distiller, make_batch("OFD"))
    with pytest.raises(InputError, match=r"OFD\.CONNECTOR\.KERNEL_SIZE must be odd"):
        build("OFD", {"OFD.CONNECTOR.KERNEL_SIZE": 2})
