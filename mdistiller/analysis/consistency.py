"""Similarity of two networks' predictions: DIST+'s consistencies and correlations.

Huang et al., DIST+ (Sec. 5.1; Fig. 4 and 7, Tab. 1). All functions take the logits ``(N, C)`` of the same N images.
Predictions are their softmax at temperature 1, in float64. The computation is done in slices, which need some 100 MB
besides the logits.

A row or column that is constant in one of the networks has no correlation and is left out of the mean. The mean is NaN
if no row or column is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mdistiller.registry import InputError, check_choice

SLICE = 2**18  # number of entries in a slice


@torch.no_grad()
def target_class_consistency(logits_a: Tensor, logits_b: Tensor, target: Tensor) -> float:
    """Share of images whose target class has the same rank in both networks (Sec. 5.1), from 0 to 1.

    The rank of a class is the number of classes with a higher logit.

    Args:
        logits_a: ``(N, C)``.
        logits_b: ``(N, C)``.
        target: class numbers ``(N,)``.

    Raises:
        InputError: shapes do not match, or there are no images.
    """
    _check(logits_a, logits_b, target)
    ranks = [(logits > logits.gather(1, target[:, None])).sum(1) for logits in (logits_a, logits_b)]
    return (ranks[0] == ranks[1]).double().mean().item()


@torch.no_grad()
def nontarget_class_consistency(logits_a: Tensor, logits_b: Tensor, target: Tensor) -> float:
    """Spearman's correlation over the classes besides the target, mean over images (Sec. 5.1), in [-1, 1].

    Args:
        logits_a: ``(N, C)``, C at least 3.
        logits_b: ``(N, C)``.
        target: class numbers ``(N,)``.

    Raises:
        InputError: see :func:`target_class_consistency`; or there are fewer than three classes.
    """
    _check(logits_a, logits_b, target)
    classes = logits_a.shape[1]
    if classes < 3:
        raise InputError(f"non-target consistency needs at least 3 classes, got {classes}")
    columns = torch.arange(classes - 1, device=target.device)
    correlations = []
    for rows in _slices(len(target), classes):
        others = columns + (columns >= target[rows, None]).long()
        correlations.append(_spearman(*(logits[rows].gather(1, others) for logits in (logits_a, logits_b))))
    return torch.cat(correlations).nanmean().item()


@torch.no_grad()
def prediction_correlation(logits_a: Tensor, logits_b: Tensor, kind: str = "pearson", axis: str = "inter") -> float:
    """Correlation of two networks' predictions (Fig. 7), in [-1, 1].

    Args:
        logits_a: ``(N, C)``.
        logits_b: ``(N, C)``.
        kind: ``"pearson"``; ``"spearman"``: of ranks, with the mean rank for equal entries; ``"kendall"``: tau-b.
        axis: ``"inter"``: over the classes of an image, mean over images; ``"intra"``: over the images for a class,
            mean over classes.

    Raises:
        InputError: the kind or the axis is unknown, shapes differ, or there are fewer than two entries to correlate.
    """
    _check(logits_a, logits_b)
    correlate = KINDS[check_choice("kind", kind, tuple(KINDS))]
    intra = check_choice("axis", axis, ("inter", "intra")) == "intra"
    images, classes = logits_a.shape
    count, length = (classes, images) if intra else (images, classes)
    if length < 2:
        raise InputError(f"axis {axis} correlates over {'images' if intra else 'classes'}, and there is only one")
    norms = [_log_sums(logits) for logits in (logits_a, logits_b)]
    correlations = []
    for part in _slices(count, length):
        where = (slice(None), part) if intra else (part, slice(None))
        logs = [z[where].double() - norm[where[0]] for z, norm in zip((logits_a, logits_b), norms, strict=True)]
        correlations.append(correlate(*(z.T.contiguous() if intra else z for z in logs)))
    return torch.cat(correlations).nanmean().item()


def _pearson_of_probabilities(log_a: Tensor, log_b: Tensor) -> Tensor:
    return _pearson(log_a.exp(), log_b.exp())


def _pearson(a: Tensor, b: Tensor) -> Tensor:
    """Correlations ``(R,)`` of the rows of two tensors ``(R, L)``; NaN if one of the rows is constant."""
    constant = (a == a[:, :1]).all(1) | (b == b[:, :1]).all(1)
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    correlations = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    return correlations.clamp(-1, 1).masked_fill(constant, torch.nan)


def _spearman(a: Tensor, b: Tensor) -> Tensor:
    return _pearson(*(((below + not_above + 1) / 2).double() for below, not_above in map(_positions, (a, b))))


def _kendall(a: Tensor, b: Tensor) -> Tensor:
    """Tau-b ``(R,)`` of the rows of two tensors ``(R, L)`` by counting inversions; NaN if a row is constant."""
    length = a.shape[1]
    (rank_a, end_a), (rank_b, end_b) = _positions(a), _positions(b)
    both, order = (rank_a * length + rank_b).sort(dim=1)
    rank_both, end_both = _positions(both)
    pairs = length * (length - 1) / 2
    tied_a, tied_b, tied_both = (
        ((end - rank - 1).sum(1) / 2).double()
        for rank, end in ((rank_a, end_a), (rank_b, end_b), (rank_both, end_both))
    )
    discordant = _inversions(rank_b.gather(1, order))
    surplus = pairs - tied_a - tied_b + tied_both - 2 * discordant  # of concordant pairs
    return surplus / ((pairs - tied_a) * (pairs - tied_b)).sqrt()  # 0 / 0 if all pairs are tied


def _positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry of ``(R, L)`` the number of smaller entries in its row, and of entries that are not larger."""
    in_order = x.sort(dim=1).values
    return torch.searchsorted(in_order, x), torch.searchsorted(in_order, x, right=True)


def _inversions(ranks: Tensor) -> Tensor:
    """``(R,)``: the number of pairs of a row ``(R, L)`` in falling order; entries are int64, 0 to L - 1.

    The bits are processed from the highest. If two entries agree in all higher bits, the larger entry has a 1 in this
    bit. Rows are sorted by the higher bits, so such entries are adjacent. A pair is inverted if the 1 comes first.
    """
    total = torch.zeros(len(ranks), dtype=torch.float64, device=ranks.device)
    for bit in reversed(range((ranks.shape[1] - 1).bit_length())):
        ones = ranks >> bit & 1
        before = ones.cumsum(1) - ones
        group = ranks >> (bit + 1)
        start = torch.searchsorted(group, group)  # each row is sorted by its groups
        total += ((before - before.gather(1, start)) * (1 - ones)).sum(1)
        ranks = ranks.gather(1, (ranks >> bit).argsort(dim=1, stable=True))
    return total


def _log_sums(logits: Tensor) -> Tensor:
    """The logarithms of the softmax's denominators, ``(N, 1)`` in float64."""
    parts = [logits[rows].double().logsumexp(1, keepdim=True) for rows in _slices(*logits.shape)]
    return torch.cat(parts)


def _slices(count: int, length: int) -> Iterator[slice]:
    """Slices of ``0 .. count`` rows of ``length`` entries, with about ``SLICE`` entries in each slice."""
    step = max(SLICE // length, 1)
    return (slice(start, start + step) for start in range(0, count, step))


KINDS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "pearson": _pearson_of_probabilities,
    "spearman": _spearman,
    "kendall": _kendall,
}


def _check(logits_a: Tensor, logits_b: Tensor, target: Tensor | None = None) -> None:
    shapes = [tuple(x.shape) for x in (logits_a, logits_b)]
    if shapes[0] != shapes[1] or len(shapes[0]) != 2 or 0 in shapes[0]:
        raise InputError(f"logits must be two tensors (images, classes) of one shape, not empty; got {shapes}")
    if target is not None and target.shape != logits_a.shape[:1]:
        raise InputError(
            f"target must have a class number for each of {len(logits_a)} images, got {tuple(target.shape)}"
        )
