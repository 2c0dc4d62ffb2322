"""A folded network gives what the network gives, and steps aside where it would not."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import method_cases
import pytest
import torch
import torch.nn.functional as F
from plugin_files import forgotten
from runs import make_trainer, same_state, teacher_file
from torch import nn
from torch.utils._pytree import tree_flatten

from mdistiller.distillers import Distiller, register_distiller
from mdistiller.engine.forwards.fold import Folding, fold_batch_norms
from mdistiller.engine.hooks import Hook
from mdistiller.models.any import find_network, with_features

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
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
    assert Folding(net, (32, 32)).active
    return net


def as_written(net: nn.Module, x):
    """The network's own code."""
    return type(net).forward(net, x)


def is_folded(net: nn.Module, x) -> bool:
    """Whether a call of the network runs its twin, which calls none of the batch norms."""
    net(x)  # the first time, both are compared
    norm, called = next(module for module in net.modules() if isinstance(module, nn.BatchNorm2d)), []
    forward = norm.forward
    norm.forward = lambda x: called.append(1) or forward(x)
    net(x)
    del norm.forward
    return not called


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
        twin, _ = fold_batch_norms(net, (32, 32))
        (logits, features), (folded_logits, folded_features) = net(x), twin(x)
    assert_near(folded_logits, logits)
    assert features.keys() == folded_features.keys()
    assert_near(all_maps(folded_features), all_maps(features))
    # Of a wide residual network half the batch norms follow a sum, not a convolution.
    assert count_norms(twin) == (count_norms(net) // 2 + 1 if name.startswith("wrn") else 0)


def test_in_float64_the_same_to_twelve_digits() -> None:
    net = settled("cifar", "vgg8").double()
    x = small_input("cifar").double()
    with torch.no_grad():
        assert_near(fold_batch_norms(net, (32, 32))[0](x), net(x), tolerance=1e-12)


def test_channels_last_stays() -> None:
    net = settled("cifar", "resnet8").to(memory_format=torch.channels_last)
    _, pairs = fold_batch_norms(net, (32, 32))
    assert len(pairs) == 9
    assert all(conv.weight.is_contiguous(memory_format=torch.channels_last) for conv, *_ in pairs)


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
    twin, pairs = fold_batch_norms(net, (32, 32))
    assert count_norms(twin) == 1 and [pair[1:] for pair in pairs] == [(net.second, net.last)]
    x = torch.randn(2, 3, 4, 4)
    assert_near(twin(x), net(x))


def test_what_is_trained_is_shared_and_gets_its_gradient() -> None:
    net = settled("cifar", "resnet8")
    trained = [net.layer3[-1].conv2.weight, net.fc.weight, net.fc.bias]
    for parameter in trained:
        parameter.requires_grad_(True)
    folding = Folding(net, (32, 32))
    x = small_input("cifar")

    def gradients(forward):
        return torch.autograd.grad(forward(x)[0].square().sum(), trained)

    assert_near(gradients(net), gradients(lambda x: as_written(net, x)))
    before = net(x)[0]
    with torch.no_grad():
        trained[0].mul_(2)
    assert not torch.allclose(net(x)[0], before)
    assert_near(net(x)[0], as_written(net, x)[0])
    assert folding.active and is_folded(net, x)


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


def test_hooks_on_the_network_itself_see_its_input_and_output() -> None:
    net = sped_up(settled("cifar", "resnet8"))
    x, seen = small_input("cifar", batch=4), []
    net.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net.register_forward_hook(lambda module, given, found: seen.append(found))
    assert is_folded(net, x)
    assert len(seen) == 4
    shown, output = seen[-2:]
    assert shown is x and torch.equal(output[0], net(x)[0])


def test_autograd_reaches_what_was_folded() -> None:
    """A stage before training, say, trains a part of the teacher for a while."""
    net = sped_up(settled("cifar", "resnet8"))
    x, weight = small_input("cifar"), net.layer1[0].conv1.weight
    assert is_folded(net, x)
    weight.requires_grad_(True)
    net(x)[0].sum().backward()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        assert is_folded(net, x)
    weight.requires_grad_(False)
    assert is_folded(net, x)


@pytest.mark.parametrize("counted", [True, False], ids=["by torch", "behind its back"])
def test_a_teacher_whose_weights_move_is_followed(counted) -> None:
    net = sped_up(settled("cifar", "resnet8"))
    x = small_input("cifar")
    with torch.no_grad():
        net(x)
        for _ in range(5):
            weight = net.conv1.weight if counted else net.conv1.weight.data
            weight.mul_(1.1)
            assert torch.equal(net(x)[0], as_written(net, x)[0])
    assert "forward" not in vars(net)  # and costs nothing more


def move(net: nn.Module) -> None:
    with torch.no_grad():
        net.conv1.weight.mul_(1.1)


def test_weights_that_rest_again_are_folded_as_they_are_then() -> None:
    net = settled("cifar", "resnet8")
    folding, x = Folding(net, (32, 32)), small_input("cifar")
    twin = folding.twin
    with torch.no_grad():
        net(x)
        move(net)
        assert not is_folded(net, x) and (folding.rests, folding.moved) == (False, True)
        folding.begin()
        assert not is_folded(net, x)  # it is not known to rest
        folding.rests = True
        folding.begin()
        assert is_folded(net, x) and folding.twin is twin  # in place: what was compiled of it stays compiled
        assert_near(net(x), as_written(net, x))
        fresh = copy.deepcopy(net)
        del fresh.forward
        assert Folding(fresh, (32, 32)).active
        assert torch.equal(fresh(x)[0], net(x)[0])


def test_a_copy_of_folded_weights_is_folded_anew_by_itself() -> None:
    net = sped_up(settled("cifar", "resnet8"))
    x, other = small_input("cifar"), copy.deepcopy(net)
    with torch.no_grad():
        before = net(x)[0]
        move(other)
        folding = other.forward.links[0][1]
        folding.begin()
        assert is_folded(other, x) and is_folded(net, x)
        assert_near(other(x), as_written(other, x))
        assert torch.equal(net(x)[0], before)


def test_what_is_trained_may_change_between_epochs() -> None:
    net = settled("cifar", "resnet8").requires_grad_(True)
    folding = Folding(net, (32, 32))
    assert not folding.active and "forward" not in vars(net)
    net.requires_grad_(False)
    folding.begin()
    x = small_input("cifar")
    assert is_folded(net, x)
    net.layer3.requires_grad_(True)
    pairs = len(folding.pairs)
    folding.begin()
    assert folding.active and 0 < len(folding.pairs) < pairs
    (gradient,) = torch.autograd.grad(net(x)[0].sum(), net.layer3[-1].conv2.weight)
    assert gradient.abs().sum() > 0 and is_folded(net, x)


def test_statistics_that_move_in_training_mode_are_noticed() -> None:
    """Torch counts a change of ``num_batches_tracked`` only."""
    net = sped_up(settled("cifar", "resnet8"))
    x = small_input("cifar", batch=4)
    with torch.no_grad():
        for _ in range(3):
            net(x)
        net.train()(x)
        assert torch.equal(net.eval()(x)[0], as_written(net, x)[0])


# In a run


class Moves(Distiller):
    """Moves its teacher in two epochs."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)

    def teacher_parameters(self):  # to be saved
        return list(self.teacher.conv1.parameters())

    def parameter_groups(self, cfg):
        return [{"params": list(self.student.parameters())}]

    def forward_train(self, image, target, epoch, **kwargs):
        with torch.no_grad():
            wanted = self.teacher(image)[0]
        if epoch <= 2:
            self.move(self.teacher.conv1.weight)
        logits = self.student(image)[0]
        return logits, {"ce": F.cross_entropy(logits, target), "kd": (logits - wanted).square().mean()}

    @torch.no_grad()
    def move(self, weight):
        weight.mul_(1.01)


class MovesUncounted(Moves):
    def move(self, weight):
        weight.data.mul_(1.01)


class MovesAtEpochs(Moves):
    """When the second and the third epoch begin; within epochs, the teacher rests."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.start = teacher.conv1.weight.clone()

    @torch.no_grad()
    def on_epoch_start(self, epoch):
        self.teacher.conv1.weight.copy_(self.start * 1.01 ** min(epoch - 1, 2))

    def move(self, weight): ...


class TrainsFirst(Moves):
    """Trains a part of its teacher with the student, until that part is frozen too."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        teacher.conv1.requires_grad_(True)

    parameter_groups = Distiller.parameter_groups

    def on_epoch_start(self, epoch):
        self.teacher.conv1.requires_grad_(epoch <= 2)

    def forward_train(self, image, target, **kwargs):
        logits, wanted = self.student(image)[0], self.teacher(image)[0]
        return logits, {"ce": F.cross_entropy(wanted, target), "kd": (logits - wanted).square().mean()}


class Prepares(Moves):
    """Trains a part of its teacher before."""

    def prepare(self, batches, autocast):
        part = self.teacher.layer1.requires_grad_(True)
        optimizer = torch.optim.SGD(part.parameters(), 0.01)
        before = [p.clone() for p in part.parameters()]
        for batch in batches(1):
            optimizer.zero_grad()
            F.cross_entropy(self.teacher(batch["image"])[0], batch["target"]).backward()
            optimizer.step()
        assert not any(map(torch.equal, before, part.parameters()))
        part.requires_grad_(False)

    def teacher_parameters(self):
        return list(self.teacher.layer1.parameters())

    def move(self, weight): ...


EPOCHS = 4  # of four steps
PATHS = {  # of each method, the epochs in which the teacher runs by its twin, after the first step
    Moves: {4},
    MovesUncounted: {4},
    MovesAtEpochs: {1, 2, 3, 4},
    TrainsFirst: {1, 2, 3, 4},
    Prepares: {1, 2, 3, 4},
}


class Paths(Hook):
    """Whether the teacher runs by its twin after each step; can end the run after one."""

    def __init__(self, trainer, stop_at=None):
        super().__init__(trainer)
        self.found, self.stop_at, self.saved = {}, stop_at, None
        trainer.hooks.append(self)

    def after_step(self, output):
        trainer = self.trainer
        self.found[trainer.step] = trainer.foldings["teacher"].active, len(trainer.foldings["teacher"].pairs)
        if trainer.step == self.stop_at:
            self.saved = trainer.state_dict()
            raise KeyboardInterrupt


def trainer_of(folder: Path, method: type, **values):
    register_distiller("MOVES")(type("Method", (method,), {}))
    file = teacher_file(folder.parent)
    return make_trainer(
        folder, DISTILLER__TYPE="MOVES", DISTILLER__TEACHER_CKPT=file, SOLVER__EPOCHS=EPOCHS, SOLVER__LR=0.01,
        SOLVER__LR_DECAY_STAGES=[], LOG__EVAL_FREQ=EPOCHS, **values,
    )  # fmt: skip


@pytest.mark.parametrize("method", PATHS)
def test_a_teacher_runs_unfolded_only_while_it_moves_and_resumes_to_the_bit(tmp_path, method) -> None:
    with forgotten():
        whole = trainer_of(tmp_path / "whole", method)
        paths = Paths(whole)
        whole.train()
        folded = {(step - 1) // 4 + 1 for step, (active, _) in paths.found.items() if active and step % 4 != 1}
        assert folded == PATHS[method]
        assert all(pairs == 9 - (method is TrainsFirst and step <= 8) for step, (_, pairs) in paths.found.items())
        for stop in (1, 4, 6, 10, 12):
            first = trainer_of(tmp_path / str(stop), method)
            stopped = Paths(first, stop)
            with pytest.raises(KeyboardInterrupt):
                first.train()
            second = trainer_of(tmp_path / str(stop), method)
            rest = Paths(second)
            second.load_state(stopped.saved)
            second.train()
            assert stopped.found | rest.found == paths.found, stop
            assert same_state(second.distiller.state_dict(), whole.distiller.state_dict()), stop
            assert same_state(second.optimizer.state_dict(), whole.optimizer.state_dict()), stop


@pytest.mark.parametrize("method", PATHS)
def test_a_teacher_that_moves_gives_what_it_gives_unfolded(tmp_path, method) -> None:
    with forgotten():
        fast, plain = (trainer_of(tmp_path / str(on), method, SOLVER__FAST_TEACHER=on) for on in (True, False))
        fast.train(), plain.train()
        assert not same_state(fast.distiller.state_dict(), plain.distiller.state_dict())  # which bits would show
        assert fast.row["train_loss"] == pytest.approx(plain.row["train_loss"], rel=2e-3)
        teachers = (trainer.distiller.teacher.state_dict() for trainer in (fast, plain))
        torch.testing.assert_close(*teachers, rtol=1e-3, atol=1e-5)


class Fickle(nn.Module):
    """Gives another output at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.calls = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), 0

    def forward(self, x):
        self.calls += 1
        return self.norm(self.conv(x)) * self.calls


def test_a_twin_that_computes_something_else_is_dropped() -> None:
    net = Fickle().eval().requires_grad_(False)
    folding = Folding(net, (32, 32))
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        net(x)
        folding.begin()
        assert not folding.active
        first, second = net(x), net(x)
    assert not torch.equal(first, second)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        between = self.conv(x)
        return self.norm(between) if x.mean() <= 0 else between


def test_code_with_branches_takes_each_of_them() -> None:
    net = Branching().eval().requires_grad_(False)
    assert Folding(net, (32, 32)).active
    with torch.no_grad():
        net(-torch.ones(2, 3, 4, 4))
        assert_near(net(-torch.ones(2, 3, 4, 4)), as_written(net, -torch.ones(2, 3, 4, 4)))


class Keeping(Branching):
    def forward(self, x):
        self.between = self.norm(self.conv(x))
        return self.between.mean((2, 3))


class OfItsOwn(nn.Conv2d):
    """Its weights do not scale its output."""

    def forward(self, x):
        return nn.functional.conv2d(x, self.weight / self.weight.norm(), self.bias)


def test_what_is_not_folded() -> None:
    """Maps that are kept as attributes, modules that are called twice, and convolutions of other kinds."""
    nets = [Keeping(), nn.Sequential(OfItsOwn(3, 3, 1), nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3))]
    nets.append(nn.Sequential(*[nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)] * 2))
    nets.append(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)))
    nets.append(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.BatchNorm2d(3)))
    nets.append(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(3)))
    for net in nets:
        net = net.eval().requires_grad_(False)
        assert not Folding(net, (32, 32)).active
        assert "forward" not in vars(net)


FOREIGN = {  # and how many of their batch norms are folded, which stand right behind a convolution
    "timm:test_resnet": 1.0, "timm:resnet10t": 1.0, "timm:mobilenetv3_small_050": 1.0, "timm:tf_efficientnet_b0": 1.0,
    "timm:repvgg_a0": 0.72, "timm:ghostnet_050": 1.0, "torchvision:resnet18": 1.0, "torchvision:mobilenet_v2": 1.0,
    "torchvision:shufflenet_v2_x0_5": 1.0, "torchvision:densenet121": 0.49,
}  # fmt: skip


@pytest.mark.parametrize("name", FOREIGN)
def test_networks_of_other_libraries_are_folded(name) -> None:
    """Their code cannot be traced, and hooks read the maps of some."""
    torch.manual_seed(0)
    net = with_features(find_network(name)(num_classes=10), 64)
    norms = [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        for tensor in (norm.weight.data, norm.running_var):
            tensor.uniform_(0.5, 1.5)
        for tensor in (norm.bias.data, norm.running_mean):
            tensor.uniform_(-0.5, 0.5)
    net, x = net.eval().requires_grad_(False), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits, features = net(x)
        folding = Folding(net, (64, 64))
        folded_logits, folded_features = net(x)
        assert folding.active and folding.agrees
        assert len(folding.pairs) == pytest.approx(FOREIGN[name] * len(norms), abs=1)
        assert_near(folded_logits, logits, 1e-4)
        assert_near(all_maps(folded_features), all_maps(features), 1e-4)
        if hasattr(net._reader, "store"):
            assert folding.twin._reader.store is not net._reader.store
        seen = []
        hooked = folding.tapped[0] if folding.tapped else norms[0]
        hooked.register_forward_hook(lambda module, given, found: seen.append(found))
        net(x)
        assert len(seen) == 1


@pytest.mark.parametrize("method", method_cases.TEACHER_METHODS)
def test_every_method_gives_the_same_losses(method) -> None:
    plain = method_cases.build(method)
    fast = copy.deepcopy(plain)
    folding = Folding(fast.teacher, (32, 32))
    batch = method_cases.make_batch(method)
    asked = []
    plain.teacher.register_forward_hook(lambda *_: asked.append(1))
    (_, expected), (_, found) = plain(**batch, epoch=1), fast(**batch, epoch=1)
    assert folding.active
    # Where the teacher's batch norms use the batch's statistics, there is nothing to fold. Methods that distil before
    # training do not run the teacher.
    assert bool(folding.calls) == (bool(asked) and not plain.teacher_batch_statistics)
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
    assert Folding(fast.teacher, (32, 32)).active
    batch = method_cases.make_batch("KD")
    torch.testing.assert_close(fast(**batch)[1]["margin"], plain(**batch)[1]["margin"])
