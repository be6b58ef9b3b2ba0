"""MuJoCo underneath dm_control and Gymnasium: exact state without pickle, and rendering without a display."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from typing import Any

import numpy as np
import torch

from lit_wm.errors import CheckpointError, EnvError

# Arrays of a model that no task writes to: meshes, textures, names. They would be most of a snapshot.
_ASSETS = ("mesh", "tex", "skin", "bvh", "oct", "text", "name", "paths", "tuple", "plugin")


def physics_state(model: Any, data: Any) -> dict[str, Any]:
    """Everything that the next steps depend on, of an MjModel and its MjData.

    The integration state alone is not enough: rewards and observations read positions of bodies that lag it
    by one substep, and tasks write targets into the model at a reset. So all arrays of both are stored.
    """
    import mujoco

    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    state = np.empty(mujoco.mj_stateSize(model, spec))
    mujoco.mj_getState(model, data, state, spec)
    return {
        "mujoco": mujoco.__version__,
        "state": torch.from_numpy(state),
        "model": _join(_model_arrays(model)),
        "data": _join(_data_arrays(model, data)),
        "flags": {name: getattr(data, name) for name in dir(data) if name.startswith("flg_")},
    }


def load_physics(model: Any, data: Any, state: dict[str, Any]) -> None:
    """Go on bitwise from :func:`physics_state`.

    Raises:
        CheckpointError: if the state is of another model or another release of MuJoCo.
    """
    import mujoco

    if state["mujoco"] != mujoco.__version__:
        raise CheckpointError(
            f"the snapshot is of mujoco {state['mujoco']}, this is {mujoco.__version__}, which differs.\n"
            f"  Fix: pip install mujoco=={state['mujoco']}"
        )
    _split(state["model"], _model_arrays(model))
    spec = mujoco.mjtState.mjSTATE_INTEGRATION
    integration = state["state"].numpy()
    mujoco.mj_setState(model, data, integration, spec)
    mujoco.mj_forward(model, data)  # finds the contacts, which are kept outside the arrays below
    mujoco.mj_setState(model, data, integration, spec)  # the line above warms up the solver anew
    _split(state["data"], _data_arrays(model, data))
    for name, value in state["flags"].items():
        setattr(data, name, value)


def _model_arrays(model: Any) -> list[np.ndarray]:
    names = [name for name in dir(model) if not name.startswith(("_", *_ASSETS))]
    arrays = [getattr(model, name) for name in names]
    return [a for a in arrays if isinstance(a, np.ndarray) and a.size and a.flags.writeable]


def _data_arrays(model: Any, data: Any) -> list[np.ndarray]:
    import mujoco

    # In data that never stepped, the arrays of contacts and constraints, whose size varies, are empty or
    # detached.
    fresh = mujoco.MjData(model)
    names = [name for name in dir(fresh) if not name.startswith(("_", "plugin"))]
    arrays = {name: getattr(fresh, name) for name in names}
    return [
        getattr(data, name)
        for name, a in arrays.items()
        if isinstance(a, np.ndarray) and a.size and not a.flags.owndata
    ]


def _join(arrays: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([a.reshape(-1).view(np.uint8) for a in arrays]))


def _split(joined: torch.Tensor, arrays: list[np.ndarray]) -> None:
    if joined.numel() != sum(a.nbytes for a in arrays):
        raise CheckpointError(
            "the snapshot is of another MuJoCo model.\n"
            "  Build the environment with the id and options that the checkpoint was saved with."
        )
    numbers, start = joined.numpy(), 0
    for a in arrays:
        a[...] = numbers[start : start + a.nbytes].view(a.dtype).reshape(a.shape)
        start += a.nbytes


def choose_gl() -> None:
    """Set MUJOCO_GL before the first import of dm_control, unless it is set or there is a display.

    EGL if it finds a device, else OSMesa, else no rendering at all: a machine without either still simulates.
    """
    here = os.environ.get("MUJOCO_GL") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if here or sys.platform != "linux":
        return
    os.environ["MUJOCO_GL"] = "egl" if _egl_works() else "osmesa" if _has_osmesa() else "disable"


def require_gl(env_id: str) -> None:
    """Refuse to render where :func:`choose_gl` found nothing to render with.

    Raises:
        EnvError: with the line that installs EGL.
    """
    if os.environ.get("MUJOCO_GL") == "disable":
        raise no_gl(env_id, "neither EGL nor OSMesa works here")


def no_gl(env_id: str, why: object) -> EnvError:
    """The error for pixels that cannot be rendered."""
    return EnvError(
        f"{env_id} cannot render: {why} (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'unset')}).\n"
        "  Fix: apt-get install -y libegl1 libgl1 libgl1-mesa-dri libgles2\n"
        "  or:  apt-get install -y --no-install-recommends libosmesa6"
    )


def _egl_works() -> bool:
    try:
        egl = ctypes.CDLL("libEGL.so.1")
        pointer = ctypes.c_void_p
        address = egl.eglGetProcAddress
        address.restype, address.argtypes = pointer, [ctypes.c_char_p]
        devices, count = (pointer * 16)(), ctypes.c_int()
        query = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, pointer, pointer)(
            address(b"eglQueryDevicesEXT")
        )
        display_of = ctypes.CFUNCTYPE(pointer, ctypes.c_uint, pointer, pointer)(
            address(b"eglGetPlatformDisplayEXT")
        )
        egl.eglInitialize.argtypes = [pointer] * 3
        query(16, devices, ctypes.byref(count))
        displays = [display_of(0x313F, device, None) for device in devices[: count.value]]  # PLATFORM_DEVICE
        return any(display and egl.eglInitialize(display, None, None) for display in displays)
    except (OSError, AttributeError, TypeError, ValueError):  # no library, or too old a one
        return False


def _has_osmesa() -> bool:
    return ctypes.util.find_library("OSMesa") is not None
