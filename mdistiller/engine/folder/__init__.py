"""The output of a run: checkpoints, logs, the folder."""
