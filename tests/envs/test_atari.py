"""The Atari environment equals a direct reading of the official recipe, frame by frame."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from PIL import Image

from lit_wm.envs import make_env, read_spaces, suite_defaults
from lit_wm.envs.atari import Atari
from lit_wm.types import Spec

ale_py = pytest.importorskip("ale_py")

FULL: dict[str, Any] = {
    "size": 64,
    "gray": False,
    "sticky": 0.0,
    "actions": "all",
    "noops": 30,
    "repeat": 4,
    "length": 108_000,
    "pool": 2,
}


class Tape:
    """Stands before the emulator and writes down the actions that reach it."""

    def __init__(self, ale: Any):
        self.ale, self.acts = ale, []

    def act(self, action: int) -> int:
        self.acts.append(action)
        return self.ale.act(action)

    def reset_game(self) -> None:
        self.acts.append("reset")
        self.ale.reset_game()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ale, name)


def taped(game: str = "pong", **options: Any) -> tuple[Atari, list[Any]]:
    env = Atari(game, **{**FULL, **options})
    env._ale = Tape(env._ale)
    return env, env._ale.acts


def test_spaces_and_defaults_are_the_official_ones() -> None:
    assert read_spaces("atari:pong").obs == {"obs": Spec("uint8", (96, 96, 1))}
    assert read_spaces("atari:pong").action == {"action": Spec("int32", (), 18)}
    assert read_spaces("atari100k:pong").obs == {"obs": Spec("uint8", (64, 64, 3))}
    assert read_spaces("atari100k:pong").action == {"action": Spec("int32", (), 6)}
    assert read_spaces("atari:james_bond", size=[80, 64], gray=False).obs["obs"].shape == (80, 64, 3)
    assert suite_defaults("atari:pong") == {"time_limit_is_terminal": True, "repeat": 4}
    assert suite_defaults("ALE/Pong-v5") == {"time_limit_is_terminal": False, "repeat": 4}
    assert suite_defaults("CartPole-v1", repeat=2) == {"time_limit_is_terminal": False, "repeat": 2}


@pytest.mark.parametrize(("game", "gray"), [("pong", False), ("breakout", True)])
def test_frames_rewards_and_ends_equal_the_recipe(game: str, gray: bool) -> None:
    env = Atari(game, **{**FULL, "gray": gray})
    obs, _ = env.reset(seed=3)

    draws, seed = np.random.SeedSequence(3).generate_state(2)
    rng, ale = np.random.default_rng(int(draws)), ale_py.ALEInterface()
    ale.setInt("random_seed", int(seed.astype(np.int32)))
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(ale_py.roms.get_rom_path(game))

    def observe(frames: list[np.ndarray]) -> np.ndarray:
        image = np.stack(frames[-2:]).max(0)
        image = np.array(Image.fromarray(image).resize((64, 64), Image.BILINEAR))
        if gray:
            image = (
                (image * np.array([0.299, 0.587, 1 - (0.299 + 0.587)])).sum(-1).astype(np.uint8)[..., None]
            )
        return image

    def new_game() -> list[np.ndarray]:
        ale.reset_game()
        for _ in range(rng.integers(31)):
            ale.act(0)
        return [ale.getScreenRGB()] * 2

    frames = new_game()
    np.testing.assert_array_equal(obs, observe(frames))
    pick, ends = np.random.default_rng(0), 0
    for _ in range(500):
        action = int(pick.integers(18))
        reward = 0.0
        for i in range(4):
            reward += ale.act(ale.getLegalActionSet()[action])
            if i >= 2:
                frames.append(ale.getScreenRGB())
            if ale.game_over():
                break
        got, got_reward, terminated, truncated, _ = env.step(action)
        np.testing.assert_array_equal(got, observe(frames))
        assert (got_reward, terminated, truncated) == (reward, ale.game_over(), False)
        if terminated:
            ends += 1
            frames = new_game()
            np.testing.assert_array_equal(env.reset()[0], observe(frames))
    assert ends > 0 or game == "pong"


def test_ale_ids_equal_gymnasium_without_sticky_actions() -> None:
    theirs = gym.make("ALE/Breakout-v5", repeat_action_probability=0.0)
    ours = make_env("ALE/Breakout-v5", sticky=0.0)
    want, _ = theirs.reset(seed=7)
    np.testing.assert_array_equal(ours.reset(seed=7)[0]["obs"], want)
    pick, ends = np.random.default_rng(0), 0
    for _ in range(400):
        action = pick.integers(4)
        want, reward, terminated, truncated, _ = theirs.step(action)
        got = ours.step({"action": action})
        np.testing.assert_array_equal(got[0]["obs"], want)
        assert got[1:4] == (reward, terminated, truncated)
        if terminated:
            ends += 1
            np.testing.assert_array_equal(ours.reset()[0]["obs"], theirs.reset()[0])
    assert ends > 0


def test_every_frame_repeats_the_last_executed_action_with_the_sticky_probability() -> None:
    env, acts = taped(sticky=0.25, noops=0)
    env.reset(seed=0)
    pick = np.random.default_rng(0)
    changes = kept = 0
    for _ in range(2000):
        del acts[:]
        before, action = env._executed, int(pick.integers(18))  # the full set's index is the action itself
        over = any(env.step(action)[2:4])
        for done in acts:
            assert done in (action, before)
            if before != action:
                changes += 1
                kept += done == before
            before = done
        if over:
            env.reset()
            assert env._executed == 0
    assert changes > 2000
    assert abs(kept / changes - 0.25) < 0.03


def test_noops_are_uniform_from_zero_and_start_unsticky() -> None:
    env, acts = taped(noops=3, sticky=0.9, repeat=1)
    counts = []
    for episode in range(200):
        del acts[:]
        env.reset(seed=1 if episode == 0 else None)
        assert acts[0] == "reset"
        assert set(acts[1:]) <= {0}
        counts.append(len(acts) - 1)
        env.step(5)  # leaves another action to repeat, which the next reset must forget
    assert set(counts) == {0, 1, 2, 3}


def test_the_length_limit_truncates_inside_a_step_without_counting_noops() -> None:
    env, acts = taped(length=10)
    env.reset(seed=0)
    del acts[:]
    assert [env.step(0)[2:4] for _ in range(3)] == [(False, False), (False, False), (False, True)]
    assert len(acts) == 10


def test_the_seed_determines_everything() -> None:
    def run(seed: int, warm: int) -> list[Any]:
        env = make_env("atari:pong", size=16)
        env.reset(seed=123)
        for _ in range(warm):
            env.step({"action": 3})
        trace = [env.reset(seed=seed)[0]["obs"].tobytes()]
        for i in range(60):
            trace.append(env.step({"action": i % 18})[0]["obs"].tobytes())
        return [*trace, env.reset()[0]["obs"].tobytes()]

    assert run(1, 0) == run(1, 37)
    assert run(1, 0) != run(2, 0)


def test_only_pooled_frames_are_rendered() -> None:
    env, _ = taped()
    env.reset(seed=0)
    rendered = []
    env._ale.getScreenRGB = lambda out: rendered.append(env._ale.ale.getScreenRGB(out))
    env.step(0)
    assert len(rendered) == 2
