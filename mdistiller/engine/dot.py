"""DOT: two momenta, a longer one for the distillation.

Zhao, Cui, Song, Liang. DOT: A Distillation-Oriented Trainer. ICCV 2023. arXiv:2307.08436. Equations are the paper's.

Cross-entropy and distillation have separate gradients. Each gradient has its own momentum buffer, with
``momentum - delta`` for the cross-entropy and ``momentum + delta`` for the distillation (Eq. 5). So the distillation's
direction dominates. A step is the sum of both.

As in the authors' code: weight decay is part of the cross-entropy's gradient. Parameters with only one of the two
gradients, such as a method's adapters, have the plain momentum; if that gradient is the distillation's, weight decay
begins at their second step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.registry import InputError

from .solver import parameter_groups
from .trainer import BaseTrainer, trainer_dict


class DistillationOrientedTrainer(torch.optim.Optimizer):
    """SGD with a momentum of its own for each of two gradients.

    Call ``backward`` of the distillation's loss, :meth:`step_kd`, ``zero_grad``, ``backward`` of the task's loss and
    :meth:`step`. The names are mdistiller's.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        momentum: of the task's gradient.
        momentum_kd: of the distillation's gradient.
        dampening: as in ``torch.optim.SGD``; not in a buffer's first step.
        weight_decay: as in ``torch.optim.SGD``, on the task's gradient.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.0,
        momentum_kd: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "momentum_kd": momentum_kd}
        settings |= {"dampening": dampening, "weight_decay": weight_decay}
        for name, value in settings.items():
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, got {value}")
        super().__init__(params, settings)
        self.kd_gradients: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def step_kd(self) -> None:
        """Keep the current gradients as the distillation's for the next :meth:`step`."""
        parameters = (p for group in self.param_groups for p in group["params"])
        self.kd_gradients = {p: p.grad for p in parameters if p.grad is not None}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the parameters with the current gradients, the task's, and those of :meth:`step_kd`.

        Args:
            closure: computes the task's loss again and calls its ``backward``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            task = {p: p.grad for p in group["params"] if p.grad is not None}
            kd = {p: self.kd_gradients[p] for p in group["params"] if p in self.kd_gradients}
            middle = (group["momentum"] + group["momentum_kd"]) / 2
            for p, gradient in task.items():
                decayed = gradient.add(p, alpha=group["weight_decay"]) if group["weight_decay"] else gradient
                momentum = group["momentum"] if p in kd else middle
                self._move(p, "momentum_buffer", decayed, momentum, group)
            for p, gradient in kd.items():
                alone = p not in task
                if alone and group["weight_decay"] and "momentum_kd_buffer" in self.state[p]:
                    gradient = gradient.add(p, alpha=group["weight_decay"])
                self._move(p, "momentum_kd_buffer", gradient, middle if alone else group["momentum_kd"], group)
        self.kd_gradients = {}
        return loss

    def _move(self, p: nn.Parameter, name: str, gradient: Tensor, momentum: float, group: dict[str, Any]) -> None:
        state = self.state[p]
        if name not in state:
            state[name] = gradient.clone()
        else:
            state[name].mul_(momentum).add_(gradient, alpha=1 - group["dampening"])
        p.add_(state[name], alpha=-group["lr"])


class DOT(BaseTrainer):
    """The loop with :class:`DistillationOrientedTrainer`: ``SOLVER.TRAINER`` ``dot``, and ``SOLVER.DOT.DELTA``.

    The task's losses are those with the name ``ce`` or ``loss_ce``, with or without an ending (``loss_ce_virtual``).
    All other losses are the distillation's.
    """

    backward_passes = 2

    def init_optimizer(self, cfg: Any) -> DistillationOrientedTrainer:
        solver, delta = cfg.SOLVER, cfg.SOLVER.DOT.DELTA
        if solver.TYPE != "SGD" or solver.NESTEROV:
            optimizer = f"SOLVER.TYPE {solver.TYPE}" + (" with SOLVER.NESTEROV" if solver.NESTEROV else "")
            raise InputError(f"SOLVER.TRAINER {solver.TRAINER} has SGD without Nesterov's momentum, got {optimizer}")
        if solver.AMP == "fp16":
            raise InputError(
                f"SOLVER.TRAINER {solver.TRAINER} has two gradients, but the loss scaling of SOLVER.AMP fp16 handles "
                "only one; use bf16"
            )
        if not 0 <= delta <= min(solver.MOMENTUM, 1 - solver.MOMENTUM):
            raise InputError(
                f"SOLVER.DOT.DELTA must leave both momenta, {solver.MOMENTUM} - DELTA and {solver.MOMENTUM} + DELTA, "
                f"between 0 and 1, got {delta}"
            )
        return DistillationOrientedTrainer(
            parameter_groups(cfg, self.distiller),
            lr=solver.LR,
            momentum=solver.MOMENTUM - delta,
            momentum_kd=solver.MOMENTUM + delta,
            weight_decay=solver.WEIGHT_DECAY,
        )

    def update(self, losses: dict[str, Tensor]) -> None:
        task = [loss for name, loss in losses.items() if is_task(name)]
        distillation = [loss for name, loss in losses.items() if not is_task(name)]
        if not (task and distillation):
            raise InputError(
                f"SOLVER.TRAINER {self.cfg.SOLVER.TRAINER} needs a method with a cross-entropy and a distillation "
                f"loss; {self.cfg.DISTILLER.TYPE} has {', '.join(losses)}"
            )
        self.optimizer.zero_grad(set_to_none=True)
        sum(distillation).backward(retain_graph=True)
        self.parallel.after_backward()
        self.optimizer.step_kd()
        self.optimizer.zero_grad(set_to_none=True)
        sum(task).backward()
        self.parallel.after_backward()
        self.optimizer.step()


def is_task(name: str) -> bool:
    """Whether a loss of this name is a cross-entropy on labels."""
    return name.removeprefix("loss_").split("_")[0] == "ce"


trainer_dict["dot"] = DOT
trainer_dict["crd_dot"] = DOT  # mdistiller's name for DOT with an index in the batch
