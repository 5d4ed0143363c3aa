"""The verbs of `broadgauge`, as a person types them: arguments in, text and exit codes out."""
