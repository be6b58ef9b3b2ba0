"""Ids, options, vector environments and the messages for what does not exist."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

import lit_wm.envs
from lit_wm.envs import (
    make_env,
    make_vector_env,
    read_spaces,
    restore_vector_env,
    snapshot_vector_env,
)
from lit_wm.errors import EnvError, LitWMError, NotSupported

DUMMY = {"obs": ("vector", "discrete"), "image_size": 8}


@pytest.mark.parametrize("env_id", ["gym:CartPole-v1", "lit_wm.envs.make:lit_wm/Dummy-v0", "gym:ALE/Pong-v5"])
def test_other_spellings_of_an_id(env_id: str) -> None:
    assert read_spaces(env_id) == read_spaces(env_id.rpartition(":")[2])


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "Pendulum-v1", "ALE/Pong-v5", "atari:pong", "lit_wm/Dummy-v0"]
)
def test_building_prints_and_warns_nothing(env_id: str, capfd: pytest.CaptureFixture) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_env(env_id, seed=0).reset()
    assert capfd.readouterr() == ("", "")


def test_arguments_of_the_environment_pass_through() -> None:
    assert make_env("Pendulum-v1", g=1.0).unwrapped.g == 1.0


@pytest.mark.parametrize(
    ("env_id", "options", "texts"),
    [
        ("CartPool-v1", {}, ["CartPool-v1", "CartPole-v1"]),
        ("Pong-v5", {}, ["did you mean 'ALE/Pong-v5'?"]),
        ("atari:space_invader", {}, ["space_invaders"]),
        ("atari:combat", {}, ["combat"]),  # the emulator would end the process
        ("atary:pong", {}, ["atary", "'atari'"]),
        ("Pong-v4", {}, ["random number of frames", "ALE/"]),
        ("CartPole-v1", {"time_limitt": 3}, ["time_limitt", "time_limit", "sutton_barto_reward"]),
        ("atari:pong", {"stiky": 0.2}, ["stiky", "'sticky'", "pool"]),
        ("atari:pong", {"sticky": True}, ["sticky=True", "0.25"]),
        ("atari:pong", {"repeat": 0}, ["repeat=0", ">= 1"]),
        ("atari:pong", {"actions": "full"}, ["'full'", "'all'", "'needed'"]),
        ("atari:pong", {"size": "big"}, ["size='big'", "64"]),
        ("CartPole-v1", {"size": 64}, ["need an image", "obs"]),
        ("CartPole-v1", {"repeat": 2.5}, ["repeat=2.5"]),
        ("Pendulum-v1", {"time_limit": 0}, ["time_limit=0"]),
        ("FrozenLake-v1", {"map_name": "9x9"}, ["FrozenLake-v1", "9x9"]),
        ("lit_wm/Dummy-v0", {"obs": ["sound"]}, ["sound", "image"]),
    ],
)
def test_a_wrong_id_or_option_names_the_right_ones(
    env_id: str, options: dict[str, Any], texts: list[str]
) -> None:
    with pytest.raises(EnvError) as error:
        make_env(env_id, **options)
    assert all(text in str(error.value) for text in texts), error.value
    assert str(error.value).count("\n") < 5
    assert isinstance(error.value, LitWMError)


@pytest.mark.parametrize("env_id", ["atari:pong", "ALE/Pong-v5"])
def test_missing_ale_py_names_the_extra(env_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(EnvError, match=r'pip install "lit-wm\[atari\]"'):
        make_env(env_id)


def test_minigrid_by_pixels_or_without_its_mission(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("minigrid", reason="needs the extra 'minigrid'")
    name = "gym:MiniGrid-Empty-5x5-v0"
    env = make_env(name, seed=0, pixels=True, agent_pov=True)
    obs, _ = env.reset()
    assert {key: value.shape for key, value in obs.items()} == {"image": (64, 64, 3)}
    after = env.step({"action": np.int32(0)})[0]
    assert (after["image"] != obs["image"]).any()
    env.close()
    assert set(read_spaces(name, drop=["mission"]).obs) == {"direction", "image"}
    with pytest.raises(EnvError, match=r"drop: \[mission\].*pixels: true"):
        make_env(name)
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(EnvError, match=r"lit-wm\[minigrid\]"):
        make_env(name)


def test_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, lit_wm.envs; assert not {'gymnasium', 'ale_py', 'torch', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert all(hasattr(lit_wm.envs, name) for name in lit_wm.envs.__all__)


def roll(envs: gym.vector.VectorEnv, steps: int, start: int = 0, ended: Any = None) -> list[Any]:
    """Steps with masked resets, as a collector takes them; ``ended`` says who is due one."""
    trace: list[Any] = []
    ended = np.zeros(envs.num_envs, bool) if ended is None else ended
    for t in range(start, start + steps):
        if ended.any():
            obs, _ = envs.reset(options={"reset_mask": ended.copy()})
            trace.append({k: v.tobytes() for k, v in obs.items()})
        space = envs.single_action_space["discrete"]
        action = {
            "continuous": np.sin(np.arange(2 * envs.num_envs, dtype=np.float32) + t).reshape(-1, 2),
            "discrete": (np.arange(envs.num_envs) + t) % space.n,
            "multi": np.full((envs.num_envs, 2), t % 3),
        }
        obs, reward, terminated, truncated, _ = envs.step(action)
        trace.append(({k: v.tobytes() for k, v in obs.items()}, reward.tolist(), terminated.tolist()))
        ended[:] = terminated | truncated
    return trace


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_a_vector_environment_goes_on_bitwise(vectorization: str, tmp_path: Any) -> None:
    def make(seed: int) -> gym.vector.VectorEnv:
        return make_vector_env("lit_wm/Dummy-v0", 3, [seed, seed + 1, seed + 2], vectorization, **DUMMY)

    envs, fresh = make(5), make(500)
    envs.reset()
    ended = np.zeros(3, bool)
    t = 0
    while not (ended.any() and not ended.all()):  # snapshot when only some are due a reset
        roll(envs, 1, t, ended)
        t += 1
    torch.save(snapshot_vector_env(envs), tmp_path / "envs.pt")
    before = ended.copy()
    want = roll(envs, 30, t, ended)
    state = torch.load(tmp_path / "envs.pt", weights_only=True)
    for target in (envs, fresh):
        restore_vector_env(target, state)
        assert roll(target, 30, t, before.copy()) == want
    assert len(envs.call("snapshot")) == 3
    envs.close()
    fresh.close()


def test_sync_and_async_are_the_same() -> None:
    traces = []
    for vectorization in ("sync", "async"):
        envs = make_vector_env("lit_wm/Dummy-v0", 2, [3, 4], vectorization, **DUMMY)
        envs.reset()
        traces.append(roll(envs, 40))
        envs.close()
    assert traces[0] == traces[1]


@pytest.mark.parametrize(("autoreset", "mode"), [("next_step", "NEXT_STEP"), ("same_step", "SAME_STEP")])
def test_the_other_autoreset_modes_go_on_bitwise_too(autoreset: str, mode: str) -> None:
    envs, fresh = (make_vector_env("CartPole-v1", 2, [1, 2], autoreset=autoreset, repeat=3) for _ in range(2))
    assert envs.metadata["autoreset_mode"].name == mode

    def go(target: gym.vector.VectorEnv, steps: int) -> list[Any]:
        outs = [target.step({"action": np.array([1, t % 2])}) for t in range(steps)]
        return [(o["obs"].tolist(), r.tolist(), a.tolist()) for o, r, a, _, _ in outs]

    envs.reset()
    while not go(envs, 1)[0][2][0]:
        pass
    state = snapshot_vector_env(envs)
    want = go(envs, 40)
    restore_vector_env(fresh, state)
    assert go(fresh, 40) == want


def test_async_environments_without_snapshot_survive_the_question() -> None:
    envs = make_vector_env("FrozenLake-v1", 2, [0, 1], "async")
    envs.reset()
    with pytest.raises(NotSupported, match="FrozenLake-v1"):
        snapshot_vector_env(envs)
    envs.step({"action": np.zeros(2, np.int32)})
    envs.close()
    envs = make_vector_env("CartPole-v1", 1, [0], "async", "next_step")
    with pytest.raises(NotSupported, match="next_step"):
        snapshot_vector_env(envs)
    envs.close()


def test_an_async_script_without_main_guard_is_told_so(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "from lit_wm.envs import make_vector_env\nmake_vector_env('CartPole-v1', 1, [0], 'async')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 1
    assert "EnvError: CartPole-v1: the environment processes died while starting" in done.stderr


def test_vector_arguments_are_checked() -> None:
    with pytest.raises(EnvError, match="sync, async"):
        make_vector_env("CartPole-v1", 1, [0], vectorization="threads")
    with pytest.raises(EnvError, match="disabled"):
        make_vector_env("CartPole-v1", 1, [0], autoreset="off")
    with pytest.raises(EnvError, match="2 seeds for num_envs=1"):
        make_vector_env("CartPole-v1", 1, [0, 1])
