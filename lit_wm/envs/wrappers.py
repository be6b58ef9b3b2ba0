"""From any Gymnasium space to flat dicts of images, float32 vectors and class indices, and back."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, TypeGuard

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from lit_wm.envs.images import check_size, resize, to_gray
from lit_wm.envs.snapshot import (
    from_plain,
    generator_state,
    load_generator,
    restore_layers,
    snapshot_layers,
    to_plain,
    unsupported_layer,
)
from lit_wm.errors import CheckpointError, EnvError, nearest
from lit_wm.types import Spaces, Spec

# An integer array with more values than this is a quantity, not a class index. The official code draws the
# line at bytes too.
_MAX_CLASSES = 256
_MIN_IMAGE = 32

Arrays = dict[str, np.ndarray]


class Image:
    """A uint8 image; (H, W) becomes (H, W, 1), channels-first stays so."""

    def __init__(self, name: str, space: spaces.Box, where: str, size: tuple[int, int] | None, gray: bool):
        shape = space.shape if len(space.shape) == 3 else (*space.shape, 1)
        self.name = name
        self._flat = len(space.shape) == 2
        self._first = Spec("uint8", shape).channels_first
        height, width, channels = Spec("uint8", shape).hwc
        self._size, self._gray = size, gray and channels != 1
        if self._gray and channels != 3:
            raise EnvError(f"{where} has {channels} channels; the option gray=True needs red, green and blue")
        height, width = size or (height, width)
        channels = 1 if self._gray else channels
        self.shape = (channels, height, width) if self._first else (height, width, channels)
        self._same = not (size or self._gray or self._flat)
        self.spaces = {name: spaces.Box(0, 255, self.shape, np.uint8)}

    def write(self, value: np.ndarray, out: Arrays) -> None:
        """Put the image into ``out``."""
        if not self._same:
            value = value[..., None] if self._flat else np.moveaxis(value, 0, -1) if self._first else value
            value = resize(np.ascontiguousarray(value), self._size) if self._size else value
            value = to_gray(value) if self._gray else value
            value = np.ascontiguousarray(np.moveaxis(value, -1, 0)) if self._first else value
        out[self.name] = value


class Vector:
    """Floats of rank 0 to 2, also unbounded integers, as float32; as an action within [-1, 1]."""

    def __init__(self, name: str, space: spaces.Box, where: str, is_action: bool):
        if len(space.shape) > 2:
            hint = (
                "images must be uint8" if len(space.shape) == 3 else "flatten it with a wrapper of your own"
            )
            raise EnvError(
                f"{where} is a {space.dtype} array of shape {space.shape}; at most 2 axes are taken ({hint})"
            )
        self.name, self._dtype = name, space.dtype
        self.low, self.high = low, high = space.low, space.high  # in the environment's units
        if is_action:
            finite = np.isfinite(low) & np.isfinite(high)
            # Elements without finite bounds pass clipped to [-1, 1] but unscaled, as in the official code.
            self._low = np.where(finite, low, -1).astype(space.dtype)
            self._high = np.where(finite, high, 1).astype(space.dtype)
            self.bounded = bool(finite.all())
            self._scaled = not (np.all(self._low == -1) and np.all(self._high == 1))
            low, high = np.full(space.shape, -1), np.full(space.shape, 1)
        low, high = low.astype(np.float32), high.astype(np.float32)
        self.spaces = {name: spaces.Box(low, high, space.shape, np.float32)}

    def write(self, value: Any, out: Arrays) -> None:
        """Put the float32 array into ``out``."""
        out[self.name] = np.asarray(value, np.float32)

    def read(self, actions: Arrays) -> np.ndarray:
        """The environment's action from the agent's, clipped first."""
        action = np.clip(np.asarray(actions[self.name], self._dtype), -1, 1)
        if self._scaled:
            action = (action + 1) / 2 * (self._high - self._low) + self._low
            action = np.clip(action, self._low, self._high)  # the line above may round past a bound
        return action


class Classes:
    """Class indices from 0 as int32; unequal counts become one key per element, since a key has one count."""

    def __init__(self, name: str, space: spaces.Space, start: np.ndarray, counts: np.ndarray):
        self.name, self.start, self._shape = name, start.astype(np.int64), counts.shape
        self._dtype: Any = space.dtype
        self._discrete = isinstance(space, spaces.Discrete)
        self.split = bool(np.any(counts != counts.reshape(-1)[0]))
        if self.split:
            self.spaces: dict[str, spaces.Space] = {
                f"{name}/{i}": spaces.Discrete(int(n), dtype=np.int32)
                for i, n in enumerate(counts.reshape(-1))
            }
        elif counts.shape == ():
            self.spaces = {name: spaces.Discrete(int(counts), dtype=np.int32)}
        else:
            self.spaces = {name: spaces.MultiDiscrete(counts, dtype=np.int32)}

    def write(self, value: Any, out: Arrays) -> None:
        """Put the indices into ``out``."""
        index = (np.asarray(value, np.int64) - self.start).astype(np.int32)
        if self.split:
            for key, element in zip(self.spaces, index.reshape(-1), strict=True):
                out[key] = np.asarray(element)
        else:
            out[self.name] = index

    def read(self, actions: Arrays) -> Any:
        """The environment's action from the agent's."""
        if self._discrete:
            return self._dtype.type(int(actions[self.name]) + int(self.start))
        index = [actions[key] for key in self.spaces] if self.split else actions[self.name]
        return (np.asarray(index, np.int64).reshape(self._shape) + self.start).astype(self._dtype)


def _leaves(space: spaces.Space, root: str, path: tuple = ()) -> list[tuple[tuple, str, spaces.Space]]:
    if isinstance(space, spaces.Dict | spaces.Tuple):
        items = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        return [leaf for key, sub in items for leaf in _leaves(sub, root, (*path, key))]
    return [(path, "/".join(map(str, path)) or root, space)]


def _integers(space: spaces.Space) -> tuple[np.ndarray, np.ndarray] | None:
    """Smallest value and number of values of each element; None if it is no integer space with bounds."""
    if isinstance(space, spaces.Discrete):
        return np.array(space.start), np.array(space.n)
    if isinstance(space, spaces.MultiDiscrete):
        return np.asarray(space.start), np.asarray(space.nvec)
    if isinstance(space, spaces.MultiBinary):
        return np.zeros(space.shape, np.int64), np.full(space.shape, 2)
    if isinstance(space, spaces.Box) and space.dtype == np.bool_:
        return np.zeros(space.shape, np.int64), np.full(space.shape, 2)
    if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.integer):
        # Python integers, since the width of an int64 or uint64 range overflows.
        low = np.array([int(x) for x in space.low.reshape(-1)], object).reshape(space.shape)
        counts = np.array([int(x) for x in space.high.reshape(-1)], object).reshape(space.shape) - low + 1
        if np.all(counts <= _MAX_CLASSES):
            return low.astype(np.int64), counts.astype(np.int64)
    return None


def _is_image(space: spaces.Space) -> TypeGuard[spaces.Box]:
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8:
        return False
    return len(space.shape) == 3 or (len(space.shape) == 2 and min(space.shape) >= _MIN_IMAGE)


class Entries:
    """The entries of an observation or action space, flat.

    Attributes:
        space: of the flat entries.
        leaves: where each leaf lies in the nested space, and what writes it; empty ones are left out.
    """

    def __init__(
        self,
        space: spaces.Space,
        root: str,
        where: str,
        size: Any = None,
        gray: bool = False,
        drop: Sequence[str] = (),
    ):
        self._space, self._bare = space, not isinstance(space, spaces.Dict | spaces.Tuple)
        self.leaves: list[tuple[tuple, Any]] = []
        is_action = root == "action"
        named: OrderedDict[str, spaces.Space] = OrderedDict()
        leaves = _leaves(space, root)
        names = [name for _, name, _ in leaves]
        if unknown := [name for name in drop if name not in names]:
            raise EnvError(
                f"{where}: drop names {unknown[0]!r}, which is no observation{nearest(unknown[0], names)}\n"
                f"  Observations: {', '.join(names)}"
            )
        for path, name, leaf in leaves:
            if name in drop:
                continue
            at = f"{where}: {'action' if is_action else 'observation'} {name!r}"
            entry = self._entry(name, leaf, at, is_action, size, gray)
            if entry is None:
                continue
            if twice := named.keys() & entry.spaces.keys():
                raise EnvError(
                    f"{at}: two entries are called {min(twice)!r} once nested names are joined by '/'"
                )
            named.update(entry.spaces)
            self.leaves.append((path, entry))
        if not named:
            raise EnvError(f"{where}: the {'action' if is_action else 'observation'} space has no entries")
        if (size or gray) and not any(isinstance(entry, Image) for _, entry in self.leaves):
            raise EnvError(
                f"{where}: the options size and gray need an image; observations are {', '.join(named)}.\n"
                "  For rendered frames add the option pixels: true"
            )
        self.space = spaces.Dict(named)

    @staticmethod
    def _entry(name: str, space: spaces.Space, at: str, is_action: bool, size: Any, gray: bool) -> Any:
        if 0 in (space.shape or ()):
            if is_action:
                raise EnvError(f"{at} is empty, shape {space.shape}")
            return None  # e.g. dm_control's empty observations: nothing to see
        if not is_action and _is_image(space):
            return Image(name, space, at, size, gray)
        if integers := _integers(space):
            start, counts = integers
            uneven_box = isinstance(space, spaces.Box) and np.any(counts != counts.reshape(-1)[0])
            if is_action or not uneven_box:
                return Classes(name, space, start, counts)
        if isinstance(space, spaces.Box):
            if is_action and np.issubdtype(space.dtype, np.integer):
                raise EnvError(
                    f"{at} is a {space.dtype} Box with more than {_MAX_CLASSES} values; "
                    "expected a float Box or classes (Discrete, MultiDiscrete)"
                )
            return Vector(name, space, at, is_action)
        raise EnvError(
            f"{at} is a {type(space).__name__} space, which no model here can take.\n"
            "  Expected Box, Discrete, MultiDiscrete, MultiBinary, or a Dict or Tuple of these."
            + ("" if is_action else f"\n  Leave it out: drop: [{name}]; or see rendered frames: pixels: true")
        )

    def write(self, value: Any) -> Arrays:
        """Flat observations from the environment's."""
        out: Arrays = {}
        for path, entry in self.leaves:
            leaf = value
            for key in path:
                leaf = leaf[key]
            entry.write(leaf, out)
        return out

    def read(self, actions: Arrays) -> Any:
        """The environment's action from flat ones."""
        if self._bare:
            return self.leaves[0][1].read(actions)
        values = {path: entry.read(actions) for path, entry in self.leaves}
        return self._build(self._space, values, ())

    def _build(self, space: spaces.Space, values: dict[tuple, Any], path: tuple) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._build(sub, values, (*path, key)) for key, sub in space.spaces.items()}
        if isinstance(space, spaces.Tuple):
            return tuple(self._build(sub, values, (*path, i)) for i, sub in enumerate(space.spaces))
        return values[path]


def entry_specs(space: spaces.Dict) -> dict[str, Spec]:
    """The entries of a flat Dict space, as :class:`Entries` makes it."""
    specs: dict[str, Spec] = {}
    for key, leaf in space.spaces.items():
        if isinstance(leaf, spaces.Discrete):
            specs[key] = Spec("int32", (), int(leaf.n))
        elif isinstance(leaf, spaces.MultiDiscrete):
            specs[key] = Spec("int32", leaf.shape, int(leaf.nvec.reshape(-1)[0]))
        elif isinstance(leaf, spaces.Box):
            specs[key] = Spec(leaf.dtype.name, leaf.shape)
    return specs


def spaces_from_gym(
    obs_space: spaces.Space, action_space: spaces.Space, where: str = "the environment"
) -> Spaces:
    """Named entries of any pair of Gymnasium spaces, as :class:`StandardEnv` shows them.

    Nested names are joined by ``/``. uint8 arrays with three axes (or two of at least 32) are images; floats
    are float32; Discrete, MultiDiscrete, MultiBinary, booleans and integers of one range of at most 256
    values are int32 classes from 0; other integers are float32. Unequal class counts become ``name/0``,
    ``name/1`` ...

    Raises:
        EnvError: for Text, Graph, Sequence and other spaces, naming the entry.
    """
    return Spaces(
        entry_specs(Entries(obs_space, "obs", where).space),
        entry_specs(Entries(action_space, "action", where).space),
    )


class StandardEnv(gym.Wrapper):
    """Any environment with flat Dict spaces, an action repeat and, where possible, an exact snapshot.

    Observations are dicts of arrays as :func:`spaces_from_gym` names them; actions are dicts likewise,
    continuous ones within [-1, 1] (clipped, then scaled to the environment's finite bounds).

    Args:
        env: the environment.
        name: its id, for messages.
        seed: used by the first reset that gets none.
        repeat: environment steps per step; rewards are summed, the end of an episode stops them.
        size: (height, width) for every image, Pillow bilinear; None leaves it.
        gray: luma instead of red, green and blue.
        stack: the newest images of each entry together, the oldest first, on the channels; a reset repeats
            its own.
        pixels: what ``env.render()`` shows, as ``image``, replaces all observations; ``size`` is then 64 x 64
            unless given.
        drop: names of observations to leave out.

    Raises:
        EnvError: for a space that is not supported or an impossible option.
    """

    def __init__(
        self,
        env: gym.Env,
        name: str,
        seed: int | None = None,
        repeat: int = 1,
        size: int | Sequence[int] | None = None,
        gray: bool = False,
        pixels: bool = False,
        drop: str | Sequence[str] = (),
        stack: int = 1,
    ):
        super().__init__(env)
        for option, value in (("repeat", repeat), ("stack", stack)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise EnvError(f"{name}: {option}={value!r}; expected a whole number >= 1")
        if pixels and env.render_mode != "rgb_array":
            modes = ", ".join(env.metadata.get("render_modes", [])) or "none"
            raise EnvError(f"{name}: pixels=True needs the render mode 'rgb_array'; it has {modes}")
        size = None if size is None and not pixels else check_size(64 if size is None else size, name)
        seen = spaces.Dict(image=spaces.Box(0, 255, (*size, 3), np.uint8)) if pixels and size else None
        drop = (drop,) if isinstance(drop, str) else tuple(drop)
        self._pixels = pixels
        self.name, self._seed, self._repeat = name, seed, repeat
        self._obs = Entries(seen or env.observation_space, "obs", name, size, gray, drop)
        self._action = Entries(env.action_space, "action", name)
        self._stack = stack
        self._axes: dict[str, int] = {}  # of the channels, by image
        self._frames: dict[str, list[np.ndarray]] = {}  # the newest ``stack``
        self.observation_space = self._obs.space if stack == 1 else self._stacked_space()
        self.action_space = self._action.space
        self._action_spaces = (self._action.space, *self._action.space.spaces.values())
        entries = (entry_specs(self.observation_space) | entry_specs(self._action.space)).items()
        sizes = ", ".join(f"{key} {spec.shape} {spec.classes or spec.dtype}" for key, spec in entries)
        self._kind = f"{name} ({sizes}, repeat {repeat}{f', stack {stack}' if stack > 1 else ''})"
        if seed is not None:
            self.action_space.seed(seed)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Arrays, dict]:
        """Start an episode; ``seed`` determines the environment and its ``action_space`` from here on."""
        if seed is None:
            seed, self._seed = self._seed, None
        if seed is not None:
            self._seed = None
            self.action_space.seed(seed)
        obs, info = self.env.reset(seed=seed, options=options)
        self._frames = {}
        return self._observe(obs), info

    def _observe(self, obs: Any) -> Arrays:
        seen = self._obs.write({"image": self.env.render()} if self._pixels else obs)
        for key, axis in self._axes.items():
            frame = seen[key].copy()  # the environment may draw the next one over it
            frames = [*self._frames.get(key, [frame] * self._stack)[1:], frame]
            self._frames[key], seen[key] = frames, np.concatenate(frames, axis)
        return seen

    def _stacked_space(self) -> spaces.Dict:
        stacked, specs = dict(self._obs.space.spaces), entry_specs(self._obs.space)
        for key, spec in specs.items():
            if spec.is_image:
                axis = self._axes[key] = 0 if spec.channels_first else 2
                shape = np.array(spec.shape)
                shape[axis] *= self._stack
                stacked[key] = spaces.Box(0, 255, tuple(shape.tolist()), np.uint8)
                if (got := entry_specs(spaces.Dict({key: stacked[key]}))[key]).hwc[2] != shape[axis]:
                    raise EnvError(
                        f"{self.name}: stack={self._stack} gives {key!r} the shape {got.shape}, which looks "
                        "like another layout.\n  Stack fewer images, or make them gray."
                    )
        if not self._axes:
            raise EnvError(
                f"{self.name}: the option stack needs an image; observations are {', '.join(specs)}.\n"
                "  For rendered frames add the option pixels: true"
            )
        return spaces.Dict(stacked)

    @property
    def action_entries(self) -> list[Any]:
        """What makes the environment's actions from the flat ones, entry by entry."""
        return [entry for _, entry in self._action.leaves]

    @property
    def unbounded_actions(self) -> tuple[str, ...]:
        """Continuous actions with an element without finite bounds."""
        return tuple(e.name for e in self.action_entries if isinstance(e, Vector) and not e.bounded)

    @property
    def episode_length(self) -> int | None:
        """Steps until the time limit; None without one."""
        spec = self.env.spec
        limit = spec.max_episode_steps if spec else getattr(self.env.unwrapped, "step_limit", None)
        return None if limit is None else -(-limit // self._repeat)

    def step(self, action: Arrays) -> tuple[Arrays, float, bool, bool, dict]:
        """Execute ``action`` ``repeat`` times."""
        inner = self._action.read(action)
        total = 0.0
        for _ in range(self._repeat):
            obs, reward, terminated, truncated, info = self.env.step(inner)
            total += float(reward)
            if terminated or truncated:
                break
        return self._observe(obs), total, bool(terminated), bool(truncated), info

    @property
    def can_snapshot(self) -> bool:
        """Whether :meth:`snapshot` works for this environment."""
        return unsupported_layer(self.env) is None

    def snapshot(self) -> dict[str, Any]:
        """The exact state: tensors and plain values that load with ``weights_only=True``.

        Raises:
            NotSupported: if a layer is a simulator or wrapper whose state is unknown.
        """
        rngs = [generator_state(space._np_random) for space in self._action_spaces]
        return {
            "kind": self._kind,
            "layers": snapshot_layers(self.env),
            "seed": self._seed,
            "action_rngs": rngs,
            "frames": {key: [to_plain(frame) for frame in seen] for key, seen in self._frames.items()},
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on bitwise from :meth:`snapshot`, in this or another environment of the same id and options.

        Raises:
            CheckpointError: if the snapshot is of another kind of environment.
        """
        if state["kind"] != self._kind:
            raise CheckpointError(
                f"the snapshot is of the environment {state['kind']}\n  but this is {self._kind}\n"
                "  Use the id and options that the checkpoint was saved with."
            )
        restore_layers(self.env, state["layers"])
        self._seed = state["seed"]
        frames = state.get("frames", {})  # snapshots of older versions have none
        self._frames = {key: [from_plain(frame) for frame in seen] for key, seen in frames.items()}
        for space, rng in zip(self._action_spaces, state["action_rngs"], strict=True):
            space._np_random = load_generator(rng)

    @property
    def packed(self) -> bytes:
        """The snapshot as bytes, assigning restores: for get_attr and set_attr across processes."""
        buffer = io.BytesIO()
        torch.save(self.snapshot(), buffer)
        return buffer.getvalue()

    @packed.setter
    def packed(self, data: bytes) -> None:
        self.restore(torch.load(io.BytesIO(data), weights_only=True))
