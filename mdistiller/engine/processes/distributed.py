"""Several processes that train as one: the engine's functions on ``torch.distributed``. All work in one process too.

``torchrun`` starts the processes and gives each process, in its environment, its rank and the address of the first
process. Each process holds all networks and, at every step, a share of the batch. Only the process of rank 0, the
*first*, writes files and prints. NCCL sends tensors on GPUs; gloo sends everything else, such as decisions, so no
decision waits for a GPU.

All functions that communicate are collective: every process must call them in the same order. Code that may fail in a
single process is run within :func:`same_error`, so that the other processes raise the error too instead of waiting for
ever. If a process dies, the job ends: the other processes lose the connection, or torchrun stops them.
"""

from __future__ import annotations

import datetime
import gc
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mdistiller.functional.gather import this_process
from mdistiller.registry import InputError

T = TypeVar("T")

# The longest wait for a process that does not answer. Other processes wait while one process downloads data, writes a
# checkpoint to a slow disk or compiles kernels.
TIMEOUT = datetime.timedelta(minutes=30)


def start() -> None:
    """Join the other processes if torchrun started several. A single process, or a second call, does nothing.

    Afterwards only the first process's standard output is shown. A process takes the GPU of its local rank.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"  # NCCL starts with the first tensor on a GPU
        if local_rank() < torch.cuda.device_count():
            torch.cuda.set_device(local_rank())
    dist.init_process_group(backend, timeout=TIMEOUT)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for the rest of the process's life


def stop() -> None:
    """Leave the other processes at the end of a run. All processes must call this."""
    if dist.is_available() and dist.is_initialized():
        gc.collect()  # a remaining trainer holds gloo's threads, which may crash the interpreter at its end
        dist.destroy_process_group()


def exit_now(code: int) -> None:
    """With several processes, end this process at once, without a wait for the others.

    gloo's remaining threads may abort the interpreter at its end, which would lose the exit code.
    """
    if dist.is_available() and dist.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def rank() -> int:
    """This process's number, from 0."""
    return this_process()[0]


def world_size() -> int:
    """Number of processes."""
    return this_process()[1]


def local_rank() -> int:
    """This process's number on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def is_first_process() -> bool:
    """Whether this process writes files and prints."""
    return rank() == 0


def check_device(device: torch.device) -> None:
    """Refuse a device that the processes cannot share.

    Raises:
        InputError: one GPU for all, or fewer GPUs than processes.
    """
    if world_size() == 1 or device.type != "cuda":
        return
    if device.index is not None:
        raise InputError(
            f"SOLVER.DEVICE {device} would put all {world_size()} processes on one GPU; set cuda or auto, and each "
            "process uses its own GPU"
        )
    if local_rank() >= torch.cuda.device_count():
        raise InputError(
            f"process {rank()} has no GPU of its own: this machine has {torch.cuda.device_count()} GPUs; start "
            "as many processes with torchrun --nproc_per_node, or choose GPUs by CUDA_VISIBLE_DEVICES"
        )


def highest(value: int) -> int:
    """The highest of all processes' values."""
    if world_size() == 1:
        return int(value)
    tensor = torch.tensor([int(value)])
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return int(tensor)


class DelayedMax:
    """Called once a step, returns the highest value that all processes gave at the previous call. So no process waits.

    With one process, returns the value itself.
    """

    def __init__(self) -> None:
        self._asked: tuple[Any, Tensor] | None = None

    def __call__(self, value: int) -> int:
        if world_size() == 1:
            return value
        before = self.answer()
        tensor = torch.tensor([value])
        self._asked = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True), tensor
        return before

    def answer(self) -> int:
        """The highest value of the previous call, 0 before the first; waits for it."""
        if self._asked is None:
            return 0
        (work, tensor), self._asked = self._asked, None
        work.wait()
        return int(tensor)

    def close(self) -> None:
        """Finish the last request; other processes may be dead."""
        with suppress(RuntimeError):
            self.answer()


def total(tensor: Tensor) -> Tensor:
    """The sum over processes."""
    if world_size() == 1:
        return tensor
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


def gather_objects(value: T) -> list[T]:
    """Every process's value, by rank. Values must be picklable."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def broadcast_object(value: T) -> T:
    """The first process's value, which must be picklable."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


@torch.no_grad()
def broadcast_state(module: torch.nn.Module) -> None:
    """Give every process the first process's parameters and saved buffers of the module."""
    if world_size() > 1:
        for value in module.state_dict().values():
            sent = value.contiguous()
            dist.broadcast(sent, 0)
            value.copy_(sent)


@contextmanager
def same_error() -> Iterator[None]:
    """Context for each process's own work: an error in one process is raised in all. It allows no collective calls.

    If several processes fail, the error of the lowest rank is raised. In the other processes the error has an attribute
    ``told_elsewhere``.
    """
    if world_size() == 1:
        yield
        return
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    if not highest(error is not None):
        return
    errors = gather_objects(None if error is None else _portable(error))
    lowest = next(number for number, of_process in enumerate(errors) if of_process is not None)
    if lowest == rank():
        raise error
    foreign = errors[lowest]
    foreign.told_elsewhere = True
    raise foreign


def on_first_process(function: Callable[[], T]) -> T:
    """Run ``function`` in the first process; all processes get its result or its error."""
    result: Any = None
    with same_error():
        if is_first_process():
            result = function()
    return broadcast_object(result)


def one_process_per_machine(function: Callable[[], T]) -> T:
    """Run ``function`` in every process, on each machine in one process first: the function may download files."""
    result: Any = None
    with same_error():
        if local_rank() == 0:
            result = function()
    if world_size() > 1:
        with same_error():
            if local_rank() != 0:
                result = function()
    return result


def _portable(error: Exception) -> Exception:
    """The error, or an error with its text if it cannot be pickled."""
    try:
        copy = pickle.loads(pickle.dumps(error))
        if str(copy) == str(error):
            return error
    except Exception:  # an exception's constructor may have any arguments
        pass
    return RuntimeError(f"{type(error).__name__}: {error}")
