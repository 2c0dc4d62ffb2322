"""What a batch holds is what ``forward_train`` names."""

import pytest
import torch

from mdistiller.contract import contract_of
from mdistiller.dataset import CIFAR100, Digits, build_loaders
from mdistiller.dataset.fields import chosen_recipes, views_of
from mdistiller.dataset.randaugment import RandAugment
from mdistiller.dataset.views import Cutout, Draws, HorizontalFlip, RandomCrop, apply_view
from mdistiller.distillers import Distiller
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.registry import InputError


class Plain(Distiller):
    def forward_train(self, image, target, **kwargs): ...


class TwoViews(Distiller):
    def forward_train(self, image_weak, image_strong, target, index, epoch, weight=1.0, **kwargs): ...


class Anything(Distiller):
    def forward_train(self, *args, **kwargs): ...


class NeedsMore(Distiller):
    def forward_train(self, image, target, contrastive_index, saliency): ...


class Rotated(Distiller):
    def forward_train(self, image_rotated, target): ...


@pytest.mark.parametrize(
    ("method", "fields"),
    [(Plain, ("image",)), (TwoViews, ("image_weak", "image_strong")), (Anything, ("image",))],
)
def test_fields(method, fields):
    assert contract_of(method).views == fields


def test_a_field_that_nobody_delivers():
    with pytest.raises(InputError, match=r"test_fields.py, NeedsMore: forward_train requires 'saliency'"):
        contract_of(NeedsMore)


@pytest.mark.parametrize("dataset", [CIFAR100, Digits])
def test_views(dataset):
    assert views_of(("image",), dataset) == {"image": ("weak", dataset.views["weak"])}
    assert views_of(("image_strong",), dataset) == {"image_strong": ("strong", dataset.views["strong"])}


def test_an_unknown_view():
    with pytest.raises(InputError, match=r"'image_rotated', but data set digits .* 'rotated'; .*weak, strong"):
        views_of(contract_of(Rotated).views, Digits)


@pytest.mark.parametrize(
    ("weak", "strong"), [("weak", "weak"), ("weak", "strong"), ("strong", "strong"), ("strong", "weak")]
)
def test_strength_pairs(weak, strong):
    """Either view can have either recipe, under its own name: that of its random numbers."""
    cfg = CFG.clone()
    cfg.merge_from_list(["DATASET.VIEW_WEAK", weak, "DATASET.VIEW_STRONG", strong])
    found = views_of(contract_of(TwoViews).views, CIFAR100, chosen_recipes(cfg, CIFAR100))
    recipes = CIFAR100.views
    assert found == {"image_weak": ("weak", recipes[weak]), "image_strong": ("strong", recipes[strong])}


def test_two_views_of_one_recipe_differ():
    cfg = CFG.clone()
    cfg.merge_from_list([
        "DATASET.TYPE", "digits", "DATASET.NUM_WORKERS", "0", "DATASET.VIEW_STRONG", "weak", "DISTILLER.TYPE", "VRM",
    ])  # fmt: skip
    batch = next(iter(build_loaders(cfg).train))
    same = (batch["image_weak"] == batch["image_strong"]).flatten(1).all(1)
    assert 0 < same.float().mean() < 0.2  # one crop of 25


@pytest.mark.parametrize("number", [0, 1, 5])
def test_number_of_operations(number):
    """None leaves Cutout alone (VRM's n = 0)."""
    cfg = CFG.clone()
    cfg.merge_from_list(["DATASET.STRONG_N", number])
    recipe = chosen_recipes(cfg, CIFAR100)["strong"]
    assert recipe == (RandomCrop(), HorizontalFlip(), RandAugment(n=number), Cutout())
    images = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8)
    without = tuple(operation for operation in recipe if number or not isinstance(operation, RandAugment))
    rng = Draws.of_view("strong", 0, 1, torch.arange(4))
    assert torch.equal(apply_view(recipe, images, rng), apply_view(without, images, rng))


def test_an_unknown_recipe():
    with pytest.raises(InputError, match=r"DATASET.VIEW_STRONG.* cifar100 has no recipe 'medium'; .*weak, strong"):
        load_config(options=["DATASET.VIEW_STRONG", "medium"])
