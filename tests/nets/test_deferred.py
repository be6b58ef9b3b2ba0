"""Weight gradients that are computed after a scan equal plain autograd's, whoever asks and how often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_wm.nets.deferred import DeferredWeights

STEPS = 4


def scan(
    x: Tensor, weight: Tensor, bias: Tensor, matmul: Callable[[Tensor, Tensor], Tensor], uses: int
) -> Tensor:
    """A recurrence that uses the weight in its first ``uses`` steps."""
    for t in range(STEPS):
        x = torch.tanh((matmul(x, weight) if t < uses else x) + bias)
    return x


def parts(blocks: int) -> tuple[Tensor, Tensor, Tensor]:
    lead = (blocks,) if blocks else ()
    shapes = ((*lead, 3, 5), (*lead, 5, 5), (5,))
    return tuple(torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("uses", [0, 1, STEPS])
def test_gradients_equal_plain_autograd(blocks: int, uses: int) -> None:
    inputs = parts(blocks)
    x, weight, bias = inputs
    held = DeferredWeights().hold(weight)
    ours = scan(x, held, bias, DeferredWeights.matmul, uses)
    want = scan(x, weight, bias, torch.matmul, uses)
    assert torch.equal(ours, want)
    cotangent = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, cotangent, allow_unused=True),
        torch.autograd.grad(want, inputs, cotangent, allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_use_outside_the_products_counts_too() -> None:
    x, weight, _ = parts(0)
    held = DeferredWeights().hold(weight)
    (ours,) = torch.autograd.grad(
        (DeferredWeights.matmul(x, held) @ held).sum() + held.square().sum(), weight
    )
    (want,) = torch.autograd.grad((x @ weight @ weight).sum() + weight.square().sum(), weight)
    torch.testing.assert_close(ours, want)


def test_a_held_weight_that_no_product_uses() -> None:
    weight = parts(0)[1]
    (grad,) = torch.autograd.grad(DeferredWeights().hold(weight).sum(), weight)
    assert torch.equal(grad, torch.ones_like(weight))


def test_a_second_pass_gives_the_same_gradient() -> None:
    x, weight, bias = parts(0)
    out = scan(x, DeferredWeights().hold(weight), bias, DeferredWeights.matmul, STEPS).sum()
    first, second = (torch.autograd.grad(out, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_a_pass_that_wants_only_the_input_leaves_nothing_behind() -> None:
    """It runs through the products too; what it collects must not be added to the next gradient."""
    x, weight, bias = parts(0)
    out = scan(x, DeferredWeights().hold(weight), bias, DeferredWeights.matmul, STEPS).sum()
    (want,) = torch.autograd.grad(scan(x, weight, bias, torch.matmul, STEPS).sum(), weight)
    torch.autograd.grad(out, x, retain_graph=True)
    (ours,) = torch.autograd.grad(out, weight)
    torch.testing.assert_close(ours, want)


def test_without_autograd_the_weight_itself_is_used() -> None:
    weight = parts(0)[1]
    with torch.no_grad():
        assert DeferredWeights().hold(weight) is weight
    assert DeferredWeights().hold(frozen := weight.detach()) is frozen
