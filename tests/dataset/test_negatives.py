"""Rows to contrast images with: who is in them, how often, and that nothing but the keys decides."""

import pytest
import torch

from mdistiller.dataset import Digits
from mdistiller.dataset.base import Split
from mdistiller.dataset.loader import BatchedImages, Loader
from mdistiller.dataset.negatives import Negatives, negatives_from
from mdistiller.engine.config.node import ConfigNode
from mdistiller.registry import InputError

LABELS = torch.tensor([0, 2, 1, 0, 2, 2, 1, 0, 5, 1, 2, 0])  # 4, 3, 4, 0, 0, 1
EVERYONE = torch.arange(len(LABELS))


def test_negatives_are_distinct_images_of_other_classes_behind_the_image_itself():
    rows = Negatives(LABELS, 7).draw(1, EVERYONE)
    assert rows.shape == (12, 8) and rows.dtype == torch.int64
    assert torch.equal(rows[:, 0], EVERYONE)
    assert (LABELS[rows[:, 1:]] != LABELS[:, None]).all()
    assert all(len(set(row.tolist())) == 8 for row in rows)


def test_as_many_as_there_are_is_all_of_them_and_more_repeats_some():
    rows = Negatives(LABELS, 8).draw(1, torch.tensor([0]))
    assert set(rows[0, 1:].tolist()) == set((LABELS != 0).nonzero().squeeze(1).tolist())
    rows = Negatives(LABELS, 50).draw(1, EVERYONE)
    assert (LABELS[rows[:, 1:]] != LABELS[:, None]).all()


def test_each_negative_is_drawn_equally_often():
    """8 negatives of image 0, of which 3 are drawn in each of 4000 epochs: 1500 of each are expected, std 30.6."""
    negatives, index = Negatives(LABELS, 3), torch.tensor([0])
    counts = torch.cat([negatives.draw(epoch, index)[0, 1:] for epoch in range(4000)]).bincount(minlength=12)
    assert (counts[LABELS == 0] == 0).all()
    assert ((counts[LABELS != 0] - 1500).abs() < 4 * 30.6).all()


def test_relaxed_positives_are_any_image_of_the_class():
    negatives = Negatives(LABELS, 2, "relax")
    rows = torch.stack([negatives.draw(epoch, EVERYONE)[:, 0] for epoch in range(60)])
    assert (LABELS[rows] == LABELS).all()
    assert set(rows[:, 0].tolist()) == {0, 3, 7, 11}


def test_rows_follow_from_seed_epoch_and_image_alone():
    first = Negatives(LABELS, 5, seed=3).draw(2, EVERYONE)
    assert torch.equal(first[[4, 1]], Negatives(LABELS, 5, seed=3).draw(2, torch.tensor([4, 1])))
    assert not torch.equal(first, Negatives(LABELS, 5, seed=4).draw(2, EVERYONE))
    assert not torch.equal(first, Negatives(LABELS, 5, seed=3).draw(3, EVERYONE))


def test_the_loader_delivers_them():
    split = Split(torch.zeros(12, 3, 8, 8, dtype=torch.uint8), LABELS)
    negatives = Negatives(LABELS, 4)
    images = BatchedImages(split, {"image": ("weak", ())}, Digits.mean, Digits.std, negatives=negatives)
    for workers in (0, 1):
        batches = list(Loader(images, 5, num_workers=workers))
        assert torch.equal(torch.cat([b["contrastive_index"] for b in batches]), negatives.draw(1, EVERYONE))


@pytest.mark.parametrize(
    ("labels", "count", "mode", "message"),
    [
        (LABELS, 4, "strict", r"CRD\.MODE takes exact or relax, got 'strict'"),
        (LABELS, 0, "exact", r"CRD\.NCE\.K.* at least 1, got 0"),
        (torch.ones(3).long(), 4, "exact", "at least two classes"),
    ],
)
def test_what_is_refused(labels, count, mode, message):
    with pytest.raises(InputError, match=message):
        Negatives(labels, count, mode)


def test_settings_come_from_the_methods_section_or_from_crd():
    cfg = ConfigNode({"EXPERIMENT": {"SEED": 1}, "CRD": {"NCE": {"K": 3}, "MODE": "relax"}, "MINE": {"NCE": {"K": 2}}})
    assert (negatives_from(cfg, "MINE", LABELS).count, negatives_from(cfg, "MINE", LABELS).mode) == (2, "exact")
    assert (negatives_from(cfg, "OTHER", LABELS).count, negatives_from(cfg, "OTHER", LABELS).mode) == (3, "relax")
    del cfg["CRD"]
    with pytest.raises(InputError, match=r"set CRD\.NCE\.K"):
        negatives_from(cfg, "OTHER", LABELS)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_same_on_the_gpu(mode):
    here, there = (Negatives(labels, 6, mode, seed=3) for labels in (LABELS, LABELS.cuda()))
    assert torch.equal(there.draw(2, EVERYONE.cuda()).cpu(), here.draw(2, EVERYONE))
