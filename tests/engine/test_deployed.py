"""The deployed network: last, best, average and the student files are of the network that predicts."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from cli_runner import run_tool
from plugin_files import forgotten, write
from runs import TINY, make_trainer, same_state, teacher_file
from torch import nn

from mdistiller.distillers import Distiller, Vanilla, register_distiller
from mdistiller.engine.deployed import WholeMethod, deployed_network, deploys_whole
from mdistiller.engine.folder.checkpoint import load_checkpoint, load_weights
from mdistiller.registry import InputError

# As SimKD does: the student's features, a projector of the method, the teacher's classifier. The student's own
# classifier is never trained. The parts are kept in a list beside the modules too, which a copy must not miss.
HEADED = """
    import torch
    import torch.nn.functional as F
    from torch import nn
    from ._base import Distiller

    class Headed(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.projector = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))
            self.parts = [student, self.projector]
            self.register_buffer("steps", torch.zeros((), dtype=torch.long))

        def get_learnable_parameters(self):
            return super().get_learnable_parameters() + list(self.projector.parameters())

        def predict(self, image):
            net, projector = self.parts
            return self.teacher.fc(projector(net(image)[1]["pooled_feat"]))

        def forward_test(self, image):
            return self.predict(image)

        def forward_train(self, image, target, **kwargs):
            self.steps += 1
            logits = self.predict(image)
            self.kept = logits  # a tensor with a graph, which cannot be copied
            return logits, {"ce": F.cross_entropy(logits, target)}
"""
DEPLOYED = HEADED.replace(
    "        def forward_train",
    """        def deployed(self):
            return Predictor(self.student, self.projector, self.teacher.fc)

        def forward_train""",
) + """
    class Predictor(nn.Module):
        def __init__(self, student, projector, classifier):
            super().__init__()
            self.student, self.projector, self.classifier = student, projector, classifier

        def forward(self, image):
            return self.classifier(self.projector(self.student(image)[1]["pooled_feat"]))
"""  # fmt: skip
PARTS = {HEADED: {"student", "projector", "steps"}, DEPLOYED: {"student", "projector", "classifier"}}
EPOCHS, STEPS = 3, 9


@pytest.fixture(autouse=True)
def clean_slate():
    with forgotten():
        yield


def trainer_of(tmp_path, text, name="run", **values):
    given = {
        "DISTILLER__PLUGINS": [str(write(tmp_path, "headed", text))],
        "DISTILLER__TYPE": "Headed",
        "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path),
        "DATASET__TRAIN_PER_CLASS": 20,
        "SOLVER__BATCH_SIZE": 64,
        "SOLVER__EPOCHS": EPOCHS,
        "SOLVER__LR_DECAY_STAGES": [EPOCHS],
        **values,
    }
    return make_trainer(tmp_path / name, **given)


def score_of_file(trainer, name, loader):
    """What the weights in a student file score, loaded as they lie there."""
    trainer.distiller.kept = None
    network = copy.deepcopy(deployed_network(trainer.distiller))
    network.load_state_dict(load_checkpoint(trainer.folder / name)["model"])
    return trainer.task.evaluate(network, loader, trainer.precision).values


def numbers(results, key):
    return {name: results[key][name] for name in ("top1", "top5", "loss")}


@pytest.mark.parametrize("text", [HEADED, DEPLOYED], ids=["forward_test only", "deployed"])
@pytest.mark.parametrize("fraction", [0.0, 0.2], ids=["best on test", "best on validation"])
def test_last_best_and_average_are_scores_of_the_network_that_predicts(tmp_path, capsys, text, fraction):
    trainer = trainer_of(tmp_path, text, DATASET__VAL_FRACTION=fraction, SOLVER__EMA_DECAY=0.5)
    results = trainer.train()
    test = trainer.test_loader or trainer.val_loader
    for key in ("last", "best", "ema"):
        assert numbers(results, key) == score_of_file(trainer, f"student_{key}", test), key
        assert {name.split(".")[0] for name in load_checkpoint(trainer.folder / f"student_{key}")["model"]} == PARTS[
            text
        ]
        assert results[key]["split"] == "test"
    assert same_state(
        load_checkpoint(trainer.folder / "student_latest"), load_checkpoint(trainer.folder / "student_last")
    )
    # The student alone, whose classifier nothing has trained, scores otherwise.
    assert trainer.task.evaluate(trainer.distiller.student, test).values["loss"] != results["last"]["loss"]
    warnings = capsys.readouterr().out.count("Define deployed(self) in Headed")
    assert warnings == (1 if text == HEADED else 0)


def test_where_best_is_last_both_score_alike(tmp_path):
    """Before, best was the score of the student without its head: 13.17 beside a last of 73.84."""
    results = trainer_of(tmp_path, HEADED, SOLVER__EPOCHS=1, DATASET__VAL_FRACTION=0.2).train()
    assert numbers(results, "best") == numbers(results, "last")


@pytest.mark.parametrize("text", [HEADED, DEPLOYED], ids=["forward_test only", "deployed"])
def test_a_resumed_run_ends_the_same(tmp_path, text):
    values = {"DATASET__VAL_FRACTION": 0.2, "SOLVER__EMA_DECAY": 0.5, "LOG__SAVE_EVERY_STEPS": 2}
    whole = trainer_of(tmp_path, text, "whole", **values)
    expected = whole.train()
    stopped = trainer_of(tmp_path, text, "parts", **values)
    run_step, steps = stopped.run_step, []

    def step(batch):
        if len(steps) == STEPS // 2:
            raise KeyboardInterrupt
        steps.append(batch)
        return run_step(batch)

    stopped.run_step = step
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer_of(tmp_path, text, "parts", **values)
    results = resumed.train(resume=True)
    for key in ("last", "best", "ema", "validation", "mean_of_last"):
        assert results[key] == expected[key], key
    for name in ("student_last", "student_best", "student_ema"):
        assert same_state(load_checkpoint(resumed.folder / name), load_checkpoint(whole.folder / name)), name


def test_a_copy_has_its_own_weights_and_shares_the_frozen_networks(tmp_path):
    distiller = trainer_of(tmp_path, HEADED).distiller
    image = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network = deployed_network(distiller)
    network.eval()
    twin = copy.deepcopy(network)
    before = network(image)
    assert isinstance(twin, WholeMethod)
    assert torch.equal(twin(image), before)
    assert twin.distiller.teacher is distiller.teacher
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in distiller.parameters()}
    with torch.no_grad():
        for parameter in distiller.student.parameters():
            parameter.add_(1)
    assert torch.equal(twin(image), before)
    assert not torch.equal(network(image), before)
    assert not any(key.startswith("teacher.") for key in network.state_dict())


class TrainsItsTeacher(Distiller):
    """Predicts by the teacher's classifier, and trains it."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.teacher.fc.requires_grad_(True)

    def teacher_parameters(self):
        return list(self.teacher.fc.parameters())

    def forward_test(self, image):
        return self.teacher.fc(self.student(image)[1]["pooled_feat"])

    def forward_train(self, image, target, **kwargs):
        logits = self.forward_test(image)
        return logits, {"ce": F.cross_entropy(logits, target)}


def test_a_teacher_of_which_something_is_trained_is_copied_and_saved(tmp_path):
    register_distiller("TRAINS_ITS_TEACHER")(TrainsItsTeacher)
    values = {"DISTILLER__TYPE": "TRAINS_ITS_TEACHER", "DISTILLER__PLUGINS": [], "SOLVER__EMA_DECAY": 0.5}
    trainer = trainer_of(tmp_path, HEADED, DATASET__VAL_FRACTION=0.2, **values)
    results = trainer.train()
    for key in ("last", "best", "ema"):
        assert numbers(results, key) == score_of_file(trainer, f"student_{key}", trainer.test_loader), key
    last, average = (load_checkpoint(trainer.folder / f"student_{key}")["model"] for key in ("last", "ema"))
    assert not torch.equal(last["teacher.fc.weight"], average["teacher.fc.weight"])


class SaysIt(Vanilla):
    def deployed(self):
        return self.student


class Derived(SaysIt):
    def forward_test(self, image):
        return super().forward_test(image) * 2


class Both(Vanilla):
    def deployed(self):
        return self.student

    def forward_test(self, image):
        return self.student(image)[0]


@pytest.mark.parametrize(
    ("method", "whole"), [(Vanilla, False), (SaysIt, False), (Both, False), (Derived, True), (nn.Linear, False)]
)
def test_the_class_that_speaks_last_says_what_is_deployed(method, whole):
    assert deploys_whole(method) is whole


def test_a_forward_test_may_call_that_of_its_parent():
    method = Derived(nn.Linear(3, 2)).eval()
    image = torch.ones(1, 3)
    assert torch.equal(deployed_network(method)(image), 2 * method.student(image))


def test_what_cannot_be_copied_is_named(tmp_path):
    trainer = trainer_of(tmp_path, HEADED, DATASET__VAL_FRACTION=0.2)
    trainer.distiller.file = (tmp_path / "open").open("w")
    with pytest.raises(InputError, match=r"Headed cannot be copied.*deployed\(self\)"):
        trainer.train()
    trainer.distiller.file.close()


def test_the_commands_train_such_a_method_and_read_its_student(tmp_path):
    options = {
        **TINY,
        "DISTILLER.PLUGINS": [str(write(tmp_path, "headed", HEADED))],
        "DISTILLER.TYPE": "Headed",
        "DISTILLER.TEACHER_CKPT": teacher_file(tmp_path),
        "LOG.PREFIX": str(tmp_path),
        "SOLVER.EPOCHS": 1,
        "SOLVER.LR_DECAY_STAGES": [],
    }
    done = run_tool("train", [part for item in options.items() for part in item])
    assert done.code == 0, done.err
    assert done.out.count("Define deployed(self) in Headed") == 1
    folder = tmp_path / "distill" / "default"
    assert json.loads((folder / "results.json").read_text())["best"]["epoch"] == 1
    done = run_tool(
        "eval",
        [
            "-m",
            "resnet8",
            "-c",
            folder / "student_best",
            "-d",
            "digits",
            "DATASET.IMAGE_SIZE",
            8,
            "SOLVER.DEVICE",
            "cpu",
        ],
    )
    assert done.code == 0, done.err
    assert "holds a whole method; only its student is loaded, without projector, steps" in done.out
    whole = load_weights(folder / "student_best", whole=True)
    assert load_weights(folder / "student_best").keys() == {
        key.removeprefix("student.") for key in whole if key.startswith("student.")
    }
