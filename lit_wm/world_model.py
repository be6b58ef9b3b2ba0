"""What every world model can do: five verbs on explicit states, free of Lightning."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_wm.errors import ConfigError
from lit_wm.nets.ensemble import Ensemble
from lit_wm.nets.normalize import Normalizer
from lit_wm.noise import Noise, NoiseStreams
from lit_wm.planners import Planner, make_planner
from lit_wm.planners.protocol import check_budget
from lit_wm.pretrained import LoadReport, Meaning, Weights, load, read_weights
from lit_wm.tasks import Task
from lit_wm.types import Spaces, Spec, State, Tensors, Trajectory

MODES = ("train", "eval", "greedy")
APART = 100.0  # in values; at MPPI's temperature a weight of e^-50


class WorldModel(nn.Module, ABC):
    """Base of the models. All verbs are batch first and take no gradient decisions: wrap them in
    ``torch.no_grad()`` or ``torch.inference_mode()`` where none is wanted.

    Attributes:
        spaces: observation and action entries.
        compute_dtype: dtype of activations; parameters, norms and losses stay float32.
        noise: default source of random numbers of the verbs.
        normalizer: puts vectors into units of their spread in the data, with ``normalize``; else None.
        decodes: whether ``decode`` gives observations; without it there are no dream errors and videos.
        reward_scale: what a reward of 1 in the data is in the model's rewards and values.
        contdisc: whether ``continues`` holds the discount.
        planner: what ``act`` plans with; None: the policy acts.
        tasks, task_index: the several tasks that it knows, and the number of the one that its environment is.
        policy_part, critic_part, slow_part: names of the policy, the critic and the critic's slow copy.
        anew: tensors that :meth:`load_weights` leaves as they are.
        meanings: what entries of its tensors mean, by what may differ, see :meth:`meanings_of`.
    """

    decodes: bool = True
    reward_scale: float = 1.0
    contdisc: bool = False
    planner: Planner | None = None
    tasks: Sequence[Task] = ()
    task_index: int | None = None
    policy_part: str
    critic_part: str
    slow_part: str
    anew: tuple[str, ...] = ()
    meanings: Mapping[str, Meaning] = {}

    def __init__(self, spaces: Spaces, normalize: bool = False):
        super().__init__()
        self.spaces = spaces
        self.ensemble: Ensemble | None = None
        self.disagreement, self.disagreement_limit = 0.0, None
        self.normalizer = Normalizer(spaces.obs) if normalize else None
        self.compute_dtype = torch.float32
        self.noise: Noise = NoiseStreams()

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.parameters()).device

    def make_ensemble(self, options: Any, inputs: int, outputs: int, units: int) -> Ensemble | None:
        """Take the options of the ensemble and make it, see :class:`lit_wm.nets.ensemble.Ensemble`.

        Raises:
            ConfigError: if its options do not fit together.
        """
        count, used = options.ensemble, options.disagreement or options.disagreement_limit is not None
        self.disagreement, self.disagreement_limit = options.disagreement, options.disagreement_limit
        if isinstance(count, bool) or not isinstance(count, int) or count < 0 or count == 1:
            raise ConfigError(
                f"model.ensemble is {count!r}; expected 0, or 2 and more networks that disagree"
            )
        limit = 1.0 if self.disagreement_limit is None else self.disagreement_limit
        if not abs(self.disagreement) < float("inf") or not limit > 0:
            raise ConfigError(
                f"model.disagreement is {options.disagreement} and model.disagreement_limit "
                f"{options.disagreement_limit}; expected a number, and more than 0 or null"
            )
        if used and not count:
            raise ConfigError(
                "model.disagreement and disagreement_limit need an ensemble: set model.ensemble: 5"
            )
        return Ensemble(inputs, outputs, count, units) if count else None

    @property
    def doubts(self) -> bool:
        """Whether the ensemble has a say in what is imagined."""
        return self.ensemble is not None and bool(self.disagreement or self.disagreement_limit is not None)

    def price(self, doubt: Tensor) -> Tensor:
        """What steps of this disagreement cost: nothing up to the mean in the data, which is 1."""
        return self.disagreement * (doubt.clamp(min=1) - 1)

    def within_limit(self, value: Tensor, beyond: Tensor) -> Tensor:
        """Value of plans, those last that go ``beyond`` the limit of the disagreement for more steps.
        (N, S), (N * S) -> (N, S)

        A plan that merely ended there would be worth the policy's value, more than most: the search
        would find just that.
        """
        if self.disagreement_limit is None:
            return value
        beyond, known = beyond.view_as(value), value.detach().nan_to_num(0, 0, 0)
        reach = APART + known.amax(1, keepdim=True) - known.amin(1, keepdim=True)
        return value - (beyond - beyond.amin(1, keepdim=True)) * reach

    def source(self, noise: Noise | None) -> Noise:
        """``noise``, or the model's own streams, which follow it to its device while they are unused."""
        if noise is not None:
            return noise
        own = self.noise
        if isinstance(own, NoiseStreams) and own.device != self.device and not own.used:
            self.noise = own = NoiseStreams(own.seed, own.rank, self.device)
        return own

    def parts(self) -> dict[str, list[str]]:
        """Names of the sub-modules with parameters, of ``world_model``, ``actor`` and ``critic``; the slow
        copy follows its critic and is in none.
        """
        named = [name for name, part in self.named_children() if any(True for _ in part.parameters())]
        others = (self.policy_part, self.critic_part, self.slow_part, "ensemble")
        rest = [name for name in named if name not in others]
        return {"world_model": rest, "actor": [self.policy_part], "critic": [self.critic_part]}

    def load_weights(
        self, source: str | Path | Weights, task_like: str | None = None, partial: bool = False
    ) -> LoadReport:
        """Take the weights of a checkpoint of ours.

        Args:
            source: the file, or a run directory.
            task_like: the task whose embedding a further one begins with.
            partial: take what fits by name, shape and meaning; else anything that does not is refused.

        Raises:
            CheckpointError: if the file is none, of another model, or does not fit.
        """
        found = source if isinstance(source, Weights) else read_weights(source, "model.start_from ")
        return load(self, found, self.adapt_weights(found, task_like, partial), partial)

    def adapt_weights(self, found: Weights, task_like: str | None, partial: bool) -> Tensors:
        """The tensors of a file as this model wants them."""
        return found.tensors

    def meanings_of(self, given: Mapping[str, Any]) -> dict[str, Meaning]:
        """What entries of tensors mean where shapes do not tell, for the arguments of a module."""
        return {}

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
        """One filtering step: the state after ``action`` was executed in ``state`` and ``obs`` was seen.

        Observations are those of environment and data, (B, ...) by name, images as uint8. Actions, of all
        verbs, are in the model's units: their bounds are -1 and 1, classes count from 0.
        """

    @abstractmethod
    def imagine(
        self, state: State, actions: Tensors | Tensor | None = None, horizon: int | None = None
    ) -> Trajectory:
        """Roll out given actions (B, H, ...), in -1 ... 1 or classes, or the policy for ``horizon`` steps; a
        ``horizon`` beside actions must be their H.

        Rewards are in units of :attr:`reward_scale`, as all that the model predicts of them.
        """

    @abstractmethod
    def decode(self, state: State) -> Tensors:
        """Expected observations by name: images as float32 in 0 ... 1, not 0 ... 255, (..., C, H, W) or
        (..., H, W, C) as they were observed; vectors in the units of the data; classes as integers.
        """

    @abstractmethod
    def q(self, state: State, action: Tensors | Tensor) -> Tensor:
        """Predicted discounted return of taking ``action`` in ``state`` and following the policy, in units of
        :attr:`reward_scale`. (B,)
        """

    @abstractmethod
    def gamma(self, task: Tensor | None) -> Tensor | float:
        """Discount of a step; of each row of a multi-task batch."""

    @abstractmethod
    def act(
        self,
        obs: Tensors,
        state: State | None = None,
        is_first: Tensor | None = None,
        mode: str = "eval",
        noise: Noise | None = None,
        planner: Planner | str | None = None,
        max_ms: float | None = None,
    ) -> tuple[Tensors, State]:
        """Action for each environment and the state to hand in with its next observation.

        Actions are (B, ...) by name, in the model's units: -1 and 1 are the bounds of the environment's,
        which numbers of DreamerV3's policy may pass, as the reference's do: clip them; classes count from 0.

        Args:
            obs: (B, ...) by name.
            state: what the call before gave; None where all rows begin an episode.
            is_first: rows that begin one while others go on.                                   (B,) bool
            mode: ``train`` explores, ``eval`` acts as the reference's evaluations do, ``greedy`` takes the
                most likely action where DreamerV3's policy samples even in those.
            planner: another than the model's own, an object or a name, see :mod:`lit_wm.planners`.
            max_ms: time for planning, in milliseconds; the best plan so far is taken. No iteration begins
                that would pass it if it took as long as the longest so far, but one is always done; a planner
                whose first one passes it warns, once. Filtering ``obs`` comes before and is not counted.

        Raises:
            ConfigError: ``planner`` or ``max_ms`` is none, or ``state`` holds a plan of another horizon.
            ValueError: another ``mode``; or ``obs``, ``state`` and ``is_first`` are not of one batch.
        """

    @abstractmethod
    def latent_specs(self) -> dict[str, Spec]:
        """Entries of a state as the replay stores them; empty for models that need none."""

    # --- Planning -----------------------------------------------------------------------------------

    @cached_property
    def action_dim(self) -> int:
        """Flat size A of an action."""
        return sum(spec.size for spec in self.spaces.action.values())

    @cached_property
    def discrete(self) -> bool:
        """Whether actions are one discrete choice, for planners a one-hot vector.

        Raises:
            ConfigError: they are neither that nor vectors between bounds.
        """
        action = self.spaces.action
        if self.spaces.unbounded:
            raise ConfigError(
                "TD-MPC2 and planners search actions between bounds; "
                f"{', '.join(self.spaces.unbounded)} has none\nGive the environment a finite Box as action "
                "space, e.g. by gymnasium's ClipAction wrapper, or let DreamerV3's policy act "
                "(model.planner: policy)"
            )
        discrete = [k for k, s in action.items() if s.is_discrete]
        if discrete and (len(action) > 1 or action[discrete[0]].shape):
            raise ConfigError(
                "TD-MPC2 and planners act by vectors or by one discrete choice, not by "
                f"{sorted(action)} with discrete {discrete}\nDreamerV3's policy can (model.planner: policy)"
            )
        return bool(discrete)

    def planner_of(self, name: str, options: dict[str, Any] | None = None) -> Planner | None:
        """A planner by name; None for ``policy``.

        Raises:
            ConfigError: unknown name or option, or actions that it cannot search.
        """
        if name == "policy":
            return None
        planner = make_planner(name, self.planner_defaults | (options or {}))
        if self.discrete and name == "gradient":
            raise ConfigError("model.planner: gradient needs continuous actions\nUse mppi, cem or random")
        return planner

    @property
    def planner_defaults(self) -> dict[str, Any]:
        """Options of a planner that differ from its own defaults."""
        return {}

    def search(
        self,
        now: State,
        before: State | None,
        is_first: Tensor | None,
        mode: str,
        noise: Noise,
        planner: Planner | str | None,
        max_ms: float | None,
    ) -> tuple[Tensor, Tensor | None] | None:
        """Flat action (B, A) and plan (B, H, A) at ``now``, starting from the plan of the state ``before``;
        None: the policy is to act. Arguments as those of :meth:`act`.
        """
        if mode not in MODES:
            raise ValueError(f"mode is {mode!r}; expected one of {', '.join(MODES)}")
        if isinstance(planner, str):
            planner = self.planner_of(planner)
        elif planner is None:
            planner = self.planner
        elif not isinstance(planner, Planner):
            raise ConfigError(
                f"planner is {planner!r}; expected a name or an object, such as 'cem' or CEM(horizon=5)"
            )
        if planner is None:
            check_budget(max_ms)
            return None
        plan = None if before is None else before.plan
        first = self.begins(is_first, None if plan is None else before, len(now.deter))
        done = planner.plan(self, now, plan, first, mode == "train", noise, max_ms)  # type: ignore[arg-type]
        return done.action, done.mean

    def action_keys(self, flat: Tensor) -> Tensors:
        """What the environment takes, from flat actions (..., A); entries beyond its own are left out."""
        specs = self.spaces.action
        if self.discrete:
            return {k: flat.argmax(-1) for k in specs}
        keys = sorted(specs)
        parts = flat[..., : sum(specs[k].size for k in keys)].split([specs[k].size for k in keys], -1)
        split = {k: p.reshape(*p.shape[:-1], *specs[k].shape) for k, p in zip(keys, parts, strict=True)}
        return {k: split[k] for k in specs}

    # --- Inputs -------------------------------------------------------------------------------------

    def begins(self, is_first: Any, state: State | None, batch: int) -> Tensor:
        """Which rows begin an episode; without a state all. (B,) bool

        Args:
            is_first: (B,) bools, a tensor, an array or a list; None = none of them.
            state: what the rows come from.
            batch: B, of the observations.

        Raises:
            ValueError: for another number of rows, or no bools.
        """
        if state is not None and len(state.deter) != batch:
            raise ValueError(
                f"the state is of {len(state.deter)} rows, deter {tuple(state.deter.shape)}, and there are "
                f"{batch} observations; expected a state for each"
            )
        first = torch.full((batch,), state is None, device=self.device)
        if is_first is None:
            return first
        given = _tensor(is_first, "is_first")
        if given.dtype != torch.bool or given.shape != first.shape:
            raise ValueError(
                f"is_first is {given.dtype} {tuple(given.shape)}; expected bools ({batch},), one for each "
                "observation"
            )
        return first if state is None else given.to(self.device)

    def action_dict(
        self, actions: Any, batch: int, steps: bool = False, horizon: int | None = None, unknown: bool = False
    ) -> Tensors:
        """Actions for the networks, checked; a bare tensor or array stands for the only key.

        Args:
            actions: (B, *shape) or (B, H, *shape) with ``steps``, by key. Classes are integers or floats with
                one more axis, a number for each class, of which the largest counts.
            batch: B.
            horizon: the H that is asked for besides; None = any.
            unknown: whether -1 may stand for a class that nobody knows.

        Raises:
            ValueError: for other keys, shapes or classes.
        """
        actions, found = _named(actions, self.spaces.action, "action"), {}
        if actions.keys() != self.spaces.action.keys():
            raise ValueError(f"action keys are {sorted(actions)}, expected {sorted(self.spaces.action)}")
        for k, spec in self.spaces.action.items():
            value = _tensor(actions[k], f"action {k!r}").to(self.device)
            kind, given = value.dtype, tuple(value.shape)
            if spec.classes and kind.is_floating_point and given[1 + steps :] == (*spec.shape, spec.classes):
                value = value.argmax(-1)
            lead, fits = value.shape[: 1 + steps], value.shape[1 + steps :] == spec.shape
            fits = fits and len(lead) == 1 + steps and lead[0] == batch and 0 not in lead[1:]
            if spec.classes and fits:
                known = (value >= -unknown) & (value < spec.classes)
                fits = not value.is_floating_point() and bool(known.all())
            if not fits:
                shape = ", ".join(map(str, [batch, *["steps"] * steps, *spec.shape]))
                what = f"({shape}{',' * (not steps and not spec.shape)})"
                if spec.classes:
                    each = f"({shape}, {spec.classes})"
                    what = (
                        f"integers 0 ... {spec.classes - 1} {what}, or floats {each}, a number for each class"
                    )
                raise ValueError(f"action {k!r} is {kind} {given}; expected {what}; the batch comes "
                                 f"first{', then one step or more' * steps}")  # fmt: skip
            if horizon is not None and lead[1] != horizon:
                raise ValueError(
                    f"horizon is {horizon}, but action {k!r} has {lead[1]} steps; expected one of them alone"
                )
            found[k] = value.long() if spec.is_discrete else value.float()
        return found

    def obs_dict(self, obs: Any) -> Tensors:
        """Observations for the networks, checked; a bare tensor or array stands for the only key."""
        obs = _named(obs, self.spaces.obs, "observation")
        missing = self.spaces.obs.keys() - obs.keys()
        if missing:
            raise ValueError(f"observation keys {sorted(missing)} are missing; got {sorted(obs)}")
        obs = {k: _tensor(obs[k], f"observation {k!r}") for k in self.spaces.obs}
        for k, spec in self.spaces.obs.items():
            if spec.is_image and obs[k].ndim > 2 and (*obs[k].shape[-2:], 1) == spec.shape:
                obs[k] = obs[k].unsqueeze(-1)  # as a space without the axis of its only channel has them
            shape = tuple(obs[k].shape[obs[k].ndim - len(spec.shape) :])
            if shape != spec.shape or obs[k].ndim == len(spec.shape):
                expected = ", ".join(map(str, ("batch", *spec.shape)))
                raise ValueError(f"observation {k!r} has shape {tuple(obs[k].shape)}; expected ({expected})")
            if spec.is_image and obs[k].dtype != torch.uint8:
                raise ValueError(
                    f"observation {k!r} is {obs[k].dtype}; expected an image of uint8, 0 ... 255"
                )
            # Asked on the host alone: a GPU would have to be waited for.
            if spec.dtype == "float32" and obs[k].device.type == "cpu" and not obs[k].isfinite().all():
                warnings.warn(
                    f"observation {k!r} has NaN or infinite values: an action or state made of them means "
                    "nothing\n  Check before: np.isfinite(obs).all()", stacklevel=2
                )  # fmt: skip
            if n := spec.classes:
                real = obs[k].is_floating_point()
                if real or ((obs[k] < 0) | (obs[k] >= n)).any():
                    found = obs[k].dtype if real else f"{int(obs[k].min())} to {int(obs[k].max())}"
                    raise ValueError(
                        f"observation {k!r} is {found}; expected classes, integers 0 ... {n - 1}\n"
                        "Subtract the start of a space that counts from elsewhere, as Discrete(3, start=5)"
                    )
        return self.normalized({k: v.to(self.device) for k, v in obs.items()})

    def normalized(self, obs: Tensors) -> Tensors:
        """Observations as the networks see them. (..., *shape) each"""
        return obs if self.normalizer is None else self.normalizer(obs)

    def __repr__(self) -> str:
        parts = {n: sum(p.numel() for p in m.parameters()) for n, m in self.named_children()}
        lines = [f"  {n:<10}{c:>14,}" for n, c in parts.items() if c]
        return "\n".join(
            [f"{type(self).__name__}(", *lines, f"  {'total':<10}{sum(parts.values()):>14,}", ")"]
        )


def _tensor(value: Any, what: str) -> Tensor:
    try:
        value = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is no tensor or array of numbers: {error}") from None
    return value.float() if value.dtype == torch.float64 else value


def _named(value: Any, specs: Mapping[str, Spec], what: str) -> dict[str, Any]:
    """Entries by name; what has no names stands for the only one."""
    if isinstance(value, Mapping):
        return dict(value)
    if len(specs) != 1:
        raise ValueError(f"this model has the {what} keys {sorted(specs)}: pass a dict of tensors")
    return {next(iter(specs)): value}
