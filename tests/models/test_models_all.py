"""Every registered network against the contract, and against the reference's numbers where it has them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Collection

import pytest
import torch
from golden_data import OWN, change, drawn_alike, fill_state, golden_dir, golden_images, golden_json, move_last_digit
from torch import nn

from mdistiller.models import cifar_model_dict, imagenet_model_dict, tiny_imagenet_model_dict

TABLES = {
    "cifar": cifar_model_dict,
    "tiny_imagenet": tiny_imagenet_model_dict,
    "imagenet": imagenet_model_dict,
}
NATIVE_SIZE = {"cifar": 32, "tiny_imagenet": 64, "imagenet": 224}
ALL = [(family, name) for family, table in TABLES.items() for name in table]
NOT_IN_REFERENCE = {("imagenet", "ResNet152"), ("cifar", "resnet14x4")}
DEEP = {("imagenet", "ResNet101"), ("imagenet", "ResNet152")}  # ResNet50 with more blocks
GOLDEN = [entry for group in golden_json("models.json").values() for entry in group]


def of_golden(golden: dict) -> tuple[str, str]:
    return golden["group"], golden["name"]


def marks(model: tuple[str, str], slow: Collection[tuple[str, str]]) -> dict:
    """Named by the model, and run only with ``-m slow`` where it is one of ``slow``."""
    return {"id": "-".join(model), "marks": [pytest.mark.slow] if model in slow else []}


def every_model(slow: Collection[tuple[str, str]] = ()):
    """Run a test for the ``family`` and ``name`` of each registered network."""
    return pytest.mark.parametrize("family, name", [pytest.param(*model, **marks(model, slow)) for model in ALL])


def every_golden(slow: Collection[tuple[str, str]] = ()):
    """Run a test for the reference's numbers of each network that it has."""
    return pytest.mark.parametrize("golden", [pytest.param(entry, **marks(of_golden(entry), slow)) for entry in GOLDEN])


def build(family: str, name: str, **kwargs) -> nn.Module:
    entry = TABLES[family][name]
    constructor = entry if family == "imagenet" else entry[0]
    return constructor(**kwargs)


def build_golden(golden: dict) -> nn.Module:
    return build(*of_golden(golden), num_classes=golden["num_classes"])


def filled(golden: dict) -> nn.Module:
    """The network with the reference's weights, in eval mode."""
    return fill_state(build_golden(golden)).eval()


def without_values(golden: dict) -> nn.Module:
    """The network where shapes and names are all that counts."""
    with torch.device("meta"):
        return build_golden(golden)


def input_of(golden: dict) -> torch.Tensor:
    return golden_images(golden["input"][0], golden["input"][-1])


def small_size(family: str) -> int:
    return 64 if family == "imagenet" else 32


def small_input(family: str, batch: int = 2, size: int | None = None) -> torch.Tensor:
    return golden_images(batch, size or small_size(family))


def all_maps(features) -> list[torch.Tensor]:
    return [*features["feats"], *features.get("preact_feats", []), features["pooled_feat"]]


# Against the reference


def assert_close(actual, expected, scale: float | None = None, rtol: float = 1e-4) -> None:
    """Largest difference within ``rtol`` of ``scale``, by default the largest expected magnitude."""
    actual = torch.as_tensor(actual, dtype=torch.float64)
    expected = torch.as_tensor(expected, dtype=torch.float64)
    scale = expected.abs().max().item() if scale is None else scale
    assert (actual - expected).abs().max().item() <= rtol * max(scale, 1e-12)


def assert_same_map(actual: torch.Tensor, stats: dict, rtol: float = 1e-4) -> None:
    """A map against its recorded statistics. Trailing axes of length 1 are not compared."""
    shape = list(stats["shape"])
    while len(shape) > actual.ndim:
        assert shape.pop() == 1
    assert list(actual.shape) == shape
    actual = actual.detach().double()
    scale = stats["std"] + abs(stats["mean"])
    assert_close(actual.mean(), stats["mean"], scale, rtol)
    assert_close(actual.std(correction=0), stats["std"], scale, rtol)
    assert_close(actual.min(), stats["min"], scale + abs(stats["min"]), rtol)
    assert_close(actual.abs().sum(), stats["abs_sum"], rtol=rtol)
    assert_close(actual.reshape(-1)[:4], stats["first4"], scale, rtol)


def test_golden_models_are_all_registered() -> None:
    found = {of_golden(golden) for golden in GOLDEN}
    assert found <= set(ALL)
    others = set(ALL) - found
    assert golden_dir() != OWN or others == NOT_IN_REFERENCE, f"put {others - NOT_IN_REFERENCE} into NOT_IN_REFERENCE"


@every_golden()
def test_golden_state_dict(golden: dict) -> None:
    net = without_values(golden)
    assert [[key, list(entry.shape)] for key, entry in net.state_dict().items()] == golden["state_dict"]
    assert sum(p.numel() for p in net.parameters()) == golden["num_parameters"]
    assert len(list(net.parameters())) == golden["num_parameter_tensors"]


@every_golden()
def test_golden_interface(golden: dict) -> None:
    net = without_values(golden)
    name_of = {module: key for key, module in net.named_modules()}
    if golden["bn_before_relu"] is not None:
        found = [[name_of[m], type(m).__name__, m.num_features] for m in net.get_bn_before_relu()]
        assert found == golden["bn_before_relu"]
    if golden["feat_modules"] is not None:
        assert [name_of[module] for module in net.get_feat_modules()] == golden["feat_modules"]
    widths = [stats["shape"][1] for stats in golden["features"]["feats"]]
    assert net.get_stage_channels() == widths
    if golden["stage_channels"] is not None and "ResNet" not in golden["name"]:
        # ResNets: the reference says 256, 512, 1024, 2048 for every depth, without the stem.
        assert net.get_stage_channels() == golden["stage_channels"]


@every_golden(slow=DEEP)
def test_golden_eval(golden: dict) -> None:
    with torch.no_grad():
        logits, features = filled(golden)(input_of(golden))
    assert list(logits.shape) == golden["logits_shape"]
    assert_close(logits[:, : golden["logits_first"]], golden["logits"])
    assert_same_map(logits, golden["logits_stats"])
    assert set(features) - {"pooled_map"} == set(golden["feature_keys"])
    assert_same_map(features["pooled_feat"], golden["features"]["pooled_feat"])
    for key in set(features) - {"pooled_feat", "pooled_map"}:
        assert len(features[key]) == len(golden["features"][key])
        for actual, stats in zip(features[key], golden["features"][key], strict=True):
            assert_same_map(actual, stats)


@every_golden(slow={*DEEP, ("imagenet", "ResNet50")})
def test_golden_train(golden: dict) -> None:
    train_golden, images = golden["train_mode_float64"], input_of(golden).double()
    net = filled(golden).double().train()
    start = copy.deepcopy(net)
    with torch.no_grad():
        logits, _ = net(images)
        rtol = 1e-6
        if not drawn_alike():  # ten times what the last digit does
            rtol = max(rtol, 10 * change(move_last_digit(copy.deepcopy(start))(images)[0], logits))
    expected = torch.tensor(train_golden["logits"], dtype=torch.float64)
    assert_close(logits[:, : expected.shape[1]], expected, rtol=rtol)
    assert_same_map(logits, train_golden["logits_stats"], rtol)

    start, after = start.state_dict(), net.state_dict()
    twice = []  # layers that the reference runs twice per step
    if 2 in train_golden["num_batches_tracked_after"]:
        twice = [key for key, m in net.named_modules() if m in net.get_bn_before_relu()]
    for key, (mean, std) in train_golden["running_stats_after"].items():
        if key.rpartition(".")[0] in twice:
            # r2 = 0.81 r0 + 0.19 batch; running once gives 0.9 r0 + 0.1 batch. Means are linear in r.
            r0 = start[key].mean().item()
            batch = (mean - 0.81 * r0) / 0.19
            assert_close(after[key].mean(), 0.9 * r0 + 0.1 * batch, abs(mean) + std, rtol=rtol)
        else:
            scale = abs(mean) + std
            assert_close(after[key].mean(), mean, scale, rtol=rtol)
            assert_close(after[key].std(correction=0), std, scale, rtol=rtol)


@every_golden()
def test_golden_initialisation(golden: dict) -> None:
    torch.manual_seed(0)
    net = build_golden(golden)
    parameters = dict(net.named_parameters())
    assert {key for key, p in parameters.items() if p.ndim >= 2} == set(golden["init_mean_std"])
    for key, (mean, std) in golden["init_mean_std"].items():
        values = parameters[key].detach()
        # Two samples of one distribution, of n values each: five standard errors of their difference.
        error = 5 * (2 / values.numel()) ** 0.5
        assert abs(values.mean().item() - mean) <= error * std, key
        assert abs(values.std(correction=0).item() - std) <= error * std, key
    for key, p in parameters.items():
        if key.endswith("bias"):
            # Uniform over the same interval, or exactly 0.
            expected = golden["init_bias_abs_max"].get(key, 0.0)
            assert p.abs().max().item() == pytest.approx(expected, rel=0.25), key
        elif p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), key


# The contract


@every_model()
def test_features(family: str, name: str) -> None:
    net = build(family, name, num_classes=10)
    with torch.no_grad():
        logits, features = net.eval()(small_input(family))
    assert logits.shape == (2, 10)
    assert features["pooled_feat"].ndim == 2
    assert [f.shape[1] for f in features["feats"]] == net.get_stage_channels()
    assert all(torch.isfinite(f).all() for f in all_maps(features))
    if "preact_feats" in features:
        assert [f.shape for f in features["preact_feats"]] == [f.shape for f in features["feats"]]
    assert net.has_stem != name.startswith(("vgg", "MobileNetV1")) or (family, name) in NOT_IN_REFERENCE
    assert net.get_stage_indices() == tuple(range(int(net.has_stem), len(features["feats"])))


@every_model()
def test_stage_channels_cannot_be_changed_from_outside(family: str, name: str) -> None:
    with torch.device("meta"):
        net = build(family, name)
    channels = list(net.get_stage_channels())
    net.get_stage_channels().pop(0)
    assert net.get_stage_channels() == channels


@every_model()
def test_bn_before_relu_fits_the_deepest_maps(family: str, name: str) -> None:
    with torch.device("meta"):
        net = build(family, name)
    if name == "ShuffleV2":
        with pytest.raises(NotImplementedError, match="ShuffleNetV2 has no batch norm"):
            net.get_bn_before_relu()
        return
    norms = net.get_bn_before_relu()
    assert [bn.num_features for bn in norms] == net.get_stage_channels()[-len(norms) :]


@every_model(slow=DEEP)
def test_a_training_step_reaches_everything_once(family: str, name: str) -> None:
    """Every parameter gets a gradient from the logits, every map does, every batch norm runs once."""
    net = build(family, name, num_classes=10).train()
    logits, features = net(small_input(family, batch=3))
    for feature in all_maps(features):
        feature.retain_grad()
    logits.square().mean().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None] == []
    assert all(feature.grad is not None for feature in all_maps(features))
    tracked = {key: int(n) for key, n in net.named_buffers() if key.endswith("num_batches_tracked")}
    assert set(tracked.values()) == {1}, {key: n for key, n in tracked.items() if n != 1}


@every_model(slow=DEEP)
def test_other_sizes(family: str, name: str) -> None:
    net = build(family, name, num_classes=10).eval()
    sizes = (32, 128) if family == "imagenet" else (16, 64)
    for size in sizes:
        with torch.no_grad():
            logits, features = net(golden_images(1, size))
        assert logits.shape == (1, 10)
        assert [f.shape[1] for f in features["feats"]] == net.get_stage_channels()


@every_model(slow=DEEP)
def test_maps_are_not_changed_afterwards(family: str, name: str) -> None:
    """Where the maps are post- and pre-activation of each other, they stay so until forward has ended."""
    net = build(family, name, num_classes=10).eval()
    with torch.no_grad():
        _, features = net(small_input(family))
    preact_feats = features.get("preact_feats")
    if preact_feats is None or name.startswith("wrn") or name == "ShuffleV2":
        return  # no such maps; the next block's batch norm; a permutation
    for feat, preact in zip(features["feats"], preact_feats, strict=True):
        assert torch.equal(feat, preact.relu())
    for index in net.get_stage_indices()[1:]:
        assert preact_feats[index].min() < 0


@every_model()
def test_default_classes(family: str, name: str) -> None:
    expected = {"cifar": 100, "tiny_imagenet": 200, "imagenet": 1000}[family]
    with torch.device("meta"):
        net = build(family, name) if family != "tiny_imagenet" else build(family, name, num_classes=expected)
        logits, _ = net.eval()(torch.empty(1, 3, NATIVE_SIZE[family], NATIVE_SIZE[family]))
    assert logits.shape == (1, expected)


@every_model(slow=DEEP)
def test_channels_last_is_equal(family: str, name: str) -> None:
    net = build(family, name, num_classes=10).eval()
    x = small_input(family)
    with torch.no_grad():
        logits, features = net(x)
        net.to(memory_format=torch.channels_last)
        logits_last, features_last = net(x.contiguous(memory_format=torch.channels_last))
    assert_close(logits_last, logits)
    for a, b in zip(all_maps(features_last), all_maps(features), strict=True):
        assert_close(a, b)


@every_model(slow=DEEP)
def test_pickle_and_state_dict_round_trip(family: str, name: str) -> None:
    net = build(family, name, num_classes=10).eval()
    x = small_input(family, batch=1)
    fresh = build(family, name, num_classes=10).eval()
    fresh.load_state_dict(net.state_dict())
    with torch.no_grad():
        expected = net(x)[0]
        assert torch.equal(fresh(x)[0], expected)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x)[0], expected)


@every_model(slow=DEEP)
def test_traces_symbolically(family: str, name: str) -> None:
    """By torch.fx, which export tools stand on."""
    net = build(family, name, num_classes=10).eval()
    x = small_input(family, batch=1)
    with torch.no_grad():
        assert_close(torch.fx.symbolic_trace(net)(x)[0], net(x)[0])


@pytest.mark.slow
@every_model()
def test_compiles_as_one_graph(family: str, name: str) -> None:
    net = build(family, name, num_classes=10).eval()
    x = small_input(family, batch=1)
    torch.compiler.reset()
    with torch.no_grad():
        assert_close(torch.compile(net, backend="eager", fullgraph=True)(x)[0], net(x)[0])


@every_model(slow=DEEP)
def test_bfloat16_and_autocast(family: str, name: str) -> None:
    net = build(family, name, num_classes=10).eval()
    x = small_input(family, batch=1)
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.isfinite(net(x)[0]).all()
        assert net.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


def test_building_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with torch.device("meta"):
        for model in ALL:
            build(*model)
    assert capsys.readouterr() == ("", "")
