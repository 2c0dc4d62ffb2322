"""Links stand in one order, know nothing of each other, and leave a network as it was."""

from __future__ import annotations

import copy
from typing import ClassVar

import pytest
import torch
from plugin_files import forgotten
from runs import make_trainer, teacher_file
from torch import nn

from mdistiller.distillers import Distiller, register_distiller
from mdistiller.engine.forwards import share
from mdistiller.engine.forwards.chain import ORDER, linked, networks_of, put
from mdistiller.engine.forwards.listen import listen
from mdistiller.engine.hooks import Hook
from mdistiller.registry import InputError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def noting(order, name):
    def link(following, *args, **kwargs):
        order.append(name)
        return following(*args, **kwargs)

    return link


def test_links_are_called_in_their_order_however_they_were_put():
    net, order, x = network(), [], torch.ones(1, 3)
    expected = net(x)
    for place in ("fold", "listen", "share", "cache"):
        put(net, place, noting(order, place))
    put(net, "share", noting(order, "a later share"))
    assert torch.equal(net(x), expected)
    assert order == ["listen", "cache", "a later share", "share", "fold"]
    assert {*order, "a later share"} == {*ORDER, "a later share"}


def test_a_network_without_links_is_as_it_was():
    net = network()
    before = dict(vars(net))
    first, second = put(net, "fold", noting([], "")), put(net, "share", noting([], ""))
    first(), first()
    assert "forward" in vars(net)
    second()
    assert vars(net) == before
    with pytest.raises(ZeroDivisionError), linked(net, "listen", lambda following, *args: 1 / 0):
        net(torch.ones(1, 3))
    assert vars(net) == before


def test_a_function_of_somebody_else_stays_in_its_place():
    net, calls, x = network(), [], torch.ones(1, 3)
    net.forward = below = noting(calls, "below").__get__(net.forward)
    take_off = put(net, "fold", noting(calls, "fold"))
    take_off()
    assert net.forward is below
    take_off = put(net, "fold", noting(calls, "fold"))
    net.forward = above = noting(calls, "above").__get__(net.forward)
    with linked(net, "listen", noting(calls, "listen")):
        net(x)
    assert calls == ["listen", "above", "fold", "below"]
    take_off()
    assert net.forward is above
    net(x)
    assert calls[4:] == ["above", "below"]


def test_links_stand_before_what_was_compiled_in_place():
    net, calls, x = network(), [], torch.ones(1, 3)
    net._compiled_call_impl = noting(calls, "compiled").__get__(net._call_impl)  # as net.compile() does
    with linked(net, "listen", noting(calls, "listen")):
        net(x)
    assert calls == ["listen", "compiled"]
    net(x)
    assert calls[2:] == ["compiled"]


def test_a_copy_has_links_of_its_own():
    net, x = network(), torch.ones(1, 3)
    put(net, "fold", noting([], ""))
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.bias += 1
    torch.testing.assert_close(other(x), net(x) + 1)


def test_a_listener_hears_arguments_and_output():
    net, heard, x = network(), [], torch.ones(1, 3)
    with linked(net, "listen", listen(lambda *call: heard.append(call))):
        output, again = net(x), net(input=x)
    assert heard == [((x,), {}, output), ((), {"input": x}, again)]
    net(x)
    assert len(heard) == 2


class Doubles(nn.Module):
    def forward(self, image, scale):
        return image * scale, {"feats": [image], "rows": len(image)}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_pass_is_shared_by_its_rows(monkeypatch, rank):
    """Of 3 images with two views each, one process has 2 and the other 1."""
    monkeypatch.setattr(share.distributed, "rank", lambda: rank)
    net, joined = Doubles(), []
    monkeypatch.setattr(share, "join_rows", lambda rows, counts, same_losses: joined.append((rows, counts)) or whole)
    views = torch.arange(6.0)[:, None]  # images 0 1 2, then again 3 4 5
    by_process = [[0, 1, 3, 4], [2, 5]]
    whole = views[by_process[0] + by_process[1]]
    with linked(net, "share", share.Share([2, 1])):
        output, features = net(views, scale=torch.tensor(2.0))
        assert torch.equal(output, views)  # in the order of the method's batch
        assert features["rows"] == len(by_process[rank]) and len(joined) == 1  # maps travel when they are looked at
        assert torch.equal(features["feats"][0], views)
        assert [counts for _, counts in joined] == [[4, 2]] * 2
        assert torch.equal(joined[1][0], views[by_process[rank]]) and torch.equal(joined[0][0], 2 * joined[1][0])
        odd = torch.ones(4, 1)
        assert net(odd, scale=2.0)[1]["feats"][0] is odd and len(joined) == 2  # no batch of the images


# All together


def steps_of(trainer):
    """Of each step: how many images the teacher's own code saw, by its first batch norm; and the losses."""
    norm, seen, found = trainer.distiller.teacher.bn1, [], []
    forward = norm.forward
    norm.forward = lambda x: seen.append(len(x)) or forward(x)

    class Note(Hook):
        def after_step(self, output):
            found.append((list(seen), {name: loss.item() for name, loss in output.losses.items()}))
            seen.clear()

    trainer.hooks.append(Note(trainer))
    trainer.train()
    return [images for images, _ in found], [losses for _, losses in found]


@pytest.mark.parametrize("cached", [False, True])
def test_added_kd_cache_and_fold(tmp_path, cached):
    """The teacher's own code runs on four images only, those on which its graph is compared with it."""
    values = {"DISTILLER__TYPE": "DIST", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__EPOCHS": 2,
              "DISTILLER__ADD_KD": 0.5, "DATASET__VIEW_WEAK": "plain"}  # fmt: skip
    fast = make_trainer(tmp_path / "fast", **values, SOLVER__CACHE_TEACHER=cached)
    plain = make_trainer(tmp_path / "plain", **values, SOLVER__FAST_TEACHER=False)
    shown = []
    put(fast.distiller.teacher, "share", listen(lambda args, kwargs, output: shown.append(len(args[0]))))
    (seen, losses), (_, expected) = steps_of(fast), steps_of(plain)
    assert seen == [[4]] + 7 * [[]]
    assert shown == [8, 8, 8, 6] * (1 if cached else 2)
    for found, wanted in zip(losses, expected, strict=True):
        assert found == pytest.approx(wanted, rel=1e-3) and "loss_added_kd" in found


# Several frozen networks


@pytest.fixture
def two_teachers(tmp_path):
    """Makes trainers of a method with a teacher and an assistant."""

    def make(**values):
        file = teacher_file(tmp_path)
        files = {"DISTILLER__TEACHER_CKPT": file, "DISTILLER__ASSISTANT_CKPT": file}
        return make_trainer(tmp_path, DISTILLER__TYPE="TWO_TEACHERS", **files, **values)

    with forgotten():

        @register_distiller("TWO_TEACHERS")
        class TwoTeachers(Distiller):
            networks: ClassVar = {"assistant": "teacher"}

            def __init__(self, student, teacher, cfg, assistant):
                super().__init__(student, teacher)
                self.assistant = assistant

            def forward_train(self, image, target, **kwargs):
                logits = self.student(image)[0]
                with torch.no_grad():
                    wanted = self.teacher(image)[0] + self.assistant(image)[0]
                return logits, {"kd": (logits - wanted).square().mean()}

        yield make


def test_all_frozen_networks_are_folded(two_teachers):
    trainer = two_teachers()
    distiller = trainer.distiller.train()
    assert networks_of(distiller) == [distiller.assistant, distiller.student, distiller.teacher]
    trainer.train()
    assert {name: folding.active and folding.agrees for name, folding in trainer.foldings.items()} == {
        "teacher": True, "assistant": True
    }  # fmt: skip


@pytest.mark.parametrize("fast", [True, False])
def test_all_frozen_networks_are_compiled(two_teachers, monkeypatch, fast):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled.append(function) or function)
    trainer = two_teachers(SOLVER__COMPILE="teacher", SOLVER__FAST_TEACHER=fast)
    frozen = trainer.distiller.frozen_networks()
    assert list(frozen) == ["teacher", "assistant"]
    expected = [trainer.foldings[name].twin if fast else net._call_impl for name, net in frozen.items()]
    assert compiled == expected


def test_only_a_teachers_outputs_can_be_kept(two_teachers):
    with pytest.raises(InputError, match="TWO_TEACHERS has frozen networks beside its teacher"):
        two_teachers(SOLVER__CACHE_TEACHER=True, DATASET__VIEW_WEAK="plain")
