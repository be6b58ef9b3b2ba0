"""A snapshot goes on bitwise, in the same and in a fresh environment, after a trip through a file."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from lit_wm.envs import make_env
from lit_wm.envs.snapshot import from_plain, to_plain
from lit_wm.envs.wrappers import StandardEnv
from lit_wm.errors import CheckpointError, NotSupported

CASES: list[tuple[str, dict[str, Any], int]] = [
    ("CartPole-v1", {}, 120),
    ("Pendulum-v1", {"time_limit": 30}, 120),
    ("Acrobot-v1", {"time_limit": 30, "repeat": 2}, 80),
    ("MountainCar-v0", {"time_limit": 40}, 120),
    ("MountainCarContinuous-v0", {"time_limit": 40}, 120),
    ("atari:pong", {"size": 64, "gray": False, "length": 150}, 110),
    ("atari:breakout", {"size": 32, "pool": 3, "stack": 4}, 300),
    ("ALE/Pong-v5", {"length": 150}, 110),
    ("lit_wm/Dummy-v0", {"image_size": 16}, 60),
]


def play(env: gym.Env, steps: int) -> list[Any]:
    """Random steps with resets; the environment's own action space draws, since a snapshot has its state."""
    trace: list[Any] = []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        trace.append((obs, reward, terminated, truncated))
        if terminated or truncated:
            trace.append(env.reset())
    return trace


def assert_same(a: list[Any], b: list[Any]) -> None:
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for key, value in x[0].items():
            np.testing.assert_array_equal(value, y[0][key], strict=True)
        assert x[1:] == y[1:]


@pytest.mark.parametrize(("env_id", "options", "steps"), CASES, ids=[c[0] for c in CASES])
def test_snapshot_goes_on_bitwise(env_id: str, options: dict[str, Any], steps: int, tmp_path: Path) -> None:
    env = make_env(env_id, seed=11, **options)
    env.reset()
    resets = 0
    for part in range(2):
        play(env, 17 + 30 * part)
        torch.save(env.snapshot(), tmp_path / "env.pt")
        want = play(env, steps)
        resets += len(want) - steps
        state = torch.load(tmp_path / "env.pt", weights_only=True)
        env.restore(state)
        assert_same(play(env, steps), want)
        fresh = make_env(env_id, seed=99, **options)  # neither reset nor in the same state
        fresh.restore(state)
        assert_same(play(fresh, steps), want)
        again = make_env(env_id, **options)
        again.reset(seed=5)
        again.packed = fresh.packed
        assert_same(play(again, 10), play(fresh, 10))
    assert resets > 0, "the test must cross an end of episode"


def test_a_snapshot_is_not_changed_by_going_on() -> None:
    env = make_env("atari:pong", seed=0)
    env.reset()
    state = env.snapshot()
    buffer = io.BytesIO()
    torch.save(state, buffer)
    want = play(env, 30)
    env.restore(state)
    assert_same(play(env, 30), want)
    buffer.seek(0)
    env.restore(torch.load(buffer, weights_only=True))
    assert_same(play(env, 30), want)


def test_a_snapshot_before_the_first_reset_keeps_the_seed() -> None:
    env, other = make_env("CartPole-v1", seed=4), make_env("CartPole-v1")
    other.restore(env.snapshot())
    np.testing.assert_array_equal(env.reset()[0]["obs"], other.reset()[0]["obs"])


def test_numpy_scalars_stay_numpy_scalars() -> None:
    state = (np.float64(0.1), 0.1, np.float32(2), None, [np.arange(3)], {"a": 2**127})
    buffer = io.BytesIO()
    torch.save(to_plain(state), buffer)
    buffer.seek(0)
    got = from_plain(torch.load(buffer, weights_only=True))
    assert [type(x) for x in got] == [type(x) for x in state]
    assert got[0] == state[0]
    assert got[5] == state[5]


def test_an_unknown_simulator_says_that_it_has_no_snapshot() -> None:
    env = make_env("FrozenLake-v1")
    assert not env.can_snapshot
    with pytest.raises(NotSupported, match="FrozenLakeEnv"):
        env.snapshot()
    wrapped = StandardEnv(gym.wrappers.RecordEpisodeStatistics(gym.make("CartPole-v1")), "wrapped")
    with pytest.raises(NotSupported, match="RecordEpisodeStatistics"):
        wrapped.snapshot()


def test_a_snapshot_does_not_go_into_another_environment() -> None:
    state = make_env("atari100k:pong").snapshot()
    with pytest.raises(CheckpointError, match="atari100k:pong"):
        make_env("atari100k:breakout").restore(state)
    with pytest.raises(CheckpointError, match="options"):
        make_env("atari100k:pong", size=32).restore(state)
    with pytest.raises(CheckpointError, match="pools 2 frames"):
        make_env("atari100k:pong", pool=3).restore(state)


class Own(gym.Env):
    """Remembers NumPy values, as users' environments do, and hands them out as they are."""

    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x, self.t = np.zeros(2, np.float32), np.int64(0)
        return self.x, {}

    def step(self, action):
        self.x, self.t = self.x + self.np_random.normal(size=2).astype(np.float32), self.t + 1
        return self.x, float(self.t), False, False, {}

    def snapshot(self):
        return {"x": self.x, "t": self.t, "rng": self.np_random.bit_generator.state}

    def restore(self, state):
        self.x, self.t = state["x"], state["t"]
        self.np_random.bit_generator.state = state["rng"]


class Named(Own):
    snapshot_fields = ("x", "t")
    snapshot = restore = None


@pytest.mark.parametrize("kind", [Own, Named])
def test_an_environment_of_the_users_own_goes_on_bitwise(kind):
    one, two = (StandardEnv(kind(), "mine", seed=seed) for seed in (1, 2))
    one.reset()
    two.reset()
    for _ in range(5):
        one.step({"action": np.int32(0)})
    two.packed = one.packed
    for _ in range(20):
        a, b = (env.step({"action": np.int32(0)}) for env in (one, two))
        assert (a[0]["obs"] == b[0]["obs"]).all()
        assert a[1] == b[1]
