"""Batches of several sources, and batches drawn ahead."""

import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import made_cache
from test_offline import LATENTS, replay_of

from datamodules.mixture import Mixture, Prefetch
from datamodules.replay import RowReplay
from lit_wm.errors import DataError


def mixture_of(tmp_path, weights=None, latents=None, within=False, seed=0, caches=None):
    """Two sources, told apart by their lengths."""
    caches = caches or [made_cache(tmp_path / "c", lengths) for lengths in ([9] * 4, [30])]
    parts = {
        f"source{i}": replay_of(tmp_path / f"{i}", cache=cache, latents=latents, within=within)[0]
        for i, cache in enumerate(caches)
    }
    for i, part in enumerate(parts.values()):
        part.sampler.name = f"source{i}"
    if weights is not None and not callable(weights):
        return Mixture(parts, lambda update: weights, seed), caches
    return Mixture(parts, weights, seed), caches


class Counted:
    """Stands for a replay of which only the number of windows matters."""

    spaces, latents, within_episodes = None, {}, False

    def __init__(self, windows):
        self.num_windows = windows


@settings(max_examples=200, deadline=None)
@given(
    weights=st.lists(st.floats(0, 10), min_size=1, max_size=5).filter(lambda w: sum(w) > 0.01),
    batch=st.integers(1, 300),
    seed=st.integers(0, 1000),
)
def test_each_batch_has_the_share_of_every_source_within_one(weights, batch, seed):
    mixture = Mixture({str(i): Counted(5) for i in range(len(weights))}, lambda update: weights, seed)
    for draw in range(5):
        mixture.draws["train"] = draw
        shares = np.array(mixture.shares(batch))
        exact = np.array(weights) / sum(weights) * batch
        assert shares.sum() == batch
        assert (shares >= np.floor(exact - 1e-6)).all()
        assert (shares <= np.ceil(exact + 1e-6)).all()


def test_any_share_holds_on_average():
    mixture = Mixture({"a": Counted(5), "b": Counted(9), "c": Counted(1)}, lambda update: [0.3, 0.6, 0.1])
    total = np.zeros(3)
    for draw in range(4000):
        mixture.draws["train"] = draw
        total += mixture.shares(7)
    np.testing.assert_allclose(total / 4000 / 7, [0.3, 0.6, 0.1], atol=0.003)


def test_schedules_windows_and_empty_sources_decide_the_shares():
    parts = {"demos": Counted(10), "env": Counted(0)}
    mixture = Mixture(parts, lambda update: [1 - min(update, 100) / 100, min(update, 100) / 100])
    for update, windows, expected in ((0, 0, [8, 0]), (50, 0, [8, 0]), (50, 4, [4, 4]), (100, 4, [0, 8])):
        parts["env"].num_windows, mixture.draws["train"] = windows, update
        assert mixture.shares(8) == expected
    parts["env"].num_windows = 0
    with pytest.raises(DataError, match="nothing to draw from: demos, env have \\[10, 0\\] windows"):
        mixture.shares(8)
    mixture.weights, parts["env"].num_windows = None, 30  # in proportion to the windows
    mixture.draws["train"] = 0
    assert mixture.shares(80) == [20, 60]


def test_a_batch_holds_the_rows_of_its_parts(tmp_path):
    mixture, _ = mixture_of(tmp_path, [0.25, 0.75])
    alone, _ = mixture_of(tmp_path / "alone", [0, 1], caches=[p.storage.cache for p in mixture.parts])
    columns = mixture.sample_columns(8)
    assert columns["source",].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    for b, part in enumerate(columns["source",].tolist()):
        storage = mixture.parts[part].storage
        assert torch.equal(
            columns["observation",][b], storage.columns["observation",][columns["index",][b, 1:]]
        )
    assert {key: v.shape[0] for key, v in columns.items()} == dict.fromkeys(columns, 8)
    assert torch.equal(alone.sample_columns(6)["index",], columns["index",][2:])


def test_write_back_reaches_the_part_that_a_row_is_of(tmp_path):
    mixture, _ = mixture_of(tmp_path, [0.5, 0.5], LATENTS)
    columns = mixture.sample_columns(6)
    index, part = columns["index",][:, 1:], columns["source",]
    deter = (1000 * part[:, None] + index).float().unsqueeze(-1).expand(-1, -1, 2)
    stoch = torch.zeros(*index.shape, 3, dtype=torch.uint8)
    mixture.write_back(index, columns["generation",][:, 1:], {"deter": deter, "stoch": stoch}, part)
    for number, replay in enumerate(mixture.parts):
        rows = index[part == number].reshape(-1)
        assert torch.equal(replay.storage.columns["latent", "deter"][rows, 0], (1000 * number + rows).float())
        assert (replay.storage.columns["latent", "deter"] != 0).any(1).sum() == len(rows.unique())
    again = dict(columns)
    mixture.add_latents(again)
    carried = zip(part, columns["index",][:, 0], again["latent", "deter"], strict=True)
    assert all(torch.equal(mixture.parts[p].storage.columns["latent", "deter"][i], x) for p, i, x in carried)


def test_a_snapshot_goes_on_with_the_same_batches(tmp_path):
    mixture, caches = mixture_of(tmp_path, [0.3, 0.7], LATENTS)
    for _ in range(3):
        mixture.sample_columns(5)
    mixture.snapshot(tmp_path / "saved")
    expected = [mixture.sample_columns(5) for _ in range(4)]
    other, _ = mixture_of(tmp_path / "other", [0.3, 0.7], LATENTS, caches=caches)
    other.restore(tmp_path / "saved")
    for columns in expected:
        found = other.sample_columns(5)
        assert all(torch.equal(columns[key], found[key]) for key in columns)


def test_a_ring_and_a_dataset_share_a_batch(tmp_path):
    data, _ = replay_of(tmp_path, latents=LATENTS)
    ring = RowReplay(data.spaces, 60, 2, tmp_path / "ring", LATENTS, 4, online=False)
    mixture = Mixture({"data": data, "env": ring}, lambda update: [0.5, 0.5])
    assert set(mixture.sample_columns(4)["source",].tolist()) == {0}  # nothing is collected yet
    both, no = np.arange(2), np.zeros(2, bool)
    for t in range(12):
        obs = {"obs": np.array([[50, t], [50, t]], np.float32)}
        ring.append(both, obs, no | (t == 0), ~no, {"action": np.zeros((2, 2))}, None)
    columns = mixture.sample_columns(4)
    assert columns["source",].tolist() == [0, 0, 1, 1]
    assert (columns["observation",][2:, :, 0] == 50).all()
    assert (columns["observation",][:2, :, 0] < 50).all()
    assert columns["observation",].is_contiguous()


@pytest.mark.parametrize("wait", [0, 0.005])
def test_batches_drawn_ahead_are_the_same_batches(tmp_path, wait):
    plain, caches = mixture_of(tmp_path, [0.3, 0.7], LATENTS)
    ahead, _ = mixture_of(tmp_path / "ahead", [0.3, 0.7], LATENTS, caches=caches)
    thread = Prefetch(ahead, 5)
    for number in range(20):
        expected, found = plain.sample_columns(5), thread.next()
        for key in expected:
            assert torch.equal(expected[key], found[key]), (number, key)
        for mixture in (plain, ahead):  # latents written now are those of the next batches
            rows, value = expected["index",][:, 1:], torch.tensor(number + 1.0)
            stoch = torch.zeros(*rows.shape, 3, dtype=torch.uint8)
            latents = {"deter": value.expand(*rows.shape, 2), "stoch": stoch}
            mixture.write_back(rows, expected["generation",][:, 1:], latents, expected["source",])
        time.sleep(wait)
        if number == 11:
            thread.rewind()
            assert ahead.state_dict() == plain.state_dict()
    thread.rewind()
    assert not [t for t in threading.enumerate() if t.name.startswith("replay") and t.is_alive()]


def test_two_threads_of_one_seed_do_not_disturb_each_other(tmp_path):
    plain, caches = mixture_of(tmp_path, [0.3, 0.7])
    both = [Prefetch(mixture_of(tmp_path / name, [0.3, 0.7], caches=caches)[0], 5) for name in "ab"]
    for number in range(300):
        expected = plain.sample_columns(5)["index",]
        for thread in both:
            assert torch.equal(thread.next()["index",], expected), number
    for thread in both:
        thread.rewind()


def test_an_error_of_the_thread_comes_out_where_the_batch_is_wanted(tmp_path):
    mixture, _ = mixture_of(tmp_path, [0, 0])
    thread = Prefetch(mixture, 4)
    with pytest.raises(DataError, match="nothing to draw from"):
        thread.next()
    thread.rewind()
