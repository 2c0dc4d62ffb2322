"""Data and networks in pictures and numbers."""
