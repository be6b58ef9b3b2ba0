"""From an environment id and options to a wrapped environment."""

from __future__ import annotations

import inspect
import multiprocessing
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import iterate

from lit_wm.envs.atari import Atari, import_ale
from lit_wm.envs.crafter import Crafter
from lit_wm.envs.dmc import DMControl
from lit_wm.envs.physics import choose_gl, require_gl
from lit_wm.envs.wrappers import StandardEnv, Vector, spaces_from_gym
from lit_wm.errors import EnvError, NotSupported, nearest
from lit_wm.types import Spaces

_OFFICIAL = {"noops": 30, "repeat": 4, "length": 108_000, "pool": 2}
_ATARI = {
    "atari": {"size": 96, "gray": True, "sticky": 0.25, "actions": "all", **_OFFICIAL},
    "atari100k": {"size": 64, "gray": False, "sticky": 0.0, "actions": "needed", **_OFFICIAL},
}
_IDS = (
    "Expected a Gymnasium id, module:ID to import a module first, atari:GAME, atari100k:GAME,\n"
    "  dmc:DOMAIN_TASK or crafter:reward"
)
_STANDARD: dict[str, Any] = {"repeat": 1, "time_limit": None, "size": None, "gray": False, "stack": 1}
_STANDARD |= {"pixels": False, "drop": ()}

if "lit_wm/Dummy-v0" not in gym.registry:
    gym.register("lit_wm/Dummy-v0", entry_point="lit_wm.envs.dummy:Dummy")
    gym.register("lit_wm/LidarRobot-v0", entry_point="lit_wm.envs.robot:LidarRobot", max_episode_steps=100)
    gym.register("lit_wm/Catch-v0", entry_point="lit_wm.envs.catch:Catch")


def make_env(env_id: str, seed: int | None = None, **options: Any) -> StandardEnv:
    """Build one environment with flat Dict spaces and snapshots.

    Args:
        env_id: ``CartPole-v1`` or any other Gymnasium id, also ``gym:ID`` and ``module:ID``; ``atari:GAME``
            (96 x 96 gray, sticky actions 0.25, all 18 actions) or ``atari100k:GAME`` (64 x 64 colour, no
            sticky actions, minimal actions), the game in snake_case; ``dmc:DOMAIN_TASK``, a task of
            dm_control's suite; ``crafter:reward``; MiniGrid's ids; ours: ``lit_wm/LidarRobot-v0``,
            ``lit_wm/Catch-v0``.
        seed: determines everything from the first reset on, unless that reset has its own.
        options: for Atari and ``ALE/`` ids ``size, gray, sticky, actions, noops, repeat, length, pool`` (see
            :class:`~lit_wm.envs.atari.Atari`); for others ``repeat`` (environment steps per step),
            ``time_limit`` (environment steps per episode instead of the registered limit), ``pixels`` (the
            rendered frame as ``image`` is the only observation), ``size`` (64 with ``pixels``) and ``gray``
            for images, ``drop`` (names of observations to leave out), for dmc ``camera``, and every argument
            of a Gymnasium environment itself; for all with images ``stack`` (the newest images together, on
            the channels).

    Raises:
        EnvError: for an unknown id or option (naming the nearest), a missing package, or an unsupported
            space.
    """
    suite, name = _split(env_id)
    if suite in _ATARI:
        options = _merge(env_id, {**_ATARI[suite], "stack": 1}, options)
        stack = options.pop("stack")
        return StandardEnv(Atari(name, **options), env_id, seed, stack=stack)
    if suite == "dmc":
        options = _merge(env_id, {**_STANDARD, "camera": None}, options)
        size = (64 if options["pixels"] else 240) if options["size"] is None else options["size"]
        limit = _time_limit(env_id, options.pop("time_limit"))
        task = DMControl(name, seed=seed, time_limit=limit, camera=options.pop("camera"), size=size)
        if options["pixels"]:
            require_gl(env_id)
        return StandardEnv(task, env_id, seed, **options)
    if suite == "crafter":
        defaults = {"repeat": 1, "time_limit": 10_000, "size": 64, "gray": False, "stack": 1}
        options = _merge(env_id, defaults, options)
        limit = _time_limit(env_id, options.pop("time_limit"))
        game = Crafter(name, size=options.pop("size"), time_limit=limit)
        return StandardEnv(game, env_id, seed, **options)
    spec = _find(name)
    if "ale_py" in str(spec.entry_point):
        options = _merge(env_id, {**_ale_defaults(spec), "stack": 1}, options)
        stack = options.pop("stack")
        return StandardEnv(Atari(spec.kwargs["game"], **options, final_frame=True), env_id, seed, stack=stack)
    standard = {key: options.pop(key, value) for key, value in _STANDARD.items()}
    time_limit = _time_limit(env_id, standard.pop("time_limit"))
    if standard["pixels"]:
        options["render_mode"] = "rgb_array"
    return StandardEnv(_make_gym(env_id, spec, time_limit, options), env_id, seed, **standard)


def _time_limit(env_id: str, steps: int | None) -> int | None:
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise EnvError(f"{env_id}: time_limit={steps!r}; expected a whole number of environment steps")
    return steps


def make_vector_env(
    env_id: str,
    num_envs: int,
    seeds: Sequence[int],
    vectorization: str = "sync",
    autoreset: str = "disabled",
    **options: Any,
) -> SyncVectorEnv | AsyncVectorEnv:
    """``num_envs`` environments of :func:`make_env` side by side.

    Args:
        env_id: as in :func:`make_env`, like ``options``.
        num_envs: how many.
        seeds: one per environment, used by the first reset.
        vectorization: ``"sync"`` in this process, ``"async"`` in one process each.
        autoreset: ``"disabled"`` (the caller resets with ``options={"reset_mask": ...}``), ``"next_step"``,
            ``"same_step"``.

    Raises:
        EnvError: as :func:`make_env`, and for another ``vectorization`` or ``autoreset``.
    """
    modes = {mode.name.lower(): mode for mode in AutoresetMode}
    for option, value, known in (
        ("vectorization", vectorization, ["sync", "async"]),
        ("autoreset", autoreset, list(modes)),
    ):
        if value not in known:
            raise EnvError(f"{option}={value!r}; expected one of {', '.join(known)}")
    if num_envs < 1 or len(seeds) != num_envs:
        raise EnvError(
            f"{env_id}: {len(seeds)} seeds for num_envs={num_envs}; expected one each and at least one"
        )
    makers = [partial(make_env, env_id, seed=seed, **options) for seed in seeds]
    if vectorization == "sync":
        return SyncVectorEnv(makers, autoreset_mode=modes[autoreset])
    # Not fork: the parent has threads (torch, loggers) whose locks a forked child would inherit, held for
    # ever.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["lit_wm.envs.make"])
    try:
        return AsyncVectorEnv(makers, context="forkserver", autoreset_mode=modes[autoreset])
    except (EOFError, ConnectionError) as error:
        raise EnvError(
            f"{env_id}: the environment processes died while starting; their messages stand above.\n"
            "  A script that uses vectorization='async' must do its work under: if __name__ == '__main__':"
        ) from error


def snapshot_vector_env(env: SyncVectorEnv | AsyncVectorEnv) -> dict[str, Any]:
    """The exact state of a vector environment of :func:`make_vector_env`, ``weights_only``-safe.

    Raises:
        NotSupported: if its environments have no snapshot, or their reset is pending inside another process
            (``"async"`` with ``"next_step"``). The environments go on unharmed.
    """
    if not all(env.get_attr("can_snapshot")):
        name = env.get_attr("name")[0]
        raise NotSupported(f"{name} has no exact snapshot: its simulator's state is unknown")
    if isinstance(env, AsyncVectorEnv) and env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP:
        raise NotSupported(
            "asynchronous environments with autoreset='next_step' hide pending resets; use 'disabled'"
        )
    obs: Any = env._observations if isinstance(env, SyncVectorEnv) else env.observations
    return {
        "envs": [torch.frombuffer(bytearray(data), dtype=torch.uint8) for data in env.get_attr("packed")],
        "obs": {key: torch.from_numpy(np.array(value)) for key, value in obs.items()},
        "ended": env._autoreset_envs.tolist() if isinstance(env, SyncVectorEnv) else None,
    }


def restore_vector_env(env: SyncVectorEnv | AsyncVectorEnv, state: dict[str, Any]) -> None:
    """Go on bitwise from :func:`snapshot_vector_env`, in this or a new vector environment of the same
    arguments.

    Raises:
        CheckpointError: if the snapshot is of another kind of environment.
    """
    env.set_attr("packed", [packed.numpy().tobytes() for packed in state["envs"]])
    # The last observations too: a masked reset returns those of the environments that it leaves alone.
    obs: Any = env._observations if isinstance(env, SyncVectorEnv) else env.observations
    for key, value in state["obs"].items():
        obs[key][...] = value.numpy()
    if isinstance(env, SyncVectorEnv):
        last: Any = [{k: np.array(v) for k, v in o.items()} for o in iterate(env.observation_space, obs)]
        env._env_obs = last
        env._autoreset_envs = np.array(state["ended"], np.bool_)


def read_spaces(env_id: str, **options: Any) -> Spaces:
    """The first part of :func:`read_env`."""
    return read_env(env_id, **options)[0]


def read_env(env_id: str, **options: Any) -> tuple[Spaces, dict[str, tuple[np.ndarray, np.ndarray]]]:
    """Of an environment, built once and closed again: observation and action entries with the time limit,
    and by continuous action what -1 and 1 are in its own units.

    Raises:
        EnvError: as :func:`make_env`.
    """
    env = make_env(env_id, **options)
    try:
        spaces = spaces_from_gym(env.observation_space, env.action_space, env_id)
        spaces = replace(spaces, episode_length=env.episode_length, unbounded=env.unbounded_actions)
        vectors = {e.name: e for e in env.action_entries if isinstance(e, Vector)}
        low, high = ({k: e.read({k: np.full(e.low.shape, x)}) for k, e in vectors.items()} for x in (-1, 1))
        return spaces, {k: (low[k], high[k]) for k in vectors}
    finally:
        env.close()


def suite_defaults(env_id: str, **options: Any) -> dict[str, Any]:
    """What the official code does in this suite.

    Returns:
        ``time_limit_is_terminal``: whether Dreamer sees the end by time limit as a terminal (Atari only), and
        ``repeat``: environment frames or steps per step with these ``options``.
    """
    suite, name = _split(env_id)
    repeat = 4 if suite in _ATARI or name.startswith("ALE/") else 1
    return {"time_limit_is_terminal": suite in _ATARI, "repeat": options.get("repeat", repeat)}


def _split(env_id: str) -> tuple[str, str]:
    suite, colon, name = env_id.partition(":")
    return (suite, name) if colon and suite in ("gym", "dmc", "crafter", *_ATARI) else ("gym", env_id)


def _merge(env_id: str, defaults: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    if unknown := [key for key in options if key not in defaults]:
        raise _bad_option(env_id, unknown[0], list(defaults))
    return {**defaults, **options}


def _bad_option(env_id: str, key: str, known: list[str]) -> EnvError:
    return EnvError(f"{env_id} has no option {key!r}{nearest(key, known)}\n  Its options: {', '.join(known)}")


def _ale_defaults(spec: Any) -> dict[str, Any]:
    """Gymnasium's own settings of an Atari id, carried out by our wrapper so that its snapshot is exact."""
    kwargs = spec.kwargs
    if not isinstance(kwargs["frameskip"], int) or kwargs.get("obs_type", "rgb") != "rgb":
        raise EnvError(
            f"{spec.id} skips a random number of frames or shows no pixels, which has no exact snapshot.\n"
            "  Use ALE/...-v5 or atari:GAME with the options you need."
        )
    return {
        "size": None,
        "gray": False,
        "sticky": kwargs["repeat_action_probability"],
        "actions": "all" if kwargs["full_action_space"] else "needed",
        "noops": 0,
        "repeat": kwargs["frameskip"],
        "length": kwargs["max_num_frames_per_episode"],
        "pool": 1,
    }


def _find(env_id: str) -> Any:
    """The registered spec, importing what registers it."""
    module, colon, name = env_id.rpartition(":")
    if name.startswith("ALE/"):
        import_ale()
    grid = name.startswith(("MiniGrid-", "BabyAI-"))
    if grid and find_spec("minigrid") is None:
        raise EnvError(
            f"{env_id} needs the package minigrid, which is not installed.\n"
            '  Fix: pip install "lit-wm[minigrid]"'
        )
    module = module or ("minigrid" if grid else "")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*already in registry.*")  # a module imported twice
            if module:
                import_module(module)
            return gym.spec(name)
    except ImportError as error:
        raise EnvError(
            f"cannot import {error.name or module!r} for {env_id!r}{nearest(module, list(_ATARI))}\n  {_IDS}"
        ) from error
    except gym.error.Error as error:
        with suppress(EnvError):
            import_ale()  # registers the old names without ALE/, and more to suggest
        if name in gym.registry:
            return gym.spec(name)
        known = [f"ALE/{name}"] if f"ALE/{name}" in gym.registry else list(gym.registry)
        close = nearest(name, known) or f"; {len(gym.registry)} are, for example CartPole-v1"
        raise EnvError(f"no environment is registered as {name!r}{close}\n  {_IDS}") from error


def _make_gym(env_id: str, spec: Any, time_limit: int | None, kwargs: dict[str, Any]) -> gym.Env:
    if str(spec.entry_point).startswith("gymnasium.envs.mujoco"):
        choose_gl()
        if kwargs.get("render_mode"):
            require_gl(env_id)
    try:
        creator = spec.entry_point if callable(spec.entry_point) else load_env_creator(spec.entry_point)
        parameters = inspect.signature(creator).parameters.values()
        own = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD]
        unknown = [key for key in kwargs if key not in (*own, "render_mode")]
        if unknown and len(own) == len(parameters):  # it takes no **kwargs, which could hold anything
            raise _bad_option(env_id, unknown[0], [*_STANDARD, *own])
        mode, modes = kwargs.get("render_mode"), getattr(creator, "metadata", {}).get("render_modes")
        if mode and modes is not None and mode not in modes:
            raise EnvError(
                f"{env_id} has no render mode {mode!r}, which the option pixels needs; it has {modes}"
            )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*precision lowered by casting.*")
            return gym.make(spec, max_episode_steps=time_limit, disable_env_checker=True, **kwargs)
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        extras = {"mujoco": "mujoco", "dm_control": "dmc"}
        extra = next((extras[p] for p in extras if f"{p} is not installed" in str(error).lower()), None)
        fix = f'\n  Fix: pip install "lit-wm[{extra}]"' if extra else ""
        raise EnvError(f"{env_id} needs a package that is not installed: {error}{fix}") from error
    except EnvError:
        raise
    except Exception as error:  # whatever the environment's constructor says about its arguments
        raise EnvError(f"{env_id} cannot be built with {kwargs}: {type(error).__name__}: {error}") from error
