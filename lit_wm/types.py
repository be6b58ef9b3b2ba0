"""The few shared types, and the glossary of shapes for the whole project.

Shapes: ``B`` batch, ``T`` replay steps, ``K`` replay context, ``H`` imagined steps, ``N = B*T`` start states,
``A`` flat action, ``E`` encoder token, ``D`` deterministic state, ``S x C`` stochastic groups x classes,
``F = D + S*C`` features, ``G`` GRU blocks. Every tensor is batch first.

Time runs like this; an observation is seen *after* the previous action was executed::

    obs      o0       o1       o2
    action       a0       a1       a2      a[t] is chosen at o[t] and stored with it
    reward   0        r1       r2          r[t] was received together with o[t]
    is_first 1        0        0           the model's state is reset here

This module needs neither ``torch.nn`` nor Lightning.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lit_wm.errors import ConfigError

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Spec:
    """One observation or action entry of a space.

    Args:
        dtype: ``"uint8"`` for images, ``"float32"`` for vectors and continuous actions, ``"int32"`` for
            discrete.
        shape: shape of one step, without batch and time. Images are (H, W, C) or (C, H, W).
        classes: number of classes of a discrete entry, one count for all elements of ``shape``; None
            otherwise.
    """

    dtype: str
    shape: tuple[int, ...]
    classes: int | None = None

    def __str__(self) -> str:
        classes = f"{self.classes} classes{f' {self.shape}' * bool(self.shape)}"
        return classes if self.classes else f"{self.dtype} {self.shape}"

    @property
    def is_image(self) -> bool:
        """Whether this is an image: uint8 with three axes."""
        return self.dtype == "uint8" and len(self.shape) == 3

    @property
    def is_discrete(self) -> bool:
        """Whether the values are class indices."""
        return self.classes is not None

    @property
    def channels_first(self) -> bool:
        """Whether an image is stored (C, H, W): its first axis is small and its last is not."""
        return self.is_image and self.shape[-1] > 16 >= self.shape[0]

    @property
    def hwc(self) -> tuple[int, int, int]:
        """Height, width and channels of an image, whatever its layout."""
        a, b, c = self.shape
        return (b, c, a) if self.channels_first else (a, b, c)

    @property
    def size(self) -> int:
        """Number of elements of one step once discrete entries are one-hot."""
        numel = 1
        for n in self.shape:
            numel *= n
        return numel * (self.classes or 1)

    def to_plain(self) -> dict[str, Any]:
        """Numbers, strings and lists only, so that a checkpoint loads with ``weights_only=True``."""
        return {"dtype": self.dtype, "shape": list(self.shape), "classes": self.classes}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Spec:
        """Inverse of :meth:`to_plain`."""
        return cls(plain["dtype"], tuple(plain["shape"]), plain.get("classes"))


@dataclass(frozen=True)
class Spaces:
    """Named observation and action entries, in the order of the environment.

    A single (non-Dict) observation space is called ``obs``, a single action space ``action``. ``tasks`` are
    those that the sources name, each a dict of the fields of :class:`lit_wm.tasks.Task`.
    """

    obs: dict[str, Spec]
    action: dict[str, Spec]
    episode_length: int | None = field(default=None, compare=False)  # decisions until the time limit
    unbounded: tuple[str, ...] = field(default=(), compare=False)  # actions said to have no bounds
    tasks: tuple[dict[str, Any], ...] = field(default=(), compare=False)

    def to_plain(self) -> dict[str, Any]:
        """A plain dict for hyper-parameters and checkpoints."""
        return {
            "obs": {k: s.to_plain() for k, s in self.obs.items()},
            "action": {k: s.to_plain() for k, s in self.action.items()},
            "episode_length": self.episode_length,
            "unbounded": list(self.unbounded),
        } | ({"tasks": [dict(task) for task in self.tasks]} if self.tasks else {})

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any] | Spaces) -> Spaces:
        """Inverse of :meth:`to_plain`; a ``Spaces`` is returned as it is."""
        if isinstance(plain, Spaces):
            return plain
        parts = [plain.get(k) for k in ("obs", "action")] if isinstance(plain, Mapping) else [None]
        entries = [list(p.values()) if isinstance(p, Mapping) else [None] for p in parts]
        if not all(isinstance(spec, Mapping) for spec in sum(entries, [])):
            raise ConfigError(
                f"spaces are {str(plain)[:200]}; expected shape and type of every observation and action\n"
                "Give data.spaces, buffer.spaces.to_plain() or to_plain() of Spaces({'obs': Spec(...)}, ...)"
            )
        return cls(
            {k: Spec.from_plain(s) for k, s in plain["obs"].items()},
            {k: Spec.from_plain(s) for k, s in plain["action"].items()},
            plain.get("episode_length"),
            tuple(plain.get("unbounded", ())),
            tuple(plain.get("tasks", ())),
        )


@dataclass
class State:
    """Latent state of a world model.

    Attributes:
        deter: deterministic part.                                                   (..., D)
        stoch: one-hot stochastic part, None for models that have none.              (..., S, C)
        action: the action chosen at this state by ``act``, kept so that the next ``act`` knows it.
        plan: mean of the last plan, from which the next one starts.                 (..., H, A)
        task: number of the task, of multi-task models.                              (...) int64
    """

    deter: Tensor
    stoch: Tensor | None = None
    action: Tensors | None = None
    plan: Tensor | None = None
    task: Tensor | None = None

    @property
    def deterministic(self) -> Tensor:
        """Alias of ``deter``."""
        return self.deter

    @property
    def stochastic(self) -> Tensor | None:
        """Alias of ``stoch``."""
        return self.stoch

    def map(self, fn: Callable[[Tensor], Tensor]) -> State:
        """Apply ``fn`` to every tensor."""
        action = None if self.action is None else {k: fn(v) for k, v in self.action.items()}
        stoch, plan, task = (None if x is None else fn(x) for x in (self.stoch, self.plan, self.task))
        return State(fn(self.deter), stoch, action, plan, task)

    def detach(self) -> State:
        """Cut the graph."""
        return self.map(Tensor.detach)

    def flatten(self, start: int = 0, end: int = 1) -> State:
        """Merge batch axes ``start..end``, e.g. (B, T, ...) to (B*T, ...)."""
        return self.map(lambda x: x.flatten(start, end))

    def at(self, t: int) -> State:
        """State at time ``t`` of a state with axes (B, T, ...)."""
        return self.map(lambda x: x[:, t])

    def __getitem__(self, index: Any) -> State:
        """Index the leading axes."""
        return self.map(lambda x: x[index])


class States:
    """A sequence of states over time: ``states[t]`` is the (B, ...) state at time t, ``states.stacked`` all
    of them.
    """

    def __init__(self, stacked: State):
        self.stacked = stacked  # (B, H+1, ...)

    def __len__(self) -> int:
        return self.stacked.deter.shape[1]

    def __getitem__(self, t: int) -> State:
        return self.stacked.at(t)


@dataclass
class Trajectory:
    """What ``imagine`` returns; time is axis 1 everywhere.

    Attributes:
        states: H+1 states, the start first.
        actions: the H actions that lead from one state to the next, by key.          (B, H, ...)
        rewards: predicted reward received on arriving at states 1..H, times the model's ``reward_scale``.
                                                                                      (B, H)
        continues: predicted probability that the episode goes on, times the discount if the model folds it
            in, at states 1..H.                                                       (B, H)
    """

    states: States
    actions: Tensors
    rewards: Tensor
    continues: Tensor


@dataclass
class Batch:
    """One training batch of T steps.

    Attributes:
        obs: observations by key, dtype as stored (uint8 images).                     (B, T, ...)
        prev_action: action executed before the observation, by key.                  (B, T, ...)
        reward: reward received together with the observation.                        (B, T) float32
        is_first, is_last, is_terminal: episode flags.                                (B, T) bool
        carry: latent state of the step before the first one; None starts from zeros. (B, ...)
        consecutive: True where the row goes on where the previous batch's row ended. (B,) bool or None
        write_back: called with the new (B, T, ...) states, so that the replay keeps fresh latents.
        task: number of the task of a row, or of each step where it may change in a row; None for
            single-task data.                                            (B,) or (B, T) int64
        fake: the observation is a copy of the one before, as its source lacks the last one, and nothing
            shall learn to predict it; None if there is none.                          (B, T) bool
        source: number of the source of a row, in the order of the data module.        (B,) int64
        recorded: the row is of a dataset, not of the environment; None if all are.    (B,) bool
        rewarded: the row's source has rewards; None if all have.                      (B,) bool
        info: more columns (``index``, ``source`` ...), never read by the losses.
    """

    obs: Tensors
    prev_action: Tensors
    reward: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    carry: State | None = None
    consecutive: Tensor | None = None
    write_back: Callable[[State], None] | None = None
    task: Tensor | None = None
    fake: Tensor | None = None
    source: Tensor | None = None
    recorded: Tensor | None = None
    rewarded: Tensor | None = None
    info: Tensors = field(default_factory=dict)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """Copy all tensors to ``device``."""

        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=non_blocking)

        return replace(
            self,
            obs={k: move(v) for k, v in self.obs.items()},
            prev_action={k: move(v) for k, v in self.prev_action.items()},
            reward=move(self.reward),
            is_first=move(self.is_first),
            is_last=move(self.is_last),
            is_terminal=move(self.is_terminal),
            carry=None if self.carry is None else self.carry.map(move),
            consecutive=None if self.consecutive is None else move(self.consecutive),
            task=None if self.task is None else move(self.task),
            fake=None if self.fake is None else move(self.fake),
            source=None if self.source is None else move(self.source),
            recorded=None if self.recorded is None else move(self.recorded),
            rewarded=None if self.rewarded is None else move(self.rewarded),
        )
