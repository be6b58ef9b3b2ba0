"""From a dataset to the environment in one run, and datasets without rewards."""

from itertools import pairwise

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from test_data_offline import data_of
from torch.utils.data import DataLoader

from datamodules import ReplayDataModule
from datamodules.cache import write_rows
from datamodules.episodes import Episode, Schema, Source
from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.envs import read_spaces
from lit_wm.errors import ConfigError
from lit_wm.tdmpc2 import TDMPC2Module

BOTH = pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
ACTOR = {DreamerV3Module: ("pol",), TDMPC2Module: ("policy",)}
CRITIC = {DreamerV3Module: ("val", "slowval"), TDMPC2Module: ("critic", "target_critic")}


@pytest.fixture
def demos(tmp_path):
    """Two datasets of Pendulum's spaces: observations of 7 with rewards, of 8 without."""

    class Demo(Source):
        files, schema = [], Schema(read_spaces("Pendulum-v1"))

        def __init__(self, rewards):
            self.rewards, self.meta = rewards, {} if rewards else {"no_reward": True}

        def episodes(self):
            end, rng = np.arange(30) == 29, np.random.default_rng(0)
            obs, action = np.full((31, 3), 7.0 if self.rewards else 8.0), rng.uniform(-1, 1, (30, 1))
            reward = np.ones(30) if self.rewards else None
            yield Episode({"obs": obs}, {"action": action}, reward, end & False, end, "demo")

    for name in ("with", "without"):
        write_rows(Demo(name == "with"), tmp_path / name)
    return {name: f"rows:{tmp_path / name}" for name in ("with", "without")}


class Watch(pl.Callback):
    def __init__(self):
        self.steps, self.batches, self.metrics, self.axis = [], [], [], []
        self.actor, self.critic = [], []  # weights after each update

    def on_train_start(self, trainer, module):
        self.keep(module)

    def keep(self, module):
        for kept, names in ((self.actor, ACTOR), (self.critic, CRITIC)):
            parts = [
                p.detach() for n in names[type(module)] for p in module.model.get_submodule(n).parameters()
            ]
            kept.append(torch.cat([p.flatten() for p in parts]))

    def setup(self, trainer, module, stage):
        draw = module.draw

        def watched(ticket):
            self.batches.append(draw(ticket))
            return self.batches[-1]

        module.draw = watched

    def on_train_batch_end(self, trainer, module, *args):
        self.keep(module)
        self.steps.append(trainer.datamodule.env_steps)
        self.metrics.append({k: v for k, v in module.latest.items() if k.startswith("train/")})
        self.axis.append(module.axis)


def moved(weights):
    """In which updates they changed."""
    return [not torch.equal(a, b) for a, b in pairwise(weights)]


def trained(tmp_path, module, data, updates):
    watch = Watch()
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        max_steps=updates, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
        callbacks=[watch],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    return watch


def fit(tmp_path, kind, updates, model=None, **options):
    stream = kind is DreamerV3Module
    own = {"windows": "stream", "batch_length": 5, "train_ratio": 20}
    if not stream:
        limit = {"env_options": {"time_limit": 20}, "prefill": 40}
        own = {"windows": "episode", "batch_length": 4, **limit}
    data = ReplayDataModule(
        **{"env": "Pendulum-v1", "batch_size": 4, "capacity": 500, "replay_dir": str(tmp_path / "replay")}
        | own | options
    )  # fmt: skip
    module = kind(
        data.spaces,
        preset="debug",
        log_every=1,
        **({"imag_length": 3, "warmup": 0} if stream else {}) | (model or {}),
    )
    return module, data, trained(tmp_path, module, data, updates)


@BOTH
@pytest.mark.parametrize("said", [None, 5])
def test_the_environment_waits_until_pretraining_is_over(tmp_path, demos, kind, said):
    pretrain = {"world_model": 3, "actor": 1}
    _, data, watch = fit(
        tmp_path, kind, 10, {"pretrain": pretrain}, sources=[demos["with"]], offline_updates=said
    )
    first = said or 4
    assert watch.steps[:first] == [0] * first
    assert min(watch.steps[first:]) > 0
    assert watch.axis == list(range(1, 11))
    for update, batch in enumerate(watch.batches):
        demo = (batch.obs["obs"] == 7).flatten(1).all(1)
        assert torch.equal(batch.recorded, demo)
        assert demo.all() == (update < first)
        assert batch.rewarded is None
    data.close()


@BOTH
def test_losses_are_told_apart_by_source(tmp_path, demos, kind, capsys):
    _, data, watch = fit(tmp_path, kind, 3, sources=[demos["with"], demos["without"]])
    assert f"no rewards in {demos['without']}: these rows teach neither" in capsys.readouterr().err
    name = "rew" if kind is DreamerV3Module else "reward"
    for metrics, batch in zip(watch.metrics, watch.batches, strict=True):
        parts = [f"train/{part}/loss/{name}" for part in ("source0", "source1", "env")]
        assert {parts[0], parts[2]} <= metrics.keys()
        assert parts[1] not in metrics  # it has no rewards to learn
        own = {k.rpartition("/")[2] for k in metrics if k.startswith("train/source1/")}
        assert own >= ({"dyn", "con", "policy"} if kind is DreamerV3Module else {"consistency"})
        assert not own & ({"repval"} if kind is DreamerV3Module else {"value"})
        assert not any(k.endswith("/rows") for k in metrics)
        assert torch.equal(batch.rewarded, ~(batch.obs["obs"] == 8).flatten(1).all(1))
        if kind is DreamerV3Module:
            shares = [(batch.source == i).float().mean() for i in range(3)]
            mean = sum(share * metrics.get(part, 0) for share, part in zip(shares, parts, strict=True))
            assert float(mean) == pytest.approx(metrics[f"train/loss/{name}"], rel=1e-4)
    data.close()


@BOTH
def test_without_rewards_only_the_world_model_learns_and_says_so(tmp_path, demos, kind, capsys):
    module, data, watch = fit(tmp_path, kind, 2, sources=[demos["without"]], env=None)
    untouched = (
        ("pol", "val", "slowval") if kind is DreamerV3Module else ("policy", "critic", "target_critic")
    )
    assert "no source has rewards: the world model learns" in capsys.readouterr().err
    assert module.phase == "world_model"
    names = {k.removeprefix("train/loss/") for k in watch.metrics[0] if k.startswith("train/loss/")}
    assert not names & {"policy", "value", "repval", "bc"}
    assert not any(p.grad is not None for n in untouched for p in module.model.get_submodule(n).parameters())
    data.close()


@BOTH
def test_rewards_of_the_data_at_hand_decide_in_every_fit(tmp_path, demos, kind):
    module, without, _ = fit(tmp_path / "a", kind, 2, sources=[demos["without"]], env=None)
    other, data, _ = fit(tmp_path / "b", kind, 1, sources=[demos["with"]], env=None)
    watch = trained(tmp_path, module, data, 2)
    assert module.phase == "joint"
    assert moved(watch.actor) == moved(watch.critic) == [True, True]
    watch = trained(tmp_path, other, without, 2)  # its replay is open already
    assert other.phase == "world_model"
    assert moved(watch.actor) == moved(watch.critic) == [False, False]
    assert module.phase == "joint"
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, max_steps=1,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    batch = data.report_batch(2, 5 if kind is DreamerV3Module else 4)
    trainer.fit(other, DataLoader([batch], batch_size=None, collate_fn=lambda x: x))  # of no data module
    assert other.phase == "joint"
    data.close(), without.close()


@BOTH
def test_without_rewards_actor_and_critic_wait_for_the_environment(tmp_path, demos, kind, capsys):
    module, data, watch = fit(tmp_path, kind, 5, sources=[demos["without"]], offline_updates=3)
    said = "no source has rewards: the world model learns, and neither actor nor critic, until Pendulum-v1"
    assert said in capsys.readouterr().err
    assert watch.steps[2] == 0 < watch.steps[3]
    assert moved(watch.actor) == moved(watch.critic) == [False] * 3 + [True] * 2
    data.close()
    weights = {"with": [[0, 0], [2, 0], [3, 1]], "without": [[0, 1], [2, 1], [3, 0]]}
    sources = [{"uri": demos[k], "weight": w} for k, w in weights.items()]
    _, data, watch = fit(tmp_path / "b", kind, 5, sources=sources, env=None)
    assert moved(watch.critic) == [False] * 3 + [True] * 2
    data.close()


@BOTH
@pytest.mark.parametrize("way", ["pretrain", "bc"])
def test_cloning_needs_no_rewards(tmp_path, demos, kind, way, capsys):
    model = {"loss_scales": {"bc": 0.5}} if kind is DreamerV3Module else {"bc_coef": 0.5}
    if way == "pretrain":
        model = {"pretrain": {"world_model": 1, "actor": 2}}
    module, data, watch = fit(tmp_path, kind, 5, model, sources=[demos["without"]], env=None)
    assert "the actor by cloning, and the critic does not" in capsys.readouterr().err
    assert moved(watch.actor) == [way == "bc"] + [True] * 4
    assert moved(watch.critic) == [False] * 5
    names = {k.removeprefix("train/loss/") for k in watch.metrics[-1] if k.startswith("train/loss/")}
    assert "bc" in names
    assert not names & {"policy", "value", "repval"}
    data.close()


@BOTH
@pytest.mark.parametrize("way", ["pretrain", "bc"])
def test_nobody_imitates_itself(tmp_path, kind, way):
    """Without a dataset all rows are the model's own."""
    model = {"loss_scales": {"bc": 0.5}} if kind is DreamerV3Module else {"bc_coef": 0.5}
    with pytest.raises(ConfigError, match="imitate recorded actions, and data.sources holds none"):
        fit(tmp_path, kind, 3, model if way == "bc" else {"pretrain": {"actor": 2}})


def test_ends_that_a_model_cannot_know_are_refused(tmp_path):
    data = data_of(tmp_path, sources=["made:9,9,9,9"], windows="episode")
    with pytest.raises(
        ConfigError, match=r"each of 2 episodes of made:9,9,9,9 ended by itself(.|\n)*episodic: t"
    ):
        trained(tmp_path, TDMPC2Module(data.spaces, preset="debug"), data, 1)
    for options, model in (({}, {"episodic": True}), ({"sources": ["made:9,9?terminates=false"]}, {})):
        data = data_of(tmp_path, **{"sources": ["made:9,9,9,9"], "windows": "episode"} | options)
        trained(tmp_path, TDMPC2Module(data.spaces, preset="debug", **model), data, 1)
        data.close()


@pytest.mark.parametrize("limit", [12, 50])
def test_the_time_limit_is_that_of_the_environment(tmp_path, demos, limit):
    """Episodes of the dataset have 30 steps."""
    options = {"env_options": {"time_limit": limit}, "prefill": limit, "capacity": limit + 5}
    module, data, _ = fit(tmp_path, TDMPC2Module, 1, sources=[demos["with"]], **options)
    assert data.spaces["episode_length"] == limit
    alone = TDMPC2Module(read_spaces("Pendulum-v1", time_limit=limit).to_plain(), preset="debug",
                         discount_min=0.0)  # fmt: skip
    both = TDMPC2Module(data.spaces, preset="debug", discount_min=0.0)
    assert both.model.gamma(None) == alone.model.gamma(None)
    data.close()


@pytest.mark.parametrize("options", [{"env": None, "sources": ["made:9"]}, {"env": "Pendulum-v1"}])
def test_updates_without_a_step_need_both(options):
    with pytest.raises(ConfigError, match="data.offline_updates is 5: updates on data.sources before"):
        ReplayDataModule(**options, offline_updates=5, capacity=5000)


def test_a_count_is_a_whole_number():
    with pytest.raises(ConfigError, match="data.offline_updates is -1, expected a whole number"):
        ReplayDataModule("Pendulum-v1", sources=["made:9"], offline_updates=-1)


def test_a_dataset_is_judged_with_the_options_that_it_was_recorded_with(tmp_path, monkeypatch):
    from lit_wm.cli import main

    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    argv = ["--env", "Pendulum-v1", "--env-options", "repeat=2", "--policy", "random", "--episodes", "2"]
    assert main(["collect", *argv, "--out", "minari:pendulum/repeated-v0"]) == 0
    data = ReplayDataModule(sources=["minari:pendulum/repeated-v0"], cache_dir=str(tmp_path / "cache"))
    assert data.evaluation_env == "Pendulum-v1"
    assert data.evaluation_options["repeat"] == 2
    envs = data.make_envs(1, [0])
    envs.reset()
    action = {"action": np.zeros((1, 1), np.float32)}
    ends = [bool(envs.step(action)[3].any()) for _ in range(100)]
    assert ends.index(True) == 99  # of 200 steps, two at a time
    envs.close()
