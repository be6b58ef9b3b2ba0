"""Spaces become flat dicts of the canonical kinds, and actions find their way back."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from lit_wm.envs import make_env, read_spaces, spaces_from_gym
from lit_wm.envs.wrappers import StandardEnv
from lit_wm.errors import CheckpointError, EnvError
from lit_wm.types import Spaces, Spec


class Echo(gym.Env):
    """Shows a fixed observation and remembers the actions that reached it."""

    def __init__(
        self, obs_space: spaces.Space, action_space: spaces.Space, obs: Any = None, length: int = 100
    ):
        self.observation_space, self.action_space = obs_space, action_space
        self.obs = obs_space.sample() if obs is None else obs
        self.actions: list[Any] = []
        self.length = length

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.actions = []
        return self.obs, {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        assert self.action_space.contains(action), action
        self.actions.append(action)
        return self.obs, 1.0, len(self.actions) >= self.length, False, {}


def test_a_single_observation_is_called_obs_and_a_single_action_action() -> None:
    assert read_spaces("CartPole-v1") == Spaces(
        {"obs": Spec("float32", (4,))}, {"action": Spec("int32", (), 2)}
    )


def test_nested_spaces_become_flat_entries_of_three_kinds() -> None:
    obs = spaces.Dict(
        {
            "camera": spaces.Box(0, 255, (3, 64, 64), np.uint8),
            "screen": spaces.Box(0, 255, (48, 40), np.uint8),
            "arm": spaces.Dict(
                {"angle": spaces.Box(-1, 1, (2, 3), np.float64), "on": spaces.Box(0, 1, (2,), bool)}
            ),
            "pair": spaces.Tuple((spaces.Discrete(3, start=-1), spaces.MultiBinary(4))),
            "clock": spaces.Box(0, 2**40, (), np.int64),
            "board": spaces.Box(0, 5, (2, 2), np.int8),
            "dice": spaces.MultiDiscrete([2, 6]),
            "nothing": spaces.Box(-1, 1, (0,), np.float32),
        }
    )
    action = spaces.Dict({"go": spaces.MultiDiscrete([3, 3]), "aim": spaces.Box(-2, 2, (2,), np.float64)})
    got = spaces_from_gym(obs, action)
    assert got.obs == {
        "arm/angle": Spec("float32", (2, 3)),
        "arm/on": Spec("int32", (2,), 2),
        "board": Spec("int32", (2, 2), 6),
        "camera": Spec("uint8", (3, 64, 64)),
        "clock": Spec("float32", ()),
        "dice/0": Spec("int32", (), 2),
        "dice/1": Spec("int32", (), 6),
        "pair/0": Spec("int32", (), 3),
        "pair/1": Spec("int32", (4,), 2),
        "screen": Spec("uint8", (48, 40, 1)),
    }
    assert got.action == {"aim": Spec("float32", (2,)), "go": Spec("int32", (2,), 3)}

    env = StandardEnv(Echo(obs, action), "echo")
    assert spaces_from_gym(env.observation_space, env.action_space) == got  # nothing left to change
    seen, _ = env.reset(seed=0)
    assert seen in env.observation_space
    for key, spec in got.obs.items():
        assert np.asarray(seen[key]).dtype == spec.dtype
        assert np.shape(seen[key]) == spec.shape
    assert env.step(env.action_space.sample())[0] in env.observation_space


def test_the_order_of_entries_is_that_of_the_environment() -> None:
    box = spaces.Box(-1, 1, (1,), np.float32)
    ordered = spaces.Dict([("b", box), ("a", box)])
    assert list(spaces_from_gym(ordered, spaces.Discrete(2)).obs) == list(ordered.spaces)


def test_class_indices_start_at_zero_inside_and_at_start_outside() -> None:
    env = StandardEnv(Echo(spaces.Discrete(5, start=2), spaces.Discrete(3, start=7), np.int64(6)), "echo")
    assert env.reset()[0]["obs"] == 4
    env.step({"action": 2})
    assert env.unwrapped.actions == [9]


def test_unequal_class_counts_are_separate_action_keys() -> None:
    env = StandardEnv(Echo(spaces.Discrete(2), spaces.MultiDiscrete([2, 5], start=[0, 10])), "echo")
    assert set(env.action_space.spaces) == {"action/0", "action/1"}
    env.reset()
    env.step({"action/0": 1, "action/1": 4})
    np.testing.assert_array_equal(env.unwrapped.actions[0], [1, 14])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_continuous_actions_are_clipped_then_scaled_where_bounds_are_finite(dtype: type) -> None:
    low, high = np.array([-2, 0, -np.inf], dtype), np.array([2, 0.3, np.inf], dtype)
    env = StandardEnv(Echo(spaces.Discrete(2), spaces.Box(low, high, dtype=dtype)), "echo")
    np.testing.assert_array_equal(env.action_space["action"].low, [-1, -1, -1])
    env.reset()
    for given, want in (([0.5, 0, 0.7], [1, 0.15, 0.7]), ([-9, 9, 9], [-2, 0.3, 1])):
        env.step({"action": np.array(given, np.float32)})
        np.testing.assert_allclose(env.unwrapped.actions[-1], np.array(want, dtype), rtol=1e-6)


def test_a_dict_action_is_rebuilt_in_the_environments_own_shape() -> None:
    space = spaces.Dict(
        {"a": spaces.Tuple((spaces.Discrete(2), spaces.Box(-1, 1, (1,)))), "b": spaces.MultiBinary(2)}
    )
    env = StandardEnv(Echo(spaces.Discrete(2), space), "echo")
    env.reset()
    env.step({"a/0": 1, "a/1": np.array([0.5], np.float32), "b": np.array([1, 0])})  # Echo checks contains()
    assert env.unwrapped.actions[0]["a"][0] == 1


def test_repeat_sums_rewards_and_stops_at_the_end() -> None:
    env = StandardEnv(Echo(spaces.Discrete(2), spaces.Discrete(2), length=6), "echo", repeat=4)
    env.reset()
    assert env.step({"action": 0})[1:4] == (4.0, False, False)
    assert env.step({"action": 0})[1:4] == (2.0, True, False)


def test_time_limit_truncates_and_counts_environment_steps() -> None:
    env = make_env("Pendulum-v1", seed=0, time_limit=10, repeat=4)
    env.reset()
    assert [env.step({"action": np.zeros(1)})[2:4] for _ in range(3)] == [(False, False)] * 2 + [
        (False, True)
    ]


@pytest.mark.parametrize("shape", [(40, 30, 3), (3, 40, 33)])
def test_images_are_resized_and_grayed_in_their_own_layout(shape: tuple[int, ...]) -> None:
    image = np.full(shape, 100, np.uint8)
    env = StandardEnv(
        Echo(spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2), image), "echo", size=(24, 20)
    )
    assert env.reset()[0]["obs"].shape == ((3, 24, 20) if shape[0] == 3 else (24, 20, 3))
    assert (env.reset()[0]["obs"] == 100).all()
    env = StandardEnv(Echo(spaces.Box(0, 255, shape, np.uint8), spaces.Discrete(2), image), "echo", gray=True)
    assert env.observation_space["obs"].shape == ((1, *shape[1:]) if shape[0] == 3 else (*shape[:2], 1))
    assert env.reset()[0] in env.observation_space


def test_the_first_seed_is_used_once_and_an_explicit_one_wins() -> None:
    def first(env: gym.Env, **kwargs: Any) -> np.ndarray:
        return env.reset(**kwargs)[0]["obs"]

    env = make_env("CartPole-v1", seed=5)
    a, b = first(env), first(env)
    assert not np.array_equal(a, b)
    np.testing.assert_array_equal(a, first(make_env("CartPole-v1"), seed=5))
    np.testing.assert_array_equal(first(make_env("CartPole-v1", seed=1), seed=5), a)
    x, y = make_env("CartPole-v1", seed=3), make_env("CartPole-v1", seed=3)
    assert [x.action_space.sample() for _ in range(20)] == [y.action_space.sample() for _ in range(20)]


@pytest.mark.parametrize(
    ("space", "text"),
    [
        (spaces.Text(5), "Text"),
        (spaces.Sequence(spaces.Discrete(2)), "Sequence"),
        (spaces.Graph(spaces.Discrete(2), None), "Graph"),
        (spaces.Box(0, 1, (64, 64, 3), np.float32), "images must be uint8"),
    ],
)
def test_an_unsupported_space_is_named_with_its_key(space: spaces.Space, text: str) -> None:
    obs = spaces.Dict({"goal": spaces.Dict({"inner": space})})
    with pytest.raises(EnvError, match=f"(?s)my/Env-v0: observation 'goal/inner'.*{text}"):
        StandardEnv(Echo(obs, spaces.Discrete(2), obs={}), "my/Env-v0")


def test_names_that_collide_once_joined_are_refused() -> None:
    obs = spaces.Dict({"a/b": spaces.Discrete(2), "a": spaces.Dict({"b": spaces.Discrete(2)})})
    with pytest.raises(EnvError, match="a/b"):
        spaces_from_gym(obs, spaces.Discrete(2))


class Clock(gym.Env):
    """Draws the time into one and the same array, as some simulators do."""

    snapshot_fields = ("time", "view")

    def __init__(self, shape: tuple[int, ...]):
        self.observation_space = spaces.Dict(
            {"view": spaces.Box(0, 255, shape, np.uint8), "x": spaces.Box(0, 1, (2,), np.float32)}
        )
        self.action_space, self.time = spaces.Box(-1, 1, (1,), np.float32), 0
        self.view = np.zeros(shape, np.uint8)

    def show(self) -> dict[str, np.ndarray]:
        self.view[...] = self.time
        return {"view": self.view, "x": np.zeros(2, np.float32)}

    def reset(self, *, seed: int | None = None, options: dict | None = None) -> tuple[Any, dict]:
        super().reset(seed=seed)
        self.time += 10
        return self.show(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        self.time += 1
        return self.show(), 0.0, False, False, {}


@pytest.mark.parametrize(("shape", "axis"), [((32, 32, 3), 2), ((3, 32, 32), 0)])
def test_stacked_frames_are_the_newest_and_a_reset_repeats_its_own(shape: tuple, axis: int) -> None:
    env = StandardEnv(Clock(shape), "clock", stack=3)
    spec = spaces_from_gym(env.observation_space, env.action_space).obs["view"]
    assert spec.hwc == (32, 32, 9)
    assert spec.channels_first == (axis == 0)
    action = {"action": np.zeros(1, np.float32)}

    def seen(obs: dict[str, np.ndarray]) -> list[int]:
        assert env.observation_space.contains(obs)
        return np.moveaxis(obs["view"], axis, 0)[:, 5, 7].tolist()

    assert seen(env.reset()[0]) == [10] * 9
    assert seen(env.step(action)[0]) == [10] * 6 + [11] * 3
    assert seen(env.step(action)[0]) == [10] * 3 + [11] * 3 + [12] * 3
    saved = env.snapshot()
    assert seen(env.step(action)[0]) == [11] * 3 + [12] * 3 + [13] * 3
    fresh = StandardEnv(Clock(shape), "clock", stack=3)
    fresh.restore(saved)
    assert seen(fresh.step(action)[0]) == [11] * 3 + [12] * 3 + [13] * 3
    assert seen(env.reset()[0]) == [23] * 9
    small = StandardEnv(Clock(shape), "clock", size=24, gray=True, stack=2)
    assert spaces_from_gym(small.observation_space, small.action_space).obs["view"].hwc == (24, 24, 2)
    assert small.reset()[0]["view"].shape == ((24, 24, 2) if axis == 2 else (2, 24, 24))
    with pytest.raises(CheckpointError, match="stack 3"):
        StandardEnv(Clock(shape), "clock").restore(saved)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((32, 32, 3), {"stack": 0}, "stack=0; expected a whole number"),
        ((3, 32, 32), {"stack": 6}, r"'view' the shape \(18, 32, 32\), which looks like another layout"),
        ((32, 32, 3), {"stack": 2, "drop": ["view"]}, "the option stack needs an image; observations are x"),
    ],
)
def test_a_stack_that_cannot_be_is_refused(shape: tuple, options: dict, message: str) -> None:
    with pytest.raises(EnvError, match=message):
        StandardEnv(Clock(shape), "clock", **options)


@pytest.mark.parametrize(
    ("env_id", "options", "length"),
    [
        ("CartPole-v1", {}, 500), ("Pendulum-v1", {"repeat": 3}, 67), ("Pendulum-v1", {"time_limit": 30}, 30),
        ("lit_wm/Dummy-v0", {}, None), ("lit_wm/LidarRobot-v0", {}, 100),
    ],
)  # fmt: skip
def test_the_time_limit_is_told_in_decisions(env_id: str, options: dict, length: int | None) -> None:
    assert read_spaces(env_id, **options).episode_length == length
