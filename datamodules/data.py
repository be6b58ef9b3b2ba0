"""Experience for a Lightning Trainer, from environments, datasets or both: replay and batches in one module.

Lightning fetches a batch ahead, even before training starts. So the loader yields *tickets* instead: the
module calls its ticket inside ``training_step``, and only then are steps collected and a batch drawn.
Resuming is exact because of this.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from itertools import repeat, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules.selection import SourceSpec, common_spaces, model_spaces, select_episodes, vectors
from datamodules.sources import parse_uri
from datamodules.views import dreamer_view, tdmpc2_view, to_latents
from lit_wm.envs import make_vector_env, read_env, read_spaces, suite_defaults
from lit_wm.errors import CheckpointError, ConfigError, DataError, LitWMError, nearest
from lit_wm.scores import Reference, reference_of
from lit_wm.tasks import TASK_SETS, Task, misfit, task_list
from lit_wm.types import Batch, Spaces, Spec, State

if TYPE_CHECKING:
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    from datamodules.cache import Cache
    from datamodules.collect import Collector
    from datamodules.mixture import Mixture, Prefetch
    from datamodules.replay import RowReplay
    from datamodules.rows import Key

Ticket = Callable[[Any], Batch]


class TrainRatio:
    """How many updates are owed, in whole numbers: ``first`` once the replay is ready, then ``first +
    floor((steps - steps_when_ready) * per_step)`` in all.
    """

    def __init__(self, per_step: Fraction, first: int = 1):
        self.per_step, self.first = per_step, first
        self.ready_at: int | None = None  # steps when the replay became ready
        self.done = 0  # updates served

    def owed(self, steps: int) -> int:
        """Updates owed and not yet served."""
        if self.ready_at is None:
            return 0
        later = (steps - self.ready_at) * self.per_step.numerator // self.per_step.denominator
        return self.first + later - self.done


class ReplayDataModule(LightningDataModule):
    """Hands out batches of experience: of environments, collected while training, of datasets, or of both.

    Several processes share the work: each owns ``num_envs``, ``batch_size`` and ``capacity`` divided by their
    number.

    Args:
        env: any Gymnasium id, ``atari:GAME`` or ``atari100k:GAME``; null trains on ``sources`` alone.
        sources: datasets to train on: a URI such as ``minari:ID``, or a list of URIs or mappings, see
            :class:`~datamodules.selection.SourceSpec`; ``env:ID?num_envs=4`` among them is the environment.
            While none that is drawn has rewards the world model learns alone, beside it a cloned actor.
        env_weight: share of the batch that comes from the environment, beside the ``weight`` of each source;
            a list ``[[update, weight], ...]`` changes it linearly between updates, and those before the first
            step there count.
        mix: ``ratio`` gives every source its weight's share of each batch, on average exactly;
            ``proportional`` a share by the number of its windows.
        val_fraction: share of the episodes of each source that are held out from training.
        cache_dir: folder for the caches of sources; null for ``$LITWM_CACHE`` or ``~/.cache/lit_wm/rows``.
        pad: fill vectors of several sources up to the widest, for models of several tasks.
        stack: images of datasets put together when drawn; environments have an option ``stack``.
        uniform_over: with ``windows: episode`` draws are uniform over ``episodes``, then over the starts
            within, as officially; or over ``windows``.
        prefetch: batches drawn ahead by a thread where no environment writes; 0 for none.
        eval_env: environment of evaluation where ``env`` is null; of several tasks one each, ``{TASK: ENV}``.
            null for those that the sources were recorded in, if they can be made here.
        env_options: options of the environment, e.g. ``{repeat: 4}``.
        num_envs: environments over all processes.
        eval_envs: environments for evaluation over all processes.
        vectorization: ``sync`` steps the environments in this process, ``async`` in one process each.
        windows: ``stream`` draws sequences uniformly over all rows, across the ends of episodes, for Dreamer;
            ``episode`` draws them within finished episodes, uniformly over episodes, for TD-MPC2: the batch
            is that of :func:`~datamodules.views.tdmpc2_view`, ``batch_length`` is the horizon + 1, there are
            no latents, and ``online_queue`` and ``time_limit_is_terminal`` are not used.
        train_ratio: replayed steps per env step.
        utd: updates per decision (executed action), instead of ``train_ratio``; null: 1 within episodes.
        offline_updates: updates on ``sources`` alone before the first step in ``env``; null for those of
            ``model.pretrain``. With them curves are drawn over updates, not over env steps.
        first_updates: updates owed at once when training begins, as many as random decisions in TD-MPC2.
        batch_size: sequences per update over all processes.
        batch_length: steps T of a sequence, without context; at least 2, as a return needs a next step.
        replay_context: steps K before a sequence; with 1 or more it starts from a stored latent, with 0 from
            zeros. null is 1, and 0 with ``windows: episode``, where nothing else is possible.
        capacity: rows kept over all processes; one row per env step.
        prefill: env steps over all processes with random actions before training begins; decisions with
            ``windows: episode``, and on until the first episode has ended. With 0 the policy acts from the
            beginning.
        epsilon: probability of a uniformly random action at collection, in each environment and step.
        action_noise: deviation of Gaussian noise on continuous actions, in units of half their range.
        max_env_steps: env steps after which training is done; null for no end.
        online_queue: hand out every new step once before drawing uniformly.
        time_limit_is_terminal: whether the value after a time limit is zero; null as officially (in Atari).
        replay_dir: folder for the replay files; null for ``replay`` inside the run's folder.
        seed: seeds environments, random actions and draws.

    Raises:
        ConfigError: for a value that cannot work.
    """

    def __init__(
        self, env: str | None = None, env_options: dict[str, Any] | None = None, num_envs: int = 1,
        eval_envs: int = 1, vectorization: str = "sync", train_ratio: float = 32.0, batch_size: int = 16,
        batch_length: int = 64, replay_context: int | None = None, capacity: int = 5_000_000,
        prefill: int = 0, epsilon: float = 0.0, action_noise: float = 0.0, max_env_steps: int | None = None,
        online_queue: bool = True, time_limit_is_terminal: bool | None = None, replay_dir: str | None = None,
        seed: int = 0, windows: str = "stream", utd: float | None = None, first_updates: int = 1,
        offline_updates: int | None = None,
        sources: list[Any] | str | None = None, env_weight: float | list[list[float]] = 1.0,
        mix: str = "ratio", val_fraction: float = 0.0, cache_dir: str | None = None, pad: bool = False,
        stack: int = 1, uniform_over: str = "episodes", prefetch: int = 2,
        eval_env: str | dict[str, str] | None = None,
    ):  # fmt: skip
        super().__init__()
        self.env, self.env_options = env, dict(env_options or {})
        self.num_envs, self.eval_envs, self.vectorization = num_envs, eval_envs, vectorization
        self.train_ratio, self.batch_size, self.batch_length = train_ratio, batch_size, batch_length
        if utd is None and windows == "episode":
            utd = 1.0
        self.windows, self.utd, self.first_updates = windows, utd, first_updates
        self.offline_updates = offline_updates
        if replay_context is None:
            replay_context = 0 if windows == "episode" else 1
        self.replay_context, self.capacity, self.prefill = replay_context, capacity, prefill
        self.epsilon, self.action_noise = epsilon, action_noise
        self.max_env_steps, self.online_queue = max_env_steps, online_queue
        self.replay_dir, self.seed = replay_dir, seed
        self._time_limit_is_terminal = time_limit_is_terminal
        self.mix, self.val_fraction = mix, val_fraction
        self.sources, self.env_weight = list[SourceSpec](), SourceSpec("data.env_weight", env_weight)
        sources = [sources] if isinstance(sources, str) else sources
        if sources is not None and not isinstance(sources, list | tuple):
            raise ConfigError(f"data.sources is {sources!r}, expected a list: [{sources!r}].")
        for number, before in enumerate(sources or [], 1):
            rest = list(takewhile(_may_be_value, (sources or [])[number:]))
            if rest and isinstance(before, str) and "?" in before:
                raise ConfigError(
                    f"data.sources: {rest[0]!r} is no source; in a list a comma begins the next one.\n"
                    f"  Write the URI in quotes: --data.sources '[\"{','.join([before, *rest])}\"]'"
                )
        for source in map(SourceSpec.of, sources or []):
            if source.uri.startswith("env:"):
                self._take_env(source)
            else:
                self.sources.append(source)
        self.cache_dir, self.pad, self.stack = cache_dir, pad, stack
        self.uniform_over, self.prefetch, self.eval_env = uniform_over, prefetch, eval_env
        self._check()
        self.world_size = self.rank = 0  # known after setup
        self.replay: RowReplay | Mixture | None = None
        self.held_out: Mixture | None = None  # episodes that are not trained on
        self._ahead: Prefetch | None = None
        self._multitask = False  # whether the model wants to know the task of each row
        self._task: int | None = None  # that of the environment
        self.rewarded: Tensor | None = None  # which sources have rewards; None if all have
        self.collector: Collector | None = None
        self.ratio: TrainRatio | None = None
        # Env steps of the run that this one goes on from, where its collectors are not restored.
        self._steps_before = 0
        self._totals = [0, 0]  # env steps collected and updates owed, of all processes, as of the last ticket
        self._restored: dict[str, Any] = {}
        self._pending: Callable[[], None] | None = None
        self._bounds = dict[str, Any]()  # of actions of the environment that is played
        self._not_made = "The first one names none."  # why there is no evaluation_env

    def _take_env(self, source: SourceSpec) -> None:
        """``env:ID?option=value`` among the sources is another way to say ``env``."""
        _, name, options = parse_uri(source.uri)
        options |= source.options or {}
        plain = SourceSpec(source.uri, source.weight, options=source.options)
        if source != plain:
            raise ConfigError(f"{source.uri} is an environment: it has a uri, a weight and options, no more.")
        if self.env is not None:
            raise ConfigError(f"{source.uri} is a second environment beside {self.env}; expected one.")
        self.num_envs = options.pop("num_envs", self.num_envs)
        self.env, self.env_options, self.env_weight = name, {**self.env_options, **options}, source

    def _check(self) -> None:
        at_least = {
            "num_envs": 1, "eval_envs": 1, "batch_size": 1, "batch_length": 2,
            "replay_context": 0, "capacity": 1, "prefill": 0, "seed": 0, "first_updates": 1, "stack": 1,
            "prefetch": 0,
        }  # fmt: skip
        for name, low in at_least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"data.{name} is {value!r}, expected a whole number of {low} or more.")
        for name, fits, expected in (
            ("train_ratio", 0 < self.train_ratio < math.inf, "a number above 0"),
            ("utd", self.utd is None or 0 < self.utd < math.inf, "a number above 0"),
            ("epsilon", 0 <= self.epsilon <= 1, "a probability, 0 to 1"),
            ("action_noise", 0 <= self.action_noise < math.inf, "0 or more"),
            ("val_fraction", 0 <= self.val_fraction < 1, "0 or more, below 1"),
            ("vectorization", self.vectorization in ("sync", "async"), "'sync' or 'async'"),
            ("windows", self.windows in ("stream", "episode"), "'stream' or 'episode'"),
            ("mix", self.mix in ("ratio", "proportional"), "'ratio' or 'proportional'"),
            ("uniform_over", self.uniform_over in ("episodes", "windows"), "'episodes' or 'windows'"),
        ):
            if not fits:
                raise ConfigError(f"data.{name} is {getattr(self, name)!r}, expected {expected}.")
        offline = self.offline_updates
        if offline is not None and (type(offline) is not int or offline < 0):
            raise ConfigError(f"data.offline_updates is {offline!r}, expected a whole number of 0 or more.")
        if offline and (self.env is None or not self.sources):
            raise ConfigError(
                f"data.offline_updates is {offline:,}: updates on data.sources before data.env is stepped.\n"
                "  Give both, or leave it out and set trainer.max_steps."
            )
        if self.env is None and not self.sources:
            raise ConfigError("there is nothing to train on: give data.env, data.sources or both.")
        if self.within_episodes and self.replay_context:
            raise ConfigError(
                f"data.replay_context is {self.replay_context}, but data.windows: episode keeps no latents.\n"
                "  Leave replay_context out, or set it to 0."
            )
        if self.utd is not None and self.train_ratio != 32:  # the default, which older runs wrote down
            raise ConfigError(
                f"data.train_ratio is {self.train_ratio:g}, but data.utd, {self.utd:g}, counts the updates.\n"
                "  Leave train_ratio out; with windows: stream you may leave utd out instead."
            )
        if self.env is None:
            return
        # Each stream needs its first window, then one more row per window; in episodes one window will do.
        begin = 0 if self.within_episodes else self.batch_size * self.batch_length
        first = begin + self.num_envs * self.window
        if self.capacity < first:
            raise ConfigError(
                f"data.capacity is {self.capacity:,}, but training begins with "
                f"{begin or 1:,} windows of {self.window} rows in {self.num_envs} environments.\n"
                f"  Raise capacity to {first:,} or more, or lower batch_size, batch_length or num_envs."
            )
        first = max(first, self.prefill)
        if self.max_env_steps is not None and self.max_env_steps < first:
            raise ConfigError(
                f"data.max_env_steps is {self.max_env_steps:,}, but training begins after about {first:,}.\n"
                "  Raise max_env_steps, or lower prefill, batch_size, batch_length or num_envs."
            )

    @property
    def within_episodes(self) -> bool:
        """Whether windows lie within episodes."""
        return self.windows == "episode"

    @property
    def window(self) -> int:
        """Rows of a window, with those before the sequence."""
        return self.batch_length + (0 if self.within_episodes else max(self.replay_context, 1))

    @property
    def _drawn(self) -> dict[str, Any]:
        """How all replays draw."""
        rows, context = self.replay_context + self.batch_length, self.replay_context
        return {"window": rows, "context": context, "seed": self.seed, "by": self.uniform_over,
                "within_episodes": self.within_episodes}  # fmt: skip

    def row_bytes(self, latents: Mapping[str, Spec]) -> dict[str, int]:
        """Bytes of a replay row by the file that holds them: ``row`` for the small columns."""
        from datamodules.rows import row_files, row_specs

        return row_files(row_specs(Spaces.from_plain(self.spaces), latents))

    @cached_property
    def caches(self) -> list[Cache]:
        """The datasets, written as rows where that has not been done yet."""
        from datamodules.cache import ingest, lost_reward

        caches = [ingest(s.uri, self.cache_dir, s.on_bad, **(s.options or {})) for s in self.sources]
        for cache in caches:
            if sentence := lost_reward(cache.uri, cache.report, cache.episodes["return"]):
                warnings.warn(sentence, stacklevel=1)  # what calls this is functools
        return caches

    @cached_property
    def spaces(self) -> dict[str, Any]:
        """Observation and action entries of all sources and of the environment, as a plain dict. Raises
        DataError if they differ, or a source cannot be read.
        """
        named = {} if self.env is None else {self.env: self._read(self.env, self.env_options)}
        told = []  # a URI may stand there twice, with other options
        for number, (spec, cache) in enumerate(zip(self.sources, self.caches, strict=True)):
            told.append((f"{spec.uri} (source {number})", spec.task, cache.meta.get("tasks")))
            named[told[-1][0]] = model_spaces(cache, self.stack)
        spaces = common_spaces(named, self.pad)
        if self.env is not None:  # whose time limit decides ring and discount, however long the data's are
            spaces = replace(spaces, episode_length=named[self.env].episode_length)
        return replace(spaces, tasks=named_tasks(told, named)).to_plain()

    def _read(self, name: str, options: dict[str, Any]) -> Spaces:
        # Bounds too, which are asked for while environments may be open: a robot can be opened once.
        spaces, self._bounds = read_env(name, **options)
        return spaces

    @property
    def evaluation_options(self) -> dict[str, Any]:
        """Options of :attr:`evaluation_env`; those that a dataset was recorded with are part of them."""
        recorded = {} if self.env or self.eval_env else self.caches[0].meta.get("env_options") or {}
        return {**recorded, **self.env_options}

    @cached_property
    def evaluation_env(self) -> str | None:
        """The environment to evaluate in; None if there is none that fits the datasets."""
        if self.env is not None:
            return self.env
        if isinstance(self.eval_env, dict):
            return None
        if self.eval_env is not None:
            shown = self._read(self.eval_env, self.env_options)
            try:
                common_spaces({"the datasets": Spaces.from_plain(self.spaces), self.eval_env: shown})
            except DataError as error:
                raise DataError(
                    f"{error}\n  Or give the datasets' own environment as data.eval_env."
                ) from None
            return self.eval_env
        name = self.caches[0].meta.get("env_id")
        if name is None:
            return None
        try:
            if self._read(name, self.evaluation_options) == Spaces.from_plain(self.spaces):
                return name
            self._not_made = f"{name}, which the first one names, has other observations or actions."
        except LitWMError as error:
            self._not_made = why_not(name, self.caches[0].meta, error)
        return None

    @cached_property
    def eval_tasks(self) -> dict[str, dict[str, Any]]:
        """By name, of the tasks of the sources that have an environment: ``env``, ``env_options``,
        ``order`` of the vectors, and ``reference``, see :mod:`lit_wm.scores`.

        Raises:
            ConfigError: for an environment of ``eval_env`` that is of another task.
        """
        model, found = Spaces.from_plain(self.spaces), dict[str, dict[str, Any]]()
        tasks = {task.name: task for task in task_list(model.tasks)} if model.tasks else {}
        given = self.eval_env if isinstance(self.eval_env, dict) else {}
        if unknown := sorted(given.keys() - tasks.keys()):
            raise ConfigError(
                f"data.eval_env names {unknown[0]!r}, which is no task of data.sources"
                f"{nearest(unknown[0], list(tasks))}\n  Their tasks: {', '.join(tasks) or 'none'}"
            )
        for spec, cache in zip(self.sources, self.caches, strict=True):
            for name in [spec.task] if isinstance(spec.task, str) else cache.meta.get("tasks") or []:
                own = None if len(cache.meta.get("tasks") or []) > 1 else cache.meta.get("env_id")
                env, options = given.get(name, own), dict(self.env_options)
                if name not in tasks or name in found or env is None:
                    continue
                if name not in given:  # as the data were recorded
                    options = (cache.meta.get("env_options") or {}) | options
                try:
                    wrong = misfit(tasks[name], model, read_spaces(env, **options))
                except LitWMError as error:
                    if name in given:
                        raise
                    wrong = str(error).splitlines()[0]
                if wrong and name in given:
                    raise ConfigError(f"data.eval_env: {env} {wrong}.")
                if not wrong:
                    reference = reference_of(spec.uri, cache.meta, env, cache.episodes["return"])
                    order = vectors(cache.schema.spaces.obs)
                    found[name] = {"env": env, "env_options": options, "order": order}
                    found[name]["reference"] = None if reference is None else reference._asdict()
        return found

    @cached_property
    def reference(self) -> Reference | None:
        """What normalised scores are relative to: the first dataset says it, or the environment's name."""
        uri, meta = (self.sources[0].uri, self.caches[0].meta) if self.sources else ("", {})
        returns = self.caches[0].episodes["return"] if self.sources else ()
        return reference_of(uri, meta, self.evaluation_env, returns)

    @cached_property
    def time_limit_is_terminal(self) -> bool:
        """Whether the value after a time limit is zero."""
        if self._time_limit_is_terminal is not None:
            return self._time_limit_is_terminal
        if self.env is None:
            return False
        return bool(suite_defaults(self.env, **self.env_options)["time_limit_is_terminal"])

    @cached_property
    def repeat(self) -> int:
        """Environment frames per env step, for the x-axis of published curves."""
        return 1 if self.env is None else int(suite_defaults(self.env, **self.env_options)["repeat"])

    def make_envs(
        self, num_envs: int, seeds: list[int], task: str | None = None
    ) -> SyncVectorEnv | AsyncVectorEnv:
        """A vector environment with this module's id and options, or that of a task. Raises ConfigError if
        there is none to evaluate in.
        """
        if task is not None:
            known = self.eval_tasks[task]
            return make_vector_env(known["env"], num_envs, seeds, self.vectorization, **known["env_options"])
        name = self.evaluation_env
        if name is None:
            raise ConfigError(
                "the datasets name no environment that can be made here.\n  Give data.eval_env, an "
                f"environment with the same observations and actions.\n  {self._not_made}"
            )
        return make_vector_env(name, num_envs, seeds, self.vectorization, **self.evaluation_options)

    def _share(self, name: str) -> int:
        value, rest = divmod(getattr(self, name), self.world_size)
        if rest:
            raise ConfigError(
                f"data.{name} is {getattr(self, name)}, which {self.world_size} processes cannot share.\n"
                f"  Use a multiple of {self.world_size}."
            )
        return value

    def setup(self, stage: str) -> None:
        """Open environments and replay for ``fit``, held-out episodes for ``validate``; a second fit goes on
        with them. Raises ConfigError if the processes cannot share the work or the disk is too small.
        """
        fitting = stage == "fit"
        looking = stage == "validate" and self.sources and self.val_fraction and self.replay is None
        if not (fitting or looking):
            return
        from datamodules.mixture import Mixture, Prefetch

        trainer = self.trainer
        if trainer is None:
            raise ConfigError(
                "setup('fit') needs the Trainer and its model: the replay also holds what the model adds\n"
                "Call trainer.fit(model, data); for batches without a Trainer: ReplayBuffer.load(URI)"
            )
        module: Any = trainer.lightning_module
        if self.replay is not None:
            self._find_rewards(module)  # which may be another one
            return
        self.world_size, self.rank = trainer.world_size, trainer.global_rank
        num_envs = 0 if self.env is None else self._share("num_envs")
        if self.pad and self.env is not None:
            raise ConfigError("data.pad fills vectors of datasets, not those of environments: leave it out.")
        self.local_batch = self._share("batch_size")
        spaces = Spaces.from_plain(self.spaces)
        if self.env is not None and self.sources and self.offline_updates is None:
            self.offline_updates = getattr(getattr(module, "pretraining", None), "updates", 0)
        self._check_model(module, spaces, num_envs)
        model = getattr(module, "model", None)
        # The rows of an environment know no task: the model itself says which one it is.
        self._multitask = bool(self.sources and getattr(model, "tasks", None))
        self._task = getattr(model, "task_index", None)
        self._pin = trainer.strategy.root_device.type == "cuda"
        root = Path(self.replay_dir) if self.replay_dir else Path(trainer.default_root_dir) / "replay"
        # Of its own for validation: a training may be under way beside it.
        root /= f"{'rank' if fitting else 'validate'}{self.rank}"
        ring = self._open_ring(module, spaces, num_envs, root) if fitting and self.env is not None else None
        self._find_rewards(module)
        if not self.sources:
            self.replay = ring
            self._fit_normalizer(module, {})
            return
        train, held = self._open_sources(module, spaces, root, fitting)
        if self.held_out is not None:
            self.held_out.close()
        self.held_out = Mixture(held, None, self.seed) if held else None
        if not fitting:
            return
        self._fit_normalizer(module, train)
        if ring is not None:
            train["env"] = ring
        weights = [*self.sources, self.env_weight] if ring is not None else self.sources

        def shares(update: int) -> list[float]:
            return [spec.weight_at(update) for spec in weights]

        self.replay = Mixture(train, None if self.mix == "proportional" else shares, self.seed, self.rank)
        if self._restored:
            self.load_state_dict(self._restored)
        if ring is None and self.prefetch:
            self._ahead = Prefetch(self.replay, self.local_batch, self.prefetch)

    def _find_rewards(self, module: Any) -> None:
        """Note and say which sources have no rewards."""
        has = [not cache.meta.get("no_reward") for cache in self.caches]
        self.rewarded = None if all(has) else torch.tensor([*has, True])  # the last is env
        module.world_model_only = self._no_rewards(module)
        if not any(has) and module.world_model_only:
            cloning = getattr(getattr(module, "pretraining", None), "cloning", False)
            others = (
                "the actor by cloning, and the critic does not" if cloning else "and neither actor nor critic"
            )
            until = "" if self.env is None else f", until {self.env} is stepped"
            self._say(f"no source has rewards: the world model learns, {others}{until}")
        elif not all(has):
            uris = (spec.uri for spec, there in zip(self.sources, has, strict=True) if not there)
            self._say(f"no rewards in {', '.join(uris)}: these rows teach neither rewards nor values")

    def _no_rewards(self, module: Any) -> bool:
        """Whether no source that may be drawn for the next update has rewards."""
        if self.rewarded is None:
            return False
        ratio, update = self.mix == "ratio", module.updates
        drawn = [not ratio or s.weight_at(update) > 0 for s in (*self.sources, self.env_weight)]
        drawn[-1] &= self.env is not None and update >= (self.offline_updates or 0)
        return not (self.rewarded & torch.tensor(drawn)).any()

    def _open_ring(self, module: Any, spaces: Spaces, num_envs: int, root: Path) -> RowReplay:
        """Environments, their collector and its ring."""
        from datamodules.collect import Collector
        from datamodules.replay import RowReplay

        assert self.trainer is not None
        if self.action_noise and all(spec.is_discrete for spec in spaces.action.values()):
            raise ConfigError(f"data.action_noise: {self.env} has no continuous action. Use data.epsilon.")
        reachable = None
        if self.max_env_steps is not None:  # the last loop may go beyond by two rows per environment
            reachable = self.max_env_steps // self.world_size + 2 * num_envs
        ring = RowReplay(
            spaces, self.capacity // self.world_size, num_envs, root, module.latent_specs(), rank=self.rank,
            online=self.online_queue, reachable=reachable, sharers=self.trainer.num_devices, pin=self._pin,
            **self._drawn,
        )  # fmt: skip
        envs = self.make_envs(num_envs, [self.seed + 10_000 * self.rank + i for i in range(num_envs)])
        prefill, noise = -(-self.prefill // self.world_size), (self.epsilon, self.action_noise)
        self.collector = Collector(envs, spaces, ring, self.seed, self.rank, prefill, *noise)
        # Through str, so that 0.1 means one tenth. Per step of this process, as every process makes every
        # update.
        per_step = Fraction(str(self.train_ratio)) / (self.batch_size * self.batch_length)
        if self.utd is not None:
            per_step = Fraction(str(self.utd))
        self.ratio = TrainRatio(per_step * self.world_size, self.first_updates)
        return ring

    def _open_sources(
        self, module: Any, spaces: Spaces, root: Path, fitting: bool
    ) -> list[dict[str, RowReplay]]:
        """Replays of the episodes to train on (none unless ``fitting``), and of those held out, by source."""
        from datamodules.offline import CacheRows, dataset_bytes, environment_bounds
        from datamodules.replay import RowReplay

        assert self.trainer is not None
        rows = sum(map(len, self.caches))
        need = dataset_bytes(rows, spaces, module.latent_specs()) * self.trainer.num_devices
        root.mkdir(parents=True, exist_ok=True)
        if fitting and need > (free := shutil.disk_usage(root).free):
            raise ConfigError(
                f"this run's own columns of {rows:,} rows need {need / 1e9:,.1f} GB, but {root} has "
                f"{free / 1e9:,.1f} GB free.\n  Move data.replay_dir to a larger disk, use less data or a "
                "smaller model."
            )
        groups: list[dict[str, RowReplay]] = [{}, {}]
        lead = 0 if self.within_episodes else max(self.replay_context, 1)
        tasks = getattr(getattr(module, "model", None), "tasks", [])
        if len(tasks) > 1 and self._task is None:
            if lacking := [t.name for t in tasks if t.name not in self.eval_tasks]:
                self._say(
                    f"no environment for {len(lacking)} of {len(tasks)} tasks ({', '.join(lacking[:4])}"
                    f"{' ...' if len(lacking) > 4 else ''}), which are not played for evaluation; "
                    "data.eval_env names some, {TASK: ENV}"
                )
        elif self.evaluation_env is None:  # asked for here, so that a wrong one ends nothing later
            self._say(f"no environment: nothing is played for evaluation; data.eval_env names one\n"
                      f"  {self._not_made}")  # fmt: skip
        played = None if len(tasks) > 1 and self._task is None else self.evaluation_env
        bounds = {} if played is None else self._bounds
        for number, (spec, cache) in enumerate(zip(self.sources, self.caches, strict=True)):
            task = task_number(spec, cache, tasks, self._task)
            split = select_episodes(cache, spec, self.val_fraction, self.seed)
            own = environment_bounds(cache, spec, str(played), bounds, np.concatenate(split))
            if ended := int(cache.episodes["terminated"][np.concatenate(split)].sum()):
                self._check_ends(module, f"each of {ended:,} episodes of {spec.uri}")
            steps = [int((cache.episodes["length"][chosen] - 1).sum()) for chosen in split]
            self._say(
                f"{spec.uri}: {len(cache.episodes['start']):,} episodes, {len(split[0]):,} to train on "
                f"({steps[0]:,} steps), {len(split[1]):,} held out ({steps[1]:,})"
            )
            for kind, group, chosen in zip(("train", "val"), groups, split, strict=True):
                train, name = kind == "train", f"source{number}"
                if not (fitting if train else len(chosen)):
                    continue
                latents, folder = module.latent_specs() if train else None, root / f"{name}-{kind}"
                storage = CacheRows(cache, folder, spaces, chosen, spec, latents, lead, self._pin, self.stack,
                                    number, task, bounds=own)  # fmt: skip
                try:
                    group[name] = RowReplay.of_dataset(
                        storage, spaces, rank=self.rank if train else 0, name=f"{name}/{kind}", **self._drawn
                    )
                except DataError:
                    if train:
                        raise
                    storage.close()  # too short to look at
        return groups

    def _say(self, line: str) -> None:
        if self.rank == 0:
            print(line, file=sys.stderr)

    def _fit_normalizer(self, module: Any, train: Mapping[str, RowReplay]) -> None:
        """Give a model that normalises its observations their statistics, unless it has some."""
        from datamodules.offline import observation_statistics

        normalizer = getattr(getattr(module, "model", None), "normalizer", None)
        if normalizer is None or normalizer.fitted or not train or self.pad:
            return  # weights that are loaded later may bring them; without them the module refuses to train
        normalizer.fit(observation_statistics([replay.storage for replay in train.values()]))

    def _check_model(self, module: Any, spaces: Spaces, num_envs: int) -> None:
        """Refuse windows that the model cannot learn from, and a ring that may never hold one."""
        wanted = getattr(module, "windows", "stream" if module.latent_specs() else "episode")
        if wanted != self.windows:
            raise ConfigError(
                f"data.windows is {self.windows!r}, but {type(module).__name__} learns from {wanted!r}.\n"
                f"  Set data.windows: {wanted}"
            )
        steps = getattr(module, "window_steps", self.batch_length)
        if steps != self.batch_length:
            found = f"data.batch_length is {self.batch_length}"
            raise ConfigError(f"{found}; expected {steps}, one more than model.horizon")
        if self.env is None:
            return
        first = getattr(module, "pretraining", None)
        if first is not None and first.cloning and not self.sources:
            raise ConfigError(
                "the policy is to imitate recorded actions, and data.sources holds none.\n"
                "  Give data.sources, or leave out model.pretrain.actor and the weight of cloning "
                "(model.loss_scales.bc, model.bc_coef)."
            )
        # While an episode runs, whole windows of the one before must still be there.
        rows, most = self.capacity // self.world_size // num_envs, spaces.episode_length
        if self.within_episodes and most is not None and rows < (need := most + 1 + self.window):
            raise ConfigError(
                f"data.capacity is {self.capacity:,}, {rows:,} rows for each environment, but an episode of "
                f"{self.env} has up to {most + 1:,}, and one window before it {self.window}.\n"
                f"  Raise capacity to {need * self.num_envs:,} or more."
            )

    def ticket(self, module: Any) -> Batch:
        """Collect until an update is owed, then draw its batch.

        Args:
            module: acts in the environments by ``module.policy`` and says by ``module.device`` where the
                batch goes.
        """
        self._flush()
        offline = self.offline_updates or 0
        if self.rewarded is not None:
            module.world_model_only = self._no_rewards(module)
        if self.env is None or (offline and module.updates < offline):
            if self._ahead is not None:
                return self._batch(self._ahead.next(), module.device)
            return self._batch(self._replay.sample_columns(self.local_batch), module.device)
        collector, replay, ratio = self._open()
        enough = 1 if self.within_episodes else self.local_batch * self.batch_length
        while not ratio.owed(self._clock):
            self._collect(module)
            if ratio.ready_at is None:
                self._begin_training(enough)
        while replay.num_windows == 0:  # resumed without its replay
            self._collect(module)
        ratio.done += 1
        self._totals = self._sum([collector.env_steps, ratio.owed(self._clock)], module.device)
        return self._batch(self._replay.sample_columns(self.local_batch), module.device)

    def _begin_training(self, enough: int) -> None:
        """Let updates be owed from now on, if there are ``enough`` windows; refuse to wait for ever."""
        collector, replay, ratio = self._open()
        windows = replay.num_windows
        if windows >= enough and not collector.prefilling:
            ratio.ready_at = self._clock
        most = min(self.capacity, self.max_env_steps or self.capacity)
        if self.spaces["episode_length"] is None:  # it may never end: do not try for hours
            most = min(most, self.num_envs * max(20_000, self.prefill))
        if windows == 0 and collector.env_steps >= most // self.world_size:
            raise ConfigError(
                f"no episode of {self.env} has ended in {collector.env_steps:,} steps: nothing to train "
                "on.\n  Set data.env_options.time_limit."
            )

    @property
    def _clock(self) -> int:
        """What updates are counted by: decisions with ``utd``, else env steps."""
        collector, _, _ = self._open()
        return collector.env_steps if self.utd is None else collector.decisions

    def _collect(self, module: Any) -> None:
        """One step of every environment. Raises Interrupted by Ctrl-C or SIGTERM, as many steps may follow
        before the next update.
        """
        collector, _, _ = self._open()
        checkpoint: Any = getattr(self.trainer, "checkpoint_callback", None)
        if self.world_size == 1 and getattr(checkpoint, "stopping", False):
            raise checkpoint.interrupted()
        collector.collect(module.policy, module.device)
        if collector.terminations:
            self._check_ends(module, f"an episode of {self.env}")

    def _check_ends(self, module: Any, what: str) -> None:
        """Refuse episodes that terminated for a model that cannot know it."""
        if self.within_episodes and not getattr(module, "episodic", True):
            several = getattr(getattr(module, "model", None), "tasks", None)
            raise ConfigError(
                f"{what} ended by itself; a model without termination head plans on beyond such ends.\n  "
                + ("model.tasks goes with time limits alone." if several else "Set model.episodic: true.")
            )

    def report_batch(self, batch_size: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """Windows of ``length`` steps for a report, of held-out episodes if there are any.

        The training draws stay as they are. Raises DataError if there is no complete window yet, NotSupported
        for another length than ``batch_length`` with ``windows: episode``.
        """
        self._flush()
        self._rewind()
        replay = self.held_out or self._replay
        columns = replay.sample_columns(batch_size, self.replay_context + length, mode="report")
        columns = self._numbered(columns) if self.held_out else columns
        return replace(self._batch(columns, device), write_back=None)

    @property
    def _replay(self) -> RowReplay | Mixture:
        if (replay := self.held_out if self.replay is None else self.replay) is None:
            raise RuntimeError("the replay is open only after setup('fit'), which Trainer.fit calls")
        return replay

    def _rewind(self) -> None:
        """Let the thread stop, with draws that stand where training does."""
        if self._ahead is not None:
            self._ahead.rewind()

    def _open(self) -> tuple[Collector, RowReplay, TrainRatio]:
        """What collecting needs; the replay is the environment's ring."""
        if self.collector is None or self.ratio is None:
            raise RuntimeError("the replay is open only after setup('fit'), which Trainer.fit calls")
        return self.collector, self.collector.replay, self.ratio

    def _with_source(self, batch: Batch, columns: dict[Key, Tensor]) -> Batch:
        """The batch with what its sources mean for the losses."""
        source = columns.get(("source",))
        if source is None or not self.sources:
            return batch
        return replace(
            batch,
            source=source,
            recorded=None if self.env is None else source < len(self.sources),
            rewarded=None if self.rewarded is None else self.rewarded[source],
        )

    def _with_task(self, batch: Batch) -> Batch:
        """The batch with the task of the environment's rows."""
        if batch.task is not None and self.collector is not None and self._task is not None:
            batch.task[batch.info["source"] == len(self.sources)] = self._task
        return batch

    def _numbered(self, columns: dict[Key, Tensor]) -> dict[Key, Tensor]:
        """Held-out rows with the numbers of their sources, not all of which have some."""
        assert self.held_out is not None
        numbers = torch.tensor([int(name.removeprefix("source")) for name in self.held_out.names])
        return columns | {("source",): numbers[columns["source",]]}

    def _batch(self, columns: dict[Key, Tensor], device: torch.device | str) -> Batch:
        from datamodules.rows import nested

        replay, rows = self._replay, nested(columns)
        if self.within_episodes:
            batch = self._with_source(self._with_task(tdmpc2_view(rows, self._multitask)), columns)
            return batch if torch.device(device).type == "cpu" else batch.to(device)
        latents = replay.latents if "latent" in rows else None
        ends: bool | Tensor = self.time_limit_is_terminal
        if ends and self._time_limit_is_terminal is None and self.sources:  # the suite's word on its own rows
            ends = columns["source",] == len(self.sources)
        batch = dreamer_view(rows, self.replay_context, ends, latents, self._multitask)
        batch = self._with_source(self._with_task(batch), columns)
        place = batch.info

        def write_back(states: State) -> None:
            latents = to_latents(states, replay.latents)
            if states.deter.device.type != "cuda":
                replay.write_back(latents={k: v.cpu() for k, v in latents.items()}, **place)
                return
            # The copy runs behind the update; whoever needs the rows next waits for it.
            staged = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for k, v in latents.items()}
            for key, value in latents.items():
                staged[key].copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()

            def finish() -> None:
                copied.synchronize()
                replay.write_back(latents=staged, **place)

            self._flush()
            self._pending = finish

        batch = batch if torch.device(device).type == "cpu" else batch.to(device)
        return replace(batch, write_back=write_back)

    def _flush(self) -> None:
        """Finish a write-back that is still under way."""
        if self._pending is not None:
            self._pending()
            self._pending = None

    def _sum(self, values: list[int], device: torch.device | str) -> list[int]:
        """Sums over all processes, so that all of them stop at the same update."""
        if self.world_size == 1:
            return values
        assert self.trainer is not None
        return self.trainer.strategy.reduce(torch.tensor(values, device=device), reduce_op="sum").tolist()

    @property
    def env_steps(self) -> int:
        """Env steps of all processes, as of the last ticket; 0 with datasets alone."""
        return self._steps_before + self._totals[0]

    @property
    def exhausted(self) -> bool:
        """Whether ``max_env_steps`` are collected and every update that they owe has been handed out."""
        done = self.max_env_steps is not None and self.env_steps >= self.max_env_steps
        return done and self._totals[1] <= 0

    def pop_finished(self) -> list[tuple[float, int]]:
        """(return, length) of this process's episodes finished since the last call."""
        if self.env is None:
            return []
        collector, _, _ = self._open()
        finished, collector.finished = collector.finished, []
        return finished

    def pop_metrics(self) -> dict[str, float]:
        """Scalars of this process: counts, and means over the episodes finished since the last call."""
        replay = self._replay
        metrics = {"replay/rows": float(len(replay)), "replay/stale_rows": float(replay.stale_rows)}
        shares: dict[str, float] = getattr(replay, "last_shares", {})
        metrics |= {f"replay/share/{name}": share for name, share in shares.items()}
        if self.collector is not None:
            metrics["step/episodes"] = float(self.collector.episodes)
        if finished := self.pop_finished():
            for name, values in zip(("return", "length"), zip(*finished, strict=True), strict=True):
                metrics[f"train/{name}"] = sum(values) / len(values)
        return metrics

    def mean_frames(self) -> dict[str, Tensor]:
        """Mean of all frames that this process collected for training, per image key, float64 in 0..255;
        of datasets the mean of up to 1,000 frames spread over each.
        """
        here = self.collector.mean_frames() if self.collector else {}
        if self.env is None and not here and self._restored.get("mean_frames") is None:
            here = self._dataset_frames()
        return here or self._restored.get("mean_frames", {})

    def _dataset_frames(self) -> dict[str, Tensor]:
        from datamodules.rows import row_key

        means = {}
        for key, spec in Spaces.from_plain(self.spaces).obs.items():
            if spec.is_image:
                frames = []
                for cache in self.caches:
                    column = cache.rows[row_key("observation", key, cache.schema.spaces.obs)]
                    some = np.linspace(0, len(column) - 1, min(1000, len(column))).astype(np.int64)
                    frames.append(column[torch.from_numpy(some)])
                mean = torch.cat(frames).mean(0, dtype=torch.float64)
                means[key] = torch.cat([mean] * self.stack, 0 if spec.channels_first else 2)
        return means

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Yields the same ticket forever."""
        return _loader(_Forever(self.ticket))

    def val_dataloader(self) -> DataLoader:
        """One item: a ticket for windows of held-out episodes, if there are any.

        The episodes of an evaluation live in the evaluator.
        """
        return _loader([self.held_out_batch if self.held_out else 0])

    def held_out_batch(self, module: Any) -> Batch:
        """The same windows of held-out episodes each time and in every process."""
        assert self.held_out is not None
        self.held_out.draws["report"] = 0
        return self.report_batch(self.local_batch, self.batch_length, module.device)

    def held_out_episodes(self, module: Any, number: int = 8, length: int = 256) -> Batch:
        """Of up to ``number`` held-out episodes (one of each task and source at least) the last ``length``
        steps, the same each time. Shorter ones are filled up: ``info["valid"]`` says which exist. (B, T)
        """
        from datamodules.rows import nested

        assert self.held_out is not None
        columns, valid = self.held_out.last_rows(number, length)
        rows = nested(columns)
        batch = self._with_source(tdmpc2_view(rows, self._multitask), self._numbered(columns))
        batch = batch.to(module.device)
        if self._time_limit_is_terminal and not self.within_episodes:
            over = rows["next"]["truncated"].squeeze(-1).roll(1, 1).to(module.device)
            over[:, 0] = False
            batch.is_terminal |= over
        return replace(batch, info={"valid": valid.to(module.device)})

    def test_dataloader(self) -> DataLoader:
        """One item; the episodes live in the evaluator."""
        return _loader([0])

    predict_dataloader = test_dataloader

    # Checkpoints. The shared part is small and the same for every process; each process has a part of its
    # own.

    def state_dict(self) -> dict[str, Any]:
        """Env steps of all processes and the mean frame; of datasets the place in the stream of batches,
        the same in every process.
        """
        state: dict[str, Any] = {"env_steps": self.env_steps, "mean_frames": self.mean_frames()}
        state["drawn_from"] = self._drawn_from()
        if self.env is None and self.replay is not None:
            self._rewind()
            state["stream"] = self.replay.state_dict()
        elif isinstance(draws := getattr(self.replay, "draws", None), dict):  # of a mixture
            state["draws"] = dict(draws)
        return state

    def _drawn_from(self) -> str:
        n = len(self.sources)
        sources, env = [f"{n} source{'s' * (n != 1)}"], ["an environment"]
        return " and ".join(sources * bool(n) + env * (self.env is not None))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`. Raises CheckpointError if a training would go on with other data."""
        before, now = state_dict.get("drawn_from", self._drawn_from()), self._drawn_from()
        if before != now and self.replay is not None:
            raise CheckpointError(
                f"the checkpoint's run drew from {before}, this one would from {now}.\n"
                "  Go on with the same data.sources and data.env. For others begin a new run from its "
                "weights: model.start_from in place of --ckpt_path."
            )
        self._restored = state_dict
        self._steps_before = state_dict["env_steps"] - self._totals[0]
        if "draws" in state_dict and self.replay is not None:
            self.replay.draws = dict(state_dict["draws"])  # type: ignore[union-attr]
        if "stream" in state_dict and self.replay is not None:
            self._rewind()
            self.replay.load_state_dict(state_dict["stream"])

    def rank_state_dict(self) -> dict[str, Any]:
        """Collector, environments and train ratio of this process, as tensors and plain values."""
        self._flush()
        state: dict[str, Any] = {"world_size": self.world_size}
        if self.env is None:
            return state
        collector, _, ratio = self._open()
        state |= {"collector": collector.state_dict(), "totals": list(self._totals)}
        state |= {"ratio": {"ready_at": ratio.ready_at, "done": ratio.done}}
        return state | {"steps_before": self._steps_before}

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`rank_state_dict`, after :meth:`setup` and :meth:`restore_replay`. Raises
        CheckpointError if the checkpoint is of another number of processes.
        """
        if state["world_size"] != self.world_size:
            raise CheckpointError(
                f"the checkpoint is of {state['world_size']} processes, this run has {self.world_size}.\n"
                "  Resume with the same number of devices."
            )
        if self.env is None:
            return
        collector, _, ratio = self._open()
        assert self.trainer is not None
        collector.load_state_dict(state["collector"], self.trainer.strategy.root_device)
        ratio.ready_at, ratio.done = state["ratio"]["ready_at"], state["ratio"]["done"]
        self._totals, self._steps_before = list(state["totals"]), state["steps_before"]

    def snapshot_replay(self, directory: Path | str) -> None:
        """Write this process's rows to a new folder, complete or not at all."""
        self._flush()
        self._rewind()
        self._replay.snapshot(directory)

    def restore_replay(self, directory: Path | str) -> None:
        """Read :meth:`snapshot_replay`. Raises CheckpointError if the folder is damaged or does not fit this
        run.
        """
        self._rewind()
        self._replay.restore(directory)

    def teardown(self, stage: str) -> None:
        """Stop the thread; environments and replay stay for another fit."""
        self._rewind()

    def close(self) -> None:
        """Close the environments and remove the replay files."""
        self._flush()
        self._rewind()
        for part in (self.collector, self.replay, self.held_out):
            if part is not None:
                part.close()
        self.collector = self.replay = self.held_out = self.ratio = self._ahead = None


def named_tasks(
    told: Sequence[tuple[str, Any, Sequence[str] | None]], spaces: Mapping[str, Spaces]
) -> tuple[dict[str, Any], ...]:
    """The tasks that sources name, with their sizes and time limits, in the sources' order.

    Args:
        told: of each source its URI or another name of its own, the task of its entry, and the tasks that it
            names itself, whose sizes are known if they are of the official sets.
        spaces: by source.

    Raises:
        DataError: if two sources of one task have other sizes.
    """
    official, found = {task.name: task for task in TASK_SETS["mt80"]}, dict[str, Task]()
    orders: dict[str, list[str]] = {}
    for uri, given, own in told:
        seen = sum(s.size for s in spaces[uri].obs.values() if s.dtype == "float32" and not s.is_discrete)
        acts, length = sum(s.size for s in spaces[uri].action.values()), spaces[uri].episode_length or 1000
        tasks = [Task(given, seen, acts, length)] if isinstance(given, str) else []
        if given is None:
            tasks = [official[name] for name in own or () if name in official]
        for task in tasks:
            before, order = found.setdefault(task.name, task), vectors(spaces[uri].obs)
            if sorted(order) == sorted(orders.setdefault(task.name, order)) and order != orders[task.name]:
                raise DataError(
                    f"{uri} has {', '.join(order)}, in another order than an earlier source of task "
                    f"{task.name!r}, {', '.join(orders[task.name])}.\n  Collect both in one format."
                )
            if before[1:3] != task[1:3]:
                raise DataError(
                    f"{uri} has {seen} observed numbers and {acts} action numbers; an earlier source of "
                    f"task {task.name!r} has {before.obs} and {before.action}.\n  Give it another name."
                )
            length = max(task.episode_length, before.episode_length)
            found[task.name] = task._replace(episode_length=length)
    return tuple(task._asdict() for task in found.values())


def task_number(spec: SourceSpec, cache: Cache, tasks: Sequence[Any], own: int | None) -> Any:
    """What the tasks of a source are among the model's.

    Args:
        spec, cache: the source; ``spec.task`` is a name or number, ``cache.meta["tasks"]`` its own names.
        tasks: the model's, none for a model of one.
        own: number of the task that the environment is.

    Returns:
        One number for all rows, an array that gives each number of the source its own, or None.

    Raises:
        ConfigError: for a name that is not among them, or if several tasks need one.
    """
    names, said = [task.name for task in tasks], cache.meta.get("tasks")
    known = f"The model's tasks: {', '.join(names[:8])}"
    if spec.task is None:
        if not names or own is not None:
            return own
        if not said:
            raise ConfigError(
                f"{spec.uri} does not say which of the model's tasks it is.\n  Say task: NAME in its entry "
                f"of data.sources. {known}"
            )
        if missing := [name for name in said if name not in names]:
            raise ConfigError(
                f"{spec.uri} has the tasks {', '.join(missing[:5])}, which the model lacks.\n  {known}\n"
                "  Name them alike (the reader's option tasks), or say task."
            )
        return np.array([names.index(name) for name in said])
    if spec.task in names:
        return names.index(str(spec.task))
    if isinstance(spec.task, int) and 0 <= spec.task < len(names):
        return spec.task
    if not names:
        known = "The model has one task: leave task out, or set model.tasks: data."
    raise ConfigError(f"{spec.uri}: task {spec.task!r} is unknown{nearest(str(spec.task), names)}\n  {known}")


def why_not(name: str, meta: Mapping[str, Any], error: LitWMError) -> str:
    """Why the environment of a dataset cannot be made, and where its module is unknown here, what the dataset
    says that it needs: names of its author's choice, which are no advice to install them.
    """
    what, *more = str(error).splitlines()
    name = name.removeprefix("gym:")
    entry = str(json.loads(meta.get("env_spec") or "{}").get("entry_point") or "")
    module = name.partition(":")[0] if ":" in name else re.split("[.:]", entry)[0]
    unknown = what.startswith(("cannot import", "no environment is registered"))
    if not unknown or module in ("", "__main__", "gymnasium", "lit_wm"):
        return "\n".join([what, *sorted(more, key=lambda line: "Fix:" not in line)[:1]])
    needs = ", ".join([f"the module {module}", *map(str, meta.get("requirements") or [])])
    home = name if ":" in name else f"{module}:{name}"
    return (
        f"{what}\n  The dataset says that it needs {needs}.\n"
        f"  Install what you trust of it, and say --data.eval_env {home}"
    )


def _may_be_value(part: Any) -> bool:
    """Whether a source may be a piece of the option before it, cut off at a comma."""
    return isinstance(part, str) and not re.search(r"[:/]|\.(npz|hdf5|h5|pt)$", part)


class _Forever(IterableDataset):
    def __init__(self, item: Any):
        self.item = item

    def __iter__(self) -> Iterator[Any]:
        return repeat(self.item)


def _loader(items: Any) -> DataLoader:
    return DataLoader(items, batch_size=None, num_workers=0, collate_fn=_identity)


def _identity(item: Any) -> Any:
    return item
