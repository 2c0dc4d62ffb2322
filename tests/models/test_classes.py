"""Teachers of other classes: a file names their outputs, or the method reads features only."""

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch
from method_cases import TEACHER_METHODS, build, make_batch

sys.path.insert(0, str(Path(__file__).parents[1] / "engine"))
from image_folders import write_images
from runs import make_trainer, teacher_file, tiny_config

from mdistiller.engine.build import build_student, build_teacher
from mdistiller.engine.folder.checkpoint import CheckpointError
from mdistiller.engine.run import run
from mdistiller.models import cifar_model_dict
from mdistiller.models.any import output_names, read_outputs, with_outputs
from mdistiller.models.facts import facts_of
from mdistiller.registry import InputError

DIGITS = [f"digit {number}" for number in range(10)]


def class_file(folder, lines):
    path = folder / "classes"
    path.write_text("\n".join(map(str, lines)) + "\n")
    return str(path)


def test_a_class_has_its_logit_or_the_summed_probability_of_its_outputs():
    plain = cifar_model_dict["resnet8"](num_classes=6).eval()
    keys, image = list(plain.state_dict()), torch.randn(4, 3, 32, 32)
    all_logits, features = plain(image)
    network = with_outputs(copy.deepcopy(plain), [[5], [0], [3]])
    for each in (network, copy.deepcopy(network)):
        logits, found = each(image)
        assert torch.equal(logits, all_logits[:, [5, 0, 3]]) and list(each.state_dict()) == keys
        assert all(map(torch.equal, found["feats"], features["feats"]))
    assert facts_of(network, (32, 32)).classes == 3 and isinstance(network, type(plain))
    whole = with_outputs(copy.deepcopy(plain), [[2], [0, 4, 1], [5, 3]])(image)[0].softmax(1)
    each = all_logits.softmax(1)
    wanted = torch.stack([each[:, 2], each[:, [0, 4, 1]].sum(1), each[:, [5, 3]].sum(1)], 1)
    torch.testing.assert_close(whole, wanted)


def test_lines_name_outputs_by_number_name_and_wordnet_id(tmp_path):
    names = output_names(1000)
    file = Path(class_file(tmp_path, ["n01440764 | 5", "Great white_shark", "crane bird", "517"]))
    assert read_outputs(file, "abcd", 1000, names) == [[0, 5], [2], [134], [517]]
    assert read_outputs(Path(class_file(tmp_path, ["dog", "a cat"])), "ab", 2, output_names(2, ["A cat", "dog"])) == [
        [1], [0]
    ]  # fmt: skip
    assert output_names(7) == {}


def test_all_lines_that_name_no_output_are_listed_at_once(tmp_path):
    file = Path(class_file(tmp_path, ["tench", "n01440764", "crane", "1000", "kit fux", ""]) + "x")
    file.write_text("tench\nn01440764\ncrane\n1000\nkit fux\n | \nfox squirrel\n")
    with pytest.raises(InputError) as error:
        read_outputs(file, "abcdefg", 1000, output_names(1000))
    for part in ("line 2 (b): 'n01440764': output 0 is that of line 1 already", "line 5 (e): 'kit fux'",
                 "line 3 (c): 'crane': stands for the outputs", "line 4 (d): '1000': the numbers are 0 to 999",
                 "closest: kit fox", "line 6 (f): '': no output is named"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(InputError, match=r"has 7 lines, and the data set has 10 classes"):
        read_outputs(file, DIGITS, 1000, {})
    with pytest.raises(InputError, match=r"line 1 \(a\): 'cat': its classes' names are not known"):
        read_outputs(Path(class_file(tmp_path, ["cat"])), "a", 7, {})
    with pytest.raises(InputError, match="TEACHER_CLASSES nowhere cannot be read"):
        read_outputs(Path("nowhere"), "a", 7, {})


def test_a_run_with_a_file_of_classes_and_one_that_goes_on_with_another(tmp_path):
    lines = [11, 3, 99, 0, "17 | 20", 5, 6, 7, 8, 9]
    values = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path, classes=100),
              "DISTILLER__TEACHER_CLASSES": class_file(tmp_path, lines), "SOLVER__LR_DECAY_STAGES": []}  # fmt: skip
    results = run(tiny_config(tmp_path, SOLVER__EPOCHS=1, **values))
    assert len(results["teacher"]["classes_sha256"]) == 64 and 0 <= results["teacher"]["top1"] <= 100
    class_file(tmp_path, [12, *lines[1:]])
    with pytest.raises(InputError, match="with another teacher: its file of classes's SHA-256 was"):
        run(tiny_config(tmp_path, SOLVER__EPOCHS=2, **values), resume=True)


def test_a_run_keeps_the_names_of_its_classes_and_a_file_may_use_them(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "pets" / split, ("cat", "dog", "emu"))
    write_images(tmp_path / "two" / "train", ("bird", "mammal"))
    values = {"DATASET__TYPE": "folder", "DATASET__TRAIN_PER_CLASS": 0, "DATASET__IMAGE_SIZE": 16,
              "DISTILLER__STUDENT": "cifar:resnet8", "SOLVER__EPOCHS": 1, "SOLVER__LR_DECAY_STAGES": [],
              "DISTILLER__TEACHER": "cifar:resnet8", "SOLVER__BATCH_SIZE": 4}  # fmt: skip
    run(tiny_config(tmp_path, DATASET__ROOT=str(tmp_path / "pets"), EXPERIMENT__NAME="teacher", **values))
    folder = tmp_path / "distill" / "teacher"
    cfg = tiny_config(tmp_path, DATASET__ROOT=str(tmp_path / "two"), DISTILLER__TYPE="KD",
                      DISTILLER__TEACHER_CKPT=str(folder / "student_last"),
                      DISTILLER__TEACHER_CLASSES=class_file(tmp_path, ["emu", "Dog | cat"]), **values)  # fmt: skip
    assert build_teacher(cfg, 2)._outputs.index.tolist() == [[2, 2], [1, 0]]


@pytest.fixture
def public(monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *given, pretrained, **more: create(*given, **more))  # no download


def test_a_public_teacher_of_1000_classes_teaches_ten(tmp_path, public):
    values = {"DISTILLER__TEACHER": "timm:test_resnet", "DISTILLER__TEACHER_CKPT": "pretrained",
              "DATASET__IMAGE_SIZE": 32}  # fmt: skip
    torch.manual_seed(0)
    file = class_file(tmp_path, range(100, 110))
    teacher = build_teacher(tiny_config(tmp_path, DISTILLER__TYPE="KD", DISTILLER__TEACHER_CLASSES=file, **values), 10)
    image = torch.randn(2, 3, 32, 32)
    assert teacher(image)[0].shape == (2, 10) and teacher.num_classes == 1000
    plain = timm.create_model("test_resnet", pretrained=True)
    plain.load_state_dict(teacher.state_dict())
    expected = plain.eval()(teacher._input(image))[:, 100:110]
    torch.testing.assert_close(teacher.eval()(image)[0], expected)
    with pytest.raises(InputError, match=r"pretrained for 1000 classes.*train a teacher.*STUDENT_CKPT pretrained.*AT"):
        build_teacher(tiny_config(tmp_path, DISTILLER__TYPE="KD", **values), 10)


def test_torchvisions_public_weights_start_a_student_of_other_classes(tmp_path, monkeypatch):
    from torchvision import models

    known = models.squeezenet1_1()
    monkeypatch.setattr(models.SqueezeNet1_1_Weights, "get_state_dict", lambda self, **more: known.state_dict())
    cfg = tiny_config(tmp_path, DISTILLER__STUDENT="torchvision:squeezenet1_1", DATASET__IMAGE_SIZE=64,
                      DISTILLER__STUDENT_CKPT="pretrained", DISTILLER__STUDENT_INPUT__SIZE=64)  # fmt: skip
    student = build_student(cfg, 10)
    assert student(torch.randn(2, 3, 64, 64))[0].shape == (2, 10)
    assert torch.equal(student.features[0].weight, known.features[0].weight)


def test_a_method_that_reads_features_takes_a_teacher_of_other_classes(tmp_path, capsys):
    values = {"DISTILLER__TEACHER_CKPT": teacher_file(tmp_path, classes=100)}
    trainer = make_trainer(tmp_path, DISTILLER__TYPE="AT", **values)
    assert "not scored, since it has 100 classes, not 10" in capsys.readouterr().out
    assert "top1" not in trainer.results["teacher"]
    trainer.train()
    for more in ({"DISTILLER__TYPE": "KD"}, {"DISTILLER__TYPE": "AT", "DISTILLER__ADD_KD": 0.5}):
        with pytest.raises(CheckpointError, match=r"has 100 classes, not the 10 of data set digits; train a teacher .*"
                           "TEACHER_CLASSES FILE"):  # fmt: skip
            make_trainer(tmp_path, **more, **values)


@pytest.mark.parametrize("method", TEACHER_METHODS)
def test_methods_that_say_so_read_no_teacher_logits(method):
    def losses(change):
        distiller = build(method, {"DCD.LAMBDA": 1.0})
        answer, teacher = type(distiller.teacher).forward, distiller.teacher

        def forward(image):
            logits, features = answer(teacher, image)
            return change(logits), features

        teacher.forward = forward
        torch.manual_seed(0)
        return torch.stack([loss.mean() for loss in distiller(**make_batch(method), epoch=10)[1].values()])

    same = torch.equal(losses(lambda logits: logits), losses(lambda logits: logits.flip(0).square() + 1))
    assert same or build(method).reads_teacher_logits  # a method may also read the weights of the classifier
