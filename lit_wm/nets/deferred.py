"""Weight gradients of a recurrent scan, computed once after all its steps.

In a scan over T steps with a small batch, autograd multiplies and accumulates a full-size weight gradient at
every step: T products with an inner size of B. The gradient of a matrix depends only on all inputs and all
output gradients, so they are collected and multiplied once, with an inner size of B*T. Same sums, better
order, far less memory traffic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Uses = list[tuple[int, Tensor, Tensor]]  # number of the backward pass, input, gradient of the output


class DeferredWeights:
    """Hands out weights whose gradients are computed when the backward pass has left the scan.

    Use ``w = tape.hold(weight)`` once before the scan and ``tape.matmul(x, w)`` in it, for (N, I) @ (I, O) or
    (G, N, I) @ (G, I, O). One tape serves one forward pass.
    """

    def hold(self, weight: Tensor) -> Tensor:
        """A stand-in for ``weight`` that collects its uses."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return weight
        uses: Uses = []
        held = _Hold.apply(weight, uses)
        held.uses = uses
        return held

    @staticmethod
    def matmul(x: Tensor, weight: Tensor) -> Tensor:
        """``x @ weight``; the weight's gradient is deferred if it is held."""
        uses = getattr(weight, "uses", None)
        return torch.matmul(x, weight) if uses is None else _Matmul.apply(x, weight, uses)


def _of_this_pass(uses: Uses) -> Uses:
    """``uses`` without those of an earlier backward pass that went through the scan but did not want the
    weight.
    """
    if uses and uses[0][0] != torch._C._current_graph_task_id():
        uses.clear()
    return uses


class _Hold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, uses: Uses) -> Tensor:
        ctx.uses = uses
        ctx.set_materialize_grads(False)
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, None]:
        uses = _of_this_pass(ctx.uses)
        if not uses:
            return grad, None
        inputs, grads = zip(*((x, g) for _, x, g in uses), strict=True)
        uses.clear()
        # (N, I) and (G, N, I) alike: join along the rows.
        weight_grad = torch.matmul(torch.cat(inputs, -2).transpose(-2, -1), torch.cat(grads, -2))
        return weight_grad if grad is None else weight_grad + grad, None


class _Matmul(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, uses: Uses) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.uses = uses
        return torch.matmul(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        _of_this_pass(ctx.uses).append((torch._C._current_graph_task_id(), x, grad))
        return torch.matmul(grad, weight.transpose(-2, -1)), None, None
