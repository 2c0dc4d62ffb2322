"""NORM, NORM_CRD: the loss against ``oracles/norm.py`` and the reference's values, and the deployed network."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, maps
from golden_data import assert_golden, case_leaves, loss_cases
from method_cases import build, config, make_batch
from oracles import norm as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.NORM import NORM, Expanded, norm_loss, normalised
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError


@pytest.mark.parametrize("parts", [1, 3])
def test_equals_the_formula(parts):
    wide, f_t = maps((2 * parts, 2), side=2)
    assert_agree(lambda w: norm_loss(w, f_t.to(w.dtype)), lambda w: oracle.norm_loss(w, f_t.tolist()), wide)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("norm"))
def test_golden_values_and_gradients(case, dtype):
    """Of the authors' training loop, with the factor of the epoch that our schedule has."""
    given, options, rel = case_leaves(case, dtype), case["hyperparameters"], 1e-7 if dtype == torch.float64 else 1e-4
    own = config("NORM").NORM
    factor = own.SCHEDULE[sum(options["epoch"] >= epoch for epoch in own.SCHEDULE_EPOCHS)]
    assert factor == options["beta1 (schedule)"]
    student, teacher = (normalised(given[f"logits_{net}"], options["ceta"]) for net in ("student", "teacher"))
    ce, norm = F.cross_entropy(student, given["target"]), norm_loss(given["feat_s_0"], given["feat_t_0"])
    assert ce.item() == pytest.approx(case["outputs"]["loss_ce"], rel=rel)
    assert norm.item() == pytest.approx(case["outputs"]["loss_norm"], rel=rel)
    loss = options["gamma"] * ce + options["beta"] * factor * norm
    assert_golden(case, given, loss + options["alpha"] * kd_loss(student, teacher, options["T"]))


def test_zero_where_every_part_is_the_teachers_map_and_pooling_takes_the_largest():
    (f_t,) = maps((3,))
    assert norm_loss(f_t.repeat(1, 4, 1, 1), f_t) == 0
    large = F.pad(f_t[:, :, :, None, :, None] + 0, (0, 1, 0, 0, 0, 1), value=-99.0).reshape(2, 3, 8, 8)
    for wide, target in ((large, f_t), (f_t, large)):
        assert norm_loss(wide, target) == 0


def test_normalised_logits():
    z = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(
        normalised(z, 2.5).std(1, correction=0), torch.full((4,), 2.5).double(), rtol=1e-6, atol=0
    )
    assert torch.equal(normalised(z, 2.5).argmax(1), z.argmax(1)) and normalised(z, 0.0) is z


def test_the_deployed_network_is_the_student_with_the_expansion():
    distiller, images = build("NORM").eval(), make_batch("NORM")["image"]
    network = distiller.deployed()
    assert isinstance(network, Expanded)
    assert {key.split(".")[0] for key in network.state_dict()} == {"student", "expansion"}
    wide = distiller.expansion.widen(distiller.student(images)[1]["feats"][-1])
    maps = distiller.student(images)[1]["feats"][-1] + distiller.expansion.narrow(wide)
    expected = normalised(distiller.student.fc(maps.mean((2, 3))), 2.5)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)
    assert wide.shape[1] == 8 * 64


@pytest.mark.parametrize("student", ["wrn_16_1", "MobileNetV2", "ShuffleV2"])
def test_without_a_change_of_the_map_the_deployed_network_is_the_student(student):
    """The expansion stands where the network pools."""
    networks = (cifar_model_dict[name][0](num_classes=10) for name in (student, "resnet8"))
    distiller = NORM(*networks, config("NORM", {"NORM.LOGIT_SCALE": 0.0})).eval()
    torch.nn.init.zeros_(distiller.expansion.narrow[0].weight)
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(distiller(image=images), distiller.student(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["NORM", "NORM_CRD"])
def test_losses_are_the_parts(method):
    distiller, batch = build(method, {f"{method}.LOSS.KD_WEIGHT": 1.0}), make_batch(method)
    logits, losses = distiller(**batch, epoch=20)
    _, _, wide = distiller.deployed().parts(batch["image"])
    logits_t, features_t = distiller.teacher(batch["image"])
    torch.testing.assert_close(losses["loss_ce"], 0.5 * F.cross_entropy(logits, batch["target"]))
    torch.testing.assert_close(losses["loss_kd"], norm_loss(wide, features_t["feats"][-1]))
    torch.testing.assert_close(losses["loss_logits"], kd_loss(logits, normalised(logits_t, 2.5), 4.0))
    assert ("loss_crd" in losses) == (method == "NORM_CRD")
    _, early = build(method, {f"{method}.LOSS.KD_WEIGHT": 1.0})(**batch, epoch=1)
    torch.testing.assert_close(early["loss_kd"], 0.1 * losses["loss_kd"])


def test_a_schedule_must_fit_its_epochs():
    with pytest.raises(InputError, match=r"NORM\.SCHEDULE must have one entry more than SCHEDULE_EPOCHS"):
        build("NORM", {"NORM.SCHEDULE": [1.0]})


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"N": 2}, {"loss_kd", "loss_ce"}),
        ({"LOGIT_SCALE": 1.0}, {"loss_ce"}),
        ({"SCHEDULE": [1.0], "SCHEDULE_EPOCHS": []}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
    ],
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("NORM", values) == changed
