"""``fit | validate | test | predict``: LightningCLI with our meaning of files, checkpoints and errors.

* Several ``--config`` are merged here, in order and deeply, before jsonargparse sees one result. Relative
  names are looked up in the working directory and then among the packaged configurations.
* ``--ckpt_path last|best|PATH`` names a run; its stored configuration is the lowest layer: run < files <
  flags.
* Every user error is a :class:`~lit_wm.errors.LitWMError` of a few lines; a misspelt key names its nearest
  neighbours.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import pydoc
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import ArgumentParser, get_loader
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_wm.callbacks import DreamVideo, Evaluate, ResumableCheckpoint, RLProgressBar
from lit_wm.callbacks.evaluate import playable
from lit_wm.errors import CheckpointError, ConfigError, LitWMError, nearest
from lit_wm.heldout import lines_of
from lit_wm.pretrained import newest
from lit_wm.strategy import ReplicatedStrategy
from lit_wm.tracking import CsvLogger, RunRecord, SafeMLFlowLogger, flatten, folder_name
from lit_wm.vocabulary import Translator, put

RUNS = Path("runs")
DEFAULT_CLASSES = {"model": "lit_wm.DreamerV3Module", "data": "datamodules.ReplayDataModule"}
SHORT_NAMES = {path.rpartition(".")[2]: path for path in (*DEFAULT_CLASSES.values(), "lit_wm.TDMPC2Module")}
CLASS_KEYS = ["class_path", "init_args", "dict_kwargs"]
CALLBACKS = {
    "progress": RLProgressBar,
    "checkpoint": ResumableCheckpoint,
    "evaluate": Evaluate,
    "video": DreamVideo,
}

# The arguments of a run that belong to no class.
USAGE = "[--config FILE]... [--ckpt_path last|best|PATH] [--GROUP.OPTION VALUE]..."
RUN_ARGUMENTS = {
    "name": "Name of the run and of its directory runs/EXPERIMENT/NAME; the time of start by default. "
    "With --ckpt_path: begin a new run of this name from the checkpoint.",
    "tracking.uri": "MLflow store: sqlite:///FILE or http://HOST:PORT. Default: MLFLOW_TRACKING_URI, else "
    "sqlite:///mlruns.db.",
    "tracking.experiment": "MLflow experiment; the environment by default.",
}

# What Lightning assumes for a supervised data set and what fits here.
TRAINER_DEFAULTS: dict[str, Any] = {
    "devices": 1,
    "max_epochs": -1,  # the budget is data.max_env_steps, or trainer.max_steps updates
    "num_sanity_val_steps": 0,
    "check_val_every_n_epoch": None,
    "use_distributed_sampler": False,
    "enable_model_summary": False,
    "log_every_n_steps": 1,  # Lightning's own counter of batches; the module decides when it logs
}

# Trainer arguments of which some values cannot work here: the others; why, and what to do.
CLIPPED = (
    "the optimisers clip each parameter themselves (model.agc)\nRemove it; all gradients: model.grad_clip"
)
ACCEPTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "precision": (
        (None, 32, "32", "32-true", "bf16", "bf16-mixed"),
        "parameters, normalisers and losses stay in float32, and with several optimisers fp16 silently clips "
        "scaled gradients\nUse bf16-mixed (GPU, recent CPU) or 32-true",
    ),
    "strategy": (
        ("auto", "ddp", "single_device"),
        "the modules average their own gradients, which other strategies would do again or not at all\n"
        "Use auto: one process per device",
    ),
    "gradient_clip_val": ((None,), CLIPPED),
    "gradient_clip_algorithm": ((None,), CLIPPED),
    "accumulate_grad_batches": ((1,), "the optimisers step after every batch\nLower data.batch_size instead"),
}

# Values that flow from elsewhere.
LINKED = {
    "model.init_args.seed": "it follows seed_everything",
    "data.init_args.seed": "it follows seed_everything",
    "model.init_args.spaces": "the model receives the spaces from the data",
}

# Said by Lightning about what is meant to be so here.
EXPECTED_WARNINGS = (
    ".*does not have many workers.*",
    ".*treespec.*",
    ".*torch.distributed.nn.functional.all_gather is deprecated.*",
    ".*ended before the epoch ended.*",  # online training has no epochs, and tickets resume exactly
    ".*callbacks used to create the checkpoint need to be provided.*",  # evaluation needs fewer of them
    ".*The dirpath has changed from.*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*predict returned None.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # the evaluation gathers by itself
    "LightningCLI's args parameter.*",
)


# -- configurations ----------------------------------------------------------------------------------------


def config_folders() -> list[Path]:
    """Where packaged configurations live: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs" if (package.parent / "pyproject.toml").is_file() else package
    return [folder for folder in (checkout, package / "_configs") if folder != package and folder.is_dir()]


def packaged_configs() -> dict[str, Path]:
    """``overlay/debug.yaml`` and the like with their files."""
    return {str(p.relative_to(f)): p for f in config_folders()[::-1] for p in sorted(f.rglob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file itself, or the packaged configuration of that name (with or without ``configs/`` in front)."""
    if Path(name).is_file():
        return Path(name)
    packaged, inner = packaged_configs(), name.removeprefix("configs/")
    for candidate in (inner, f"{inner}.yaml"):
        if candidate in packaged:
            return packaged[candidate]
    close = nearest(inner, [*packaged])
    raise ConfigError(
        f"--config {name}: no such file, no packaged configuration of this name{close}\n"
        f"Packaged: {', '.join(packaged)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one configuration; an empty file is an empty dict."""
    try:
        # jsonargparse's loader knows that 1e-3 is a number, which YAML 1.1 does not.
        loaded = get_loader("yaml")(path.read_text())
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else "?"
        raise ConfigError(f"{path}, line {line}: not YAML: {error.problem}") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if not isinstance(loaded, dict | None):
        raise ConfigError(f"{path}: expected keys and values like 'model:', found {type(loaded).__name__}")
    return loaded or {}


def merge(low: dict[str, Any], *layers: dict[str, Any]) -> dict[str, Any]:
    """Each layer over the former, deeply. Another ``class_path`` drops the arguments of the former class."""
    if len(layers) != 1:
        return merge(merge(low, layers[0]), *layers[1:]) if layers else low
    high = layers[0]
    if "class_path" in low and high.get("class_path", low["class_path"]) != low["class_path"]:
        return dict(high)
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flags_as_config(flags: list[str]) -> dict[str, Any]:
    """The flags in the form of a configuration file, with words as values: for questions about the run."""
    config: dict[str, Any] = {}
    for word, following in zip(flags, [*flags[1:], "--"], strict=False):
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or ASKS.fullmatch(word):
            continue
        keys = name.removesuffix("+").split(".")
        if keys[0] in DEFAULT_CLASSES and len(keys) == 1:
            keys.append("class_path")
        elif keys[0] in DEFAULT_CLASSES and keys[1] not in CLASS_KEYS:
            keys.insert(1, "init_args")
        branch: Any = value if equals else None if following.startswith("--") else following
        for key in reversed(keys):
            branch = {key: branch}
        config = merge(config, branch)
    return config


# -- the command line, before jsonargparse -----------------------------------------------------------------

ASKS = re.compile(r"-h|--(.+\.)?help(=.*)?|--print_config(=.*)?")  # flags that train nothing


@dataclass
class Command:
    """One command line, taken apart.

    Attributes:
        verb: fit, validate, test or predict.
        config: the ``--config`` files, merged over the configuration of the checkpoint's run.
        flags: everything else, as given.
        checkpoint: the file to load, or None.
        run: the directory of the checkpoint's run, or None.
        stored: configuration of the checkpoint's run.
    """

    verb: str
    config: dict[str, Any]
    flags: list[str]
    checkpoint: Path | None
    run: Path | None
    stored: dict[str, Any]


def read_command(argv: list[str]) -> Command:
    """Read the files, find the checkpoint, merge: run < files < (later) flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-c", "--config", action="append", default=[])
    parser.add_argument("--ckpt_path")
    try:
        options, flags = parser.parse_known_args(argv[1:])
    except argparse.ArgumentError as error:
        raise ConfigError(f"{argv[-1]} needs a value: a file, or 'last' or 'best' for --ckpt_path") from error
    files = [load_yaml(find_config(name)) for name in options.config]
    given = merge({}, *files)
    in_file = given.pop("ckpt_path", None)
    verb, said = argv[0], flatten(merge(given, flags_as_config(flags)))
    checkpoint = find_checkpoint(verb, options.ckpt_path or in_file, said)
    asks_only = any(ASKS.fullmatch(flag) for flag in flags)
    if checkpoint is None and verb != "fit" and not asks_only:
        raise CheckpointError(
            f"'{verb}' needs a trained model: --ckpt_path best, last, a run directory or a .ckpt"
        )
    if checkpoint is None and not (
        options.config or asks_only or said.get("data.env") or said.get("data.sources")
    ):
        raise ConfigError(
            "'fit' needs to know what to train: --config FILE, --data.env ID, --data.sources [URI], or "
            "--ckpt_path last to go on\n"
            f"Packaged files: {', '.join(name for name in packaged_configs() if '/' not in name)}"
        )
    run, stored = (None, {}) if checkpoint is None else stored_run(checkpoint)
    given, flags = translate(files, flags, merge(stored, merge(given, flags_as_config(flags))))
    config = merge(stored, given)
    for group, class_path in DEFAULT_CLASSES.items():
        if isinstance(config.setdefault(group, {}), dict):
            config[group].setdefault("class_path", class_path)
    return Command(verb, config, flags, checkpoint, run, stored)


def translate(
    files: list[dict[str, Any]], flags: list[str], said: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Files merged and flags in our vocabulary, with a printed note for every name of another one."""
    known: dict[str, list[str]] = {}
    for group, class_path in DEFAULT_CLASSES.items():
        chosen = said.get(group)
        chosen = chosen.get("class_path") if isinstance(chosen, dict) else chosen
        known[group] = arguments_of(chosen or class_path) or []
    translator, words = Translator(known), flags_as_config(flags)
    for layer in files:
        translator.translate(layer)
    given, before = merge({}, *files), flatten(words)
    given.pop("ckpt_path", None)
    for target, value in translator.translate(words).items():
        put(given, target, value)
    after = flatten(words)
    gone, kept, drop = before.keys() - after.keys(), list[str](), False
    for path, value in after.items():  # a flag with a dict that an old name has joined
        if path.rpartition(".")[0] in gone:
            put(given, path, value)
    for word in flags:
        if word.startswith("--"):
            drop = word.removeprefix("--").partition("=")[0].replace(".init_args", "") in gone
        if not drop:
            kept.append(word)
        drop = drop and word.startswith("--") and "=" not in word  # its value goes too
    for note in translator.notes if not is_later_process() else ():
        print(note, file=sys.stderr)  # the printed configuration goes to the other stream
    return given, kept


def experiment_of(config: dict[str, Any]) -> str | None:
    """The MLflow experiment of a flat configuration: the environment or dataset if it names no other."""
    name, sources = config.get("tracking.experiment") or config.get("data.env"), config.get("data.sources")
    if name or not sources:
        return name
    first = sources[0] if isinstance(sources, list) else sources
    uri = first if isinstance(first, str) else str(first.get("uri"))
    return re.sub(r"[^\w.-]+", "-", "-".join(Path(uri.partition("?")[0]).parts[-3:])).strip("-")


NO_REPLAY = " (all but the replay, which starts empty)"


def find_checkpoint(
    verb: str, ckpt_path: str | None, said: dict[str, Any], flag: str = "--ckpt_path"
) -> Path | None:
    """The file that ``last``, ``best``, a run directory or a path means, or None without ``ckpt_path``.

    ``last`` and ``best`` are the newest of the run, the experiment or all runs, as far as ``said`` goes: the
    flat configuration of files and flags. Of a directory ``fit`` takes the last one, other verbs the best.
    Messages name ``flag``.

    Raises:
        CheckpointError: there is none.
    """
    if is_later_process() and "LITWM_CHECKPOINT" in os.environ:
        return Path(os.environ["LITWM_CHECKPOINT"])
    if ckpt_path is None:
        return None
    if Path(ckpt_path).is_file():
        return Path(ckpt_path)
    names = [ckpt_path]
    if Path(ckpt_path).is_dir():
        root, names = Path(ckpt_path), ["last"] if verb == "fit" else ["best", "last"]
    elif ckpt_path not in ("last", "best"):
        here = next(folder for folder in Path(ckpt_path).parents if folder.is_dir())
        beside = sorted(
            f"{p.name}{'/' * p.is_dir()}" for p in here.iterdir() if p.is_dir() or p.suffix == ".ckpt"
        )
        raise CheckpointError(
            f"{flag} {ckpt_path}: no such file{nearest(Path(ckpt_path).name, beside, 1)}\n"
            f"In {here}: {', '.join(beside[:8]) or 'no checkpoints'}{' ...' * (len(beside) > 8)}\n"
            "Give 'last', 'best', a run directory or a .ckpt"
        )
    elif said.get("trainer.default_root_dir"):
        root = Path(said["trainer.default_root_dir"])
    else:
        root = RUNS / folder_name(experiment_of(said) or "")
        # --name NEW starts from the experiment's newest run; the name of a run means that one.
        if experiment_of(said) and said.get("name") and (root / said["name"]).is_dir():
            root /= said["name"]
    for name in names:
        if found := newest(root, name):
            return found
    start = "Start without --ckpt_path, or give" if verb == "fit" else "Give"
    advice = f"{start} the path of a checkpoint or of a run directory"
    if other := newest(root, "[!.]*"):
        advice = f"There is another: {flag} {other}{NO_REPLAY * (verb == 'fit')}"
    raise CheckpointError(f"{flag} {ckpt_path}: no {names[-1]} checkpoint under '{root}'\n{advice}")


def stored_run(checkpoint: Path) -> tuple[Path | None, dict[str, Any]]:
    """Run directory of a checkpoint and its configuration; for a lone file what it says of itself."""
    try:
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        params, about = dict(loaded.get("hyper_parameters", {})), dict(loaded.get("lit_wm", {}))
        names = [str(name) for name in loaded.get("model", loaded)]
    except Exception as error:  # torch has no one class for these
        raise CheckpointError(f"{checkpoint}: not a checkpoint, or one that was cut off") from error
    if "state_dict" not in loaded:
        if any(name.startswith(("_dynamics.", "_Qs.")) for name in names):
            raise CheckpointError(
                f"{checkpoint} is of the official TD-MPC2 code; make it one of ours first:\n"
                f"lit-wm convert tdmpc2 {checkpoint} -o OUT.ckpt"
            )
        raise CheckpointError(f"{checkpoint} holds no training of lit-wm: no 'state_dict' in it")
    for run in checkpoint.resolve().parents:
        if (run / "config.yaml").is_file():
            stored = load_yaml(run / "config.yaml")
            stored.get("trainer", {}).pop("default_root_dir", None)
            return run, {k: v for k, v in stored.items() if k not in ("ckpt_path", "name")}
    class_path = params.pop("_class_path", about.get("class_path", DEFAULT_CLASSES["model"]))
    init_args = {k: v for k, v in params.items() if k not in ("_instantiator", "spaces", "seed")}
    stored = {"model": {"class_path": class_path, "init_args": init_args}} if params else {}
    if about.get("env"):
        stored["data"] = {"init_args": {k: about[k] for k in ("env", "env_options")}}
        stored["trainer"] = {"precision": about["precision"]}
    return None, stored


def is_later_process() -> bool:
    """Whether this is one of several processes and not the first."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


# -- what jsonargparse says, in other words ----------------------------------------------------------------


def arguments_of(class_path: Any) -> list[str] | None:
    """Names that a class takes; None if there is no such class: jsonargparse then says what is wrong."""
    try:
        found = pydoc.locate(SHORT_NAMES.get(str(class_path), str(class_path)))
    except pydoc.ErrorDuringImport:
        return None
    if not isinstance(found, type):
        return None
    return ArgumentParser(exit_on_error=False).add_class_arguments(found, fail_untyped=False)


class Spelling:
    """Checks every key of a configuration against what the parser and the classes take.

    Args:
        parser: parser of the verb.
    """

    def __init__(self, parser: LightningArgumentParser):
        self.groups: dict[str, list[str]] = {"": []}
        for action in parser._actions:
            group, _, key = action.dest.rpartition(".")
            if key == "help":  # trainer.logger.help does not make trainer.logger a group
                continue
            self.groups.setdefault(group, []).append(key)
            if (first := action.dest.split(".")[0]) not in self.groups[""]:
                self.groups[""].append(first)
        for group, class_path in DEFAULT_CLASSES.items():
            self.groups[group] = arguments_of(class_path) or []

    def check(self, tree: Any, where: str = "", known: list[str] | None = None) -> None:
        """Raise a ConfigError that names the nearest keys if one below ``where`` is not ``known`` there."""
        for i, item in enumerate(tree if isinstance(tree, list) else ()):
            self.check(item, f"{where}[{i}]")
        if where in self.groups and not isinstance(tree, dict | str | None):
            raise ConfigError(f"{where}: expected keys and values, found {tree!r}")
        if not isinstance(tree, dict):
            return
        known = CLASS_KEYS if "class_path" in tree else known
        for key, value in tree.items():
            path = f"{where}.{key}".removeprefix(".")
            if path in LINKED:
                raise ConfigError(f"'{path.replace('.init_args', '')}' cannot be set: {LINKED[path]}")
            if known is not None and key not in known:
                self._refuse(path, known, tree)
            is_class = key == "init_args"
            self.check(
                value, path, arguments_of(tree.get("class_path")) if is_class else self.groups.get(path)
            )

    def _refuse(self, path: str, known: list[str], tree: dict[str, Any]) -> NoReturn:
        key = path.rpartition(".")[2]
        hint = nearest(key, known)
        if known is CLASS_KEYS:
            known = arguments_of(tree["class_path"]) or []
            hint = "; write it under 'init_args:'" if key in known else nearest(key, known)
        elif not hint:  # the right word in the wrong group, e.g. trainer.batch_size
            elsewhere = [
                f"{group}.{key}".removeprefix(".") for group, keys in self.groups.items() if key in keys
            ]
            hint = f"; did you mean {' or '.join(map(repr, elsewhere[:3]))}?" if elsewhere else ""
        listing = "" if hint else f"\nKnown there: {', '.join(sorted(known))[:600]}"
        path = re.sub(r"^(model|data)\.init_args\.", r"\1.", path)  # as in a flag
        raise ConfigError(f"unknown key '{path}'{hint}{listing}")


# What an option's type does not say.
FORMS = {"pretrain": "whole numbers of updates, no shares, e.g. {world_model: 10000, actor: 2000}"}


def shorten(message: str) -> str:
    """The cause in a message of jsonargparse: which key, what was given, what was expected."""
    key, _, rest = re.sub(r'^Parser key "([^"]+)":\s*', r"\1\n", message.strip()).partition("\n")
    if inner := re.search(r"^ +- ([\w.]+: got .+)\n +(Expected: .+)", rest, re.MULTILINE):  # shortened before
        return f"{key}.{inner[1]}\n{inner[2]}"
    if problem := re.search(r"Problem with given class_path '([^']+)':\s+(.+)", rest):
        return f"{key}: cannot use '{problem[1]}': {problem[2].strip()}"
    expected: list[str] = []
    for kind in re.findall(r"Expected an? (.+?)(?:\. Got value.*|\. .*|)$", rest, re.MULTILINE):
        literal = re.search(r"Literal\[(.+)\]", kind)
        words = literal[1].replace("'", "").split(", ") if literal else [kind]
        expected += [re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", word) for word in words]
    expected = [word for word in dict.fromkeys(expected) if word != "NoneType"]
    given = re.search(r"(?:Given|Got) value: (.+)", rest)
    if expected and given:
        value = given[1].strip()
        form = FORMS.get(key, ", ".join(expected))
        return f"{key}: got {value!r}{nearest(value, expected)}\nExpected: {form}"
    found = message.partition("Errors:\n")[2]  # a cause may have several lines
    causes = re.findall(r"^ +- (?!Expected)(.+(?:\n {4}(?! *- ).+)*)", found, re.MULTILINE)
    if len(causes) == 1:
        return causes[0].replace("\n    ", "\n")
    return re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", message.strip())


class QuietParser(LightningArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Every refusal of jsonargparse as a short :class:`ConfigError`."""
        raise ConfigError(shorten(message)) from ex


# -- the training command ----------------------------------------------------------------------------------


class TrainingCLI(LightningCLI):
    """LightningCLI with the run directory, the loggers and the callbacks of this project."""

    writes_run = True  # False for a look at what would be done

    def __init__(self, command: Command):
        self.command, self.verb = command, command.verb
        args = [self.verb, "--config", json.dumps(command.config), *command.flags]
        if command.checkpoint is not None:
            args += ["--ckpt_path", str(command.checkpoint)]
        more = [f"lit-wm {self.verb} --{group}.help {path}" for group, path in DEFAULT_CLASSES.items()]
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,  # RunRecord does it; Lightning's dies with an SQLite store
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=QuietParser,
            parser_kwargs={self.verb: {"usage": "\n       ".join([f"lit-wm {self.verb} {USAGE}", *more])}},
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # else --optimizer would replace the three of the module
            args=args,
        )

    # -- parsing -------------------------------------------------------------------------------------------

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb at hand, so that one parser is built; checkpoints are read with weights_only."""
        return {self.verb: LightningCLI.subcommands()[self.verb] | {"weights_only"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The arguments of a run."""
        parser.add_argument("--seed_everything", type=int, default=0, help="The one seed of everything.")
        for name, meaning in RUN_ARGUMENTS.items():
            parser.add_argument(f"--{name}", type=str | None, default=None, help=meaning)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, and the values that flow from one group to another."""
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments("data.spaces", "model.init_args.spaces", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the spelling first: jsonargparse's own message does not help."""
        said = merge(self.command.config, flags_as_config(self.command.flags))
        for group in DEFAULT_CLASSES:
            name = said[group].get("class_path") if isinstance(said[group], dict) else None
            if name and "." not in name and name not in SHORT_NAMES:
                raise ConfigError(
                    f"{group}: no class {name!r}{nearest(name, [*SHORT_NAMES])}\n"
                    f"Give its import path, e.g. {DEFAULT_CLASSES[group]}"
                )
        spelling = Spelling(self._parser(self.verb))
        spelling.check(said, known=spelling.groups[""])
        super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the file's hyper-parameters over the flags; ours lie under them."""

    # -- building ------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, choose the run directory, report what the checkpoint's run had."""
        trainer, checkpoint = self.config[self.verb].trainer, self.command.checkpoint
        for key, (accepted, reason) in ACCEPTED.items():
            if trainer.get(key) not in accepted:
                what = key if len(accepted) == 1 else f"{key}: {trainer.get(key)}"
                raise ConfigError(f"trainer.{what} is refused: {reason}")
        flat = flatten(yaml.safe_load(self._dump()))
        self.experiment = experiment_of(flat) or str(flat["data.class_path"]).rpartition(".")[2]
        self.run_dir = self._choose_run_dir()
        trainer.default_root_dir = str(self.run_dir)
        os.environ["LITWM_RUN_DIR"] = str(self.run_dir.resolve())  # for the processes that Lightning starts
        os.environ.pop("LITWM_CHECKPOINT", None)
        if checkpoint is None:
            return
        os.environ["LITWM_CHECKPOINT"] = str(checkpoint.resolve())
        if not is_later_process():
            print(f"checkpoint: {checkpoint}")
            for key, value in flatten(self.command.stored).items():
                if key in flat and flat[key] != value:
                    print(f"  {key}: {flat[key]} (the checkpoint's run had {value})")

    def _dump(self) -> str:
        return self._parser(self.verb).dump(self.config[self.verb], skip_none=False)

    def _choose_run_dir(self) -> Path:
        name, root = self.config[self.verb].name, self.config[self.verb].trainer.default_root_dir
        run = self.command.run
        if is_later_process():
            if "LITWM_RUN_DIR" in os.environ:
                return Path(os.environ["LITWM_RUN_DIR"])
            if not (name or root):
                raise ConfigError(
                    "several processes that were not started by this program need one run directory\n"
                    "Give --name NAME to all of them"
                )
        if root:
            chosen = Path(root)
        elif run is not None and name in (None, run.name):
            chosen = run.relative_to(Path.cwd()) if run.is_relative_to(Path.cwd()) else run
        else:
            # Several trainings may start in one second: in as many processes, or one after the other in one.
            home, now = RUNS / folder_name(self.experiment), f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
            names = (f"{now}-{n}" if n else now for n in count())
            chosen = home / (name or next(n for n in names if not (home / n / "config.yaml").exists()))
        taken = (chosen / "config.yaml").exists() and chosen.resolve() != run
        if self.verb == "fit" and self.writes_run and taken and not is_later_process():
            go_on = "It has no checkpoint: remove it, if nothing trains there any more"
            if newest(chosen, "last"):
                go_on = f"Go on with it: --ckpt_path {chosen}"
            elif other := newest(chosen, "[!.]*"):
                go_on = f"Go on with it: --ckpt_path {other}{NO_REPLAY}"
            raise ConfigError(
                f"the run directory '{chosen}' already holds a run\n{go_on}\nBegin another: --name NEW_NAME"
            )
        return chosen

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what their constructors refuse is a user error."""
        try:
            super().instantiate_classes()
        except LitWMError:
            raise
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            raise ConfigError(shorten(str(error)) or type(error).__name__) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our loggers and callbacks."""
        config = self.config_init[self.verb]
        trainer = config.trainer
        loggers: list[Any] = []  # an evaluation has its own file and leaves the training's record alone
        if self.verb == "fit":
            loggers.append(CsvLogger(self.run_dir))
            mlflow = None
            if trainer.logger is not False and not trainer.fast_dev_run and not is_later_process():
                mlflow = SafeMLFlowLogger(self.experiment, self.run_dir.name, config.tracking.uri)
                loggers.append(mlflow)
            if trainer.logger not in (None, True, False):
                loggers += trainer.logger if isinstance(trainer.logger, list) else [trainer.logger]
            same_run = self.run_dir.resolve() == self.command.run
            record = RunRecord(self.run_dir, self._dump(), mlflow, same_run)
            trainer.callbacks = [*(trainer.callbacks or []), record]
        several = trainer.devices not in (1, "1", [0]) or trainer.num_nodes > 1
        if several and trainer.strategy != "single_device":
            kwargs["strategy"] = ReplicatedStrategy()
        return super().instantiate_trainer(logger=loggers or False, **kwargs)

    # -- running -------------------------------------------------------------------------------------------

    def _run_subcommand(self, subcommand: str) -> None:
        ours = [path for path in (self.run_dir, *self.run_dir.parents) if not path.exists()]
        try:
            super()._run_subcommand(subcommand)
        except BaseException as error:
            if ours and not (self.run_dir / "config.yaml").exists():  # it ended before it began
                shutil.rmtree(self.run_dir / "replay", ignore_errors=True)
                for folder in (self.run_dir / "checkpoints", *ours):
                    with suppress(OSError):  # there is something in it
                        folder.rmdir()
            # So Lightning ends after Ctrl-C, without a word.
            if isinstance(error, SystemExit) and self.trainer.state.status == "interrupted":
                raise KeyboardInterrupt from error
            raise

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        return {**super()._prepare_subcommand_kwargs(subcommand), "weights_only": True}

    def before_fit(self) -> None:
        """Remember how far the checkpoint had come."""
        checkpoint = self.command.checkpoint
        loaded = checkpoint and torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        self._done_before = loaded.get("global_step") if loaded else None

    def after_fit(self) -> None:
        """Say where everything is and what comes next; after a signal leave with its status.

        The other processes leave in peace: Lightning would take their status for a crash and kill the first.
        """
        checkpoint = self.trainer.checkpoint_callback
        if self.trainer.is_global_zero and getattr(checkpoint, "stopping", False):
            raise checkpoint.interrupted()  # type: ignore[union-attr]
        if self.trainer.is_global_zero:
            if self.trainer.global_step == self._done_before:
                print("fit: nothing was left to do: raise data.max_env_steps or trainer.max_steps")
            else:
                print(*self._last_evaluation(), sep="\n")
            where = "" if playable(self.trainer) else " --env ENV"
            print(f"fit: {self.run_dir}\nlit-wm evaluate --ckpt {self.run_dir}{where}")

    def _last_evaluation(self) -> list[str]:
        """What was last found: returns, and losses on held-out episodes; else why there is nothing."""
        evaluate, module = self._get(self.config_init, "evaluate"), self.model
        lines, results = [], evaluate.results
        if results is not None:
            score = {k.removeprefix("eval/"): v for k, v in results.summary().items()}
            shown = [f"{k} {score[k]:.2f}" for k in ("return", "normalized", "success") if k in score]
            count = int(score["episodes"])
            when = f"{count} episode{'s' * (count != 1)} at update {evaluate.played_at:,}"
            lines.append(f"fit: {', '.join(shown)}: {when}{evaluate.cut_note()}")
        if getattr(module, "held_out", None):
            lines += [f"fit: held-out episodes at update {module.held_out_at:,}:", *lines_of(module.held_out)]
        why = f"trainer.val_check_interval is {self.trainer.val_check_interval}"
        if not (playable(self.trainer) or getattr(self.datamodule, "held_out", None)):
            why = "data.eval_env or data.val_fraction would make it possible"
        return lines or [f"fit: nothing was evaluated: {why}"]

    def after_validate(self) -> None:
        """Print what episodes and held-out data say and write it to ``validate.json`` in the run directory.

        Raises:
            ConfigError: there are neither.
        """
        evaluate, held_out = self._get(self.config_init, "evaluate"), getattr(self.model, "held_out", {})
        if not self.trainer.is_global_zero:
            return
        if (results := evaluate.results) is None and not held_out:
            raise ConfigError(
                "validate: no environment to play in and no held-out episodes to look at\n"
                "Name an environment: --data.eval_env ENV. Trainings with data.val_fraction hold episodes out"
            )
        metrics = {} if results is None else results.summary()
        metrics |= {f"dream/{k}": v for k, v in evaluate.errors.items()}
        for name, value in metrics.items():
            print(f"  {name:<32} {value:.6g}{evaluate.cut_note() if name == 'eval/return' else ''}")
        if held_out:
            print("held-out episodes:", *lines_of(held_out), sep="\n")
        reference = None if results is None or results.reference is None else results.reference._asdict()
        report: dict[str, Any] = {"env": self.experiment, "checkpoint": str(self.command.checkpoint)}
        report |= {"metrics": metrics | held_out, "reference": reference}
        path = self.run_dir / "validate.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"validate: {path}")


def check_datamodules() -> None:
    """``python -m`` puts the working directory first, and many projects have a folder of this name."""
    import datamodules

    if "ReplayDataModule" not in getattr(datamodules, "__all__", ()):
        where = getattr(datamodules, "__file__", None) or next(iter(datamodules.__path__))
        raise ConfigError(
            f"'{where}' hides the package 'datamodules' of lit-wm\n"
            "Start with 'lit-wm' instead of 'python -m lit_wm', or from another directory"
        )


def main(argv: list[str]) -> int:
    """Run ``argv[0]`` and return the exit status.

    Raises:
        LitWMError: anything the user can fix.
        SystemExit: after ``--help`` and ``--print_config``, and after Ctrl-C.
    """
    return guarded(lambda: TrainingCLI(read_command(argv)))


def guarded(body: Callable[[], Any]) -> int:
    """Call ``body`` without what Lightning says about intended things, with its refusals as our errors."""
    for noisy in ("lightning.pytorch", "lightning.fabric"):  # seeds, devices, litlogger advertisements
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    check_datamodules()
    try:
        body()
    except MisconfigurationException as error:
        raise ConfigError(str(error)) from error
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        raise CheckpointError(
            "the checkpoint's model has other parts or sizes than this configuration (see above)\n"
            "Go on without the files that change the model, or without --ckpt_path"
        ) from error
    return 0
