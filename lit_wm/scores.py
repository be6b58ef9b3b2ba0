"""Normalised scores: 0 stands for what random actions reach, 100 for an expert.

The two returns are those that a dataset states, as Minari's metadata can, or those of a row of D4RL's table.
Rows are of D4RL's datasets, and of the environments that it registers under the same names. D4RL's data keep
their row in whatever environment they are played: ``d4rl:hopper-medium-v2`` has scores in Hopper-v5, although
physics differ a little. An environment alone is never taken for another: HalfCheetah-v5 has no score.
"""

from __future__ import annotations

import csv
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lit_wm.errors import DataError, nearest


class Reference(NamedTuple):
    """The returns that 0 and 100 stand for, and who says so."""

    low: float
    high: float
    source: str

    def __str__(self) -> str:
        return f"0 is a return of {self.low:,.2f}, 100 one of {self.high:,.2f}: {self.source}"


@cache
def d4rl_table() -> dict[str, dict[str, str]]:
    """The rows of ``d4rl.csv`` by name: file, steps (time limit), ref_min, ref_max."""
    with open(Path(__file__).with_name("d4rl.csv"), newline="") as file:
        return {row["id"]: row for row in csv.DictReader(line for line in file if line[0] != "#")}


def d4rl_reference(name: str) -> Reference | None:
    """Of the row ``name`` of D4RL's table; None if there is none, or none with scores."""
    row = d4rl_table().get(name)
    if row is None or not row["ref_min"]:
        return None
    return Reference(float(row["ref_min"]), float(row["ref_max"]), f"row {name} of D4RL's table")


def reference_of(
    uri: str, meta: Mapping[str, Any], env: str | None, returns: np.ndarray | Sequence[float] = ()
) -> Reference | None:
    """What the scores of a run are relative to; None where nobody says it.

    Args:
        uri: of the dataset.
        meta: what it says of itself: ``ref_min_score``, ``ref_max_score``, and in which ``env_id`` it was
            recorded. Its scores are not used for another environment.
        env: the environment of evaluation, which may itself be one of D4RL's names.
        returns: of the episodes of the dataset. Where all are farther than 1 from scores of 0 and 1, these
            are placeholders: a warning says that they are not used.
    """
    low, high, recorded = (meta.get(k) for k in ("ref_min_score", "ref_max_score", "env_id"))
    same = not (recorded and env) or str(recorded).split(":")[-1] == env.split(":")[-1]
    if low is None or high is None or not low < high or not same:
        return d4rl_reference(env or "")
    if meta.get("format") == "d4rl":
        return d4rl_reference(str(meta["dataset_id"]))
    found = Reference(float(low), float(high), f"metadata of {uri}")
    scores = normalized_score(found, np.asarray(returns)[np.isfinite(returns)])
    near = not scores.size or ((scores >= -100) & (scores <= 200)).any()
    if (low, high) != (0, 1) or meta.get("no_reward") or near:
        return found
    warnings.warn(
        f"no normalised scores: {uri} says that {low:g} and {high:g} are 0 and 100, its own episodes return "
        f"{np.nanmin(returns):,.4g} to {np.nanmax(returns):,.4g}.\n  These look like placeholders; mend "
        "ref_min_score and ref_max_score in metadata.json.",
        stacklevel=2,
    )
    return d4rl_reference(env or "")


def normalized_score(name: str | Reference, returns: Any) -> Any:
    """100 (return - low) / (high - low), of one return or of an array of them.

    Args:
        name: a row of D4RL's table, e.g. ``halfcheetah-medium-v2``, or the two returns.

    Raises:
        DataError: for a name without scores.
    """
    known = name if isinstance(name, Reference) else d4rl_reference(name.removeprefix("d4rl:"))
    if known is None:
        scored = [row for row, entry in d4rl_table().items() if entry["ref_min"]]
        raise DataError(
            f"{name!r} is no row of D4RL's table that has scores{nearest(str(name), scored)}\n"
            "  Its rows are datasets, e.g. halfcheetah-medium-v2; environments of other versions are none of "
            "them.\n  Say the two returns yourself: normalized_score(Reference(low, high, source), returns)"
        )
    return 100 * (np.asarray(returns, np.float64) - known.low) / (known.high - known.low)
