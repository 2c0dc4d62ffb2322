"""DML: its losses against ``oracles/dml.py`` and the reference's values, and its two networks."""

import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden, case_leaves, listed, loss_cases
from method_cases import CLASSES, config, make_batch
from oracles import dml as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.DML import DML, dml_losses
from mdistiller.models import cifar_model_dict


def logits(count, images=4, classes=5):
    return [*torch.randn(count, images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("count", [2, 3])
def test_equals_the_formula(count):
    assert_agree(lambda *z: tuple(dml_losses(z)), oracle.dml_losses, *logits(count), wrt=range(count))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("dml"))
def test_golden_values_and_gradients(case, dtype):
    given, exact = case_leaves(case, dtype), dtype == torch.float64
    assert case["hyperparameters"]["T"] == 1
    networks = listed(given, "logits_")
    losses = [
        F.cross_entropy(z, given["target"]) + distance
        for z, distance in zip(networks, dml_losses(networks), strict=True)
    ]
    for number, loss in enumerate(losses):
        assert loss.item() == pytest.approx(case["outputs"][f"loss_net_{number}"], rel=1e-7 if exact else 1e-4)
    assert_golden(case, given, sum(losses))


def test_equal_networks_learn_from_the_labels_only():
    z = logits(2)[0].requires_grad_()
    for loss in dml_losses([z, z]):
        assert loss.abs() < 1e-12
        (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
        torch.testing.assert_close(gradient, torch.zeros_like(z))


def build(values=None):
    torch.manual_seed(0)
    networks = [cifar_model_dict[name][0](num_classes=CLASSES) for name in ("resnet8", "resnet14")]
    return DML(*networks, config("DML", values)).train()


def test_losses_are_the_parts_of_both_networks():
    distiller, batch = build(), make_batch("DML")
    logits, losses = distiller(**batch, epoch=1)
    of_peer, _ = distiller.peer(batch["image"])
    for name, expected in zip(("loss_kd", "loss_kd_peer"), dml_losses([logits, of_peer]), strict=True):
        torch.testing.assert_close(losses[name], expected)
    torch.testing.assert_close(losses["loss_ce_peer"], F.cross_entropy(of_peer, batch["target"]))
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in distiller.parameters())


def test_who_is_deployed():
    images = make_batch("DML")["image"]
    for name in ("student", "peer"):
        distiller = build({"DML.DEPLOYED": name})
        assert distiller.deployed() is getattr(distiller, name)
        torch.testing.assert_close(distiller(**make_batch("DML"))[0], getattr(distiller, name)(images)[0])


def test_without_its_own_term_each_network_trains_plainly_to_the_bit():
    distiller, batch = build({"DML.LOSS.KD_WEIGHT": 0.0}), make_batch("DML")
    plain = build().student
    sum(distiller(**batch, epoch=1)[1].values()).backward()
    F.cross_entropy(plain(batch["image"])[0], batch["target"]).backward()
    for p, q in zip(distiller.student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_both_networks_are_trained_and_saved():
    distiller = build()
    trained = {id(p) for p in distiller.get_learnable_parameters()}
    assert {id(p) for p in distiller.parameters()} == trained
    assert {key.split(".")[0] for key in distiller.state_dict()} == {"student", "peer"}
    assert distiller.peer.training and not distiller.frozen_networks()
