"""Ranking a model's blocks before training: one module per scorer, and the ranking they share."""
