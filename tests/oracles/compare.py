"""Holds a differentiable torch function against an oracle's loops: value and gradients, in several precisions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from .complex_step import differentiate

# Relative to the largest entry; and what is left where terms of about 1 cancel.
RELATIVE = {torch.float64: 1e-10, torch.float32: 1e-4}
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}


def assert_close(got: Any, expected: Any, dtype: torch.dtype, what: str = "value", unit: float = 1.0) -> None:
    """``|got - expected|`` within the tolerances of ``dtype``, everywhere; both are multiplied by ``unit`` first."""
    actual = unit * np.asarray(torch.as_tensor(got).detach().double())
    expected = unit * np.asarray(expected, dtype=np.float64)
    assert actual.shape == expected.shape, (what, actual.shape, expected.shape)
    error = np.abs(actual - expected).max(initial=0)
    allowed = RELATIVE[dtype] * np.abs(expected).max(initial=0) + ROUNDING[dtype]
    assert error <= allowed, f"{what}: off by {error:.3g}, allowed {allowed:.3g}; {actual} against {expected}"


def outputs(result: Any) -> dict[Any, Any]:
    """Several results by name or number; a single one by an empty name."""
    if isinstance(result, dict):
        return result
    return dict(enumerate(result)) if isinstance(result, tuple) else {"": result}


def assert_agree(
    library: Callable[..., Any], oracle: Callable[..., Any], *arrays: Any, wrt: Sequence[int] = (0,)
) -> None:
    """Both give the same scalars and the same gradients; in bfloat16, under autocast, the library's are finite.

    ``library`` gets tensors and ``oracle`` nested lists, of the arrays as rounded to each precision, so that what is
    measured is the arithmetic and not the rounding of the inputs. Either gives a scalar, a tuple of scalars or a
    dictionary of them. Gradients are taken at the positions ``wrt``, and compared in units of the input's largest
    entry: what the loss changes by where the input changes by its own size. An input that must be a constant belongs
    there too, if the oracle treats it as one.
    """
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        tensors = [torch.as_tensor(np.asarray(a, dtype=np.float64)).to(dtype) for a in arrays]
        for i in wrt:
            tensors[i].requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            losses = outputs(library(*tensors))
        at = [tensors[i] for i in wrt]
        gradients = {
            name: torch.autograd.grad(loss, at, retain_graph=True, allow_unused=True, materialize_grads=True)
            if loss.requires_grad
            else [torch.zeros_like(x) for x in at]
            for name, loss in losses.items()
        }
        if dtype == torch.bfloat16:
            assert all(torch.isfinite(x).all() for name in losses for x in (losses[name], *gradients[name]))
            continue
        given = [t.detach().double().numpy() for t in tensors]
        expected = differentiate(lambda *nested: outputs(oracle(*nested)), *given, wrt=wrt)
        assert losses.keys() == expected.keys()
        for name, (value, slopes) in expected.items():
            assert_close(losses[name], value, dtype, f"value {name}")
            for i, gradient, slope in zip(wrt, gradients[name], slopes, strict=True):
                unit = np.abs(given[i]).max(initial=0) or 1.0
                assert_close(gradient, slope, dtype, f"gradient {name} of input {i}", unit)
