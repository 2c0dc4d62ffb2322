"""HSAKD: its losses against ``oracles/hsakd.py`` and the authors' values, its branches, its first stage."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by
from golden_data import assert_golden, case_leaves, case_tensors, listed, loss_cases
from method_cases import build, config, make_batch
from oracles import hsakd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.HSAKD import Branches, branch_loss, joint_labels
from mdistiller.distillers.KD import kd_loss
from mdistiller.engine.build import build_distiller
from mdistiller.functional.rotations import rotations
from mdistiller.models import cifar_model_dict
from mdistiller.models.cifar.resnet import ResNet
from mdistiller.models.facts import facts_of
from mdistiller.registry import InputError

CASES = loss_cases("hsakd")
NETWORKS = [case for case in CASES if "image" in case.values[0]["inputs"]]


def test_equals_the_formula():
    generator = torch.Generator().manual_seed(0)
    given = [3 * torch.randn(2, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2)]
    assert_agree(
        lambda s, t: branch_loss(s.unbind(), t.unbind(), 3.0), lambda s, t: oracle.branch_loss(s, t, 3.0), *given,
        wrt=(0, 1),
    )  # fmt: skip


def by_rotation(rows):
    """The references' rows 4k, ..., 4k + 3 are one image; here the images come first."""
    return rows.reshape(-1, 4, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in NETWORKS])
def test_golden_losses_and_gradients(case, dtype):
    given, options, target = case_leaves(case, dtype), case["hyperparameters"], case_tensors(case, "in")["target"]
    logits_s, logits_t = (by_rotation(given[f"logits_{side}"]) for side in ("student", "teacher"))
    branches_s, branches_t = ([by_rotation(x) for x in listed(given, f"ss_{side}_")] for side in ("student", "teacher"))
    labels = joint_labels(target)
    assert torch.equal(labels, by_rotation(case_tensors(case, "out")["labels_joint"]))
    loss = F.cross_entropy(logits_s[: len(target)], target) + kd_loss(logits_s, logits_t, options["T"])
    assert_golden(case, given, loss + branch_loss(branches_s, branches_t, options["T"]))
    of_teacher = sum(F.cross_entropy(z, labels) for z in branches_t) + F.cross_entropy(logits_t[: len(target)], target)
    assert of_teacher.item() == pytest.approx(case["outputs"]["teacher_stage"], rel=1e-5)


@pytest.mark.parametrize("case", NETWORKS)
def test_golden_branches(case):
    given, options = case_leaves(case), case["hyperparameters"]
    network = ResNet(options["depth"], options["num_filters"], num_classes=options["num_classes"]).double().eval()
    branches = Branches(network, facts_of(network, given["image"].shape[2:])).eval()
    found = {name: given[f"param.backbone.{name}"] for name in network.state_dict() if "num_batches" not in name}
    network.load_state_dict(network.state_dict() | found)
    state = branches.state_dict()
    for name in state:
        part, number, *rest = name.split(".")
        theirs = f"block_extractor{int(number) + 1}" if part == "tails" else f"fc{int(number) + 1}"
        key = ".".join(["param.auxiliary_classifier", theirs, *rest])
        state[name] = given.get(key, state[name])
    branches.load_state_dict(state)
    logits, features = network(given["image"])
    found, expected = branches(features["feats"]), case_tensors(case, "out")
    torch.testing.assert_close(logits, expected["logits"])
    for number, z in enumerate(found):
        torch.testing.assert_close(z, expected[f"ss_logits_{number}"])
    assert_golden(case, given, logits.sum() + sum(z.square().sum() for z in found))


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("resnet8", 3),
        ("ResNet18", 4),
        ("wrn_16_1", 3),
        ("ShuffleV1", 3),
        ("ShuffleV2", 3),
        ("vgg8", 4),
        ("MobileNetV2", 4),
    ],
)
def test_each_architecture_has_branches_of_its_own(name, maps):
    """They share no weight with the network or each other, and end at the size of the network's last map."""
    network = cifar_model_dict[name][0](num_classes=3).eval()
    branches = Branches(network, facts_of(network, (32, 32))).eval()
    _, features = network(torch.zeros(2, 3, 32, 32))
    found = branches(features["feats"])
    assert [z.shape for z in found] == [(2, 12)] * maps
    own = {p.data_ptr() for p in network.parameters()}
    assert not own & {p.data_ptr() for p in branches.parameters()}
    assert all(p.requires_grad for p in branches.parameters())
    assert branches.maps[-1] == len(features["feats"]) - 1


def test_the_teachers_branches_learn_alone_and_are_then_frozen():
    distiller, batch = build("HSAKD", {"HSAKD.PREPARE.EPOCHS": 6}), make_batch("HSAKD")
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    facts = distiller.prepare(lambda epoch: iter([batch]), contextlib.nullcontext)
    moved = {name.split(".")[0] for name, v in distiller.state_dict().items() if not torch.equal(v, before[name])}
    assert moved == {"teacher_branches"} and facts["loss"] < 3 * 3.6  # log 40 = 3.69 by chance
    assert not any(p.requires_grad for p in distiller.teacher_branches.parameters())
    assert not distiller.train().teacher_branches.training and distiller.student_branches.training


def test_losses_are_the_parts():
    distiller, batch = build("HSAKD"), make_batch("HSAKD")
    logits, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    shown = rotations(batch["image"])
    (logits_s, of_student), (logits_t, of_teacher) = (net(shown) for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(logits, logits_s[:8])
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits_s[:8], batch["target"]))
    torch.testing.assert_close(losses["loss_kd"], kd_loss(logits_s, logits_t, 3.0))
    branches = distiller.student_branches(of_student["feats"]), distiller.teacher_branches(of_teacher["feats"])
    torch.testing.assert_close(losses["loss_branches"], branch_loss(*branches, 3.0))


@pytest.mark.parametrize(
    ("values", "changed"),
    [({"T": 2.0}, {"loss_kd", "loss_branches"}), ({"LOSS.BRANCH_WEIGHT": 2.0}, {"loss_branches"})],
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("HSAKD", values) == changed


def test_networks_with_other_numbers_of_branches_are_refused():
    student, teacher = (cifar_model_dict[name][0](num_classes=10) for name in ("vgg8", "resnet8"))
    with pytest.raises(InputError, match=r"the student VGG has 4, the teacher ResNet 3"):
        build_distiller(config("HSAKD", {"DATASET.IMAGE_SIZE": 32}), student, teacher)
