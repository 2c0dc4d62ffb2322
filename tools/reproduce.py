"""``python -m mdistiller reproduce`` from a checkout."""

from mdistiller.commands.reproduce import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
