"""Benchmarks: `toprovar bench NAME` and the scripts in benchmarks/ run a module each, which writes JSON and a plot."""
