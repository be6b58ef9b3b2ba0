"""What every data source hands over: episodes in NumPy, and the checks that each of them has to pass.

A source reads its format into an :class:`Episode` and knows nothing of rows, caches or models; what follows
knows nothing of formats. :func:`checked` stands between the two, so that a defect gets the same message
wherever it comes from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec

Arrays = dict[str, np.ndarray]


@dataclass
class Episode:
    """One episode of T transitions as a source read it.

    Attributes:
        observation: by entry, ``obs`` if there is only one without a name; o_0 ... o_T.       (T+1, ...)
        action: by entry, ``action`` if there is only one; a_t was chosen at o_t. Continuous ones in the
            source's own units, classes from 0.                                                   (T, ...)
        reward: r_{t+1}, which a_t led to; None if the source has none.                                (T,)
        terminated: the task itself ended after a_t.                                              (T,) bool
        truncated: it was cut off after a_t.                                                      (T,) bool
        where: the place for messages, e.g. ``"demo.npz, episode 3"``.
        seed: of the reset, if the source knows it.
        task: number of the task, in multi-task sources.
        fake_last: o_T is a copy of o_{T-1}, because the source lacks it.
        broken: why this episode cannot be read although others can; its arrays are empty then.
    """

    observation: Arrays
    action: Arrays
    reward: np.ndarray | None
    terminated: np.ndarray
    truncated: np.ndarray
    where: str
    seed: int | None = None
    task: int = 0
    fake_last: bool = False
    broken: DataError | None = None

    @classmethod
    def unreadable(cls, where: str, error: DataError) -> Episode:
        """An episode in the place of one that cannot be read; :func:`checked` raises or counts ``error``."""
        no = np.zeros(0, np.bool_)
        return cls({}, {}, None, no, no, where, broken=error)

    @property
    def steps(self) -> int:
        """Number of transitions T."""
        return len(self.terminated)


@dataclass(frozen=True)
class Schema:
    """What the entries of a source are.

    Attributes:
        spaces: observation and action entries.
        low, high: bounds of continuous actions in the source's units, by entry; an entry that no one knows
            the bounds of is left out, single unbounded elements are infinite.
    """

    spaces: Spaces
    low: Arrays = field(default_factory=dict)
    high: Arrays = field(default_factory=dict)

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings and lists only; infinities as strings, which JSON lacks."""

        def plain(bounds: Arrays) -> dict[str, Any]:
            return {k: [x if np.isfinite(x) else str(x) for x in v.reshape(-1).tolist()]
                    for k, v in bounds.items()}  # fmt: skip

        return {"spaces": self.spaces.to_plain(), "low": plain(self.low), "high": plain(self.high)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Schema:
        """Inverse of :meth:`to_plain`."""
        spaces = Spaces.from_plain(plain["spaces"])

        def arrays(bounds: Mapping[str, Any]) -> Arrays:
            return {k: np.array([float(x) for x in v]).reshape(spaces.action[k].shape)
                    for k, v in bounds.items()}  # fmt: skip

        return cls(spaces, arrays(plain["low"]), arrays(plain["high"]))


@dataclass
class Report:
    """What was noticed while a source was read.

    Attributes:
        counts: how often, by name: ``skipped`` (bad episodes left out), ``empty`` (episodes without a
            step), ``split`` (cut in two at a truncation), ``too_long`` (cut to fit into memory),
            ``both_flags``, ``no_end_flag``, ``fake_last``, ``last_dropped`` (transitions without a next
            observation), ``out_of_range`` (action values beyond the space's bounds), ``cast`` (arrays stored
            in another type), ``next_zero`` and ``next_differs`` (next observations that cannot be right).
        notes: sentences for people, the first few of each kind.
        first: the first note by name.
        warnings: sentences by name that whoever trains on the source should hear, each time.
        lost_reward: sum of the sizes of rewards in transitions that were left out.
    """

    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    first: dict[str, str] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)
    lost_reward: float = 0.0

    def count(self, name: str, note: str = "", by: int = 1) -> None:
        """Count ``name`` and keep the note of its first three times."""
        if note and self.counts[name] < 3 * by:
            self.notes.append(note)
            self.first.setdefault(name, note)
        self.counts[name] += by

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        plain = {"counts": dict(self.counts), "notes": list(self.notes)}
        more = {"lost_reward": self.lost_reward, "warnings": dict(self.warnings)}
        return plain | {k: v for k, v in more.items() if v}


class Source(ABC):
    """Streams the episodes of one dataset; never holds the whole of it in memory.

    A subclass sets ``schema`` and yields episodes::

        @register("mine")
        class Mine(Source):
            def __init__(self, path: str):
                self.files = [Path(path)]
                spaces = Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("float32", (1,))})
                self.schema, self.meta = Schema(spaces), {}

            def episodes(self):
                for i, (obs, action, reward) in enumerate(read_my_format(self.files[0])):
                    end, no = np.zeros((2, len(reward)), bool)
                    end[-1] = True
                    yield Episode({"obs": obs}, {"action": action}, reward, end, no, f"episode {i}")

    Attributes:
        schema: the entries.
        files: the files that are the data; their content is the identity of a cache.
        meta: plain values worth keeping: ``env_id``, ``env_spec``, ``ref_min_score``, ``ref_max_score``,
            ``tasks`` (names), ``no_reward`` ...
        last_obs: what to do with episodes of T instead of T+1 observations: ``error``, or as in
            :func:`completed`.
        total_episodes, total_steps: what the source says of itself, None if it says nothing.
        version: of the reader; another one reads the same files into another cache.
        report: what the reader itself noticed.
    """

    schema: Schema
    files: list[Path]
    meta: dict[str, Any]
    last_obs: str = "error"
    version: int = 1
    total_episodes: int | None = None
    total_steps: int | None = None

    @property
    def report(self) -> Report:
        """Made on first use, so that subclasses need no ``super().__init__``."""
        if "_report" not in self.__dict__:
            self._report = Report()
        return self._report

    @abstractmethod
    def episodes(self) -> Iterator[Episode]:
        """All episodes in the order of the source, each time anew."""


def listed(value: Any) -> list[str]:
    """Names in an option such as ``drop``: text with commas, a list, or a single one, as the 1 of a Tuple."""
    many = value.split(",") if isinstance(value, str) else value if isinstance(value, Sequence) else [value]
    return [name for name in (str(item).strip() for item in many if item is not None) if name]


def checked(
    source: Source, on_bad: str = "error", tell: Callable[[DataError], None] | None = None
) -> Iterator[Episode]:
    """The episodes of a source, checked and in the types of its schema.

    Args:
        source: what to read.
        on_bad: ``error`` stops at the first bad episode, ``skip_episode`` leaves bad ones out and counts
            them.
        tell: called with the error of each one that is left out.

    Yields:
        Episodes of one step or more with exactly one end flag, at the last step.

    Raises:
        DataError: for lengths, shapes or types that do not fit, values that are not finite, and steps that
            follow a termination, with file, episode, entry and row.
    """
    for episode in source.episodes():
        try:
            if episode.broken is not None:
                raise episode.broken
            if source.last_obs != "error":
                episode = completed(episode, source.last_obs, source.report)
            whole = _checked(episode, source)
            parts = [] if whole is None else list(_split(whole, source.report))
        except DataError as error:
            if on_bad != "skip_episode":
                if "on_bad=" in str(error):
                    raise
                raise DataError(f"{error}\n  on_bad=skip_episode leaves such episodes out.") from error
            source.report.count("skipped", str(error).splitlines()[0])
            if tell is not None:
                tell(error)
            continue
        yield from parts


def completed(episode: Episode, last_obs: str, report: Report) -> Episode:
    """An episode with its last observation, if it has only T of them.

    Args:
        episode: with T or T+1 observations; with T+1 it is returned as it is.
        last_obs: ``terminal`` repeats o_{T-1} after a termination, so that its reward is not lost, and else
            lets o_{T-1} be the last observation, which drops the transition that nobody saw the end of;
            ``repeat`` always repeats, ``drop`` always drops.
        report: counts ``fake_last`` and ``last_dropped``.

    Raises:
        ConfigError: for another ``last_obs``.
    """
    if last_obs not in ("terminal", "repeat", "drop"):
        raise ConfigError(f"last_obs is {last_obs!r}; expected terminal, repeat or drop.")
    steps = episode.steps
    if steps == 0 or any(len(v) != steps for v in episode.observation.values()):
        return episode
    if last_obs == "repeat" or (last_obs == "terminal" and bool(episode.terminated[-1])):
        report.count("fake_last")
        observation = {k: np.concatenate([v, v[-1:]]) for k, v in episode.observation.items()}
        return replace(episode, observation=observation, fake_last=True)
    report.count("last_dropped")
    if episode.reward is not None and np.asarray(episode.reward).dtype.kind in "biuf":
        report.lost_reward += abs(float(np.asarray(episode.reward).reshape(steps, -1)[-1, 0]))
    terminated, truncated = np.array(episode.terminated[:-1]), np.array(episode.truncated[:-1])
    truncated[-1:] = True
    return replace(
        episode,
        action={k: v[:-1] for k, v in episode.action.items()},
        reward=None if episode.reward is None else episode.reward[:-1],
        terminated=terminated,
        truncated=truncated,
    )


def _checked(episode: Episode, source: Source) -> Episode | None:
    report, where, steps = source.report, episode.where, episode.steps
    lengths = {f"observation {k}": len(v) for k, v in episode.observation.items()}
    lengths |= {f"action {k}": len(v) for k, v in episode.action.items()}
    lengths |= {"reward": len(episode.reward)} if episode.reward is not None else {}
    lengths |= {"terminated": steps, "truncated": len(episode.truncated)}
    wanted = {name: steps + name.startswith("observation") for name in lengths}
    if lengths != wanted:
        found = ", ".join(f"{name} {n:,}" for name, n in lengths.items())
        if all(n == steps for n in lengths.values()):
            raise DataError(
                f"{where}: {steps:,} observations for {steps:,} actions, expected {steps + 1:,}: the last is "
                "missing.\n  Accept that with last_obs=terminal (see the docs), or use "
                "on_bad=skip_episode."
            )
        raise DataError(
            f"{where}: the lengths differ: {found}.\n  Expected T+1 observations and T of all others; "
            "on_bad=skip_episode leaves such episodes out."
        )
    if steps == 0:
        report.count("empty", f"{where} has no step and is left out")
        return None
    specs = source.schema.spaces
    observation = {
        k: _typed(f"{where}: observation {k!r}", _entry(episode.observation, k, where), s, report)
        for k, s in specs.obs.items()
    }
    action = {
        k: _typed(f"{where}: action {k!r}", _entry(episode.action, k, where), s, report)
        for k, s in specs.action.items()
    }
    for key, low in source.schema.low.items():
        value = action[key]
        outside = int(((value < np.float32(low)) | (value > np.float32(source.schema.high[key]))).sum())
        if outside:
            report.count("out_of_range", f"{where}: {outside:,} values of action {key!r} beyond its bounds",
                         outside)  # fmt: skip
    reward = None
    if episode.reward is not None:
        reward = np.asarray(episode.reward)
        reward = reward.reshape(steps) if reward.size == steps else reward
        reward = _typed(f"{where}: reward", reward, Spec("float32", ()), Report())
    flags = [_flag(f"{where}: {name}", getattr(episode, name), steps) for name in ("terminated", "truncated")]
    return replace(episode, observation=observation, action=action, reward=reward, terminated=flags[0],
                   truncated=flags[1])  # fmt: skip


def _entry(arrays: Mapping[str, np.ndarray], key: str, where: str) -> np.ndarray:
    if key not in arrays:
        raise DataError(f"{where} has no {key!r}; found: {', '.join(arrays) or 'nothing'}.")
    return np.asarray(arrays[key])


def _typed(where: str, value: np.ndarray, spec: Spec, report: Report) -> np.ndarray:
    """The array in the type of its spec, if shape and values allow."""
    if value.dtype.kind not in "biuf":
        raise DataError(f"{where} has the type {value.dtype}; expected numbers ({spec.dtype}).")
    if [n for n in value.shape[1:] if n != 1] == [n for n in spec.shape if n != 1]:
        value = value.reshape(len(value), *spec.shape)
    else:
        raise DataError(f"{where} has the shape (.., {_shape(value.shape[1:])}), its space says "
                        f"({_shape(spec.shape)}).")  # fmt: skip
    if value.dtype.kind == "f":
        finite = np.isfinite(value)
        if not finite.all():
            bad = np.argwhere(~finite)
            raise DataError(
                f"{where}, row {bad[0][0]} is {value[tuple(bad[0])]}; {len(bad):,} values of this episode "
                "are not finite.\n  on_bad=skip_episode leaves such episodes out."
            )
    if spec.is_discrete:
        index = value.astype(np.int64)
        if (index != value).any() or index.min(initial=0) < 0 or index.max(initial=0) >= (spec.classes or 0):
            raise DataError(f"{where} holds {value.min()} to {value.max()}; expected classes 0 to "
                            f"{(spec.classes or 0) - 1}.")  # fmt: skip
    elif spec.dtype == "uint8" and value.dtype != np.uint8:
        raise DataError(f"{where} has the type {value.dtype}; expected images of uint8, 0 to 255.")
    if value.dtype != np.dtype(spec.dtype):
        report.count("cast")
        with np.errstate(over="ignore"):
            cast = value.astype(spec.dtype)
        if spec.dtype == "float32" and not np.isfinite(cast).all():
            raise DataError(f"{where} holds {np.abs(value).max():.3g}, beyond the range of float32.")
        return cast
    return value


def _flag(where: str, value: Any, steps: int) -> np.ndarray:
    flag = np.asarray(value)
    if flag.size != steps:
        raise DataError(
            f"{where} has the shape ({_shape(flag.shape)}); expected one flag per step, {steps:,}."
        )
    if flag.dtype.kind not in "biuf":
        raise DataError(f"{where} has the type {flag.dtype}; expected bool, or numbers 0 and 1.")
    flag = flag.reshape(steps)
    if flag.dtype != np.bool_ and not np.isin(flag, (0, 1)).all():
        raise DataError(f"{where} holds other values than 0 and 1, e.g. {flag[~np.isin(flag, (0, 1))][0]}.")
    return flag.astype(np.bool_)


def _split(episode: Episode, report: Report) -> Iterator[Episode]:
    """Cut at truncations in the middle; set exactly one flag at the end."""
    terminated, truncated, last = episode.terminated, episode.truncated, episode.steps - 1
    if terminated[:last].any():
        at = int(terminated.argmax())
        raise DataError(
            f"{episode.where}: terminated at step {at}, but {last - at:,} more steps follow.\n"
            "  Expected a termination at the last step only; on_bad=skip_episode leaves such episodes out."
        )
    start = 0
    for end in [*np.flatnonzero(truncated[:last]).tolist(), last]:
        if end < last:
            report.count("split", f"{episode.where}: truncated at step {end} of {last + 1}: cut in two there")
        stop = end + 1
        flags = np.zeros((2, stop - start), np.bool_)
        if terminated[end] and truncated[end]:
            report.count("both_flags")
        if not (terminated[end] or truncated[end]):
            report.count("no_end_flag", f"{episode.where}: neither terminated nor truncated at the end: "
                         "taken as truncated")  # fmt: skip
        flags[0, -1], flags[1, -1] = terminated[end], not terminated[end]
        if stop - start == episode.steps:  # the whole of it, which is the rule
            yield replace(episode, terminated=flags[0], truncated=flags[1])
            return
        yield replace(
            episode,
            observation={k: v[start : stop + 1] for k, v in episode.observation.items()},
            action={k: v[start:stop] for k, v in episode.action.items()},
            reward=None if episode.reward is None else episode.reward[start:stop],
            terminated=flags[0],
            truncated=flags[1],
            fake_last=episode.fake_last and end == last,
        )
        start = stop


def _shape(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape)) or "scalar"
