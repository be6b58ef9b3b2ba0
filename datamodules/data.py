"""Online experience for a Lightning Trainer: environments, collection, replay and batches in one data module.

Lightning fetches a batch ahead, even before training starts. So the loader yields *tickets* instead: the
module calls its ticket inside ``training_step``, and only then are steps collected and a batch drawn.
Resuming is exact because of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from datamodules.views import dreamer_view, tdmpc2_view, to_latents
from lit_wm.envs import make_vector_env, read_spaces, suite_defaults
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.types import Batch, Spaces, Spec, State

if TYPE_CHECKING:
    from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv

    from datamodules.collect import Collector
    from datamodules.replay import RowReplay

Ticket = Callable[[Any], Batch]


class TrainRatio:
    """How many updates are owed after a number of steps, in whole numbers.

    The first updates are owed once the replay is ready, then ``first + floor((steps - steps_when_ready) *
    per_step)`` in all.

    Args:
        per_step: updates per step.
        first: updates owed at once.
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
    """Collects experience from environments while training and hands out replayed batches.

    Several processes share the work: each owns ``num_envs``, ``batch_size`` and ``capacity`` divided by their
    number.

    Args:
        env: environment id: any Gymnasium id, ``atari:GAME`` or ``atari100k:GAME``.
        env_options: options of the environment, e.g. ``{repeat: 4}``.
        num_envs: environments over all processes.
        eval_envs: environments for evaluation over all processes.
        vectorization: ``sync`` steps the environments in this process, ``async`` in one process each.
        windows: ``stream`` draws sequences uniformly over all rows, across the ends of episodes, for Dreamer;
            ``episode`` draws them within finished episodes, uniformly over episodes, for TD-MPC2: the batch
            is that of :func:`~datamodules.views.tdmpc2_view`, ``batch_length`` is the horizon + 1, there are
            no latents, and ``online_queue`` and ``time_limit_is_terminal`` are not used.
        train_ratio: replayed steps per env step.
        utd: updates per decision (executed action), instead of ``train_ratio``; 1 with ``windows: episode``
            if nothing is said.
        first_updates: updates owed at once when training begins. The official TD-MPC2 has ``seed_steps`` of
            them after ``seed_steps + 1`` random decisions, then ``utd`` 1.
        batch_size: sequences per update over all processes.
        batch_length: steps T of a sequence, without context; at least 2, as a return needs a next step.
        replay_context: steps K before a sequence; with 1 or more it starts from a stored latent, with 0 from
            zeros. null is 1, and 0 with ``windows: episode``, where nothing else is possible.
        capacity: rows kept over all processes; one row per env step.
        prefill: env steps over all processes with random actions before training begins; decisions with
            ``windows: episode``, and on until the first episode has ended.
        epsilon: probability of a uniformly random action at collection, in each environment and step.
        action_noise: standard deviation of Gaussian noise on continuous actions at collection, in units of
            half their range.
        max_env_steps: env steps after which training is done; null for no end.
        online_queue: hand out every new step once before drawing uniformly.
        time_limit_is_terminal: whether the value after a time limit is zero; null for the official choice of
            the suite (true for Atari).
        replay_dir: folder for the replay files; null for ``replay`` inside the run's folder.
        seed: seeds environments, random actions and draws.

    Raises:
        ConfigError: for a value that cannot work.
    """

    def __init__(
        self,
        env: str,
        env_options: dict[str, Any] | None = None,
        num_envs: int = 1,
        eval_envs: int = 1,
        vectorization: str = "sync",
        train_ratio: float = 32.0,
        batch_size: int = 16,
        batch_length: int = 64,
        replay_context: int | None = None,
        capacity: int = 5_000_000,
        prefill: int = 0,
        epsilon: float = 0.0,
        action_noise: float = 0.0,
        max_env_steps: int | None = None,
        online_queue: bool = True,
        time_limit_is_terminal: bool | None = None,
        replay_dir: str | None = None,
        seed: int = 0,
        windows: str = "stream",
        utd: float | None = None,
        first_updates: int = 1,
    ):
        super().__init__()
        self.env, self.env_options = env, dict(env_options or {})
        self.num_envs, self.eval_envs, self.vectorization = num_envs, eval_envs, vectorization
        self.train_ratio, self.batch_size, self.batch_length = train_ratio, batch_size, batch_length
        if utd is None and windows == "episode":
            utd = 1.0
        self.windows, self.utd, self.first_updates = windows, utd, first_updates
        if replay_context is None:
            replay_context = 0 if windows == "episode" else 1
        self.replay_context, self.capacity, self.prefill = replay_context, capacity, prefill
        self.epsilon, self.action_noise = epsilon, action_noise
        self.max_env_steps, self.online_queue = max_env_steps, online_queue
        self.replay_dir, self.seed = replay_dir, seed
        self._time_limit_is_terminal = time_limit_is_terminal
        self._check()
        self.world_size = self.rank = 0  # known after setup
        self.replay: RowReplay | None = None
        self.collector: Collector | None = None
        self.ratio: TrainRatio | None = None
        # Env steps of the run that this one goes on from, where its collectors are not restored.
        self._steps_before = 0
        self._totals = [0, 0]  # env steps collected and updates owed, of all processes, as of the last ticket
        self._restored: dict[str, Any] = {}
        self._pending: Callable[[], None] | None = None

    def _check(self) -> None:
        at_least = {
            "num_envs": 1, "eval_envs": 1, "batch_size": 1, "batch_length": 2,
            "replay_context": 0, "capacity": 1, "prefill": 0, "seed": 0, "first_updates": 1,
        }  # fmt: skip
        for name, low in at_least.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ConfigError(f"data.{name} is {value!r}, expected a whole number of {low} or more.")
        for name in ("train_ratio", *(["utd"] if self.utd is not None else [])):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"data.{name} is {getattr(self, name)!r}, expected a number above 0.")
        if not 0 <= self.epsilon <= 1:
            raise ConfigError(f"data.epsilon is {self.epsilon!r}, expected a probability, 0 to 1.")
        if not 0 <= self.action_noise < float("inf"):
            raise ConfigError(f"data.action_noise is {self.action_noise!r}, expected 0 or more.")
        if self.vectorization not in ("sync", "async"):
            raise ConfigError(f"data.vectorization is {self.vectorization!r}, expected 'sync' or 'async'.")
        if self.windows not in ("stream", "episode"):
            raise ConfigError(f"data.windows is {self.windows!r}, expected 'stream' or 'episode'.")
        if self.within_episodes and self.replay_context:
            raise ConfigError(
                f"data.replay_context is {self.replay_context}, but data.windows: episode keeps no latents.\n"
                "  Leave replay_context out, or set it to 0."
            )
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

    def row_bytes(self, latents: Mapping[str, Spec]) -> dict[str, int]:
        """Bytes of a replay row by the file that holds them: ``row`` for the small columns."""
        from datamodules.rows import row_files, row_specs

        return row_files(row_specs(Spaces.from_plain(self.spaces), latents))

    @cached_property
    def spaces(self) -> dict[str, Any]:
        """Observation and action entries as a plain dict, read from one environment that is closed again."""
        return read_spaces(self.env, **self.env_options).to_plain()

    @cached_property
    def time_limit_is_terminal(self) -> bool:
        """Whether the value after a time limit is zero."""
        if self._time_limit_is_terminal is not None:
            return self._time_limit_is_terminal
        return bool(suite_defaults(self.env, **self.env_options)["time_limit_is_terminal"])

    @cached_property
    def repeat(self) -> int:
        """Environment frames per env step, for the x-axis of published curves."""
        return int(suite_defaults(self.env, **self.env_options)["repeat"])

    def make_envs(self, num_envs: int, seeds: list[int]) -> SyncVectorEnv | AsyncVectorEnv:
        """A vector environment with this module's id and options."""
        return make_vector_env(self.env, num_envs, seeds, self.vectorization, **self.env_options)

    def _share(self, name: str) -> int:
        value, rest = divmod(getattr(self, name), self.world_size)
        if rest:
            raise ConfigError(
                f"data.{name} is {getattr(self, name)}, which {self.world_size} processes cannot share.\n"
                f"  Use a multiple of {self.world_size}."
            )
        return value

    def setup(self, stage: str) -> None:
        """Open environments and replay for ``fit``; a second fit goes on with them.

        Raises:
            ConfigError: if the processes cannot share the work or the disk is too small.
        """
        if stage != "fit" or self.collector is not None:
            return
        from datamodules.collect import Collector
        from datamodules.replay import RowReplay

        trainer = self.trainer
        assert trainer is not None
        module: Any = trainer.lightning_module
        self.world_size, self.rank = trainer.world_size, trainer.global_rank
        num_envs, self.local_batch = self._share("num_envs"), self._share("batch_size")
        spaces = Spaces.from_plain(self.spaces)
        if self.action_noise and all(spec.is_discrete for spec in spaces.action.values()):
            raise ConfigError(f"data.action_noise: {self.env} has no continuous action. Use data.epsilon.")
        self._check_model(module, spaces, num_envs)
        reachable = None
        if self.max_env_steps is not None:  # the last loop may go beyond by two rows per environment
            reachable = self.max_env_steps // self.world_size + 2 * num_envs
        root = Path(self.replay_dir) if self.replay_dir else Path(trainer.default_root_dir) / "replay"
        self.replay = RowReplay(
            spaces,
            self.capacity // self.world_size,
            num_envs,
            root / f"rank{self.rank}",
            module.latent_specs(),
            self.replay_context + self.batch_length,
            self.replay_context,
            self.seed,
            self.rank,
            self.online_queue,
            reachable,
            sharers=trainer.num_devices,
            pin=trainer.strategy.root_device.type == "cuda",
            within_episodes=self.within_episodes,
        )
        seeds = [self.seed + 10_000 * self.rank + i for i in range(num_envs)]
        envs = self.make_envs(num_envs, seeds)
        prefill = -(-self.prefill // self.world_size)
        self.collector = Collector(
            envs, spaces, self.replay, self.seed, self.rank, prefill, self.epsilon, self.action_noise
        )
        # Through str, so that 0.1 means one tenth. Per step of this process, as every process makes every
        # update.
        per_step = Fraction(str(self.train_ratio)) / (self.batch_size * self.batch_length)
        if self.utd is not None:
            per_step = Fraction(str(self.utd))
        self.ratio = TrainRatio(per_step * self.world_size, self.first_updates)

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
            raise ConfigError(
                f"data.batch_length is {self.batch_length}; expected {steps}, one more than model.horizon"
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
        collector, replay, ratio = self._open()
        self._flush()
        enough = 1 if self.within_episodes else self.local_batch * self.batch_length
        while not ratio.owed(self._clock):
            self._collect(module)
            if ratio.ready_at is None:
                self._begin_training(enough)
        while replay.num_windows == 0:  # resumed without its replay
            self._collect(module)
        ratio.done += 1
        self._totals = self._sum([collector.env_steps, ratio.owed(self._clock)], module.device)
        return self._batch(replay.sample(self.local_batch), module.device)

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
        collector, _, _ = self._open()
        collector.collect(module.policy, module.device)
        if self.within_episodes and collector.terminations and not getattr(module, "episodic", True):
            raise ConfigError(
                f"an episode of {self.env} ended by itself, which a model without termination head takes for "
                "a time limit.\n  Set model.episodic: true."
            )

    def report_batch(self, batch_size: int, length: int, device: torch.device | str = "cpu") -> Batch:
        """Windows of ``length`` steps for a report; leaves the training draws as they are.

        Raises:
            DataError: if there is no complete window yet.
            NotSupported: for another length than ``batch_length`` with ``windows: episode``.
        """
        _, replay, _ = self._open()
        self._flush()
        rows = replay.sample(batch_size, self.replay_context + length, mode="report")
        return replace(self._batch(rows, device), write_back=None)

    def _open(self) -> tuple[Collector, RowReplay, TrainRatio]:
        if self.collector is None or self.replay is None or self.ratio is None:
            raise RuntimeError("the replay is open only after setup('fit'), which Trainer.fit calls")
        return self.collector, self.replay, self.ratio

    def _batch(self, rows: Any, device: torch.device | str) -> Batch:
        _, replay, _ = self._open()
        if self.within_episodes:
            batch = tdmpc2_view(rows)
            return batch if torch.device(device).type == "cpu" else batch.to(device)
        batch = dreamer_view(rows, self.replay_context, self.time_limit_is_terminal, replay.latents)
        index, generation = batch.info["index"], batch.info["generation"]

        def write_back(states: State) -> None:
            latents = to_latents(states, replay.latents)
            if states.deter.device.type != "cuda":
                replay.write_back(index, generation, {k: v.cpu() for k, v in latents.items()})
                return
            # The copy runs behind the update; whoever needs the rows next waits for it.
            staged = {k: torch.empty(v.shape, dtype=v.dtype, pin_memory=True) for k, v in latents.items()}
            for key, value in latents.items():
                staged[key].copy_(value, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record()

            def finish() -> None:
                copied.synchronize()
                replay.write_back(index, generation, staged)

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
        """Env steps of all processes, as of the last ticket."""
        return self._steps_before + self._totals[0]

    @property
    def exhausted(self) -> bool:
        """Whether ``max_env_steps`` are collected and every update that they owe has been handed out."""
        return (
            self.max_env_steps is not None and self.env_steps >= self.max_env_steps and self._totals[1] <= 0
        )

    def pop_finished(self) -> list[tuple[float, int]]:
        """(return, length) of this process's episodes finished since the last call."""
        collector, _, _ = self._open()
        finished, collector.finished = collector.finished, []
        return finished

    def pop_metrics(self) -> dict[str, float]:
        """Scalars of this process: counts, and means over the episodes finished since the last call.

        ``step/episodes``, ``replay/rows``, ``replay/stale_rows``; ``train/return`` and ``train/length`` if
        an episode has finished.
        """
        collector, replay, _ = self._open()
        metrics = {
            "step/episodes": float(collector.episodes),
            "replay/rows": float(len(replay)),
            "replay/stale_rows": float(replay.stale_rows),
        }
        if finished := self.pop_finished():
            for name, values in zip(
                ("train/return", "train/length"), zip(*finished, strict=True), strict=True
            ):
                metrics[name] = sum(values) / len(values)
        return metrics

    def mean_frames(self) -> dict[str, Tensor]:
        """Mean of all frames that this process collected for training, per image key, float64 in 0..255."""
        here = self.collector.mean_frames() if self.collector else {}
        return here or self._restored.get("mean_frames", {})

    # Loaders

    def train_dataloader(self) -> DataLoader:
        """Yields the same ticket forever."""
        return _loader(_Tickets(self.ticket))

    def val_dataloader(self) -> DataLoader:
        """One item; the episodes live in the evaluator."""
        return _loader([0])

    def test_dataloader(self) -> DataLoader:
        """One item; the episodes live in the evaluator."""
        return _loader([0])

    def predict_dataloader(self) -> DataLoader:
        """One item; the episodes live in the evaluator."""
        return _loader([0])

    # Checkpoints. The shared part is small and the same for every process; each process has a part of its
    # own.

    def state_dict(self) -> dict[str, Any]:
        """Env steps of all processes and the mean frame."""
        return {"env_steps": self.env_steps, "mean_frames": self.mean_frames()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of :meth:`state_dict`."""
        self._restored = state_dict
        self._steps_before = state_dict["env_steps"] - self._totals[0]

    def rank_state_dict(self) -> dict[str, Any]:
        """Collector, environments and train ratio of this process, as tensors and plain values."""
        collector, _, ratio = self._open()
        self._flush()
        return {
            "world_size": self.world_size,
            "collector": collector.state_dict(),
            "ratio": {"ready_at": ratio.ready_at, "done": ratio.done},
            "totals": list(self._totals),
            "steps_before": self._steps_before,
        }

    def load_rank_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of :meth:`rank_state_dict`, after :meth:`setup` and :meth:`restore_replay`.

        Raises:
            CheckpointError: if the checkpoint is of another number of processes.
        """
        collector, _, ratio = self._open()
        if state["world_size"] != self.world_size:
            raise CheckpointError(
                f"the checkpoint is of {state['world_size']} processes, this run has {self.world_size}.\n"
                "  Resume with the same number of devices."
            )
        assert self.trainer is not None
        collector.load_state_dict(state["collector"], self.trainer.strategy.root_device)
        ratio.ready_at, ratio.done = state["ratio"]["ready_at"], state["ratio"]["done"]
        self._totals, self._steps_before = list(state["totals"]), state["steps_before"]

    def snapshot_replay(self, directory: Path | str) -> None:
        """Write this process's rows to a new folder, complete or not at all."""
        _, replay, _ = self._open()
        self._flush()
        replay.snapshot(directory)

    def restore_replay(self, directory: Path | str) -> None:
        """Read :meth:`snapshot_replay`.

        Raises:
            CheckpointError: if the folder is damaged or does not fit this run.
        """
        _, replay, _ = self._open()
        replay.restore(directory)

    def close(self) -> None:
        """Close the environments and remove the replay files."""
        if self.collector is not None:
            self._flush()
            self.collector.close()
        if self.replay is not None:
            self.replay.close()
        self.collector = self.replay = self.ratio = None


class _Tickets(IterableDataset):
    def __init__(self, ticket: Ticket):
        self.ticket = ticket

    def __iter__(self) -> Iterator[Ticket]:
        while True:
            yield self.ticket


def _loader(items: Any) -> DataLoader:
    return DataLoader(items, batch_size=None, num_workers=0, collate_fn=_identity)


def _identity(item: Any) -> Any:
    return item
