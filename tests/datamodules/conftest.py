from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from datamodules.replay import RowReplay
from lit_wm.types import Spaces, Spec

SPACES = Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("int32", (), 5)})
LATENTS = {"deter": Spec("float32", (2,)), "stoch": Spec("uint8", (3,), classes=4)}


class Play:
    """Random episodes written into a replay, and beside it the steps as the official driver emits them.

    The observation is (stream, position, x) with x' = (3 x + action) mod 997, so it shows where it belongs
    and which action led to it.
    """

    def __init__(self, replay: RowReplay, seed: int, mean_length: float = 6.0):
        self.replay, self.rng = replay, np.random.default_rng(seed)
        self.end = 1 / mean_length
        streams = replay.storage.streams
        self.steps: list[list[dict[str, Any]]] = [[] for _ in range(streams)]

    def step(self, streams: np.ndarray) -> None:
        """One row to each of the streams."""
        n, rng = len(streams), self.rng
        obs, first, valid, action = np.zeros((n, 3)), np.zeros(n, bool), np.zeros(n, bool), np.zeros(n, int)
        reward, terminated, truncated = np.zeros(n), np.zeros(n, bool), np.zeros(n, bool)
        deter, stoch = np.zeros((n, 2), np.float32), np.zeros((n, 3), np.uint8)
        for i, s in enumerate(streams):
            log = self.steps[s]
            first[i] = not log or log[-1]["is_last"]
            x = len(log) if first[i] else (3 * log[-1]["obs"][2] + log[-1]["action"]) % 997
            obs[i] = s, len(log), x
            if not first[i]:
                reward[i] = rng.integers(1, 100)
                terminated[i], truncated[i] = rng.random(2) < self.end / 2
            valid[i] = not (terminated[i] or truncated[i])
            action[i] = rng.integers(1, 5) * valid[i]
            deter[i], stoch[i] = rng.random(2), rng.integers(0, 4, 3)
            log.append(
                {
                    "obs": obs[i].copy(), "reward": reward[i], "is_first": first[i], "is_last": not valid[i],
                    "is_terminal": terminated[i], "timeout": truncated[i], "action": action[i],
                    "deter": deter[i].copy(), "stoch": stoch[i].copy(),
                }
            )  # fmt: skip
        self.replay.set_outcome(streams[~first], reward[~first], terminated[~first], truncated[~first])
        latent = {"deter": torch.from_numpy(deter), "stoch": torch.from_numpy(stoch)}
        self.replay.append(streams, {"obs": obs}, first, valid, {"action": action}, latent)

    def run(self, steps: int) -> "Play":
        for _ in range(steps):
            self.step(np.arange(len(self.steps)))
        return self


@pytest.fixture(scope="session")
def make_replay(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RowReplay]:
    def make(capacity: int = 120, streams: int = 3, window: int = 7, **options: Any) -> RowReplay:
        folder = tmp_path_factory.mktemp("replay")
        return RowReplay(SPACES, capacity, streams, folder, LATENTS, window, **options)

    return make


@pytest.fixture(scope="session")
def play() -> type[Play]:
    return Play
