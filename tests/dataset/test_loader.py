"""Loaders: what a batch holds, and that workers, views and interruptions change nothing in it."""

import pytest
import torch

from mdistiller.dataset import Split
from mdistiller.dataset.cifar100 import CIFAR100
from mdistiller.dataset.loader import BatchedImages, Loader
from mdistiller.dataset.mixing import LabelMixing

SPLIT = Split(
    torch.randint(0, 256, (53, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
    torch.arange(53) % 5,
)
WEAK, STRONG = (("weak", CIFAR100.views["weak"]), ("strong", CIFAR100.views["strong"]))
TWO_VIEWS = {"image_weak": WEAK, "image_strong": STRONG}


def make_loader(views=TWO_VIEWS, seed=0, **options):
    dataset = BatchedImages(SPLIT, views, CIFAR100.mean, CIFAR100.std, seed, with_index=True)
    return Loader(dataset, 8, shuffle=True, seed=seed, **options)


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        assert all(torch.equal(batch[key], other[key]) for key in batch)


def images_by_index(batches, field):
    return {int(i): image for batch in batches for i, image in zip(batch["index"], batch[field], strict=True)}


def test_what_a_batch_holds():
    loader = make_loader()
    batches = list(loader)
    assert [len(batch["target"]) for batch in batches] == [8] * 6 + [5]
    assert (len(loader), loader.num_data, loader.batch_size, loader.last_batch_size) == (7, 53, 8, 5)
    for batch in batches:
        assert list(batch) == ["image_weak", "image_strong", "target", "index"]
        assert batch["image_weak"].dtype == torch.float32
        assert batch["image_weak"].shape == batch["image_strong"].shape == (len(batch["index"]), 3, 16, 16)
        assert torch.equal(batch["target"], SPLIT.targets[batch["index"]])
    seen = torch.cat([batch["index"] for batch in batches])
    assert seen.sort().values.tolist() == list(range(53))


def test_drop_last():
    loader = make_loader(drop_last=True)
    assert (len(loader), len(list(loader)), loader.last_batch_size) == (6, 6, 8)


def test_without_views_and_shuffling():
    loader = Loader(BatchedImages(SPLIT, {"image": ("test", ())}, (0, 0, 0), (1, 1, 1)), 20)
    batches = list(loader)
    assert list(batches[0]) == ["image", "target"]
    assert torch.equal(torch.cat([batch["image"] for batch in batches]), SPLIT.images.pixels() / 255)
    assert_same(batches, loader)


def test_epochs_differ_and_can_be_repeated():
    loader = make_loader()
    first, second = list(loader), list(loader)
    assert not torch.equal(first[0]["index"], second[0]["index"])
    image = images_by_index(first, "image_weak"), images_by_index(second, "image_weak")
    assert sum(torch.equal(image[0][i], image[1][i]) for i in range(53)) < 5
    loader.set_epoch(1)
    assert_same(loader, first)
    assert_same(loader, second)


def test_seeds_differ():
    assert not torch.equal(next(iter(make_loader(seed=1)))["index"], next(iter(make_loader(seed=2)))["index"])


@pytest.mark.parametrize("start_step", [0, 3, 7])
def test_resumed_in_the_middle(start_step):
    loader = make_loader()
    loader.set_epoch(4)
    whole = list(loader)
    loader.set_epoch(4, start_step)
    assert_same(loader, whole[start_step:])
    assert len(list(loader)) == 7  # the next epoch is whole again


def test_start_step_beyond_the_epoch():
    with pytest.raises(ValueError, match="start_step=8, but an epoch has 7 batches"):
        make_loader().set_epoch(1, 8)


def test_workers_change_nothing():
    alone, helped = make_loader(), make_loader(num_workers=2)
    assert_same(alone, helped)
    next(iter(helped))  # an epoch broken off must not leak into the next
    alone.set_epoch(3)
    assert_same(alone, helped)
    for loader in (alone, helped):
        loader.set_epoch(9, start_step=2)
    assert_same(alone, helped)


def joined(parts):
    """What several processes' loaders give, put together step by step."""
    steps = zip(*parts, strict=True)
    return [{key: torch.cat([part[key] for part in step]) for key in step[0]} for step in steps]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_together_see_what_one_sees(processes):
    whole = make_loader()
    parts = [make_loader(share=(rank, processes)) for rank in range(processes)]
    assert len(parts[0]) == len(whole)
    assert_same(joined(parts), whole)
    for loader in (whole, *parts):
        loader.set_epoch(5, start_step=4)
    assert_same(joined(parts), whole)
    sizes = [len(batch["index"]) for batch in parts[-1]]
    assert sizes == [8 // processes] * 6 + [5 // processes]
    assert [whole.images_in(step) for step in (0, 5, 6)] == [8, 8, 5]
    with parts[0].undivided():
        parts[0].set_epoch(2)
        whole.set_epoch(2)
        assert_same(parts[0], whole)
    assert parts[0].share == (0, processes)


def test_processes_with_workers_together_see_what_one_sees():
    parts = [make_loader(share=(rank, 2), num_workers=1) for rank in range(2)]
    assert_same(joined(parts), make_loader())
    with parts[1].undivided():
        parts[1].set_epoch(3)
        undivided = list(parts[1])
    whole = make_loader()
    whole.set_epoch(3)
    assert_same(undivided, whole)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_partners_of_mixed_images_come_from_the_batch_of_all_processes(num_workers):
    mixing = LabelMixing(5, mixup=0.8, cutmix=1.0, smoothing=0.1, seed=3)

    def mixed(**options):
        dataset = BatchedImages(SPLIT, TWO_VIEWS, CIFAR100.mean, CIFAR100.std, 0, with_index=True, mixing=mixing)
        return Loader(dataset, 8, shuffle=True, **options)

    parts = [mixed(share=(rank, 2), num_workers=num_workers) for rank in range(2)]
    assert_same(joined(parts), mixed())


def test_processes_take_whole_batches_in_turn():
    whole = list(make_loader())
    parts = [list(make_loader(share=(rank, 3), in_turn=True)) for rank in range(3)]
    assert [len(part) for part in parts] == [3, 2, 2]
    for rank, part in enumerate(parts):
        assert_same(part, whole[rank::3])


@pytest.mark.gpu
def test_the_device_changes_nothing():
    here = make_loader()
    dataset = BatchedImages(SPLIT, TWO_VIEWS, CIFAR100.mean, CIFAR100.std, 0, with_index=True, device="cuda")
    there = Loader(dataset, 8, shuffle=True)
    for start_step in (0, 3):
        here.set_epoch(2, start_step)
        there.set_epoch(2, start_step)
        batches = list(there)
        assert all(value.is_cuda for batch in batches for value in batch.values())
        assert_same(here, [{key: value.cpu() for key, value in batch.items()} for batch in batches])


@pytest.mark.gpu
def test_no_batch_waits_for_the_gpu():
    dataset = BatchedImages(SPLIT, TWO_VIEWS, CIFAR100.mean, CIFAR100.std, 0, with_index=True, device="cuda")
    loader = Loader(dataset, 8, shuffle=True)
    list(loader)
    batches = iter(loader)  # the order of images is copied here
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_workers_need_images_on_the_cpu():
    dataset = BatchedImages(SPLIT, TWO_VIEWS, CIFAR100.mean, CIFAR100.std, device="meta")
    with pytest.raises(ValueError, match="num_workers=2, but the images lie on meta, which takes 0"):
        Loader(dataset, 8, num_workers=2)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_channels_last_changes_the_layout_only(num_workers):
    dataset = BatchedImages(SPLIT, TWO_VIEWS, CIFAR100.mean, CIFAR100.std, 0, with_index=True, channels_last=True)
    batches = list(Loader(dataset, 8, shuffle=True, num_workers=num_workers))
    assert_same(batches, make_loader())
    images = [batch[field] for batch in batches for field in TWO_VIEWS]
    assert all(image.is_contiguous(memory_format=torch.channels_last) for image in images)


def test_a_view_is_the_same_beside_others_and_alone():
    both, weak, strong = (list(make_loader(v)) for v in (TWO_VIEWS, {"image": WEAK}, {"image": STRONG}))
    for batch, batch_weak, batch_strong in zip(both, weak, strong, strict=True):
        assert torch.equal(batch["image_weak"], batch_weak["image"])
        assert torch.equal(batch["image_strong"], batch_strong["image"])


def test_an_image_is_the_same_in_any_batch():
    small, large = make_loader(), Loader(make_loader().dataset, 50)
    for field in TWO_VIEWS:
        one, other = images_by_index(small, field), images_by_index(large, field)
        assert all(torch.equal(one[i], other[i]) for i in range(53))
        small.set_epoch(1)
        large.set_epoch(1)


def test_the_epoch_is_read_when_the_iteration_starts():
    loader = make_loader()
    loader.set_epoch(5)
    iteration = iter(loader)
    loader.set_epoch(8)
    expected = make_loader()
    expected.set_epoch(5)
    assert_same(iteration, expected)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_global_generator_is_left_alone(num_workers):
    """Otherwise a run continued in mid-epoch would draw other dropout masks."""
    before = torch.get_rng_state()
    list(make_loader(num_workers=num_workers))
    assert torch.equal(torch.get_rng_state(), before)
