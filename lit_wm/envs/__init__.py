"""Environments: Gymnasium ids, Atari by the official recipe and a dummy, all with flat Dict spaces.

Importing this package imports neither Gymnasium nor ale_py; the first call does.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_wm.envs.dummy import Dummy
    from lit_wm.envs.make import (
        make_env,
        make_vector_env,
        read_env,
        read_spaces,
        restore_vector_env,
        snapshot_vector_env,
        suite_defaults,
    )
    from lit_wm.envs.wrappers import StandardEnv, spaces_from_gym

_HOME = {
    "Dummy": "dummy",
    "StandardEnv": "wrappers",
    "make_env": "make",
    "make_vector_env": "make",
    "read_env": "make",
    "read_spaces": "make",
    "restore_vector_env": "make",
    "snapshot_vector_env": "make",
    "spaces_from_gym": "wrappers",
    "suite_defaults": "make",
}

__all__ = [
    "Dummy",
    "StandardEnv",
    "make_env",
    "make_vector_env",
    "read_env",
    "read_spaces",
    "restore_vector_env",
    "snapshot_vector_env",
    "spaces_from_gym",
    "suite_defaults",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
