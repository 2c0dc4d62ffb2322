"""ReviewKD: its loss against ``oracles/reviewkd.py`` and the reference's values, and its levels on the usual pairs."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, listed, loss_cases
from method_cases import build, config, make_batch
from networks_stub import GivenNet
from oracles import reviewkd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant

from mdistiller.distillers.ReviewKD import ABF, hcl_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError

# The formula


def maps(sides=(8, 6, 1), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(2, 3, s, s, dtype=torch.float64, generator=generator) for s in sides] for _ in range(2)]


@pytest.mark.parametrize("sides", [(8, 6, 1), (5,), (4, 2), (3, 7)], ids=str)
def test_equals_the_formula(sides):
    """Poolings nest in maps of side 8, 4, 2; a side that is no multiple has cells that overlap."""
    student, teacher = ([f[:, :2] for f in net] for net in maps(sides))
    levels = len(sides)
    assert_agree(
        lambda *f: hcl_loss(f[:levels], f[levels:]),
        lambda *f: oracle.hcl_loss(f[:levels], constant(list(f[levels:]))),
        *student,
        *teacher,
        wrt=range(2 * levels),
    )


def test_gradient():
    student, teacher = maps()
    assert hcl_loss(student, student).item() == 0
    student = [f[:1, :2].clone().requires_grad_() for f in student]
    teacher = [f[:1, :2] for f in teacher]
    assert torch.autograd.gradcheck(lambda *f: hcl_loss(f, teacher), student)


@pytest.mark.parametrize("sides", [(8, 4), (8, 1), (6, 4), (4, 4)])
def test_fusion_equals_the_plain_form(sides):
    abf = ABF(3, 5, 4, fuse=True).double()
    x, deeper = (torch.randn(2, 5, side, side, dtype=torch.float64, requires_grad=True) for side in sides)
    up = F.interpolate(deeper, x.shape[2:], mode="nearest")
    a, b = abf.att_conv(torch.cat([x, up], dim=1)).split(1, dim=1)
    found, expected = abf._fuse(x, deeper), x * a + up * b
    torch.testing.assert_close(found, expected)
    weights, inputs = torch.randn_like(found), (x, deeper, *abf.att_conv.parameters())
    for one, other in zip(*(torch.autograd.grad((y * weights).sum(), inputs) for y in (found, expected)), strict=True):
        torch.testing.assert_close(one, other)


def of_case(case, given):
    """The method on networks that return the case's tensors, with the case's modules."""
    options = case["hyperparameters"]
    maps_s, maps_t = listed(given, "feat_s_"), listed(given, "feat_t_")
    values = {f"REVIEWKD.{key}": value for key, value in options.items() if key != "epoch"}
    nets = []
    for which, maps, stem in (("s", maps_s, []), ("t", maps_t, [torch.zeros(1, 1, 1, 1)])):
        pooled = given[f"pooled_{which}"]
        name = "preact_feats" if which == "t" or options["STU_PREACT"] else "feats"
        features = {name: [*stem, *maps], "pooled_feat": pooled}
        logits = given["logits_student" if which == "s" else "logits_teacher"]
        nets.append(GivenNet(logits, features))
    distiller = build_distiller(config("REVIEWKD", values), *nets).double().train()
    state = {name.removeprefix("param."): value for name, value in given.items() if name.startswith("param.")}
    missing, unknown = distiller.load_state_dict(state, strict=False)
    assert not unknown and all(key.startswith(("student", "teacher")) for key in missing)
    return distiller


@pytest.mark.parametrize("case", loss_cases("reviewkd"))
def test_golden_values_and_gradients(case):
    given = case_tensors(case, "in")
    for name, value in given.items():
        if name in case["gradients"] and not name.startswith("param."):
            value.requires_grad_()
    if "epoch" not in case["hyperparameters"]:
        loss = hcl_loss(listed(given, "feat_s_"), listed(given, "feat_t_"))
    else:
        distiller = of_case(case, given)
        _, losses = distiller(image=None, target=given["target"], epoch=case["hyperparameters"]["epoch"])
        loss = sum(losses.values())
        given |= {f"param.{name}": p for name, p in distiller.named_parameters()}
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=1e-7)
    assert_golden_gradients(case, given)


# At the edges


def test_half_precision_is_computed_in_float32():
    student, teacher = ([f.bfloat16() for f in net] for net in maps())
    found = hcl_loss(student, teacher)
    assert found.dtype == torch.float32
    assert torch.equal(found, hcl_loss([f.float() for f in student], [f.float() for f in teacher]))


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_the_ends(scale):
    student, teacher = ([(scale * f).float() for f in net] for net in maps())
    assert torch.isfinite(hcl_loss(student, teacher))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MAX_MID_CHANNEL": 0}, r"REVIEWKD\.MAX_MID_CHANNEL"),
        ({"WARMUP_EPOCHS": -1}, r"REVIEWKD\.WARMUP_EPOCHS"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("REVIEWKD", {f"REVIEWKD.{key}": value for key, value in values.items()})


# The method


PAIRS = [
    ("resnet32x4", "resnet8x4", 4), ("wrn_40_2", "wrn_16_2", 4), ("vgg13", "vgg8", 5), ("vgg13", "MobileNetV2", 5),
    ("ResNet50", "MobileNetV2", 5), ("ResNet50", "vgg8", 5), ("resnet32x4", "ShuffleV1", 4),
    ("wrn_40_2", "ShuffleV2", 4),
]  # fmt: skip


@pytest.mark.parametrize(("teacher", "student", "levels"), PAIRS)
def test_levels_of_the_usual_pairs_follow_from_the_networks(teacher, student, levels):
    """In mdistiller, every pair but the first fails until sizes and widths are written down by hand."""
    with torch.device("meta"):
        nets = [cifar_model_dict[name][0](num_classes=10) for name in (student, teacher)]
        distiller = build_distiller(config("REVIEWKD", {"DISTILLER.TEACHER": teacher}), *nets)
        _, losses = distiller(image=torch.zeros(2, 3, 32, 32), target=torch.zeros(2, dtype=torch.long), epoch=1)
    assert len(distiller.abfs) == levels and losses["loss_kd"].shape == ()


def test_mdistillers_shapes_and_widths_change_nothing():
    keys = {"SHAPES": [1, 8], "OUT_SHAPES": [1, 2, 3], "IN_CHANNELS": [16, 32, 64, 32], "OUT_CHANNELS": [8]}
    batch = make_batch("REVIEWKD")
    given, found = (build("REVIEWKD", values)(**batch, epoch=1)[1] for values in (
        {f"REVIEWKD.{key}": value for key, value in keys.items()}, {}
    ))  # fmt: skip
    assert given == found


def test_the_bound_of_the_fusions_width_is_heeded():
    """mdistiller reads MAX_MID_CHANNEL and takes 512 all the same."""
    assert {abf.conv1[0].out_channels for abf in build("REVIEWKD").abfs} == {64}
    assert {abf.conv1[0].out_channels for abf in build("REVIEWKD", {"REVIEWKD.MAX_MID_CHANNEL": 8}).abfs} == {8}


def test_keys_change_what_they_name():
    batch = make_batch("REVIEWKD")

    def losses(values, epoch=10):
        return build("REVIEWKD", {f"REVIEWKD.{key}": value for key, value in values.items()})(**batch, epoch=epoch)[1]

    before = losses({})
    torch.testing.assert_close(losses({"REVIEWKD_WEIGHT": 2.0})["loss_kd"], 2 * before["loss_kd"])
    torch.testing.assert_close(losses({"WARMUP_EPOCHS": 10})["loss_kd"], 2 * before["loss_kd"])
    torch.testing.assert_close(losses({"WARMUP_EPOCHS": 0})["loss_kd"], 2 * before["loss_kd"])
    torch.testing.assert_close(losses({"CE_WEIGHT": 2.0})["loss_ce"], 2 * before["loss_ce"])
    assert not torch.isclose(losses({"STU_PREACT": True})["loss_kd"], before["loss_kd"], rtol=1e-3)


def test_the_pooled_features_are_the_deepest_level():
    distiller, batch = build("REVIEWKD"), make_batch("REVIEWKD")
    _, features = distiller.student(batch["image"])
    levels = distiller._levels(features["feats"], features)
    assert [tuple(f.shape[1:]) for f in levels] == [(64, 1, 1), (64, 4, 4), (32, 8, 8), (16, 16, 16)]
    assert torch.equal(levels[0].flatten(1), features["pooled_feat"])
    assert torch.equal(levels[1], features["feats"][3])
    assert F.adaptive_avg_pool2d(levels[1], 1).sub(levels[0]).abs().max() < 1e-5
