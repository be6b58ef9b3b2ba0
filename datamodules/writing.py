"""Rows on disk: episodes become the columns of a memory-mapped TensorDict, with a checksum of every block."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict

from datamodules.episodes import Episode, Source
from datamodules.files import sync_directory
from datamodules.rows import row_key, row_specs
from lit_wm.errors import DataError
from lit_wm.types import Spaces, Spec

Key = tuple[str, ...]

BLOCK = 64 << 20  # bytes under one checksum
BUFFER = 32 << 20  # bytes of episodes that are written together
_RESERVED = ("shape", "device", "_type")  # of TensorDict's meta.json
EPISODE = {
    "start": Spec("int64", ()),
    "length": Spec("int64", ()),
    "return": Spec("float64", ()),
    "terminated": Spec("bool", ()),
    "fake_last": Spec("bool", ()),
    "seed": Spec("int64", ()),
    "task": Spec("int16", ()),
    "crc": Spec("uint32", ()),
}


class ColumnFiles:
    """The columns of a memory-mapped TensorDict, written through files and not through the maps: a full disk
    is then an error, and not the end of the process.
    """

    def __init__(self, folder: Path, specs: Mapping[Key, Spec]):
        folder.mkdir(exist_ok=True)
        self.folder, self.specs, self.rows = folder, specs, 0
        self.parts = {key: folder / f"{i}.part" for i, key in enumerate(specs)}
        self.handles = {key: open(path, "wb") for key, path in self.parts.items()}  # noqa: SIM115
        self.crcs: dict[Key, list[int]] = {key: [] for key in specs}
        self.sizes = dict.fromkeys(specs, 0)

    def append(self, columns: Mapping[Key, np.ndarray]) -> None:
        """Append rows."""
        for key, spec in self.specs.items():
            value = np.ascontiguousarray(columns[key], spec.dtype)
            data = value.reshape(-1).view(np.uint8).data
            while len(data):
                at = self.sizes[key] % BLOCK
                part, data = data[: BLOCK - at], data[BLOCK - at :]
                crcs = self.crcs[key]
                if at == 0:
                    crcs.append(0)
                crcs[-1] = zlib.crc32(part, crcs[-1])
                self.handles[key].write(part)
                self.sizes[key] += len(part)
        self.rows += len(value)

    def finish(self) -> dict[Path, dict[str, Any]]:
        """Sync, and let TensorDict say the names of the files and write its ``meta.json``."""
        for handle in self.handles.values():
            handle.flush()
            os.fsync(handle.fileno())
        self.close()
        like = TensorDict({}, [1])
        for key, spec in self.specs.items():
            like[key] = torch.empty((1, *spec.shape), dtype=getattr(torch, spec.dtype))
        like = like.expand(self.rows).memmap_like(self.folder)  # files with holes, replaced by ours
        files = {}
        for key, part in self.parts.items():
            path = Path(like[key].filename)
            os.replace(part, path)
            path.chmod(0o444)
            files[path] = {"bytes": self.sizes[key], "crc": self.crcs[key]}
        return files

    def close(self) -> None:
        """Close the files."""
        for handle in self.handles.values():
            handle.close()


class RowWriter:
    """Writes episodes as rows, and one row about each episode into ``episodes/``."""

    def __init__(self, folder: Path, spaces: Spaces):
        for name in (*spaces.obs, *spaces.action):
            if name in _RESERVED:
                raise DataError(f"an entry is called {name!r}, which TensorDict keeps for itself.\n"
                                "  Leave it out or rename it in the source.")  # fmt: skip
        self.spaces, self.folder, self.no_reward = spaces, folder, False
        self.rows = ColumnFiles(folder, row_specs(spaces))
        self.table = ColumnFiles(folder / "episodes", {(k,): v for k, v in EPISODE.items()})
        self.pending: list[Episode] = []
        self.bytes = self.steps = 0

    def add(self, episode: Episode) -> None:
        """Append an episode; only a few MB of them are held."""
        size = sum(v.nbytes for v in (*episode.observation.values(), *episode.action.values()))
        if self.bytes + size > BUFFER:
            self.flush()
        self.pending.append(episode)
        self.bytes += size
        self.steps += episode.steps

    def flush(self) -> None:
        """Write what is held."""
        episodes, self.pending, self.bytes = self.pending, [], 0
        if not episodes:
            return
        length = np.array([e.steps + 1 for e in episodes])
        stop = np.cumsum(length)
        start, last, n = stop - length, stop - 1, int(stop[-1])
        task = np.array([e.task for e in episodes])
        valid = np.ones(n, np.bool_)
        valid[last] = False
        terminated, truncated, init = np.zeros((3, n), np.bool_)
        terminated[last - 1] = [e.terminated[-1] for e in episodes]
        truncated[last - 1] = [e.truncated[-1] for e in episodes]
        init[start] = True

        def joined(arrays: list[np.ndarray]) -> np.ndarray:
            return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

        def steps(arrays: list[np.ndarray], spec: Spec) -> np.ndarray:
            column = np.zeros((n, *spec.shape), spec.dtype)
            column[valid] = joined(arrays)
            return column

        self.no_reward |= any(e.reward is None for e in episodes)
        rewards = [np.zeros(e.steps, np.float32) if e.reward is None else e.reward for e in episodes]
        columns: dict[Key, np.ndarray] = {
            row_key("observation", k, self.spaces.obs): joined([e.observation[k] for e in episodes])
            for k in self.spaces.obs
        }
        for k, spec in self.spaces.action.items():
            columns[row_key("action", k, self.spaces.action)] = steps([e.action[k] for e in episodes], spec)
        columns["next", "reward"] = steps(rewards, Spec("float32", ()))
        columns |= {("next", "terminated"): terminated, ("next", "truncated"): truncated}
        columns |= {("next", "done"): terminated | truncated, ("is_init",): init, ("valid",): valid}
        columns["episode",] = np.repeat(self.table.rows + np.arange(len(episodes)), length)
        columns["step",] = np.arange(n) - np.repeat(start, length)
        columns |= {("source",): np.zeros(n, np.int16), ("task",): np.repeat(task, length)}
        table = {
            "start": self.rows.rows + start,
            "length": length,
            "return": np.array([r.sum(dtype=np.float64) for r in rewards]),
            "terminated": terminated[last - 1],
            "fake_last": np.array([e.fake_last for e in episodes]),
            "seed": np.array([-1 if e.seed is None else e.seed for e in episodes]),
            "task": task,
            "crc": np.array([_episode_crc(e, r) for e, r in zip(episodes, rewards, strict=True)]),
        }
        self.rows.append(columns)
        self.table.append({(k,): v for k, v in table.items()})

    def finish(self) -> dict[str, Any]:
        """Sync all; the part of ``rows.json`` that comes from here."""
        self.flush()
        if not self.table.rows:
            raise DataError("there is no episode with a step in it.")
        files = {**self.rows.finish(), **self.table.finish()}
        for path in self.folder.rglob("meta.json"):
            files[path] = {"bytes": path.stat().st_size, "crc": block_crcs(path)}
            sync_directory(path)
        plain = {str(path.relative_to(self.folder)): files[path] for path in sorted(files)}
        return {"episodes": self.table.rows, "steps": self.steps, "rows": self.rows.rows, "files": plain}

    def close(self) -> None:
        """Close the files."""
        self.rows.close()
        self.table.close()


def plan_size(source: Source) -> int:
    """Bytes that the rows of a source will take: exact if it says how many steps it has, else the size of its
    files.
    """
    if source.total_steps is None:
        return sum(path.stat().st_size for path in source.files)
    row = sum(_width(spec) for spec in row_specs(source.schema.spaces).values())
    episodes = source.total_episodes or 0
    return (source.total_steps + episodes) * row + episodes * sum(map(_width, EPISODE.values()))


def blocks(path: Path, size: int) -> Iterator[bytes]:
    """A file in blocks of ``size`` bytes."""
    with open(path, "rb") as file:
        while block := file.read(size):
            yield block


def block_crcs(path: Path) -> list[int]:
    """The checksums of a file, one per block."""
    return list(map(zlib.crc32, blocks(path, BLOCK)))


def _episode_crc(episode: Episode, reward: np.ndarray) -> int:
    crc = 0
    for value in (*episode.observation.values(), *episode.action.values(), reward):
        crc = zlib.crc32(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data, crc)
    return crc


def _width(spec: Spec) -> int:
    return int(np.prod(spec.shape, dtype=np.int64)) * np.dtype(spec.dtype).itemsize
