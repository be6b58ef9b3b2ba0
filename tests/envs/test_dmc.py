"""DeepMind Control and Gymnasium's MuJoCo: observations, ends of episodes, pixels, exact snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_wm.envs import make_env, suite_defaults
from lit_wm.errors import EnvError

pytest.importorskip("dm_control", reason="needs the extra 'dmc'")

TASKS = [
    "acrobot_swingup",
    "ball_in_cup_catch",
    "cartpole_swingup",
    "cheetah_run",
    "finger_turn_hard",
    "fish_swim",
    "hopper_hop",
    "humanoid_CMU_run",
    "humanoid_run",
    "lqr_lqr_2_1",
    "manipulator_bring_peg",
    "point_mass_hard",
    "quadruped_fetch",
    "reacher_hard",
    "stacker_stack_2",
    "swimmer_swimmer6",
    "walker_walk",
]
GYM = ["Ant", "HalfCheetah", "Hopper", "Humanoid", "InvertedPendulum", "Pusher", "Reacher", "Walker2d"]


def play(env: Any, steps: int) -> list[Any]:
    trace: list[Any] = []
    for _ in range(steps):
        obs, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        trace.append((*(v.tobytes() for v in obs.values()), reward, terminated, truncated))
        if terminated or truncated:
            trace.append([v.tobytes() for v in env.reset()[0].values()])
    return trace


@pytest.mark.parametrize("env_id", [f"dmc:{t}" for t in TASKS] + [f"{name}-v5" for name in GYM])
def test_a_fresh_environment_goes_on_bitwise(env_id: str, tmp_path: Path) -> None:
    env, fresh = (make_env(env_id, seed=seed, time_limit=40) for seed in (3, 77))
    env.reset()
    play(env, 17)
    torch.save(env.snapshot(), tmp_path / "env.pt")
    want = play(env, 60)
    assert len(want) > 60, "the test must cross an end of episode"
    state = torch.load(tmp_path / "env.pt", weights_only=True)
    fresh.restore(state)  # neither reset nor in the same state
    assert play(fresh, 60) == want
    env.restore(state)
    assert play(env, 60) == want
    env.close()
    fresh.close()


def test_every_observation_is_an_entry_and_the_limit_truncates() -> None:
    env = make_env("dmc:cup-catch", seed=0)
    spaces = env.observation_space.spaces
    assert {key: space.shape for key, space in spaces.items()} == {"position": (4,), "velocity": (4,)}
    assert {space.dtype for space in spaces.values()} == {np.dtype(np.float32)}
    env.reset()
    for t in range(1000):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert not terminated
        assert truncated == (t == 999)
    with pytest.raises(EnvError, match="reset"):
        env.step(env.action_space.sample())
    assert suite_defaults("dmc:cup_catch") == {"time_limit_is_terminal": False, "repeat": 1}
    env.close()
