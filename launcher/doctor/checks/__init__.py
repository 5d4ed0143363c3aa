"""One check a file: what is measured, `measure` and `judge`. None of them knows of Ray or of the other machines."""
