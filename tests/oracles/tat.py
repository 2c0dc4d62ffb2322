"""TaT's loss, loop by loop, as the authors' code has it."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, dot, flat, mean, softmax


def positions(image: Any, channels: range) -> list[list[Any]]:
    """(C, H, W): the vectors of all positions, of some channels."""
    return [list(vector) for vector in zip(*(flat(image[c]) for c in channels), strict=True)]


def tat_loss(query: Any, value: Any, f_t: Any, heads: int = 1, over: str = "teacher") -> Any:
    """Maps (B, C, H, W) of one shape."""
    terms, each = [], len(f_t[0]) // heads
    for images in zip(query, value, constant(f_t), strict=True):
        for head in range(heads):
            q, v, f = (positions(image, range(head * each, (head + 1) * each)) for image in images)
            scores = [[dot(a, b) for b in f] for a in q]
            if over == "teacher":
                weights = [softmax(row) for row in scores]
            else:
                columns = [softmax(column) for column in zip(*scores, strict=True)]
                weights = list(zip(*columns, strict=True))
            for row, wanted in zip(weights, f, strict=True):
                terms += [
                    (sum(w * vector[c] for w, vector in zip(row, v, strict=True)) - wanted[c]) ** 2 for c in range(each)
                ]
    return mean(terms)
