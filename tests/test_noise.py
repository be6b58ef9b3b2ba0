"""Streams of random numbers: each by its name alone, and resumable."""

import pytest
import torch

from lit_wm.noise import NoiseStreams, stream_seed

SHAPE = (3, 4)


def test_a_stream_does_not_depend_on_the_others():
    alone, among = NoiseStreams(5), NoiseStreams(5)
    among.normal("another", SHAPE)
    assert torch.equal(alone.exponential("x", SHAPE), among.exponential("x", SHAPE))


def test_seed_rank_and_name_each_make_another_stream():
    seeds = {stream_seed(s, r, name) for s in (0, 1) for r in (0, 1) for name in ("a", "b")}
    assert len(seeds) == 8


def test_streams_go_on_where_they_were_saved():
    noise = NoiseStreams(5)
    noise.normal("x", SHAPE)
    state = noise.state_dict()
    expected = [noise.normal("x", SHAPE), noise.exponential("new", SHAPE)]
    resumed = NoiseStreams()
    resumed.load_state_dict(state)
    for a, b in zip(expected, (resumed.normal("x", SHAPE), resumed.exponential("new", SHAPE)), strict=True):
        assert torch.equal(a, b)


def test_streams_of_another_kind_of_device_begin_anew_and_say_so():
    """The state of a GPU's generator does not fit a CPU's: a run may move, but not bit for bit."""
    state = NoiseStreams(5, rank=1).state_dict() | {"device": "cuda", "streams": {"x": torch.zeros(16)}}
    resumed = NoiseStreams()
    with pytest.warns(UserWarning, match="those of a cuda, this run computes on a cpu"):
        resumed.load_state_dict(state)
    assert torch.equal(resumed.normal("x", SHAPE), NoiseStreams(5, rank=1).normal("x", SHAPE))
