"""Makes the helpers in ``tests/`` importable from every test file."""

import os
import sys
from pathlib import Path

# The tests' networks are small: on a shared machine more threads wait for each other more than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

sys.path.insert(0, str(Path(__file__).parent))
