"""Pruning policies: how a scale and a layer are scored, how much is kept, how the rest is restored."""
