"""The data module on datasets, alone and beside an environment."""

import json
from dataclasses import replace

import gymnasium as gym
import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from made import made_cache
from test_data import Module, trainer_of

from datamodules import ReplayDataModule
from datamodules.data import why_not
from datamodules.offline import CacheRows
from datamodules.selection import SourceSpec, model_spaces
from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.envs import read_spaces
from lit_wm.errors import ConfigError, DataError, EnvError
from lit_wm.noise import NoiseStreams
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Spaces, Spec

LENGTHS = "9,4,12,7,30,3,15,8"


class Watch(Module):
    """Keeps all that a batch holds, and writes latents back that tell where they were written."""

    def __init__(self, updates, windows="stream", tasks=()):
        super().__init__(updates)
        self.windows = windows
        self.model = type("Model", (), {"tasks": tasks})

    def latent_specs(self):
        return {} if self.windows == "episode" else {"deter": Spec("float32", (2,))}

    def policy(self, obs, state, is_first, mode="train"):
        from lit_wm.types import State

        x = obs["obs"]
        action = {"action": torch.rand(len(x), 2, generator=self.generator) * 2 - 1}
        return action, State(x[:, :2], None, action)

    def training_step(self, ticket, batch_idx):
        from lit_wm.types import State

        batch = ticket(self)
        kept = [*batch.obs.values(), *batch.prev_action.values(), batch.reward, batch.is_first, batch.is_last,
                batch.is_terminal, *batch.info.values()]  # fmt: skip
        if batch.carry is not None:
            kept.append(batch.carry.deter)
        if batch.task is not None:
            kept.append(batch.task)
        self.seen.append([x.clone() for x in kept])
        self.batch = batch
        if batch.write_back is not None:
            self.count = getattr(self, "count", 0) + 1
            batch.write_back(State(batch.obs["obs"][..., :2] + self.count))
        self.optimizers().step()
        if len(self.seen) == self.updates:
            self.trainer.should_stop = True


def data_of(tmp_path, cache=None, **options):
    defaults = {"sources": [f"made:{LENGTHS}"], "batch_size": 4, "batch_length": 5}
    if options.get("windows") == "episode":
        defaults["batch_length"] = 4
    cache = cache or tmp_path / "cache"
    return ReplayDataModule(**(defaults | options), cache_dir=str(cache), replay_dir=str(tmp_path / "replay"))


def fit(tmp_path, updates=6, resume=None, tasks=(), cache=None, **options):
    module = Watch(updates, options.get("windows", "stream"), tasks)
    data, trainer = data_of(tmp_path, cache, **options), trainer_of(tmp_path)
    if resume is not None:
        trainer.callbacks.append(Resume(data, resume))
        module.count = resume["count"]
    trainer.fit(module, datamodule=data)
    return module, data


class Resume(pl.Callback):
    def __init__(self, data, state):
        self.data, self.state = data, state

    def on_fit_start(self, trainer, pl_module):
        self.data.load_state_dict(self.state["shared"])
        self.data.restore_replay(self.state["folder"])
        self.data.load_rank_state_dict(self.state["rank"])


@pytest.mark.parametrize("windows", ["stream", "episode"])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_resuming_a_stream_of_batches_is_bitwise(tmp_path, windows, prefetch):
    two = [f"made:{LENGTHS}", {"uri": "made:20,30", "weight": [[0, 0.2], [8, 1.5]]}]
    options = {"windows": windows, "sources": two, "prefetch": prefetch, "cache": tmp_path / "cache"}
    whole, _ = fit(tmp_path / "whole", 10, **options)
    part, data = fit(tmp_path / "source", 6, **options)
    state = {"shared": data.state_dict(), "rank": data.rank_state_dict(), "folder": tmp_path / "saved"}
    torch.save(state["rank"], tmp_path / "rank.pt")
    torch.load(tmp_path / "rank.pt", weights_only=True)
    data.snapshot_replay(state["folder"])
    state["count"] = getattr(part, "count", 0)
    rest, _ = fit(tmp_path / "rest", 4, state, **options)
    seen = part.seen + rest.seen
    assert len(seen) == len(whole.seen) == 10
    for a, b in zip(whole.seen, seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("early", [False, True])
def test_the_state_alone_goes_on_with_the_same_batches(tmp_path, early):
    """Without the snapshot, as with any other checkpoint callback; TD-MPC2 has no latents to lose."""
    options = {"windows": "episode", "cache": tmp_path / "cache"}
    whole, _ = fit(tmp_path / "whole", 9, **options)
    _, data = fit(tmp_path / "source", 5, **options)
    state = data.state_dict()

    class Load(pl.Callback):
        def on_fit_start(self, trainer, module):
            if not early:
                trainer.datamodule.load_state_dict(state)

    rest, again = Watch(4, "episode"), data_of(tmp_path / "rest", tmp_path / "cache", windows="episode")
    if early:
        again.load_state_dict(state)
    trainer = trainer_of(tmp_path)
    trainer.callbacks.append(Load())
    trainer.fit(rest, datamodule=again)
    for a, b in zip(whole.seen[5:], rest.seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_saving_does_not_change_the_batches_that_follow(tmp_path):
    plain, _ = fit(tmp_path / "a", 8, cache=tmp_path / "c")

    class Save(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.datamodule.snapshot_replay(tmp_path / "saved")
            trainer.datamodule.report_batch(2, 4)

    module, data, trainer = Watch(8), data_of(tmp_path / "b", tmp_path / "c"), trainer_of(tmp_path / "b")
    trainer.callbacks.append(Save())
    trainer.fit(module, datamodule=data)
    for a, b in zip(plain.seen, module.seen, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_reports_come_from_held_out_episodes_which_training_never_sees(tmp_path):
    module, data = fit(tmp_path, 40, val_fraction=0.4)
    trained = {int(e) for batch in module.seen for e in batch[0][..., 0].unique()}
    seen = {int(e) for _ in range(20) for e in data.report_batch(4, 3).obs["obs"][..., 0].unique()}
    assert trained
    assert seen
    assert not trained & seen
    assert trained | seen <= set(range(8))


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_losses_on_held_out_episodes_are_logged_and_change_nothing(tmp_path, kind):
    windows = {"windows": "episode", "batch_length": 4} if kind is TDMPC2Module else {}
    more = {"episodic": True} if windows else {"imag_length": 3}

    class Keep(pl.loggers.CSVLogger):
        def log_metrics(self, metrics, step=None):
            logged.append((step, {k: v for k, v in metrics.items() if k.startswith("val/")}))

    weights = []
    for held, check in ((0.0, 3), (0.4, 100), (0.4, 3)):
        logged = []
        data = data_of(tmp_path / f"{held}{check}", tmp_path / "cache", batch_size=4,
                       sources=["made:40,50,60,40,30"], val_fraction=held, **windows)  # fmt: skip
        torch.manual_seed(0)
        module = kind(data.spaces, preset="debug", log_every=1000, seed=3, **more)
        trainer = pl.Trainer(
            accelerator="cpu", logger=Keep(tmp_path), enable_checkpointing=False, enable_progress_bar=False,
            max_steps=6, enable_model_summary=False, default_root_dir=tmp_path, val_check_interval=check,
            check_val_every_n_epoch=None, num_sanity_val_steps=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        weights.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))
        seen = [(step, losses) for step, losses in logged if losses]
        assert [step for step, _ in seen] == ([3, 6] if held and check == 3 else [])
        data.close()
    names = ("reward", "consistency", "value") if windows else ("rew", "obs", "dyn")
    assert seen[0][1].keys() >= {f"val/loss/{name}" for name in names}
    assert torch.equal(weights[1], weights[2])  # looking changes nothing
    assert not torch.equal(weights[0], weights[1])


def test_tasks_of_sources_reach_the_batch(tmp_path):
    tasks = [type("Task", (), {"name": name}) for name in ("walk", "run", "jump")]
    two = [{"uri": "made:9,9", "task": "jump"}, {"uri": "made:8,8", "task": 1}]
    module, _ = fit(tmp_path, 3, windows="episode", sources=two, tasks=tasks)
    batch = module.batch
    assert torch.equal(batch.task, torch.where(batch.info["source"] == 0, 2, 1))
    with pytest.raises(ConfigError, match="task 'walc' is unknown; did you mean 'walk'"):
        fit(tmp_path / "2", 1, windows="episode", sources=[{"uri": "made:9", "task": "walc"}], tasks=tasks)
    with pytest.raises(ConfigError, match="The model has one task"):
        fit(tmp_path / "3", 1, windows="episode", sources=[{"uri": "made:9", "task": "walk"}])


def test_demonstrations_beside_an_environment(tmp_path):
    """The robot's own observations are not the made ones: a source of its spaces is written first."""
    from datamodules.cache import write_rows
    from datamodules.episodes import Episode, Schema, Source

    spaces = read_spaces("Pendulum-v1")

    class Demo(Source):
        files, meta, schema = [], {}, Schema(spaces)

        def episodes(self):
            end = np.arange(30) == 29
            obs, action = np.full((31, 3), 7.0), np.full((30, 1), 0.5)
            yield Episode({"obs": obs}, {"action": action}, np.ones(30), end & False, end, "demo")

    write_rows(Demo(), tmp_path / "rows")

    class Robot(Watch):
        def policy(self, obs, state, is_first, mode="train"):
            action, state = super().policy(obs, state, is_first, mode)
            return {"action": action["action"][:, :1]}, state

    data = ReplayDataModule(
        "Pendulum-v1", sources=[f"rows:{tmp_path / 'rows'}"], env_weight=[[0, 0], [5, 3]], batch_size=4,
        batch_length=5, capacity=500, train_ratio=20, replay_dir=str(tmp_path / "replay"), num_envs=2,
    )  # fmt: skip
    module = Robot(12)
    trainer_of(tmp_path).fit(module, datamodule=data)
    for update, batch in enumerate(module.seen):
        part, demo = batch[-2], (batch[0] == 7).all(-1).all(-1)
        assert torch.equal(part == 0, demo)
        env = 3 * min(update, 5) / 5
        assert abs((part == 1).sum() - 4 * env / (1 + env)) < 1
    assert data.env_steps > 20
    metrics = data.pop_metrics()
    assert metrics["replay/share/env"] == (module.seen[-1][-2] == 1).float().mean()
    assert metrics["replay/share/env"] + metrics["replay/share/source0"] == 1
    data.close()


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_both_models_learn_from_a_dataset_alone(tmp_path, kind):
    windows = {"windows": "episode", "batch_length": 4} if kind is TDMPC2Module else {}
    data = data_of(tmp_path, batch_size=8, sources=["made:40,40,40"], **windows)
    more = {"episodic": True} if windows else {"imag_length": 3, "lr": 1e-3, "warmup": 0}
    module = kind(data.spaces, preset="debug", log_every=1000, **more)
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, max_steps=40,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    losses = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            losses.append(module.pop_metrics()[f"train/loss/{'reward' if windows else 'rew'}"])

    trainer.callbacks.append(Keep())
    trainer.fit(module, datamodule=data)
    assert module.updates == 40
    assert np.mean(losses[-5:]) < 0.97 * np.mean(losses[:5])
    data.close()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sources": None}, ConfigError, "nothing to train on"),
        ({"sources": {"uri": "made:9"}}, ConfigError, "expected a list"),
        ({"sources": ["npz:x?drop=a", "b"]}, ConfigError, r"comma .*\n.*quotes: .*'\[\"npz:x\?drop=a,b\"\]'"),
        ({"sources": ["npz:x?drop=a", "b", "c", "made:9"]}, ConfigError, r"'\[\"npz:x\?drop=a,b,c\"\]'"),
        ({"sources": ["made:9?width=2", "b.npz"]}, ConfigError, "^'b.npz' is no source"),
        ({"sources": ["made:9?width=2", "demos/b"]}, ConfigError, "^'demos/b' is no source"),
        ({"sources": [{"uri": "made:9?width=2"}, "b"]}, ConfigError, "^'b' is no source"),
        ({"sources": ["env:Pendulum-v1?x=1", "made:9"], "pad": True}, ConfigError, "leave it out"),
        ({"sources": [{"uri": "env:Pendulum-v1", "reward": {"scale": 2}}]}, ConfigError, "no more"),
        ({"sources": ["made:9"], "stack": 2}, ConfigError, "has no images"),
        (
            {"sources": [{"uri": "made:9", "action_low": -1}]},
            ConfigError,
            "both of action_low and action_high",
        ),
        ({"mix": "half"}, ConfigError, "data.mix is 'half'"),
        ({"val_fraction": 1.0}, ConfigError, "val_fraction is 1.0"),
        ({"uniform_over": "steps"}, ConfigError, "uniform_over is 'steps'"),
        ({"sources": ["made:9", "made:9?width=3"]}, DataError, "different spaces"),
        ({"sources": ["made:9"], "batch_length": 30}, DataError, "there are 10 observations"),
        ({"sources": ["made:9"], "env": "CartPole-v1", "capacity": 200}, DataError, "different spaces"),
    ],
)
def test_what_cannot_work_is_one_clear_error(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        fit(tmp_path, 1, **options)


def test_rewards_that_are_left_out_are_spoken_of(tmp_path):
    """A goal's reward at a last step without a next observation, the usual form of demonstrations."""
    done = np.arange(40) % 8 == 7
    np.savez(tmp_path / "goal.npz", observations=np.zeros((40, 3)), actions=np.zeros((40, 1)),
             rewards=done * 1.0, dones=done)  # fmt: skip
    plain = data_of(tmp_path, sources=f"npz:{tmp_path}/goal.npz")
    with pytest.warns(UserWarning, match="5 episodes are left out.*rewards of 5 \\(0 are left"):
        _ = plain.caches
    ended = {"uri": f"npz:{tmp_path}/goal.npz", "options": {"dones_are": "terminals"}}
    assert data_of(tmp_path, sources=[ended]).caches[0].episodes["return"].tolist() == [1] * 5


def test_an_environment_may_stand_among_the_sources(tmp_path):
    mixed = [f"made:{LENGTHS}", {"uri": "env:Pendulum-v1?num_envs=3&time_limit=50", "weight": 2}]
    assert [spec.uri for spec in data_of(tmp_path, sources="made:9").sources] == ["made:9"]
    data = data_of(tmp_path, sources=mixed, capacity=500)
    assert (data.env, data.num_envs, data.env_options) == ("Pendulum-v1", 3, {"time_limit": 50})
    assert [spec.uri for spec in data.sources] == [f"made:{LENGTHS}"]
    assert data.env_weight.weight == 2
    with pytest.raises(ConfigError, match="a second environment beside CartPole-v1"):
        data_of(tmp_path, env="CartPole-v1", sources=mixed)


@pytest.mark.parametrize("role", ["env", "eval_env"])
def test_demos_in_the_units_of_the_environment_are_scaled_by_its_bounds(tmp_path, role):
    done, actions = np.arange(40) % 8 == 7, np.linspace(-1.9, 1.9, 40)[:, None]
    np.savez(tmp_path / "demos.npz", observations=np.zeros((40, 3)), actions=actions, rewards=done * 1.0,
             next_observations=np.zeros((40, 3)), terminals=done)  # fmt: skip

    class Robot(Watch):
        def policy(self, obs, state, is_first, mode="train"):
            action, state = super().policy(obs, state, is_first, mode)
            return {"action": action["action"][:, :1]}, state

    data = data_of(tmp_path, sources=f"npz:{tmp_path}/demos.npz?last_obs=repeat", capacity=500,
                   **{role: "Pendulum-v1"})  # fmt: skip
    with pytest.warns(UserWarning, match="in Pendulum-v1 it is -2 to 2: taken in those units"):
        trainer_of(tmp_path).fit(Robot(1), datamodule=data)
    rows = data.replay.parts[0].storage.arrays
    np.testing.assert_allclose(rows["action",][rows["valid",]], actions / 2, atol=1e-6)
    data.close()


class Robot(gym.Env):
    """Whose port is open at most once at a time."""

    open, made = False, 0
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-3, 3, (2,), np.float32)

    def __init__(self):
        assert not Robot.open
        Robot.open, Robot.made = True, Robot.made + 1

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}

    def close(self):
        Robot.open = False


def test_a_robot_is_opened_once_at_a_time_and_demos_that_are_left_out_change_no_unit(tmp_path):
    """The actions of episode e are about e / 10 - 2."""
    gym.register("Once-v0", Robot, max_episode_steps=10)
    lengths = ",".join(["6"] * 30)
    demos = {"uri": f"made:{lengths}?bounds=false", "episodes": list(range(12, 30))}
    data = data_of(tmp_path, env="Once-v0", sources=[demos], val_fraction=0.2, capacity=500)
    with pytest.warns(UserWarning, match=r"from -0.8 to 0.\d+, .*in Once-v0 it is -3 to 3: taken as scaled"):
        trainer_of(tmp_path).fit(Watch(1), datamodule=data)
    assert Robot.made == 2  # for its spaces, and to collect
    assert data.replay.parts[0].storage.arrays["action",].min() < -0.5
    data.close()
    assert not Robot.open


def test_an_environment_that_cannot_be_made_is_said_with_what_to_install():
    spec = json.dumps({"id": "Door-v1", "entry_point": "some_robotics.envs:Door"})
    meta, error = {"env_spec": spec}, EnvError("no environment is registered as 'Door-v1'\n  Expected")
    first, needs, fix = why_not("Door-v1", meta | {"requirements": ["mujoco<4"]}, error).splitlines()
    assert first == "no environment is registered as 'Door-v1'"
    assert needs == "  The dataset says that it needs the module some_robotics, mujoco<4."
    assert fix == "  Install what you trust of it, and say --data.eval_env some_robotics:Door-v1"
    said = why_not("mine:Env-v0", {}, EnvError("cannot import 'mine' for 'mine:Env-v0'"))
    assert said.endswith("--data.eval_env mine:Env-v0")
    mujoco = EnvError('A-v5 needs a package that is not installed: x\n  Fix: pip install "lit-wm[mujoco]"')
    assert why_not("A-v5", meta, mujoco) == str(mujoco)


def test_no_package_is_named_where_none_is_missing():
    """Of a module of nobody else, or for what is wrong otherwise, the error itself says what to do."""
    with pytest.raises(EnvError) as caught:
        read_spaces("dmc:walker_walk", colour=3)
    said = why_not("dmc:walker_walk", {}, caught.value).splitlines()
    assert said == str(caught.value).splitlines()[:2]
    assert "Its options: " in said[1]
    error = EnvError("no environment is registered as 'Lift-v0'\n  Expected a Gymnasium id")
    for entry in ("__main__:Lift", "gymnasium.envs.x:Lift", "lit_wm.envs.x:Lift"):
        assert why_not("Lift-v0", {"env_spec": json.dumps({"entry_point": entry})}, error) == str(error)
    assert why_not("gym:Lift-v0", {}, error) == str(error)


def test_an_environment_for_evaluation_is_found_or_asked_for(tmp_path):
    data = data_of(tmp_path)
    assert data.evaluation_env is None
    with pytest.raises(ConfigError, match="Give data.eval_env.*\n  The first one names none"):
        data.make_envs(1, [0])
    data = data_of(tmp_path)
    data.caches[0].meta["env_id"] = "nothere:Env-v0"
    with pytest.raises(ConfigError, match="cannot import 'nothere' .*\n.* the module nothere\\.\n  Install"):
        data.make_envs(1, [0])
    with pytest.raises(
        DataError, match="Pendulum-v1: obs float32 \\[3\\](.|\n)*\n  Or give .* as data.eval_env"
    ):
        _ = data_of(tmp_path, eval_env="Pendulum-v1").evaluation_env
    like = data_of(tmp_path, sources=["made:9?width=3&actions=1"], eval_env="Pendulum-v1")
    assert like.evaluation_env == "Pendulum-v1"
    assert made_cache(tmp_path / "cache", [int(x) for x in LENGTHS.split(",")]).meta == {}


class Record(pl.Callback):
    """Writes what each process has drawn, while it still lives."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_end(self, trainer, module):
        data = trainer.datamodule
        seen = [batch.obs["obs"].clone() for batch in module.batches]
        held = data.report_batch(4, 3).obs["obs"]
        torch.save({"seen": seen, "held": held}, self.folder / f"rank{trainer.global_rank}.pt")


class Kept(DreamerV3Module):
    """A model that keeps its batches."""

    def training_step(self, ticket, batch_idx):
        self.batches = getattr(self, "batches", [])

        def kept(module):
            self.batches.append(ticket(module))
            return self.batches[-1]

        return super().training_step(kept, batch_idx)


def test_two_processes_draw_different_batches_of_the_same_data(tmp_path):
    from lit_wm.strategy import ReplicatedStrategy

    data = data_of(tmp_path, batch_size=4, sources=["made:40,40,40,40"], val_fraction=0.3)
    module = Kept(data.spaces, preset="debug", log_every=1000, imag_length=3)
    strategy = ReplicatedStrategy(start_method="fork", process_group_backend="gloo")
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy,
        logger=False, callbacks=[Record(tmp_path)], enable_checkpointing=False, enable_progress_bar=False,
        max_steps=3, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
        use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    one, two = (torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in range(2))
    assert len(one["seen"]) == len(two["seen"]) == 3
    for a, b in zip(one["seen"], two["seen"], strict=True):
        assert a.shape == b.shape == (2, 5, 2)
        assert not torch.equal(a, b)
    trained = {int(e) for part in (one, two) for batch in part["seen"] for e in batch[..., 0].unique()}
    held = {int(e) for part in (one, two) for e in part["held"][..., 0].unique()}
    assert not trained & held


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_normalisation_is_fitted_to_training_rows_and_lives_with_the_weights(tmp_path, kind):
    windows = {"windows": "episode", "batch_length": 4} if kind is TDMPC2Module else {}
    more = {"episodic": True} if windows else {"imag_length": 3}
    data = data_of(tmp_path, batch_size=4, sources=["made:40,50,60,40,50,60"], val_fraction=0.3, **windows)

    def fitted(normalize):
        module = kind(data.spaces, preset="debug", log_every=1000, normalize=normalize, seed=3, **more)
        trainer = pl.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            max_steps=2, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
        )  # fmt: skip
        trainer.fit(module, datamodule=data)
        return module, trainer

    module, trainer = fitted(True)
    rows = [(e, t) for e in data.replay.parts[0].storage.chosen for t in range([40, 50, 60][e % 3] + 1)]
    mean, std = np.mean(rows, 0), np.std(rows, 0)
    obs = torch.tensor([[1.0, 20.0], [0.0, 3.0]])
    seen = module.model.obs_dict(obs)["obs"]
    np.testing.assert_allclose(seen, (obs - mean) / std, rtol=1e-5)
    trainer.save_checkpoint(tmp_path / "m.ckpt")
    loaded = kind.load_from_checkpoint(tmp_path / "m.ckpt", weights_only=True)
    assert torch.equal(loaded.model.obs_dict(obs)["obs"], seen)
    if kind is DreamerV3Module:  # what is decoded is in the units of the data
        state = loaded.model.encode(obs)
        inside = loaded.model.normalizer(loaded.model.decode(state))["obs"]
        assert inside.abs().max() < 2
    data.close()
    folder = str(tmp_path / "r")
    online = ReplayDataModule("Pendulum-v1", capacity=500, batch_size=2, batch_length=8, replay_dir=folder)
    module = kind(online.spaces, preset="debug", normalize=True, **more)
    if kind is DreamerV3Module:
        with pytest.raises(ConfigError, match="model.normalize needs data.sources"):
            trainer_of(tmp_path).fit(module, datamodule=online)


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_a_copied_last_observation_is_not_learnt(tmp_path, kind):
    """Its reward and end are, but not how it looks: two copies that differ there give the same loss."""
    np.savez(
        tmp_path / "demo.npz", observations=np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32),
        actions=np.zeros((40, 1), np.float32), rewards=np.arange(40.0), dones=np.arange(40) % 4 == 3,
    )  # fmt: skip
    windows = {"windows": "episode", "batch_length": 4} if kind is TDMPC2Module else {}
    more = {"episodic": True} if windows else {"imag_length": 3}
    source = {"uri": f"npz:{tmp_path}/demo.npz", "options": {"dones_are": "terminals"}}
    data = data_of(tmp_path, batch_size=8, sources=[source], **windows)
    module = kind(data.spaces, preset="debug", log_every=1000, **more)
    batches = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, ticket, batch_idx):
            batches.append(ticket(module))

    trainer = trainer_of(tmp_path)
    trainer.callbacks.append(Look())
    trainer.fit_loop.max_epochs, trainer.fit_loop.epoch_loop.max_steps = 1, 2
    trainer.fit(module, datamodule=data)
    batch = batches[0]
    assert batch.fake.any()
    assert torch.equal(batch.fake, batch.is_last)  # every episode of this set lacks its last observation
    copied = batch.obs["obs"][batch.fake]
    before = batch.obs["obs"][:, :-1][batch.fake[:, 1:]]
    assert len(before) <= len(copied)
    assert all(any(torch.equal(x, y) for y in copied) for x in before)
    other = torch.where(batch.fake.unsqueeze(-1), 5.0, batch.obs["obs"])

    def losses(obs, fake):
        given, noise = replace(batch, obs={"obs": obs}, fake=fake), NoiseStreams(0)
        if kind is TDMPC2Module:
            return [module.model.model_loss(given, noise).losses["consistency"]]
        found = module.model.loss(given, module.model.initial(8), noise).losses
        return [found[k] for k in ("obs", "dyn", "rep")]

    for fake, equal in ((batch.fake, True), (None, False)):
        pairs = zip(losses(batch.obs["obs"], fake), losses(other, fake), strict=True)
        assert all(torch.equal(x, y) for x, y in pairs) == equal


def test_the_names_of_a_sources_tasks_find_those_of_the_model():
    from datamodules.data import task_number
    from datamodules.selection import SourceSpec

    model = [type("Task", (), {"name": name}) for name in ("c", "b", "a")]

    def number(task, said=None, own=None, tasks=model):
        cache = type("Cache", (), {"meta": {"tasks": said} if said else {}})
        return task_number(SourceSpec("x:y", task=task), cache, tasks, own)

    assert number(None, ["a", "b"]).tolist() == [2, 1]
    assert number("b", ["a"]) == 1
    assert number(0) == 0
    assert number(None, own=2) == 2
    assert number(None, tasks=[]) is None
    with pytest.raises(ConfigError, match="x:y has the tasks d, which the model lacks"):
        number(None, ["a", "d"])
    with pytest.raises(ConfigError, match="does not say which of the model's tasks it is"):
        number(None)


def test_a_time_limit_of_the_suite_ends_nothing_in_a_dataset(tmp_path):
    """Atari's rule that a time limit is a terminal is the environment's own."""
    from datamodules.views import dreamer_view

    rows = {
        "is_init": torch.zeros(2, 4, 1, dtype=torch.bool), "valid": torch.ones(2, 4, 1, dtype=torch.bool),
        "next": {
            "reward": torch.zeros(2, 4, 1), "terminated": torch.zeros(2, 4, 1, dtype=torch.bool),
            "truncated": torch.tensor([[0, 1, 0, 0], [0, 1, 0, 0]], dtype=torch.bool)[..., None],
        },
        "observation": torch.zeros(2, 3, 1), "action": torch.zeros(2, 4, 1),
        "index": torch.zeros(2, 4), "generation": torch.zeros(2, 4),
    }  # fmt: skip
    ended = dreamer_view(rows, 1, torch.tensor([False, True])).is_terminal
    assert ended.tolist() == [[False, False, False], [False, True, False]]


def test_sources_are_read_by_name_and_each_with_its_own_options(tmp_path):
    """The same file twice, with other observations dropped, and one with observations in another order."""
    ends, rng = np.arange(20) % 10 == 9, np.random.default_rng(0)
    made = {"actions": rng.uniform(-1, 1, (20, 1)), "terminations": ends, "truncations": ends & False}
    made |= {"observations/a": rng.random((20, 3)), "observations/b": rng.random((20, 2))}
    for name, columns in (("x", made), ("y", dict(reversed(made.items())))):
        np.savez(tmp_path / f"{name}.npz", rewards=np.ones(20), **columns)
    x, y = (f"npz:{tmp_path}/{name}.npz?last_obs=repeat" for name in "xy")
    twice = data_of(tmp_path, sources=[{"uri": x, "options": {"drop": "a"}}, x])
    with pytest.raises(DataError, match=r"first in 'a':\n.*\(source 0\): b .*\n.*\(source 1\): a .* b "):
        _ = twice.spaces
    with pytest.raises(DataError, match="has the vectors b, which do not fill a, b"):
        CacheRows(twice.caches[0], tmp_path / "r", model_spaces(twice.caches[1]), np.arange(2), SourceSpec(x))
    turned = data_of(tmp_path, sources=[x, y])
    spaces = Spaces.from_plain(turned.spaces)
    assert list(spaces.obs) == ["a", "b"]
    assert list(turned.caches[1].schema.spaces.obs) == ["b", "a"]
    rows = CacheRows(turned.caches[1], tmp_path / "rows", spaces, np.array([1]), SourceSpec(y), lead=0)
    seen = rows.get(torch.arange(10)[None])["observation"]
    for name in "ab":
        np.testing.assert_array_equal(seen[name][0], made[f"observations/{name}"][10:].astype(np.float32))
    rows.close()
