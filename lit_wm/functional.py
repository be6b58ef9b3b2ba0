"""Small pure functions used by both models."""

from __future__ import annotations

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """sign(x) ln(1 + |x|): compresses large values, identity near zero."""
    return torch.sign(x) * torch.log1p(torch.abs(x))


def symexp(x: Tensor) -> Tensor:
    """Inverse of :func:`symlog`: sign(x) (exp|x| - 1)."""
    return torch.sign(x) * torch.expm1(torch.abs(x))


def one_hot(index: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One-hot vectors on a new last axis; an index outside 0..classes-1 gives zeros.

    Unlike ``F.one_hot`` it neither reads the data on the host nor raises on -1.
    """
    return (index.unsqueeze(-1) == torch.arange(classes, device=index.device, dtype=index.dtype)).to(dtype)
