"""What a batch holds is what ``forward_train`` names."""

import pytest

from mdistiller.dataset import CIFAR100, Digits, batch_fields
from mdistiller.dataset.fields import views_of
from mdistiller.registry import InputError


class Plain:
    def forward_train(self, image, target, **kwargs): ...


class TwoViews:
    def forward_train(self, image_weak, image_strong, target, index, epoch, weight=1.0, **kwargs): ...


class Anything:
    def forward_train(self, *args, **kwargs): ...


class NeedsMore:
    def forward_train(self, image, target, contrastive_index, saliency): ...


class Rotated:
    def forward_train(self, image_rotated, target): ...


@pytest.mark.parametrize(
    ("method", "fields"),
    [(Plain, ("image",)), (TwoViews, ("image_weak", "image_strong")), (Anything, ("image",))],
)
def test_fields(method, fields):
    assert batch_fields(method) == fields


def test_a_field_that_nobody_delivers():
    with pytest.raises(InputError, match=r"NeedsMore.forward_train requires 'saliency'"):
        batch_fields(NeedsMore)


@pytest.mark.parametrize("dataset", [CIFAR100, Digits])
def test_views(dataset):
    assert views_of(("image",), dataset) == {"image": ("weak", dataset.views["weak"])}
    assert views_of(("image_strong",), dataset) == {"image_strong": ("strong", dataset.views["strong"])}


def test_an_unknown_view():
    with pytest.raises(InputError, match=r"'image_rotated', but data set digits .* 'rotated'; .*weak, strong"):
        views_of(batch_fields(Rotated), Digits)
