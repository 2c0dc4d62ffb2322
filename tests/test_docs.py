"""README, CONTRIBUTING and docs/ are correct: code runs, commands parse, paths and links exist.

Belongs here: a statement of the documentation that a test can run or look up. Features are tested elsewhere.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from cli_runner import run_tool
from method_cases import build, make_batch, total

import mdistiller
import mdistiller.bench.commands
import mdistiller.dataset
import mdistiller.engine.build
import mdistiller.engine.run
import mdistiller.reports.methods
from mdistiller.detection.cfg import all_options as options_of_detectors
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.engine.config.experiment import flatten
from mdistiller.models import cifar_model_dict
from mdistiller.models.facts import facts_of
from mdistiller.options import OPTIONS
from mdistiller.registry import dataset_dict, distiller_dict
from mdistiller.reports.table import COLUMNS

ROOT = Path(__file__).resolve().parents[1]
README, CONTRIBUTING, CHANGELOG = (
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
)
DOCS = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
BOTH = README + CONTRIBUTING + "".join(DOCS.values())
OWN = DOCS[ROOT / "docs" / "own.md"]
# The files of CONTRIBUTING's walk-through: a line that holds nothing but `path`: and below it the content.
WALK_THROUGH = dict(re.findall(r"^`([\w/.]+)`:\n\n```\w+\n(.*?)^```", CONTRIBUTING, re.MULTILINE | re.DOTALL))
METHOD_FILE, DATASET_FILE = "mdistiller/distillers/MYKD.py", "mdistiller/dataset/stripes.py"
NETWORK_FILE = "mdistiller/models/cifar/tinycnn.py"
ORACLE_FILE, TEST_FILE = "tests/oracles/mykd.py", "tests/distillers/test_mykd.py"
IMPORT_NAMES = {"yaml": "PyYAML", "sklearn": "scikit-learn", "PIL": "pillow"}


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """The lines of the bash blocks, continued lines joined."""
    return "".join(blocks(text, "bash")).replace("\\\n", " ").splitlines()


def table(*heading: str) -> list[list[str]]:
    """The rows of the table in README or docs/runs.md whose heading begins with a text."""
    for lines in re.findall(r"(?:^\|.*\n)+", README + DOCS[ROOT / "docs" / "runs.md"], re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines.splitlines()]
        if header[: len(heading)] == list(heading):
            return rows
    raise AssertionError(f"there is no table with heading {heading}")


def names_in(cell: str) -> list[str]:
    return re.findall(r"`(\w[\w.]*)`", cell)


TABLES = distiller_dict, dataset_dict, cifar_model_dict, CFG, CFG.DATASET
IN_DOCS = {"MYKD", "stripes", "STRIPES", "tinycnn"}  # what the walk-throughs register
FOLLOWED = [IN_DOCS & set(table) for table in TABLES]  # by someone who has put the files there


@pytest.fixture
def tables_restored():
    """What a test registers is forgotten afterwards, so that the registry-wide tests do not meet it.

    Someone who follows the walk-through to the letter has its names already: they are set aside.
    """
    found = [dict(table) for table in TABLES]
    for table in TABLES:
        for name in IN_DOCS & set(table):
            del table[name]
    yield
    for table, before in zip(TABLES, found, strict=True):
        for name in set(table) - set(before):
            del table[name]
        for name, entry in before.items():
            if table.get(name) is not entry:
                dict.__setitem__(table, name, entry)


def load_walk_through(path, monkeypatch):
    """A file of CONTRIBUTING's, loaded as if it were at the path in the text."""
    name = path.removesuffix(".py").removeprefix("tests/").replace("/", ".")
    spec = importlib.util.spec_from_loader(name, loader=None)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(WALK_THROUGH[path], path, "exec", dont_inherit=True), vars(module))
    return module


@pytest.fixture
def walk_through_method(tables_restored, monkeypatch):
    module = load_walk_through(METHOD_FILE, monkeypatch)
    load_config()  # makes room for its section
    return module.MYKD


@pytest.fixture
def walk_through_dataset(tables_restored, monkeypatch):
    module = load_walk_through(DATASET_FILE, monkeypatch)
    load_config()  # makes room for its section
    return module.Stripes


@pytest.fixture
def walk_through_network(tables_restored, monkeypatch):
    return load_walk_through(NETWORK_FILE, monkeypatch).TinyCNN


@pytest.fixture
def walk_through_folder(tmp_path, monkeypatch):
    """The current folder holds the library's configs and those of CONTRIBUTING's walk-through."""
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "docs").mkdir()
    for path, content in WALK_THROUGH.items():
        if path.startswith("configs/"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(content)
    monkeypatch.chdir(tmp_path)


# Code


PROGRAMS = blocks(README, "python") + blocks(OWN, "python")


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_python_in_readme_and_for_own_things_runs(number, tables_restored):
    registered = set(distiller_dict)
    code = compile(PROGRAMS[number], f"python block {number}", "exec", dont_inherit=True)
    exec(code, {"__name__": "readme"})
    load_config()  # makes room for its section
    for method in set(distiller_dict) - registered:
        assert_trains(method)


def assert_trains(method):
    distiller = build(method)
    total(distiller, make_batch(method)).backward()
    assert all(p.grad is not None for p in distiller.student.parameters())
    assert all(p.grad is None for p in distiller.teacher.parameters())


def test_walk_through_method_passes_the_registry_wide_tests(walk_through_method):
    assert walk_through_method.__module__ == "mdistiller.distillers.MYKD"
    assert distiller_dict["MYKD"] is walk_through_method
    assert_trains("MYKD")
    tests = runpy.run_path(str(ROOT / "tests" / "distillers" / "test_distillers_all.py"))
    checks = [test for name, test in tests.items() if name.startswith("test_")]
    checks = [test for test in checks if "method" in inspect.signature(test).parameters]
    assert len(checks) > 10
    for check in checks:
        check("MYKD")
    examples = runpy.run_path(str(ROOT / "tests" / "distillers" / "test_examples.py"))
    examples["test_examples_run"](walk_through_method.__module__)


def test_walk_through_tests_pass(walk_through_method, monkeypatch):
    load_walk_through(ORACLE_FILE, monkeypatch)
    namespace = vars(load_walk_through(TEST_FILE, monkeypatch))
    checks = [value for name, value in namespace.items() if name.startswith("test_")]
    assert checks
    for check in checks:
        check()


def test_walk_through_data_set_trains_by_the_command(walk_through_dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = "SOLVER.BATCH_SIZE 20 SOLVER.DEVICE cpu DATASET.NUM_WORKERS 0 EXPERIMENT.NAME a"
    (train,) = (line for line in commands(CONTRIBUTING) if "train.py DATASET.TYPE stripes" in line)
    assert run_tool("train", [*shlex.split(train)[2:], *options.split()]).code == 0
    results = json.loads((tmp_path / "output" / "distill" / "a" / "results.json").read_text())
    assert results["last"]["top1"] > 80
    (views,) = (line for line in commands(CONTRIBUTING) if "-d stripes" in line)
    assert run_tool("views", shlex.split(views)[2:]).code == 0
    rows = [line.split() for line in run_tool("list", ["datasets"]).out.splitlines()]
    assert ["stripes", "2", "16x16", "cifar", "plain,", "weak,", "strong"] in rows


@pytest.mark.parametrize("method", ["KD", "VRM", "REVIEWKD"])
def test_walk_through_network_learns(walk_through_network, tmp_path, method):
    facts = facts_of(walk_through_network(num_classes=10), (16, 16))
    assert facts.channels == [16, 32, 64] and facts.stages == (0, 1, 2) and facts.strides == [1, 2, 4]
    values = {"DISTILLER.TYPE": method, "DISTILLER.STUDENT": "tinycnn", "DISTILLER.TEACHER": "tinycnn"}
    cfg = load_config(options=[part for item in values.items() for part in item])
    networks = [walk_through_network(num_classes=10) for _ in range(2)]
    image, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    batch = {"image_weak": image, "image_strong": image} if method == "VRM" else {"image": image}
    _, losses = build_distiller(cfg, *networks).train()(**batch, target=target, epoch=1)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in networks[0].parameters())


def test_walk_through_leaves_nothing_behind():
    assert [IN_DOCS & set(table) for table in TABLES] == FOLLOWED
    for path in (METHOD_FILE, DATASET_FILE, NETWORK_FILE, ORACLE_FILE):
        if not (ROOT / path).exists():
            assert not any(name.endswith(f".{Path(path).stem}") for name in sys.modules)


# Commands


class ReachedError(Exception):
    """A command has accepted its arguments and would start its work."""


def reach(*args, **kwargs):
    raise ReachedError


@pytest.mark.parametrize("line", [line for line in commands(BOTH) if line.startswith(("python tools/", "torchrun "))])
def test_commands_are_accepted(line, walk_through_method, walk_through_dataset, walk_through_folder, monkeypatch):
    """Each command parses its arguments and reads its config or plan; its work does not start."""
    monkeypatch.setattr("mdistiller.commands.train.run", reach)
    monkeypatch.setattr("mdistiller.commands.eval.build_student", reach)
    monkeypatch.setattr("mdistiller.commands.reproduce.run_plan", reach)
    monkeypatch.setattr("mdistiller.commands.bench.run_command", reach)
    monkeypatch.setattr("mdistiller.commands.list.write_methods_page", lambda *given: None)  # builds each method
    monkeypatch.setattr("mdistiller.commands.views.load_splits", reach)
    monkeypatch.setattr("mdistiller.commands.export.export_run", reach)
    script, *arguments = shlex.split(line[line.index("tools/") :])
    name = Path(script).stem
    if name == "list":
        assert run_tool(name, arguments).code == 0
    else:
        with pytest.raises(ReachedError):
            run_tool(name, arguments)


def test_a_wrong_command_would_be_noticed(walk_through_folder):
    assert run_tool("train", ["--config", "configs/digits/kd/res20_res8.yaml"]).code == 2
    assert run_tool("train", ["--cfg", "configs/digits/kd/res20_res8.yaml", "KD.TEMPRATURE", "2"]).code == 2


def test_config_keys_exist(walk_through_method, walk_through_dataset):
    keys = set(re.findall(r"\b[A-Z][A-Z\d_]*(?:\.[A-Z][A-Z\d_]*)+\b", BOTH))
    assert len(keys) > 50
    known = [
        f"{key}." for key in (*flatten(CFG), *OPTIONS, *options_of_detectors())
    ]  # an option may be an empty section
    assert [key for key in sorted(keys) if not any(name.startswith(f"{key}.") for name in known)] == []


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    named = set(re.findall(r"^make ([\w-]+)", "\n".join(commands(BOTH)), re.MULTILINE))
    named |= set(re.findall(r"`make ([\w-]+)`", BOTH + CHANGELOG))
    assert {"demo", "test"} <= named
    for target in named:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_teachers_lie_where_the_readme_says():
    named = re.findall(r"download_ckpts/cifar_teachers/[\w/.]+\.pth", README)
    registered = [checkpoint for _, checkpoint in cifar_model_dict.values() if checkpoint]
    assert named
    assert all(any(checkpoint.endswith(path) for checkpoint in registered) for path in named)


# Paths and links


def paths_in(text: str) -> set[str]:
    """Texts that look like a path below one of the repository's folders, without a full stop at the end."""
    text = re.sub(r"https?://\S+", "", text)
    found = re.findall(r"(?<![\w/.-])(?:mdistiller|tools|configs|tests|docs|examples)/[\w./<>*-]*", text)
    return {path.rstrip(".") for path in found}


def test_paths_exist():
    """``<dataset>`` stands for any name."""
    paths = paths_in(BOTH + CHANGELOG) - set(WALK_THROUGH)
    assert len(paths) > 50
    assert not [path for path in sorted(paths) if not any(ROOT.glob(re.sub(r"<\w+>", "*", path)))]


def test_relative_links_resolve():
    texts = {ROOT / "README.md": README + CONTRIBUTING + CHANGELOG, **DOCS}
    links = {(path, to) for path, text in texts.items() for to in re.findall(r"\]\((?!https?://)([^)#]+)", text)}
    assert len(links) > 20
    assert not [(path.name, to) for path, to in sorted(links) if not (path.parent / to).exists()]


# Tables


def test_demo_table_has_the_rows_and_columns_of_the_plan():
    plan = yaml.safe_load((ROOT / "configs" / "plans" / "demo.yaml").read_text())
    teacher, *rows = table(*(column.format("top-1 [%]") for column in COLUMNS))
    assert teacher[0] == "teacher (resnet20)"
    assert [row[0] for row in rows] == list(plan["METHODS"])
    assert {int(row[COLUMNS.index("n")]) for row in rows} == {len(plan["SEEDS"])}


def test_method_table_is_complete():
    """A new method needs a row in README's table, and a name there must be registered."""
    rows = table("method", "paper", "loss")
    ours = [name for name, method in distiller_dict.items() if ROOT in Path(inspect.getfile(method)).parents]
    assert sorted(name for row in rows for name in names_in(row[0])) == sorted(ours)  # other tests may add methods


def test_data_set_table_is_complete():
    assert sorted(name for row in table("data set") for name in names_in(row[0])) == sorted(dataset_dict)


def test_table_of_a_runs_files(tmp_path):
    options = {
        "LOG.PREFIX": tmp_path, "LOG.SAVE_CHECKPOINT_FREQ": 1, "DATASET.TYPE": "digits", "DATASET.TRAIN_PER_CLASS": 2,
        "DATASET.IMAGE_SIZE": 8, "DATASET.NUM_WORKERS": 0, "DISTILLER.STUDENT": "resnet8",
        "SOLVER.EMA_DECAY": 0.9, "SOLVER.DEVICE": "cpu",
    }  # fmt: skip
    for epochs in (1, 2):
        options["SOLVER.EPOCHS"] = epochs
        cfg = load_config(options=[str(part) for item in options.items() for part in item])
        mdistiller.engine.run.run(cfg, resume=epochs == 2)
    found = {re.sub(r"_[12]$", "_N", path.name) for path in (tmp_path / "distill" / "default").iterdir()}
    assert found == {name for row in table("file") for name in names_in(row[0])}


def test_readme_is_short_enough_to_be_read():
    assert len(README.split()) <= 1800


def test_pictures_are_small():
    for path in (ROOT / "docs" / "pictures").iterdir():
        assert path.stat().st_size < 150_000, path.name


def test_the_citation_file():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert (citation["version"], citation["license"]) == (mdistiller.__version__, "MIT")
    assert all(entry["authors"] and entry["title"] and entry["year"] for entry in citation["references"])
    titles = {entry["title"] for entry in citation["references"]}
    cited = re.findall(r"title=\{(.*?)\}, ?\n? *(?:booktitle|journal)", blocks(README, "bibtex")[0])
    assert len(cited) >= 5 and {title.replace("{", "").replace("}", "") for title in cited} <= titles


# Packaging


def packaging(monkeypatch):
    """The arguments of ``setup`` in setup.py."""
    given = {}
    stub = SimpleNamespace(setup=lambda **kwargs: given.update(kwargs), find_packages=lambda **kwargs: [])
    monkeypatch.setitem(sys.modules, "setuptools", stub)
    runpy.run_path(str(ROOT / "setup.py"))
    return given


def project(requirement: str) -> str:
    return re.match(r"[\w-]+", requirement)[0]


def test_setup_and_requirements_agree(monkeypatch):
    given = packaging(monkeypatch)
    assert given["install_requires"] == (ROOT / "requirements.txt").read_text().splitlines()
    assert given["long_description"] == README
    assert given["version"] == mdistiller.__version__


def test_everything_imported_is_required(monkeypatch):
    given = packaging(monkeypatch)
    required = {project(r) for group in (given["install_requires"], *given["extras_require"].values()) for r in group}
    imported = set()
    for path in (ROOT / "mdistiller").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
    third_party = imported - sys.stdlib_module_names - {"mdistiller"}
    assert {IMPORT_NAMES.get(name, name) for name in third_party} <= required


def test_extras_that_are_named_exist(monkeypatch):
    extras = packaging(monkeypatch)["extras_require"]
    named = re.findall(r"\.\[(\w+)\]", BOTH) + re.findall(r"installed-([a-z]+)", (ROOT / "Makefile").read_text())
    assert named
    assert set(named) <= set(extras)


def test_changelog_has_this_version():
    assert re.search(rf"^## .*{re.escape(mdistiller.__version__)}", CHANGELOG, re.MULTILINE)
