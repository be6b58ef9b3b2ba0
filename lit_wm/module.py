"""What the Lightning modules of all world models share: counting, synchronising, stepping, logging. No
losses.
"""

from __future__ import annotations

import inspect
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, Self, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor

from lit_wm import __version__
from lit_wm.errors import CheckpointError, ConfigError, nearest
from lit_wm.heldout import foresee
from lit_wm.noise import Noise, NoiseStreams
from lit_wm.pretrained import LoadReport, read_weights
from lit_wm.tasks import open_tasks
from lit_wm.types import Batch, Spaces, Spec, State, Tensors, Trajectory
from lit_wm.world_model import WorldModel


@dataclass(frozen=True)
class Pretraining:
    """How many updates train the world model alone, and how many then clone recorded actions beside it."""

    world_model: int = 0
    actor: int = 0
    cloning: bool = False  # whether the actor ever imitates: it goes on to where there are no rewards

    @classmethod
    def of(
        cls, given: Mapping[str, int] | None, groups: Mapping[str, bool], cloning: bool = False
    ) -> Pretraining:
        """Check ``model.pretrain``.

        Args:
            given: the option.
            groups: whether world_model, actor and critic learn.
            cloning: whether the actor's loss has a part that imitates.

        Raises:
            ConfigError: for other entries, negative counts, or a world model or cloned actor that is frozen.
        """
        given = given or {}
        if not isinstance(given, Mapping) or given.keys() - {"world_model", "actor"}:
            raise ConfigError(
                f"model.pretrain is {given!r}; expected {{world_model: n, actor: m}} in updates"
            )
        for name, count in given.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 0:
                raise ConfigError(
                    f"model.pretrain.{name} is {count!r}; expected a whole number of updates, e.g. "
                    "model.pretrain: {world_model: 10000}"
                )
        if any(given.values()) and not groups["world_model"]:
            raise ConfigError("model.pretrain trains the world model, which train_world_model: false freezes")
        if given.get("actor") and not groups["actor"]:
            raise ConfigError(
                "model.pretrain.actor clones actions, but train_actor: false or freeze keeps the actor\n"
                "Leave one of them out, or count these updates as pretrain.world_model"
            )
        return cls(**given, cloning=cloning or given.get("actor", 0) > 0)

    @property
    def updates(self) -> int:
        """All of them."""
        return self.world_model + self.actor


class WorldModelModule(pl.LightningModule):
    """Base of the modules. A sub-class sets ``model``, ``trained`` (by optimizer) and ``groups``, and writes
    ``training_step``.

    Counters: ``updates`` counts gradient steps and equals ``trainer.global_step``; environment steps belong
    to the data module. Metrics stay on the device and reach the loggers every ``log_every`` updates, at
    environment steps; of several processes those of the first.
    """

    model: WorldModel
    trained: dict[str, bool]
    grad_clip: float | None = None  # largest norm of all gradients together
    groups: dict[str, bool]  # whether world_model, actor and critic learn
    pretraining = Pretraining()
    world_model_only = False  # the data have no rewards, as the data module says
    of_rewards: tuple[str, ...] = ()  # losses that rows without rewards have no part in
    optimizer_states: list[dict[str, Any]] | None = None  # what lit_wm.training.train goes on from

    def __init__(self, log_every: int = 100, seed: int = 0):
        super().__init__()
        if log_every < 1:
            raise ConfigError(f"model.log_every is {log_every}; expected 1 update or more between two lines")
        self.automatic_optimization = False
        self.log_every, self.seed = log_every, seed
        self.register_buffer("updates_done", torch.zeros((), dtype=torch.int64))
        self.updates = 0  # host mirror of updates_done: reading the buffer would synchronise with the device
        self.noise = NoiseStreams(seed)
        self.load_report: LoadReport | None = None  # what became of the weights that it began with
        self._restored = False  # whether the weights are those of a run that is under way
        self.latest: dict[str, float] = {}  # last metrics, for the progress bar and callbacks
        self.held_out: dict[str, float] = {}  # those of the last validation, which was at update held_out_at
        self.held_out_at = 0
        self._sums: dict[str, Tensor] = {}
        self._count = 0

    updates_done: Tensor

    @classmethod
    def from_pretrained(
        cls, path: str | Path, spaces: Spaces | Mapping[str, Any] | None = None, **overrides: Any
    ) -> Self:
        """A module with the arguments and the weights of a checkpoint, for a new run.

        Weights are taken where name, shape and meaning fit; the rest, such as first layers and heads of other
        spaces and the outputs of rewards and values in other units, begins fresh, the same in every call, see
        :attr:`load_report`. Counters and optimisers begin anew, phases of pretraining are over. Statistics of
        observations are kept if the observations are the same; the only one may have another name.

        Args:
            path: the file, whole or exported, or a run directory.
            spaces: observations and actions; those of the checkpoint by default.
            overrides: arguments of the module instead of the checkpoint's; ``task_like`` as there.

        Raises:
            CheckpointError: the file is none, or of another model.
            ConfigError: for an argument that the module does not have.
        """
        found, known = read_weights(path), inspect.signature(cls).parameters
        if wrong := sorted(overrides.keys() - known.keys()):
            raise ConfigError(f"{cls.__name__} has no argument {wrong[0]!r}{nearest(wrong[0], list(known))}")
        if not found.hparams or (other := sorted(found.hparams.keys() - known.keys())):
            kind = str(found.about.get("class_path", "another model")).rpartition(".")[2]
            what = f"a checkpoint of {kind}, with {other[0]}" if found.hparams else "without arguments"
            raise CheckpointError(
                f"{path} is {what}: {cls.__name__} cannot be built from it\n"
                "Use a checkpoint of the same model and version"
            )
        once = {k: None for k in ("start_from", "task_like", "pretrain") if k in known}
        options = {**found.hparams, **once, "start_partial": False, **overrides}
        like = options.pop("task_like", None)
        if spaces is not None:
            options["spaces"] = spaces.to_plain() if isinstance(spaces, Spaces) else dict(spaces)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.get("seed", 0))
            module = cls(**options)
        module.load_report = module.model.load_weights(found, like, partial=True)
        half = str(found.about.get("precision", "")).startswith("bf16")
        module.model.compute_dtype = torch.bfloat16 if half else torch.float32
        return module

    def _begin(self) -> None:
        """Begin a new run with the weights of ``start_from``."""
        learning = self.learning()
        clones = learning["actor"] and not self.groups["critic"]
        if self.world_model_only and not learning["world_model"] and not clones:
            raise ConfigError(
                "the data have no rewards for a critic, and train_world_model: false or model.freeze keeps "
                "the world model\nTrain the world model, use data with rewards or, with train_critic: "
                "false, clone actions alone"
            )
        start, like, partial = map(self.hparams.get, ("start_from", "task_like", "start_partial"))
        if not start and (partial or like):
            raise ConfigError(
                f"model.{'start_partial' if partial else 'task_like'} needs model.start_from, a checkpoint"
            )
        if start and not self._restored:
            self.load_report = self.model.load_weights(start, like, bool(partial))
        if self.load_report and not self._restored and self.trainer.is_global_zero:
            print(self.load_report, file=sys.stderr)
            fixed = [n for n, p in self.model.named_parameters() if not p.requires_grad]
            slow = f"{self.model.slow_part}."
            if lost := [n for n in self.load_report.fresh if n in fixed and not n.startswith(slow)]:
                shown = f"{', '.join(lost[:4])}{f' ... and {len(lost) - 4} more' * (len(lost) > 4)}"
                warnings.warn(
                    f"frozen but not loaded: {shown}; these weights are random and stay so\n  Train them "
                    "too (model.freeze, train_world_model, train_actor, train_critic), or begin with a "
                    "checkpoint that has them.", stacklevel=2
                )  # fmt: skip
        self._restored = True
        first, end = self.pretraining, 0 if self._trainer is None else self._trainer.max_steps
        if 0 < end <= first.updates and not self.world_model_only and self.global_rank == 0:
            idle = "actor and critic never learn" if end <= first.world_model else "the critic never learns"
            warnings.warn(
                f"{idle}: the training ends after {end:,} updates, and model.pretrain has {first.updates:,}\n"
                "  Raise trainer.max_steps (total_steps of train) or lower model.pretrain.", stacklevel=2
            )  # fmt: skip
        if self.model.normalizer is not None and not self.model.normalizer.fitted:
            raise ConfigError(
                "model.normalize needs data.sources without pad, whose training rows it is fitted to\n"
                "Leave it out, or begin with a checkpoint that was fitted"
            )

    def freeze_parts(self, freeze: Sequence[str] | str | None, **train: bool) -> dict[str, bool]:
        """Give gradients to the parts of the model that are trained, and to no others.

        What has no gradient never changes: the optimizers list it, keep no state of it, and pass over it.

        Args:
            freeze: names of sub-modules of the model.
            train: ``world_model``, ``actor``, ``critic``: False freezes all of its parts.

        Returns:
            Which of the three still have anything to train.

        Raises:
            ConfigError: for an unknown name, or if nothing is left.
        """
        names, parts = [freeze] if isinstance(freeze, str) else freeze or [], self.model.parts()
        known = [name for group in parts.values() for name in group]
        if wrong := [name for name in names if name not in known]:
            raise ConfigError(
                f"model.freeze: {wrong[0]!r} is no part of {type(self.model).__name__}"
                f"{nearest(wrong[0], known)}\nIts parts: {', '.join(known)}"
            )
        for group, own in parts.items():
            for name in own:
                self.model.get_submodule(name).requires_grad_(train[group] and name not in names)
        left = {group: train[group] and not set(own) <= set(names) for group, own in parts.items()}
        if not any(left.values()):
            raise ConfigError(
                "train_world_model, train_actor and train_critic are all false, or model.freeze has what is "
                "left: nothing would be trained"
            )
        return left

    # --- One update --------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """What the next update trains: ``world_model`` alone, the ``actor`` beside it by cloning, or all
        (``joint``). Without rewards there is no joint one.
        """
        first = self.pretraining
        if self.updates < first.world_model or (self.world_model_only and not first.cloning):
            return "world_model"
        return "actor" if self.updates < first.updates or self.world_model_only else "joint"

    def learning(self) -> dict[str, bool]:
        """Which of world_model, actor and critic the next update trains."""
        now = {"world_model": ("world_model",), "actor": ("world_model", "actor")}.get(self.phase)
        return {k: on and (now is None or k in now) for k, on in self.groups.items()}

    def draw(self, batch: Any) -> Batch:
        """The batch itself, or what its ticket draws: collecting first, if the train ratio owes environment
        steps.
        """
        return batch if isinstance(batch, Batch) else cast(Batch, batch(self))

    def optimise(self, loss: Tensor, *names: str) -> Tensor:
        """One backward pass, then the optimizers ``names`` (all, without names) step as one joint optimizer.

        The first trained optimizer advances ``trainer.global_step``, the others do not. Gradients of other
        parameters stay.

        Returns:
            Norm of all gradients together, before ``grad_clip``.
        """
        optimizers = cast(list[LightningOptimizer], self.optimizers())
        loss.backward()
        trained = {n: opt for (n, on), opt in zip(self.trained.items(), optimizers, strict=True) if on}
        live = {n: opt for n, opt in trained.items() if n in (names or trained)}
        grads = []
        for opt in live.values():
            sync_gradients(opt.optimizer)
            grads += [p.grad for g in opt.param_groups for p in g["params"] if p.grad is not None]
        norm = torch.stack(torch._foreach_norm(grads)).square().sum().sqrt()
        if self.grad_clip is not None:
            torch._foreach_mul_(grads, (self.grad_clip / (norm + 1e-6)).clamp(max=1.0))
        for name, opt in live.items():
            with nullcontext() if name == next(iter(trained)) else uncounted(opt):
                opt.step()
            opt.zero_grad(set_to_none=True)
        return norm

    def finish_update(self, metrics: Tensors) -> None:
        """Count the update and add up its metrics."""
        self.updates += 1
        self.updates_done += 1
        if self._sums.keys() != metrics.keys() and self._sums:  # another phase
            self.log_metrics(self.pop_metrics())
        if not self._sums:
            self._sums = {k: v.detach().float().clone() for k, v in metrics.items()}
        else:
            torch._foreach_add_(list(self._sums.values()), [metrics[k].detach().float() for k in self._sums])
        self._count += 1
        if self.updates % self.log_every == 0:
            self.log_metrics(self.pop_metrics())

    def pop_metrics(self) -> dict[str, float]:
        """Means of the training metrics since the last call; one read of the device."""
        if not self._sums:
            return {}
        values = (torch.stack(list(self._sums.values())) / self._count).tolist()
        result = {f"train/{k}": v for k, v in zip(self._sums, values, strict=True)}
        self._sums, self._count = {}, 0
        for name in [k.removesuffix("/rows") for k in result if k.endswith("/rows")]:
            rows = result.pop(f"{name}/rows")
            mine = [k for k in result if k.startswith(f"{name}/loss/")]
            result |= {k: result[k] / rows for k in mine} if rows else {}
            result = result if rows else {k: v for k, v in result.items() if k not in mine}
        return result

    def by_source(self, batch: Batch, rows: Tensors) -> Tensors:
        """Losses of the rows of a batch, (B, ...) by name, added up by the source that the rows are of."""
        data = getattr(self._trainer, "datamodule", None)
        names, rewarded = getattr(getattr(data, "replay", None), "names", []), getattr(data, "rewarded", None)
        if batch.source is None or len(names) < 2:
            return {}
        sums: Tensors = {}
        for number, name in enumerate(names):
            here = (batch.source == number).float()
            sums[f"{name}/rows"] = here.sum()
            sums |= {
                f"{name}/loss/{k}": (here * v.detach().reshape(len(v), -1).mean(1)).sum()
                for k, v in rows.items()
                if (k not in self.of_rewards or rewarded is None or rewarded[number])
                and (name, k) != ("env", "bc")  # the model's own actions are not cloned
            }
        return sums

    def log_metrics(self, metrics: dict[str, float]) -> None:
        """Hand scalars to every logger at the current :attr:`axis`, as an exact integer."""
        metrics = metrics | {"step/env": self.env_steps, "step/grad": self.updates}
        data = getattr(self.trainer, "datamodule", None)
        if data is not None and hasattr(data, "pop_metrics"):
            metrics |= data.pop_metrics()
        self.latest |= metrics
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(metrics, step=self.axis)

    @property
    def env_steps(self) -> int:
        """Environment steps of all processes; 0 without a data module that counts them."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        return int(getattr(data, "env_steps", 0))

    @property
    def axis(self) -> int:
        """What curves are drawn over: environment steps; updates where no environment is collected from."""
        data = getattr(self._trainer, "datamodule", None) if self._trainer is not None else None
        offline = getattr(data, "env", "") is None or getattr(data, "offline_updates", None)
        return int(self.updates) if offline else self.env_steps

    # --- Lightning hooks ---------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Take the compute dtype from the Trainer and give every process its own noise."""
        self._take_precision()
        if getattr(self.trainer, "datamodule", None) is None:
            self.world_model_only = False  # whatever the data of an earlier fit were
        # A second fit goes on with the streams of the first.
        if not self.noise.used or self.noise.rank != self.trainer.global_rank:
            self.noise = NoiseStreams(self.seed, self.trainer.global_rank, self.device)
            self.model.noise = self.noise

    def _take_precision(self) -> None:
        precision = str(self.trainer.precision)
        if precision not in ("32-true", "bf16-mixed"):
            raise ConfigError(
                f"trainer.precision is {precision!r}; expected '32-true' or 'bf16-mixed'. float16 needs "
                "a loss scaler, which gives wrong gradients with several optimizers"
            )
        self.model.compute_dtype = torch.bfloat16 if precision == "bf16-mixed" else torch.float32

    def on_fit_start(self) -> None:
        """Move the noise to the device once that is known; streams of another device begin anew. A new run
        then takes the weights that it begins with: a run that goes on has its own by now.
        """
        if self.noise.device != self.device:
            self.noise = NoiseStreams(self.seed, self.trainer.global_rank, self.device)
            self.model.noise = self.noise
        self._begin()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Stop when the budget of environment steps is used up."""
        if getattr(getattr(self.trainer, "datamodule", None), "exhausted", False):
            self.trainer.should_stop = True

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses on windows of held-out episodes, if any, and how well the first process foresees whole ones;
        ``Evaluate`` plays the episodes.

        Args:
            batch: a ticket that draws the same windows each time, or anything else for none.
        """
        if not callable(batch):
            return
        whole = getattr(getattr(self.trainer, "datamodule", None), "held_out_episodes", None)
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            losses = self.held_out_losses(self.draw(batch), NoiseStreams(self.seed, 0, self.device))
            metrics = {f"val/loss/{name}": float(loss) for name, loss in losses.items()}
            if whole is not None and self.trainer.is_global_zero:
                found = foresee(self.model, whole(self), NoiseStreams(self.seed, 0, self.device))
                metrics |= {f"val/{name}": value for name, value in found.items()}
        metrics = self.trainer.strategy.broadcast(metrics)
        self.held_out, self.held_out_at = metrics, int(self.updates)
        self.log_dict(metrics, logger=False, batch_size=1)  # for checkpoint.monitor; loggers want other steps
        for logger in self.trainer.loggers:
            logger.log_metrics(metrics, step=self.axis)

    def held_out_losses(self, batch: Batch, noise: Noise) -> Tensors:
        """Mean losses on a batch that is not trained on, by name; none unless the model says some."""
        return {}

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, as in :meth:`validation_step`."""

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing, as in :meth:`validation_step`."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What a lone file needs to be used: class, environment and precision, in plain values."""
        trainer, kind = self._trainer, type(self)  # none, if a file of others has been converted
        data = getattr(trainer, "datamodule", None)
        env = getattr(data, "evaluation_env", getattr(data, "env", None))
        options: dict[str, Any] | None = getattr(data, "evaluation_options", None) or {}
        try:
            options = json.loads(json.dumps(options))
        except (TypeError, ValueError):  # objects, which would keep the file from loading with weights_only
            options = None
        reference = getattr(data, "reference", None)
        checkpoint["lit_wm"] = {
            "version": __version__,
            "class_path": f"{kind.__module__}.{kind.__qualname__}",
            "env": env if options is not None else None,
            "env_options": options,
            "reference": None if reference is None else reference._asdict(),
            "tasks": getattr(data, "eval_tasks", {}) if open_tasks(self.model) else {},
            "precision": "32-true" if trainer is None else str(trainer.precision),
            "updates": self.updates,
            "env_steps": self.env_steps,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the host's copy of the update counter; fit refuses a file without optimizers."""
        fitting = self._trainer is not None and self.trainer.state.fn == "fit"
        if fitting and "optimizer_states" not in checkpoint:
            raise CheckpointError(
                "this checkpoint holds the model alone, without optimizers: fit cannot go on from it\n"
                "It is for evaluate, test, validate and predict; go on from the run that it was exported from"
            )
        self.updates, self._restored = int(checkpoint["state_dict"]["updates_done"]), True

    # --- State of this process ---------------------------------------------------------------------

    def rank_state_dict(self) -> dict[str, Any]:
        """What differs between processes: the noise streams and the metrics not logged yet."""
        sums = {k: v.cpu() for k, v in self._sums.items()}
        return {"noise": self.noise.state_dict(), "metrics": {"sums": sums, "count": self._count}}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`rank_state_dict`."""
        self.noise.load_state_dict(state["noise"])
        self._sums = {k: v.to(self.device) for k, v in state["metrics"]["sums"].items()}
        self._count = int(state["metrics"]["count"])

    # --- Verbs: without autograd, see give_verbs; those of ``model`` are differentiable ---------------

    encode: Callable[..., State]
    imagine: Callable[..., Trajectory]
    decode: Callable[..., Tensors]
    q: Callable[..., Tensor]
    act: Callable[..., tuple[Tensors, State]]

    def latent_specs(self) -> dict[str, Spec]:
        """Entries of a latent state as the replay stores them; empty for a model that needs none."""
        if self._trainer is not None:  # the data module is set up, and asks, before this module
            self._take_precision()
        return self.model.latent_specs()

    @torch.inference_mode()
    def policy(
        self,
        obs: Tensors,
        state: State | None = None,
        is_first: Tensor | None = None,
        mode: str = "train",
        noise: Any = None,
        task: int | None = None,
    ) -> tuple[Tensors, State]:
        """``act`` as collectors and evaluators call it: no autograd, no autocast, any device in, actions on
        the CPU. ``task`` is the number of the one of several that is played.
        """
        rows = len(next(iter(obs.values())))
        more: dict[str, Any] = {} if task is None else {"task": torch.full((rows,), task, device=self.device)}
        with torch.autocast(self.device.type, enabled=False):
            action, state = self.model.act(obs, state, is_first, mode, noise, **more)
        return {k: v.cpu() for k, v in action.items()}, state


def give_verbs(module: type[WorldModelModule], model: type[WorldModel]) -> None:
    """Give a module the verbs of its model, with their arguments and words, but without autograd."""
    for name in ("encode", "imagine", "decode", "q", "act"):
        setattr(module, name, _verb(getattr(model, name), inspect.getdoc(getattr(WorldModel, name))))


def _verb(own: Any, words: str | None) -> Any:
    place = [*inspect.signature(own).parameters].index("state")

    @wraps(own)
    @torch.no_grad()
    def verb(self: WorldModelModule, *args: Any, **kwargs: Any) -> Any:
        state = args[place - 1] if len(args) >= place else kwargs.get("state")
        if not isinstance(state, State) and (place == 1 or state is not None):
            raise TypeError(
                f"{own.__name__} takes a state, as encode and act give it, or trajectory.states[-1] of "
                f"imagine; this is a {type(state).__name__}"
            )
        return getattr(self.model, own.__name__)(*args, **kwargs)

    verb.__doc__ = f"{words}\n\nOf {own.__qualname__}: {inspect.getdoc(own)}"
    return verb


def arguments_of(module: type, given: Mapping[str, Any], exact: bool = True) -> dict[str, Any]:
    """Every argument of a module but ``spaces``: what is ``given``, else its default.

    Raises:
        TypeError: for a name that it does not have, if ``exact``.
    """
    known = inspect.signature(module).parameters
    if exact and (unknown := given.keys() - known.keys()):
        raise TypeError(f"{module.__name__} has no argument {', '.join(sorted(unknown))}")
    return {k: given.get(k, p.default) for k, p in known.items() if k != "spaces"}


@contextmanager
def uncounted(opt: LightningOptimizer) -> Iterator[None]:
    """Steps of ``opt`` in here leave ``trainer.global_step`` alone.

    Lightning counts through two hooks that it installs on the optimizers anew for every batch, so they are
    replaced for the time of the step only.
    """
    before, after = opt._on_before_step, opt._on_after_step
    opt._on_before_step = opt._on_after_step = lambda: None
    try:
        yield
    finally:
        opt._on_before_step, opt._on_after_step = before, after


def sync_gradients(opt: torch.optim.Optimizer) -> None:
    """Average the gradients of all processes in one flat all-reduce; nothing to do on one.

    DDP would synchronise only inside its own backward hooks, which manual optimisation with a plain backward
    bypasses.
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return
    params = [p for g in opt.param_groups for p in g["params"] if p.requires_grad]
    # All parameters, not those with a gradient: the ranks must agree on the length.
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, grad in zip(params, flat.split([p.numel() for p in params]), strict=True):
        p.grad = grad.view_as(p)
