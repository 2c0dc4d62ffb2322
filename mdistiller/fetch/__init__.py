"""Downloads, safe unpacking of tars, and mdistiller's public teachers."""
