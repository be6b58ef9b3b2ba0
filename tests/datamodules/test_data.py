from fractions import Fraction

import lightning.pytorch as pl
import pytest
import torch

from datamodules import ReplayDataModule
from datamodules.data import TrainRatio
from lit_wm.errors import CheckpointError, ConfigError, NotSupported
from lit_wm.types import Spec, State


class Module(pl.LightningModule):
    """The least that the data module needs, with everything it was given kept."""

    def __init__(self, updates: int | None = None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.automatic_optimization = False
        self.updates, self.seen, self.steps = updates, [], []
        self.generator = torch.Generator().manual_seed(0)

    def latent_specs(self):
        return {"deter": Spec("bfloat16", (4,)), "stoch": Spec("uint8", (2,), classes=3)}

    def policy(self, obs, state, is_first, mode="train"):
        x = obs["obs"].to(torch.bfloat16)
        deter = x if state is None else torch.where(is_first[:, None], x, 0.5 * state.deter + x)
        action = {"action": (torch.rand(len(x), generator=self.generator) > 0.5).to(torch.int32)}
        return action, State(deter, torch.nn.functional.one_hot((x[:, :2] > 0).long(), 3).to(x.dtype), action)

    def training_step(self, ticket, batch_idx):
        batch = ticket(self)
        B, T = batch.reward.shape
        kept = [*batch.obs.values(), *batch.prev_action.values(), batch.reward, batch.is_first, batch.is_last]
        self.seen.append(
            [x.clone() for x in (*kept, batch.is_terminal, batch.carry.deter, batch.carry.stoch)]
        )
        batch.write_back(State(torch.full((B, T, 4), float(len(self.seen))), torch.zeros(B, T, 2, 3)))
        self.optimizers().step()
        data = self.trainer.datamodule
        self.steps.append(data.env_steps)
        if data.exhausted or len(self.seen) == self.updates:
            self.trainer.should_stop = True

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def data_of(tmp_path, **options):
    defaults = {"num_envs": 2, "batch_size": 4, "batch_length": 8, "capacity": 400, "train_ratio": 16}
    return ReplayDataModule("CartPole-v1", **(defaults | options), replay_dir=str(tmp_path / "replay"))


def trainer_of(tmp_path):
    return pl.Trainer(
        accelerator="cpu", max_epochs=-1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip


def fit(tmp_path, updates=None, **options):
    module, data, trainer = Module(updates), data_of(tmp_path, **options), trainer_of(tmp_path)
    trainer.fit(module, datamodule=data)
    return module, data, trainer


@pytest.mark.parametrize("ratio", [16, 37.5, 0.1, 1024, 33.3])
def test_the_train_ratio_is_exact(tmp_path, ratio):
    module, data, _ = fit(tmp_path, max_env_steps=3000 if ratio < 1 else 300, train_ratio=ratio)
    per_step = Fraction(str(ratio)) / (4 * 8)
    ready = data.ratio.ready_at
    assert len(module.seen) == 1 + (data.env_steps - ready) * per_step // 1
    for update, steps in enumerate(module.steps):  # never early, and late by less than one loop
        earliest = ready + -(-update // per_step)
        assert earliest <= steps
        assert update >= 1 + (steps - 4 - ready) * per_step // 1 - 1 or steps - earliest <= 4
    data.close()


def test_whole_numbers_do_not_drift():
    ratio = TrainRatio(Fraction("0.1") / 3)
    ratio.ready_at, served = 7, 0
    for step in range(7, 10**5, 11):
        while ratio.owed(step):
            ratio.done += 1
            served += 1
        assert served == 1 + (step - 7) // 30


def test_training_begins_when_the_replay_is_ready_and_prefilled(tmp_path):
    _, data, _ = fit(tmp_path, updates=1)
    windows = 4 * 8
    assert windows <= data.replay.num_windows <= windows + 4
    data.close()
    _, data, _ = fit(tmp_path, updates=1, prefill=201)
    assert 201 <= data.ratio.ready_at <= 205
    data.close()


def test_resuming_is_bitwise_with_eviction_under_way(tmp_path):
    whole, data, _ = fit(tmp_path / "whole", updates=130, capacity=120)
    assert data.replay.storage.tail.min() > 0
    data.close()
    part, data, _ = fit(tmp_path / "part", updates=71, capacity=120)
    torch.save(
        {"shared": data.state_dict(), "rank": data.rank_state_dict(), "noise": part.generator.get_state()},
        tmp_path / "state.pt",
    )
    data.snapshot_replay(tmp_path / "saved")
    data.close()

    state = torch.load(tmp_path / "state.pt", weights_only=True)
    module, data, trainer = Module(59), data_of(tmp_path / "resumed", capacity=120), trainer_of(tmp_path)
    module.generator.set_state(state["noise"])

    class Resume(pl.Callback):
        def on_fit_start(self, trainer, pl_module):
            data.load_state_dict(state["shared"])
            data.restore_replay(tmp_path / "saved")
            data.load_rank_state_dict(state["rank"])

    trainer.callbacks.append(Resume())
    trainer.fit(module, datamodule=data)
    assert part.steps + module.steps == whole.steps
    together = [x for batch in part.seen + module.seen for x in batch]
    # A write-back numbers its update; the resumed module counts from one again: no carries.
    for i, (a, b) in enumerate(zip(together, (x for batch in whole.seen for x in batch), strict=True)):
        if i // 8 < 71 or i % 8 != 6:
            assert torch.equal(a, b), i
    data.close()


def test_written_back_latents_are_the_next_carry(tmp_path):
    module, data, _ = fit(tmp_path, updates=200, capacity=120, online_queue=False)
    values = torch.cat([batch[-2][:, 0] for batch in module.seen[150:]]).float()
    fresh = values[values == values.round()]
    assert len(fresh) > 0.8 * len(values)
    assert fresh.max() > 140
    data.close()


def test_a_report_does_not_change_what_training_sees(tmp_path):
    one, data, _ = fit(tmp_path / "a", updates=20)
    data.close()

    class Curious(Module):
        def training_step(self, ticket, batch_idx):
            super().training_step(ticket, batch_idx)
            batch = self.trainer.datamodule.report_batch(3, 5)
            assert batch.reward.shape == (3, 5)
            assert batch.write_back is None

    two, data = Curious(20), data_of(tmp_path / "b")
    trainer_of(tmp_path).fit(two, datamodule=data)
    assert all(
        torch.equal(a, b) for x, y in zip(one.seen, two.seen, strict=True) for a, b in zip(x, y, strict=True)
    )
    data.close()


def test_metrics_count_each_episode_once(tmp_path):
    _, data, _ = fit(tmp_path, updates=100)
    finished = list(data.collector.finished)
    metrics = data.pop_metrics()
    assert metrics["train/return"] == metrics["train/length"] == sum(r for r, _ in finished) / len(finished)
    assert metrics["step/episodes"] == len(finished)
    assert metrics["replay/rows"] == len(data.replay)
    assert "train/return" not in data.pop_metrics()
    data.close()


def test_counters_and_mean_frames_survive_without_the_rest(tmp_path):
    _, data, _ = fit(tmp_path, updates=30)
    state, steps = data.state_dict(), data.env_steps
    data.close()
    module, data, trainer = Module(1), data_of(tmp_path), trainer_of(tmp_path)
    data.load_state_dict(state)
    assert data.env_steps == steps
    trainer.fit(module, datamodule=data)
    assert data.env_steps == steps + data.collector.env_steps
    data.close()


def test_another_number_of_processes_is_refused(tmp_path):
    _, data, _ = fit(tmp_path, updates=1)
    with pytest.raises(CheckpointError, match="4 processes, this run has 1"):
        data.load_rank_state_dict(data.rank_state_dict() | {"world_size": 4})
    data.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capacity": -5}, "data.capacity is -5, expected a whole number of 1 or more"),
        ({"num_envs": 0}, "data.num_envs is 0"),
        ({"batch_size": 2.5}, "data.batch_size is 2.5"),
        ({"batch_length": 1}, "data.batch_length is 1, expected a whole number of 2 or more"),
        ({"replay_context": -1}, "data.replay_context is -1, expected a whole number of 0 or more"),
        ({"train_ratio": 0}, "data.train_ratio is 0"),
        ({"train_ratio": float("nan")}, "data.train_ratio is nan"),
        ({"vectorization": "thread"}, "expected 'sync' or 'async'"),
        ({"windows": "episodes"}, "expected 'stream' or 'episode'"),
        ({"windows": "episode", "replay_context": 1, "train_ratio": 32}, "Leave replay_context out"),
        ({"windows": "episode", "capacity": 15, "train_ratio": 32}, "Raise capacity to 16 or more"),
        ({"utd": 0}, "data.utd is 0"),
        ({"utd": 0.5}, "train_ratio is 16, but data.utd, 0.5, counts"),
        ({"windows": "episode"}, "train_ratio is 16, but data.utd, 1, .*\n  Leave train_ratio out"),
        ({"first_updates": 0}, "data.first_updates is 0"),
        ({"capacity": 49}, "Raise capacity to 50 or more"),
        ({"max_env_steps": 20}, "training begins after about 50"),
        ({"max_env_steps": 900, "prefill": 1000}, "training begins after about 1,000"),
    ],
)
def test_bad_values_are_refused_at_once(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        data_of(tmp_path, **options)


def test_the_smallest_capacity_allowed_does_train(tmp_path):
    for context in (1, 3):
        capacity = 4 * 8 + 2 * (8 + context)
        module, data, _ = fit(tmp_path, updates=3, capacity=capacity, replay_context=context)
        assert len(module.seen) == 3
        data.close()


def test_processes_that_cannot_share_are_refused(tmp_path):
    data = data_of(tmp_path, num_envs=3)

    class Two:
        world_size, global_rank, lightning_module = 2, 0, None

    data.trainer = Two()
    with pytest.raises(ConfigError, match="data.num_envs is 3, which 2 processes cannot share"):
        data.setup("fit")


def test_setup_without_a_trainer_says_what_to_call(tmp_path):
    with pytest.raises(ConfigError, match=r"Call trainer\.fit\(model, data\)"):
        data_of(tmp_path).setup("fit")


def test_an_unknown_environment_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="CartPoll"):
        _ = ReplayDataModule("CartPoll-v1").spaces


class Planner(Module):
    """A model without latents: remembers at which decision it was asked and what it learned from."""

    episodic = True

    def __init__(self, updates=None):
        super().__init__(updates)
        self.asked, self.at = [], []

    def latent_specs(self):
        return {}

    def policy(self, obs, state, is_first, mode="train"):
        self.asked.append((self.trainer.datamodule.collector.decisions, state is None))
        plan = torch.zeros(len(is_first), 2, 1) if state is None else state.plan + obs["obs"][:, :1, None]
        action = {"action": (plan[:, 0, 0] + torch.rand(len(plan), generator=self.generator) > 0.5).int()}
        return action, State(obs["obs"], action=action, plan=plan)

    def training_step(self, ticket, batch_idx):
        batch = ticket(self)
        kept = (batch.obs["obs"], batch.prev_action["action"], batch.reward, batch.is_terminal)
        self.seen.append([x.clone() for x in kept])
        self.at.append(self.trainer.datamodule.collector.decisions)
        self.optimizers().step()
        if self.trainer.datamodule.exhausted or len(self.seen) == self.updates:
            self.trainer.should_stop = True


def plan_of(tmp_path, module, **options):
    defaults = {"windows": "episode", "utd": 1, "prefill": 40, "num_envs": 1, "batch_length": 4}
    defaults |= {"capacity": 600, "env_options": {"time_limit": 12}, "train_ratio": 32}
    data = data_of(tmp_path, **(defaults | options))
    return data, trainer_of(tmp_path)


def test_without_random_actions_the_policy_acts_from_the_first_step(tmp_path):
    module = Planner(updates=5)
    data, trainer = plan_of(tmp_path, module, prefill=0, first_updates=1)
    trainer.fit(module, datamodule=data)
    assert module.asked[0] == (0, True)
    assert module.at[:3] == [12, 13, 14]  # the first episode has ended
    data.close()


@pytest.mark.parametrize(("envs", "utd", "first"), [(1, 1, 60), (1, 1, 1), (2, 0.5, 7), (3, 2, 61)])
def test_updates_are_counted_by_decisions(tmp_path, envs, utd, first):
    """The official loop: ``first`` updates at once after ``prefill`` random decisions, then ``utd`` each."""
    module = Planner(updates=first + 40)
    data, trainer = plan_of(tmp_path, module, num_envs=envs, utd=utd, prefill=60, first_updates=first)
    trainer.fit(module, datamodule=data)
    begin = -(-60 // envs) * envs  # whole loops; the first episode has ended by then
    assert module.at[:first] == [begin] * first
    assert all(first + int((at - begin) * utd) > i for i, at in enumerate(module.at))  # never early
    owed = [first + int((at - begin) * utd) for at in module.at]
    late = [owed[i - 1] > i for i in range(1, len(owed)) if module.at[i] > module.at[i - 1]]
    assert not any(late)  # never another step before all that was owed is done
    if envs == utd == 1:
        assert module.at[first:] == list(range(begin + 1, begin + 41))
    assert module.asked[0] == (begin, True)  # the planner is not asked before, and begins anew then
    assert data.collector.decisions == data.collector.env_steps - data.collector.episodes
    data.close()


def test_planning_resumes_bitwise_while_rows_are_overwritten(tmp_path):
    for at in (1, 90):
        whole = Planner(at + 60)
        data, trainer = plan_of(tmp_path / "whole", whole, capacity=100)
        trainer.fit(whole, datamodule=data)
        data.close()
        part = Planner(at)
        data, trainer = plan_of(tmp_path / "part", part, capacity=100)
        trainer.fit(part, datamodule=data)
        state = {"shared": data.state_dict(), "rank": data.rank_state_dict()}
        torch.save(state | {"noise": part.generator.get_state()}, tmp_path / "state.pt")
        data.snapshot_replay(tmp_path / "saved")
        assert (data.replay.storage.tail > 0) == (at == 90)
        data.close()
        state = torch.load(tmp_path / "state.pt", weights_only=True)
        rest = Planner(60)
        data, trainer = plan_of(tmp_path / "rest", rest, capacity=100)
        rest.generator.set_state(state["noise"])

        class Resume(pl.Callback):
            def on_fit_start(self, trainer, pl_module, data=data, state=state):
                data.load_state_dict(state["shared"])
                data.restore_replay(tmp_path / "saved")
                data.load_rank_state_dict(state["rank"])

        trainer.callbacks.append(Resume())
        trainer.fit(rest, datamodule=data)
        assert part.at + rest.at == whole.at
        assert part.asked + rest.asked == whole.asked
        assert all(
            torch.equal(a, b)
            for x, y in zip(part.seen + rest.seen, whole.seen, strict=True)
            for a, b in zip(x, y, strict=True)
        )
        data.close()


def test_a_model_without_termination_head_refuses_episodes_that_end_by_themselves(tmp_path):
    module = Planner(10)
    module.episodic = False
    data, trainer = plan_of(tmp_path, module, env_options={})
    with pytest.raises(ConfigError, match=r"CartPole-v1 ended by itself(.|\n)*model.episodic: true"):
        trainer.fit(module, datamodule=data)
    data.close()


def test_windows_that_do_not_fit_the_model_or_the_ring_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"learns from 'stream'(.|\n)*Set data.windows: stream"):
        fit(tmp_path, updates=1, windows="episode", train_ratio=32)
    module = Planner(1)
    data, trainer = plan_of(tmp_path, module, windows="stream")
    with pytest.raises(ConfigError, match="Set data.windows: episode"):
        trainer.fit(module, datamodule=data)
    data, trainer = plan_of(tmp_path, module, capacity=33, num_envs=2)
    with pytest.raises(ConfigError, match=r"CartPole-v1 has up to 13(.|\n)*Raise capacity to 34 or more"):
        trainer.fit(module, datamodule=data)


def test_a_report_within_episodes_has_their_windows(tmp_path):
    module = Planner(3)
    data, trainer = plan_of(tmp_path, module)
    trainer.fit(module, datamodule=data)
    assert data.report_batch(5, 4).reward.shape == (5, 4)
    with pytest.raises(NotSupported, match="4 rows"):
        data.report_batch(5, 8)
    data.close()


def test_an_environment_that_never_ends_an_episode_is_refused_in_time(tmp_path):
    """There would be nothing to train on, and training would wait for ever."""
    module = Planner(updates=1)
    options = {"env_options": {"time_limit": 90}, "prefill": 20, "max_env_steps": 60}
    data, trainer = plan_of(tmp_path, module, **options)
    data.env = "Pendulum-v1"
    with pytest.raises(ConfigError, match=r"no episode of .* has ended in 60 steps(.|\n)*time_limit"):
        trainer.fit(module, datamodule=data)
    assert data.collector.episodes == 0
    data.close()


def test_several_environments_act_at_random_until_the_first_episode_has_ended(tmp_path):
    """Else an untrained model would plan, and its steps would count as neither kind."""
    module = Planner(updates=3)
    data, trainer = plan_of(tmp_path, module, num_envs=8, prefill=9, env_options={"time_limit": 12})
    trainer.fit(module, datamodule=data)
    begin, fresh = module.asked[0]
    assert fresh
    assert module.at[0] == begin == data.ratio.ready_at > 9
    data.close()
