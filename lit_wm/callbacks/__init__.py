"""Callbacks: evaluation, dream video, checkpoints that resume bitwise, progress, the demo's report."""

from lit_wm.callbacks.evaluate import Evaluate

__all__ = ["Evaluate"]
