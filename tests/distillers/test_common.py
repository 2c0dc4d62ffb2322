"""What method files import from ``_common``: the regressor's shapes, and that asking for shapes changes nothing."""

import copy

import pytest
import torch

from mdistiller.distillers._common import ConvReg, get_feat_shapes
from mdistiller.models import cifar_model_dict
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
