"""Method files in the style of other projects, and a fixture that resets the registries after each test."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mdistiller import plugins
from mdistiller.engine.cfg import CFG
from mdistiller.registry import dataset_dict, distiller_dict, task_dict

# The style of public files: imports from the package, settings read in the constructor, a regressor added by hand to
# the learned parameters, warm-up by the epoch.
FEATURE = """
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from ._base import Distiller
    from ._common import ConvReg, get_feat_shapes
    from .KD import kd_loss

    class HintPlus(Distiller):
        def __init__(self, student, teacher, cfg):
            super(HintPlus, self).__init__(student, teacher)
            self.ce = cfg.HintPlus.LOSS.CE
            self.feat = cfg.HintPlus.LOSS.FEAT
            self.layer = cfg.HintPlus.layer
            self.tau = cfg.KD.TEMPERATURE
            shapes_s, shapes_t = get_feat_shapes(self.student, self.teacher, cfg.HintPlus.SIZE)
            self.reg = ConvReg(shapes_s[self.layer], shapes_t[self.layer])

        def get_learnable_parameters(self):
            return super().get_learnable_parameters() + list(self.reg.parameters())

        def get_extra_parameters(self):
            return sum(p.numel() for p in self.reg.parameters())

        def forward_train(self, image, target, **kwargs):
            z_s, f_s = self.student(image)
            with torch.no_grad():
                z_t, f_t = self.teacher(image)
            loss = F.mse_loss(self.reg(f_s["feats"][self.layer]), f_t["feats"][self.layer])
            ramp = min(kwargs["epoch"] / 2, 1.0)
            return z_s, {
                "loss_ce": self.ce * F.cross_entropy(z_s, target),
                "loss_kd": ramp * self.feat * loss + kd_loss(z_s, z_t, self.tau),
            }
"""
FEATURE_SETTINGS = {"LOSS": {"CE": 1.0, "FEAT": 10}, "layer": 2, "SIZE": "(8, 8)"}

# An import by accident that servers lack, an unused helper, two views, a key in a section of the library.
TWO_VIEWS = """
    from no_such_toolkit import st
    import torch
    import torch.nn.functional as F
    from ._base import Distiller
    from .smoothing import smoothed

    class WeakStrong(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.scale = cfg.EXPERIMENT.SCALED
            self.tau = cfg.KD.TEMPERATURE

        def forward_train(self, image_weak, image_strong, target, **kwargs):
            weak, _ = self.student(image_weak)
            strong, _ = self.student(image_strong)
            return weak, {"loss_ce": smoothed(weak, target) + smoothed(strong, target)}
"""
SMOOTHING = """
    import torch.nn.functional as F

    def smoothed(logits, target):
        return F.cross_entropy(logits, target, label_smoothing=0.1)
"""

# A memory bank: num_data, index, contrastive_index, no **kwargs, a loss of shape (1,), another name for each parameter.
MEMORY = """
    import torch
    import torch.nn as nn
    import torch.nn.functional as F
    from mdistiller.distillers._base import Distiller

    class Bank(Distiller):
        def __init__(self, model_s, model_t, config, n):
            super().__init__(model_s, model_t)
            self.k = config.CRD.NCE.K
            self.head = nn.Linear(64, 8)
            self.register_buffer("bank", F.normalize(torch.randn(n, 8), dim=1))

        def get_learnable_parameters(self):
            return super().get_learnable_parameters() + list(self.head.parameters())

        def forward_train(self, image, target, index, contrastive_index):
            assert contrastive_index.shape == (len(image), self.k + 1)
            assert (contrastive_index[:, 0] == index).all()
            logits, features = self.student(image)
            query = F.normalize(self.head(features["pooled_feat"]), dim=1)
            score = (self.bank[contrastive_index] @ query[:, :, None]).squeeze(2)
            nce = F.cross_entropy(score / 0.1, torch.zeros_like(target))
            return logits, {"loss_ce": F.cross_entropy(logits, target), "loss_kd": nce.view(1)}
"""

# Code for GPUs only, in the constructor or at each step.
CUDA_IN_STEP = """
    import torch
    import torch.nn.functional as F
    from ._base import Distiller

    class NeedsGpu(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)

        def forward_train(self, image, target, **kwargs):
            logits, _ = self.student(image)
            weight = torch.ones(len(image)).cuda()
            return logits, {"ce": (weight * F.cross_entropy(logits, target, reduction="none")).mean()}
"""
CUDA_IN_CONSTRUCTOR = CUDA_IN_STEP.replace(
    "super().__init__(student, teacher)", "super().__init__(student, teacher); self.w = torch.ones(1).cuda()"
)

WITH_DEFAULTS = """
    import torch.nn.functional as F
    from mdistiller.distillers import Distiller

    DEFAULTS = {"SCALE": 2.0, "MODE": "soft"}

    class Stated(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.scale = cfg.STATED.SCALE

        def forward_train(self, image, target, **kwargs):
            logits, _ = self.student(image)
            return logits, {"loss_ce": self.scale * F.cross_entropy(logits, target)}
"""

# A task of its own with a data set and a method for it: where is the bright square?
SQUARES = """
    import torch
    import torch.nn.functional as F
    from mdistiller.dataset.base import DataSet, Split, register_dataset
    from mdistiller.distillers import Distiller, register_distiller
    from mdistiller.engine.task import Measure, Task
    from mdistiller.registry import task_dict

    class Regression(Task):
        measures = (
            Measure("mae", "mae", "MAE", "px", digits=3, higher_is_better=False),
            Measure("mse", "mse", "MSE", higher_is_better=False),
        )
        meters = measures[:1]

        def means(self, output, target):
            return [(output - target.view_as(output)).abs().mean()]

        def sums(self, output, target):
            error = output - target.view_as(output)
            return torch.stack([error.abs().mean(1).sum(), error.square().mean(1).sum()])

    task_dict["regression"] = Regression

    @register_dataset("squares")
    class Squares(DataSet):
        task = "regression"
        num_classes = 2  # outputs: row and column
        image_size = 8
        mean = std = (0.5, 0.5, 0.5)
        model_family = "cifar"
        views = {"weak": (), "plain": ()}

        def load(self):
            return self.drawn(self.image_size, 40, 1), self.drawn(self.image_size, 24, 2)

        @staticmethod
        def drawn(size, count, seed):
            corners = torch.randint(0, size - 2, (count, 2), generator=torch.Generator().manual_seed(seed))
            images = torch.zeros(count, 3, size, size, dtype=torch.uint8)
            for image, (row, column) in zip(images, corners.tolist()):
                image[:, row : row + 3, column : column + 3] = 255
            return Split(images, corners.float() - 3)

    @register_distiller("MIMIC", {"WEIGHT": 0.1})
    class Mimic(Distiller):
        def __init__(self, student, teacher, cfg):
            super().__init__(student, teacher)
            self.weight = cfg.MIMIC.WEIGHT

        def forward_train(self, image, target):
            output, _ = self.student(image)
            with torch.no_grad():
                of_teacher, _ = self.teacher(image)
            mimic = self.weight * F.mse_loss(output, of_teacher)
            return output, {"mse": F.mse_loss(output, target), "mimic": mimic}

    @register_distiller("PLAIN_SQUARES")
    class Plain(Distiller):
        def __init__(self, student):
            super().__init__(student)

        def forward_train(self, image, target):
            output, _ = self.student(image)
            return output, {"mse": F.mse_loss(output, target)}
"""


# A fork: defaults in engine/cfg.py, a key of the library with another meaning, a file in a sub-folder, helpers above
# it, more than two returned values, and code that must not be executed.
FORKS_CFG = """
    import os
    from yacs.config import CfgNode as CN

    CFG = CN()
    CFG.SOLVER = CN()
    CFG.SOLVER.EPOCHS = 999
    CFG.SOLVER.ALPHA = 31.0
    CFG.KD = CN()
    CFG.KD.TEMPERATURE = 7
    CFG.NEWKD = CN()
    CFG.NEWKD.LOSS = CN()
    CFG.NEWKD.LOSS.CE_WEIGHT = 2.0
    CFG.NEWKD.SHAPES = [1, 8]
    CFG.NEWKD.UNREAD = "word"
    CFG.NEWKD.ROOT = os.environ["NOT_THERE"]
    CFG.OTHER = CN()
    CFG.OTHER.KEY = 1
"""
FORKS_METHOD = """
    import torch.nn.functional as F
    from .._base import Distiller
    from ..KD import kd_loss, halved
    from ..tricks import doubled

    class NEWKD(Distiller):
        def __init__(self, student, teacher, cfg):
            super(NEWKD, self).__init__(student, teacher)
            self.given = cfg.SOLVER.ALPHA, cfg.KD.TEMPERATURE, cfg.SOLVER.EPOCHS
            self.ce, self.shapes, self.mode = cfg.NEWKD.LOSS.CE_WEIGHT, cfg.NEWKD.SHAPES, cfg.NEWKD.MODE

        def forward_train(self, image, target, **kwargs):
            logits, _ = self.student(image)
            return logits, {"loss_ce": doubled(halved(self.ce * F.cross_entropy(logits, target)))}, logits, target
"""


def write_fork(root: Path) -> Path:
    """A fork's tree; returns the method file."""
    package = root / "mdistiller"
    write(package / "engine", "cfg", FORKS_CFG)
    write(package / "distillers", "tricks", "from .KD import halved\ndef doubled(x): return 2 * x\n")
    write(package / "distillers", "KD", "def kd_loss(*args): ...\ndef halved(x): return x / 2\n")
    write(package / "distillers" / "new", "__init__", "CFG.NEWKD.MODE = 'soft'\nraise SystemExit('executed')\n")
    return write(package / "distillers" / "new", "NEWKD", FORKS_METHOD)


def write(folder: Path, name: str, text: str) -> Path:
    """A file like those in another project's ``distillers`` folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.py"
    path.write_text(textwrap.dedent(text))
    return path


@contextmanager
def forgotten() -> Iterator[None]:
    """Remove all methods, data sets, tasks and settings that a test has registered or loaded."""
    tables = [(table, dict(table)) for table in (distiller_dict, dataset_dict, task_dict, plugins._loaded)]
    modules = set(sys.modules)
    tree, frozen = CFG.clone(), CFG.is_frozen()
    try:
        yield
    finally:
        for table, content in tables:
            table.clear()
            table.update(content)
        for name in set(sys.modules) - modules:
            if name.startswith("mdistiller.distillers."):
                del sys.modules[name]
        CFG.defrost()
        CFG.clear()
        CFG.update(tree)
        if frozen:
            CFG.freeze()
