"""CRD's losses, loop by loop, from arXiv:1910.10699, Eq. 18, with densities as the authors' code has them.

B images of N, D entries of an embedding, K negatives. Z is a constant, set by the first batch.
"""

from __future__ import annotations

from typing import Any

from .complex_step import constant, dot, exp, log, mean, unit

EPS = 1e-7


def density_ratios(embeddings: Any, bank: Any, index: Any, temperature: float) -> list[list[Any]]:
    """(B, K + 1): exp(similarity / temperature) of each embedding and its rows of the other network's bank, over Z."""
    scores = [
        [exp(dot(embedding, bank[int(i)]) / temperature) for i in row]
        for embedding, row in zip(embeddings, index, strict=True)
    ]
    z = mean([constant(x) for row in scores for x in row]) * len(bank)
    return [[x / z for x in row] for row in scores]


def nce_loss(ratios: Any, num_data: int) -> Any:
    """Of ratios (B, K + 1), the positive first: log-losses of telling it from the noise, and each negative."""
    losses = []
    for positive, *negatives in ratios:
        noise = len(negatives) / num_data
        of_negatives = [log(noise / (ratio + noise + EPS)) for ratio in negatives]
        losses.append(-log(positive / (positive + noise + EPS)) - sum(of_negatives))
    return mean(losses)


def moved(entry: Any, embedding: Any, momentum: float) -> list[Any]:
    """An entry of a bank after its image's embedding has been seen."""
    return unit([momentum * a + (1 - momentum) * b for a, b in zip(entry, embedding, strict=True)])
