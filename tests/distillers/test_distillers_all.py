"""What every method must do; parametrised over the registry, so that registering a method is testing it."""

import copy

import pytest
import torch
from fake_gpu import FakeGPU
from method_cases import (
    CLASSES,
    FALLING,
    IMAGES,
    METHODS,
    TEACHER_METHODS,
    build,
    config,
    make_batch,
    total,
    weights,
)

from mdistiller.contract import contract_of
from mdistiller.registry import distiller_dict

each_method = pytest.mark.parametrize("method", METHODS)
each_teacher_method = pytest.mark.parametrize("method", TEACHER_METHODS)


def sgd(distiller, lr=0.05):
    return torch.optim.SGD(distiller.get_learnable_parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)


def train(distiller, method, steps, lr=0.05):
    """Steps on one fixed batch, in an epoch behind all warm-ups; the loss before each."""
    optimizer, batch, history = sgd(distiller, lr), make_batch(method), []
    for _ in range(steps):
        loss = total(distiller, batch, epoch=100)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


@each_method
def test_losses_are_finite_scalars_and_logits_the_students(method):
    distiller, batch = build(method), make_batch(method)
    logits, losses = distiller(**batch, epoch=1)
    assert logits.shape == (IMAGES, CLASSES)
    assert losses
    for name, loss in losses.items():
        assert loss.numel() == 1 and torch.isfinite(loss).all(), name


@each_method
def test_every_student_parameter_gets_gradient_and_no_teacher_parameter(method):
    distiller = build(method)
    # A method with a head of its own does not use the student's.
    distiller.eval().forward_test(make_batch("NONE")["image"]).sum().backward()
    used = {name for name, p in distiller.student.named_parameters() if p.grad is not None}
    distiller.zero_grad()
    total(distiller.train(), make_batch(method)).backward()
    without = [name for name, p in distiller.student.named_parameters() if p.grad is None or not p.grad.any()]
    assert not used.intersection(without)
    assert distiller.deployed() is not distiller.student or not without
    if distiller.teacher is not None:
        allowed = {id(p) for p in distiller.teacher_parameters()}
        assert all(p.grad is None for p in distiller.teacher.parameters() if id(p) not in allowed)


@each_teacher_method
def test_teacher_stays_in_eval_and_does_not_move(method):
    distiller = build(method)
    before = copy.deepcopy(distiller.teacher.state_dict())
    train(distiller.train(), method, steps=2)
    assert not any(module.training for module in distiller.teacher.modules())
    allowed = {id(p) for p in distiller.teacher_parameters()}
    moving = {name for name, p in distiller.teacher.named_parameters() if id(p) in allowed}
    for name, value in distiller.teacher.state_dict().items():
        assert name in moving or torch.equal(value, before[name]), name


@each_teacher_method
def test_own_weight_zero_is_plain_training_to_the_bit(method):
    plain = "NONE_TWO_VIEWS" if "image_weak" in contract_of(distiller_dict[method]).views else "NONE"
    with_method, without = build(method, weights(method, ce=1.0, own=0.0)), build(plain)
    without.student.load_state_dict(with_method.student.state_dict())
    train(with_method, method, steps=3)
    train(without, plain, steps=3)
    for (name, a), b in zip(
        with_method.student.state_dict().items(), without.student.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


@each_teacher_method
def test_own_weight_matters(method):
    batch = make_batch(method)
    values = FALLING.get(method, {})
    off, on = (total(build(method, values | weights(method, ce=1.0, own=w)), batch) for w in (0.0, 1.0))
    assert off != on


@each_teacher_method
def test_own_terms_alone_fall_on_a_fixed_batch(method):
    values = weights(method, ce=0.0, own=1.0) | FALLING.get(method, {})
    history = train(build(method, values), method, steps=40, lr=0.01)
    assert min(history[-5:]) < 0.8 * history[0]


@each_method
def test_everything_that_gets_gradient_is_optimised(method):
    distiller = build(method)
    owned = {id(p) for p in distiller.get_learnable_parameters()}
    orphans = [tuple(leaf.shape) for leaf in leaves_of(total(distiller, make_batch(method))) if id(leaf) not in owned]
    assert not orphans


def leaves_of(loss):
    seen, todo = set(), [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            yield node.variable
        todo += [parent for parent, _ in node.next_functions]


@each_method
def test_extra_parameters_are_what_is_trained_beside_the_student(method):
    distiller = build(method)
    trained = sum(p.numel() for p in {id(p): p for p in distiller.get_learnable_parameters()}.values())
    own = trained - sum(p.numel() for p in distiller.student.parameters())
    banks = sum(b.numel() for name, b in distiller.named_buffers() if name.startswith("contrast."))  # as mdistiller
    assert distiller.get_extra_parameters() == own + banks


@each_method
def test_bfloat16_losses_are_float32_and_near(method):
    distiller, batch = build(method), make_batch(method)
    _, exact = copy.deepcopy(distiller)(**batch, epoch=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, rough = distiller(**batch, epoch=1)
    for name, loss in rough.items():
        assert loss.dtype == torch.float32, name
        torch.testing.assert_close(loss, exact[name], rtol=0.1, atol=0.02)


@each_method
def test_gradients_of_maps_keep_the_memory_layout(method):
    """One loss that hands back its gradient in another layout made a step of ReviewKD twice as long."""
    for bf16 in (False, True):
        layouts = layouts_of_gradients(method, bf16)
        assert layouts and not [module for module, kept in layouts if not kept]


def layouts_of_gradients(method, bf16):
    """Of each map that a channels_last distiller computes: its module, and whether its gradient lies so too."""
    distiller = build(method).to(memory_format=torch.channels_last)
    batch = make_batch(method)
    batch |= {name: x.to(memory_format=torch.channels_last) for name, x in batch.items() if x.ndim == 4}
    layouts = []

    def watch(module, _, output):
        if not isinstance(output, torch.Tensor) or output.ndim != 4 or not output.requires_grad:
            return
        if output.shape[1] > 2 and output.shape[2] > 1:  # two channels weigh nothing, and of one position all is one
            output.register_hook(lambda g: layouts.append((module, g.is_contiguous(memory_format=torch.channels_last))))

    for module in distiller.modules():
        if not list(module.children()):
            module.register_forward_hook(watch)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        loss = total(distiller, batch)
    loss.backward()
    return layouts


@each_method
def test_mixes_no_devices_and_asks_for_no_value(method):
    """On a GPU the first fails, and the second makes every step wait."""
    gpu = FakeGPU()
    distiller = gpu.module(build(method))
    batch = {name: gpu.tensor(x) for name, x in make_batch(method).items()}
    with gpu:
        logits, losses = distiller(**batch, epoch=1)
    assert {x.device.type for x in (logits, *losses.values())} == {"cuda"}


def test_the_gpu_that_is_not_there_notices_both():
    gpu = FakeGPU()
    x = gpu.tensor(torch.ones(3))
    with gpu, pytest.raises(RuntimeError, match="device"):
        x + torch.ones(3)
    for asks in (lambda: x.sum().item(), lambda: x.nonzero(), lambda: bool((x > 0).any())):
        with gpu, pytest.raises((RuntimeError, NotImplementedError)):
            asks()


@each_method
def test_works_in_float64(method):
    distiller = build(method).double()
    loss = total(distiller, make_batch(method, dtype=torch.float64))
    assert loss.dtype == torch.float64 and torch.isfinite(loss)


@pytest.mark.parametrize("method", [name for name in METHODS if distiller_dict[name].mixed_labels])
def test_labels_may_be_shares_of_classes(method):
    """Shares that are all at one class are that class, and mixed ones are taken."""
    numbers = make_batch(method)
    whole = torch.nn.functional.one_hot(numbers["target"], CLASSES).float()
    mixed = 0.6 * whole + 0.4 * whole.roll(1, 0)
    found = []
    for target in (numbers["target"], whole, mixed):
        _, losses = build(method, weights(method, ce=1.0, own=1.0))(**{**numbers, "target": target}, epoch=1)
        found.append(sum(loss.mean() for loss in losses.values()))
    torch.testing.assert_close(found[1], found[0])
    assert torch.isfinite(found[2]) and abs(found[2] - found[0]) > 1e-3


@each_method
def test_batch_of_two(method):
    loss = total(build(method), make_batch(method, images=2))
    loss.backward()
    assert torch.isfinite(loss)


@each_method
def test_state_dict_round_trip(method):
    first, second = build(method), build(method)
    train(first, method, steps=2)
    with torch.no_grad():
        for value in second.state_dict().values():
            if value.is_floating_point():
                value.add_(1)
    second.load_state_dict(first.state_dict())
    batch = make_batch(method)
    assert total(first, batch).item() == total(second, batch).item()


@each_method
def test_only_the_deployed_network_is_asked_in_eval_mode(method):
    """The student, or one of its parts and a head."""
    distiller, images = build(method).eval(), make_batch("NONE")["image"]
    with torch.no_grad():
        found, network = distiller(image=images), distiller.deployed()
        if network is distiller.student:
            torch.testing.assert_close(found, distiller.student(images)[0])
        else:
            assert network.student is distiller.student
            torch.testing.assert_close(found, network(images))


@each_method
def test_states_where_it_comes_from(method):
    cls = distiller_dict[method]
    assert cls.__doc__
    if method in TEACHER_METHODS:
        assert cls.paper and cls.family in ("logit", "feature", "relation")
        assert cls.section in config(method)
