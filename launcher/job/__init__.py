"""A job as the process that leads it sees it: its machines, its ranks, its end."""
