"""Returns and their normalisers. Pure functions are batch first, (B, T) in, (B, T-1) out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def lambda_return(reward: Tensor, cont: Tensor, boot: Tensor, lam: float | Tensor) -> Tensor:
    """Lambda-return over imagined or replayed steps.

    R[t] = r[t+1] + cont[t+1] * ((1 - lam[t+1]) * boot[t+1] + lam[t+1] * R[t+1]), and R[T-1] = boot[T-1].

    Args:
        reward: r[t] received on arriving at step t.                                     (B, T)
        cont: probability of going on after step t, times the discount.                  (B, T)
        boot: value of step t that the return falls back on.                             (B, T)
        lam: 0 = one-step target, 1 = Monte Carlo; a tensor gives one per step.          float or (B, T)

    Returns:
        R[t] for t = 0 ... T-2.                                                          (B, T-1)

    Source: dreamerv3 ``lambda_return``; Hafner et al. 2025, "Critic learning".
    """
    lam = lam if isinstance(lam, Tensor) else torch.full_like(cont, lam)
    live = cont[:, 1:] * lam[:, 1:]
    inter = reward[:, 1:] + (cont[:, 1:] - live) * boot[:, 1:]
    returns = [boot[:, -1]]
    for t in range(inter.shape[1] - 1, -1, -1):
        returns.append(torch.addcmul(inter[:, t], live[:, t], returns[-1]))
    return torch.stack(returns[:0:-1], 1)


class ReturnNorm(nn.Module):
    """Moving offset and scale of the returns; advantages are divided by the scale, never below ``limit``.

    With several processes the statistics are those of the values of all of them.

    Args:
        impl: ``"perc"`` = range from the 5th to the 95th percentile, ``"meanstd"`` = mean and standard
            deviation, ``"none"`` = 0 and 1.
        rate: share of the new statistic in each update.
        limit: smallest scale, so that small returns are not blown up.
        low, high: percentiles as fractions.
        debias: correct for the start at zero, as Adam does.

    Source: dreamerv3 ``Normalize``; the reference scales returns by ``perc`` without debiasing.
    """

    lo: Tensor
    hi: Tensor
    corr: Tensor
    percentiles: Tensor

    def __init__(
        self,
        impl: str = "perc",
        rate: float = 0.01,
        limit: float = 1.0,
        low: float = 0.05,
        high: float = 0.95,
        debias: bool = False,
    ):
        super().__init__()
        if impl not in ("perc", "meanstd", "none"):
            raise ValueError(f"return_norm is {impl!r}; expected 'perc', 'meanstd' or 'none'")
        self.impl, self.rate, self.limit, self.debias = impl, rate, limit, debias
        self.register_buffer("lo", torch.zeros(()))  # low percentile, or mean
        self.register_buffer("hi", torch.zeros(()))  # high percentile, or mean square
        self.register_buffer("corr", torch.zeros(()))  # what a constant 1 has come to
        # On the device once and for all: copying them there in every update would synchronise with it.
        self.register_buffer("percentiles", torch.tensor([low, high]), persistent=False)

    @torch.no_grad()
    def update(self, x: Tensor, counted: Tensor | None = None) -> None:
        """Move the statistics towards those of ``x`` (any shape), or of its ``counted`` entries (bool); where
        none counts they stay.
        """
        flat = gather_values(x if counted is None else torch.where(counted, x, torch.nan))
        if self.impl == "perc":
            lo, hi = (torch.quantile if counted is None else torch.nanquantile)(flat, self.percentiles)
        elif counted is None:
            lo, hi = flat.mean(), flat.square().mean()
        else:
            lo, hi = flat.nanmean(), flat.square().nanmean()
        for old, new in ((self.lo, lo), (self.hi, hi), (self.corr, torch.ones_like(self.corr))):
            if counted is not None:
                new = torch.where(lo.isnan(), old, new)
            old.mul_(1 - self.rate).add_(new, alpha=self.rate)

    def offset_scale(self) -> tuple[Tensor, Tensor]:
        """Offset and scale of the values seen so far."""
        if self.impl == "none":
            return torch.zeros_like(self.lo), torch.ones_like(self.lo)
        share = self.corr.clamp(min=self.rate) if self.debias else torch.ones_like(self.corr)
        lo, hi = self.lo / share, self.hi / share
        if self.impl == "perc":
            return lo, (hi - lo).clamp(min=self.limit)
        return lo, (hi - lo.square()).clamp(min=0).sqrt().clamp(min=self.limit)


def gather_values(x: Tensor) -> Tensor:
    """The values of ``x`` (any shape) of all processes, flat and in float32."""
    flat = x.detach().float().flatten()
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, flat)
        flat = torch.cat(parts)
    return flat
