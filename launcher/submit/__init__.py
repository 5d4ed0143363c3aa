"""Runs that are started somewhere else: how a cluster is told to do what `broadgauge run` does."""
