"""TorchRL data on disk: memory-mapped TensorDicts in the TED form, read without TorchRL.

That is what ``TensorDict.memmap``, ``ReplayBuffer.dumps`` and TorchRL's dataset classes write.
Written against torchrl 0.14.1 and tensordict 0.14.3.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from datamodules.episodes import Episode, Schema, Source
from datamodules.sources import flat, register
from datamodules.sources.flat import dropped, from_one_hot, seen
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec

_ENDS = ("done", "terminated", "truncated")
_NOT_SEEN = {*_ENDS, "next", "reward", "action", "collector", "episode", "index", "is_init", "step_count",
             "info", "traj_ids", "seed", "task", "reward_sum",
             "episode_reward", "metadata", "_weight"}  # fmt: skip
_BLOCK = 1 << 20  # rows of a small column that are looked at together
_SAMPLE = 256  # rows that are looked at for the known defects of TorchRL's own loaders


@dataclass
class _Column:
    """A file of one array, of which the leading axes are those of the table."""

    path: Path
    dtype: np.dtype
    shape: tuple[int, ...]  # of one row

    def take(self, rows: np.ndarray) -> np.ndarray:
        """Rows by number (n,). The map lives for the call only, so its pages are not held."""
        data = np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)
        together = len(rows) > 0 and (np.diff(rows) == 1).all()
        return np.array(data[rows[0] : rows[-1] + 1] if together else data[rows])


class _Stream(NamedTuple):
    """Rows that follow each other in time: every ``step``-th from ``first``, the oldest at ``oldest``."""

    first: int
    step: int
    length: int
    oldest: int

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Numbers of the rows at the places ``start`` to ``stop``."""
        return self.first + (np.arange(start, stop) + self.oldest) % self.length * self.step


@register("torchrl")
class TorchRL(Source):
    """A folder of TED transitions: ``observation``, ``action``, ``next`` with observation, reward and ends.

    Episodes follow ``("collector", "traj_ids")`` or ``episode`` where they are there, so trajectories may be
    interleaved, and end at ``("next", "done")``. The last observation is that of ``next``. Where ``next``
    does not show the observation that follows, e.g. since a buffer has overwritten it, the episode is cut
    there as truncated. One episode is in memory, and where all of them begin and end.

    Args:
        rest: the folder.
        last_obs: for data without ``next`` observations, see :class:`datamodules.episodes.Source`.
        dones_are: ``terminals`` or ``ends`` (which count as truncated), if ``done`` alone is there.
        classes: number of classes of an integer action; else the greatest value + 1.
        drop: observations to leave out.

    Raises:
        DataError: if files are absent, cut off, or hold what TorchRL's broken loaders are known to write.
        ConfigError: for another ``dones_are`` or names that do not exist.
    """

    version = 2

    def __init__(
        self, rest: str, last_obs: str = "error", dones_are: str = "ends", classes: int | None = None,
        drop: str | Sequence[str] = (),
    ):  # fmt: skip
        if dones_are not in ("terminals", "ends"):
            raise ConfigError(f"dones_are is {dones_are!r}; expected terminals or ends.")
        self.last_obs, self._dones_are, self.name = last_obs, dones_are, Path(rest).name
        root = _root(Path(rest).expanduser())
        self.files: list[Path] = []
        self._columns: dict[str, _Column] = {}
        shape = self._walk(root, "", None)
        self._streams, self.total_steps = _streams(root, shape)
        if not any(f"next/{k}" in self._columns for k in _ENDS):
            raise DataError(f"{root}: no column next/done; found: {', '.join(self._columns)}.")
        names = [k for k in self._columns if k.split("/")[0] not in _NOT_SEEN]
        both = [k for k in names if f"next/{k}" in self._columns]
        names = both or [k for k in names if k.split("/")[0] in ("observation", "pixels", "state")]
        plain = {"obs" if names == ["observation"] else k.removeprefix("observation/"): k for k in names}
        drop = dropped(drop, list(plain), str(root))
        self._obs = {k: self._columns[v] for k, v in plain.items() if k not in drop}
        self._next = {k: self._columns[f"next/{plain[k]}"] for k in self._obs} if both else {}
        self._has_next = bool(both)
        actions = [k for k in self._columns if k.split("/")[0] == "action"]
        if not self._obs or not actions:
            what = "action" if self._obs else "observation"
            raise DataError(f"{root}: no {what} column; found: {', '.join(self._columns)}.")
        self._action = {k.removeprefix("action/"): self._columns[k] for k in actions}
        self._hot: set[str] = set()
        specs = {k: self._acted(k, c, classes) for k, c in self._action.items()}
        obs = {k: seen(c.dtype, c.shape) for k, c in self._obs.items()}
        self.schema = Schema(Spaces(obs, specs))
        self.meta = {"format": "torchrl"} | ({} if "next/reward" in self._columns else {"no_reward": True})
        self._runs = [self._find(rows) for rows in self._streams]
        self._look_for_defects(root)
        if not {f"next/{k}" for k in _ENDS[1:]} & set(self._columns):
            note = f"{self.name} has next/done alone, taken as {dones_are} (dones_are=)"
            self.report.count("dones_are", note)

    def _walk(self, folder: Path, prefix: str, batch: tuple[int, ...] | None) -> tuple[int, ...]:
        """Collect the columns of a folder and check the sizes of their files."""
        path = folder / "meta.json"
        try:
            meta = json.loads(path.read_bytes())
            batch = tuple(meta["shape"]) if batch is None else batch
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}): the dump is not complete.") from error
        self.files.append(path)
        for key, info in meta.items():
            if not isinstance(info, dict):
                continue
            if "dtype" not in info or info.get("is_nested"):
                if (folder / key / "meta.json").is_file():
                    self._walk(folder / key, f"{prefix}{key}/", batch)
                continue
            try:
                dtype = np.dtype(str(info["dtype"]).removeprefix("torch."))
            except TypeError:
                continue  # e.g. bfloat16 latents, which no observation is
            shape, file = tuple(info["shape"]), folder / f"{key}.memmap"
            size, whole = file.stat().st_size if file.is_file() else -1, int(np.prod(shape)) * dtype.itemsize
            if size < whole:  # TorchRL itself would show zeros
                what = f"is truncated: {size:,} of {whole:,} bytes" if size >= 0 else "is missing"
                raise DataError(f"{file} {what}.\n  Restore it, or dump the data again.")
            self.files.append(file)
            self._columns[prefix + key] = _Column(file, dtype, shape[len(batch) :])
        return batch

    def _acted(self, name: str, column: _Column, classes: int | None) -> Spec:
        """What an action is: one-hot rows of truths or integers, class numbers, or continuous."""
        shape, kind = column.shape, column.dtype.kind
        if kind == "f":
            return Spec("float32", shape)
        top, hot = 0, len(shape) == 1 and shape[0] > 1
        for stream in self._streams:
            for start in range(0, stream.length, _BLOCK):
                block = column.take(stream.rows(start, min(start + _BLOCK, stream.length)))
                top = max(top, int(block.max()))
                hot = hot and top == 1 and block.min() >= 0 and bool((block.sum(1) == 1).all())
        if hot:
            self._hot.add(name)
            return Spec("int32", (), shape[0])
        if shape == (1,):
            shape = ()
        return Spec("int32", shape, 2 if kind == "b" else classes or max(top + 1, 2))

    def _find(self, stream: _Stream) -> list[tuple[np.ndarray, np.ndarray]]:
        """The episodes of a stream: of each the places (runs,) where its runs of rows start and stop."""
        ids = self._columns.get("collector/traj_ids") or self._columns.get("episode")
        found: list[tuple[np.ndarray, ...]] = []
        for start in range(0, stream.length, _BLOCK):
            # One row more than the block, to see whether a trajectory goes on in the next one.
            rows = stream.rows(start, min(start + _BLOCK + 1, stream.length))
            label = np.zeros(len(rows), np.int64) if ids is None else ids.take(rows).reshape(len(rows))
            done = self._ends(rows)[2]
            cut = done | np.append(label[1:] != label[:-1], start + _BLOCK >= stream.length)
            at = np.flatnonzero(cut[:_BLOCK])
            found.append((at + start + 1, label[at], done[at]))
        stops, label, done = map(np.concatenate, zip(*found, strict=True))
        starts = np.append(0, stops[:-1])
        order = np.argsort(np.arange(len(stops)) if ids is None else label, kind="stable")
        new = done[order][:-1] | (label[order][1:] != label[order][:-1])
        runs = np.split(order, np.flatnonzero(new) + 1)
        return [(starts[run], stops[run]) for run in sorted(runs, key=lambda run: int(run[0]))]

    def _ends(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """terminated, truncated and either, (n,) bool."""
        flag = {k: self._columns[f"next/{k}"].take(rows).reshape(len(rows)).astype(bool)
                for k in _ENDS if f"next/{k}" in self._columns}  # fmt: skip
        no = np.zeros(len(rows), np.bool_)
        done = flag.get("done", no) | flag.get("terminated", no) | flag.get("truncated", no)
        if len(flag) == 1 and "done" in flag:
            return (done, no, done) if self._dones_are == "terminals" else (no, done, done)
        terminated = flag.get("terminated", no)
        return terminated, flag.get("truncated", done & ~terminated), done

    def _look_for_defects(self, root: Path) -> None:
        """Refuse what TorchRL's own loaders are known to write, and look no further than some rows."""
        some = [(stream, run) for stream, found in zip(self._streams, self._runs, strict=True)
                for run in found[:_SAMPLE]]  # fmt: skip
        first = [stream.rows(run[0][0], run[1][0])[:_SAMPLE] for stream, run in some[:16]]
        columns = [*self._obs.values(), *self._next.values(), *self._action.values()]
        more = sum(map(len, first)) > 1
        if more and not any(column.take(rows).any() for rows in first for column in columns):
            raise DataError(
                f"{root}: all observations and actions are zero, as TorchRL's MinariExperienceReplay writes."
                "\n  Read the dataset itself: minari:ID."
            )
        last = np.concatenate([stream.rows(run[1][-1] - 1, run[1][-1]) for stream, run in some])
        last = last[self._ends(last)[2]]
        real, shown = (any(c.take(last).any() for c in part.values()) for part in (self._obs, self._next))
        if self._has_next and len(last) and real and not shown:
            if self.last_obs == "error":
                raise DataError(
                    f"{root}: next observations are zero at every end, a defect of D4RLExperienceReplay."
                    "\n  Read the file itself, d4rl:NAME or hdf5:PATH, or accept it with last_obs=terminal."
                )
            self._has_next = False

    def episodes(self) -> Iterator[Episode]:
        """All episodes, stream by stream, in the order of their first rows."""
        number = 0
        for stream, found in zip(self._streams, self._runs, strict=True):
            for starts, stops in found:
                rows = np.concatenate([stream.rows(a, b) for a, b in zip(starts, stops, strict=True)])
                jumps = self._jumps(rows)
                if len(jumps):
                    note = f"{self.name}, row {rows[jumps[0] - 1]}: the row that follows does not show its"
                    self.report.count("jumps", f"{note} next observation: cut in two there", len(jumps))
                for part in np.split(rows, jumps):
                    where, row = f"{self.name}, episode {number}", sum(map(_bytes, self._obs.values()))
                    for a, b in flat.pieces(len(part), row, where, self.report):
                        cut = b < len(part) or part[-1] != rows[-1]
                        yield self._episode(part[a : b + 1], b - a, f"{self.name}, episode {number}", cut)
                        number += 1

    def _jumps(self, rows: np.ndarray) -> np.ndarray:
        """Places in an episode whose observation is not the next one of the row before."""
        if not self._next:
            return np.zeros(0, np.int64)
        key = min(self._obs, key=lambda k: int(np.prod(self._obs[k].shape)))
        found, step = [np.zeros(0, np.int64)], max(flat.BLOCK // max(_bytes(self._obs[key]), 1), 1)
        for start in range(0, len(rows) - 1, step):
            some = rows[start : start + step + 1]
            here, shown = self._obs[key].take(some[1:]), self._next[key].take(some[:-1])
            equal = (here == shown) | ((here != here) & (shown != shown))
            found.append(np.flatnonzero(~equal.reshape(len(here), -1).all(1)) + start + 1)
        return np.concatenate(found)

    def _episode(self, rows: np.ndarray, steps: int, where: str, cut: bool) -> Episode:
        """Of so many steps; a piece of a longer one has one row more, which shows its last observation."""
        specs, seen, rows = self.schema.spaces.obs, rows, rows[:steps]
        observation, action = {}, {}
        for k, column in self._obs.items():
            value = column.take(seen)
            if self._has_next and len(seen) == steps:
                value = np.concatenate([value, self._next[k].take(rows[-1:])])
            observation[k] = value.reshape(len(value), *specs[k].shape)
        for k, column in self._action.items():
            value = column.take(rows)
            value = from_one_hot(value, f"{where}: action {k!r}") if k in self._hot else value
            action[k] = value.reshape(len(rows), *self.schema.spaces.action[k].shape)
        reward = self._columns.get("next/reward")
        terminated, truncated, _ = self._ends(rows)
        truncated = truncated.copy()
        truncated[-1] |= cut and not terminated[-1]
        rewards = None if reward is None else reward.take(rows)
        return Episode(observation, action, rewards, terminated, truncated, where)


def _bytes(column: _Column) -> int:
    return int(np.prod(column.shape)) * column.dtype.itemsize


def _root(path: Path) -> Path:
    """The folder of the table below a dump."""
    if not path.is_dir():
        raise DataError(f"{path} is no folder; expected a dump of TensorDict or ReplayBuffer.")
    for folder in (path, path / "storage", *sorted(p.parent.parent for p in path.glob("**/next/meta.json"))):
        if (folder / "meta.json").is_file() and (folder / "next").is_dir():
            return folder
    what = "its dump was not finished" if any(path.rglob("*.memmap")) else "no TensorDict is in it"
    raise DataError(f"{path}: {what}.\n  Expected meta.json and next/, as TensorDict.memmap writes them.")


def _json(path: Path) -> Mapping[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _streams(root: Path, shape: tuple[int, ...]) -> tuple[list[_Stream], int]:
    """The streams of a table, and how many rows they have."""
    whole, oldest = int(np.prod(shape)), 0
    count = int(_json(root / "storage_metadata.json").get("len", whole))
    if buffer := (root / "storage_metadata.json").is_file():
        cursor = int(_json(root.parent / "writer" / "metadata.json").get("cursor", 0))
        oldest = cursor % shape[0] if count == whole else 0  # of a full buffer, what the next step overwrites
    if count == 0:
        raise DataError(f"{root} holds no step.")
    if len(shape) == 1 or buffer:  # (N,), or (T, ...): a buffer keeps time first
        side = whole // shape[0]
        return [_Stream(i, side, count // side, oldest) for i in range(side)], count
    length = shape[-1]  # rollouts (..., T)
    return [_Stream(i, 1, length, 0) for i in range(0, whole, length)], count
