"""Training of one distiller in several processes.

Each process computes the losses of its share of the batch, and DistributedDataParallel averages the gradients. So
losses that are means over images have the gradient of the global batch. If the last batch of an epoch does not divide
evenly, each process's losses are weighted by its share.

Losses that relate images to each other see the process's own images only, unless ``SOLVER.GATHER`` is on. Then the
processes gather all images, the method gets the global batch, and only the networks' work is divided: the input of
student and teacher is reduced to the process's images, and their output is gathered. So every process computes the
numbers of a single process: losses, memories of earlier batches, BatchNorm in adapters. The cost: processes
exchange the images, the logits and the features that the method reads, and each process computes the method's work
besides the networks. Gradients with respect to images are not supported.

``SOLVER.BATCH_NORM``: BatchNorm takes its statistics from the process's own images (``local``) or from all images of
the batch (``sync``).
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from mdistiller.functional import at_least_float32
from mdistiller.functional.gather import batch_of_processes, join_rows
from mdistiller.messages import warn

from ..explain import read_output
from ..forwards.chain import linked, networks_of
from ..forwards.share import Share, has_rows
from . import distributed

# DistributedDataParallel's option that synchronises buffers; newer versions of torch have renamed it.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
KEEP_BUFFERS = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


def shares(images: int, processes: int) -> list[int]:
    """The number of a batch's images for each process: equal numbers, with the remainder on the first processes."""
    return [len(part) for part in torch.arange(images).tensor_split(processes)]


class Parallel:
    """Runs a distiller's training steps and averages their gradients. With one process it does nothing more.

    Args:
        distiller: on its device. All processes get the first process's weights.
        gather: ``SOLVER.GATHER``.
        batch_norm: ``SOLVER.BATCH_NORM``.
        overlap: average gradients during the backward pass, for steps with one backward pass; else after each pass.
    """

    def __init__(self, distiller: nn.Module, gather: bool, batch_norm: str, overlap: bool = True) -> None:
        self.distiller = distiller
        self.gather = gather
        self.overlap = overlap
        self.world = distributed.world_size()
        self.wrapper: DistributedDataParallel | None = None
        self.weight = 1.0
        if self.world == 1:
            return
        if batch_norm == "sync":
            # With SOLVER.GATHER, modules outside the networks get the global batch in every process.
            for part in networks_of(distiller) if gather else [distiller]:
                synchronize_batch_norm(part)
        self.local_batch_norm = batch_norm == "local"
        self.replica = Replica(distiller, gather)
        self.leaves_unused = self.first_step = False
        self.in_backward = self.averaged = False  # gradients of the current step
        self._wrap()

    def _wrap(self) -> None:
        # The search for unused parameters costs a pass over the graph at each step, and warns if there are none.
        self.wrapper = DistributedDataParallel(self.replica, find_unused_parameters=self.leaves_unused, **KEEP_BUFFERS)

    def begin_epoch(self) -> None:
        """Let the next step find the parameters that the method uses: terms may start and end with epochs."""
        self.first_step = self.world > 1

    def __call__(self, inputs: dict[str, Any], images: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The method's ``forward_train`` in one of several processes: logits of the process's images, and the losses.

        Args:
            inputs: the arguments of ``forward_train``, with this process's share of the batch.
            images: number of images in the batch of all processes.
        """
        counts = shares(images, self.world)
        self.weight = 1.0 if self.gather else self.world * counts[distributed.rank()] / images
        self.in_backward = self.overlap and not self.first_step
        with nullcontext() if self.in_backward else self.wrapper.no_sync():
            return self.wrapper(counts, inputs)

    def weighted(self, losses: dict[str, Tensor]) -> dict[str, Tensor]:
        """The losses times this process's weight: their mean over processes is the loss of the batch."""
        return losses if self.weight == 1 else {name: self.weight * loss for name, loss in losses.items()}

    def after_backward(self) -> None:
        """Average the remaining gradients. Call this after each backward pass."""
        if self.world == 1:
            return
        if not self.in_backward:
            lacking = average_gradients(self.distiller)
            if self.overlap and lacking and not self.leaves_unused:
                self.leaves_unused = True
                self.wrapper = None  # removes its hooks from the parameters before the next wrapper adds its own
                self._wrap()
            self.first_step = False
        self.averaged = True

    def end_step(self) -> None:
        """Check that the step's gradients were averaged, since a trainer may have its own ``update``.

        Raises:
            RuntimeError: the gradients were not averaged.
        """
        if self.world > 1 and not self.averaged:
            raise RuntimeError("a trainer's update() must call self.parallel.after_backward() after each backward()")
        self.in_backward = self.averaged = False

    def average_statistics(self, *modules: nn.Module) -> None:
        """Give all processes the mean of their BatchNorm statistics, in the distiller and in ``modules``.

        The running statistics are linear in the batches' statistics, so the number of calls does not matter.
        """
        if self.world == 1 or not self.local_batch_norm:
            return
        fixed = {module for network in self.distiller.frozen_networks().values() for module in network.modules()}
        for part in (self.distiller, *modules):
            for module in part.modules():
                if isinstance(module, _BatchNorm) and module not in fixed and module.running_mean is not None:
                    for statistic in (module.running_mean, module.running_var):
                        dist.all_reduce(statistic)
                        statistic /= self.world

    def warn_of_differing_buffers(self) -> None:
        """Warn if a buffer of the method, such as a memory of features, differs between processes."""
        if self.world == 1:
            return
        fixed = {id(buffer) for network in self.distiller.frozen_networks().values() for buffer in network.buffers()}
        buffers = {name: b for name, b in self.distiller.named_buffers() if b.numel() and id(b) not in fixed}
        if not buffers:
            return
        sums = torch.stack([buffer.detach().double().sum().cpu() for buffer in buffers.values()])
        low, high = -_highest(-sums), _highest(sums)
        differing = [name for name, same in zip(buffers, (low == high).tolist(), strict=True) if not same]
        if differing:
            warn(
                f"processes have different values of {', '.join(differing[:4])}, which the method computes from the "
                "process's images; the first process's values are saved. With SOLVER.GATHER True every process gets "
                "all images of the batch"
            )


def _highest(values: Tensor) -> Tensor:
    values = values.clone()
    dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


@torch.no_grad()
def average_gradients(module: nn.Module) -> bool:
    """Replace every gradient by its mean over processes. A missing gradient counts as zero.

    Returns:
        Whether a process lacked a gradient.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    counts = distributed.total(torch.tensor([p.grad is not None for p in parameters]).long())
    groups: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter, processes in zip(parameters, counts.tolist(), strict=True):
        if processes:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    for group in groups.values():
        flat = torch.cat([p.grad.reshape(-1) for p in group])
        dist.all_reduce(flat)
        flat /= distributed.world_size()
        for parameter, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            parameter.grad.copy_(part.view_as(parameter))
    return bool((counts < distributed.world_size()).any())


class Replica(nn.Module):
    """The distiller's training pass in one process, with its share of the batch; see the top of the file.

    Args:
        distiller: the method.
        gather: give the method the batch of all processes.
    """

    def __init__(self, distiller: nn.Module, gather: bool) -> None:
        super().__init__()
        self.distiller = distiller
        self.gather = gather

    def forward(self, counts: list[int], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        with batch_of_processes(counts, gathered=self.gather):
            logits, losses = (
                self._whole_batch(counts, inputs)
                if self.gather
                else read_output(self.distiller, self.distiller(**inputs))
            )
        return logits.detach(), losses  # else the search for unused parameters would count those of the logits alone

    def _whole_batch(self, counts: list[int], inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        rank, share = distributed.rank(), Share(counts)
        whole = {
            name: join_rows(value, counts) if has_rows(value, counts[rank]) else value for name, value in inputs.items()
        }
        with ExitStack() as stack:
            for network in networks_of(self.distiller):
                stack.enter_context(linked(network, "share", share))
            logits, losses = read_output(self.distiller, self.distiller(**whole))
        return logits.split(counts)[rank], losses


def synchronize_batch_norm(part: nn.Module) -> None:
    """Let every BatchNorm compute its statistics from all processes' batches. Names and weights do not change."""
    on_gpu = next(part.parameters()).is_cuda
    for module in part.modules():
        if isinstance(module, _BatchNorm):
            module.__class__ = nn.SyncBatchNorm if on_gpu else SyncBatchNorm  # in place: a method may hold the module
            module.process_group = None


class SyncBatchNorm(_BatchNorm):
    """``nn.SyncBatchNorm`` for the CPU; torch's class is for GPUs only."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any dimension: this class replaces all kinds of BatchNorm."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        dtype, input = input.dtype, at_least_float32(input)
        dims = [0, *range(2, input.ndim)]
        count = torch.tensor([float(input.numel() // input.shape[1])], dtype=input.dtype)
        sums = _sum_over_processes(torch.cat([input.sum(dims), count]))
        mean = sums[:-1] / sums[-1]
        centred = input - _as_channels(mean, input)
        squares = _sum_over_processes(centred.square().sum(dims))
        variance = squares / sums[-1]
        if self.track_running_stats:
            self.num_batches_tracked += 1
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            unbiased = squares.detach() / (sums[-1].detach() - 1).clamp(min=1)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        output = centred * _as_channels((variance + self.eps).rsqrt(), input)
        if self.affine:
            output = output * _as_channels(self.weight, input) + _as_channels(self.bias, input)
        return output.to(dtype)


def _as_channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))


class _Sum(torch.autograd.Function):
    """The sum over processes; a process's gradient is the sum of all processes' gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return distributed.total(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return distributed.total(gradient.contiguous())


_sum_over_processes = _Sum.apply
