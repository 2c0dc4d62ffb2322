"""CRCD's losses, loop by loop, as an author's code has them."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, dot, exp, log, mean, norm, softmax, unit

SHIFT, EPS = 1e-6, 1e-7


def relation(x: Any, anchor: Any) -> list[Any]:
    return unit([a - b + SHIFT for a, b in zip(x, anchor, strict=True)])


def contrast_loss(embedding: Any, bank: Any, index: Any, rows: Any, z: float, temperature: float) -> Any:
    """Embeddings (B, D), the other network's bank (N, D), positions (B,) and (B, K + 1); z the constant Z."""
    bank, terms = constant(bank), []
    for anchor in (bank[int(i)] for i in index):
        for x, candidates in zip(embedding, rows, strict=True):
            scores = [dot(relation(x, anchor), relation(bank[int(row)], anchor)) for row in candidates]
            ratio = [exp(score / temperature) / z for score in scores]
            noise = (len(ratio) - 1) / len(bank)
            wrong = sum(log(noise / (r + noise + EPS)) for r in ratio[1:])
            terms.append(-log(ratio[0] / (ratio[0] + noise + EPS)) - wrong)
    return mean(terms)


def gradient_loss(logits_s: Any, weight_s: Any, logits_t: Any, weight_t: Any, target: Any) -> Any:
    cosines = []
    for row_s, row_t, label in zip(logits_s, logits_t, target, strict=True):
        gradients = []
        for row, weight in ((row_s, weight_s), (row_t, weight_t)):
            apart = [p - (k == label) for k, p in enumerate(softmax(row))]
            gradients.append([dot(apart, column) for column in zip(*weight, strict=True)])
        cosines.append(dot(*gradients) / (norm(gradients[0]) * norm(gradients[1])))
    return 1 - mean(cosines)
