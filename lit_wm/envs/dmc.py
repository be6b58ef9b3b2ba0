"""DeepMind Control: the tasks of dm_control's suite, with an exact snapshot."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from lit_wm.envs.images import check_size
from lit_wm.envs.physics import choose_gl, load_physics, no_gl, physics_state, require_gl
from lit_wm.envs.snapshot import from_plain, to_plain
from lit_wm.errors import EnvError, nearest

_CAMERAS = {"quadruped": 2}  # as the official code: the view from behind


class DMControl(gym.Env):
    """One task of the suite; every observation of dm_control is an entry of its own, ``/`` in names is ``_``.

    The suite's limit of 1000 steps truncates; an episode terminates only where the task says so.

    Args:
        task: ``DOMAIN_TASK`` such as ``walker_walk`` or ``ball_in_cup_catch`` (also ``cup_catch``).
        seed: of everything random that the task does; a seeded reset starts it anew (of the lqr tasks, which
            have no time limit either, the model itself is drawn when they are built).
        time_limit: environment steps until truncation, instead of the task's own.
        size: (height, width) of :meth:`render` in pixels.
        camera: index of the camera that renders; None for 0, in quadruped tasks 2.

    Raises:
        EnvError: for an unknown task, an impossible option, or when dm_control is missing.
    """

    render_mode = "rgb_array"

    def __init__(
        self,
        task: str,
        *,
        seed: int | None = None,
        time_limit: int | None = None,
        size: int | Sequence[int],
        camera: int | None = None,
    ):
        suite = import_suite()
        from dm_control.rl.control import PhysicsError

        self._broken = PhysicsError
        self._id = f"dmc:{task}"
        known = {f"{domain}_{name}": (domain, name) for domain, name in suite.ALL_TASKS}
        known["cup_catch"] = known["ball_in_cup_catch"]
        task = task.replace("-", "_")
        if task not in known:
            raise EnvError(
                f"dm_control has no task {task!r}{nearest(task, list(known))}\n"
                "  Expected dmc:DOMAIN_TASK, for example dmc:walker_walk"
            )
        domain, name = known[task]
        self._size = check_size(size, self._id)
        self._camera = _CAMERAS.get(domain, 0) if camera is None else camera
        self._env = suite.load(domain, name, task_kwargs={"random": None if seed is None else seed % 2**32})
        if task == "quadruped_escape":
            require_gl(self._id)  # its reset uploads the terrain
        cameras = self._env.physics.model.ncam
        if isinstance(self._camera, bool) or self._camera not in range(-1, cameras):
            raise EnvError(f"{self._id}: camera={camera!r}; expected -1 (free) to {cameras - 1}")
        fps = round(1 / self._env.control_timestep())
        self.metadata = {"render_modes": ["rgb_array"], "render_fps": fps}
        if time_limit is not None:
            self._env._step_limit = time_limit
        limit = self._env._step_limit
        self.step_limit = math.ceil(limit) if limit < math.inf else None
        entries = {
            key: gym.spaces.Box(-np.inf, np.inf, spec.shape, np.float64)
            for key, spec in self._env.observation_spec().items()
        }
        # Gymnasium sorts the keys of a plain dict; a model of one joined vector needs dm_control's order.
        self.observation_space = gym.spaces.Dict(OrderedDict(self._renamed(entries)))
        action = self._env.action_spec()
        low, high = (np.broadcast_to(b, action.shape) for b in (action.minimum, action.maximum))
        self.action_space = gym.spaces.Box(low, high, dtype=np.float64)

    @staticmethod
    def _renamed(obs: Any) -> dict[str, Any]:
        return {key.replace("/", "_"): value for key, value in obs.items()}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict]:
        """Start an episode; a ``seed`` determines all that follows."""
        if seed is not None:
            self._env.task._random = np.random.RandomState(seed % 2**32)
        return self._renamed(self._env.reset().observation), {}

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict]:
        """One control step."""
        if self._env._reset_next_step:
            raise EnvError(f"{self._id}: step() after the end of the episode; call reset() first")
        try:
            now = self._env.step(action)
        except self._broken as error:
            given = np.array2string(np.asarray(action), precision=3, threshold=8)
            raise EnvError(
                f"{self._id}: the simulation broke down in step {self._env._step_count + 1} of an episode: "
                f"{error}\n  The action was {given}; a policy that has diverged gives NaN.\n"
                "  Go on from an earlier checkpoint, with smaller learning rates."
            ) from error
        terminated = now.last() and now.discount == 0
        return self._renamed(now.observation), now.reward, terminated, now.last() and not terminated, {}

    def render(self) -> np.ndarray:
        """The frame of the chosen camera, (height, width, 3) uint8.

        Raises:
            EnvError: where nothing can render, with the line that installs it.
        """
        require_gl(self._id)
        try:
            return self._env.physics.render(*self._size, camera_id=self._camera)
        except Exception as error:  # whatever OpenGL says
            raise no_gl(self._id, f"{type(error).__name__}: {error}") from error

    def close(self) -> None:
        """Free the simulator and its renderer, which complains when the interpreter does it."""
        self._env.close()
        self._env.physics.free()

    def snapshot(self) -> dict[str, Any]:
        """Exact state: simulator, what the task remembers, its generator and the step count."""
        physics, task = self._env.physics, self._env.task
        return {
            "physics": physics_state(physics.model.ptr, physics.data.ptr),
            "task": to_plain({key: value for key, value in vars(task).items() if key != "_random"}),
            "random": to_plain(task.random.get_state(legacy=False)),
            "step": self._env._step_count,
            "over": self._env._reset_next_step,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where ``snapshot`` was taken."""
        physics, task = self._env.physics, self._env.task
        load_physics(physics.model.ptr, physics.data.ptr, state["physics"])
        if physics._contexts and physics.model.nhfield:
            physics._free_rendering_contexts()  # the next frame uploads the restored terrain
        vars(task).update(from_plain(state["task"]))
        task._random = np.random.RandomState()
        task._random.set_state(from_plain(state["random"]))
        self._env._step_count, self._env._reset_next_step = state["step"], state["over"]


def import_suite() -> Any:
    """dm_control's suite, rendering by what :func:`~lit_wm.envs.physics.choose_gl` finds.

    Raises:
        EnvError: with the pip line if it is not installed, or if the chosen OpenGL cannot be loaded.
    """
    choose_gl()
    try:
        from dm_control import suite
    except ModuleNotFoundError as error:
        raise EnvError(
            f'DeepMind Control needs the package dm_control: {error}.\n  Fix: pip install "lit-wm[dmc]"'
        ) from error
    except Exception as error:  # a MUJOCO_GL of the user's that does not load
        raise no_gl("dm_control", f"{type(error).__name__}: {error}") from error
    return suite
