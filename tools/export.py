"""``python -m mdistiller export`` from a checkout."""

from mdistiller.commands.export import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
