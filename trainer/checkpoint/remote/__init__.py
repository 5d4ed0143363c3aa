"""Checkpoints on object stores: `copies` knows what one is there, `object_store` moves bytes."""
