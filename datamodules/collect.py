"""The loop that lets a policy act in environments and writes what it saw into the replay.

The three autoreset modes of Gymnasium give the same rows in the same order: where the vector environment
would reset at its next step, or not at all, the ended environments are reset at once by a mask. So one call
of the vector environment gives one row per environment, and a second one, the first of the next episode,
where an episode has ended.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.spaces import Dict as DictSpace
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torch import Tensor

from datamodules.replay import RowReplay
from datamodules.sampling import counter_rng
from datamodules.views import to_latents
from lit_wm.errors import ConfigError, NotSupported
from lit_wm.noise import stream_seed
from lit_wm.types import Spaces, State, Tensors

_COUNTS = ("env_steps", "decisions", "episodes", "terminations")

if TYPE_CHECKING:
    Policy = Callable[[Tensors, State | None, Tensor], tuple[Tensors, State]]


class Collector:
    """Steps a vector environment with a recurrent policy; environment i writes stream i of the replay.

    Every row counts as one env step, the first of an episode too, as in the official driver. The last
    observation of an episode has no action, and no latent either: nothing ever starts from it.

    Args:
        env: a Gymnasium vector environment; ``NEXT_STEP`` and ``DISABLED`` must know ``reset_mask``.
        spaces: its entries.
        replay: with as many streams as there are environments.
        seed, rank: environment i of process r starts with ``seed + 10_000 * r + i``.
        prefill: first env steps of this process with uniformly random actions; the policy still follows
            along, so that their latents are valid. With a replay within episodes, which has none, these are
            decisions and the policy is not asked before.
        epsilon: probability that an environment executes a uniformly random action instead of the policy's.
        action_noise: deviation of Gaussian noise on continuous actions, in units of half their range.

    Attributes:
        env_steps, decisions: rows written, actions executed.
        episodes, terminations: episodes finished, and those among them that no time limit has ended.
        finished: (return, length) of finished episodes that nobody has taken yet; length counts actions.
    """

    def __init__(
        self, env: SyncVectorEnv | AsyncVectorEnv, spaces: Spaces, replay: RowReplay, seed: int = 0,
        rank: int = 0, prefill: int = 0, epsilon: float = 0.0, action_noise: float = 0.0,
    ):  # fmt: skip
        if env.num_envs != replay.storage.streams:
            raise ConfigError(f"{env.num_envs} environments cannot write {replay.storage.streams} streams.")
        self.env, self.spaces, self.replay = env, spaces, replay
        self.seed, self.rank, self.prefill = seed, rank, prefill
        self.epsilon, self.action_noise = epsilon, action_noise
        self.same_step = env.metadata.get("autoreset_mode") == AutoresetMode.SAME_STEP
        self.env_steps = self.decisions = self.episodes = self.terminations = 0
        self.finished: list[tuple[float, int]] = []
        self.frame_sums = {k: np.zeros(s.shape, np.int64) for k, s in spaces.obs.items() if s.is_image}
        self._streams = np.arange(env.num_envs)
        self._return = np.zeros(env.num_envs)
        self._length = np.zeros(env.num_envs, np.int64)
        self._state: State | None = None
        self._action: dict[str, np.ndarray] | None = None  # chosen at the newest rows
        # Within episodes the newest action is executed already, and these are not acted on yet.
        self._seen: tuple[dict[str, np.ndarray], np.ndarray] | None = None

    def collect(self, policy: Policy, device: torch.device | str = "cpu") -> int:
        """Step every environment once.

        Args:
            policy: ``policy(obs, state, is_first) -> (action, state)`` over a leading axis of environments,
                called in inference mode; ``obs`` and ``is_first`` are on ``device``.

        Returns:
            Number of rows written.
        """
        before = self.env_steps
        if self.replay.within_episodes:  # the newest weights choose: act, then step
            self._choose(policy, device, *(self._seen or self._begin()))
            assert self._action is not None
            self._seen = self._step(self._action)
        else:  # step, then act: every row is written with the latent that its action was chosen from
            self._choose(policy, device, *(self._step(self._action) if self._action else self._begin()))
        return self.env_steps - before

    def _begin(self) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """First observations of all environments."""
        raw, _ = self.env.reset(seed=self._seeds())
        return self._entries(raw), np.ones(self.env.num_envs, np.bool_)

    def _choose(
        self, policy: Policy, device: torch.device | str, obs: dict[str, np.ndarray], is_first: np.ndarray
    ) -> None:
        """Choose the actions that follow ``obs`` and write both down."""
        state, latent = None, {}
        with torch.inference_mode():
            if self.replay.within_episodes and self.prefilling:
                n, specs = self.env.num_envs, self.spaces.action.items()
                action = {k: torch.zeros(n, *s.shape, dtype=getattr(torch, s.dtype)) for k, s in specs}
                action = self._explore(action)
            else:
                seen = {k: torch.as_tensor(v, device=device) for k, v in obs.items()}
                action, state = policy(seen, self._state, torch.as_tensor(is_first, device=device))
                wanted, action = action, self._explore(action)
                if action is not wanted and state.action is not None:  # stays on the policy's device
                    state = replace(state, action={k: action[k].to(v) for k, v in state.action.items()})
                latent = {k: v.cpu() for k, v in to_latents(state, self.replay.latents).items()}
            chosen = {k: v.cpu().numpy() for k, v in action.items()}
        valid = np.ones_like(is_first)
        self.replay.append(self._streams, obs, is_first, valid, chosen, latent)
        self._count(obs)
        self._state, self._action = state, chosen

    @property
    def prefilling(self) -> bool:
        """Whether the next action is one of the random ones before training."""
        if self.replay.within_episodes:
            # There is nothing to train on before an episode has ended. With prefill: 0 a policy that has
            # learnt elsewhere acts even then.
            nothing = self._state is None and self.replay.num_windows == 0
            return self.prefill > 0 and (self.decisions < self.prefill or nothing)
        return self.env_steps < self.prefill

    def _step(self, action: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Execute the actions, write outcomes and last rows, and begin new episodes where old ones ended."""
        single = not isinstance(self.env.single_action_space, DictSpace)
        raw, reward, terminated, truncated, info = self.env.step(action["action"] if single else action)
        self.replay.set_outcome(self._streams, reward, terminated, truncated)
        self._return += reward
        self._length += 1
        self.decisions += len(reward)
        self.terminations += int(terminated.sum())
        ended = terminated | truncated
        if ended.any():
            which = np.flatnonzero(ended)
            if self.same_step:
                finals = [self._entries(info["final_obs"][i]) for i in which]
                last = {k: np.stack([final[k] for final in finals]) for k in self.spaces.obs}
            else:
                last = {k: v[which] for k, v in self._entries(raw).items()}
            no = np.zeros(len(which), np.bool_)
            self.replay.append(which, last, no, no)
            self._count(last)
            self.finished += [(float(self._return[i]), int(self._length[i])) for i in which]
            self.episodes += len(which)
            self._return[which], self._length[which] = 0.0, 0
            if not self.same_step:
                raw, _ = self.env.reset(options={"reset_mask": ended})
        return self._entries(raw), ended

    def _entries(self, raw: Any) -> dict[str, np.ndarray]:
        """Observations by key, in the type of their spec."""
        named = raw if isinstance(raw, dict) else {"obs": raw}
        return {k: np.asarray(named[k], dtype=spec.dtype) for k, spec in self.spaces.obs.items()}

    def _count(self, obs: dict[str, np.ndarray]) -> None:
        self.env_steps += len(next(iter(obs.values())))
        for key, total in self.frame_sums.items():
            for frame in obs[key]:
                total += frame

    def _explore(self, action: Tensors) -> Tensors:
        """What is executed: random while prefilling, else the policy's action with noise, if there is any.

        The draws depend on the step count only.
        """
        n = self.env.num_envs
        if self.prefilling:
            rng, random = counter_rng(self.seed, self.rank, "prefill", self.env_steps), np.ones(n, np.bool_)
        elif self.epsilon or self.action_noise:
            rng = counter_rng(self.seed, self.rank, "explore", self.env_steps)
            random = rng.random(n) < self.epsilon
        else:
            return action
        out = {}
        for key, spec in self.spaces.action.items():
            shape, like = (n, *spec.shape), action[key]
            if spec.classes is None:
                uniform = torch.as_tensor(rng.uniform(-1, 1, shape)).to(like)
                if self.action_noise:
                    like = like + self.action_noise * torch.as_tensor(rng.normal(size=shape)).to(like)
            else:
                uniform = torch.as_tensor(rng.integers(spec.classes, size=shape)).to(like)
            out[key] = torch.where(torch.from_numpy(random).view(-1, *[1] * len(spec.shape)), uniform, like)
        return out

    def _seeds(self) -> list[int | None]:
        """Environment seeds: the documented ones at the start, others when environments start again later."""
        if self.env_steps == 0:
            return [self.seed + 10_000 * self.rank + i for i in range(self.env.num_envs)]
        names = [f"env {i} at {self.env_steps}" for i in self._streams]
        return [stream_seed(self.seed, self.rank, name) >> 32 for name in names]

    def mean_frames(self) -> dict[str, Tensor]:
        """Mean over all rows written, per image key, float64 in 0..255; empty before the first row."""
        if not self.env_steps:
            return {}
        return {k: torch.from_numpy(total / self.env_steps) for k, total in self.frame_sums.items()}

    def state_dict(self) -> dict[str, Any]:
        """Counters, recurrent state, pending action and environments, as tensors and plain values.

        An environment without an exact snapshot is left out: see :meth:`load_state_dict`.
        """
        from lit_wm.envs import snapshot_vector_env

        envs = None
        if self._action is not None:
            try:
                envs = snapshot_vector_env(self.env)
            except NotSupported as error:
                note = f"{error}; a resumed run starts new episodes instead of going on exactly."
                warnings.warn(note, stacklevel=2)
        state = seen = None
        if self._state is not None:
            state = vars(self._state.map(lambda x: x.cpu().clone()))
        if self._seen is not None:
            obs, first = self._seen
            seen = {"obs": {k: torch.tensor(v) for k, v in obs.items()}, "is_first": torch.tensor(first)}
        counts = {name: getattr(self, name) for name in _COUNTS}
        return {
            **counts,
            "frame_sums": {k: torch.from_numpy(v.copy()) for k, v in self.frame_sums.items()},
            "finished": [list(x) for x in self.finished],
            "return": self._return.tolist(),
            "length": self._length.tolist(),
            "state": state,
            "action": None if self._action is None else {k: torch.tensor(v) for k, v in self._action.items()},
            "seen": seen,
            "envs": envs,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Go on where :meth:`state_dict` was called; the replay must have been restored before.

        Without a snapshot of the environments all start a new episode, and the open ones are cut off in the
        replay.
        """
        for name in _COUNTS:  # older checkpoints, all of DreamerV3, lack two that it does not count by
            setattr(self, name, state.get(name, 0))
        for key, total in state["frame_sums"].items():
            self.frame_sums[key][...] = total.numpy()
        self.finished = [(r, n) for r, n in state["finished"]]
        self._return[:], self._length[:] = state["return"], state["length"]
        self._state = self._action = self._seen = None
        if state["envs"] is None:
            self.replay.cut(self._streams)
            self._return[:], self._length[:] = 0.0, 0
            return
        from lit_wm.envs import restore_vector_env

        self.env.reset(seed=self._seeds())  # some environments create what they restore only here
        restore_vector_env(self.env, state["envs"])
        self._action = {k: v.numpy().copy() for k, v in state["action"].items()}
        if seen := state.get("seen"):
            obs = {k: v.numpy().copy() for k, v in seen["obs"].items()}
            self._seen = obs, seen["is_first"].numpy().copy()
        if state["state"] is not None:
            self._state = State(**state["state"]).map(lambda x: x.to(device))

    def close(self) -> None:
        """Close the environments."""
        self.env.close()
