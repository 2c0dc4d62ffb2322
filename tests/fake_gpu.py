"""A simulated GPU: its tensors have shapes, types and a device, but no values.

Mixing devices and asking for a value, which makes a step wait for the GPU, both raise there. Forward passes only:
autograd asks the driver for a stream.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeGPU:
    """Moves tensors and modules to the GPU; as a context, lets them compute. Skips the test if torch needs a GPU."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        try:
            with self.mode:
                torch.empty(1, device="cuda")[None]
        except RuntimeError as error:  # older ones, such as 2.7, ask the driver
            pytest.skip(f"torch {torch.__version__} does not pretend a GPU: {str(error).splitlines()[0]}")

    def __enter__(self) -> None:
        self.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)

    def tensor(self, x: Tensor) -> Tensor:
        fake = self.mode.from_tensor(x.detach())
        with self.mode:
            return fake.to("cuda")

    def module(self, module: nn.Module) -> nn.Module:
        """A copy on the GPU; a module's lists of its parameters hold the copy's parameters."""
        moved: dict[int, Any] = {}
        for x in [*module.parameters(), *module.buffers()]:
            fake = self.tensor(x)
            moved[id(x)] = nn.Parameter(fake, x.requires_grad) if isinstance(x, nn.Parameter) else fake
        return copy.deepcopy(module, moved)
