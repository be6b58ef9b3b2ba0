"""Distributions against torch.distributions in float64 and against dense two-hot targets."""

from __future__ import annotations

import pytest
import torch
import torch.distributions as td
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wm import distributions as dists
from lit_wm.noise import NoiseStreams

BINS = dists.symexp_bins(255)


def mixed(logits: torch.Tensor, mix: float) -> torch.Tensor:
    return (1 - mix) * logits.softmax(-1) + mix / logits.shape[-1]


# --- Categorical ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 8, 9, 33])  # up to 8 classes take another path
def test_unimix_equals_autograd(classes: int) -> None:
    logits = (3 * torch.randn(5, classes)).requires_grad_()
    cotangent = torch.randn(5, classes)
    exact = logits.detach().double().requires_grad_()
    ours, want = dists.unimix(logits, 0.01), mixed(exact, 0.01)
    ours.backward(cotangent)
    want.backward(cotangent.double())
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_unimix_survives_huge_logits() -> None:
    probs = dists.unimix(torch.tensor([[1e30, 0.0, -1e30]]), 0.03)
    torch.testing.assert_close(probs, torch.tensor([[0.98, 0.01, 0.01]]))


def test_the_race_draws_from_the_probabilities() -> None:
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    n = 40_000
    index = dists.categorical_index(probs.expand(n, 4), NoiseStreams(1).exponential("x", (n, 4)))
    share = torch.bincount(index, minlength=4) / n
    assert ((share - probs).abs() < 5 * (probs * (1 - probs) / n).sqrt()).all()


def test_a_class_of_probability_zero_is_never_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uniform numbers may be exactly 0: about once in 2**24, which is every few dozen updates."""
    draws = torch.tensor([0.0, 0.5])
    monkeypatch.setattr(torch, "rand", lambda *args, **kwargs: draws.clone())
    noise = NoiseStreams().exponential("x", (2,))
    assert (noise > 0).all()
    assert dists.categorical_index(torch.tensor([0.0, 1.0]), noise) == 1


def test_straight_through_is_a_sample_with_the_gradient_of_the_probabilities() -> None:
    probs = torch.rand(6, 4).requires_grad_()
    noise, cotangent = torch.rand(6, 4) + 0.1, torch.randn(6, 4)
    sample = dists.straight_through(probs, noise, torch.float32)
    sample.backward(cotangent)
    assert torch.equal(sample.argmax(-1), (probs / noise).argmax(-1))
    assert torch.equal(probs.grad, cotangent)


def test_kl_and_entropy_are_those_of_torch() -> None:
    p, q = (torch.randn(7, 5, dtype=torch.float64).softmax(-1) for _ in range(2))
    kl = td.kl_divergence(td.Categorical(p), td.Categorical(q))
    torch.testing.assert_close(dists.categorical_kl(p, p.log(), q.log()), kl)
    torch.testing.assert_close(dists.categorical_entropy(p, p.log()), td.Categorical(p).entropy())


# --- Normal and Bernoulli ------------------------------------------------------------------------


def test_normal_is_that_of_torch() -> None:
    x, mean, std = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4, 3) + 0.1
    want = td.Normal(mean, std)
    torch.testing.assert_close(dists.normal_log_prob(x, mean, std), want.log_prob(x).sum(-1))
    torch.testing.assert_close(dists.normal_entropy(std), want.entropy())


def test_the_policy_is_bounded() -> None:
    raw = torch.tensor([-1e4, -1.0, 0.0, 1.0, 1e4])
    mean, std = dists.bounded_normal(raw, raw)
    assert mean.abs().max() <= 1
    torch.testing.assert_close(std[[0, -1]], torch.tensor([0.1, 1.0]))


def test_bernoulli_loss_is_finite_and_exact() -> None:
    logit, target = torch.tensor([-300.0, -2.0, 0.5, 300.0]), torch.tensor([0.0, 0.3, 0.997, 1.0])
    want = torch.nn.functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    torch.testing.assert_close(dists.bernoulli_loss(logit, target), want)


# --- Two-hot -------------------------------------------------------------------------------------


def dense_target(y: float, bins: torch.Tensor) -> torch.Tensor:
    """The definition, one number at a time, in float64."""
    b = bins.double().tolist()
    below = max(sum(v <= y for v in b) - 1, 0)
    above = min(len(b) - sum(v > y for v in b), len(b) - 1)
    to_below, to_above = (1.0, 1.0) if below == above else (abs(b[below] - y), abs(b[above] - y))
    dense = torch.zeros(len(b), dtype=torch.float64)
    dense[below] += to_above / (to_below + to_above)
    dense[above] += to_below / (to_below + to_above)
    return dense


@pytest.mark.parametrize("n", [40, 41, 255])
def test_bins_are_mirrored_and_ascend(n: int) -> None:
    bins = dists.symexp_bins(n)
    assert len(bins) == n
    assert torch.equal(bins, -bins.flip(0))
    assert (bins.diff() >= 0).all()
    assert (bins == 0).sum() == (1 if n % 2 else 2)


ODD = [
    0.0,
    -0.0,
    1e9,
    -1e9,
    float(BINS[0]),
    float(BINS[-1]),
    float(BINS[3]),
    float(BINS[127]),
    float(BINS[128]),
]


@pytest.mark.parametrize("n", [40, 255])
@pytest.mark.parametrize("y", ODD)
def test_two_hot_loss_at_the_edges(y: float, n: int) -> None:
    bins = dists.symexp_bins(n)
    logits = torch.randn(n)
    want = -(dense_target(y, bins) * logits.double().log_softmax(-1)).sum()
    assert dists.two_hot_loss(logits, bins, torch.tensor(y)).double() == pytest.approx(want.item(), rel=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=3), st.integers(0, 2**31))
def test_two_hot_loss_and_gradient_equal_dense_targets(values: list[float], seed: int) -> None:
    logits = torch.randn(255, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    exact = logits.detach().double().requires_grad_()
    loss = dists.two_hot_loss(logits, BINS, *(torch.tensor(y) for y in values))
    want = -sum((dense_target(y, BINS) * exact.log_softmax(-1)).sum() for y in values)
    loss.backward()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-5)
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-5)


@settings(deadline=None)
@given(st.floats(-4e8, 4e8, width=32))
def test_the_mean_of_a_two_hot_target_is_the_target(y: float) -> None:
    below, above, w_below, w_above = dists.two_hot_weights(torch.tensor(y), BINS)
    assert 0 <= above - below <= 1
    assert (w_below * BINS[below] + w_above * BINS[above]).item() == pytest.approx(y, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("n", [40, 255])
def test_a_uniform_prediction_is_exactly_zero(n: int) -> None:
    """A plain sum would leave hundreds: the outer bins are of the order of 1e8."""
    assert dists.two_hot_mean(torch.full((3, n), 1 / n), dists.symexp_bins(n)).tolist() == [0.0] * 3
