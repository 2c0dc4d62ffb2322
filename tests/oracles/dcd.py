"""DCD's loss, loop by loop, in float64.

From the supplement of "DCD: Discriminative and Consistent Representation Distillation", Algorithm 1 and Sec. 9. B
images, E entries of an embedding; arguments are nested lists of numbers. The algorithm's listing is read as follows:

- ``consistent_loss`` compares row i of the row-wise softmax with column i of the column-wise one, and is a mean over
  the images (the listing compares it with row i, which is no distribution, and divides by B once more);
- gradient passes through both, or through the row-wise softmax alone (``detach_target``);
- the scale is exp(theta), at most 10, and multiplies.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .complex_step import exp, kl_divergence, log_softmax, mean, norm, value

Vector = Sequence[Any]
Matrix = Sequence[Vector]


def embed(features: Matrix, weight: Matrix, bias: Vector) -> list[list[Any]]:
    """``(B, D)`` -> ``(B, E)``: a linear layer, every row then divided by its length."""
    rows = []
    for feature in features:
        row = [sum(w * x for w, x in zip(line, feature, strict=True)) + b for line, b in zip(weight, bias, strict=True)]
        length = norm(row)
        rows.append([x / length for x in row])
    return rows


def scale(theta: Any, highest: float = 10.0) -> Any:
    """tau of the listing: exp(theta), clamped; no gradient where it is."""
    return exp(theta) if value(exp(theta)) <= highest else highest


def dcd_loss(
    embed_s: Matrix, embed_t: Matrix, tau: Any, b: Any, alpha: float = 0.5, detach_target: bool = False
) -> Any:
    """``contrastive_loss + alpha * consistent_loss`` of normalised embeddings ``(B, E)``."""
    logits = [[sum(x * y for x, y in zip(s, t, strict=True)) * tau + b for t in embed_t] for s in embed_s]
    by_row = [log_softmax(row) for row in logits]
    by_column = [log_softmax([row[j] for row in logits]) for j in range(len(embed_t))]
    if detach_target:
        by_column = [[value(x) for x in column] for column in by_column]
    contrastive = mean([-by_row[i][i] for i in range(len(by_row))])
    consistent = mean([kl_divergence(by_column[i], by_row[i]) for i in range(len(by_row))])
    return contrastive + alpha * consistent
