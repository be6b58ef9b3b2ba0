"""``lit-wm collect``: episodes of a checkpoint or of random actions, written as a dataset."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from datamodules.record import (
    Played,
    Policy,
    Take,
    minari_folder,
    play,
    portable,
    write_demos,
    write_minari,
    write_played,
)
from lit_wm import __version__
from lit_wm.callbacks.evaluate import Interrupts, acting
from lit_wm.callbacks.progress import RLProgressBar
from lit_wm.envs import make_env, spaces_from_gym
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.evaluation_cli import Parser, as_one, check_numbers, check_task, entries_for, load_module
from lit_wm.noise import NoiseStreams
from lit_wm.tasks import misfit, ordered
from lit_wm.training_cli import find_checkpoint
from lit_wm.types import State, Tensors


def collect_parser() -> Parser:
    """The options of ``collect``."""
    parser = Parser(
        prog="lit-wm collect",
        description="Play episodes and write them as a Minari dataset, rows for training or an npz of demos.",
        epilog="Episode k starts from seed S + k. A Minari dataset of a plain Gymnasium environment holds "
        "its own observations and actions; of Atari, dm_control and Crafter, and with options for images or "
        "repeats, what a model sees and does. Images are stored without loss.",
    )
    cuda = torch.cuda.is_available()
    for name, kind, default, meta, meaning in (
        ("env", str, None, "ID", "environment; a checkpoint's own by default"),
        ("policy", str, "random", "random|CKPT", "random, last, best, a run or a .ckpt (random)"),
        ("episodes", int, 10, "N", "number of episodes (10)"),
        ("out", str, None, "minari:ID|rows:PATH|npz:FILE", "what to write"),
        ("seed", int, 0, "S", "of the first episode (0)"),
        ("num-envs", int, 1, "K", "environments side by side (1)"),
        ("task", str, None, "NAME", "the one of several tasks of the checkpoint that is played"),
        ("epsilon", float, 0.0, "P", "probability of a random action instead of the policy's (0)"),
        ("max-steps", int, 30_000, "T", "truncate longer episodes (30000)"),
        ("root", Path, None, "DIR", "folder of Minari's datasets (as Minari finds it)"),
        ("algorithm", str, None, "NAME", "algorithm_name of the dataset (the class of the model, or random)"),
        ("author", str, None, "NAME", "author of the dataset"),
        ("device", str, "cuda" if cuda else "cpu", "cpu|cuda", "where the model runs; cuda if there is one"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=meta, help=meaning)
    meaning = "options of the environment, as K=V or '{K: V}'; the training's if --env is not given"
    parser.add_argument("--env-options", nargs="+", metavar="K=V", help=meaning)
    meaning = "how a checkpoint acts: as in evaluations, as in training, or by its likeliest action (eval)"
    parser.add_argument("--mode", choices=["eval", "train", "greedy"], default="eval", help=meaning)
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that exists")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def env_options_of(given: list[str]) -> dict[str, Any]:
    """Options from ``K=V`` or YAML. Raises ConfigError for anything else."""
    options: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        found = {key: yaml.safe_load(value)} if equals and "{" not in key else yaml.safe_load(text)
        if not isinstance(found, dict):
            raise ConfigError(f"--env-options {text}: expected K=V or '{{K: V}}', e.g. size=64")
        options |= found
    return options


def npz_file(path: str, overwrite: bool) -> Path:
    """Where a new npz will lie. Raises ConfigError for another name, or if something lies there."""
    file = Path(path).expanduser()
    if file.suffix != ".npz":
        raise ConfigError(f"--out npz:{path}: expected a file name that ends in .npz")
    if file.exists() and not (overwrite and file.is_file()):
        raise ConfigError(f"--out npz:{path} exists\n  Give another one, or --overwrite for a file.")
    return file


def rows_folder(path: str, overwrite: bool) -> Path:
    """Where new rows will lie. Raises ConfigError if something else does."""
    folder = Path(path).expanduser()
    if folder.exists() and not (overwrite and (folder / "rows.json").exists()):
        what = "--overwrite replaces rows only" if overwrite else "Give another one, or --overwrite"
        raise ConfigError(f"--out rows:{path} exists; expected a new folder\n  {what}.")
    return folder


def policy_of(given: Any, env: Any, env_id: str, module: Any, about: dict[str, Any]) -> Policy:
    """A checkpoint as a policy for the environment."""
    spaces = spaces_from_gym(env.observation_space, env.action_space)
    noise, task = NoiseStreams(given.seed, 0, given.device), check_task(module, given.task)
    trained_in, order = about["env"], about.get("order")
    if task is not None:
        if wrong := misfit(module.model.tasks[task], module.model.spaces, spaces):
            raise CheckpointError(f"{env_id} {wrong}\nGive the environment and options of that task")
        return acting(module, given.mode, noise, task, ordered(spaces, order))
    join = entries_for(module.model.spaces, spaces, env_id, trained_in is None or bool(given.task))

    def policy(obs: Tensors, state: State | None, is_first: torch.Tensor) -> tuple[Tensors, State]:
        if join:
            one = as_one({k: v.cpu().numpy() for k, v in obs.items()}, join, module.model.spaces.obs["obs"])
            obs = {k: torch.as_tensor(v, device=given.device) for k, v in one.items()}
        return module.policy(obs, state, is_first, given.mode, noise)

    return policy


def collect(argv: list[str]) -> int:
    """``lit-wm collect``: play, write, say how to look at it. Raises LitWMError for anything the user can
    fix, Interrupted by Ctrl-C or SIGTERM, and then nothing is written.
    """
    given = collect_parser().parse_args(argv)
    check_numbers(given, {"episodes": 1, "num_envs": 1, "seed": 0, "epsilon": 0, "max_steps": 1})
    if given.epsilon > 1:
        raise ConfigError(f"--epsilon is {given.epsilon}; expected a probability, 0 to 1")
    if given.device not in ("cpu", "cuda") or (given.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {given.device}: not here; expected cpu, or cuda where there is one")
    scheme, _, target = (given.out or "").partition(":")
    if scheme not in ("minari", "rows", "npz") or not target:
        raise ConfigError(
            f"--out {given.out}: expected minari:ID (cartpole/random-v0), rows:PATH or npz:FILE.npz"
        )
    if scheme == "minari":
        folder = minari_folder(target, given.root, given.overwrite)
    else:
        folder = (rows_folder if scheme == "rows" else npz_file)(target, given.overwrite)
    above = next(p for p in folder.absolute().parents if p.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise ConfigError(f"--out {given.out}: {folder} cannot be written: give a folder that is yours")
    module, about, who = None, {"env": None, "env_options": None}, "random"
    if given.policy != "random":
        try:
            path = find_checkpoint("evaluate", given.policy, {})
            assert path is not None
            module, about = load_module(path, given.device, task=given.task)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace("--ckpt_path", "--policy")) from error
        check_task(module, given.task)
        about |= (about.get("tasks") or {}).get(given.task, {})
        who = f"{type(module).__name__.removesuffix('Module')} ({given.mode}, {module.updates:,} updates"
        who += f", epsilon {given.epsilon:g})" if given.epsilon else ")"
    env_id = given.env or about["env"]
    if env_id is None:
        raise ConfigError(f"in which environment? --policy {given.policy} does not say: give --env ID")
    options = (about["env_options"] or {}) if env_id == about["env"] else {}
    if given.env_options is not None:
        options = env_options_of(given.env_options)
    envs = [make_env(env_id, **options) for _ in range(min(given.num_envs, given.episodes))]
    ends: list[tuple[float, int, bool]] = []  # return, length and whether it terminated, by episode
    bar = RLProgressBar()
    try:
        policy = None if module is None else policy_of(given, envs[0], env_id, module, about)
        shown, spec = portable(envs[0], options) if scheme == "minari" else (envs[0], None)
        with Interrupts() as signals:

            def takes() -> Iterator[Take]:
                for take in play(
                    envs, policy, given.episodes, given.seed, raw=shown is not envs[0], device=given.device,
                    max_steps=given.max_steps, epsilon=given.epsilon,
                    stop=lambda: signals.number is not None,
                    progress=lambda done, steps: bar.episodes(done, given.episodes, steps),
                ):  # fmt: skip
                    yield take
                    ends.append((float(take.reward.sum()), len(take.reward), bool(take.terminated[-1])))
                signals.check(len(ends), given.episodes)

            # The folder of a checkpoint says nothing to those who read the dataset elsewhere.
            full, name = given.policy, Path(given.policy).name
            named = {full: name, f"--policy={full}": f"--policy={name}"}
            command = shlex.join(["lit-wm", "collect", *(named.get(word, word) for word in argv)])
            about_it = f"{given.episodes} episodes of {env_id}, {who}. lit-wm {__version__}: {command}"
            meta = {"env_id": env_id, "env_options": options, "description": about_it}
            name, author = given.algorithm or who, {given.author} - {None}
            if scheme == "minari":
                meta |= {"algorithm_name": name, "author": author}
                write_minari(takes(), folder, target, shown, meta, spec)
            else:
                meta |= {"algorithm": name} | ({"author": sorted(author)} if author else {})
                played = Played(envs[0], takes(), meta, given.episodes)
                (write_played if scheme == "rows" else write_demos)(played, folder)
    finally:
        bar.clear()
        for env in envs:
            env.close()

    returns, lengths, terminated = map(np.array, zip(*ends, strict=True))
    place = f"{scheme}:{folder if given.root or scheme != 'minari' else target}"
    again = f"lit-wm data inspect {shlex.quote(place)}"
    if given.json:
        report = {"out": given.out, "folder": str(folder), "env": env_id, "env_options": options}
        report |= {"episodes": len(returns), "steps": int(lengths.sum()), "seed": given.seed, "policy": who}
        columns = {"returns": returns, "lengths": lengths, "terminated": terminated}
        report |= {k: v.tolist() for k, v in columns.items()}
        print(json.dumps(report | {"inspect": again}))
        return 0
    spread = f", std {returns.std(ddof=1):.2f}" if len(returns) > 1 else ""
    print(f"written:    {folder} ({len(returns):,} episodes, {lengths.sum():,} steps)")
    print(f"return:     {returns.mean():.2f}{spread}, {returns.min():.2f} to {returns.max():.2f}")
    print(f"length:     {lengths.mean():.1f} ({lengths.min()} to {lengths.max()})")
    print(f"terminated: {terminated.mean():.0%}")
    if scheme == "minari" and spec is None:
        print(f"note: Minari's recover_environment() cannot make {env_id}; lit_wm can", file=sys.stderr)
    print(f"look at it: {again}")
    return 0
