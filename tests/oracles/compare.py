"""Holds a differentiable torch function against an oracle's loops: value and gradients, in several precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .complex_step import differentiate

# Relative to the largest entry; and what is left where terms of about 1 cancel.
RELATIVE = {torch.float64: 1e-6, torch.float32: 1e-4}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(got: Any, expected: Any, dtype: torch.dtype, what: str = "value", unit: float = 1.0) -> None:
    """``|got - expected|`` within the tolerances of ``dtype``, everywhere; both are multiplied by ``unit`` first."""
    actual = unit * np.asarray(torch.as_tensor(got).detach().double())
    expected = unit * np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = np.abs(actual - expected).max(initial=0)
    allowed = RELATIVE[dtype] * np.abs(expected).max(initial=0) + ROUNDING[dtype]
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}; {actual} against {expected}"


def assert_agree(
    library: Callable[..., Tensor], oracle: Callable[..., Any], *arrays: Any, wrt: Sequence[int] = (0,)
) -> None:
    """Both give the same scalar and the same gradients; in bfloat16, under autocast, the library's are finite.

    ``library`` gets tensors and ``oracle`` nested lists, of the arrays as rounded to each precision, so that what is
    measured is the arithmetic and not the rounding of the inputs. Gradients are taken at the positions ``wrt``, and
    compared in units of the input's largest entry: what the loss changes by where the input changes by its own size. An
    input that must be a constant belongs there too, if the oracle treats it as one.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [torch.as_tensor(np.asarray(a, dtype=np.float64)).to(dtype) for a in arrays]
        for i in wrt:
            tensors[i].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            got = library(*tensors)
        gradients = [torch.zeros_like(tensors[i]) for i in wrt]
        if got.requires_grad:
            gradients = torch.autograd.grad(got, [tensors[i] for i in wrt], allow_unused=True, materialize_grads=True)
        if dtype == torch.bfloat16:
            assert all(torch.isfinite(x).all() for x in (got, *gradients))
            continue
        given = [t.detach().double().numpy() for t in tensors]
        expected, expected_gradients = differentiate(oracle, *given, wrt=wrt)
        assert_close(got, expected, dtype)
        for i, gradient, wanted in zip(wrt, gradients, expected_gradients, strict=True):
            assert_close(gradient, wanted, dtype, f"gradient of input {i}", np.abs(given[i]).max(initial=0) or 1.0)
