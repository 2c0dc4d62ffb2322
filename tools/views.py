"""``python -m mdistiller views`` from a checkout."""

from mdistiller.commands.views import main
from mdistiller.engine.cli import command

if __name__ == "__main__":
    command(main)
