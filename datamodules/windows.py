"""Batches to train on from a buffer that holds still, without a data module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import torch

from datamodules.buffer import ReplayBuffer
from datamodules.data import task_number
from datamodules.offline import BOUNDS_HINT, CacheRows, observation_statistics
from datamodules.rows import RowStorage, nested
from datamodules.sampling import EpisodeSampler, WindowSampler
from datamodules.selection import SourceSpec, model_spaces
from datamodules.views import dreamer_view, tdmpc2_view
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Batch, Spaces

_FOLDERS = count()  # of this process


def buffer_spaces(buffer: ReplayBuffer) -> Spaces:
    """The entries of a buffer as a model sees them; its longest episode stands for an unknown time limit."""
    if buffer.cache is not None:
        return model_spaces(buffer.cache)
    spaces = buffer.spaces
    if spaces.episode_length is None and buffer._replay is not None and buffer.num_episodes:
        return replace(spaces, episode_length=int(np.diff(buffer._replay.sampler.pieces()).max()) - 1)
    return spaces


class BufferWindows:
    """Windows of a buffer's finished episodes: batch k depends on the seed and k alone.

    Args:
        buffer: nothing may be added while these windows are in use.
        steps: T of a window.
        within_episodes: whether windows lie within one episode, as TD-MPC2 wants them; else they run across
            the ends of episodes, as Dreamer wants them, each from a state of zeros.
        seed: of the draws.
        tasks, task: of a model of several tasks, and the one that it plays.

    Raises:
        DataError: if no window is as long, or for actions beyond -1 ... 1 whose bounds nobody knows.
    """

    def __init__(
        self,
        buffer: ReplayBuffer,
        steps: int,
        within_episodes: bool,
        seed: int = 0,
        tasks: Sequence[Any] = (),
        task: int | None = None,
    ):
        rows = buffer._filled(1)
        self.within_episodes, self.fake = within_episodes, sorted(buffer._fake)
        self.tasks = bool(tasks) and buffer.cache is not None  # the rows of a ring know no task
        self.buffer = buffer
        if buffer.cache is None:
            self.storage: RowStorage = rows.storage
        else:  # rows of their own, with actions in -1 ... 1
            cache, folder = buffer.cache, buffer._folder / f"train{next(_FOLDERS)}"
            every, spec = np.arange(len(cache.episodes["start"])), SourceSpec(str(cache.uri or cache.folder))
            numbers, lead = task_number(spec, cache, tasks, task), int(not within_episodes)
            try:
                self.storage = CacheRows(cache, folder, buffer.spaces, every, spec, lead=lead, task=numbers)
            except DataError as error:
                here = "Say them: ReplayBuffer.load(..., action_low=, action_high=)."
                raise DataError(str(error).replace(BOUNDS_HINT, here)) from None
        storage = self.storage
        self.rows = storage.rows(0, np.arange(storage.tail[0], storage.head[0]))  # those that are there
        self._check_bounds(buffer)
        if within_episodes:
            self.sampler: WindowSampler = EpisodeSampler(self.storage, steps, seed, 0, name="train")
            most, what = int(np.diff(rows.sampler.pieces()).max()), "the longest episode has"
        else:
            self.sampler = WindowSampler(self.storage, steps, 0, seed, 0, False, "train")
            most = int((self.storage.head - self.sampler.starts(1)[0]).max())
            what = "there are"
        self.sampler.rebuild()
        if not self.sampler.num_windows:
            fits = f"batch_length={most} fits"
            if within_episodes:
                fits = f"A model with horizon={most - 1} fits"
            hint = fits if most > 1 else "Add longer episodes"
            raise DataError(
                f"a window has {steps} steps, but {what} {most} observations in {buffer}.\n  {hint}."
            )

    def batch(self, size: int, number: int, mode: str = "train") -> Batch:
        """Batch ``number`` of ``size`` windows; those of the mode ``report`` are others."""
        self.sampler.draws[mode], self.sampler.mode = number, mode
        index, _ = self.sampler.draw(size)
        columns = self.storage.gather(index)
        if self.buffer.cache is None:
            columns = self.buffer._for_models(columns)
        if self.fake:
            copied = np.isin(self.storage.arrays["episode",][index.numpy()], self.fake)
            columns["fake_last",] = torch.from_numpy(copied).unsqueeze(-1) & ~columns["valid",]
        rows = nested(columns)
        if self.within_episodes:
            return tdmpc2_view(rows, self.tasks)
        batch = dreamer_view(rows, 0, False, tasks=self.tasks)
        skip = int(self.storage.lead == 0)  # a ring reads the observation of the row before too
        return replace(batch, obs={k: v[:, skip:] for k, v in batch.obs.items()})

    @property
    def terminates(self) -> bool:
        """Whether an episode ends by itself."""
        return bool(self.storage.arrays["next", "terminated"][self.rows].any())

    def statistics(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """See :func:`datamodules.offline.observation_statistics`.

        Raises:
            ConfigError: for a buffer that may still grow.
        """
        if not isinstance(self.storage, CacheRows):
            raise ConfigError(
                "normalize is fitted to a dataset, not to a buffer that grows: save() it and load() that"
            )
        return observation_statistics([self.storage])

    def _check_bounds(self, buffer: ReplayBuffer) -> None:
        """Of what add() took, where nobody says them; a dataset's own have been seen to."""
        assert buffer._schema is not None
        for key, values in self.storage.arrays.items():
            known = isinstance(self.storage, CacheRows) or key[-1] in buffer._schema.low
            if key[0] != "action" or values.dtype.kind != "f" or known:
                continue
            if (most := float(np.abs(values[self.rows]).max())) > 1 + 1e-5:
                raise DataError(
                    f"action {key[-1]!r} goes up to {most:.3g} in {buffer}; models need -1 to 1.\n"
                    "  Say its bounds: ReplayBuffer(..., action_low=, action_high=)."
                )
