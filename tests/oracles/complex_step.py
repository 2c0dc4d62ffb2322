"""Values and exact derivatives of losses that are written as loops over numbers.

A loss takes nested lists of numbers and works with ``+ - * /``, :func:`exp`, :func:`log`, :func:`sqrt` and
:func:`absolute`. Fed with floats it computes its value. :func:`differentiate` feeds it complex vectors instead: entry k
is moved by i * 1e-40 in component k, and the imaginary part of the result, over 1e-40, is the gradient. Nothing is
subtracted, so the derivative is exact to float64's rounding, and no automatic differentiation is involved.

What a loss branches on must be a plain number, :func:`value`; a :func:`constant` passes no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

STEP = 1e-40

exp, log, sqrt = np.exp, np.log, np.sqrt


def value(x: Any) -> float:
    """The number itself, without its derivative."""
    return float(np.real(x).flat[0]) if isinstance(x, np.ndarray) else float(x)


def constant(x: Any) -> Any:
    """Numbers, nested in lists or not, without their derivatives."""
    return [constant(entry) for entry in x] if isinstance(x, list) else value(x)


def absolute(x: Any) -> Any:
    """``|x|``; at 0 the derivative is 0."""
    if value(x) == 0:
        return 0.0
    return x if value(x) > 0 else -x


def numbers(array: Any) -> Any:
    """An array or tensor as nested lists of floats."""
    return np.asarray(array, dtype=np.float64).tolist()


def differentiate(loss: Callable[..., Any], *arrays: Any, wrt: Sequence[int] = (0,)) -> Any:
    """``loss(*arrays)`` and its gradients with respect to the arrays at the positions ``wrt``.

    Arrays (or tensors) reach ``loss`` as nested lists of their own shapes; gradients are float64 of those shapes.

    Returns:
        The value and the list of gradients; where ``loss`` gives a dictionary, one of such pairs.
    """
    given = [np.asarray(array, dtype=np.float64) for array in arrays]
    total = sum(given[i].size for i in wrt)
    nested, start = [], 0
    for i, array in enumerate(given):
        if i not in wrt:
            nested.append(array.tolist())
            continue
        entries = np.empty(array.size, dtype=object)
        for k, entry in enumerate(array.flat):
            moved = np.full(total, entry, dtype=np.complex128)
            moved[start + k] += 1j * STEP
            entries[k] = moved
        nested.append(entries.reshape(array.shape).tolist())
        start += array.size

    def taken_apart(result: Any) -> Any:
        if isinstance(result, dict):
            return {name: taken_apart(entry) for name, entry in result.items()}
        gradient = np.imag(result) / STEP if isinstance(result, np.ndarray) else np.zeros(total)
        parts = np.split(gradient, np.cumsum([given[i].size for i in wrt])[:-1])
        return value(result), [part.reshape(given[i].shape) for part, i in zip(parts, wrt, strict=True)]

    return taken_apart(loss(*nested))


# ------------------------------------------------------------------------------------------------ shared by the oracles


def mean(terms: Sequence[Any]) -> Any:
    return sum(terms) / len(terms)


def log_softmax(scores: Sequence[Any]) -> list[Any]:
    """Logarithms of the softmax of one vector."""
    highest = max(value(x) for x in scores)
    total = sum(exp(x - highest) for x in scores)
    return [x - highest - log(total) for x in scores]


def softmax(scores: Sequence[Any]) -> list[Any]:
    return [exp(x) for x in log_softmax(scores)]


def kl_divergence(log_p: Sequence[Any], log_q: Sequence[Any]) -> Any:
    """KL(p || q) of two vectors of log-probabilities, in nats; 0 log 0 is 0."""
    return sum(exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True) if exp(value(a)) > 0)


def norm(vector: Sequence[Any]) -> Any:
    """Euclidean length; at the zero vector the derivative is 0."""
    squared = sum(x * x for x in vector)
    return sqrt(squared) if value(squared) > 0 else 0.0


def unit(vector: Sequence[Any]) -> list[Any]:
    """At length 1; the zero vector stays as it is, without gradient."""
    length = norm(vector)
    return [x / length for x in vector] if value(length) > 0 else [0.0 for _ in vector]


def dot(a: Sequence[Any], b: Sequence[Any]) -> Any:
    return sum(x * y for x, y in zip(a, b, strict=True))


def flat(nested: Any) -> list[Any]:
    """The entries of nested lists, in their order."""
    return [x for entry in nested for x in flat(entry)] if isinstance(nested, list) else [nested]


def cross_entropy(logits: Sequence[Sequence[Any]], target: Sequence[int]) -> Any:
    """Mean over the rows of -log p of the label."""
    return mean([-log_softmax(row)[int(label)] for row, label in zip(logits, target, strict=True)])
