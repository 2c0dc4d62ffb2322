"""What every loss of two networks' outputs does with inputs that are unusual, or do not belong together."""

from itertools import product

import pytest
import torch
from torch import nn

from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CATKD import cat_loss
from mdistiller.distillers.CRD import nce_loss
from mdistiller.distillers.CRLD import crld_losses
from mdistiller.distillers.DCD import dcd_loss
from mdistiller.distillers.DIST import (
    acclimation_loss,
    cosine_distance,
    dist_loss,
    feature_relation_loss,
    pearson_distance,
)
from mdistiller.distillers.DKD import dkd_loss
from mdistiller.distillers.EGA import ega_loss
from mdistiller.distillers.FitNet import hint_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.distillers.FT import ft_loss
from mdistiller.distillers.ICKD import ickd_loss
from mdistiller.distillers.ITRD import correlation_loss, mutual_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.LG import lg_loss
from mdistiller.distillers.MDR import angle_matrix, distance_matrix, length_loss, length_matrix, relation_kl
from mdistiller.distillers.MGD import mgd_loss
from mdistiller.distillers.MLKD import bc_loss, cc_loss, mlkd_losses
from mdistiller.distillers.NKD import nkd_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import ofd_loss
from mdistiller.distillers.PEFD import pefd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.ReviewKD import hcl_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.RRD import rrd_loss
from mdistiller.distillers.SimKD import simkd_loss
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.TAKD import takd_loss
from mdistiller.distillers.TaT import tat_loss
from mdistiller.distillers.TTM import ttm_loss, wttm_loss
from mdistiller.distillers.VID import vid_loss
from mdistiller.distillers.VRM import vrm_loss
from mdistiller.distillers.WSLD import wsld_loss
from mdistiller.registry import InputError


def targets(z):
    return torch.arange(len(z)) % z.shape[1]


def of_views(loss):
    return lambda s, t: sum(loss(*(x.float().softmax(1).to(x.dtype) for x in (s, s.flip(1), t, t.flip(1)))))


# Of the student's and the teacher's logits (B, C).
OF_LOGITS = {
    "kd": lambda s, t: kd_loss(s, t, 4.0),
    "kd standardised": lambda s, t: kd_loss(s, t, 2.0, logit_stand=True),
    "dkd": lambda s, t: dkd_loss(s, t, targets(s), 1.0, 8.0, 4.0),
    "nkd": lambda s, t: nkd_loss(s, t, targets(s), 1.5, 3.0),
    "ttm": lambda s, t: ttm_loss(s, t, 0.1),
    "wttm": lambda s, t: wttm_loss(s, t, 0.1),
    "wsld": lambda s, t: wsld_loss(s, t, targets(s), 4.0),
    "cc": lambda s, t: cc_loss(s, t, 4.0),
    "bc": lambda s, t: bc_loss(s, t, 4.0),
    "mlkd": lambda s, t: sum(mlkd_losses((s, s.flip(1)), (t, t.flip(1)), 4.0)),
    "mlkd masked": lambda s, t: sum(mlkd_losses((s, s.flip(1)), (t, t.flip(1)), 4.0, as_published=False)),
    "dist": lambda s, t: sum(dist_loss(s, t, 4.0)),
    "dist cosine": lambda s, t: sum(dist_loss(s, t, 4.0, "cosine")),
    "dist kl": lambda s, t: sum(dist_loss(s, t, 4.0, "kl")),
    "pearson": lambda s, t: pearson_distance(s, t).mean(),
    "cosine": lambda s, t: cosine_distance(s, t).mean(),
    "vrm": of_views(vrm_loss),
    "dcd": lambda s, t: dcd_loss(s, t, 2.7, 0.0),
    "crld": lambda s, t: sum(crld_losses((s, s.flip(1)), (t, t.flip(1)), 4.0, 0.0, 0.0)),
    "ega": ega_loss,
    "rrd": lambda s, t: rrd_loss(s, t, 0.1, 0.1),
    "takd": lambda s, t: takd_loss(s, t, 4.0),
    "itrd": correlation_loss,
    "pefd": lambda s, t: pefd_loss([s, s.flip(1)], t),
}
ACCLIMATIONS = {kind: lambda s, t, kind=kind: acclimation_loss(t, s, targets(s), 1.0, kind) for kind in ("all", "kl")}
ACCLIMATIONS["nontarget"] = lambda s, t: acclimation_loss(t, s, targets(s))
# Of embeddings (B, D) or maps (B, C, H, W), whose other sizes may differ.
OF_IMAGES = {"pkt": pkt_loss, "rkd": rkd_loss, "sp": lambda s, t: sp_loss([s], [t]), "mutual": mutual_loss}
# Of maps of any width and size.
OF_ANY_MAPS = {
    "at": lambda s, t: at_loss([s], [t], 2),
    "at 1": lambda s, t: at_loss([s], [t], 1),
    "nst": lambda s, t: nst_loss([s], [t]),
    "kdsvd": lambda s, t: kdsvd_loss([s, 2 * s.flip(1)], [t, 3 * t.flip(1)], 1),
    "ft": ft_loss,
    "fsp": lambda s, t: fsp_loss([s, s.flip(1)], [t, t.flip(1)]),
    "sp maps": lambda s, t: sp_loss([s], [t]),
}
OF_MAPS = {
    "hint": hint_loss,
    "cat": cat_loss,
    "ickd": ickd_loss,
    "lg": lambda s, t: lg_loss([s], [t]),
    "simkd": simkd_loss,
    "mgd": mgd_loss,
    "ab": lambda s, t: ab_loss([s], [t]),
    "tat": lambda s, t: tat_loss(s, s.flip(1), t),
    "hcl": lambda s, t: hcl_loss([s], [t]),
    "ofd": lambda s, t: ofd_loss(s, t, -torch.ones(1, s.shape[1], 1, 1)),
    "vid": lambda s, t: vid_loss(nn.Identity(), torch.zeros(t.shape[1]), s, t),
    "features": lambda s, t: sum(feature_relation_loss(s, t)),
    "features cosine": lambda s, t: sum(feature_relation_loss(s, t, "cosine")),
    "features mse": lambda s, t: sum(feature_relation_loss(s, t, "mse")),
}
ROWS = OF_LOGITS | ACCLIMATIONS | OF_IMAGES
MAPS = OF_ANY_MAPS | OF_MAPS
# A gradient to the teacher's side would train it, where a method lets it move.
LETS_THROUGH = {"kd", "kd standardised", "dkd", "cc", "bc", "pearson", "cosine", "dcd", "pkt", "sp"}
LETS_THROUGH |= {"at", "at 1", "sp maps", "hint", "vid"}


def pair(*shape, like=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(shape, generator=generator)
    return first, torch.randn(like or shape, generator=generator)


def value_and_gradient(loss, student, teacher):
    student = student.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    value = loss(student, teacher)
    value.backward()
    return value.detach(), student.grad


def each(losses):
    return pytest.mark.parametrize("loss", [pytest.param(loss, id=name) for name, loss in losses.items()])


@each(OF_LOGITS | ACCLIMATIONS)
def test_logits_that_do_not_belong_together_are_refused(loss):
    """A teacher's row or column that is alone would be broadcast."""
    for teacher in ((1, 10), (3, 10), (6, 1), (6, 7)):
        with pytest.raises(InputError, match=r"one shape.*\(6, 10\)"):
            loss(*pair(6, 10, like=teacher))


@each(OF_IMAGES)
def test_other_images_are_refused(loss):
    for images in (1, 3):
        with pytest.raises(InputError, match="as many rows of both"):
            loss(*pair(6, 10, like=(images, 7)))
    assert torch.isfinite(loss(*pair(6, 10, like=(6, 7))))


@each(MAPS)
def test_maps_of_other_images_are_refused(loss):
    for images in (1, 2):
        with pytest.raises(InputError):
            loss(*pair(3, 4, 6, 6, like=(images, 4, 6, 6)))


@each(OF_MAPS)
def test_maps_of_another_width_are_refused(loss):
    for channels in (1, 3):
        with pytest.raises(InputError, match=r"4, 6, 6|4x6x6"):
            loss(*pair(2, 4, 6, 6, like=(2, channels, 6, 6)))


@pytest.mark.parametrize("count", [1, 3])
def test_as_many_targets_as_images(count):
    """``gather`` takes fewer rows of what it gathers from than there are."""
    student, teacher = pair(6, 10)
    few = torch.zeros(count, dtype=torch.int64)
    with pytest.raises(InputError, match="dkd_loss takes as many rows"):
        dkd_loss(student, teacher, few, 1.0, 8.0, 4.0)
    with pytest.raises(InputError, match="acclimation_loss takes as many rows"):
        acclimation_loss(student, teacher, few)


@pytest.mark.parametrize("loss", [relation_kl, length_loss])
def test_relations_of_other_positives_are_refused(loss):
    with pytest.raises(InputError, match="one shape"):
        loss(torch.zeros(2, 6, 2), torch.zeros(2, 6, 1), torch.zeros(1, 6, dtype=torch.int64))


@pytest.mark.parametrize(
    ("loss", "shape"),
    [pytest.param(loss, (6, 10), id=name) for name, loss in ROWS.items()]
    + [pytest.param(loss, (2, 4, 6, 6), id=name) for name, loss in MAPS.items()],
)
def test_half_precision_counts_as_the_numbers_that_it_holds(loss, shape):
    for dtype in (torch.float16, torch.bfloat16):
        student, teacher = (x.to(dtype) for x in pair(*shape))
        value, gradient = value_and_gradient(loss, student, teacher)
        exact, exact_gradient = value_and_gradient(loss, student.double(), teacher.double())
        assert value.dtype == torch.float32 and gradient.dtype == dtype
        # The views of VRM and the second maps of KDSVD are rounded once more on their way.
        torch.testing.assert_close(value.double(), exact, rtol=2e-2, atol=1e-3)
        torch.testing.assert_close(
            gradient.double(), exact_gradient, rtol=0.1, atol=0.02 * exact_gradient.abs().max().item()
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_of_one_side(dtype):
    first, second = (x.to(dtype) for x in pair(6, 10))
    for matrix in (angle_matrix, length_matrix, distance_matrix):
        found = matrix(first, second)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), matrix(first.double(), second.double()), rtol=1e-4, atol=1e-5)
    stages, chosen = torch.stack([first, second]), torch.zeros(1, 6, dtype=torch.int64)
    for loss in (relation_kl, length_loss):
        assert loss(stages, stages.flip(0), chosen).dtype == torch.float32
    assert nce_loss(first, 1000).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "shape"), [(name, (6, 10)) for name in ROWS] + [(name, (2, 4, 6, 6)) for name in MAPS]
)
def test_who_gets_a_gradient(name, shape):
    student, teacher = pair(*shape)
    teacher.requires_grad_()
    value_and_gradient((ROWS | MAPS)[name], student, teacher)
    assert (teacher.grad is not None and bool(teacher.grad.any())) == (name in LETS_THROUGH)


@pytest.mark.parametrize("name", list(ROWS))
def test_finite_at_the_edges(name):
    for images, classes in product((1, 2, 6), (2, 10)):
        first, second = pair(images, classes)
        sure = 100 * nn.functional.one_hot(targets(first), classes).float()
        students = {"random": first, "constant": first * 0 + 1, "zero": first * 0, "sure": sure, "large": 1e4 * first}
        teachers = {"random": second, "constant": second * 0 + 1, "sure": sure, "large": 1e4 * second}
        for student, teacher in product(students, teachers):
            value, gradient = value_and_gradient(ROWS[name], students[student], teachers[teacher])
            case = images, classes, student, teacher
            assert torch.isfinite(value) and torch.isfinite(gradient).all(), case
            assert gradient.abs().max() < 1e4 or name == "dcd", case  # which is made for rows of length 1


@pytest.mark.parametrize("name", list(MAPS))
def test_maps_at_the_edges(name):
    for shape in ((1, 4, 6, 6), (2, 1, 4, 4), (3, 4, 1, 1)):
        first, second = pair(*shape)
        for student, teacher in product((0.0, 1.0, 1e4), repeat=2):
            value, gradient = value_and_gradient(MAPS[name], student * first, teacher * second)
            assert torch.isfinite(value) and torch.isfinite(gradient).all(), (shape, student, teacher)


@each(ROWS)
def test_strides_of_rows_do_not_matter(loss):
    student, teacher = pair(6, 10)
    torch.testing.assert_close(
        value_and_gradient(loss, student.T.contiguous().T, teacher.T.contiguous().T),
        value_and_gradient(loss, student, teacher),
    )


@each(MAPS)
def test_strides_of_maps_do_not_matter(loss):
    student, teacher = pair(2, 4, 6, 6)
    plain = value_and_gradient(loss, student, teacher)
    for order in ((0, 2, 3, 1), (1, 3, 0, 2)):  # the first is channels_last
        back = [order.index(dim) for dim in range(4)]
        other = [x.permute(order).contiguous().permute(back) for x in (student, teacher)]
        torch.testing.assert_close(value_and_gradient(loss, *other), plain)
