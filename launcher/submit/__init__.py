"""Runs that are started somewhere else: what a cluster is to be told so that it does there what `broadgauge run` does."""
