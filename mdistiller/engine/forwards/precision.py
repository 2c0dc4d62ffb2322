"""Device, number format and memory layout of the networks; the same code for CPU and GPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError

AUTOCAST_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Precision:
    """Device, autocast type and memory layout of a run.

    Args:
        device: of networks and batches.
        autocast_dtype: the type of autocast; ``None``: float32 throughout.
        channels_last: NHWC layout of images and convolution weights.
    """

    device: torch.device
    autocast_dtype: torch.dtype | None = None
    channels_last: bool = False

    @classmethod
    def from_cfg(cls, cfg: Any) -> Precision:
        """Read ``SOLVER.DEVICE``, ``SOLVER.AMP`` and ``SOLVER.CHANNELS_LAST``.

        Raises:
            InputError: the machine lacks the device, or fp16 is set without a GPU.
        """
        device = resolve_device(cfg.SOLVER.DEVICE)
        if cfg.SOLVER.AMP == "fp16" and device.type == "cpu":
            raise InputError("SOLVER.AMP fp16 needs a GPU; on the CPU use SOLVER.AMP bf16")
        layout = cfg.SOLVER.CHANNELS_LAST
        # On a CPU no network of the library is slower in NHWC (docs/performance.md). A GPU was not measured.
        channels_last = layout == "on" or (layout == "auto" and device.type == "cpu")
        return cls(device, AUTOCAST_DTYPES[cfg.SOLVER.AMP], channels_last)

    def autocast(self) -> AbstractContextManager:
        """Context in which the networks run."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def place(self, module: nn.Module) -> nn.Module:
        """Move a network to the device and the memory layout."""
        layout = torch.channels_last if self.channels_last else torch.preserve_format
        return module.to(self.device, memory_format=layout)

    def place_tensor(self, tensor: Tensor) -> Tensor:
        """Move a tensor to the device, and ``(B, C, H, W)`` to the memory layout. The type does not change."""
        if tensor.ndim == 4 and self.channels_last:
            return tensor.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return tensor.to(self.device, non_blocking=True)

    def synchronize(self) -> None:
        """Wait for the device before a time is measured."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def scaler(self) -> torch.amp.GradScaler:
        """Loss scaling; it does nothing unless fp16 is on."""
        return torch.amp.GradScaler(self.device.type, enabled=self.autocast_dtype is torch.float16)


def resolve_device(name: str) -> torch.device:
    """The device of ``SOLVER.DEVICE``; ``auto`` is the GPU if there is one.

    Raises:
        InputError: the machine has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # meta has no memory
        if device.type == "cpu" and device.index:  # torch accepts cpu:1
            raise RuntimeError("there is one CPU device")
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).split("\n")[0].split(". ")[0]
        usable = ["auto", "cpu", *(f"cuda:{number}" for number in range(torch.cuda.device_count()))]
        raise InputError(f"SOLVER.DEVICE {name!r} cannot be used here: {reason}; use {' or '.join(usable)}") from None
    return device


@contextmanager
def hard_coded_cuda_explained(device: torch.device) -> Iterator[None]:
    """Context of a method's code: names the line that moves a tensor to the GPU in a run on another device.

    Raises:
        InputError: in place of torch's error; names file and line.
    """
    try:
        yield
    except (RuntimeError, AssertionError) as error:
        frames = traceback.extract_tb(error.__traceback__)
        asked_for_gpu = any(frame.name == "_lazy_init" and "torch" in frame.filename for frame in frames)
        if device.type != "cpu" or not (asked_for_gpu or "on the same device" in str(error)):
            raise
        torch_folder = str(Path(torch.__file__).parent)
        place = [frame for frame in frames if not frame.filename.startswith(torch_folder)][-1]
        problem = "needs a GPU" if asked_for_gpu else "meets a tensor that the method keeps on the GPU"
        raise InputError(
            f"{place.filename}, line {place.lineno}: {place.line!r} {problem}, and this run is on the CPU; run it on a "
            "GPU (SOLVER.DEVICE), or let the file write .to(tensor.device) where it writes .cuda()"
        ) from None
