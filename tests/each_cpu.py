"""Run the tests of numbers under each vector instruction set that this CPU has: ``python tests/each_cpu.py``.

torch, oneDNN and MKL choose their loops by the CPU, and loops of another width or on more threads round otherwise.
Golden and model tests against the reference and the tests of ``mdistiller/functional`` run under each of ``SETS``, on
one thread and on two. The exit code is 1 if one fails.
"""

from __future__ import annotations

import os
import subprocess
import sys

# torch's capability, oneDNN's highest, MKL's
SETS = [
    ("default", "SSE41", "SSE4_2"),
    ("default", "DEFAULT", "SSE4_2"),
    ("avx2", "AVX2", "AVX2"),
    ("avx512", "DEFAULT", "AVX512"),
]
TESTS = ["tests/distillers", "tests/engine/test_dot.py", "tests/functional", "tests/models"]
PYTEST = [sys.executable, "-m", "pytest", "-q", *TESTS, "-k", "golden or functional"]


def best() -> str:
    """The capability that torch chooses."""
    environment = {key: value for key, value in os.environ.items() if key != "ATEN_CPU_CAPABILITY"}
    question = [sys.executable, "-c", "import torch; print(torch.backends.cpu.get_cpu_capability().lower())"]
    return subprocess.run(question, env=environment, check=True, capture_output=True, text=True).stdout.strip()


def main() -> int:
    order = list(dict.fromkeys(capability for capability, _, _ in SETS))
    own = best()
    known = order[: order.index(own) + 1] if own in order else ["default"]
    outcomes = {}
    for threads, processes in (("1", "2"), ("2", "0")):
        for capability, onednn, mkl in SETS:
            what = f"{capability}, oneDNN {onednn}, threads {threads}"
            print(f"== {what}", flush=True)
            if capability not in known:
                outcomes[what] = f"left out: this CPU has {own}"
                continue
            chosen = {"ATEN_CPU_CAPABILITY": capability, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}
            # Passive: where other programs compute too, threads that wait for each other actively hardly get on.
            environment = {**os.environ, **chosen, "OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE"}
            code = subprocess.run([*PYTEST, "-n", processes], env=environment).returncode
            outcomes[what] = "passed" if code == 0 else f"FAILED (pytest's exit code {code})"
    print("\n".join(f"{what}: {outcome}" for what, outcome in outcomes.items()))
    return int(any(outcome.startswith("FAILED") for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
