"""Golden sets: every array is tracked, and counts as used only when a numeric comparison has read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORWARD = 5e-6  # of the largest entry
GRADIENT = 1e-4  # of the largest entry of the tensor
PARAMETER = 2e-5  # absolute, after three updates
ROUNDING = 1e-6  # of the largest entry: a gradient below may come out with the other sign


class Arrays:
    """One npz file whose arrays are marked as they are compared."""

    def __init__(self, path: Path):
        self.path = path
        with np.load(path) as file:
            self.data = {k: file[k] for k in file.files}
        self.used: set[str] = set()
        self.errors: dict[str, float] = {}  # reached, relative to the largest entry of the array

    def __contains__(self, name: str) -> bool:
        return name in self.data

    def tensor(self, name: str) -> Tensor:
        """An input; reading it does not mark it."""
        return torch.from_numpy(np.array(self.data[name]))

    def keys(self, prefix: str) -> list[str]:
        """Names below ``prefix``, without it."""
        return [k.removeprefix(prefix) for k in self.data if k.startswith(prefix)]

    def compare(self, name: str, ours: Any, rtol: float = FORWARD, atol: float | np.ndarray = 0.0) -> None:
        """Assert that ``ours`` equals the array: exactly if it holds integers, else within rtol of its
        largest entry, or within atol, which may be given per entry.
        """
        theirs = self.data[name]
        ours = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
        where = f"{self.path.name}:{name}"
        assert ours.shape == theirs.shape, f"{where}: shape {ours.shape}, golden {theirs.shape}"
        if theirs.dtype.kind in "biu":
            assert np.array_equal(ours, theirs), (
                f"{where}: {(ours != theirs).sum()} of {theirs.size} entries differ"
            )
        else:
            finite = np.isfinite(theirs)
            assert np.array_equal(ours[~finite], theirs[~finite], equal_nan=True), f"{where}: not finite"
            ours, theirs = ours[finite], theirs[finite]
            assert np.isfinite(ours).all(), f"{where}: not finite"
            largest = float(np.abs(theirs).max(initial=0.0))
            limit = np.maximum(np.broadcast_to(atol, finite.shape)[finite], rtol * largest)
            error = np.abs(ours.astype(np.float64) - theirs)
            relative = float(error.max(initial=0.0)) / (largest or 1.0)
            self.errors[name] = max(relative, self.errors.get(name, 0.0))
            over = error > limit
            assert not over.any(), (
                f"{where}: differs by {error[over].max():.3e}, allowed {limit[over].max():.3e}"
            )
        self.used.add(name)

    def compare_pixels(self, name: str, ours: Tensor) -> None:
        """Assert that at most one pixel in a thousand is off, by one level: a float within rounding of a
        whole number may be truncated to the pixel value next to it.
        """
        theirs = self.tensor(name)
        assert ours.shape == theirs.shape, f"{name}: {ours.shape}, golden {theirs.shape}"
        assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, golden {theirs.dtype}"
        error = (ours.int() - theirs.int()).abs()
        assert error.max() <= 1, f"{name}: a pixel is off by {error.max()}"
        assert (error > 0).float().mean() < 1e-3, f"{name}: {(error > 0).sum()} pixels differ"
        self.used.add(name)

    def report(self) -> str:
        """A line per group of arrays: how many, and the largest error reached."""
        groups: dict[str, list[float]] = {}
        for name in sorted(self.used):
            groups.setdefault(name.split("/")[0], []).append(self.errors.get(name, 0.0))
        lines = [f"{k:<28}{len(v):>5}{max(v):>10.1e}" for k, v in groups.items()]
        return "\n".join([f"{self.path.name}: {len(self.used)} of {len(self.data)} arrays", *lines])

    def unused(self) -> list[str]:
        """Names that no comparison has read."""
        return sorted(self.data.keys() - self.used)


class GoldenSet:
    """All files of one set."""

    def __init__(self, directory: Path, name: str):
        self.name = name
        self.meta = json.loads((directory / f"{name}_meta.json").read_text())
        self.files = {
            p.stem.removeprefix(f"{name}_"): Arrays(p) for p in sorted(directory.glob(f"{name}_*.npz"))
        }

    def __getattr__(self, name: str) -> Arrays:
        try:
            return self.__dict__["files"][name]
        except KeyError:
            raise AttributeError(name) from None

    def unused(self) -> list[str]:
        """Every array of every file that no comparison has read."""
        return [f"{f.path.name}:{k}" for f in self.files.values() for k in f.unused()]


def find_sets(directory: Path) -> list[str]:
    """Names of the sets in a directory, by their ``*_meta.json``."""
    return sorted(p.name.removesuffix("_meta.json") for p in directory.glob("*_meta.json"))


class ReplayedNoise:
    """Hands out recorded noise by stream name, and can say what it has handed out.

    Args:
        tapes: ``name -> (kind, array)`` with kind "gumbel" or "normal". A tape of a roll-out has its time on
            ``axis``.
    """

    def __init__(self, tapes: dict[str, tuple[Tensor, int | None]]):
        self.tapes = tapes
        self.served: dict[str, Tensor] = {k: torch.full_like(v, torch.nan) for k, (v, _) in tapes.items()}

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """exp(-gumbel): the exponential race that equals the recorded Gumbel draw."""
        return self._serve(name, shape, t, lambda g: torch.exp(-g), lambda e: -torch.log(e))

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """The recorded normal noise."""
        return self._serve(name, shape, t, lambda x: x, lambda x: x)

    def _serve(
        self,
        name: str,
        shape: tuple[int, ...],
        t: int,
        to: Callable[[Tensor], Tensor],
        back: Callable[[Tensor], Tensor],
    ) -> Tensor:
        tape, axis = self.tapes[name]
        served = self.served[name]
        part, record = (tape, served) if axis is None else (tape.select(axis, t), served.select(axis, t))
        assert tuple(part.shape) == tuple(shape), f"{name}: asked for {shape}, recorded {tuple(part.shape)}"
        out = to(part)
        record.copy_(back(out))
        return out


class Greedy:
    """Noise that makes every categorical sample its most likely class."""

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Ones."""
        return torch.ones(shape)

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Zeros."""
        return torch.zeros(shape)
