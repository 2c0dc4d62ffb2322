"""tools/train.py in a process that sends itself a signal at a chosen moment.

python crash_driver.py MOMENT COUNT SIGNAL [arguments of tools/train.py]

MOMENT: ``step`` (after the COUNT-th step of this process), ``evaluation`` (after the COUNT-th batch of an evaluation
within the training), ``save`` (with the COUNT-th checkpoint or log half written), ``never``.
"""

import os
import runpy
import signal
import sys
from pathlib import Path

from mdistiller.engine import hooks
from mdistiller.engine.folder import checkpoint

TRAIN = Path(__file__).parents[2] / "tools" / "train.py"


def arm(moment, count, number):
    """Have the COUNT-th occurrence of the moment send the signal."""
    left = [count]

    def strike():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    if moment == "step":
        hooks.Meters.after_step = _then(hooks.Meters.after_step, strike)
    elif moment == "evaluation":
        check = hooks.StopSignals.check

        def check_in_evaluation(self):
            if not self.trainer.distiller.student.training:
                strike()
            check(self)

        hooks.StopSignals.check = check_in_evaluation
    elif moment == "save":
        original = checkpoint.write_atomically

        def write(path, content, **options):
            if left[0] == 1:
                Path(f"{path}.half.tmp").write_bytes(
                    content[: len(content) // 2] if isinstance(content, bytes) else b""
                )
            strike()
            original(path, content, **options)

        checkpoint.write_atomically = write


def _then(method, action):
    def both(self, *args):
        method(self, *args)
        action()

    return both


if __name__ == "__main__":
    moment, count, number = sys.argv[1], int(sys.argv[2]), signal.Signals[sys.argv[3]]
    arm(moment, count, number)
    sys.argv = [str(TRAIN), *sys.argv[4:]]
    runpy.run_path(str(TRAIN), run_name="__main__")
