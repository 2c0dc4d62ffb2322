"""``python -m mdistiller train`` from a checkout."""

from mdistiller.commands.train import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
