"""RRD: its loss against ``oracles/rrd.py`` and the reference's values, and its queue."""

import pytest
import torch
import torch.nn.functional as F
from feature_maps import changed_by, embeddings
from golden_data import assert_golden, case_leaves, case_tensors, load_case, loss_cases
from method_cases import build, make_batch
from oracles import rrd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.CRD import ContrastMemory, Embed
from mdistiller.distillers.RRD import Queue, rrd_loss


@pytest.mark.parametrize(("images", "t_s", "t_t"), [(1, 0.1, 0.02), (3, 0.5, 1.0)])
def test_equals_the_formula(images, t_s, t_t):
    similar_s, similar_t = embeddings((4, 4), images)
    assert_agree(
        lambda s: rrd_loss(s, similar_t.to(s.dtype), t_s, t_t),
        lambda s: oracle.rrd_loss(s, similar_t.tolist(), t_s, t_t),
        similar_s,
    )


@pytest.mark.parametrize("case", loss_cases("rrd"))
def test_golden_values_gradients_and_stores(case):
    given, options, prefix = case_leaves(case), case["hyperparameters"], "param.rrd.memory."
    dim = given[f"{prefix}embed_s.weight"].shape[0]
    embeds = [Embed(given[f"pooled_{net}"].shape[1], dim) for net in "st"]
    for net, embed in zip("st", embeds, strict=True):
        load_case(embed.linear, given, f"{prefix}embed_{net}.")
    embed_s, embed_t = (embed(given[f"pooled_{net}"]) for net, embed in zip("st", embeds, strict=True))
    if "momentum" in options:
        memory = ContrastMemory(dim, options["n_data"], options["K"], options["nce_t"], options["momentum"])
        load_case(memory, given, f"{prefix}contrast.")
        memory.temperature = memory.params[1].item()  # kept in float32 there
        ratios = memory(embed_s, embed_t, given["index"], given["contrast_index"])
        similar_s, similar_t = (ratio.exp() for ratio in ratios)
    else:
        memory = load_case(Queue(options["K"], dim), given, prefix)
        memory.push(embed_t)
        similar_s, similar_t = (embed @ memory.queue.T for embed in (embed_s, embed_t))
    assert_golden(case, given, rrd_loss(similar_s, similar_t, options["t_s"], options["t_t"]))
    for name, value in case_tensors(case, "after").items():
        found = memory.state_dict()[name.removeprefix("rrd.memory.").removeprefix("contrast.")]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-7)


def test_a_queue_takes_batches_of_any_size_and_forgets_the_oldest():
    """In the code, K must be a multiple of the batch."""
    queue = Queue(5, 1)
    torch.testing.assert_close(queue.queue.norm(dim=1), torch.ones(5))
    for first, count in ((0, 3), (3, 4), (7, 1), (8, 7)):
        queue.push(torch.arange(first, first + count).float()[:, None])
        newest = range(max(first + count - 5, 0), first + count)
        assert set(newest) <= set(queue.queue.flatten().tolist())
    assert queue.queue_ptr.item() == 0


def test_equal_similarities_give_the_teachers_entropy():
    similar, _ = embeddings((6, 6))
    p = (similar / 0.1).softmax(1)
    torch.testing.assert_close(rrd_loss(similar, similar, 0.1, 0.1), -(p * p.log()).sum(1).mean())


def test_losses_are_the_parts_and_the_teachers_projection_is_constant():
    distiller, batch = build("RRD", {"RRD.K": 16}), make_batch("RRD")
    logits, losses = distiller(**batch, epoch=1)
    embed_s, embed_t = (
        embed(net(batch["image"])[1]["pooled_feat"])
        for net, embed in ((distiller.student, distiller.embed_s), (distiller.teacher, distiller.embed_t))
    )
    queue = distiller.memory.queue
    torch.testing.assert_close(queue[:8], embed_t)
    torch.testing.assert_close(losses["loss_kd"], rrd_loss(embed_s @ queue.T, embed_t @ queue.T))
    torch.testing.assert_close(losses["loss_ce"], F.cross_entropy(logits, batch["target"]))
    assert distiller.get_extra_parameters() == 64 * 128 + 128
    assert {"memory.queue", "memory.queue_ptr", "embed_t.linear.weight"} <= set(distiller.state_dict())


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"T_S": 0.5}, {"loss_kd"}),
        ({"T_T": 0.5}, {"loss_kd"}),
        ({"K": 64}, {"loss_kd"}),
        ({"FEAT_DIM": 16}, {"loss_kd"}),
        ({"LOSS.FEAT_WEIGHT": 2.0}, {"loss_kd"}),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    assert changed_by("RRD", values) == changed
