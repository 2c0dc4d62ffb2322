"""CRD: its losses against ``oracles/crd.py`` and the reference's values, its banks, and several processes."""

import copy
import socket

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import IMAGES, build, make_batch, total
from oracles import crd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import exp
from torch import multiprocessing, nn

from mdistiller.distillers.CRD import WHOLE_BANK, ContrastMemory, Embed, nce_loss, similarities
from mdistiller.functional import at_least_float32
from mdistiller.functional.gather import batch_of_processes, gather_rows
from mdistiller.registry import InputError

# The formula


def ratios(images=3, negatives=5, seed=0):
    return torch.randn(images, negatives + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("images", "negatives", "num_data"), [(1, 1, 2), (3, 5, 40), (2, 8, 4)])
def test_equals_the_formula(images, negatives, num_data):
    assert_agree(
        lambda x: nce_loss(x, num_data),
        lambda x: oracle.nce_loss([[exp(entry) for entry in row] for row in x], num_data),
        ratios(images, negatives),
    )


def test_both_networks_against_the_others_bank():
    """Loss and gradient of the embeddings, and the banks afterwards: each is compared before it is written to."""
    generator = torch.Generator().manual_seed(0)
    embed_s, embed_t = F.normalize(torch.randn(2, 3, 4, dtype=torch.float64, generator=generator), dim=2)
    banks = F.normalize(torch.randn(2, 10, 4, dtype=torch.float64, generator=generator), dim=2)
    index, rows = torch.tensor([7, 0, 4]), torch.randint(10, (3, 6), generator=generator)

    def memory(dtype):
        made = ContrastMemory(4, 10, 5, 0.3, 0.7).to(dtype)
        made.memory_v1.copy_(banks[0])
        made.memory_v2.copy_(banks[1])
        return made

    def library(s, t):
        s, t = at_least_float32(s), at_least_float32(t)
        return sum(nce_loss(log_ratio, 10) for log_ratio in memory(s.dtype)(s, t, index, rows))

    def loops(s, t):
        pairs = ((s, banks[1].tolist()), (t, banks[0].tolist()))
        return sum(oracle.nce_loss(oracle.density_ratios(*pair, rows.tolist(), 0.3), 10) for pair in pairs)

    assert_agree(library, loops, embed_s, embed_t, wrt=(0, 1))
    made = memory(torch.float64)
    made(embed_s, embed_t, index, rows)
    for bank, embedding, after in zip(banks, (embed_s, embed_t), (made.memory_v1, made.memory_v2), strict=True):
        expected = bank.tolist()
        for i, row in zip(index.tolist(), embedding.tolist(), strict=True):
            expected[i] = oracle.moved(expected[i], row, 0.7)
        torch.testing.assert_close(after, torch.tensor(expected, dtype=torch.float64))


def test_gradient():
    assert torch.autograd.gradcheck(lambda x: nce_loss(x, 40), (ratios().requires_grad_(),))


CASES = [case for case in loss_cases("crd") if "param.queue" not in case.values[0]["inputs"]]  # whose loss is InfoNCE


@pytest.mark.parametrize("case", CASES)
def test_golden_values_gradients_and_banks(case):
    given, options = case_tensors(case, "in"), case["hyperparameters"]
    state = {name.removeprefix("param."): value for name, value in given.items() if name.startswith("param.")}
    modules = nn.ModuleDict(
        {
            "embed_s": Embed(given["pooled_s_0"].shape[1], options["feat_dim"]),
            "embed_t": Embed(given["pooled_t_0"].shape[1], options["feat_dim"]),
            "contrast": ContrastMemory(
                options["feat_dim"], options["num_data"], options["K"], options["temperature"], options["momentum"]
            ),
        }
    ).double()
    modules.load_state_dict(state)
    modules["contrast"].temperature = state["contrast.params"][1].item()  # kept in float32 there
    loss = 0.0
    for call in range(options["calls"]):
        for name in ("pooled_s", "pooled_t"):
            if f"{name}_{call}" in case["gradients"]:
                given[f"{name}_{call}"].requires_grad_()
        embed_s, embed_t = (modules[f"embed_{k}"](given[f"pooled_{k}_{call}"]) for k in "st")
        ratios = modules["contrast"](embed_s, embed_t, given[f"index_{call}"], given[f"contrast_index_{call}"])
        of_call = sum(nce_loss(log_ratio, options["num_data"]) for log_ratio in ratios)
        assert of_call.item() == pytest.approx(case["outputs"][f"loss_call_{call}"], rel=1e-7)
        loss = loss + of_call
    loss.backward()
    given |= {f"param.{name}": p for name, p in modules.named_parameters()}
    assert_golden_gradients(case, given)
    for name, expected in case_tensors(case, "after").items():
        torch.testing.assert_close(modules.state_dict()[name], expected, rtol=1e-6, atol=1e-7)


# The formula: what it does not depend on, and where it is simple


def test_the_order_of_negatives_does_not_matter_and_the_positive_does():
    given = ratios()
    turned = given[:, [0, 5, 4, 3, 2, 1]]
    torch.testing.assert_close(nce_loss(turned, 40), nce_loss(given, 40))
    assert not torch.isclose(nce_loss(given.flip(1), 40), nce_loss(given, 40))


def test_with_the_whole_bank_or_row_by_row_similarities_are_the_same():
    generator = torch.Generator().manual_seed(0)
    embedding = torch.randn(3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    bank = torch.randn(WHOLE_BANK * 2 + 1, 4, dtype=torch.float64, generator=generator)
    for negatives in (1, 2):  # below and above the bound
        index = torch.randint(len(bank), (3, negatives + 1), generator=generator)
        expected = torch.stack([bank[row] @ e for row, e in zip(index, embedding, strict=True)])
        whole, rows = similarities(embedding, bank[: WHOLE_BANK * 2], index % 8), similarities(embedding, bank, index)
        torch.testing.assert_close(rows, expected)
        torch.testing.assert_close(whole, torch.einsum("bkd,bd->bk", bank[index % 8], embedding))
        weights = torch.arange(whole.numel(), dtype=torch.float64).view_as(whole)
        for found, chosen in ((rows, index), (whole, index % 8)):
            (gradient,) = torch.autograd.grad((found * weights).sum(), embedding, retain_graph=True)
            torch.testing.assert_close(gradient, torch.einsum("bk,bkd->bd", weights, bank[chosen]))


# At the edges


@pytest.mark.parametrize("size", [0.0, 100.0, 1e4])
def test_finite_at_extreme_similarities(size):
    """The reference takes exp(similarity / temperature) / Z itself, which is infinite in float32 from 89 on."""
    given = (size * torch.tensor([[1.0, -1.0, 1.0], [-1.0, 1.0, 0.0]])).requires_grad_()
    loss = nce_loss(given, 10)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(given.grad).all()


def test_under_autocast_all_behind_the_pooled_features_is_float32():
    distiller, batch = build("CRD"), make_batch("CRD")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = distiller(**batch, epoch=1)
    assert losses["loss_kd"].dtype == torch.float32
    assert distiller.contrast.memory_v1.dtype == torch.float32


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"CRD.FEAT.DIM": 0}, r"CRD\.FEAT\.DIM"),
        ({"CRD.NCE.K": 0}, r"CRD\.NCE\.K"),
        ({"CRD.NCE.TEMPERATURE": 0.0}, r"CRD\.NCE\.TEMPERATURE"),
        ({"CRD.NCE.MOMENTUM": 1.0}, r"CRD\.NCE\.MOMENTUM"),
    ],
    ids=str,
)
def test_wrong_configurations(values, message):
    with pytest.raises(InputError, match=message):
        build("CRD", values)


# The method: the banks


def test_entries_move_halfway_and_stay_of_length_one_and_the_others_stay():
    distiller, batch = build("CRD"), make_batch("CRD", images=4)
    before = copy.deepcopy(distiller.contrast.state_dict())
    with torch.no_grad():
        embed_s = distiller.embed_s(copy.deepcopy(distiller.student)(batch["image"])[1]["pooled_feat"])
        embed_t = distiller.embed_t(distiller.teacher(batch["image"])[1]["pooled_feat"])
    total(distiller, batch)
    for name, embedding in (("memory_v1", embed_s), ("memory_v2", embed_t)):
        after = distiller.contrast.state_dict()[name]
        expected = F.normalize(0.5 * before[name][:4] + 0.5 * embedding, dim=1)
        torch.testing.assert_close(after[:4], expected)
        assert torch.equal(after[4:], before[name][4:])


def test_z_is_set_by_the_first_batch_and_saved():
    distiller, batch = build("CRD"), make_batch("CRD")
    assert distiller.contrast.params[2:4].tolist() == [-1, -1]
    total(distiller, batch)
    first = distiller.contrast.params.clone()
    assert (first[2:4] > 0).all()
    total(distiller, batch)
    assert torch.equal(distiller.contrast.params, first)
    assert {"contrast.params", "contrast.memory_v1", "contrast.memory_v2"} <= set(distiller.state_dict())


def test_the_order_of_a_batch_changes_nothing():
    one, other, batch = build("CRD"), build("CRD"), make_batch("CRD")
    order = torch.tensor([3, 1, 7, 0, 2, 6, 5, 4])
    turned = {name: value[order] for name, value in batch.items()}
    torch.testing.assert_close(total(one, batch), total(other, turned))
    torch.testing.assert_close(one.contrast.memory_v1, other.contrast.memory_v1)


def test_it_needs_no_gpu_to_be_built_and_counts_its_banks():
    """mdistiller's moves its sampler to the GPU in the constructor."""
    distiller = build("CRD")
    assert distiller.contrast.memory_v1.shape == (IMAGES, 128)
    assert distiller.get_extra_parameters() == 2 * (64 * 128 + 128) + 5 + 2 * IMAGES * 128


# The method: several processes


def of_rank(rank, count, port, folder):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=count)
    torch.set_num_threads(1)
    distiller, batch = build("CRD"), make_batch("CRD")
    share = slice(0, 5) if rank == 0 else slice(5, 8)  # unequal shares, as at the end of an epoch
    with batch_of_processes((5, 3)):  # as the trainer says it
        for _ in range(2):
            total(distiller, {name: value[share] for name, value in batch.items()})
        assert gather_rows(batch["index"][share]).tolist() == list(range(8))
    torch.save(distiller.contrast.state_dict(), f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.mark.slow
def test_banks_of_two_processes_are_equal_and_have_everyones_entries(tmp_path):
    """In mdistiller, what DataParallel's copies on the other devices write is lost."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(of_rank, (2, port, str(tmp_path)), nprocs=2)
    one, other = (torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    fresh = build("CRD").contrast.state_dict()
    assert (one["memory_v1"] != fresh["memory_v1"]).any(1).all()
    torch.testing.assert_close(one["memory_v1"].norm(dim=1), torch.ones(IMAGES))


def test_rows_of_one_process_are_its_own():
    x = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(gather_rows(x), x.detach()) and not gather_rows(x).requires_grad


# The method: settings


def test_widths_follow_from_the_networks():
    """mdistiller takes 256 unless it is told otherwise, and fails at the first step."""
    for values in ({}, {"CRD.FEAT.STUDENT_DIM": 100, "CRD.FEAT.TEACHER_DIM": 128}):
        distiller = build("CRD", values)
        assert [embed.linear.in_features for embed in (distiller.embed_s, distiller.embed_t)] == [64, 64]


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"FEAT.DIM": 16}, True),
        ({"NCE.TEMPERATURE": 0.5}, True),
        ({"NCE.MOMENTUM": 0.9}, False),  # seen from the second step on
        ({"LOSS.FEAT_WEIGHT": 1.6}, True),
    ],
    ids=str,
)
def test_keys_change_what_they_name(values, changed):
    def losses(values):
        distiller, batch = build("CRD", {f"CRD.{key}": value for key, value in values.items()}), make_batch("CRD")
        return [distiller(**batch, epoch=1)[1]["loss_kd"].item() for _ in range(2)]

    before, after = losses({}), losses(values)
    assert (before[0] != pytest.approx(after[0], rel=1e-5)) == changed
    assert before[1] != pytest.approx(after[1], rel=1e-5)
