"""TaT: its loss against ``oracles/tat.py`` and the authors' values, its embeddings, and its edges."""

import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_float32_under_autocast, changed_by, maps
from golden_data import assert_golden, case_leaves, case_tensors, loss_cases
from method_cases import build, make_batch
from oracles import tat as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.TaT import Embedding, tat_loss
from mdistiller.registry import InputError


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("over", ["teacher", "student"])
def test_equals_the_formula(heads, over):
    assert_agree(
        lambda q, v, t: tat_loss(q, v, t, heads, over), lambda q, v, t: oracle.tat_loss(q, v, t, heads, over),
        *maps((4, 4, 4), side=2), wrt=(0, 1, 2),
    )  # fmt: skip


# The form for segmentation has groups of patches and a learned key.
CASES = [case for case in loss_cases("tat") if "anchor" not in case.values[0]["hyperparameters"]]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_golden_losses_and_gradients(case, dtype):
    given = case_leaves(case, dtype)
    f_s, f_t, embedded, modules = given["feat_s_0"], given["feat_t_0"], [], {}
    for name in ("query", "value"):
        module = Embedding(f_s.shape[1], f_t.shape[1]).to(dtype).train()
        keys = [key for key in module.state_dict() if "num_batches" not in key]
        state = {key: given[f"param.{name}.{reference(key)}"].detach() for key in keys}
        module.load_state_dict(module.state_dict() | state)
        given |= {f"param.{name}.{reference(key)}": parameter for key, parameter in module.named_parameters()}
        embedded.append(module(f_s))
        modules[name] = module
    assert_golden(case, given, tat_loss(*embedded, f_t, case["hyperparameters"]["heads"]))
    for key, expected in case_tensors(case, "after", dtype).items():
        name, _, rest = key.partition(".")
        found = modules[name].state_dict()[rest.replace("l2norm", "norm")]
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def reference(key):
    """The reference's name of a parameter."""
    return key.replace("conv.", "conv2d.").replace("norm.", "l2norm.")


def test_values_that_are_the_teachers_map_have_no_loss_where_each_position_sees_itself():
    f_t = torch.eye(4, dtype=torch.float64).view(1, 4, 2, 2)
    assert tat_loss(100 * f_t, f_t, f_t) < 1e-12 < tat_loss(0 * f_t, f_t, f_t)
    assert_float32_under_autocast(tat_loss, maps((4, 4, 4)))
    with pytest.raises(InputError, match=r"TAT\.HEADS 3 does not divide the teacher's 4 channels"):
        tat_loss(f_t, f_t, f_t, heads=3)


def test_losses_are_the_parts():
    distiller, batch = build("TAT"), make_batch("TAT")
    logits, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    (_, of_student), (logits_t, of_teacher) = (net(batch["image"]) for net in (distiller.student, distiller.teacher))
    f_s, f_t = of_student["feats"][-1], of_teacher["feats"][-1]
    torch.testing.assert_close(losses["loss_tat"], 0.1 * tat_loss(distiller.query(f_s), distiller.value(f_s), f_t))
    torch.testing.assert_close(losses["loss_kd"], 0.9 * kd_loss(logits, logits_t, 4.0))
    torch.testing.assert_close(losses["loss_ce"], 0.1 * F.cross_entropy(logits, batch["target"]))


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"HEADS": 4}, "loss_tat"), ({"SOFTMAX_OVER": "student"}, "loss_tat"), ({"LOSS.TAT_WEIGHT": 1.0}, "loss_tat"),
        ({"T": 2.0}, "loss_kd"),
    ],
)  # fmt: skip
def test_keys_change_what_they_name(values, changed):
    assert changed_by("TAT", values) == {changed}
