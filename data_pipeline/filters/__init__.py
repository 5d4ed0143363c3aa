"""Steps that judge documents one by one: by language, by rules of quality, by a classifier."""
