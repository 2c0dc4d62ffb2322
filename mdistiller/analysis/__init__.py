"""What data and networks look like, as pictures and numbers."""
