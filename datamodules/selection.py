"""Which episodes of which datasets take part, and what they have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lit_wm.errors import ConfigError, DataError, nearest
from lit_wm.noise import stream_seed
from lit_wm.types import Spaces, Spec

if TYPE_CHECKING:
    from datamodules.cache import Cache


@dataclass(frozen=True)
class RewardTransform:
    """``clip(scale * reward + shift)``.

    Args:
        scale, shift: applied in this order.
        clip: lowest and highest reward afterwards, null for none; ``[-1, 1]`` as Atari agents do.
    """

    scale: float = 1.0
    shift: float = 0.0
    clip: tuple[float, float] | None = None

    def __call__(self, reward: np.ndarray) -> np.ndarray:
        """Transform rewards of any shape."""
        reward = self.scale * reward + self.shift
        return reward if self.clip is None else np.clip(reward, *self.clip)


def _whole(x: Any) -> bool:
    return isinstance(x, int) and not isinstance(x, bool)


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and -float("inf") < x < float("inf")


def _pair(x: Any) -> bool:
    return isinstance(x, list | tuple) and len(x) == 2 and all(map(_number, x))


@dataclass(frozen=True)
class SourceSpec:
    """One entry of ``data.sources``.

    Args:
        uri: ``minari:ID``, ``npz:PATH`` ..., see :mod:`datamodules.sources`.
        weight: share of the batch, relative to the other sources; a list ``[[update, weight], ...]`` changes
            it linearly between updates, of which those of pretraining and ``offline_updates`` are the first.
        task: name or number of the task, for multi-task models.
        top_returns: use the fraction of episodes with the highest returns only.
        min_length: leave out episodes of fewer transitions.
        episodes: use these episodes only, by their number in the source.
        fraction: use a random fraction of the episodes, the same for the same seed.
        max_steps: use the first episodes that together have no more transitions.
        reward: ``{scale, shift, clip}``, see :class:`RewardTransform`.
        action_low, action_high: bounds that become -1 and 1, where the source does not state its own.
        on_bad: ``error`` or ``skip_episode``, what to do with bad episodes.
        options: of the reader, e.g. ``{episode_length: 300}``.
    """

    uri: str
    weight: float | list[list[float]] = 1.0
    task: str | int | None = None
    top_returns: float | None = None
    min_length: int | None = None
    episodes: list[int] | None = None
    fraction: float | None = None
    max_steps: int | None = None
    reward: dict[str, Any] | None = None
    action_low: float | list[float] | None = None
    action_high: float | list[float] | None = None
    on_bad: str = "error"
    options: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        rules: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
            ("top_returns fraction", lambda x: _number(x) and 0 < x <= 1, "a fraction above 0, up to 1"),
            ("min_length max_steps", lambda x: _whole(x) and x >= 1, "a whole number of 1 or more"),
            ("episodes", lambda x: isinstance(x, list) and all(map(_whole, x)), "a list of numbers"),
            ("options", lambda x: isinstance(x, dict), "a mapping"),
            ("on_bad", lambda x: x in ("error", "skip_episode"), "error or skip_episode"),
        )
        for name, fits, expected in [(n, fits, text) for names, fits, text in rules for n in names.split()]:
            if (value := getattr(self, name)) is not None and not fits(value):
                raise ConfigError(f"{self.uri}: {name} is {value!r}, expected {expected}.")
        knots = self.weight if isinstance(self.weight, list) else [[0, self.weight]]
        pairs = bool(knots) and all(map(_pair, knots))
        if not pairs or any(k[1] < 0 for k in knots) or knots != sorted(knots, key=lambda k: k[0]):
            raise ConfigError(
                f"{self.uri}: weight is {self.weight!r}, expected a number of 0 or more, or a list "
                "[[update, weight], ...] with growing updates."
            )
        given = self.reward or {}
        known = isinstance(given, Mapping) and not set(given) - {"scale", "shift", "clip"}
        clip = given.get("clip") if known else None
        numbers = known and all(_number(given[k]) for k in ("scale", "shift") if k in given)
        if not numbers or not (clip is None or (_pair(clip) and clip[0] < clip[1])):
            raise ConfigError(
                f"{self.uri}: reward is {given!r}, expected {{scale: NUMBER, shift: NUMBER, "
                "clip: [LOW, HIGH]}, each of them or none."
            )

    @classmethod
    def of(cls, value: str | Mapping[str, Any] | SourceSpec) -> SourceSpec:
        """From a URI or a mapping, as YAML gives it. Raises ConfigError for a name that does not exist or an
        impossible value.
        """
        if isinstance(value, SourceSpec):
            return value
        given = {"uri": value} if isinstance(value, str) else dict(value)
        known = list(cls.__dataclass_fields__)
        if "uri" not in given or set(given) - set(known):
            wrong = next(iter(sorted(set(given) - set(known))), None)
            found = f"has no {wrong!r}{nearest(wrong, known)}" if wrong else "needs a uri"
            raise ConfigError(f"a source in data.sources {found}\n  Its entries: {', '.join(known)}")
        return cls(**given)

    def weight_at(self, update: int) -> float:
        """Weight when ``update`` updates have been made."""
        if not isinstance(self.weight, list):
            return float(self.weight)
        knots = np.array(self.weight, np.float64)
        return float(np.interp(update, knots[:, 0], knots[:, 1]))


def uniform_hash(seed: int, name: str, ids: np.ndarray) -> np.ndarray:
    """Numbers in [0, 1) that depend on seed, name and id alone. (n,)"""
    x = ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x += np.uint64(stream_seed(seed, 0, name) & (2**64 - 1))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) / float(1 << 53)


def select_episodes(
    cache: Cache, spec: SourceSpec, val_fraction: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the episodes to train on and of those held out.

    The split goes by a hash of each episode's content, whatever the seed: an episode stays on its side when
    the source grows or is named otherwise, when a filter changes, and in a run that goes on from another's
    weights. Equal episodes are on one side. A larger fraction holds out those of a smaller one and more.
    Filters apply to both sides, before the split; ``seed`` chooses those of ``fraction``. Raises DataError if
    no episode is left to train on.
    """
    table, steps = cache.episodes, cache.episodes["length"] - 1
    keep = np.ones(len(steps), np.bool_)
    if spec.episodes is not None:
        ids = np.asarray(spec.episodes, np.int64)
        if len(wrong := ids[(ids < 0) | (ids >= len(keep))]):
            raise DataError(f"{spec.uri} has episodes 0 to {len(keep) - 1}; episodes names {wrong[0]}.")
        keep[:] = False
        keep[ids] = True
    if spec.min_length is not None:
        keep &= steps >= spec.min_length
    chosen = np.flatnonzero(keep)
    if spec.top_returns is not None:
        best = np.argsort(-table["return"][chosen], kind="stable")
        chosen = np.sort(chosen[best[: max(1, round(spec.top_returns * len(chosen)))]])
    if spec.fraction is not None:
        order = np.argsort(uniform_hash(seed, f"fraction {spec.uri}", chosen), kind="stable")
        chosen = np.sort(chosen[order[: max(1, round(spec.fraction * len(chosen)))]])
    if spec.max_steps is not None:
        chosen = chosen[np.cumsum(steps[chosen]) <= spec.max_steps]
    draw = uniform_hash(0, "split", table["crc"])  # of all, whatever the filters
    held = draw < val_fraction
    if val_fraction:  # at least one on each side, if there are two that differ
        held = (held | (draw == draw.min())) & (draw < draw.max())
    held = held[chosen]
    if held.all():
        raise DataError(
            f"{spec.uri} has {len(steps):,} episodes of {steps.min()} to {steps.max()} steps; none is left "
            "to train on.\n  Loosen top_returns, min_length, episodes, fraction, max_steps or val_fraction."
        )
    return chosen[~held], chosen[held]


def model_spaces(cache: Cache, stack: int = 1) -> Spaces:
    """The entries of a cache as a model sees them: images stacked on their channels.

    Without a known time limit the longest episode stands for it.
    """
    spaces, obs = cache.schema.spaces, {}
    for key, spec in spaces.obs.items():
        shape = list(spec.shape)
        if spec.is_image:
            shape[0 if spec.channels_first else 2] *= stack
        obs[key] = replace(spec, shape=tuple(shape))
    length = spaces.episode_length
    length = int(cache.episodes["length"].max()) - 1 if length is None else length
    return replace(spaces, obs=obs, episode_length=length)


def vectors(obs: Mapping[str, Spec]) -> list[str]:
    """The entries that hold numbers, no images and no classes."""
    return [k for k, s in obs.items() if s.dtype == "float32" and s.classes is None]


def joined(spaces: Spaces) -> Spaces:
    """All vectors of an observation side by side in one, ``obs``, in their order; the rest as it is."""
    names = vectors(spaces.obs)
    obs = {k: s for k, s in spaces.obs.items() if k not in names}
    if names:
        obs["obs"] = Spec("float32", (sum(spaces.obs[k].size for k in names),))
    return replace(spaces, obs=obs)


def common_spaces(named: Mapping[str, Spaces], pad: bool = False) -> Spaces:
    """The entries that all of several sources have.

    Args:
        named: spaces by source.
        pad: for models of several tasks: each source's vectors become one, unless all sources have one of the
            same name; those of different widths get the widest, classes the largest count.

    Raises:
        DataError: if they differ otherwise, with all of them side by side.
    """
    names = [vectors(s.obs) for s in named.values()]
    if pad and any(own != names[0][:1] for own in names):
        named = {name: joined(s) for name, s in named.items()}
    first, *others = named.values()
    obs, action = dict(first.obs), dict(first.action)
    for other in others:
        for ours, theirs in ((obs, other.obs), (action, other.action)):
            if set(ours) != set(theirs):  # their order does not matter: rows are read by name
                raise _differ(named, pad)
            for key in ours:
                wide = _wider(ours[key], theirs[key], pad)
                if wide is None:
                    raise _differ(named, pad)
                ours[key] = wide
    lengths = [s.episode_length for s in named.values()]
    most = None if None in lengths else max(x for x in lengths if x is not None)
    unbounded = tuple(dict.fromkeys(name for s in named.values() for name in s.unbounded))
    return Spaces(obs, action, most, unbounded)


def _wider(a: Spec, b: Spec, pad: bool) -> Spec | None:
    if a == b:
        return a
    if not pad or a.dtype != b.dtype or (a.classes is None) != (b.classes is None) or a.is_image:
        return None
    if a.classes is not None and b.classes is not None and a.shape == b.shape:
        return replace(a, classes=max(a.classes, b.classes))
    if len(a.shape) == len(b.shape) == 1 and a.classes == b.classes:
        return replace(a, shape=max(a.shape, b.shape))
    return None


def _differ(named: Mapping[str, Spaces], pad: bool) -> DataError:
    # Observations and actions may have the same names.
    entries = {name: {(i, k): s for i, own in enumerate((x.obs, x.action)) for k, s in own.items()}
               for name, x in named.items()}  # fmt: skip
    shown = [f"  {name}: " + ", ".join(f"{k} {s.classes or s.dtype} {list(s.shape)}"
             for (_, k), s in own.items()) for name, own in entries.items()]  # fmt: skip
    first, *others = entries.values()
    bad = next(k for own in entries.values() for k in own if any(first.get(k) != o.get(k) for o in others))
    more = "" if pad else "; for several tasks pad: true fills vectors up"
    lines = (f"the sources have different spaces, first in {bad[1]!r}:", *shown[:3],
             f"  Leave entries out with the reader's option drop{more}.")  # fmt: skip
    return DataError("\n".join(lines))
