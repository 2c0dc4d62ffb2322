"""SSKD's losses of copies, loop by loop, from arXiv:2006.07114 and the authors' code."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, dot, kl_divergence, log_softmax, mean, unit, value


def similarities(embeddings: Any) -> list[list[Any]]:
    """(4B, D), the images first: cosines of the 3B copies with the B images."""
    directions = [unit(row) for row in embeddings]
    images = len(directions) // 4
    return [[dot(copy, image) for image in directions[:images]] for copy in directions[images:]]


def contrastive_loss(embeddings: Any) -> Any:
    rows = similarities(embeddings)
    return mean([-log_softmax(row)[i % len(row)] for i, row in enumerate(rows)])


def kept(scores: Any, target: Any, ratio: float) -> list[int]:
    """Numbers of the rows that count."""
    ranks = [sum(value(z) > value(row[int(y)]) for z in row) for row, y in zip(scores, target, strict=True)]
    wrong = sum(rank > 0 for rank in ranks)
    order = sorted(range(len(ranks)), key=lambda row: ranks[row])
    return order[: len(ranks) - wrong + int(wrong * ratio)]


def kept_kl_loss(student: Any, teacher: Any, target: Any, temperature: float, ratio: float) -> Any:
    """Scores (M, K) of both networks, the right columns (M,)."""
    teacher, terms = constant(teacher), []
    for row in kept(teacher, target, ratio):
        log_p_s, log_p_t = (log_softmax([z / temperature for z in rows[row]]) for rows in (student, teacher))
        terms.append(temperature**2 * kl_divergence(log_p_t, log_p_s))
    return mean(terms)
