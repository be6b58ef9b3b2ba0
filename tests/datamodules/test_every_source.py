"""Every kind of dataset through cache, replay and both views, value by value beside a reading of our own.

What is expected is read with Minari, h5py, NumPy or torch alone, as lists of episodes
(observations T+1, actions T, rewards T, terminated, whether the last observation is real).
"""

import glob
import os
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch

from datamodules.cache import ingest
from datamodules.offline import CacheRows
from datamodules.rows import nested
from datamodules.selection import SourceSpec, model_spaces
from datamodules.views import dreamer_view, tdmpc2_view

DATA = Path(__file__).parent / "data"
CHUNKS = DATA / "dreamer_chunks"


def read_minari(name):
    os.environ["MINARI_DATASETS_PATH"] = str(DATA / "minari")
    try:
        return [
            (e.observations, e.actions, e.rewards, bool(e.terminations[-1]))
            for e in minari.load_dataset(name).iterate_episodes()
        ]
    finally:
        del os.environ["MINARI_DATASETS_PATH"]


def without_last(obs, action, reward, terminated):
    """An episode whose source lacks o_T: repeated after a termination, else o_{T-1} is the last."""
    if terminated:
        return np.concatenate([obs, obs[-1:]]), action, reward, True
    return obs, action[:-1], reward[:-1], False


def read_d4rl(name, length=None):
    with h5py.File(DATA / "d4rl" / name) as file:
        obs, action, reward, done = (file[k][:] for k in ("observations", "actions", "rewards", "terminals"))
        end = done | (file["timeouts"][:] if length is None else np.arange(len(obs)) % length == length - 1)
        after = file["next_observations"][:] if "next_observations" in file else None
    episodes, start = [], 0
    for stop in np.flatnonzero(end) + 1:
        part = slice(start, stop)
        if after is None:
            episodes.append(without_last(obs[part], action[part], reward[part], bool(done[stop - 1])))
        else:
            whole = np.concatenate([obs[part], after[stop - 1 : stop]])
            episodes.append((whole, action[part], reward[part], bool(done[stop - 1])))
        start = stop
    return episodes


def read_npz(name, discrete=False):
    with np.load(DATA / "npz" / name) as file:
        obs = file["obs"] if "obs" in file else file["observations"]
        action, reward, done = file["actions"], file["rewards"], file["dones"].astype(bool)
    action = action.argmax(1) if discrete else action
    ends = [*(np.flatnonzero(done) + 1)]
    if ends[-1] != len(obs):
        ends.append(len(obs))
    starts = [0, *ends[:-1]]
    return [
        without_last(obs[a:b], action[a:b], reward[a:b], False) for a, b in zip(starts, ends, strict=True)
    ]


def read_chunks():
    files = sorted(glob.glob(str(CHUNKS / "*.npz")))
    keys = ("vector", "action", "reward", "is_first", "is_last", "is_terminal")
    steps = {k: np.concatenate([np.load(f)[k] for f in files]) for k in keys}
    episodes, starts = [], np.flatnonzero(steps["is_first"])
    for a, b in zip(starts, [*starts[1:], len(steps["reward"])], strict=True):
        end = bool(steps["is_terminal"][b - 1])
        episodes.append((steps["vector"][a:b], steps["action"][a : b - 1], steps["reward"][a + 1 : b], end))
    return episodes


def read_tdmpc2():
    episodes = []
    for name in ("chunk_0.pt", "chunk_1.pt"):
        td = torch.load(DATA / "tdmpc2" / name, weights_only=False)
        for e in td:
            obs, action, reward = e["obs"].numpy(), e["action"].numpy()[1:], e["reward"].numpy()[1:]
            episodes.append((obs, action, reward, False))
    return episodes


SETS = {
    "minari hdf5": (
        f"minari:{DATA}/minari/pendulum/scripted-v0",
        lambda: read_minari("pendulum/scripted-v0"),
    ),
    "minari arrow": (f"minari:{DATA}/minari/pendulum/arrow-v0", lambda: read_minari("pendulum/arrow-v0")),
    "minari parquet": (
        f"minari:{DATA}/minari/pendulum/parquet-v0",
        lambda: read_minari("pendulum/parquet-v0"),
    ),
    "minari discrete": (f"minari:{DATA}/minari/cartpole/mixed-v0", lambda: read_minari("cartpole/mixed-v0")),
    "d4rl": (
        f"hdf5:{DATA}/d4rl/pendulum_scripted-v2-nonext.hdf5",
        lambda: read_d4rl("pendulum_scripted-v2-nonext.hdf5"),
    ),
    "d4rl by length": (
        f"hdf5:{DATA}/d4rl/halfcheetah_scripted-v0-notimeouts.hdf5?episode_length=300",
        lambda: read_d4rl("halfcheetah_scripted-v0-notimeouts.hdf5", 300),
    ),
    "demonstrations": (f"npz:{DATA}/npz/recording.npz", lambda: read_npz("recording.npz")),
    "open end": (f"npz:{DATA}/npz/recording_open_end.npz", lambda: read_npz("recording_open_end.npz")),
    "replay form": (f"npz:{DATA}/npz/atari_breakout.npz", lambda: read_npz("atari_breakout.npz", True)),
    "dreamer chunks": (f"npz:{CHUNKS}", read_chunks),
    "tdmpc2": (f"tdmpc2:{DATA}/tdmpc2/chunk_*.pt", read_tdmpc2),
}


def windows(storage, length, lead):
    """All windows of a dataset, as rows."""
    starts = np.arange(lead, storage.ring - length + 1)
    index = torch.from_numpy(starts[:, None] + np.arange(-lead, length))
    return nested(storage.gather(index) | {("index",): index, ("generation",): index})


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SETS)
def test_both_views_equal_the_source(tmp_path, name):
    uri, read = SETS[name]
    episodes = read()
    cache = ingest(uri, tmp_path / "cache")
    assert len(cache.episodes["start"]) == len(episodes)
    assert cache.steps == sum(len(e[2]) for e in episodes)
    bounds = {"action_low": -2.0, "action_high": 2.0} if not cache.schema.low else {}
    spec = SourceSpec(uri, **bounds)
    discrete = cache.schema.spaces.action["action"].is_discrete
    low, high = (-2.0, 2.0) if bounds else (0.0, 1.0)
    if not discrete and not bounds:
        low, high = (np.asarray(x["action"]) for x in (cache.schema.low, cache.schema.high))

    def wanted(action):
        if discrete:
            return torch.from_numpy(np.asarray(action)).int()
        return torch.from_numpy(
            ((np.asarray(action, np.float64) - low) / (high - low) * 2 - 1).astype(np.float32)
        )

    cast = "uint8" if cache.schema.spaces.obs["obs"].is_image else "float32"
    obs = torch.from_numpy(np.concatenate([e[0].astype(cast) for e in episodes]))
    ids = np.concatenate([np.full(len(e[0]), i) for i, e in enumerate(episodes)])
    steps = np.concatenate([np.arange(len(e[0])) for e in episodes])
    lengths = np.array([len(e[2]) for e in episodes])
    reward = torch.from_numpy(np.concatenate([[0.0, *e[2]] for e in episodes]).astype(np.float32))
    first, last = torch.from_numpy(steps == 0), torch.from_numpy(steps == lengths[ids])
    terminal = torch.from_numpy((steps == lengths[ids]) & np.array([e[3] for e in episodes])[ids])
    acts = [wanted(e[1]) for e in episodes]
    zero = torch.zeros_like(acts[0][:1])
    before = torch.cat([torch.cat([zero, a]) for a in acts])  # the action that led to each row

    everything = np.arange(len(episodes))
    spaces, length = model_spaces(cache), 4
    dreamer = CacheRows(cache, tmp_path / "dreamer", spaces, everything, spec, lead=1)
    batch = dreamer_view(windows(dreamer, length, 1), 1, False)
    at = torch.arange(1, len(obs) - length + 1)[:, None] + torch.arange(length)
    assert torch.equal(batch.obs["obs"], obs[at])
    assert torch.equal(batch.reward, reward[at])
    assert torch.equal(batch.is_first, first[at])
    assert torch.equal(batch.is_last, last[at])
    assert torch.equal(batch.is_terminal, terminal[at])
    later = ~first[at]  # what led to the first row is never used
    torch.testing.assert_close(batch.prev_action["action"][later], before[at][later], rtol=0, atol=1e-6)

    td = CacheRows(cache, tmp_path / "td", spaces, everything, spec, lead=0)
    batch = tdmpc2_view(windows(td, length, 0))
    at = torch.arange(len(obs) - length + 1)[:, None] + torch.arange(length)
    within = torch.from_numpy(ids)[at[:, 0]] == torch.from_numpy(ids)[at[:, -1]]
    assert within.sum() == sum(max(0, len(e[0]) - length + 1) for e in episodes)
    assert torch.equal(batch.obs["obs"], obs[at])
    assert torch.equal(batch.reward[within, 1:], reward[at][within, 1:])
    assert torch.equal(batch.is_terminal[within, 1:], terminal[at][within, 1:])
    taken = batch.prev_action["action"][within, 1:]
    torch.testing.assert_close(taken, before[at][within, 1:], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_same_transitions_from_other_formats_are_the_same_rows(tmp_path):
    """CartPole as Minari stores it and as Dreamer's chunks do."""
    a = ingest(SETS["minari discrete"][0], tmp_path)
    b = ingest(SETS["dreamer chunks"][0], tmp_path)
    for key in a.rows.keys(True, True):
        assert torch.equal(a.rows[key], b.rows[key]), key
    assert np.array_equal(a.episodes["return"], b.episodes["return"])
