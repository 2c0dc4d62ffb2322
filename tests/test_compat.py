"""What mdistiller's users rely on: names, signatures, scripts, batches, configs and checkpoint files."""

from __future__ import annotations

import argparse
import os

import pytest
import torch
import torch.nn.functional as F
from cli_runner import run_tool
from engine.runs import make_trainer, same_state, teacher_file, tiny_config
from mini_cifar import write_mini_cifar100
from plugin_files import forgotten
from torch import nn

import mdistiller.dataset
import mdistiller.distillers
import mdistiller.distillers._base
import mdistiller.distillers._common
import mdistiller.engine
import mdistiller.engine.cfg
import mdistiller.engine.utils
import mdistiller.models
from mdistiller.dataset import get_dataset
from mdistiller.distillers import Distiller, Vanilla, distiller_dict
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG, load_config, show_cfg
from mdistiller.engine.utils import adjust_learning_rate, load_checkpoint, log_msg, save_checkpoint, validate
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError


@pytest.fixture(autouse=True)
def clean_slate():
    models = dict(cifar_model_dict)
    with forgotten():
        yield
    cifar_model_dict.update(models)


NAMES = {
    mdistiller.engine: "trainer_dict",
    mdistiller.engine.cfg: "CFG CN show_cfg",
    mdistiller.engine.utils: "AverageMeter accuracy adjust_learning_rate log_msg validate load_checkpoint "
    "save_checkpoint",
    mdistiller.models: "cifar_model_dict imagenet_model_dict tiny_imagenet_model_dict",
    mdistiller.distillers: "Distiller KD Vanilla distiller_dict",
    mdistiller.distillers._base: "Distiller Vanilla",
    mdistiller.distillers._common: "ConvReg get_feat_shapes",
    mdistiller.dataset: "get_dataset",
}  # fmt: skip


@pytest.mark.parametrize(("module", "names"), NAMES.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_public_names(module, names):
    for name in names.split():
        assert hasattr(module, name), name


def test_tables_are_dictionaries_of_mdistillers_kinds():
    assert {"base", "crd"} <= set(trainer_dict)
    assert distiller_dict["NONE"] is Vanilla
    constructor, checkpoint = cifar_model_dict["resnet32x4"]
    assert checkpoint.endswith("download_ckpts/cifar_teachers/resnet32x4_vanilla/ckpt_epoch_240.pth")
    assert cifar_model_dict["resnet8"][1] is None
    assert isinstance(constructor(num_classes=3), nn.Module)
    distiller_dict["MINE"] = Vanilla
    assert load_config(options=["DISTILLER.TYPE", "MINE"]).DISTILLER.TYPE == "MINE"


# Configurations

FLAT_YAML = """
EXPERIMENT:
  NAME: ""
  TAG: "kd,res56,res20"
  PROJECT: "cifar100_baselines"
DISTILLER:
  TYPE: "KD"
  TEACHER: "resnet56"
  STUDENT: "resnet20"
SOLVER:
  BATCH_SIZE: 64
  EPOCHS: 240
  LR: 0.05
  LR_DECAY_STAGES: [150, 180, 210]
  LR_DECAY_RATE: 0.1
  WEIGHT_DECAY: 0.0005
  MOMENTUM: 0.9
  TYPE: "SGD"
KD:
  TEMPERATURE: 4
  LOSS:
    CE_WEIGHT: 0.1
    KD_WEIGHT: 0.9
LOG:
  TENSORBOARD_FREQ: 500
  SAVE_CHECKPOINT_FREQ: 40
  PREFIX: "./output"
"""


def test_a_flat_yaml_merges_on_the_global_tree_and_prints(tmp_path, capsys):
    path = tmp_path / "flat.yaml"
    path.write_text(FLAT_YAML)
    CFG.merge_from_file(str(path))
    CFG.merge_from_list(["SOLVER.EPOCHS", "3", "KD.TEMPERATURE", "2"])
    CFG.freeze()
    assert (CFG.SOLVER.EPOCHS, CFG.KD.TEMPERATURE, CFG.DISTILLER.STUDENT) == (3, 2.0, "resnet20")
    show_cfg(CFG)
    assert "TEMPERATURE: 2.0" in capsys.readouterr().out


def test_a_section_that_a_script_adds_with_yacs_takes_values():
    from yacs.config import CfgNode

    CFG.MINE = CfgNode({"WEIGHT": 1.0, "DEEP": {"K": 1}})
    CFG.merge_from_list(["MINE.WEIGHT", "2", "MINE.DEEP.K", "3"])
    assert (CFG.MINE.WEIGHT, CFG.MINE.DEEP.K) == (2.0, 3)


# A training script in mdistiller's manner


def script(arguments):
    """A user's training script: the script calls the library's parts itself."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--cfg")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("opts", nargs=argparse.REMAINDER)
    args = parser.parse_args(arguments)
    cfg = CFG
    cfg.merge_from_file(args.cfg)
    cfg.merge_from_list(args.opts)
    cfg.freeze()
    name = os.path.join(cfg.EXPERIMENT.PROJECT, cfg.EXPERIMENT.NAME or cfg.EXPERIMENT.TAG)
    show_cfg(cfg)
    train_loader, val_loader, num_data, num_classes = get_dataset(cfg)
    if cfg.DISTILLER.TYPE == "NONE":
        distiller = distiller_dict["NONE"](cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=num_classes))
    else:
        net, path = cifar_model_dict[cfg.DISTILLER.TEACHER]
        teacher = net(num_classes=num_classes)
        teacher.load_state_dict(load_checkpoint(path)["model"])
        student = cifar_model_dict[cfg.DISTILLER.STUDENT][0](num_classes=num_classes)
        distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg)
    distiller = nn.DataParallel(distiller)
    if cfg.DISTILLER.TYPE != "NONE":
        print(log_msg(f"extra parameters: {distiller.module.get_extra_parameters()}", "INFO"))
    trainer = trainer_dict[cfg.SOLVER.TRAINER](name, distiller, train_loader, val_loader, cfg)
    trainer.train(resume=args.resume)
    return num_data, num_classes, validate(val_loader, distiller)


@pytest.mark.parametrize("method", ["NONE", "KD"])
def test_a_training_script_in_mdistillers_manner(tmp_path, method, capsys):
    config = tmp_path / "flat.yaml"
    config.write_text(FLAT_YAML)
    teacher = teacher_file(tmp_path)
    cifar_model_dict["resnet56"] = (cifar_model_dict["resnet8"][0], teacher)
    tiny = {
        "DISTILLER.TYPE": method, "DATASET.TYPE": "digits", "DATASET.TRAIN_PER_CLASS": 3, "DATASET.NUM_WORKERS": 0,
        "DATASET.IMAGE_SIZE": 8, "SOLVER.BATCH_SIZE": 8, "SOLVER.DEVICE": "cpu", "LOG.PREFIX": tmp_path,
        "DISTILLER.STUDENT": "resnet8",
    }  # fmt: skip
    options = [str(part) for item in tiny.items() for part in item]
    for arguments, epochs in ((["--cfg", str(config)], "1"), (["--cfg", str(config), "--resume"], "2")):
        with forgotten():
            num_data, num_classes, (top1, top5, loss) = script([*arguments, *options, "SOLVER.EPOCHS", epochs])
    assert (num_data, num_classes) == (30, 10)
    assert 0 <= top1 <= top5 <= 100 and loss > 0
    folder = tmp_path / "cifar100_baselines" / "kd,res56,res20"
    assert load_checkpoint(folder / "latest")["epoch"] == 2
    assert {"latest", "best", "student_latest", "student_best", "worklog.txt"} <= {p.name for p in folder.iterdir()}
    out = capsys.readouterr().out
    assert f"Resuming from {folder / 'latest'}: 1 epoch" in out


# Batches and forward_train


class Recorder(Distiller):
    """Takes any arguments and records them."""

    def __init__(self, student):
        super().__init__(student)
        self.came = {}

    def learn(self, image, target, **came):
        self.came = {"image": image, "target": target, **came}
        logits = self.student(image)[0]
        return logits, {"loss": F.cross_entropy(logits, target).view(1)}

    def forward_train(self, **kwargs):
        image = kwargs.pop("image") if "image" in kwargs else kwargs["image_weak"]
        return self.learn(image, **kwargs)


class OnlyWhatMdistillerGives(Recorder):
    def forward_train(self, image, target, epoch):
        return self.learn(image, target, epoch=epoch)


class TwoViews(Recorder):
    def forward_train(self, image_weak, image_strong, target, **kwargs):
        return self.learn(image_weak, target, image_strong=image_strong, **kwargs)


class Contrast(Recorder):
    def forward_train(self, image, target, index, contrastive_index):
        return self.learn(image, target, index=index, contrastive_index=contrastive_index)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 4)

    def forward(self, x):
        return self.linear(x.flatten(1)), {}


IMAGE, TARGET, INDEX = torch.arange(48).view(4, 3, 2, 2), torch.arange(4), torch.arange(4)  # mdistiller: .float()
ROWS = torch.arange(12).view(4, 3)


@pytest.mark.parametrize(
    ("kind", "item", "came"),
    [
        (Recorder, (IMAGE, TARGET), "image target epoch"),
        (Recorder, (IMAGE, TARGET, INDEX), "image target index epoch"),
        (Recorder, (IMAGE, TARGET, INDEX, ROWS), "image target index contrastive_index epoch"),
        (OnlyWhatMdistillerGives, (IMAGE, TARGET, INDEX), "image target epoch"),
        (TwoViews, ((IMAGE, -IMAGE), TARGET, INDEX), "image target image_strong index epoch"),
        (TwoViews, ([IMAGE, -IMAGE], TARGET, INDEX), "image target image_strong index epoch"),
        (Contrast, (IMAGE, TARGET, INDEX, ROWS), "image target index contrastive_index"),
    ],
)
@pytest.mark.parametrize("trainer", ["base", "crd"])
def test_tuples_of_mdistillers_loaders(tmp_path, kind, item, came, trainer):
    distiller = kind(Net())
    cfg = tiny_config(tmp_path, SOLVER__EPOCHS=2, SOLVER__LR=1e-3)
    trainer = trainer_dict[trainer]("x", nn.DataParallel(distiller), [item], [(IMAGE, TARGET)], cfg)
    trainer.train(resume=False)
    assert set(distiller.came) == set(came.split())
    assert distiller.came["image"].dtype == torch.float32 and torch.equal(distiller.came["image"], IMAGE.float())
    assert distiller.came.get("epoch", 2) == 2
    if "image_strong" in distiller.came:
        assert torch.equal(distiller.came["image_strong"], -IMAGE.float())
    if "contrastive_index" in distiller.came:
        assert torch.equal(distiller.came["contrastive_index"], ROWS)


def test_the_learning_rate_of_an_own_loop(tmp_path):
    cfg = tiny_config(tmp_path, SOLVER__LR=0.4, SOLVER__LR_DECAY_STAGES="[2, 3]", SOLVER__LR_DECAY_RATE=0.5)
    optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
    for epoch, rate in ((1, 0.4), (2, 0.4), (3, 0.2), (4, 0.1)):
        assert adjust_learning_rate(epoch, cfg, optimizer) == pytest.approx(rate)
        assert optimizer.param_groups[0]["lr"] == pytest.approx(rate)


# Checkpoints


def test_files_of_mdistiller_are_read(tmp_path):
    """Files of mdistiller: DataParallel's prefix and the teacher in ``latest`` and ``best``; a tensor as accuracy."""
    values = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path)}
    source = make_trainer(tmp_path / "source", **values)
    source.train()
    student = source.distiller.student.state_dict()
    folder = tmp_path / "distill" / "default"
    folder.mkdir(parents=True)
    whole = {
        "epoch": 2,
        "model": nn.DataParallel(source.distiller).state_dict(),
        "optimizer": source.optimizer.state_dict(),
        "best_acc": torch.tensor([99.5]),
    }
    for name, content in (("latest", whole), ("best", whole), ("student_best", {"model": student})):
        torch.save(content, folder / name)
    assert any(key.startswith("module.teacher.") for key in load_checkpoint(folder / "best")["model"])
    trainer = make_trainer(tmp_path, **values)
    results = trainer.train(resume=True)
    assert trainer.step == 12
    assert results["best"]["top1"] == 99.5  # epoch 3 is not better
    assert same_state(load_checkpoint(folder / "student_best")["model"], dict(student))
    command = ["-m", "resnet8", "-c", folder / "student_best", "-d", "digits", "DATASET.IMAGE_SIZE", 8]
    assert run_tool("eval", command).code == 0


def test_students_are_written_as_mdistiller_reads_them(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    for name in ("student_best", "student_latest"):
        with (trainer.folder / name).open("rb") as file:
            content = torch.load(file, map_location="cpu")
        cifar_model_dict["resnet8"][0](num_classes=10).load_state_dict(content["model"])


def test_save_and_load(tmp_path):
    save_checkpoint({"model": {"w": torch.ones(2)}}, str(tmp_path / "file"))
    assert torch.equal(load_checkpoint(str(tmp_path / "file"))["model"]["w"], torch.ones(2))


def test_evaluation_of_public_weights(tmp_path):
    write_mini_cifar100(tmp_path / "data")
    net = cifar_model_dict["resnet8"][0]
    cifar_model_dict["resnet8"] = (net, teacher_file(tmp_path, classes=100))
    command = ["-m", "resnet8", "-c", "pretrain", "-d", "cifar100", "-bs", 50]
    outcome = run_tool("eval", [*command, "DATASET.ROOT", tmp_path / "data", "SOLVER.DEVICE", "cpu"])
    assert outcome.code == 0, outcome
    assert "resnet8 on 200 test images of cifar100: top-1 " in outcome.out


# Networks and loaders of a script's own


class Bare(nn.Module):
    """Returns ``answer`` of its logits."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.fc = answer, nn.Linear(3, 10)

    def forward(self, image):
        return self.answer(self.fc(image.mean((2, 3))))


@pytest.mark.parametrize(
    ("method", "answer", "message"),
    [
        ("KD", lambda z: z, r"the student \(Bare\) returns Tensor; a network must return \(logits, features\)"),
        ("DKD", lambda z: (z, [z]), None),
        ("SP", lambda z: (z, {}), r"SP reads features\['feats'\], which the student \(Bare\) does not return; it has"),
        ("VRM", lambda z: (z, {}), "VRM reads image_weak, image_strong, and the training batches hold image, target"),
        ("KD", lambda z: (z, {}), None),
    ],
    ids=["a tensor", "a list of features", "no maps", "one view", "no features"],
)
def test_what_networks_of_ones_own_must_return(method, answer, message, tmp_path):
    cfg = load_config(options=["DISTILLER.TYPE", method, "LOG.PREFIX", str(tmp_path), "SOLVER.EPOCHS", "1"])
    batches = [(torch.randn(4, 3, 8, 8), torch.randint(10, (4,)))]
    distiller = distiller_dict[method](Bare(answer), Bare(answer), cfg)
    trainer = trainer_dict["base"]("mine", distiller, batches, batches, cfg)
    if message is None:
        trainer.train()
        assert (tmp_path / "mine" / "student_last").is_file()
    else:
        with pytest.raises(InputError, match=message):
            trainer.train()
