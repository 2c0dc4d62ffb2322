"""MLKD: its terms against ``oracles/mlkd.py`` and the reference's values, and what its masks do."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_data import assert_golden_gradients, case_tensors, loss_cases
from method_cases import build, make_batch
from oracles import mlkd as oracle
from oracles.compare import assert_agree
from oracles.complex_step import constant

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.MLKD import bc_loss, below_median, cc_loss, mlkd_losses
from mdistiller.registry import InputError, distiller_dict

# The formula


PIECES = {"kd": kd_loss, "cc": cc_loss, "bc": bc_loss}


def views(images=5, classes=7, seed=0, scale=3.0):
    """Student's and teacher's logits, each of the weak and the strong view."""
    z = scale * torch.randn(4, images, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return (z[0], z[1]), (z[2], z[3])


@pytest.mark.parametrize("as_published", [True, False])
@pytest.mark.parametrize(("images", "classes"), [(1, 3), (2, 2), (5, 4), (6, 3)])
def test_equals_the_formula(images, classes, as_published):
    """All three terms of both views' logits; the teacher's are constants."""
    student, teacher = views(images, classes)
    assert_agree(
        lambda *z: mlkd_losses(z[:2], z[2:], 4.0, as_published=as_published),
        lambda *z: oracle.mlkd_losses(z[:2], constant(list(z[2:])), 4.0, as_published),
        *student,
        *teacher,
        wrt=range(4),
    )


@pytest.mark.parametrize("as_published", [True, False])
def test_gradient_and_invariances(as_published):
    student, teacher = views(3, 4)
    for z in student:
        z.requires_grad_()
    assert torch.autograd.gradcheck(lambda *z: mlkd_losses(z, teacher, 4.0, False, as_published), student)
    order = torch.tensor([2, 0, 1])
    turned = [[z[order] for z in net] for net in (student, teacher)]
    torch.testing.assert_close(
        mlkd_losses(*turned, 4.0, False, as_published), mlkd_losses(student, teacher, 4.0, False, as_published)
    )
    for term in mlkd_losses(teacher, teacher, 4.0, False, as_published):
        assert term.item() == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("case", loss_cases("mlld"))
def test_golden_values_and_gradients(case):
    given, options = case_tensors(case, "in"), case["hyperparameters"]
    for name in given:
        if name.startswith("logits_student"):
            given[name].requires_grad_()
    if "reduce" in options:
        loss = next(loss for name, loss in PIECES.items() if f"{name}_loss" in case["case"])
        found = loss(given["logits_student"], given["logits_teacher"], options["temperature"], reduce=options["reduce"])
        if not options["reduce"]:
            torch.testing.assert_close(found, case_tensors(case, "out")["matrix"])
            return
        losses = {"loss": found}
    else:
        student, teacher = (
            [given[f"logits_{net}_{view}"] for view in ("weak", "strong")] for net in ("student", "teacher")
        )
        terms = mlkd_losses(student, teacher, options["TEMPERATURE"], options.get("LOGIT_STAND", False))
        hard = sum(F.cross_entropy(z, given["target"]) for z in student)
        losses = {"loss_ce": options["CE_WEIGHT"] * hard}
        losses |= {f"loss_{name}": options["KD_WEIGHT"] * term for name, term in zip(PIECES, terms, strict=True)}
        losses["loss"] = sum(losses.values())
    losses["loss"].backward()
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(case["outputs"][name], rel=1e-7), name
    assert_golden_gradients(case, given)


def test_median():
    for values in ([3.0, 1.0, 2.0], [4.0, 1.0, 3.0, 2.0], [5.0, 5.0, 5.0, 1.0], [7.0]):
        expected = [v <= np.percentile(values, 50) for v in values]
        assert below_median(torch.tensor(values)).tolist() == expected


# The formula: what it does not depend on, and where it is simple


def gradients(as_published):
    student, teacher = views(6)
    for z in student:
        z.requires_grad_()
    kd, _, _ = mlkd_losses(student, teacher, 4.0, as_published=as_published)
    kd.backward()
    return [z.grad for z in student], below_median(teacher[0].softmax(1).amax(1))


def test_masks_leave_images_out_which_the_published_code_only_scales():
    """In the authors' code the average is taken before the mask: every image of the weak view keeps its gradient."""
    (weak, _), kept = gradients(as_published=False)
    assert kept.sum() == 3 and (weak.abs().sum(1) > 0).equal(kept)
    (weak, _), _ = gradients(as_published=True)
    assert (weak.abs().sum(1) > 0).all()


def test_the_strong_view_counts_at_all_temperatures_where_the_published_code_takes_the_weak_ones():
    student, teacher = views()
    terms = [kd_loss(student[1], teacher[1], t) for t in (4.0, 3.0, 5.0, 2.0, 6.0)]
    same = (student[0], student[1]), (student[0], teacher[1])  # nothing to learn from the weak view
    mended, published = (mlkd_losses(*same, 4.0, as_published=mode)[0] for mode in (False, True))
    torch.testing.assert_close(mended, sum(terms))
    torch.testing.assert_close(published, sum(terms[:3]))


# At the edges


@pytest.mark.parametrize("as_published", [True, False])
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_extreme_logits(as_published, scale):
    student, teacher = ([z.float() for z in net] for net in views(scale=scale))
    for z in student:
        z.requires_grad_()
    terms = mlkd_losses(student, teacher, 4.0, False, as_published)
    sum(terms).backward()
    assert all(torch.isfinite(x).all() for x in (*terms, *(z.grad for z in student)))


def test_half_precision_is_computed_in_float32_under_autocast_too():
    student, teacher = ([z.bfloat16() for z in net] for net in views())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = mlkd_losses(student, teacher, 4.0)
    as_float32 = ([z.float() for z in net] for net in (student, teacher))
    for a, b in zip(found, mlkd_losses(*as_float32, 4.0), strict=True):
        assert torch.equal(a, b)


# The method


def test_the_method():
    batch = make_batch("MLKD")
    published, mended = (build("MLKD", {"KD.MLKD.AS_PUBLISHED": value})(**batch, epoch=1)[1] for value in (True, False))
    assert list(published) == ["loss_ce", "loss_kd", "loss_cc", "loss_bc"]
    torch.testing.assert_close(published["loss_ce"], mended["loss_ce"])
    assert all(not torch.isclose(published[name], mended[name]) for name in published if name != "loss_ce")
    assert distiller_dict["KD_ours"] is distiller_dict["MLKD"]
    with pytest.raises(InputError, match=r"KD\.TEMPERATURE"):
        build("MLKD", {"KD.TEMPERATURE": 0.0})
