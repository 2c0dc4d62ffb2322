"""``python -m mdistiller eval`` from a checkout."""

from mdistiller.commands.eval import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
