"""Random feature maps and embeddings, and common checks of methods that use them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from method_cases import build, make_batch
from torch import Tensor


def maps(channels: tuple[int, ...] = (3, 5), side: int = 4, images: int = 2, seed: int = 0) -> list[Tensor]:
    """Signed maps in float64, of the student and of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, c, side, side, generator=generator, dtype=torch.float64) for c in channels]


def embeddings(widths: tuple[int, ...] = (4, 6), images: int = 5, seed: int = 0) -> list[Tensor]:
    """Embeddings ``(B, D)`` in float64, of the student and of the teacher."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(images, d, generator=generator, dtype=torch.float64) for d in widths]


def changed_by(method: str, values: dict[str, object], section: str = "") -> set[str]:
    """The names of the losses that other settings change."""
    found = []
    for given in ({}, values):
        distiller = build(method, {f"{section or method}.{key}": value for key, value in given.items()})
        found.append(distiller(**make_batch(method), epoch=1)[1])
    before, after = found
    assert before.keys() == after.keys()
    return {name for name in before if not torch.isclose(before[name], after[name], rtol=1e-6, atol=0.0)}


def assert_finite(loss: Callable[[Tensor], Tensor], student: Tensor, largest: float) -> None:
    """Value and gradient are finite, the gradient of a reasonable size."""
    student = student.detach().requires_grad_()
    value = loss(student)
    value.backward()
    assert torch.isfinite(value)
    assert student.grad.abs().max() <= largest  # NaN is not


def assert_float32_under_autocast(loss: Callable[..., Tensor], given: list[Tensor]) -> None:
    """Half-precision inputs and the same values in float32 give equal bits."""
    for dtype in (torch.bfloat16, torch.float16):
        half = [x.to(dtype) for x in given]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = loss(*half)
        assert found.dtype == torch.float32
        assert torch.equal(found, loss(*(x.float() for x in half)))
