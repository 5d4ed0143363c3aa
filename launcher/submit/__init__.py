"""Handing a run to a cluster from a machine that is not part of it."""
