"""MGD's loss, loop by loop, from arXiv:2205.01529: one linear 3x3 convolution, a ReLU, a second convolution."""

from __future__ import annotations

from typing import Any

from .complex_step import flat, value


def conv3x3(image: Any, kernel: Any, bias: Any) -> Any:
    """(C, H, W), (C', C, 3, 3), (C',) -> (C', H, W) with zeros around the image."""
    height, width = len(image[0]), len(image[0][0])

    def at(channel: int, y: int, x: int) -> Any:
        return image[channel][y][x] if 0 <= y < height and 0 <= x < width else 0.0

    def summed(weights: Any, y: int, x: int) -> Any:
        places = [(c, i, j) for c in range(len(image)) for i in range(3) for j in range(3)]
        return sum(weights[c][i][j] * at(c, y + i - 1, x + j - 1) for c, i, j in places)

    return [
        [[summed(weights, y, x) + b for x in range(width)] for y in range(height)]
        for weights, b in zip(kernel, bias, strict=True)
    ]


def relu(x: Any) -> Any:
    return [relu(entry) for entry in x] if isinstance(x, list) else (x if value(x) > 0 else 0.0)


def mgd_loss(f_s: Any, draw: Any, ratio: float, layers: Any, f_t: Any) -> Any:
    """Aligned maps, a number in [0, 1) for each image and channel, two pairs of kernel and bias."""
    total = 0.0
    for image, numbers, teacher in zip(f_s, draw, f_t, strict=True):
        kept = [
            channel if number >= ratio else [[0.0 for _ in row] for row in channel]
            for channel, number in zip(image, numbers, strict=True)
        ]
        generated = conv3x3(relu(conv3x3(kept, *layers[0])), *layers[1])
        total = total + sum((g - t) ** 2 for g, t in zip(flat(generated), flat(teacher), strict=True))
    return total / len(f_s)
