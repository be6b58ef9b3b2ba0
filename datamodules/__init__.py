"""The world's memory: rows of experience, the replay that keeps them, and the collection that makes them.

Importing this package is cheap; TorchRL, Gymnasium and Lightning come with the parts that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.collect import Collector
    from datamodules.data import ReplayDataModule
    from datamodules.replay import RowReplay
    from datamodules.views import dreamer_view, tdmpc2_view

_HOME = {"Collector": "collect", "ReplayDataModule": "data", "RowReplay": "replay"}
_HOME |= {"dreamer_view": "views", "tdmpc2_view": "views"}

__all__ = ["Collector", "ReplayDataModule", "RowReplay", "dreamer_view", "tdmpc2_view"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
