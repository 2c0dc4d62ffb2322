"""What a run writes: checkpoints, logs, the folder itself."""
