"""A small network of every family of timm: logits, state dict, maps and copies. ``test_any.py`` has twelve families."""

import copy

import pytest
import timm
import torch

from mdistiller.models.any import with_features
from mdistiller.models.facts import facts_of

pytestmark = pytest.mark.slow
FEWEST = 3  # of a family's networks whose parameters are counted
SMALL = (
    "test_",
    "femto",
    "atto",
    "pico",
    "xxs",
    "nano",
    "_050",
    "tiny",
    "_xs",
    "_t0",
    "small",
    "_s",
    "18",
    "_a0",
    "b0",
)
FAMILIES = [name for name in timm.list_modules() if timm.list_models(module=name)]
REAL = (  # compiled whole, in bfloat16 and channels last; with their image sizes
    "test_resnet", "resnet10t", "resnet18d", "mobilenetv3_small_050", "tf_efficientnet_b0", "repvgg_a0", "regnetx_002",
    "convnext_atto", "densenet121", "ghostnet_050", "mobilevit_xxs", "pvt_v2_b0", "test_vit", "mixnet_s",
    "hardcorenas_a", "lcnet_035", "mobileone_s0", "fastvit_t8", "starnet_s1", "edgenext_xx_small", "efficientvit_b0",
)  # fmt: skip


def rank(name):
    return (next((place for place, word in enumerate(SMALL) if word in name), len(SMALL)), len(name), name)


def smallest(family):
    """The network with the fewest parameters of the most promising ones, on the meta device."""
    found = {}
    for name in sorted(timm.list_models(module=family), key=rank)[:FEWEST]:
        with torch.device("meta"):
            network = timm.create_model(name, num_classes=7)
        found[name] = sum(parameter.numel() for parameter in network.parameters()), network
    name = min(found, key=lambda each: found[each][0])
    return name, found[name][1]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(family):
    name, plain = smallest(family)
    if name.startswith("gemma"):
        pytest.skip("reads numbers of its input, which the meta device has not")
    size = plain.pretrained_cfg["input_size"][-1]
    expected = list(plain.state_dict())
    network = with_features(plain.eval(), size)
    image = torch.zeros(2, 3, size, size, device="meta")
    for each in (network, copy.deepcopy(network)):
        logits, features = each(image)
        assert logits.shape == (2, 7) and features["pooled_feat"].shape[0] == 2
        assert 1 <= len(features["feats"]) <= 6 and all(each.ndim == 4 for each in features["feats"])
    info = network.feature_info
    channels = [info[int(number)]["num_chs"] for number in network.map_names]
    assert [each.shape[1] for each in features["feats"]] == channels
    assert list(network.state_dict()) == expected


@pytest.mark.parametrize("name", REAL)
def test_a_real_network(name):
    torch.manual_seed(0)
    size = 160 if name == "test_vit" else 64
    plain = timm.create_model(name, num_classes=7).eval()
    network = with_features(copy.deepcopy(plain), size)
    image = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = plain(image)
        assert torch.equal(network(image)[0], expected)
        torch.compiler.reset()
        found, features = torch.compile(network, backend="eager", fullgraph=True)(image)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    facts = facts_of(network, (size, size))
    assert [each.shape[1] for each in features["feats"]] == facts.channels
    network = network.train().to(memory_format=torch.channels_last)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits, features = network(image.to(memory_format=torch.channels_last))
        loss = logits.float().square().sum() + sum(each.float().square().mean() for each in features["feats"])
    loss.backward()
    gradients = [parameter.grad for parameter in network.parameters() if parameter.requires_grad]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
