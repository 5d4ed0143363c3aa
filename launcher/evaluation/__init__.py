"""How good checkpoints are: tasks in tokens, grades, and the service that judges beside training."""
