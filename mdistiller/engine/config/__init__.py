"""The configuration: the node type, options by role, and the comparison of two runs' settings."""
