"""A network's facts: right for every network of the tables and for networks of one's own, and asked without a trace."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mdistiller.models.facts import facts_of
from mdistiller.registry import MODEL_FAMILIES, InputError

NETWORKS = [(family, name) for family, table in MODEL_FAMILIES.items() for name in sorted(table)]


@pytest.mark.parametrize(("family", "name"), NETWORKS)
def test_facts_of_the_tables_networks(family, name):
    with torch.device("meta"):
        network = MODEL_FAMILIES[family][name](num_classes=7)
    facts = facts_of(network, (64, 64), "teacher")
    with torch.no_grad():
        logits, features = network.eval()(torch.zeros(1, 3, 64, 64, device="meta"))
    assert facts.classes == logits.shape[1] == 7
    assert facts.channels == network.get_stage_channels()
    assert facts.shapes == tuple(feat.shape for feat in features["feats"])
    assert facts.strides == [round(64 / feat.shape[2]) for feat in features["feats"]]
    assert facts.stages == network.get_stage_indices()
    assert facts.preact_channels == facts.channels
    assert (facts.preact_shapes is not None) == ("preact_feats" in features)
    assert facts.pooled_width == features["pooled_feat"].shape[1]
    assert network.get_submodule(facts.classifier).weight.shape[:2] == (7, facts.pooled_width)
    assert isinstance(network.get_submodule(facts.last_convolution), nn.Conv2d)
    assert facts.last_convolution != facts.classifier
    if facts.norms_before_relu is not None:
        assert [network.get_submodule(path) for path in facts.norms_before_relu] == network.get_bn_before_relu()
    assert str(facts) == f"teacher {type(network).__name__}"


class Odd(nn.Module):
    """Its modules stand in another order than they are called in, and some are never called."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(8, 5)
        self.last = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Dropout(0.5))
        self.unused = nn.Sequential(nn.Conv2d(8, 9, 1), nn.Linear(9, 11))

    def forward(self, image):
        first = self.stem(image)
        second = self.last(first)
        pooled = second.mean((2, 3))
        return self.head(pooled), {"feats": [first, second], "pooled_feat": pooled}


def test_layers_are_found_by_what_they_compute():
    facts = facts_of(Odd(), (8, 8))
    assert (facts.classifier, facts.last_convolution, facts.classes, facts.pooled_width) == ("head", "last", 5, 8)
    assert (facts.channels, facts.strides, facts.stages) == ([6, 8], [1, 2], (1,))
    assert facts.preact_shapes is None and facts.preact_channels == [6, 8]


class Heads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.convolution, self.linear = nn.Conv2d(3, 5, 1), nn.Linear(3, 5)
        self.halves = nn.Sequential(nn.Linear(3, 10))
        nn.utils.parametrizations.weight_norm(self.linear)

    def forward(self, image):
        pooled = image.mean((2, 3), keepdim=True)
        flat = pooled.flatten(1)
        logits = {
            "convolution": lambda: self.convolution(pooled).flatten(1),
            "normalised": lambda: self.linear(flat),
            "two heads": lambda: (self.linear(flat) + self.convolution(pooled).flatten(1)) / 2,
            "half": lambda: self.halves(flat).chunk(2, dim=1)[0],
        }[self.kind]()
        return logits, {"pooled_feat": pooled}


@pytest.mark.parametrize(
    ("kind", "classifier"),
    [("convolution", "convolution"), ("normalised", "linear"), ("two heads", None), ("half", None)],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_other_classifiers(kind, classifier, device):
    facts = facts_of(Heads(kind).to(device), (8, 8), "student")
    assert (facts.classifier, facts.classes, facts.pooled_width) == (classifier, 5, 3)
    if classifier is None:
        with pytest.raises(InputError, match="the student Heads has no layer whose output is the logits"):
            facts.need("classifier")


def test_maps_of_tokens_have_widths_and_strides():
    """As of a vision transformer with patches of 4 pixels and a class token, and of a pyramid of maps."""

    class Tokens(nn.Module):
        def forward(self, image):
            tokens = F.avg_pool2d(image, 4).flatten(2).mT
            tokens = torch.cat([tokens[:, :1], tokens], dim=1)
            return image.mean((2, 3)), {"feats": [tokens, F.avg_pool2d(image, (8, 2))]}

    facts = facts_of(Tokens(), (32, 32))
    assert facts.shapes == ((1, 65, 3), (1, 3, 4, 16))
    assert (facts.channels, facts.strides) == ([3, 3], [4, 4])


def test_asking_moves_no_statistics_no_generator_and_no_mode():
    network = Odd().train()
    network.stem[1].eval()
    before, modes = copy.deepcopy(network.state_dict()), [module.training for module in network.modules()]
    generator = torch.get_rng_state()
    facts = facts_of(network, (8, 8))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert [module.training for module in network.modules()] == modes
    assert not any(module._forward_hooks for module in network.modules())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert facts == facts_of(copy.deepcopy(network), (8, 8)) == copy.deepcopy(facts)


def test_a_network_for_other_images_is_refused_with_the_size():
    class Fixed(nn.Linear):
        def forward(self, image):
            return super().forward(image.flatten(1)), {}

    network = Fixed(3 * 64, 10).train()
    assert facts_of(network, (8, 8)).classes == 10
    with pytest.raises(InputError, match=r"the student Fixed fails on an image of 32x32 .*DATASET\.IMAGE_SIZE"):
        facts_of(network, (32, 32), "student")
    assert network.training and not network._forward_hooks


@pytest.mark.parametrize("fact", ["shapes", "pooled_width", "classifier", "last_convolution", "norms_before_relu"])
def test_what_a_network_lacks_is_said_by_role_and_class(fact):
    class Bare(nn.Module):
        def forward(self, image):
            return image.mean((2, 3)), {}

    facts = facts_of(Bare(), (8, 8), "teacher")
    assert getattr(facts, fact) is None and facts.stages == ()
    with pytest.raises(InputError, match="the teacher Bare "):
        facts.need(fact)


@pytest.mark.parametrize(
    "output", [lambda x: x, lambda x: (x, x), lambda x: ((x, x), {}), lambda x: {"logits": x}, lambda x: (x, {}, {})]
)
def test_a_network_that_returns_something_else_is_refused(output):
    class Other(nn.Module):
        def forward(self, image):
            return output(image.flatten(1))

    with pytest.raises(InputError, match=r"the student Other must return \(logits, features\)"):
        facts_of(Other(), (8, 8), "student")


def test_maps_behind_a_relu_are_not_taken_for_maps_before_it_without_a_word(capsys):
    class Wrapped(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.conv, self.fc, self.activation = nn.Conv2d(3, 4, 3), nn.Linear(4, 10), activation

        def forward(self, x):
            x = self.activation(self.conv(x))
            pooled = x.mean((2, 3))
            return self.fc(pooled), {"feats": [x], "pooled_feat": pooled}

    for activation, expected in ((nn.ReLU(inplace=True), 1), (nn.Identity(), 0)):
        network = Wrapped(activation).requires_grad_(False)
        assert facts_of(network, (8, 8), "teacher").preact_channels == [4]
        assert capsys.readouterr().out.count("teacher Wrapped gives no features['preact_feats']") == expected
