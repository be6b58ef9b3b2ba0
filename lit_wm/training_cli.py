"""``fit | validate | test | predict``: LightningCLI with our meaning of files, checkpoints and errors.

* Several ``--config`` are merged here, in order and deeply, before jsonargparse sees one result. Relative
  names are looked up in the working directory and then among the packaged configurations.
* ``--ckpt_path last|best|PATH`` names a run; its stored configuration is the lowest layer: run < files <
  flags.
* Every user error is a :class:`~lit_wm.errors.LitWMError` of a few lines; a misspelt key names its nearest
  neighbours.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import time
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import get_loader
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lit_wm.errors import CheckpointError, ConfigError, LitWMError, nearest
from lit_wm.strategy import ReplicatedStrategy
from lit_wm.tracking import CsvLogger, RunRecord, SafeMLFlowLogger

RUNS = Path("runs")
DEFAULT_CLASSES = {"model": "lit_wm.DreamerV3Module", "data": "datamodules.ReplayDataModule"}
SHORT_NAMES = [path.rpartition(".")[2] for path in DEFAULT_CLASSES.values()]
PRECISIONS = (None, 32, "32", "32-true", "bf16", "bf16-mixed")

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

# Trainer arguments that cannot work with manual optimisation, with the reason.
REFUSED_TRAINER_ARGS = {
    "gradient_clip_val": "the optimisers clip each parameter themselves (adaptive gradient clipping)",
    "gradient_clip_algorithm": "the optimisers clip each parameter themselves (adaptive gradient clipping)",
    "accumulate_grad_batches": "the optimisers step together after every batch; lower data.batch_size",
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
    ".*You have overridden `transfer_batch_to_device` in `LightningModule`.*",
    ".*predict returned None.*",
    ".*It is recommended to use `self.log.*sync_dist=True.*",  # the evaluation gathers by itself
)


# -- files -------------------------------------------------------------------------------------------------


def config_folders() -> list[Path]:
    """Where packaged configurations live: beside the package in a checkout, inside it in a wheel."""
    package = Path(__file__).resolve().parent
    checkout = package.parent / "configs"
    folders = [checkout] if (package.parent / "pyproject.toml").is_file() and checkout.is_dir() else []
    return [*folders, *([package / "_configs"] if (package / "_configs").is_dir() else [])]


def find_config(name: str) -> Path:
    """The file itself, or the packaged configuration of that name (with or without ``configs/`` in front)."""
    path = Path(name)
    if path.is_file():
        return path
    inner = Path(*path.parts[1:]) if path.parts[:1] == ("configs",) else path
    known: list[str] = []
    for folder in config_folders():
        for candidate in (folder / inner, folder / f"{inner}.yaml"):
            if not path.is_absolute() and candidate.is_file():
                return candidate
        known += [str(p.relative_to(folder)) for p in sorted(folder.rglob("*.yaml"))]
    raise ConfigError(
        f"--config {name}: no such file, no packaged configuration of this name{nearest(str(inner), known)}\n"
        f"Packaged: {', '.join(known)}"
    )


def load_yaml(path: Path) -> dict[str, Any]:
    """Read one configuration; an empty file is an empty dict."""
    try:
        # jsonargparse's loader knows that 1e-3 is a number, which YAML 1.1 does not.
        loaded = get_loader("yaml")(path.read_text())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: not YAML: {getattr(error, 'problem', None) or error}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(f"{path}: expected keys and values like 'model:', found {type(loaded).__name__}")
    return loaded


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``, deeply. Another ``class_path`` drops the arguments of the former class."""
    if "class_path" in low and high.get("class_path", low["class_path"]) != low["class_path"]:
        return dict(high)
    merged = dict(low)
    for key, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; ``init_args`` is left out since flags leave it out too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix.rstrip(".") if key == "init_args" else f"{prefix}{key}"
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{name}." if name else "")
        else:
            flat[name] = value
    return flat


# -- the command line, before jsonargparse -----------------------------------------------------------------


@dataclass
class Request:
    """One command line, taken apart.

    Attributes:
        verb: fit, validate, test or predict.
        configs: the ``--config`` files in order.
        ckpt_path: ``last``, ``best``, a path, or None.
        flags: everything else, as given.
    """

    verb: str
    configs: list[str] = field(default_factory=list)
    ckpt_path: str | None = None
    flags: list[str] = field(default_factory=list)

    @classmethod
    def parse(cls, argv: list[str]) -> Request:
        """Take ``--config`` and ``--ckpt_path`` out of the arguments."""
        request = cls(argv[0])
        rest = iter(argv[1:])
        for word in rest:
            name, equals, value = word.partition("=")
            if name not in ("-c", "--config", "--ckpt_path"):
                request.flags.append(word)
                continue
            value = value if equals else next(rest, "")
            if not value or value.startswith("--"):
                raise ConfigError(f"{name} needs a value, e.g. {name} {EXAMPLES[name]}")
            if name == "--ckpt_path":
                request.ckpt_path = value
            else:
                request.configs.append(value)
        return request

    def options(self) -> Iterator[tuple[str, str | None]]:
        """``(name without dashes, value)`` of the flags; None where the next word is another flag."""
        for i, word in enumerate(self.flags):
            if not word.startswith("--"):
                continue
            name, equals, value = word[2:].partition("=")
            if equals:
                yield name, value
            else:
                following = self.flags[i + 1] if i + 1 < len(self.flags) else None
                yield name, following if following is not None and not following.startswith("--") else None

    def option(self, *names: str) -> str | None:
        """The value of the last flag with one of these names."""
        found = [value for name, value in self.options() if name in names]
        return found[-1] if found else None


EXAMPLES = {
    "-c": "configs/dreamer_atari.yaml",
    "--config": "configs/dreamer_atari.yaml",
    "--ckpt_path": "last",
}


# -- run directories and checkpoints -----------------------------------------------------------------------


def folder_name(experiment: str) -> str:
    """``atari:pong`` and ``ALE/Pong-v5`` as names of a directory."""
    return re.sub(r"[^\w.-]+", "-", experiment)


def run_of(checkpoint: Path) -> Path | None:
    """The run directory a checkpoint lies in: the nearest parent with a ``config.yaml``."""
    for parent in checkpoint.resolve().parents:
        if (parent / "config.yaml").is_file():
            return parent
    return None


def checkpoint_in(run: Path, which: str) -> Path | None:
    """The ``last`` or ``best`` checkpoint file of a run, or None."""
    path = run / "checkpoints" / f"{which}.ckpt"
    return path if path.is_file() else None


def resolve_checkpoint(ckpt_path: str, root: Path) -> Path:
    """The file that ``last``, ``best``, a run directory or a path means.

    Args:
        ckpt_path: ``last`` or ``best`` of the newest run under ``root``; a run directory (its best checkpoint
            for evaluation and its last for ``fit`` are chosen by the caller); or a file.
        root: a run directory, an experiment directory or the folder of all runs.

    Raises:
        CheckpointError: there is none.
    """
    if ckpt_path not in ("last", "best"):
        path = Path(ckpt_path)
        if path.is_file():
            return path
        raise CheckpointError(
            f"--ckpt_path {ckpt_path}: no such file. Give 'last', 'best', a run directory or a .ckpt"
        )
    runs = [root, *root.glob("*"), *root.glob("*/*")] if root.is_dir() else []
    found = [p for run in runs if (p := checkpoint_in(run, ckpt_path))]
    if not found:
        raise CheckpointError(
            f"--ckpt_path {ckpt_path}: no {ckpt_path} checkpoint under '{root}'\n"
            "Start without --ckpt_path, or give the path of a checkpoint or of a run directory"
        )
    return max(found, key=lambda p: p.stat().st_mtime)


def stored_config(checkpoint: Path, run: Path | None) -> dict[str, Any]:
    """What the checkpoint's run was configured with; of a lone file the model's arguments only."""
    if run is not None:
        stored = load_yaml(run / "config.yaml")
        for own in ("ckpt_path", "name", "config"):
            stored.pop(own, None)
        stored.get("trainer", {}).pop("default_root_dir", None)
        return stored
    import torch

    try:
        loaded = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        params = dict(loaded.get("hyper_parameters", {}))
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(f"{checkpoint} is not a checkpoint of this program: {reason}") from error
    class_path = params.pop("_class_path", DEFAULT_CLASSES["model"])
    for linked in ("_instantiator", "spaces", "seed"):
        params.pop(linked, None)
    return {"model": {"class_path": class_path, "init_args": params}} if params else {}


# -- spelling ----------------------------------------------------------------------------------------------


def import_class(class_path: str) -> type | None:
    """The class, or None if the path is short or wrong (jsonargparse then says what is wrong)."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found if isinstance(found, type) else None


def parameters_of(cls: type) -> list[str] | None:
    """Names that a constructor takes; ``**kwargs`` goes on with the parent. None if anything is taken."""
    names: list[str] = []
    for owner in cls.__mro__:
        if "__init__" not in vars(owner):
            continue
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]  # type: ignore[misc]
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return names
    return None


def _refuse_key(where: str, key: str, known: list[str], all_keys: list[str]) -> NoReturn:
    close = nearest(key, known)
    if not close:  # the right word in the wrong group, e.g. trainer.batch_size
        elsewhere = [k for k in all_keys if k.rpartition(".")[2] == key]
        close = f"; did you mean {' or '.join(map(repr, elsewhere[:3]))}?" if elsewhere else ""
    listing = "" if close else f"\nKnown there: {', '.join(sorted(known))}"
    raise ConfigError(f"unknown key '{where}{key}'{close}{listing[:600]}")


LINKED = {
    "model.seed": "it follows seed_everything",
    "data.seed": "it follows seed_everything",
    "model.spaces": "the model receives the spaces from the data",
}


class Spelling:
    """Checks every key of the merged files and the flags against what the parser and the classes take."""

    def __init__(self, parser: LightningArgumentParser, config: dict[str, Any], request: Request):
        self.classes = dict(DEFAULT_CLASSES)
        for group in self.classes:
            given = request.option(group, f"{group}.class_path") or (config.get(group) or {}).get(
                "class_path"
            )
            self.classes[group] = given or self.classes[group]
            if "." not in self.classes[group] and self.classes[group] not in SHORT_NAMES:
                raise ConfigError(
                    f"{group}: no class {given!r}{nearest(str(given), SHORT_NAMES)}\n"
                    f"Give its import path, e.g. {DEFAULT_CLASSES[group]}"
                )
        self.groups: dict[str, list[str] | None] = {}
        for action in parser._actions:
            group, _, key = action.dest.rpartition(".")
            if action.dest not in ("help", "==SUPPRESS=="):
                self._learn("", action.dest.split(".")[0])
                if group:
                    self._learn(group, key)
        for group, class_path in self.classes.items():
            cls = import_class(class_path)
            self.groups[group] = parameters_of(cls) if cls else None
        self.all_keys = [f"{g}.{k}" if g else k for g, keys in self.groups.items() for k in keys or []]

    def _learn(self, group: str, key: str) -> None:
        known = self.groups.setdefault(group, [])
        if known is not None and key not in known:
            known.append(key)

    def check(self, config: dict[str, Any], request: Request) -> None:
        """Raise a :class:`ConfigError` that names the nearest keys."""
        for name, _ in request.options():
            if name.partition("+")[0] in ("print_config", "help") or name.endswith(".help"):
                continue
            self._flag(name.removesuffix("+"))
        self._tree(config)

    def _known(self, group: str, key: str) -> None:
        known = self.groups.get(group)
        if f"{group}.{key}" in LINKED:
            raise ConfigError(f"'{group}.{key}' cannot be set: {LINKED[f'{group}.{key}']}")
        if known is not None and key not in known:
            _refuse_key(f"{group}." if group else "", key, known, self.all_keys)

    def _flag(self, name: str) -> None:
        parts = [p for p in name.split(".") if p != "init_args"]
        self._known("", parts[0])
        if len(parts) > 1 and parts[0] in self.groups and parts[1] not in ("class_path", "dict_kwargs"):
            self._known(parts[0], parts[1])

    def _tree(self, config: dict[str, Any]) -> None:
        for top, value in config.items():
            self._known("", top)
            if not isinstance(value, dict):
                continue
            if top in self.classes:
                unknown = [k for k in value if k not in ("class_path", "init_args", "dict_kwargs")]
                if unknown:
                    known = self.groups.get(top) or []
                    hint = (
                        f"; write it under '{top}: init_args:'"
                        if unknown[0] in known
                        else nearest(unknown[0], known)
                    )
                    raise ConfigError(f"unknown key '{top}.{unknown[0]}'{hint}")
                for key in value.get("init_args") or {}:
                    self._known(top, key)
            elif top in self.groups:
                for key, inner in value.items():
                    self._known(top, key)
                    self._classes(inner, f"{top}.{key}")

    def _classes(self, value: Any, where: str) -> None:
        """Arguments of every ``class_path`` further down, e.g. of trainer.callbacks."""
        if isinstance(value, list):
            for i, item in enumerate(value):
                self._classes(item, f"{where}[{i}]")
        elif isinstance(value, dict) and "class_path" in value:
            cls = import_class(str(value["class_path"]))
            known = parameters_of(cls) if cls else None
            for key, inner in (value.get("init_args") or {}).items():
                if known is not None and key not in known:
                    _refuse_key(f"{where}.init_args.", key, known, self.all_keys)
                self._classes(inner, f"{where}.init_args.{key}")


def shorten(message: str) -> str:
    """The innermost problem of a jsonargparse message."""
    message = str(message).strip()
    key = re.search(r'^Parser key "([^"]+)":', message)
    where = f"{key.group(1)}: " if key else ""
    given = re.search(r"Given value: (.+)", message) or re.search(r"Got value: (.+)", message)
    problem = re.search(r"Problem with given class_path '([^']+)':\s+(.+)", message)
    if "Errors:\n" in message:
        block = message.split("Errors:\n", 1)[1].split("\n  Given value", 1)[0]
        items = re.split(r"^    - ", block, flags=re.MULTILINE)[1:]
        items = ["\n".join(map(str.strip, item.strip().splitlines())) for item in items]
        items = [item for item in items if not item.startswith("Expected a <class 'NoneType'>")]
        if len(items) == 1 and not problem:
            inner = shorten(items[0])
            joined = re.match(r"[\w.]+: got ", inner)
            return (f"{where[:-2]}." if joined and where else where) + inner
    if problem:
        return f"{where}cannot use '{problem.group(1)}': {problem.group(2).strip()}"
    options: list[str] = []
    for one in re.findall(r"Expected an? (.+?)(?:\. Got value|\. |$)", message, flags=re.MULTILINE):
        literal = re.search(r"Literal\[(.+)\]", one)
        name = re.search(r"<class '([^']+)'>", one)
        if literal:
            options += [part.strip().strip("'") for part in literal.group(1).split(",")]
        elif name and name.group(1) != "NoneType":
            options.append(name.group(1).rpartition(".")[2])
        elif not name:
            options.append(one)
    options = list(dict.fromkeys(options))
    if key and options:
        value = given.group(1).strip() if given else "?"
        return f"{where}got {value!r}{nearest(value, options)}\nExpected: {', '.join(options)}"
    return re.sub(r'^Parser key "([^"]+)":\s*', r"\1: ", message)


class QuietParser(LightningArgumentParser):
    """Raises instead of printing the usage and leaving."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Every refusal of jsonargparse as a short :class:`ConfigError`."""
        raise ConfigError(shorten(message)) from ex


# -- the training command ----------------------------------------------------------------------------------


@dataclass
class Plan:
    """What was decided before the parser ran.

    Attributes:
        request: the command line.
        config: merged configuration, the lowest layer being the checkpoint's run.
        checkpoint: the file to load, or None.
        run: the directory of the checkpoint's run, or None.
        stored: configuration of the checkpoint's run.
    """

    request: Request
    config: dict[str, Any]
    checkpoint: Path | None
    run: Path | None
    stored: dict[str, Any]


def make_plan(argv: list[str]) -> Plan:
    """Read the files, find the checkpoint, merge: run < files < (later) flags."""
    request = Request.parse(argv)
    given: dict[str, Any] = {}
    for name in request.configs:
        given = merge(given, load_yaml(find_config(name)))
    ckpt = request.ckpt_path or given.pop("ckpt_path", None)
    given.pop("ckpt_path", None)
    checkpoint = run = None
    stored: dict[str, Any] = {}
    inherited = os.environ.get("LITWM_CHECKPOINT") if _is_child_process() else None
    asks_only = "-h" in request.flags or any(
        name.startswith("print_config") or name.endswith("help") for name, _ in request.options()
    )
    if inherited:
        checkpoint = Path(inherited)
    elif ckpt:
        root = _search_root(request, given)
        if Path(ckpt).is_dir():  # a run directory
            root, ckpt = Path(ckpt), "last" if request.verb == "fit" else "best"
            if request.verb != "fit" and checkpoint_in(root, "best") is None:
                ckpt = "last"
        checkpoint = resolve_checkpoint(str(ckpt), root)
    elif request.verb != "fit" and not asks_only:
        raise CheckpointError(
            f"'{request.verb}' needs a trained model: --ckpt_path best, last, a run directory or a .ckpt"
        )
    elif not (request.configs or asks_only or request.option("data.env", "data.init_args.env")):
        names = [p.name for folder in config_folders()[:1] for p in sorted(folder.glob("*.yaml"))]
        raise ConfigError(
            "'fit' needs to know what to train: --config FILE, --data.env ID, or --ckpt_path last to go on\n"
            f"Packaged files: {', '.join(names)}"
        )
    if checkpoint is not None:
        if not zipfile.is_zipfile(checkpoint):
            raise CheckpointError(f"--ckpt_path {checkpoint}: not a checkpoint, or one that was cut off")
        run = run_of(checkpoint)
        stored = stored_config(checkpoint, run)
    config = merge(stored, given)
    for group, class_path in DEFAULT_CLASSES.items():
        if isinstance(config.setdefault(group, {}), dict):
            config[group].setdefault("class_path", class_path)
    return Plan(request, config, checkpoint, run, stored)


def _search_root(request: Request, given: dict[str, Any]) -> Path:
    """Where ``last`` and ``best`` look: the run, the experiment or all runs, as far as the command says."""
    exact = request.option("trainer.default_root_dir") or (given.get("trainer") or {}).get("default_root_dir")
    if exact:
        return Path(exact)
    name = request.option("name") or given.get("name")
    init_args = (given.get("data") or {}).get("init_args") or {}
    experiment = (
        request.option("tracking.experiment")
        or (given.get("tracking") or {}).get("experiment")
        or request.option("data.env", "data.init_args.env")
        or init_args.get("env")
    )
    root = RUNS / folder_name(experiment) if experiment else RUNS
    # With --name NEW the run to start from is the experiment's newest; with the name of a run it is that one.
    return root / name if name and experiment and (root / name).is_dir() else root


def _is_child_process() -> bool:
    """Whether this is one of several processes and not the first."""
    return any(os.environ.get(name, "0") != "0" for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"))


class TrainingCLI(LightningCLI):
    """LightningCLI with the run directory, the loggers and the callbacks of this project."""

    def __init__(self, plan: Plan, callbacks: dict[str, type[Callback]]):
        self.plan, self.callback_classes = plan, callbacks
        self.run_dir = Path()
        self.mlflow: SafeMLFlowLogger | None = None
        args = [plan.request.verb, "--config", json.dumps(plan.config), *plan.request.flags]
        if plan.checkpoint is not None:
            args += ["--ckpt_path", str(plan.checkpoint)]
        super().__init__(
            LightningModule,
            LightningDataModule,
            save_config_callback=None,  # RunRecord does it; Lightning's dies with an SQLite store
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=QuietParser,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,  # else --optimizer would replace the three of the module
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Only the verb at hand, so that one parser is built; checkpoints are read with weights_only."""
        verb = self.plan.request.verb
        known = LightningCLI.subcommands()
        return {verb: known[verb] | {"weights_only"}}

    def add_default_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The arguments of a run."""
        parser.add_argument(
            "--seed_everything", type=int, default=0, help="The one seed of model, data and environments."
        )
        parser.add_argument(
            "--name",
            type=str | None,
            default=None,
            help="Name of the run and of its directory runs/EXPERIMENT/NAME; the time of start by default. "
            "With --ckpt_path: begin a new run of this name from the checkpoint.",
        )
        parser.add_argument(
            "--tracking.uri",
            type=str | None,
            default=None,
            help="MLflow store: sqlite:///FILE or http://HOST:PORT. Default: MLFLOW_TRACKING_URI, else "
            "sqlite:///mlruns.db.",
        )
        parser.add_argument(
            "--tracking.experiment",
            type=str | None,
            default=None,
            help="MLflow experiment; the environment by default.",
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Callbacks that every run has, and the values that flow from one group to another."""
        for key, callback in self.callback_classes.items():
            parser.add_lightning_class_args(callback, key)
        parser.link_arguments("data.spaces", "model.init_args.spaces", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.init_args.seed")
        parser.link_arguments("seed_everything", "model.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check the spelling first: jsonargparse's own message does not help."""
        sub = self._subcommand_parsers[self.plan.request.verb]
        Spelling(sub, self.plan.config, self.plan.request).check(self.plan.config, self.plan.request)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Nothing: Lightning would put the file's hyper-parameters over the flags; ours lie under them."""

    @property
    def _section(self) -> Any:
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Refuse what cannot work, choose the run directory, report what the checkpoint's run had."""
        config = self._section
        trainer = config.trainer
        if trainer.precision not in PRECISIONS:
            reason = (
                "with several optimisers fp16 clips scaled gradients, and steps on half of them after a "
                "change of the loss scale, silently"
                if "16" in str(trainer.precision) and "bf16" not in str(trainer.precision)
                else "parameters, normalisers and losses stay in float32"
            )
            raise ConfigError(
                f"trainer.precision: {trainer.precision} is refused: {reason}\n"
                "Use bf16-mixed (GPU, recent CPU) or 32-true"
            )
        for key, reason in REFUSED_TRAINER_ARGS.items():
            if trainer.get(key) not in ((1,) if key == "accumulate_grad_batches" else (None,)):
                raise ConfigError(f"trainer.{key} is refused: {reason}\nRemove it from the configuration")
        self._check_strategy()
        self.experiment = self._experiment()
        self.run_dir = self._choose_run_dir()
        trainer.default_root_dir = str(self.run_dir)
        os.environ["LITWM_RUN_DIR"] = str(self.run_dir.resolve())
        if self.plan.checkpoint is not None:
            os.environ["LITWM_CHECKPOINT"] = str(self.plan.checkpoint.resolve())
            self._report_differences()
        else:
            os.environ.pop("LITWM_CHECKPOINT", None)

    def _check_strategy(self) -> None:
        strategy = self._section.trainer.strategy
        if isinstance(strategy, str) and strategy not in ("auto", "ddp", "single_device"):
            raise ConfigError(
                f"trainer.strategy: {strategy} is refused: the modules average their own gradients, which "
                "other strategies would do again or not at all\nUse auto: one process per device"
            )

    def _experiment(self) -> str:
        config = self._section
        init_args = config.data.get("init_args") or {}
        return str(
            config.tracking.experiment or init_args.get("env") or config.data.class_path.rpartition(".")[2]
        )

    def _choose_run_dir(self) -> Path:
        if _is_child_process():
            inherited = os.environ.get("LITWM_RUN_DIR")
            if inherited:
                return Path(inherited)
            if not self._section.name and not self._section.trainer.default_root_dir:
                raise ConfigError(
                    "several processes that were not started by this program need one run directory\n"
                    "Give --name NAME to all of them"
                )
        config, plan = self._section, self.plan
        if config.trainer.default_root_dir:
            chosen = Path(config.trainer.default_root_dir)
        elif plan.run is not None and config.name in (None, plan.run.name):
            try:
                return plan.run.relative_to(Path.cwd())
            except ValueError:
                return plan.run
        else:
            base = RUNS / folder_name(self.experiment)
            stamp = time.strftime("%Y%m%d-%H%M%S")
            names = [stamp, *(f"{stamp}-{i}" for i in range(2, 100))]
            chosen = base / (config.name or next(n for n in names if not (base / n).exists()))
        continued = plan.run is not None and chosen.resolve() == plan.run
        if (
            plan.request.verb == "fit"
            and not continued
            and not _is_child_process()
            and (chosen / "config.yaml").exists()
        ):
            raise ConfigError(
                f"the run directory '{chosen}' already holds a run\n"
                "Go on with it: --ckpt_path last. Begin another: --name NEW_NAME"
            )
        return chosen

    @property
    def continues(self) -> bool:
        """Whether the checkpoint's own run goes on, in its directory."""
        return self.plan.run is not None and self.run_dir.resolve() == self.plan.run

    def _report_differences(self) -> None:
        if _is_child_process():
            return
        print(f"checkpoint: {self.plan.checkpoint}")
        if not self.plan.stored:
            return
        now = flatten(yaml.safe_load(self._dump()))
        for key, value in flatten(self.plan.stored).items():
            if key in now and now[key] != value and not key.startswith("trainer.default_root_dir"):
                print(f"  {key}: {now[key]} (the checkpoint's run had {value})")

    def _dump(self) -> str:
        verb = self.plan.request.verb
        return self._subcommand_parsers[verb].dump(self._section, skip_none=False)

    def instantiate_classes(self) -> None:
        """Build data, model and Trainer; what their constructors refuse is a user error."""
        try:
            super().instantiate_classes()
        except (ValueError, TypeError, NotImplementedError, OSError) as error:
            if isinstance(error, LitWMError):
                raise
            raise ConfigError(str(error) or type(error).__name__) from error

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with our loggers and callbacks."""
        config = self.config_init[self.subcommand]
        wanted = config.trainer.logger
        csv_file = CsvLogger(self.run_dir)
        loggers: list[Any] = [csv_file]
        tracked = self.subcommand == "fit" and wanted is not False and not config.trainer.fast_dev_run
        if tracked and not _is_child_process():
            self.mlflow = SafeMLFlowLogger(
                self.experiment, run_name=self.run_dir.name, tracking_uri=config.tracking.uri
            )
            loggers.append(self.mlflow)
        if wanted not in (None, True, False):
            loggers += wanted if isinstance(wanted, list) else [wanted]
        if self.subcommand != "fit":
            loggers = []  # evaluation writes its own file; it must not touch the record of the training
        config.trainer.callbacks = list(config.trainer.callbacks or [])
        if self.subcommand == "fit":
            config.trainer.callbacks.append(
                RunRecord(self.run_dir, self._dump(), self.mlflow, self.continues)
            )
        kwargs["logger"] = loggers or False
        devices = config.trainer.devices
        several = devices not in (1, "1", [0]) or config.trainer.num_nodes > 1
        if several and config.trainer.strategy in ("auto", "ddp"):
            kwargs["strategy"] = ReplicatedStrategy()
        return super().instantiate_trainer(**kwargs)

    def after_validate(self) -> None:
        """Print what the evaluation found and write it to ``validate.json`` in the run directory."""
        evaluate = self._get(self.config_init, "evaluate")
        if not self.trainer.is_global_zero or evaluate.results is None:
            return
        metrics = evaluate.results.summary() | {f"dream/{k}": v for k, v in evaluate.errors.items()}
        path = self.run_dir / "validate.json"
        report = {"env": self.experiment, "checkpoint": str(self.plan.checkpoint), "metrics": metrics}
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        for name, value in metrics.items():
            print(f"  {name:<32} {value:.6g}")
        print(f"validate: {path}")

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        return {**kwargs, "weights_only": True}


def check_datamodules() -> None:
    """``python -m`` puts the working directory first, and many projects have a folder of this name."""
    import datamodules

    if "ReplayDataModule" not in getattr(datamodules, "__all__", ()):
        where = getattr(datamodules, "__file__", None) or next(iter(datamodules.__path__))
        raise ConfigError(
            f"'{where}' hides the package 'datamodules' of lit-wm\n"
            "Start with 'lit-wm' instead of 'python -m lit_wm', or from another directory"
        )


def run_callbacks() -> dict[str, type[Callback]]:
    """The callbacks of every run with their configuration groups."""
    from lit_wm.callbacks import DreamVideo, Evaluate, ResumableCheckpoint, RLProgressBar

    return {
        "progress": RLProgressBar,
        "checkpoint": ResumableCheckpoint,
        "evaluate": Evaluate,
        "video": DreamVideo,
    }


def main(argv: list[str]) -> int:
    """Run ``argv[0]`` and return the exit status.

    Raises:
        LitWMError: anything the user can fix.
        SystemExit: after ``--help`` and ``--print_config``, and after Ctrl-C.
    """
    for noisy in ("lightning.pytorch", "lightning.fabric"):  # seeds, devices, litlogger advertisements
        logging.getLogger(noisy).setLevel(logging.WARNING)
    for message in EXPECTED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    check_datamodules()
    try:
        TrainingCLI(make_plan(argv), run_callbacks())
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
