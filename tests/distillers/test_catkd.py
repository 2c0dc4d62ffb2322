"""CAT-KD: its loss against ``oracles/catkd.py`` and the reference's values, its maps, and its networks."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_finite, assert_float32_under_autocast, changed_by, maps
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, config, make_batch
from oracles import catkd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.CATKD import CATKD, binary, cat_loss, class_activation_maps
from mdistiller.models import cifar_model_dict
from mdistiller.models._features import pooled_map
from mdistiller.registry import InputError


@pytest.mark.parametrize(("resolution", "normalise"), [(1, True), (2, True), (2, False), (4, True)])
def test_equals_the_formula(resolution, normalise):
    cam_s, cam_t = maps((3, 3))
    assert_agree(
        lambda s: cat_loss(s, cam_t.to(s.dtype), resolution, normalise),
        lambda s: oracle.cat_loss(s, cam_t.tolist(), resolution, normalise),
        cam_s,
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("catkd"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    cam_t, kept, weight, ce = given["feat_t_0"], None, 1.0, 0.0
    if "target" in given:
        weight = options["CAT_loss_weight"]
        ce = options["CE_WEIGHT"] * F.cross_entropy(given["logits_student"], given["target"])
        if options["IF_BINARIZE"]:
            cam_t = binary(cam_t)
        if options["IF_OnlyTransferPartialCAMs"]:
            assert options["Strategy"] == 0
            kept = given["logits_teacher"].topk(options["CAMs_Nums"] - 1).indices  # one less than the code's key says
    loss = cat_loss(given["feat_s_0"], cam_t, options["CAM_RESOLUTION"], options["IF_NORMALIZE"], kept)
    assert_golden(case, given, ce + weight * loss)


@pytest.mark.parametrize("network", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2"])
def test_the_mean_of_a_map_is_the_logit_without_bias(network):
    """Also where the pooled map is none of the stages'."""
    net = cifar_model_dict[network][0](num_classes=10).eval()
    distiller = CATKD(net, cifar_model_dict["resnet8"][0](num_classes=10), config("CATKD"))
    classifier = net.get_submodule(distiller.classifiers[0])
    with torch.no_grad():
        logits, features = net(torch.randn(2, 3, 32, 32))
        cam = class_activation_maps(pooled_map(features), classifier.weight)
    torch.testing.assert_close(cam.mean((2, 3)), logits - classifier.bias, rtol=1e-4, atol=1e-5)


def test_only_the_pattern_of_normalised_maps_counts():
    cam_s, cam_t = maps((3, 3))
    torch.testing.assert_close(cat_loss(30 * cam_s, 0.1 * cam_t), cat_loss(cam_s, cam_t))
    assert cat_loss(cam_s, cam_s, normalise=False) == 0
    torch.testing.assert_close(cat_loss(cam_s, cam_t, kept=torch.tensor([[2, 0, 1]] * 2)), cat_loss(cam_s, cam_t))
    torch.testing.assert_close(
        cat_loss(cam_s, cam_t, kept=torch.tensor([[1]] * 2)), cat_loss(cam_s[:, 1:2], cam_t[:, 1:2])
    )


@pytest.mark.parametrize("value", [0.0, 1e4])
def test_finite_for_flat_maps(value):
    _, cam_t = (x.float() for x in maps((3, 3)))
    assert_finite(lambda x: cat_loss(x, cam_t), torch.full((2, 3, 4, 4), value), largest=1.0)


def test_half_precision_is_computed_in_float32():
    assert_float32_under_autocast(cat_loss, maps((3, 3)))


def test_losses_are_the_parts():
    distiller, batch = build("CATKD"), make_batch("CATKD")
    logits, losses = distiller(**batch, epoch=1)
    cams = [
        class_activation_maps(net(batch["image"])[1]["feats"][-1], net.fc.weight)
        for net in (distiller.student, distiller.teacher)
    ]
    torch.testing.assert_close(losses["loss_kd"], 400 * cat_loss(*cams))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"RESOLUTION": 1}, {"loss_kd"}),
        ({"NORMALISE": False}, {"loss_kd"}),
        ({"BINARISE": True}, {"loss_kd"}),
        ({"TOP_CLASSES": 2}, {"loss_kd"}),
        ({"TOP_CLASSES": 99}, set()),  # there are 10
        ({"LOSS.CE_WEIGHT": 0.0}, {"loss_ce"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("CATKD", values) == changed


def test_a_network_whose_classifier_sees_no_map_is_refused():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 10)

        def forward(self, image):
            f = self.conv(image)
            return self.fc(f.amax((2, 3)) + 1), {"feats": [f], "pooled_feat": f.amax((2, 3)) + 1}

    with pytest.raises(InputError, match=r"the student Other must return .*pooled_map"):
        CATKD(Other(), cifar_model_dict["resnet8"][0](num_classes=10), config("CATKD"))
