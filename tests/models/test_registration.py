"""The tables' entries, the teachers' files, and the errors of the constructors."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision

from mdistiller.models import (
    ModelEntry,
    _registration,
    cifar_model_dict,
    imagenet_model_dict,
    tiny_imagenet_model_dict,
)
from mdistiller.models.cifar.resnet import ResNet, resnet32x4
from mdistiller.models.cifar.wrn import WideResNet
from mdistiller.registry import InputError, Registry

TEACHERS = {"resnet56", "resnet110", "resnet32x4", "ResNet50", "wrn_40_2", "vgg13"}


def test_table_kinds() -> None:
    constructor, checkpoint = cifar_model_dict["resnet32x4"]
    assert constructor is resnet32x4
    assert Path(checkpoint).parts[-4:] == (
        "download_ckpts",
        "cifar_teachers",
        "resnet32x4_vanilla",
        "ckpt_epoch_240.pth",
    )
    assert cifar_model_dict["resnet8x4"][1] is None
    checkpoint = tiny_imagenet_model_dict["ResNet18"][1]
    assert checkpoint.endswith("tiny_imagenet_teachers/ResNet18_vanilla/ti_res18")
    assert callable(imagenet_model_dict["ResNet50"])


def test_teachers_with_checkpoints() -> None:
    assert {name for name, (_, path) in cifar_model_dict.items() if path} == TEACHERS
    assert {name for name, (_, path) in tiny_imagenet_model_dict.items() if path} == {"ResNet18"}
    for name in TEACHERS:
        assert f"{name}_vanilla/" in cifar_model_dict[name][1]


def test_unknown_name_says_what_is_close() -> None:
    with pytest.raises(KeyError, match="no CIFAR model named 'resnet8X4'; closest: resnet8x4"):
        cifar_model_dict["resnet8X4"]


def test_checkpoints_lie_in_the_checkout_or_else_in_the_current_directory(tmp_path, monkeypatch) -> None:
    package_file = tmp_path / "checkout" / "mdistiller" / "models" / "_registration.py"
    monkeypatch.setattr(_registration, "__file__", str(package_file))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkout").mkdir()
    assert _registration.checkpoint_root() == Path.cwd()
    (tmp_path / "checkout" / "setup.py").touch()
    assert _registration.checkpoint_root() == (tmp_path / "checkout").resolve()


@pytest.mark.parametrize("name", ["ResNet18", "ResNet34", "ResNet50", "ResNet101", "ResNet152"])
def test_pretrained_is_torchvision(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and shapes are torchvision's; the weights asked for are the first ImageNet ones."""
    asked = []
    with torch.device("meta"):
        state = getattr(torchvision.models, name.lower())().state_dict()

    def get_state_dict(weights, *args, **kwargs):
        asked.append(weights.name)
        return state

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    with torch.device("meta"):
        net = imagenet_model_dict[name](pretrained=True)
    assert asked == ["IMAGENET1K_V1"]
    assert list(net.state_dict()) == list(state)


def test_pretrained_without_a_network_says_where_the_file_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_state_dict(weights, *args, **kwargs):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    with pytest.raises(InputError, match=r"Name or service.*resnet18-\w+\.pth into .*checkpoints.*TEACHER_CKPT"):
        imagenet_model_dict["ResNet18"](pretrained=True)


def test_pretrained_equals_torchvision_in_value() -> None:
    theirs = torchvision.models.resnet18().eval()
    ours = imagenet_model_dict["ResNet18"]().eval()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours(x)[0], theirs(x), atol=1e-5)


def test_pretrained_needs_matching_classes() -> None:
    with pytest.raises(InputError, match="1000 classes, not 10"):
        imagenet_model_dict["ResNet18"](pretrained=True, num_classes=10)
    with pytest.raises(InputError, match="no public weights"):
        imagenet_model_dict["MobileNetV1"](pretrained=True)


def test_impossible_depths() -> None:
    with pytest.raises(ValueError, match="depth=9 is not 6n"):
        ResNet(9, [16, 16, 32, 64])
    with pytest.raises(ValueError, match="depth=17 is not 6n"):
        WideResNet(17)


def test_bottleneck_resnet_reports_its_widths() -> None:
    net = ResNet(11, [16, 16, 32, 64], "Bottleneck", num_classes=10)
    _, features = net(torch.zeros(2, 3, 32, 32))
    assert net.get_stage_channels() == [16, 64, 128, 256]
    assert [f.shape[1] for f in features["feats"]] == net.get_stage_channels()


def test_shuffle_stage_activates_what_it_returns_before_the_activation() -> None:
    """feats is relu(preact) with the halves' channels interleaved."""
    net = cifar_model_dict["ShuffleV2"][0](num_classes=10).eval()
    with torch.no_grad():
        _, features = net(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    for feat, preact in list(zip(features["feats"], features["preact_feats"], strict=True))[1:]:
        half = feat.shape[1] // 2
        assert torch.equal(feat[:, 0::2], preact[:, :half].relu())
        assert torch.equal(feat[:, 1::2], preact[:, half:].relu())


def test_wrn_preact_is_the_next_batch_norm() -> None:
    net = cifar_model_dict["wrn_16_2"][0](num_classes=10).eval()
    with torch.no_grad():
        _, features = net(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
        for bn, feat, preact in zip(
            net.get_bn_before_relu(), features["feats"][1:], features["preact_feats"][1:], strict=True
        ):
            assert torch.equal(bn(feat), preact)


def test_wrn_dropout_acts_in_training_only() -> None:
    net = WideResNet(10, num_classes=10, drop_rate=0.5)
    x = torch.ones(2, 3, 16, 16)
    assert not torch.equal(net(x)[0], net(x)[0])
    net.eval()
    assert torch.equal(net(x)[0], net(x)[0])


@pytest.mark.parametrize("table", [cifar_model_dict, tiny_imagenet_model_dict, imagenet_model_dict])
def test_an_entry_is_of_one_type_and_serves_as_both_of_mdistillers(table) -> None:
    for name in table:
        entry = table[name]
        constructor, weights = entry
        assert entry == (constructor, weights) == (entry.constructor, entry.weights) and ModelEntry.of(entry) is entry
        assert entry.mean is None and entry.std is None
        with torch.device("meta"):
            assert type(entry(num_classes=3)) is type(constructor(num_classes=3))


def test_which_constructors_fetch_weights() -> None:
    assert not any(entry.pretrained for entry in cifar_model_dict.values())
    assert {name for name, entry in imagenet_model_dict.items() if not entry.pretrained} == {"MobileNetV1"}


def test_what_a_script_assigns_is_read_as_an_entry() -> None:
    assert ModelEntry.of((resnet32x4, "file")) == ModelEntry(resnet32x4, "file")
    assert ModelEntry.of((resnet32x4, None)).weights is None
    assert not ModelEntry.of((resnet32x4, None)).pretrained
    assert ModelEntry.of(resnet32x4).constructor is resnet32x4 and ModelEntry.of(resnet32x4).pretrained


def test_an_entry_is_copied_whole_and_may_be_entered_again() -> None:
    entry = ModelEntry(resnet32x4, "file", mean=(0.5, 0.5, 0.5), std=(0.1, 0.1, 0.1))
    for twin in (copy.deepcopy(entry), pickle.loads(pickle.dumps(entry))):
        assert twin == entry and (twin.pretrained, twin.mean, twin.std) == (False, entry.mean, entry.std)
    table = Registry("model")
    table.add("mine", entry)
    table.add("mine", ModelEntry(resnet32x4, "another file"))  # the same cell of a notebook, run again
    assert table["mine"].weights == "another file"
    with pytest.raises(ValueError, match="registered already"):
        table.add("mine", ModelEntry(WideResNet))
