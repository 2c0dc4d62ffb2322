"""``python -m mdistiller list`` from a checkout."""

from mdistiller.commands.list import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
