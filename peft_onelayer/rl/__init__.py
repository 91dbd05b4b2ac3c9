"""Reinforcement learning of one block with TRL's trainers."""
