"""Data sets and loaders from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mdistiller.contract import contract_of
from mdistiller.functional.gather import this_process
from mdistiller.registry import InputError, distiller_dict, open_dataset

from .augment import ColorJitter, RandomErasing
from .base import DataSet, Split
from .fields import chosen_recipes, views_of
from .loader import BatchedImages, Loader
from .mixing import LabelMixing
from .negatives import negatives_from
from .randaugment import RandAugment
from .subsets import check_class_numbers, hold_out, reduce_train
from .views import View


@dataclass(frozen=True)
class Splits:
    """Images to train on, to choose on (``None`` if there are none) and to test on."""

    train: Split
    val: Split | None
    test: Split


@dataclass(frozen=True)
class Loaders:
    """The data of a run.

    ``train`` delivers the views that the method's ``forward_train`` names, ``target`` and ``index``; ``val``
    (``None`` without a validation split) and ``test`` deliver ``image`` and ``target``. ``index`` runs from
    0 to ``num_data - 1`` over the images that are trained on, not over the data set they were taken from.
    """

    train: Loader
    val: Loader | None
    test: Loader
    num_data: int
    num_classes: int


def load_splits(cfg: Any) -> Splits:
    """The images of the data set.

    The validation images are the data set's own, or are taken from the training images; ``TRAIN_FRACTION`` or
    ``TRAIN_PER_CLASS`` then applies to the rest. Both choices depend on ``EXPERIMENT.SEED``; the test
    images are always all of them.

    Raises:
        InputError: unknown data set, missing files, or not enough images for what is asked.
    """
    train, test, *given = open_dataset(cfg).load()
    val, seed = (*given, None)[0], cfg.EXPERIMENT.SEED
    if cfg.DATASET.VAL_FRACTION != 0 and val is not None:
        raise InputError(
            f"DATASET.VAL_FRACTION is {cfg.DATASET.VAL_FRACTION}, and the data set has validation images of its own; "
            "give one of the two"
        )
    if cfg.DATASET.VAL_FRACTION != 0:
        rest, held_out = hold_out(train.targets, cfg.DATASET.VAL_FRACTION, seed)
        train, val = train.take(rest), train.take(held_out)
    kept = reduce_train(train.targets, cfg.DATASET.TRAIN_FRACTION, cfg.DATASET.TRAIN_PER_CLASS, seed)
    return Splits(train if kept is None else train.take(kept), val, test)


def build_loaders(cfg: Any, device: torch.device | str = "cpu") -> Loaders:
    """The loaders of a run of method ``DISTILLER.TYPE`` on data set ``DATASET.TYPE``.

    Where several processes train (``torch.distributed`` is initialised), ``SOLVER.BATCH_SIZE`` is the batch of all of
    them: each is given its share of every training batch. Test batches they take in turn.

    Args:
        cfg: the configuration.
        device: where the networks run. With ``DATASET.LOADER`` ``device`` images are kept and batches made there;
            ``auto`` means that on a GPU, and anywhere with ``DATASET.NUM_WORKERS`` 0.

    Raises:
        InputError: see :func:`load_splits`, :func:`~mdistiller.contract.contract_of`, :func:`chosen_recipes` and
            :func:`views_of`; or no batch is left; or the images do not fit into the device's memory; or the batch does
            not divide among the processes.
    """
    share = this_process()
    if cfg.SOLVER.BATCH_SIZE % share[1]:
        raise InputError(
            f"SOLVER.BATCH_SIZE, the batch of all processes, is {cfg.SOLVER.BATCH_SIZE} and must be a multiple of "
            f"the number of processes, {share[1]}"
        )
    dataset = open_dataset(cfg)
    method, seed = distiller_dict[cfg.DISTILLER.TYPE], cfg.EXPERIMENT.SEED
    views = training_views(cfg, method)
    splits = load_splits(cfg)
    workers = _worker_count(cfg, torch.device(device))
    decoders = cfg.DATASET.NUM_WORKERS if dataset.in_files else 0
    place = {"device": "cpu" if workers is not None else device, "channels_last": cfg.SOLVER.CHANNELS_LAST == "on"}
    batch_size = cfg.DATASET.TEST.BATCH_SIZE

    def test_loader(split: Split) -> Loader:
        """Workers only where there is something to decode: passing a batch on takes longer than normalising it."""
        views = {"image": ("test", dataset.views.get("test", ()))}
        images = BatchedImages(split, views, *dataset.normalisation, **place)
        return Loader(images, batch_size, num_workers=decoders, share=share, in_turn=True, device=device)

    try:
        targets = splits.train.targets.to(place["device"])
        negatives = negatives_from(cfg, method.section, targets) if contract_of(method).negatives else None
        train = Loader(
            BatchedImages(
                splits.train,
                views,
                *dataset.normalisation,
                seed,
                with_index=True,
                negatives=negatives,
                mixing=_label_mixing(cfg, dataset, splits.train.targets),
                **place,
            ),
            cfg.SOLVER.BATCH_SIZE,
            shuffle=True,
            seed=seed,
            drop_last=cfg.SOLVER.DROP_LAST,
            num_workers=workers or 0,
            share=share,
            device=device,
        )
        val = None if splits.val is None else test_loader(splits.val)
        test = test_loader(splits.test)
    except torch.cuda.OutOfMemoryError as error:
        raise InputError(f"the images do not fit into the memory of {device}; set DATASET.LOADER workers") from error
    if len(train) == 0:
        raise InputError(
            f"SOLVER.DROP_LAST leaves none of {train.num_data} training images: the only batch is smaller "
            f"than SOLVER.BATCH_SIZE={train.batch_size}; give a batch size of at most {train.num_data}"
        )
    return Loaders(train, val, test, num_data=len(splits.train), num_classes=dataset.num_classes)


def training_views(cfg: Any, method: type) -> dict[str, tuple[str, View]]:
    """For each image field that a method asks for, name and recipe of its view.

    The weak view's recipe (see :func:`chosen_recipes`) is followed by what ``DATASET.COLOR_JITTER``, ``RANDAUGMENT``
    and ``RANDOM_ERASING`` ask for, in this order; other views are the methods' own and stay as they are.

    Raises:
        InputError: see :func:`views_of`.
    """
    keys, added = cfg.DATASET, ()
    if keys.COLOR_JITTER:
        added += (ColorJitter(keys.COLOR_JITTER),)
    if keys.RANDAUGMENT:
        added += (RandAugment(keys.RANDAUGMENT),)
    if keys.RANDOM_ERASING:
        added += (RandomErasing(keys.RANDOM_ERASING),)
    dataset = open_dataset(cfg)
    views = views_of(contract_of(method).views, dataset, chosen_recipes(cfg, dataset))
    return {field: (name, (*view, *added) if name == "weak" else view) for field, (name, view) in views.items()}


def _label_mixing(cfg: Any, dataset: DataSet, targets: Tensor) -> LabelMixing | None:
    wanted = {key: cfg.DATASET[key] for key in ("MIXUP_ALPHA", "CUTMIX_ALPHA", "LABEL_SMOOTHING")}
    if not any(wanted.values()):
        return None
    check_class_numbers(targets, " and ".join(f"DATASET.{key}" for key, value in wanted.items() if value))
    return LabelMixing(dataset.num_classes, *wanted.values(), cfg.EXPERIMENT.SEED)


def _worker_count(cfg: Any, device: torch.device) -> int | None:
    """Worker processes for the training batches; ``None``: they are made on the device."""
    count, choice = cfg.DATASET.NUM_WORKERS, cfg.DATASET.LOADER
    if open_dataset(cfg).in_files:
        if choice == "device":
            raise InputError(f"DATASET.LOADER device keeps images in memory; {cfg.DATASET.TYPE} takes workers or auto")
        return count
    on_device = choice == "device" or (choice == "auto" and (device.type != "cpu" or count == 0))
    return None if on_device else count


def get_dataset(cfg: Any) -> tuple[Loader, Loader, int, int]:
    """mdistiller's form: ``(train_loader, val_loader, num_data, num_classes)``.

    ``val_loader`` has the validation images where ``DATASET.VAL_FRACTION`` sets some aside, else the test's.
    """
    loaders = build_loaders(cfg)
    return loaders.train, loaders.val or loaders.test, loaders.num_data, loaders.num_classes
