"""Two processes that gather against one process with both their batches: values, losses, averaged gradients."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from method_cases import config
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mdistiller.engine.build import build_distiller
from mdistiller.functional.gather import gather_with_gradient

ROWS, CLASSES, WORLD = 4, 6, 2
METHODS = {
    "DCD": {"DCD.FEAT_DIM": 5, "DCD.LAMBDA": 1.0, "DCD.INIT_THETA": 1.5},
    "DCD alone": {"DCD.FEAT_DIM": 5, "DCD.GATHER": False},
    "DIST": {"DIST.GATHER": True},
    "DIST alone": {"DIST.GATHER": False},
    "DIST_PLUS": {"DIST_PLUS.GATHER": True},
}


class Net(nn.Module):
    """A network without BatchNorm, whose statistics would differ between processes."""

    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        maps = torch.tanh(self.conv(x))
        pooled = maps.mean((2, 3))
        return self.head(pooled), {"feats": [maps], "preact_feats": [maps], "pooled_feat": pooled}


def images():
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(WORLD * ROWS, 3, 6, 6, generator=generator, dtype=torch.float64)
    return {"image": image, "target": torch.arange(WORLD * ROWS) % CLASSES}


def rank_batch(rank):
    return {name: value[rank * ROWS : (rank + 1) * ROWS] for name, value in images().items()}


def method_of(case):
    torch.manual_seed(0)
    student, teacher = Net(4), Net(7)
    return build_distiller(config(case.split()[0], METHODS[case]), student, teacher).double().train()


def loss_and_gradients(case, batch, wrap=lambda module: module):
    distiller = method_of(case)
    wrapped = wrap(distiller)  # kept: DDP averages no gradient of a wrapper that is gone
    _, losses = wrapped(**batch)
    sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def rows_of(rank):
    return torch.arange(6.0).reshape(3, 2) + 10 * rank


def factors():
    return torch.arange(12.0).reshape(6, 2)


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    rows = rows_of(rank).T.contiguous().T.requires_grad_()  # not contiguous
    gathered = gather_with_gradient(rows)
    (gathered * factors()).sum().mul(rank + 1).backward()
    found = {"values": gathered.detach(), "gradient": rows.grad}
    found["constant"] = gather_with_gradient(torch.full((1,), rank))
    for case in METHODS:
        found[case] = loss_and_gradients(case, rank_batch(rank), DistributedDataParallel)
    torch.save(found, f"{folder}/{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found."""
    folder = tmp_path_factory.mktemp("gather")
    mp.spawn(work, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / str(rank)) for rank in range(WORLD)]


def test_one_process_keeps_its_tensor():
    rows = torch.randn(3, 2)
    assert gather_with_gradient(rows) is rows


def test_rows_of_all_in_the_order_of_ranks(found):
    for result in found:
        assert torch.equal(result["values"], torch.cat([rows_of(0), rows_of(1)]))
        assert torch.equal(result["constant"], torch.tensor([0, 1]))


def test_gradient_is_that_of_the_sum_of_the_losses(found):
    for rank, result in enumerate(found):
        assert torch.equal(result["gradient"], 3 * factors()[3 * rank : 3 * rank + 3])  # (1 + 2) * factors


@pytest.mark.parametrize("case", ["DCD", "DIST", "DIST_PLUS"])
def test_losses_and_averaged_gradients_are_those_of_the_global_batch(found, case):
    losses, gradients = loss_and_gradients(case, images())
    for name, loss in losses.items():
        per_rank = torch.stack([result[case][0][name] for result in found])
        torch.testing.assert_close(per_rank.mean(), loss)
    for result in found:
        assert result[case][1].keys() == gradients.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(result[case][1][name], gradient, rtol=1e-9, atol=1e-12)
    gathered = {"DCD": "loss_dcd", "DIST": "loss_intra", "DIST_PLUS": "loss_intra"}[case]
    torch.testing.assert_close(found[0][case][0][gathered], losses[gathered])


@pytest.mark.parametrize(("case", "term"), [("DCD alone", "loss_dcd"), ("DIST alone", "loss_intra")])
def test_without_gathering_each_process_keeps_to_its_own_images(found, case, term):
    whole, _ = loss_and_gradients(case, images())
    for rank, result in enumerate(found):
        own, _ = loss_and_gradients(case, rank_batch(rank))
        torch.testing.assert_close(result[case][0][term], own[term])
        assert abs(whole[term] - own[term]) > 1e-3
