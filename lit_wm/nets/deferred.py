"""Weight gradients of a recurrent scan, computed once after all its steps.

In a scan over T steps with a small batch, autograd multiplies and accumulates a full-size weight gradient at every
step: T products with an inner size of B. The gradient of a matrix depends only on all inputs and all output gradients,
so they are collected and multiplied once, with an inner size of B*T. Same sums, better order, far less memory traffic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class DeferredWeights:
    """Hands out weights whose gradients are computed when the backward pass has left the scan.

    Use ``w = tape.hold(weight)`` once before the scan and ``tape.matmul(x, w)`` in it, for (N, I) @ (I, O) or
    (G, N, I) @ (G, I, O). One tape serves one forward and one backward pass.
    """

    def hold(self, weight: Tensor) -> Tensor:
        """A stand-in for ``weight`` that collects its uses."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        uses: list[tuple[Tensor, Tensor]] = []
        held = _Hold.apply(weight, uses)
        held.uses = uses
        return held

    @staticmethod
    def matmul(x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight``; the weight's gradient is deferred if it is held."""
        uses = getattr(weight, "uses", None)
        return torch.matmul(x, weight) if uses is None else _Matmul.apply(x, weight, uses)


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor, None]:
        inputs, grads = zip(*ctx.uses, strict=True)
        ctx.uses.clear()
        # (N, I) and (G, N, I) alike: join along the rows.
        weight_grad = torch.matmul(torch.cat(inputs, -2).transpose(-2, -1), torch.cat(grads, -2))
        return weight_grad if grad is None else weight_grad + grad, None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, uses: list[tuple[Tensor, Tensor]]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return torch.matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        ctx.uses.append((x, grad))
        return torch.matmul(grad, weight.transpose(-2, -1)), None, None
