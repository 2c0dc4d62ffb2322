"""What stands in for a network's forward: heard, kept, shared, folded, compiled; and in which number format it runs."""
