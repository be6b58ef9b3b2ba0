"""Where a run is recorded: a CSV file that is always written, and MLflow through a logger that cannot hurt
training.

A tracking server may die, hang or lose its disk while training goes on. :class:`SafeMLFlowLogger` therefore
talks to MLflow from a thread of its own: a call only puts work into a bounded queue, failed work is tried
again later, and what cannot be delivered is counted and reported. Only the very start is strict: a store that
does not answer then is an error, since it is usually a typing mistake.
"""

from __future__ import annotations

import csv
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
from collections.abc import Callable, Mapping
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


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Numbers only: tensors are read here, text is dropped."""
    return {k: float(v) for k, v in metrics.items() if not isinstance(v, str)}


def _reason(error: Exception) -> str:
    """One short line: the operating system's words where there are any."""
    text = str(error).strip()
    system = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text) or re.search(r"(timed out)", text)
    if system:
        return system.group(1).strip()
    return text.splitlines()[0][:200] if text else type(error).__name__


def _flat(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


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
        self._columns: list[str] | None = None

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
        at = int(step or 0)
        row: dict[str, float] = {"step": at, **_plain(metrics)}
        if self._columns is None:
            self._open(row)
        assert self._columns is not None
        new = [key for key in row if key not in self._columns]
        if new:
            self._columns += new
            self._rewrite(lambda old: True)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns, restval="").writerow(row)

    def _open(self, first: dict[str, float]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._columns = ["step"]
        if self.path.exists():
            with self.path.open(newline="") as file:
                self._columns = next(csv.reader(file), None) or ["step"]

        def before(old: dict[str, str]) -> bool:
            """Several updates can share one environment step, so their own counter decides if present."""
            if old.get("step/grad") and "step/grad" in first:
                return float(old["step/grad"]) < first["step/grad"]
            return bool(old["step"]) and int(old["step"]) <= first["step"]

        self._rewrite(before)

    def _rewrite(self, keep: Callable[[dict[str, str]], bool]) -> None:
        """Write the file anew with all columns and the rows to keep; a reader never sees half a file."""
        assert self._columns is not None
        fresh = self.path.with_suffix(".csv.tmp")
        with fresh.open("w", newline="") as target:
            writer = csv.DictWriter(target, self._columns, restval="", extrasaction="ignore")
            writer.writeheader()
            if self.path.exists():
                with self.path.open(newline="") as source:
                    writer.writerows(row for row in csv.DictReader(source) if keep(row))
        os.replace(fresh, self.path)


class SafeMLFlowLogger(MLFlowLogger):
    """An MLflow logger that cannot kill or stall training.

    Args:
        experiment_name: MLflow experiment; the command line uses the environment id.
        run_name: name shown in the MLflow UI.
        tracking_uri: ``sqlite:///FILE`` or ``http://HOST:PORT``; None takes ``MLFLOW_TRACKING_URI`` and else
            ``sqlite:///mlruns.db``.
        artifact_location: folder or URI of a new experiment's artifacts. None: ``mlruns/<experiment>`` beside
            an SQLite file; the server's choice for a server.
        tags: tags of the run.
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
        artifact_location: str | None = None,
        tags: dict[str, Any] | None = None,
        run_id: str | None = None,
        max_pending: int = 10_000,
        drain_s: float = 10.0,
    ):
        # With MLflow's own defaults a dead server blocks one call for minutes (lightning issue 12833).
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        uri = tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or DEFAULT_URI
        if uri.startswith("sqlite:///"):
            # MLflow keeps one connection per URI, so a relative path would mean its first working directory.
            file = Path(uri.removeprefix("sqlite:///")).resolve()
            uri, folder = f"sqlite:///{file}", file.parent / "mlruns"
            artifact_location = (
                artifact_location or (folder / re.sub(r"[^\w.-]+", "-", experiment_name)).as_uri()
            )
        # A new database reports each of some fifty migrations.
        for noisy in ("alembic", "mlflow.store.db.utils"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            super().__init__(
                experiment_name=experiment_name,
                run_name=run_name,
                tracking_uri=uri,
                tags=tags,
                artifact_location=artifact_location,
                run_id=run_id,
            )
        except (
            Exception
        ) as error:  # an unknown scheme, a refused file store: MLflow has no common base class for these
            raise self._unreachable(uri, error) from error
        self.dropped = 0
        self.max_pending, self.drain_s = max_pending, drain_s
        self._answers = False
        self._pending: deque[tuple[str, Any]] = deque()
        self._wake = threading.Condition()
        self._busy = False
        self._closing = False
        self._thread: threading.Thread | None = None
        self._warned = False
        self._known_params: dict[str, str] | None = None

    # -- the strict start ----------------------------------------------------------------------------------

    @staticmethod
    def _unreachable(uri: str, error: Exception) -> TrackingError:
        return TrackingError(
            f"the MLflow store {uri!r} does not answer: {_reason(error)}\n"
            "Start the server, correct --tracking.uri (or MLFLOW_TRACKING_URI), or train without MLflow: "
            "--trainer.logger false"
        )

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The ``MlflowClient``. The first use checks that the store answers; it does not open a run yet.

        Calls on the client are synchronous and can raise; prefer :meth:`log_artifact` and :meth:`set_tags` in
        training.
        """
        if not self._answers:
            try:
                self._mlflow_client.search_experiments(max_results=1)
            except Exception as error:
                raise self._unreachable(str(self._tracking_uri), error) from error
            self._answers = True
        return self._mlflow_client

    @rank_zero_only
    def start(self) -> None:
        """Open the run, or go on with ``run_id``. Called by the first log; a second call does nothing."""
        if self._initialized:
            return
        client = self.experiment
        try:
            if self._run_id is not None and not self._adopt(client, self._run_id):
                self._run_id = None
            if self._run_id is None:
                self._create(client)
        except Exception as error:
            raise self._unreachable(str(self._tracking_uri), error) from error
        self._initialized = True
        self._ensure_worker()

    def _adopt(self, client: Any, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            warnings.warn(
                f"MLflow run {run_id} of the checkpoint is not in {self._tracking_uri}; a new run begins.",
                stacklevel=2,
            )
            self.tags = {**(self.tags or {}), "resumed_from": run_id}
            return False
        self._experiment_id = run.info.experiment_id
        self._known_params = dict(run.data.params)
        client.update_run(run_id, status="RUNNING")
        return True

    def _create(self, client: Any) -> None:
        from mlflow.exceptions import MlflowException

        found = client.get_experiment_by_name(self._experiment_name)
        if found is not None and found.lifecycle_stage == "deleted":
            client.restore_experiment(found.experiment_id)
        if found is None:
            try:
                self._experiment_id = client.create_experiment(
                    self._experiment_name, artifact_location=self._artifact_location
                )
            except MlflowException:  # another run has just created it
                found = client.get_experiment_by_name(self._experiment_name)
                if found is None:
                    raise
        if found is not None:
            self._experiment_id = found.experiment_id
        tags = {k: str(v) for k, v in (self.tags or {}).items()}
        self._run_id = client.create_run(self._experiment_id, tags=tags, run_name=self._run_name).info.run_id
        self._known_params = {}

    def resume(self, run_id: str) -> None:
        """Go on with this run; of use before the first log only."""
        if not self._initialized:
            self._run_id = run_id

    @property
    def run_id(self) -> str | None:
        """Identifier of the run, once it is open; None before and on other processes than the first."""
        return self._run_id

    @property
    def experiment_id(self) -> str | None:
        """Identifier of the experiment, once the run is open."""
        return self._experiment_id

    @property
    def tracking_uri(self) -> str:
        """Where the run is stored."""
        return str(self._tracking_uri)

    @property
    def name(self) -> str:
        """Name of the experiment; asks no server."""
        return str(self._experiment_name)

    @property
    def version(self) -> str:
        """Name of the run; asks no server."""
        return str(self._run_name)

    @property
    def save_dir(self) -> None:
        """None: this logger has no folder of its own."""
        return None

    # -- what training calls: never raises, never waits ----------------------------------------------------

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Queue numbers; ``step`` is the environment step. Characters MLflow does not take become ``_``."""
        self.start()
        values = {re.sub(r"[^\w/. :-]", "_", k): v for k, v in _plain(metrics).items()}
        self._put("metrics", (values, int(step or 0), int(time.time() * 1000)))

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Queue parameters. MLflow forbids changing one: in a resumed run a changed value becomes a tag."""
        self.start()
        plain = vars(params) if isinstance(params, Namespace) else dict(params or {})
        self._put("params", {k: str(v)[:500] for k, v in _flat(plain).items() if k[:1] != "_"})

    @rank_zero_only
    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Queue the upload of a file, read when its turn comes."""
        self._put("artifact", (str(path), folder))

    @rank_zero_only
    def set_tags(self, tags: Mapping[str, Any]) -> None:
        """Queue tags of the run."""
        self._put("tags", {k: str(v)[:5000] for k, v in tags.items()})

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        """Nothing: checkpoints stay in the run directory (tag ``run_dir``); a replay can be 100 GB."""

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """Mark the run as finished or failed and wait at most ``drain_s`` for what is pending."""
        if not self._initialized:
            return
        self._put("status", {"success": "FINISHED", "finished": "FINISHED"}.get(status, "FAILED"))
        with self._wake:
            self._closing = True
            self._wake.notify_all()
            self._wake.wait_for(lambda: not self._pending and not self._busy, timeout=self.drain_s)
            self._closing = False
            lost = self.dropped + len(self._pending)
        if lost:
            self.dropped, self._pending = lost, deque()
            print(
                f"warning: {lost} calls did not reach MLflow at {self._tracking_uri}; metrics.csv in the run "
                "directory has every number",
                file=sys.stderr,
            )

    # -- the worker ----------------------------------------------------------------------------------------

    def _put(self, kind: str, work: Any) -> None:
        with self._wake:
            if len(self._pending) >= self.max_pending:
                self._pending.popleft()
                self.dropped += 1
            self._pending.append((kind, work))
            self._wake.notify_all()
        if self._initialized:
            self._ensure_worker()

    def _ensure_worker(self) -> None:
        if self._thread is None or not self._thread.is_alive():  # a forked child starts its own
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def _take(self) -> tuple[str, list[Any]]:
        """The next piece of work; neighbouring metrics go out in one request."""
        kind, work = self._pending.popleft()
        taken = [work]
        while kind == "metrics" and self._pending and self._pending[0][0] == "metrics" and len(taken) < 50:
            taken.append(self._pending.popleft()[1])
        return kind, taken

    def _work(self) -> None:
        delay = 1.0
        while True:
            with self._wake:
                self._wake.wait_for(lambda: bool(self._pending))
                kind, taken = self._take()
                self._busy = True
            again = False
            try:
                self._send(kind, taken)
                delay = 1.0
            except Exception as error:  # the promise of this class: nothing leaves the thread
                again = self._is_temporary(error)
                self._report(kind, error, again)
            with self._wake:
                self._busy = False
                if not again:
                    self._wake.notify_all()
                    continue
                self._pending.extendleft((kind, work) for work in reversed(taken))
                while len(self._pending) > self.max_pending:
                    self._pending.popleft()
                    self.dropped += 1
                # New work does not shorten the pause, the end of the run does.
                self._wake.wait_for(lambda: self._closing, timeout=delay)
                if self._closing:
                    delay = 1.0
                    self._wake.wait(timeout=0.5)
                else:
                    delay = min(2 * delay, 60.0)

    @staticmethod
    def _is_temporary(error: Exception) -> bool:
        """Whether trying again can help: not when the store has understood the request and refused it."""
        refused = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST", "PERMISSION_DENIED")
        return getattr(error, "error_code", None) not in refused and not isinstance(error, FileNotFoundError)

    def _report(self, kind: str, error: Exception, again: bool) -> None:
        if not again:
            self.dropped += 1
        if self._warned:
            return
        self._warned = True
        what = "will be sent when it answers again" if again else "are given up"
        print(
            f"warning: MLflow at {self._tracking_uri} did not take {kind}: {_reason(error)}. "
            f"Training goes on, they {what}; metrics.csv in the run directory has every number.",
            file=sys.stderr,
        )

    def _send(self, kind: str, taken: list[Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        client, run_id = self._mlflow_client, str(self._run_id)
        if kind == "metrics":
            rows = [
                Metric(key, value, at, step) for values, step, at in taken for key, value in values.items()
            ]
            for i in range(0, len(rows), 1000):
                client.log_batch(run_id, metrics=rows[i : i + 1000])
            return
        (work,) = taken
        if kind == "params":
            known = self._known_params or {}
            changed = {k: v for k, v in work.items() if k in known and known[k] != v}
            fresh = [Param(k, v) for k, v in work.items() if k not in known]
            for i in range(0, len(fresh), 100):
                client.log_batch(run_id, params=fresh[i : i + 100])
            if changed:
                client.log_batch(run_id, tags=[RunTag(f"resumed_with.{k}", v) for k, v in changed.items()])
            self._known_params = {**work, **known}
        elif kind == "artifact":
            client.log_artifact(run_id, work[0], work[1])
        elif kind == "tags":
            client.log_batch(run_id, tags=[RunTag(k, v) for k, v in work.items()])
        elif kind == "status":
            client.set_terminated(run_id, status=work)


# -- the record of a run -----------------------------------------------------------------------------------

PACKAGES = (
    "torch",
    "lightning",
    "torchrl",
    "tensordict",
    "gymnasium",
    "minari",
    "ale-py",
    "mlflow",
    "numpy",
    "pillow",
)


def versions() -> dict[str, str]:
    """Versions of this package, Python and what it stands on."""
    found = {"lit-wm": __version__, "python": sys.version.split()[0]}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None when this code is not in a git checkout."""

    def git(*args: str) -> str:
        root = Path(__file__).resolve().parent.parent
        return subprocess.run(
            ["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        if not git("ls-files", "lit_wm/tracking.py"):
            return None  # installed inside somebody else's repository
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

    def state_dict(self) -> dict[str, Any]:
        """The MLflow run, so that a resumed training goes on in it."""
        return {"mlflow_run_id": self.logger.run_id if self.logger else None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Lightning calls this before anything is logged."""
        run_id = state_dict.get("mlflow_run_id")
        if self.logger is not None and self.same_run and run_id:
            self.logger.resume(run_id)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the files once the checkpoint, if any, has been read."""
        if not trainer.is_global_zero:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        config, record = self.directory / "config.yaml", self.directory / "run.json"
        config.write_text(self.config)
        git = git_state() or {}
        known: dict[str, Any] = {"versions": versions(), "git": git or None, "command": sys.argv}
        known["processes"] = trainer.world_size
        if self.logger is not None:
            self.logger.start()
            known["mlflow"] = {"run_id": self.logger.run_id, "uri": self.logger.tracking_uri}
        record.write_text(json.dumps(known, indent=2) + "\n")
        if self.logger is not None:
            self.logger.set_tags(
                {
                    "run_dir": str(self.directory),
                    "lit_wm_version": __version__,
                    "git_commit": git.get("commit", ""),
                    "git_changed": bool(git.get("changed")),
                }
            )
            self.logger.log_artifact(config)
            self.logger.log_artifact(record)
