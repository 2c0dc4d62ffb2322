"""Compiled networks, fused optimisers and kept memory change how long a step takes, not what comes out of it."""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys

import pytest
import torch
from runs import make_trainer, teacher_file, tiny_config

from mdistiller.distillers import Distiller
from mdistiller.engine.batch import to_batch
from mdistiller.engine.forwards import compile as acceleration
from mdistiller.engine.forwards.compile import begin_step, check_compiler, keep_freed_memory
from mdistiller.engine.forwards.precision import Precision
from mdistiller.engine.solver import build_optimizer
from mdistiller.registry import InputError

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


def losses_of(trainer) -> list[float]:
    trainer.distiller.train()
    return [trainer.run_step(to_batch(item, trainer.precision)).total.item() for item in trainer.train_loader]


@pytest.fixture
def kd(tmp_path):
    """Makes trainers of KD on the tiny digits."""
    number = iter(range(9))

    def make(**values):
        file = teacher_file(tmp_path)
        folder = tmp_path / str(next(number))
        return make_trainer(folder, DISTILLER__TYPE="KD", DISTILLER__TEACHER_CKPT=file, **values)

    return make


def test_the_teacher_of_a_run_is_folded_unless_told_otherwise(kd):
    fast, plain = kd(), kd(SOLVER__FAST_TEACHER=False)
    assert fast.foldings["teacher"].active
    assert not any("forward" in vars(network) for network in plain.distiller.modules())
    assert losses_of(fast) == pytest.approx(losses_of(plain), rel=1e-4)
    assert fast.foldings["teacher"].active and fast.foldings["teacher"].agrees
    assert fast.distiller.state_dict().keys() == plain.distiller.state_dict().keys()


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("which", ["teacher", "all"])
def test_compiled_networks_give_the_same_losses(kd, which, weight):
    compiled, plain = kd(SOLVER__COMPILE=which, DISTILLER__ADD_KD=weight), kd(DISTILLER__ADD_KD=weight)
    assert losses_of(compiled) == pytest.approx(losses_of(plain), rel=1e-3)
    assert compiled.distiller.state_dict().keys() == plain.distiller.state_dict().keys()


@pytest.mark.parametrize("which", ["teacher", "all"])
def test_what_is_compiled_and_what_is_not(kd, monkeypatch, which):
    """By a stand-in for the compiler, which takes half a minute."""
    seen = []
    monkeypatch.setattr(torch, "compile", lambda graph, **options: seen.append(options) or graph)
    compiled = {"dynamic": False, "mode": "default"}
    trainer = kd(SOLVER__COMPILE=which)
    expected = losses_of(kd())
    assert seen[0] == compiled
    student = trainer.distiller.student
    assert (student._compiled_call_impl is not None) == (which == "all")
    assert copy.deepcopy(student)._compiled_call_impl is None
    with torch.compiler.set_stance("force_eager"):
        assert losses_of(trainer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fast", [True, False])
def test_added_kd_listens_outside_of_compiled_code(kd, monkeypatch, fast):
    calls = []
    monkeypatch.setattr(
        torch, "compile", lambda function, **options: lambda *args: calls.append(function) or function(*args)
    )
    trainer = kd(SOLVER__COMPILE="all", SOLVER__FAST_TEACHER=fast, DISTILLER__ADD_KD=1.0)
    assert losses_of(trainer) == pytest.approx(losses_of(kd(DISTILLER__ADD_KD=1.0)), rel=1e-4)
    student, teacher = trainer.distiller.student, trainer.distiller.teacher
    of_teacher = trainer.foldings["teacher"].twin if fast else teacher._call_impl
    assert [calls.count(function) for function in (student._call_impl, of_teacher)] == [4, 4]


def test_no_compiler_is_said_before_the_run(monkeypatch, kd):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(InputError, match=r"SOLVER.COMPILE needs a C\+\+ compiler .* apt install g\+\+"):
        kd(SOLVER__COMPILE="teacher")
    kd()


def test_no_triton_is_said_for_a_gpu(monkeypatch):
    monkeypatch.setattr(acceleration.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs the package triton"):
        check_compiler(torch.device("cuda"))


@pytest.mark.parametrize("key, value", [("COMPILE", "student"), ("COMPILE", "teachr"), ("COMPILE_MODE", "fast")])
def test_unknown_values_are_refused(tmp_path, key, value):
    with pytest.raises(InputError, match=f"SOLVER.{key}: no .* named '{value}'"):
        tiny_config(tmp_path, **{f"SOLVER__{key}": value})


@pytest.mark.parametrize("mode, marked", [("default", 0), ("reduce-overhead", 1), ("max-autotune", 1)])
def test_cuda_graphs_are_told_of_each_step(tmp_path, monkeypatch, mode, marked):
    calls = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: calls.append(1))
    begin_step(tiny_config(tmp_path, SOLVER__COMPILE="all", SOLVER__COMPILE_MODE=mode))
    begin_step(tiny_config(tmp_path, SOLVER__COMPILE="off", SOLVER__COMPILE_MODE=mode))
    assert len(calls) == marked


@pytest.mark.parametrize("kind, nesterov", [("SGD", False), ("SGD", True), ("AdamW", False)])
def test_the_fused_optimiser_takes_the_same_steps(tmp_path, kind, nesterov):
    cfg = tiny_config(tmp_path, SOLVER__TYPE=kind, SOLVER__NESTEROV=nesterov, SOLVER__LR=0.01)
    fused, plain = (torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Linear(8, 5)).double() for _ in range(2))
    plain.load_state_dict(fused.state_dict())
    optimizers = [build_optimizer(cfg, Distiller(model)) for model in (fused, plain)]
    assert optimizers[0].defaults["fused"] is True
    for group in optimizers[1].param_groups:
        group["fused"], group["foreach"] = False, False
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=a.dtype)
            b.grad = a.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_state_saved_without_fusing_goes_on_fused(kd):
    first, second = kd(), kd()
    losses_of(first)
    state = copy.deepcopy(first.state_dict())
    for group in state["optimizer"]["param_groups"]:
        group["fused"] = None
    second.load_state(state)
    assert all(group["fused"] for group in second.optimizer.param_groups)
    for trainer in (first, second):
        trainer.train_loader.set_epoch(2)
    assert losses_of(second) == losses_of(first)


MEMORY = """
import resource
import torch
from mdistiller.engine.forwards.compile import keep_freed_memory

torch.set_num_threads(1)

def pages_from_the_system():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(16 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(pages_from_the_system())
keep_freed_memory(torch.device("cpu"))
pages_from_the_system()  # the heap grows
pages_from_the_system()
print(pages_from_the_system())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again():
    """Large tensors come from the system once, not in each step."""
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert kept < 0.05 * given_back


def test_memory_of_a_gpus_process_is_left_alone(monkeypatch):
    monkeypatch.setattr(acceleration.ctypes, "CDLL", None)  # would raise when called
    keep_freed_memory(torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("method", ["KD", "VRM", "DIST", "DIST_PLUS", "DCD"])
def test_no_step_waits_for_the_gpu(tmp_path, method, amp):
    file = teacher_file(tmp_path)
    values = {"SOLVER__DEVICE": "cuda", "SOLVER__AMP": amp, "SOLVER__CHANNELS_LAST": True}
    trainer = make_trainer(tmp_path / "run", DISTILLER__TYPE=method, DISTILLER__TEACHER_CKPT=file, **values)
    batches = [to_batch(item, trainer.precision) for item in trainer.train_loader][:3]
    meters = next(hook for hook in trainer.hooks if type(hook).__name__ == "Meters")
    trainer.distiller.train()
    for batch in batches * 2:  # the teacher's weights are looked at before the 2nd and the 4th call
        trainer.run_step(batch)
    torch.cuda.set_sync_debug_mode("error")
    try:
        meters.after_step(trainer.run_step(batches[0]))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("method", ["KD", "KD_TWO_VIEWS"])
def test_compiled_on_a_gpu_gives_the_same_losses(tmp_path, method, mode):
    options = {"DISTILLER__TYPE": method, "DISTILLER__TEACHER_CKPT": teacher_file(tmp_path), "SOLVER__DEVICE": "cuda"}
    plain = make_trainer(tmp_path / "a", **options)
    fast = make_trainer(tmp_path / "b", SOLVER__COMPILE="all", SOLVER__COMPILE_MODE=mode, **options)
    assert losses_of(fast) == pytest.approx(losses_of(plain), rel=1e-3)


def half_precision(trainer):
    """The trainer in float16 with its scaler, as on a GPU; a CPU computes it too, only not fast."""
    trainer.precision = Precision(torch.device("cpu"), torch.float16, channels_last=True)
    trainer.precision.place(trainer.distiller)
    trainer.scaler = trainer.precision.scaler()
    return trainer


def test_float16_trains_with_scaled_losses(kd):
    half, plain = half_precision(kd()), kd()
    assert half.scaler.is_enabled() and not plain.scaler.is_enabled()
    assert losses_of(half) == pytest.approx(losses_of(plain), rel=0.02)


def test_a_step_with_gradients_that_overflow_is_left_out(kd):
    trainer = half_precision(kd())
    batch = to_batch(next(iter(trainer.train_loader)), trainer.precision)
    trainer.distiller.train()
    before = [p.detach().clone() for p in trainer.distiller.student.parameters()]
    scale = trainer.scaler.get_scale()
    for p in trainer.distiller.student.parameters():
        p.register_hook(lambda gradient: gradient * torch.inf)
    trainer.run_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.distiller.student.parameters(), strict=True))
    assert trainer.scaler.get_scale() == 0.5 * scale
