"""LaProp and AGC against a slow float64 reference, tensor by tensor."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lit_wm.optim import LaProp, clip_agc_, learning_rate


def slow_laprop(
    start: torch.Tensor, grads: list[torch.Tensor], lr: float, warmup: int, agc: float = 0.3
) -> torch.Tensor:
    p, v, m = start.double(), 0.0, 0.0
    for n, g in enumerate(grads, 1):
        g = g.double()
        g = g / max(1.0, float(g.norm()) / (agc * max(1e-3, float(p.norm()))))
        v = 0.999 * v + 0.001 * g**2
        m = 0.9 * m + 0.1 * g / ((v / (1 - 0.999**n)).sqrt() + 1e-20)
        p = p - lr * min(1.0, (n - 1) / warmup) * m / (1 - 0.9**n)
    return p


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 1e3), st.integers(1, 8))
def test_it_is_the_definition(seed: int, size: float, warmup: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    start = [torch.randn(4, 3, generator=generator), torch.randn(5, generator=generator)]
    grads = [[size * torch.randn(p.shape, generator=generator) for p in start] for _ in range(6)]
    params = [nn.Parameter(p.clone()) for p in start]
    optimizer = LaProp(params, lr=0.01, warmup=warmup)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g.clone()
        optimizer.step()
    for i, p in enumerate(params):
        want = slow_laprop(start[i], [g[i] for g in grads], 0.01, warmup)
        torch.testing.assert_close(p.detach().double(), want, rtol=1e-4, atol=1e-6)


def test_the_first_update_moves_nothing_when_there_is_a_warm_up() -> None:
    p = nn.Parameter(torch.randn(3))
    before = p.detach().clone()
    p.grad = torch.randn(3)
    LaProp([p], lr=1.0, warmup=10).step()
    assert torch.equal(p, before)


def test_a_zero_gradient_moves_nothing() -> None:
    p = nn.Parameter(torch.randn(3))
    before = p.detach().clone()
    p.grad = torch.zeros(3)
    LaProp([p], lr=1.0, warmup=0).step()
    assert torch.equal(p, before)


def test_a_tensor_without_gradient_keeps_its_counter() -> None:
    used, idle = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
    optimizer = LaProp([used, idle])
    used.grad = torch.randn(3)
    optimizer.step()
    assert idle not in optimizer.state


@settings(deadline=None)
@given(st.floats(0, 1e4), st.floats(0, 1e4))
def test_agc_bounds_the_gradient_by_the_parameter(grad: float, param: float) -> None:
    grads = [torch.tensor([grad, 0.0])]
    clip_agc_([torch.tensor([0.0, param])], grads, 0.3)
    assert grads[0].norm().item() == pytest.approx(min(grad, 0.3 * max(1e-3, param)), rel=1e-5, abs=1e-20)


@pytest.mark.parametrize(
    ("schedule", "n", "factor"),
    [
        ("const", 1, 0.0),
        ("const", 6, 0.5),
        ("const", 10**6, 1.0),
        ("linear", 61, 0.55),
        ("linear", 10**6, 0.1),
        ("cosine", 61, 0.5),
    ],
)
def test_learning_rate(schedule: str, n: int, factor: float) -> None:
    group = {"lr": 1e-3, "warmup": 10, "anneal": 110, "schedule": schedule}
    assert math.isclose(learning_rate(group, n), 1e-3 * factor, rel_tol=1e-3)


def test_decay_spares_biases_and_scales() -> None:
    kernel, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    for p in (kernel, bias):
        p.grad = torch.zeros_like(p)
    LaProp([kernel, bias], lr=0.1, warmup=0, weight_decay=0.5).step()
    assert torch.equal(bias, torch.ones(2))
    torch.testing.assert_close(kernel.detach(), torch.full((2, 2), 0.95))


def test_saved_and_loaded_it_goes_on_bit_for_bit() -> None:
    def run(resume: bool) -> torch.Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(4))
        optimizer = LaProp([p], lr=0.1, warmup=2)
        for n in range(6):
            if resume and n == 3:
                state = optimizer.state_dict()
                optimizer = LaProp([p], lr=0.5, warmup=9)
                optimizer.load_state_dict(state)
            p.grad = torch.randn(4)
            optimizer.step()
        return p.detach()

    assert torch.equal(run(False), run(True))


def test_a_falling_schedule_needs_its_end() -> None:
    with pytest.raises(ValueError, match="anneal > warmup"):
        LaProp([nn.Parameter(torch.ones(1))], schedule="linear")
