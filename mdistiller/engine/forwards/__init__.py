"""What stands in for a network's forward: folded, compiled, kept, shared; and in which number format it runs."""
