"""The adapter against our own collector on the same environments, and on rollouts made by hand."""

import sys
import warnings
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from tensordict.nn import TensorDictModule

from datamodules.collect import Collector
from datamodules.replay import RowReplay
from datamodules.torchrl_collector import TorchRLAdapter
from lit_wm.envs import StandardEnv, spaces_from_gym
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec, State

COLUMNS = ("observation", "action", "next.reward", "next.terminated", "next.truncated", "next.done")
COLUMNS += ("is_init", "valid", "step")


class OwnSeeds(gym.Wrapper):
    """Episode k of an environment starts from ``seed + k``, whoever resets it and however often before."""

    def __init__(self, name, seed, limit):
        super().__init__(gym.wrappers.TimeLimit(gym.make(name).unwrapped, limit))
        self.start, self.episode, self.fresh = seed, 0, False

    def reset(self, *, seed=None, options=None):
        self.episode += not self.fresh  # TorchRL resets twice before its first step
        self.fresh = True
        return self.env.reset(seed=self.start + self.episode)

    def step(self, action):
        self.fresh = False
        return self.env.step(action)


def torchrl_env(name, seed, limit=40):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchrl.envs import GymWrapper

        return GymWrapper(OwnSeeds(name, seed, limit))


def cartpole_action(observation):
    return torch.nn.functional.one_hot((observation[..., 2] + 0.3 * observation[..., 3] > 0).long(), 2)


def pendulum_torque(observation):
    # In eighths: exact as [-1, 1] and as [-2, 2].
    return (observation[..., 2:] * 4).round().clamp(-16, 16) / 8


def ours(tmp_path, name, seeds, rows, act, limit=40):
    """Rows of our own collector, by stream."""
    envs = [lambda s=s: StandardEnv(OwnSeeds(name, s, limit), name) for s in seeds]
    vector = SyncVectorEnv(envs, autoreset_mode=AutoresetMode.DISABLED)
    spaces = spaces_from_gym(vector.single_observation_space, vector.single_action_space)
    replay = RowReplay(spaces, 4000, len(seeds), tmp_path / "ours", None, 9)
    loop = Collector(vector, spaces, replay)
    while loop.decisions < rows * len(seeds):
        loop.collect(lambda obs, state, is_first: (act(obs["obs"]), State(torch.zeros(len(is_first), 1))))
    return rows_of(replay), spaces


def rows_of(replay):
    """By stream, the columns of all rows but the last, which may lack its outcome."""
    storage, streams = replay.storage, []
    for s in range(storage.streams):
        index = storage.rows(s, np.arange(storage.tail[s], storage.head[s]))
        streams.append(
            {k: v.numpy() for k, v in storage.get(torch.from_numpy(index)).flatten_keys(".").items()}
        )
    return streams


def assert_same(mine, theirs, rows):
    for a, b in zip(mine, theirs, strict=True):
        n = min(len(a["valid"]), len(b["valid"])) - 1
        assert n >= rows
        for key in COLUMNS:
            np.testing.assert_array_equal(a[key][:n], b[key][:n], key)
        assert a["is_init"][:n].sum() > 2


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1"])
def test_torchrls_collector_gives_the_rows_of_our_own(tmp_path, name):
    from torchrl.collectors import Collector as TorchRLCollector
    from torchrl.envs import SerialEnv

    torque = name == "Pendulum-v1"
    act = pendulum_torque if torque else cartpole_action
    seeds = [100, 200]
    mine, spaces = ours(
        tmp_path,
        name,
        seeds,
        130,
        lambda x: {"action": act(x) / 2 if torque else act(x).argmax(-1).to(torch.int32)},
    )
    env = SerialEnv(2, [lambda s=s: torchrl_env(name, s) for s in seeds])
    policy = TensorDictModule(act, in_keys=["observation"], out_keys=["action"])
    collector = TorchRLCollector(env, policy, frames_per_batch=26, total_frames=260)  # 13 steps: mid-episode
    replay = RowReplay(spaces, 4000, 2, tmp_path / "theirs", None, 9)
    adapter = TorchRLAdapter(collector, spaces, replay)
    counts = []
    while count := adapter.collect():
        counts.append(count)
    collector.shutdown()
    assert len(counts) == 10
    assert sum(counts) == adapter.env_steps == len(replay)
    assert adapter.broken == 0
    theirs = rows_of(replay)
    assert_same(mine, theirs, 125)
    # Numbers of episodes too: they are given in the order of the rows.
    np.testing.assert_array_equal(mine[1]["episode"][:100], theirs[1]["episode"][:100])
    if torque:
        assert 0 < np.abs(theirs[0]["action"]).max() <= 1
        assert set(theirs[0]["next.truncated"].ravel()) == {False, True}


@pytest.mark.parametrize(
    "kind", ["MultiSyncCollector", pytest.param("MultiAsyncCollector", marks=pytest.mark.slow)]
)
def test_processes_keep_their_streams(tmp_path, kind):
    import cloudpickle
    import torchrl.collectors

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the processes cannot import a test
    seeds = [100, 200]
    mine, spaces = ours(
        tmp_path, "CartPole-v1", seeds, 100, lambda x: {"action": cartpole_action(x).argmax(-1).int()}
    )
    policy = TensorDictModule(cartpole_action, in_keys=["observation"], out_keys=["action"])
    collector = getattr(torchrl.collectors, kind)(
        [partial(torchrl_env, "CartPole-v1", s) for s in seeds], policy, frames_per_batch=30, total_frames=300
    )
    replay = RowReplay(spaces, 4000, 2, tmp_path / "theirs", None, 9)
    adapter = TorchRLAdapter(collector, spaces, replay)
    try:
        while adapter.collect():
            pass
    finally:
        collector.shutdown()
    theirs = rows_of(replay)
    assert adapter.broken == 0
    if kind == "MultiSyncCollector":
        return assert_same(mine, theirs, 100)
    # Whichever process is first takes the first stream: by the first observation of an episode.
    starts = {tuple(m["observation"][i]): (m, i) for m in mine for i in np.flatnonzero(m["is_init"])}
    compared = 0
    for stream in theirs:
        begins = np.flatnonzero(stream["is_init"])
        for i, end in zip(begins[:-1], begins[1:], strict=True):
            if (found := starts.get(tuple(stream["observation"][i]))) and found[1] + end - i < len(
                found[0]["step"]
            ):
                m, at = found
                for key in COLUMNS:
                    np.testing.assert_array_equal(m[key][at : at + end - i], stream[key][i:end], key)
                compared += 1
    assert compared > 3


SPACES = Spaces({"obs": Spec("float32", (2,))}, {"action": Spec("int32", (), 3)})


def steps(trajectory, start, length, end=None):
    """Steps ``start ...`` of a trajectory: observation (trajectory, step), action step mod 3, reward step."""
    t = torch.arange(start, start + length)
    done = torch.zeros(length, 1, dtype=torch.bool)
    done[-1] = end is not None
    seen = torch.stack(
        [torch.full((length + 1,), float(trajectory)), torch.arange(start, start + length + 1)], 1
    )
    flags = {"done": done, "terminated": done & (end == "T"), "truncated": done & (end == "t")}
    after = {"observation": seen[1:], "reward": t[:, None].float(), **flags}
    return TensorDict(
        {
            "observation": seen[:-1], "action": torch.nn.functional.one_hot(t % 3, 3), "next": after,
            "collector": {"traj_ids": torch.full((length,), trajectory)},
        },
        [length],
    )  # fmt: skip


def lane(*parts):
    return torch.cat(parts)


def write(tmp_path, streams, *batches, spaces=SPACES):
    adapter = TorchRLAdapter(batches, spaces, RowReplay(spaces, 600, streams, tmp_path, None, 4))
    counts = [adapter.collect() for _ in batches]
    assert adapter.collect() == 0
    assert sum(counts) == len(adapter.replay)
    return adapter, rows_of(adapter.replay)


def read(stream):
    """Episodes of a stream as (trajectory, first step, observations, how it ended)."""
    found = []
    for e in dict.fromkeys(stream["episode"].tolist()):
        rows = {k: v[stream["episode"] == e] for k, v in stream.items()}
        first, n = int(rows["observation"][0, 1]), len(rows["valid"])
        assert rows["observation"][:, 1].tolist() == list(range(first, first + n))
        assert rows["is_init"].ravel().tolist() == [True] + [False] * (n - 1)
        acted = rows["valid"].ravel()
        assert acted[:-1].all()
        assert rows["action"][acted].tolist() == [(first + i) % 3 for i in range(acted.sum())]
        assert rows["next.reward"][acted].ravel().tolist() == [first + i for i in range(acted.sum())]
        flags = rows["next.terminated"].any(), rows["next.truncated"].any()
        assert rows["next.done"].ravel().tolist() == [False] * (n - 2) + [any(flags), False][: min(n, 2)]
        end = {(True, False): "T", (False, True): "t", (False, False): "open"}[flags]
        assert acted[-1] == (end == "open")
        found.append((int(rows["observation"][0, 0]), first, n, end))
    return found


def test_partial_trajectories_of_several_processes_go_on_in_their_streams(tmp_path):
    first = torch.stack([lane(steps(0, 0, 3, "T"), steps(4, 0, 2)), lane(steps(1, 0, 5))])
    adapter, (a, b, c, d) = write(
        tmp_path,
        4,
        first,  # one process
        torch.stack([steps(2, 0, 4), steps(3, 0, 4, "t")]),  # the other
        torch.stack([steps(2, 4, 2), steps(5, 0, 2)]),
        torch.stack([lane(steps(4, 2, 2, "t"), steps(6, 0, 1)), steps(1, 5, 3, "T")]),
    )
    assert [read(s) for s in (a, b, c, d)] == [
        [(0, 0, 4, "T"), (4, 0, 5, "t"), (6, 0, 1, "open")],
        [(1, 0, 9, "T")],
        [(2, 0, 6, "open")],
        [(3, 0, 5, "t"), (5, 0, 2, "open")],
    ]
    assert (adapter.episodes, adapter.broken) == (4, 0)


def test_a_trajectory_that_stops_without_an_end_is_truncated_at_what_was_seen_last(tmp_path):
    inside = torch.stack([lane(steps(0, 0, 3), steps(2, 0, 2)), steps(1, 0, 5)])
    between = torch.stack([steps(3, 0, 2), steps(4, 0, 2)])
    adapter, streams = write(tmp_path, 2, inside, between)
    assert [read(s) for s in streams] == [
        [(0, 0, 4, "t"), (2, 0, 3, "t"), (3, 0, 2, "open")],
        [(1, 0, 6, "t"), (4, 0, 2, "open")],
    ]
    assert adapter.broken == 3


def test_concatenated_processes_whole_episodes_and_masks(tmp_path):
    flat = [lane(steps(0, 0, 3), steps(1, 0, 3)), lane(steps(0, 3, 3, "T"), steps(1, 3, 2), steps(2, 0, 1))]
    _, streams = write(tmp_path / "flat", 2, flat[0], lane(*flat[1:]))
    assert [read(s) for s in streams] == [[(0, 0, 7, "T"), (2, 0, 1, "open")], [(1, 0, 5, "open")]]

    lengths = [3, 1, 5, 2, 4]
    padded = []
    for i, n in enumerate(lengths):
        whole = lane(steps(i, 0, n, "T"), *([steps(i, n, 5 - n)] if n < 5 else []))
        whole["collector", "mask"] = torch.arange(5) < n
        padded.append(whole)
    adapter, streams = write(tmp_path / "padded", 2, torch.stack(padded))
    assert sorted(e for s in streams for e in read(s)) == [(i, 0, n + 1, "T") for i, n in enumerate(lengths)]
    assert adapter.broken == 0

    preempted = torch.stack([steps(0, 0, 4), steps(1, 0, 4)])
    preempted["collector", "traj_ids"][1, 2:] = -1
    _, streams = write(tmp_path / "preempted", 2, preempted, torch.stack([steps(0, 4, 2), steps(1, 2, 2)]))
    assert [read(s) for s in streams] == [[(0, 0, 6, "open")], [(1, 0, 4, "open")]]


def test_machines_that_count_trajectories_alike_are_told_apart_by_what_they_see(tmp_path):
    def machine(number, start):
        batch = steps(7, start, 3)
        for part in (batch, batch["next"]):
            part["observation"][:, 0] = number
        return batch

    _, streams = write(tmp_path, 2, machine(0, 0), machine(1, 0), machine(1, 3), machine(0, 3))
    assert [read(s) for s in streams] == [[(0, 0, 6, "open")], [(1, 0, 6, "open")]]


def test_classes_of_every_kind_and_bounds(tmp_path):
    spaces = Spaces(
        {"a": Spec("float32", (2,)), "b/c": Spec("int32", (), 4), "pixels": Spec("uint8", (3, 4, 3))},
        {"action/0": Spec("int32", (), 2), "action/1": Spec("int32", (), 3)},
    )
    image = torch.randint(0, 256, (4, 3, 4, 3), dtype=torch.uint8)

    def seen(start):
        t = torch.arange(start, start + 3)
        nested = {"c": torch.nn.functional.one_hot(t, 5)[:, :4]}
        return {"a": torch.randn(3, 2, dtype=torch.float64), "b": nested, "pixels": image[start : start + 3]}

    no = torch.zeros(3, 1, dtype=torch.bool)
    batch = TensorDict({**seen(0), "collector": {"traj_ids": torch.zeros(3, dtype=torch.int64)}}, [3])
    batch["action"] = torch.tensor([[0, 1, 0, 0, 1], [1, 0, 1, 0, 0], [1, 0, 0, 1, 0]])
    batch["next"] = TensorDict({**seen(1), "reward": torch.ones(3, 1), "done": no, "terminated": no}, [3])
    _, (rows,) = write(tmp_path / "one", 1, batch, spaces=spaces)
    assert rows["action.action/0"].tolist() == [1, 0, 0]
    assert rows["action.action/1"].tolist() == [2, 0, 1]
    assert rows["observation.b/c"].tolist() == [0, 1, 2]
    np.testing.assert_array_equal(rows["observation.a"], batch["a"].numpy().astype(np.float32))
    np.testing.assert_array_equal(rows["observation.pixels"], image[:3].numpy())

    batch["pixels"] = batch["pixels"].float()
    with pytest.raises(DataError, match="'pixels' is float32 of shape .3, 4, 3.; expected uint8"):
        write(tmp_path / "two", 1, batch, spaces=spaces)
    with pytest.raises(DataError, match="has no 'collector/traj_ids'; found: .*next/reward"):
        write(tmp_path / "three", 1, steps(0, 0, 3).exclude(("collector", "traj_ids")))
    with pytest.raises(ConfigError, match="action_spec"):
        write(tmp_path / "four", 1, batch, spaces=Spaces(SPACES.obs, {"action": Spec("float32", (1,))}))


def test_bounds_come_from_the_environment_that_a_collector_makes(tmp_path):
    batch = steps(0, 0, 3)
    batch["action"] = torch.tensor([[1.0], [-3.0], [2.0]])

    class Several(list):
        create_env_fn = (partial(torchrl_env, "Pendulum-v1", 0),)

    spaces = Spaces(SPACES.obs, {"action": Spec("float32", (1,))})
    adapter = TorchRLAdapter(Several([batch]), spaces, RowReplay(spaces, 60, 1, tmp_path, None, 4))
    adapter.collect()
    assert rows_of(adapter.replay)[0]["action"].tolist() == [[0.5], [-1.0], [1.0]]
