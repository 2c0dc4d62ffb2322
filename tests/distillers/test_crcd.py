"""CRCD: its losses against ``oracles/crcd.py`` and the authors' values, its banks, and its last epochs."""

import math

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by
from golden_data import assert_golden, assert_golden_gradients, case_leaves, case_tensors, load_case, loss_cases
from method_cases import build, config, make_batch
from oracles import crcd as oracle
from oracles.compare import assert_agree
from torch import nn

from mdistiller.distillers.CRCD import RelationMemory, gradient_loss, relations
from mdistiller.distillers.CRD import Embed, nce_loss
from mdistiller.engine.build import build_distiller
from mdistiller.models import cifar_model_dict


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_contrast_equals_the_formula():
    index, places = torch.tensor([2, 0]), torch.tensor([[2, 4, 1], [0, 3, 5]])
    bank, z = F.normalize(rows(6, 3), dim=1), 40.0

    def library(embedding, bank):
        memory = RelationMemory(3, 6, 2, 0.5, 0.5)
        scores = memory.scores(embedding, bank.detach(), index, places) / 0.5
        return nce_loss(scores - math.log(z), 6)

    assert_agree(
        library, lambda e, b: oracle.contrast_loss(e, b, index.tolist(), places.tolist(), z, 0.5),
        F.normalize(rows(2, 3, seed=1), dim=1), bank, wrt=(0, 1),
    )  # fmt: skip


def test_gradient_element_equals_the_formula():
    target = torch.tensor([0, 2])
    assert_agree(
        lambda *given: gradient_loss(*given, target), lambda *given: oracle.gradient_loss(*given, target.tolist()),
        rows(2, 3), rows(3, 4, seed=1), rows(2, 3, seed=2), rows(3, 4, seed=3), wrt=(0, 1, 2, 3),
    )  # fmt: skip


def test_gradient_element_is_of_autograds_gradients():
    pooled, target = [rows(4, 5).requires_grad_(), rows(4, 5, seed=1).requires_grad_()], torch.tensor([0, 2, 1, 1])
    layers = [nn.Linear(5, 3).double() for _ in pooled]
    logits = [layer(x) for layer, x in zip(layers, pooled, strict=True)]
    gradients = [torch.autograd.grad(F.cross_entropy(z, target), x)[0] for z, x in zip(logits, pooled, strict=True)]
    logits = [layer(x) for layer, x in zip(layers, pooled, strict=True)]
    found = gradient_loss(logits[0], layers[0].weight, logits[1], layers[1].weight, target)
    torch.testing.assert_close(found, 1 - F.cosine_similarity(*gradients, dim=1).mean())
    assert gradient_loss(logits[0], layers[0].weight, logits[0], layers[0].weight, target).abs() < 1e-12


@pytest.mark.parametrize("case", loss_cases("crcd"))
def test_golden_values_gradients_and_banks(case):
    given, options = case_leaves(case), case["hyperparameters"]
    if "target" in given:
        classifiers = []
        for side in "st":
            classes, width = given[f"param.fc_{side}.weight"].shape
            classifiers.append(load_case(nn.Linear(width, classes), given, f"param.fc_{side}."))
        pairs = [(fc(given[f"pooled_{side}"]), fc.weight) for side, fc in zip("st", classifiers, strict=True)]
        assert_golden(case, given, gradient_loss(*pairs[0], *pairs[1], given["target"]))
        return
    assert options["embed_type"] == "linear"
    modules = nn.ModuleDict({f"embed_{k}": Embed(given[f"pooled_{k}_0"].shape[1], options["feat_dim"]) for k in "st"})
    modules["contrast"] = RelationMemory(
        options["feat_dim"], options["num_data"], options["K"], options["temperature"], options["momentum"]
    )
    modules = load_case(modules, given)
    modules["contrast"].temperature = modules["contrast"].params[1].item()  # kept in float32 there
    for call in range(options["calls"]):
        embedded = (modules[f"embed_{k}"](given[f"pooled_{k}_{call}"]) for k in "st")
        ratios = modules["contrast"](*embedded, given[f"index_{call}"], given[f"contrast_index_{call}"])
        loss = sum(nce_loss(log_ratio, options["num_data"]) for log_ratio in ratios)
        assert loss.item() == pytest.approx(case["outputs"][f"loss_call_{call}"], rel=1e-7)
    loss.backward()
    assert_golden_gradients(case, given)
    for name, expected in case_tensors(case, "after").items():
        torch.testing.assert_close(modules.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


def test_relations():
    """An anchor's relation to itself is the direction of the shift."""
    x = rows(3, 4)
    found = relations(x, x)
    torch.testing.assert_close(found[1, 1], torch.full((4,), 0.5, dtype=torch.float64))
    torch.testing.assert_close(found[0, 1], F.normalize(x[1] - x[0] + 1e-6, dim=0))
    torch.testing.assert_close(RelationMemory(4, 5, 2, 0.05, 0.5).memory_v1.norm(dim=1), torch.ones(5))


def test_the_last_epochs_train_on_the_labels_alone():
    distiller, batch = build("CRCD", {"SOLVER.EPOCHS": 250}), make_batch("CRCD")
    names = {epoch: set(distiller(**batch, epoch=epoch)[1]) for epoch in (240, 241)}
    assert names == {240: {"loss_ce", "loss_kd", "loss_feat", "loss_gradient"}, 241: {"loss_ce"}}


def test_product_is_what_was_published():
    batch, found = make_batch("CRCD"), {}
    for kind in ("sum", "product", "off"):
        found[kind] = build("CRCD", {"CRCD.GRADIENT": kind})(**batch, epoch=1)[1]
    torch.testing.assert_close(
        found["product"]["loss_gradient"], found["sum"]["loss_gradient"] * found["sum"]["loss_kd"]
    )
    assert "loss_gradient" not in found["off"]


def test_pairs_of_other_widths_go_without_gradient_element(capsys):
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet8x4"))
    distiller = build_distiller(config("CRCD"), student, teacher, num_data=8).train()
    assert "64 and 256 entries, so it goes without gradient element" in capsys.readouterr().out
    assert "loss_gradient" not in distiller(**make_batch("CRCD"), epoch=1)[1]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"NCE.TEMPERATURE": 0.5}, "loss_feat"), ({"LOSS.FEAT_WEIGHT": 2.0}, "loss_feat"), ({"T": 2.0}, "loss_kd"),
        ({"LOSS.GRADIENT_WEIGHT": 1.0}, "loss_gradient"),
    ],
)  # fmt: skip
def test_keys_change_what_they_name(values, changed):
    assert changed_by("CRCD", values) == {changed}
