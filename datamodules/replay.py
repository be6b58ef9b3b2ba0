"""Rows of experience in a ring on disk, sampled as windows.

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

import errno
import json
import multiprocessing
import os
import shutil
import uuid
import warnings
import weakref
import zlib
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from tensordict import MemoryMappedTensor, TensorDict
from torch import Tensor

from datamodules.views import NO_LATENT
from lit_wm.errors import CheckpointError, ConfigError, DataError, NotSupported
from lit_wm.noise import stream_seed
from lit_wm.types import Spaces, Spec

_start_method = multiprocessing.get_start_method(allow_none=True)
with warnings.catch_warnings():
    # TorchRL warns about its compiled extension, which nothing here needs, and changes how processes start.
    warnings.simplefilter("ignore")
    from torchrl.data.replay_buffers import ReplayBuffer
    from torchrl.data.replay_buffers.samplers import Sampler
    from torchrl.data.replay_buffers.storages import Storage
    from torchrl.data.replay_buffers.writers import Writer
multiprocessing.set_start_method(_start_method, force=True)

Key = tuple[str, ...]
Array = np.ndarray | Tensor

LAYOUT = 1  # version of the snapshot files
_FLAT = ("next", "is_init", "valid")  # columns of shape [1] that are written and read here as numbers
_WIDE = ("observation", "latent")  # columns with a file of their own
# Not gathered for windows: nothing reads them there.
_UNREAD = frozenset({("next", "done"), ("episode",), ("step",), ("source",), ("task",)})
_BLOCK = 1 << 24  # bytes copied or checked at a time


def counter_rng(seed: int, rank: int, name: str, count: int) -> np.random.Generator:
    """The generator of draw number ``count``: a function of these four and nothing else."""
    return np.random.Generator(np.random.Philox(key=stream_seed(seed, rank, name), counter=count << 64))


def row_key(group: str, name: str, alone: str) -> Key:
    """Column of an entry: ``observation`` for ``obs`` (the ``alone``), else ``("observation", name)``."""
    return (group,) if name == alone else (group, name)


def row_specs(spaces: Spaces, latents: Mapping[str, Spec] | None = None) -> dict[Key, Spec]:
    """All columns of a row and what they hold."""
    flag = Spec("bool", (1,))
    return {
        **{row_key("observation", k, "obs"): s for k, s in spaces.obs.items()},
        **{row_key("action", k, "action"): s for k, s in spaces.action.items()},
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


def _bytes(spec: Spec) -> int:
    return prod(spec.shape) * _dtype(spec).itemsize


def _dtype(spec: Spec) -> torch.dtype:
    return getattr(torch, spec.dtype)


class _Record:
    """Where the small columns lie in the bytes of a row; wide types come first, so that all are aligned."""

    def __init__(self, specs: Mapping[Key, Spec]):
        self.places: list[tuple[Key, torch.dtype, int, tuple[int, ...]]] = []
        at = 0
        for key, spec in sorted(specs.items(), key=lambda item: -_dtype(item[1]).itemsize):
            if key[0] not in _WIDE:
                self.places.append((key, _dtype(spec), at // _dtype(spec).itemsize, spec.shape))
                at += _bytes(spec)
        self.dtypes = {dtype for _, dtype, _, _ in self.places}

    def unpack(self, record: Tensor, without: frozenset[Key] = frozenset()) -> dict[Key, Tensor]:
        """The columns as views of the bytes. (..., bytes) -> (..., *shape) each."""
        typed = {dtype: record.view(dtype) for dtype in self.dtypes}
        columns = {}
        for key, dtype, at, shape in self.places:
            if key not in without:
                part = typed[dtype][..., at : at + prod(shape)]
                columns[key] = (
                    part if len(shape) == 1 else part.unflatten(-1, shape) if shape else part[..., 0]
                )
        return columns


def _raw(x: Tensor) -> np.ndarray:
    """NumPy view of a tensor; bfloat16, which NumPy lacks, as its 16 bits."""
    x = x.detach()
    return (x.view(torch.int16) if x.dtype is torch.bfloat16 else x).numpy()


class RowStorage(Storage):
    """Memory-mapped columns, ``streams`` rings of ``capacity // streams`` rows each.

    The small columns of a row lie side by side in one file: a window is then one cache miss or two, not ten.

    Args:
        specs: the columns, see :func:`row_specs`.
        capacity: rows in all, a multiple of ``streams`` (what is over is not used).
        streams: number of environments.
        directory: where the column files lie; column files of an earlier run in it are replaced.
        lead: rows of a window that stand before the ones to train on; they come without observations. With 0
            there are no latents.
        pin: put gathered observations into page-locked memory, for copies to a GPU that do not block.
    """

    def __init__(
        self,
        specs: dict[Key, Spec],
        capacity: int,
        streams: int,
        directory: Path,
        lead: int = 1,
        pin: bool = False,
    ):
        self.ring = capacity // streams
        super().__init__(self.ring * streams, compilable=True)  # plain counters instead of shared semaphores
        self.specs, self.streams, self.lead, self.pin = specs, streams, lead, pin
        self.head = np.zeros(streams, np.int64)  # rows ever written
        self.floor = np.zeros(streams, np.int64)  # first row that was ever here: not 0 after a restore
        directory.mkdir(parents=True, exist_ok=True)
        self.files = {name: directory / f"{quote(name, safe='')}.rows" for name in row_files(specs)}
        self._blocks: dict[str, Tensor] = {}  # by file: the bytes of each row
        self._handles: dict[str, Any] = {}
        for name, size in row_files(specs).items():
            self.files[name].unlink(missing_ok=True)  # whoever still maps it keeps what was there
            block = MemoryMappedTensor.empty(
                (self.max_size, size), dtype=torch.uint8, filename=str(self.files[name])
            )
            # The subclass costs microseconds per call.
            self._blocks[name] = block.as_subclass(Tensor)
            # Stays ours even if another run replaces the name.
            self._handles[name] = open(self.files[name], "rb")  # noqa: SIM115
        self._record = _Record(specs)
        self.columns = self._record.unpack(self._blocks["row"])
        for key, spec in specs.items():
            if key[0] in _WIDE:
                self.columns[key] = self._blocks[".".join(key)].view(_dtype(spec)).view(-1, *spec.shape)
        self.data = TensorDict({}, [self.max_size])
        self.arrays: dict[Key, np.ndarray] = {}  # writing through NumPy is faster
        for key, column in self.columns.items():
            self.data[key] = column
            self.arrays[key] = _raw(column)[:, 0] if key[0] in _FLAT else _raw(column)
        self._buffers: dict[Any, list[Tensor]] = {}
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
        """Rows by number.

        Args:
            index: (B, lead + T) row numbers of windows, or any index of single rows.

        Returns:
            For windows a TensorDict of batch size B: observations (B, T, ...) of the rows after the lead,
            latents (B, ...) of the last lead row, where training starts, and action, reward and flags
            (B, lead + T, ...). For single rows a TensorDict with every column.
        """
        if not isinstance(index, Tensor) or index.ndim != 2:
            return self.data[index]
        record = self._blocks["row"].index_select(0, index.reshape(-1))
        columns = self._record.unpack(record.view(*index.shape, -1), _UNREAD)
        trained, carry = index[:, self.lead :], index[:, self.lead - 1]
        for key in self.specs:
            if key[0] == "observation":
                column, shape = self.columns[key], (trained.numel(), *self.specs[key].shape)
                out = self._buffer(key, shape, column.dtype)
                torch.index_select(column, 0, trained.reshape(-1), out=out)
                columns[key] = out.view(*trained.shape, *shape[1:])
            elif key[0] == "latent":
                columns[key] = self.columns[key].index_select(0, carry)
        nested: dict[str, Any] = {}
        for key, value in columns.items():
            group = nested if len(key) == 1 else nested.setdefault(key[0], {})
            group[key[-1]] = value
        return TensorDict(nested, index.shape[:1])

    def _buffer(self, key: Key, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for one gathered column that nobody else uses.

        Fresh memory costs a page fault for every 4 KB, a third of the time of the copy, so a buffer is used
        again once no tensor but ours shares its storage: a batch that somebody keeps is never overwritten.
        Page-locked memory has such a cache inside PyTorch, which also waits for copies to the GPU.
        """
        if self.pin:
            return torch.empty(shape, dtype=dtype, pin_memory=True)
        pool = self._buffers.setdefault((key, shape), [])
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
                    _copy_range(self._handles[name].fileno(), target.fileno(), row * size, count * size)
                    crc = _crc32(rows[row : row + count].reshape(-1), crc)
                os.fsync(target.fileno())
            files.append({"name": name, "bytes": len(self) * size, "crc32": crc})
        columns = [{"key": list(key), **spec.to_plain()} for key, spec in self.specs.items()]
        manifest = {"layout": LAYOUT, "rows": len(self), "columns": columns, "files": files}
        manifest |= self.state_dict()
        _write_json(Path(path) / "manifest.json", manifest)

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps` of the same columns and streams; a smaller ring keeps the newest rows.

        Raises:
            CheckpointError: if a file is missing, damaged or of another layout; the rows here are then
                untouched.
        """
        path = Path(path)
        manifest = _read_json(path / "manifest.json", ("layout", "head", "tail", "columns", "files"))
        if manifest.get("layout") != LAYOUT:
            raise CheckpointError(
                f"replay snapshot {path} has layout {manifest.get('layout')}, this version reads {LAYOUT}."
            )
        if len(manifest["head"]) != self.streams:
            raise CheckpointError(
                f"replay snapshot {path} has {len(manifest['head'])} environments per process, this run has "
                f"{self.streams}.\n  Resume with the same num_envs and number of processes."
            )
        stored = {tuple(c["key"]): Spec.from_plain(c) for c in manifest["columns"]}
        if stored != self.specs:
            differ = sorted(
                ".".join(k) for k in stored.keys() | self.specs.keys() if stored.get(k) != self.specs.get(k)
            )
            raise CheckpointError(
                f"replay snapshot {path} differs from this run in the columns {', '.join(differ)}.\n"
                "  Resume with the same environment, model size and precision."
            )
        sources = {
            f["name"]: _checked(path / self.files[f["name"]].name, f["bytes"], f["crc32"])
            for f in manifest["files"]
        }
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


def _copy_range(source: int, target: int, start: int, count: int) -> None:
    """Append bytes of one file to another; inside the kernel, and shared instead of copied, where it can."""
    in_kernel = hasattr(os, "copy_file_range")
    while count:
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, min(count, 1 << 30), offset_src=start)
            except OSError as error:
                if error.errno not in (
                    errno.EXDEV,
                    errno.EINVAL,
                    errno.ENOSYS,
                    errno.EOPNOTSUPP,
                    errno.EPERM,
                ):
                    raise
                in_kernel = False
                continue
        else:
            done = os.write(target, os.pread(source, min(count, _BLOCK), start))
        if done == 0:
            raise DataError("a replay file is shorter than the replay: something else has cut it.")
        start, count = start + done, count - done


def _crc32(data: np.ndarray, crc: int = 0) -> int:
    for start in range(0, len(data), _BLOCK):
        crc = zlib.crc32(data[start : start + _BLOCK].data, crc)
    return crc


def _checked(path: Path, size: int, crc: int) -> np.ndarray:
    """The bytes of a snapshot file as a memory map, after a check of size and checksum."""
    actual = path.stat().st_size if path.is_file() else None
    if actual != size:
        found = "is missing" if actual is None else f"has {actual:,} bytes instead of {size:,}"
        raise CheckpointError(f"replay snapshot is damaged: {path} {found}.\n  Use an older checkpoint.")
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)
    if _crc32(data) != crc:
        raise CheckpointError(
            f"replay snapshot is damaged: the content of {path} does not match its checksum.\n"
            "  Use an older checkpoint."
        )
    return data


def _write_json(path: Path, value: dict[str, Any]) -> None:
    with open(path, "w") as file:
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())


def _read_json(path: Path, like: Iterable[str]) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
        if missing := sorted(set(like) - set(value)):
            raise ValueError(f"it lacks {', '.join(missing)}")
        return value
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.parent} is not a replay snapshot: {path.name} is missing.\n"
            "  A snapshot is a folder with manifest.json; use a checkpoint that was saved with its replay."
        ) from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"replay snapshot is damaged: {path} cannot be read: {error}.\n  Use an older checkpoint."
        ) from None


class RingWriter(Writer):
    """Appends rows to their streams and numbers the episodes."""

    file = "writer.json"

    def __init__(self, streams: int):
        super().__init__()
        self.episode = np.full(streams, -1, np.int64)
        self.step = np.zeros(streams, np.int64)
        self.episodes = 0  # begun so far

    def extend(self, data: Mapping[Any, Any]) -> Tensor:
        """Append a row to each of the streams ``data["stream"]`` (n,); columns left out are zero."""
        storage, streams = self._storage, data["stream"]
        index = storage.rows(streams, storage.head[streams])
        first = np.flatnonzero(data["is_init",])
        self.step[streams] += 1
        if len(first):
            self.step[streams[first]] = 0
            self.episode[streams[first]] = self.episodes + np.arange(len(first))
            self.episodes += len(first)
        rows = {key: data.get(key, NO_LATENT if key == ("latent", "stoch") else 0) for key in storage.specs}
        storage.set(index, rows | {("episode",): self.episode[streams], ("step",): self.step[streams]})
        storage.head[streams] += 1
        return torch.from_numpy(index)

    def add(self, data: Mapping[Any, Any]) -> int:
        """Append one row to the stream ``data["stream"]``."""
        return int(self.extend({k: np.asarray(v)[None] for k, v in data.items()})[0])

    def _empty(self, empty_write_count: bool = True) -> None:
        self.episode[:], self.step[:], self.episodes = -1, 0, 0

    def state_dict(self) -> dict[str, Any]:
        """Episode and step of every stream."""
        return {"episode": self.episode.tolist(), "step": self.step.tolist(), "episodes": self.episodes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.episode[:], self.step[:] = state_dict["episode"], state_dict["step"]
        self.episodes = state_dict["episodes"]

    def dumps(self, path: Any) -> None:
        """Write the state to its file in a snapshot."""
        _write_json(Path(path) / self.file, self.state_dict())

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps`."""
        self.load_state_dict(_read_json(Path(path) / self.file, self.state_dict()))


class WindowSampler(Sampler):
    """Draws windows of consecutive rows of one stream, every complete window being equally likely.

    Windows run across the ends of episodes. In train mode every ``window``-th window of a stream, which
    together hold each row once, waits in a queue and is handed out once before anything is drawn. Draw number
    k depends on seed, rank and k alone, so the state is a count.

    Args:
        storage: where the rows are.
        window: rows of a training window, context included.
        context: rows before those to train on. With none, the row before the window gives previous action and
            reward, so the oldest row of a stream can start a window only if it starts an episode.
        online: whether to keep the queue.
    """

    file = "sampler.json"

    def __init__(self, storage: RowStorage, window: int, context: int, seed: int, rank: int, online: bool):
        self.storage, self.window, self.context = storage, window, context
        self.seed, self.rank, self.online = seed, rank, online
        self.before = int(context == 0)  # rows that come with a window and stand before it
        self.length, self.mode = window, "train"  # of the next draw
        self.draws = {"train": 0, "report": 0}
        self.queue: deque[tuple[int, int]] = deque()

    @property
    def num_windows(self) -> int:
        """Complete training windows that can be drawn."""
        return int(self.starts(self.window)[1].sum())

    def starts(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """First possible start and number of windows of ``length`` rows, per stream."""
        storage = self.storage
        low = storage.tail
        if self.context == 0:
            oldest = storage.rows(np.arange(storage.streams), low)
            low = low + ~storage.arrays["is_init",][oldest]
        return low, np.maximum(storage.head - low - length + 1, 0)

    def extend(self, index: Any) -> None:
        """Queue the windows that new rows complete: starts 1, 1 + window, 1 + 2 window ... of each stream."""
        if self.online:
            streams = np.asarray(index) // self.storage.ring
            head = self.storage.head[streams]
            for i in np.flatnonzero((head - 1) % self.window == 0):
                if head[i] > 1:
                    self.queue.append((int(streams[i]), int(head[i]) - self.window))

    def add(self, index: int) -> None:
        """See :meth:`extend`."""
        self.extend(np.array([index]))

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict[str, Any]]:
        """Row numbers of ``batch_size`` windows of ``length`` rows (plus the row before, without context).

        Raises:
            DataError: if there is no complete window yet.
        """
        chosen: list[tuple[int, int]] = []
        if self.mode == "train" and self.length == self.window:
            tail = self.starts(self.length)[0] if self.queue else ()
            while self.queue and len(chosen) < batch_size:
                queued = self.queue.popleft()
                if queued[1] >= tail[queued[0]]:  # else evicted unseen
                    chosen.append(queued)
        rng = counter_rng(self.seed, self.rank, f"replay/{self.mode}", self.draws[self.mode])
        stream, start = self._draw(rng, batch_size - len(chosen))
        self.draws[self.mode] += 1
        if chosen:
            first = np.array(chosen)
            stream, start = np.append(first[:, 0], stream), np.append(first[:, 1], start)
        position = start[:, None] + np.arange(-self.before, self.length)
        if self.before:
            position = np.maximum(position, self.storage.tail[stream][:, None])
        index = self.storage.rows(stream[:, None], position)
        return torch.from_numpy(index), {"generation": torch.from_numpy(position)}

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams and first positions of ``count`` windows."""
        low, windows = self.starts(self.length)
        stream, number = self._pick(rng, windows, count)
        return stream, low[stream] + number

    def _pick(self, rng: np.random.Generator, sizes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` uniform draws from things of which stream s has ``sizes[s]``: stream, number in it."""
        ends = np.cumsum(sizes)
        if ends[-1] == 0:
            raise DataError(
                f"the replay has no complete window of {self.length} rows yet: collect more steps first."
            )
        draw = rng.integers(ends[-1], size=count)
        stream = np.searchsorted(ends, draw, side="right")
        return stream, draw - (ends - sizes)[stream]

    def rebuild(self) -> None:
        """Derive from the rows what is kept beside them: nothing here."""

    def _empty(self) -> None:
        self.draws = dict.fromkeys(self.draws, 0)
        self.queue.clear()
        self.rebuild()

    def state_dict(self) -> dict[str, Any]:
        """Number of draws and the queue."""
        return {"draws": dict(self.draws), "queue": [list(x) for x in self.queue]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self.draws = dict(state_dict["draws"])
        self.queue = deque((s, p) for s, p in state_dict["queue"])
        self.rebuild()

    def dumps(self, path: Any) -> None:
        """Write the state to its file in a snapshot."""
        _write_json(Path(path) / self.file, self.state_dict())

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps`."""
        self.load_state_dict(_read_json(Path(path) / self.file, self.state_dict()))


class EpisodeSampler(WindowSampler):
    """Draws windows that lie within one finished episode, as TD-MPC2 does.

    A *piece* is what the ring still holds of an episode. Draws are uniform over the finished pieces of at
    least ``window`` rows, then uniform over the starts within the piece: a row of a short episode comes more
    often. The running episodes of the streams are never drawn. Source: TorchRL's ``SliceSampler`` as the
    official code sets it (``num_slices``, ``strict_length``).

    Everything but the number of draws follows from the rows. A stream cannot hold more than
    ``ring // window`` such pieces, so they too lie in a ring, and only the oldest can be shortened.
    """

    def __init__(self, storage: RowStorage, window: int, seed: int, rank: int):
        super().__init__(storage, window, 0, seed, rank, False)
        self.before = 0
        self._pieces = np.zeros((storage.streams, storage.ring // window + 1, 2), np.int64)  # start, stop
        self._oldest, self._count, self._windows, self._open = np.zeros((4, storage.streams), np.int64)

    @property
    def num_windows(self) -> int:
        """Windows that can be drawn."""
        lost = self.storage.tail - self._pieces[np.arange(len(self._count)), self._oldest, 0]
        return int((self._windows - np.where(self._count > 0, np.maximum(lost, 0), 0)).sum())

    def rebuild(self) -> None:
        """Find the pieces in the rows; costs a pass over all of them."""
        storage = self.storage
        self._oldest[:] = self._count[:] = self._windows[:] = 0
        self._open[:] = -1
        for stream, (tail, head) in enumerate(zip(storage.tail, storage.head, strict=True)):
            if tail == head:
                continue
            rows = storage.rows(stream, np.arange(tail, head))
            first = storage.arrays["is_init",][rows].copy()
            first[0] = True
            starts = tail + np.flatnonzero(first)
            for start, stop in zip(starts, starts[1:], strict=False):
                self._close(stream, start, stop)
            self._open[stream] = starts[-1]
            if not storage.arrays["valid",][rows[-1]]:
                self._close(stream, starts[-1], int(head))

    def extend(self, index: Any) -> None:
        """Take notice of new rows: forget pieces that have become too short, add those that are complete."""
        storage = self.storage
        rows = np.asarray(index)
        streams = rows // storage.ring
        tail, head = storage.tail[streams], storage.head[streams]
        while True:
            oldest = self._pieces[streams, self._oldest[streams]]
            gone = (self._count[streams] > 0) & (oldest[:, 1] - tail < self.window)
            if not gone.any():
                break
            which = streams[gone]
            self._windows[which] -= oldest[gone, 1] - oldest[gone, 0] - self.window + 1
            self._oldest[which] = (self._oldest[which] + 1) % self._pieces.shape[1]
            self._count[which] -= 1
        first, ends = storage.arrays["is_init",][rows], ~storage.arrays["valid",][rows]
        for i in np.flatnonzero(first | ends):
            stream = int(streams[i])
            if first[i]:
                if self._open[stream] >= 0:  # broken off
                    self._close(stream, self._open[stream], head[i] - 1)
                self._open[stream] = head[i] - 1
            if ends[i]:
                self._close(stream, self._open[stream], head[i])

    def _close(self, stream: int, start: int, stop: int) -> None:
        """The episode from ``start`` ends before position ``stop``."""
        self._open[stream] = -1
        start = max(start, self.storage.tail[stream])
        if stop - start >= self.window:
            slot = (self._oldest[stream] + self._count[stream]) % self._pieces.shape[1]
            self._pieces[stream, slot] = start, stop
            self._count[stream] += 1
            self._windows[stream] += stop - start - self.window + 1

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        stream, number = self._pick(rng, self._count, count)
        start, stop = self._pieces[stream, (self._oldest[stream] + number) % self._pieces.shape[1]].T
        start = np.maximum(start, self.storage.tail[stream])
        return stream, start + rng.integers(stop - start - self.window + 1)


class RowReplay:
    """Replay of rows behind TorchRL's ``ReplayBuffer`` (``self.buffer``).

    Args:
        spaces: observation and action entries.
        capacity: rows kept, over all streams.
        streams: number of environments; each owns ``capacity // streams`` rows.
        directory: where the column files lie.
        latents: latent entries that are stored with every row, None for none.
        window: rows of a training window, context included.
        context: rows before those to train on; 0 or more.
        seed, rank: choose the draws.
        online: whether every row is handed out once, soon after it was collected, before uniform draws.
        reachable: rows that the run can reach at most, if it is known; only those count for the disk space.
        sharers: processes that put a replay of this size on the same disk.
        pin: gather into page-locked memory, for a GPU.
        within_episodes: draw windows that lie in one finished episode (:class:`EpisodeSampler`), with the
            observations of all their rows; ``context``, ``online`` and ``latents`` are not used.

    Raises:
        ConfigError: if the replay cannot hold one window per stream or would not fit on the disk; nothing has
            been written then.
    """

    def __init__(
        self,
        spaces: Spaces,
        capacity: int,
        streams: int,
        directory: Path | str,
        latents: Mapping[str, Spec] | None = None,
        window: int = 65,
        context: int = 1,
        seed: int = 0,
        rank: int = 0,
        online: bool = True,
        reachable: int | None = None,
        sharers: int = 1,
        pin: bool = False,
        within_episodes: bool = False,
    ):
        if within_episodes:
            latents, context, lead = None, 0, 0
        else:
            lead = max(context, 1)
        if capacity // streams < window - context + lead:
            raise ConfigError(
                f"a capacity of {capacity:,} leaves {capacity // streams:,} rows for each of {streams} "
                f"environments, but one window has {window - context + lead}.\n"
                f"  Raise capacity to {streams * (window - context + lead):,} or more."
            )
        self.spaces, self.latents, self.window, self.context = spaces, dict(latents or {}), window, context
        specs, directory = row_specs(spaces, latents), Path(directory)
        rows = capacity if reachable is None else min(capacity, reachable)
        require_disk(directory, rows * sharers, row_bytes(specs))
        self.storage = RowStorage(specs, capacity, streams, directory, lead, pin)
        self.within_episodes = within_episodes
        self.sampler = (
            EpisodeSampler(self.storage, window, seed, rank)
            if within_episodes
            else WindowSampler(self.storage, window, context, seed, rank, online)
        )
        self.writer = RingWriter(streams)
        self.buffer = ReplayBuffer(
            storage=self.storage, sampler=self.sampler, writer=self.writer, collate_fn=_identity
        )
        self.stale_rows = 0  # write-backs that came too late

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def num_windows(self) -> int:
        """Complete training windows that can be drawn."""
        return self.sampler.num_windows

    def append(
        self,
        streams: np.ndarray,
        obs: Mapping[str, Array],
        is_init: np.ndarray,
        valid: np.ndarray,
        action: Mapping[str, Array] | None = None,
        latent: Mapping[str, Array] | None = None,
    ) -> None:
        """Append one row to each stream.

        Args:
            streams: stream numbers, all different.                                     (n,)
            obs: observations by key.                                                   (n, ...)
            is_init: the observation is the first of an episode.                        (n,) bool
            valid: an action follows; False at the last observation of an episode.      (n,) bool
            action: actions by key, None writes zeros.                                  (n, ...)
            latent: latents by key as stored, None writes "no latent".                  (n, ...)
        """
        rows: dict[Any, Any] = {"stream": streams, ("is_init",): is_init, ("valid",): valid}
        rows |= {row_key("observation", k, "obs"): obs[k] for k in self.spaces.obs}
        if action is not None:
            rows |= {row_key("action", k, "action"): action[k] for k in self.spaces.action}
        if latent is not None:
            rows |= {("latent", k): latent[k] for k in self.latents}
        self.buffer.extend(rows)

    def set_outcome(
        self, streams: np.ndarray, reward: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> None:
        """Say what the action of the newest row of each stream led to; rows without an action stay."""
        arrays, rows = self.storage.arrays, self.storage.newest(streams)
        open_ = arrays["valid",][rows] & (self.storage.head[streams] > self.storage.floor[streams])
        if not open_.all():
            rows, reward, terminated, truncated = (
                rows[open_],
                reward[open_],
                terminated[open_],
                truncated[open_],
            )
        arrays["next", "reward"][rows] = reward
        arrays["next", "terminated"][rows] = terminated
        arrays["next", "truncated"][rows] = truncated
        arrays["next", "done"][rows] = terminated | truncated

    def cut(self, streams: np.ndarray) -> None:
        """End the open episodes of streams whose environment is lost: the newest row is the truncated end."""
        storage, arrays = self.storage, self.storage.arrays
        for stream in streams:
            if storage.head[stream] == storage.floor[stream]:
                continue
            newest = storage.newest(stream)
            if not arrays["valid",][newest]:
                continue
            arrays["valid",][newest] = False
            for key in storage.specs:
                if key[0] == "action":
                    arrays[key][newest] = 0
            if not arrays["is_init",][newest] and storage.head[stream] - 1 > storage.tail[stream]:
                before = storage.rows(stream, storage.head[stream] - 2)
                arrays["next", "truncated"][before] = arrays["next", "done"][before] = True
        self.sampler.rebuild()

    def sample(self, batch_size: int, length: int | None = None, mode: str = "train") -> TensorDict:
        """Draw windows uniformly over all complete windows of all streams, or as :class:`EpisodeSampler`.

        Args:
            batch_size: number of windows B.
            length: rows of a window, context included; None is the training window, the only one within
                episodes.
            mode: ``"train"`` empties the online queue first; ``"report"`` draws from random numbers of its
                own and leaves the training draws as they are.

        Returns:
            As :meth:`RowStorage.get`, and per row ``index`` (row number) and ``generation`` (position in its
            stream), both (B, rows) int64.

        Raises:
            DataError: if there is no complete window yet.
            NotSupported: for another length within episodes.
        """
        if self.within_episodes and length not in (None, self.window):
            raise NotSupported(f"windows within episodes have {self.window} rows here, not {length}.")
        self.sampler.length, self.sampler.mode = length or self.window, mode
        data, info = self.buffer.sample(batch_size, return_info=True)
        data["index"], data["generation"] = info["index"], info["generation"]
        return data

    def write_back(self, index: Tensor, generation: Tensor, latents: Mapping[str, Tensor]) -> None:
        """Replace the latents of sampled rows. Rows evicted since stay and are counted in ``stale_rows``.

        Where windows of a batch overlap, the later window of the batch wins.

        Args:
            index, generation: as sampled, each row of them consecutive rows of one stream.  (B, L)
            latents: new values by key, in the type they are stored in.                      (B, L, ...)
        """
        storage, length = self.storage, index.shape[1]
        streams, starts = index[:, 0].numpy() // storage.ring, generation[:, 0].numpy()
        stale = np.clip(storage.tail[streams] - starts, 0, length)
        self.stale_rows += int(stale.sum())
        for key, value in latents.items():
            array, values = storage.arrays["latent", key], _raw(value)
            for b, (stream, start, skip) in enumerate(zip(streams, starts, stale, strict=True)):
                at = int(skip)
                for row, count in storage._runs(int(stream), int(start) + at, int(start) + length):
                    array[row : row + count] = values[b, at : at + count]
                    at += count

    def close(self) -> None:
        """Remove the column files; the replay cannot be used any more."""
        self.storage.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters, queue and draws as plain values; the rows are in :meth:`snapshot`."""
        return {
            "storage": self.storage.state_dict(),
            "sampler": self.sampler.state_dict(),
            "writer": self.writer.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for the same rows."""
        self.storage.load_state_dict(state["storage"])
        self.sampler.load_state_dict(state["sampler"])
        self.writer.load_state_dict(state["writer"])

    def snapshot(self, directory: Path | str) -> None:
        """Write rows and state to a new folder, complete or not at all; one that is there is replaced."""
        final = Path(directory)
        work = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
        work.mkdir(parents=True)
        try:
            for part in (self.storage, self.sampler, self.writer):
                part.dumps(work)
            _sync_directory(work)
            old = None
            if final.exists():
                old = final.with_name(f"{work.name}.old")
                os.rename(final, old)
            os.rename(work, final)
            _sync_directory(final.parent)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
        if old is not None:
            shutil.rmtree(old)

    def restore(self, directory: Path | str) -> None:
        """Go on from :meth:`snapshot`, with the same draws; a smaller capacity keeps the newest rows.

        Raises:
            CheckpointError: if the snapshot is damaged or belongs to another environment, model or number of
                streams.
        """
        small = [
            (part, _read_json(Path(directory) / part.file, part.state_dict()))
            for part in (self.sampler, self.writer)
        ]
        self.storage.loads(directory)
        for part, state in small:
            part.load_state_dict(state)


def require_disk(directory: Path, rows: int, bytes_per_row: int) -> None:
    """Refuse a replay that cannot fit.

    Raises:
        ConfigError: with all figures.
    """
    parent = directory.absolute()
    while not parent.exists():
        parent = parent.parent
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


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _identity(x: Any) -> Any:
    return x
