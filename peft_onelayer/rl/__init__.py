"""Reinforcement learning of one block with TRL's trainers."""

from .ema import EMAAdapterCallback, EMATeacherMixin

__all__ = ["EMAAdapterCallback", "EMATeacherMixin"]
