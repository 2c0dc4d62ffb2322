"""A run's student as files: equal to the network, complete in their facts, refused where a run or a place is no good.

Belongs here: ``tools/export.py`` and ``mdistiller/export/``.
"""

from __future__ import annotations

import copy
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from cli_runner import run_tool

from mdistiller.engine.build import build_deployed
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import save_checkpoint
from mdistiller.export import Request, export_run
from mdistiller.export.formats import FORMATS, TOLERANCE, Runner
from mdistiller.export.student import read_student
from mdistiller.files import file_sha256
from mdistiller.models import cifar_model_dict
from mdistiller.models.any import with_features, without_features

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")

TINY = "DATASET.TRAIN_PER_CLASS 4 SOLVER.BATCH_SIZE 20 SOLVER.EPOCHS 2 LOG.EVAL_FREQ 1 SOLVER.DEVICE cpu"
TIMM = [
    "resnet18",
    "mobilenetv3_small_050",
    "efficientnet_b0",
    "deit_tiny_patch16_224",
    "pit_ti_224",
    "pvt_v2_b0",
    "swin_tiny_patch4_window7_224",
    "convnext_atto",
    "repvgg_a0",
    "mobilevit_xxs",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run with an average, of a resnet8 on digits."""
    place = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        line = f"--cfg configs/digits/vanilla/res8.yaml {TINY} EXPERIMENT.NAME run SOLVER.EMA_DECAY 0.5"
        assert run_tool("train", shlex.split(line)).code == 0
    return place / "output" / "digits" / "run"


@pytest.fixture
def run_folder(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def written_run(folder: Path, **values: object) -> Path:
    """A run's folder as it would be after training, with random weights and statistics."""
    values = {"DATASET.TYPE": "digits", "SOLVER.DEVICE": "cpu"} | {k.replace("__", "."): v for k, v in values.items()}
    cfg = load_config(options=[str(part) for item in values.items() for part in item])
    network = build_deployed(cfg)
    disturb(network)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(cfg.dump())
    (folder / "results.json").write_text(json.dumps({"status": "finished", "training_images": 40}))
    save_checkpoint({"model": network.state_dict()}, folder / "student_last")
    return folder


def disturb(network):
    """Weights and statistics as after some training: none is the same as another's."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 2)
        elif name.endswith("running_mean"):
            value.normal_(0, 0.1)


def refused(folder, words="", code=2) -> str:
    outcome = run_tool("export", [folder, *shlex.split(words)])
    assert outcome.code == code, outcome
    assert outcome.err.count("error: ") == (code == 2)
    return outcome.err


# What is written


def test_every_file_is_the_network_and_is_scored(run_folder):
    outcome = run_tool("export", [run_folder, "--int8"])
    assert (outcome.code, outcome.err) == (0, "")
    out, results = run_folder / "export", json.loads((run_folder / "results.json").read_text())
    assert {path.name for path in out.iterdir()} == {form.file for form in FORMATS.values()} | {
        "card.md",
        "export.json",
    }
    record = json.loads((out / "export.json").read_text())
    for form in FORMATS.values():
        facts = record["files"][form.file]
        if form.is_exact:
            assert facts["difference"] <= TOLERANCE
            assert facts["test"]["top1"] == results["last"]["top1"]
        assert f"{form.file}: " in outcome.out
    assert f"{results['last']['top1']:.2f}" in outcome.out

    model = onnx.load(out / "student.onnx")
    facts = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(facts["classes"]) == [str(number) for number in range(10)]
    assert json.loads(facts["input_size"]) == [3, 16, 16] and json.loads(facts["mean"]) == [0.3059] * 3
    assert [entry.version for entry in model.opset_import if not entry.domain] == [18]
    for value, sizes in ((model.graph.input[0], [3, 16, 16]), (model.graph.output[0], [10])):
        batch, *others = value.type.tensor_type.shape.dim
        assert (batch.dim_param, [size.dim_value for size in others]) == ("batch", sizes)
    assert b"site-packages" not in (out / "student.onnx").read_bytes()  # nor any other path of this machine
    assert b"site-packages" not in (out / "student.int8.onnx").read_bytes()

    from safetensors import safe_open

    with safe_open(out / "student.safetensors", "pt") as file:
        assert file.metadata()["student"] == "resnet8"
        network = cifar_model_dict["resnet8"][0](num_classes=10)
        network.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    session = onnxruntime.InferenceSession(out / "student.onnx")
    program = torch.export.load(out / "student.pt2").module()
    for batch in (1, 3, 64):
        image = torch.randn(batch, 3, 16, 16)
        with torch.no_grad():
            wanted = network.eval()(image)[0]
        (found,) = session.run(["logits"], {"image": image.numpy()})
        assert (torch.from_numpy(found) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
        assert (program(image) - wanted).abs().max() <= TOLERANCE * wanted.abs().max()

    card = (out / "card.md").read_text()
    for part in (
        "# resnet8 on digits",
        "| last (these) | 2 | test |",
        "*last* is the honest one",
        record["config_sha256"],
        "`(batch, 3, 16, 16)`, float32",
        "| seed | 0 |",
        "9. 9",
        "onnxruntime ",
    ):
        assert part in card
    program = card.partition("```python\n")[2].partition("```")[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(out)
        exec(compile(program, "card", "exec"), {})

    again = run_tool("export", [run_folder, "--formats", "safetensors", "--weights", "best", "--no-score"])
    assert again.code == 0 and "student.onnx of the earlier export is deleted" in again.out
    assert {path.name for path in out.iterdir()} == {"student.safetensors", "card.md", "export.json"}
    assert "No file was run on test images" in (out / "card.md").read_text()


def test_normalisation_inside(run_folder, tmp_path):
    record = export_run(Request(run_folder, tmp_path / "out", ("onnx", "pt2"), "average", normalize_inside=True))
    student = read_student(run_folder, "average")
    assert record["recorded"]["top1"] == record["files"]["student.onnx"]["test"]["top1"]
    image = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in student.normalisation)
    with torch.no_grad():
        wanted = student.network((image / 255 - mean) / std)[0]
    (found,) = onnxruntime.InferenceSession(tmp_path / "out" / "student.onnx").run(None, {"image": image.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    assert "uint8 from 0 to 255" in (tmp_path / "out" / "card.md").read_text()


def compare(student, name, folder, batches=(1, 3, 64)):
    form = FORMATS[name]
    path = folder / form.file
    path.write_bytes(form.write(student, student.deployable(), None))
    runner = Runner(form.read(path, student), student, False)
    for batch in batches:
        image = torch.randn(batch, 3, student.side, student.side)
        with torch.no_grad():
            wanted = student.deployable()(image)
        assert (runner(image) - wanted).abs().max() <= TOLERANCE * wanted.abs().max(), (name, batch)


def test_a_foreign_network_is_its_librarys_again(tmp_path):
    """Here with images of another size and normalisation: the file transforms them, the weights do not."""
    timm = pytest.importorskip("timm")
    values = {"DISTILLER__STUDENT": "timm:resnet10t", "DATASET__IMAGE_SIZE": 24}
    values |= {"DISTILLER__STUDENT_INPUT.SIZE": 32, "DISTILLER__STUDENT_INPUT.MEAN": [0.5, 0.5, 0.5]}
    folder = written_run(tmp_path / "run", **values, **{"DISTILLER__STUDENT_INPUT.STD": [0.5, 0.4, 0.5]})
    assert run_tool("export", [folder, "--no-score", "--formats", "safetensors", "onnx"]).code == 0
    from safetensors.torch import load_file

    network = timm.create_model("resnet10t", num_classes=10).eval()
    network.load_state_dict(load_file(folder / "export" / "student.safetensors"))
    record = json.loads((folder / "export" / "export.json").read_text())
    assert record["network_input"] == {"input_size": [3, 32, 32], "mean": [0.5] * 3, "std": [0.5, 0.4, 0.5]}
    student = read_student(folder)
    assert type(student.network) is type(network)
    image = torch.randn(2, 3, 24, 24)
    session = onnxruntime.InferenceSession(folder / "export" / "student.onnx")
    (found,) = session.run(None, {"image": image.numpy()})
    with torch.no_grad():
        wanted = network(student.input(image))
    torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-4)
    assert "24, 24" in (folder / "export" / "card.md").read_text()


@pytest.mark.parametrize("maps", [(), ("layer1", "layer2")])
def test_features_are_put_on_and_taken_off(maps):
    from torchvision.models import resnet18

    plain = resnet18(num_classes=10).eval()
    adapted = with_features(copy.deepcopy(plain), 32, maps)
    network, input = without_features(adapted)
    assert type(network) is type(plain) and input is None
    assert not any(module._forward_hooks for module in network.modules())
    assert vars(network).keys() == vars(plain).keys()
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(image), plain(image))
    assert isinstance(with_features(network, 32)(image), tuple)  # and on again


def test_no_teacher_and_no_public_weights_are_touched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"DISTILLER__TYPE": "KD", "DISTILLER__TEACHER": "resnet20", "DISTILLER__TEACHER_CKPT": "gone"}
    values |= {"DISTILLER__STUDENT": "torchvision:mobilenet_v3_small", "DISTILLER__STUDENT_CKPT": "pretrained"}
    folder = written_run(tmp_path / "run", **values)
    student = read_student(folder)
    assert student.input.size == 224  # what the public weights were made for
    compare(student, "safetensors", tmp_path, (2,))


HEADS = """
import torch
from torch import nn
from mdistiller.distillers import Distiller

class HEADED(Distiller):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher)
        self.head = nn.Linear(10, 10)
        self.teacher_head = nn.Linear(10, 10)
    def forward_train(self, image, target):
        logits = self.forward_test(image)
        return logits, {"loss_ce": nn.functional.cross_entropy(logits, target)}
    def forward_test(self, image):
        logits = self.head(self.student(image)[0])
        return BODY
"""


@pytest.mark.parametrize("uses_teacher", [False, True])
def test_a_method_with_a_head_of_its_own(tmp_path, uses_teacher):
    name = f"HEADED_{uses_teacher}".upper()
    path = tmp_path / f"{name}.py"
    body = "logits + self.teacher(image)[0]" if uses_teacher else "2 * logits"
    path.write_text(HEADS.replace("BODY", body).replace("HEADED", name))
    values = {"DISTILLER__TYPE": name, "DISTILLER__TEACHER": "resnet14", "DISTILLER__STUDENT": "resnet8"}
    folder = written_run(tmp_path / "run", DISTILLER__PLUGINS=f"[{path}]", **values)
    assert "names code, which runs with all your rights" in refused(folder, "--no-score")
    if uses_teacher:
        assert "predicts with its teacher" in refused(folder, "--no-score --allow-plugins")
    else:
        done = run_tool("export", [folder, "--no-score", "--allow-plugins", "--formats", "onnx", "pt2"])
        assert (done.code, done.err) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(cifar_model_dict))
def test_onnx_of_the_zoo(name, tmp_path):
    compare(
        read_student(written_run(tmp_path / "run", DATASET__IMAGE_SIZE=32, DISTILLER__STUDENT=name)), "onnx", tmp_path
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_onnx_of_timm(name, tmp_path):
    pytest.importorskip("timm")
    folder = written_run(tmp_path / "run", DATASET__IMAGE_SIZE=224, DISTILLER__STUDENT=f"timm:{name}")
    compare(read_student(folder), "onnx", tmp_path)


@pytest.mark.slow
def test_int8_loses_less_than_a_point(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = "--cfg configs/digits/vanilla/res8.yaml DATASET.TRAIN_PER_CLASS 0 SOLVER.EPOCHS 15 EXPERIMENT.NAME a"
    stages = "SOLVER.LR_DECAY_STAGES [9,12] LOG.EVAL_FREQ 15"
    assert run_tool("train", shlex.split(f"{line} {stages}")).code == 0
    files = export_run(Request(Path("output/digits/a"), formats=("onnx", "int8")))["files"]
    plain, small = (files[name]["test"]["top1"] for name in ("student.onnx", "student.int8.onnx"))
    assert plain > 90 and small > plain - 1
    assert files["student.int8.onnx"]["bytes"] < 0.5 * files["student.onnx"]["bytes"]


# Bad input


def test_no_run(tmp_path, run_folder):
    assert "there is no folder" in refused(tmp_path / "none")
    (tmp_path / "notes").mkdir()
    assert "notes holds no config.yaml; name the folder of a run" in refused(tmp_path / "notes")
    assert "student_last is a file; name the folder of a run" in refused(run_folder / "student_last")


def test_an_unfinished_run_says_what_there_is(run_folder):
    (run_folder / "student_last").unlink()
    (run_folder / "student_ema").unlink()
    (run_folder / "results.json").write_text(json.dumps({"status": "interrupted"}))
    message = refused(run_folder)
    assert "holds no student_last: the run is not finished (2 epochs are done)" in message
    assert "take what is there by --weights best or latest; finish the run" in message
    assert run_tool("export", [run_folder, "--weights", "latest", "--no-score", "--formats", "safetensors"]).code == 0
    assert "the run is not finished" in refused(run_folder, "--weights average")


def test_an_average_that_was_not_kept(tmp_path):
    folder = written_run(tmp_path / "run", DISTILLER__STUDENT="resnet8")
    assert "the run kept no average (SOLVER.EMA_DECAY); take what is there by --weights last" in refused(
        folder, "--weights average"
    )
    (folder / "student_last").unlink()
    assert "holds no student_last; nothing of its students is left" in refused(folder)


def test_damaged_and_foreign_weights(run_folder, tmp_path):
    whole = (run_folder / "student_last").read_bytes()
    (run_folder / "student_last").write_bytes(whole[:1000])
    assert "student_last is damaged" in refused(run_folder)
    other = written_run(tmp_path / "other", DISTILLER__STUDENT="resnet14")
    shutil.copy(other / "student_last", run_folder / "student_last")
    assert "student_last does not fit: " in refused(run_folder)
    (run_folder / "config.yaml").write_text("SOLVER: [1")
    assert "cannot read" in refused(run_folder)


SEVERAL = """
from torch import nn
class Two(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.fc = nn.Linear(3, num_classes)
    def forward(self, image):
        logits = self.fc(image.mean((2, 3)))
        return OUTPUT, {"feats": [image], "pooled_feat": image.mean((2, 3))}
"""


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("[logits, logits]", "returns 2 tensors; a student for export must"),
        ("logits[:, 0]", "of shape (2,); logits are"),
    ],
)
def test_a_student_without_one_tensor_of_logits(output, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = f"several_{abs(hash(output))}"
    (tmp_path / f"{module}.py").write_text(SEVERAL.replace("OUTPUT", output))
    folder = written_run(tmp_path / "run", DISTILLER__STUDENT=f"{module}:Two")
    assert message in refused(folder, "--no-score --allow-plugins")


def test_files_of_others_stay(run_folder):
    out = run_folder / "export"
    out.mkdir()
    (out / "card.md").write_text("mine")
    assert "card.md is in the way: no export wrote it, or it was changed since" in refused(run_folder, "--no-score")
    assert (out / "card.md").read_text() == "mine" and len(list(out.iterdir())) == 1
    (out / "card.md").rename(out / "notes.md")
    quick = ["--no-score", "--formats", "safetensors"]
    assert run_tool("export", [run_folder, *quick]).code == 0
    assert run_tool("export", [run_folder, *quick]).code == 0
    (out / "student.safetensors").write_bytes(b"other")
    assert "student.safetensors is in the way" in refused(run_folder, shlex.join(quick))
    assert (out / "notes.md").read_text() == "mine"
    (out / "student.safetensors").unlink()
    record = json.loads((out / "export.json").read_text())
    record["files"]["notes.md"] = record["files"]["../config.yaml"] = {"sha256": file_sha256(out / "notes.md")}
    (out / "export.json").write_text(json.dumps(record))
    assert run_tool("export", [run_folder, *quick]).code == 0
    assert (out / "notes.md").read_text() == "mine"  # whatever the record says


def test_a_place_that_is_no_folder(run_folder, tmp_path):
    (tmp_path / "file").write_text("")
    assert "is a file; name a folder by --out" in refused(run_folder, f"--out {tmp_path / 'file'} --no-score")
    assert "cannot write /proc/x" in refused(run_folder, "--out /proc/x --no-score --formats safetensors")


def test_missing_packages_are_named_at_once(run_folder, monkeypatch):
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "onnx" in name else found(name))
    message = refused(run_folder)
    assert "student.onnx needs onnx, onnxscript, onnxruntime: pip install onnx onnxscript onnxruntime" in message
    assert "--formats" in message and not (run_folder / "export").exists()


def test_normalisation_inside_needs_a_file_that_normalises(run_folder):
    assert "does nothing to safetensors" in refused(run_folder, "--formats safetensors --normalize-inside")


def test_settings_that_would_make_another_student(run_folder):
    for setting in ("DISTILLER.STUDENT resnet14", "SOLVER.LR 1"):
        assert "only settings of place and speed" in refused(run_folder, f"--set {setting}")
    assert "unknown config key" in refused(run_folder, "--set DATASET.ROOTS x")


def test_images_that_are_not_here(tmp_path):
    folder = written_run(tmp_path / "run", DATASET__TYPE="cifar100", DISTILLER__STUDENT="resnet8", DATASET__ROOT="gone")
    message = refused(folder)
    assert "cannot be scored without the run's images: " in message and "give --no-score" in message
    assert "cannot be calibrated (int8) without" in refused(folder, "--no-score --int8")
    assert run_tool("export", [folder, "--no-score", "--formats", "safetensors"]).code == 0


def test_a_file_that_is_not_the_network_is_not_kept(run_folder, monkeypatch):
    form = FORMATS["safetensors"]

    def other(student, network, images):
        student.network.fc.weight.data[0] += 1  # what is written differs from what is compared below
        content = form.write(student, network, images)
        student.network.fc.weight.data[0] -= 1
        return content

    import dataclasses

    monkeypatch.setitem(FORMATS, "safetensors", dataclasses.replace(form, write=other))
    assert "student.safetensors is not the network: " in refused(run_folder, "--formats safetensors --no-score", code=1)
    assert not list((run_folder / "export").iterdir())
