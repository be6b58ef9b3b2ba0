"""Checkpoints: exact, atomic under kill -9, and clear about what is wrong with them."""

import json
import multiprocessing
import os
import random
import shutil
import signal

import lightning.pytorch as pl
import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.strategies import DDPStrategy

from lit_wm.callbacks.checkpoint import ResumableCheckpoint, random_state, set_random_state
from lit_wm.callbacks.evaluate import Interrupts
from lit_wm.errors import CheckpointError, ConfigError


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fit(make_trainer, updates, ckpt=None, **options):
    checkpoint = ResumableCheckpoint(**({"every_n_updates": 5, "every_n_minutes": 0} | options))
    trainer = make_trainer(checkpoint, max_steps=updates, limit_val_batches=0)
    module, data = tiny.TinyModule(), tiny.TinyData()
    trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
    return trainer, module, data


def start(root, updates):
    """Train in a process of its own; its stages come out of the connection, which ends with the process."""
    fork = multiprocessing.get_context("fork")
    stages, inside = fork.Pipe(duplex=False)
    process = fork.Process(target=tiny.main, args=(root, updates, inside))
    process.start()
    inside.close()
    return process, stages


def stages_of(stages):
    while True:
        try:
            yield stages.recv()
        except EOFError:
            return


def test_kill_9_anywhere_in_saving_leaves_a_pair_from_which_training_goes_on_bitwise(tmp_path):
    process, stages = start(tmp_path / "whole", 60)
    list(stages_of(stages))
    expected = torch.load(tmp_path / "whole" / "digest.pt", weights_only=True)
    root = tmp_path / "killed"
    # One process per stage: each goes on from what the kill before has left, and dies in its second save.
    for stage in ("begin", "replay", "folder", "file", "cleaned"):
        process, stages = start(root, 60)
        seen = 0
        for told in stages_of(stages):
            seen += told == stage
            if seen == 2:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.join()
        assert process.exitcode == -signal.SIGKILL, stage
        names = sorted(p.name for p in (root / "checkpoints").glob("resume-*"))
        saved = torch.load(root / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["resume"]["folder"] in names, stage
        assert torch.equal(saved["state_dict"]["updates_done"], torch.tensor(saved["resume"]["updates"]))
    process, stages = start(root, 60)
    list(stages_of(stages))
    assert equal(torch.load(root / "digest.pt", weights_only=True), expected)
    assert len(list((root / "checkpoints").glob("resume-*"))) == 1
    assert not list((root / "checkpoints").glob(".*"))


def test_sigterm_saves_after_the_running_update_and_leaves_in_peace(tmp_path):
    process, stages = start(tmp_path, 10_000)
    for told in stages_of(stages):
        if told == "cleaned":
            process.terminate()
            break
    list(stages_of(stages))
    process.join()
    assert process.exitcode == 0
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert 5 <= saved["global_step"] < 10_000
    assert saved["global_step"] == saved["resume"]["updates"]
    assert (tmp_path / "digest.pt").exists()  # fit returned


class Fails(pl.Callback):
    """An evaluation whose environment raises once ``at`` updates are made."""

    def __init__(self, at, error):
        self.at, self.error = at, error

    def on_validation_epoch_end(self, trainer, pl_module):
        if pl_module.updates >= self.at:
            raise self.error("the simulator broke")


def test_a_failed_evaluation_leaves_a_checkpoint_from_which_training_goes_on_bitwise(make_trainer, tmp_path):
    def go_on(name, at, ckpt=None, error=ValueError):
        checkpoint = ResumableCheckpoint(every_n_minutes=0)
        trainer = make_trainer(
            checkpoint,
            Fails(at, error),
            max_steps=30,
            default_root_dir=tmp_path / name,
            val_check_interval=10,
        )
        pl.seed_everything(5)
        module, data = tiny.TinyModule(), tiny.TinyData()
        trainer.fit(module, data, ckpt_path=ckpt, weights_only=True)
        return tiny.digest(module, trainer, data)

    with pytest.raises(ValueError, match="the simulator broke"):
        go_on("failed", 20)
    last = tmp_path / "failed" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["resume"]["updates"] == 20
    assert equal(go_on("failed", 99, last), go_on("whole", 99))
    with pytest.raises(SystemExit):  # a second Ctrl-C is in a hurry
        go_on("hurried", 20, error=KeyboardInterrupt)
    assert not list((tmp_path / "hurried" / "checkpoints").iterdir())


def test_a_second_signal_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with Interrupts() as signals:
        signal.raise_signal(signal.SIGINT)
        assert signals.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is before


def test_only_last_carries_the_replay_and_only_the_newest_folder_stays(make_trainer, tmp_path):
    fit(make_trainer, 12, keep_every_n_updates=4)
    folder = tmp_path / "checkpoints"
    names = sorted(p.name for p in folder.iterdir())
    assert names[0] == "last.ckpt"
    assert names[1].startswith("resume-000000012-")
    assert names[2:] == ["updates-000000004.ckpt", "updates-000000008.ckpt", "updates-000000012.ckpt"]
    for path in folder.glob("*.ckpt"):
        saved = torch.load(path, weights_only=True)
        assert (saved["resume"]["folder"] is not None) == (path.name == "last.ckpt")
        assert len(saved["optimizer_states"]) == 3


def test_best_follows_the_monitored_metric_and_survives_a_resume(make_trainer, tmp_path):
    scores = iter([1.0, 3.0, 2.0, float("nan"), 2.5, 4.0])

    class Scored(tiny.TinyModule):
        def validation_step(self, batch, batch_idx):
            self.log("eval/return", next(scores), logger=False, batch_size=1)

    def run(updates, ckpt=None):
        checkpoint = ResumableCheckpoint(every_n_minutes=0)
        trainer = make_trainer(checkpoint, max_steps=updates, val_check_interval=2)
        trainer.fit(Scored(), tiny.TinyData(), ckpt_path=ckpt, weights_only=True)
        best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
        return checkpoint, best["global_step"]

    checkpoint, at = run(8)
    assert (float(checkpoint.best_model_score), at) == (3.0, 4)
    checkpoint, at = run(12, tmp_path / "checkpoints" / "last.ckpt")
    assert (float(checkpoint.best_model_score), at) == (4.0, 12)
    assert checkpoint.best_model_path == str(tmp_path / "checkpoints" / "best.ckpt")


def test_a_metric_that_is_not_measured_is_said_with_what_is(make_trainer, tmp_path):
    class Scored(tiny.TinyModule):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss/rew", 1.0, logger=False, batch_size=1)

    trainer = make_trainer(ResumableCheckpoint(monitor="val/loss"), max_steps=2, val_check_interval=2)
    with pytest.warns(UserWarning, match="no best.ckpt: .*'val/loss'.*did you mean 'val/loss/rew'"):
        trainer.fit(Scored(), tiny.TinyData())


def test_a_dry_run_saves_nothing(make_trainer, tmp_path):
    trainer = make_trainer(ResumableCheckpoint(every_n_updates=1), max_steps=3, fast_dev_run=True)
    trainer.fit(tiny.TinyModule(), tiny.TinyData())
    assert not list((tmp_path / "checkpoints").iterdir())


def test_the_clock_saves_too(make_trainer, tmp_path):
    saved = []

    class Watch(ResumableCheckpoint):
        def save_last_now(self, trainer, pl_module):
            saved.append(pl_module.updates)
            super().save_last_now(trainer, pl_module)

    trainer = make_trainer(Watch(every_n_minutes=1e-9), max_steps=3, limit_val_batches=0)
    trainer.fit(tiny.TinyModule(), tiny.TinyData())
    assert saved == [1, 2, 3]


def test_a_full_disk_keeps_the_former_pair_and_training_goes_on(make_trainer, tmp_path):
    class Full(tiny.TinyData):
        def snapshot_replay(self, directory):
            if self.env_steps > 5:
                raise OSError(28, "No space left on device")
            super().snapshot_replay(directory)

    checkpoint = ResumableCheckpoint(every_n_updates=5, every_n_minutes=0)
    trainer = make_trainer(checkpoint, max_steps=12, limit_val_batches=0)
    module = tiny.TinyModule()
    with pytest.warns(UserWarning, match="No space left on device.*last.ckpt stays as it was"):
        trainer.fit(module, Full())
    assert module.updates == 12
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["resume"]["updates"] == 5
    assert [p.name for p in (tmp_path / "checkpoints").glob("*resume-*")] == [saved["resume"]["folder"]]


def test_a_disk_too_full_for_the_weights_keeps_the_former_pair_too(make_trainer, tmp_path):
    checkpoint = ResumableCheckpoint(every_n_updates=5, every_n_minutes=0)
    trainer = make_trainer(checkpoint, max_steps=12, limit_val_batches=0)
    save = trainer.save_checkpoint

    def full(path, weights_only=False):
        if trainer.global_step > 5:
            path.write_bytes(b"the first bytes")
            raise OSError(28, "No space left on device")
        save(path, weights_only)

    trainer.save_checkpoint = full
    module = tiny.TinyModule()
    with pytest.warns(UserWarning, match="last.ckpt could not be written.*No space left on device"):
        trainer.fit(module, tiny.TinyData())
    assert module.updates == 12
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["resume"]["updates"] == 5
    names = {p.name for p in (tmp_path / "checkpoints").iterdir()}
    assert names == {"last.ckpt", saved["resume"]["folder"]}


def two_processes(root, updates):
    """Train in two gloo processes; runs in a process of its own, as the launcher forks."""
    torch.set_num_threads(1)
    checkpoint = ResumableCheckpoint(every_n_updates=4, every_n_minutes=0)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    options = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": strategy,
        "logger": False,
        "limit_val_batches": 0,
    }
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    trainer = tiny.pl.Trainer(
        default_root_dir=root, max_epochs=-1, max_steps=updates, callbacks=[checkpoint], **options, **quiet
    )
    last = root / "checkpoints" / "last.ckpt"
    tiny.pl.seed_everything(5)
    ckpt = last if last.exists() else None
    trainer.fit(Ranked(), tiny.TinyData(), ckpt_path=ckpt, weights_only=True)


class Ranked(tiny.TinyModule):
    """Every process has noise of its own."""

    def setup(self, stage):
        self.noise = tiny.NoiseStreams(3, self.trainer.global_rank)


def test_each_of_two_processes_goes_on_with_its_own_part(tmp_path):
    fork = multiprocessing.get_context("fork")
    parts = {}
    for root, budgets in ((tmp_path / "whole", [10]), (tmp_path / "parts", [6, 10])):
        for updates in budgets:
            process = fork.Process(target=two_processes, args=(root, updates))
            process.start()
            process.join()
            assert process.exitcode == 0
        folder = next((root / "checkpoints").glob("resume-*"))
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["updates"], manifest["world_size"]) == (10, 2)
        parts[root.name] = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert equal(parts["whole"], parts["parts"])
    assert not equal(parts["whole"][0]["module"], parts["whole"][1]["module"])


@pytest.fixture
def saved(make_trainer, tmp_path):
    fit(make_trainer, 5)
    folder = next((tmp_path / "checkpoints").glob("resume-*"))
    return tmp_path / "checkpoints" / "last.ckpt", folder


def test_a_missing_folder_is_named(make_trainer, saved):
    path, folder = saved
    folder.rename(folder.with_name("moved"))
    with pytest.raises(CheckpointError, match=f"needs .*{folder.name}.* which is not there"):
        fit(make_trainer, 10, path)


def test_the_folder_of_another_checkpoint_is_refused(make_trainer, saved):
    path, folder = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(
        json.dumps(manifest | {"name": "resume-000000007-00000000", "updates": 7})
    )
    with pytest.raises(CheckpointError, match="belongs to another checkpoint.*update 7.*at update 5"):
        fit(make_trainer, 10, path)


def test_a_damaged_part_is_refused(make_trainer, saved):
    path, folder = saved
    content = bytearray((folder / "rank0.pt").read_bytes())
    content[len(content) // 2] ^= 255
    (folder / "rank0.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="rank0.pt is damaged"):
        fit(make_trainer, 10, path)


def test_a_missing_replay_is_refused(make_trainer, saved):
    path, folder = saved
    shutil.rmtree(folder / "replay0")
    with pytest.raises(CheckpointError, match="replay0' is missing"):
        fit(make_trainer, 10, path)


def test_another_number_of_processes_is_refused(make_trainer, saved):
    path, _ = saved
    content = torch.load(path, weights_only=True)
    content["resume"]["world_size"] = 2
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="saved by 2 processes.*this run has 1"):
        fit(make_trainer, 10, path)


def test_a_checkpoint_without_replay_goes_on_with_a_warning(make_trainer, tmp_path):
    fit(make_trainer, 4, keep_every_n_updates=4)
    with pytest.warns(UserWarning, match="carries no replay"):
        _, module, data = fit(make_trainer, 6, tmp_path / "checkpoints" / "updates-000000004.ckpt")
    assert (module.updates, data.env_steps, len(data.rows)) == (6, 6, 2)


def test_resuming_a_finished_fit_with_a_larger_budget_makes_exactly_the_missing_updates(
    make_trainer, tmp_path
):
    fit(make_trainer, 7)
    trainer, module, data = fit(make_trainer, 11, tmp_path / "checkpoints" / "last.ckpt")
    assert (module.updates, trainer.global_step, data.env_steps) == (11, 11, 11)


def test_changing_the_cadence_does_not_lose_the_state(make_trainer, tmp_path):
    fit(make_trainer, 5)
    _, module, data = fit(make_trainer, 7, tmp_path / "checkpoints" / "last.ckpt", every_n_updates=3)
    assert len(data.rows) == 7


def test_global_random_numbers_go_on():
    state = random_state()
    expected = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    set_random_state(state)
    again = (torch.rand(3), np.random.rand(3), random.random())  # noqa: NPY002
    assert torch.equal(expected[0], again[0])
    assert np.array_equal(expected[1], again[1])
    assert expected[2] == again[2]


def test_of_the_gpus_only_the_one_in_use_is_asked(monkeypatch):
    """Asking all of them would open each GPU in every process, and another machine has others."""
    told = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.arange(16, dtype=torch.uint8))
    monkeypatch.setattr(torch.cuda, "set_rng_state", told.append)
    assert random_state()["cuda"] is None  # trained on the CPU: the GPU stays closed
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    set_random_state(random_state())
    assert torch.equal(*told, torch.arange(16, dtype=torch.uint8))


@pytest.mark.parametrize("options", [{"every_n_updates": 0}, {"keep_every_n_updates": -1}, {"mode": "best"}])
def test_impossible_arguments_are_refused(options):
    with pytest.raises(ConfigError, match="checkpoint"):
        ResumableCheckpoint(**options)
