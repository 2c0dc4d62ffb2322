"""``python -m mdistiller COMMAND ...``: the commands of ``mdistiller/commands/`` from any folder."""

import importlib
import sys

from mdistiller.commands import NAMES
from mdistiller.engine.cli import command
from mdistiller.registry import InputError, suggestion


def main() -> int | None:
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print("python -m mdistiller COMMAND [--help | arguments]\n")
        for each in NAMES:
            summary = importlib.import_module(f"mdistiller.commands.{each}").__doc__.partition("\n")[0]
            print(f"  {each:12}{summary}")
        print("\nPublic teachers: python -m mdistiller.hub --help")
        return 0
    if name not in NAMES:
        raise InputError(f"no command named {name!r}; {suggestion(name, NAMES)}")
    return importlib.import_module(f"mdistiller.commands.{name}").main(arguments)


if __name__ == "__main__":
    command(main)
