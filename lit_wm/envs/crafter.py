"""Crafter, the open world of 22 achievements, made deterministic and with an exact snapshot."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from lit_wm.envs.images import check_size
from lit_wm.envs.snapshot import from_plain, to_plain
from lit_wm.errors import EnvError, nearest

_TASKS = ["reward", "noreward"]
_SHARED = ("world", "random", "player")  # by all objects


class _Ordered(dict):
    """A set in insertion order. Crafter keeps creatures in sets, whose order depends on memory addresses, and
    draws one by its index: a seed would not determine the game."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


class Crafter(gym.Env):
    """One observation, ``image``, and 17 actions; death terminates, ``time_limit`` truncates.

    ``info["achievements"]`` of the last step counts each achievement of the episode.

    Args:
        task: ``reward``, or ``noreward`` for rewards of 0.
        size: (height, width) of the observation in pixels.
        time_limit: steps per episode, None for no limit.

    Raises:
        EnvError: for an unknown task or an impossible size, or when crafter is missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    render_mode = "rgb_array"

    def __init__(self, task: str, *, size: int | Sequence[int], time_limit: int | None):
        if task not in _TASKS:
            raise EnvError(
                f"crafter has no task {task!r}{nearest(task, _TASKS)}; expected crafter:reward or :noreward"
            )
        try:
            import crafter
        except ImportError as error:
            raise EnvError(
                "crafter:* needs the package crafter, which is not installed.\n"
                '  Fix: pip install "lit-wm[crafter]"'
            ) from error
        height, width = check_size(size, f"crafter:{task}")
        # Without a seed it would draw one from NumPy's global generator, which belongs to the training.
        chance = int(np.random.default_rng().integers(2**31))
        self._env = crafter.Env(size=(width, height), reward=task == "reward", length=time_limit, seed=chance)
        world = self._env._world
        begin = world.reset

        def reset(seed: int | None = None) -> None:
            begin(seed)
            world._chunks = defaultdict(_Ordered)

        world.reset = reset
        self._over, self.step_limit = True, time_limit
        image = gym.spaces.Box(0, 255, (height, width, 3), np.uint8)
        self.observation_space = gym.spaces.Dict(image=image)
        self.action_space = gym.spaces.Discrete(self._env.action_space.n)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Generate a world; a ``seed`` determines this and all that follow."""
        if seed is not None:
            self._env._seed, self._env._episode = seed, 0
        self._over = False
        return {"image": self._env.reset()}, {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """Act once."""
        if self._over:
            raise EnvError("Crafter: step() after the end of the episode; call reset() first")
        obs, reward, self._over, info = self._env.step(action)
        dead = info["discount"] == 0
        kept = {"achievements": info["achievements"]} if self._over else {}
        return {"image": obs}, float(reward), dead, self._over and not dead, kept

    def render(self) -> np.ndarray:
        """The view of the player, (288, 288, 3) uint8."""
        env, random = self._env, self._env._world.random
        state, size = random.get_state(), env._size
        env._size = np.array((288, 288))  # its own argument for this does not work
        frame = env.render()
        env._size = size
        random.set_state(state)  # the night's noise is drawn from the game's generator
        return frame

    def snapshot(self) -> dict[str, Any]:
        """Exact state: the map, every object, the generator and the counters."""
        env, world = self._env, self._env._world
        if env._player is None:
            return {"seed": env._seed}
        index = {id(obj): i for i, obj in enumerate(world._objects)}
        objects = [
            obj
            and {"class": type(obj).__name__}
            | {k: to_plain(v) for k, v in vars(obj).items() if k not in _SHARED}
            for obj in world._objects
        ]
        members = {key: [index[id(obj)] for obj in objs] for key, objs in world._chunks.items()}
        return {
            "seed": env._seed,
            "over": self._over,
            "counters": [env._episode, env._step, env._last_health, sorted(env._unlocked)],
            "maps": [to_plain(world._mat_map), to_plain(world._obj_map), to_plain(world.daylight)],
            "random": to_plain(world.random.get_state(legacy=False)),
            "objects": objects,
            "chunks": [[[int(n) for n in key], found] for key, found in members.items()],
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``snapshot`` was taken."""
        from crafter import objects

        env, world = self._env, self._env._world
        env._seed = state["seed"]
        if "over" not in state:  # before the first reset
            env._episode, self._over = 0, True
            return
        self._over = state["over"]
        env._episode, env._step, env._last_health, unlocked = state["counters"]
        env._unlocked = set(unlocked)
        world.reset()
        world._mat_map, world._obj_map, world.daylight = from_plain(state["maps"])
        world.random.set_state(from_plain(state["random"]))
        world._objects = []
        for fields in state["objects"]:
            obj = fields and object.__new__(getattr(objects, fields["class"]))
            if obj is not None:
                vars(obj).update(from_plain({k: v for k, v in fields.items() if k != "class"}))
            world._objects.append(obj)
        env._player = next(obj for obj in world.objects if isinstance(obj, objects.Player))
        for obj in world.objects:
            obj.world, obj.random, obj.player = world, world.random, env._player
        for key, members in state["chunks"]:
            world._chunks[tuple(key)] = _Ordered.fromkeys(world._objects[i] for i in members)
