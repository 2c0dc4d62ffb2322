"""DCD's loss against the reference's values and the formula written out, at the ends, and what is learned."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import golden_dir
from method_cases import build, config, make_batch, total

from mdistiller.distillers._common import pooled_width
from mdistiller.distillers.DCD import bounded_scale, dcd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.engine.solver import build_optimizer
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError


def embeddings(images=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(images, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [F.normalize(x, dim=1) for x in given]


def written_out(embed_s, embed_t, tau, b, alpha):
    s, t = embed_s.tolist(), embed_t.tolist()
    n = len(s)
    exp = [[math.exp(tau * sum(x * y for x, y in zip(a, c, strict=True)) + b) for c in t] for a in s]
    rows = [[exp[i][j] / sum(exp[i]) for j in range(n)] for i in range(n)]
    columns = [[exp[j][i] / sum(exp[k][i] for k in range(n)) for j in range(n)] for i in range(n)]
    contrastive = -sum(math.log(rows[i][i]) for i in range(n)) / n
    pairs = [(i, j) for i in range(n) for j in range(n)]
    consistency = sum(columns[i][j] * math.log(columns[i][j] / rows[i][j]) for i, j in pairs) / n
    return contrastive + alpha * consistency


def golden_cases():
    cases = json.loads((golden_dir() / "losses" / "losses.json").read_text())
    return [pytest.param(case, id=case["case"]) for case in cases if case["method"] == "dcd"]


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient", "rounding"),  # b's gradient is rounding, 0 in theory
    [(torch.float64, 1e-7, 1e-6, 1e-14), (torch.float32, 1e-4, 1e-4, 1e-6)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", golden_cases())
def test_golden_values_and_gradients(case, dtype, of_value, of_gradient, rounding):
    arrays = np.load(golden_dir() / "losses" / "dcd.npz")
    given = {
        name: torch.from_numpy(np.asarray(arrays[f"{case['case']}/in/{name}"])).to(dtype) for name in case["inputs"]
    }
    learned = [name for name, shape in case["gradients"].items() if isinstance(shape, list)]  # or a note, "none ..."
    for name in learned:
        given[name].requires_grad_()
    embed_s, embed_t = (
        F.normalize(F.linear(given[f"pooled_{k}"], given[f"param.embed_{k}.weight"], given[f"param.embed_{k}.bias"]))
        for k in "st"
    )
    options, stored = case["hyperparameters"], given["param.params.tau"]
    tau = bounded_scale(stored, options["max_tau"]) if options["trainable"] else stored
    loss = dcd_loss(embed_s, embed_t, tau, given["param.params.b"], options["alpha"])
    loss.backward()
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=of_value, abs=rounding)
    for name in learned:
        expected = torch.from_numpy(np.asarray(arrays[f"{case['case']}/grad/{name}"])).double()
        assert (given[name].grad - expected).abs().max() <= of_gradient * expected.abs().max() + rounding, name


@pytest.mark.parametrize("alpha", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("images", [1, 2, 5])
def test_equals_the_formula(images, alpha):
    embed_s, embed_t = embeddings(images)
    found = dcd_loss(embed_s, embed_t, 2.7, 0.3, alpha).item()
    assert found == pytest.approx(written_out(embed_s, embed_t, 2.7, 0.3, alpha), rel=1e-10, abs=1e-12)


@pytest.mark.parametrize("detach", [False, True])
def test_gradient(detach):
    embed_s, embed_t = (x.requires_grad_() for x in embeddings(3, 3))
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    if not detach:
        assert torch.autograd.gradcheck(lambda *x: dcd_loss(*x, b=0.1), (embed_s, embed_t, tau))
        return
    logits = embed_s @ embed_t.T * tau
    columns = logits.detach().softmax(0).T
    rows = logits.log_softmax(1)
    by_hand = -rows.diagonal().mean() + 0.5 * (columns * (columns.log() - rows)).sum() / 3
    found, expected = (
        torch.autograd.grad(loss, (embed_s, embed_t, tau))
        for loss in (dcd_loss(embed_s, embed_t, tau, 0.0, detach_target=True), by_hand)
    )
    torch.testing.assert_close(found, expected)


def test_blind_to_the_order_of_images_to_a_rotation_and_to_b():
    embed_s, embed_t = embeddings()
    expected, order = dcd_loss(embed_s, embed_t, 3.0, 0.0), torch.randperm(5)
    torch.testing.assert_close(dcd_loss(embed_s[order], embed_t[order], 3.0, 0.0), expected)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    torch.testing.assert_close(dcd_loss(embed_s @ rotation, embed_t @ rotation, 3.0, 0.0), expected)
    b = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    loss = dcd_loss(embed_s, embed_t, 3.0, b)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert abs(b.grad.item()) < 1e-14


def test_pairs_matter():
    embed_s, embed_t = embeddings(6, 32)
    assert dcd_loss(embed_s, embed_s, 10.0, 0.0) < dcd_loss(embed_s, embed_t, 10.0, 0.0)
    assert dcd_loss(embed_s, embed_s, 10.0, 0.0) < dcd_loss(embed_s, embed_s.roll(1, 0), 10.0, 0.0)


def test_a_perfect_match_of_64():
    """Why the scale matters: 1 on the diagonal and 0 off it."""
    eye = torch.eye(64, dtype=torch.float64)
    assert dcd_loss(eye, eye, math.e, 0.0).item() == pytest.approx(1.64, abs=0.005)
    assert dcd_loss(eye, eye, 10.0, 0.0).item() == pytest.approx(0.003, abs=0.0005)


def test_consistency_vanishes_for_symmetric_similarities():
    embed, _ = embeddings()
    torch.testing.assert_close(dcd_loss(embed, embed, 3.0, 0.0, alpha=5.0), dcd_loss(embed, embed, 3.0, 0.0, alpha=0.0))


@pytest.mark.parametrize("tau", [0.0, 1e4, 1e30])
def test_finite_at_extreme_scales(tau):
    embed_s, embed_t = (x.float().requires_grad_() for x in embeddings())
    loss = dcd_loss(embed_s, embed_t, tau, 0.0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(embed_s.grad).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    embed_s, embed_t = (x.to(dtype) for x in embeddings())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = dcd_loss(embed_s, embed_t, 2.7, 0.0)
    assert found.dtype == torch.float32
    assert torch.equal(found, dcd_loss(embed_s.float(), embed_t.float(), 2.7, 0.0))


def test_bounded_scale():
    theta = torch.tensor([1.0, 3.0], requires_grad=True)
    scale = bounded_scale(theta, 10.0)
    scale.sum().backward()
    assert scale.tolist() == pytest.approx([math.e, 10.0]) and theta.grad.tolist() == pytest.approx([math.e, 0.0])


# The method


def test_losses_are_the_parts():
    distiller, batch = build("DCD", {"DCD.LAMBDA": 1.0}), make_batch("DCD")
    logits, losses = distiller(**batch, epoch=1)
    (_, feats_s), (logits_t, feats_t) = (net(batch["image"]) for net in (distiller.student, distiller.teacher))
    embed_s = F.normalize(distiller.embed_s(feats_s["pooled_feat"]))
    embed_t = F.normalize(distiller.embed_t(feats_t["pooled_feat"]))
    torch.testing.assert_close(losses["loss_dcd"], dcd_loss(embed_s, embed_t, math.e, 0.0))
    torch.testing.assert_close(losses["loss_kd"], kd_loss(logits, logits_t, 4.0))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert distiller.get_extra_parameters() == 2 * (64 * 128 + 128) + 2
    assert distiller.monitors["tau"].item() == pytest.approx(math.e)


def losses_of(values):
    return build("DCD", {f"DCD.{key}": value for key, value in values.items()})(**make_batch("DCD"), epoch=1)[1]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"ALPHA": 0.0}, {"loss_dcd"}),
        ({"BETA": 2.0}, {"loss_dcd"}),
        ({"CE_WEIGHT": 0.5}, {"loss_ce"}),
        ({"LAMBDA": 2.0}, {"loss_kd"}),
        ({"TEMPERATURE": 2.0}, {"loss_kd"}),
        ({"INIT_THETA": 0.0}, {"loss_dcd"}),
        ({"MAX_TAU": 2.0}, {"loss_dcd"}),
        ({"FEAT_DIM": 16}, {"loss_dcd"}),
        ({"INIT_B": 2.0}, set()),
        ({"LEARN_TEMPERATURE": False}, set()),
        ({"DETACH_TARGET": True}, set()),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    before, after = losses_of({"LAMBDA": 1.0}), losses_of({"LAMBDA": 1.0, **values})
    assert {k for k in before if not torch.isclose(before[k], after[k], rtol=1e-6, atol=0.0)} == changed


def test_without_kd_there_is_no_such_term():
    assert sorted(losses_of({})) == ["loss_ce", "loss_dcd"]


def test_detached_targets_change_the_gradient():
    def gradient(values):
        distiller = build("DCD", values)
        total(distiller, make_batch("DCD")).backward()
        return distiller.embed_s.weight.grad

    assert not torch.allclose(gradient({"DCD.DETACH_TARGET": True}), gradient({}))


def steps(values, count=3, lr=0.05):
    cfg = config("DCD", {"SOLVER.LR": lr, "SOLVER.WEIGHT_DECAY": 0.1, **values})
    distiller = build("DCD", values)
    optimizer = build_optimizer(cfg, distiller)
    for _ in range(count):
        optimizer.zero_grad()
        total(distiller, make_batch("DCD")).backward()
        optimizer.step()
    return distiller, optimizer


def test_scale_is_learned_without_weight_decay():
    distiller, optimizer = steps({})
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays.pop(id(distiller.theta)) == decays.pop(id(distiller.b)) == 0
    assert set(decays.values()) == {0.1}
    assert len(decays) + 2 == len(distiller.get_learnable_parameters())
    assert distiller.theta.item() != 1.0 and abs(distiller.b.item()) < 1e-6


def test_scale_can_be_left_at_its_start():
    distiller, _ = steps({"DCD.LEARN_TEMPERATURE": False, "DCD.INIT_B": 0.5})
    assert distiller.theta.item() == 1.0 and distiller.b.item() == 0.5
    assert {"theta", "b"} <= set(distiller.state_dict())
    assert distiller.get_extra_parameters() == 2 * (64 * 128 + 128)


def test_scale_is_held_below_its_bound_and_can_come_back():
    distiller = build("DCD", {"DCD.INIT_THETA": 5.0})
    _, losses = distiller(**make_batch("DCD"), epoch=1)
    assert distiller.theta.item() == pytest.approx(math.log(10) - 1e-6, abs=1e-6)
    assert distiller.monitors["tau"].item() == pytest.approx(10.0, rel=1e-5)
    losses["loss_dcd"].backward()
    assert distiller.theta.grad.item() != 0
    fixed = build("DCD", {"DCD.INIT_THETA": 5.0, "DCD.LEARN_TEMPERATURE": False})
    _, losses_fixed = fixed(**make_batch("DCD"), epoch=1)
    assert fixed.theta.item() == 5.0
    torch.testing.assert_close(losses_fixed["loss_dcd"], losses["loss_dcd"], rtol=1e-5, atol=0)


def test_projections_of_both_sides_learn_and_the_teacher_does_not():
    distiller = build("DCD")
    total(distiller, make_batch("DCD")).backward()
    assert all(p.grad.any() for module in (distiller.embed_s, distiller.embed_t) for p in module.parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_under_autocast_all_behind_the_pooled_features_is_float32():
    distiller, batch = build("DCD"), make_batch("DCD")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = distiller(**batch, epoch=1)
        pooled = [net(batch["image"])[1]["pooled_feat"].float() for net in (distiller.student, distiller.teacher)]
    embedded = [F.normalize(m(x)) for m, x in zip((distiller.embed_s, distiller.embed_t), pooled, strict=True)]
    torch.testing.assert_close(losses["loss_dcd"], dcd_loss(*embedded, math.e, 0.0))


@pytest.mark.parametrize("name", sorted(cifar_model_dict))
def test_pooled_width(name):
    network = cifar_model_dict[name][0](num_classes=10).eval()
    with torch.no_grad():
        assert pooled_width(network, "student") == network(torch.zeros(1, 3, 32, 32))[1]["pooled_feat"].shape[1]


def test_building_leaves_random_states_alone():
    networks = [cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet14")]
    state = torch.get_rng_state()
    build_distiller(config("DCD"), *networks)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"DCD.FEAT_DIM": 0}, r"DCD\.FEAT_DIM must be above 0"),
        ({"DCD.MAX_TAU": 0.0}, r"DCD\.MAX_TAU"),
        ({"DCD.TEMPERATURE": -1.0}, r"DCD\.TEMPERATURE"),
        ({"DCD.DETACH_TARGET": True, "DCD.ALPHA": 0.0}, r"DCD\.DETACH_TARGET"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("DCD", values)


def test_a_network_without_a_linear_layer():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), {}

    with pytest.raises(InputError, match="student's pooled_feat"):
        build_distiller(config("DCD"), Net(), Net())
