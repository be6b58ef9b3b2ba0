"""Training from a script or notebook: a model, a buffer, a number of updates.

The updates are those of the command line: the same ``training_step`` under a Lightning Trainer.
"""

from __future__ import annotations

import inspect
import json
import logging
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
import yaml

from datamodules.buffer import ReplayBuffer
from datamodules.sources import find_uri, parse_uri
from datamodules.windows import BufferWindows, buffer_spaces
from lit_wm.callbacks import ResumableCheckpoint, RLProgressBar
from lit_wm.create import describe
from lit_wm.errors import CheckpointError, ConfigError, DataError, nearest, whole
from lit_wm.module import WorldModelModule
from lit_wm.noise import NoiseStreams
from lit_wm.tracking import CsvLogger, RunRecord, SafeMLFlowLogger
from lit_wm.training_cli import ACCEPTED, EXPECTED_WARNINGS, TRAINER_DEFAULTS
from lit_wm.types import Batch, Spaces

__all__ = ["ReplayBuffer", "held_out_losses", "train"]

# Trainer arguments that something else decides here.
DECIDED = {"max_steps": "total_steps", "min_steps": "total_steps", "max_epochs": "total_steps",
           "min_epochs": "total_steps", "default_root_dir": "folder", "enable_checkpointing": "folder",
           "enable_progress_bar": "progress", "fast_dev_run": "total_steps"}  # fmt: skip
DECIDED |= dict.fromkeys(
    ("accelerator", "devices", "num_nodes", "strategy"), "create_world_model(device=...)"
)


def train(
    model: WorldModelModule,
    buffer: ReplayBuffer | str | Path,
    total_steps: int,
    *,
    batch_size: int | None = None,
    batch_length: int | None = None,
    folder: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, float]:
    """Make ``total_steps`` updates on what a buffer holds; another call goes on where this one ended.

    Two calls of N updates equal one of 2N bit for bit (on a CPU): optimizers, noise and the order of batches
    go on. DreamerV3's windows start from a state of zeros; those of the command line from stored latents.

    Args:
        model: of :func:`lit_wm.create_world_model`; it learns on its device.
        buffer: filled or loaded; or the path or URI of a dataset, which is loaded.
        total_steps: gradient updates.
        batch_size: windows of an update; None is the reference's: 16 for DreamerV3, 256 for TD-MPC2.
        batch_length: steps of a window; None is the reference's: 64, and the model's horizon + 1.
        folder: a run directory: checkpoints, ``metrics.csv``, and an MLflow run named after the folder, in an
            experiment named after its parent (``logger=False``: none). None writes nothing at all.
        progress: show a line of progress.
        options: of Lightning's Trainer, e.g. ``precision="bf16-mixed"`` or ``callbacks=[...]``.

    Returns:
        The metrics logged last: means over the last ``log_every`` updates at most.

    Raises:
        DataError: if the buffer does not fit the model or has no window as long; nothing has begun then.
        ConfigError: for an argument that cannot work, and where episodes end by themselves for TD-MPC2
            without ``episodic=True``.
    """
    total_steps = _check(model, total_steps, options)
    data = _Data(model, buffer, batch_size, batch_length)
    started, device, bf16 = model.updates, model.device, model.model.compute_dtype == torch.bfloat16
    if started and not model.optimizer_states:
        warnings.warn(
            f"the model stands at update {started:,} without what its optimizers knew, as after an export: "
            "they begin anew.\n  Create it from the run directory instead to go on exactly.", stacklevel=2
        )  # fmt: skip
    callbacks = [_GoOn(), *options.pop("callbacks", [])]
    own = options.pop("logger", None)
    loggers = list(own) if isinstance(own, list) else [] if own in (None, True, False) else [own]
    if folder is not None:
        run = _run_of(Path(folder).expanduser(), model)
        loggers.append(CsvLogger(run))
        name, mlflow = run.resolve().parent.name, None
        if own is not False:
            mlflow = SafeMLFlowLogger(name, run.name, run_id=_run_id(run))
            loggers.append(mlflow)
        callbacks += [RunRecord(run, _config(model, total_steps), mlflow), _Checkpoint()]
        options["default_root_dir"] = str(run)
    if progress:
        callbacks.append(RLProgressBar())
    precision = "bf16-mixed" if bf16 else "32-true"
    given = TRAINER_DEFAULTS | {"precision": precision, "callbacks": callbacks} | options
    given["devices"] = [device.index or 0] if device.type == "cuda" else 1
    interrupt = signal.getsignal(signal.SIGINT)
    with _quiet():
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            max_steps=started + total_steps,
            limit_val_batches=0,
            logger=loggers or False,
            enable_checkpointing=folder is not None,
            enable_progress_bar=progress,
            **given,
        )
        # Updates made before count, as in a training that was resumed.
        done = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
        done.ready = done.completed = started
        try:
            trainer.fit(model.train(), data)
        except SystemExit as left:  # so Lightning ends after Ctrl-C, and ignores all that follow
            signal.signal(signal.SIGINT, interrupt)
            raise KeyboardInterrupt from left
        finally:
            model.optimizer_states = [
                opt.state_dict() for opt in trainer.optimizers
            ] or model.optimizer_states
            model.trainer = None  # type: ignore[assignment]
            model.to(device)
    if getattr(trainer.checkpoint_callback, "stopping", False):
        raise KeyboardInterrupt(f"stopped after update {model.updates:,}; {folder} has the checkpoint")
    return dict(model.latest)


@torch.no_grad()
def held_out_losses(
    model: WorldModelModule,
    buffer: ReplayBuffer | str | Path,
    *,
    batches: int = 4,
    batch_size: int | None = None,
    batch_length: int | None = None,
) -> dict[str, float]:
    """Mean losses of the world model on windows of a buffer that is not trained on, the same each time.

    Arguments and errors are those of :func:`train`.

    Returns:
        Losses by name, those that ``lit-wm fit`` logs as ``val/loss/...``.
    """
    data = _Data(model, buffer, batch_size, batch_length)
    noise, total = NoiseStreams(model.seed, 0, model.device), dict[str, float]()
    for number in range(batches):
        losses = model.held_out_losses(
            data.windows.batch(data.batch_size, number, "report").to(model.device), noise
        )
        total = {k: total.get(k, 0.0) + float(v) / batches for k, v in losses.items()}
    return total


def no_source(data: str) -> str | None:
    """Why this names no dataset, by a path that is there or a URI of a known scheme; None if it does."""
    try:
        return "an environment" if parse_uri(find_uri(data))[0] == "env" else None
    except (ConfigError, DataError) as error:
        return str(error).splitlines()[0]


def spaces_of(data: ReplayBuffer | str | Path) -> Spaces:
    """Entries of a buffer or dataset, as a model of it needs them."""
    return buffer_spaces(_buffer(data))


def _buffer(data: Any) -> ReplayBuffer:
    if isinstance(data, str | Path):
        return ReplayBuffer.load(data)
    if not isinstance(data, ReplayBuffer):
        raise ConfigError(
            f"the data are a {type(data).__name__}; expected a ReplayBuffer, a path or the URI of a dataset\n"
            "  ReplayBuffer().add_episode(obs, action, reward) makes one of arrays."
        )
    return data


class _Data(pl.LightningDataModule):
    """What ``trainer.datamodule`` is here: numbered batches of a buffer, and nothing to save."""

    env = None

    def __init__(
        self, model: WorldModelModule, buffer: Any, batch_size: int | None, batch_length: int | None
    ):
        super().__init__()
        inner, within = model.model, getattr(model, "windows", "stream") == "episode"
        exactly = getattr(model, "window_steps", None)
        self.batch_size = (256 if within else 16) if batch_size is None else whole("batch_size", batch_size)
        steps = (exactly or 64) if batch_length is None else whole("batch_length", batch_length, 2)
        if exactly not in (None, steps):
            raise ConfigError(
                f"batch_length is {steps}; expected {exactly}, one more than the model's horizon"
            )
        buffer = _buffer(buffer)
        if buffer.cache is None and not buffer.num_episodes:
            raise DataError(f"there is nothing to train on: {buffer}. Add a finished episode first.")
        _check_fit(inner.spaces, buffer)
        tasks, task = getattr(inner, "tasks", []), getattr(inner, "task_index", None)
        self.windows = BufferWindows(buffer, steps, within, model.seed, tasks, task)
        if not getattr(model, "episodic", True) and self.windows.terminates:
            raise ConfigError(
                "an episode of the data ends by itself; with episodic=False a model plans on beyond it\n"
                + ("  Several tasks go with time limits alone: leave such episodes out." if tasks else
                   "  create_world_model(NAME, ..., episodic=True) makes one that knows them.")
            )  # fmt: skip
        model.world_model_only = bool(buffer.cache is not None and buffer.cache.meta.get("no_reward"))
        if model.world_model_only:
            cloning = model.pretraining.cloning
            others = "and the actor by cloning, not the critic" if cloning else "and neither actor nor critic"
            warnings.warn(f"the data have no rewards: the world model learns, {others}", stacklevel=3)
        if inner.normalizer is not None and not inner.normalizer.fitted:
            inner.normalizer.fit(self.windows.statistics())

    def ticket(self, module: Any) -> Batch:
        """The batch of the update at hand."""
        batch = self.windows.batch(self.batch_size, module.updates)
        if module.world_model_only:
            batch.rewarded = torch.zeros(self.batch_size, dtype=torch.bool)
        return batch.to(module.device)

    def train_dataloader(self) -> Any:
        """The same ticket for ever, as in :class:`datamodules.ReplayDataModule`."""
        return repeat(self.ticket)

    def val_dataloader(self) -> Any:
        """Nothing; Lightning would ask where it is."""
        return []


class _GoOn(pl.Callback):
    """Hands the optimizers what they knew, and logs the last metrics."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        for optimizer, state in zip(trainer.optimizers, pl_module.optimizer_states or (), strict=False):
            optimizer.load_state_dict(state)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        if metrics := pl_module.pop_metrics():
            pl_module.log_metrics(metrics)


class _Checkpoint(ResumableCheckpoint):
    """Without a replay: ``create_world_model(folder)`` goes on exactly, ``lit-wm fit`` with other data."""

    def _write_folder(self, trainer: pl.Trainer, pl_module: Any, name: str) -> str | None:
        return None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Names no folder, but has what the module keeps beside its weights."""
        super().on_save_checkpoint(trainer, pl_module, checkpoint)
        checkpoint["resume"]["folder"] = None
        checkpoint["of_train"] = pl_module.rank_state_dict()


def _check(model: Any, total_steps: int, options: dict[str, Any]) -> int:
    """The number of updates, if model and options can be used."""
    if not isinstance(model, WorldModelModule):
        raise ConfigError(f"model is a {type(model).__name__}; expected what create_world_model gives")
    known = [*inspect.signature(pl.Trainer).parameters]
    own = [*inspect.signature(train).parameters][2:-1]
    for name, value in options.items():
        if name in DECIDED:
            raise ConfigError(f"{name} cannot be set: {DECIDED[name]} decides it")
        if name not in known:
            raise ConfigError(
                f"train and Lightning's Trainer have no option {name!r}{nearest(name, own + known)}\n"
                "  Those of the model, such as its learning rate lr, are create_world_model's."
            )
        accepted, reason = ACCEPTED.get(name, ((value,), ""))
        if value not in accepted:
            raise ConfigError(f"{name}={value!r} is refused: {reason}")
    return whole("total_steps", total_steps)


def _check_fit(model: Spaces, buffer: ReplayBuffer) -> None:
    """Refuse a buffer whose entries are not the model's."""
    its = buffer.spaces
    for ours, theirs in ((model.obs, its.obs), (model.action, its.action)):
        for name in {**ours, **theirs}:
            if ours.get(name) != theirs.get(name):
                raise DataError(
                    f"the buffer does not fit the model, first in {name!r}:\n"
                    f"  model   {describe(model.obs | model.action)}\n"
                    f"  buffer  {describe(its.obs | its.action)}\n"
                    "  create_world_model(NAME, data=buffer) makes a model that fits."
                )


def _run_of(run: Path, model: WorldModelModule) -> Path:
    """The run directory, unless another run lives there; one that never saved may begin anew."""
    last = run / "checkpoints" / "last.ckpt"
    if not last.exists():
        if saved := sorted(last.parent.glob("*.ckpt")):
            raise CheckpointError(f"{run} holds {saved[-1].name} of another run\n  Choose another folder.")
        return run
    there = torch.load(last, map_location="cpu", weights_only=True, mmap=True)["resume"]["updates"]
    if there != model.updates:
        raise CheckpointError(
            f"{run} holds a run that stands at update {there}, the model at {model.updates}\n"
            f"  Go on with it: create_world_model({str(run)!r}). Or choose another folder."
        )
    return run


def _run_id(run: Path) -> str | None:
    """The MLflow run of a folder that training goes on in."""
    record, last = run / "run.json", run / "checkpoints" / "last.ckpt"
    goes_on = record.exists() and last.exists()
    return json.loads(record.read_text()).get("mlflow", {}).get("run_id") if goes_on else None


def _config(model: WorldModelModule, total_steps: int) -> str:
    """What ``lit-wm`` reads of a run: the model; the data are in the script."""
    kind = type(model)
    init = {k: v for k, v in model.hparams.items() if k not in ("spaces", "seed") and not k.startswith("_")}
    named = {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": json.loads(json.dumps(init)),
    }
    told = {
        "seed_everything": model.seed,
        "model": named,
        "trainer": {"max_steps": model.updates + total_steps},
    }
    return yaml.safe_dump(told, sort_keys=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning says about intended things."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        for message in EXPECTED_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        for logger in loggers:
            logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
