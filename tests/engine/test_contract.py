"""A method's contract: constructors, further networks, and what a step may return."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from plugin_files import forgotten
from runs import make_trainer, same_state, teacher_file, tiny_config
from torch import nn

from mdistiller.contract import contract_of
from mdistiller.distillers import Distiller, register_distiller
from mdistiller.engine.run import run
from mdistiller.registry import InputError, distiller_dict


@pytest.fixture(autouse=True)
def clean_slate():
    with forgotten():
        yield


def test_a_registered_method_gets_nothing_by_place():
    class Mutual(Distiller):
        def __init__(self, student, teacher, cfg, peer):
            super().__init__(student, teacher)

    assert contract_of(Mutual).arguments["peer"] == "num_data"  # a file of another project: by place

    @register_distiller("MUTUAL")
    class Registered(Mutual):
        def __init__(self, student, teacher, cfg, peer): ...

    with pytest.raises(
        InputError, match=r'asks for \'peer\', which the library does not pass; .* networks = {"peer": "student"}'
    ):
        contract_of(Registered)


# Further networks


def mutual_learning(name="MUTUAL", networks=None):
    @register_distiller(name)
    class Mutual(Distiller):
        def __init__(self, student, cfg, peer, judge=None):
            super().__init__(student)
            self.peer, self.judge = peer, judge

        def forward_train(self, image, target, **kwargs):
            own, other = self.student(image)[0], self.peer(image)[0]
            return own, {"ce": F.cross_entropy(own, target), "ce_peer": F.cross_entropy(other, target)}

    Mutual.networks = {"peer": "student"} if networks is None else networks
    return Mutual


def test_a_declared_network_has_keys_is_built_trained_saved_and_resumed(tmp_path):
    mutual_learning()
    values = {"DISTILLER__TYPE": "MUTUAL", "DISTILLER__PEER": "resnet14"}
    trainer = make_trainer(tmp_path, **values)
    peer = trainer.distiller.peer
    assert sum(p.numel() for p in peer.parameters()) > sum(p.numel() for p in trainer.distiller.student.parameters())
    before = {key: value.clone() for key, value in peer.state_dict().items()}
    run(tiny_config(tmp_path, **values, SOLVER__EPOCHS=1))
    resumed = make_trainer(tmp_path, **values)
    resumed.resume()
    assert not same_state(before, resumed.distiller.peer.state_dict())
    assert any(key.startswith("peer.") for key in torch.load(resumed.folder / "latest", weights_only=True)["model"])


def test_a_peer_of_the_students_architecture_starts_elsewhere(tmp_path):
    mutual_learning()
    distiller = make_trainer(tmp_path, DISTILLER__TYPE="MUTUAL").distiller
    student, peer = distiller.student.state_dict(), distiller.peer.state_dict()
    assert student.keys() == peer.keys() and not same_state(student, peer)


def test_a_further_teacher_is_loaded_frozen_and_not_saved(tmp_path):
    mutual_learning(networks={"peer": "student", "judge": "teacher"})
    values = {"DISTILLER__TYPE": "MUTUAL"}
    with pytest.raises(InputError, match=r"DISTILLER\.JUDGE_CKPT names no file; MUTUAL needs the weights of judge"):
        make_trainer(tmp_path, **values)
    trainer = make_trainer(tmp_path, **values, DISTILLER__JUDGE_CKPT=teacher_file(tmp_path))
    judge = trainer.distiller.train().judge
    assert not judge.training and not any(p.requires_grad for p in judge.parameters())
    assert not any(key.startswith("judge.") for key in trainer.state_dict()["model"])
    learned = {id(p) for p in trainer.distiller.get_learnable_parameters()}
    assert not learned & {id(p) for p in judge.parameters()}


# The value of forward_train


class Returns(Distiller):
    """As another project writes it: not registered by our decorator."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        return self.value(logits, F.cross_entropy(logits, target))


def trainer_of(tmp_path, value, decorated=False):
    class Method(Returns):
        pass

    Method.value = staticmethod(value)
    if decorated:
        register_distiller("RETURNS")(Method)
    else:
        distiller_dict["RETURNS"] = Method
    return make_trainer(tmp_path, DISTILLER__TYPE="RETURNS", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path))


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda logits, loss: loss, "Tensor"),
        (lambda logits, loss: (logits,), "1 values"),
        (lambda logits, loss: (None, {"ce": loss}), "NoneType instead of the logits"),
        (lambda logits, loss: (logits, loss), r"tensor\(.* instead of the losses"),
        (lambda logits, loss: (logits, {}), r"\{\} instead of the losses"),
        (lambda logits, loss: (logits, {"ce": loss, "kd": 0.0}), "the loss 'kd' as float"),
        (lambda logits, loss: (logits, {"ce": loss.detach()}), r"losses without gradient \(ce\)"),
    ],
)
def test_another_value_is_named(tmp_path, value, found):
    message = rf"test_contract.py, Method: forward_train returned {found}; it must return the student's logits"
    with pytest.raises(InputError, match=message):
        trainer_of(tmp_path, value).train()


def test_further_values_of_another_projects_file_are_dropped_with_a_notice(tmp_path, capsys):
    trainer_of(tmp_path, lambda logits, loss: (logits, {"ce": loss}, {"feats": None})).train()
    assert capsys.readouterr().out.count("forward_train returns 3 values; all but the logits and the losses") == 1


def test_further_values_of_a_registered_method_are_refused(tmp_path):
    with pytest.raises(InputError, match="forward_train returned 3 values"):
        trainer_of(tmp_path, lambda logits, loss: (logits, {"ce": loss}, None), decorated=True).train()


@pytest.mark.parametrize(
    ("value", "found"),
    [
        (lambda logits, loss: (logits[:, :7], {"ce": loss}), r"\(8, 7\) for 8 images and 10 classes"),
        (lambda logits, loss: (torch.cat([logits, logits]), {"ce": loss}), r"\(16, 10\) for 8 images and 10 classes"),
        (lambda logits, loss: (loss, {"ce": loss}), r"\(\) for 8 images and 10 classes"),
    ],
)
def test_logits_of_another_shape_are_named(tmp_path, value, found):
    with pytest.raises(InputError, match=rf"Method: forward_train returned logits {found}; it must"):
        trainer_of(tmp_path, value).train()


class KeepsNothing(Returns):
    def __init__(self, student, teacher, cfg):
        nn.Module.__init__(self)


class TakesNothing(Returns):
    def __init__(self):
        super().__init__(None, None, None)


class HasNoStep(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)


class TrainsNothing(Returns):
    def get_learnable_parameters(self):
        return []


@pytest.mark.parametrize(
    ("method", "found"),
    [
        (
            KeepsNothing,
            r"the constructor does not store the student; it must call super\(\).__init__\(student, teacher\)",
        ),
        (TakesNothing, "the constructor takes no student; it can take student, teacher, cfg, num_data"),
        (HasNoStep, "the class defines no forward_train"),
        (
            TrainsNothing,
            r"there is nothing to train; get_learnable_parameters\(\) and parameter_groups\(\) must",
        ),
    ],
)
def test_a_broken_class_is_named_before_the_first_step(tmp_path, method, found):
    distiller_dict["BROKEN"] = method
    with pytest.raises(InputError, match=rf"test_contract.py, {method.__name__}: {found}"):
        make_trainer(tmp_path, DISTILLER__TYPE="BROKEN", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path))


class Hidden(Returns):
    """A module in a plain list, a tensor without a name, a loss without a gradient, and a parameter left out."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.heads = [nn.Linear(10, 10)]
        self.known, self.used = nn.Linear(10, 10), nn.Linear(10, 10)

    def get_learnable_parameters(self):
        return [*self.student.parameters(), *self.used.parameters()]

    def forward_train(self, image, target, **kwargs):
        logits, _ = self.student(image)
        other = self.heads[0](self.known(self.used(logits)))
        return logits, {"ce": F.cross_entropy(other, target), "kd": torch.tensor(1.0)}


def test_what_is_not_trained_is_named_once(tmp_path, capsys):
    distiller_dict["HIDDEN"] = Hidden
    make_trainer(tmp_path, DISTILLER__TYPE="HIDDEN", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path)).train()
    out = capsys.readouterr().out
    assert (
        out.count("the losses depend on known.bias, known.weight, self.heads, which the optimiser does not hold") == 1
    )
    assert out.count("nothing is learned from kd, which has no gradient in the first step") == 1


def test_a_run_whose_weights_are_all_zero_is_said(tmp_path, capsys):
    zero = {"KD__LOSS__CE_WEIGHT": 0, "KD__LOSS__KD_WEIGHT": 0}
    make_trainer(tmp_path, **zero, DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT=teacher_file(tmp_path)).train()
    assert capsys.readouterr().out.count("KD.py, KD: every loss is 0 in the first step") == 1


def test_every_optional_part_has_a_default():
    plain = Distiller(nn.Linear(2, 2))
    assert plain.deployed() is plain.student
    assert plain.frozen_networks() == {} and plain.teacher_parameters() == [] and plain.preparation() is None
    assert plain.on_epoch_start(1) is None
    (group,) = plain.parameter_groups(None)
    assert len(group["params"]) == 2
