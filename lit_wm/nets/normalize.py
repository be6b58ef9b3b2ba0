"""Observations in units of their own spread, fitted once to a dataset and stored with the weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lit_wm.nets.coders import module_key
from lit_wm.types import Spec, Tensors


class Normalizer(nn.Module):
    """``(x - mean) / std`` of every float vector; the identity until :meth:`fit`.

    Args:
        specs: observation entries by key.

    Attributes:
        fitted: whether mean and deviation are those of data, a 0-d bool that is saved with them.
    """

    fitted: Tensor

    def __init__(self, specs: dict[str, Spec]):
        super().__init__()
        self.keys = [k for k, s in specs.items() if s.dtype == "float32" and not s.is_discrete]
        self.register_buffer("fitted", torch.tensor(False))
        for key in self.keys:
            self.register_buffer(f"mean{module_key(key)}", torch.zeros(specs[key].shape))
            self.register_buffer(f"std{module_key(key)}", torch.ones(specs[key].shape))

    def _of(self, key: str) -> tuple[Tensor, Tensor]:
        return getattr(self, f"mean{module_key(key)}"), getattr(self, f"std{module_key(key)}")

    def fit(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Take mean and standard deviation by key, each of the entry's shape."""
        for key in self.keys:
            for own, given in zip(self._of(key), statistics[key], strict=True):
                own.copy_(given)
        self.fitted.fill_(True)

    def forward(self, obs: Tensors) -> Tensors:
        """Normalised observations; other entries pass. (..., *shape) each"""
        return obs | {k: (obs[k].float() - mean) / std for k in self.keys for mean, std in [self._of(k)]}

    def inverse(self, obs: Tensors) -> Tensors:
        """Observations in their own units. (..., *shape) each"""
        return obs | {k: obs[k] * std + mean for k in self.keys for mean, std in [self._of(k)]}
