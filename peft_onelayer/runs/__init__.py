"""A training run and an evaluation as library calls: what the commands call."""
