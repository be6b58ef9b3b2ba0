"""Callbacks: evaluation, dream video, checkpoints that resume bitwise, progress, the demo's report."""

from lit_wm.callbacks.checkpoint import ResumableCheckpoint
from lit_wm.callbacks.evaluate import Evaluate
from lit_wm.callbacks.progress import RLProgressBar
from lit_wm.callbacks.report import DemoReport
from lit_wm.callbacks.video import DreamVideo

__all__ = ["DemoReport", "DreamVideo", "Evaluate", "RLProgressBar", "ResumableCheckpoint"]
