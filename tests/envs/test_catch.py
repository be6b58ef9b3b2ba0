"""Catch: what the picture shows, when a ball counts, and that one can win by looking."""

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from lit_wm.envs import make_env, read_spaces
from lit_wm.envs.catch import Catch


def columns(picture):
    """Columns of the ball's and the paddle's middle."""
    cells = picture[::6, ::6, 0]
    ball = np.unique(np.argwhere(cells == 255)[:, 1])
    # A ball at a wall shows two columns only.
    middle = int(np.mean(ball)) if len(ball) == 3 else {0: 0, 6: 7}[ball[0]]
    return middle, int(np.median(np.flatnonzero(cells[-1] == 128)))


def play(env, choose, episodes=20):
    total = 0.0
    for episode in range(episodes):
        obs, ended = env.reset(seed=episode)[0], False
        while not ended:
            obs, reward, ended, *_ = env.step(choose(obs))
            total += reward
    return total / episodes


def follow(picture):
    ball, paddle = columns(picture)
    return 1 + int(np.sign(ball - paddle))


def test_it_is_a_gymnasium_environment():
    make_env("lit_wm/Catch-v0")  # registers the id
    check_env(gym.make("lit_wm/Catch-v0").unwrapped)
    assert read_spaces("lit_wm/Catch-v0").obs["obs"].is_image


def test_who_follows_the_ball_catches_all_and_who_stands_still_does_not():
    assert play(Catch(), follow) == pytest.approx(5, abs=0.5)  # a ball that bounces late may get away
    assert play(Catch(), lambda obs: 1) < 3


def test_a_blind_player_sees_nothing():
    env = Catch(blind=True)
    assert not env.reset(seed=0)[0].any()
    assert not env.step(0)[0].any()


def test_balls_fall_bounce_and_end_the_episode():
    env = Catch(balls=2, cells=8)
    env.reset(seed=0)
    env._ball, env._drift = [6, 0], 1
    seen = [columns(env.step(1)[0])[0] for _ in range(6)]
    assert seen == [7, 6, 5, 4, 3, 2]
    env._paddle = 1
    assert env.step(1)[1:3] == (1.0, False)  # the ball lands in column 1
    for _ in range(6):
        assert env.step(1)[1:3] == (0.0, False)
    assert env.step(1)[2]


def test_a_snapshot_goes_on_with_the_same_bits():
    env, other = make_env("lit_wm/Catch-v0", seed=1), make_env("lit_wm/Catch-v0", seed=2)
    env.reset()
    other.reset()
    for _ in range(17):
        env.step({"action": np.int32(2)})
    other.restore(env.snapshot())
    for t in range(100):
        one, two = (e.step({"action": np.int32(t % 3)}) for e in (env, other))
        assert (one[0]["obs"] == two[0]["obs"]).all()
        assert one[1:4] == two[1:4]
        if one[2]:
            assert (env.reset()[0]["obs"] == other.reset()[0]["obs"]).all()
