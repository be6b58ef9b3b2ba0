"""``d4rl:NAME``: the D4RL datasets (Fu et al., arXiv:2004.07219) by their names, without the d4rl package.

``lit_wm/d4rl.csv`` holds names, files, time limits and reference scores.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datamodules.download import command, download, verify
from datamodules.sources import register
from datamodules.sources.flat import NAMES
from datamodules.sources.hdf5 import HDF5, open_hdf5
from lit_wm.errors import DataError, nearest
from lit_wm.scores import d4rl_table as table

BASE = "http://rail.eecs.berkeley.edu/datasets/offline_rl/"
_MAGIC = b"\x89HDF\r\n\x1a\n"
# Environments whose actions are known to lie in [-1, 1]; the flow and CARLA ones have others.
_BOUNDED = ("gym_mujoco", "hand_dapg", "ant_maze", "kitchen", "maze2d", "bullet")
# What is peculiar to a family, by the folder of its files: the rule for its ends, and why.
_FAMILIES = {
    "ant_maze_new": (
        "timeouts|jump>1",
        "timeouts of antmaze v0 are out of step with the resets (D4RL issue 77): both end episodes; terminals"
        " repeat at the goal while the ant walks on, and end nothing",
    ),
    "ant_maze": ("timeouts", "terminals repeat at the goal while the ant walks on: timeouts end episodes"),
    "maze2d": (
        None,
        "timeouts mark a new goal, the ball moves on from there (D4RL issue 85); rewards come one step late "
        "(issue 194)",
    ),
}


@register("d4rl")
class D4RL(HDF5):
    """A D4RL file from ``cache_dir``, ``$D4RL_DATASET_DIR`` or ``~/.d4rl/datasets``, where d4rl keeps it.

    Files without ``timeouts`` (locomotion, kitchen and human sets of v0) are also cut after as many steps as
    the environment allowed. antmaze ends at timeouts only, v0 also where the ant jumps. ``split`` and
    ``episode_length`` override it.

    Args:
        rest: the name, e.g. ``hopper-medium-v2``.
        download: fetch the file if it is not there; else nothing touches the network.
        cache_dir: folder of the files.
        sha256: checksum that the file must have.
        last_obs, dones_are, episode_length, split, classes, drop: as for ``hdf5:``.

    Raises:
        DataError: for an unknown name, or if the file is absent or damaged.
    """

    def __init__(
        self, rest: str, download: bool = False, cache_dir: str | Path | None = None,
        sha256: str | None = None, last_obs: str | None = None, dones_are: str = "ends",
        episode_length: int | None = None, split: str | None = None, classes: int | None = None,
        drop: str | Sequence[str] = (),
    ):  # fmt: skip
        known = table()
        if (row := known.get(rest)) is None:
            raise DataError(
                f"d4rl: {rest!r} is no D4RL dataset{nearest(rest, list(known))}\n"
                f"  There are {len(known)} of them; a file of another name opens as hdf5:PATH."
            )
        path = find(BASE + row["file"], download, cache_dir, sha256)
        family = row["file"].split("/")[0]
        named = (facts for name, facts in _FAMILIES.items() if family.startswith(name))
        rule, note = next(named, (None, ""))
        if split is None and episode_length is None:
            with open_hdf5(path) as file:
                cut = row["steps"] and not any(name in file for name in (*NAMES["truncated"], "episode_0"))
            if cut:
                episode_length = int(row["steps"])
                note = f"{path} has no timeouts: cut after {row['steps']} steps, the limit of {rest}"
                self.report.count("time_limit", f"{note}; episode_length= or split= override it")
            elif rule:
                split = rule
        if note:
            self.report.count("family", f"{rest}: {note}")
        super().__init__(str(path), last_obs, dones_are, episode_length, split, classes, None, drop)
        scores = {f"ref_{k}_score": float(row[f"ref_{k}"]) for k in ("min", "max") if row[f"ref_{k}"]}
        self.meta |= {"format": "d4rl", "dataset_id": rest, **scores}
        if family.startswith(_BOUNDED) and not self.schema.low:
            self.take_bounds(-1.0, 1.0)


def find(url: str, fetch: bool = False, cache_dir: Any = None, sha256: str | None = None) -> Path:
    """The local file of a URL: in ``cache_dir``, else where d4rl keeps it. Raises DataError if it is not
    there and may not be fetched, with the command that fetches it.
    """
    name = url.rsplit("/", 1)[1]
    given = [cache_dir, os.environ.get("D4RL_DATASET_DIR"), "~/.d4rl/datasets"]
    folders = [Path(folder).expanduser() for folder in given if folder]
    for folder in folders:
        if (folder / name).is_file():
            return verify(folder / name, sha256)
    path = folders[0] / name
    if fetch:
        return download(url, path, sha256, _MAGIC)
    raise DataError(
        f"d4rl: {name} is not in {' or '.join(map(str, folders))}.\n  Fetch it with download=true, or on "
        f"a machine with a network run\n    {command(url, path)}"
    )
