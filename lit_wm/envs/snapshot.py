"""The exact state of an environment as tensors and plain values, without pickle.

A snapshot has one part per layer of the environment, the outermost first. A layer takes part by having its
own ``snapshot()`` and ``restore(state)``; Gymnasium's time limit, order check, classic control and MuJoCo are
known here. Anything else raises :class:`~lit_wm.errors.NotSupported`: a simulator with hidden state would
only look restored.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.envs import classic_control
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, TimeLimit
from torch import Tensor

from lit_wm.envs.physics import load_physics, physics_state
from lit_wm.errors import CheckpointError, NotSupported

# Everything that step() and reset() of these classes read and write.
_FIELDS: dict[type, tuple[str, ...]] = {
    TimeLimit: ("_elapsed_steps",),
    OrderEnforcing: ("_has_reset",),
    PassiveEnvChecker: (),
    classic_control.CartPoleEnv: ("state", "steps_beyond_terminated"),
    classic_control.PendulumEnv: ("state", "last_u"),
    classic_control.AcrobotEnv: ("state",),
    classic_control.MountainCarEnv: ("state",),
    classic_control.Continuous_MountainCarEnv: ("state",),
}

_MUJOCO_FIELDS = ("init_qpos", "goal", "goal_pos", "cylinder_pos")  # what Pusher and Reacher write at a reset


def to_plain(value: Any) -> Any:
    """Turn arrays into tensors, keeping types so exactly that :func:`from_plain` gives the same arithmetic.

    A NumPy scalar is not a Python float: mixed with float32 the two promote differently.
    """
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return {"scalar": torch.from_numpy(np.array(value))}
    if isinstance(value, dict):
        return {k: to_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(to_plain, value))
    if value is None or isinstance(value, bool | int | float | str | Tensor):
        return value
    raise NotSupported(f"a snapshot cannot hold a {type(value).__name__}")


def from_plain(value: Any) -> Any:
    """Inverse of :func:`to_plain`; never shares memory with ``value``."""
    if isinstance(value, Tensor):
        return value.numpy().copy()
    if isinstance(value, dict):
        if value.keys() == {"scalar"}:
            return value["scalar"].numpy()[()]
        return {k: from_plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(map(from_plain, value))
    return value


def generator_state(generator: np.random.Generator | None) -> dict[str, Any] | None:
    """State of a NumPy generator; None if it was never made."""
    return None if generator is None else to_plain(dict(generator.bit_generator.state))


def load_generator(state: dict[str, Any] | None) -> Any:
    """A generator that goes on from :func:`generator_state`, None from None."""
    if state is None:
        return None
    generator = np.random.Generator(getattr(np.random, state["bit_generator"])())
    generator.bit_generator.state = from_plain(state)
    return generator


def _holds_arrays(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return isinstance(value, np.ndarray | np.generic) or any(map(_holds_arrays, parts))


def _layers(env: gym.Env) -> list[gym.Env]:
    layers = [env]
    while isinstance(layers[-1], gym.Wrapper):
        layers.append(layers[-1].env)
    return layers


def _has_own(layer: gym.Env) -> bool:
    # A wrapper would answer for its inner environment: look at the class only.
    return callable(getattr(type(layer), "snapshot", None)) and callable(
        getattr(type(layer), "restore", None)
    )


def _is_mujoco(layer: gym.Env) -> bool:
    return type(layer).__module__.startswith("gymnasium.envs.mujoco.")


def _known(layer: gym.Env) -> tuple[str, ...] | None:
    # Of the class itself: a wrapper would answer for its inner environment.
    return getattr(type(layer), "snapshot_fields", _FIELDS.get(type(layer)))


def _fields(layer: gym.Env) -> list[str]:
    if (known := _known(layer)) is not None:
        return list(known)
    return [name for name in _MUJOCO_FIELDS if hasattr(layer, name)]


def unsupported_layer(env: gym.Env) -> str | None:
    """Name of the first layer whose state cannot be read, None if the whole environment can be stored."""
    for layer in _layers(env):
        if not (_has_own(layer) or _known(layer) is not None or _is_mujoco(layer)):
            return f"{type(layer).__module__}.{type(layer).__name__}"
    return None


def snapshot_layers(env: gym.Env) -> list[dict[str, Any]]:
    """State of ``env`` and everything inside it.

    Raises:
        NotSupported: if a layer is an unknown simulator or wrapper.
    """
    if name := unsupported_layer(env):
        raise NotSupported(
            f"no exact snapshot of {name}: its state is unknown here.\n"
            "  Known: classic control, MuJoCo, dmc, Atari, Crafter, ours; classes with snapshot, restore\n"
            "  or with snapshot_fields: the attributes that step() and reset() read and write."
        )
    parts = []
    for layer in _layers(env):
        arrays = False
        if _has_own(layer):
            state = layer.snapshot()  # type: ignore[attr-defined]
            arrays, state = _holds_arrays(state), to_plain(state)
        else:
            state = {name: to_plain(getattr(layer, name)) for name in _fields(layer)}
            if _is_mujoco(layer):
                state["physics"] = physics_state(layer.model, layer.data)  # type: ignore[attr-defined]
            if not isinstance(layer, gym.Wrapper):  # a wrapper's generator is that of its inner environment
                state |= {"rng": generator_state(layer._np_random), "seed": layer._np_random_seed}
        parts.append({"layer": type(layer).__name__, "state": state, "arrays": arrays})
    return parts


def restore_layers(env: gym.Env, parts: list[dict[str, Any]]) -> None:
    """Put :func:`snapshot_layers` into an environment that was built the same way.

    Raises:
        CheckpointError: if the environment is built from other layers.
    """
    layers = _layers(env)
    here, there = [type(layer).__name__ for layer in layers], [part["layer"] for part in parts]
    if here != there:
        raise CheckpointError(
            f"the snapshot is of {' > '.join(there)}, but this environment is {' > '.join(here)}.\n"
            "  Build the environment with the id and options that the checkpoint was saved with."
        )
    for layer, part in zip(layers, parts, strict=True):
        state = part["state"]
        if _has_own(layer):
            layer.restore(from_plain(state) if part["arrays"] else state)  # type: ignore[attr-defined]
            continue
        for name in state.keys() - {"physics", "rng", "seed"}:
            setattr(layer, name, from_plain(state[name]))
        if _is_mujoco(layer):
            load_physics(layer.model, layer.data, state["physics"])  # type: ignore[attr-defined]
        if not isinstance(layer, gym.Wrapper):
            layer._np_random = load_generator(state["rng"])
            layer._np_random_seed = state["seed"]
