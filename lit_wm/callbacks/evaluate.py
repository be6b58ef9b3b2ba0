"""Evaluation: whole episodes in environments of their own, and how well the model foresees them.

Nothing that is seen here is ever trained on: the environments have their own seeds, and neither their rows
nor the random numbers of the policy touch training. The same seed gives the same numbers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.loops.evaluation_loop import RestartStage
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from lit_wm.envs import spaces_from_gym
from lit_wm.errors import ConfigError, Interrupted
from lit_wm.noise import NoiseStreams
from lit_wm.openloop import open_loop, open_loop_errors, reconstruct
from lit_wm.scores import Reference, normalized_score
from lit_wm.tasks import as_seen, as_taken, open_tasks, ordered
from lit_wm.types import Spaces, State, Tensors

Policy = Callable[[Tensors, State | None, Tensor], tuple[Tensors, State]]

PER_EPISODE = ("returns", "lengths", "terminated", "cut", "success", "jitter")  # of EpisodeResults

NO_SCORE = "none: some episodes were cut, and reference scores are of whole ones"


@dataclass
class Windows:
    """Held-out windows of frames, all of one length; short ones are filled up and marked.

    Attributes:
        obs: observations, dtype as recorded.                                     (W, T, ...)
        prev_action: action executed before each observation.                     (W, T, ...)
        is_first: where an episode begins.                                        (W, T) bool
        valid: which frames exist.                                                (W, T) bool
        carry: the acting state of the step before the window.                    (W, ...)
    """

    obs: Tensors
    prev_action: Tensors
    is_first: Tensor
    valid: Tensor
    carry: State

    def __len__(self) -> int:
        return self.is_first.shape[0]

    def to(self, device: torch.device | str) -> Windows:
        """Copy all tensors to ``device``."""
        return Windows(
            {k: v.to(device) for k, v in self.obs.items()},
            {k: v.to(device) for k, v in self.prev_action.items()},
            self.is_first.to(device),
            self.valid.to(device),
            self.carry.map(lambda x: x.to(device)),
        )


@dataclass
class EpisodeResults:
    """What :func:`run_episodes` saw.

    Attributes:
        returns: undiscounted return of each episode, in environment reward units.
        lengths: agent decisions of each episode.
        terminated: whether an episode ended by itself, not by a time limit.
        cut: whether the evaluation's own limit ended it.
        success: ``is_success`` or ``success`` in the info of its last step; None if the environment gave
            neither there.
        jitter: mean absolute change of the continuous actions from one decision of an episode to the next,
            in units of half their range; None without such actions, or with one decision only.
        windows: held-out windows, None if there is none.
        rows: if recorded, one dict of arrays per episode: ``obs/KEY``, ``action/KEY``, ``reward``,
            ``terminated``, ``truncated`` with one row per observation; the last row's action is zero, it was
            never executed.
        reference: what normalised scores are relative to, if that is known.
        tasks: of a model of several tasks the results of each; the lists above are then those of all.
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    terminated: list[bool] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    success: list[bool | None] = field(default_factory=list)
    jitter: list[float | None] = field(default_factory=list)
    windows: Windows | None = None
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    reference: Reference | None = None
    tasks: dict[str, EpisodeResults] = field(default_factory=dict)

    @classmethod
    def of_tasks(cls, tasks: dict[str, EpisodeResults]) -> EpisodeResults:
        """The results of several tasks together."""
        lists = {k: [x for part in tasks.values() for x in getattr(part, k)] for k in PER_EPISODE}
        return cls(**lists, tasks=tasks)  # type: ignore[arg-type]

    def summary(self, prefix: str = "eval/") -> dict[str, float]:
        """Means over the episodes; from two on their spread, from five on the return's 95 % interval.

        ``success`` is there if the environment reports it (an episode without a report counts as failed),
        ``normalized`` with a reference and of whole episodes alone, ``jitter`` with continuous actions,
        ``cut``, the number of episodes cut by the evaluation's limit, if there are any. Of several tasks each
        has its own as ``TASK/return`` ...; ``return``, ``normalized``, ``length``, ``terminated`` and
        ``success`` are the means of those that all have.
        """
        result = {f"{prefix}episodes": float(len(self.returns))}
        if not self.returns:
            return result
        if self.tasks:
            each = {name: part.summary("") for name, part in self.tasks.items()}
            for key in ("return", "normalized", "length", "terminated", "success"):
                if all(key in part for part in each.values()):
                    result[f"{prefix}{key}"] = float(np.mean([part[key] for part in each.values()]))
            return result | {f"{prefix}{n}/{k}": v for n, part in each.items() for k, v in part.items()}
        values = np.asarray(self.returns, np.float64)
        result[f"{prefix}return"] = float(values.mean())
        if self.reference is not None and not any(self.cut):
            result[f"{prefix}normalized"] = float(normalized_score(self.reference, values.mean()))
        result[f"{prefix}length"] = float(np.mean(self.lengths))
        result[f"{prefix}terminated"] = float(np.mean(self.terminated))
        if any(x is not None for x in self.success):
            result[f"{prefix}success"] = float(np.mean([bool(x) for x in self.success]))
        if jitters := [x for x in self.jitter if x is not None]:
            result[f"{prefix}jitter"] = float(np.mean(jitters))
        if any(self.cut):
            result[f"{prefix}cut"] = float(sum(self.cut))
        if len(values) > 1:
            result[f"{prefix}return_std"] = float(values.std(ddof=1))
        if len(values) >= 5:  # resampling fewer gives an interval that is far too narrow
            low, high = confidence_interval(values)
            result[f"{prefix}return_low"] = low
            result[f"{prefix}return_high"] = high
        return result


def confidence_interval(values: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean, 10,000 resamples; the same values give the same bounds."""
    rng = np.random.default_rng(0)
    means = np.concatenate([rng.choice(values, (1000, len(values))).mean(1) for _ in range(10)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


class _Reservoir:
    """A uniform sample of at most ``size`` items of a stream."""

    def __init__(self, size: int, seed: int):
        self.size, self.seen, self.items = size, 0, []  # type: int, int, list[Any]
        self.rng = np.random.default_rng(seed)

    def add(self, item: Any) -> None:
        self.seen += 1
        if len(self.items) < self.size:
            self.items.append(item)
        elif (slot := int(self.rng.integers(self.seen))) < self.size:
            self.items[slot] = item


class _Recorder:
    """Cuts the rows of each environment into windows and keeps a bounded, uniform sample of them."""

    def __init__(self, size: int, length: int, seed: int):
        self.length = length
        self.full, self.short = _Reservoir(size, seed), _Reservoir(size, seed + 1)
        self.open: dict[int, dict[str, Any]] = {}

    def add(self, env: int, obs: Tensors, action: Tensors, is_first: bool, carry: State, end: bool) -> None:
        window = self.open.setdefault(env, {"carry": carry, "obs": [], "action": [], "is_first": []})
        window["obs"].append({k: v[env].clone() for k, v in obs.items()})
        window["action"].append({k: v[env].clone() for k, v in action.items()})
        window["is_first"].append(is_first)
        if end or len(window["is_first"]) == self.length:
            kind = self.full if len(window["is_first"]) == self.length else self.short
            kind.add(self.open.pop(env))

    def windows(self) -> Windows | None:
        """The full windows; short ones, filled up with their last frame, take the places that are left."""
        chosen = [*self.full.items, *self.short.items][: self.full.size]
        if not chosen:
            return None

        def column(rows: list[Tensors]) -> Tensors:
            rows = rows + rows[-1:] * (self.length - len(rows))
            return {k: torch.stack([row[k] for row in rows]) for k in rows[0]}

        def batch(parts: list[Tensors]) -> Tensors:
            return {k: torch.stack([part[k] for part in parts]) for k in parts[0]}

        counts = torch.tensor([len(w["is_first"]) for w in chosen])
        first = torch.zeros(len(chosen), self.length, dtype=torch.bool)
        for row, window in enumerate(chosen):
            first[row, : len(window["is_first"])] = torch.tensor(window["is_first"])
        carries = [w["carry"] for w in chosen]
        stoch = None if carries[0].stoch is None else torch.stack([c.stoch for c in carries])
        return Windows(
            obs=batch([column(w["obs"]) for w in chosen]),
            prev_action=batch([column(w["action"]) for w in chosen]),
            is_first=first,
            valid=torch.arange(self.length)[None] < counts[:, None],
            carry=State(torch.stack([c.deter for c in carries]), stoch),
        )


@torch.no_grad()
def run_episodes(
    policy: Policy,
    env: Any,
    episodes: int,
    seed: int,
    *,
    device: torch.device | str = "cpu",
    max_steps: int | None = None,
    windows: int = 0,
    window_length: int = 32,
    record: bool = False,
    stop: Callable[[], bool] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EpisodeResults:
    """Play whole episodes and count them fairly.

    Each environment plays a fixed share of the episodes. Taking the first to finish instead would favour
    short ones.

    Args:
        policy: ``policy(obs, state, is_first) -> (action, state)`` on tensors with one row per environment.
        env: a Gymnasium vector environment with flat Dict spaces and autoreset disabled.
        episodes: number of episodes in all.
        seed: environment i is reset with ``seed + i`` once, before its first episode.
        device: where the policy wants its observations.
        max_steps: cut an episode after this many decisions and count it with what it has; None never cuts.
        windows: keep up to this many windows, a uniform sample over all episodes.
        window_length: frames in a window.
        record: keep all rows of all episodes.
        stop: asked at every step; True ends it with the episodes finished so far.
        progress: told at every step how many episodes are finished and how many decisions were made.
    """
    num = env.num_envs
    share = np.array([episodes // num + (i < episodes % num) for i in range(num)])
    recorder = _Recorder(windows, window_length, seed)
    tracks: list[dict[str, list]] = [{} for _ in range(num)]
    finished: list[list[tuple]] = [[] for _ in range(num)]
    rows: list[list[dict[str, np.ndarray]]] = [[] for _ in range(num)]
    total, length, steps = np.zeros(num), np.zeros(num, np.int64), 0
    moved = np.zeros(num)  # sum of changes of the action in the episode; NaN without continuous ones

    obs = _tensors(env.reset(seed=[seed + i for i in range(num)])[0])
    is_first, state = np.ones(num, bool), None
    prev_action: Tensors | None = None
    carry: State | None = None  # the state before the current observation, on the CPU
    flags = {"reward": np.zeros(num), "terminated": np.zeros(num, bool), "truncated": np.zeros(num, bool)}

    def keep(i: int, action: Tensors, last: bool) -> None:
        """Store the current observation of environment i, with the action that follows it."""
        if windows:
            assert carry is not None
            assert prev_action is not None
            before = carry[i].map(torch.zeros_like if is_first[i] else torch.clone)
            recorder.add(i, obs, prev_action, bool(is_first[i]), before, last)
        if record:
            row = {f"obs/{k}": v[i] for k, v in obs.items()}
            row |= {f"action/{k}": torch.zeros_like(v[i]) if last else v[i] for k, v in action.items()}
            row |= {k: torch.as_tensor(v[i]) for k, v in flags.items()}
            for name, value in row.items():
                tracks[i].setdefault(name, []).append(value.numpy().copy())
        if record and last:
            rows[i].append({k: np.stack(v) for k, v in tracks[i].items()})
            tracks[i] = {}

    while (share > 0).any() and not (stop is not None and stop()):
        action, state = policy(
            {k: v.to(device) for k, v in obs.items()}, state, torch.from_numpy(is_first).to(device)
        )
        action = {k: v.detach().cpu() for k, v in action.items()}
        now = State(state.deter, state.stoch).map(lambda x: x.cpu()) if windows else None
        if prev_action is None:
            prev_action = {k: torch.zeros_like(v) for k, v in action.items()}
            carry = None if now is None else now.map(torch.zeros_like)
        moved += np.where(is_first, 0, _change(prev_action, action))
        for i in np.flatnonzero(share):
            keep(int(i), action, last=False)

        seen, reward, terminated, truncated, info = env.step({k: v.numpy() for k, v in action.items()})
        obs, prev_action, carry = _tensors(seen), action, now
        total, length, steps = total + reward, length + 1, steps + int(np.count_nonzero(share))
        ended = terminated | truncated
        if max_steps is not None:
            truncated = truncated | (length >= max_steps)
        flags = {"reward": reward, "terminated": terminated, "truncated": truncated}
        is_first, done = np.zeros(num, bool), terminated | truncated
        if progress is not None:
            progress(sum(map(len, finished)) + int(np.count_nonzero(done & (share > 0))), steps)
        if not done.any():
            continue
        for i in np.flatnonzero(done & (share > 0)):
            keep(int(i), action, last=True)
            jitter = None if length[i] == 1 or np.isnan(moved[i]) else float(moved[i] / (length[i] - 1))
            how = (bool(terminated[i]), not ended[i], _success(info, int(i)), jitter)
            finished[i].append((float(total[i]), int(length[i]), *how))
            share[i] -= 1
        obs = _tensors(env.reset(options={"reset_mask": done})[0])
        is_first, prev_action = done, {k: v.clone() for k, v in action.items()}
        for v in prev_action.values():
            v[torch.from_numpy(done)] = 0
        total[done], length[done], moved[done] = 0, 0, 0
        flags = {k: np.where(done, 0, v) for k, v in flags.items()}

    results = EpisodeResults(windows=recorder.windows())
    for plays, records in zip(finished, rows, strict=True):
        for play in plays:
            for name, value in zip(PER_EPISODE, play, strict=True):
                getattr(results, name).append(value)
        results.rows.extend(records)
    return results


def _success(info: dict[str, Any], i: int) -> bool | None:
    """What environment i says of its episode; ``_KEY`` marks the environments that gave ``KEY``."""
    for key in ("is_success", "success"):
        if key in info and info[f"_{key}"][i]:
            return bool(info[key][i])
    return None


def _change(before: Tensors, now: Tensors) -> np.ndarray:
    """Mean absolute change of the continuous actions, which lie in -1 ... 1; NaN if there are none. (N,)"""
    pairs = [(before[k].clamp(-1, 1), v.clamp(-1, 1)) for k, v in now.items() if v.is_floating_point()]
    changes = [(b - a).abs().flatten(1) for a, b in pairs]
    return torch.cat(changes, 1).double().mean(1).numpy() if changes else np.array(np.nan)


def acting(module: Any, mode: str, noise: Any, task: int | None = None, own: Spaces | None = None) -> Policy:
    """How a module acts: in its environment, or in that of the ``task`` of this number, with its ``own``
    spaces.
    """
    if task is None or own is None:
        return lambda obs, state, is_first: module.policy(obs, state, is_first, mode, noise)

    def policy(obs: Tensors, state: State | None, is_first: Tensor) -> tuple[Tensors, State]:
        seen = as_seen(obs, own.obs, module.model.spaces.obs)
        action, state = module.policy(seen, state, is_first, mode, noise, task)
        return as_taken(action, own.action), state

    return policy


class Interrupts:
    """While entered, Ctrl-C and SIGTERM are noted in ``number``; Ctrl-C after that stops at once.

    Args:
        answer: printed behind the signal's name.
        enabled: False does nothing, like any other thread than the main one.
    """

    def __init__(self, answer: str = "stopping", enabled: bool = True):
        self.number: int | None = None
        self._answer = answer
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM) if self._enabled else ():
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: Any) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: Any) -> None:
        if self.number is None:
            self.number = number
            print(f"\n{signal.Signals(number).name}: {self._answer}; Ctrl-C now stops at once", flush=True)
        elif number == signal.SIGINT:  # SIGTERM may come twice, from the outside and from the first process
            self.__exit__()
            raise KeyboardInterrupt

    def check(self, done: int, episodes: int) -> None:
        """Raise Interrupted if not all episodes are ``done``."""
        if done < episodes:
            number = self.number or signal.SIGTERM  # None: another process has heard it
            raise Interrupted(
                f"{signal.Signals(number).name}: stopped after {done} of {episodes} episodes; "
                "nothing was written",
                number,
            )


def _tensors(obs: dict[str, np.ndarray]) -> Tensors:
    """Copies, as a vector environment may write into its buffers again."""
    return {k: torch.from_numpy(np.array(v)) for k, v in obs.items()}


def foresight(
    model: Any,
    windows: Windows,
    mean: dict[str, Tensor] | None = None,
    context: int | None = None,
    horizons: tuple[int, ...] = (5, 15),
    noise: Any = None,
) -> tuple[dict[str, float], Tensors]:
    """Errors of reconstruction and dream on held-out windows, and the predictions behind them.

    Args:
        model: a world model with the verbs ``encode``, ``imagine`` and ``decode``.
        windows: of :func:`run_episodes`, on the model's device.
        mean: mean training frame by key, images in [0, 1].
        context: frames that the dream sees, default half of the window.
        horizons: dreamed steps to report.
        noise: another source of noise than the model's own.

    Returns:
        The dict of :func:`lit_wm.openloop.open_loop_errors` and the open-loop predictions (W, T, ...) by key.
    """
    context = context or windows.is_first.shape[1] // 2
    given = (windows.obs, windows.prev_action, windows.is_first)
    seen = reconstruct(model, *given, carry=windows.carry, noise=noise)
    dreamed = open_loop(model, *given, context, carry=windows.carry, noise=noise)
    errors = open_loop_errors(windows.obs, seen, dreamed, context, horizons, mean, windows.valid)
    return errors, dreamed


class Evaluate(pl.Callback):
    """Play episodes at every validation; the final protocol in ``test``; record episodes in ``predict``.

    Uses ``make_envs``, ``eval_envs``, ``env``, ``env_steps`` and ``mean_frames`` of the data module. Metrics
    go to every logger with environment steps as x axis: ``eval/return``, ``eval/return_std``,
    ``eval/return_low`` and ``eval/return_high`` (95 % interval of the mean), ``eval/length``,
    ``eval/episodes``, ``eval/terminated``, ``eval/success`` if the environment reports it,
    ``eval/normalized`` where reference scores are known, see :mod:`lit_wm.scores`, ``eval/jitter``
    with continuous actions (mean absolute change from decision to decision, in units of half their range),
    and, for models that decode, the errors of :func:`foresight` as ``dream/...``. ``eval/return`` can be
    monitored. Every validation meets the same seeds. With several processes each plays its share with seeds
    of its own. A model of several tasks plays ``episodes`` of each one that has an environment (see
    ``eval_tasks`` of the data module): ``eval/TASK/return`` and so on, and their means as ``eval/return``;
    such runs have no ``dream/...``.

    Args:
        episodes: episodes of a validation.
        test_episodes: episodes of ``test``; the result is also written to ``test.json`` in the run directory.
        predict_episodes: episodes of ``predict``, written to ``episodes.npz`` in the run directory.
        max_episode_steps: cut longer episodes, in decisions.
        windows: held-out windows kept for the open-loop errors and the dream video; none for a model that
            does not decode.
        window_length: frames of a window; the first half is seen, the second dreamed.
        seed: of environments and policy; far from the training seeds. ``test`` uses ``seed + 500_000``.
    """

    def __init__(
        self,
        episodes: int = 8,
        test_episodes: int = 100,
        predict_episodes: int = 1,
        max_episode_steps: int = 30_000,
        windows: int = 16,
        window_length: int = 32,
        seed: int = 1_000_000,
    ):
        super().__init__()
        for name in ("episodes", "test_episodes", "predict_episodes", "max_episode_steps"):
            if (value := locals()[name]) < 1:
                raise ConfigError(f"evaluate.{name} must be at least 1, got {value}")
        if window_length < 2:
            raise ConfigError(
                f"evaluate.window_length is {window_length}; expected at least 2: half seen, half dreamed"
            )
        self.episodes, self.test_episodes, self.predict_episodes = episodes, test_episodes, predict_episodes
        self.max_episode_steps, self.seed = max_episode_steps, seed
        self.windows, self.window_length = windows, window_length
        self.results: EpisodeResults | None = None
        self.errors: dict[str, float] = {}
        self.prediction: Tensors | None = None
        self.measured_at = -1  # updates when errors and prediction were taken
        self.played_at = -1  # and when the episodes were played
        self._owed = False  # the evaluation of this update: one that resumes begins with it
        self._envs: dict[str | None, Any] = {}  # by task

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse a seed with which evaluation would meet the training's episodes."""
        seed = getattr(getattr(trainer, "datamodule", None), "seed", None)
        for own in (self.seed, self.seed + 500_000):
            if stage == "fit" and seed is not None and abs(own - seed) < 10_000 * trainer.world_size:
                raise ConfigError(
                    f"evaluate.seed {self.seed} is too near to the training's seed {seed}: evaluation would "
                    f"meet the training's episodes\nUse another: --evaluate.seed {seed + 1_000_000}"
                )

    def state_dict(self) -> dict[str, Any]:
        """Whether an evaluation is owed."""
        return {"owed": self._owed}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The same; checkpoints of older versions owe none."""
        self._owed = bool(state_dict.get("owed"))

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Let a training that was stopped before or in an evaluation begin with it, if it is still due."""
        loop: Any = trainer.fit_loop.epoch_loop
        if self._owed and loop.restarting:
            # So Lightning goes on with a validation that was interrupted between two of its batches ...
            loop.val_loop._restart_stage = RestartStage.RESTARTED_MID_EVALUATION
            loop.val_loop.restarting = False  # ... here with the first of them.
            loop._batches_that_stepped -= loop.restarted_on_train_batch_end  # it will count this one twice

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Know what is due before a checkpoint of this update is saved; it is the last of the callbacks."""
        done, every = trainer.fit_loop.epoch_loop.total_batch_idx + 1, trainer.val_check_batch
        self._owed = bool(every and done % every == 0)

    def run(
        self, trainer: pl.Trainer, module: Any, episodes: int, seed: int, record: bool = False
    ) -> EpisodeResults:
        """Play this process's share of ``episodes``, of several tasks so many of each, and bring the numbers
        of all processes together.

        Windows and recorded rows stay those of this process.

        Raises:
            Interrupted: by Ctrl-C or SIGTERM outside of a training, which has its own way to stop.
        """
        names = open_tasks(module.model)
        if not names:
            return self._run(trainer, module, episodes, seed, record)
        played = [name for name in names if name in data_of(trainer).eval_tasks]
        each = {}
        for name in played:
            each[name] = self._run(trainer, module, episodes, seed, record, name, names.index(name))
            known = data_of(trainer).eval_tasks[name]["reference"]
            each[name].reference = known and Reference(**known)
        return EpisodeResults.of_tasks(each)

    def _run(
        self, trainer: pl.Trainer, module: Any, episodes: int, seed: int, record: bool,
        task: str | None = None, number: int | None = None,
    ) -> EpisodeResults:  # fmt: skip
        rank, world = trainer.global_rank, trainer.world_size
        mine = episodes // world + (rank < episodes % world)
        results = EpisodeResults()
        fitting, show = trainer.state.fn == "fit", getattr(trainer.progress_bar_callback, "episodes", None)
        with Interrupts(enabled=not fitting) as signals:
            if mine:
                # Streams of its own, so that evaluating draws nothing from training's.
                env, own = self._open_env(data_of(trainer), mine, world, task), None
                if task is not None:
                    own = spaces_from_gym(env.single_observation_space, env.single_action_space)
                    own = ordered(own, data_of(trainer).eval_tasks[task].get("order"))
                results = run_episodes(
                    acting(module, "eval", NoiseStreams(seed, rank, module.device), number, own),
                    env,
                    mine,
                    seed + 10_000 * rank,
                    device=module.device,
                    max_steps=self.max_episode_steps,
                    windows=0
                    if record or task or not getattr(module.model, "decodes", True)
                    else self.windows,
                    window_length=self.window_length,
                    record=record,
                    stop=lambda: leaving(trainer) if fitting else signals.number is not None,
                    progress=None if show is None else lambda done, steps: show(done, mine, steps, trainer),
                )
            launcher: Any = trainer.strategy.launcher
            if signals.number == signal.SIGTERM and hasattr(launcher, "kill"):
                launcher.kill(signal.SIGTERM)  # the processes that this one started, and waits for now
            if world > 1:
                results = _gather(results, -(-episodes // world), trainer)
        if not fitting:
            signals.check(len(results.returns), episodes)
        results.reference = getattr(data_of(trainer), "reference", None)
        return results

    def _open_env(self, data: Any, episodes: int, world_size: int, task: str | None) -> Any:
        count = min(max(1, data.eval_envs // world_size), episodes)
        if task in self._envs and self._envs[task].num_envs != count:
            self._envs.pop(task).close()
        if task not in self._envs:
            seeds = list(range(self.seed, self.seed + count))  # each run resets with its own
            more = {} if task is None else {"task": task}
            self._envs[task] = data.make_envs(count, seeds, **more)
        return self._envs[task]

    def _close(self) -> None:
        while self._envs:
            self._envs.popitem()[1].close()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Close the environments."""
        self._close()

    def _foresee(self, trainer: pl.Trainer, module: Any, seed: int) -> dict[str, float]:
        """Errors on the windows of the last run; each process looks at its own, loggers take rank 0's."""
        self.errors, self.prediction, self.measured_at = {}, None, int(module.updates)
        if self.results is not None and self.results.windows is not None:
            self.errors, self.prediction = foresight(
                module.model,
                self.results.windows.to(module.device),
                mean_frames(data_of(trainer)),
                noise=NoiseStreams(seed, 0, module.device),
            )
        return {f"dream/{name}": value for name, value in self.errors.items()}

    def catch_up(self, trainer: pl.Trainer, module: Any) -> None:
        """Measure the present weights, unless the last evaluation did; on its windows if it has any."""
        if self.measured_at == int(module.updates) or leaving(trainer) or not playable(trainer):
            return
        if self.results is None:
            self.results = self.run(trainer, module, self.episodes, self.seed)
            self.played_at = int(module.updates)
        self._foresee(trainer, module, self.seed)

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Play, measure, log; nothing where datasets name no environment to play in."""
        if trainer.sanity_checking:
            return
        results = None
        if playable(trainer) and not leaving(trainer):
            results = self.run(trainer, pl_module, self.episodes, self.seed)
        if leaving(trainer):  # its numbers would be of too few and too short episodes
            trainer.checkpoint_callback.break_off(trainer, pl_module)  # type: ignore[union-attr]
            return
        self._owed = False
        if results is None:
            return
        for name, part in (results.tasks or {"": results}).items():
            if self.results is None and "normalized" in part.summary("") and trainer.is_global_zero:
                print(f"eval/{name}{'/' * bool(name)}normalized: {part.reference}", file=sys.stderr)
        self.results, self.played_at = results, int(pl_module.updates)
        metrics = self.results.summary() | self._foresee(trainer, pl_module, self.seed)
        self._log(trainer, pl_module, metrics, "eval/return")

    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The final protocol."""
        seed = self.seed + 500_000
        self.results = self.run(trainer, pl_module, self.test_episodes, seed)
        metrics = self.results.summary("test/") | self._foresee(trainer, pl_module, seed)
        self._log(trainer, pl_module, metrics, "test/return")
        self._write_test(trainer, pl_module, seed, metrics)

    @rank_zero_only
    def _write_test(self, trainer: pl.Trainer, module: Any, seed: int, metrics: dict[str, float]) -> None:
        assert self.results is not None
        report = {
            "env": data_of(trainer).env,
            "checkpoint": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
            "env_steps": int(data_of(trainer).env_steps),
            "updates": int(module.updates),
            "seed": seed,
            "metrics": metrics,
            "reference": self.results.reference and self.results.reference._asdict(),
            "returns": self.results.returns,
            "lengths": self.results.lengths,
            "terminated": self.results.terminated,
            "cut": self.results.cut,
            "success": self.results.success,
            "jitter": self.results.jitter,
        }
        if self.results.tasks:
            lists = {n: {k: getattr(part, k) for k in PER_EPISODE} for n, part in self.results.tasks.items()}
            report["tasks"] = {n: data_of(trainer).eval_tasks[n] | per for n, per in lists.items()}
        path = Path(trainer.default_root_dir) / "test.json"
        write_atomic(path, lambda part: part.write_text(json.dumps(report, indent=1) + "\n"))
        value, low, high = (metrics.get(f"test/return{x}", float("nan")) for x in ("", "_low", "_high"))
        interval = "" if low != low else f"95 % interval {low:.2f} to {high:.2f}, "
        episodes = f"{len(self.results.returns)} episodes{self.cut_note()}"
        print(f"test: return {value:.2f}, {interval}{episodes}: {path}")
        if self.results.reference:
            score = f"{metrics['test/normalized']:.2f}" if "test/normalized" in metrics else NO_SCORE
            print(f"test: normalized {score}; {self.results.reference}")

    def cut_note(self) -> str:
        """How many of the last episodes ``max_episode_steps`` has cut, for the line of their score."""
        cut = sum(self.results.cut) if self.results else 0
        return f" ({cut} cut at max_episode_steps {self.max_episode_steps:,})" if cut else ""

    def on_predict_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Record episodes: each process writes those it played."""
        results = self.run(trainer, pl_module, self.predict_episodes, self.seed, record=True)
        rank = f"-rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        for name, part in (results.tasks or {"": results}).items():
            if not part.rows:
                continue
            name = f"episodes{f'-{name}' if name else ''}{rank}.npz".replace("/", "_")
            path = write_episodes(Path(trainer.default_root_dir) / name, part.rows)
            print(f"predict: {len(part.rows)} episodes, {sum(map(len_rows, part.rows))} rows: {path}")

    def _log(self, trainer: pl.Trainer, module: Any, metrics: dict[str, float], watch: str) -> None:
        # Loggers get integers as steps (a metric called "step" would be rounded to float32); `log` feeds only
        # checkpointing and early stopping.
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=int(getattr(module, "axis", data_of(trainer).env_steps)))
        if watch in metrics:
            module.log(watch, metrics[watch], logger=False, prog_bar=False, sync_dist=False)


def data_of(trainer: pl.Trainer) -> Any:
    """The data module of a trainer; Lightning sets this attribute without declaring it."""
    return trainer.datamodule  # type: ignore[attr-defined]


def playable(trainer: pl.Trainer) -> bool:
    """Whether the data module has an environment to play episodes in, of several tasks of one at least."""
    if open_tasks(getattr(trainer.lightning_module, "model", None)):
        return bool(getattr(data_of(trainer), "eval_tasks", None))
    return getattr(data_of(trainer), "evaluation_env", "") is not None


def leaving(trainer: pl.Trainer) -> bool:
    """Whether somebody has pressed Ctrl-C, and does not want to wait for episodes."""
    return bool(getattr(trainer.checkpoint_callback, "stopping", False))


def mean_frames(data: Any) -> dict[str, Tensor] | None:
    """The mean training frame of every image, in [0, 1]; None without images or before the first row."""
    return {k: v.float() / 255 for k, v in data.mean_frames().items()} or None


def len_rows(rows: dict[str, np.ndarray]) -> int:
    """Number of rows of a recorded episode."""
    return len(rows["reward"])


def write_episodes(path: str | Path, rows: list[dict[str, np.ndarray]]) -> Path:
    """Write recorded episodes one behind the other to a compressed npz file without pickles.

    Arrays: those of :attr:`EpisodeResults.rows` concatenated, and ``episode`` (N,) int64, the episode of
    each row.
    """
    arrays = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    arrays["episode"] = np.repeat(np.arange(len(rows)), [len_rows(row) for row in rows])

    def save(part: Path) -> None:
        with open(part, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    return write_atomic(Path(path), save)


def write_atomic(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let ``write`` fill a file beside ``path`` and move it there in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        os.replace(part, path)
    except OSError as error:
        raise ConfigError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _gather(results: EpisodeResults, most: int, trainer: pl.Trainer) -> EpisodeResults:
    """Returns, lengths and ends of all processes; shares differ by one episode, hence the padding."""
    table = torch.full((most, 6), float("nan"), dtype=torch.float64)
    success, jitter = (
        [float("nan") if x is None else float(x) for x in values]
        for values in (results.success, results.jitter)
    )
    columns = (results.returns, results.lengths, results.terminated, results.cut, success, jitter)
    for row, values in enumerate(zip(*columns, strict=True)):
        table[row] = torch.tensor(values, dtype=torch.float64)
    gathered = trainer.strategy.all_gather(table.to(trainer.strategy.root_device)).reshape(-1, 6).cpu()
    rows = gathered[~gathered[:, 0].isnan()].tolist()
    return replace(
        results,
        returns=[row[0] for row in rows],
        lengths=[int(row[1]) for row in rows],
        terminated=[bool(row[2]) for row in rows],
        cut=[bool(row[3]) for row in rows],
        success=[None if row[4] != row[4] else bool(row[4]) for row in rows],
        jitter=[None if row[5] != row[5] else row[5] for row in rows],
    )
