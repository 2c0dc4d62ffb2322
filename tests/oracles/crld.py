"""CRLD's losses, loop by loop, from arXiv:2412.16493 and the public codes."""

from __future__ import annotations

from typing import Any

from .complex_step import constant, kl_divergence, log_softmax, mean, softmax


def kd(row_s: Any, row_t: Any, temperature: float) -> Any:
    log_s, log_t = (log_softmax([z / temperature for z in row]) for row in (row_s, row_t))
    return temperature**2 * kl_divergence(log_t, log_s)


def crld_losses(student: Any, teacher: Any, temperature: float, taus: Any, by_view: bool) -> tuple[Any, Any]:
    """Logits of the weak and of the strong view, (B, K) each; a threshold for each view."""
    sums = {"within": [], "across": []}
    for image in range(len(student[0])):
        sure = [max(softmax(constant(teacher[view][image]))) >= taus[view] for view in (0, 1)]
        for kind, pairs in {"within": [(0, 0), (1, 1)], "across": [(0, 1), (1, 0)]}.items():
            terms = [
                kd(student[s][image], constant(teacher[t][image]), temperature)
                for s, t in pairs
                if sure[t if by_view else int(kind == "across")]
            ]
            sums[kind].append(sum(terms, 0.0))
    return mean(sums["within"]), mean(sums["across"])
