"""DistPro: many paths between the networks' maps, and a process of their weights that was found by meta learning.

Deng, Sun, Newsam, Wang. DistPro: Searching a Fast Knowledge Distillation Process via Meta Optimization. ECCV 2022.
arXiv:2204.05547. Shapes: B images, P paths.

A path leads from a map of the student to an equally deep or shallower map of the teacher, both before the ReLU: 10
paths for networks with four maps. Each has a connector (:class:`Connector`) and the loss of ReviewKD
(:func:`~mdistiller.distillers.ReviewKD.hcl_loss`); the paths' losses are weighted (:func:`path_weights`).

- Search (:meth:`DistPro.prepare`): a copy of the student trains for ``SEARCH_EPOCHS`` epochs. Before each step one
  logit for each path, alpha, takes a step that lowers the cross-entropy on held-out images after the student's step
  (DARTS' second order: the gradient through a virtual step, by finite differences). The weights are the softmax of
  alpha. Alpha after each epoch is the process.
- Training: the process is stretched linearly over the epochs. Weights are ``softmax([alpha, 1]) * P``, without the last
  entry; paths whose weight is below ``CLIP`` are not computed.

Stretching and clipping are the paper's. The authors' code does not have them: its training goes on searching. Our
readings: held-out images are a share of each batch, drawn by image; the maps of networks with more than four are all
used, and connectors take the sizes of the teacher's maps, where the code has 32, 32, 16 and 8. Departs from the code:
the teacher is in eval mode. Without a search (``SEARCH_EPOCHS`` 0) all weights are equal.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional import draws
from mdistiller.options import MANY, Option

from ._base import Distiller, register_distiller
from ._common import feature_losses, generator_kept, preact_maps, zero_of
from .ReviewKD import hcl_loss

DEFAULTS = {
    "CLIP": Option(0.5, "paths of smaller weight are not computed", at_least=0),
    "SEARCH_EPOCHS": Option(40, "epochs of the search; 0: equal weights", at_least=0, at_most=MANY),
    "SEARCH_LR": Option(0.1, "learning rate of the student in the search", above=0),
    "SEARCH_MOMENTUM": Option(0.9, "its momentum, Nesterov's", above=0, below=1),
    "SEARCH_WEIGHT_DECAY": Option(5e-4, "its weight decay", at_least=0),
    "ALPHA_LR": Option(0.1, "learning rate of alpha, Adam with betas 0.5 and 0.999", above=0),
    "HELD_OUT": Option(0.2, "share of the images that alpha learns from", above=0, below=1),
    "LOSS": feature_losses(1.0),
}
PAPER = "Deng et al., ECCV 2022, arXiv:2204.05547"
KEY = zlib.crc32(b"DistPro's held-out images")
MOST_CHANNELS = 512  # of a connector's inner maps


def path_weights(alpha: Tensor, biased: bool) -> Tensor:
    """``softmax(alpha)``, or with ``biased`` ``softmax([alpha, 1])`` without its last entry, times P; ``(P,)``."""
    if not biased:
        return alpha.softmax(0)
    return torch.cat([alpha, alpha.new_ones(1)]).softmax(0)[:-1] * len(alpha)


def distpro_loss(maps_s: Sequence[Tensor], maps_t: Sequence[Tensor], weights: Sequence[float] | Tensor) -> Tensor:
    """``sum over paths of weight * HCL``, HCL the loss of :func:`~mdistiller.distillers.ReviewKD.hcl_loss`.

    Args:
        maps_s: of each path, the connector's output ``(B, C, H, W)``; gradient flows.
        maps_t: of each path, the teacher's map of that shape; constant.
        weights: of the paths; gradient flows.

    Returns:
        Scalar ``()`` in float32 or better.

    Raises:
        InputError: maps of different shapes.
        ValueError: lists of different length.

    Example:
        >>> maps_s, maps_t = [torch.ones(1, 2, 8, 8)] * 2, [torch.zeros(1, 2, 8, 8)] * 2
        >>> distpro_loss(maps_s, maps_t, [0.25, 0.5])
        tensor(0.7500)
    """
    paths = zip(maps_s, maps_t, weights, strict=True)
    return sum(weight * hcl_loss([f_s], [f_t]) for f_s, f_t, weight in paths)


class Gate(nn.Module):
    """``x * conv(x)``: a map ``(B, C, H, W)`` times a 1x1 convolution of itself to one channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.conv(x)


class Connector(nn.Sequential):
    """Three 3x3 convolutions with batch norm, a gate behind the first, a resize in front of the last.

    Args:
        width_s: of the student's map.
        width_t: of the teacher's map.
    """

    RESIZE = 7  # number of the layer

    def __init__(self, width_s: int, width_t: int) -> None:
        inner = min(MOST_CHANNELS, width_s, width_t)

        def convolution(c_in: int, c_out: int) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            nn.init.normal_(conv.weight, std=math.sqrt(2 / (9 * c_out)))
            return [conv, nn.BatchNorm2d(c_out)]

        super().__init__(
            *convolution(width_s, inner), nn.ReLU(), Gate(inner),
            *convolution(inner, inner), nn.ReLU(), nn.Identity(),
            *convolution(inner, width_t),
        )  # fmt: skip

    def forward(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """``(B, width_t, *size)`` of ``x`` ``(B, width_s, H, W)``; ``size`` is that of the teacher's map."""
        for number, layer in enumerate(self):
            x = F.interpolate(x, tuple(size), mode="nearest") if number == self.RESIZE else layer(x)
        return x


class Process(nn.Module):
    """Alpha ``(P,)`` after each epoch of the search, and the weights of each epoch of the training.

    Args:
        searched: epochs of the search.
        paths: P.
        epochs: of the training.
    """

    def __init__(self, searched: int, paths: int, epochs: int) -> None:
        super().__init__()
        self.epochs = epochs
        self.register_buffer("alpha", torch.ones(max(searched, 1), paths))
        self._stretch()

    @torch.no_grad()
    def put(self, rows: list[list[float]]) -> None:
        self.alpha.copy_(torch.tensor(rows))
        self._stretch()

    def _stretch(self) -> None:
        """Compute the weights as numbers: reading them in a step does not wait for the device."""
        alpha = self.alpha.detach().cpu().double()
        self.weights = []
        for epoch in range(self.epochs):
            place = epoch / max(self.epochs - 1, 1) * (len(alpha) - 1)
            before = min(int(place), len(alpha) - 1)
            between = torch.lerp(alpha[before], alpha[min(before + 1, len(alpha) - 1)], place - before)
            self.weights.append(path_weights(between, biased=True).tolist())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._stretch()


@register_distiller("DISTPRO", DEFAULTS, paper=PAPER, family="feature")
class DistPro(Distiller):
    """Paths between maps before the ReLU, with weights that change by epoch (:func:`distpro_loss`)."""

    mixed_labels = True

    def __init__(self, student: nn.Module, teacher: nn.Module, cfg: Any) -> None:
        super().__init__(student, teacher)
        self.own, self.seed = cfg.DISTPRO, cfg.EXPERIMENT.SEED
        of_student, of_teacher = self.network_facts(cfg)
        widths_s, widths_t = of_student.preact_channels, of_teacher.preact_channels
        self.paths = [(t, s) for t in range(len(widths_t)) for s in range(t, len(widths_s))]
        with generator_kept():
            self.connectors = nn.ModuleList(Connector(widths_s[s], widths_t[t]) for t, s in self.paths)
        self.process = Process(self.own.SEARCH_EPOCHS, len(self.paths), cfg.SOLVER.EPOCHS)

    def weights_in(self, epoch: int) -> list[float]:
        """Of the paths in an epoch of the training; 0 for clipped ones."""
        weights = self.process.weights[min(epoch, self.process.epochs) - 1]
        return [weight if weight >= self.own.CLIP else 0.0 for weight in weights]

    def forward_train(
        self, image: Tensor, target: Tensor, epoch: int = 1, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        weights = self.weights_in(epoch)
        logits_student, features_student = self.student(image)
        with torch.no_grad():
            _, features_teacher = self.teacher(image)
        distance = self.distance(self.connectors, features_student, features_teacher, weights)
        return logits_student, {
            "loss_ce": self.own.LOSS.CE_WEIGHT * F.cross_entropy(logits_student, target),
            "loss_kd": self.own.LOSS.FEAT_WEIGHT * (distance + zero_of(self.connectors)),
        }

    def distance(
        self, connectors: nn.ModuleList, features_s: dict[str, Any], features_t: dict[str, Any], weights: Any
    ) -> Tensor:
        """The unweighted loss. Paths whose weight is the number 0 are not computed."""
        maps_s, maps_t = preact_maps(features_s), preact_maps(features_t)
        kept = [n for n, weight in enumerate(weights) if isinstance(weight, Tensor) or weight]
        if not kept:
            return maps_s[0].new_zeros(())
        targets = [maps_t[self.paths[n][0]] for n in kept]
        mapped = [connectors[n](maps_s[self.paths[n][1]], f_t.shape[2:]) for n, f_t in zip(kept, targets, strict=True)]
        return distpro_loss(mapped, targets, [weights[n] for n in kept])

    # The search

    def prepare(
        self,
        batches: Callable[[int], Iterable[dict[str, Tensor]]],
        autocast: Callable[[], AbstractContextManager],
    ) -> dict[str, Any]:
        """Search the process of the weights, with copies of student and connectors.

        Args:
            batches: gives the batches of an epoch, as ``forward_train`` gets them.
            autocast: context for the networks.

        Returns:
            Alpha after the last epoch.
        """
        own = self.own
        if not own.SEARCH_EPOCHS:
            return {}
        search = Search(self, autocast)
        rows = []
        for epoch in range(1, own.SEARCH_EPOCHS + 1):
            for batch in batches(epoch):
                index = batch.get("index", torch.arange(len(batch["image"]), device=batch["image"].device))
                held = draws.uniform(self.seed, KEY, index) < own.HELD_OUT
                if held.sum() > 1 and (~held).sum() > 1:  # a batch norm needs two
                    parts = [(batch["image"][rows], batch["target"][rows]) for rows in (~held, held)]
                    search.step(*parts)
            rows.append(search.alpha.detach().tolist())
        self.process.put(rows)
        return {"alpha": rows[-1]}


class Search:
    """The bilevel optimisation of one run: alpha, and copies of the student and the connectors.

    Args:
        method: gives the networks, the paths and the settings.
        autocast: context for the networks.
    """

    def __init__(self, method: DistPro, autocast: Callable[[], AbstractContextManager]) -> None:
        self.method, self.autocast = method, autocast
        self.student, self.connectors = (copy.deepcopy(part).train() for part in (method.student, method.connectors))
        self.params = [*self.student.parameters(), *self.connectors.parameters()]
        self.alpha = self.params[0].new_ones(len(method.paths)).requires_grad_()
        own = method.own
        self.rate, self.momentum, self.decay = own.SEARCH_LR, own.SEARCH_MOMENTUM, own.SEARCH_WEIGHT_DECAY
        self.optimizer = torch.optim.SGD(
            self.params, lr=self.rate, momentum=self.momentum, weight_decay=self.decay, nesterov=True
        )
        self.of_alpha = torch.optim.Adam([self.alpha], lr=own.ALPHA_LR, betas=(0.5, 0.999))

    def loss(self, image: Tensor, target: Tensor) -> Tensor:
        """The student's loss ``()`` by the weights of alpha."""
        losses = self.method.own.LOSS
        with self.autocast():
            logits, features_s = self.student(image)
            with torch.no_grad():
                _, features_t = self.method.teacher(image)
            weights = path_weights(self.alpha, biased=False)
            distance = self.method.distance(self.connectors, features_s, features_t, weights)
            return losses.CE_WEIGHT * F.cross_entropy(logits, target) + losses.FEAT_WEIGHT * distance

    def step(self, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> None:
        """One step of alpha, on the held-out images; then one of student and connectors."""
        self.alpha.grad = self.gradient_of_alpha(train, held)
        self.of_alpha.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.loss(*train).backward(inputs=self.params)
        self.optimizer.step()

    def gradient_of_alpha(self, train: tuple[Tensor, Tensor], held: tuple[Tensor, Tensor]) -> Tensor:
        """``- rate * d/d alpha (grad_w loss(train) . v)``, v the gradient on held-out images after a virtual step.

        The product is a difference quotient of the gradients at ``w + r v`` and ``w - r v``, r = 0.01 / ||v||.
        """
        start = [p.detach().clone() for p in self.params]
        gradients = torch.autograd.grad(self.loss(*train), self.params, allow_unused=True, materialize_grads=True)
        buffers = [self.optimizer.state.get(p, {}).get("momentum_buffer") for p in self.params]
        moves = [
            g + self.decay * p.detach() + (0 if buffer is None else self.momentum * buffer)
            for p, g, buffer in zip(self.params, gradients, buffers, strict=True)
        ]
        self.move(start, moves, -self.rate)
        with self.autocast():
            after = F.cross_entropy(self.student(held[0])[0], held[1])
        v = torch.autograd.grad(after, self.params, allow_unused=True, materialize_grads=True)
        r = 0.01 / torch.stack([part.norm() for part in v]).norm().clamp(min=1e-12)
        at = []
        for sign in (1, -1):
            self.move(start, v, sign * r)
            at += torch.autograd.grad(self.loss(*train), self.alpha)
        self.move(start, v, 0.0)
        return -self.rate * (at[0] - at[1]) / (2 * r)

    @torch.no_grad()
    def move(self, start: Sequence[Tensor], directions: Sequence[Tensor], by: float | Tensor) -> None:
        """Put the parameters to ``start + by * direction``."""
        for p, origin, direction in zip(self.params, start, directions, strict=True):
            p.copy_(origin + by * direction)
