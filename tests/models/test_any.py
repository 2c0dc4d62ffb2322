"""Networks of other libraries: logits and state dict of the plain network, maps, and what is refused."""

import copy
import sys

import pytest
import timm
import torch
import torchvision
from torch import nn

from mdistiller.commands.list import main as list_command
from mdistiller.engine.build import build_student, build_teacher
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import CheckpointError, load_weights
from mdistiller.models import cifar_model_dict, imagenet_model_dict
from mdistiller.models.any import Input, find_network, is_code, with_features
from mdistiller.models.any.timm_maps import stages_of
from mdistiller.models.facts import facts_of
from mdistiller.registry import InputError, UnknownName

NETWORKS = (  # small members of twelve families of timm, six of torchvision
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_efficientnet",
    "timm:test_convnext",
    "timm:test_nfnet",
    "timm:test_mambaout",
    "timm:mobilenetv3_small_050",
    "timm:repvgg_a0",
    "timm:pvt_v2_b0",
    "timm:deit_tiny_distilled_patch16_224",
    "timm:mobilevit_xxs",
    "timm:levit_128s",
    "torchvision:resnet18",
    "torchvision:squeezenet1_1",
    "torchvision:mobilenet_v3_small",
    "torchvision:vgg11_bn",
    "torchvision:shufflenet_v2_x0_5",
    "torchvision:swin_t",
)
SIDES = {"timm:deit_tiny_distilled_patch16_224": 224, "timm:levit_128s": 224}  # of those that take one size only
WIDTHS = {  # of the maps of networks that do not state them
    "torchvision:resnet18": [64, 64, 128, 256, 512],
    "torchvision:squeezenet1_1": [64, 128, 256, 512],
    "torchvision:mobilenet_v3_small": [16, 16, 24, 48, 576],
    "torchvision:vgg11_bn": [64, 128, 256, 512, 512, 512],
    "torchvision:shufflenet_v2_x0_5": [24, 24, 48, 96, 1024],
    "torchvision:swin_t": [96, 192, 384, 768],
}


@pytest.mark.parametrize("name", NETWORKS)
def test_logits_and_weights_are_the_plain_networks(name):
    torch.manual_seed(0)
    size = SIDES.get(name, 64)
    plain = find_network(name)(num_classes=7)
    network = with_features(copy.deepcopy(plain), size)
    image = torch.randn(2, 3, size, size)
    assert isinstance(network, type(plain)) and type(network).__name__ == type(plain).__name__
    assert network.training and list(network.state_dict()) == list(plain.state_dict())
    with torch.no_grad():
        expected = plain.eval()(image)
        twin = copy.deepcopy(network.eval())
        for each in (network, twin):
            logits, features = each(image)
            assert torch.equal(logits, expected)
    facts = facts_of(network, (size, size))
    assert [f.shape[1] for f in features["feats"]] == facts.channels == WIDTHS.get(name, facts.channels)
    assert all(f.ndim == 4 for f in features["feats"]) and facts.strides == sorted(facts.strides)
    assert 3 <= len(facts.shapes) <= 6 and facts.stages[-1] == len(facts.shapes) - 1
    assert facts.stages == tuple(range(int(len(facts.shapes) == 5 and facts.strides[0] == 2), len(facts.shapes)))
    assert features["pooled_feat"].shape == (2, facts.pooled_width)
    assert any(not torch.equal(a, b) for a, b in zip(features["feats"], twin(2 * image)[1]["feats"], strict=True))


def test_the_twin_of_a_hooked_network_keeps_its_own_maps():
    network = with_features(torchvision.models.resnet18(num_classes=3), 32).eval()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
        assert twin(torch.ones(1, 3, 32, 32))[1]["feats"][-1].abs().max() == 0
        assert network(torch.ones(1, 3, 32, 32))[1]["feats"][-1].abs().max() > 0


def test_maps_are_those_of_the_modules_also_behind_operations_in_place():
    plain = torchvision.models.mobilenet_v2(num_classes=3).eval()
    network = with_features(copy.deepcopy(plain), 32, ["features.1", "features.3", "features.18.1"]).eval()
    image, seen = torch.randn(2, 3, 32, 32), {}
    for name in ("features.1", "features.3", "features.18.1"):
        plain.get_submodule(name).register_forward_hook(lambda m, i, o, name=name: seen.update({name: o.clone()}))
    with torch.no_grad():
        plain(image)
        maps = network(image)[1]["feats"]
    assert all(torch.equal(found, seen[name]) for found, name in zip(maps, seen, strict=True))


def test_tokens_and_channels_that_come_last_become_maps():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.head = nn.Conv2d(3, 6, 8, 8), nn.Linear(6, 4)
            self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(5))

        def forward(self, image):
            x = self.patches(image).flatten(2).mT
            x = torch.cat([x.mean(1, keepdim=True), x], 1)  # a class token
            for block in self.blocks:
                x = x + block(x)
            return self.head(x[:, 0])

    network = with_features(Tokens(), 32)
    _, features = network(torch.randn(2, 3, 32, 32))
    assert network._reader.maps == ["blocks.0", "blocks.1", "blocks.2", "blocks.4"]
    assert [f.shape for f in features["feats"]] == [(2, 6, 4, 4)] * 4
    assert features["pooled_feat"].shape == (2, 6)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([(8, 8), (4, 4), (2, 2), (1, 1)], [0, 1, 2, 3]),
        ([(14, 14)] * 12, [2, 5, 8, 11]),
        ([(14, 14)] * 3, [0, 1, 2]),
        ([(8, 8)] * 4 + [(4, 4)] * 3, [3, 6]),
    ],
)
def test_which_intermediates_are_stages(sizes, expected):
    assert stages_of(sizes) == expected


def test_a_network_resizes_and_normalises_for_itself():
    data, own = ([0.5, 0.4, 0.3], [0.2, 0.2, 0.2]), ([0.1, 0.2, 0.3], [0.5, 0.25, 1.0])
    pixels = torch.rand(2, 3, 24, 24)

    def normal(image, mean, std):
        return (image - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]

    network = cifar_model_dict["resnet8"](num_classes=5).eval()
    small = nn.functional.interpolate(pixels, (16, 16), mode="bilinear", align_corners=False, antialias=True)
    expected = network(normal(small, *own))[0]
    keys = list(network.state_dict())
    fitted = with_features(network, 24, input=Input(16, "antialias", data, own))
    torch.testing.assert_close(fitted(normal(pixels, *data))[0], expected, rtol=1e-5, atol=1e-6)
    assert list(fitted.state_dict()) == keys
    assert torch.equal(Input(24, "bilinear", data, data)(pixels), pixels)
    assert not Input(0, "bilinear", data, data).normalises


def options(*more):
    return load_config(options=["DATASET.TYPE", "digits", "DATASET.IMAGE_SIZE", 32, *more])


def test_a_run_builds_them_by_name_with_arguments_maps_and_input(capsys):
    cfg = options("DISTILLER.STUDENT", "timm:test_vit", "DISTILLER.STUDENT_ARGS.img_size", 32,
                  "DISTILLER.STUDENT_ARGS.patch_size", 8, "DISTILLER.STUDENT_MAPS", "[0, 3]")  # fmt: skip
    student = build_student(cfg, 10)
    assert [f.shape[2:] for f in student(torch.zeros(1, 3, 32, 32))[1]["feats"]] == [(4, 4), (4, 4)]
    assert load_config(options=[]).DISTILLER.STUDENT_ARGS == {}
    cfg = options("DISTILLER.STUDENT", "timm:test_vit", "DISTILLER.STUDENT_INPUT.SIZE", 160)
    assert build_student(cfg, 10)(torch.zeros(1, 3, 32, 32))[0].shape == (1, 10)
    assert "student timm:test_vit: images are resized from 32 to 160 pixels (antialias)" in capsys.readouterr().out
    cfg = options("DISTILLER.STUDENT", "timm:deit_tiny_distilled_patch16_224", "DISTILLER.STUDENT_INPUT.SIZE", 224)
    assert build_student(cfg, 10)(torch.zeros(1, 3, 32, 32))[0].shape == (1, 10)  # a network of one size
    assert "student timm:deit_tiny_distilled_patch16_224: maps of 2, 5, 8, 11" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"STUDENT_INPUT\.MEAN and DISTILLER\.STUDENT_INPUT\.STD belong together"):
        build_student(options("DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_INPUT.MEAN", "[0.5, 0.5, 0.5]"), 10)
    cfg = options("DISTILLER.STUDENT", "resnet8", "DISTILLER.STUDENT_INPUT.MEAN", "[0.5, 0.5, 0.5]",
                  "DISTILLER.STUDENT_INPUT.STD", "[0.5, 0.5, 0.5]")  # fmt: skip
    assert build_student(cfg, 10)(torch.zeros(1, 3, 32, 32))[0].shape == (1, 10)
    assert "student resnet8: normalised by the network's own mean and std" in capsys.readouterr().out


def test_a_file_of_the_library_is_a_teacher_or_a_start(tmp_path):
    path = tmp_path / "weights"
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), path)
    cfg = options("DISTILLER.TEACHER", "timm:test_resnet", "DISTILLER.TEACHER_CKPT", str(path),
                  "DISTILLER.STUDENT", "timm:test_resnet", "DISTILLER.STUDENT_CKPT", str(path))  # fmt: skip
    teacher, student = build_teacher(cfg, 10), build_student(cfg, 10)
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


def test_weights_of_another_network_are_refused(tmp_path):
    path = tmp_path / "weights"
    torch.save(timm.create_model("test_vit", num_classes=10).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"teacher timm:test_resnet does not fit.*name the network that"):
        build_teacher(options("DISTILLER.TEACHER", "timm:test_resnet", "DISTILLER.TEACHER_CKPT", str(path)), 10)


def test_a_safetensors_file_is_read_and_a_damaged_one_refused(tmp_path):
    from safetensors.torch import save_file

    path = tmp_path / "weights.safetensors"
    state = timm.create_model("test_resnet", num_classes=10).state_dict()
    save_file(state, path)
    found = load_weights(path)
    assert found.keys() == state.keys() and all(torch.equal(found[key], state[key]) for key in state)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"weights\.safetensors is damaged"):
        load_weights(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnt50", "timm has no network named 'resnt50'; closest: resnet50"),
        ("timm:resnet50.a9_in1k", "timm's resnet50 has no weights named 'a9_in1k'; closest: .*a3_in1k"),
        ("torchvision:resnt50", "torchvision has no classifier named 'resnt50'; closest: resnet50"),
        ("torchvision:fasterrcnn_resnet50_fpn", "torchvision has no classifier named"),
        (":", ": is no name of a network: a factory is written package.module:factory"),
        ("mine/net.py:small", "mine/net.py:small is no name of a network: a factory is written package.module:factory"),
        ("no.such:factory", "no.such:factory: No module named 'no'; a name package.module:factory must lie below"),
        ("math:sine", "math:sine: module math has no 'sine'"),
        ("math:pi", "math:pi: pi is no function and no class"),
        ("math:floor", "DISTILLER.STUDENT math:floor cannot be built"),
        ("builtins:dict", "builtins:dict must return a torch.nn.Module, not dict"),
        ("timm:vit_tiny_patch16_224", "fails on an image of 32x32 .*_INPUT.SIZE 224 .*STUDENT_ARGS.img_size 32"),
    ],
)
def test_what_cannot_be_built_is_refused(name, message):
    with pytest.raises(InputError, match=message):
        build_student(options("DISTILLER.STUDENT", name), 10)


def test_a_pretrained_teacher_of_other_classes_is_refused(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, pretrained, **more: create(*given, **more))  # no download
    cfg = options("DISTILLER.TEACHER", "timm:test_resnet", "DISTILLER.TEACHER_CKPT", "pretrained",
                  "DISTILLER.STUDENT", "timm:test_resnet", "DISTILLER.STUDENT_CKPT", "pretrained")  # fmt: skip
    with pytest.raises(InputError, match="is pretrained for 1000 classes, and data set digits has 10; train a teacher"):
        build_teacher(cfg, 10)
    assert build_student(cfg, 10)(torch.zeros(1, 3, 32, 32))[0].shape == (1, 10)


def test_wrong_arguments_maps_and_second_adaption_are_refused():
    with pytest.raises(InputError, match=r"DISTILLER\.STUDENT timm:test_resnet cannot be built with .*depth"):
        build_student(options("DISTILLER.STUDENT", "timm:test_resnet", "DISTILLER.STUDENT_ARGS.depth", 3), 10)
    with pytest.raises(InputError, match="ResNet has no module 'layer5'; closest: layer"):
        with_features(torchvision.models.resnet18(), 32, ["layer5"])
    with pytest.raises(InputError, match="the output of 'fc' is no map"):
        with_features(torchvision.models.resnet18(), 32, ["fc"])
    with pytest.raises(InputError, match="has the maps 0 to 4, not 9"):
        with_features(timm.create_model("test_resnet"), 32, [9])
    with pytest.raises(InputError, match="has features already"):
        with_features(with_features(torchvision.models.resnet18(), 32), 32)
    with pytest.raises(InputError, match="must return logits"):
        with_features(nn.Conv2d(3, 4, 3), 32)


def test_a_factory_is_code_that_the_command_line_may_name_and_a_file_may_not(tmp_path, monkeypatch):
    (tmp_path / "mine_of_any.py").write_text(
        "from torch import nn\n\n\ndef net(num_classes, width=4):\n    return nn.Sequential(nn.Conv2d(3, width, 3, 2), "
        "nn.ReLU(True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert is_code("mine_of_any:net") and not is_code("timm:resnet18") and not is_code("resnet8")
    (tmp_path / "a.yaml").write_text("DATASET: {TYPE: digits}\nDISTILLER: {STUDENT: 'mine_of_any:net'}\n")
    with pytest.raises(InputError, match=r"DISTILLER\.STUDENT names code"):
        load_config(str(tmp_path / "a.yaml"))
    assert "mine_of_any" not in sys.modules
    for cfg in (
        load_config(str(tmp_path / "a.yaml"), allow_plugins=True),
        options("DISTILLER.STUDENT", "mine_of_any:net", "DISTILLER.STUDENT_ARGS.width", 5),
    ):
        student = build_student(cfg, 10)
        logits, features = student(torch.zeros(2, 3, 32, 32))
        assert logits.shape == (2, 10) and features["pooled_feat"].shape[1] == len(features["feats"][0][0])
    monkeypatch.delitem(sys.modules, "mine_of_any")


def test_a_factory_is_found_below_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "here_of_any").mkdir()
    (tmp_path / "here_of_any" / "net.py").write_text("from torch.nn import Identity as net\n")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.chdir(tmp_path)
    assert isinstance(find_network("here_of_any.net:net")(num_classes=10), nn.Identity)
    assert sys.path[-1] == str(tmp_path)  # what is installed comes first
    for name in ("here_of_any", "here_of_any.net"):
        monkeypatch.delitem(sys.modules, name)


def test_a_network_of_another_table_is_named_with_the_table():
    assert find_network("cifar:resnet8") is cifar_model_dict["resnet8"]
    cfg = options("DATASET.TYPE", "folder", "DATASET.IMAGE_SIZE", 32, "DISTILLER.STUDENT", "cifar:resnet8")
    logits, features = build_student(cfg, 3)(torch.zeros(2, 3, 32, 32))
    assert logits.shape == (2, 3) and len(features["feats"]) == 4
    with pytest.raises(UnknownName, match=r"no ImageNet model named 'resnet8'; .*other networks: cifar:resnet8"):
        imagenet_model_dict["resnet8"]


def test_a_factory_behind_the_name_of_a_table_is_not_executed(tmp_path, monkeypatch):
    (tmp_path / "behind_a_table.py").write_text("net = print\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UnknownName, match="no CIFAR model named 'behind_a_table:net'"):
        find_network("cifar:behind_a_table:net")
    assert "behind_a_table" not in sys.modules


def test_names_of_other_forms_are_looked_up_as_ever():
    with pytest.raises(UnknownName, match="no CIFAR model named 'resnet9'"):
        cifar_model_dict["resnet9"]


def test_networks_of_others_are_listed_by_pattern(capsys):
    list_command(["models", "timm:test_v*", "torchvision:swin_v2_t"])
    lines = capsys.readouterr().out.split("\n")
    assert lines[0].split() == ["MODEL", "PUBLIC", "WEIGHTS"]
    assert any(line.split() == ["timm:test_vit", "r160_in1k"] for line in lines)
    assert any(line.split() == ["torchvision:swin_v2_t", "IMAGENET1K_V1"] for line in lines)
    with pytest.raises(InputError, match="library: no 'tim'; closest: timm"):
        list_command(["models", "tim:resnet*"])
