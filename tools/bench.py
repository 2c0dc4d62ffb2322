"""``python -m mdistiller bench`` from a checkout."""

from mdistiller.commands.bench import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
