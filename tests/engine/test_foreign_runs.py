"""Runs with networks of timm: they resume to the bit, in bfloat16, with an average of weights and with added KD."""

import pytest
from runs import make_trainer, same_state

from mdistiller.engine.build import build_student
from mdistiller.engine.cfg import load_config
from mdistiller.engine.folder.checkpoint import save_checkpoint
from mdistiller.engine.hooks import Hook

CNN, VIT = "timm:test_resnet", "timm:test_vit"
OF_VIT = {"ARGS.img_size": 32, "ARGS.patch_size": 8}
PAIRS = {"CNN to ViT": (CNN, VIT), "ViT to CNN": (VIT, CNN)}
VARIANTS = {
    "float32": {"DISTILLER__TYPE": "SP"},
    "bf16": {"DISTILLER__TYPE": "PKT", "DISTILLER__ADD_KD": 0.5, "SOLVER__AMP": "bf16", "SOLVER__EMA_DECAY": 0.9},
}


class Stop(Hook):
    """Ends the run after a step and keeps the state."""

    def after_step(self, output):
        if self.trainer.step == 6:
            self.trainer.saved = self.trainer.state_dict()
            raise KeyboardInterrupt


def keys_of(role, name):
    values = OF_VIT if name == VIT else {}
    return {f"DISTILLER__{role}": name, **{f"DISTILLER__{role}_{key}": value for key, value in values.items()}}


@pytest.fixture(params=PAIRS)
def pair(request, tmp_path):
    """Options of a pair of networks and its teacher's file."""
    teacher, student = PAIRS[request.param]
    path, values = tmp_path / "weights", keys_of("STUDENT", teacher)
    given = {key.replace("__", "."): value for key, value in values.items()} | {"DATASET.IMAGE_SIZE": 32}
    cfg = load_config(options=[part for item in given.items() for part in item])
    save_checkpoint({"model": build_student(cfg, 10).state_dict()}, path)
    return {**keys_of("TEACHER", teacher), **keys_of("STUDENT", student), "DISTILLER__TEACHER_CKPT": str(path),
            "DATASET__IMAGE_SIZE": 32, "SOLVER__EPOCHS": 2, "SOLVER__LR": 0.01,
            "SOLVER__LR_DECAY_STAGES": []}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path, pair, variant):
    values = {**pair, **VARIANTS[variant]}
    whole = make_trainer(tmp_path / "whole", **values)
    assert whole.foldings["teacher"].active == (pair["DISTILLER__TEACHER"] == CNN)
    whole.train()
    first = make_trainer(tmp_path / "parts", **values)
    first.hooks.append(Stop(first))
    with pytest.raises(KeyboardInterrupt):
        first.train()
    second = make_trainer(tmp_path / "parts", **values)
    second.load_state(first.saved)
    second.train()
    assert same_state(second.distiller.state_dict(), whole.distiller.state_dict())
    assert same_state(second.optimizer.state_dict(), whole.optimizer.state_dict())
    assert second.row["train_loss"] == whole.row["train_loss"]
    assert list(second.distiller.student.state_dict()) == list(build_student(whole.cfg, 10).state_dict())
