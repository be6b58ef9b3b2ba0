"""LaProp with adaptive gradient clipping and a learning-rate schedule: the optimiser of DreamerV3."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def clip_agc_(params: list[Tensor], grads: list[Tensor], clip: float, floor: float = 1e-3) -> None:
    """Adaptive gradient clipping, in place: no gradient norm exceeds ``clip`` times its parameter's norm.

    Norms are over whole tensors, biases and scales included; ``floor`` is the least parameter norm counted.
    Source: dreamerv3 ``clip_by_agc``.
    """
    grad_norms = torch._foreach_norm(grads)
    limits = torch._foreach_norm(params)
    torch._foreach_clamp_min_(limits, floor)
    torch._foreach_mul_(limits, clip)
    torch._foreach_div_(grad_norms, limits)
    torch._foreach_clamp_min_(grad_norms, 1.0)
    torch._foreach_div_(grads, grad_norms)


class LaProp(torch.optim.Optimizer):
    """LaProp: normalise the gradient by its RMS first, then average the normalised gradients.

    The momentum holds no learning rate, so a warm-up does not echo in it. The first update has learning rate
    0 when there is a warm-up.

    Args:
        lr: learning rate after the warm-up.
        betas: decay of the momentum and of the second moment.
        eps: added to the RMS. 1e-20 lets parameters with tiny gradients move at full speed.
        agc: largest gradient norm as a share of the parameter norm; 0 turns the clipping off.
        warmup: updates over which the learning rate rises linearly from 0.
        schedule: after the warm-up ``"const"``, or ``"linear"`` / ``"cosine"`` down to their floor at
            ``anneal`` updates.
        anneal: update at which a falling schedule ends.
        weight_decay: decoupled decay of parameters with more than one axis (kernels).
        nesterov: add the newest gradient to the momentum once more.

    Source: dreamerv3 ``Optimizer`` (scale_by_agc, scale_by_rms, scale_by_momentum, chained in this order).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 4e-5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-20,
        agc: float = 0.3,
        warmup: int = 1000,
        schedule: str = "const",
        anneal: int = 0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
    ):
        if schedule not in ("const", "linear", "cosine"):
            raise ValueError(f"schedule is {schedule!r}; expected 'const', 'linear' or 'cosine'")
        if schedule != "const" and anneal <= warmup:
            raise ValueError(
                f"schedule {schedule!r} needs anneal > warmup, got anneal={anneal}, warmup={warmup}"
            )
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "agc": agc,
            "warmup": warmup,
            "schedule": schedule,
            "anneal": anneal,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            # Parameters that had no gradient for a while are behind the others.
            of_step: dict[int, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float64)  # exact up to 2**53 updates
                    state["rms"] = torch.zeros_like(p)
                    state["momentum"] = torch.zeros_like(p)
                state["step"] += 1  # lives on the host: no synchronisation
                of_step.setdefault(int(state["step"]), []).append(p)
            for n, params in of_step.items():
                self._update(group, params, n)
        return loss

    def _update(self, group: dict[str, Any], params: list[Tensor], n: int) -> None:
        beta1, beta2 = group["betas"]
        rms = [self.state[p]["rms"] for p in params]
        momentum = [self.state[p]["momentum"] for p in params]
        grads = [p.grad.float() for p in params]  # type: ignore[union-attr]

        if group["agc"]:
            clip_agc_(params, grads, group["agc"])
        torch._foreach_mul_(rms, beta2)
        torch._foreach_addcmul_(rms, grads, grads, 1 - beta2)
        scale = torch._foreach_div(rms, 1 - beta2**n)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_div_(grads, scale)
        torch._foreach_mul_(momentum, beta1)
        torch._foreach_add_(momentum, grads, alpha=1 - beta1)
        if group["nesterov"]:
            torch._foreach_mul_(grads, 1 - beta1)
            torch._foreach_add_(grads, momentum, alpha=beta1)
            updates = torch._foreach_div(grads, 1 - beta1**n)
        else:
            updates = torch._foreach_div(momentum, 1 - beta1**n)
        if group["weight_decay"]:
            for p, u in zip(params, updates, strict=True):
                if p.ndim > 1:
                    u.add_(p, alpha=group["weight_decay"])
        torch._foreach_add_(params, updates, alpha=-learning_rate(group, n))


def learning_rate(group: dict[str, Any], n: int) -> float:
    """Learning rate of the n-th update (n counts from 1) under the group's warm-up and schedule."""
    lr, warmup, anneal, done = group["lr"], group["warmup"], group["anneal"], n - 1
    if done < warmup:
        return lr * done / warmup
    if group["schedule"] == "linear":
        return lr + (0.1 * lr - lr) * min(1.0, (done - warmup) / (anneal - warmup))
    if group["schedule"] == "cosine":
        # The reference hands 0.1 * lr to a floor that is a fraction of lr, so the floor is 0.1 * lr**2.
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - warmup) / (anneal - warmup))))
        return lr * ((1 - 0.1 * lr) * cosine + 0.1 * lr)
    return lr
