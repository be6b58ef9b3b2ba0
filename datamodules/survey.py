"""One pass over a source in bounded memory: numbers of every entry, and of its episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from datamodules.episodes import Episode, Schema
from lit_wm.types import Spec

QUANTILES = (0.01, 0.5, 0.99)
_SAMPLE = 32 << 20  # bytes of rows that are kept for quantiles


def spread(values: Sequence[float] | np.ndarray) -> float:
    """Standard deviation over episodes, of the sample, as evaluations say it; NaN for a single one."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else float("nan")


class Sample:
    """``size`` rows drawn uniformly from a stream of rows, all if they are fewer; always the same ones."""

    def __init__(self, size: int):
        self.size, self._limit, self._rng = size, 1.0, np.random.default_rng(0)
        self._keys: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(self, count: int, rows: Callable[[np.ndarray], np.ndarray]) -> None:
        """Take part in the draw with ``count`` rows; ``rows(index)`` is called for those that are kept."""
        keys = self._rng.random(count)
        index = np.flatnonzero(keys < self._limit)
        self._keys.append(keys[index])
        self._rows.append(rows(index))
        if sum(map(len, self._keys)) > 2 * self.size:
            keys = np.concatenate(self._keys)
            best = np.argpartition(keys, self.size)[: self.size]
            self._limit = keys[best].max()
            self._keys, self._rows = [keys[best]], [np.concatenate(self._rows)[best]]

    @property
    def rows(self) -> np.ndarray:
        """What was drawn, in any order."""
        keys = np.concatenate(self._keys or [np.zeros(0)])
        return np.concatenate(self._rows)[np.argsort(keys)[: self.size]] if len(keys) else np.zeros((0, 1))


class Numbers:
    """Statistics of an entry: by element of a vector, over all pixels of images, and how often each class is.

    Means and deviations are exact, in float64; quantiles those of a sample of 32 MB of vectors.
    """

    def __init__(self, spec: Spec):
        self.spec, self.count, self.width = spec, 0, int(np.prod(spec.shape, dtype=np.int64))
        self.mean, self._square = np.zeros(self.width), np.zeros(self.width)
        self.min, self.max = np.full(self.width, np.inf), np.full(self.width, -np.inf)
        self._sample = Sample(max(min(_SAMPLE // (4 * max(self.width, 1)), 1 << 16), 256))
        kinds = spec.classes or (256 if spec.dtype == "uint8" else 0)
        # One row of counts for each element of classes, one for all pixels.
        self.counts = np.zeros((self.width if spec.is_discrete else 1, kinds), np.int64)

    def add(self, value: np.ndarray) -> None:
        """Values (n, *shape) in the type of the spec, n >= 1."""
        if kinds := self.counts.shape[1]:
            rows = len(self.counts)
            place = (value.reshape(-1, rows) + np.arange(rows) * kinds if rows > 1 else value).reshape(-1)
            for start in range(0, len(place), 1 << 22):  # NumPy counts in eight bytes per value
                counts = np.bincount(place[start : start + (1 << 22)], minlength=self.counts.size)
                self.counts += counts.reshape(self.counts.shape)
            self.count += len(value)
            return
        x = value.reshape(len(value), -1)
        mean = x.mean(0, dtype=np.float64)
        step, total = mean - self.mean, self.count + len(x)
        # Chan, Golub and LeVeque (1979): the moments of two parts together.
        self._square += ((x - mean) ** 2).sum(0) + step**2 * (self.count * len(x) / total)
        self.mean += step * (len(x) / total)
        self.count = total
        self.min, self.max = np.minimum(self.min, x.min(0)), np.maximum(self.max, x.max(0))
        self._sample.add(len(x), lambda index: x[index].astype(np.float32))

    @property
    def std(self) -> np.ndarray:
        """Deviation by element."""
        return np.sqrt(self._square / max(self.count, 1))

    def to_plain(self) -> dict[str, Any]:
        """For JSON; lists by element unless it is a number, an image or a class."""
        if self.spec.is_discrete:
            counts = self.counts.tolist()
            return {"rows": self.count, "classes": counts if self.spec.shape else counts[0]}
        names = [f"q{100 * q:02.0f}" for q in QUANTILES]
        if self.spec.dtype == "uint8":
            seen, total = np.flatnonzero(self.counts[0]), self.counts.sum()
            weights = self.counts[0][seen] / total
            mean = float(seen @ weights)
            at = [int(seen[np.searchsorted(np.cumsum(weights), q - 1e-12)]) for q in QUANTILES]
            return {
                "rows": self.count, "mean": mean, "std": float(np.sqrt((seen - mean) ** 2 @ weights)),
                "min": int(seen[0]), "max": int(seen[-1]), **dict(zip(names, at, strict=True)),
            }  # fmt: skip
        quantiles = np.quantile(self._sample.rows, QUANTILES, axis=0)
        found = {"mean": self.mean, "std": self.std, "min": self.min, "max": self.max}
        found |= dict(zip(names, quantiles, strict=True))
        plain = {k: v.tolist() if self.spec.shape else float(v[0]) for k, v in found.items()}
        return {"rows": self.count, **plain}


class Survey:
    """What a source holds, episode by episode.

    Attributes:
        numbers: of ``observation NAME``, ``action NAME``, ``reward``; a source without rewards has none.
        steps, returns, terminated: one number per episode.
        digests: of the content of each episode.
        black: frames without any light, by image.
    """

    def __init__(self, schema: Schema):
        self.spaces = schema.spaces
        self.numbers = {f"observation {k}": Numbers(s) for k, s in self.spaces.obs.items()}
        self.numbers |= {f"action {k}": Numbers(s) for k, s in self.spaces.action.items()}
        self.numbers["reward"] = Numbers(Spec("float32", ()))
        self.steps: list[int] = []
        self.returns: list[float] = []
        self.terminated: list[bool] = []
        self.digests: list[bytes] = []
        self.black = {k: 0 for k, s in self.spaces.obs.items() if s.is_image}

    def add(self, episode: Episode) -> None:
        """One episode more, as :func:`~datamodules.episodes.checked` yields it."""
        content = hashlib.blake2b(digest_size=16)
        for part, values in (("observation", episode.observation), ("action", episode.action)):
            for key, value in values.items():
                self.numbers[f"{part} {key}"].add(value)
                content.update(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        for key in self.black:
            self.black[key] += int((~episode.observation[key].reshape(episode.steps + 1, -1).any(1)).sum())
        if episode.reward is not None:
            self.numbers["reward"].add(episode.reward)
            self.returns.append(float(episode.reward.sum(dtype=np.float64)))
            content.update(np.ascontiguousarray(episode.reward).view(np.uint8).data)
        self.steps.append(episode.steps)
        self.terminated.append(bool(episode.terminated[-1]))
        self.digests.append(content.digest())

    def to_plain(self) -> dict[str, Any]:
        """For JSON."""
        plain = {name: numbers.to_plain() for name, numbers in self.numbers.items() if numbers.count}
        for name, values in (("return", self.returns), ("length", self.steps)):
            if values:
                numbers = Numbers(Spec("float32", ()))
                numbers.add(np.array(values))
                plain[name] = numbers.to_plain() | {"std": spread(values)}
        return {"episodes": len(self.steps), "steps": sum(self.steps), "entries": plain}
