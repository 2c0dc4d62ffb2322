"""The folded teacher gives what the teacher gives, and steps aside where it would not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import method_cases
import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from mdistiller.distillers import Distiller
from mdistiller.engine.forwards.fold import FoldedForward, fold_batch_norms, speed_up_teacher

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
from test_models_all import DEEP, all_maps, build, every_model, small_input


def settled(family: str, name: str, **kwargs) -> nn.Module:
    """A frozen network whose batch norms have statistics and weights of their own."""
    torch.manual_seed(0)
    net = build(family, name, num_classes=10, **kwargs).train()
    with torch.no_grad():
        for _ in range(2):
            net(small_input(family, batch=4) + torch.randn_like(small_input(family, batch=4)))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return net.eval().requires_grad_(False)


def sped_up(net: nn.Module) -> nn.Module:
    net = copy.deepcopy(net)
    speed_up_teacher(net)
    assert isinstance(net.forward, FoldedForward)
    return net


def assert_near(ours, theirs, tolerance=1e-5) -> None:
    ours, theirs = tree_flatten(ours)[0], tree_flatten(theirs)[0]
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


def count_norms(net: nn.Module) -> int:
    return sum(isinstance(module, nn.BatchNorm2d) for module in net.modules())


@every_model(slow=DEEP)
def test_every_output_of_every_network_is_the_same(family: str, name: str) -> None:
    net = settled(family, name)
    x = small_input(family, batch=2)
    with torch.no_grad():
        graph, _ = fold_batch_norms(net)
        (logits, features), (folded_logits, folded_features) = net(x), graph(x)
    assert_near(folded_logits, logits)
    assert features.keys() == folded_features.keys()
    assert_near(all_maps(folded_features), all_maps(features))
    # Of a wide residual network half the batch norms follow a sum, not a convolution.
    assert count_norms(graph) == (count_norms(net) // 2 + 1 if name.startswith("wrn") else 0)


def test_in_float64_the_same_to_twelve_digits() -> None:
    net = settled("cifar", "vgg8").double()
    x = small_input("cifar").double()
    with torch.no_grad():
        assert_near(fold_batch_norms(net)[0](x), net(x), tolerance=1e-12)


def test_channels_last_stays() -> None:
    net = settled("cifar", "resnet8").to(memory_format=torch.channels_last)
    graph, _ = fold_batch_norms(net)
    folded = [module.weight for name, module in graph.named_modules() if name.startswith("folded_")]
    assert len(folded) == 9
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in folded)


def test_bfloat16_is_as_near_to_exact_as_it_was() -> None:
    net = settled("cifar", "resnet20")
    x = small_input("cifar", batch=8)
    with torch.no_grad():
        exact = net(x)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before, after = net(x)[0], sped_up(net)(x)[0]
    assert (after - exact).abs().mean() <= 1.5 * (before - exact).abs().mean()


def test_the_network_itself_is_untouched() -> None:
    net = settled("cifar", "resnet8")
    fast = sped_up(net)
    assert [name for name, _ in fast.named_modules()] == [name for name, _ in net.named_modules()]
    assert all(torch.equal(a, b) for a, b in zip(fast.state_dict().values(), net.state_dict().values(), strict=True))
    assert all(isinstance(norm, nn.BatchNorm2d) for norm in fast.get_bn_before_relu())
    x = small_input("cifar")
    assert torch.equal(fast.layer1(fast.relu(fast.bn1(fast.conv1(x))))[0], net(x)[1]["feats"][1])


def test_a_copy_is_a_network_of_its_own() -> None:
    fast = sped_up(settled("cifar", "resnet8"))
    x = small_input("cifar")
    before = fast(x)[0]
    other = copy.deepcopy(fast)
    assert torch.equal(other(x)[0], before)
    with torch.no_grad():
        other.fc.bias.add_(1)
    assert torch.equal(fast(x)[0], before)
    assert_near(other(x)[0], before + 1)


class Shared(nn.Module):
    """Returns the map between a convolution and its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.last = nn.BatchNorm2d(4, affine=False)

    def forward(self, x):
        between = self.first(x)
        return self.last(self.second(self.norm(between))), between


def test_a_map_that_is_asked_for_keeps_its_batch_norm() -> None:
    net = Shared().eval().requires_grad_(False)
    graph, sources = fold_batch_norms(net)
    assert count_norms(graph) == 1 and len(sources) == 4  # the second pair's; its norm has no weights
    x = torch.randn(2, 3, 4, 4)
    assert_near(graph(x), net(x))


def test_what_is_trained_is_shared_and_gets_its_gradient() -> None:
    net = settled("cifar", "resnet8")
    trained = [net.layer3[-1].conv2.weight, net.fc.weight, net.fc.bias]
    for parameter in trained:
        parameter.requires_grad_(True)
    speed_up_teacher(net)
    x = small_input("cifar")

    def gradients(forward):
        return torch.autograd.grad(forward(x)[0].square().sum(), trained)

    assert_near(gradients(net), gradients(net.forward.original))
    before = net(x)[0]
    with torch.no_grad():
        trained[0].mul_(2)
    assert not torch.allclose(net(x)[0], before)
    assert_near(net(x)[0], net.forward.original(x)[0])
    assert net.forward.holds


def test_training_mode_and_hooks_run_the_networks_own_code() -> None:
    net = sped_up(settled("cifar", "resnet8"))
    x, seen = small_input("cifar", batch=4), []
    handle = net.layer1[0].conv1.register_forward_hook(lambda module, given, found: seen.append(found))
    net(x)
    assert len(seen) == 1
    handle.remove()
    net(x)
    assert len(seen) == 1
    before = net.bn1.running_mean.clone()
    net.train()(x)
    assert not torch.equal(net.bn1.running_mean, before)


@pytest.mark.parametrize("counted", [True, False], ids=["by torch", "behind its back"])
def test_a_teacher_whose_weights_move_is_followed(counted) -> None:
    net = sped_up(settled("cifar", "resnet8"))
    x = small_input("cifar")
    with torch.no_grad():
        net(x)
        for _ in range(5):
            weight = net.conv1.weight if counted else net.conv1.weight.data
            weight.mul_(1.1)
            assert torch.equal(net(x)[0], net.forward.original(x)[0])
    assert not net.forward.holds


class Fickle(nn.Module):
    """A trace would keep the first image's brightness for ever."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), 0

    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) * self.calls


def test_a_graph_that_computes_something_else_is_dropped() -> None:
    net = Fickle().eval().requires_grad_(False)
    speed_up_teacher(net)
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        net(x)
        assert not net.forward.holds
        first, second = net(x), net(x)
    assert not torch.equal(first, second)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) if x.mean() > 0 else x


def test_code_that_cannot_be_traced_stays() -> None:
    net = Branching().eval().requires_grad_(False)
    speed_up_teacher(net)
    assert "forward" not in vars(net)


BATCH_STATISTICS = {"OFD"}  # the teacher's batch norms use the batch's, so there is nothing to fold


@pytest.mark.parametrize("method", method_cases.TEACHER_METHODS)
def test_every_method_gives_the_same_losses(method) -> None:
    plain = method_cases.build(method)
    fast = copy.deepcopy(plain)
    speed_up_teacher(fast.teacher)
    batch = method_cases.make_batch(method)
    (_, expected), (_, found) = plain(**batch, epoch=1), fast(**batch, epoch=1)
    assert isinstance(fast.teacher.forward, FoldedForward)
    assert bool(fast.teacher.forward.calls) == (method not in BATCH_STATISTICS)
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-3, atol=1e-4)  # some weights are in the thousands
    for losses in (expected, found):
        sum(loss.mean() for loss in losses.values()).backward()
    for a, b in zip(plain.teacher_parameters(), fast.teacher_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-6)


class ReadsNorms(Distiller):
    """As OFD computes its margins."""

    def forward_train(self, image, target, **kwargs):
        margins = [norm.bias.mean() - norm.weight.abs().mean() for norm in self.teacher.get_bn_before_relu()]
        return self.student(image)[0], {"margin": self.teacher(image)[0].mean() + torch.stack(margins).mean()}


def test_a_method_that_reads_batch_norms_finds_them() -> None:
    plain = ReadsNorms(settled("cifar", "resnet8"), settled("cifar", "resnet8")).train()
    fast = copy.deepcopy(plain)
    speed_up_teacher(fast.teacher)
    batch = method_cases.make_batch("KD")
    torch.testing.assert_close(fast(**batch)[1]["margin"], plain(**batch)[1]["margin"])
