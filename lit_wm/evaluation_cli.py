"""``evaluate`` and ``export``: a checkpoint by itself, without Trainer, data module or replay."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import os
import pydoc
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import yaml
from PIL import Image

from lit_wm.callbacks.evaluate import (
    NO_SCORE,
    PER_EPISODE,
    EpisodeResults,
    Interrupts,
    acting,
    run_episodes,
    write_atomic,
)  # fmt: skip
from lit_wm.callbacks.progress import RLProgressBar
from lit_wm.envs import make_vector_env, spaces_from_gym, suite_defaults
from lit_wm.errors import CheckpointError, ConfigError, EnvError, nearest
from lit_wm.module import WorldModelModule
from lit_wm.noise import NoiseStreams, stream_seed
from lit_wm.openloop import rgb, write_gif
from lit_wm.scores import Reference, reference_of
from lit_wm.tasks import Task, list_tasks, misfit, open_tasks, ordered
from lit_wm.tracking import flatten, versions
from lit_wm.training_cli import find_checkpoint, stored_run
from lit_wm.types import Spaces, Spec

VIDEO_FRAMES, VIDEO_SIDE = 2_000, 320  # a video ends after so many frames; larger renderings are shrunk
EXPORTED = ["state_dict", "hyper_parameters", "hparams_name", "pytorch-lightning_version"]
EXPORTED += ["epoch", "global_step"]


class Parser(argparse.ArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str) -> NoReturn:
        """Every refusal as a ConfigError."""
        raise ConfigError(f"{message}\nAll options: {self.prog} --help")


def parser_of(verb: str, description: str, epilog: str | None = None) -> Parser:
    """A parser that knows ``--ckpt``."""
    parser = Parser(prog=f"lit-wm {verb}", description=description, epilog=epilog)
    parser.add_argument(
        "--ckpt", "--ckpt_path", required=True, metavar="C", help="last, best, a run or a .ckpt"
    )
    return parser


def evaluate_parser() -> Parser:
    """The options of ``evaluate``."""
    parser = parser_of(
        "evaluate",
        "Play episodes with a checkpoint; print return with its 95 % interval, lengths and success.",
        "On a CPU the same options give the same numbers to the last bit. That needs equal --num-envs and "
        "threads: matrix products of another size are rounded otherwise. Success is info['is_success'] or "
        "info['success'] of an episode's last step.",
    )
    cuda = torch.cuda.is_available()
    for name, kind, default, meta, meaning in (
        ("env", str, None, "E", "environment; the training's by default"),
        ("env-options", yaml.safe_load, None, "{K: V}", "options; the training's if --env is"),
        ("episodes", int, 20, "N", "number of episodes (20)"),
        ("seed", int, 0, "S", "of everything; never a seed of the training (0)"),
        ("num-envs", int, 8, "K", "environments side by side (8)"),
        ("planner", str, None, "P", "mppi, cem, gradient, random or policy; the checkpoint's by default"),
        ("task", str, None, "NAME", "the one of several tasks that is played (all that have an environment)"),
        ("max-episode-steps", int, 30_000, "M", "cut longer episodes (30000)"),
        ("obs-noise", float, 0.0, "SIGMA", "Gaussian noise on observations: vectors in their own "
            "units, images in parts of the whole scale, clipped and rounded; classes stay as they are (0)"),
        ("device", str, "cuda" if cuda else "cpu", "cpu|cuda", "where the model runs; cuda if there is one"),
        ("video", Path, None, "F", "first episode as .gif, at most 2000 frames"),
        ("json", Path, None, "F", "write everything to this file"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind, default=default, metavar=meta, help=meaning)
    meaning = "eval as in a training's evaluations; greedy: where a policy acts, no sample but its most "
    meaning += "likely action. Planners act as in eval"
    parser.add_argument("--mode", choices=["eval", "greedy"], default="eval", help=meaning)
    return parser


def read_about(path: Path) -> dict[str, Any]:
    """What the file, else its run's configuration, says: class, environment, precision, counters."""
    _, stored = stored_run(path)
    loaded, flat = torch.load(path, map_location="cpu", weights_only=True, mmap=True), flatten(stored)
    return {
        "class_path": flat.get("model.class_path"),
        "env": flat.get("data.env"),
        "env_options": stored.get("data", {}).get("init_args", {}).get("env_options"),
        "precision": str(flat.get("trainer.precision") or "32-true"),
        "updates": loaded.get("global_step"),
        "env_steps": loaded.get("ReplayDataModule", {}).get("env_steps"),
    } | loaded.get("lit_wm", {})


def load_module(
    path: Path, device: str = "cpu", planner: str | None = None, task: str | None = None
) -> tuple[WorldModelModule, dict[str, Any]]:
    """The module of a checkpoint, ready to act, and :func:`read_about` it.

    Args:
        planner: another than the checkpoint's, with its own default options.
        task: the one of the checkpoint's tasks that is played; spaces are of the largest one's sizes.

    Raises:
        CheckpointError: the file is none, or its class or weights are not of this version.
        ConfigError: it has no planners or not this task.
    """
    about = read_about(path)
    name, (_, stored) = str(about["class_path"]), stored_run(path)
    # Importing runs code: a file may name our classes, any other one must stand in its run's configuration.
    if not name.startswith("lit_wm.") and name != flatten(stored).get("model.class_path"):
        raise CheckpointError(
            f"{path}: its class {name!r} is not of this package; evaluate it in its run directory"
        )
    loaded, kind = torch.load(path, map_location="cpu", weights_only=True), pydoc.locate(name)
    if not (isinstance(kind, type) and issubclass(kind, WorldModelModule)):
        raise CheckpointError(f"{path}: its class {about['class_path']!r} is no world model known here")
    options = {k: v for k, v in loaded["hyper_parameters"].items() if not k.startswith("_")}
    known = inspect.signature(kind).parameters  # more than an older file has options
    lacking = {"planner": planner and "planner" not in known, "task": task and not options.get("tasks")}
    for flag in [flag for flag, lacks in lacking.items() if lacks]:
        raise ConfigError(f"--{flag}: {path} is of a {kind.__name__}, which has none: leave it out")
    if planner not in (None, options.get("planner")):
        options |= {"planner": planner, "planner_options": None}
    if task not in (None, options.get("task")):
        tasks, _ = list_tasks(options["tasks"], options.get("task"), Spaces.from_plain(options["spaces"]))
        if task not in (names := [t.name for t in tasks]):
            close = nearest(str(task), names)
            raise ConfigError(
                f"--task {task}: none of the checkpoint's{close or f', which has {len(tasks)}'}"
            )
        if options.get("task") is not None:  # its spaces are of that one's sizes
            largest = Task("all", max(t.obs for t in tasks), max(t.action for t in tasks), 1)
            options |= {"tasks": [t._asdict() for t in tasks], "task": None}
            options["spaces"] = largest.spaces().to_plain()
    try:
        module = kind(**options)
        module.load_state_dict(loaded["state_dict"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        if planner and isinstance(error, ConfigError) and "planner" in str(error).splitlines()[0]:
            raise ConfigError(f"--planner: {str(error).removeprefix('model.planner: ')}") from error
        reason = "\n".join(str(error).strip().splitlines()[:2])
        raise CheckpointError(f"{path} does not fit this version of {kind.__name__}:\n{reason}") from error
    module.on_load_checkpoint(loaded)
    module.model.compute_dtype = torch.bfloat16 if about["precision"].startswith("bf16") else torch.float32
    return module.to(device).eval(), about


def check_spaces(model: Spaces, env: Spaces, env_id: str) -> None:
    """Raise a CheckpointError unless the environment shows and takes what the model knows."""

    for what, mine, its in (("observation", model.obs, env.obs), ("action", model.action, env.action)):
        for key in mine if what == "observation" else mine | its:  # more to see does no harm
            if (ours := mine.get(key)) != (theirs := its.get(key)):
                hint = ""
                if ours is not None and ours.is_image:  # several pictures of three colours, e.g. the authors'
                    stack = f", stack: {ours.hwc[2] // 3}" if ours.hwc[2] > 3 else ""
                    hint = f", for pictures e.g. --env-options '{{pixels: true{stack}}}'"
                raise CheckpointError(
                    f"{what} {key!r}: the checkpoint has {ours or 'none'}, {env_id} has {theirs or 'none'}\n"
                    f"Give --env and --env-options as in the training{hint}"
                )


def check_task(module: WorldModelModule, task: str | None) -> int | None:
    """The number of ``task`` for the policy; None for a model that has one to play. Raises ConfigError if it
    knows several and nobody said which.
    """
    if not (names := open_tasks(module.model)):
        return None
    if task is None:
        shown = ", ".join(names[:8]) + (" ..." if len(names) > 8 else "")
        raise ConfigError(f"say with --task which of the checkpoint's tasks is played: {shown}")
    return names.index(task)


def entries_for(model: Spaces, env: Spaces, env_id: str, foreign: bool) -> list[str]:
    """Entries of the environment that a ``foreign`` model sees as one ``obs``; none as a rule.

    Raises:
        CheckpointError: unless the environment then shows and takes what the model knows.
    """
    join: list[str] = []
    if foreign and model.obs.keys() == {"obs"} and env.obs.get("obs") != model.obs["obs"]:
        # Converted from a program that saw all entries as one vector, or a picture with the channels first,
        # and did not note their names.
        if model.obs["obs"].is_image:
            join = [k for k, s in env.obs.items() if s.is_image][:1]
            seen = [Spec("uint8", (s.hwc[2], *s.hwc[:2])) for s in (env.obs[k] for k in join)]
        else:
            join = [k for k, s in env.obs.items() if s.dtype == "float32"]
            seen = [Spec("float32", (sum(env.obs[k].size for k in join),))] if join else []
        env = replace(env, obs={"obs": seen[0]} if seen else env.obs)
    check_spaces(model, env, env_id)
    return join


def as_one(obs: dict[str, np.ndarray], join: Sequence[str], wanted: Spec) -> dict[str, np.ndarray]:
    """The entries ``join`` as one ``obs``: a vector, or a picture in the wanted layout. (N, ...)"""
    if not wanted.is_image:
        return {"obs": np.concatenate([obs[k].reshape(len(obs[k]), -1) for k in join], 1)}
    picture = obs[join[0]]
    return {"obs": picture if picture.shape[1:] == wanted.shape else np.moveaxis(picture, -1, 1)}


class Stage:
    """A vector environment with noise before the agent's eyes and a camera on its first episode.

    Args:
        env: the environments, in this process.
        spaces: the model's.
        sigma: standard deviation of the noise; see ``--obs-noise``.
        seed: of the noise.
        film: keep ``frames`` (H, W, 3) uint8, of the first image that the model sees or else rendered.
        join: entries to be shown as one vector ``obs``, in this order; or the one to be shown as a picture
            ``obs`` with the channels first.
    """

    def __init__(
        self, env: Any, spaces: Spaces, sigma: float, seed: int, film: bool, join: Sequence[str] = ()
    ):
        self.env, self.num_envs, self.sigma, self.filming = env, env.num_envs, sigma, film
        self.frames: list[np.ndarray] = []
        self._join, self._wanted = join, spaces.obs.get("obs", Spec("float32", ()))
        self._noise = NoiseStreams(seed)
        self._noisy = {k: s for k, s in spaces.obs.items() if sigma and not s.is_discrete}
        self._image = next(((k, s) for k, s in spaces.obs.items() if s.is_image), None)
        if sigma and not self._noisy:
            raise ConfigError("--obs-noise has nothing to act on: all observations are classes")

    def reset(self, *, seed: Any = None, options: Any = None) -> tuple[dict[str, np.ndarray], dict]:
        """As the environments'; a masked reset of the first one ends the film."""
        self.filming = self.filming and (options is None or not options["reset_mask"][0])
        obs, info = self.env.reset(seed=seed, options=options)
        return self._show(obs, options is None), info

    def step(self, action: Any) -> Any:
        """As the environments'."""
        obs, *rest = self.env.step(action)
        return self._show(obs, True), *rest

    def _show(self, obs: dict[str, np.ndarray], new: bool) -> dict[str, np.ndarray]:
        if self._join:
            obs = as_one(obs, self._join, self._wanted)
        for key, spec in self._noisy.items():
            noise = self.sigma * self._noise.normal(f"obs/{key}", obs[key].shape).numpy()
            noisy = np.clip(np.rint(obs[key] + 255 * noise), 0, 255) if spec.is_image else obs[key] + noise
            obs = obs | {key: noisy.astype(obs[key].dtype)}
        if self.filming and new and len(self.frames) < VIDEO_FRAMES:
            self.frames.append(self._frame(obs))
        return obs

    def _frame(self, obs: dict[str, np.ndarray]) -> np.ndarray:
        if self._image is not None:
            key, spec = self._image
            image = torch.from_numpy(obs[key][0].copy())
            return rgb(image.movedim(0, -1) if spec.channels_first else image).numpy()
        try:
            picture = Image.fromarray(self.env.envs[0].render())
        except Exception as error:  # whatever a renderer misses: pygame, a display, OpenGL
            hint = "Install what it asks for, or leave out --video"
            raise EnvError(f"--video: the environment cannot be rendered: {error}\n{hint}") from error
        picture.thumbnail((VIDEO_SIDE, VIDEO_SIDE))
        return np.asarray(picture)


def open_envs(env_id: str, num_envs: int, options: dict[str, Any], render: bool) -> Any:
    """The environments, able to render if that is wanted."""
    env: Any = make_vector_env(env_id, num_envs, list(range(num_envs)), **options)
    if not render or env.envs[0].render_mode == "rgb_array":
        return env
    env.close()
    if "rgb_array" not in env.envs[0].metadata.get("render_modes", ()):
        raise EnvError(f"--video: {env_id} shows no image and has no rendering as 'rgb_array'")
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws into memory and asks for no screen
    return make_vector_env(env_id, num_envs, list(range(num_envs)), **options, render_mode="rgb_array")


def check_outputs(video: Path | None, *others: Path | None) -> None:
    """Refuse files that could not be written, before hours of episodes."""
    for path in filter(None, (video, *others)):
        folder = next(p for p in path.absolute().parents if p.exists())
        if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise ConfigError(f"{path} cannot be written: give a file in a folder that is yours")
    if video and video.suffix != ".gif":
        raise ConfigError(f"--video {video}: expected a file name that ends in .gif")


def check_numbers(given: argparse.Namespace, lowest: dict[str, int]) -> None:
    """Refuse options below their ``lowest`` value, and such as are no finite number.

    Raises:
        ConfigError: for the first of them.
    """
    for name, low in lowest.items():
        if not low <= (value := getattr(given, name)) < math.inf:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; expected {low} or more")


@dataclass
class Play:
    """What :func:`evaluate` plays, and what it has seen of it."""

    env_id: str
    options: dict[str, Any]
    task: int | None = None  # number of the one of several
    name: str | None = None
    reference: Reference | None = None
    results: EpisodeResults = field(default_factory=EpisodeResults)
    frames: list[np.ndarray] = field(default_factory=list)
    fps: float = 30


def plays_of(
    module: WorldModelModule, about: dict[str, Any], given: argparse.Namespace, path: Path
) -> list[Play]:
    """The environment to play in; of several tasks those of all that have one, unless one is asked for.

    Raises:
        ConfigError: if nobody says which.
    """
    known, options = about.get("tasks") or {}, given.env_options
    if not isinstance(options, dict | None):
        raise ConfigError(f"--env-options: expected keys and values such as '{{size: 64}}', got {options!r}")
    names = open_tasks(module.model)
    every = [name for name in names if name in known and given.task in (None, name)] if not given.env else []
    if len(every) > 1 and given.video:
        raise ConfigError(f"--video shows one task of {', '.join(every[:4])}: say which with --task")
    if every:
        return [
            Play(known[n]["env"], known[n]["env_options"] if options is None else options, names.index(n), n,
                 Reference(**known[n]["reference"]) if known[n]["reference"] and options is None else None)
            for n in every
        ]  # fmt: skip
    task, env_id = check_task(module, given.task), given.env or about["env"]
    if env_id is None:
        raise ConfigError(
            f"{path} does not say in which environment it was trained\n"
            "Give it, e.g. --env CartPole-v1, or --env dmc:walker_walk --env-options '{repeat: 2}'"
        )
    if options is None:
        options = about["env_options"] or {} if env_id == about["env"] else {}
    # The reference that the checkpoint notes is of its own environment.
    same = about["env"] is None or (env_id, options) == (about["env"], about["env_options"] or {})
    noted = about.get("reference") if same and not given.task else None
    reference = Reference(**noted) if noted else reference_of("", {}, env_id)
    return [Play(env_id, options, task, given.task if task is not None else None, reference)]


def perform(
    play: Play,
    module: WorldModelModule,
    about: dict[str, Any],
    given: argparse.Namespace,
    signals: Interrupts,
) -> None:
    """Play the episodes."""
    spaces, bar = module.model.spaces, RLProgressBar()
    rendered = given.video is not None and not any(s.is_image for s in spaces.obs.values())
    env = open_envs(play.env_id, min(given.num_envs, given.episodes), play.options, rendered)
    try:
        shown, join = spaces_from_gym(env.single_observation_space, env.single_action_space), list[str]()
        if play.task is None:
            join = entries_for(spaces, shown, play.env_id, about["env"] is None or bool(given.task))
            theirs, ours = spaces.episode_length, env.get_attr("episode_length")[0]
            # Where datasets were all there was, their longest episode may stand for the limit.
            if about["env_steps"] and None not in (theirs, ours) and theirs != ours:
                print(
                    f"note: an episode of {play.env_id} has {ours:,} decisions here, the checkpoint's had "
                    f"{theirs:,}: another time_limit or repeat? Say which by --env-options",
                    file=sys.stderr,
                )
        else:
            shown = ordered(shown, (about.get("tasks") or {}).get(play.name, {}).get("order"))
        if play.task is not None and (wrong := misfit(module.model.tasks[play.task], spaces, shown)):
            raise CheckpointError(f"{play.env_id} {wrong}\nGive the environment and options of that task")
        film = given.video is not None
        stage = Stage(env, spaces if play.task is None else shown, given.obs_noise, given.seed, film, join)
        play.results = run_episodes(
            acting(module, given.mode, NoiseStreams(given.seed, 0, given.device), play.task, shown),
            stage,
            given.episodes,
            stream_seed(given.seed, 0, "evaluate") % 2**30,  # apart from all seeds of a training
            device=given.device,
            max_steps=given.max_episode_steps,
            stop=lambda: signals.number is not None,
            progress=lambda done, steps: bar.episodes(done, given.episodes, steps),
        )
        play.frames, play.fps = stage.frames, env.envs[0].metadata.get("render_fps", 30)
    finally:
        bar.clear()
        env.close()
    signals.check(len(play.results.returns), given.episodes)
    play.results.reference = play.reference


def show(play: Play, given: argparse.Namespace) -> None:
    """Print what was found."""
    results, score = play.results, play.results.summary("")
    spread, lengths = "", results.lengths
    if "return_std" in score:
        spread = ", std {return_std:.2f}".format(**score)
    if "return_low" in score:
        spread += ", 95 % interval {return_low:.2f} to {return_high:.2f}".format(**score)
    cut = f" ({sum(results.cut)} cut at --max-episode-steps)" if any(results.cut) else ""
    count = f"{given.episodes} episode{'s' * (given.episodes != 1)}"
    print(f"return:     {score['return']:.2f}{spread}, {count}{cut}")
    if results.reference:
        known = f"{score['normalized']:.2f}" if "normalized" in score else NO_SCORE
        print(f"normalized: {known} ({results.reference}; played in {play.env_id})")
    print(f"length:     {score['length']:.1f} ({min(lengths)} to {max(lengths)})")
    print(f"terminated: {score['terminated']:.0%}")
    if "success" in score:
        print(f"success:    {score['success']:.0%}")
    if "jitter" in score:
        print(f"jitter:     {score['jitter']:.3f} of half the range per decision")


def evaluate(argv: list[str]) -> int:
    """``lit-wm evaluate``: play, print, write.

    Raises:
        LitWMError: anything the user can fix; Interrupted by Ctrl-C or SIGTERM, and then nothing is written.
    """
    given = evaluate_parser().parse_args(argv)
    check_numbers(given, {"episodes": 1, "num_envs": 1, "max_episode_steps": 1, "seed": 0, "obs_noise": 0})
    check_outputs(given.video, given.json)
    if given.device not in ("cpu", "cuda") or (given.device == "cuda" and not torch.cuda.is_available()):
        raise ConfigError(f"--device {given.device}: not here; expected cpu, or cuda where there is one")
    path = find_checkpoint("evaluate", given.ckpt, {}, "--ckpt")
    assert path is not None
    module, about = load_module(path, given.device, given.planner, given.task)
    plays = plays_of(module, about, given, path)
    for play in plays:
        with Interrupts() as signals:
            if play is plays[0]:
                print(f"checkpoint: {path} ({type(module).__name__}, {module.updates:,} updates)", flush=True)
            said = yaml.safe_dump(play.options, default_flow_style=True, sort_keys=False, width=math.inf)
            options = f" ({said.strip()[1:-1]})" if play.options else ""
            if play.name:
                print(f"task:       {play.name}")
            print(f"environment: {play.env_id}{options}", flush=True)
            perform(play, module, about, given, signals)
        show(play, given)
    play = plays[0]
    results = play.results
    if len(plays) > 1:
        results = EpisodeResults.of_tasks({str(p.name): p.results for p in plays})
    score = results.summary("")
    if len(plays) > 1:
        also = f", normalized {score['normalized']:.2f}" if "normalized" in score else ""
        print(f"mean of {len(plays)} tasks: return {score['return']:.2f}{also}")
    if given.json:
        asked = (
            "episodes",
            "seed",
            "num_envs",
            "max_episode_steps",
            "obs_noise",
            "device",
            "planner",
            "mode",
            "task",
        )
        report: dict[str, Any] = {
            "checkpoint": str(path),
            "env": play.env_id,
            "env_options": play.options,
            "metrics": score,
        }
        report["reference"] = results.reference and results.reference._asdict()
        report |= {k: about[k] for k in ("class_path", "precision", "updates", "env_steps")}
        report |= {k: getattr(given, k) for k in asked} | {"threads": torch.get_num_threads()}
        if results.tasks:
            report |= {"env": None, "env_options": None, "tasks": {}}
        for p in plays:
            lists = {k: getattr(p.results, k) for k in PER_EPISODE}
            if not results.tasks:
                report |= lists
                continue
            reference = p.reference and p.reference._asdict()
            named = {"env": p.env_id, "env_options": p.options, "reference": reference}
            report["tasks"][p.name] = named | lists
        text = json.dumps(report | {"versions": versions()}, indent=1) + "\n"
        write_atomic(given.json, lambda part: part.write_text(text))
        print(f"results:    {given.json}")
    if given.video:
        fps = play.fps * suite_defaults(play.env_id)["repeat"]
        fps /= suite_defaults(play.env_id, **play.options)["repeat"]
        video = torch.from_numpy(np.stack(play.frames))
        print(f"writing {given.video} ...", flush=True)
        # Viewers slow down what is faster than 50 frames per second.
        write_atomic(given.video, lambda part: write_gif(part, video, min(fps, 50)))
        print(f"video:      {given.video} ({len(play.frames)} frames)")
    return 0


def export(argv: list[str]) -> int:
    """``lit-wm export``: the model alone, without optimizers and the training's counters."""
    parser = parser_of("export", "Write a checkpoint with the model alone, for sharing.")
    parser.add_argument("-o", "--output", required=True, type=Path, metavar="OUT", help="the file to write")
    given = parser.parse_args(argv)
    out, path = given.output, find_checkpoint("export", given.ckpt, {}, "--ckpt")
    assert path is not None
    check_outputs(None, out)
    if out.exists() and out.samefile(path):
        raise ConfigError(f"-o {out} is the checkpoint itself, which would lose its optimizers")
    about, loaded = read_about(path), torch.load(path, map_location="cpu", weights_only=True)
    kept = {k: loaded[k] for k in EXPORTED if k in loaded} | {"lit_wm": about}
    write_atomic(out, lambda part: torch.save(kept, part))
    print(f"{out}: {out.stat().st_size / 1e6:.2f} MB, of {path} with {path.stat().st_size / 1e6:.2f} MB")
    return 0
