"""One call from a name and two shapes to a model, for scripts and notebooks."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch

from lit_wm.envs import read_spaces, spaces_from_gym
from lit_wm.envs.wrappers import Entries
from lit_wm.errors import ConfigError, EnvError, nearest, whole
from lit_wm.module import WorldModelModule
from lit_wm.noise import NoiseStreams
from lit_wm.presets import DREAMERV3, TDMPC2
from lit_wm.pretrained import file_of
from lit_wm.types import Spaces, Spec

KINDS: dict[str, type] = {"bool": bool, "int": Integral, "float": Real}
PRESETS = {"dreamerv3": DREAMERV3, "tdmpc2": TDMPC2}


def create_world_model(
    name: str | Path,
    obs_shape: Any = None,
    action_dim: Any = None,
    *,
    discrete: bool | None = None,
    data: Any = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> WorldModelModule:
    """A :class:`~lit_wm.DreamerV3Module` or :class:`~lit_wm.TDMPC2Module` with the five verbs on a device.

    The same call gives the same weights; ``seed=1`` others.

    Args:
        name: ``dreamerv3:size50m``, ``tdmpc2:19m`` and so on (``lit-wm presets`` lists them), ``dreamerv3``
            or ``tdmpc2`` for the reference's size; or a checkpoint of ours, a file or run directory, which
            knows its spaces: :func:`lit_wm.training.train` goes on where it stood.
        obs_shape: shape of one observation: three axes are an image of uint8, (C, H, W) or (H, W, C), others
            float32; a mapping of names to shapes, or a Gymnasium space. Without names it is called ``obs``.
            Images (H, W) of a space may come without the axis of their only channel.
        action_dim: how many numbers an action has, each in -1 ... 1, or how many classes; a mapping of names
            to these, or a Gymnasium space. Without names it is called ``action``. The verbs count classes
            from 0: of a ``Discrete(3, start=5)`` subtract 5 before, and add 5 to what ``act`` says.
        discrete: whether an ``action_dim`` counts classes; None: for DreamerV3 with an image, as in Atari.
        data: a dataset (path or URI), a ``ReplayBuffer`` or an environment id that says both instead.
        device: ``cpu``, ``cuda`` or ``cuda:1``; None is a GPU if there is one.
        options: arguments of the module, e.g. ``lr=1e-4``.

    Raises:
        ConfigError: for an unknown name, option or device, for spaces said twice or not at all.
        CheckpointError: for a file that is no checkpoint.
        DataError, EnvError: for data or an environment that cannot be read.
    """
    place, (kind, _, preset) = _device(device), str(name).partition(":")
    if (
        name
        and kind not in PRESETS
        and (isinstance(name, Path) or name.endswith(".ckpt") or Path(name).exists())
    ):
        if options:
            raise ConfigError(
                f"{name} is a checkpoint, with options of its own: leave out {', '.join(options)}\n  Its "
                "weights in a new model with others: from_pretrained of DreamerV3Module or TDMPC2Module"
            )
        return _of_checkpoint(Path(name), place, obs_shape, action_dim, discrete, data)
    known = [f"{k}:{size}" for k, sizes in PRESETS.items() for size in sizes]
    if kind not in PRESETS or (preset or "debug") not in PRESETS[kind] or str(name).endswith(":"):
        whole = [k for k in known if k.endswith(f":{name}")]
        close = f"; did you mean {whole[0]!r}?" if whole else nearest(str(name), [*PRESETS, *known])
        raise ConfigError(
            f"no world model {str(name)!r}{close}\n  Known: {', '.join(known)}, and checkpoints"
        )
    from lit_wm.dreamerv3 import DreamerV3Module
    from lit_wm.tdmpc2 import TDMPC2Module

    module_class: type = {"dreamerv3": DreamerV3Module, "tdmpc2": TDMPC2Module}[kind]
    takes = inspect.signature(module_class).parameters
    if wrong := [k for k in options if k not in takes or k == "spaces" or (k == "preset" and preset)]:
        shown, several = ", ".join(map(repr, wrong)), len(wrong) > 1
        told = f"{'are no options' if several else 'is no option'} of it{nearest(wrong[0], [*takes])}"
        if any("space" in k for k in wrong):
            told += "\n  Spaces of Gymnasium are given as obs_shape and action_dim."
        raise ConfigError(f"{name}: {shown} {'is part of the name' if wrong == ['preset'] else told}")
    for key, value in options.items():
        _check_kind(f"{name}: {key}", str(takes[key].annotation), value)
    said = _said(obs_shape, action_dim, discrete, data, kind == "dreamerv3")
    if not said.obs or not said.action:
        missing = "data, or both of obs_shape and action_dim"
        raise ConfigError(
            f"{name}: what does it see and do? Give {missing}, e.g. obs_shape=(39,), action_dim=6"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.get("seed", 0))
        try:
            module = module_class(said.to_plain(), **({"preset": preset} if preset else {}), **options)
        except ConfigError as error:
            raise ConfigError(f"{name}: {_in_python(str(error))}") from None
    return module.to(place)


def _check_kind(option: str, annotation: str, value: Any) -> None:
    """Raise a ConfigError for a number or bool of another type, as the command line does."""
    kind, _, other = annotation.partition(" | ")
    if kind not in KINDS or other not in ("", "None") or (value is None and other):
        return
    if not isinstance(value, KINDS[kind]) or (isinstance(value, bool) and kind != "bool"):
        raise ConfigError(f"{option} is {value!r}; expected {kind}{' or None' * bool(other)}")


def _in_python(message: str) -> str:
    """What names keys of a configuration, with arguments instead: ``model.horizon: 5`` as ``horizon=5``."""

    def said(found: re.Match[str]) -> str:
        plain = {"true": "True", "false": "False", "null": "None"}.get(found[2], found[2])
        return f"{found[1]}={plain if plain != found[2] or plain[0].isdigit() else repr(plain)}"

    message = re.sub(r"\bmodel\.(\w+): ([\w.]*\w)", said, message)
    return re.sub(r"\bmodel\.(?=\w)| \(data\.[^)]*\)", "", message)


def _device(wanted: str | torch.device | None) -> torch.device:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(wanted or ("cuda" if gpus else "cpu"))
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= gpus):
        has = f"{gpus} GPU{'s' * (gpus > 1)}" if gpus else "no GPU"
        raise ConfigError(
            f"device={str(wanted)!r}: PyTorch finds {has} here; expected cpu, cuda, cuda:N or None"
        )
    if device.type == "cuda" and device.index is None:  # as Lightning will call it
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _said(obs_shape: Any, action_dim: Any, discrete: bool | None, data: Any, dreamer: bool = False) -> Spaces:
    """The spaces that the arguments say; entries that they do not are left out."""
    if data is not None:
        if not (obs_shape is action_dim is discrete is None):
            raise ConfigError(
                "data says what obs_shape, action_dim and discrete would: give one or the other"
            )
        return _of_data(data)
    obs = {} if obs_shape is None else _entries("obs_shape", obs_shape, "obs", _obs)
    if discrete is None:
        discrete = dreamer and any(s.is_image for s in obs.values())

    def act(value: Any) -> Spec:
        (size,) = _shape("action_dim", value, axes=1)
        return Spec("int32", (), size) if discrete else Spec("float32", (size,))

    action = {} if action_dim is None else _entries("action_dim", action_dim, "action", act)
    leaves = Entries(action_dim, "action", "action_dim").leaves if isinstance(action_dim, gym.Space) else []
    return Spaces(obs, action, unbounded=tuple(e.name for _, e in leaves if not getattr(e, "bounded", True)))


def _of_data(data: Any) -> Spaces:
    """Spaces of a dataset, a buffer or an environment."""
    if isinstance(data, Spaces):
        return data
    from lit_wm.training import no_source, spaces_of

    if not isinstance(data, str) or (reason := no_source(data)) is None:
        return spaces_of(data)
    try:
        return read_spaces(data.removeprefix("env:"))
    except EnvError as error:
        why = str(error).splitlines()[0]
        raise EnvError(f"{data!r} is neither an environment nor data:\n  {why}\n  {reason}") from error


def _entries(argument: str, value: Any, alone: str, make: Any) -> dict[str, Spec]:
    """Specs by name, of a space, of a mapping of names, or of what stands alone."""
    if isinstance(value, gym.Space):
        unit = gym.spaces.Discrete(2)
        if alone == "obs":
            return spaces_from_gym(value, unit, argument).obs
        return spaces_from_gym(unit, value, argument).action
    named = value if isinstance(value, Mapping) else {alone: value}
    return {str(k): v if isinstance(v, Spec) else make(v) for k, v in named.items()}


def _obs(value: Any) -> Spec:
    shape = _shape("obs_shape", value)
    return Spec("uint8" if len(shape) == 3 else "float32", shape)


def _shape(argument: str, value: Any, axes: int | None = None) -> tuple[int, ...]:
    shape = value if isinstance(value, list | tuple) else (value,)
    try:
        sizes = tuple(whole(argument, n) for n in shape)
    except ConfigError:
        sizes = ()
    if not sizes or axes not in (None, len(sizes)):
        form = "a whole number, such as 6" if axes else "a shape, such as (39,) or (3, 64, 64)"
        raise ConfigError(
            f"{argument} is {value!r}; expected {form}, a mapping of names, or a Gymnasium space"
        )
    return sizes


def describe(specs: Mapping[str, Spec]) -> str:
    """Entries in words: ``obs: uint8 (3, 64, 64); action: 18 classes``."""
    return "; ".join(f"{name}: {spec}" for name, spec in specs.items())


def _of_checkpoint(
    path: Path, device: torch.device, obs_shape: Any, action_dim: Any, discrete: bool | None, data: Any
) -> WorldModelModule:
    """The module of a checkpoint, with what :func:`lit_wm.training.train` goes on from."""
    from lit_wm.evaluation_cli import load_module

    file = file_of(path)
    module, _ = load_module(file, str(device))
    own = module.model.spaces
    if discrete is None and action_dim is not None:
        discrete = any(spec.is_discrete for spec in own.action.values())
    said = _said(obs_shape, action_dim, discrete, data)
    for name, mine, given in (("obs_shape", own.obs, said.obs), ("action_dim", own.action, said.action)):
        if given and mine != given:
            raise ConfigError(
                f"{file} has {describe(mine)}; the arguments say {describe(given)}\n"
                f"  Leave out {name} and data."
            )
    loaded = torch.load(file, map_location="cpu", weights_only=True)
    module.optimizer_states = loaded.get("optimizer_states")
    if "of_train" in loaded:
        module.noise = module.model.noise = NoiseStreams(module.seed, 0, module.device)
        module.load_rank_state_dict(loaded["of_train"])
    return module.train()
