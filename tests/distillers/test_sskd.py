"""SSKD: its losses against ``oracles/sskd.py`` and the authors' values, the rows that count, the teacher's head."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from feature_maps import assert_float32_under_autocast, changed_by
from golden_data import assert_golden, case_leaves, case_tensors, loss_cases
from method_cases import build, make_batch
from oracles import sskd as oracle
from oracles.compare import assert_agree

from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.SSKD import contrastive_loss, kept_kl_loss, kept_rows, own_image, similarities
from mdistiller.functional.rotations import rotations

TARGET = torch.tensor([0, 2, 1, 3, 3, 0])


def scores(rows=6, columns=4):
    generator = torch.Generator().manual_seed(0)
    return [2 * torch.randn(rows, columns, generator=generator, dtype=torch.float64) for _ in range(2)]


def embeddings():
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 4.0])
def test_equals_the_formula(ratio, temperature):
    assert_agree(
        lambda s, t: kept_kl_loss(s, t, temperature, kept_rows(t, TARGET, ratio)),
        lambda s, t: oracle.kept_kl_loss(s, t, TARGET.tolist(), temperature, ratio),
        *scores(), wrt=(0, 1),
    )  # fmt: skip


def test_contrastive_loss_equals_the_formula():
    assert_agree(lambda x: contrastive_loss(similarities(x)), oracle.contrastive_loss, embeddings())
    assert_float32_under_autocast(lambda x: contrastive_loss(similarities(x)), [embeddings()])


def by_rotation(rows):
    """The references' rows 4k, ..., 4k + 3 are one image; here the images come first."""
    return rows.reshape(-1, 4, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", loss_cases("sskd"))
def test_golden_losses_and_gradients(case, dtype):
    given, options = case_leaves(case, dtype), case["hyperparameters"]
    if "ss_feat" in given:
        assert_golden(case, given, contrastive_loss(similarities(by_rotation(given["ss_feat"]))))
        return
    logits_s, logits_t, rows_s, rows_t = (
        by_rotation(given[name]) for name in ("logits_student", "logits_teacher", "ss_feat_s", "ss_feat_t")
    )
    target, images = given["target"], len(given["target"])
    rows_s, rows_t = similarities(rows_s), similarities(rows_t)
    of_classes = kept_rows(logits_t[images:], target.repeat(3), options["ratio_tf"])
    of_images = kept_rows(rows_t, own_image(rows_t), options["ratio_ss"])
    parts = [
        F.cross_entropy(logits_s[:images], target),
        kd_loss(logits_s[:images], logits_t[:images], options["kd_T"]),
        kept_kl_loss(logits_s[images:], logits_t[images:], options["tf_T"], of_classes),
        kept_kl_loss(rows_s, rows_t, options["ss_T"], of_images),
    ]
    expected = case_tensors(case, "out", dtype)
    assert (
        len(expected["distill_index_tf"]) == of_classes.sum() and len(expected["distill_index_ss"]) == of_images.sum()
    )
    (weights,) = [value for name, value in options.items() if name.startswith("weights")]
    assert_golden(case, given, sum(w * part for w, part in zip(weights, parts, strict=True)))


def test_rows_that_count():
    rows = torch.tensor([[3.0, 2.0, 1.0], [3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    target = torch.tensor([0, 1, 0, 0])  # ranks 0, 1, 2, 1
    for ratio, expected in ((0.0, [1, 0, 0, 0]), (0.5, [1, 1, 0, 0]), (0.7, [1, 1, 0, 1]), (1.0, [1, 1, 1, 1])):
        assert kept_rows(rows, target, ratio).int().tolist() == expected
    student, teacher = scores()
    everything = torch.ones(6, dtype=torch.bool)
    torch.testing.assert_close(kept_kl_loss(student, teacher, 4.0, everything), kd_loss(student, teacher, 4.0))
    assert kept_kl_loss(student, teacher, 4.0, ~everything) == 0


def test_the_teachers_head_learns_alone_and_is_then_frozen():
    distiller, batch = build("SSKD", {"SSKD.PREPARE.EPOCHS": 30}), make_batch("SSKD")
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    first = distiller.prepare(lambda epoch: iter([batch]), contextlib.nullcontext)["loss"]
    moved = {name.split(".")[0] for name, v in distiller.state_dict().items() if not torch.equal(v, before[name])}
    assert moved == {"teacher_head"} and first < 2.0  # log 8 = 2.08 by chance
    assert not any(p.requires_grad for p in distiller.teacher_head.parameters())
    assert distiller.preparation()[0] is distiller.teacher_head


def test_losses_are_the_parts():
    distiller, batch = build("SSKD"), make_batch("SSKD")
    logits, losses = copy.deepcopy(distiller)(**batch, epoch=1)
    shown, target = rotations(batch["image"]), batch["target"]
    (logits_s, of_student), (logits_t, of_teacher) = (net(shown) for net in (distiller.student, distiller.teacher))
    torch.testing.assert_close(logits, logits_s[:8])
    torch.testing.assert_close(losses["loss_ce"], 0.1 * F.cross_entropy(logits_s[:8], target))
    torch.testing.assert_close(losses["loss_tf"], 2.7 * kd_loss(logits_s[8:], logits_t[8:], 4.0))  # all count
    rows_s = similarities(distiller.student_head(of_student["pooled_feat"]))
    rows_t = similarities(distiller.teacher_head(of_teacher["pooled_feat"]))
    expected = kept_kl_loss(rows_s, rows_t, 0.5, kept_rows(rows_t, own_image(rows_t), 0.75))
    torch.testing.assert_close(losses["loss_ss"], 10 * expected)


def test_without_the_copies_weights_it_is_kd_on_the_images_alone():
    values = {"SSKD.LOSS.TF_WEIGHT": 0.0, "SSKD.LOSS.SS_WEIGHT": 0.0}
    distiller, batch = build("SSKD", values), make_batch("SSKD")
    _, losses = distiller(**batch, epoch=1)
    _, expected = build("KD")(**batch, epoch=1)
    assert losses.keys() == expected.keys() and distiller.student_images_per_sample == 1
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name])
    assert not distiller.preparation()[0].state_dict()


@pytest.mark.parametrize(
    ("values", "changed"),
    [
        ({"T": 2.0}, "loss_kd"), ({"TF_T": 2.0}, "loss_tf"), ({"TF_RATIO": 0.3}, "loss_tf"), ({"SS_T": 2.0}, "loss_ss"),
        ({"SS_RATIO": 0.1}, "loss_ss"), ({"LOSS.TF_WEIGHT": 1.0}, "loss_tf"), ({"LOSS.SS_WEIGHT": 1.0}, "loss_ss"),
    ],
)  # fmt: skip
def test_keys_change_what_they_name(values, changed):
    assert changed_by("SSKD", values) == {changed}
