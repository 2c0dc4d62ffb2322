"""From images in memory to batches: whole batches are drawn, augmented and normalised at once.

The sampler hands out requests ``(epoch, indices)`` and the data set answers each with a finished batch. The
epoch is part of the request, so worker processes that live through all epochs know it; and since the
augmentation is a pure function of the request, it makes no difference whether worker processes answer it or the
device on which the networks run, except for the speed.
"""

from __future__ import annotations

import itertools
import signal
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from mdistiller.functional import draws
from mdistiller.registry import InputError

from .base import Split
from .mixing import LabelMixing
from .negatives import Negatives
from .views import Draws, View, apply_views, name_key, normalize

# Epoch and indices. With a third entry, of the batch that they make the images in these places are wanted only.
Request = tuple[int, Tensor] | tuple[int, Tensor, Tensor]
Batch = dict[str, Tensor]

# On a CPU the views of so many images are made together and then divided into batches: an operation that RandAugment
# gives to four images of a batch takes no longer for sixteen. An image's draws are its own, so it stays the same.
AT_ONCE = 256


class BatchedImages(Dataset):
    """Answers ``(epoch, indices)`` with a batch.

    Args:
        split: the images; an index is a position in it.
        views: for each image field of the batch the name and the recipe of its view.
        mean, std: of the three channels, where white is 1.
        seed: of the augmentation.
        with_index: also deliver ``index``.
        negatives: also deliver ``contrastive_index``; made of labels on the device.
        mixing: mix images and labels; ``target`` are shares of classes then.
        device: where images and labels are kept and batches are made; their indices must lie there.
        channels_last: NHWC layout of the images delivered.
    """

    def __init__(
        self,
        split: Split,
        views: dict[str, tuple[str, View]],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        seed: int = 0,
        with_index: bool = False,
        negatives: Negatives | None = None,
        mixing: LabelMixing | None = None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> None:
        self.device = torch.device(device)
        self.split = split.to(self.device)
        self.views = views
        self.mean = torch.tensor(mean, device=self.device).view(-1, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(-1, 1, 1)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.seed = seed
        self.with_index = with_index
        self.negatives = negatives
        self.mixing = mixing

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, request: Request) -> Batch:
        """``{field: (B, 3, H, W) float32, "target": (B,) int64}``, or with mixing ``(B, K)`` float32.

        If wanted, also ``"index"``, ``(B,)`` int64, and ``"contrastive_index"``, ``(B, K + 1)`` int64.
        """
        return self.normalised(self.unnormalised(request))

    def unnormalised(self, request: Request) -> Batch:
        """The same with images as bytes, ``(B, 3, H, W)`` uint8, unless they are mixed, which takes numbers."""
        epoch, index, *wanted = request
        if wanted:
            return self._part_of_mixed(epoch, index, *wanted)
        batch = self._unmixed(epoch, index)
        return batch if self.mixing is None else self.mixing(self.normalised(batch), epoch, index)

    def normalised(self, batch: Batch, device: torch.device | None = None) -> Batch:
        """``batch`` with normalised images, on ``device`` if that is given."""
        found = dict(batch)
        for field in self.views:
            images = batch[field] if device is None else batch[field].to(device, non_blocking=True)
            if images.dtype == torch.uint8:
                mean, std = (value.to(images.device) for value in (self.mean, self.std))
                images = normalize(images, mean, std, self.layout)
            found[field] = images
        return found

    def _part_of_mixed(self, epoch: int, index: Tensor, places: Tensor) -> Batch:
        """The mixed images at these places of a batch, computed from them and their partners only."""
        partners, count = self.mixing.partners(epoch, index)[places], len(places)
        index = index[torch.cat([places, partners])]
        partner = torch.arange(count, 2 * count, device=index.device).repeat(2)  # of the partners, nothing is kept
        mixed = self.mixing(self.normalised(self._unmixed(epoch, index)), epoch, index, partner)
        return {name: value[:count] for name, value in mixed.items()}

    def _unmixed(self, epoch: int, index: Tensor) -> Batch:
        images = self.split.images.take(index)
        views = [(view, Draws.of_view(name, self.seed, epoch, index)) for name, view in self.views.values()]
        batch = dict(zip(self.views, apply_views(views, images), strict=True))
        batch["target"] = self.split.targets.index_select(0, index)
        if self.with_index:
            batch["index"] = index
        if self.negatives is not None:
            batch["contrastive_index"] = self.negatives.draw(epoch, index)
        return batch


class EpochSampler(Sampler[Request]):
    """The requests of one epoch, from its step ``start_step`` on; see :class:`Loader`."""

    def __init__(
        self,
        num_data: int,
        batch_size: int,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        device: torch.device,
        share: tuple[int, int] = (0, 1),
        in_turn: bool = False,
        mixed: bool = False,
    ) -> None:
        self.num_data = num_data
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.device = device
        self.share = share
        self.in_turn = in_turn
        self.mixed = mixed
        self.epoch = 1
        self.start_step = 0

    def __len__(self) -> int:
        whole, rest = divmod(self.num_data, self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> Tensor:
        """All indices in the order of this epoch, on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_data)
        return draws.permutation(self.num_data, self.seed, name_key("order of images"), epoch)

    def __iter__(self) -> Iterator[Request]:
        # Not a generator: one would read the epoch only when the first batch is asked for.
        batches = self.order(self.epoch).to(self.device).split(self.batch_size)[self.start_step : len(self)]
        rank, processes = self.share
        if self.in_turn:
            batches = batches[rank::processes]
        elif processes > 1 and self.mixed:
            places = [torch.arange(len(b), device=self.device).tensor_split(processes)[rank] for b in batches]
            return iter([(self.epoch, indices, own) for indices, own in zip(batches, places, strict=True)])
        elif processes > 1:
            batches = [indices.tensor_split(processes)[rank] for indices in batches]
        return iter([(self.epoch, indices) for indices in batches])


class Loader:
    """Batches, epoch after epoch.

    Iterating gives the batches of the current epoch and moves on to the next one; epochs count from 1. To
    repeat an epoch or to go on in the middle of one, call :meth:`set_epoch` before. Order and augmentation
    depend on the seed and the epoch only.

    Args:
        dataset: what answers the requests.
        batch_size: images per batch; the last batch may be smaller.
        shuffle: a new order in each epoch; otherwise the order of the data set.
        seed: of the order.
        drop_last: leave out a last batch that is smaller.
        num_workers: processes that prepare batches on the CPU. They are started once and kept. 0: this process
            makes a batch when it is asked for, on the data set's device. On a GPU the order of images is all that is
            then copied, once an epoch, and no batch waits for the GPU.
        share: rank and number of the processes that train together. A batch is divided among them, the first ones
            getting an image more where it does not divide; together they see what one process would see.
        in_turn: the processes take whole batches in turn instead.
        device: where the batches of workers, which send bytes, are normalised; None: on the CPU.

    Raises:
        ValueError: workers for a data set that does not lie on the CPU.
    """

    def __init__(
        self,
        dataset: BatchedImages,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        num_workers: int = 0,
        share: tuple[int, int] = (0, 1),
        in_turn: bool = False,
        device: torch.device | str | None = None,
    ) -> None:
        if num_workers and dataset.device.type != "cpu":
            raise ValueError(f"num_workers={num_workers}, but the images lie on {dataset.device}, which takes 0")
        self.dataset = dataset
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.device = None if device is None else torch.device(device)
        self.num_data = len(dataset)
        mixed = dataset.mixing is not None and dataset.mixing.needs_partners
        self.sampler = EpochSampler(
            self.num_data, batch_size, shuffle, seed, drop_last, dataset.device, share, in_turn, mixed
        )
        self._batches = _start_workers(dataset, self.sampler, num_workers) if num_workers else None
        if num_workers:
            # Python ends what is left of them by SIGTERM, to which they are deaf: end them before, in torch's way.
            weakref.finalize(self, _end_workers, self._batches)

    def __len__(self) -> int:
        """Batches in a whole epoch, those of all processes."""
        return len(self.sampler)

    @property
    def share(self) -> tuple[int, int]:
        """Rank and number of the processes among which the batches are divided."""
        return self.sampler.share

    @contextmanager
    def undivided(self) -> Iterator[None]:
        """Within it, iterating gives this process the whole batches."""
        share, self.sampler.share = self.sampler.share, (0, 1)
        try:
            yield
        finally:
            self.sampler.share = share

    def images_in(self, step: int) -> int:
        """Images in the batch of a step (from 0), over all processes."""
        return self.last_batch_size if step == len(self) - 1 else self.batch_size

    @property
    def last_batch_size(self) -> int:
        """Images in the last batch of an epoch: a method with BatchNorm cannot train on a single one."""
        rest = self.num_data % self.batch_size
        return self.batch_size if self.sampler.drop_last or rest == 0 else rest

    def set_epoch(self, epoch: int, start_step: int = 0) -> None:
        """The next iteration gives epoch ``epoch`` (from 1) without its first ``start_step`` batches."""
        if not 0 <= start_step <= len(self):
            raise ValueError(f"start_step={start_step}, but an epoch has {len(self)} batches")
        self.sampler.epoch = epoch
        self.sampler.start_step = start_step

    def __iter__(self) -> Iterator[Batch]:
        batches = self._make_here(iter(self.sampler)) if self._batches is None else self._finished(iter(self._batches))
        self.set_epoch(self.sampler.epoch + 1)
        return batches

    def _finished(self, answers: Iterator[Batch | InputError]) -> Iterator[Batch]:
        """
        Raises:
            InputError: the answer of a worker process.
        """
        for answer in answers:
            if isinstance(answer, InputError):
                raise answer
            yield self.dataset.normalised(answer, self.device)

    def _make_here(self, requests: Iterator[Request]) -> Iterator[Batch]:
        dataset = self.dataset
        if dataset.device.type != "cpu" or dataset.mixing is not None or dataset.split.images.in_files:
            yield from map(dataset.__getitem__, requests)
            return
        while group := list(itertools.islice(requests, max(1, AT_ONCE // self.batch_size))):
            (epoch, _), *_ = group
            indices = [index for _, index in group]
            whole = dataset[epoch, torch.cat(indices)]
            parts = zip(*(value.split([*map(len, indices)]) for value in whole.values()), strict=True)
            yield from (dict(zip(whole, part, strict=True)) for part in parts)


def _start_workers(dataset: BatchedImages, sampler: EpochSampler, num_workers: int) -> DataLoader:
    return DataLoader(
        _InWorker(dataset),
        batch_size=None,  # the sampler's items are whole batches
        sampler=sampler,
        num_workers=num_workers,
        persistent_workers=True,
        worker_init_fn=_leave_signals_to_the_parent,
        collate_fn=_as_it_is,
        generator=torch.Generator(),  # or each iteration would advance the global one
        pin_memory=torch.cuda.is_available(),
    )


class _InWorker(Dataset):
    """A data set in worker processes. An ``InputError`` is an answer, since torch would write a traceback into it."""

    def __init__(self, dataset: BatchedImages) -> None:
        self.dataset = dataset

    def __getitem__(self, request: Request) -> Batch | InputError:
        try:
            return self.dataset.unnormalised(request)
        except InputError as error:
            return error


def _leave_signals_to_the_parent(worker: int) -> None:
    """A Ctrl-C or a cluster's SIGTERM reaches every process of the job; the parent finishes its step with these."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_workers(batches: DataLoader) -> None:
    iterator, batches._iterator = batches._iterator, None
    if iterator is not None:
        iterator._shutdown_workers()


def _as_it_is(batch: Batch) -> Batch:
    return batch
