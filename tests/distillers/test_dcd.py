"""DCD: its loss against ``oracles/dcd.py``, the listing written out in loops; at the ends; and what is learned."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases, rounding
from method_cases import build, config, make_batch, total
from oracles import dcd as oracle
from oracles.cases import each_and_some, named
from oracles.compare import assert_agree
from oracles.complex_step import constant, cross_entropy, mean, numbers
from oracles.kd import kd_loss as kd_oracle
from oracles.stubs import Outputs

from mdistiller.distillers.DCD import bounded_scale, dcd_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.engine.solver import build_optimizer
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError, distiller_dict


def embeddings(images=5, width=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    given = [torch.randn(images, width, generator=generator, dtype=torch.float64) for _ in range(2)]
    return [F.normalize(x, dim=1) for x in given]


# The formula


def test_the_oracle_by_hand():
    # A perfect match of two orthogonal pairs: rows and columns are both softmax(tau, 0), so the second term is 0.
    eye = [[1.0, 0.0], [0.0, 1.0]]
    assert oracle.dcd_loss(eye, eye, 2.0, 0.7) == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-12)
    # One student for both teachers: rows (1, 0), columns (1/2, 1/2).
    p = 1 / (1 + math.exp(-1))
    consistency = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    contrastive = -(math.log(p) + math.log(1 - p)) / 2
    one = [[1.0, 0.0], [1.0, 0.0]]
    assert oracle.dcd_loss(one, eye, 1.0, 0.0, alpha=3.0) == pytest.approx(contrastive + 3 * consistency, rel=1e-12)
    assert oracle.scale(1.0) == pytest.approx(math.e)
    assert oracle.scale(2.4) == 10.0
    assert oracle.embed([[1.0, 2.0]], [[1.0, 1.0], [0.0, 2.0]], [0.0, 0.0]) == [pytest.approx([0.6, 0.8])]


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_gradient"),
    [(torch.float64, 1e-7, 1e-6), (torch.float32, 1e-4, 1e-4)],
    ids=["float64", "float32"],
)
@pytest.mark.parametrize("case", loss_cases("dcd"))
def test_golden_values_and_gradients(case, dtype, of_value, of_gradient):
    given = case_tensors(case, "in", dtype)
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
    assert loss.item() == pytest.approx(case["outputs"]["loss"], rel=of_value, abs=rounding(dtype))
    assert_golden_gradients(case, given, rel=of_gradient)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def pair(kind: str, batch: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings of student and teacher, ``(batch, width)``, normalised."""
    random = np.random.default_rng(batch * 100 + width)
    student, teacher = random.normal(size=(2, batch, width))
    if kind == "near":
        student = teacher + 1e-6 * student
    if kind == "equal":
        student = teacher
    if kind == "opposite":
        student = -teacher
    if kind == "repeated":  # every image the same: all rows tie
        student, teacher = (np.tile(x[:1], (batch, 1)) for x in (student, teacher))
    return unit(student), unit(teacher)


@pytest.mark.parametrize(
    "case",
    each_and_some(
        16,
        shape=[(7, 4), (1, 3), (2, 1), (2, 5), (3, 2)],
        kind=["random", "near", "equal", "opposite", "repeated"],
        detach=[False, True],
        tau=[math.e, 10.0, 0.07],
        b=[0.0, 0.3, -50.0],
        alpha=[0.5, 2.0, 0.0],
    ),
    ids=named,
)
def test_the_loss_and_all_gradients_are_the_listings(case):
    shape, kind, detach, tau, b, alpha = case.values()
    assert_agree(
        lambda s, t, tau, b: dcd_loss(s, t, tau, b, alpha, detach_target=detach),
        lambda s, t, tau, b: oracle.dcd_loss(s, t, tau, b, alpha, detach_target=detach),
        *pair(kind, *shape),
        tau,
        b,
        wrt=(0, 1, 2, 3),
    )


def test_extreme_scales_stay_on_the_oracle():
    student, teacher = pair("random", 4, 3)
    for tau in (1e3, 1e-6):
        assert_agree(
            lambda s, t, tau: dcd_loss(s, t, tau, 0.0), lambda s, t, tau: oracle.dcd_loss(s, t, tau, 0.0),
            student, teacher, tau, wrt=(0, 1, 2),
        )  # fmt: skip


def test_gradient():
    embed_s, embed_t = (x.requires_grad_() for x in embeddings(3, 3))
    tau = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: dcd_loss(*x, b=0.1), (embed_s, embed_t, tau))


def test_a_perfect_match_of_64():
    """Why the scale matters: 1 on the diagonal and 0 off it."""
    eye = torch.eye(64, dtype=torch.float64)
    assert dcd_loss(eye, eye, math.e, 0.0).item() == pytest.approx(1.64, abs=0.005)
    assert dcd_loss(eye, eye, 10.0, 0.0).item() == pytest.approx(0.003, abs=0.0002)


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
    assert abs(b.grad.item()) < rounding(b.dtype)


def test_pairs_matter():
    embed_s, embed_t = embeddings(6, 32)
    assert dcd_loss(embed_s, embed_s, 10.0, 0.0) < dcd_loss(embed_s, embed_t, 10.0, 0.0)
    assert dcd_loss(embed_s, embed_s, 10.0, 0.0) < dcd_loss(embed_s, embed_s.roll(1, 0), 10.0, 0.0)


def test_consistency_vanishes_for_symmetric_similarities():
    embed, _ = embeddings()
    torch.testing.assert_close(dcd_loss(embed, embed, 3.0, 0.0, alpha=5.0), dcd_loss(embed, embed, 3.0, 0.0, alpha=0.0))


def test_bounded_scale():
    theta = torch.tensor([1.0, 3.0], requires_grad=True)
    scale = bounded_scale(theta, 10.0)
    scale.sum().backward()
    assert scale.tolist() == pytest.approx([math.e, 10.0]) and theta.grad.tolist() == pytest.approx([math.e, 0.0])


# At the edges


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


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"DCD.FEAT_DIM": 0}, r"DCD\.FEAT_DIM must be at least 1"),
        ({"DCD.MAX_TAU": 0.0}, r"DCD\.MAX_TAU"),
        ({"DCD.TEMPERATURE": -1.0}, r"DCD\.TEMPERATURE"),
        ({"DCD.DETACH_TARGET": True, "DCD.ALPHA": 0.0}, r"DCD\.DETACH_TARGET"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("DCD", values)


def test_a_network_without_pooled_features():
    class Net(torch.nn.Module):
        def forward(self, x):
            return x.mean((2, 3)), {}

    with pytest.raises(InputError, match=r"the student Net must return .*pooled_feat"):
        build_distiller(config("DCD"), Net(), Net())


# The method


METHOD = [
    {},
    {"LAMBDA": 1.0},
    {"LAMBDA": 0.5, "TEMPERATURE": 2.0, "CE_WEIGHT": 0.1, "BETA": 3.0},
    {"ALPHA": 0.0},
    {"DETACH_TARGET": True, "ALPHA": 2.0},
    {"INIT_THETA": 2.0},
    {"INIT_THETA": 3.0, "LEARN_TEMPERATURE": False},  # above the clamp
    {"INIT_THETA": 1.0, "MAX_TAU": 2.0, "LEARN_TEMPERATURE": False},
]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("values", METHOD, ids=str)
def test_losses_from_given_outputs(values, batch):
    classes, target = 4, [1, 3, 0][:batch]
    torch.manual_seed(0)
    student, teacher = Outputs(classes, [3]), Outputs(classes, [5])
    cfg = config("DCD", {"DCD.FEAT_DIM": 3} | {f"DCD.{key}": value for key, value in values.items()})
    distiller = build_distiller(cfg, student, teacher).train()
    options, random = cfg.DCD, np.random.default_rng(0)
    layers = [[numbers(p.detach()) for p in layer.parameters()] for layer in (distiller.embed_s, distiller.embed_t)]

    def library(logits_s, logits_t, map_s, map_t):
        distiller.to(torch.promote_types(logits_s.dtype, torch.float32))
        student.give(logits_s, [map_s])
        teacher.give(logits_t, [map_t])
        return distiller(image=torch.zeros(batch, 3, 1, 1), target=torch.tensor(target))[1]

    def loops(logits_s, logits_t, map_s, map_t):
        pooled = ([[mean(line[0]) for line in image] for image in maps] for maps in (map_s, constant(map_t)))
        embedded = [oracle.embed(x, *layer) for x, layer in zip(pooled, layers, strict=True)]
        tau = oracle.scale(options.INIT_THETA, options.MAX_TAU)
        loss = oracle.dcd_loss(*embedded, tau, 0.0, options.ALPHA, options.DETACH_TARGET)
        losses = {"loss_ce": options.CE_WEIGHT * cross_entropy(logits_s, target), "loss_dcd": options.BETA * loss}
        if options.LAMBDA:
            losses["loss_kd"] = options.LAMBDA * kd_oracle(logits_s, constant(logits_t), options.TEMPERATURE)
        return losses

    given = [random.normal(size=shape) for shape in [(batch, classes)] * 2 + [(batch, 3, 1, 2), (batch, 5, 1, 2)]]
    assert_agree(library, loops, *given, wrt=(0, 1, 2, 3))


def test_every_key_is_among_those():
    tested = {key for values in METHOD for key in values} | {"FEAT_DIM"}
    elsewhere = {"GATHER"}  # in tests/functional/test_gather.py
    assert tested | elsewhere == set(distiller_dict["DCD"].defaults)


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


def test_under_autocast_all_behind_the_pooled_features_is_float32():
    distiller, batch = build("DCD"), make_batch("DCD")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = distiller(**batch, epoch=1)
        pooled = [net(batch["image"])[1]["pooled_feat"].float() for net in (distiller.student, distiller.teacher)]
    embedded = [F.normalize(m(x)) for m, x in zip((distiller.embed_s, distiller.embed_t), pooled, strict=True)]
    torch.testing.assert_close(losses["loss_dcd"], dcd_loss(*embedded, math.e, 0.0))


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
    distiller, _ = steps({"DCD.LEARN_TEMPERATURE": False})
    assert distiller.theta.item() == 1.0 and distiller.b.item() == 0.0
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


def test_building_leaves_random_states_alone():
    networks = [cifar_model_dict[name][0](num_classes=10) for name in ("resnet8", "resnet14")]
    state = torch.get_rng_state()
    build_distiller(config("DCD"), *networks)
    assert torch.equal(torch.get_rng_state(), state)
