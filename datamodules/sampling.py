"""Which windows of rows make the next batch."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules._torchrl import Sampler, Storage
from datamodules.files import read_json, write_json
from datamodules.rows import RowStorage
from lit_wm.errors import DataError
from lit_wm.noise import stream_seed


class _Streams(threading.local):
    """The generators of one thread: they are set back for each draw, which no other thread may see."""

    def __init__(self) -> None:
        self.of = lru_cache(256)(self._make)

    @staticmethod
    def _make(seed: int, rank: int, name: str) -> tuple[np.random.Philox, Any, np.random.Generator]:
        bits = np.random.Philox(key=stream_seed(seed, rank, name), counter=0)
        return bits, bits.state, np.random.Generator(bits)


_streams = _Streams()


def counter_rng(seed: int, rank: int, name: str, count: int) -> np.random.Generator:
    """The generator of draw number ``count``: a function of these four and nothing else.

    Draw from it before this thread asks for the same stream again: it is one object, set back each time,
    which takes a tenth of the time of a new one.
    """
    bits, state, generator = _streams.of(seed, rank, name)
    state["state"]["counter"][:] = 0, count, 0, 0
    bits.state = state
    return generator


class Kept:
    """A small state that a snapshot keeps as JSON in ``file``."""

    file: str
    state_dict: Callable[[], dict[str, Any]]
    load_state_dict: Callable[[dict[str, Any]], None]

    def dumps(self, path: Any) -> None:
        """Write the state into a folder."""
        write_json(Path(path) / self.file, self.state_dict())

    def loads(self, path: Any) -> None:
        """Read :meth:`dumps`."""
        self.load_state_dict(read_json(Path(path) / self.file, self.state_dict()))


class WindowSampler(Kept, Sampler):
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
        name: of the random numbers; another for every source of a mixture.
    """

    file = "sampler.json"

    def __init__(
        self, storage: RowStorage, window: int, context: int, seed: int, rank: int, online: bool,
        name: str = "replay",
    ):  # fmt: skip
        self.storage, self.window, self.context, self.name = storage, window, context, name
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
        """As :meth:`draw`, in the form that TorchRL wants."""
        index, position = self.draw(batch_size)
        return index, {"generation": position}

    def draw(self, batch_size: int) -> tuple[Tensor, Tensor]:
        """Row numbers and positions of windows (plus the row before, without context), (B, rows) int64 each.
        Raises DataError if there is no complete window yet.
        """
        chosen: list[tuple[int, int]] = []
        if self.mode == "train" and self.length == self.window:
            tail = self.starts(self.length)[0] if self.queue else ()
            while self.queue and len(chosen) < batch_size:
                queued = self.queue.popleft()
                if queued[1] >= tail[queued[0]]:  # else evicted unseen
                    chosen.append(queued)
        rng = counter_rng(self.seed, self.rank, f"{self.name}/{self.mode}", self.draws[self.mode])
        stream, start = self._draw(rng, batch_size - len(chosen))
        self.draws[self.mode] += 1
        if chosen:
            first = np.array(chosen)
            stream, start = np.append(first[:, 0], stream), np.append(first[:, 1], start)
        position = start[:, None] + np.arange(-self.before, self.length)
        if self.before:
            position = np.maximum(position, self.storage.tail[stream][:, None])
        index = self.storage.rows(stream[:, None], position)
        return torch.from_numpy(index), torch.from_numpy(position)

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Streams and first positions of ``count`` windows."""
        low, windows = self.starts(self.length)
        stream, number = self._pick(rng, windows, count)
        return stream, low[stream] + number

    def _pick(self, rng: np.random.Generator, sizes: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """``count`` uniform draws from things of which stream s has ``sizes[s]``: stream, number in it."""
        ends = np.cumsum(sizes)
        if not ends[-1]:
            what = f"the replay has no complete window of {self.length} rows yet"
            raise DataError(f"{what}: collect more steps first.")
        draw = rng.integers(ends[-1], size=count)
        if len(ends) == 1:
            return np.zeros(count, np.int64), draw
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


class EpisodeSampler(WindowSampler):
    """Draws windows that lie within one finished episode, as TD-MPC2 does.

    A *piece* is what the ring still holds of an episode, or a whole episode of a dataset. With ``by`` =
    ``"episodes"`` draws are uniform over the finished pieces of at least ``window`` rows, then over the
    starts within the piece: a row of a short episode comes more often. Source: TorchRL's ``SliceSampler`` as
    the official code sets it (``num_slices``, ``strict_length``). With ``"windows"`` every window is equally
    likely. The running episodes of the streams are never drawn.

    Everything but the number of draws follows from the rows. A stream cannot hold more than
    ``ring // window`` such pieces, so they too lie in a ring, and only the oldest can be shortened.
    """

    def __init__(
        self, storage: RowStorage, window: int, seed: int, rank: int, by: str = "episodes",
        name: str = "replay",
    ):  # fmt: skip
        super().__init__(storage, window, 0, seed, rank, False, name)
        self.before, self.by = 0, by
        most = storage.ring // window if storage.episodes is None else len(storage.episodes[0])
        # Start, stop, and the number of windows that earlier pieces of the stream ever had.
        self._pieces = np.zeros((storage.streams, most + 1, 3), np.int64)
        self._oldest, self._count, self._windows, self._open = np.zeros((4, storage.streams), np.int64)
        self._ever = np.zeros(storage.streams, np.int64)

    @property
    def num_windows(self) -> int:
        """Windows that can be drawn."""
        return int(self._sizes().sum())

    def pieces(self, stream: int = 0) -> np.ndarray:
        """First position and end of the pieces of a stream, oldest first. (n, 2)"""
        slots = (self._oldest[stream] + np.arange(self._count[stream])) % self._pieces.shape[1]
        return np.maximum(self._pieces[stream, slots, :2], self.storage.tail[stream])

    def _sizes(self) -> np.ndarray:
        """Windows that can be drawn, per stream."""
        return self._windows - self._lost()

    def _lost(self) -> np.ndarray:
        """Windows of the oldest piece that have lost their first rows, per stream."""
        lost = self.storage.tail - self._pieces[np.arange(len(self._count)), self._oldest, 0]
        return np.where(self._count > 0, np.maximum(lost, 0), 0)

    def rebuild(self) -> None:
        """Find the pieces; in a ring that costs a pass over all rows."""
        storage = self.storage
        if storage.episodes is not None and self._count.any():
            return  # those of a dataset do not change
        self._oldest[:] = self._count[:] = self._windows[:] = self._ever[:] = 0
        self._open[:] = -1
        if storage.episodes is not None:
            start, stop = storage.episodes
            long = stop - start >= self.window
            windows = (stop - start - self.window + 1)[long]
            n = self._count[0] = len(windows)
            before = np.cumsum(windows) - windows
            self._pieces[0, :n] = np.stack([start[long], stop[long], before], 1)
            self._windows[0] = self._ever[0] = windows.sum()
            return
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
            self._pieces[stream, slot] = start, stop, self._ever[stream]
            self._count[stream] += 1
            for total in (self._windows, self._ever):
                total[stream] += stop - start - self.window + 1

    def _draw(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        if self.by == "episodes":
            stream, number = self._pick(rng, self._count, count)
            slot = (self._oldest[stream] + number) % self._pieces.shape[1]
            start, stop = self._pieces[stream, slot, :2].T
            start = np.maximum(start, self.storage.tail[stream])
            return stream, start + rng.integers(stop - start - self.window + 1)
        stream, number = self._pick(rng, self._sizes(), count)
        number += self._lost()[stream] + self._pieces[stream, self._oldest[stream], 2]
        position = np.empty_like(number)
        for s in np.unique(stream):
            mine = stream == s
            position[mine] = self._locate(int(s), number[mine])
        return stream, position

    def _locate(self, stream: int, number: np.ndarray) -> np.ndarray:
        """Position of windows by their number among all that the stream ever had."""
        pieces, oldest = self._pieces[stream], int(self._oldest[stream])
        end = oldest + int(self._count[stream])
        wrapped = max(0, end - len(pieces))
        slot = oldest - 1 + np.searchsorted(pieces[oldest:end, 2], number, side="right")
        if wrapped:
            later = number >= pieces[0, 2]
            slot[later] = np.searchsorted(pieces[:wrapped, 2], number[later], side="right") - 1
        return pieces[slot, 0] + number - pieces[slot, 2]
