"""Stratified, reproducible, nested subsets, and what is said where there are too few images."""

import pytest
import torch

from mdistiller.dataset.subsets import class_ranks, hold_out, reduce_train, stratified_mask
from mdistiller.registry import InputError

LABELS = torch.arange(5).repeat_interleave(torch.tensor([10, 20, 30, 40, 41]))
LABELS = LABELS[torch.randperm(141, generator=torch.Generator().manual_seed(0))]


def test_ranks_number_each_class():
    ranks = class_ranks(LABELS, 1)
    for label in range(5):
        of_class = ranks[label == LABELS]
        assert of_class.sort().values.tolist() == list(range(len(of_class)))
        assert of_class.tolist() != sorted(of_class.tolist())


def test_classes_may_be_absent():
    labels = torch.tensor([7, 2, 7, 2, 7, 2])
    assert class_ranks(labels, 1).sort().values.tolist() == [0, 0, 1, 1, 2, 2]
    assert len(reduce_train(labels, 1.0, 2, seed=0)) == 4


def test_each_class_gives_its_share():
    mask = stratified_mask(LABELS, 0.3, 1)
    assert LABELS[mask].bincount().tolist() == [3, 6, 9, 12, 12]


def test_hold_out_parts_the_images():
    train, val = hold_out(LABELS, 0.2, seed=3)
    assert torch.cat([train, val]).sort().values.tolist() == list(range(141))
    assert LABELS[val].bincount().tolist() == [2, 4, 6, 8, 8]


@pytest.mark.parametrize(("fraction", "per_class", "counts"), [(0.5, 0, [5, 10, 15, 20, 21]), (1.0, 7, [7] * 5)])
def test_reduction(fraction, per_class, counts):
    kept = reduce_train(LABELS, fraction, per_class, seed=0)
    assert LABELS[kept].bincount().tolist() == counts
    assert kept.tolist() == sorted(set(kept.tolist()))
    assert torch.equal(kept, reduce_train(LABELS, fraction, per_class, seed=0))
    assert not torch.equal(kept, reduce_train(LABELS, fraction, per_class, seed=1))


def test_no_reduction():
    assert reduce_train(LABELS, 1.0, 0, seed=0) is None


def test_smaller_subsets_lie_in_larger_ones():
    parts = [set(reduce_train(LABELS, fraction, 0, seed=0).tolist()) for fraction in (0.1, 0.25, 0.5)]
    parts.append(set(reduce_train(LABELS, 1.0, 10, seed=0).tolist()))
    assert parts[0] < parts[1] < parts[2]
    assert parts[0] < parts[3]


@pytest.mark.parametrize("fraction", [-0.1, 0.01, 0.99, 1.0, 1.5])
def test_validation_without_enough_images(fraction):
    with pytest.raises(InputError, match=rf"DATASET.VAL_FRACTION={fraction} .* 10 .*0\.1 to 0\.9"):
        hold_out(LABELS, fraction, seed=0)


@pytest.mark.parametrize("fraction", [-0.5, 0.0, 0.04, 1.01])
def test_training_fraction_without_enough_images(fraction):
    with pytest.raises(InputError, match=rf"DATASET.TRAIN_FRACTION={fraction}, .* 10 .*0\.1 to 1"):
        reduce_train(LABELS, fraction, 0, seed=0)


@pytest.mark.parametrize("per_class", [-1, 11])
def test_more_images_per_class_than_there_are(per_class):
    with pytest.raises(InputError, match=rf"DATASET.TRAIN_PER_CLASS={per_class}, .* 1 to 10"):
        reduce_train(LABELS, 1.0, per_class, seed=0)


def test_two_reductions_at_once():
    with pytest.raises(InputError, match=r"TRAIN_FRACTION=0.5 and DATASET.TRAIN_PER_CLASS=5 are both set"):
        reduce_train(LABELS, 0.5, 5, seed=0)
