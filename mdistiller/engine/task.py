"""A task: the fields that it reads from a batch, the score of a network, and the names of the numbers.

The rest of the engine and the reports read a score's headline and values, with the task's names and units. A new task
is a subclass of :class:`Task` in ``registry.task_dict``. A data set names its task by the attribute ``task``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.functional.mixing import class_numbers
from mdistiller.registry import InputError, dataset_dict, task_dict

from .batch import to_batch
from .forwards.precision import Precision
from .processes import distributed


@dataclass(frozen=True)
class Measure:
    """A number that describes a network's quality.

    Args:
        name: in ``results.json``.
        column: in ``metrics.csv`` and TensorBoard, after ``train_``, ``val_`` or ``test_``.
        label: on the console and in tables.
        unit: in tables.
        digits: after the decimal point.
        higher_is_better: else a lower value is better.
    """

    name: str
    column: str
    label: str
    unit: str = ""
    digits: int = 4
    higher_is_better: bool = True

    @property
    def title(self) -> str:
        """``"top-1 [%]"``."""
        return f"{self.label} [{self.unit}]" if self.unit else self.label

    def text(self, value: float) -> str:
        return f"{value:.{self.digits}f}"

    def with_unit(self, value: float) -> str:
        return f"{self.text(value)} {self.unit}".rstrip()

    def difference(self, value: float, form: str = "") -> str:
        """``"+1.25 points"``: the unit of differences of percentages is points. ``form`` is a format for the number."""
        unit = "points" if self.unit == "%" else self.unit
        return f"{format(value, form or f'+.{self.digits}f')} {unit}".rstrip()

    def gain(self, value: float, other: float) -> float:
        """How much better ``value`` is than ``other``; negative if it is worse."""
        return value - other if self.higher_is_better else other - value


LOSS = Measure("loss", "loss", "loss", higher_is_better=False)


@dataclass(frozen=True)
class Score:
    """A network's score on a split.

    Args:
        headline: the number for comparisons of networks.
        values: all numbers by name, the headline first.
        count: number of images.
    """

    headline: float
    values: dict[str, float]
    count: int

    @property
    def without_loss(self) -> dict[str, float]:
        """The values without the loss, or the loss if it is the only value."""
        others = {name: value for name, value in self.values.items() if name != LOSS.name}
        return others or self.values


class Task:
    """Base of all tasks.

    A task states ``measures`` and defines :meth:`sums`. If a measure is no mean over images, the task also defines
    :meth:`values`. If a score needs more than sums over batches, the task defines :meth:`evaluate`.
    """

    image = "image"
    """The field of a batch with the network's input."""
    target = "target"
    """The field of a batch with the targets; its length is the number of images."""
    measures: ClassVar[tuple[Measure, ...]]
    """The numbers of a score. The first is the headline."""
    meters: ClassVar[tuple[Measure, ...]] = ()
    """The numbers of a training step beside its losses."""

    @property
    def headline(self) -> Measure:
        return self.measures[0]

    def means(self, output: Tensor, target: Any) -> list[Tensor]:
        """The ``meters`` of a training step, each a mean over the images, ``()``.

        Args:
            output: the student's output, as ``forward_train`` returns it.
            target: the batch's field ``target``.
        """
        return []

    def sums(self, output: Tensor, target: Any) -> Tensor:
        """Sums over a batch's images, ``(S,)``. :meth:`values` computes the measures from them.

        Args:
            output: the network's output in float32.
            target: the batch's field ``target``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no sums")

    def values(self, sums: list[float], count: int) -> dict[str, float]:
        """The measures by name, from the sums over all batches and processes; by default the means over images.

        Args:
            sums: see :meth:`sums`.
            count: number of images.
        """
        return {measure.name: total / count for measure, total in zip(self.measures, sums, strict=True)}

    def evaluate(
        self,
        network: nn.Module,
        loader: Iterable[Any],
        precision: Precision | None = None,
        on_batch: Callable[[], None] | None = None,
    ) -> Score:
        """Run ``network`` over ``loader`` in eval mode and restore the network's mode.

        Several processes take turns with the loader's batches, and each gets the score over all images. The batches are
        the same as in one process.

        Args:
            network: a distiller, or a network that returns ``(output, features)`` or the output.
            loader: batches with the task's fields, as dictionaries or tuples.
            precision: device and number format; by default float32 on the device of the network's parameters.
            on_batch: called after each batch, equally often in all processes. It may raise an error to end the
                evaluation.

        Raises:
            InputError: the loader is empty.
        """
        partial, count, processes = [], 0, getattr(loader, "share", (0, 1))[1]
        for output, target in self.outputs(network, loader, precision):
            partial.append(self.sums(output, target))  # stays on the device until the end
            count += len(target)
            if on_batch is not None:
                on_batch()
        sums = torch.stack(partial).double().sum(dim=0).tolist() if partial else []
        if processes > 1:
            if on_batch is not None and len(partial) * processes < len(loader):  # other processes have one more batch
                on_batch()
            mine = torch.zeros(distributed.highest(len(sums)) + 1, dtype=torch.float64)  # a process may have no batch
            mine[: len(sums)], mine[-1] = torch.tensor(sums, dtype=torch.float64), count
            *sums, count = distributed.total(mine).tolist()
        if not count:
            raise InputError("nothing to evaluate on: the split is empty")
        values = self.values(sums, int(count))
        return Score(values[self.headline.name], values, int(count))

    @torch.no_grad()
    def outputs(
        self, network: nn.Module, loader: Iterable[Any], precision: Precision | None = None
    ) -> Iterator[tuple[Tensor, Any]]:
        """The network's output on each batch, in float32, and the batch's targets. Arguments as in :meth:`evaluate`."""
        precision = precision or Precision(device=next(network.parameters()).device)
        was_training = network.training
        network.eval()
        for item in loader:
            batch = to_batch(item, precision)
            # Not compiled: the size of the last batch would cost another compilation.
            with precision.autocast(), torch.compiler.set_stance("force_eager"):
                output = _prediction(network, batch[self.image]).float()
            yield output, batch[self.target]
        network.train(was_training)

    def line(self, values: Mapping[str, float]) -> str:
        """``"loss 0.1234, top-1 71.20"``, in the order of ``values``."""
        known = {measure.name: measure for measure in (LOSS, *self.meters, *self.measures)}
        return ", ".join(f"{known[name].label} {known[name].text(value)}" for name, value in values.items())


def _prediction(network: nn.Module, image: Tensor) -> Tensor:
    inner = getattr(network, "module", network)
    output = network(image=image) if hasattr(inner, "forward_test") else network(image)
    return output[0] if isinstance(output, tuple) else output


def task_of(cfg: Any) -> Task:
    """The task of the data set ``DATASET.TYPE``."""
    return task_dict[dataset_dict[cfg.DATASET.TYPE].task]()


def hits_at(output: Tensor, target: Tensor, topk: tuple[int, ...]) -> list[Tensor]:
    """For each k, ``(B,)`` booleans: whether the target is among the k highest of ``output`` ``(B, K)``."""
    widest = min(max(topk), output.shape[1])
    hits = output.topk(widest, dim=1).indices == target[:, None]
    return [hits[:, :k].any(dim=1) for k in topk]


class Classification(Task):
    """Top-1 and top-5 accuracy in percent, and the mean cross-entropy; targets are class numbers ``(B,)``.

    With fewer than five classes, top-5 is 100 by definition. In training, targets may be shares of classes ``(B, K)``;
    the largest share counts.
    """

    meters = (
        Measure("top1", "acc", "top-1", "%", digits=2),
        Measure("top5", "acc_top5", "top-5", "%", digits=2),
    )
    measures = (*meters, LOSS)

    def means(self, output: Tensor, target: Tensor) -> list[Tensor]:
        return [100 * hits.float().mean() for hits in hits_at(output, class_numbers(target), (1, 5))]

    def sums(self, output: Tensor, target: Tensor) -> Tensor:
        top1, top5 = hits_at(output, target, (1, 5))
        return torch.stack([top1.sum().float(), top5.sum().float(), F.cross_entropy(output, target, reduction="sum")])

    def values(self, sums: list[float], count: int) -> dict[str, float]:
        top1, top5, loss = sums
        return {"top1": 100 * top1 / count, "top5": 100 * top5 / count, LOSS.name: loss / count}


task_dict["classification"] = Classification
