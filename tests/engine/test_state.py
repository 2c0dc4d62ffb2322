"""A state whose parts are of another kind is refused before anything of the run is changed."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from runs import make_trainer, same_state
from torch import nn

from mdistiller.engine.folder.checkpoint import CheckpointError, load_into, load_weights, save_checkpoint
from mdistiller.engine.trainer import BaseTrainer

VALUES = {"SOLVER__EPOCHS": 1, "SOLVER__EMA_DECAY": 0.5, "DATASET__TRAIN_PER_CLASS": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The output folder of a run of one epoch, and its state."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = make_trainer(folder, **VALUES)
    trainer.train()
    return folder, trainer.state_dict()


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[BaseTrainer]:
    yield make_trainer(tmp_path, **VALUES)


WRONG: dict[str, Any] = {
    "epoch": "1",
    "epoch ": -1,
    "step": None,
    "row": [1],
    "config": 5,
    "config ": "!!python/object/apply:os.getcwd []",
    "config  ": "- 1",
    "model": [torch.ones(1)],
    "model ": {0: torch.ones(1)},
    "optimizer": [],
    "optimizer ": {"param_groups": [1], "state": {}},
    "random": "MT19937",
    "random ": {"python": [3, [1, 2], None]},
    "random_of_others": {},
    "hooks": [],
    "hooks ": {"Meters": 5},
    "hooks.names": {"Meters": {"sums": "many", "count": 1}},
    "hooks.seconds": {"Clock": {"seconds": {"train": "long"}}},
    "hooks.scores": {"Evaluate": {"scores": ["high"]}},
    "hooks.rows": {"Writers": {"rows": [{"epoch": 1, "lr": "small"}]}},
    "hooks.average": {"WeightAverage": {"average": {"n": torch.ones(1)}}},
    "results": 7,
    "results ": {"last": 99.0},
    "best_acc": "99",
}


@pytest.mark.parametrize("part", WRONG)
def test_a_part_of_the_wrong_kind(
    trained: tuple[Path, dict[str, Any]], fresh: BaseTrainer, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {**trained[1], part.split(".")[0].strip(): WRONG[part]}
    before = copy.deepcopy(fresh.state_dict())
    generators = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    with pytest.raises(CheckpointError, match="FILE"):
        fresh.load_state(state, "FILE")
    after = fresh.state_dict()
    for kept in (before, after):
        kept["hooks"].pop("Clock")
    assert same_state(after, before)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == generators


def test_the_state_itself_is_taken(trained: tuple[Path, dict[str, Any]], fresh: BaseTrainer) -> None:
    fresh.load_state(copy.deepcopy(trained[1]))
    assert fresh.epoch == 2


def test_a_file_names_no_attribute_of_a_hook(trained: tuple[Path, dict[str, Any]], fresh: BaseTrainer) -> None:
    hooks = {**trained[1]["hooks"], "Meters": {**trained[1]["hooks"]["Meters"], "trainer": 5, "after_epoch": 6}}
    fresh.load_state({**trained[1], "hooks": hooks})
    meters = next(hook for hook in fresh.hooks if type(hook).__name__ == "Meters")
    assert meters.trainer is fresh
    assert callable(meters.after_epoch)


def test_the_message_of_a_resume(trained: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, **VALUES)
    save_checkpoint({**trained[1], "results": 7}, trainer.folder / "latest")
    with pytest.raises(
        CheckpointError, match=r"cannot resume: results of .*latest should be of type dict, and is of type int; and "
    ):
        trainer.train(resume=True)


def test_numbers_of_another_kind_are_no_weights(tmp_path: Path) -> None:
    network = nn.Linear(2, 2)
    for dtype in (torch.complex64, torch.int8):
        save_checkpoint({"model": {k: v.to(dtype) for k, v in network.state_dict().items()}}, tmp_path / "file")
        with pytest.raises(CheckpointError, match=f"other type: weight is {dtype}, the model's torch.float32"):
            load_into(network, tmp_path / "file", "linear model")
    save_checkpoint({"model": {k: v.half() for k, v in network.state_dict().items()}}, tmp_path / "file")
    load_into(network, tmp_path / "file", "linear model")
    for content in ({0: torch.ones(1)}, {"w": torch.ones(3).to_sparse()}, {"w": torch.ones(3, device="meta")}):
        torch.save({"model": content}, tmp_path / "file")
        with pytest.raises(CheckpointError, match=r"file holds no state dict under 'model'; found: \[(0|'w')\]"):
            load_weights(tmp_path / "file")
