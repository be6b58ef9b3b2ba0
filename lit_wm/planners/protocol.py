"""What a planner asks of a model, what it gives back, and what all planners share."""

from __future__ import annotations

import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from lit_wm.errors import ConfigError
from lit_wm.noise import Noise
from lit_wm.types import State, Tensors


class PlanningModel(Protocol):
    """The part of a world model that planners use: ``N`` environments, ``S`` candidates of ``H`` steps.

    Attributes:
        action_dim: flat size ``A`` of an action: numbers in -1 ... 1, or the classes of a one-hot vector.
        discrete: whether it is a one-hot vector, of a single discrete action.
    """

    @property
    def action_dim(self) -> int: ...  # noqa: D102

    @property
    def discrete(self) -> bool: ...  # noqa: D102

    def action_mask_of(self, state: State) -> Tensor | None:
        """1 for the action entries that the environment's task has, else 0 (N, A); None: all have all."""

    def propose(self, state: State, n: int, horizon: int, noise: Noise) -> Tensor:
        """Samples of the policy, rolled out. (N, n, H, A)"""
        ...

    def value(
        self, state: State, actions: Tensor, noise: Noise, t: int = 0, deterministic: bool = False
    ) -> Tensor:
        """Predicted return of ``actions`` (N, S, H, A) with the value of their end, in the plan's iteration
        ``t``. ``deterministic`` draws nothing and is differentiable. (N, S)
        """
        ...


@dataclass
class Plan:
    """Result of one planning step.

    Attributes:
        action: what to execute.                                                          (N, A)
        mean: to hand in at the next step, unshifted.                                     (N, H, A)
        iterations: how many were done; fewer than configured if the time budget ended them.
        trace: per iteration ``values`` (N, S), ``elites`` (N, E) their indices from the best down, ``score``
            (N, E) their weights, ``mean`` and ``std`` (N, H, A) after it.
    """

    action: Tensor
    mean: Tensor
    iterations: int
    trace: list[Tensors]


def check_budget(max_ms: Any) -> None:
    """Raise a ConfigError unless ``max_ms`` is None or a time."""
    number = isinstance(max_ms, Real) and not isinstance(max_ms, bool)
    if max_ms is not None and not (number and 0 < float(max_ms) < float("inf")):
        raise ConfigError(f"max_ms is {max_ms!r}; expected milliseconds, a finite number above 0")


class Laps:
    """Counts iterations and ends them in time. Only with a limit is the clock read, the device waited for.

    ``late`` is how long the first one took, with all before it, if that was more than the limit.
    """

    def __init__(self, max_ms: float | None, device: torch.device):
        check_budget(max_ms)
        self.max_ms, self.device, self.late = max_ms, device, 0.0
        self.start = self._now()

    def _now(self) -> float:
        if self.max_ms is None:
            return 0.0
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() * 1e3

    def __call__(self, count: int) -> Iterator[int]:
        """0 ... count-1, ending before a lap that would pass the limit if it took as long as the longest."""
        longest, before = 0.0, self._now()
        for i in range(count):
            yield i
            if self.max_ms is not None:
                now = self._now()
                longest, before, passed = max(longest, now - before), now, now - self.start
                if i == 0 and passed > self.max_ms:
                    self.late = passed
                if passed + longest > self.max_ms:
                    return


Found = tuple[Tensor, Tensor, Tensor, list[Tensors]]
LATE: set[Planner] = set()  # those that have said so


@dataclass(frozen=True)
class Planner(ABC):
    """A search over action sequences, batched over environments. It holds options only, never state.

    Args:
        horizon: steps H looked ahead.
        num_pi_trajs: how many of the candidates are samples of the policy.
        min_std, max_std: limits of the noise's standard deviation.

    Raises:
        ConfigError: an option of the wrong type or out of bounds.
    """

    horizon: int = 3
    num_pi_trajs: int = 24
    min_std: float = 0.05
    max_std: float = 2.0
    ordered: ClassVar[tuple[tuple[str, str], ...]] = (("min_std", "max_std"),)

    def __post_init__(self) -> None:
        name = f"planner {type(self).__name__.lower()}"
        for f in fields(self):
            value: Any = getattr(self, f.name)
            whole, low = f.type == "int", int(f.type == "int" and f.name != "num_pi_trajs")
            high = 1.0 if f.name in ("momentum", "min_prob") else float("inf")
            kind = int if whole else (int, float)
            if isinstance(value, bool) or not isinstance(value, kind) or not low <= value <= high:
                expected = f"{'an integer' if whole else 'a number'} in {low} ... {high:g}"
                raise ConfigError(f"{name}: {f.name} is {value!r}; expected {expected}")
        for small, large in self.ordered:
            a, b, strict = getattr(self, small), getattr(self, large), small == "num_pi_trajs"
            if a > b - strict:
                order = "less than" if strict else "at most"
                raise ConfigError(f"{name}: {small} is {a}; expected {order} {large}, which is {b}")

    @torch.no_grad()
    def plan(
        self,
        model: PlanningModel,
        state: State,
        mean_prev: Tensor | None,
        t0: Tensor,
        explore: bool,
        noise: Noise,
        max_ms: float | None = None,
    ) -> Plan:
        """Plan an action for each of N environments.

        Args:
            model: world model, in eval mode.
            state: latent states.                                                         (N, ...)
            mean_prev: ``Plan.mean`` of the step before; None at the start.               (N, H, A)
            t0: True where an episode begins: there ``mean_prev`` is not used.            (N,) bool
            explore: add the exploration noise of training (continuous actions only).
            noise: source of all random numbers.
            max_ms: time budget: no iteration begins that would pass it, but one is always done; a planner
                whose first one passes it warns, once.

        NaN counts as 0 in the policy's samples and in the values of MPPI and CEM: a broken observation spoils
        neither the other environments nor this one's next plan.

        Raises:
            ConfigError: ``max_ms`` is no time, or ``mean_prev`` is of another horizon.
        """
        laps = Laps(max_ms, state.deter.device)
        fill = 1 / model.action_dim if model.discrete else 0.0
        shape = (state.deter.shape[0], self.horizon, model.action_dim)
        mean = state.deter.new_full(shape, fill, dtype=torch.float32)
        if mean_prev is not None:
            if mean_prev.shape != shape:
                raise ConfigError(
                    f"the plan of the step before has shape {tuple(mean_prev.shape)}, expected {shape} "
                    "(environments, horizon, action)\nTake a planner of that horizon, or begin a new plan: "
                    "state.plan = None"
                )
            mean[:, :-1] = torch.where(t0[:, None, None], fill, mean_prev[:, 1:])
        mask = model.action_mask_of(state)
        mask = None if mask is None else mask[:, None]
        action, mean, std, trace = self._search(model, state, mean, mask, noise, laps)
        if laps.late and self not in LATE:
            LATE.add(self)
            count = "num_candidates" if hasattr(self, "num_candidates") else "num_samples"
            warnings.warn(
                f"planner {type(self).__name__.lower()}: the first iteration, which is always done, ended "
                f"after {laps.late:.3g} ms, max_ms is {max_ms:g}: lower {count} or horizon",
                stacklevel=2,
            )
        if explore and not model.discrete:
            action = action + std[:, 0] * noise.normal("plan/explore", tuple(action.shape))
        return Plan(action.clamp(-1, 1), mean, len(trace), trace)

    @abstractmethod
    def _search(
        self, model: PlanningModel, state: State, mean: Tensor, mask: Tensor | None, noise: Noise, laps: Laps
    ) -> Found:
        """From the start ``mean`` (N, H, A) and ``mask`` (N, 1, A) to the action before noise (N, A), the
        final mean and standard deviation (N, H, A) and the trace.
        """
