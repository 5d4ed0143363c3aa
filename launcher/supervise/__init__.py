"""Watching over a run: what hangs, what is slow, and what to say of it. Decisions are pure, and know no Ray."""
