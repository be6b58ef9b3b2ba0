"""Heads: features -> logits. Losses and samples are in ``lit_wm.distributions``."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_wm import distributions as dists
from lit_wm.nets.coders import module_key
from lit_wm.nets.layers import MLP, Linear, stacked_linear
from lit_wm.noise import Noise
from lit_wm.types import Spec, Tensors


class Head(nn.Module):
    """MLP and one output layer.

    Args:
        inputs: size F of the features.
        units, layers: width and depth of the MLP.
        outputs: size of the output layer. name: its name.
        outscale: factor on its initial kernel; 0 starts with uniform predictions.
    """

    def __init__(self, inputs: int, units: int, layers: int, outputs: int, name: str, outscale: float):
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.head = nn.ModuleDict({name: Linear(units, outputs, outscale)})
        self.name = name

    @property
    def output(self) -> Linear:
        """The output layer."""
        return self.head[self.name]  # type: ignore[return-value]

    def forward(self, feat: Tensor) -> Tensor:
        """(..., F) -> (..., outputs) float32."""
        return self.output(self.mlp(feat)).float()

    def from_first(self, x: Tensor) -> Tensor:
        """The same from the first linear layer's output, see :func:`batched_heads`."""
        return self.output(self.mlp(x, start=1)).float()


def batched_heads(feat: Tensor, heads: list[Head]) -> list[Tensor]:
    """Outputs of several heads; their first layers, the widest, are one matrix product. (..., F) -> (...,
    outputs).
    """
    firsts = stacked_linear(feat, [h.mlp.layer(0)[0] for h in heads])
    return [h.from_first(x) for h, x in zip(heads, firsts, strict=True)]


class ActionDist(NamedTuple):
    """Policy output of one action key: ``log_p`` (..., C) of a discrete one, ``mean`` and ``std`` (..., A)
    otherwise, of which only entries with a 1 in ``mask`` are sampled and scored.
    """

    spec: Spec
    log_p: Tensor | None = None
    mean: Tensor | None = None
    std: Tensor | None = None
    mask: Tensor | None = None

    def log_prob(self, action: Tensor) -> Tensor:
        """Log-probability of ``action``, summed over all its dimensions. (...)"""
        if self.log_p is not None:
            return _sum_dims(dists.categorical_log_prob(self.log_p, action), self.spec)
        x, mean, std = (_as_vector(v, self.spec) for v in (action, self.mean, self.std))  # type: ignore[arg-type]
        if self.mask is not None:
            each = dists.normal_log_prob(x.unsqueeze(-1), mean.unsqueeze(-1), std.unsqueeze(-1))
            return (each * self.mask).sum(-1)
        return dists.normal_log_prob(x, mean, std)

    def entropy(self) -> Tensor:
        """Entropy in nats, summed over all dimensions. (...)"""
        if self.log_p is not None:
            return _sum_dims(dists.categorical_entropy(self.log_p.exp(), self.log_p), self.spec)
        entropy = dists.normal_entropy(self.std)  # type: ignore[arg-type]
        return _sum_dims(entropy if self.mask is None else entropy * self.mask, self.spec)

    def entropy_range(self) -> tuple[float | Tensor, float | Tensor]:
        """Smallest and largest entropy that this policy can have."""
        dims: float | Tensor = self.spec.size // (self.spec.classes or 1)
        if self.mask is not None:
            dims = self.mask.sum(-1).mean()
        if self.spec.is_discrete:
            return 0.0, dims * math.log(self.spec.classes or 1)
        lo, hi = (0.5 * math.log(2 * math.pi * math.e * std**2) for std in (dists.MIN_STD, dists.MAX_STD))
        return dims * lo, dims * hi

    def mode(self) -> Tensor:
        """The most likely action: int64 indices or float32 values within -1 ... 1. (..., *shape)"""
        if self.log_p is not None:
            return self.log_p.argmax(-1)
        return self.mean if self.mask is None else self.mean * self.mask  # type: ignore[operator, return-value]

    def sample(self, noise: Noise, stream: str, t: int = 0) -> Tensor:
        """A sample: int64 indices or unclipped float32 values. (..., *shape)"""
        if self.log_p is not None:
            return dists.categorical_index(
                self.log_p.exp(), noise.exponential(stream, tuple(self.log_p.shape), t)
            )
        eps = noise.normal(stream, tuple(self.mean.shape), t)  # type: ignore[union-attr]
        sample = self.mean + self.std * eps  # type: ignore[operator]
        return sample if self.mask is None else sample * self.mask


def _as_vector(x: Tensor, spec: Spec) -> Tensor:
    """(..., *shape) -> (..., A)."""
    return x.flatten(-len(spec.shape)) if spec.shape else x.unsqueeze(-1)


def _sum_dims(x: Tensor, spec: Spec) -> Tensor:
    return x.sum(tuple(range(-len(spec.shape), 0))) if spec.shape else x


class PolicyHead(nn.Module):
    """MLP and one output per action key: logits of a discrete, raw mean and stddev of a continuous one."""

    def __init__(self, inputs: int, units: int, layers: int, specs: dict[str, Spec], outscale: float = 0.01):
        super().__init__()
        self.specs = specs
        self.mlp = MLP(inputs, units, layers)
        self.head = nn.ModuleDict()
        for k, spec in specs.items():
            names = ("logits",) if spec.is_discrete else ("mean", "stddev")
            self.head[module_key(k)] = nn.ModuleDict({n: Linear(units, spec.size, outscale) for n in names})

    def forward(self, feat: Tensor, mask: Tensor | None = None) -> dict[str, ActionDist]:
        """(..., F) -> one distribution per action key; of a single one ``mask`` (..., A) says by 1 which
        entries or classes there are.
        """
        return self.from_hidden(self.mlp(feat), mask)

    def from_first(self, x: Tensor, mask: Tensor | None = None) -> dict[str, ActionDist]:
        """The same from the first linear layer's output."""
        return self.from_hidden(self.mlp(x, start=1), mask)

    def from_hidden(self, x: Tensor, mask: Tensor | None = None) -> dict[str, ActionDist]:
        """The same from the MLP's output."""
        out = {}
        for k, spec in self.specs.items():
            layers = self.head[module_key(k)]
            if spec.is_discrete:
                logits = layers["logits"](x).float().view(*x.shape[:-1], *spec.shape, spec.classes)  # type: ignore[index]
                if mask is not None:  # finite, as 0 * inf has no value
                    logits = logits.masked_fill(mask == 0, -1e9)
                out[k] = ActionDist(spec, log_p=torch.log_softmax(logits, -1))
            else:
                shape = (*x.shape[:-1], *spec.shape)
                mean, std = dists.bounded_normal(layers["mean"](x), layers["stddev"](x))  # type: ignore[index]
                out[k] = ActionDist(spec, mean=mean.view(shape), std=std.view(shape), mask=mask)
        return out


def sample_actions(policy: dict[str, ActionDist], noise: Noise, stream: str, t: int = 0) -> Tensors:
    """One action per key; every key draws from a stream of its own."""
    return {k: d.sample(noise, f"{stream}/{k}", t) for k, d in policy.items()}


def flat_action(action: Tensors, specs: dict[str, Spec], dtype: torch.dtype) -> Tensor:
    """Action dict -> one vector: keys sorted, discrete entries one-hot, continuous ones as they are. (..., A)

    A key marked missing (an int of -1 or a float of -inf in it) is encoded as zeros.
    """
    parts = []
    for k in sorted(specs):
        value, spec = action[k], specs[k]
        if spec.is_discrete:
            hot = dists.one_hot(value, spec.classes or 0, dtype)
            dims = len(spec.shape)
            if dims:
                valid = (value >= 0).flatten(-dims).all(-1)
                hot = hot.flatten(-dims - 1) * valid.unsqueeze(-1)
        else:
            dims = len(spec.shape)
            flat = value.flatten(-dims) if dims else value.unsqueeze(-1)
            valid = (flat != -torch.inf).all(-1, keepdim=True)
            hot = torch.where(valid, flat, 0.0).to(dtype)
        parts.append(hot)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
