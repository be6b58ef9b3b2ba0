"""N updates equal k updates, kill -9, and N-k more: every bit of what the last checkpoint holds."""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.trainer.connectors.data_connector import warning_cache

from datamodules import ReplayDataModule
from datamodules.collect import Collector
from lit_wm import DreamerV3Module, TDMPC2Module
from lit_wm.callbacks import Evaluate, ResumableCheckpoint
from lit_wm.errors import Interrupted

UPDATES, SAVED_AT, KILLED_AT = 40, 20, 27

WORLDS = {
    "CartPole-v1": {"num_envs": 2, "capacity": 96},
    "atari:pong": {"num_envs": 1, "capacity": 64, "env_options": {"size": 48, "gray": False}},
    "lit_wm/LidarRobot-v0": {"num_envs": 2, "capacity": 96, "epsilon": 0.1, "action_noise": 0.2},
    # TD-MPC2: windows, tasks, plans that go on from the last one, discrete actions, ends by themselves.
    "tdmpc2:Pendulum-v1": {"num_envs": 2, "capacity": 60, "env_options": {"time_limit": 12}, "prefill": 30},
    "tdmpc2:CartPole-v1": {"num_envs": 2, "capacity": 70, "env_options": {"time_limit": 15}, "prefill": 36},
    # DreamerV3 with plans that go on from the last one.
    "planned:Pendulum-v1": {"num_envs": 2, "capacity": 80, "env_options": {"time_limit": 20}},
    "dmc:reacher_hard": {"num_envs": 1, "capacity": 96, "env_options": {"time_limit": 30}},
}


# Everything that changes in the course of a training or draws random numbers of its own.
OPTIONS = {
    "kl_warmup": 30, "imag_warmup": 25, "imag_length": 4, "actent_final": 1e-3, "actent_anneal": 35,
    "schedule": "cosine", "anneal": 38, "actor_lr": 2e-3, "grad_clip": 10.0, "reward_scale": 2.0,
}  # fmt: skip


# One of several tasks: the policy's loss leaves a gradient for the next update of the model.
TASKS = [
    {"name": "other", "obs": 5, "action": 2, "episode_length": 50},
    {"name": "pendulum", "obs": 3, "action": 1, "episode_length": 12},
]
SEARCH = {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 4, "iterations": 2}


def make(env):
    """Data and module of one of the worlds."""
    if env.startswith("tdmpc2:"):
        windows = {"batch_size": 4, "batch_length": 4, "windows": "episode", "utd": 1, "first_updates": 5}
        data = ReplayDataModule(env.removeprefix("tdmpc2:"), seed=3, **windows, **WORLDS[env])
        own = {"episodic": True} if "CartPole" in env else {"tasks": TASKS, "task": "pendulum"}
        return data, TDMPC2Module(data.spaces, "debug", planner_options=SEARCH, log_every=7, seed=3, **own)
    data = ReplayDataModule(
        env.removeprefix("planned:"), batch_size=2, batch_length=8, train_ratio=8, replay_context=1, seed=3,
        **WORLDS[env],
    )  # fmt: skip
    options = OPTIONS if env.startswith("lit_wm/") else {}
    if env.startswith("planned:"):
        options = {"planner": "mppi", "planner_options": SEARCH}
    return data, DreamerV3Module(
        data.spaces, preset="debug", lr=1e-3, warmup=3, log_every=7, seed=3, **options
    )


def train(root, env, told=None):
    """Train to UPDATES in ``root``, from its last checkpoint if any; ``told`` hears of each update."""
    torch.set_num_threads(1)
    pl.seed_everything(3)
    data, module = make(env)
    evaluate = Evaluate(episodes=1, max_episode_steps=12, windows=1, window_length=8)

    class Tell(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if told is not None:
                told.send(pl_module.updates)

    checkpoint = ResumableCheckpoint(every_n_updates=SAVED_AT, every_n_minutes=0)
    last = Path(root) / "checkpoints" / "last.ckpt"
    trainer = pl.Trainer(
        default_root_dir=root,
        max_epochs=-1,
        max_steps=UPDATES,
        accelerator="cpu",
        logger=False,
        num_sanity_val_steps=0,
        val_check_interval=15,
        check_val_every_n_epoch=None,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[checkpoint, evaluate, Tell()],
    )
    trainer.fit(module, data, ckpt_path=last if last.exists() else None, weights_only=True)


def run(root, env, kill_at=None):
    """:func:`train` in a process of its own, killed when it tells of update ``kill_at``; its exit code."""
    fork = multiprocessing.get_context("fork")
    told, inside = fork.Pipe(duplex=False)
    process = fork.Process(target=train, args=(root, env, inside))
    process.start()
    inside.close()
    try:
        while True:
            if told.recv() == kill_at:
                os.kill(process.pid, signal.SIGKILL)
    except EOFError:
        process.join()
    return process.exitcode


def saved(root):
    """Everything in the last checkpoint: Lightning's file, this process's part, the replay's files."""
    folder = Path(root) / "checkpoints"
    checkpoint = torch.load(folder / "last.ckpt", weights_only=True)
    resume = folder / checkpoint["resume"]["folder"]
    replay = {p.name: p.read_bytes() for p in sorted((resume / "replay0").iterdir())}
    return checkpoint, torch.load(resume / "rank0.pt", weights_only=True), replay


def differences(a, b, where=""):
    """The places where two nested structures differ."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [f"{where}/{k}" for k in a.keys() ^ b.keys()]
        return keys + [d for k in a.keys() & b.keys() for d in differences(a[k], b[k], f"{where}/{k}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return [
            d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{where}/{i}")
        ]
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.contiguous().flatten().equal(b.flatten())
        return [] if same else [where]
    return [] if type(a) is type(b) and a == b else [where]


@pytest.mark.parametrize("env", WORLDS)
def test_killed_and_resumed_training_equals_uninterrupted_training_bit_for_bit(env, tmp_path):
    if env.startswith("atari"):
        pytest.importorskip("ale_py")
    if env.startswith("dmc"):
        pytest.importorskip("dm_control")
    assert run(tmp_path / "whole", env) == 0
    assert run(tmp_path / "killed", env, kill_at=KILLED_AT) == -signal.SIGKILL
    at_kill, _, _ = saved(tmp_path / "killed")
    assert at_kill["resume"]["updates"] == SAVED_AT
    assert run(tmp_path / "killed", env) == 0

    whole, whole_rank, whole_replay = saved(tmp_path / "whole")
    again, again_rank, again_replay = saved(tmp_path / "killed")
    assert whole["global_step"] == whole["resume"]["updates"] == UPDATES
    for part in ("state_dict", "optimizer_states", "global_step", "ReplayDataModule"):
        assert differences(whole[part], again[part], part) == []
    assert differences(whole_rank, again_rank) == []
    assert whole_replay.keys() == again_replay.keys()
    assert [name for name in whole_replay if whole_replay[name] != again_replay[name]] == []

    # The test is worth something: rows were evicted, weights moved, and moved after the kill.
    assert whole["ReplayDataModule"]["env_steps"] > WORLDS[env]["capacity"]
    assert differences(whole["state_dict"], at_kill["state_dict"])


def test_sigterm_while_the_replay_fills_stops_at_once_and_loses_nothing(tmp_path, monkeypatch):
    env, collect, seen = "tdmpc2:Pendulum-v1", Collector.collect, []
    monkeypatch.setattr(sys.modules[__name__], "UPDATES", 8)
    train(tmp_path / "whole", env)

    def signalled(self, *args):
        seen.append(self.decisions)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return collect(self, *args)

    monkeypatch.setattr(Collector, "collect", signalled)
    with pytest.raises(Interrupted, match="SIGTERM"):
        train(tmp_path / "stopped", env)
    assert len(seen) == 6
    assert saved(tmp_path / "stopped")[0]["resume"]["updates"] == 0
    train(tmp_path / "stopped", env)
    assert seen[6] == seen[5] + 2  # it goes on filling
    (whole, *parts), (stopped, *others) = saved(tmp_path / "whole"), saved(tmp_path / "stopped")
    for part in ("state_dict", "optimizer_states", "global_step", "ReplayDataModule"):
        assert differences(whole[part], stopped[part], part) == []
    assert differences(parts, others) == []


def test_lightning_finds_no_hook_overridden(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr(sys.modules[__name__], "UPDATES", 1)
    warning_cache.clear()  # it warns once in a process
    train(tmp_path, "tdmpc2:Pendulum-v1")
    assert not [w for w in recwarn if "overridden" in str(w.message)]
