"""A data set is opened for a configuration: once, without reading, whatever form its class has."""

from typing import ClassVar

import pytest
import torch

from mdistiller.dataset import DataSet, Split, dataset_dict, load_splits, open_dataset, register_dataset
from mdistiller.dataset.images import InMemory, as_images
from mdistiller.dataset.views import apply_view
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.registry import image_side


@pytest.fixture
def forgotten():
    """What a test registers is forgotten afterwards."""
    names, sections = set(dataset_dict), set(CFG.DATASET)
    yield
    for name in set(dataset_dict) - names:
        del dataset_dict[name]
    for name in set(CFG.DATASET) - sections:
        del CFG.DATASET[name]


def config(*options):
    return load_config(options=["DATASET.TYPE", "plain", *options])


def split(count, size):
    return Split(torch.zeros(count, 3, size, size, dtype=torch.uint8), torch.arange(count) % 4)


class Facts:
    num_classes, image_size, mean, std, model_family = 4, 8, (0.5,) * 3, (0.5,) * 3, "cifar"
    views: ClassVar = {"weak": (), "strong": ()}
    defaults: ClassVar = {"TRAIN_SIZE": 12}


def test_a_data_set_knows_its_settings(forgotten):
    @register_dataset("plain")
    class Plain(Facts, DataSet):
        def load(self):
            return split(self.options["train_size"], self.image_size), split(4, self.image_size)

    cfg = config("DATASET.PLAIN.TRAIN_SIZE", 20)
    assert open_dataset(cfg).name == "plain" and open_dataset(cfg).classes == ["0", "1", "2", "3"]
    assert len(load_splits(cfg).train) == 20
    assert (image_side(cfg), image_side(config("DATASET.IMAGE_SIZE", 16))) == (8, 16)
    assert load_splits(config("DATASET.IMAGE_SIZE", 16)).test.images.size == (16, 16)


def test_a_class_method_that_is_given_everything_is_called_so(forgotten, tmp_path):
    @register_dataset("plain")
    class Plain(Facts, DataSet):
        @classmethod
        def load(cls, root, image_size, download, train_size):
            assert (root, download) == (tmp_path, False)
            return split(train_size, image_size), split(cls.num_classes, image_size)

    cfg = config("DATASET.ROOT", str(tmp_path), "DATASET.DOWNLOAD", False, "DATASET.IMAGE_SIZE", 16)
    train, test = open_dataset(cfg).load()
    assert (len(train), len(test), train.images.size) == (12, 4, (16, 16))


def test_a_configuration_s_data_set_is_opened_once_and_again_when_a_key_changes(forgotten):
    opened = []

    @register_dataset("plain")
    class Plain(Facts, DataSet):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            opened.append(options["train_size"])

    cfg = config()
    assert open_dataset(cfg) is open_dataset(cfg) and opened == [12]
    assert open_dataset(cfg.clone()) is not open_dataset(cfg)
    changed = cfg.clone()
    changed.defrost()
    before = open_dataset(changed)
    changed.DATASET.PLAIN.TRAIN_SIZE = 16
    assert open_dataset(changed) is not before and opened[-1] == 16


def test_a_class_that_is_written_anew_counts(forgotten):
    cfg = None
    for classes in (4, 5):
        dataset_dict["plain"] = type("Plain", (Facts, DataSet), {"name": "plain", "num_classes": classes})
        cfg = cfg or config()
        assert open_dataset(cfg).num_classes == classes


def test_a_tensor_stands_for_images_in_memory():
    tensor = torch.randint(0, 256, (5, 3, 8, 6), dtype=torch.uint8)
    images = as_images(tensor)
    assert as_images(images) is images and images.pixels() is tensor
    assert (len(images), images.size, images.device.type, images.in_files) == (5, (8, 6), "cpu", False)
    assert torch.equal(images.take(torch.tensor([3, 1])).pixels(), tensor[[3, 1]])
    assert images.to(torch.device("meta")).device.type == "meta"
    assert [picture.size for picture in images.pictures()] == [(6, 8)] * 5
    assert Split(images, torch.zeros(5, 2)).take(torch.tensor([4])).targets.shape == (1, 2)


def test_a_first_operation_may_take_the_images_themselves():
    class Halves:
        takes_images, slots = True, 0

        def __call__(self, images, rng):
            assert isinstance(images, InMemory)
            return images.pixels()[:, :, :4]

    class Inverts:
        slots = 0

        def __call__(self, images, rng):
            return 255 - images

    class NoDraws:
        def skip(self, slots):
            return self

    tensor = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    for images in (tensor, InMemory(tensor)):
        assert torch.equal(apply_view((Inverts(),), images, NoDraws()), 255 - tensor)
        assert torch.equal(apply_view((Halves(), Inverts()), images, NoDraws()), 255 - tensor[:, :, :4])
