"""Several replays drawn from as one, and the thread that draws ahead."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.files import read_json, write_folder, write_json
from datamodules.replay import RowReplay
from datamodules.rows import Key
from datamodules.sampling import counter_rng
from lit_wm.errors import CheckpointError, DataError
from lit_wm.types import Tensors

_STATE = "mixture.json"


class Mixture:
    """Replays of the same entries, each with a share of every batch.

    Of 16 windows a share of 0.3 has 4 or 5, 4.8 on average; which depends on seed, rank and the number of the
    draw alone. A replay without a complete window, as that of an environment at first, has no share.

    Args:
        parts: the replays, by name; the parts of a batch stand in this order.
        weights: ``weights(update)`` are the relative shares when that many batches have been drawn, those of
            pretraining too; None gives every part a share in proportion to its windows.
        seed, rank: choose the shares.
    """

    def __init__(
        self, parts: Mapping[str, RowReplay], weights: Callable[[int], list[float]] | None = None,
        seed: int = 0, rank: int = 0,
    ):  # fmt: skip
        self.names, self.parts = list(parts), list(parts.values())
        self.weights, self.seed, self.rank = weights, seed, rank
        self.draws = {"train": 0, "report": 0}
        self.last_shares = dict.fromkeys(self.names, 0.0)  # of the last training batch
        self.latents = self.parts[0].latents

    def __len__(self) -> int:
        return sum(len(part) for part in self.parts)

    @property
    def num_windows(self) -> int:
        """Complete training windows that can be drawn."""
        return sum(part.num_windows for part in self.parts)

    @property
    def stale_rows(self) -> int:
        """Write-backs that came too late."""
        return sum(part.stale_rows for part in self.parts)

    def shares(self, batch_size: int, mode: str = "train") -> list[int]:
        """Windows of each part in the next batch. Raises DataError if no part with a weight above 0 has a
        window.
        """
        update = self.draws["train"]
        windows = [part.num_windows for part in self.parts]
        weights = np.array(self.weights(update) if self.weights else windows, np.float64)
        weights[np.array(windows) == 0] = 0
        if not weights.sum():
            raise DataError(
                f"update {update} has nothing to draw from: {', '.join(self.names)} have {windows} windows.\n"
                "  Give one of them a weight, or collect more steps first."
            )
        offset = counter_rng(self.seed, self.rank, f"mixture/{mode}", self.draws[mode]).random()
        ends = np.cumsum(weights / weights.sum()) * batch_size
        ends[-1] = batch_size
        return np.diff(np.ceil(ends - offset), prepend=np.ceil(-offset)).astype(int).tolist()

    def sample_columns(
        self, batch_size: int, length: int | None = None, mode: str = "train", latents: bool = True
    ) -> dict[Key, Tensor]:
        """As :meth:`RowReplay.sample_columns`, with ``source``, the number of the part.            (B,)"""
        shares = self.shares(batch_size, mode)
        count, self.draws[mode] = self.draws[mode], self.draws[mode] + 1
        if mode == "train":
            self.last_shares = {n: s / batch_size for n, s in zip(self.names, shares, strict=True)}
        drawn: list[dict[Key, Tensor]] = []
        out: dict[Key, Tensor] = {}
        start = 0
        for number, (part, share) in enumerate(zip(self.parts, shares, strict=True)):
            part.sampler.draws[mode] = count  # whether or not it had a share before
            if not share:
                continue
            mine = None
            if share < batch_size:
                out = out or self._memory(part, batch_size, (length or part.window) - part.context)
                mine = {key: value[start : start + share] for key, value in out.items()}
            columns = part.sample_columns(share, length, mode, mine, latents)
            columns["source",] = torch.full((share,), number)
            drawn.append(columns)
            start += share
        if len(drawn) == 1:
            return drawn[0]
        return self._join(drawn, out)

    @staticmethod
    def _join(drawn: list[dict[Key, Tensor]], out: Mapping[Key, Tensor]) -> dict[Key, Tensor]:
        """All rows in one; those in ``out`` are that already."""
        if any(("fake_last",) in columns for columns in drawn):  # which environments never have
            for columns in drawn:
                columns.setdefault(("fake_last",), torch.zeros_like(columns["valid",]))
        joined = {key: torch.cat([columns[key] for columns in drawn]) for key in drawn[0] if key not in out}
        return joined | dict(out)

    def last_rows(self, number: int, length: int) -> tuple[dict[Key, Tensor], Tensor]:
        """The last rows of about ``number`` episodes of datasets, evenly spread over each task of each part,
        of which there is one at least.

        Returns:
            Columns without lead rows, (B, T, ...) with T of up to ``length``, short episodes filled up with
            their last row; and which rows those are not. (B, T)
        """
        groups = []
        for part in self.parts:
            assert part.storage.episodes is not None
            task = part.storage.arrays["task",][part.storage.episodes[0]].reshape(-1)
            groups.append([np.flatnonzero(task == one) for one in np.unique(task)])
        each = max(1, number // sum(map(len, groups)))
        found = []
        for part, tasks in zip(self.parts, groups, strict=True):
            starts, stops = part.storage.episodes  # type: ignore[misc]
            spread = [own[np.linspace(0, len(own) - 1, each).astype(int)] for own in tasks]
            chosen = np.unique(np.concatenate(spread))
            found.append((part.storage, np.maximum(starts, stops - length)[chosen], stops[chosen]))
        longest = max(int((stops - begins).max()) for _, begins, stops in found)
        drawn, exist = [], []
        for n, (storage, begins, stops) in enumerate(found):
            rows = torch.from_numpy(begins[:, None] + np.arange(longest))
            last, lead = torch.from_numpy(stops[:, None] - 1), storage.lead
            exist.append(rows <= last)
            index = rows.minimum(last)
            columns = storage.gather(torch.cat([index[:, :1].expand(-1, lead), index], 1))
            drawn.append({k: v if k[0] == "observation" else v[:, lead:] for k, v in columns.items()})
            drawn[-1]["source",] = torch.full((len(begins),), n)
        return self._join(drawn, {}), torch.cat(exist)

    def _memory(self, part: RowReplay, batch_size: int, steps: int) -> dict[Key, Tensor]:
        """Where the parts put their observations. (B, T, ...)"""
        storage = part.storage
        return {
            key: storage.buffer(key, (batch_size, steps, *spec.shape), getattr(torch, spec.dtype))
            for key, spec in storage.specs.items()
            if key[0] == "observation"
        }

    def add_latents(self, columns: dict[Key, Tensor]) -> None:
        """As :meth:`RowReplay.add_latents`."""
        found: dict[Key, list[Tensor]] = {}
        for number, rows in self._split(columns["source",]):
            mine: dict[Key, Tensor] = {("index",): columns["index",][rows]}
            self.parts[number].add_latents(mine)
            for key, value in mine.items():
                if key[0] == "latent":
                    found.setdefault(key, []).append(value)
        columns |= {key: torch.cat(values) for key, values in found.items()}

    def write_back(self, index: Tensor, generation: Tensor, latents: Tensors, source: Tensor) -> None:
        """As :meth:`RowReplay.write_back`, each row to its part."""
        for number, rows in self._split(source):
            mine = {key: value[rows] for key, value in latents.items()}
            self.parts[number].write_back(index[rows], generation[rows], mine)

    @staticmethod
    def _split(source: Tensor) -> list[tuple[int, slice]]:
        """Number and rows of every part of a batch."""
        numbers, counts = torch.unique_consecutive(source, return_counts=True)
        ends = counts.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        return [(n, slice(a, b)) for n, a, b in zip(numbers.tolist(), starts, ends, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Draws, and the states of the parts, as plain values."""
        return {"draws": dict(self.draws), "parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`state_dict`, for the same rows."""
        self.draws = dict(state["draws"])
        for part, mine in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(mine)

    def snapshot(self, directory: Path | str) -> None:
        """Write draws, rings and latents to a new folder, complete or not at all."""

        def fill(work: Path) -> None:
            write_json(work / _STATE, {"draws": self.draws, "names": self.names})
            for number, part in enumerate(self.parts):
                (work / f"part{number}").mkdir()
                part.dump(work / f"part{number}")

        write_folder(Path(directory), fill)

    def restore(self, directory: Path | str) -> None:
        """Go on from :meth:`snapshot`, with the same draws. Raises CheckpointError if the snapshot is damaged
        or of other data.
        """
        state = read_json(Path(directory) / _STATE, ("draws", "names"))
        if state["names"] != self.names:
            raise CheckpointError(
                f"{directory} is of {', '.join(state['names'])}, this run has {', '.join(self.names)}.\n"
                "  Resume with the same data.sources and data.env."
            )
        for number, part in enumerate(self.parts):
            part.restore(Path(directory) / f"part{number}")
        self.draws = dict(state["draws"])

    def close(self) -> None:
        """Remove the files of all parts."""
        for part in self.parts:
            part.close()


class Prefetch:
    """Draws batches ahead in a thread; only for replays that nobody writes rows to.

    Which batch comes next does not depend on the thread: draws are numbered, and latents, which training
    refreshes, are read when the batch is handed out.

    Args:
        replay: draws from it must depend on its state alone.
        batch_size: of every batch.
        depth: batches ahead.
    """

    def __init__(self, replay: Mixture, batch_size: int, depth: int = 2):
        self.replay, self.batch_size, self.depth = replay, batch_size, depth
        self._thread: ThreadPoolExecutor | None = None
        self._ahead: deque[Future[tuple[dict[str, Any], dict[Key, Tensor]]]] = deque()

    def _draw(self) -> tuple[dict[str, Any], dict[Key, Tensor]]:
        return self.replay.state_dict(), self.replay.sample_columns(self.batch_size, latents=False)

    def next(self) -> dict[Key, Tensor]:
        """The next batch; an error of the thread comes out here."""
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "replay")
        while len(self._ahead) <= self.depth:
            self._ahead.append(self._thread.submit(self._draw))
        _, columns = self._ahead.popleft().result()
        if self.replay.latents:
            self.replay.add_latents(columns)
        return columns

    def rewind(self) -> None:
        """End the thread and give back what was drawn and not handed out.

        The replay's state is then that of its user; the next batch begins anew.
        """
        for future in reversed(self._ahead):
            future.cancel()
        # An error, if there is one, comes out when its batch is wanted again.
        drawn = [f.result() for f in self._ahead if not f.cancelled() and f.exception() is None]
        if drawn:
            self.replay.load_state_dict(drawn[0][0])
        self._ahead.clear()
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None
