"""symlog, symexp and one-hot vectors."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_wm.functional import one_hot, symexp, symlog

FLOATS = st.floats(-1e8, 1e8, width=32)


@settings(deadline=None)
@given(FLOATS)
def test_symexp_undoes_symlog(x: float) -> None:
    value = torch.tensor(x, dtype=torch.float64)
    torch.testing.assert_close(symexp(symlog(value)), value, rtol=1e-9, atol=1e-12)


@settings(deadline=None)
@given(FLOATS)
def test_symlog_is_odd(x: float) -> None:
    assert symlog(torch.tensor(-x)) == -symlog(torch.tensor(x))


def test_symlog_of_a_tiny_number_is_that_number() -> None:
    """log(1 + x) instead of log1p would give 0."""
    assert symlog(torch.tensor(1e-12)) == torch.tensor(1e-12)


def test_one_hot_is_the_row_of_the_identity() -> None:
    index = torch.tensor([[0, 3], [2, 1]])
    assert torch.equal(one_hot(index, 4), torch.eye(4)[index])


def test_one_hot_of_an_index_outside_is_zero() -> None:
    assert one_hot(torch.tensor([-1, 4]), 4).count_nonzero() == 0
