"""DIST's and DIST+'s losses, loop by loop, in float64.

From "DIST+: Knowledge Distillation from A Stronger Adaptive Teacher", Sec. 3-5. B images, C classes; arguments are
nested lists of numbers. What the paper leaves open is settled as follows:

- ``eps`` is added to the product of the two centred norms, as in the public code;
- a constant vector has no correlation: rho is 0, without gradient;
- acclimation's rows are the probabilities of all classes but the label divided by their sum, that is, the softmax of
  the other logits: without ``eps`` the sum cancels, with it a row's weight must not depend on the label's logit;
- KL as the relation: of a class's column as it stands, a sum over the images that isn't made a distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .complex_step import log, log_softmax, mean, norm, softmax, value

EPS = 1e-8
Vector = Sequence[Any]
Matrix = Sequence[Vector]


def pearson_distance(u: Vector, v: Vector, eps: float = EPS) -> Any:
    """Eq. 6 and 7: 1 - rho of two vectors."""
    if any(all(value(x) == value(w[0]) for x in w) for w in (u, v)):
        return 1.0
    mean_u, mean_v = mean(u), mean(v)
    return cosine_distance([x - mean_u for x in u], [y - mean_v for y in v], eps)


def cosine_distance(u: Vector, v: Vector, eps: float = EPS) -> Any:
    """1 - cos of two vectors, for the ablation of Sec. 6.4; also the second half of Eq. 7."""
    lengths = norm(u), norm(v)
    if value(lengths[0]) == 0 or value(lengths[1]) == 0:
        return 1.0
    return 1 - sum(x * y for x, y in zip(u, v, strict=True)) / (lengths[0] * lengths[1] + eps)


def kl_relation(u: Vector, v: Vector, eps: float = EPS) -> Any:
    """sum of v log(v / u), for the ablation of Sec. 6.4: u is the student's. ``eps`` isn't used."""
    return sum(y * (log(y) - log(x)) for x, y in zip(u, v, strict=True))


def probabilities(logits: Matrix, tau: float) -> list[list[Any]]:
    """Eq. 2: every row's softmax at temperature ``tau``."""
    return [softmax([z / tau for z in row]) for row in logits]


def columns(matrix: Matrix) -> list[list[Any]]:
    return [[row[j] for row in matrix] for j in range(len(matrix[0]))]


def dist_loss(
    logits_s: Matrix, logits_t: Matrix, tau: float, eps: float = EPS, relation: Any = pearson_distance, group: int = 0
) -> tuple[Any, Any]:
    """Eq. 8 and 9, without a factor tau^2: inter-class over the images, intra-class over the classes.

    With ``group``, each device of several has so many images, in their order, and its own loss; intra-class is the mean
    over the devices.
    """
    y_s, y_t = probabilities(logits_s, tau), probabilities(logits_t, tau)
    inter = mean([relation(s, t, eps) for s, t in zip(y_s, y_t, strict=True)])
    starts = range(0, len(y_s), group or len(y_s))
    devices = [(columns(y_s[a : a + starts.step]), columns(y_t[a : a + starts.step])) for a in starts]
    intra = mean([mean([relation(s, t, eps) for s, t in zip(*own, strict=True)]) for own in devices])
    return inter, intra


def acclimation_loss(
    logits_s: Matrix, logits_t: Matrix, target: Sequence[int], tau: float = 1.0, eps: float = EPS
) -> Any:
    """Eq. 14: Pearson's distance of the softmax without the label. The student's are constants."""
    distances = []
    for s, t, label in zip(logits_s, logits_t, target, strict=True):
        e_s, e_t = (softmax([z / tau for j, z in enumerate(row) if j != label]) for row in (s, t))
        distances.append(pearson_distance([value(p) for p in e_s], e_t, eps))
    return mean(distances)


def acclimation_pearson(logits_s: Matrix, logits_t: Matrix, tau: float = 1.0, eps: float = EPS) -> Any:
    """Tab. 15's variant over all classes."""
    y_s, y_t = probabilities(logits_s, tau), probabilities(logits_t, tau)
    return mean([pearson_distance([value(p) for p in s], t, eps) for s, t in zip(y_s, y_t, strict=True)])


def acclimation_kl(logits_s: Matrix, logits_t: Matrix, tau: float = 1.0) -> Any:
    """Tab. 15's variant with KL(student || teacher) over all classes, without tau^2."""
    losses = []
    for s, t in zip(logits_s, logits_t, strict=True):
        log_s = [value(x) for x in log_softmax([z / tau for z in s])]
        log_t = log_softmax([z / tau for z in t])
        losses.append(sum(softmax(log_s)[j] * (log_s[j] - log_t[j]) for j in range(len(s))))
    return mean(losses)


def channel_relation_loss(f_s: Any, f_t: Any, eps: float = EPS, relation: Any = pearson_distance) -> Any:
    """Eq. 15: ``(B, D, H, W)`` twice; mean over images and pixels of the distance along the channels."""
    distances = []
    for image_s, image_t in zip(f_s, f_t, strict=True):
        for j in range(len(image_s[0])):
            for k in range(len(image_s[0][0])):
                u, v = ([channel[j][k] for channel in image] for image in (image_s, image_t))
                distances.append(relation(u, v, eps))
    return mean(distances)


def spatial_relation_loss(f_s: Any, f_t: Any, eps: float = EPS, relation: Any = pearson_distance) -> Any:
    """Eq. 16: ``(B, D, H, W)`` twice; mean over images of the distance of the maps summed over the channels."""

    def summed(image: Any) -> list[Any]:
        height, width = len(image[0]), len(image[0][0])
        return [sum(channel[j][k] for channel in image) for j in range(height) for k in range(width)]

    return mean([relation(summed(s), summed(t), eps) for s, t in zip(f_s, f_t, strict=True)])


def convolution_1x1(maps: Any, weight: Matrix, bias: Vector) -> Any:
    """The student's alignment: ``(B, C, H, W)`` -> ``(B, D, H, W)`` by ``weight``, ``(D, C)``."""
    return [
        [
            [
                [sum(w * image[c][j][k] for c, w in enumerate(line)) + b for k in range(len(image[0][0]))]
                for j in range(len(image[0]))
            ]
            for line, b in zip(weight, bias, strict=True)
        ]
        for image in maps
    ]


def halved(maps: Any) -> Any:
    """Means of 2 x 2 pixels: ``(B, C, 2H, 2W)`` -> ``(B, C, H, W)``."""
    return [
        [
            [
                [mean([x[j][k], x[j][k + 1], x[j + 1][k], x[j + 1][k + 1]]) for k in range(0, len(x[0]), 2)]
                for j in range(0, len(x), 2)
            ]
            for x in image
        ]
        for image in maps
    ]


def squared_distance(u: Vector, v: Vector, eps: float = EPS) -> Any:
    """Mean squared difference, for the ablation of Tab. 14. ``eps`` isn't used."""
    return mean([(x - y) * (x - y) for x, y in zip(u, v, strict=True)])
