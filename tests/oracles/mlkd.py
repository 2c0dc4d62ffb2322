"""MLKD's terms, loop by loop, from "Multi-Level Logit Distillation", CVPR 2023, and its code.

Both readings of its masks: as published, a term is multiplied by the share of what is kept, and the strong view's last
two temperatures see the weak view; mended, what the mask names is left out.
"""

from __future__ import annotations

from typing import Any

from .complex_step import dot, mean, softmax, value
from .kd import kd_loss


def at_most_median(numbers: Any) -> list[bool]:
    ordered, count = sorted(numbers), len(numbers)
    median = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return [x <= median for x in numbers]


def gram_distances(rows_s: Any, rows_t: Any) -> list[Any]:
    """Of each column of the Gram matrices (N, N) of N rows the squared distance, over N."""
    return [
        sum((dot(a_t, b_t) - dot(a_s, b_s)) ** 2 for a_s, a_t in zip(rows_s, rows_t, strict=True)) / len(rows_s)
        for b_s, b_t in zip(rows_s, rows_t, strict=True)
    ]


def mlkd_losses(student: Any, teacher: Any, temperature: float, as_published: bool) -> tuple[Any, Any, Any]:
    """``kd``, ``cc``, ``bc`` of the logits (B, K) of the weak and of the strong view."""
    (weak_s, strong_s), (weak_t, strong_t) = student, teacher
    certain = [[value(x) for x in softmax(row)] for row in weak_t]
    images = at_most_median([max(row) for row in certain])
    classes = at_most_median([sum(column) for column in zip(*certain, strict=True)])
    kd = cc = bc = 0.0
    for number, t in enumerate((temperature, 3.0, 5.0, 2.0, 6.0)):
        weak = [kd_loss([s], [z], t) for s, z in zip(weak_s, weak_t, strict=True)]
        strong = kd_loss(weak_s, weak_t, t) if as_published and number >= 3 else kd_loss(strong_s, strong_t, t)
        p_s, p_t = ([softmax([z / t for z in row]) for row in logits] for logits in (weak_s, weak_t))
        of_classes = gram_distances(*(list(zip(*p, strict=True)) for p in (p_s, p_t)))
        of_images = gram_distances(p_s, p_t)
        if as_published:
            kd = kd + mean(weak) * mean(images) + strong
            cc, bc = cc + sum(of_classes) * mean(classes), bc + sum(of_images) * mean(images)
        else:
            kd = kd + mean([x * kept for x, kept in zip(weak, images, strict=True)]) + strong
            cc, bc = cc + dot(of_classes, classes), bc + dot(of_images, images)
    return kd, cc, bc
