"""Whole held-out episodes: what the data module hands out, and what both models say of them."""

import json
import os
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from made import made_cache, scaled_action
from test_data import trainer_of
from test_data_offline import Watch, data_of

from datamodules.mixture import Mixture
from datamodules.offline import CacheRows
from datamodules.replay import RowReplay
from datamodules.selection import SourceSpec
from lit_wm.callbacks.checkpoint import ResumableCheckpoint
from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.heldout import foresee
from lit_wm.noise import NoiseStreams
from lit_wm.tdmpc2 import TDMPC2Module

DATA = Path(__file__).parent / "data"
LENGTHS = [9, 4, 12, 7, 30, 3, 15, 8]
EPISODE = {"windows": "episode", "batch_length": 4}


@pytest.mark.parametrize("windows", ["stream", "episode"])
def test_held_out_episodes_are_the_ends_of_whole_ones_and_never_trained_on(tmp_path, windows):
    module = Watch(20, windows)
    data = data_of(tmp_path, windows=windows, val_fraction=0.6)
    trainer_of(tmp_path).fit(module, datamodule=data)
    trained = {int(e) for batch in module.seen for e in batch[0][..., 0].unique()}
    batch, again = data.held_out_episodes(module, 8, 11), data.held_out_episodes(module, 8, 11)
    assert torch.equal(batch.obs["obs"], again.obs["obs"])
    seen = batch.obs["obs"][:, 0, 0].int().tolist()
    assert len(set(seen)) == len(seen) > 2
    assert not trained & set(seen)
    for row, e in enumerate(seen):
        n = min(11, LENGTHS[e] + 1)
        t = np.arange(LENGTHS[e] + 1)[-n:]
        valid = batch.info["valid"][row]
        assert valid.tolist() == [True] * n + [False] * (len(valid) - n)
        assert batch.obs["obs"][row, :n, 1].tolist() == t.tolist()
        assert batch.reward[row, 1:n].tolist() == [100 * e + x - 1 for x in t[1:]]
        np.testing.assert_allclose(
            batch.prev_action["action"][row, 1:n, 0], scaled_action(e, t[1:] - 1), rtol=1e-5
        )
        assert batch.is_terminal[row, :n].tolist() == [False] * (n - 1) + [e % 3 == 0]
    assert data.held_out_episodes(module, 2, 5).reward.shape == (2, min(5, 1 + max(LENGTHS[e] for e in seen)))
    data.close()


@pytest.mark.parametrize("windows", ["stream", "episode"])
def test_held_out_rows_know_their_source_where_another_has_none_held_out(tmp_path, windows):
    module = Watch(1, windows)
    data = data_of(tmp_path, windows=windows, val_fraction=0.5, sources=["made:30", "made:20,21,22,23"])
    trainer_of(tmp_path).fit(module, datamodule=data)
    assert data.held_out.names == ["source1"]
    for batch in (data.held_out_episodes(module), data.held_out_batch(module)):
        assert batch.source.tolist() == [1] * len(batch.reward)
    data.close()


def test_every_task_of_a_source_is_looked_at(tmp_path):
    """Here nine of ten episodes are of the first of three tasks."""
    cache = made_cache(tmp_path / "cache", [6] * 100)
    task = np.repeat([2, 0, 1], [90, 5, 5])
    cache.rows["task"][:] = torch.from_numpy(np.repeat(task, 7))
    spec, spaces = SourceSpec("made:6"), cache.schema.spaces
    storage = CacheRows(cache, tmp_path / "rows", spaces, np.arange(100), spec, lead=0)
    options = {"window": 4, "context": 0, "seed": 0, "by": "episodes", "within_episodes": True}
    mixture = Mixture({"source0": RowReplay.of_dataset(storage, spaces, **options)})
    for number, counts in ((1, [1, 1, 1]), (9, [3, 3, 3]), (100, [5, 5, 33])):
        columns, _ = mixture.last_rows(number, 5)
        assert torch.bincount(columns["task",][:, 0].flatten().long()).tolist() == counts
    mixture.close()


def fit(tmp_path, name, kind, source, check, updates=4, **options):
    windows = EPISODE if kind is TDMPC2Module else {}
    more = {"episodic": True} if windows else {"imag_length": 3}
    data = data_of(tmp_path / name, tmp_path / "cache", sources=[source], val_fraction=0.3, **windows)
    logged = []

    class Keep(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, {k: v for k, v in metrics.items() if k.startswith("val/")}))

    torch.manual_seed(0)
    module = kind(data.spaces, preset="debug", log_every=1000, seed=3, **more | options)
    trainer = pl.Trainer(
        accelerator="cpu", logger=Keep(tmp_path), enable_checkpointing=False, enable_progress_bar=False,
        max_steps=updates, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=check,
        check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return module, data, [(step, found) for step, found in logged if found]


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
@pytest.mark.parametrize("name", ["cartpole/mixed-v0", "pendulum/scripted-v0"])
def test_both_models_log_what_is_documented_and_train_as_if_nobody_looked(tmp_path, monkeypatch, kind, name):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(DATA / "minari"))
    module, data, logged = fit(tmp_path, "looked", kind, f"minari:{name}", 2)
    assert [step for step, _ in logged] == [2, 4]
    key = "latent" if kind is TDMPC2Module else "obs"
    longest = int(data.held_out_episodes(module).info["valid"].sum(1).max()) - 1
    horizons = [h for h in (1, 5, 15) if h <= longest - 4]
    for _, found in logged:
        assert np.isfinite(list(found.values())).all()
        found = {k for k in found if not k.startswith("val/loss/")}
        wanted = {
            f"val/{n}@{h}" for n in (f"open_loop/{key}", "reward/error", "continue/error") for h in horizons
        }
        assert wanted | {"val/value/bias"} <= found
        relative = {f"val/reward/relative@{h}" for h in horizons}  # of CartPole every reward is 1
        assert (found & relative == set()) if name.startswith("cart") else relative <= found
        assert found <= wanted | relative | {"val/value/bias", "val/value/correlation"}
    other, unseen, nothing = fit(tmp_path, "unseen", kind, f"minari:{name}", 1000)
    assert nothing == []
    for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    a, b = module.rank_state_dict()["noise"]["streams"], other.rank_state_dict()["noise"]["streams"]
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert torch.equal(data.ticket(module).reward, unseen.ticket(other).reward)
    data.close(), unseen.close()


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_a_trained_model_foresees_better_than_one_with_shuffled_weights(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(DATA / "minari"))
    rates = {"lr": 1e-3} | ({} if kind is TDMPC2Module else {"warmup": 0})
    module, data, _ = fit(tmp_path, "trained", kind, "minari:pendulum/scripted-v0", 1000, 100, **rates)
    batch, module = data.held_out_episodes(module), module.eval()
    trained = foresee(module.model, batch, NoiseStreams(0))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(p.flatten()[torch.randperm(p.numel())].view_as(p))
    shuffled = foresee(module.model, batch, NoiseStreams(0))
    worse = [k for k in trained if k.startswith("open_loop") or ("reward" in k and kind is DreamerV3Module)]
    assert len(worse) == (3 if kind is TDMPC2Module else 9)  # whose rewards, weighed by 0.1, take longer
    assert {k: (trained[k], shuffled[k]) for k in worse if not trained[k] < shuffled[k]} == {}
    data.close()


def test_images_and_tasks_are_foreseen_too(tmp_path):
    module, data, logged = fit(tmp_path, "image", DreamerV3Module, "made:20,30,25?image=48", 1, 1)
    assert np.isfinite([logged[0][1][f"val/open_loop/obs@{h}"] for h in (1, 5, 15)]).all()
    data.close()
    tasks = [{"name": n, "obs": w, "action": 2, "episode_length": 50} for n, w in (("walk", 3), ("run", 2))]
    uri = "made:2{w},3{w},2{w}?terminates=false&width={w}"
    sources = [{"uri": uri.format(w=w), "task": n} for n, w in (("run", 2), ("walk", 3))]
    data = data_of(tmp_path, sources=sources, pad=True, val_fraction=0.3, **EPISODE)
    module = TDMPC2Module(data.spaces, preset="debug", tasks=tasks, discount=[0.9, 0.99])
    trainer = trainer_of(tmp_path)
    trainer.fit_loop.epoch_loop.max_steps = 1
    trainer.fit(module, datamodule=data)
    batch, model = data.held_out_episodes(module), module.eval().model
    assert batch.task.tolist() == (1 - batch.source).tolist()
    assert set(batch.task.tolist()) == {0, 1}
    with torch.no_grad():
        model.task_embedding.weight[0] = 1
    found = foresee(model, batch, NoiseStreams(0))
    assert np.isfinite(list(found.values())).all()
    batch.task = 1 - batch.task
    other = foresee(model, batch, NoiseStreams(0))
    assert {k: found[k] for k in ("open_loop/latent@5", "value/bias") if found[k] == other[k]} == {}
    data.close()


def test_of_several_processes_the_first_measures(tmp_path, monkeypatch):
    from lit_wm import module as shared
    from lit_wm.strategy import ReplicatedStrategy

    def watched(*args):
        with open(tmp_path / "calls", "a") as file:
            file.write(f"{os.getpid()}\n")
        return foresee(*args)

    class Compare(pl.Callback):
        """Before the checkpoint, where one rank alone would wait for ever."""

        def on_validation_end(self, trainer, module):
            assert "val/open_loop/obs@1" in trainer.callback_metrics
            name = f"rank{trainer.global_rank}at{module.held_out_at}"
            (tmp_path / name).write_text(json.dumps(module.held_out))

    best = ResumableCheckpoint(str(tmp_path / "saved"), "val/open_loop/obs@1", "min", every_n_minutes=0)
    monkeypatch.setattr(shared, "foresee", watched)
    data = data_of(tmp_path, batch_size=4, sources=["made:40,40,40,40"], val_fraction=0.3)
    module = DreamerV3Module(data.spaces, preset="debug", log_every=1000, imag_length=3)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, logger=False, callbacks=[best, Compare()], enable_progress_bar=False,
        strategy=ReplicatedStrategy(start_method="fork", process_group_backend="gloo"), max_steps=2,
        enable_model_summary=False, default_root_dir=tmp_path, use_distributed_sampler=False,
        val_check_interval=1, check_val_every_n_epoch=None, num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    calls = (tmp_path / "calls").read_text().split()
    assert len(calls) == 2
    assert len(set(calls)) == 1
    for update in (1, 2):
        first, second = (json.loads((tmp_path / f"rank{r}at{update}").read_text()) for r in (0, 1))
        assert first == second
    assert (tmp_path / "saved" / "best.ckpt").exists()
