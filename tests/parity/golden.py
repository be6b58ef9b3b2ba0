"""Golden sets: every array is tracked, and counts as used only when a numeric comparison has read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
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

    def compare(
        self,
        name: str,
        ours: Any,
        rtol: float = FORWARD,
        atol: float | np.ndarray = 0.0,
        index: int | None = None,
    ) -> None:
        """Assert that ``ours`` equals the array, or its entry ``index``: exactly if it holds integers, else
        within rtol of its largest entry, or within atol, which may be given per entry.
        """
        theirs = self.data[name] if index is None else self.data[name][index]
        ours = ours.detach().cpu().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
        where = f"{self.path.name}:{name}" + ("" if index is None else f"[{index}]")
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
            groups.setdefault(self.group_of(name), []).append(self.errors.get(name, 0.0))
        lines = [f"{k:<36}{len(v):>5}{max(v):>10.1e}" for k, v in groups.items()]
        return "\n".join([f"{self.path.name}: {len(self.used)} of {len(self.data)} arrays", *lines])

    @staticmethod
    def group_of(name: str) -> str:
        """Line of the report that an array belongs to."""
        return name.split("/")[0]

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


KINDS = {"dreamerv3": ("*_meta.json", "*units.npz"), "tdmpc2": ("*.pt",)}


def golden_dir(config: pytest.Config, kind: str) -> Path:
    """Where the files of ``kind`` are: shipped, or in ``--golden-dir DIR`` or ``DIR/kind``. DIR may hold one
    kind only, then the tests of the other have nothing to run on.
    """
    given = config.getoption("--golden-dir")
    if given is None:
        return Path(__file__).parent / "data" / kind

    def place(kind: str) -> Path | None:
        both = (Path(given) / kind, Path(given))
        return next((d for d in both if any(any(d.glob(p)) for p in KINDS[kind])), None)

    if not any(map(place, KINDS)):
        raise pytest.UsageError(
            f"--golden-dir {given} holds no golden files; expected {KINDS} in it or in a folder of that name"
        )
    return place(kind) or Path(given) / kind


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


# --- TD-MPC2: one .pt file per case -----------------------------------------------------------------


class TorchFile(Arrays):
    """One ``.pt`` file: a nested dict, whose tensors are arrays named by their path (``updates/0/zs``)."""

    def __init__(self, path: Path):
        self.path = path
        self.tree: dict[str, Any] = torch.load(path, weights_only=True)
        self.data, self.used, self.errors = {}, set(), {}
        self._flatten("", self.tree)

    def _flatten(self, prefix: str, value: Any) -> None:
        if isinstance(value, Tensor):
            self.data[prefix] = (value.float() if value.dtype == torch.float16 else value).numpy()
        elif isinstance(value, dict | list):
            for k, v in value.items() if isinstance(value, dict) else enumerate(value):
                self._flatten(f"{prefix}/{k}" if prefix else str(k), v)

    def inputs(self, *prefixes: str) -> None:
        """Count arrays as used: our code was given them, or what it did with them was compared."""
        found = {k for k in self.data if k.startswith(prefixes)}
        assert found, f"{self.path.name} has none of {prefixes}"
        self.used |= found

    @staticmethod
    def group_of(name: str) -> str:
        """The path without numbers, and without the name of a parameter or a noise stream."""
        parts = [p for p in name.split("/") if not p.isdigit()]
        return "/".join(parts[:-1] if len(parts) > 2 or "." in parts[-1] or parts[0] == "batch" else parts)


class Tapes:
    """Recorded noise by stream name; every draw is handed out once.

    Args:
        tapes: ``name -> (kind, noise, stepped)`` with kind "normal", "uniform" or "exponential"; where
            ``stepped``, the first axis is the step ``t`` of a roll-out or plan.
    """

    def __init__(self, tapes: dict[str, tuple[str, Tensor, bool]]):
        self.tapes = tapes
        self.drawn: set[tuple[str, int]] = set()

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """The recorded Exp(1) noise."""
        return self._serve("exponential", name, shape, t)

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """The recorded normal noise."""
        return self._serve("normal", name, shape, t)

    def uniform(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Noise in [0, 1) that leads to the recorded choice."""
        return self._serve("uniform", name, shape, t)

    def _serve(self, kind: str, name: str, shape: tuple[int, ...], t: int) -> Tensor:
        assert name in self.tapes, f"stream {name!r} was not recorded; there are {sorted(self.tapes)}"
        recorded, tape, stepped = self.tapes[name]
        assert kind == recorded, f"{name}: asked for {kind} noise, recorded {recorded}"
        assert (name, t) not in self.drawn, f"{name}: step {t} is drawn twice"
        self.drawn.add((name, t))
        part = tape[t] if stepped else tape
        assert tuple(part.shape) == tuple(shape), f"{name}: asked for {shape}, recorded {tuple(part.shape)}"
        return part.clone()

    def check_all_drawn(self) -> None:
        """Assert that no recorded draw was left over."""
        all_draws = {
            (name, t) for name, (_, x, stepped) in self.tapes.items() for t in range(len(x) if stepped else 1)
        }
        assert all_draws == self.drawn, f"never drawn: {sorted(all_draws - self.drawn)}"
