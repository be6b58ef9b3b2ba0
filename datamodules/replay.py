"""The replay: rows that are written, drawn as windows and refreshed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules._torchrl import ImmutableDatasetWriter, ReplayBuffer, Writer
from datamodules.files import read_json, write_folder
from datamodules.rows import Array, Key, RowStorage, _raw, nested, require_disk, row_bytes, row_key, row_specs
from datamodules.sampling import EpisodeSampler, Kept, WindowSampler
from datamodules.views import NO_LATENT
from lit_wm.errors import ConfigError, DataError, NotSupported
from lit_wm.types import Spaces, Spec

if TYPE_CHECKING:
    from datamodules.offline import CacheRows


class RingWriter(Kept, Writer):
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


class RowReplay:
    """Replay of rows behind TorchRL's ``ReplayBuffer`` (``self.buffer``).

    Args:
        spaces: observation and action entries.
        capacity: rows kept; each of the ``streams`` environments owns ``capacity // streams``.
        directory, latents, pin: see :class:`~datamodules.rows.RowStorage`.
        window, context, seed, rank, online: see :class:`~datamodules.sampling.WindowSampler`.
        reachable: rows that the run can reach at most, if it is known; only those count for the disk space.
        sharers: processes that put a replay of this size on the same disk.
        within_episodes: draw windows that lie in one finished episode (:class:`EpisodeSampler`), with the
            observations of all their rows; ``context``, ``online`` and ``latents`` are not used.
        by: what those draws are uniform over, ``episodes`` or ``windows``.

    Raises:
        ConfigError: if the replay cannot hold one window per stream or would not fit on the disk; nothing has
            been written then.
    """

    def __init__(
        self, spaces: Spaces, capacity: int, streams: int, directory: Path | str,
        latents: Mapping[str, Spec] | None = None, window: int = 65, context: int = 1, seed: int = 0,
        rank: int = 0, online: bool = True, reachable: int | None = None, sharers: int = 1, pin: bool = False,
        within_episodes: bool = False, by: str = "episodes",
    ):  # fmt: skip
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
        specs, directory = row_specs(spaces, latents), Path(directory)
        rows = capacity if reachable is None else min(capacity, reachable)
        require_disk(directory, rows * sharers, row_bytes(specs))
        storage = RowStorage(specs, capacity, streams, directory, lead, pin)
        sampler = WindowSampler(storage, window, context, seed, rank, online)
        if within_episodes:
            sampler = EpisodeSampler(storage, window, seed, rank, by)
        self._assemble(spaces, storage, sampler, RingWriter(streams))

    @classmethod
    def of_dataset(
        cls, storage: CacheRows, spaces: Spaces, window: int, context: int = 1, seed: int = 0, rank: int = 0,
        within_episodes: bool = False, by: str = "episodes", name: str = "replay",
    ) -> RowReplay:  # fmt: skip
        """A replay of the rows of a dataset, which only draws and keeps latents.

        Args:
            storage, spaces: the rows, with a ``lead`` of ``max(context, 1)``, 0 within episodes; its entries.
            name: of its random numbers; the others are as for a ring.

        Raises:
            DataError: if no window fits.
        """
        replay = cls.__new__(cls)
        sampler = WindowSampler(storage, window, context, seed, rank, False, name)
        if within_episodes:
            sampler = EpisodeSampler(storage, window, seed, rank, by, name)
        sampler.rebuild()
        replay._assemble(spaces, storage, sampler, None)
        if replay.num_windows == 0:
            assert storage.episodes is not None
            longest = int(np.subtract(*storage.episodes[::-1]).max()) if within_episodes else storage.ring
            raise DataError(
                f"{storage.cache.uri}: {'the longest episode has' if within_episodes else 'there are'} "
                f"{longest:,} observations, but a window has {window}.\n"
                "  Lower data.batch_length, or use more data."
            )
        return replay

    def _assemble(self, spaces: Spaces, storage: RowStorage, sampler: WindowSampler, writer: Any) -> None:
        self.spaces, self.storage, self.sampler = spaces, storage, sampler
        self.latents = {key[1]: spec for key, spec in storage.specs.items() if key[0] == "latent"}
        self.window, self.context = sampler.window, sampler.context
        self.within_episodes = isinstance(sampler, EpisodeSampler)
        self.writer: RingWriter | None = writer
        parts = {"storage": storage, "sampler": sampler, "writer": writer or ImmutableDatasetWriter()}
        self.buffer = ReplayBuffer(**parts, collate_fn=lambda x: x)
        self.stale_rows = 0  # write-backs that came too late

    def __len__(self) -> int:
        return len(self.storage)

    @property
    def num_windows(self) -> int:
        """Complete training windows that can be drawn."""
        return self.sampler.num_windows

    def append(
        self, streams: np.ndarray, obs: Mapping[str, Array], is_init: np.ndarray, valid: np.ndarray,
        action: Mapping[str, Array] | None = None, latent: Mapping[str, Array] | None = None,
    ) -> None:  # fmt: skip
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
        rows |= {row_key("observation", k, self.spaces.obs): obs[k] for k in self.spaces.obs}
        if action is not None:
            rows |= {row_key("action", k, self.spaces.action): action[k] for k in self.spaces.action}
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
            rows, reward, terminated, truncated = (x[open_] for x in (rows, reward, terminated, truncated))
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
            length: rows of a window with its context; None: of training, the only one within episodes.
            mode: ``train`` empties the online queue first; ``report`` leaves the training draws as they are.

        Returns:
            As :meth:`RowStorage.get`, and per row ``index`` (row number) and ``generation`` (position in its
            stream), both (B, rows) int64.

        Raises:
            DataError: if there is no complete window yet.
            NotSupported: for another length within episodes.
        """
        columns = self.sample_columns(batch_size, length, mode)
        return TensorDict(nested(columns), [batch_size])

    def sample_columns(
        self, batch_size: int, length: int | None = None, mode: str = "train",
        out: Mapping[Key, Tensor] | None = None, latents: bool = True,
    ) -> dict[Key, Tensor]:  # fmt: skip
        """As :meth:`sample`, as a plain dict by column, which takes less time to make.

        Args:
            batch_size, length, mode: as there.
            out: memory for the observations, by column; None takes new memory.           (B, T, ...)
            latents: whether to read them now; else :meth:`add_latents` does later.
        """
        if self.within_episodes and length not in (None, self.window):
            raise NotSupported(f"windows within episodes have {self.window} rows here, not {length}.")
        self.sampler.length, self.sampler.mode = length or self.window, mode
        index, position = self.sampler.draw(batch_size)
        columns = self.storage.gather(index, out)
        columns["index",], columns["generation",] = index, position
        if latents:
            self.add_latents(columns)
        return columns

    def add_latents(self, columns: dict[Key, Tensor]) -> None:
        """Read the latents of the last lead row of sampled windows, as they are now. (B, ...) each"""
        columns |= self.storage.carried(columns["index",])

    def write_back(self, index: Tensor, generation: Tensor, latents: Mapping[str, Tensor]) -> None:
        """Replace the latents of sampled rows; those evicted since are counted in ``stale_rows``.

        Args:
            index, generation: as sampled; where windows overlap, the later one of the batch wins.   (B, L)
            latents: new values by key, in the type they are stored in.                         (B, L, ...)
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
                    storage.mark(row, count)
                    at += count

    def close(self) -> None:
        """Remove the column files; the replay cannot be used any more."""
        self.storage.close()

    def state_dict(self) -> dict[str, Any]:
        """Counters, queue and draws as plain values; the rows are in :meth:`snapshot`."""
        return {name: part.state_dict() for name, part in self._parts().items()}

    def _parts(self) -> dict[str, Any]:
        parts = {"storage": self.storage, "sampler": self.sampler, "writer": self.writer}
        return {name: part for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for the same rows."""
        for name, part in self._parts().items():
            part.load_state_dict(state[name])

    def snapshot(self, directory: Path | str) -> None:
        """Write rows and state to a new folder, complete or not at all; one that is there is replaced."""
        write_folder(Path(directory), self.dump)

    def dump(self, directory: Path) -> None:
        """Write rows and state into an empty folder."""
        for part in self._parts().values():
            part.dumps(directory)

    def restore(self, directory: Path | str) -> None:
        """Go on from :meth:`snapshot`, with the same draws; a smaller capacity keeps the newest rows. Raises
        CheckpointError if the snapshot is damaged or belongs to another environment, model or number of
        streams.
        """
        parts = [part for part in (self.sampler, self.writer) if part is not None]
        small = [(part, read_json(Path(directory) / part.file, part.state_dict())) for part in parts]
        self.storage.loads(directory)
        for part, state in small:
            part.load_state_dict(state)
