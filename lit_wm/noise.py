"""Named streams of random numbers.

Every place that draws noise has a stream of its own, seeded from (seed, rank, name). Adding a part to a model
never changes what the other parts draw, a checkpoint stores each stream, and a test replays recorded noise by
handing in another object with the same methods.
"""

from __future__ import annotations

import hashlib
import warnings
from typing import Any, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """What the models need: exponential, normal and uniform noise by stream name."""

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Exp(1) noise; ``t`` is the step of a roll-out, of use to replayed noise only."""
        ...

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Standard normal noise."""
        ...

    def uniform(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Noise in [0, 1)."""
        ...


def stream_seed(seed: int, rank: int, name: str) -> int:
    """A 63-bit seed that differs for every (seed, rank, name)."""
    digest = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class NoiseStreams:
    """One ``torch.Generator`` per stream name, created on first use on the given device."""

    def __init__(self, seed: int = 0, rank: int = 0, device: torch.device | str = "cpu"):
        self.seed, self.rank, self.device = seed, rank, torch.device(device)
        self._generators: dict[str, torch.Generator] = {}

    @property
    def used(self) -> bool:
        """Whether anything was drawn yet."""
        return bool(self._generators)

    def generator(self, name: str) -> torch.Generator:
        """The generator of one stream."""
        if name not in self._generators:
            generator = torch.Generator(device=self.device)
            generator.manual_seed(stream_seed(self.seed, self.rank, name))
            self._generators[name] = generator
        return self._generators[name]

    def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Exp(1) noise, float32. ``argmax(p / noise)`` samples the categorical p (the Gumbel trick)."""
        # -ln(u) of uniform u in [0, 1): five times faster than Tensor.exponential_ on a CPU. It may be inf
        # (that class loses the race) but never 0, with which a class of probability 0 would win it.
        return torch.rand(shape, device=self.device, generator=self.generator(name)).log_().neg_()

    def normal(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Standard normal noise, float32."""
        return torch.randn(shape, device=self.device, generator=self.generator(name))

    def uniform(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        """Noise in [0, 1), float32."""
        return torch.rand(shape, device=self.device, generator=self.generator(name))

    def state_dict(self) -> dict[str, Any]:
        """Seed, rank and the state of every stream used so far, as plain values and tensors."""
        states = {k: g.get_state().clone() for k, g in self._generators.items()}
        return {"seed": self.seed, "rank": self.rank, "device": self.device.type, "streams": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue all streams where :meth:`state_dict` left them; on another kind of device they begin
        anew.
        """
        self.seed, self.rank = int(state["seed"]), int(state["rank"])
        self._generators = {}
        if state["device"] != self.device.type:  # its generators are of another make
            warnings.warn(
                f"the checkpoint's random numbers are those of a {state['device']}, this run computes on a "
                f"{self.device.type}: it goes on with others, so not bit for bit.",
                stacklevel=2,
            )
            return
        for name, value in state["streams"].items():
            self.generator(name).set_state(value.cpu())
