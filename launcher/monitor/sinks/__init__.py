"""Other places that a run's curves are told to, as they grow: each an optional package, imported in one file."""
