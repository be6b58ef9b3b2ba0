"""Output distributions as plain functions on tensors: no objects, no validation, no host synchronisation.

Logits enter in float32. Categorical samples are exponential races: ``argmax(p / e)`` with e ~ Exp(1) draws
from p, and equals the Gumbel trick ``argmax(ln p + g)`` with g = -ln e.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_wm.functional import one_hot, symexp, symlog

# --- Categorical ----------------------------------------------------------------------------------


class _Unimix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, mix: float) -> Tensor:
        if logits.shape[-1] <= 8:  # torch's softmax over a few entries is five times slower than its parts
            probs = (logits - logits.amax(-1, keepdim=True)).exp_()
            probs /= probs.sum(-1, keepdim=True)
        else:
            probs = torch.softmax(logits, -1)
        ctx.save_for_backward(probs)
        ctx.mix = mix
        return probs * (1 - mix) + mix / logits.shape[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (probs,) = ctx.saved_tensors
        grad = grad * probs
        return grad.addcmul_(probs, grad.sum(-1, keepdim=True), value=-1).mul_(1 - ctx.mix), None


def unimix(logits: Tensor, mix: float) -> Tensor:
    """Probabilities (1-mix) softmax + mix/C of a categorical mixed with the uniform one. (..., C) float32"""
    return _Unimix.apply(logits.float(), mix)


def categorical_index(probs: Tensor, noise: Tensor) -> Tensor:
    """Class indices drawn from ``probs`` (..., C) by an exponential race with ``noise`` (..., C) ~ Exp(1)."""
    return (probs / noise).argmax(-1)


class _StraightThrough(torch.autograd.Function):
    """Forward: the one-hot sample. Backward: the gradient goes to the probabilities, as onehot + p - sg(p)
    does.
    """

    @staticmethod
    def forward(ctx: Any, probs: Tensor, onehot: Tensor) -> Tensor:
        return onehot.view_as(onehot)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.float(), None


def straight_through(probs: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """One-hot sample of ``probs`` (..., S, C) whose gradient is that of the probabilities."""
    onehot = one_hot(categorical_index(probs.detach(), noise), probs.shape[-1], dtype)
    return _StraightThrough.apply(probs, onehot)


def categorical_kl(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of categoricals over the last axis, from probabilities and log-probabilities."""
    return (p * (log_p - log_q)).sum(-1)


def categorical_entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """Entropy in nats over the last axis."""
    return -(p * log_p).sum(-1)


def categorical_log_prob(log_p: Tensor, index: Tensor) -> Tensor:
    """Log-probability of class ``index`` (...) under ``log_p`` (..., C)."""
    return log_p.gather(-1, index.long().unsqueeze(-1)).squeeze(-1)


# --- Bounded normal -------------------------------------------------------------------------------

MIN_STD, MAX_STD = 0.1, 1.0
_LOG_SQRT_2PI = 0.5 * math.log(2 * math.pi)


def bounded_normal(raw_mean: Tensor, raw_std: Tensor) -> tuple[Tensor, Tensor]:
    """Mean in (-1, 1) and standard deviation in (0.1, 1) of the continuous policy, from raw head outputs."""
    mean = torch.tanh(raw_mean.float())
    std = (MAX_STD - MIN_STD) * torch.sigmoid(raw_std.float() + 2.0) + MIN_STD
    return mean, std


def normal_log_prob(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log-density, summed over the last axis."""
    return (-0.5 * ((x - mean) / std).square() - std.log() - _LOG_SQRT_2PI).sum(-1)


def normal_entropy(std: Tensor) -> Tensor:
    """Differential entropy per dimension in nats."""
    return std.log() + (_LOG_SQRT_2PI + 0.5)


# --- Bernoulli ------------------------------------------------------------------------------------


def bernoulli_loss(logit: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy with a soft target in [0, 1], elementwise."""
    return -(target * F.logsigmoid(logit) + (1 - target) * F.logsigmoid(-logit))


# --- Two-hot over exponentially spaced bins -------------------------------------------------------


def symexp_bins(n: int = 255) -> Tensor:
    """Bins from -(e^20 - 1) to e^20 - 1, dense around 0 and exactly mirrored. (n,)

    Source: dreamerv3 ``symexp_twohot``. An even ``n`` holds 0 twice.
    """
    if n % 2:
        half = symexp(torch.linspace(-20, 0, (n - 1) // 2 + 1))
        return torch.cat([half, -half[:-1].flip(0)])
    half = symexp(torch.linspace(-20, 0, n // 2))
    return torch.cat([half, -half.flip(0)])


def two_hot_mean(probs: Tensor, bins: Tensor) -> Tensor:
    """Expected value of probabilities over mirrored ``bins``. (..., n) -> (...)

    Mirror entries are paired before the sum, so that a uniform distribution gives exactly 0 although the
    outer bins are of the order of 1e8.
    """
    n, half = bins.shape[0], bins.shape[0] // 2
    return ((probs[..., n - half :] - probs[..., :half].flip(-1)) * bins[n - half :]).sum(-1)


def two_hot_weights(target: Tensor, bins: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Neighbouring bins of ``target`` and their weights: (below, above, w_below, w_above), each like
    ``target``.
    """
    n = bins.shape[0]
    above = torch.searchsorted(bins, target.contiguous(), right=True)
    below = (above - 1).clamp_(0, n - 1)
    above = above.clamp_(0, n - 1)
    same = below == above
    to_below = torch.where(same, 1.0, (bins[below] - target).abs())
    to_above = torch.where(same, 1.0, (bins[above] - target).abs())
    total = to_below + to_above
    return below, above, to_above / total, to_below / total


class _TwoHotLoss(torch.autograd.Function):
    """Cross-entropy against several two-hot targets at once, without a dense target tensor."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, log_probs: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(log_probs, index, weight)
        return -(log_probs.gather(-1, index) * weight).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        log_probs, index, weight = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        out = log_probs.exp().mul_(grad * weight.sum(-1, keepdim=True))
        return out.scatter_add_(-1, index, -grad * weight), None, None, None


def two_hot_loss(logits: Tensor, bins: Tensor, *targets: Tensor, log_probs: Tensor | None = None) -> Tensor:
    """Sum over ``targets`` of the cross-entropy between ``logits`` (..., n) and the two-hot target (...).

    Args:
        logits: float32.                                                                 (..., n)
        bins: ascending bin values.                                                      (n,)
        targets: values in the bins' own units (no symlog).                              each (...)
        log_probs: ``log_softmax(logits)`` when the caller has it already; not differentiated.
    """
    if log_probs is None:
        log_probs = torch.log_softmax(logits.detach(), -1)
    index, weight = [], []
    for target in targets:
        below, above, w_below, w_above = two_hot_weights(target, bins)
        index += [below, above]
        weight += [w_below, w_above]
    return _TwoHotLoss.apply(logits, log_probs, torch.stack(index, -1), torch.stack(weight, -1))


# --- Two-hot over evenly spaced bins in symlog space ------------------------------------------------


def symlog_two_hot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Cross-entropy between ``logits`` (..., n) and the two-hot symlog of ``target`` (...), broadcast. (...)

    Args:
        logits: over n bins from ``low`` to ``high``, float32; with more leading axes if need be.
        target: values, clamped to the bins' range.

    Source: tdmpc2 ``soft_ce`` and ``two_hot``.
    """
    n = logits.shape[-1]
    place = (symlog(target).clamp_(low, high) - low) / ((high - low) / (n - 1))
    below = place.floor()
    share = place - below
    # At the upper end all mass lies on the last bin, and what wraps around to the first is 0.
    index = torch.stack([below, (below + 1) % n], -1).long().expand(*logits.shape[:-1], 2)
    weight = torch.stack([1 - share, share], -1).expand(*logits.shape[:-1], 2)
    return _TwoHotLoss.apply(logits, torch.log_softmax(logits.detach(), -1), index, weight)


def symlog_two_hot_mean(logits: Tensor, bins: Tensor) -> Tensor:
    """Expected symlog value of ``logits`` (..., n) over ``bins`` (n,), back in its own units. (...)"""
    return symexp(torch.softmax(logits, -1) @ bins)
