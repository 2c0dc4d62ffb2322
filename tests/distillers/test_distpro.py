"""DistPro: weights and loss against ``oracles/distpro.py`` and the reference's values, the search, and the replay."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import maps
from golden_data import assert_golden, case_leaves, listed, load_case, loss_cases
from method_cases import CLASSES, config, make_batch
from oracles import distpro as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.DistPro import Connector, DistPro, Process, Search, distpro_loss, path_weights
from mdistiller.functional import at_least_float32
from mdistiller.models import cifar_model_dict


@pytest.mark.parametrize("biased", [False, True])
def test_equals_the_formula(biased):
    (first, first_t), (second, second_t) = maps((2, 2), side=2, images=1), maps((1, 1), side=3, images=1, seed=1)

    def library(alpha, *maps_s):
        maps_t = [f.to(alpha.dtype) for f in (first_t, second_t)]
        return distpro_loss(maps_s, maps_t, path_weights(at_least_float32(alpha), biased))

    def loops(alpha, *maps_s):
        return oracle.distpro_loss(maps_s, [first_t.tolist(), second_t.tolist()], alpha, biased)

    assert_agree(library, loops, [0.5, -1.0], first, second, wrt=(0, 1, 2))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("distpro"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    maps_s, maps_t = listed(given, "preact_s_"), listed(given, "preact_t_")
    alpha, mapped = given["param.alpha"], []
    for number, (t, s) in enumerate(options["connections"]):
        connector = Connector(maps_s[s].shape[1], maps_t[t].shape[1])
        load_case(connector, given, f"param.Connectors.{number}.")
        mapped.append(connector(maps_s[s], maps_t[t].shape[2:]))
    weights = path_weights(alpha, biased=options["alpha_normalization_style"] == 333)
    targets = [maps_t[t] for t, _ in options["connections"]]
    assert_golden(case, given, options["kd_weight"] * distpro_loss(mapped, targets, weights))


def build(values=None, dtype=torch.float64):
    torch.manual_seed(0)
    networks = [cifar_model_dict["resnet8"][0](num_classes=CLASSES) for _ in range(2)]
    values = {f"DISTPRO.{key}": value for key, value in (values or {}).items()}
    values |= {"DATASET.IMAGE_SIZE": 8, "SOLVER.EPOCHS": 5, "SOLVER.LR_DECAY_STAGES": []}
    return DistPro(*networks, config("DISTPRO", values)).to(dtype).train()


def test_paths_lead_to_equally_deep_or_shallower_maps():
    distiller = build()
    assert distiller.paths == [(t, s) for t in range(4) for s in range(t, 4)]
    assert distiller.weights_in(1) == pytest.approx([10 / 11] * 10)


def test_the_process_is_stretched_over_the_training_clipped_and_saved():
    distiller = build({"SEARCH_EPOCHS": 2})
    distiller.process.put([[1.0] * 10, [3.0] + [-1.0] * 9])
    for epoch, share in ((1, 0.0), (2, 0.25), (5, 1.0), (100, 1.0)):
        alpha = torch.tensor([1.0] * 10).lerp(torch.tensor([3.0] + [-1.0] * 9), share)
        expected = path_weights(alpha, biased=True).tolist()
        assert distiller.weights_in(epoch) == pytest.approx([w if w >= 0.5 else 0.0 for w in expected])
    assert distiller.weights_in(5)[1:] == [0.0] * 9
    again = build({"SEARCH_EPOCHS": 2})
    again.load_state_dict(distiller.state_dict())
    assert again.weights_in(3) == distiller.weights_in(3)
    assert Process(0, 3, 4).weights == [pytest.approx([0.75] * 3)] * 4


def test_clipped_paths_are_not_computed():
    distiller, batch = build({"SEARCH_EPOCHS": 1}), make_batch("DISTPRO", dtype=torch.float64, size=8)
    distiller.process.put([[9.0] + [0.0] * 9])
    logits, losses = distiller(**batch, epoch=1)
    target = distiller.teacher(batch["image"])[1]["preact_feats"][0]
    first = distiller.connectors[0](distiller.student(batch["image"])[1]["preact_feats"][0], target.shape[2:])
    torch.testing.assert_close(losses["loss_kd"], distpro_loss([first], [target], distiller.weights_in(1)[:1]))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    distiller.process.put([[-99.0] * 10])
    assert distiller(**batch, epoch=1)[1]["loss_kd"] == 0


def halves(batch):
    return [(batch["image"][rows], batch["target"][rows]) for rows in (slice(0, 5), slice(5, 8))]


def test_alphas_gradient_is_the_one_through_the_students_step():
    """Against the difference quotient of the held-out cross-entropy after a step, alpha by alpha."""
    distiller = build({"SEARCH_LR": 0.01})
    train, held = halves(make_batch("DISTPRO", dtype=torch.float64, size=8))
    search = Search(distiller, lambda: torch.autocast("cpu", enabled=False))
    before = [p.detach().clone() for p in search.params]
    found = search.gradient_of_alpha(train, held)
    assert all(torch.equal(p, q) for p, q in zip(search.params, before, strict=True))

    def after(number, by):
        with torch.no_grad():
            search.alpha[number] += by
        gradients = torch.autograd.grad(search.loss(*train), search.params, allow_unused=True, materialize_grads=True)
        moves = [g + search.decay * p for p, g in zip(before, gradients, strict=True)]
        search.move(before, moves, -search.rate)
        with torch.no_grad():
            loss = F.cross_entropy(search.student(held[0])[0], held[1])
            search.alpha[number] -= by
        search.move(before, moves, 0.0)
        return loss.item()

    quotients = torch.tensor([(after(n, 0.01) - after(n, -0.01)) / 0.02 for n in range(10)], dtype=torch.float64)
    assert F.cosine_similarity(found, quotients, dim=0) > 0.99
    assert found.norm().item() == pytest.approx(quotients.norm().item(), rel=0.05)


def test_the_search_leaves_the_method_alone_and_its_process_is_kept():
    distiller = build({"SEARCH_EPOCHS": 2}, torch.float32)
    batch = make_batch("DISTPRO", size=8)
    before = {name: x.clone() for name, x in distiller.state_dict().items() if not name.startswith("process")}
    facts = distiller.prepare(lambda epoch: [batch], lambda: torch.autocast("cpu", enabled=False))
    assert all(torch.equal(x, before[name]) for name, x in distiller.state_dict().items() if name in before)
    assert facts["alpha"] == pytest.approx(distiller.process.alpha[-1].tolist())
    assert len(set(distiller.weights_in(1))) > 1
    assert build({"SEARCH_EPOCHS": 0}).prepare(None, None) == {}


def test_connectors_of_clipped_paths_have_a_gradient():
    """torch's fused SGD fails where a parameter's first gradient comes late."""
    distiller = build({"SEARCH_EPOCHS": 1})
    distiller.process.put([[9.0] + [0.0] * 9])
    batch = make_batch("DISTPRO", dtype=torch.float64, size=8)
    sum(distiller(**batch, epoch=1)[1].values()).backward()
    assert all(p.grad is not None for p in distiller.connectors.parameters())
