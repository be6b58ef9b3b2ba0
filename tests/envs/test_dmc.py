"""DeepMind Control and Gymnasium's MuJoCo: observations, ends of episodes, pixels, exact snapshots."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_wm.envs import (
    make_env,
    make_vector_env,
    physics,
    read_spaces,
    restore_vector_env,
    snapshot_vector_env,
    suite_defaults,
)
from lit_wm.errors import CheckpointError, EnvError

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


def test_an_end_of_the_task_terminates() -> None:
    env = make_env("InvertedPendulum-v5", seed=0)
    env.reset()
    while not (end := env.step({"action": np.ones(1, np.float32)}))[2]:
        pass
    assert not end[3]
    env.close()
    lqr = make_env("dmc:lqr_lqr_2_1", seed=0)  # terminates when it stands still; has no time limit
    lqr.reset()
    with lqr.unwrapped._env.physics.reset_context():
        pass
    assert lqr.step({"action": np.zeros(1, np.float32)})[2:4] == (True, False)
    lqr.close()


def test_a_simulation_that_breaks_down_names_environment_and_step() -> None:
    env = make_env("dmc:cartpole_swingup", seed=0)
    env.reset()
    env.step(env.action_space.sample())
    env.unwrapped._env.physics.data.qvel[0] = np.inf
    with pytest.raises(EnvError, match=r"dmc:cartpole_swingup: .* in step 2 of an episode: .*\n  The action"):
        env.step(env.action_space.sample())


def test_the_seed_determines_the_task() -> None:
    def first(seed: int | None, again: int | None = None) -> Any:
        env = make_env("dmc:reacher_easy", seed=seed)
        obs = [v.tobytes() for _ in range(3) for v in env.reset(seed=again)[0].values()]
        env.close()
        return obs

    assert first(5) == first(5)
    assert first(5) != first(6)
    assert first(None, 7) == first(None, 7)
    assert first(2**40)


def test_repeat_sums_rewards_and_stops_at_the_end() -> None:
    one, two = make_env("dmc:cartpole_balance", seed=1), make_env("dmc:cartpole_balance", seed=1, repeat=3)
    one.reset()
    two.reset()
    action = {"action": np.array([0.3], np.float32)}
    assert two.step(action)[1] == pytest.approx(sum(one.step(action)[1] for _ in range(3)))
    steps = 1
    while not two.step(action)[3]:
        steps += 1
    assert steps + 1 == 334  # 333 decisions of 3 steps, one of 1
    one.close()
    two.close()


@pytest.mark.parametrize(
    ("env_id", "options", "texts"),
    [
        ("dmc:walker_wlak", {}, ["walker_wlak", "'walker_walk'"]),
        ("dmc:walker_walk", {"camera": 9}, ["camera=9", "-1 (free) to 1"]),
        ("dmc:walker_walk", {"pixel": True}, ["'pixels'", "camera"]),
        ("dmc:walker_walk", {"size": 64}, ["need an image", "orientations", "pixels: true"]),
        ("dmc:walker_walk", {"time_limit": 2.5}, ["time_limit=2.5"]),
        ("dmc:walker_walk", {"drop": ["height", "speed"]}, ["'speed'", "orientations, height, velocity"]),
        ("lit_wm/Dummy-v0", {"pixels": True}, ["rgb_array", "pixels"]),
    ],
)
def test_a_wrong_option_names_the_right_ones(env_id: str, options: dict[str, Any], texts: list[str]) -> None:
    with pytest.raises(EnvError) as error:
        make_env(env_id, **options)
    assert all(text in str(error.value) for text in texts), error.value


def test_dropped_observations_are_gone() -> None:
    env = make_env("dmc:walker_walk", drop="height")
    assert list(env.reset()[0]) == ["orientations", "velocity"]
    env.close()


@pytest.mark.parametrize(
    ("env_id", "package", "extra"),
    [("dmc:walker_walk", "dm_control", "dmc"), ("HalfCheetah-v5", "mujoco", "mujoco")],
)
def test_a_missing_package_names_the_extra(
    env_id: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(EnvError, match=rf"lit-wm\[{extra}\]"):
        make_env(env_id)


def test_a_snapshot_stays_with_its_model_and_release() -> None:
    env, other = make_env("dmc:walker_walk", seed=0), make_env("dmc:cheetah_run", seed=0)
    state = env.unwrapped.snapshot()
    with pytest.raises(CheckpointError, match="another MuJoCo model"):
        other.unwrapped.restore(state)
    state["physics"]["mujoco"] = "3.1.0"
    with pytest.raises(CheckpointError, match=r"pip install mujoco==3\.1\.0"):
        env.unwrapped.restore(state)
    env.close()
    other.close()


def test_what_renders_is_chosen_once_and_its_absence_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    for display in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(display, raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    for egl, osmesa, chosen in ((True, True, "egl"), (False, True, "osmesa"), (False, False, "disable")):
        monkeypatch.setattr(physics, "_egl_works", lambda egl=egl: egl)
        monkeypatch.setattr(physics, "_has_osmesa", lambda osmesa=osmesa: osmesa)
        monkeypatch.setenv("MUJOCO_GL", "")
        physics.choose_gl()
        assert os.environ["MUJOCO_GL"] == chosen
    for env_id in ("dmc:walker_walk", "HalfCheetah-v5"):
        with pytest.raises(EnvError, match="apt-get install -y libegl1"):
            make_env(env_id, pixels=True)
    make_env("dmc:walker_walk").close()  # without pixels nothing is missing
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    physics.choose_gl()
    assert os.environ["MUJOCO_GL"] == "glfw"


@pytest.fixture
def opengl() -> None:
    physics.choose_gl()
    if os.environ.get("MUJOCO_GL") == "disable":
        pytest.skip("neither EGL nor OSMesa works here")


@pytest.mark.usefixtures("opengl")
def test_pixels_are_the_only_observation_and_go_on_bitwise() -> None:
    env, fresh = (make_env("dmc:quadruped_fetch", seed=s, pixels=True, size=[48, 64]) for s in (1, 2))
    assert env.observation_space["image"].shape == (48, 64, 3)
    assert env.unwrapped._camera == 2
    image = env.reset()[0]["image"]
    assert image.std() > 10
    play(env, 3)
    fresh.reset()
    fresh.restore(env.snapshot())
    assert play(fresh, 4) == play(env, 4)
    env.close()
    env.close()  # twice does no harm
    fresh.close()
    plain = make_env("dmc:walker_walk", seed=0)
    plain.reset()
    assert plain.unwrapped._env.physics._contexts is None, "it renders on demand only"
    assert plain.render().shape == (240, 240, 3)
    plain.close()
    half = make_env("HalfCheetah-v5", pixels=True, size=16, gray=True)
    assert half.reset(seed=0)[0]["image"].shape == (16, 16, 1)
    half.close()


@pytest.mark.usefixtures("opengl")
def test_other_processes_render_and_go_on_the_same() -> None:
    def make(way: str, seed: int) -> Any:
        return make_vector_env("dmc:cartpole_swingup", 2, [seed, seed + 1], way, pixels=True, time_limit=4)

    def go(envs: Any, steps: int) -> list[Any]:
        trace: list[Any] = []
        for _ in range(steps):
            obs, reward, _, truncated, _ = envs.step({"action": np.full((2, 1), 0.5, np.float32)})
            trace.append((obs["image"].tobytes(), reward.tolist()))
            if truncated.any():
                envs.reset(options={"reset_mask": truncated})
        return trace

    envs, fresh, here = make("async", 3), make("async", 8), make("sync", 3)
    envs.reset()
    here.reset()
    assert go(envs, 2) == go(here, 2)
    here.close()
    restore_vector_env(fresh, snapshot_vector_env(envs))
    assert go(fresh, 6) == go(envs, 6)
    envs.close()
    fresh.close()


def test_the_time_limit_counts_decisions() -> None:
    assert read_spaces("dmc:cartpole_swingup", repeat=2).episode_length == 500
    assert read_spaces("dmc:cartpole_swingup", repeat=2, time_limit=301).episode_length == 151
    assert read_spaces("dmc:lqr_lqr_2_1").episode_length is None
