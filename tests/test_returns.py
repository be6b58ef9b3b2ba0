"""Lambda-returns against the recursion in plain Python; the normaliser's moving statistics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wm.returns import ReturnNorm, lambda_return


def slow_return(reward: list, cont: list, boot: list, lam: list) -> list:
    ret = [boot[-1]]
    for t in reversed(range(len(reward) - 1)):
        ret.insert(0, reward[t + 1] + cont[t + 1] * ((1 - lam[t + 1]) * boot[t + 1] + lam[t + 1] * ret[0]))
    return ret[:-1]


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 20), st.integers(0, 2**31))
def test_it_is_the_recursion(length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    reward, boot = torch.randn(2, 3, length, generator=generator, dtype=torch.float64)
    cont, lam = torch.rand(2, 3, length, generator=generator, dtype=torch.float64)
    ours = lambda_return(reward, cont, boot, lam)
    want = [slow_return(*(x[b].tolist() for x in (reward, cont, boot, lam))) for b in range(3)]
    torch.testing.assert_close(ours, torch.tensor(want, dtype=torch.float64))


def test_the_first_reward_was_received_before_and_does_not_count() -> None:
    reward = torch.tensor([[100.0, 1.0, 2.0]])
    assert lambda_return(reward, torch.ones(1, 3), torch.zeros(1, 3), 1.0).tolist() == [[3.0, 2.0]]


def test_nothing_flows_back_over_the_end_of_an_episode() -> None:
    reward, boot = torch.zeros(1, 4), torch.zeros(1, 4)
    reward[0, 3] = boot[0, 3] = 5.0
    assert lambda_return(reward, torch.tensor([[1.0, 1.0, 0.0, 1.0]]), boot, 0.95)[0, :2].tolist() == [
        0.0,
        0.0,
    ]


def test_percentiles_move_by_the_rate_and_start_at_zero() -> None:
    norm = ReturnNorm(rate=0.1)
    norm.update(torch.linspace(0, 100, 101).view(1, 101))
    norm.update(torch.linspace(100, 200, 101))
    offset, scale = norm.offset_scale()
    assert offset.item() == pytest.approx(0.1 * 5 * 0.9 + 0.1 * 105)
    assert scale.item() == pytest.approx(0.1 * 90 * 0.9 + 0.1 * 90)


def test_small_returns_are_not_blown_up() -> None:
    norm = ReturnNorm(rate=1.0)
    norm.update(torch.linspace(0, 0.01, 10))
    assert norm.offset_scale()[1] == 1.0


def test_debiased_statistics_of_a_constant_are_right_from_the_first_update() -> None:
    norm = ReturnNorm("meanstd", debias=True, limit=1e-8)
    norm.update(torch.tensor([-1.0, 1.0]) * 3 + 7)
    offset, scale = norm.offset_scale()
    assert (offset.item(), scale.item()) == (pytest.approx(7, rel=1e-5), pytest.approx(3, rel=1e-5))


def test_none_leaves_the_returns_alone() -> None:
    norm = ReturnNorm("none")
    norm.update(torch.randn(100) * 50)
    assert [float(v) for v in norm.offset_scale()] == [0.0, 1.0]


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'perc', 'meanstd' or 'none'"):
        ReturnNorm("percentile")
