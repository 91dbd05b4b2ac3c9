"""Completions of a model for the rows of a task, with their rewards, and the accuracy that they amount to."""
