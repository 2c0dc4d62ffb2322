"""The page of all methods: their batch, the teacher's outputs that they use, their parameters and their costs.

All columns are read from the code or measured. A method uses an output of the teacher if noise on this output changes
the losses. The costs come from the reports of ``tools/bench.py step`` and ``memory``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.contract import contract_of
from mdistiller.engine.build import build_distiller
from mdistiller.engine.cfg import CFG
from mdistiller.models import cifar_model_dict
from mdistiller.registry import InputError, distiller_dict

OUTPUTS = {"logits": "logits", "feats": "maps", "preact_feats": "maps before ReLU", "pooled_feat": "pooled features"}
GOLDEN_NAMES = {"MLKD": "mlld"}  # methods with another name in the reference values
COLUMNS = (
    "method",
    "paper and venue",
    "family",
    "batch",
    "of the teacher",
    "extra parameters",
    "step",
    "memory",
    "golden cases",
)
INTRODUCTION = """# The methods

Made by `{command}` from the code, from the reference values in `tests/golden` and from two measurements of
`tools/bench.py`; do not edit by hand.

- batch: the views of each image in a step, and further fields beside the labels.
- of the teacher: the teacher's outputs that the losses use.
- extra parameters: trained beside the student's, for resnet32x4 to resnet8x4 with 100 classes.
- step: time of a training step divided by the time of KD with as many views; memory: memory that training adds to a
  process, divided by KD's. {measured}
- golden cases: sets of reference values from the papers' or mdistiller's code; the tests compare with these values.
"""


def write_methods_page(path: Path, step: Path, memory: Path, golden: Path, command: str) -> None:
    """Write the page.

    Args:
        path: of the Markdown file.
        step: report of ``tools/bench.py step --json``.
        memory: report of ``tools/bench.py memory --json``.
        golden: folder of the reference values.
        command: the command that makes the page.

    Raises:
        InputError: a report cannot be read.
    """
    reports = [_report(step), _report(memory)]
    costs = [{row["name"]: row["ratio"]["median"] for row in report["rows"]} for report in reports]
    lines = [COLUMNS, ["---"] * len(COLUMNS)]
    for name in sorted(distiller_dict):
        step_ratio, memory_ratio = (f"{cost[name]:.2f}" if name in cost else "-" for cost in costs)
        lines.append([*facts(name), step_ratio, memory_ratio, str(golden_cases(name, golden) or "-")])
    measured = "; ".join(
        f"{report['what']}: {report['teacher'].split(',')[0]} to {report['student']}, {report['data']}, "
        f"{report['precision']}, {report['machine']['processor']}, {report['date'][:10]}"
        for report in reports
    )
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    path.write_text(INTRODUCTION.format(command=command, measured=f"Measured as {measured}.") + "\n" + table + "\n")


def facts(name: str) -> list[str]:
    """The columns that are read from the code."""
    cls = distiller_dict[name]
    fields = [field.removeprefix("image_") if field != "image" else "one view" for field in contract_of(cls).views]
    batch = fields + (["negatives"] if contract_of(cls).negatives else [])
    cfg = CFG.clone()
    cfg.merge_from_list(["DISTILLER.TYPE", name])
    extra = _build(cfg, "resnet32x4", "resnet8x4", 100).get_extra_parameters()
    used = ", ".join(OUTPUTS[key] for key in teacher_outputs(cfg)) if contract_of(cls).teacher else ""
    return [
        f"`{name}`", getattr(cls, "paper", "") or "-", getattr(cls, "family", "") or "-", ", ".join(batch), used or "-",
        f"{extra:,}",
    ]  # fmt: skip


def teacher_outputs(cfg: Any) -> list[str]:
    """The outputs of the teacher that the losses of the method in ``cfg`` use, found by noise on each output."""
    reference = _losses(cfg, "")
    return [key for key in OUTPUTS if not torch.equal(_losses(cfg, key), reference)]


def golden_cases(name: str, golden: Path) -> int:
    """The number of sets of reference values for the method in ``golden``."""
    cases = [case for file in sorted(golden.glob("losses*/*.json")) for case in json.loads(file.read_text())]
    return sum(case["method"] == GOLDEN_NAMES.get(name, name.lower()) for case in cases)


def _losses(cfg: Any, disturbed: str) -> Tensor:
    """The losses on one small random batch, with noise on the teacher's output ``disturbed``."""
    distiller = _build(cfg, "resnet14", "resnet8", 10)

    def disturb(module: nn.Module, args: Any, output: Any) -> Any:
        logits, features = output
        generator = torch.Generator().manual_seed(1)

        def noisy(value: Any) -> Any:
            if isinstance(value, list):
                return [noisy(part) for part in value]
            return value + torch.randn(value.shape, generator=generator)

        outputs = {"logits": logits, **features}
        outputs = {key: noisy(value) if key == disturbed else value for key, value in outputs.items()}
        return outputs.pop("logits"), outputs

    distiller.teacher.register_forward_hook(disturb)
    generator = torch.Generator().manual_seed(0)
    cls, images = type(distiller), 8
    batch = {field: torch.randn(images, 3, 16, 16, generator=generator) for field in contract_of(cls).views}
    batch |= {"target": torch.arange(images), "index": torch.arange(images)}
    if contract_of(cls).negatives:
        batch["contrastive_index"] = torch.arange(images).repeat(images, 1)
    torch.manual_seed(0)
    _, losses = distiller(**batch, epoch=1)
    return torch.stack([loss.detach().mean() for loss in losses.values()])


def _build(cfg: Any, teacher: str, student: str, classes: int) -> nn.Module:
    torch.manual_seed(0)
    networks = [cifar_model_dict[name](num_classes=classes) for name in (student, teacher)]
    further = {
        key: cifar_model_dict[student](num_classes=classes)
        for key in getattr(distiller_dict[cfg.DISTILLER.TYPE], "networks", {})
    }
    return build_distiller(cfg, *networks, num_data=50, networks=further).train()


def _report(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read the measurement {path}: {error}; make it with tools/bench.py --json {path}"
        ) from None
