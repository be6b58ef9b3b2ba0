"""Windows within episodes: which may be drawn, how often, and that nothing but the rows decides it."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from datamodules.replay import RowReplay
from datamodules.sampling import EpisodeSampler
from datamodules.views import tdmpc2_view
from lit_wm.errors import DataError, NotSupported
from lit_wm.types import Spaces, Spec

NUMBERS = Spaces({"obs": Spec("float32", (1,))}, {"action": Spec("float32", (1,))})


def write_episode(replay, rows, first_number, finished=True):
    """Rows ``first_number ...`` of stream 0: as in the official buffer, what i says led to row i."""
    for i in range(rows):
        number, last = first_number + i, finished and i == rows - 1
        if i:
            replay.set_outcome(
                np.array([0]), np.array([2000.0 + number]), np.array([False]), np.array([last])
            )
        replay.append(
            np.array([0]), {"obs": np.array([[number]])}, np.array([i == 0]), np.array([not last]),
            {"action": np.array([[0.0 if last else 1001 + number]])},
        )  # fmt: skip


def pieces(log, ring, window):
    """(start, stop) of what the ring holds of finished episodes, if it is a window at least."""
    tail, start, found = max(0, len(log) - ring), 0, []
    for position, step in enumerate(log):
        if step["is_first"]:
            start = position
        if step["is_last"] and position + 1 - max(start, tail) >= window:
            found.append((max(start, tail), position + 1))
    return found


def drawn(replay, batch=100):
    rows = replay.sample(batch)
    streams = (rows["index"] // replay.storage.ring)[:, 0].tolist()
    return list(zip(streams, rows["generation"].tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6), steps=st.integers(1, 120), streams=st.integers(1, 3),
    window=st.integers(2, 6), mean=st.sampled_from([2.0, 6.0, 25.0]),
    by=st.sampled_from(["episodes", "windows"]),
)  # fmt: skip
def test_every_window_lies_in_one_finished_episode(make_replay, play, seed, steps, streams, window, mean, by):
    replay = make_replay(capacity=streams * 20, streams=streams, window=window, within_episodes=True, by=by)
    game = play(replay, seed, mean)
    for step in range(steps):
        game.step(np.flatnonzero(game.rng.random(streams) < 0.7))
        allowed = {
            (s, p): None
            for s, log in enumerate(game.steps)
            for start, stop in pieces(log, 20, window)
            for p in range(start, stop - window + 1)
        }
        assert replay.num_windows == len(allowed)
        if not allowed:
            with pytest.raises(DataError, match=f"no complete window of {window} rows"):
                replay.sample(4)
        elif step % 5 == 0:
            for stream, positions in drawn(replay, 8):
                assert (stream, positions[0]) in allowed
                assert positions == list(range(positions[0], positions[0] + window))


def test_draws_are_uniform_over_all_windows_of_the_pieces_if_wanted(make_replay, play):
    replay = make_replay(capacity=240, streams=3, window=4, within_episodes=True, by="windows")
    game = play(replay, 1, 9.0).run(300)  # every ring has been filled more than three times
    allowed = [
        (s, p)
        for s, log in enumerate(game.steps)
        for start, stop in pieces(log, 80, 4)
        for p in range(start, stop - 3)
    ]
    counts = Counter((s, positions[0]) for _ in range(300) for s, positions in drawn(replay))
    assert counts.keys() == set(allowed)
    assert chisquare([counts[x] for x in allowed]).pvalue > 1e-4


def test_draws_are_uniform_over_episodes_then_over_their_starts(make_replay, play):
    replay = make_replay(capacity=240, streams=3, window=4, within_episodes=True)
    game = play(replay, 1, 7.0)
    for streams in (np.arange(3),) * 40 + (np.array([1]),) * 100:  # stream 1 has overwritten its first rows
        game.step(streams)
    found = [(s, *piece) for s, log in enumerate(game.steps) for piece in pieces(log, 80, 4)]
    lengths = {stop - start for _, start, stop in found}
    assert 4 in lengths and max(lengths) > 10  # noqa: PT018
    assert found[0][1] == 0 and game.steps[1][found[-1][1]]  # noqa: PT018
    expected = {
        (s, p): 1 / len(found) / (stop - start - 3)
        for s, start, stop in found
        for p in range(start, stop - 3)
    }
    counts = Counter((s, p[0]) for _ in range(200) for s, p in drawn(replay))
    assert counts.keys() <= expected.keys()
    keys = list(expected)
    assert chisquare([counts[k] for k in keys], [20_000 * expected[k] for k in keys]).pvalue > 1e-3


def test_draws_and_batches_are_those_of_the_official_buffer(tmp_path):
    golden = torch.load(Path(__file__).parent / "data" / "tdmpc2_buffer.pt", weights_only=True)
    window = golden["horizon"] + 1
    replay = RowReplay(NUMBERS, golden["capacity"], 1, tmp_path, window=window, within_episodes=True)
    number = 0
    for rows in golden["episode_rows_in_insertion_order"]:
        write_episode(replay, rows, number)
        number += rows
    theirs = {int(k): n for k, n in golden["start_row_counts_in_12800_samples"].items()}
    ours = Counter(p[0] for _ in range(100) for _, p in drawn(replay, 128))
    assert ours.keys() == theirs.keys()
    table = np.array([[ours[k], theirs[k]] for k in theirs])
    assert chi2_contingency(table).pvalue > 1e-3
    assert abs(ours[34] / 12_800 - 0.25) < 0.02  # the episode of four rows

    batch = tdmpc2_view(replay.sample(400))
    ours = {int(o[0, 0]): b for b, o in enumerate(batch.obs["obs"])}
    for b in range(64):
        same = ours[int(golden["sample_obs"][0, b, 0])]
        assert torch.equal(batch.obs["obs"][same, :, 0], golden["sample_obs"][:, b, 0])
        assert torch.equal(batch.prev_action["action"][same, 1:], golden["sample_action"][:, b])
        assert torch.equal(batch.reward[same, 1:], golden["sample_reward"][:, b, 0])
        assert torch.equal(batch.is_terminal[same, 1:].float(), golden["sample_terminated"][:, b, 0])


def test_an_episode_that_its_ring_cannot_hold_is_drawn_from_what_is_left(tmp_path):
    replay = RowReplay(NUMBERS, 10, 1, tmp_path, window=4, within_episodes=True)
    write_episode(replay, 25, 0)
    assert {p[0] for _, p in drawn(replay)} == set(range(15, 22))
    write_episode(replay, 4, 25, finished=False)  # overwrites four rows more; itself it is not drawn
    assert {p[0] for _, p in drawn(replay)} == set(range(19, 22))
    write_episode(replay, 5, 29)  # what the environment lost had four rows
    assert {p[0] for _, p in drawn(replay)} == {25, 29, 30}


def test_a_restored_replay_goes_on_with_the_same_draws(make_replay, play, tmp_path):
    whole = make_replay(capacity=90, streams=3, window=4, within_episodes=True)
    game = play(whole, 5, 5.0).run(70)
    drawn(whole)
    whole.snapshot(tmp_path / "saved")
    again = make_replay(capacity=90, streams=3, window=4, within_episodes=True)
    again.restore(tmp_path / "saved")
    for _ in range(60):
        assert drawn(whole) == drawn(again)
        assert whole.num_windows == again.num_windows
        game.step(np.arange(3))
        for key, array in again.storage.arrays.items():  # the same new rows
            array[...] = whole.storage.arrays[key]
        again.storage.head[:] = whole.storage.head
        again.sampler.extend(torch.from_numpy(again.storage.newest(np.arange(3))))
    smaller = make_replay(capacity=45, streams=3, window=4, within_episodes=True)
    smaller.restore(tmp_path / "saved")
    assert {(s, p[0]) for s, p in drawn(smaller)} <= {(s, p) for s in range(3) for p in range(55, 67)}


def test_a_cut_episode_may_be_drawn(tmp_path):
    replay = RowReplay(NUMBERS, 30, 1, tmp_path, window=4, within_episodes=True)
    write_episode(replay, 6, 0, finished=False)
    assert replay.num_windows == 0
    replay.cut(np.array([0]))
    assert replay.num_windows == 3
    assert not tdmpc2_view(replay.sample(8)).is_terminal.any()


def test_what_does_not_fit_is_refused(make_replay, play):
    replay = make_replay(window=4, within_episodes=True)
    play(replay, 0).run(40)
    assert isinstance(replay.sampler, EpisodeSampler)
    assert replay.latents == {}
    with pytest.raises(NotSupported, match="4 rows here, not 5"):
        replay.sample(2, 5)
    assert replay.sample(2, 4, "report")["observation"].shape == (2, 4, 3)


def test_an_append_costs_the_same_at_any_size(make_replay, play):
    replay = make_replay(capacity=3000, streams=3, window=2, within_episodes=True)
    play(replay, 0, 2.5).run(2500)
    sampler = replay.sampler
    assert sampler._pieces.shape[:2] == (3, 501)  # as many as a ring can hold, however long the run
    assert (sampler._count <= 500).all()
    assert (sampler._count > 100).all()
