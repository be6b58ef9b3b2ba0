"""The replay for scripts and notebooks: rows, samplers and caches of the data module without a Trainer."""

from __future__ import annotations

import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from datamodules.cache import Cache, ingest, write_rows
from datamodules.episodes import Arrays, Episode, Report, Schema, Source, _typed, checked
from datamodules.offline import CacheRows, action_bounds, scaled
from datamodules.replay import RowReplay
from datamodules.rows import Key, nested, row_key
from datamodules.sampling import EpisodeSampler, counter_rng
from datamodules.selection import SourceSpec
from datamodules.sources import find_uri, open_source
from datamodules.sources.flat import fitted, infer
from datamodules.sources.npz import write_npz
from lit_wm.errors import ConfigError, DataError, NotSupported, whole
from lit_wm.types import Spaces, Spec, Tensors

_SAMPLERS = 8  # sequence lengths that are kept ready
_ONE = np.zeros(1, np.int64)  # the only stream


class ReplayBuffer:
    """Transitions to draw from: a ring that :meth:`add` fills, or a dataset that :meth:`load` opens.

    A transition is an observation o_t, the action a_t chosen at it, the reward r_{t+1} and the flags that a_t
    led to, and o_{t+1}. Values are kept in their units, floats as float32, and images as uint8. Several
    observations or actions are mappings by name.

    Args:
        capacity: observations kept, T+1 for an episode of T transitions; the oldest go first.
        obs_shape: of one observation, to be checked.
        action_dim: numbers of a continuous action, or classes of an integer one, which needs it.
        spaces: all entries, where one transition does not show them; ``lit_wm.envs.spaces_from_gym`` makes
            them from those of an environment.
        directory: for memory-mapped files, which are gone with the buffer; None is a temporary one.
        seed: of the draws: the same calls give the same batches.
        action_low, action_high: what is -1 and 1 to a model: a number or an array of the only continuous
            action, or several by name. :func:`lit_wm.training.train` and :meth:`sample_sequences` scale by
            them, and keep values beyond them; where they are not said ``train`` takes actions in -1 ... 1.

    Raises:
        ConfigError: for bounds or numbers that cannot be.
    """

    def __init__(
        self, capacity: int = 100_000, obs_shape: Iterable[int] | None = None, action_dim: int | None = None,
        *, spaces: Spaces | None = None, directory: str | Path | None = None, seed: int = 0,
        action_low: Any = None, action_high: Any = None,
    ):  # fmt: skip
        action_dim = None if action_dim is None else whole("action_dim", action_dim)
        self.capacity, self.seed, self._said = whole("capacity", capacity), seed, (obs_shape, action_dim)
        self._bounds = action_low, action_high
        self.cache: Cache | None = None  # of a loaded buffer
        self._schema = None if spaces is None else _bounded(Schema(spaces), *self._bounds)
        if spaces is None:  # what cannot be whatever the actions are
            names = [k for x in self._bounds if isinstance(x, Mapping) for k in x] or ["action"]
            given: list[list[Any]] = [
                [x.get(k) if isinstance(x, Mapping) else x for x in self._bounds] for k in names
            ]
            shapes = (max((np.shape(x) for x in pair), key=len) for pair in given)
            guess = {k: Spec("float32", shape) for k, shape in zip(names, shapes, strict=True)}
            _bounded(Schema(Spaces({}, guess)), *self._bounds)
        self._replay: RowReplay | None = None
        self._samplers: dict[int, EpisodeSampler] = {}  # by sequence length
        self._draws = 0
        self._steps: list[tuple[Arrays, Arrays, float]] = []  # of the episode that add() has begun
        self._next: Arrays | None = None  # the observation that comes next, if that was said
        self._fake: set[int] = set()  # episodes whose last observation is a copy
        self._folder = Path(directory or tempfile.mkdtemp(prefix="lit-wm-")).expanduser()
        if directory is None:
            weakref.finalize(self, shutil.rmtree, self._folder, True)

    @classmethod
    def load(
        cls, source: str | Path, *, cache_dir: str | Path | None = None, on_bad: str = "error",
        directory: str | Path | None = None, seed: int = 0, action_low: Any = None, action_high: Any = None,
        **options: Any,
    ) -> ReplayBuffer:  # fmt: skip
        """Open a dataset, or what :meth:`save` wrote; it is written as rows once and never held in memory.

        Args:
            source: a URI such as ``minari:ID``; or a path: an npz, HDF5 or TD-MPC2 file, or the folder of a
                Minari dataset, a cache, TorchRL data or npz files.
            cache_dir, on_bad: see :func:`datamodules.ingest`.
            directory, seed: as above.
            action_low, action_high: as above; None is what the dataset states.
            options: of the reader, e.g. ``episode_length=300``.

        Raises:
            DataError: if the data are absent or cannot be used.
            ConfigError: for a source or option that does not exist.
        """
        cache = ingest(find_uri(source), cache_dir, on_bad, **options)
        if lost := cache.report["counts"].get("last_dropped"):
            warnings.warn(
                f"{source}: {lost:,} of {cache.steps + lost:,} transitions are left out: the last ones of "
                "episodes, as nobody saw what they led to. last_obs=repeat keeps them.", stacklevel=2
            )  # fmt: skip
        buffer = cls(len(cache), directory=directory, seed=seed)
        cache.schema = _bounded(cache.schema, action_low, action_high, str(source))
        buffer.cache, buffer._schema = cache, cache.schema
        spaces, every = cache.schema.spaces, np.arange(len(cache.episodes["start"]))
        rows = CacheRows(cache, buffer._folder, spaces, every, SourceSpec(str(source)), lead=0, rescale=False)
        buffer._replay = RowReplay.of_dataset(rows, spaces, 2, 0, within_episodes=True, by="windows")
        return buffer

    def __len__(self) -> int:
        """Number of transitions, those of the running episode included."""
        return len(self._steps) + (0 if self._replay is None else self._replay.num_windows)

    def __repr__(self) -> str:
        what = f", observation {self.obs_shape}, action {self.action_dim}" if self._schema else ""
        return f"ReplayBuffer({len(self):,} transitions, {self.num_episodes:,} finished episodes{what})"

    @property
    def num_episodes(self) -> int:
        """Finished episodes of which there is a transition."""
        return 0 if self._replay is None else len(self._replay.sampler.pieces())

    @property
    def spaces(self) -> Spaces:
        """Observation and action entries; a DataError if they are not known yet."""
        if self._schema is None:
            raise DataError("the buffer is empty: its spaces are known from the first transition on.")
        return self._schema.spaces

    @property
    def obs_shape(self) -> Any:
        """Shape of one observation; by name if there are several."""
        shapes = {k: s.shape for k, s in self.spaces.obs.items()}
        return shapes["obs"] if list(shapes) == ["obs"] else shapes

    @property
    def action_dim(self) -> int:
        """Numbers of an action, classes counted one by one."""
        return sum(spec.size for spec in self.spaces.action.values())

    def add(
        self, obs: Any, action: Any, reward: float, terminated: bool, truncated: bool = False,
        next_obs: Any = None,
    ) -> None:  # fmt: skip
        """Append one transition; it can be drawn once its episode has ended.

        Args:
            obs, action: o_t, and a_t chosen at it.                                              (...)
            reward: r_{t+1}, which a_t led to.
            terminated, truncated: the task ended, or the episode was cut off, after a_t.
            next_obs: o_{t+1}. Give it at the end of an episode, where no other call brings it: else the last
                observation is repeated after a termination, and a transition that was truncated is left out,
                since nobody knows what it led to.                                               (...)

        Raises:
            DataError: for shapes and values that do not fit, or if ``obs`` is not the ``next_obs`` before.
            NotSupported: on a loaded buffer.
        """
        seen, act = _named(obs, "obs", 1), _named(action, "action", 1)
        self._open(seen, act)
        where = f"transition {len(self._steps)} of the running episode"
        here, act = _fit(where, seen, self.spaces.obs), _fit(where, act, self.spaces.action)
        after = None
        if next_obs is not None:
            after = _fit(f"{where}, next_obs", _named(next_obs, "obs", 1), self.spaces.obs)
        if self._next is not None and any(not np.array_equal(v, self._next[k]) for k, v in here.items()):
            raise DataError(
                f"{where}: the observation is not the next_obs of the transition before.\n"
                "  If a new episode began, say truncated=True (or terminated) at the end of the last one."
            )
        worth = _typed(f"{where}: reward", np.reshape(reward, 1), Spec("float32", ()), Report())[0]
        self._steps.append((here, act, worth))
        self._next = after
        if terminated or truncated:
            if after is None and not terminated:
                warnings.warn("a transition truncated without next_obs is left out", stacklevel=2)
            obs, action, rewards = self._stacked()
            self._steps, self._next = [], None
            self._append(obs, action, rewards, terminated, truncated)

    def add_episode(
        self, obs: Any, action: Any, reward: Any, terminated: Any = False, truncated: Any = False
    ) -> None:
        """Append a whole episode of T transitions.

        Args:
            obs: o_0 ... o_T; without o_T, what a_{T-1} led to, as in :meth:`add`, with a warning.
                                                                                           (T+1, ...)
            action: a_0 ... a_{T-1}.                                                          (T, ...)
            reward: r_1 ... r_T.                                                                  (T,)
            terminated, truncated: of the last transition, or of each; with neither it was truncated.

        Raises:
            DataError: for lengths, shapes and values that do not fit.
            NotSupported: on a loaded buffer.
        """
        seen, acts = _named(obs, "obs"), _named(action, "action")
        self._open(seen, acts)
        if self._steps:
            raise DataError("an episode is being added step by step; end it with truncated=True first.")
        if self._append(seen, acts, reward, terminated, truncated):
            warnings.warn(
                "an episode has as many observations as actions: nobody knows what the last action led to.\n"
                "  That transition is left out, or repeats the last observation if the episode terminated. "
                "Give T+1 observations of T actions.", stacklevel=2
            )  # fmt: skip

    def _append(self, seen: Arrays, acts: Arrays, reward: Any, terminated: Any, truncated: Any) -> bool:
        """Add a whole episode; True if it lacks the last observation."""
        replay = self._open(seen, acts)
        assert replay.writer is not None
        where, steps = f"episode {replay.writer.episodes}", len(next(iter(acts.values())))
        _same_names(where, seen, self.spaces.obs)
        _same_names(where, acts, self.spaces.action)
        seen = {k: fitted(self.spaces.obs[k], v) for k, v in seen.items()}
        acts = {k: fitted(self.spaces.action[k], v) for k, v in acts.items()}
        ended, cut = (
            np.arange(steps) == (steps - 1 if x else -1) if np.ndim(x) == 0 else np.asarray(x)
            for x in (terminated, truncated)
        )
        episode = Episode(seen, acts, np.asarray(reward), ended, cut, where)
        for e in list(checked(self._source(lambda: [episode]))):
            if e.steps >= self.capacity:
                warnings.warn(
                    f"an episode of {e.steps:,} transitions has {e.steps + 1:,} observations, but capacity "
                    f"is {self.capacity:,}: only its end is kept.", stacklevel=3
                )  # fmt: skip
            for t in range(e.steps + 1):
                step = {k: v[t : t + 1] for k, v in e.action.items()} if t < e.steps else None
                row = {k: v[t : t + 1] for k, v in e.observation.items()}
                replay.append(_ONE, row, np.array([t == 0]), np.array([t < e.steps]), step)
                if t < e.steps and e.reward is not None:
                    replay.set_outcome(_ONE, *(x[t : t + 1] for x in (e.reward, e.terminated, e.truncated)))
                for sampler in self._samplers.values():
                    sampler.extend(replay.storage.newest(_ONE))
            if e.fake_last:
                self._fake.add(replay.writer.episodes - 1)
        return len(next(iter(seen.values()))) == steps

    def sample_sequences(self, batch_size: int, sequence_length: int) -> TensorDict:
        """Draw runs of transitions, each within one finished episode; every such run is equally likely.

        Returns:
            A TensorDict (B, L) with, at t, ``observation`` o_t, ``action`` a_t, ``reward`` r_{t+1},
            ``terminated`` and ``truncated`` after a_t, ``next_observation`` o_{t+1}, ``is_first`` if t begins
            the episode, and ``task``. Several entries are nested by name. Actions are those that ``train``
            shows a model and its verbs take: their bounds are -1 and 1; where nobody has said the bounds
            they are as added. :meth:`episodes` has them in their own units.

        Raises:
            DataError: if no finished episode is as long.
        """
        replay = self._filled(batch_size)
        sampler = self._samplers.pop(sequence_length, None)
        if sampler is None and sequence_length > 0:
            name = f"buffer/{sequence_length}"
            sampler = EpisodeSampler(replay.storage, sequence_length + 1, self.seed, 0, "windows", name)
            sampler.rebuild()
        if sampler is None or not sampler.num_windows:
            longest, count = int(np.diff(replay.sampler.pieces()).max()) - 1, self.num_episodes
            raise DataError(f"sequence_length is {sequence_length}; expected 1 to {longest:,}, the "
                            f"transitions of the longest of {count:,} finished episodes.")  # fmt: skip
        self._samplers[sequence_length] = sampler  # the last one used stands last
        if len(self._samplers) > _SAMPLERS:
            del self._samplers[next(iter(self._samplers))]
        sampler.draws["train"], self._draws = self._draws, self._draws + 1
        rows = nested(self._for_models(replay.storage.gather(sampler.draw(batch_size)[0])))

        def part(x: Any, steps: slice) -> Any:
            return {k: v[:, steps] for k, v in x.items()} if isinstance(x, dict) else x[:, steps]

        batch = {k: v[:, :-1, 0] for k, v in (rows["next"] | {"is_first": rows["is_init"]}).items()}
        batch |= {k: part(rows[k], slice(-1)) for k in ("observation", "action", "task")}
        batch["next_observation"] = part(rows["observation"], slice(1, None))
        found = TensorDict(batch, [batch_size, sequence_length])
        return found.clone()  # both observations would share their memory

    def sample_states(self, batch_size: int) -> Tensor | Tensors:
        """Draw single observations of finished episodes, all of them equally likely, the last ones too.

        Returns:
            What ``model.act`` takes: a tensor, or tensors by name.                               (B, ...)

        Raises:
            DataError: if there is no finished episode.
        """
        storage = self._filled(batch_size).storage
        rng, self._draws = counter_rng(self.seed, 0, "buffer/states", self._draws), self._draws + 1
        found = storage.get(torch.from_numpy(rng.integers(len(storage), size=batch_size)))
        entries = {k: found[row_key("observation", k, self.spaces.obs)] for k in self.spaces.obs}
        return entries["obs"] if list(entries) == ["obs"] else entries

    def episodes(self) -> Iterator[Episode]:
        """What is held, oldest first: the rest of an episode whose first rows have gone, and at last the
        running one, as truncated.
        """
        if self.cache is not None:
            yield from open_source(f"rows:{self.cache.folder}").episodes()
            return
        if self._replay is not None:
            storage, spaces, column = self._replay.storage, self.spaces, self._replay.storage.arrays
            for start, stop in self._replay.sampler.pieces():
                rows = storage.rows(0, np.arange(start, stop))
                obs = {k: column[row_key("observation", k, spaces.obs)][rows] for k in spaces.obs}
                acts = {k: column[row_key("action", k, spaces.action)][rows[:-1]] for k in spaces.action}
                r, end, cut = (column["next", k][rows[:-1]] for k in ("reward", "terminated", "truncated"))
                number = int(column["episode",][rows[0]])
                fake = number in self._fake
                yield Episode(obs, acts, r, end, cut, f"episode {number}", fake_last=fake)
        if self._steps:
            obs, acts, reward = self._stacked()
            no = np.zeros(len(reward), np.bool_)
            running = Episode(obs, acts, reward, no, no, "the running episode")
            yield from checked(self._source(lambda: [running]))

    def save(self, path: str | Path) -> None:
        """Write all episodes, complete or not at all; :meth:`load` reads them back exactly.

        Args:
            path: ``NAME.npz`` for plain arrays ``observations``, ``actions``, ``rewards``, ``terminations``,
                ``truncations`` and ``next_observations``, named entries as ``observations/NAME``; or a new
                folder for rows, which take half the space and open at once.

        Raises:
            DataError: if there is nothing to save.
            ConfigError: for another suffix, or a folder that exists.
        """
        path = Path(path).expanduser()
        steps = sum(e.steps for e in self.episodes())
        if path.suffix not in ("", ".npz"):
            raise ConfigError(f"{path}: expected NAME.npz, or a new folder, whose name has no dot.")
        if not steps:
            raise DataError("the buffer is empty: there is nothing to save.")
        (write_npz if path.suffix else write_rows)(self._source(self.episodes), path)

    def _source(self, episodes: Callable[[], Iterable[Episode]]) -> Source:
        assert self._schema is not None
        return _AtHand(self._schema, episodes, {} if self.cache is None else self.cache.meta)

    def _open(self, obs: Arrays, action: Arrays) -> RowReplay:
        """The ring, made for the first transition. (1 or more, ...) each"""
        if self.cache is not None:
            raise NotSupported("a loaded buffer does not grow.\n  Make a new one, ReplayBuffer(spaces=loaded."
                               "spaces), and give it the old episodes by add_episode.")  # fmt: skip
        if self._replay is None:
            self._schema = self._schema or _bounded(Schema(self._infer(obs, action)), *self._bounds)
            how: dict[str, Any] = {"window": 2, "within_episodes": True, "by": "windows"}
            try:
                self._replay = RowReplay(self.spaces, self.capacity, 1, self._folder, **how)
            except ConfigError as error:
                text = str(error).replace("data.replay_dir", "directory").replace("data.capacity", "capacity")
                raise ConfigError(text) from None
        return self._replay

    def _infer(self, obs: Arrays, action: Arrays) -> Spaces:
        shape, classes = self._said
        acts = {}
        for k, v in action.items():
            whole = v.dtype.kind in "biu"
            if whole and classes is None:
                raise ConfigError(f"action {k!r} is a whole number; give action_dim, the number of classes.")
            acts[k] = infer(f"action {k!r}", v[:1], True, classes if whole else None)
            if classes not in (None, acts[k].classes or acts[k].size):
                raise DataError(f"action {k!r} has {acts[k].size} numbers; action_dim says {classes}.")
        seen = {k: infer(f"observation {k!r}", v[:1], False) for k, v in obs.items()}
        for k, spec in seen.items():
            if spec.is_discrete:
                raise ConfigError(f"observation {k!r} is a whole number; give spaces, which say its classes.")
            ends = spec.shape[::2]
            if not spec.is_image and len(spec.shape) == 3 and min(ends) <= 4 and sorted(spec.shape)[1] >= 8:
                raise DataError(
                    f"observation {k!r} is {obs[k].dtype} {spec.shape}, which looks like an image; images "
                    "are uint8, 0 ... 255.\n  Convert values of 0 ... 1: (255 * obs).round().astype('uint8')."
                    " If it is none, give spaces."
                )
            if shape is not None and tuple(shape) not in (spec.shape, obs[k].shape[1:]):
                raise DataError(f"observation {k!r} is {spec.shape}; obs_shape says {tuple(shape)}.")
        return Spaces(seen, acts)

    def _stacked(self) -> tuple[Arrays, Arrays, np.ndarray]:
        """The running episode, with the observation that follows if it is known."""
        seen = [step[0] for step in self._steps] + ([] if self._next is None else [self._next])
        obs = {k: np.stack([x[k] for x in seen]) for k in seen[0]}
        action = {k: np.stack([step[1][k] for step in self._steps]) for k in self._steps[0][1]}
        return obs, action, np.array([step[2] for step in self._steps])

    def _for_models(self, columns: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Drawn columns (B, T, ...) with the bounds of actions, where they are known, at -1 and 1."""
        assert self._schema is not None
        specs = self._schema.spaces.action
        for k in [k for k in self._schema.low if not specs[k].is_discrete]:
            if (bounds := action_bounds(k, self._schema, SourceSpec("ReplayBuffer"))) is not None:
                value = columns[row_key("action", k, specs)].numpy()
                flat, acts = value.reshape(-1, *value.shape[2:]), columns["valid",].numpy()
                value = scaled(flat, bounds, acts).astype(np.float32).reshape(value.shape)
                columns[row_key("action", k, specs)] = torch.from_numpy(value)
        return columns

    def _filled(self, batch_size: int) -> RowReplay:
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; expected 1 or more.")
        if self._replay is None or not self._replay.num_windows:
            begun = f"; one of {len(self._steps):,} transitions is running" if self._steps else ""
            raise DataError(f"the buffer has no finished episode yet: add one before drawing{begun}.")
        return self._replay


def _bounded(schema: Schema, low: Any, high: Any, where: str = "ReplayBuffer") -> Schema:
    """The schema, with the bounds that are said."""
    if low is None and high is None:
        return schema
    floats = [k for k, s in schema.spaces.action.items() if not s.is_discrete]
    lows, highs = (dict(x if isinstance(x, Mapping) else dict.fromkeys(floats, x)) for x in (low, high))
    names = lows | highs
    if names.keys() - floats or (len(floats) != 1 and not isinstance(low, Mapping)):
        told = ", ".join(map(str, names)) or "none"
        raise ConfigError(
            f"{where}: action_low and action_high are of {told}; the continuous "
            f"actions are {', '.join(floats) or 'none'}: bounds of several are mappings by name."
        )
    found = dict(schema.low), dict(schema.high)
    for k in names:
        spec = SourceSpec(where, action_low=lows.get(k), action_high=highs.get(k))
        for own, x in zip(found, action_bounds(k, schema, spec) or (-1.0, 1.0), strict=True):
            own[k] = np.broadcast_to(np.asarray(x, np.float64), schema.spaces.action[k].shape)
    free = tuple(k for k in schema.spaces.unbounded if k not in names)
    return Schema(replace(schema.spaces, unbounded=free), *found)


def _named(value: Any, alone: str, axes: int = 0) -> Arrays:
    """Arrays by entry, of a single step with a leading axis of 1."""
    items = value.items() if isinstance(value, Mapping) else [(alone, value)]
    return {k: np.asarray(v)[(None,) * axes] for k, v in items}


def _same_names(where: str, value: Arrays, specs: Mapping[str, Spec]) -> None:
    if value.keys() != specs.keys():
        raise DataError(f"{where} has the entries {', '.join(value)}; expected {', '.join(specs)}.")


def _fit(where: str, value: Arrays, specs: Mapping[str, Spec]) -> Arrays:
    """One step of all entries, checked and in their types. (1, ...) -> (...)"""
    _same_names(where, value, specs)
    found = {k: _typed(f"{where}: {k!r}", fitted(s, value[k]), s, Report()) for k, s in specs.items()}
    return {k: v[0].copy() for k, v in found.items()}


class _AtHand(Source):
    """Episodes that need no reader."""

    def __init__(self, schema: Schema, episodes: Callable[[], Iterable[Episode]], meta: dict[str, Any]):
        self.schema, self._episodes, self.meta, self.files = schema, episodes, meta, []
        self.last_obs = "terminal"

    def episodes(self) -> Iterator[Episode]:
        """Anew each time."""
        return iter(self._episodes())
