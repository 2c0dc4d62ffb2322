"""Replacements of a network's forward (record, cache, share, fold, compile), and its number format."""
