"""SemCKD: attention and loss against ``oracles/semckd.py`` and the reference's values, and smaller batches."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, maps
from golden_data import assert_golden, case_leaves, case_tensors, listed, load_case, loss_cases
from method_cases import build, make_batch
from oracles import semckd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.SemCKD import Attention, semckd_loss, similarities
from mdistiller.functional import at_least_float32
from mdistiller.registry import InputError


def test_equals_the_formula():
    torch.manual_seed(0)
    maps_s, maps_t = maps((2, 3), side=2, images=4), maps((3, 2), side=2, images=4, seed=1)
    module = Attention(4, [2, 3], [3, 2], 0.5).double().eval()
    layers_s, layers_t = (
        [[[p.tolist() for p in layer.parameters()] for layer in (d.linear1, d.linear2)] for d in descriptions]
        for descriptions in (module.query, module.key)
    )
    distances = torch.rand(4, 2, 2, dtype=torch.float64)

    def library(*given):
        given = [at_least_float32(f) for f in given]
        weights, _ = module.to(given[0].dtype)(given, [f.to(given[0].dtype) for f in maps_t])
        return semckd_loss(weights, distances.to(weights.dtype))

    def loops(*given):
        weights = oracle.attention(given, [f.tolist() for f in maps_t], layers_s, layers_t, 0.5)
        return oracle.semckd_loss(weights, distances.tolist())

    assert_agree(library, loops, *maps_s, wrt=(0, 1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", loss_cases("semckd"))
def test_golden_values_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    maps_s, maps_t = listed(given, "feat_s_"), listed(given, "feat_t_")
    widths = [[f.shape[1] for f in side] for side in (maps_s, maps_t)]
    module = Attention(len(maps_s[0]), *widths, options["soft"], options["factor"])
    for name, descriptions in {"query": module.query, "key": module.key}.items():
        for i, description in enumerate(descriptions):
            load_case(description, given, f"param.attention.{name}_{i}.")
    for i, projects in enumerate(module.project):
        for j, project in enumerate(projects):
            load_case(project, given, f"param.attention.regressor{i}{j}.regressor.")
    weights, distances = module.to(dtype)(maps_s, maps_t)
    torch.testing.assert_close(weights, case_tensors(case, "out", dtype)["weight"])
    assert_golden(case, given, semckd_loss(weights, distances))


def test_a_batch_that_lacks_images_has_no_similarity_to_them():
    """The authors' code skips such batches."""
    (f,) = maps((2,), images=3)
    whole = similarities(f, 5)
    assert whole.shape == (3, 5) and not whole[:, 3:].any()
    torch.testing.assert_close(whole[:, :3], similarities(f, 3))
    with pytest.raises(InputError, match=r"a batch of 3 images, above SOLVER.BATCH_SIZE 2"):
        similarities(f, 2)
    batch = make_batch("SEMCKD", images=2)
    distiller = build("SEMCKD", {"SOLVER.BATCH_SIZE": 4})
    assert torch.isfinite(distiller(**batch, epoch=1)[1]["loss_feat"])


def test_attention_sums_to_one():
    distiller, batch = build("SEMCKD"), make_batch("SEMCKD")
    maps_s, maps_t = (net(batch["image"])[1]["feats"][1:] for net in (distiller.student, distiller.teacher))
    weights, distances = distiller.attention(maps_s, maps_t)
    assert weights.shape == distances.shape == (8, 3, 3)
    torch.testing.assert_close(weights.sum(2), torch.ones(8, 3))


def test_losses_are_the_parts():
    distiller, batch = build("SEMCKD"), make_batch("SEMCKD")
    logits, losses = distiller(**batch, epoch=1)
    torch.testing.assert_close(losses["loss_kd"], kd_loss(logits, distiller.teacher(batch["image"])[0], 4.0))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert losses["loss_feat"] > 0


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"SOFT": 0.1}, {"loss_feat"}),
        ({"TEMPERATURE": 1.0}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 1.0}, {"loss_feat"}),
        ({"LOSS.KD_WEIGHT": 0.0}, {"loss_kd"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("SEMCKD", values) == changed
