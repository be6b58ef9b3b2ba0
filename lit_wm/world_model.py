"""What every world model can do: five verbs on explicit states, free of Lightning."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lit_wm.nets.normalize import Normalizer
from lit_wm.noise import Noise, NoiseStreams
from lit_wm.types import Spaces, Spec, State, Tensors, Trajectory


class WorldModel(nn.Module, ABC):
    """Base of the models. All verbs are batch first and take no gradient decisions: wrap them in
    ``torch.no_grad()`` or ``torch.inference_mode()`` where none is wanted.

    Attributes:
        spaces: observation and action entries.
        compute_dtype: dtype of activations; parameters, norms and losses stay float32.
        noise: default source of random numbers of the verbs.
        normalizer: puts vectors into units of their spread in the data, with ``normalize``; else None.
        decodes: whether ``decode`` gives observations; without it there are no dream errors and videos.
    """

    decodes: bool = True

    def __init__(self, spaces: Spaces, normalize: bool = False):
        super().__init__()
        self.spaces = spaces
        self.normalizer = Normalizer(spaces.obs) if normalize else None
        self.compute_dtype = torch.float32
        self.noise: Noise = NoiseStreams()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def source(self, noise: Noise | None) -> Noise:
        """``noise``, or the model's own streams, which follow it to its device while they are unused."""
        if noise is not None:
            return noise
        own = self.noise
        if isinstance(own, NoiseStreams) and own.device != self.device and not own.used:
            self.noise = own = NoiseStreams(own.seed, own.rank, self.device)
        return own

    @abstractmethod
    def initial(self, batch_size: int) -> State:
        """State before the first observation."""

    @abstractmethod
    def encode(
        self,
        obs: Tensors,
        state: State | None = None,
        action: Tensors | None = None,
        is_first: Tensor | None = None,
    ) -> State:
        """One filtering step: the state after ``action`` was executed in ``state`` and ``obs`` was seen."""

    @abstractmethod
    def imagine(
        self, state: State, actions: Tensors | Tensor | None = None, horizon: int | None = None
    ) -> Trajectory:
        """Roll out given actions (B, H, ...), or the policy for ``horizon`` steps."""

    @abstractmethod
    def decode(self, state: State) -> Tensors:
        """Expected observations in the environment's units and layout; images as floats in 0 ... 1."""

    @abstractmethod
    def q(self, state: State, action: Tensors | Tensor) -> Tensor:
        """Predicted return of taking ``action`` in ``state`` and following the policy. (B,)"""

    @abstractmethod
    def act(
        self,
        obs: Tensors,
        state: State | None = None,
        is_first: Tensor | None = None,
        mode: str = "eval",
        noise: Noise | None = None,
    ) -> tuple[Tensors, State]:
        """Action for each environment and the state to hand in next time."""

    @abstractmethod
    def latent_specs(self) -> dict[str, Spec]:
        """Entries of a state as the replay stores them; empty for models that need none."""

    def action_dict(self, actions: Tensors | Tensor) -> Tensors:
        """A bare tensor stands for the only action key."""
        if isinstance(actions, Tensor):
            if len(self.spaces.action) != 1:
                raise ValueError(
                    f"this model has the action keys {sorted(self.spaces.action)}: pass a dict of tensors"
                )
            actions = {next(iter(self.spaces.action)): actions}
        if actions.keys() != self.spaces.action.keys():
            raise ValueError(f"action keys are {sorted(actions)}, expected {sorted(self.spaces.action)}")
        return {k: v.to(self.device) for k, v in actions.items()}

    def obs_dict(self, obs: Tensors | Tensor) -> Tensors:
        """Observations for the networks, checked; a bare tensor stands for the only key."""
        if isinstance(obs, Tensor):
            if len(self.spaces.obs) != 1:
                raise ValueError(
                    f"this model has the observation keys {sorted(self.spaces.obs)}: pass a dict of tensors"
                )
            obs = {next(iter(self.spaces.obs)): obs}
        missing = self.spaces.obs.keys() - obs.keys()
        if missing:
            raise ValueError(f"observation keys {sorted(missing)} are missing; got {sorted(obs)}")
        for k, spec in self.spaces.obs.items():
            shape = tuple(obs[k].shape[obs[k].ndim - len(spec.shape) :])
            if shape != spec.shape or obs[k].ndim == len(spec.shape):
                expected = ", ".join(map(str, ("batch", *spec.shape)))
                raise ValueError(f"observation {k!r} has shape {tuple(obs[k].shape)}; expected ({expected})")
            if spec.is_image and obs[k].dtype != torch.uint8:
                raise ValueError(
                    f"observation {k!r} is {obs[k].dtype}; expected an image of uint8, 0 ... 255"
                )
        return self.normalized({k: obs[k].to(self.device) for k in self.spaces.obs})

    def normalized(self, obs: Tensors) -> Tensors:
        """Observations as the networks see them. (..., *shape) each"""
        return obs if self.normalizer is None else self.normalizer(obs)

    def __repr__(self) -> str:
        parts = {n: sum(p.numel() for p in m.parameters()) for n, m in self.named_children()}
        lines = [f"  {n:<10}{c:>14,}" for n, c in parts.items() if c]
        return "\n".join(
            [f"{type(self).__name__}(", *lines, f"  {'total':<10}{sum(parts.values()):>14,}", ")"]
        )
