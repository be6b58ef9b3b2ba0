"""Rows of experience: what a row holds, and the memory maps that hold rows.

An episode of T transitions is T+1 rows, one for each observation; ``action`` and ``next.*`` of a row belong
to the transition that starts there. Each environment is a *stream* with a ring of its own, so parallel
environments never interleave, the oldest row of a stream is the one that goes, and every operation costs the
same at any size.

A row is known by its position in its stream, counted from the first row ever written::

    row = stream * ring + position % ring            position in [tail, head) is alive, below is evicted

The position is also the *generation* of a sampled row: whoever writes back to it later is ignored if it has
gone.
"""

from __future__ import annotations

import os
import shutil
import warnings
import weakref
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from datamodules._torchrl import Storage
from datamodules.files import checked_file, copy_range, crc32, read_json, write_json
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.types import Spaces, Spec

Key = tuple[str, ...]
Array = np.ndarray | Tensor

LAYOUT = 1  # version of the snapshot files
_FLAT = ("next", "is_init", "valid")  # columns of shape [1] that are written and read here as numbers
_WIDE = ("observation", "latent")  # columns with a file of their own
# Not gathered for windows: nothing reads them there.
_UNREAD = frozenset({("next", "done"), ("episode",), ("step",), ("source",)})


def row_key(group: str, name: str, entries: Collection[str]) -> Key:
    """Column of one of ``entries``: ``observation`` if ``obs`` is alone, else ``("observation", name)``."""
    alone = {"observation": "obs", "action": "action"}[group]
    return (group,) if list(entries) == [alone] else (group, name)


def row_specs(spaces: Spaces, latents: Mapping[str, Spec] | None = None) -> dict[Key, Spec]:
    """All columns of a row and what they hold."""
    flag = Spec("bool", (1,))
    return {
        **{row_key("observation", k, spaces.obs): s for k, s in spaces.obs.items()},
        **{row_key("action", k, spaces.action): s for k, s in spaces.action.items()},
        ("next", "reward"): Spec("float32", (1,)),
        ("next", "terminated"): flag,
        ("next", "truncated"): flag,
        ("next", "done"): flag,
        ("is_init",): flag,
        ("valid",): flag,  # the row starts a transition; False at the end of an episode
        ("episode",): Spec("int64", ()),
        ("step",): Spec("int32", ()),
        ("source",): Spec("int16", ()),
        ("task",): Spec("int16", ()),
        **{("latent", k): s for k, s in (latents or {}).items()},
    }


def row_files(specs: Mapping[Key, Spec]) -> dict[str, int]:
    """Files that hold the columns, and their bytes per row: ``row`` for all small ones, else one each."""
    wide = {".".join(k): _bytes(s) for k, s in specs.items() if k[0] in _WIDE}
    return {"row": -(-sum(_bytes(s) for k, s in specs.items() if k[0] not in _WIDE) // 8) * 8, **wide}


def row_bytes(specs: Mapping[Key, Spec]) -> int:
    """Size of one row on disk."""
    return sum(row_files(specs).values())


def nested(columns: Mapping[Key, Any]) -> dict[str, Any]:
    """Columns as dicts in dicts."""
    groups: dict[str, Any] = {}
    for key, value in columns.items():
        group = groups if len(key) == 1 else groups.setdefault(key[0], {})
        group[key[-1]] = value
    return groups


def _bytes(spec: Spec) -> int:
    return prod(spec.shape) * _dtype(spec).itemsize


def _dtype(spec: Spec) -> torch.dtype:
    return getattr(torch, spec.dtype)


class _Record:
    """Where the small columns lie in the bytes of a row; wide types come first, so that all are aligned."""

    def __init__(self, specs: Mapping[Key, Spec]):
        small = [(k, s) for k, s in specs.items() if k[0] not in _WIDE]
        small.sort(key=lambda item: -_dtype(item[1]).itemsize)
        self.names = {key: str(i) for i, (key, _) in enumerate(small)}
        ends = np.cumsum([0, *(_bytes(spec) for _, spec in small)]).tolist()
        fields: Any = {"names": list(self.names.values()), "formats": [(s.dtype, s.shape) for _, s in small]}
        self.dtype = np.dtype(fields | {"offsets": ends[:-1], "itemsize": row_files(specs)["row"]})

    def unpack(self, record: np.ndarray, without: frozenset[Key] = frozenset()) -> dict[Key, Tensor]:
        """The columns as views of the bytes. (..., bytes) uint8 -> (..., *shape) each."""
        rows = record.view(self.dtype)[..., 0]  # NumPy makes views in a fraction of torch's time
        return {key: torch.from_numpy(rows[name]) for key, name in self.names.items() if key not in without}


def _raw(x: Tensor) -> np.ndarray:
    """NumPy view of a tensor; bfloat16, which NumPy lacks, as its 16 bits."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy()


class RowStorage(Storage):
    """Memory-mapped columns, ``streams`` rings of ``capacity // streams`` rows each.

    The small columns of a row lie side by side in one file: a window is then one cache miss or two, not ten.

    Args:
        specs: the columns, see :func:`row_specs`; with latents or not.
        capacity, streams: rows in all, and number of environments that share them evenly.
        directory: where the column files lie; column files of an earlier run in it are replaced.
        lead: rows of a window that stand before the ones to train on; they come without observations. With 0
            there are no latents.
        pin: put gathered observations into page-locked memory, for copies to a GPU that do not block.
    """

    def __init__(
        self, specs: dict[Key, Spec], capacity: int, streams: int, directory: Path, lead: int = 1,
        pin: bool = False,
    ):  # fmt: skip
        self.ring = capacity // streams
        super().__init__(self.ring * streams, compilable=True)  # plain counters instead of shared semaphores
        self.specs, self.streams, self.lead, self.pin = specs, streams, lead, pin
        self.episodes: tuple[np.ndarray, np.ndarray] | None = None  # first row and end of each, of a dataset
        self.head = np.zeros(streams, np.int64)  # rows ever written
        self.floor = np.zeros(streams, np.int64)  # first row that was ever here: not 0 after a restore
        self._map(directory, specs)
        self.data = TensorDict(self.columns, [self.max_size])

    def _map(self, directory: Path, specs: Mapping[Key, Spec]) -> None:
        """Make the files of columns, and look at them as ``columns`` and, to write faster, ``arrays``."""
        directory.mkdir(parents=True, exist_ok=True)
        self.files = {name: directory / f"{quote(name, safe='')}.rows" for name in row_files(specs)}
        self._blocks: dict[str, Tensor] = {}  # by file: the bytes of each row
        self._handles: dict[str, Any] = {}
        self._buffers: dict[Any, list[Tensor]] = {}
        for name, size in row_files(specs).items():
            file, shape = self.files[name], (self.max_size, size)
            file.unlink(missing_ok=True)  # whoever still maps it keeps what was there
            block = MemoryMappedTensor.empty(shape, dtype=torch.uint8, filename=str(file))
            self._blocks[name] = block.as_subclass(Tensor)  # the subclass costs microseconds per call
            # Stays ours even if another run replaces the name.
            self._handles[name] = open(file, "rb")  # noqa: SIM115
        self._record = _Record(specs)
        self.columns = self._record.unpack(self._blocks["row"].numpy())
        for key, spec in specs.items():
            if key[0] in _WIDE:
                self.columns[key] = self._blocks[".".join(key)].view(_dtype(spec)).view(-1, *spec.shape)
        self.arrays = {k: _raw(v)[:, 0] if k[0] in _FLAT else _raw(v) for k, v in self.columns.items()}
        # They are large: gone with the process, unless it is killed; then the next run replaces them.
        self.close = weakref.finalize(self, _remove, list(self._handles.values()), list(self.files.values()))

    @property
    def tail(self) -> np.ndarray:
        """Position of the oldest row alive, per stream."""
        return np.maximum(self.floor, self.head - self.ring)

    def rows(self, stream: Any, position: Any) -> Any:
        """Row numbers of positions in streams."""
        return stream * self.ring + position % self.ring

    def newest(self, streams: np.ndarray) -> np.ndarray:
        """Row numbers of the newest rows."""
        return self.rows(streams, self.head[streams] - 1)

    def set(self, cursor: Any, data: Mapping[Key, Any], *, set_cursor: bool = True) -> None:
        """Write the columns in ``data`` at row numbers ``cursor`` (n,)."""
        for key, value in data.items():
            self.arrays[key][cursor] = _raw(value) if isinstance(value, Tensor) else value

    def get(self, index: Any) -> TensorDict:
        """Windows by row numbers (B, lead + T), as of :meth:`gather` and :meth:`carried`; for any
        other index single rows with every column.
        """
        if not isinstance(index, Tensor) or index.ndim != 2:
            return self.data[index]
        return TensorDict(nested(self.gather(index) | self.carried(index)), index.shape[:1])

    def carried(self, index: Tensor) -> dict[Key, Tensor]:
        """Latents of the last lead row of windows, where training starts. (B, ...) each"""
        rows = index[:, self.lead - 1]
        return {k: self.columns[k].index_select(0, rows) for k in self.specs if k[0] == "latent"}

    def gather(self, index: Tensor, out: Mapping[Key, Tensor] | None = None) -> dict[Key, Tensor]:
        """Columns of windows.

        Args:
            index: row numbers.                                                     (B, lead + T) int64
            out: where to put observations, by column; new memory if it is None.    (B, T, ...)

        Returns:
            Observations (B, T, ...) of the rows after the lead, and action, reward, flags and task
            (B, lead + T, ...).
        """
        columns = self._record.unpack(self._blocks["row"].numpy().take(index.numpy(), 0), _UNREAD)
        trained = index[:, self.lead :]
        for key in self.specs:
            if key[0] == "observation":
                columns[key] = self._observe(key, trained, None if out is None else out[key])
        return columns

    def _observe(self, key: Key, index: Tensor, out: Tensor | None) -> Tensor:
        """Observations of rows. (B, T) -> (B, T, ...)"""
        column, shape = self.columns[key], self.specs[key].shape
        if out is None:
            out = self.buffer(key, (*index.shape, *shape), column.dtype)
        torch.index_select(column, 0, index.reshape(-1), out=out.view(-1, *shape))
        return out

    def buffer(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for one gathered column that nobody else uses.

        Fresh memory costs a page fault for every 4 KB, a third of the time of the copy, so a buffer is used
        again once no tensor but ours shares its storage: a batch that somebody keeps is never overwritten.
        Page-locked memory has such a cache inside PyTorch, which also waits for copies to the GPU.
        """
        if self.pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        pool = self._buffers.pop((key, shape), [])
        self._buffers[key, shape] = pool  # now the newest
        if len(self._buffers) > 2 * len(self.specs):
            del self._buffers[next(iter(self._buffers))]
        for buffer in pool:
            storage = buffer.untyped_storage()
            if torch._C._storage_Use_Count(storage._cdata) == 2:  # the pool's tensor and the line above
                return buffer.view(shape)
        buffer = torch.empty(shape, dtype=dtype)
        if len(pool) < 3:
            pool.append(buffer)
        return buffer.view(shape)

    def __len__(self) -> int:
        return int((self.head - self.tail).sum())

    def contains(self, item: int) -> bool:
        """Whether row number ``item`` holds a row."""
        stream, slot = divmod(item, self.ring)
        newest = self.head[stream] - 1  # the latest position in this slot is the only one that can be alive
        return 0 <= item < self.max_size and newest - (newest - slot) % self.ring >= self.tail[stream]

    def mark(self, row: int, count: int) -> None:
        """Take notice of latents written to rows: nothing to do in a ring."""

    def _empty(self) -> None:
        self.head[:] = self.floor[:] = 0

    def state_dict(self) -> dict[str, Any]:
        """Which rows are alive; the rows themselves are in :meth:`dumps`."""
        return {"head": self.head.tolist(), "tail": self.tail.tolist()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.head[:], self.floor[:] = state_dict["head"], state_dict["tail"]

    # Files of a snapshot: as those in use; the rows that are alive, stream after stream, oldest first.

    def _runs(self, stream: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Positions [start, stop) of a stream as pieces (first row, rows) that lie in one run on disk."""
        while start < stop:
            slot = start % self.ring
            count = min(stop - start, self.ring - slot)
            yield stream * self.ring + slot, count
            start += count

    def dumps(self, path: Any) -> None:
        """Write the rows that are alive: their files and ``manifest.json``, all synced to disk."""
        runs = [run for s, h in enumerate(self.head) for run in self._runs(s, int(self.tail[s]), int(h))]
        files = []
        for name, size in row_files(self.specs).items():
            rows, crc = self._blocks[name].numpy(), 0
            with open(Path(path) / self.files[name].name, "wb") as target:
                for row, count in runs:
                    copy_range(self._handles[name].fileno(), target.fileno(), row * size, count * size)
                    crc = crc32(rows[row : row + count].reshape(-1), crc)
                os.fsync(target.fileno())
            files.append({"name": name, "bytes": len(self) * size, "crc32": crc})
        columns = [{"key": list(key), **spec.to_plain()} for key, spec in self.specs.items()]
        manifest = {"layout": LAYOUT, "rows": len(self), "columns": columns, "files": files}
        write_json(Path(path) / "manifest.json", manifest | self.state_dict())

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps` of the same columns and streams; a smaller ring keeps the newest rows. Raises
        CheckpointError if a file is missing, damaged or of another layout; the rows here are then untouched.
        """
        path = Path(path)
        manifest = read_json(path / "manifest.json", ("layout", "head", "tail", "columns", "files"))
        what = f"replay snapshot {path}"
        if manifest["layout"] != LAYOUT:
            raise CheckpointError(f"{what} has layout {manifest['layout']}, this version reads {LAYOUT}.")
        if len(manifest["head"]) != self.streams:
            raise CheckpointError(
                f"{what} has {len(manifest['head'])} environments per process, this run has {self.streams}.\n"
                "  Resume with the same num_envs and number of processes."
            )
        stored = {tuple(c["key"]): Spec.from_plain(c) for c in manifest["columns"]}
        if differ := [k for k in stored | self.specs if stored.get(k) != self.specs.get(k)]:
            raise CheckpointError(
                f"{what} differs from this run in the columns {', '.join(sorted(map('.'.join, differ)))}.\n"
                "  Resume with the same environment, model size and precision."
            )
        sources = {f["name"]: checked_file(path / self.files[f["name"]].name, f["bytes"], f["crc32"])
                   for f in manifest["files"]}  # fmt: skip
        for name, size in row_files(self.specs).items():
            rows, source, end = self._blocks[name].numpy(), sources[name].reshape(-1, size), 0
            for stream, (head, tail) in enumerate(zip(manifest["head"], manifest["tail"], strict=True)):
                end += head - tail
                start = max(tail, head - self.ring)
                at = end - (head - start)
                for row, count in self._runs(stream, start, head):
                    rows[row : row + count] = source[at : at + count]
                    at += count
        self.load_state_dict(manifest)


def require_disk(directory: Path, rows: int, bytes_per_row: int) -> None:
    """Refuse a replay that cannot fit, by a ConfigError with all figures."""
    parent = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    replaced = sum(f.stat().st_blocks * 512 for f in directory.glob("*.rows")) if directory.is_dir() else 0
    free, need = shutil.disk_usage(parent).free + replaced, rows * bytes_per_row
    if need > free:
        raise ConfigError(
            f"the replay would need {need / 1e9:,.1f} GB ({rows:,} rows of {bytes_per_row:,} bytes), "
            f"but {directory} has {free / 1e9:,.1f} GB free.\n"
            f"  Lower data.capacity to {int(free * 0.9) // bytes_per_row:,} or less, "
            "or move data.replay_dir to a larger disk."
        )
    if 3 * need > free:
        warnings.warn(
            f"the replay takes {need / 1e9:,.1f} of the {free / 1e9:,.1f} GB free in {directory}; a disk "
            f"that cannot share blocks needs up to {3 * need / 1e9:,.1f} GB to save it for a resume. A save "
            "that does not fit is left out with a warning.",
            stacklevel=2,
        )


def _remove(handles: list[Any], files: list[Path]) -> None:
    for handle, file in zip(handles, files, strict=True):
        if file.exists() and os.path.samestat(file.stat(), os.fstat(handle.fileno())):  # else another run's
            file.unlink()
        handle.close()
