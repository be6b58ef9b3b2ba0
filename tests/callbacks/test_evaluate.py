"""Evaluation episodes: counted fairly, repeatable, and their windows are what happened."""

import numpy as np
import pytest
import tiny
import torch

from lit_wm.callbacks.evaluate import (
    EpisodeResults,
    Evaluate,
    _gather,
    confidence_interval,
    run_episodes,
    write_episodes,
)
from lit_wm.callbacks.video import DreamVideo
from lit_wm.envs import make_vector_env
from lit_wm.errors import ConfigError
from lit_wm.types import State


class Remember:
    """A policy on CartPole whose latent is a digest of all it has seen in this episode."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, obs, state, is_first):
        past = torch.zeros(len(is_first), 1) if state is None else state.deter
        deter = 0.5 * torch.where(is_first[:, None], 0.0, past) + obs["obs"].sum(-1, keepdim=True)
        action = {"action": torch.randint(0, 2, (len(is_first),), generator=self.generator)}
        return action, State(deter, action=action)


def play(episodes=7, num_envs=3, seed=5, **options):
    env = make_vector_env("CartPole-v1", num_envs, list(range(num_envs)))
    try:
        return run_episodes(Remember(), env, episodes, seed, **options)
    finally:
        env.close()


def test_the_same_seed_gives_the_same_episodes():
    first, second, other = play(), play(), play(seed=6)
    assert first.returns == second.returns
    assert first.returns != other.returns


def test_exactly_the_wanted_episodes_are_counted_and_cartpole_pays_one_per_step():
    results = play(episodes=7, num_envs=3)
    assert len(results.returns) == len(results.lengths) == len(results.terminated) == 7
    assert results.returns == [float(n) for n in results.lengths]
    assert all(results.terminated)


def test_each_environment_plays_its_share_however_long_its_episodes_are():
    class Lengths:  # environment 0 ends after 2 steps, environment 1 after 20
        num_envs = 2

        def reset(self, seed=None, options=None):
            mask = np.ones(2, bool) if options is None else options["reset_mask"]
            self.steps = np.where(mask, 0, self.steps if options else 0)
            return {"obs": np.zeros((2, 4), np.float32)}, {}

        def step(self, action):
            self.steps = self.steps + 1
            done = self.steps >= np.array([2, 20])
            obs = {"obs": np.zeros((2, 4), np.float32)}
            return obs, np.ones(2), done, np.zeros(2, bool), {}

    results = run_episodes(Remember(), Lengths(), 4, seed=0)
    assert sorted(results.lengths) == [2, 2, 20, 20]


def test_long_episodes_are_cut_and_counted_as_truncated():
    results = play(episodes=2, num_envs=2, max_steps=3)
    assert results.lengths == [3, 3]
    assert not any(results.terminated)
    assert results.cut == [True, True]
    assert results.summary()["eval/cut"] == 2
    assert not any(play(episodes=2, num_envs=2).cut)


def test_asked_to_stop_it_ends_with_what_is_finished():
    asked = iter(range(10_000))
    results = play(episodes=50, num_envs=2, stop=lambda: next(asked) == 60)
    assert 1 <= len(results.returns) < 50


def test_recorded_rows_replay_in_a_fresh_environment(tmp_path):
    results = play(episodes=2, num_envs=1, record=True)
    rows = results.rows[0]
    assert len(rows["reward"]) == results.lengths[0] + 1
    assert rows["reward"][0] == 0
    assert rows["reward"].sum() == results.returns[0]
    assert rows["terminated"][-1]
    assert not rows["terminated"][:-1].any()
    env = make_vector_env("CartPole-v1", 1, [0])
    obs, _ = env.reset(seed=[5])
    for t in range(results.lengths[0]):
        np.testing.assert_array_equal(obs["obs"][0], rows["obs/obs"][t])
        obs, *_ = env.step({"action": rows["action/action"][t : t + 1]})
    np.testing.assert_array_equal(obs["obs"][0], rows["obs/obs"][-1])
    env.close()
    with np.load(write_episodes(tmp_path / "episodes.npz", results.rows), allow_pickle=False) as data:
        assert list(np.bincount(data["episode"])) == [n + 1 for n in results.lengths]
    assert [p.name for p in tmp_path.iterdir()] == ["episodes.npz"]


def test_windows_are_cut_from_the_episodes_and_carry_the_state_before_them():
    results = play(episodes=6, num_envs=2, windows=50, window_length=8, record=True)
    windows = results.windows
    episodes = {tuple(r["obs/obs"][0]): r for r in results.rows}
    starts = 0
    for w in range(len(windows)):
        count = int(windows.valid[w].sum())
        assert windows.valid[w, :count].all()
        obs = windows.obs["obs"][w, :count].numpy()
        rows, at = find(obs, episodes.values())
        before = np.zeros(1, np.float32)
        for t in range(at):  # what Remember would have in mind
            before = (0.5 * before + rows["obs/obs"][t].sum()).astype(np.float32)
        np.testing.assert_allclose(windows.carry.deter[w].numpy(), before, rtol=1e-5, atol=1e-6)
        actions = np.concatenate([[0], rows["action/action"][:-1]])[at : at + count]
        np.testing.assert_array_equal(windows.prev_action["action"][w, :count].numpy(), actions)
        assert windows.is_first[w, 0] == (at == 0)
        assert not windows.is_first[w, 1:].any()
        starts += at == 0
    assert starts == 6
    assert int(windows.valid.sum()) == sum(n + 1 for n in results.lengths)  # every row in one window


def find(obs, episodes):
    """The episode and row where ``obs`` begins."""
    for rows in episodes:
        for at in range(len(rows["reward"]) - len(obs) + 1):
            if np.array_equal(rows["obs/obs"][at : at + len(obs)], obs):
                return rows, at
    raise AssertionError("the window is in no episode")


def test_no_more_windows_are_kept_than_wanted_and_full_ones_come_first():
    windows = play(episodes=6, num_envs=2, windows=3, window_length=8).windows
    assert len(windows) == 3
    assert windows.valid.all()


def test_summary_has_an_interval_from_five_episodes_on():
    five = EpisodeResults([0.0, 1.0, 2.0, 3.0, 4.0], [10] * 5, [True] * 5).summary()
    assert 0 < five["eval/return_low"] < 2 < five["eval/return_high"] < 4
    summary = EpisodeResults([1.0, 3.0], [10, 30], [True, True]).summary()
    assert summary["eval/return"] == 2
    assert summary["eval/length"] == 20
    assert summary["eval/return_std"] == pytest.approx(2**0.5)
    assert "eval/return_low" not in summary
    assert set(EpisodeResults([1.0], [10], [True]).summary()) == {
        "eval/episodes",
        "eval/return",
        "eval/length",
        "eval/terminated",
    }


def test_success_is_the_last_steps_and_silence_counts_as_failure_once_anything_was_said():
    summary = EpisodeResults(
        [1.0] * 4, [10] * 4, [True] * 4, [False] * 4, [True, None, True, False]
    ).summary()
    assert summary["eval/success"] == 0.5
    assert "eval/success" not in EpisodeResults([1.0], [10], [True], [False], [None]).summary()


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_the_robots_success_is_read_from_its_environment(vectorization):
    def ahead(obs, state, is_first):  # full speed, turning to the goal's side
        turn = (2 * obs["obs"][:, 7]).clamp(-1, 1)
        return {"action": torch.stack([torch.ones_like(turn), turn], 1)}, State(obs["obs"])

    env = make_vector_env("lit_wm/LidarRobot-v0", 3, [0, 1, 2], vectorization, obstacles=0)
    try:
        results = run_episodes(ahead, env, 6, seed=0, max_steps=60)
    finally:
        env.close()
    assert results.success == [value == 1 for value in results.returns] == results.terminated
    assert any(results.success)


class Quiet:
    """An environment that reports success only in the episodes of its second copy."""

    num_envs = 2

    def reset(self, seed=None, options=None):
        return {"obs": np.zeros((2, 4), np.float32)}, {}

    def step(self, action):
        info = {"success": np.array([0.0, 1.0]), "_success": np.array([False, True])}
        return {"obs": np.zeros((2, 4), np.float32)}, np.ones(2), np.ones(2, bool), np.zeros(2, bool), info


def test_what_one_environment_reports_is_not_taken_for_the_others():
    assert run_episodes(Remember(), Quiet(), 4, seed=0).success == [None, None, True, True]


def test_progress_counts_episodes_and_the_decisions_of_those_that_count():
    told = []
    results = play(episodes=5, num_envs=2, progress=lambda *counts: told.append(counts))
    assert told[-1] == (5, sum(results.lengths))
    assert told == sorted(told)


def test_a_seed_that_meets_the_trainings_episodes_is_refused(make_trainer):
    data = tiny.TinyData()
    trainer = make_trainer(Evaluate(), max_steps=1)
    for seed in (1_000_000, 1_500_003):
        data.seed = seed
        with pytest.raises(ConfigError, match=f"--evaluate.seed {seed + 1_000_000}"):
            trainer.fit(tiny.TinyModule(), data)
    data.seed = 0
    trainer.fit(tiny.TinyModule(), data)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(3)
    hits = 0
    for _ in range(200):
        low, high = confidence_interval(rng.normal(10, 2, 40))
        hits += low <= 10 <= high
    assert 0.88 <= hits / 200 <= 0.99


class Swings:
    """Two environments whose episodes last 3 and 1 decisions; the actions are given."""

    num_envs = 2

    def reset(self, seed=None, options=None):
        self.steps = 0 if options is None else self.steps
        return {"obs": np.zeros((2, 1), np.float32)}, {}

    def step(self, action):
        self.steps += 1
        done = np.array([self.steps % 3 == 0, True])
        return {"obs": np.zeros((2, 1), np.float32)}, np.ones(2), done, np.zeros(2, bool), {}


def test_jitter_is_the_mean_change_within_an_episode_in_half_ranges():
    given = iter([[0.0, 1.0], [0.5, -1.0], [3.0, 0.0], [-1.0, -1.0], [-1.0, -1.0], [0.0, -1.0]])

    def policy(obs, state, is_first):
        action = next(given)
        return {
            "arm": torch.tensor([action, [9.0, 9.0]]),
            "leg": torch.zeros(2, 2),
            "grip": torch.randint(0, 5, (2,)),
        }, State(torch.zeros(2, 1))

    results = run_episodes(policy, Swings(), 4, seed=0)
    # Episode 1: (0.5 + 2) / 4 and, 3 being clipped to 1, (0.5 + 1) / 4; episode 2: 0 and 1 / 4.
    assert results.jitter == [0.5, 0.125, None, None]
    assert results.summary()["eval/jitter"] == 0.3125


def test_discrete_actions_do_not_jitter():
    results = play(episodes=3)
    assert results.jitter == [None] * 3
    assert "eval/jitter" not in results.summary()


def test_a_model_that_does_not_decode_is_played_without_dreams(make_trainer, recwarn, tmp_path):
    evaluate, module = Evaluate(episodes=2), tiny.TinyModule()
    module.model.decodes, module.model.decode = False, None
    make_trainer(evaluate, DreamVideo()).validate(module, tiny.TinyData())
    assert len(evaluate.results.returns) == 2
    assert evaluate.results.windows is None
    assert evaluate.errors == {}
    assert not [w for w in recwarn if "dream" in str(w.message)]
    assert not list(tmp_path.rglob("*.gif"))


def test_what_two_processes_saw_is_brought_together():
    one = EpisodeResults([1.0, 2.0], [3, 4], [True, False], [False, False], [None, True], [0.25, None])

    class Trainer:
        class strategy:
            root_device = "cpu"

            @staticmethod
            def all_gather(table):
                return torch.stack([table, table])

    both = _gather(one, 3, Trainer)
    assert both.returns == [1.0, 2.0, 1.0, 2.0]
    assert both.success == [None, True, None, True]
    assert both.jitter == [0.25, None, 0.25, None]
    assert both.summary()["eval/jitter"] == 0.25
