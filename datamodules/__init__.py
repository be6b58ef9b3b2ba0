"""The world's memory: rows of experience, the replay that keeps them, and the collection that makes them.

Importing this package is cheap; TorchRL, Gymnasium and Lightning come with the parts that need them.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datamodules.buffer import ReplayBuffer
    from datamodules.cache import ingest, open_cache
    from datamodules.collect import Collector
    from datamodules.data import ReplayDataModule
    from datamodules.episodes import Episode, Schema, Source
    from datamodules.mixture import Mixture
    from datamodules.replay import RowReplay
    from datamodules.sources import open_source, register
    from datamodules.torchrl_collector import TorchRLAdapter
    from datamodules.views import dreamer_view, tdmpc2_view

_HOME = {
    "Collector": "collect", "Episode": "episodes", "Mixture": "mixture", "ReplayBuffer": "buffer",
    "ReplayDataModule": "data", "RowReplay": "replay", "Schema": "episodes", "Source": "episodes",
    "dreamer_view": "views", "ingest": "cache", "open_cache": "cache", "open_source": "sources",
    "register": "sources", "tdmpc2_view": "views", "TorchRLAdapter": "torchrl_collector",
}  # fmt: skip

__all__ = ["Collector", "Episode", "Mixture", "ReplayBuffer", "ReplayDataModule", "RowReplay", "Schema",
           "Source", "TorchRLAdapter", "dreamer_view", "ingest", "open_cache", "open_source", "register",
           "tdmpc2_view"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
