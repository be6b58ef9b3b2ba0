"""Rows of a dataset as the models want them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules._torchrl import Storage
from datamodules.files import checked_file, crc32, read_json, write_json
from datamodules.rows import _FLAT, Key, RowStorage, row_files, row_key, row_specs
from datamodules.selection import RewardTransform, SourceSpec, vectors
from datamodules.views import NO_LATENT
from lit_wm.errors import CheckpointError, ConfigError, DataError, NotSupported
from lit_wm.types import Spaces, Spec

if TYPE_CHECKING:
    from datamodules.cache import Cache
    from datamodules.episodes import Schema

_BLOCK = 1 << 16  # rows changed at a time
Bounds = tuple[np.ndarray, np.ndarray]
BOUNDS_HINT = "Give action_low and action_high in its entry of data.sources."


class CacheRows(RowStorage):
    """Episodes of a cache as one stream of rows; nothing but latents is ever written.

    Observations stay in the cache's files. A window needs the small columns of all its rows, so they are
    copied side by side into a file of this run, in the order of the episodes chosen, with actions within
    [-1, 1], rewards as wanted, and the number of the source and of the task.

    Args:
        spaces: what the model sees: the cache's entries, with stacked images and padded vectors, which stand
            side by side in one if they have another name there.
        episodes: numbers of those that take part, in growing order.
        spec: transforms of the source.
        directory, latents, lead, pin: as in :class:`~datamodules.rows.RowStorage`.
        stack: images that are put together, the newest last; before an episode began its first is repeated.
        source, task: numbers written to every row; a task of None leaves those of the cache, an array
            gives the number that each of them becomes.
        rescale: whether actions become -1 to 1; else they keep the units of the cache.
        bounds: what becomes -1 and 1, of actions of which neither source nor spec says it.

    Raises:
        DataError: for actions beyond [-1, 1] whose bounds nobody knows.
    """

    def __init__(
        self, cache: Cache, directory: Path, spaces: Spaces, episodes: np.ndarray, spec: SourceSpec,
        latents: Mapping[str, Spec] | None = None, lead: int = 1, pin: bool = False, stack: int = 1,
        source: int = 0, task: int | np.ndarray | None = None, rescale: bool = True,
        bounds: Mapping[str, Bounds] | None = None,
    ):  # fmt: skip
        lengths = cache.episodes["length"][episodes]
        self.ring = int(lengths.sum())
        Storage.__init__(self, self.ring, compilable=True)
        self.cache, self.chosen, self.stack = cache, np.asarray(episodes), stack
        self.specs, self.streams, self.lead, self.pin = row_specs(spaces, latents), 1, lead, pin
        if cache.episodes["fake_last"][episodes].any():
            self.specs["fake_last",] = Spec("bool", (1,))
        if stack > 1 and not any(s.is_image for s in spaces.obs.values()):
            has = ", ".join(spaces.obs)
            raise ConfigError(f"data.stack is {stack}, but {spec.uri} has no images: {has}.")
        self._stops = np.cumsum(lengths)  # of the episodes, in rows of this storage
        self.episodes = (self._stops - lengths, self._stops)
        self._shift = cache.episodes["start"][episodes] - self.episodes[0]  # to rows of the cache
        self._moved = bool(self._shift.any())
        self.head, self.floor = np.array([self.ring]), np.zeros(1, np.int64)
        self._written = np.zeros(self.ring if latents else 0, np.bool_)  # rows that have latents
        self._map(directory, {k: s for k, s in self.specs.items() if k[0] != "observation"})
        floats = [k for k, s in spaces.action.items() if rescale and s.classes is None]
        scales = {k: (bounds or {}).get(k) or action_bounds(k, cache.schema, spec) for k in floats}
        self._fill(spaces, spec, source, task, scales)
        self.data = TensorDict(self.columns, [self.ring])
        own = cache.schema.spaces.obs
        apart, wanted = vectors(own), vectors(spaces.obs)
        if set(apart) == set(wanted):
            apart = []
        elif wanted != ["obs"] or sum(own[k].size for k in apart) > spaces.obs["obs"].size:
            raise DataError(
                f"{spec.uri} has the vectors {', '.join(apart) or 'none'}, which do not fill "
                f"{', '.join(wanted) or 'none'}.\n  Expected the same, or one 'obs' that holds them all."
            )
        self._parts = [cache.rows[row_key("observation", k, own)].as_subclass(Tensor) for k in apart]
        for name in spaces.obs:
            key = row_key("observation", name, spaces.obs)
            if not apart or name not in wanted:
                self.columns[key] = cache.rows[row_key("observation", name, own)].as_subclass(Tensor)
        for key, entry in self.specs.items():
            if key[0] == "latent" and entry.is_discrete:
                self.columns[key].fill_(NO_LATENT)

    def _fill(self, spaces: Spaces, spec: SourceSpec, source: int, task: Any, scales: dict[str, Any]) -> None:
        """Copy the small columns."""
        reward = RewardTransform(**(spec.reward or {}))
        said = spec.action_low is not None
        valid = self.arrays["valid",]
        valid[:] = True
        valid[self._stops - 1] = False
        for key, array in self.arrays.items():
            if key[0] == "latent" or key == ("valid",):
                continue
            if key == ("fake_last",):
                array[self._stops[self.cache.episodes["fake_last"][self.chosen]] - 1] = True
                continue
            if key == ("source",) or (key == ("task",) and isinstance(task, int)):
                array[:] = source if key == ("source",) else task
                continue
            column, most = self.cache.rows[key].numpy(), 0.0
            name = key[1] if len(key) > 1 else "action"
            for start in range(0, self.ring, _BLOCK):
                value = column[self._origin(np.arange(start, min(start + _BLOCK, self.ring)))]
                part = array[start : start + len(value)]
                value = value[:, 0] if key[0] in _FLAT else value
                if key == ("next", "reward"):
                    value = np.where(valid[start : start + len(value)], reward(value), 0)
                elif key[0] == "action" and name in scales:
                    if (scale := scales[name]) is not None:
                        value = scaled(value, scale, valid[start : start + len(value)])
                    most = max(most, float(np.abs(value).max(initial=0)))
                elif key == ("task",) and isinstance(task, np.ndarray):
                    value = task[value]
                if value.shape != part.shape:  # padded
                    part[...] = 0
                    part = part[:, : value.shape[1]]
                part[...] = value
            if most <= 1 + 1e-5:
                continue
            if not (said or self._bounded(name) or scales[name] is not None):
                raise DataError(
                    f"{spec.uri}: the values of action {name!r} go up to {most:.3g}, and nobody says their "
                    f"bounds; models need -1 to 1.\n  {BOUNDS_HINT}"
                )
            warnings.warn(
                f"{spec.uri}: with its bounds at -1 and 1, as a model sees them, action {name!r} goes up to "
                f"{most:.3g}.\n  Such values are kept: right if the environment clipped them. Else give "
                "bounds that hold all of them as action_low and action_high, or clip them in the source.",
                stacklevel=3,
            )

    def _bounded(self, key: str) -> bool:
        """Whether the source says the bounds of an action; values beyond them are then kept as they are."""
        schema = self.cache.schema
        return key in schema.low and bool(np.isfinite([schema.low[key], schema.high[key]]).all())

    def _origin(self, rows: np.ndarray) -> np.ndarray:
        """Rows of the cache. Any shape."""
        if not self._moved:
            return rows
        return rows + self._shift[np.searchsorted(self._stops, rows, side="right")]

    def set(self, cursor: Any, data: Mapping[Key, Any], *, set_cursor: bool = True) -> None:
        """Refused: a dataset does not grow."""
        raise NotSupported("rows of a dataset cannot be written; add to a ring instead.")

    def get(self, index: Any) -> TensorDict:
        """As :meth:`RowStorage.get`; single rows with their observations too."""
        if isinstance(index, Tensor) and index.ndim == 2:
            return super().get(index)
        rows = torch.arange(self.ring)[index]
        found = self.data[rows]
        for key in self.specs:
            if key[0] == "observation":
                value = self._observe(key, rows.reshape(1, -1), None)
                found[key] = value.reshape(*rows.shape, *self.specs[key].shape)
        return found

    def _observe(self, key: Key, index: Tensor, out: Tensor | None) -> Tensor:
        spec, column = self.specs[key], self.columns.get(key)
        if out is None:
            out = self.buffer(key, (*index.shape, *spec.shape), getattr(torch, spec.dtype))
        rows = torch.from_numpy(self._origin(index.numpy()))
        if column is None:
            found = torch.cat([part[rows].flatten(index.ndim) for part in self._parts], -1)
            out.zero_()[..., : found.shape[-1]] = found
            return out
        if self.stack > 1 and spec.is_image:
            # Frames of the same episode only: before it began, its first.
            age = self.columns["step",][index.reshape(-1)].view(index.shape).long()
            axis = 2 + (0 if spec.channels_first else 2)
            for part, back in zip(out.chunk(self.stack, axis), range(self.stack - 1, -1, -1), strict=True):
                frames = column.index_select(0, (rows - age.clamp(max=back)).reshape(-1))
                part.copy_(frames.view(part.shape))
        elif column.shape[1:] == spec.shape:
            torch.index_select(column, 0, rows.reshape(-1), out=out.view(-1, *spec.shape))
        else:
            out.zero_()[..., : column.shape[1]] = column[rows]
        return out

    # A snapshot holds the latents that have been written; the rest is in the dataset.

    def mark(self, row: int, count: int) -> None:
        """Take notice of latents written to rows."""
        self._written[row : row + count] = True

    def dumps(self, path: Any) -> None:
        """Write the latents and what they belong to."""
        rows = np.flatnonzero(self._written)
        files = [_write_array(Path(path) / "index.rows", "index", rows.view(np.uint8))]
        for name, block in self._blocks.items():
            if name != "row":
                data = block.numpy()[rows].reshape(-1)
                files.append(_write_array(Path(path) / self.files[name].name, name, data))
        write_json(Path(path) / "manifest.json", {"dataset": self._identity(), "files": files})

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps`. Raises CheckpointError if it is damaged or of other episodes."""
        path = Path(path)
        manifest = read_json(path / "manifest.json", ("dataset", "files"))
        if manifest["dataset"] != self._identity():
            raise CheckpointError(
                f"{path} belongs to other data: {manifest['dataset']}\n  but this run has "
                f"{self._identity()}.\n  Resume with the same data.sources and seed."
            )
        names = {"index": "index.rows"} | {k: f.name for k, f in self.files.items() if k != "row"}
        data = {f["name"]: checked_file(path / names[f["name"]], f["bytes"], f["crc32"])
                for f in manifest["files"]}  # fmt: skip
        rows = data.pop("index").view(np.int64)
        self._written[:] = False
        self._written[rows] = True
        for name, values in data.items():
            block = self._blocks[name].numpy()
            block[rows] = values.reshape(len(rows), block.shape[1])

    def _identity(self) -> dict[str, Any]:
        content = np.stack([self.chosen, self.cache.episodes["crc"][self.chosen]])
        latents = {key[1]: spec.to_plain() for key, spec in self.specs.items() if key[0] == "latent"}
        return {"rows": self.ring, "crc32": crc32(content.view(np.uint8).reshape(-1)), "latents": latents}


def action_bounds(key: str, schema: Schema, spec: SourceSpec) -> Bounds | None:
    """What becomes -1 and 1, as the entry says or else the source; None for an action that is not scaled.

    Raises:
        ConfigError: for bounds that cannot be.
    """
    if (spec.action_low is None) != (spec.action_high is None):
        raise ConfigError(f"{spec.uri}: give both of action_low and action_high, or none.")
    if spec.action_low is not None and spec.action_high is not None:
        shape, said = schema.spaces.action[key].shape, (spec.action_low, spec.action_high)
        try:
            if any(np.asarray(x).dtype.kind not in "iuf" for x in said):  # NumPy makes numbers of words too
                raise TypeError
            low, high = (np.broadcast_to(np.asarray(x, np.float64), shape) for x in said)
        except (ValueError, TypeError, RuntimeError):
            raise ConfigError(
                f"{spec.uri}: action_low {said[0]!r} and action_high {said[1]!r} do not fit action {key!r}; "
                f"expected numbers, or arrays {shape}."
            ) from None
        stated = [np.asarray(x.get(key, np.nan)) for x in (schema.low, schema.high)]
        if np.isfinite(stated).all() and (np.any(stated[0] != low) or np.any(stated[1] != high)):
            told, given = (f"{np.min(a):g} to {np.max(b):g}" for a, b in (stated, (low, high)))
            warnings.warn(
                f"{spec.uri} says that {told} is -1 to 1 in action {key!r}; action_low and action_high "
                f"make it {given}.\n  Leave them out, unless the source is wrong.", stacklevel=2
            )  # fmt: skip
    elif key in schema.low:
        low, high = (np.asarray(x[key], np.float64) for x in (schema.low, schema.high))
        finite = np.isfinite(low) & np.isfinite(high)  # as environments do: others pass unscaled
        low, high = np.where(finite, low, -1.0), np.where(finite, high, 1.0)
    else:
        return None
    if not (low < high).all() or np.isinf(high - low).any():
        raise ConfigError(f"{spec.uri}: action_low {low} must be below action_high {high}, both finite.")
    return None if (low == -1).all() and (high == 1).all() else (low, high)


def environment_bounds(
    cache: Cache, spec: SourceSpec, env: str, bounds: Mapping[str, Bounds], episodes: np.ndarray
) -> dict[str, Bounds]:
    """The actions of a source that nobody states the bounds of and that are in an environment's units.

    A warning says what was taken for granted, and where stated bounds are others than the environment's;
    those of -1 and 1 are of values that are scaled already.

    Args:
        env, bounds: name of the environment, and what -1 and 1 are in it, see :func:`lit_wm.envs.read_env`.
        episodes: numbers of those that are used, held out or not.

    Raises:
        DataError: for values that are neither in its units nor from -1 to 1.
    """
    schema, found = cache.schema, dict[str, Bounds]()
    turns, start = np.zeros(len(cache), np.int8), cache.episodes["start"][episodes]
    turns[start] = 1
    turns[start + cache.episodes["length"][episodes] - 1] -= 1
    acts = np.cumsum(turns, dtype=np.int8).astype(np.bool_)  # not in the last rows
    for key, (low, high) in bounds.items():
        if key not in schema.spaces.action or schema.spaces.action[key].shape != low.shape:
            continue  # of another task
        about, there = f"{spec.uri}: action {key!r}", f"in {env} it is {_shown(low)} to {_shown(high)}"
        mend = f"action_low: {_shown(low)}, action_high: {_shown(high)} in its entry of data.sources"
        known = [np.isfinite(side.get(key, np.nan)) for side in (schema.low, schema.high)]
        if spec.action_low is not None or np.logical_and(*known).any():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # said when they are used
                stated = action_bounds(key, schema, spec)
            if stated is not None and not np.allclose(stated, (low, high), 1e-5, 1e-6):
                given = f"{_shown(stated[0])} to {_shown(stated[1])}"
                warnings.warn(
                    f"{about} is {given} by its bounds, {there}; either is -1 to 1 to the model.\n"
                    f"  Right if their units differ. If not, say {mend}; -1 and 1 for scaled values.",
                    stacklevel=2,
                )  # fmt: skip
            continue
        if np.all(low == -1) and np.all(high == 1):
            continue
        column = cache.rows[row_key("action", key, schema.spaces.action)].numpy()
        least, most = np.full(low.shape, np.inf), np.full(low.shape, -np.inf)
        for start in range(0, len(column), _BLOCK):
            value = column[start : start + _BLOCK][acts[start : start + _BLOCK]]
            least = np.minimum(least, value.min(0, initial=np.inf))
            most = np.maximum(most, value.max(0, initial=-np.inf))
        unit, own = (((least >= a - 1e-5 * (b - a)) & (most <= b + 1e-5 * (b - a))).all()
                     for a, b in ((-1.0, 1.0), (low, high)))  # fmt: skip
        what = (
            f"{about} has values from {least.min():.3g} to {most.max():.3g}, nobody says its bounds, {there}"
        )
        if not (unit or own):
            raise DataError(f"{what}.\n  {BOUNDS_HINT}")
        if own:
            taken = "as scaled to -1 to 1 already" if unit else "in those units"
            warnings.warn(
                f"{what}: taken {taken}.\n  Say {mend} for those units, -1 and 1 for scaled values.",
                stacklevel=2,
            )
        if own and not unit:
            found[key] = low, high
    return found


def _shown(bound: np.ndarray) -> str:
    """As an entry of ``data.sources`` takes it."""
    values = [f"{x:.6g}" for x in np.ravel(bound)]
    return values[0] if len(set(values)) == 1 else f"[{', '.join(values)}]"


def scaled(value: np.ndarray, bounds: Bounds, acts: np.ndarray) -> np.ndarray:
    """Actions (n, ...) with their bounds at -1 and 1, zeros in rows where nobody acts. ``acts``: (n,)"""
    low, high = bounds
    return ((value - low) / (high - low) * 2 - 1) * acts.reshape(-1, *[1] * (value.ndim - 1))


def _write_array(path: Path, name: str, data: np.ndarray) -> dict[str, Any]:
    with open(path, "wb") as file:
        file.write(data.data)
        file.flush()
        os.fsync(file.fileno())
    return {"name": name, "bytes": data.nbytes, "crc32": crc32(data)}


def dataset_bytes(rows: int, spaces: Spaces, latents: Mapping[str, Spec] | None) -> int:
    """Size of the files of a run for so many rows of datasets."""
    own = {k: s for k, s in row_specs(spaces, latents).items() if k[0] != "observation"}
    return rows * (sum(row_files(own).values()) + 8)


def observation_statistics(parts: list[CacheRows]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and standard deviation of every float vector over the rows that are trained on, by entry.

    In float64, block by block around a first guess of the mean; what never changes gets a deviation of 1.
    """
    stats = {}
    for key, spec in parts[0].specs.items():
        if key[0] != "observation" or spec.dtype != "float32":
            continue
        count, guess = 0, parts[0].columns[key][:1].double().numpy()
        total, square = np.zeros(spec.shape), np.zeros(spec.shape)
        for part in parts:
            for start in range(0, part.ring, _BLOCK):
                rows = part._origin(np.arange(start, min(start + _BLOCK, part.ring)))
                value = part.columns[key].numpy()[rows].astype(np.float64) - guess
                count += len(value)
                total += value.sum(0)
                square += (value**2).sum(0)
        mean = total / count
        std = np.sqrt(np.maximum(square / count - mean**2, 0))
        std[std < 1e-6] = 1.0
        name = key[1] if len(key) > 1 else "obs"
        stats[name] = (torch.from_numpy(mean + guess[0]).float(), torch.from_numpy(std).float())
    return stats
