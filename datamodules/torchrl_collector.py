"""Rollouts of TorchRL's collectors as the rows that our own collector writes.

``Collector``, ``MultiSyncCollector``, ``MultiAsyncCollector``, and the Ray, RPC and distributed ones all
yield batches whose last axis is time, with the trajectory of every step in ``("collector", "traj_ids")``. By
these an episode goes on in the next batch, whichever process it comes from.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tensordict import TensorDictBase

from datamodules.episodes import Arrays
from datamodules.replay import RowReplay
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec


class TorchRLAdapter:
    """Appends what a TorchRL collector yields to a replay, one stream per environment.

    A trajectory that stops without an end (the collector has reset its environment) is truncated there, at
    the last observation that was seen. Rows have no latents.

    Args:
        collector: a collector, or any iterable of its batches.
        spaces: the entries. ``obs`` is TorchRL's ``observation``, names with ``/`` are its nested keys;
            one-hot classes become indices, bounded actions are scaled to [-1, 1].
        replay: with as many streams as environments run side by side, over all processes.
        action_spec: of one environment (``env.full_action_spec_unbatched``), for the bounds of continuous
            actions; the collector's own environment by default.

    Attributes:
        env_steps: rows written.
        episodes, broken: episodes finished, and those among them that were broken off.

    Raises:
        ConfigError: if the bounds of continuous actions are not known.
    """

    def __init__(self, collector: Iterable[Any], spaces: Spaces, replay: RowReplay, action_spec: Any = None):
        self.spaces, self.replay, self._batches = spaces, replay, iter(collector)
        self._bounds: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        continuous = {k: s for k, s in spaces.action.items() if s.classes is None}
        if continuous:
            spec = _action_spec(collector) if action_spec is None else action_spec
            for name, entry in continuous.items():
                space = spec[_key(spec, name, "action")].space
                low, high = (x.cpu().numpy().reshape(-1, *entry.shape)[0] for x in (space.low, space.high))
                finite = np.isfinite(low) & np.isfinite(high)
                self._bounds[name] = np.where(finite, low, -1.0), np.where(finite, high, 1.0)
        streams = replay.storage.streams
        self.env_steps = self.episodes = self.broken = 0
        self._open = np.full(streams, -1, np.int64)  # trajectory that a stream is in the middle of
        self._fed = np.zeros(streams, np.int64)  # when it got its newest row
        self._last: dict[int, Arrays] = {}  # the observation after the newest row, of open streams

    def collect(self) -> int:
        """Take one batch; the number of rows written, 0 once the collector has ended.

        Raises:
            DataError: if the batch does not fit the spaces or lacks what TorchRL's collectors put into it.
        """
        if (batch := next(self._batches, None)) is None:
            return 0
        before, streams = self.env_steps, len(self._open)
        rollout = self._read(batch.to("cpu").reshape(-1, batch.shape[-1]))
        lanes = len(rollout.valid)
        for start in range(0, lanes, streams):  # whole episodes may come as more lanes than streams
            self._write(rollout.part(slice(start, start + streams)), lanes == streams)
        return self.env_steps - before

    def _read(self, batch: TensorDictBase) -> _Rollout:
        after = _get(batch, ("next",))
        action = _entries(batch, self.spaces.action, "action")
        for name, (low, high) in self._bounds.items():
            action[name] = np.clip((action[name] - low) / (high - low) * 2 - 1, -1, 1).astype(np.float32)

        def column(part: Any, *key: str) -> np.ndarray:
            return _get(part, key).numpy().reshape(batch.shape)

        trajectory, done = column(batch, "collector", "traj_ids"), column(after, "done")
        valid = trajectory >= 0
        if ("collector", "mask") in batch.keys(True):
            valid &= column(batch, "collector", "mask")
        terminated = column(after, "terminated") if "terminated" in after else done
        truncated = done & ~terminated
        if "truncated" in after:
            truncated |= column(after, "truncated")
        obs, seen = (_entries(part, self.spaces.obs, "observation") for part in (batch, after))
        return _Rollout(obs, seen, action, trajectory, valid, column(after, "reward"), terminated, truncated)

    def _write(self, r: _Rollout, whole: bool) -> None:
        """Write lanes, at most one per stream; ``whole`` if each of them is an environment for ever."""
        held = np.full(len(r.valid), -1)  # stream of each lane
        place: dict[int, tuple[int, int]] = {}  # lane and time of the newest row of each stream
        for t in range(r.valid.shape[1]):
            lanes = np.flatnonzero(r.valid[:, t])
            new = lanes[(held[lanes] < 0) | (self._open[held[lanes]] != r.trajectory[lanes, t])]
            if len(new):
                self._assign(new.tolist(), t, held, r, place, whole)
            streams, at = held[lanes], (lanes, t)
            first = self._open[streams] < 0
            self._append(streams, r.obs, at, first, np.ones_like(first), r.action)
            self.replay.set_outcome(streams, r.reward[at], r.terminated[at], r.truncated[at])
            ended = r.terminated[at] | r.truncated[at]
            self._open[streams] = np.where(ended, -1, r.trajectory[at])
            self._fed[streams] = self.env_steps
            place |= {s: (lane, t) for s, lane in zip(streams.tolist(), lanes.tolist(), strict=True)}
            if ended.any():
                no = np.zeros(int(ended.sum()), np.bool_)
                self._append(streams[ended], r.after, (lanes[ended], t), no, no)
                self.episodes += len(no)
        for s, where in place.items():
            self._last[s] = {k: v[where].copy() for k, v in r.after.items()}

    def _assign(self, lanes: list[int], t: int, held: Any, r: _Rollout, place: Any, whole: bool) -> None:
        """Find streams for lanes where a trajectory begins or comes back."""
        for lane in lanes:  # those that come back first: their streams are theirs
            for s in np.flatnonzero(self._open == r.trajectory[lane, t]).tolist():
                # Collectors on several machines may count alike, so the observation has to go on too.
                seen = self._last.get(s, {})
                if s not in place and all(np.array_equal(seen[k], v[lane, t]) for k, v in r.obs.items()):
                    held[lane] = s
        for lane in lanes:
            s = int(held[lane])
            if s >= 0 and self._open[s] == r.trajectory[lane, t]:
                continue
            if s < 0 or (self._open[s] >= 0 and not whole):  # else the environment's own
                others, mine = set(held.tolist()) - {s}, lane if whole else -1
                free = [x for x in range(len(self._open)) if x not in others]
                s = min(free, key=lambda x: (x != mine, self._open[x] >= 0, self._fed[x], x))
            if self._open[s] >= 0:
                self._break_off(s, r, place)
            held[lane] = s

    def _break_off(self, s: int, r: _Rollout, place: dict[int, tuple[int, int]]) -> None:
        """Truncate the open episode of a stream at its newest row."""
        arrays, stream, no = self.replay.storage.arrays, np.array([s]), np.zeros(1, np.bool_)
        row = self.replay.storage.newest(stream)
        arrays["next", "truncated"][row] = arrays["next", "done"][row] = True
        last = {k: v[place[s]] for k, v in r.after.items()} if s in place else self._last[s]
        self._append(stream, {k: v[None] for k, v in last.items()}, slice(None), no, no)
        self._open[s] = -1
        self.episodes += 1
        self.broken += 1

    def _append(
        self, streams: np.ndarray, obs: Arrays, at: Any, first: Any, valid: Any, action: Arrays | None = None
    ) -> None:
        taken = None if action is None else {k: v[at] for k, v in action.items()}
        self.replay.append(streams, {k: v[at] for k, v in obs.items()}, first, valid, taken)
        self.env_steps += len(streams)


@dataclass
class _Rollout:
    """A batch of L lanes and T steps: observations before and after each step, and what our rows hold."""

    obs: Arrays
    after: Arrays
    action: Arrays
    trajectory: np.ndarray
    valid: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray

    def part(self, lanes: slice) -> _Rollout:
        """Some of the lanes."""

        def cut(v: Any) -> Any:
            return {k: x[lanes] for k, x in v.items()} if isinstance(v, dict) else v[lanes]

        return _Rollout(*map(cut, vars(self).values()))


def _get(part: Any, key: tuple[str, ...]) -> Any:
    keys = [k if isinstance(k, tuple) else (k,) for k in part.keys(True)]
    if key not in keys:
        found = ", ".join(map("/".join, keys))
        raise DataError(f"the collector's batch has no {'/'.join(key)!r}; found: {found}")
    return part[key]


def _key(part: Any, name: str, alone: str) -> tuple[str, ...]:
    """Where TorchRL keeps an entry; our ``name/0``, ``name/1`` ... of unequal classes are one entry there."""
    first, *rest = name.split("/")
    path = (alone if first in ("obs", "action") else first, *rest)
    known = {k if isinstance(k, tuple) else (k,) for k in part.keys(True)}
    return next((key for key in (path, (alone, *path), path[:-1]) if key in known), path)


def _entries(part: Any, specs: dict[str, Spec], alone: str) -> Arrays:
    """The entries in the types of their specs, as (lanes, T, ...)."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name in specs:
        groups.setdefault(_key(part, name, alone), []).append(name)
    out: Arrays = {}
    for key, names in groups.items():
        value = _get(part, key).detach().numpy()
        lead, rest = value.shape[:2], value.shape[2:]
        spec = specs[names[0]]
        if spec.is_discrete:
            out |= _classes(value.reshape(*lead, -1), {k: specs[k] for k in names}, "/".join(key))
            continue
        image = spec.dtype == "uint8"
        if prod(rest) != prod(spec.shape) or (image and (rest != spec.shape or value.dtype != np.uint8)):
            raise DataError(
                f"the collector's {'/'.join(key)!r} is {value.dtype} of shape {rest}; expected "
                f"{spec.dtype} of shape {spec.shape}.\n  Leave out the transforms that change it, or "
                "change the spaces."
            )
        out[names[0]] = value.reshape(*lead, *spec.shape).astype(spec.dtype, copy=False)
    return out


def _classes(value: np.ndarray, specs: dict[str, Spec], where: str) -> Arrays:
    """Indices from indices or one-hot vectors side by side. (lanes, T, n)"""
    counts = [spec.classes or 0 for spec in specs.values() for _ in range(prod(spec.shape))]
    if value.shape[-1] == len(counts):
        index = value.astype(np.int32)
    elif value.shape[-1] == sum(counts):
        parts = [part.argmax(-1) for part in np.split(value, np.cumsum(counts)[:-1], -1)]
        index = np.stack(parts, -1).astype(np.int32)
    else:
        found = f"the collector's {where!r} has {value.shape[-1]} values"
        raise DataError(f"{found}; expected {len(counts)} classes, or {sum(counts)} one-hot.")
    at = np.cumsum([prod(spec.shape) for spec in specs.values()])[:-1]
    split = np.split(index, at, -1)
    return {k: v.reshape(*v.shape[:2], *s.shape) for (k, s), v in zip(specs.items(), split, strict=True)}


def _action_spec(collector: Any) -> Any:
    """Of one environment of a collector."""
    if (env := getattr(collector, "env", None)) is not None:
        return env.full_action_spec_unbatched
    if not (makers := getattr(collector, "create_env_fn", None)):
        name = type(collector).__name__
        raise ConfigError(f"{name} does not say what range the actions have: give "
                          "action_spec=env.full_action_spec_unbatched")  # fmt: skip
    if hasattr(made := makers[0], "full_action_spec_unbatched"):
        return made.full_action_spec_unbatched
    env = made()
    spec = env.full_action_spec_unbatched
    env.close()
    return spec
