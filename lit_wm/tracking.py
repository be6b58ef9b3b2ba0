"""Where a run is recorded: a CSV file that is always written, and MLflow through a logger that cannot hurt
training.

A tracking server may die, hang or lose its disk while training goes on. :class:`SafeMLFlowLogger` therefore
talks to MLflow from a thread of its own: logging only puts a call into a bounded queue, a call that fails is
tried again, and what cannot be delivered is counted and reported. Only the very start is strict: a store that
does not answer then is an error, since it is usually a typing mistake.
"""

from __future__ import annotations

import csv
import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from argparse import Namespace
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.loggers.logger import Logger, rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from lit_wm import __version__
from lit_wm.errors import LitWMError

DEFAULT_URI = "sqlite:///mlruns.db"


class TrackingError(LitWMError):
    """The tracking store did not answer when the run began."""


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; ``init_args`` is left out since the flags of the command line leave it out too."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = prefix if key == "init_args" else f"{prefix}{key}."
        flat |= flatten(value, name) if isinstance(value, Mapping) and value else {name[:-1]: value}
    return flat


def folder_name(name: str) -> str:
    """``atari:pong`` and ``ALE/Pong-v5`` as names of a directory."""
    return re.sub(r"[^\w.-]+", "-", name)


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only: tensors are read here, text is dropped."""
    return {k: float(v) for k, v in metrics.items() if not isinstance(v, str)}


def _reason(error: Exception) -> str:
    """One short line: the operating system's words where there are any."""
    system = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)|(timed out)", str(error))
    if system:
        return (system[1] or system[2]).strip()
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class CsvLogger(Logger):
    """One row per call of ``log_metrics`` in ``<directory>/metrics.csv``; the first column is the environment
    step.

    New metrics add columns. A resumed run goes on in the same file: rows beyond where it begins came from a
    stretch that was not saved, will be logged again, and are removed.

    Args:
        directory: the run directory; made when the first row is written.
    """

    def __init__(self, directory: str | Path):
        super().__init__()
        self.path = Path(directory) / "metrics.csv"
        self._columns: list[str] = []

    @property
    def name(self) -> str:
        """Name of this logger, not of the run."""
        return "csv"

    @property
    def version(self) -> str:
        """Name of the run directory."""
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        """The run directory; Lightning shows it as ``trainer.log_dir``."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the whole configuration in ``config.yaml``."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Append one row."""
        row: dict[str, float] = {"step": int(step or 0), **_plain(metrics)}
        if not row.keys() <= set(self._columns):
            self._add_columns(row)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _add_columns(self, row: dict[str, float]) -> None:
        """Write the file anew with the columns of ``row`` too; a reader never sees half a file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        old: list[dict[str, str]] = []
        if self.path.exists():
            with self.path.open(newline="") as file:
                old = list(csv.DictReader(file))
            if not self._columns:  # the first row of this process
                old = [earlier for earlier in old if _precedes(earlier, row)]
        self._columns = list(dict.fromkeys([*(old[0] if old else ()), *row]))
        fresh = self.path.with_suffix(".csv.tmp")
        with fresh.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(old)
        os.replace(fresh, self.path)


def _precedes(old: dict[str, str], row: dict[str, float]) -> bool:
    """Several updates can share one environment step, so their own counter decides if present."""
    if old.get("step/grad") and "step/grad" in row:
        return float(old["step/grad"]) < row["step/grad"]
    return int(old["step"]) <= row["step"]


# -- MLflow ------------------------------------------------------------------------------------------------

# What a store answers that has understood a call and refused it: trying again does not help.
REFUSALS = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED")
METRICS_PER_CALL, PARAMS_PER_CALL = 1000, 100  # MLflow's limits


class SafeMLFlowLogger(MLFlowLogger):
    """An MLflow logger that cannot kill or stall training.

    Args:
        experiment_name: MLflow experiment; the command line uses the environment id.
        run_name: name shown in the MLflow UI.
        tracking_uri: ``sqlite:///FILE`` or ``http://HOST:PORT``; None takes ``MLFLOW_TRACKING_URI`` and else
            ``sqlite:///mlruns.db``. Artifacts go to ``mlruns/<experiment>`` beside an SQLite file, and where
            a server decides.
        run_id: go on with this run.
        max_pending: calls kept while the store does not answer; the oldest are given up first.
        drain_s: seconds to wait at the end for what is still pending.

    Raises:
        TrackingError: at the start only, when the store does not answer.
    """

    def __init__(
        self,
        experiment_name: str,
        run_name: str | None = None,
        tracking_uri: str | None = None,
        run_id: str | None = None,
        max_pending: int = 10_000,
        drain_s: float = 10.0,
    ):
        # With MLflow's own defaults a dead server blocks one call for minutes (pytorch-lightning #12833).
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        # A new database reports each of some fifty migrations.
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        uri, artifacts = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI, None
        if uri.startswith("sqlite:///"):
            # MLflow keeps one connection per URI, so a relative path would mean its first working directory.
            file = Path(uri.removeprefix("sqlite:///")).resolve()
            uri, folder = f"sqlite:///{file}", file.parent / "mlruns" / folder_name(experiment_name)
            artifacts = folder.as_uri()
        self._store = uri
        try:
            with self._alone():
                super().__init__(experiment_name, run_name, uri, run_id=run_id, artifact_location=artifacts)
        except Exception as error:  # MLflow has no one class for an unknown scheme and a refused file store
            raise self._unreachable(error) from error
        self.tracking_uri, self.max_pending, self.drain_s = uri, max_pending, drain_s
        self.dropped = 0  # calls given up so far
        self._params: dict[str, str] = {}  # what the run has in the store
        self._pending: deque[tuple[str, dict[str, Any]]] = deque()  # method of the client, its arguments
        self._sending = 0  # pending calls that the worker is delivering as one
        self._closing = self._warned = False
        self._changed = threading.Condition()

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``MlflowClient``. Its calls wait and can raise: prefer the methods of this class in training.

        Lightning asks for it before a checkpoint is read, so it does not open a run yet.
        """
        return self._mlflow_client

    # -- the strict start ----------------------------------------------------------------------------------

    @rank_zero_only
    def start(self) -> None:
        """Open the run, or go on with ``run_id``. Called by the first log; a second call does nothing."""
        if self._initialized:
            return
        try:
            with self._alone():
                if self._run_id is None or not self._adopt(self._run_id):
                    self._create()
        except Exception as error:
            raise self._unreachable(error) from error
        self._initialized = True
        threading.Thread(target=self._work, name="mlflow", daemon=True).start()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other trainings off a database file: several starting at once would all create its tables."""
        if not self._store.startswith("sqlite:///"):
            yield
            return
        lock = Path(self._store.removeprefix("sqlite:///") + ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        with open(lock, "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
            yield

    def resume(self, run_id: str) -> None:
        """Go on with this run; of use before the first log only."""
        if not self._initialized:
            self._run_id = run_id

    def _adopt(self, run_id: str) -> bool:
        """Open this run again; False when the store does not have it."""
        from mlflow.exceptions import MlflowException

        try:
            run = self._mlflow_client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            warnings.warn(
                f"MLflow run {run_id} is not in {self.tracking_uri}; a new run begins.", stacklevel=2
            )
            self.tags = {"resumed_from": run_id}
            return False
        self._experiment_id, self._params = run.info.experiment_id, dict(run.data.params)
        self._mlflow_client.update_run(run_id, status="RUNNING")
        return True

    def _create(self) -> None:
        from mlflow.exceptions import MlflowException

        client, name = self._mlflow_client, self._experiment_name
        try:
            client.create_experiment(name, artifact_location=self._artifact_location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        found = client.get_experiment_by_name(name)
        assert found is not None
        if found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        self._experiment_id = found.experiment_id
        run = client.create_run(self._experiment_id, tags=self.tags, run_name=self._run_name)
        self._run_id = run.info.run_id

    def _unreachable(self, error: Exception) -> TrackingError:
        return TrackingError(
            f"the MLflow store {self._tracking_uri!r} does not answer: {_reason(error)}\n"
            "Start the server, correct --tracking.uri (or MLFLOW_TRACKING_URI), or train without MLflow: "
            "--trainer.logger false"
        )

    # -- what training calls: never raises, never waits ----------------------------------------------------

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Queue numbers; ``step`` is the environment step. Characters MLflow does not take become ``_``."""
        from mlflow.entities import Metric

        self.start()
        now, values = int(time.time() * 1000), _plain(metrics).items()
        rows = [Metric(re.sub(r"[^\w/. :-]", "_", k), v, now, int(step or 0)) for k, v in values]
        self._queue("log_batch", metrics=rows)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace) -> None:
        """Queue parameters. MLflow forbids changing one: in a resumed run a changed value becomes a tag."""
        from mlflow.entities import Param

        self.start()
        tree = vars(params) if isinstance(params, Namespace) else params
        given = {k: str(v)[:500] for k, v in flatten(tree).items() if not k.startswith("_")}
        fresh = [Param(k, v) for k, v in given.items() if k not in self._params]
        for i in range(0, len(fresh), PARAMS_PER_CALL):
            self._queue("log_batch", params=fresh[i : i + PARAMS_PER_CALL])
        self._params = given | self._params
        if changed := {f"resumed_with.{k}": v for k, v in given.items() if self._params[k] != v}:
            self.set_tags(changed)

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Queue the upload of a file, read when its turn comes."""
        self._queue("log_artifact", local_path=str(path), artifact_path=folder)

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Queue tags of the run."""
        from mlflow.entities import RunTag

        self._queue("log_batch", tags=[RunTag(k, str(v)[:5000]) for k, v in tags.items()])

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Mark the run as finished or failed and wait at most ``drain_s`` for what is pending."""
        if not self._initialized:
            return
        self._queue("set_terminated", status="FAILED" if status == "failed" else "FINISHED")
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._pending and not self._sending, timeout=self.drain_s)
            self.dropped += len(self._pending) + self._sending
            self._pending.clear()
            self._sending, self._closing = 0, False
        if self.dropped:
            self._warn(f"{self.dropped} calls did not reach MLflow at {self.tracking_uri}")

    # -- the worker ----------------------------------------------------------------------------------------

    def _queue(self, method: str, **arguments: Any) -> None:
        with self._changed:
            if len(self._pending) >= self.max_pending:
                self._pending.popleft()
                self.dropped += 1
            self._pending.append((method, arguments))
            self._changed.notify_all()

    def _take(self) -> tuple[str, dict[str, Any]]:
        """The next call; neighbouring metrics go out as one."""
        method, arguments = self._pending.popleft()
        self._sending = 1
        rows = arguments.get("metrics")
        while rows is not None and self._pending:
            more = self._pending[0][1].get("metrics")
            if more is None or len(rows) + len(more) > METRICS_PER_CALL:
                break
            rows += more
            self._pending.popleft()
            self._sending += 1
        return method, arguments

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._pending))
                method, arguments = self._take()
            delay = 1.0
            while self._sending and not self._send(method, arguments):
                with self._changed:
                    # New work does not shorten the pause, the end of the run does.
                    if self._changed.wait_for(lambda: self._closing, timeout=delay):
                        self._changed.wait(timeout=0.5)
                delay = min(2 * delay, 60.0)
            with self._changed:
                self._sending = 0
                self._changed.notify_all()

    def _send(self, method: str, arguments: dict[str, Any]) -> bool:
        """Whether the call is done with: delivered or refused."""
        try:
            getattr(self._mlflow_client, method)(self._run_id, **arguments)
            return True
        except Exception as error:  # the promise of this class: nothing leaves the thread
            refused = getattr(error, "error_code", None) in REFUSALS or isinstance(error, FileNotFoundError)
            if refused:
                with self._changed:
                    self.dropped += self._sending
            if not self._warned:
                self._warned = True
                fate = "this is given up" if refused else "this will be sent when it answers again"
                what = f"MLflow at {self.tracking_uri} did not take {method}: {_reason(error)}"
                self._warn(f"{what}. Training goes on, {fate}")
            return refused

    @staticmethod
    def _warn(message: str) -> None:
        print(f"warning: {message}; metrics.csv in the run directory has every number", file=sys.stderr)


# -- the record of a run -----------------------------------------------------------------------------------

PACKAGES = ["torch", "lightning", "torchrl", "tensordict", "numpy", "pillow"]
PACKAGES += ["gymnasium", "minari", "ale-py", "mujoco", "dm-control", "crafter", "minigrid", "mlflow"]


def versions() -> dict[str, str]:
    """Versions of this package, Python and what it stands on."""
    found = {"lit-wm": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):  # an extra
            found[package] = metadata.version(package)
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None when this code is not in a git checkout."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).resolve().parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "tracking.py")  # fails inside somebody else's repository
        return {
            "commit": git("rev-parse", "HEAD"),
            "changed": git("status", "--porcelain", "-uno").splitlines(),
        }
    except (OSError, subprocess.SubprocessError):
        return None


class RunRecord(Callback):
    """Saves what made a run (configuration, versions, git state) and keeps its MLflow run through a resume.

    Args:
        directory: the run directory; gets ``config.yaml`` and ``run.json``.
        config: the full resolved configuration as YAML.
        logger: the MLflow logger, or None.
        same_run: whether a checkpoint's run is continued (True) or a new one begins from its weights.
    """

    def __init__(
        self,
        directory: str | Path,
        config: str,
        logger: SafeMLFlowLogger | None = None,
        same_run: bool = True,
    ):
        self.directory, self.config, self.logger, self.same_run = Path(directory), config, logger, same_run
        self._written = False

    def state_dict(self) -> dict[str, Any]:
        """The MLflow run, so that a resumed training goes on in it."""
        return {"mlflow_run_id": self.logger.run_id if self.logger else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before anything is logged."""
        if self.logger is not None and self.same_run and (run_id := state_dict.get("mlflow_run_id")):
            self.logger.resume(run_id)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files of a new run."""
        self._written = not trainer.is_global_zero
        if self._written:
            return
        if self.logger is not None:
            self.logger.start()  # a store that does not answer ends this before there is a run
        if not (self.directory / "config.yaml").exists():
            self._write(trainer)

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        """Write those of a run that goes on: now all of its checkpoint has been read, its replay too."""
        if not self._written:
            self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        self._written = True
        self.directory.mkdir(parents=True, exist_ok=True)
        config, record = self.directory / "config.yaml", self.directory / "run.json"
        config.write_text(self.config)
        git = git_state()
        made_by: dict[str, Any] = {"versions": versions(), "git": git, "command": sys.argv}
        made_by["processes"] = trainer.world_size
        if self.logger is not None:
            made_by["mlflow"] = {"run_id": self.logger.run_id, "uri": self.logger.tracking_uri}
        record.write_text(json.dumps(made_by, indent=2) + "\n")
        if self.logger is not None:
            commit, changed = (git["commit"], bool(git["changed"])) if git else ("", False)
            tags = {"run_dir": self.directory, "lit_wm_version": __version__}
            self.logger.set_tags({**tags, "git_commit": commit, "git_changed": changed})
            self.logger.log_artifact(config)
            self.logger.log_artifact(record)
