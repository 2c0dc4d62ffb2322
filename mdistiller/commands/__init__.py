"""The commands, one file each: ``main(arguments)`` is ``python -m mdistiller NAME``, and ``tools/NAME.py`` too."""

from pathlib import Path

NAMES = sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))
