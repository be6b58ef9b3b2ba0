"""Crafter: a seed determines the game, a snapshot goes on bitwise, ends and rewards are as in the package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lit_wm.envs import make_env, suite_defaults
from lit_wm.errors import EnvError

pytest.importorskip("crafter", reason="needs the extra 'crafter'")


def play(env: Any, steps: int, ends: list | None = None) -> list[Any]:
    trace: list[Any] = []
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(env.action_space.sample())
        trace.append((obs["image"].tobytes(), reward, terminated, truncated))
        if terminated or truncated:
            trace.append(env.reset()[0]["image"].tobytes())
            if ends is not None:
                ends.append((terminated, info["achievements"]))
    return trace


def test_seeds_and_snapshots_determine_the_game(tmp_path: Path) -> None:
    env, same, fresh = (make_env("crafter:reward", seed=seed, time_limit=280) for seed in (3, 3, 9))
    env.reset()
    litter = [object() for _ in range(99)]  # the order of a set depends on where its members lie
    same.reset()
    start = play(env, 260)  # into the night, whose noise is drawn from the game's generator
    assert env.render().shape == (288, 288, 3)
    torch.save(env.snapshot(), tmp_path / "env.pt")
    ends: list[Any] = []
    want = play(env, 250, ends)
    assert play(same, 60) == start[:60]
    assert litter
    assert ends
    assert len(ends[0][1]) == 22
    fresh.restore(torch.load(tmp_path / "env.pt", weights_only=True))  # it was never reset
    assert play(fresh, 250) == want


def test_spaces_ends_and_options() -> None:
    before = np.random.get_state()[2]  # noqa: NPY002
    env = make_env("crafter:noreward", seed=0, size=[48, 64], time_limit=5)
    assert np.random.get_state()[2] == before  # noqa: NPY002
    assert env.observation_space["image"].shape == (48, 64, 3)
    assert env.action_space["action"].n == 17
    env.reset()
    trace = play(env, 5)
    assert [step[1:] for step in trace[:5]] == [(0.0, False, False)] * 4 + [(0.0, False, True)]
    assert suite_defaults("crafter:reward") == {"time_limit_is_terminal": False, "repeat": 1}
    with pytest.raises(EnvError, match="'reward'"):
        make_env("crafter:rewards")
    with pytest.raises(EnvError, match="time_limit"):
        make_env("crafter:reward", length=3)
