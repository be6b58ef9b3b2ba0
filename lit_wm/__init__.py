"""DreamerV3 and TD-MPC2 as Lightning modules.

Names are loaded on first use, so that ``import lit_wm`` costs nothing and the command line can answer
``--help`` before torch is imported.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "DreamerV3Module": "lit_wm.dreamerv3",
    "TDMPC2Module": "lit_wm.tdmpc2",
    "create_world_model": "lit_wm.create",
    "run_imagination": "lit_wm.openloop",
    "State": "lit_wm.types",
    "Trajectory": "lit_wm.types",
    "Batch": "lit_wm.types",
    "Spec": "lit_wm.types",
    "Spaces": "lit_wm.types",
}

__all__ = ["Batch", "DreamerV3Module", "Spaces", "Spec", "State", "TDMPC2Module", "Trajectory", "__version__",
           "create_world_model", "run_imagination"]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'lit_wm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
