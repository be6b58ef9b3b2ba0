"""Learning curves that the authors of both algorithms published, to lay under one's own.

The figures are data of this package; ``README.md`` beside them says where they come from, how they were
reduced and what to mind when comparing. Nothing was run again.
"""

from __future__ import annotations

import csv
import gzip
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lit_wm.errors import ConfigError, nearest

# Authors first: DreamerV3 by its own repository goes before the baseline in TD-MPC2's.
REPOSITORIES = {"dreamerv3": "danijar/dreamerv3", "tdmpc2": "nicklashansen/tdmpc2"}


class Curve(NamedTuple):
    """Mean and spread over seeds.

    Attributes:
        model: ``dreamerv3``, ``tdmpc2``, ``tdmpc`` or ``sac``.
        task: ``walker-walk``, ``atari-pong``, ``mw-assembly``; see :func:`task_name`.
        pixels: whether DeepMind Control was seen in pictures.
        metric: ``return``, of an episode and unscaled, or ``success``, 0 to 1.
        source: the repository that has the runs.
        steps: of the simulator: every repeat of an action counts.                          (N,)
        mean, std: std is NaN for one seed.                                                  (N,)
        seeds: how many the mean is of.                                                      (N,) int
    """

    model: str
    task: str
    pixels: bool
    metric: str
    source: str
    steps: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    seeds: np.ndarray


def task_name(task: str) -> str:
    """The curves' name of an environment: ``dmc:walker_walk`` is ``walker-walk``, ``atari100k:pong``
    ``atari-pong``; other names are taken as they are.
    """
    suite, _, name = task.rpartition(":")
    if suite in ("", "dmc", "atari100k"):
        task = ("atari_" if suite == "atari100k" else "") + name
    return task.removeprefix("dmc_").replace("_", "-").replace("ball-in-cup", "cup")


@cache
def curves() -> tuple[Curve, ...]:
    """All of them; where two repositories have one of a model, that of its own authors comes first."""
    found: dict[tuple[str, str, bool, str, str], list[list[float]]] = {}
    for file, source in REPOSITORIES.items():
        with gzip.open(Path(__file__).with_name(f"{file}_scores.csv.gz"), "rt", newline="") as text:
            for row in csv.DictReader(text):
                model, _, pixels = row["method"].partition("-")
                seen = bool(pixels) or row.get("suite") == "dmc_vision"
                metric = "success" if row.get("metric") == "success" else "return"
                mean, std = (row[k] if k in row else row[f"score_{k}"] for k in ("mean", "std"))
                numbers = [float(x or "nan") for x in (row["step"], mean, std, row["n_seeds"])]
                found.setdefault((model, task_name(row["task"]), seen, metric, source), []).append(numbers)
    columns = ((key, np.array(rows).T) for key, rows in found.items())  # (4, N)
    return tuple(Curve(*key, steps, mean, std, n.astype(int)) for key, (steps, mean, std, n) in columns)


def published(model: str, task: str, pixels: bool = False) -> Curve:
    """The curve of a model on a task.

    Args:
        model, pixels: see :class:`Curve`.
        task: an environment of ours such as ``dmc:walker_walk``, or a name of the curves.

    Raises:
        ConfigError: if there is none.
    """
    models = dict.fromkeys(c.model for c in curves())
    if model not in models:
        close = nearest(model, [*models])
        raise ConfigError(f"no curves of {model!r}{close}\n  There are {', '.join(models)}.")
    name, own = task_name(task), [c for c in curves() if c.model == model]
    for curve in own:
        if (curve.task, curve.pixels) == (name, pixels):
            return curve
    if any(c.task == name for c in own):
        raise ConfigError(f"{model} has no curve on {task!r} with pixels={pixels}, but one with {not pixels}")
    raise ConfigError(
        f"{model} has no published curve on {task!r}{nearest(name, [c.task for c in own])}\n"
        "  lit_wm.curves.curves() lists all: DeepMind Control, Atari 100k, Meta-World, MyoSuite, ManiSkill2."
    )
