"""The configuration: the node type, options by role, what makes two runs one experiment."""
