"""How things look to a person: progress, tables, pictures, verdicts."""
