"""Data sets and loaders from a configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mdistiller.registry import InputError, dataset_dict, distiller_dict

from .base import DataSet, Split
from .fields import batch_fields, views_of, wants_negatives
from .loader import BatchedImages, Loader
from .negatives import negatives_from
from .subsets import hold_out, reduce_train


@dataclass(frozen=True)
class Splits:
    """Images to train on, to choose on (``None`` where ``DATASET.VAL_FRACTION`` is 0) and to test on."""

    train: Split
    val: Split | None
    test: Split


@dataclass(frozen=True)
class Loaders:
    """What a run needs of its data.

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
    """The images of ``DATASET.TYPE``, in memory.

    The validation images are taken from the training images first, ``TRAIN_FRACTION`` or
    ``TRAIN_PER_CLASS`` then applies to the rest. Both choices depend on ``EXPERIMENT.SEED``; the test
    images are always all of them.

    Raises:
        InputError: unknown data set, missing files, or not enough images for what is asked.
    """
    dataset = dataset_dict[cfg.DATASET.TYPE]
    size = cfg.DATASET.IMAGE_SIZE or dataset.image_size
    train, test = dataset.load(Path(cfg.DATASET.ROOT).expanduser(), size, cfg.DATASET.DOWNLOAD)
    val, seed = None, cfg.EXPERIMENT.SEED
    if cfg.DATASET.VAL_FRACTION != 0:
        rest, held_out = hold_out(train.labels, cfg.DATASET.VAL_FRACTION, seed)
        train, val = train.take(rest), train.take(held_out)
    kept = reduce_train(train.labels, cfg.DATASET.TRAIN_FRACTION, cfg.DATASET.TRAIN_PER_CLASS, seed)
    return Splits(train if kept is None else train.take(kept), val, test)


def build_loaders(cfg: Any) -> Loaders:
    """The loaders of a run of method ``DISTILLER.TYPE`` on data set ``DATASET.TYPE``.

    Raises:
        InputError: see :func:`load_splits`, :func:`batch_fields` and :func:`views_of`; or no batch is left.
    """
    dataset = dataset_dict[cfg.DATASET.TYPE]
    method, seed = distiller_dict[cfg.DISTILLER.TYPE], cfg.EXPERIMENT.SEED
    views = views_of(batch_fields(method), dataset)
    splits = load_splits(cfg)
    negatives = negatives_from(cfg, method.section, splits.train.labels) if wants_negatives(method) else None
    train = Loader(
        BatchedImages(splits.train, views, dataset.mean, dataset.std, seed, with_index=True, negatives=negatives),
        cfg.SOLVER.BATCH_SIZE,
        shuffle=True,
        seed=seed,
        drop_last=cfg.SOLVER.DROP_LAST,
        num_workers=cfg.DATASET.NUM_WORKERS,
    )
    if len(train) == 0:
        raise InputError(
            f"SOLVER.DROP_LAST leaves nothing of {train.num_data} training images: the only batch is smaller "
            f"than SOLVER.BATCH_SIZE={train.batch_size}; give a batch size of at most {train.num_data}"
        )
    batch_size = cfg.DATASET.TEST.BATCH_SIZE
    return Loaders(
        train=train,
        val=None if splits.val is None else _test_loader(splits.val, dataset, batch_size),
        test=_test_loader(splits.test, dataset, batch_size),
        num_data=len(splits.train),
        num_classes=dataset.num_classes,
    )


def get_dataset(cfg: Any) -> tuple[Loader, Loader, int, int]:
    """mdistiller's form: ``(train_loader, val_loader, num_data, num_classes)``.

    ``val_loader`` has the validation images where ``DATASET.VAL_FRACTION`` sets some aside, else the test's.
    """
    loaders = build_loaders(cfg)
    return loaders.train, loaders.val or loaders.test, loaders.num_data, loaders.num_classes


def _test_loader(split: Split, dataset: type[DataSet], batch_size: int) -> Loader:
    """No view, no workers: passing a batch between processes takes longer than normalising it."""
    images = BatchedImages(split, {"image": ("test", ())}, dataset.mean, dataset.std)
    return Loader(images, batch_size)
