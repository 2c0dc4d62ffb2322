"""FCFD: its losses against ``oracles/fcfd.py`` and the reference's whole steps, its paths, and the networks' stages."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from feature_maps import maps
from golden_data import case_leaves, case_tensors, loss_cases
from method_cases import build, config, make_batch
from oracles import fcfd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.FCFD import FCFD, appearance_loss, bridge
from mdistiller.models import cifar_model_dict, imagenet_model_dict
from mdistiller.models.cifar.resnet import ResNet
from mdistiller.registry import InputError


@pytest.mark.parametrize("pooled", [False, True])
def test_equals_the_formula(pooled):
    f, f_t = maps((2, 2), side=2)
    assert_agree(
        lambda x: appearance_loss(x, f_t.to(x.dtype), pooled),
        lambda x: oracle.appearance_loss(x, f_t.tolist(), pooled),
        f,
    )


def ours(key):
    """Our name of an entry of the reference's state; ``None`` for what is not here."""
    for old, new in ((r"models\.0\.(.*)", r"teacher.\1"), (r"models\.1\.(.*)", r"student.\1")):
        if match := re.fullmatch(old, key):
            return match.expand(new)
    stage, end, start, rest = re.fullmatch(r"bridges\.(\d+)\.(\d)\.(\d)\.(.*)", key).groups()
    return f"{'to_teacher' if end == '0' else 'to_student'}.{int(stage) - 1}.{rest}" if end != start else None


@pytest.mark.parametrize("case", loss_cases("fcfd"))
def test_golden_steps(case):
    """Losses of each part, of the paths' predictions, and gradients of networks and bridges."""
    given, options = case_leaves(case), case["hyperparameters"]
    student, teacher = (ResNet(*options[role], num_classes=options["num_classes"]) for role in ("student", "teacher"))
    values = {"FCFD.TEMPERATURE": float(options["T"]), "DATASET.IMAGE_SIZE": given["image"].shape[2]}
    distiller = FCFD(student, teacher, config("FCFD", values)).double().train()
    state = {ours(name.removeprefix("param.")): x.detach() for name, x in given.items() if name.startswith("param.")}
    distiller.load_state_dict(distiller.state_dict() | {k: v for k, v in state.items() if k in distiller.state_dict()})
    paths = [("student" if path[0] else "teacher", path.index(1 - path[0]) - 2) for path in options["extra_paths"]]
    before = copy.deepcopy(teacher.state_dict())

    logits, parts = distiller.parts(given["image"], paths)
    ce, expected = F.cross_entropy(logits, given["target"]), case["outputs"]
    found = {"loss_ce": ce, "kl_student": parts["kd"]}
    found |= {f"kl_mix_{number}": loss for number, loss in enumerate(parts["mix"])}
    found |= {f"l2_stage_{number}": loss for number, loss in enumerate(parts["l2"], 1)}
    assert {name: x.item() for name, x in found.items()} == pytest.approx(
        {name: expected[name] for name in found}, rel=1e-7
    )
    warm = min(1, (options["epoch_from_0"] + 1) / options["warmup_epochs"])
    loss = ce + parts["kd"] + options["mixture_kl_weight"] * sum(parts["mix"])
    loss = loss + options["weight_l2"] * warm * sum(parts["l2"])
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-7)
    loss.backward()
    parameters = dict(distiller.named_parameters())
    for name, gradient in case_tensors(case, "grad").items():
        error = (parameters[ours(name.removeprefix("param."))].grad - gradient).abs().max()
        assert error <= 1e-6 * gradient.abs().max(), name
    for name, value in case_tensors(case, "after").items():
        key = ours(name)
        if key and key.startswith("student."):
            torch.testing.assert_close(distiller.state_dict()[key], value, rtol=1e-6, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *(("cifar", name) for name in ("resnet8", "ResNet18", "wrn_16_1", "vgg8", "MobileNetV2")),
        *(("cifar", name) for name in ("ShuffleV1", "ShuffleV2")),
        *(("imagenet", name) for name in ("ResNet18", "MobileNetV1")),
    ],
)
def test_stages_one_by_one_are_the_network(family, name):
    models, side = (cifar_model_dict, 32) if family == "cifar" else (imagenet_model_dict, 64)
    network = models[name][0](num_classes=10).eval()
    with torch.no_grad():
        logits, features = network(torch.randn(2, 3, side, side))
        stages = network.get_stages()
        expected = stages.maps(features)
        assert len(expected) == len(stages.run)
        for x, run, y in zip(expected, stages.run[1:], expected[1:], strict=False):
            torch.testing.assert_close(run(x), y, rtol=1e-4, atol=1e-5)
        pooled = expected[-1].relu().mean((2, 3))
        torch.testing.assert_close(stages.classifier(pooled), logits, rtol=1e-4, atol=1e-5)
        assert not stages.rectified or all((x >= 0).all() for x in expected)


def test_bridges_between_sizes():
    for source, target, bias in (((1, 3, 4, 4), (1, 5, 4, 4), False), ((1, 3, 8, 8), (1, 5, 4, 4), True),
                                 ((1, 3, 2, 2), (1, 5, 4, 4), True)):  # fmt: skip
        made = bridge(torch.Size(source), torch.Size(target), rectified=True)
        assert made(torch.randn(2, *source[1:])).shape[1:] == target[1:]
        assert (made[0].bias is not None) == bias and len(made) == 3
    with pytest.raises(InputError, match="FCFD bridges maps of one size or of twice the size, not 9x9 and 4x4"):
        bridge(torch.Size((1, 3, 9, 9)), torch.Size((1, 5, 4, 4)), rectified=False)


def test_paths_change_with_the_steps_and_belong_to_the_state():
    distiller, drawn = build("FCFD"), []
    distiller.parts = lambda image, paths: drawn.append(tuple(paths)) or FCFD.parts(distiller, image, paths)
    for _ in range(8):
        distiller(**make_batch("FCFD"), epoch=1)
    assert len(set(drawn)) > 2 and all(len(set(paths)) == 2 for paths in drawn)
    again = build("FCFD")
    again.load_state_dict(distiller.state_dict())
    assert again.steps.number == 8


def test_only_the_pure_path_moves_running_statistics():
    distiller, batch = build("FCFD"), make_batch("FCFD")
    plain = copy.deepcopy(distiller.student)
    plain(batch["image"])
    before = copy.deepcopy(distiller.teacher.state_dict())
    distiller(**batch, epoch=1)
    assert all(torch.equal(x, plain.state_dict()[name]) for name, x in distiller.student.state_dict().items())
    assert all(torch.equal(x, before[name]) for name, x in distiller.teacher.state_dict().items())


def test_networks_of_other_numbers_of_stages_are_refused():
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("MobileNetV2", "resnet8"))
    with pytest.raises(InputError, match="the student MobileNetV2 has 4, the teacher ResNet 3"):
        FCFD(student, teacher, config("FCFD"))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"TEMPERATURE": 1.0}, {"loss_kd", "loss_mix"}),
        ({"PATHS": 0}, {"loss_mix", "loss_l2"}),
        ({"WARMUP": 1}, {"loss_l2"}),
        ({"MIX_WEIGHT": 0.2}, {"loss_mix"}),
        ({"KD_WEIGHT": 0.2}, {"loss_kd"}),
        ({"TEACHER_BATCH_STATISTICS": False}, {"loss_kd", "loss_mix", "loss_l2"}),
    ],
)
def test_keys_change_what_they_name(values, changed):
    found = [build("FCFD", given)(**make_batch("FCFD"), epoch=1)[1]
             for given in ({}, {f"FCFD.{key}": value for key, value in values.items()})]  # fmt: skip
    assert {name for name in found[0] if not torch.isclose(found[0][name], found[1][name], rtol=1e-6)} == changed


def test_every_bridge_has_a_gradient_in_every_step():
    """torch's fused SGD fails where a parameter's first gradient comes late."""
    distiller = build("FCFD", {"FCFD.PATHS": 0})
    sum(distiller(**make_batch("FCFD"), epoch=1)[1].values()).backward()
    assert all(p.grad is not None for p in distiller.to_student.parameters())
