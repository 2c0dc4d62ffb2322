#!/bin/sh
# Fetch mdistiller's public teachers, checked, into download_ckpts/ beside this script, from any directory:
#   sh download_ckpts.sh [cifar_teachers ...] [--root DIR] [--list] [--verify] [--overwrite]
# PYTHON: the interpreter (default: the one of .venv, else python3).
# MDISTILLER_CKPT_URL: a mirror, the address of a folder that holds cifar_teachers.tar.
set -eu

checkout=$(cd "$(dirname "$0")" && pwd)
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    [ ! -x "$checkout/.venv/bin/python" ] || PYTHON=$checkout/.venv/bin/python
fi

"$PYTHON" - "$checkout" <<'CHECK' || exit 2
import importlib.util
import sys

if sys.version_info < (3, 10):
    sys.exit("error: %s is Python %d.%d, 3.10 or later is needed: PYTHON=... sh download_ckpts.sh"
             % (sys.executable, sys.version_info[0], sys.version_info[1]))
missing = [name for name in ("torch", "torchvision", "numpy", "yacs", "yaml") if not importlib.util.find_spec(name)]
if missing:
    sys.exit("error: %s has no %s; install the package first (python -m pip install -e %s), or name another "
             "interpreter: PYTHON=... sh download_ckpts.sh" % (sys.executable, ", ".join(missing), sys.argv[1]))
CHECK

# The checkout's own package, even where the current directory holds another mdistiller.
exec "$PYTHON" -c 'import runpy, sys
sys.path.insert(0, sys.argv.pop(1))
runpy.run_module("mdistiller.hub", run_name="__main__", alter_sys=True)' "$checkout" "$@"
