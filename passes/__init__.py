"""Graph passes, one file each, run in the order of a literal list."""
