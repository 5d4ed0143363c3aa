"""What the verbs do, stage by stage."""
