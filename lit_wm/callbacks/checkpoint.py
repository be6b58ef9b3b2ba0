"""Checkpoints from which training goes on bit for bit.

A run directory holds::

    checkpoints/
        last.ckpt                       Lightning's file: weights, optimizers, counters; names its folder
        resume-000012000-9f3c/          what Lightning's file cannot hold, one part per process
            manifest.json
            rank0.pt                    noise streams, random numbers of torch, numpy and Python, collector,
                                        environments
            replay0/                    the replay
        best.ckpt                       best ``eval/return``, or other ``monitor``; no replay
        updates-000010000.ckpt          periodic; no replay

The folder is written first, then the file that names it, then older folders are deleted. Each step is
complete or not there at all, so a kill at any moment leaves a last.ckpt and the folder it names.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_wm.callbacks.evaluate import Interrupts, data_of
from lit_wm.errors import CheckpointError, ConfigError, Interrupted, nearest

# Updates between two looks of several processes at clock and signals: each costs a collective.
AGREE_EVERY = 10


class ResumableCheckpoint(ModelCheckpoint):
    """Save ``last`` (with the replay), ``best`` and periodic checkpoints; go on from ``last`` exactly.

    Uses of the data module: ``rank_state_dict``, ``load_rank_state_dict``, ``snapshot_replay(dir)`` and
    ``restore_replay(dir)``; of the module: ``updates``, ``rank_state_dict`` and ``load_rank_state_dict``.
    Everything is saved between two updates. Ctrl-C and SIGTERM let the running update end, save ``last`` and
    stop; Ctrl-C after that stops at once.

    Args:
        dirpath: folder of the checkpoints; None is ``checkpoints`` in the run directory.
        monitor: metric that decides what is best: ``eval/return``, ``val/...`` of held-out episodes, or one
            that the module itself logs.
        mode: whether the best is the ``"max"`` or the ``"min"`` of it.
        every_n_minutes: save ``last`` when the newest one is this old; 0 never does. ``last`` is also saved
            at the end. A save copies the replay and deletes the former copy only afterwards, so that for a
            moment it is on the disk three times: in use, in the former copy and in the new one.
        every_n_updates: save ``last`` every so many updates; None leaves it to the clock.
        keep_every_n_updates: keep a checkpoint every so many updates; None keeps none.
    """

    def __init__(
        self,
        dirpath: str | None = None,
        monitor: str = "eval/return",
        mode: str = "max",
        every_n_minutes: float = 30.0,
        every_n_updates: int | None = None,
        keep_every_n_updates: int | None = None,
    ):
        for name in ("every_n_updates", "keep_every_n_updates"):
            if (value := locals()[name]) is not None and value < 1:
                raise ConfigError(f"checkpoint.{name} is {value}; expected at least 1, or null for never")
        if mode not in ("max", "min"):
            raise ConfigError(f"checkpoint.mode is {mode!r}; expected 'max' or 'min'")
        super().__init__(dirpath=dirpath, filename="best", monitor=monitor, mode=mode, save_last=True)
        self.every_n_minutes, self.every_n_updates = every_n_minutes, every_n_updates
        self.keep_every_n_updates = keep_every_n_updates
        self._folder: str | None = None  # named by the file being written
        self._pending: Path | None = None  # folder to restore before the first batch
        self._saved_at = -1  # updates of the newest last.ckpt
        self._saved_when = time.monotonic()
        self._signals = Interrupts()
        self._alone, self._agreed, self._dry = True, False, False

    @property
    def state_key(self) -> str:
        """One name whatever the arguments, so that changing a cadence does not lose the state."""
        return "ResumableCheckpoint"

    @property
    def stopping(self) -> bool:
        """Whether a signal ends this training; of several processes, once all of them know."""
        return self._agreed or (self._alone and self._signals.number is not None)

    def interrupted(self) -> Interrupted:
        """What to leave with when :attr:`stopping` has ended the training; its checkpoint is there."""
        number = self._signals.number or signal.SIGTERM  # None: another process has heard it
        return Interrupted(f"{signal.Signals(number).name}: the training was stopped before its end", number)

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        assert self.dirpath is not None
        return Path(self.dirpath)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Fix the folder: the run directory's, whatever the loggers think."""
        if self.dirpath is None:
            self.dirpath = os.path.join(trainer.default_root_dir, "checkpoints")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
            super().setup(trainer, pl_module, stage)
        self._alone = trainer.world_size == 1
        self._dry = bool(trainer.fast_dev_run)  # type: ignore[attr-defined]
        if trainer.is_global_zero and stage == "fit":
            self.folder.mkdir(parents=True, exist_ok=True)

    # --- When --------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Restore a checkpoint's folder, at the last moment before the first batch, as set-up draws too."""
        if self._pending is not None:
            self._restore(trainer, pl_module, self._pending)
            self._pending = None
        self._saved_at, self._saved_when = int(pl_module.updates), time.monotonic()
        self._signals, self._agreed = Interrupts("saving after this update"), False
        self._signals.__enter__()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save what is due."""
        updates = int(pl_module.updates)
        stop, late = self._agree(trainer, updates)
        if self.keep_every_n_updates and updates % self.keep_every_n_updates == 0:
            self._write(trainer, self.folder / f"updates-{updates:09d}.ckpt")
        if stop or late or (self.every_n_updates and updates % self.every_n_updates == 0):
            self.save_last_now(trainer, pl_module)
        if stop:
            self._agreed = trainer.should_stop = True

    def _agree(self, trainer: pl.Trainer, updates: int) -> tuple[bool, bool]:
        """Whether to stop, and whether the newest checkpoint is too old; equal in all processes."""
        age = time.monotonic() - self._saved_when
        late = bool(self.every_n_minutes) and age > 60 * self.every_n_minutes
        stop = self._signals.number is not None
        if trainer.world_size == 1:
            return stop, late
        if updates % AGREE_EVERY:
            return False, False
        reduce = trainer.strategy.reduce_boolean_decision
        return reduce(stop, all=False), reduce(late, all=False)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save ``best``."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or self.monitor is None:
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is None and self.monitor != "eval/return" and not self.stopping:
            known = [name for name in trainer.callback_metrics if name.startswith(("eval/", "val/"))]
            close = nearest(self.monitor, known) or f"; there is {', '.join(known[:6]) or 'nothing'}"
            rank_zero_warn(f"no best.ckpt: checkpoint.monitor {self.monitor!r} is not measured here{close}")
        if score is None or bool(score.isnan()):
            return
        better = {"max": torch.gt, "min": torch.lt}[self.mode]
        if self.best_model_score is not None and not better(score.cpu(), self.best_model_score.cpu()):
            return
        self.best_model_score = self.current_score = score.detach().cpu()
        self.best_model_path = str(self.folder / "best.ckpt")
        self._write(trainer, Path(self.best_model_path))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Nothing: online training has no epochs."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Save ``last``."""
        if int(pl_module.updates) != self._saved_at:
            self.save_last_now(trainer, pl_module)
        if self.stopping and trainer.is_global_zero and not self._dry:
            print(f"stopped after update {self._saved_at:,}; go on with --ckpt_path {self.last_model_path}")
        self._signals.__exit__()

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save ``last`` if an evaluation has failed, or collecting was interrupted; elsewhere it may be
        between two optimizers' steps.

        Several processes save nothing: the others wait for what the failed one would have said.
        """
        failed = isinstance(exception, Exception) and trainer.validating
        failed = failed and int(pl_module.updates) != self._saved_at
        stopped = isinstance(exception, Interrupted)
        if trainer.state.fn == TrainerFn.FITTING and self._alone and (failed or stopped):
            self.save_last_now(trainer, pl_module)
            if self._saved_at == int(pl_module.updates):
                print(f"saved after update {self._saved_at:,}; go on with --ckpt_path {self.last_model_path}")
        self._signals.__exit__()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Give the signal handlers back."""
        self._signals.__exit__()

    # --- Saving ------------------------------------------------------------------------------------

    def break_off(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """End the training in an evaluation: save before another update, unless that was done before it."""
        trainer.should_stop = True
        if int(pl_module.updates) != self._saved_at:
            self.save_last_now(trainer, pl_module)

    def save_last_now(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Write the folder, then ``last.ckpt`` that names it, then delete older folders.

        If any process cannot write its part, e.g. for lack of disk, the former pair stays and training goes
        on.
        """
        if self._dry:
            return
        updates = int(pl_module.updates)
        token = trainer.strategy.broadcast(os.urandom(4).hex())
        name = f"resume-{updates:09d}-{token}"
        problem = self._write_folder(trainer, pl_module, name)
        self._saved_when = time.monotonic()
        written = False
        if trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            self._folder = name
            try:
                written = self._write(trainer, self.folder / "last.ckpt")
            finally:
                self._folder = None
        else:
            rank_zero_warn(f"checkpoint: {problem or 'another process failed'}; last.ckpt stays as it was")
        if written:
            self._saved_at, self.last_model_path = updates, str(self.folder / "last.ckpt")
        if trainer.is_global_zero:
            if not written:
                shutil.rmtree(self.folder / name, ignore_errors=True)
            self._clean(name if written else None)

    def _write_folder(self, trainer: pl.Trainer, pl_module: Any, name: str) -> str | None:
        """Write ``resume-...`` whole; what went wrong in this process, or None."""
        part, rank = self.folder / f".{name}", trainer.global_rank
        if trainer.is_global_zero:
            part.mkdir()
        trainer.strategy.barrier("resume folder made")
        problem = None
        try:
            self._write_rank(trainer, pl_module, part, rank)
        except OSError as error:
            problem = f"process {rank} could not save its replay: {error}"
        # Everyone has written, or no one goes on.
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            return problem
        if trainer.is_global_zero:
            files = {path.name: _fingerprint(path) for path in sorted(part.glob("*.pt"))}
            manifest = {"name": name, "updates": int(pl_module.updates), "world_size": trainer.world_size}
            _write_file(part / "manifest.json", json.dumps({**manifest, "files": files}, indent=1).encode())
            _sync(part)
            os.rename(part, self.folder / name)
            _sync(self.folder)
        trainer.strategy.barrier("resume folder complete")
        return None

    def _write_rank(self, trainer: pl.Trainer, pl_module: Any, folder: Path, rank: int) -> None:
        data = data_of(trainer)
        state = {
            "rank": rank,
            "module": pl_module.rank_state_dict(),
            "data": data.rank_state_dict(),
            "random": random_state(),
        }
        with open(folder / f"rank{rank}.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        data.snapshot_replay(folder / f"replay{rank}")

    def _write(self, trainer: pl.Trainer, path: Path) -> bool:
        """Write Lightning's checkpoint in one step, or leave the former one; all processes call this.

        Returns:
            Whether it was written; if not, e.g. for lack of disk, a warning has said why.
        """
        if self._dry:
            return False
        part, problem = path.with_name(f".{path.name}"), None
        try:
            trainer.save_checkpoint(part, weights_only=False)
        except OSError as error:  # only the first process writes
            problem = error
            trainer.strategy.barrier("Trainer.save_checkpoint")  # where the others wait for it
        if trainer.is_global_zero and problem is None:
            try:
                with open(part, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(part, path)
            except OSError as error:
                problem = error
        if not trainer.strategy.reduce_boolean_decision(problem is None, all=True):
            rank_zero_warn(f"checkpoint: {path.name} could not be written: {problem}; it stays as it was")
            if trainer.is_global_zero:
                part.unlink(missing_ok=True)
            return False
        if trainer.is_global_zero:
            _sync(path.parent)
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
        return True

    def _clean(self, keep: str | None) -> None:
        """Delete unfinished parts and, once ``keep`` is named by last.ckpt, the folders before it."""
        for path in self.folder.iterdir():
            outdated = keep is not None and path.name.startswith("resume-") and path.name != keep
            if outdated or path.name.startswith((".resume-", ".last.ckpt", ".best.ckpt", ".updates-")):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Name the folder that belongs to the file."""
        checkpoint["resume"] = {
            "folder": self._folder,
            "updates": int(pl_module.updates),
            "world_size": trainer.world_size,
        }

    def state_dict(self) -> dict[str, Any]:
        """What is best so far: file name and score, plain values only."""
        score = None if self.best_model_score is None else float(self.best_model_score)
        return {"best": Path(self.best_model_path).name, "best_score": score, "monitor": self.monitor}

    # --- Loading -----------------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing: :meth:`on_load_checkpoint` does it, which knows where the file is."""

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Find and check the folder of the file. Raises CheckpointError before anything is trained."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        path = Path(str(trainer.ckpt_path))
        state = checkpoint.get("callbacks", {}).get(self.state_key, {})
        best = path.parent / state.get("best", "")
        same_place = path.parent.resolve() == self.folder.resolve()
        if same_place and state.get("monitor") == self.monitor and best.is_file():
            self.best_model_path = str(self.folder / best.name)
            self.best_model_score = torch.tensor(float(state["best_score"]))
        if same_place and path.name == "last.ckpt":
            self.last_model_path = str(path)
        named = checkpoint.get("resume")
        if named is None:
            raise CheckpointError(
                f"{path} was not written by this program's checkpoint callback; fit cannot go on from it"
            )
        if named["folder"] is None:
            rank_zero_warn(
                f"{path.name} carries no replay: weights, optimizers and counters go on, the replay starts "
                "empty. Only last.ckpt goes on exactly."
            )
            return
        self._pending = self._check(path, named, trainer.world_size)

    @staticmethod
    def _check(path: Path, named: dict[str, Any], world_size: int) -> Path:
        """The folder of the checkpoint ``path``, which exists, is whole, and belongs to it."""
        folder = path.parent / named["folder"]
        advice = "Copy the whole checkpoints folder, or go on from best.ckpt, which needs no replay"
        if named["world_size"] != world_size:
            raise CheckpointError(
                f"{path} was saved by {named['world_size']} processes, each with its own replay; "
                f"this run has {world_size}\n"
                f"Use --trainer.devices {named['world_size']}, or best.ckpt, which needs no replay"
            )
        if not folder.is_dir():
            raise CheckpointError(
                f"{path} needs the folder '{folder}' with its replay, which is not there\n{advice}"
            )
        try:
            manifest = json.loads((folder / "manifest.json").read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{folder}/manifest.json cannot be read: {error}\n{advice}") from error
        if manifest.get("name") != named["folder"] or manifest.get("updates") != named["updates"]:
            raise CheckpointError(
                f"'{folder}' belongs to another checkpoint: it was saved as {manifest.get('name')} at update "
                f"{manifest.get('updates')}, {path.name} is at update {named['updates']}\n{advice}"
            )
        for rank in range(world_size):
            file = folder / f"rank{rank}.pt"
            if not file.is_file() or _fingerprint(file) != manifest["files"].get(file.name):
                raise CheckpointError(f"{file} is {'damaged' if file.exists() else 'missing'}\n{advice}")
            if not (folder / f"replay{rank}").is_dir():
                raise CheckpointError(f"'{folder}/replay{rank}' is missing\n{advice}")
        return folder

    def _restore(self, trainer: pl.Trainer, pl_module: Any, folder: Path) -> None:
        rank, data = trainer.global_rank, data_of(trainer)
        state = torch.load(folder / f"rank{rank}.pt", map_location="cpu", weights_only=True)
        data.restore_replay(folder / f"replay{rank}")
        data.load_rank_state_dict(state["data"])
        pl_module.load_rank_state_dict(state["module"])
        set_random_state(state["random"])
        trainer.strategy.barrier("resumed")


def random_state() -> dict[str, Any]:
    """State of the global random numbers of torch, CUDA, numpy and Python; tensors and plain values only."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    version, words, spare = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        # Of this process's GPU: to ask for all of them would open each in every process.
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [
            name,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(gauss),
        ],
        "python": [version, list(words), spare],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Inverse of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
    version, words, spare = state["python"]
    random.setstate((version, tuple(words), spare))


def _fingerprint(path: Path) -> list[int]:
    """Size and CRC-32 of a file."""
    crc, size = 0, 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            crc, size = zlib.crc32(block, crc), size + len(block)
    return [size, crc]


def _write_file(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    """Make a rename in ``folder`` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
