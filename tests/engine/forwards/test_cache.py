"""Kept outputs of the teacher: the run is the one that would have been without, and what cannot be kept is refused."""

import pytest
import torch
from method_cases import IMAGES, NEGATIVES, SIZE, TEACHER_METHODS, build
from runs import make_trainer, same_state, teacher_file, tiny_config

from mdistiller.contract import contract_of
from mdistiller.dataset import Loader, Split
from mdistiller.dataset.loader import BatchedImages
from mdistiller.dataset.negatives import Negatives
from mdistiller.engine.batch import to_batch
from mdistiller.engine.forwards import cache as teacher_cache
from mdistiller.engine.forwards.chain import put
from mdistiller.engine.forwards.listen import listen
from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.processes import distributed
from mdistiller.registry import InputError

HALF = {"SOLVER__AMP": "bf16", "SOLVER__CHANNELS_LAST": True}
REFUSED = {
    "CRLD": "CRLD asks for 2 views",
    "DIST_PLUS": "DIST_PLUS trains a part of its teacher",
    "FCFD": "FCFD runs its teacher on the statistics of the batch",
    "KD_TWO_VIEWS": r"KD_TWO_VIEWS asks for 2 views \(image_weak, image_strong\)",
    "HSAKD": "HSAKD makes copies of the images of its own",
    "MDR": "MDR makes copies of the images of its own",
    "MLKD": "MLKD asks for 2 views",
    "OFD": "OFD runs its teacher on the statistics of the batch",
    "SSKD": "SSKD makes copies of the images of its own",
    "VRM": "VRM asks for 2 views",
}


def trainer_of(folder, method="KD", cached=True, **values):
    given = {
        "DISTILLER__TYPE": method,
        "DISTILLER__TEACHER_CKPT": teacher_file(folder),
        "DATASET__VIEW_WEAK": "plain",
        "SOLVER__CACHE_TEACHER": cached,
        "EXPERIMENT__NAME": f"{method}_{cached}",
        "LOG__EVAL_FREQ": 3,
    }
    return make_trainer(folder, **{**given, **values})


def batches_of(trainer, epoch):
    trainer.train_loader.set_epoch(epoch)
    return [to_batch(item, trainer.precision) for item in trainer.train_loader]


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("KD", {}),
        ("KD", {"DATASET__LOADER": "workers", "DATASET__NUM_WORKERS": 1, "SOLVER__FAST_TEACHER": False}),
        ("SP", HALF | {"DISTILLER__ADD_KD": 0.5, "SOLVER__DROP_LAST": True}),
    ],
    ids=["kd", "workers", "maps, added kd, half precision"],
)
def test_a_run_ends_with_the_same_weights(tmp_path, method, values):
    """To the bit here, where no kernel treats an image differently in another batch; torch does not promise that."""
    cached, plain = (trainer_of(tmp_path, method, on, SOLVER__EPOCHS=2, **values) for on in (True, False))
    results = [trainer.train() for trainer in (cached, plain)]
    torch.testing.assert_close(cached.distiller.state_dict(), plain.distiller.state_dict(), rtol=1e-4, atol=1e-5)
    assert results[0]["last"]["top1"] == results[1]["last"]["top1"]


@pytest.mark.parametrize("method", [*(name for name in TEACHER_METHODS if name not in REFUSED), "OFD"])
def test_every_method_with_one_view_has_the_same_losses(method):
    images = torch.randint(256, (IMAGES, 3, SIZE, SIZE), dtype=torch.uint8)
    split, view = Split(images, torch.arange(IMAGES)), {"image": ("weak", ())}
    dataset = BatchedImages(split, view, (0.5,) * 3, (0.2,) * 3, with_index=True)
    index = torch.randperm(IMAGES)[:5]
    extra = {"epoch": 1, "contrastive_index": Negatives(split.targets, NEGATIVES).draw(1, index)}
    values = {"DISTILLER.ADD_KD": 0.5, "OFD.TEACHER_BATCH_STATISTICS": False}
    cached, plain = (build(method, values) for _ in range(2))
    batch = dataset[(1, index)]
    cache = teacher_cache.TeacherCache(method, cached.teacher, Loader(dataset, 3), Precision(torch.device("cpu")))
    accepted = contract_of(type(plain)).fields
    given = {name: v for name, v in {**batch, **extra}.items() if accepted is None or name in accepted}
    with cache.of(batch, 1):
        logits, losses = cached(**given)
    expected_logits, expected = plain(**given)
    torch.testing.assert_close(logits, expected_logits)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    assert cache.kept


@pytest.mark.parametrize("half", [{}, HALF], ids=["float32", "bf16, channels last"])
def test_outputs_are_the_teachers_in_value_type_and_layout(tmp_path, half):
    trainer = trainer_of(tmp_path, **half)
    teacher, cache = trainer.distiller.teacher, trainer.teacher_cache
    for batch in batches_of(trainer, 2):
        with torch.no_grad(), trainer.precision.autocast():
            logits, features = teacher(batch["image"])
            with cache.of(batch, 1):
                kept, kept_features = teacher(batch["image"])
                pairs = [
                    (kept, logits),
                    (kept_features["pooled_feat"], features["pooled_feat"]),
                    *zip(kept_features["feats"][1:], features["feats"][1:], strict=True),
                ]
        assert kept_features.keys() == features.keys() and len(kept_features["feats"]) == len(features["feats"])
        for found, expected in pairs:
            torch.testing.assert_close(found, expected, rtol=2e-2 if half else 1e-5, atol=1e-4)
            assert found.stride() == expected.stride() and not found.requires_grad
    assert len(cache.kept) == 2 + len(features["feats"][1:])  # and nothing that was not looked at


@pytest.mark.parametrize(("method", "passes"), [("DCD", 1), ("SP", 2), ("FITNET", 2)])
def test_the_teacher_sees_each_image_once_for_vectors_and_once_for_each_map(tmp_path, method, passes):
    """Also those that the first epoch leaves out."""
    trainer = trainer_of(tmp_path, method, SOLVER__DROP_LAST=True)
    seen = []
    put(trainer.distiller.teacher, "share", listen(lambda args, kwargs, output: seen.append(len(args[0]))))
    for epoch in (1, 2, 3):
        for batch in batches_of(trainer, epoch):
            trainer.run_step(batch)
    assert seen == passes * [8, 8, 8, 6]


def test_a_resumed_run_is_the_one_that_was_not_interrupted(tmp_path):
    whole = trainer_of(tmp_path, LOG__SAVE_EVERY_STEPS=6)
    whole.train()
    part = trainer_of(tmp_path, SOLVER__EPOCHS=2, EXPERIMENT__NAME="part")
    part.train()
    rest = trainer_of(tmp_path, EXPERIMENT__NAME="part")
    rest.train(resume=True)
    assert same_state(rest.distiller.state_dict(), whole.distiller.state_dict())


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_are_refused(tmp_path, method):
    with pytest.raises(InputError, match=rf"SOLVER\.CACHE_TEACHER: {REFUSED[method]}.*set it to False"):
        trainer_of(tmp_path, method)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"DATASET__VIEW_WEAK": "weak"},
            r"change the images: DATASET.VIEW_WEAK weak \(the same in every epoch: plain\); switch",
        ),
        ({"DATASET__COLOR_JITTER": 0.4, "DATASET__RANDAUGMENT": 1}, "DATASET.COLOR_JITTER 0.4, DATASET.RANDAUGMENT 1;"),
        (
            {"DATASET__RANDOM_ERASING": 0.1},
            "change the images: DATASET.RANDOM_ERASING 0.1; switch them off, or set SOLVER.CACHE",
        ),
        ({"DATASET__MIXUP_ALPHA": 0.2, "DATASET__CUTMIX_ALPHA": 1.0}, "DATASET.MIXUP_ALPHA 0.2, DATASET.CUTMIX_ALPHA"),
        ({"DISTILLER__TYPE": "NONE"}, "needs a teacher, and NONE has none"),
        ({"SOLVER__COMPILE": "teacher"}, "not compiled; set SOLVER.COMPILE off"),
    ],
)
def test_settings_that_are_refused(tmp_path, values, message):
    given = {"DISTILLER__TYPE": "KD", "DATASET__VIEW_WEAK": "plain", "SOLVER__CACHE_TEACHER": True}
    with pytest.raises(InputError, match=rf"SOLVER\.CACHE_TEACHER.*{message}"):
        tiny_config(tmp_path, **{**given, **values})


def test_several_processes_and_other_loaders_are_refused(tmp_path, monkeypatch):
    plain = trainer_of(tmp_path, cached=False)
    arguments = plain.distiller, plain.train_loader, plain.cfg, plain.precision
    with pytest.raises(InputError, match="needs the training loader of build_loaders"):
        teacher_cache.cache_teacher(plain.distiller, list(plain.train_loader), plain.cfg, plain.precision)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    with pytest.raises(InputError, match="is for one process, and 2 train"):
        teacher_cache.cache_teacher(*arguments)


def test_too_little_memory_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    monkeypatch.setattr(teacher_cache, "free_megabytes", lambda device: 0.001)
    message = (
        r"KD reads an output of the teacher that is \(10,\) for each image, 0 MB for 30, more than half of the 0 MB"
    )
    with pytest.raises(InputError, match=message):
        trainer.run_step(batches_of(trainer, 1)[0])
    assert not trainer.teacher_cache.kept


def test_free_memory_is_a_number_of_megabytes():
    assert teacher_cache.free_megabytes(torch.device("cpu")) > 1


def test_what_a_method_does_with_its_teacher_beyond_the_images(tmp_path):
    """Refused within a step, where memory would answer another question; outside, the teacher computes as ever."""
    trainer = trainer_of(tmp_path)
    teacher, cache, batch = trainer.distiller.teacher, trainer.teacher_cache, batches_of(trainer, 1)[0]
    turned = batch["image"].flip(3)
    with cache.of(batch, 1), pytest.raises(InputError, match="KD shows its teacher other images than the batch's"):
        teacher(turned)
    part = next(module for module in teacher.modules() if module is not teacher)
    handle = part.register_forward_hook(lambda *_: None)
    with cache.of(batch, 1), pytest.raises(InputError, match="hooks on the teacher's modules"):
        teacher(batch["image"])
    handle.remove()
    part.train()
    with cache.of(batch, 1), pytest.raises(InputError, match="in training mode"):
        teacher(batch["image"])
    part.eval()
    expected = trainer_of(tmp_path, cached=False).distiller.teacher(turned)[0]
    assert torch.equal(teacher(turned)[0], expected) and not cache.kept
