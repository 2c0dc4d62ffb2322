"""``SOLVER.CHANNELS_LAST``: what ``auto`` means, and that a resumed run keeps its layout."""

import pytest
import torch
import yaml
from runs import same_state, tiny_config

from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.run import run
from mdistiller.registry import InputError


def test_auto_is_channels_last_on_a_cpu_and_not_on_a_gpu(tmp_path, monkeypatch):
    assert Precision.from_cfg(tiny_config(tmp_path)).channels_last
    monkeypatch.setattr("mdistiller.engine.forwards.precision.resolve_device", torch.device)
    assert not Precision.from_cfg(tiny_config(tmp_path, SOLVER__DEVICE="cuda")).channels_last
    for value, expected in ((True, True), ("false", False), ("on", True), ("off", False)):
        cfg = tiny_config(tmp_path, SOLVER__DEVICE="cuda", SOLVER__CHANNELS_LAST=value)
        assert Precision.from_cfg(cfg).channels_last == expected
    with pytest.raises(InputError, match="CHANNELS_LAST: no choice named 'NHWC'; known: auto, off, on"):
        tiny_config(tmp_path, SOLVER__CHANNELS_LAST="NHWC")


def test_a_resumed_run_keeps_its_layout_also_one_of_an_earlier_version(tmp_path, capsys):
    def config(name, epochs, **values):
        return tiny_config(tmp_path, EXPERIMENT__NAME=name, SOLVER__EPOCHS=epochs, **values)

    run(config("whole", 2, SOLVER__CHANNELS_LAST="off"))
    cfg = config("parts", 1, SOLVER__CHANNELS_LAST="off")
    run(cfg)
    file = tmp_path / cfg.EXPERIMENT.PROJECT / "parts" / "config.yaml"
    content = yaml.safe_load(file.read_text())
    content["SOLVER"]["CHANNELS_LAST"] = False  # as before there was auto
    file.write_text(yaml.safe_dump(content))
    capsys.readouterr()
    run(config("parts", 2), resume=True)
    assert "CHANNELS_LAST" not in capsys.readouterr().out
    assert yaml.safe_load(file.read_text())["SOLVER"]["CHANNELS_LAST"] == "off"
    latest = [torch.load(file.parents[1] / name / "latest", weights_only=True) for name in ("whole", "parts")]
    assert same_state(latest[0]["model"], latest[1]["model"])
    run(config("fresh", 1))
    assert yaml.safe_load((file.parents[1] / "fresh" / "config.yaml").read_text())["SOLVER"]["CHANNELS_LAST"] == "on"
