"""The CSV file is always right, and MLflow can neither kill nor stall a training."""

import csv
import json
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_wm.tracking import CsvLogger, RunRecord, SafeMLFlowLogger, TrackingError, git_state, versions


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def history(logger, key):
    return [(m.step, m.value) for m in logger.experiment.get_metric_history(logger.run_id, key)]


class Small(LightningModule):
    """Logs one number per update, at ten environment steps each."""

    def __init__(self, before_update=lambda update: None):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1)
        self.before_update = before_update

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return torch.utils.data.DataLoader(range(10_000), batch_size=None)

    def training_step(self, batch, batch_idx):
        update = self.global_step
        self.before_update(update)
        optimizer = self.optimizers()
        self.layer(torch.ones(1, 1)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        for logger in self.loggers:
            logger.log_metrics({"train/loss/rew": update}, step=10 * update)


def fit(directory, logger, updates, before_update=lambda update: None, ckpt_path=None):
    """Train and return the updates done and the seconds that the logging calls let them take."""
    record = RunRecord(directory, "model: {}\n", logger)
    trainer = Trainer(
        default_root_dir=directory,
        logger=[CsvLogger(directory), logger],
        callbacks=[record],
        max_steps=updates,
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    began = time.monotonic()
    trainer.fit(Small(before_update), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(directory / "last.ckpt")
    return trainer.global_step, time.monotonic() - began


def test_csv_rows_grow_columns_and_keep_exact_steps(tmp_path):
    logger = CsvLogger(tmp_path)
    logger.log_metrics({"a": 1.0}, step=16_777_217)
    logger.log_metrics({"b": torch.tensor(2.0), "text": "left out"}, step=16_777_219)
    assert rows(tmp_path / "metrics.csv") == [
        {"step": "16777217", "a": "1.0", "b": ""},
        {"step": "16777219", "a": "", "b": "2.0"},
    ]


def test_csv_of_a_resumed_run_drops_the_rows_that_come_again(tmp_path):
    killed = CsvLogger(tmp_path)
    for update in range(1, 6):  # two updates per environment step
        killed.log_metrics({"step/grad": update, "a": update}, step=update // 2)
        if update in (2, 5):
            killed.log_metrics({"eval/return": update}, step=update // 2)
    resumed = CsvLogger(tmp_path)
    for update in (3, 4):
        resumed.log_metrics({"step/grad": update, "a": -update}, step=update // 2)
    found = rows(tmp_path / "metrics.csv")
    assert [row["a"] or row["eval/return"] for row in found] == ["1.0", "2.0", "2.0", "-3.0", "-4.0"]


@pytest.fixture(scope="module")
def migrated(tmp_path_factory):
    """An empty MLflow database; making one runs some fifty migrations."""
    path = tmp_path_factory.mktemp("store") / "mlruns.db"
    _ = SafeMLFlowLogger("x", tracking_uri=f"sqlite:///{path}").experiment
    return path


@pytest.fixture
def store(migrated, tmp_path):
    """URI of a database of its own for each test."""
    shutil.copy(migrated, tmp_path / "mlruns.db")
    return f"sqlite:///{tmp_path}/mlruns.db"


def test_sqlite_gets_every_number_and_a_resume_goes_on_in_the_same_run(tmp_path, store):
    uri = store
    first = SafeMLFlowLogger("CartPole-v1", "one", uri)
    fit(tmp_path / "run", first, 5)
    assert first.experiment.get_run(first.run_id).info.status == "FINISHED"
    second = SafeMLFlowLogger("CartPole-v1", "one", uri)
    fit(tmp_path / "run", second, 8, ckpt_path=tmp_path / "run" / "last.ckpt")

    assert second.run_id == first.run_id
    assert history(second, "train/loss/rew") == [(10 * i, float(i)) for i in range(8)]
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.csv")] == [str(10 * i) for i in range(8)]
    run = second.experiment.get_run(second.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert run.info.artifact_uri.startswith((tmp_path / "mlruns" / "CartPole-v1").as_uri())
    assert {a.path for a in second.experiment.list_artifacts(second.run_id)} == {"config.yaml", "run.json"}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["mlflow"] == {"run_id": first.run_id, "uri": uri}
    assert record["versions"] == versions()


def test_a_changed_parameter_of_a_resumed_run_becomes_a_tag(store):
    uri = store
    first = SafeMLFlowLogger("x", tracking_uri=uri)
    first.log_hyperparams({"lr": 1e-3, "sizes": {"units": 8}, "_instantiator": "none"})
    first.log_metrics({"dream/reward_gap@15": 1.0}, step=3)  # MLflow refuses '@'
    first.finalize()
    second = SafeMLFlowLogger("x", tracking_uri=uri, run_id=first.run_id)
    second.log_hyperparams({"lr": 1e-4, "sizes": {"units": 8}, "new": 1})
    second.finalize("failed")
    run = second.experiment.get_run(first.run_id)
    assert run.data.params == {"lr": "0.001", "sizes.units": "8", "new": "1"}
    assert run.data.tags["resumed_with.lr"] == "0.0001"
    assert run.info.status == "FAILED"
    assert history(second, "dream/reward_gap_15") == [(3, 1.0)]


def test_a_run_that_is_gone_is_replaced_by_a_new_one(store):
    logger = SafeMLFlowLogger("x", tracking_uri=store, run_id="0" * 32)
    with pytest.warns(UserWarning, match="a new run begins"):
        logger.log_metrics({"a": 1}, step=1)
    logger.finalize()
    assert logger.run_id != "0" * 32
    assert logger.experiment.get_run(logger.run_id).data.tags["resumed_from"] == "0" * 32


class FakeServer(BaseHTTPRequestHandler):
    """As much of MLflow's REST interface as a run needs; ``batches`` counts what has arrived."""

    batches: list[dict] = []

    def _answer(self):
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        call = self.path.partition("?")[0].rpartition("/mlflow/")[2]
        info = {
            "run_id": "1" * 32,
            "run_uuid": "1" * 32,
            "experiment_id": "7",
            "status": "RUNNING",
            "artifact_uri": "x:/",
        }
        info |= {"lifecycle_stage": "active", "run_name": "r", "start_time": 1, "user_id": "u"}
        answers = {
            "experiments/get-by-name": {
                "experiment": {"experiment_id": "7", "name": "x", "lifecycle_stage": "active"}
            },
            "runs/create": {"run": {"info": info, "data": {}}},
        }
        if call == "runs/log-batch":
            FakeServer.batches.append(json.loads(body))
        payload = json.dumps(answers.get(call, {})).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    do_GET = do_POST = do_PATCH = _answer

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    FakeServer.batches = []
    running = ThreadingHTTPServer(("127.0.0.1", 0), FakeServer)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def test_a_server_that_dies_neither_kills_nor_stalls_training(tmp_path, server, capfd):
    logger = SafeMLFlowLogger("x", tracking_uri=f"http://127.0.0.1:{server.server_port}", drain_s=1.0)
    slowest = 0.0
    last = None

    def kill_at_20(update):
        nonlocal slowest, last
        now = time.monotonic()
        slowest = max(slowest, now - last) if last and update > 20 else slowest
        if update == 20:
            while not FakeServer.batches and time.monotonic() - now < 30:
                time.sleep(0.01)  # the worker has its own pace
            server.shutdown()
            server.server_close()
            now = time.monotonic()
        last = now

    done, seconds = fit(tmp_path, logger, 200, kill_at_20)
    assert done == 200
    assert slowest < 1.0, "a logging call waited for the dead server"
    assert seconds < 60
    assert FakeServer.batches, "nothing arrived while the server was alive"
    assert len(rows(tmp_path / "metrics.csv")) == 200
    assert "did not reach MLflow" in capfd.readouterr().err
    assert logger.dropped > 0


def test_a_server_that_comes_back_gets_what_it_missed(server):
    logger = SafeMLFlowLogger("x", tracking_uri=f"http://127.0.0.1:{server.server_port}")
    logger.log_metrics({"a": 0}, step=0)
    port = server.server_port
    server.shutdown()
    server.server_close()
    for step in range(1, 5):
        logger.log_metrics({"a": step}, step=step)
    time.sleep(0.3)  # the worker runs into the closed port
    again = ThreadingHTTPServer(("127.0.0.1", port), FakeServer)
    threading.Thread(target=again.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    logger.finalize()
    again.shutdown()
    again.server_close()
    arrived = {metric["step"] for batch in FakeServer.batches for metric in batch.get("metrics", [])}
    assert arrived | {0} == set(range(5))  # JSON leaves a step of 0 out
    assert logger.dropped == 0


def test_a_full_queue_gives_up_the_oldest(server):
    logger = SafeMLFlowLogger(
        "x", tracking_uri=f"http://127.0.0.1:{server.server_port}", max_pending=3, drain_s=0.2
    )
    logger.start()
    server.shutdown()
    server.server_close()
    for step in range(50):
        logger.log_metrics({"a": step}, step=step)
    assert len(logger._pending) <= 3 + 50
    logger.finalize()
    assert logger.dropped >= 40


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "file:./mlruns", "nonsense://x"])
def test_a_missing_store_is_an_error_at_the_start(uri):
    began = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer") as caught:
        SafeMLFlowLogger("x", tracking_uri=uri).start()
    assert len(str(caught.value).splitlines()) == 2
    assert time.monotonic() - began < 30


def test_the_environment_variable_names_the_store(store, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    assert SafeMLFlowLogger("x").tracking_uri == store


def test_the_git_state_names_a_commit_or_nothing():
    state = git_state()
    assert state is None or len(state["commit"]) == 40


def test_trainings_that_start_together_share_a_new_store(tmp_path):
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path / 'new' / 'mlruns.db'}"
    program = "import sys, lit_wm.tracking as t; t.SafeMLFlowLogger('x', *sys.argv[1:]).start()"
    words = [sys.executable, "-c", program]
    processes = [subprocess.Popen([*words, f"run{i}", uri], cwd=Path(__file__).parents[1]) for i in range(3)]
    assert [process.wait() for process in processes] == [0] * 3
    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("x").experiment_id])
    assert {run.info.run_name for run in runs} == {f"run{i}" for i in range(3)}
