"""What a model can do, measured by tasks."""
