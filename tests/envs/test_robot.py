"""The robot's geometry against hand-made scenes, and the contract of a Gymnasium environment."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

from lit_wm.envs import make_env, read_spaces
from lit_wm.envs.robot import LidarRobot
from lit_wm.errors import EnvError

ID = "lit_wm/LidarRobot-v0"


def scene(pose, goal=(1.2, 1.2), obstacles=()):
    env = LidarRobot(obstacles=len(obstacles))
    env.reset(seed=0)
    env._pose, env._goal = np.array(pose, float), np.array(goal, float)
    env._obstacles = np.array(obstacles, float).reshape(-1, 3)
    return env


def test_it_is_a_gymnasium_environment_of_34_numbers_and_2_actions():
    make_env(ID)  # registers the id
    check_env(gym.make(ID, render_mode="rgb_array").unwrapped, skip_render_check=False)
    spaces = read_spaces(ID)
    assert spaces.obs["obs"].shape == (34,)
    assert spaces.action["action"].shape == (2,)


def test_lidar_sees_walls_and_obstacles():
    env = scene((0.5, -0.2, 0.0), obstacles=[(0.5, 0.8, 0.3), (-5, -5, 0.1)])
    ray = env.lidar()
    # ahead: wall x = 1.5; left: the obstacle; behind: wall x = -1.5; right: wall y = -1.5
    assert ray[[0, 6, 12, 18]] == pytest.approx([1.0, 0.7, 2.0, 1.3])
    assert ray[3] == pytest.approx(math.sqrt(2) * 1.0)  # 45 degrees, to the wall
    env._pose[2] = math.pi / 2
    assert env.lidar()[[0, 6, 12, 18]] == pytest.approx([0.7, 2.0, 1.3, 1.0])


def test_lidar_reaches_three_metres():
    env = LidarRobot(obstacles=0, room=10.0)
    env.reset(seed=0)
    env._pose = np.zeros(3)
    assert (env.lidar() == 3.0).all()


def test_it_drives_forward_turns_left_and_stops_at_walls():
    env = scene((0.0, 0.0, 0.0))
    for _ in range(3):
        obs, *_ = env.step(np.array([0.8, 0.0]))
    assert env._pose[0] > 0.3
    assert env._pose[1:] == pytest.approx([0, 0])
    for _ in range(20):
        obs, *_ = env.step(np.array([0.8, 0.0]))
    assert obs[9] == 1.0  # blocked
    assert 1.0 < env._pose[0] <= 1.5 - env.radius
    env.step(np.array([0.0, 2.0]))
    assert env._pose[2] > 0


def test_actions_are_limited():
    one, two = scene((0, 0, 0)), scene((0, 0, 0))
    assert (one.step(np.array([9.0, 9.0]))[0] == two.step(np.array([0.8, 2.0]))[0]).all()
    assert (one.step(np.array([-9.0, 0.0]))[0] == two.step(np.array([-0.2, 0.0]))[0]).all()


def test_the_goal_is_seen_in_the_robots_frame_and_ends_the_episode():
    env = scene((0.0, 0.0, math.pi / 2), goal=(0.0, 0.6))
    obs, reward, terminated, _, info = env.step(np.array([0.0, 0.0]))
    assert obs[6:9] == pytest.approx([0.4, 0.0, 0.4], abs=1e-6)
    assert (reward, terminated, info["is_success"]) == (0.0, False, False)
    for _ in range(10):
        obs, reward, terminated, _, info = env.step(np.array([0.8, 0.0]))
        if terminated:
            break
    assert (reward, terminated, info["is_success"]) == (1.0, True, True)


@pytest.mark.parametrize(
    "options", [{"room": 1.6}, {"obstacles": -1}, {"obstacles": 2.5}, {"goal_radius": 1.0}]
)
def test_rooms_without_place_are_refused(options):
    with pytest.raises(EnvError, match=next(iter(options))):
        LidarRobot(**options)


def test_nothing_touches_at_the_start():
    env = LidarRobot()
    for seed in range(200):
        env.reset(seed=seed)
        assert env._free(env._pose[:2])
        assert np.linalg.norm(env._goal - env._pose[:2]) >= 1.0


def test_a_snapshot_goes_on_with_the_same_bits():
    env, other, rng = make_env(ID, seed=3), make_env(ID, seed=9), np.random.default_rng(0)
    env.reset()
    other.reset()
    for _ in range(30):
        env.step({"action": rng.uniform(-1, 1, 2).astype(np.float32)})
    other.restore(env.snapshot())
    for _ in range(150):
        action = {"action": rng.uniform(-1, 1, 2).astype(np.float32)}
        one, two = env.step(action), other.step(action)
        assert torch.equal(torch.tensor(one[0]["obs"]), torch.tensor(two[0]["obs"]))
        assert one[1:4] == two[1:4]
        if one[2] or one[3]:
            assert (env.reset()[0]["obs"] == other.reset()[0]["obs"]).all()
