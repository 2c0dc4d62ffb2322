"""What method files import from ``_common``: the regressor's shapes, asking for shapes, and which maps are compared."""

import copy

import pytest
import torch
from method_cases import config

from mdistiller.distillers._common import (
    ConvReg,
    get_feat_shapes,
    pick_pairs,
    stage_offset,
    stage_pairs,
)
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict, imagenet_model_dict
from mdistiller.models.facts import facts_of
from mdistiller.registry import InputError


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((8, 8), (8, 8)), ((8, 7), (5, 5))],
    ids=["half", "double", "equal", "smaller"],
)
def test_the_regressor_gives_the_shape_of_the_teacher(student, teacher):
    student, teacher = (2, 3, *student), (2, 5, *teacher)
    for use_relu in (True, False):
        regressor = ConvReg(student, teacher, use_relu)
        out = regressor(torch.randn(student))
        assert out.shape == teacher
        assert (out.min() >= 0) == use_relu
        assert {key.split(".")[0] for key in regressor.state_dict()} == {"conv", "bn"}


def test_the_regressor_without_batch_norm():
    shape, image = (2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    regressor = ConvReg(shape, shape, use_relu=False, use_bn=False)
    assert torch.equal(regressor(image), regressor.conv(image))


def test_a_map_that_cannot_be_fitted_is_refused_in_words():
    with pytest.raises(InputError, match="not 4x4 to 16x16; choose other layers"):
        ConvReg((1, 3, 4, 4), (1, 5, 16, 16))


def test_asking_for_shapes_moves_no_statistics_no_generator_and_no_mode():
    student, teacher = (cifar_model_dict[name][0](num_classes=7) for name in ("resnet8", "MobileNetV2"))
    student.train()
    student.layer1.eval()
    teacher.eval()
    before = [(copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]) for net in (student, teacher)]
    generator = torch.get_rng_state()
    shapes = get_feat_shapes(student, teacher, (32, 32))
    assert torch.equal(torch.get_rng_state(), generator)
    for net, (state, modes) in zip((student, teacher), before, strict=True):
        assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
        assert [m.training for m in net.modules()] == modes
    assert shapes[0] == [(1, 16, 32, 32), (1, 16, 32, 32), (1, 32, 16, 16), (1, 64, 8, 8)]
    assert [shape[1] for shape in shapes[1]] == teacher.get_stage_channels()


# Which maps are compared


def network(name, family=cifar_model_dict):
    """A network without weights, which costs nothing to build."""
    with torch.device("meta"):
        return family[name]()


def facts(student, teacher):
    return [facts_of(net, (64, 64), role) for net, role in ((student, "student"), (teacher, "teacher"))]


def pairs_of(student, teacher, rule="matched"):
    return stage_pairs(*facts(student, teacher), rule)


class Maps(torch.nn.Module):
    """A network that does not say which of its maps are stages."""

    def __init__(self, count):
        super().__init__()
        self.count = count

    def forward(self, image):
        return image.mean((2, 3)), {"feats": [image[..., :: 2**i, :: 2**i] for i in (0, *range(self.count - 1))]}


@pytest.mark.parametrize("rule", ["matched", "skip_first"])
@pytest.mark.parametrize(
    ("student", "teacher", "last"),
    [("resnet8x4", "resnet32x4", 3), ("ShuffleV1", "wrn_40_2", 3), ("vgg8", "vgg13", 4), ("MobileNetV2", "vgg13", 4),
     ("vgg8", "ResNet50", 4)],
)  # fmt: skip
def test_of_equally_many_maps_all_but_the_first_are_compared_in_order(student, teacher, last, rule):
    assert pairs_of(network(student), network(teacher), rule) == [(i, i) for i in range(1, last + 1)]


def test_a_network_without_a_map_of_its_stem_is_not_compared_one_stage_off():
    """mdistiller drops the first map of both: MobileNetV1's first stage meets none, ResNet50's last none."""
    student, teacher = (network(name, imagenet_model_dict) for name in ("MobileNetV1", "ResNet50"))
    sides_s, sides_t = [16, 8, 4, 2], [32, 16, 8, 4, 2]  # at 64 pixels; see the test below
    matched, published = pairs_of(student, teacher), pairs_of(student, teacher, "skip_first")
    assert matched == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert all(sides_s[i] == sides_t[j] for i, j in matched)
    assert published == [(1, 1), (2, 2), (3, 3)]
    assert all(2 * sides_s[i] == sides_t[j] for i, j in published)


def test_sides_of_mobilenetv1_and_of_an_imagenet_resnet():
    nets = [network(name, imagenet_model_dict).to_empty(device="cpu") for name in ("MobileNetV1", "ResNet18")]
    sides = [[shape[-1] for shape in shapes] for shapes in get_feat_shapes(*nets, (64, 64))]
    assert sides == [[16, 8, 4, 2], [32, 16, 8, 4, 2]]


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        ("vgg8", "resnet20", [(0, 1), (1, 2), (2, 3)]),
        ("resnet20", "vgg8", [(1, 0), (2, 1), (3, 2)]),
        ("MobileNetV2", "resnet20", [(2, 1), (3, 2), (4, 3)]),  # strides 2, 4, 8, 16 and 1, 2, 4: from the deep end
    ],
)
def test_what_is_left_over_is_said(student, teacher, expected, capsys):
    assert pairs_of(network(student), network(teacher)) == expected
    said = capsys.readouterr().out
    role, other = ("teacher", "VGG") if teacher == "vgg8" else ("student", {"vgg8": "VGG"}.get(student, "MobileNetV2"))
    assert f"the {role}'s maps" in said and other in said


def test_equal_networks_warn_of_nothing(capsys):
    pairs_of(network("resnet8"), network("resnet20"))
    assert not capsys.readouterr().out


def test_a_network_that_does_not_declare_its_stages_has_a_stem():
    assert stage_offset(*facts(Maps(5), network("resnet8")), "matched") == 0
    assert stage_offset(*facts(Maps(4), network("vgg8")), "matched") == 1


def test_an_unknown_rule_is_refused():
    with pytest.raises(InputError, match="no 'match'; closest: matched"):
        pairs_of(network("resnet8"), network("resnet8"), "match")


def test_networks_without_stages_in_common_are_refused():
    with pytest.raises(InputError, match=r"the student Maps has 1 feature maps, the teacher Maps 1: no stages"):
        build_distiller(config("AT"), Maps(1), Maps(1))


def test_pairs_pick_maps():
    pairs = pairs_of(network("vgg8"), network("resnet20"))
    features = [{"feats": [torch.full((1, 1, 2, 2), 10.0 * net + i) for i in range(4 + net)]} for net in (1, 0)]
    picked = pick_pairs(*features, pairs)
    assert [[x[0, 0, 0, 0].item() for x in maps] for maps in picked] == [[10, 11, 12], [1, 2, 3]]


@pytest.mark.parametrize("output", ["logits", "no maps", "two tensors"])
def test_a_network_without_maps_is_named(output):
    class Plain(torch.nn.Linear):
        def forward(self, image):
            logits = super().forward(image.mean((2, 3)))
            return {"logits": logits, "no maps": (logits, {}), "two tensors": (logits, logits)}[output]

    student, teacher = Plain(3, 10), cifar_model_dict["resnet8"][0](num_classes=10)
    for method in ("AT", "FITNET", "MDR"):
        for networks in ((student, teacher), (teacher, student)):
            role = "student" if networks[0] is student else "teacher"
            with pytest.raises(InputError, match=rf"the {role} Plain must return \(logits, features\)"):
                build_distiller(config(method), *networks)
