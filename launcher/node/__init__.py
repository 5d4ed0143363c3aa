"""A job's presence on one machine: the agent, what it starts, and who may."""
