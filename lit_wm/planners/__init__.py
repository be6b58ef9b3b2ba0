"""Planners: they search action sequences in a model's imagination. No Lightning, no networks, no data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lit_wm.errors import ConfigError, nearest
from lit_wm.planners.gradient import Gradient
from lit_wm.planners.mppi import CEM, MPPI
from lit_wm.planners.protocol import Plan, Planner, PlanningModel
from lit_wm.planners.random import Random

__all__ = ["CEM", "MPPI", "Gradient", "Plan", "Planner", "PlanningModel", "Random", "make_planner"]

PLANNERS: dict[str, type[Planner]] = {"mppi": MPPI, "cem": CEM, "gradient": Gradient, "random": Random}


def make_planner(name: str, options: Mapping[str, Any] | None = None) -> Planner:
    """``mppi``, ``cem``, ``gradient`` or ``random`` with the given ``options``, arguments of its class.

    Raises:
        ConfigError: unknown name or option, or an impossible value.
    """
    if name not in PLANNERS:
        names = [*PLANNERS, "policy"]  # the last is the models' own option: to act without planning
        close = nearest(str(name), names)
        raise ConfigError(f"unknown planner {name!r}{close}; expected one of {', '.join(names)}")
    known = [f.name for f in fields(PLANNERS[name]) if f.init]
    for key in options or {}:
        if key == "max_ms":
            raise ConfigError(f"planner {name}: max_ms is no option but an argument of act(obs, max_ms=50)")
        if key not in known:
            close = nearest(str(key), known)
            raise ConfigError(f"planner {name}: unknown option {key!r}{close}; it has {', '.join(known)}")
    return PLANNERS[name](**(options or {}))
