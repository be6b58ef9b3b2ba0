"""Catch: the smallest game that must be played from its picture."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np


class Catch(gym.Env):
    """Balls fall one after the other, straight or slanting, and bounce off the walls; catch them.

    The court is ``cells`` x ``cells``; a ball starts in a random column of the top row, falls a cell per step
    and drifts by -1, 0 or 1. The paddle, three cells wide in the bottom row, moves left, stays or moves right
    by a cell. A ball caught gives 1; the episode ends with the last ball. The picture (6 * cells, 6 * cells,
    1) shows the ball white, three cells wide and high, and the paddle grey on black; nothing else tells where
    they are.

    Args:
        balls: per episode.
        cells: width and height of the court.
        blind: show a black picture: what can be had without looking?
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    snapshot_fields = ("_ball", "_drift", "_paddle", "_left")

    def __init__(
        self, balls: int = 5, cells: int = 8, blind: bool = False, render_mode: str | None = "rgb_array"
    ):
        self.balls, self.cells, self.blind, self.render_mode = balls, cells, blind, render_mode
        self.observation_space = gym.spaces.Box(0, 255, (6 * cells, 6 * cells, 1), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """The paddle begins in the middle."""
        super().reset(seed=seed)
        self._paddle, self._left = self.cells // 2, self.balls
        self._drop()
        return self._observe(), {}

    def _drop(self) -> None:
        self._ball = [int(self.np_random.integers(self.cells)), 0]
        self._drift = int(self.np_random.integers(-1, 2))

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """0 moves the paddle left, 1 leaves it, 2 moves it right."""
        self._paddle = min(max(self._paddle + int(action) - 1, 1), self.cells - 2)
        if not 0 <= self._ball[0] + self._drift < self.cells:
            self._drift = -self._drift
        self._ball = [self._ball[0] + self._drift, self._ball[1] + 1]
        if self._ball[1] < self.cells - 1:
            return self._observe(), 0.0, False, False, {}
        caught, self._left = abs(self._ball[0] - self._paddle) <= 1, self._left - 1
        seen = self._observe()
        if self._left:
            self._drop()
        return seen, float(caught), not self._left, False, {}

    def _observe(self) -> np.ndarray:
        court = np.zeros((self.cells, self.cells), np.uint8)
        if not self.blind:
            x, y = self._ball
            court[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2] = 255
            court[-1, self._paddle - 1 : self._paddle + 2] = 128
        return court.repeat(6, 0).repeat(6, 1)[..., None]

    def render(self) -> np.ndarray:
        """The picture in colour. (6 * cells, 6 * cells, 3) uint8"""
        return self._observe().repeat(3, 2)
