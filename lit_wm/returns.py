"""Returns and their normalisers. Pure functions are batch first, (B, T) in, (B, T-1) out."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn


def lambda_return(
    reward: Tensor, cont: Tensor, boot: Tensor, lam: float | Tensor, first_boot: Tensor | None = None
) -> Tensor:
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


class PercentileNorm(nn.Module):
    """Moving 5th to 95th percentile range of the returns; advantages are divided by it, never below ``limit``.

    With several processes the percentiles are taken over the returns of all of them.

    Args:
        rate: share of the new percentile in each update.
        limit: smallest scale, so that small returns are not blown up.
        low, high: percentiles as fractions.

    Source: dreamerv3 ``Normalize(impl="perc")``, no debiasing.
    """

    lo: Tensor
    hi: Tensor

    def __init__(self, rate: float = 0.01, limit: float = 1.0, low: float = 0.05, high: float = 0.95):
        super().__init__()
        self.rate, self.limit, self.low, self.high = rate, limit, low, high
        self.register_buffer("lo", torch.zeros(()))
        self.register_buffer("hi", torch.zeros(()))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Move the percentiles towards those of ``x`` (any shape)."""
        flat = x.detach().float().flatten()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            parts = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, flat)
            flat = torch.cat(parts)
        lo, hi = torch.quantile(flat, torch.tensor([self.low, self.high], device=flat.device))
        self.lo.mul_(1 - self.rate).add_(lo, alpha=self.rate)
        self.hi.mul_(1 - self.rate).add_(hi, alpha=self.rate)

    def offset_scale(self) -> tuple[Tensor, Tensor]:
        """The low percentile, and the range but at least ``limit``."""
        return self.lo, (self.hi - self.lo).clamp(min=self.limit)
