"""Every method on networks that are not the library's: it trains, or says which of the two lacks what."""

import copy

import pytest
import torch
import torchvision
from method_cases import IMAGES, METHODS, TEACHER_METHODS, config, make_batch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from mdistiller.engine.build import build_distiller
from mdistiller.engine.explain import contract_explained
from mdistiller.registry import InputError, distiller_dict


class WithFeatures(nn.Module):
    """A torchvision ResNet that also returns what methods read beside the logits, as the README wraps it."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.projector = nn.Sequential(nn.Conv2d(3, 5, 1), nn.Linear(7, 3))  # left from pre-training, not called

    def forward(self, image):
        net = self.net
        x = net.relu(net.bn1(net.conv1(image)))
        feats = [x]
        x = net.maxpool(x)
        for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
            x = stage(x)
            feats.append(x)
        pooled = net.avgpool(x).flatten(1)
        return net.fc(pooled), {"feats": feats, "pooled_feat": pooled}


class Bare(WithFeatures):
    """Logits, and nothing beside them."""

    def forward(self, image):
        return self.net(image), {}


def wrapped(wrapper, block):
    return wrapper(torchvision.models.ResNet(block, [1, 1, 1, 1], num_classes=10))


def train_a_step(method, wrapper):
    """Build the method on a student and a teacher of other widths, and train the student by one step."""
    torch.manual_seed(0)
    student, teacher = wrapped(wrapper, BasicBlock), wrapped(wrapper, Bottleneck)
    further = {name: wrapped(wrapper, BasicBlock) for name in distiller_dict[method].networks}
    distiller = build_distiller(config(method), student, teacher, IMAGES, further).train()
    before = copy.deepcopy(student.net.conv1.weight)
    batch = make_batch(method)
    with contract_explained(distiller, batch):
        _, losses = distiller(**batch, epoch=1)
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.01)
    sum(loss.mean() for loss in losses.values()).backward()
    optimizer.step()
    assert all(torch.isfinite(loss).all() for loss in losses.values())
    assert not torch.equal(student.net.conv1.weight, before)
    return distiller


LACKING = {  # what methods ask of a network that no wrapped one has
    "FCFD": r"the student WithFeatures does not say by get_stages\(\)",
    "OFD": r"the teacher WithFeatures does not say by get_bn_before_relu\(\)",
    "HSAKD": r"the student WithFeatures does not offer them by get_tails\(\)",
    "FSP": r"equal widths; the student WithFeatures has \[64, 64, .*the teacher WithFeatures \[64, 256",
}


@pytest.mark.parametrize("method", METHODS)
def test_a_wrapped_network_trains_or_is_told_what_it_lacks(method):
    if method in LACKING:
        with pytest.raises(InputError, match=LACKING[method]):
            train_a_step(method, WithFeatures)
    else:
        train_a_step(method, WithFeatures)


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_a_network_of_logits_trains_or_is_told_what_it_lacks(method):
    """Methods that compare logits need no more."""
    try:
        train_a_step(method, Bare)
    except InputError as error:
        assert any(f"the {role} {name}" in str(error) for role in ("student", "teacher") for name in ("Bare", "(Bare)"))


LOGIT_METHODS = ["CTKD", "DIST", "DKD", "KD", "KD_TWO_VIEWS", "MLKD", "VRM", "VRM_ONE_VIEW"]


@pytest.mark.parametrize("method", LOGIT_METHODS)
def test_methods_that_compare_logits_train_a_network_of_logits(method):
    train_a_step(method, Bare)


def test_norms_before_the_relu_that_a_wrapped_teacher_names_are_enough():
    class WithNorms(WithFeatures):
        def get_bn_before_relu(self):
            stages = (self.net.layer1, self.net.layer2, self.net.layer3, self.net.layer4)
            return [[part for part in stage[-1].children() if isinstance(part, nn.BatchNorm2d)][-1] for stage in stages]

    distiller = train_a_step("OFD", WithNorms)
    assert distiller.stages == 4
    assert [m[0].weight.shape[:2] for m in distiller.connectors.connectors] == [
        (256, 64), (512, 128), (1024, 256), (2048, 512)
    ]  # fmt: skip


def test_the_layers_that_are_acclimated_are_those_that_are_called():
    distiller = train_a_step("DIST_PLUS", WithFeatures)
    net = distiller.teacher.net
    expected = [*net.layer4[-1].downsample[0].parameters(), *net.fc.parameters()]
    assert {id(p) for p in distiller.teacher_parameters()} == {id(p) for p in expected}


def test_facts_are_asked_once_kept_copied_and_not_saved():
    torch.manual_seed(0)
    student, teacher = wrapped(WithFeatures, BasicBlock), wrapped(WithFeatures, Bottleneck)
    calls = []
    for network in (student, teacher):
        network.register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    cfg = config("MDR")
    distiller = build_distiller(cfg, student, teacher)
    assert len(calls) == 2 and distiller.network_facts(cfg)[0] is distiller.student_facts and len(calls) == 2
    assert distiller.student_facts.pooled_width == 512 and distiller.teacher_facts.pooled_width == 2048
    twin = copy.deepcopy(distiller)
    assert (twin.student_facts, twin.teacher_facts) == (distiller.student_facts, distiller.teacher_facts)
    assert not [key for key in distiller.state_dict() if "facts" in key]
