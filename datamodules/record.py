"""Episodes played to be kept: a policy in environments, written down as a dataset.

A Minari dataset of a plain Gymnasium environment holds what that environment itself shows and takes, so that
any program can read it; where our wrappers make the environment (Atari, dm_control, Crafter, resized or
stacked images) it holds the wrapped observations and actions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from torch import Tensor

from datamodules.cache import Cache, open_cache, write_rows
from datamodules.episodes import Episode, Schema, Source
from datamodules.files import replacing
from datamodules.sources.npz import write_npz
from datamodules.sources.rows import Rows
from lit_wm.envs import StandardEnv, spaces_from_gym
from lit_wm.envs.wrappers import Vector
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import State, Tensors

Policy = Callable[[Tensors, State | None, Tensor], tuple[Tensors, State]]
_WRAPPING = {"repeat", "size", "gray", "stack", "pixels", "drop"}  # options that our wrapper carries out


@dataclass
class Take:
    """One episode of T steps."""

    number: int  # from 0
    seed: int  # of the reset: that of the first one plus the number
    observation: Any  # arrays (T+1, ...) in the structure and the types of the space
    action: Any  # arrays (T, ...) likewise
    reward: np.ndarray  # in the environment's units (T,)
    terminated: np.ndarray  # (T,) bool; exactly one of these two is True, at the last step
    truncated: np.ndarray


class _Tap(gym.Wrapper):
    """Keeps what passes between an environment and whoever plays it, one episode at a time."""

    def reset(self, **options: Any) -> tuple[Any, dict]:
        obs, info = self.env.reset(**options)
        self._seen, self._steps = [deepcopy(obs)], []  # type: list[Any], list[tuple]
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._seen.append(deepcopy(obs))
        self._steps.append((deepcopy(action), float(reward), bool(terminated), bool(truncated)))
        return obs, reward, terminated, truncated, info

    def take(self, number: int, seed: int) -> Take:
        """The episode, truncated where it stands unless it has terminated."""
        where = f"episode {number}"
        actions, reward, terminated, _ = zip(*self._steps, strict=True)
        ended = np.array(terminated)
        cut = ~ended & (np.arange(len(ended)) == len(ended) - 1)
        seen = _stack(self.observation_space, self._seen, f"{where}: observation")
        done = _stack(self.action_space, actions, f"{where}: action")
        return Take(number, seed, seen, done, np.array(reward), ended, cut)


def _stack(space: spaces.Space, values: Sequence[Any], where: str) -> Any:
    """A tree of arrays from a list of trees."""
    if isinstance(space, spaces.Dict):
        return {k: _stack(sub, [v[k] for v in values], f"{where} {k!r}") for k, sub in space.spaces.items()}
    if isinstance(space, spaces.Tuple):
        parts = enumerate(space.spaces)
        return tuple(_stack(sub, [v[i] for v in values], f"{where} {i}") for i, sub in parts)
    shapes = {np.shape(v) for v in values}
    if shapes != {space.shape}:
        raise DataError(f"{where} has the shapes {', '.join(map(str, shapes))}; its space says {space.shape}")
    return np.stack([np.asarray(v, space.dtype) for v in values])


def portable(env: StandardEnv, options: Iterable[str]) -> tuple[gym.Env, EnvSpec | None]:
    """What of an environment a dataset for any program shows, and what Gymnasium makes it from.

    Args:
        env: of :func:`~lit_wm.envs.make_env`.
        options: the names of its options.

    Returns:
        The environment inside where our wrapper only renames and rescales, else ``env`` itself; its spec,
        None if Gymnasium alone cannot make it or JSON cannot hold it.
    """
    inner, spec = (env, None) if _WRAPPING & set(options) else (env.env, env.env.spec)
    if spec is None:
        atari = env.name.startswith("ALE/") and not list(options)  # our emulator with Gymnasium's settings
        return env, gym.spec(env.name) if atari else None
    try:
        spec.to_json()
    except (TypeError, ValueError):  # made by a function or with arguments that are no plain values
        spec = None
    return inner, spec


def play(
    envs: Sequence[StandardEnv], policy: Policy | None, episodes: int, seed: int, *, raw: bool = False,
    device: torch.device | str = "cpu", max_steps: int | None = None, epsilon: float = 0.0,
    stop: Callable[[], bool] | None = None, progress: Callable[[int, int], None] | None = None,
) -> Iterator[Take]:  # fmt: skip
    """Play whole episodes and hand out each as it ends.

    Environment i of n plays the episodes i, i + n, i + 2n ...: a fixed share, since the first to end would
    favour short ones. Episode k starts from ``seed + k`` whatever n is, random actions included.

    Args:
        envs: of one id and the same options; the policy sees them as one batch.
        policy: ``policy(obs, state, is_first) -> (action, state)``, None for uniformly random actions.
        episodes, seed: how many, and of episode 0.
        raw: hand out what the environments inside show and take, instead of the wrapped entries.
        device: where the policy wants its observations.
        max_steps: truncate an episode after so many decisions.
        epsilon: probability of a uniformly random action instead of the policy's, per decision.
        stop: asked before every decision; True ends it, and episodes that are not complete are lost.
        progress: told at every decision how many episodes are complete and how many decisions were made.
    """
    inner = [_Tap(env.env if raw else env) for env in envs]
    stage: Sequence[gym.Env] = envs if raw else inner
    for env, tap in zip(envs, inner, strict=True):
        env.env = tap if raw else env.env
    n, complete, steps = len(envs), 0, 0
    number, length, first = np.arange(n), np.zeros(n, np.int64), np.ones(n, np.bool_)
    obs = [env.reset(seed=seed + i)[0] for i, env in enumerate(stage)]
    coins = [np.random.default_rng([seed + i, 1]) for i in range(n)]
    state: State | None = None
    while (active := [i for i in range(n) if number[i] < episodes]) and not (stop and stop()):
        if policy is None:
            chosen = [envs[i].action_space.sample() if i in active else None for i in range(n)]
        else:
            seen = {k: torch.as_tensor(np.stack([o[k] for o in obs]), device=device) for k in obs[0]}
            with torch.inference_mode():
                action, state = policy(seen, state, torch.as_tensor(first, device=device))
            random = [epsilon > 0 and coins[i].random() < epsilon for i in range(n)]
            if any(random):
                action = {k: v.clone() for k, v in action.items()}
                for i in [i for i, yes in enumerate(random) if yes]:
                    for k, v in envs[i].action_space.sample().items():
                        action[k][i] = torch.as_tensor(v).to(action[k])
                if state.action is not None:  # it remembers the executed one
                    state = replace(state, action={k: action[k].to(v) for k, v in state.action.items()})
            executed = {k: v.cpu().numpy() for k, v in action.items()}
            chosen = [{k: v[i] for k, v in executed.items()} for i in range(n)]
        first = np.zeros(n, np.bool_)
        for i in active:
            obs[i], _, terminated, truncated, _ = stage[i].step(chosen[i])
            length[i], steps = length[i] + 1, steps + 1
            if not (terminated or truncated or length[i] == max_steps):
                continue
            yield inner[i].take(int(number[i]), seed + int(number[i]))
            complete += 1
            number[i], length[i], first[i] = number[i] + n, 0, True
            if number[i] < episodes:
                start = seed + int(number[i])
                obs[i], coins[i] = stage[i].reset(seed=start)[0], np.random.default_rng([start, 1])
        if progress:
            progress(complete, steps)


class Played(Source):
    """Wrapped episodes of :func:`play`, so many of them, as a source, which can be read once; continuous
    actions are in the environment's units, as it executed them.
    """

    def __init__(self, env: StandardEnv, takes: Iterator[Take], meta: dict[str, Any], episodes: int):
        found = spaces_from_gym(env.observation_space, env.action_space, env.name)
        found = replace(found, episode_length=env.episode_length, unbounded=env.unbounded_actions)
        self._vectors = {e.name: e for e in env.action_entries if isinstance(e, Vector)}
        bounds = [{k: np.array(getattr(e, side), np.float64) for k, e in self._vectors.items()
                   if np.isfinite([e.low, e.high]).any()} for side in ("low", "high")]  # fmt: skip
        self.schema = Schema(found, *bounds)
        self.files, self.meta, self.total_episodes = [], meta, episodes
        self._takes = takes

    def episodes(self) -> Iterator[Episode]:
        """What is played, as it ends."""
        for t in self._takes:
            action = t.action | {k: e.read(t.action) for k, e in self._vectors.items()}
            yield Episode(t.observation, action, t.reward, t.terminated, t.truncated,
                          f"{self.meta['env_id']}, episode {t.number}", t.seed)  # fmt: skip


def minari_folder(dataset_id: str, root: Path | None, overwrite: bool) -> Path:
    """Where a new dataset will lie: ``ROOT/ID``, the root as Minari finds it unless given. Raises ConfigError
    for an id that Minari does not take, or one that exists already.
    """
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage.datasets_root_dir import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError):  # TypeError: there is no version
        raise ConfigError(
            f"{dataset_id!r} is no id of a Minari dataset.\n"
            "  Expected NAME-vNUMBER or NAMESPACE/NAME-vNUMBER, e.g. cartpole/random-v0."
        ) from None
    folder = (get_dataset_path(dataset_id) if root is None else root / dataset_id).absolute()
    if folder.exists() and not (overwrite and (folder / "data").exists()):
        what = "--overwrite replaces datasets only" if overwrite else "Give another id, or --overwrite"
        raise ConfigError(f"{dataset_id!r} exists: {folder}\n  {what}.")
    return folder


def write_minari(
    takes: Iterable[Take], folder: Path, dataset_id: str, env: gym.Env, metadata: dict[str, Any],
    env_spec: EnvSpec | None = None,
) -> None:  # fmt: skip
    """Write episodes as a Minari dataset (HDF5, images without loss), complete or not at all.

    Args:
        takes: read one by one; each is on disk before the next one.
        folder, dataset_id: ``ROOT/ID``, from :func:`minari_folder`, and the id.
        env: has the spaces of the takes. Names with ``/`` become nested Dicts, as HDF5 reads them, and our
            wrapper's Dict of a single unnamed entry becomes this entry.
        metadata: more entries of ``metadata.json``.
        env_spec: what ``recover_environment`` shall make; None if Gymnasium cannot make it.

    Raises:
        DataError: while another process writes the same dataset, and if the disk is full.
    """
    import minari
    from minari.data_collector.episode_buffer import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    folder = folder.absolute()  # Minari takes a relative path twice when it adds up the size
    root = folder.parents[dataset_id.count("/")]
    wrapped = isinstance(env, StandardEnv)
    with replacing(folder, root) as work:
        work.mkdir()
        stored = [_stored(space, wrapped) for space in (env.observation_space, env.action_space)]
        storage = MinariStorage.new(work / "data", *stored, env_spec, "hdf5", jpeg_encoding=False)
        # Minari's own collector would now play a hundred episodes for reference scores: these are left out.
        fixed = {"dataset_id": dataset_id, "minari_version": minari.__version__}
        storage.update_metadata(fixed | {"author": set(), "author_email": set()} | metadata)
        scores: list[dict[str, float]] = []
        for take in takes:
            columns: dict[str, Any] = {"rewards": take.reward, "seed": take.seed}
            columns |= {"terminations": take.terminated, "truncations": take.truncated}
            columns["observations"] = _stored(take.observation, wrapped)
            columns["actions"] = _stored(take.action, wrapped)
            try:
                storage.update_episodes([EpisodeBuffer(**columns)])
            except OSError as error:  # of HDF5: a full disk, for example
                raise DataError(f"{folder} cannot be written: {error}\n  Nothing of it is left.") from error
            names = ("sum", "mean", "std", "max", "min")
            scores.append({f"rewards_{name}": float(getattr(take.reward, name)()) for name in names})
        storage.update_episode_metadata(scores)
    for parent in folder.relative_to(root).parents:
        about = root / parent / "namespace_metadata.json"
        if parent.name and not about.exists():
            about.write_text("{}")


def write_played(source: Played, folder: Path) -> Cache:
    """Write a source as rows; a folder that is there is replaced. Raises DataError as
    :func:`~datamodules.cache.write_rows` does, and while another process writes the same folder.
    """
    folder = folder.expanduser().absolute()
    with replacing(folder, folder.parent) as work:
        write_rows(source, work)
    return open_cache(folder)


def write_demos(source: Source, file: Path) -> None:
    """Write a source that can be read once as an ``npz:`` of demos, complete or not at all; a file is
    replaced. Raises DataError as :func:`write_played` does.
    """
    with replacing(file, file.parent) as work:
        rows = work.with_name("rows")
        write_rows(source, rows)
        write_npz(Rows(str(rows)), work)


def _stored(tree: Any, wrapped: bool) -> Any:
    if wrapped and list(tree) in (["obs"], ["action"]):
        (tree,) = tree.values()
    return _nested(tree)


def _nested(tree: Any) -> Any:
    """A space or a tree of arrays with ``a/b`` as a part of ``a``."""
    if isinstance(tree, spaces.Tuple):
        return spaces.Tuple([_nested(part) for part in tree.spaces])
    if isinstance(tree, tuple):
        return tuple(map(_nested, tree))
    if not isinstance(tree, dict | spaces.Dict):
        return tree
    out: dict[str, Any] = {}
    for key, value in tree.items():
        first, *rest = key.split("/", 1)
        if rest:
            out.setdefault(first, {})[rest[0]] = value
        else:
            out[first] = value
    found = {k: _nested(type(tree)(v) if isinstance(v, dict) else v) for k, v in out.items()}
    return spaces.Dict(found) if isinstance(tree, spaces.Dict) else found
