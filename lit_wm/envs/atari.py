"""Atari 2600 games by the recipe of the official DreamerV3 code, with an exact snapshot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from lit_wm.envs.images import check_size, resize, to_gray
from lit_wm.envs.snapshot import from_plain, generator_state, load_generator, to_plain
from lit_wm.errors import CheckpointError, EnvError, nearest

_NOOP = 0


class Atari(gym.Env):
    """One game; an observation is the maximum of the last ``pool`` rendered frames, resized, then turned
    gray.

    The emulator itself runs frame by frame without sticky actions, because its own sticky action is not part
    of its snapshot. We draw instead, immediately before every emulated frame (no-ops included) as the
    emulator would: with probability ``sticky`` the frame repeats the action of the frame before; a reset
    makes that action NOOP.

    Args:
        game: name of the ROM in snake_case, e.g. ``space_invaders``.
        size: (height, width) of the observation in pixels; None leaves 210 x 160.
        gray: one channel instead of three; the image stays (H, W, C).
        sticky: probability that a frame repeats the action of the frame before.
        actions: ``"all"`` 18 actions, or ``"needed"`` for the game's minimal set.
        noops: an episode begins with 0..noops NOOP frames, uniform.
        repeat: frames per step; rewards are summed and the game's end stops them.
        length: frames after which the episode is truncated (the no-ops do not count).
        pool: frames in the maximum.
        final_frame: render the frame at which the game ended even if the pool does not reach it (Gymnasium
            does, the official code shows the older frames).

    Raises:
        EnvError: for an unknown game, a bad value, or when ale_py is missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 15}
    render_mode = "rgb_array"

    def __init__(
        self,
        game: str,
        *,
        size: int | Sequence[int] | None,
        gray: bool,
        sticky: float,
        actions: str,
        noops: int,
        repeat: int,
        length: int,
        pool: int,
        final_frame: bool = False,
    ):
        _check(game, sticky=sticky, actions=actions, noops=noops, repeat=repeat, length=length, pool=pool)
        ale_py = import_ale()
        game = {"james_bond": "jamesbond"}.get(game, game)  # the benchmark's spelling
        # The registered games: on a ROM without a single-player mode the emulator ends the whole process.
        known = [spec.kwargs["game"] for spec in gym.registry.values() if spec.namespace == "ALE"]
        if game not in known:
            raise EnvError(
                f"unknown Atari game {game!r}{nearest(game, known)}\n"
                "  Games are written in snake_case: atari:space_invaders"
            )
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # before the first instance: no banner
        self._ale = ale_py.ALEInterface()
        self._ale.setFloat("repeat_action_probability", 0.0)
        self._ale.setInt("frame_skip", 1)
        self._rom = ale_py.roms.get_rom_path(game)
        self._size = None if size is None else check_size(size, f"atari:{game}")
        self._gray, self._sticky, self._noops, self._repeat = gray, float(sticky), noops, repeat
        self._length, self._final_frame = length, final_frame
        self.step_limit = -(-length // repeat)
        self._load(None)
        legal = self._ale.getLegalActionSet() if actions == "all" else self._ale.getMinimalActionSet()
        self._actions = [a.value for a in legal]
        self._frames = [np.zeros((*self._ale.getScreenDims(), 3), np.uint8) for _ in range(pool)]
        self._newest = 0  # index of the newest of the pooled frames
        self._executed = _NOOP
        self._duration = 0
        self._over = True
        shape = (*(self._size or self._frames[0].shape[:2]), 1 if gray else 3)
        self.observation_space = gym.spaces.Box(0, 255, shape, np.uint8)
        self.action_space = gym.spaces.Discrete(len(self._actions))

    def _load(self, seed: int | None) -> None:
        # One seed for the emulator and one for our draws, derived as ale_py's own environment does.
        ours, emulator = np.random.SeedSequence(seed).generate_state(2)
        self._rng = np.random.default_rng(int(ours))
        signed = int(emulator.astype(np.int32))
        self._ale.setInt("random_seed", 0 if signed == -1 else signed)  # -1 would mean the clock
        self._ale.loadROM(self._rom)  # the emulator reads its seed here

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict]:
        """Start a game; a ``seed`` determines all that follows."""
        if seed is not None:
            self._load(seed)
        self._new_game()
        for _ in range(self._rng.integers(self._noops + 1)):
            self._act(_NOOP)
            if self._ale.game_over():
                self._new_game()
        self._ale.getScreenRGB(self._frames[0])
        for frame in self._frames[1:]:
            np.copyto(frame, self._frames[0])
        self._duration, self._over = 0, False
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        """Repeat ``action`` (index into the action set) for ``repeat`` frames."""
        if self._over:
            raise EnvError("Atari: step() after the end of the episode; call reset() first")
        reward, terminated, truncated = 0.0, False, False
        command = self._actions[action]
        for i in range(self._repeat):
            reward += self._act(command)
            self._duration += 1
            terminated, truncated = self._ale.game_over(), self._duration >= self._length
            ended = terminated or truncated
            if i >= self._repeat - len(self._frames) or (ended and self._final_frame):
                self._newest = (self._newest + 1) % len(self._frames)
                self._ale.getScreenRGB(self._frames[self._newest])
            if ended:
                break
        self._over = terminated or truncated
        return self._observe(), reward, terminated, truncated, {}

    def render(self) -> np.ndarray:
        """The newest frame that was pooled, (210, 160, 3) uint8."""
        return self._frames[self._newest].copy()

    def _new_game(self) -> None:
        self._ale.reset_game()
        self._executed = _NOOP

    def _act(self, command: int) -> int:
        if not (self._sticky and self._rng.random() < self._sticky):
            self._executed = command
        return self._ale.act(self._executed)

    def _observe(self) -> np.ndarray:
        image = self._frames[0]
        if len(self._frames) > 1:
            image = np.maximum(image, self._frames[1])
            for frame in self._frames[2:]:
                np.maximum(image, frame, out=image)
        if self._size:
            image = resize(image, self._size)
        if self._gray:
            image = to_gray(image)
        return image.copy() if image is self._frames[0] else image

    def snapshot(self) -> dict[str, Any]:
        """Exact state: emulator, our generator, the pooled frames and the action of the last frame."""
        emulator = self._ale.cloneState(include_rng=True).serialize()
        return {
            "emulator": torch.frombuffer(bytearray(emulator), dtype=torch.uint8),
            "frames": [to_plain(frame) for frame in self._frames],
            "newest": self._newest,
            "executed": self._executed,
            "duration": self._duration,
            "over": self._over,
            "rng": generator_state(self._rng),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``snapshot`` was taken."""
        import ale_py

        if len(state["frames"]) != len(self._frames):
            raise CheckpointError(
                f"the snapshot pools {len(state['frames'])} frames, this environment {len(self._frames)}.\n"
                "  Use the option pool that the checkpoint was saved with."
            )
        self._ale.restoreState(ale_py.ALEState(state["emulator"].numpy().tobytes()))
        self._frames = [from_plain(frame) for frame in state["frames"]]
        self._newest, self._executed = state["newest"], state["executed"]
        self._duration, self._over = state["duration"], state["over"]
        self._rng = load_generator(state["rng"])


def import_ale() -> Any:
    """ale_py, which registers its Gymnasium ids when imported.

    Raises:
        EnvError: with the pip line if it is not installed.
    """
    try:
        import ale_py
        import ale_py.roms
    except ImportError as error:
        raise EnvError(
            'Atari games need the package ale_py, which is not installed.\n  Fix: pip install "lit-wm[atari]"'
        ) from error
    return ale_py


def _check(game: str, **options: Any) -> None:
    lowest = {"noops": 0, "repeat": 1, "length": 1, "pool": 1}
    for name, low in lowest.items():
        if isinstance(options[name], bool) or not isinstance(options[name], int) or options[name] < low:
            raise EnvError(f"atari:{game}: {name}={options[name]!r}; expected a whole number >= {low}")
    sticky = options["sticky"]
    if (
        isinstance(sticky, bool)
        or not isinstance(sticky, int | float)
        or not 0 <= sticky <= 1
        or math.isnan(sticky)
    ):
        raise EnvError(
            f"atari:{game}: sticky={sticky!r}; expected a probability, 0.25 for sticky actions, 0.0 for none"
        )
    if options["actions"] not in ("all", "needed"):
        raise EnvError(
            f"atari:{game}: actions={options['actions']!r}; expected 'all' (18) or 'needed' (the minimal set)"
        )
