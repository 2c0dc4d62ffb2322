"""From a configuration to loaders, as the tools use them."""

import pytest
import torch
from mini_cifar import write_mini_cifar100
from yacs.config import CfgNode

from mdistiller.dataset import Split, build_loaders, dataset_dict, get_dataset, load_splits
from mdistiller.dataset.base import resize_images
from mdistiller.dataset.views import is_random
from mdistiller.distillers import Distiller
from mdistiller.registry import MODEL_FAMILIES, InputError, UnknownName, distiller_dict


class OneView(Distiller):
    def forward_train(self, image, target, **kwargs): ...


class TwoViews(Distiller):
    def forward_train(self, image_weak, image_strong, target, **kwargs): ...


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(distiller_dict, "ONE", OneView)
    monkeypatch.setitem(distiller_dict, "TWO", TwoViews)


def make_cfg(*options):
    cfg = CfgNode()
    cfg.EXPERIMENT = CfgNode({"SEED": 0})
    cfg.DATASET = CfgNode(
        {
            "TYPE": "digits",
            "ROOT": "./data",
            "DOWNLOAD": False,
            "IMAGE_SIZE": 0,
            "NUM_WORKERS": 0,
            "LOADER": "auto",
            "VIEW_WEAK": "weak",
            "VIEW_STRONG": "strong",
            "STRONG_N": 2,
            "TRAIN_FRACTION": 1.0,
            "TRAIN_PER_CLASS": 0,
            "VAL_FRACTION": 0.0,
            "COLOR_JITTER": 0.0,
            "RANDAUGMENT": 0,
            "RANDOM_ERASING": 0.0,
            "MIXUP_ALPHA": 0.0,
            "CUTMIX_ALPHA": 0.0,
            "LABEL_SMOOTHING": 0.0,
            "TEST": {"BATCH_SIZE": 50},
        }
    )
    cfg.DISTILLER = CfgNode({"TYPE": "ONE"})
    cfg.SOLVER = CfgNode({"BATCH_SIZE": 64, "DROP_LAST": False, "CHANNELS_LAST": "off"})
    cfg.merge_from_list(list(options))
    cfg.freeze()
    return cfg


def test_get_dataset_has_mdistillers_form():
    train_loader, val_loader, num_data, num_classes = get_dataset(make_cfg())
    assert (num_data, num_classes) == (1258, 10)
    assert (len(train_loader), len(val_loader)) == (20, 11)
    assert list(next(iter(train_loader))) == ["image", "target", "index"]
    assert list(next(iter(val_loader))) == ["image", "target"]


def test_the_method_says_which_views():
    batch = next(iter(build_loaders(make_cfg("DISTILLER.TYPE", "TWO")).train))
    assert list(batch) == ["image_weak", "image_strong", "target", "index"]


@pytest.mark.parametrize("key", ["COLOR_JITTER", "RANDAUGMENT", "RANDOM_ERASING"])
def test_added_operations_follow_the_weak_view_only(key):
    value = 3 if key == "RANDAUGMENT" else 0.9
    before, after = (
        next(iter(build_loaders(make_cfg("DISTILLER.TYPE", "TWO", *options)).train))
        for options in ((), (f"DATASET.{key}", value))
    )
    assert torch.equal(before["image_strong"], after["image_strong"])
    changed = (before["image_weak"] != after["image_weak"]).flatten(1).any(1).float().mean()
    assert changed > 0.7


def test_labels_become_shares_when_they_are_mixed():
    options = ("DATASET.MIXUP_ALPHA", 1.0, "DATASET.LABEL_SMOOTHING", 0.1)
    loaders = build_loaders(make_cfg("DISTILLER.TYPE", "TWO", *options))
    batch, plain = next(iter(loaders.train)), next(iter(build_loaders(make_cfg("DISTILLER.TYPE", "TWO")).train))
    assert batch["target"].shape == (64, 10)
    assert not torch.equal(batch["image_strong"], plain["image_strong"])
    assert next(iter(loaders.test))["target"].shape == (50,)


def test_the_test_images_are_only_normalised():
    cfg = make_cfg()
    loaders = build_loaders(cfg)
    test = load_splits(cfg).test
    batch = next(iter(loaders.test))
    assert torch.equal(batch["target"], test.targets[:50])
    restored = batch["image"] * dataset_dict["digits"].std[0] + dataset_dict["digits"].mean[0]
    assert torch.allclose(restored * 255, test.images.pixels()[:50].float(), atol=1e-3)


def test_no_validation_images_by_default():
    assert build_loaders(make_cfg()).val is None


def test_validation_images():
    cfg = make_cfg("DATASET.VAL_FRACTION", 0.1)
    loaders, splits = build_loaders(cfg), load_splits(cfg)
    assert len(splits.train) + len(splits.val) == 1258 and len(splits.test) == 539
    assert loaders.num_data == loaders.train.num_data == len(splits.train)
    assert get_dataset(cfg)[1].num_data == len(splits.val)
    images = [{image.numpy().tobytes() for image in part.images.pixels()} for part in (splits.train, splits.val)]
    assert not images[0] & images[1]


def test_index_runs_over_the_images_in_use():
    loaders = build_loaders(make_cfg("DATASET.TRAIN_PER_CLASS", 3, "DATASET.VAL_FRACTION", 0.2))
    seen = torch.cat([batch["index"] for batch in loaders.train])
    assert loaders.num_data == 30
    assert seen.sort().values.tolist() == list(range(30))


def test_seed_chooses_the_images_in_use():
    options = ("DATASET.TRAIN_FRACTION", 0.1, "DATASET.VAL_FRACTION", 0.1)
    first, same, other = (load_splits(make_cfg(*options, "EXPERIMENT.SEED", seed)) for seed in (1, 1, 2))
    for part in ("train", "val"):
        images = [getattr(splits, part).images.pixels() for splits in (first, same, other)]
        assert torch.equal(images[0], images[1])
        assert not torch.equal(images[0], images[2])
    assert torch.equal(first.test.images.pixels(), other.test.images.pixels())


def test_the_reduction_leaves_the_validation_images_alone():
    whole = load_splits(make_cfg("DATASET.VAL_FRACTION", 0.1))
    reduced = load_splits(make_cfg("DATASET.VAL_FRACTION", 0.1, "DATASET.TRAIN_FRACTION", 0.5))
    assert torch.equal(whole.val.images.pixels(), reduced.val.images.pixels())
    assert abs(len(reduced.train) - len(whole.train) / 2) <= 5


def test_image_size():
    cfg = make_cfg("DATASET.IMAGE_SIZE", 32)
    assert next(iter(build_loaders(cfg).train))["image"].shape == (64, 3, 32, 32)


def test_cifar100_from_its_files(tmp_path):
    write_mini_cifar100(tmp_path, train_per_class=2, test_per_class=1)
    cfg = make_cfg("DATASET.TYPE", "cifar100", "DATASET.ROOT", str(tmp_path), "DISTILLER.TYPE", "TWO")
    loaders = build_loaders(cfg)
    assert (loaders.num_data, loaders.num_classes, loaders.test.num_data) == (200, 100, 100)
    assert next(iter(loaders.train))["image_strong"].shape == (64, 3, 32, 32)


@pytest.mark.parametrize(
    ("loader", "num_workers", "device", "expected"),
    [
        ("auto", 0, "cpu", ("cpu", 0)),
        ("auto", 2, "cpu", ("cpu", 2)),
        ("auto", 2, "meta", ("meta", 0)),  # as on a GPU
        ("device", 2, "cpu", ("cpu", 0)),
        ("device", 2, "meta", ("meta", 0)),
        ("workers", 2, "meta", ("cpu", 2)),
        ("workers", 0, "meta", ("cpu", 0)),
    ],
)
def test_where_batches_are_made(monkeypatch, loader, num_workers, device, expected):
    made = []
    monkeypatch.setattr(
        "mdistiller.dataset.build.Loader",
        lambda images, *args, num_workers=0, **named: made.append((images, num_workers)) or [1],
    )
    build_loaders(make_cfg("DATASET.LOADER", loader, "DATASET.NUM_WORKERS", num_workers), device)
    (train, count), (test, none) = made
    assert (train.device.type, count) == expected
    assert (test.device.type, none) == (expected[0], 0)  # test images are only normalised, which needs no help
    assert train.split.images.device.type == expected[0]


def test_images_that_do_not_fit_on_the_device(monkeypatch):
    def fail(*args, **kwargs):
        raise torch.cuda.OutOfMemoryError

    monkeypatch.setattr(Split, "to", fail)
    with pytest.raises(InputError, match=r"do not fit into the memory of cpu; set DATASET.LOADER workers"):
        build_loaders(make_cfg())


def test_unknown_names():
    with pytest.raises(UnknownName, match="no data set named 'digit'; closest: digits"):
        build_loaders(make_cfg("DATASET.TYPE", "digit"))
    with pytest.raises(UnknownName, match="no distiller named 'ONES'"):
        build_loaders(make_cfg("DISTILLER.TYPE", "ONES"))


def test_drop_last_must_leave_a_batch():
    options = ("DATASET.TRAIN_PER_CLASS", 2, "SOLVER.DROP_LAST", True)
    with pytest.raises(InputError, match=r"SOLVER.DROP_LAST .* 20 .*SOLVER.BATCH_SIZE=64; .* at most 20"):
        build_loaders(make_cfg(*options))


@pytest.mark.parametrize("dataset", dataset_dict.values(), ids=dataset_dict.keys())
def test_every_data_set_states_its_facts(dataset, tmp_path):
    assert dataset_dict[dataset.name] is dataset
    for name in ("cat", "dog"):  # for one whose classes are folders
        (tmp_path / "train" / name).mkdir(parents=True)
    dataset = dataset(tmp_path)
    assert len(dataset.mean) == len(dataset.std) == 3
    assert dataset.num_classes > 1 and dataset.image_size > 0
    assert dataset.model_family in MODEL_FAMILIES
    assert {"weak", "strong", "plain"} <= set(dataset.views)
    assert {name for name, view in dataset.views.items() if not is_random(view)} <= {"plain", "test"}


def test_resize():
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    assert resize_images(images, 32) is images
    flat = resize_images(torch.full((5, 3, 32, 32), 77, dtype=torch.uint8), 12)
    assert flat.shape == (5, 3, 12, 12) and (flat == 77).all()
    halved = resize_images(torch.tensor([0.0, 255.0]).view(1, 1, 1, 2).repeat(1, 1, 2, 1), 1)
    assert halved.item() == 128  # 127.5 rounded to even


def test_take_keeps_images_and_labels_together():
    split = Split(torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1), torch.arange(4))
    part = split.take(torch.tensor([3, 1]))
    assert part.images.pixels().flatten().tolist() == part.targets.tolist() == [3, 1]
    assert len(part) == 2
