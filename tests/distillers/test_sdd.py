"""SDD: its loss against ``oracles/sdd.py`` and the authors' values, its regions, and the three methods."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by
from golden_data import assert_golden, case_leaves, case_tensors, loss_cases
from method_cases import build, config, make_batch
from oracles import sdd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.SDD import region_features, sdd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict
from mdistiller.models._features import pooled_map
from mdistiller.models.facts import facts_of
from mdistiller.registry import InputError

TARGET = torch.tensor([0, 2, 1])
ROWS = {
    "kd": lambda s, t, y, T: kd_loss(s, t, T, reduce=False),
    "dkd": lambda s, t, y, alpha, beta, temperature: dkd_loss(s, t, y, alpha, beta, temperature, reduce=False),
    "nkd": lambda s, t, y, gamma, temp: nkd_loss(s, t, y, gamma, temp, target_among_others=True, reduce=False),
}
CASES = loss_cases("sdd")
PYRAMIDS = [case for case in CASES if "feature_map" in case.values[0]["inputs"]]
each_method = pytest.mark.parametrize("method", ["SDD_KD", "SDD_DKD", "SDD_NKD"])


def regions():
    generator = torch.Generator().manual_seed(0)
    return [3 * torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(2)]


def test_equals_the_formula():
    assert_agree(
        lambda s, t: sdd_loss(s, t, TARGET, lambda *rows: ROWS["kd"](*rows, T=4.0)),
        lambda s, t: oracle.sdd_kd_loss(s, t, TARGET.tolist(), 4.0),
        *regions(), wrt=(0, 1),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in PYRAMIDS])
def test_golden_losses_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    (row,) = [loss for name, loss in ROWS.items() if f"_{name}_" in case["case"]]
    loss = sdd_loss(
        given["patch_logits_student"], given["patch_logits_teacher"], given["target"],
        lambda *rows: row(*rows, **options),
    )  # fmt: skip
    assert_golden(case, given, loss)


@pytest.mark.parametrize("case", PYRAMIDS)
def test_golden_regions(case):
    scales = [int(digit) for digit in case["hyperparameters"]["M"].strip("[]").split(",")]
    found = region_features(case_tensors(case, "in")["feature_map"], scales)
    torch.testing.assert_close(found, case_tensors(case, "out")["x_feature"])


def test_the_whole_image_is_the_mean_for_any_size():
    maps = torch.rand(2, 3, 7, 7)
    torch.testing.assert_close(region_features(maps, (1, 2, 4))[:, :, 0], maps.mean((2, 3)))


@pytest.mark.parametrize("name", ["resnet8", "wrn_16_1", "vgg8", "MobileNetV2", "ShuffleV1", "ShuffleV2", "ResNet18"])
def test_the_logits_of_the_whole_map_are_the_network_s(name):
    """So the map is the one that the classifier sees, also behind a last batch norm or convolution."""
    torch.manual_seed(0)
    network = cifar_model_dict[name][0](num_classes=10).eval()
    logits, features = network(torch.randn(2, 3, 32, 32))
    facts = facts_of(network, (32, 32))
    whole = region_features(pooled_map(features), (1,)).squeeze(2)
    assert whole.shape[1] == facts.need("pooled_map")[1]
    torch.testing.assert_close(network.get_submodule(facts.classifier)(whole), logits, rtol=1e-4, atol=1e-4)


@each_method
def test_one_scale_is_the_plain_method(method):
    plain = method.removeprefix("SDD_")
    values = {f"{method}.SCALES": [1]} | ({"SDD_DKD.WARMUP": 0} if plain == "DKD" else {})
    values |= {"SDD_NKD.WARMUP": 0} if plain == "NKD" else {}
    batch, losses = make_batch(method), []
    for name, given in ((method, values), (plain, {"DKD.WARMUP": 0} if plain == "DKD" else {})):
        losses.append(build(name, given)(**batch, epoch=1)[1])
    assert losses[0].keys() == losses[1].keys()
    for name, loss in losses[0].items():
        torch.testing.assert_close(loss, losses[1][name])


def test_losses_are_the_parts():
    distiller, batch = build("SDD_KD"), make_batch("SDD_KD")
    _, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    logits = []
    for net in (distiller.student, distiller.teacher):
        cells = region_features(net(batch["image"])[1]["feats"][-1], (1, 2, 4))
        logits.append(torch.stack([net.fc(cells[:, :, n]) for n in range(21)], dim=2))
    expected = sdd_loss(*logits, batch["target"], lambda s, t, y: kd_loss(s, t, 4.0, reduce=False))
    torch.testing.assert_close(losses["loss_kd"], 0.9 * expected)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("SDD_KD", {"SCALES": [1, 2]}), ("SDD_KD", {"T": 2.0}), ("SDD_KD", {"LOSS.KD_WEIGHT": 2.0}),
        ("SDD_DKD", {"BETA": 2.0}), ("SDD_DKD", {"WARMUP": 0}), ("SDD_NKD", {"GAMMA": 2.0}),
        ("SDD_NKD", {"TARGET_AMONG_OTHERS": True}),
    ],
)  # fmt: skip
def test_keys_change_what_they_name(method, values):
    assert changed_by(method, values) == {"loss_kd"}


def test_other_pyramids_and_networks_without_the_map_are_refused():
    with pytest.raises(InputError, match=r"SDD_KD\.SCALES must be \[1\], \[1, 2\] or \[1, 2, 4\], got"):
        config("SDD_KD", {"SDD_KD.SCALES": [2, 4]})

    class Tail(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.tail, self.fc = torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 1), torch.nn.Linear(4, 10)

        def forward(self, x):
            x = self.conv(x)
            pooled = F.relu(self.tail(x)).mean((2, 3))
            return self.fc(pooled), {"feats": [x], "pooled_feat": pooled}

    with pytest.raises(InputError, match=r"the student Tail must return .* in features\['pooled_map'\]"):
        build_distiller(config("SDD_KD"), Tail(), Tail())
