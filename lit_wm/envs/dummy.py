"""A small environment with every kind of observation and action, for tests and for trying things out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from lit_wm.envs.snapshot import from_plain, generator_state, load_generator, to_plain
from lit_wm.errors import EnvError

OBS = ("image", "vector", "scalar", "matrix", "discrete", "multi")
ACTIONS = ("continuous", "discrete", "multi")


class Dummy(gym.Env):
    """Random walk that shows in every observation, and rewards that tell which action was executed.

    ``vector`` is (episode, step, checksum of the executed action, steps ever, walk); the reward is that
    checksum, so a test can see from the rows alone whether an action stands beside its own outcome.

    Args:
        obs: observation keys, some of image (S,S,3) uint8, vector (5,), scalar (), matrix (3,4) float64,
            discrete (5 classes from 2), multi (3 x 4 classes); a single string makes the space a bare one,
            not a Dict.
        actions: action keys, some of continuous (2,) within [-2,0]..[2,1], discrete (4), multi (2 x 3
            classes); a single string likewise.
        image_size: S, height and width of the image in pixels.
        limit: steps after which an episode is truncated.
        death: probability of a terminal after each step.

    Raises:
        EnvError: for a key that does not exist.
    """

    metadata = {"render_modes": []}

    def __init__(
        self,
        obs: str | Sequence[str] = OBS,
        actions: str | Sequence[str] = ACTIONS,
        image_size: int = 64,
        limit: int = 12,
        death: float = 0.05,
    ):
        s = image_size
        all_obs: dict[str, gym.Space] = {
            "image": Box(0, 255, (s, s, 3), np.uint8),
            "vector": Box(-np.inf, np.inf, (5,), np.float32),
            "scalar": Box(-np.inf, np.inf, (), np.float32),
            "matrix": Box(-1.0, 1.0, (3, 4), np.float64),
            "discrete": Discrete(5, start=2),
            "multi": MultiDiscrete([4, 4, 4]),
        }
        all_actions: dict[str, gym.Space] = {
            "continuous": Box(np.array([-2, 0], np.float32), np.array([2, 1], np.float32)),
            "discrete": Discrete(4),
            "multi": MultiDiscrete([3, 3]),
        }
        self.observation_space = self._choose("obs", obs, all_obs)
        self.action_space = self._choose("actions", actions, all_actions)
        self._obs, self._actions = obs, actions
        self._image_size, self._limit, self._death = s, limit, death
        self._episode, self._step, self._steps_ever, self._walk, self._checksum = -1, 0, 0, 0.0, 0.0

    @staticmethod
    def _choose(option: str, keys: str | Sequence[str], known: dict[str, gym.Space]) -> gym.Space:
        wrong = [k for k in ([keys] if isinstance(keys, str) else keys) if k not in known]
        if wrong or not keys:
            raise EnvError(f"lit_wm/Dummy-v0: {option}={keys!r}; choose from {', '.join(known)}")
        return known[keys] if isinstance(keys, str) else Dict({k: known[k] for k in keys})

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Start an episode with a new walk."""
        super().reset(seed=seed)
        if seed is not None:
            self._episode, self._steps_ever = -1, 0
        self._episode += 1
        self._step, self._checksum = 0, 0.0
        self._walk = float(self.np_random.normal())
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Walk on; the reward is the checksum of ``action``."""
        parts = [action] if isinstance(self._actions, str) else [action[k] for k in self._actions]
        numbers = np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in parts])
        self._checksum = float(np.float32(numbers @ np.arange(1, len(numbers) + 1)))
        self._step += 1
        self._steps_ever += 1
        self._walk += 0.1 * float(self.np_random.normal()) + 0.01 * self._checksum
        terminated = bool(self.np_random.random() < self._death)
        return self._observe(), self._checksum, terminated, self._step >= self._limit, {}

    def _observe(self) -> Any:
        keys = [self._obs] if isinstance(self._obs, str) else self._obs
        seen = {k: getattr(self, f"_see_{k}")() for k in keys}
        return seen[self._obs] if isinstance(self._obs, str) else seen

    def _see_image(self) -> np.ndarray:
        s = self._image_size
        image = np.full((s, s, 3), (10 * self._episode + 60) % 256, np.uint8)
        row, col = self._step * s // (self._limit + 1), int(np.tanh(self._walk) * s * 0.45 + s / 2)
        image[row : row + s // 8, max(0, col - s // 8) : col + s // 8] = (255, 10 * self._step % 256, 40)
        return image

    def _see_vector(self) -> np.ndarray:
        return np.array([self._episode, self._step, self._checksum, self._steps_ever, self._walk], np.float32)

    def _see_scalar(self) -> np.ndarray:
        return np.array(self._walk, np.float32)

    def _see_matrix(self) -> np.ndarray:
        return np.sin(self._walk + np.arange(12.0)).reshape(3, 4)

    def _see_discrete(self) -> np.int64:
        return np.int64(2 + self._step % 5)

    def _see_multi(self) -> np.ndarray:
        return np.array([self._step, self._episode, self._steps_ever]) % 4

    def snapshot(self) -> dict[str, Any]:
        """Exact state."""
        state = (self._episode, self._step, self._steps_ever, self._walk, self._checksum)
        return {
            "state": to_plain(state),
            "rng": generator_state(self._np_random),
            "seed": self._np_random_seed,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``snapshot`` was taken."""
        self._episode, self._step, self._steps_ever, self._walk, self._checksum = from_plain(state["state"])
        self._np_random, self._np_random_seed = load_generator(state["rng"]), state["seed"]
