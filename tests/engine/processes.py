"""What one of two processes does for ``test_distributed.py``: everything in one go, since starting them takes seconds.

Each task gets the rank and a folder that both share, and returns what the tests look at.
"""

from __future__ import annotations

import datetime
import hashlib
import os
import signal
import time
import traceback
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from method_cases import METHODS, build, config, make_batch
from runs import make_trainer, teacher_file, tiny_config
from torch import nn

from mdistiller import messages
from mdistiller.distillers import Distiller
from mdistiller.engine import hooks
from mdistiller.engine.build import build_distiller
from mdistiller.engine.dot import DOT
from mdistiller.engine.folder.checkpoint import DiskFullError
from mdistiller.engine.forwards.fold import Folding
from mdistiller.engine.processes import distributed
from mdistiller.engine.processes.parallel import Parallel, SyncBatchNorm, average_gradients, shares
from mdistiller.engine.run import run
from mdistiller.engine.task import Classification
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.functional.gather import batch_of_processes, gather_with_gradient
from mdistiller.registry import InputError, distiller_dict

WORLD = 2
SIZES = (8, 7, 8)  # images in the steps of a method; 7 do not divide, as at the end of an epoch
EPOCHS = (1, 1, 2)
# Losses per image: without SOLVER.GATHER too, two processes compute what one does.
PER_IMAGE = ["NONE", "NONE_TWO_VIEWS", "KD", "KD_TWO_VIEWS"]
RUN = {"DISTILLER__TYPE": "KD", "SOLVER__BATCH_NORM": "sync", "SOLVER__EMA_DECAY": 0.5, "LOG__SAVE_EVERY_STEPS": 3,
       "DATASET__TEST__BATCH_SIZE": 250, "DATASET__VAL_FRACTION": 0.2}  # fmt: skip
PREPARED = {"DISTILLER__TYPE": "MDR", "SOLVER__BATCH_NORM": "sync", "SOLVER__GATHER": True, "SOLVER__EPOCHS": 1,
            "SOLVER__LR_DECAY_STAGES": [], "MDR__SM_EPOCHS": 1, "MDR__SM_LR_DECAY_STAGES": [],
            "MDR__SM_WIDTH": 16}  # fmt: skip


def main(rank: int, folder: str) -> None:
    """Do all tasks and leave their results, or the traceback, in ``folder/RANK``."""
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    place, found = Path(folder), {}
    with processes(rank, place / "first"):
        for task in (decisions, rows, training, gathering, trainers, runs, signals, stops):
            try:
                found[task.__name__] = task(rank, place)
            except Exception:
                found[task.__name__] = traceback.format_exc()
                print(found[task.__name__], flush=True)
    if rank == 0:  # alone, in between
        found["alone"] = go_on(place, 2)
        (place / "alone").touch()
    while not (place / "alone").exists():
        time.sleep(0.05)
    with processes(rank, place / "second"):
        found["together"] = go_on(place, 3)
    torch.save(found, place / str(rank))


@contextmanager
def processes(rank, meeting):
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=WORLD, timeout=timeout)
    yield
    distributed.stop()


# What processes tell each other


def raised(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__, str(error), getattr(error, "told_elsewhere", False)


class Stubborn(Exception):
    """Cannot be unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} {second}")


def fail_in(rank, error):
    """A function that fails in one process."""

    def work():
        with distributed.same_error():
            if distributed.rank() == rank:
                raise error

    return work


def decisions(rank, folder):
    poll, order = distributed.DelayedMax(), []

    def note():
        order.append(time.monotonic())
        if distributed.local_rank() == 0:
            time.sleep(0.1)
        return rank, time.monotonic()

    asked = [poll(5 * rank), poll(0), poll(3 * rank)]
    poll.close()
    return {
        "poll": asked,
        "highest": distributed.highest(rank == 1),
        "total": distributed.total(torch.tensor([rank + 1.0])),
        "objects": distributed.gather_objects({"rank": rank}),
        "first": distributed.on_first_process(lambda: f"of {rank}"),
        "fine": raised(fail_in(5, InputError("none"))),
        "error of 0": raised(
            lambda: distributed.on_first_process(lambda: (_ for _ in ()).throw(InputError("no such file")))
        ),
        "error of 1": raised(fail_in(1, InputError("mine"))),
        "stubborn": raised(fail_in(1, Stubborn("a", "b"))),
        "one by machine": distributed.one_process_per_machine(note),
        "began": order,
    }


# What travels with gradient


def rows(rank, folder):
    """Three rows in the one, two in the other process."""
    counts = shares(5, WORLD)
    own = torch.arange(10.0).view(5, 2).split(counts)[rank].clone().requires_grad_()
    factors = torch.arange(10.0).view(5, 2) ** 2
    with batch_of_processes(counts):
        whole = gather_with_gradient(own)
        twice = gather_with_gradient(torch.cat([own.detach()] * 2))
    (whole * factors).sum().mul(rank + 1).backward()
    image = torch.randn(3, 2, 4, 4).to(memory_format=torch.channels_last)
    return {
        "whole": whole.detach(),
        "gradient": own.grad,
        "twice": len(twice),
        "layout": gather_with_gradient(image).is_contiguous(memory_format=torch.channels_last),
        "wrong": raised(lambda: _gather_odd(counts)),
        "norm": normalised(rank),
        "average": averaged(rank),
    }


def _gather_odd(counts):
    with batch_of_processes(counts):
        gather_with_gradient(torch.zeros(7, 2))


def norm_case():
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) * 2 + 1
    return nn.BatchNorm2d(3).double(), image, torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)


def normalised(rank):
    """BatchNorm over both processes: output, statistics, and both gradients."""
    norm, image, factors = norm_case()
    norm.__class__ = SyncBatchNorm
    image, factors = (part.split(shares(5, WORLD))[rank] for part in (image, factors))
    image = image.clone().requires_grad_()
    output = norm(image)
    (output * factors).sum().backward()
    gradient = distributed.total(norm.weight.grad)
    return {"output": output.detach(), "image": image.grad, "gradient": gradient, **norm.state_dict()}


def averaged(rank):
    module = nn.ParameterList([nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(1))])
    module[0].grad = torch.full((2,), rank + 1.0)
    if rank == 1:
        module[1].grad = torch.full((3,), 4.0)
    lacking = average_gradients(module)
    return lacking, [p.grad for p in module]


# Methods


def digest(state):
    """Of all bits of a state dict."""
    sha = hashlib.sha256()
    for name, value in state.items():
        sha.update(name.encode() + value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def train(distiller, method, gather=False, batch_norm="local", dtype=torch.float32, rank=0):
    """Steps on other images each; their losses."""
    parallel = Parallel(distiller, gather, batch_norm)
    optimizer = torch.optim.SGD(distiller.get_learnable_parameters(), lr=0.02, momentum=0.9)
    history = []
    for step, (images, epoch) in enumerate(zip(SIZES, EPOCHS, strict=True)):
        if step == 0 or epoch != EPOCHS[step - 1]:
            parallel.begin_epoch()
        batch = make_batch(method, images, seed=step, dtype=dtype)
        if distributed.world_size() == 1:
            logits, losses = distiller(**batch, epoch=epoch)
        else:
            batch = {name: value.split(shares(images, WORLD))[rank] for name, value in batch.items()}
            logits, losses = parallel({**batch, "epoch": epoch}, images)
        assert len(logits) == len(batch["target"])
        losses = {name: loss.mean() for name, loss in losses.items()}
        optimizer.zero_grad()
        sum(parallel.weighted(losses).values()).backward()
        parallel.after_backward()
        optimizer.step()
        history.append({name: loss.detach() for name, loss in losses.items()})
    parallel.average_statistics()
    return history


class Fickle(Distiller):
    """An adapter that is only used in the second epoch, and one only in process 0."""

    def __init__(self, student):
        super().__init__(student)
        self.late, self.sometimes = nn.Linear(10, 10), nn.Linear(10, 10)
        self.register_buffer("seen", torch.zeros(1))

    def forward_train(self, image, target, epoch, index, **kwargs):
        logits, _ = self.student(image)
        self.seen += image.sum().detach()
        losses = {"ce": nn.functional.cross_entropy(logits, target)}
        if epoch > 1:
            losses["late"] = self.late(logits).square().mean()
        if 0 in index:
            losses["sometimes"] = self.sometimes(logits).square().mean()
        return logits, losses


class Headed(Fickle):
    """Predicts by an adapter; processes differ in what ``seen`` holds, which belongs to what is deployed then."""

    def forward_test(self, image):
        return self.late(self.student(image)[0])

    def forward_train(self, image, target):
        self.seen += image.sum()
        logits = self.forward_test(image)
        return logits, {"ce": nn.functional.cross_entropy(logits, target)}


def fickle():
    torch.manual_seed(0)
    return Fickle(build("NONE").student).train()


def attempt(function, *args, **kwargs):
    try:
        return function(*args, **kwargs)
    except Exception:
        return traceback.format_exc()


def train_each(rank, cases, dtype=torch.float32, **options):
    found = {}
    for method in cases:
        distiller = build(method).to(dtype)
        history = attempt(train, distiller, method, dtype=dtype, rank=rank, **options)
        found[method] = {"losses": history, "state": distiller.state_dict()}
    return found


def training(rank, folder):
    """Every method on its process's own images, with BatchNorm of its own."""
    found = train_each(rank, METHODS)
    for result in found.values():
        result["digest"] = digest(result.pop("state"))
    distiller, output = fickle(), []
    losses = attempt(train, distiller, "NONE", rank=rank)
    parallel = Parallel(distiller, False, "local")  # gives all the first one's buffers
    distiller.seen += rank
    with printed(output):
        parallel.warn_of_differing_buffers()
    state = distiller.state_dict()
    state.pop("seen")
    return {
        "methods": found,
        "fickle": {"losses": losses, "digest": digest(state), "warned": "".join(output)},
        "searches": {name: searches(name) for name in ("KD", "fickle")},
        "per image": train_each(rank, PER_IMAGE, torch.float64, batch_norm="sync"),
    }


def searches(name):
    """Whether parameters without gradient are looked for after a step."""
    distiller = fickle() if name == "fickle" else build(name)
    parallel = Parallel(distiller, False, "local")
    parallel.begin_epoch()
    _, losses = parallel({**make_batch("NONE"), "epoch": 1}, 2 * len(make_batch("NONE")["target"]))
    sum(losses.values()).backward()
    parallel.after_backward()
    return parallel.wrapper.find_unused_parameters


@contextmanager
def printed(lines):
    messages.print = lambda text, **_: lines.append(text)
    yield
    del messages.print


def gathering(rank, folder):
    """Every method on the images of both processes."""
    found = train_each(rank, METHODS, torch.float64, gather=True, batch_norm="sync")
    distiller = build_distiller(config("KD", {"DISTILLER.ADD_KD": 0.5}), *networks("KD")).double().train()
    folding = Folding(distiller.teacher, (32, 32))
    losses = attempt(train, distiller, "KD", True, "sync", torch.float64, rank)
    compiled = build("KD").double()
    compiled.student._compiled_call_impl = compiled.student._call_impl  # as student.compile() does
    of_compiled = attempt(train, compiled, "KD", True, "sync", torch.float64, rank)
    return {
        "methods": found,
        "added": {"losses": losses, "state": distiller.state_dict(), "folded": (folding.calls, folding.agrees)},
        "compiled": {"losses": of_compiled, "state": compiled.state_dict()},
    }


def networks(method):
    distiller = build(method)
    return distiller.student, distiller.teacher


class Forgetful(BaseTrainer):
    """Knows nothing of several processes."""

    def update(self, losses):
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self.optimizer.step()


def trainer_of(cls, folder):
    """Of a run that takes seconds; its weights are those of one process."""
    made = make_trainer(
        folder, DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT=teacher_file(folder.parent), SOLVER__EPOCHS=1,
        SOLVER__LR_DECAY_STAGES=[], SOLVER__BATCH_NORM="sync",
    )  # fmt: skip
    return cls(f"{cls.__name__}", made.distiller, made.train_loader, made.val_loader, made.cfg)


def trainers(rank, folder):
    distributed.on_first_process(lambda: teacher_file(folder))
    dot = trainer_of(DOT, folder / "two")  # with two backward passes
    dot.train()
    return {"dot": dot.distiller.student.state_dict(), "forgetful": raised(trainer_of(Forgetful, folder / "two").train)}


# Runs


def runs(rank, folder):
    """One epoch of a run with everything; a stage before the training; what is refused."""
    teacher = distributed.on_first_process(lambda: teacher_file(folder))
    values = {**RUN, "DISTILLER__TEACHER_CKPT": teacher}
    results = run(tiny_config(folder / "run", **{**values, "SOLVER__EPOCHS": 1}))
    prepared = run(tiny_config(folder / "prepared", **PREPARED, DISTILLER__TEACHER_CKPT=teacher))
    again = run(tiny_config(folder / "prepared", **PREPARED, DISTILLER__TEACHER_CKPT=teacher, EXPERIMENT__NAME="b"))
    distiller_dict["HEADED"] = Headed
    headed = run(tiny_config(folder / "headed", **{**RUN, "DISTILLER__TYPE": "HEADED", "SOLVER__EPOCHS": 1}))
    tried = []
    loader = make_trainer(folder / "loader").val_loader
    Classification().evaluate(build("NONE").student, loader, on_batch=lambda: tried.append(1))
    return {
        "results": results,
        "prepared": {"results": prepared, "again": again["preparation"]["from_file"]},
        "headed": headed,
        "batches of test": len(tried),
        "odd batch": raised(lambda: make_trainer(folder / "odd", SOLVER__BATCH_SIZE=9)),
        "tiny batch": raised(lambda: make_trainer(folder / "tiny", SOLVER__BATCH_SIZE=28)),
        "held": raised(lambda: run(tiny_config(folder / "run", **values))),
        "loader": raised(lambda: _with_undivided_loader(folder)),
    }


def _with_undivided_loader(folder):
    trainer = make_trainer(folder / "undivided")
    trainer.train_loader.sampler.share = (0, 1)
    type(trainer)("undivided", trainer.distiller, trainer.train_loader, trainer.val_loader, trainer.cfg)


def go_on(folder, epochs):
    """The run of ``runs``, until a later epoch."""
    teacher = str(folder / "resnet8_10")
    cfg = tiny_config(folder / "run", **{**RUN, "DISTILLER__TEACHER_CKPT": teacher, "SOLVER__EPOCHS": epochs})
    return run(cfg, resume=True)


def signals(rank, folder):
    """A signal reaches one process after two steps; both leave after the same one."""
    trainer = make_trainer(folder / "signal")
    stop = next(hook for hook in trainer.hooks if isinstance(hook, hooks.StopSignals))
    _at_step(trainer, 2, lambda: rank == 1 and stop._receive(signal.SIGTERM, None))
    error = raised(trainer.train)
    stop._receive(signal.SIGTERM, None)  # torchrun's echo: does not kill
    return {"error": error, "step": trainer.step, "number": stop.received}


def stops(rank, folder):
    """A loss that is not finite in one process, a disk that is full in the first."""
    trainer = make_trainer(folder / "nan")

    def spoil():
        if rank == 1:
            with torch.no_grad():
                next(trainer.distiller.parameters()).fill_(torch.nan)

    _at_step(trainer, 2, spoil)
    found = {"not finite": raised(trainer.train), "step": trainer.step}
    full = make_trainer(folder / "full")

    def fail(*args, **kwargs):
        raise DiskFullError("no space left")

    original, hooks.save_checkpoint = hooks.save_checkpoint, fail
    found["full"] = raised(full.train)
    hooks.save_checkpoint = original
    return found


def _at_step(trainer, step, action):
    """Have something happen after a step, before its hooks."""
    original = trainer.run_step

    def run_step(batch):
        output = original(batch)
        if trainer.step + 1 == step:
            action()
        return output

    trainer.run_step = run_step


def alone(method, dtype=torch.float64) -> tuple[Any, dict[str, torch.Tensor]]:
    """What one process with the whole batches finds."""
    distiller = build(method).to(dtype)
    return train(distiller, method, dtype=dtype), distiller.state_dict()
