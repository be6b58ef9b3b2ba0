"""Recorded datasets against Minari's own reading and against the environments played again."""

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from made import Made

import lit_wm
from datamodules.cache import ingest, open_cache
from datamodules.files import replacing
from datamodules.offline import CacheRows
from datamodules.record import (
    Played,
    minari_folder,
    play,
    portable,
    write_demos,
    write_minari,
    write_played,
)
from datamodules.selection import SourceSpec, model_spaces
from datamodules.sources import checked, open_source
from datamodules.sources.npz import write_npz
from lit_wm.envs import make_env
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import State


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    return tmp_path / "sets"


def record(dataset_id, env_id, episodes, num_envs=1, policy=None, overwrite=False, seed=0, **options):
    playing = {k: options.pop(k) for k in ("max_steps", "epsilon") if k in options}
    envs = [make_env(env_id, **options) for _ in range(num_envs)]
    shown, spec = portable(envs[0], options)
    takes = play(envs, policy, episodes, seed, raw=shown is not envs[0], **playing)
    folder = minari_folder(dataset_id, None, overwrite)
    write_minari(takes, folder, dataset_id, shown, {"env_id": env_id, "author": {"me"}}, spec)
    return minari.load_dataset(dataset_id)


def test_a_plain_environment_is_stored_in_its_own_units_and_can_be_played_again_from_its_seeds(root):
    dataset = record("swing/random-v1", "Pendulum-v1", 3, num_envs=2, seed=5, time_limit=30)
    env = dataset.recover_environment()
    assert env.spec.max_episode_steps == 30
    assert (dataset.observation_space, dataset.action_space) == (env.observation_space, env.action_space)
    assert (dataset.total_episodes, dataset.total_steps) == (3, 90)
    seeds = []
    for facts, episode in zip(dataset.storage.get_episode_metadata(range(3)), dataset, strict=True):
        seeds.append(facts["seed"])
        assert facts["total_steps"] == 30
        assert facts["rewards_sum"] == episode.rewards.sum()
        obs, _ = env.reset(seed=facts["seed"])
        for t, action in enumerate(episode.actions):
            np.testing.assert_array_equal(episode.observations[t], obs)
            obs, reward, *_ = env.step(action)
            assert episode.rewards[t] == reward
        np.testing.assert_array_equal(episode.observations[30], obs)
        assert np.abs(episode.actions).max() > 1  # of [-2, 2]
        assert not episode.terminations.any()
        assert episode.truncations.tolist() == [False] * 29 + [True]
    assert sorted(seeds) == [5, 6, 7]
    metadata = dataset.storage.metadata
    assert metadata["author"] == {"me"}
    assert metadata["author_email"] == set()
    assert not {"ref_min_score", "code_permalink"} & metadata.keys()
    assert "swing" in minari.namespace.list_local_namespaces()
    assert list(minari.list_local_datasets()) == ["swing/random-v1"]


def test_our_reader_finds_the_same_episodes_in_the_entries_of_the_wrapper(root):
    record("ours/dummy-v0", "lit_wm/Dummy-v0", 4)
    env, source = make_env("lit_wm/Dummy-v0"), open_source("minari:ours/dummy-v0")
    assert source.meta["env_id"] == "lit_wm/Dummy-v0"
    assert not source.meta.get("lossy_images")
    for number, episode in enumerate(checked(source)):
        assert episode.seed == number
        seen, _ = env.reset(seed=number)
        for t in range(episode.steps):
            for key, value in seen.items():
                np.testing.assert_array_equal(episode.observation[key][t], value, key)
            action = env.action_space.sample()
            for key in ("discrete", "multi"):
                np.testing.assert_array_equal(episode.action[key][t], action[key])
            low, high = source.schema.low["continuous"], source.schema.high["continuous"]
            own = (action["continuous"] + 1) / 2 * (high - low) + low
            np.testing.assert_allclose(episode.action["continuous"][t], own, atol=1e-6)
            seen, reward, terminated, truncated, _ = env.step(action)
            assert episode.reward[t] == np.float32(reward)
            assert (episode.terminated[t], episode.truncated[t]) == (terminated, truncated)
        for key, value in seen.items():
            np.testing.assert_array_equal(episode.observation[key][-1], value, key)
    assert number == 3


@pytest.mark.parametrize("num_envs", [1, 3])
def test_rows_hold_the_units_of_the_environment_whatever_the_number_of_environments(tmp_path, num_envs):
    envs = [make_env("lit_wm/Dummy-v0") for _ in range(num_envs)]
    source = Played(envs[0], play(envs, None, 5, 0), {"env_id": "lit_wm/Dummy-v0"}, 5)
    cache = write_played(source, tmp_path / "rows")
    assert cache.meta["env_id"] == "lit_wm/Dummy-v0"
    low, high = (bounds["continuous"] for bounds in (cache.schema.low, cache.schema.high))
    assert (low.tolist(), high.tolist()) == ([-2, 0], [2, 1])
    env, rows, table = make_env("lit_wm/Dummy-v0"), cache.rows, open_cache(tmp_path / "rows").episodes
    assert sorted(table["seed"]) == [0, 1, 2, 3, 4]
    for seed, start, length in zip(table["seed"], table["start"], table["length"], strict=True):
        seen, _ = env.reset(seed=int(seed))
        for row in range(start, start + length):
            for key, value in seen.items():
                np.testing.assert_array_equal(rows["observation", key][row], value, key)
            if row < start + length - 1:
                action = env.action_space.sample()
                own = {"continuous": (action["continuous"] + 1) / 2 * (high - low) + low}
                for key, value in (action | own).items():
                    np.testing.assert_allclose(rows["action", key][row], value, atol=1e-6, err_msg=key)
                seen, reward, terminated, _, _ = env.step(action)
                assert rows["next", "reward"][row] == np.float32(reward)
                assert rows["next", "terminated"][row] == terminated
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("uri", ["rows:demos", "npz:demos.npz", "minari:pendulum/demos-v0"])
def test_models_see_the_actions_that_were_chosen(tmp_path, root, monkeypatch, uri):
    """Whatever the format, -1 and 1 are the bounds of the environment, here -2 and 2."""
    monkeypatch.chdir(tmp_path)
    scheme, name = uri.split(":")
    if scheme == "minari":
        record(name, "Pendulum-v1", 2, time_limit=20)
    else:
        env = make_env("Pendulum-v1", time_limit=20)
        played = Played(env, play([env], None, 2, 0), {"env_id": "Pendulum-v1"}, 2)
        (write_played if scheme == "rows" else write_demos)(played, tmp_path / name)
    cache = ingest(uri, tmp_path / "cache")
    stored = cache.rows["action"].squeeze(1).numpy()
    assert np.abs(stored).max() > 1
    spaces = model_spaces(cache, 1)
    seen = CacheRows(cache, tmp_path / "run", spaces, np.arange(2), SourceSpec(uri)).arrays["action",]
    env = make_env("Pendulum-v1", time_limit=20)
    for seed, start in enumerate(cache.episodes["start"]):
        env.reset(seed=int(seed))
        chosen = np.array([env.action_space.sample()["action"] for _ in range(20)])
        np.testing.assert_allclose(seen[start : start + 20], chosen, atol=1e-6)


def test_wrapped_suites_nested_names_and_bare_entries(root):
    image = record("dummy/image-v0", "lit_wm/Dummy-v0", 1, obs=["image"], size=32)
    assert image.observation_space["image"].shape == (32, 32, 3)
    assert image.spec.env_spec is None
    assert image[0].observations["image"].dtype == np.uint8
    bare = record("cart/two-v0", "CartPole-v1", 2, repeat=2)
    assert bare.observation_space == make_env("CartPole-v1").observation_space["obs"]
    assert isinstance(bare.action_space, gym.spaces.Discrete)

    class Nested(gym.Env):
        observation_space = gym.spaces.Dict(
            {"arm": gym.spaces.Dict({"a": gym.spaces.Box(0, 9, (2,)), "b": gym.spaces.Discrete(3, start=4)}),
             "base/x": gym.spaces.Box(-1, 1, (3,), np.float64)}
        )  # fmt: skip
        action_space = gym.spaces.Tuple([gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Box(-3, 5, (1,))])

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            self.observation_space.seed(seed)
            return self.observation_space.sample(), {}

        def step(self, action):
            return self.observation_space.sample(), 1.0, False, False, {}

    gym.register("Nested-v0", Nested)
    try:
        dataset = record("deep/one-v0", "Nested-v0", 2, max_steps=4)
        assert dataset.spec.env_spec is None  # a class cannot be written down
        assert dataset.observation_space["base"]["x"].dtype == np.float64
        assert dataset[0].observations["arm"]["b"].min() >= 4
        assert dataset[0].actions[0].shape == (4, 2)
        assert dataset[1].truncations.tolist() == [False, False, False, True]
        source = open_source("minari:deep/one-v0")
        assert set(source.schema.spaces.obs) == {"arm/a", "arm/b", "base/x"}
        first = next(iter(checked(source)))
        np.testing.assert_array_equal(first.observation["arm/b"], dataset[0].observations["arm"]["b"] - 4)
    finally:
        del gym.registry["Nested-v0"]


def test_a_policy_sees_first_observations_and_its_own_actions_and_epsilon_replaces_some(root):
    seen = []

    def policy(obs, state, is_first):
        assert state is None or torch.equal(state.action["action"], state.deter[:, 0].to(torch.int32))
        assert state is None or seen
        seen.append(is_first.tolist())
        action = {"action": torch.ones(len(is_first), dtype=torch.int32)}
        return action, State(torch.ones(len(is_first), 1), action=action)

    dataset = record("right/always-v0", "CartPole-v1", 5, num_envs=2, policy=policy)
    assert all((episode.actions == 1).all() for episode in dataset)
    lengths = {m["seed"]: m["total_steps"] for m in dataset.storage.get_episode_metadata(range(5))}
    # Environment 0 plays the seeds 0, 2, 4, environment 1 the seeds 1 and 3.
    expected = [
        np.cumsum([0, *(lengths[s] for s in seeds)])[: len(seeds)].tolist() for seeds in ([0, 2, 4], [1, 3])
    ]
    for i in range(2):
        starts = [t for t, first in enumerate(seen) if first[i]]
        assert starts[: len(expected[i])] == expected[i]

    remembered = []

    def noisy(obs, state, is_first):
        if state is not None:
            remembered.append(int(state.action["action"][0]))
        action = {"action": torch.ones(len(is_first), dtype=torch.int32)}
        return action, State(torch.ones(len(is_first), 1), action=action)

    dataset = record("right/mostly-v0", "CartPole-v1", 30, policy=noisy, epsilon=0.4)
    taken = np.concatenate([episode.actions for episode in dataset])
    assert np.mean(taken == 0) == pytest.approx(0.2, abs=0.07)
    assert remembered == taken[:-1].tolist()


def test_ids_and_existing_folders_are_checked_first(root):
    for bad in ("noversion", "bad name-v0", "x/y/-v1"):
        with pytest.raises(ConfigError, match=r"NAME-vNUMBER"):
            minari_folder(bad, None, False)
    record("cart/a-v0", "CartPole-v1", 2)
    with pytest.raises(ConfigError, match=r"exists: (.|\n)*--overwrite"):
        minari_folder("cart/a-v0", None, False)
    assert record("cart/a-v0", "CartPole-v1", 3, overwrite=True).total_episodes == 3
    (root / "photos-v0").mkdir()
    with pytest.raises(ConfigError, match="replaces datasets only"):
        minari_folder("photos-v0", None, True)


def test_an_error_or_a_kill_leaves_the_old_dataset_and_nothing_else(root, tmp_path):
    record("cart/a-v0", "CartPole-v1", 2)

    def broken(obs, state, is_first):
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        record("cart/a-v0", "CartPole-v1", 3, policy=broken, overwrite=True)
    with pytest.raises(RuntimeError, match="no"):
        record("other/b-v0", "CartPole-v1", 3, policy=broken)
    assert sorted(p.name for p in root.iterdir()) == ["cart"]
    assert minari.load_dataset("cart/a-v0").total_episodes == 2

    command = [sys.executable, "-m", "lit_wm", "collect", "--env", "CartPole-v1", "--episodes", "1000000"]
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(lit_wm.__file__))}
    process = subprocess.Popen([*command, "--out", "minari:cart/a-v0", "--overwrite"], env=env)
    part = root / ".cart%2Fa-v0.part" / "new" / "data" / "main_data.hdf5"
    while not (part.exists() and part.stat().st_size > 20_000):
        assert process.poll() is None
        time.sleep(0.05)
    with pytest.raises(DataError, match="another process"):
        record("cart/a-v0", "CartPole-v1", 3, overwrite=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert minari.load_dataset("cart/a-v0").total_episodes == 2
    assert list(minari.list_local_datasets()) == ["cart/a-v0"]
    assert record("cart/a-v0", "CartPole-v1", 4, overwrite=True).total_episodes == 4
    assert sorted(p.name for p in root.iterdir()) == ["cart"]


def test_a_kill_between_the_two_names_gives_the_old_folder_back(tmp_path):
    old = tmp_path / ".x.old"
    old.mkdir()
    (old / "kept").write_text("1")
    with pytest.raises(KeyError), replacing(tmp_path / "x", tmp_path):
        raise KeyError
    assert (tmp_path / "x" / "kept").exists()
    handle = os.open(tmp_path / "x", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # somebody else's lock on the finished folder is none of ours
    with replacing(tmp_path / "x", tmp_path) as new:
        new.mkdir()
        (new / "newer").write_text(json.dumps(2))
    os.close(handle)
    assert [p.name for p in (tmp_path / "x").iterdir()] == ["newer"]
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("write", [write_demos, write_npz])
def test_what_a_kill_leaves_of_an_npz_goes_with_the_next_attempt(tmp_path, write):
    class Watched(Made):
        def episodes(self):
            shutil.copytree(tmp_path / "here", tmp_path / "killed", dirs_exist_ok=True)
            return super().episodes()

    (tmp_path / "here").mkdir()
    write(Watched("3,2"), tmp_path / "here" / "x.npz")
    assert os.listdir(tmp_path / "here") == ["x.npz"]
    assert os.listdir(tmp_path / "killed") == [".x.npz.part"]
    write(Made("4"), tmp_path / "killed" / "x.npz")
    assert os.listdir(tmp_path / "killed") == ["x.npz"]
    assert len(np.load(tmp_path / "killed" / "x.npz")["rewards"]) == 4
