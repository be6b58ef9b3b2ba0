import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from scipy.stats import kstest

from datamodules.collect import Collector
from datamodules.replay import RowReplay
from lit_wm.envs import make_vector_env
from lit_wm.types import Spaces, Spec, State

LATENTS = {"deter": Spec("float32", (4,)), "stoch": Spec("uint8", (2,), classes=3)}
CARTPOLE = Spaces({"obs": Spec("float32", (4,))}, {"action": Spec("int32", (), 2)})


class Policy:
    """Recurrent and random: the action depends on all observations of the episode and on noise."""

    def __init__(self, seed=0):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, obs, state, is_first):
        x = obs["obs"]
        before = torch.zeros(len(x), 4) if state is None else torch.where(is_first[:, None], 0.0, state.deter)
        deter = 0.5 * before + x
        noise = torch.rand(len(x), generator=self.generator)
        action = {"action": (deter[:, 2] + 0.1 * (noise - 0.5) > 0).to(torch.int32)}
        stoch = torch.nn.functional.one_hot(
            (deter[:, :2] > 0).long() + (noise > 0.5).long()[:, None], 3
        ).float()
        return action, State(deter, stoch, action)


def collector(tmp_path, env, spaces=CARTPOLE, **options):
    replay = RowReplay(spaces, 3000, env.num_envs, tmp_path, LATENTS, 9)
    return Collector(env, spaces, replay, **options)


def cartpoles(mode, num_envs=3):
    make = [lambda: gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 40) for _ in range(num_envs)]
    return SyncVectorEnv(make, autoreset_mode=mode)


def rows_of(replay):
    """Every live row of every stream, by column."""
    storage = replay.storage
    index = np.concatenate(
        [storage.rows(s, np.arange(storage.tail[s], storage.head[s])) for s in range(storage.streams)]
    )
    return dict(storage.get(torch.from_numpy(index)).flatten_keys(".").items())


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


def test_the_three_autoreset_modes_give_identical_rows(tmp_path):
    rows = {}
    for mode in AutoresetMode:
        loop = collector(tmp_path / mode.name, cartpoles(mode), seed=7, prefill=50)
        policy = Policy()
        for _ in range(200):
            loop.collect(policy)
        rows[mode] = rows_of(loop.replay)
        assert loop.episodes > 6
        assert loop.env_steps == len(loop.replay) == 600 + loop.episodes
    assert_equal(rows[AutoresetMode.DISABLED], rows[AutoresetMode.NEXT_STEP])
    assert_equal(rows[AutoresetMode.DISABLED], rows[AutoresetMode.SAME_STEP])


def test_rows_are_those_of_a_plain_loop_over_single_environments(tmp_path):
    loop = collector(tmp_path, cartpoles(AutoresetMode.DISABLED, 2), seed=3, rank=1)
    policy = Policy()
    for _ in range(150):
        loop.collect(policy)
    rows = rows_of(loop.replay)
    for stream in range(2):
        env = gym.wrappers.TimeLimit(gym.make("CartPole-v1").unwrapped, 40)
        mine = (torch.cumsum(rows["is_init"].flatten(), 0) >= 0).nonzero().flatten()
        head = int(loop.replay.storage.head[0])
        mine = mine[:head] if stream == 0 else mine[head:]
        obs, _ = env.reset(seed=3 + 10_000 + stream)
        first, ends = True, set()
        for row in mine.tolist():
            assert rows["observation"][row].tolist() == obs.tolist()
            assert bool(rows["is_init"][row]) == first
            if not rows["valid"][row]:
                assert rows["action"][row] == 0
                assert rows["latent.stoch"][row].tolist() == [255, 255]
                (obs, _), first = env.reset(), True
                continue
            if row == mine[-1]:
                break
            obs, reward, terminated, truncated, _ = env.step(int(rows["action"][row]))
            assert rows["next.reward"][row] == reward
            assert (bool(rows["next.terminated"][row]), bool(rows["next.truncated"][row])) == (
                terminated,
                truncated,
            )
            assert bool(rows["valid"][row + 1]) == (not (terminated or truncated))
            first = False
            ends |= {(terminated, truncated)}
        assert (True, False) in ends


def test_latents_and_steps_follow_the_episodes(tmp_path):
    loop = collector(tmp_path, cartpoles(AutoresetMode.DISABLED, 1))
    policy = Policy()
    for _ in range(120):
        loop.collect(policy)
    rows = rows_of(loop.replay)
    deter = torch.zeros(4)
    for i in range(len(loop.replay)):
        if not rows["valid"][i]:
            continue
        if rows["is_init"][i]:
            deter, step = torch.zeros(4), 0
        deter = 0.5 * deter + rows["observation"][i]
        assert torch.equal(rows["latent.deter"][i], deter)
        assert int(rows["step"][i]) == step
        step += 1
    assert rows["episode"].tolist() == (torch.cumsum(rows["is_init"].flatten(), 0) - 1).tolist()
    returns, lengths = zip(*loop.finished, strict=True)
    assert (
        returns == lengths == tuple(((rows["episode"] == e).sum() - 1).item() for e in range(loop.episodes))
    )


def test_prefill_acts_at_random_and_the_policy_learns_of_it(tmp_path):
    seen = []

    def always_one(obs, state, is_first):
        seen.append(None if state is None else state.action["action"].clone())
        n = len(is_first)
        action = {"action": torch.ones(n, dtype=torch.int32)}
        return action, State(torch.zeros(n, 4), torch.zeros(n, 2, 3), action)

    loop = collector(tmp_path, cartpoles(AutoresetMode.DISABLED), prefill=90)
    for _ in range(60):
        loop.collect(always_one)
    rows = rows_of(loop.replay)
    head = int(loop.replay.storage.head[0])
    taken = rows["action"][:head][rows["valid"].flatten()[:head]]
    assert 0 < taken[:25].sum() < 25
    assert taken[31:].all()
    told = torch.stack(seen[1:])[:, 0]
    assert torch.equal(told, taken[: len(told)])


def test_random_actions_reach_the_policy_on_its_own_device(tmp_path):
    """The policy hands actions out on the CPU and keeps them where it computes; meta stands for a GPU."""
    seen = []

    def policy(obs, state, is_first):
        seen.extend([] if state is None else [state.action["action"]])
        action = {"action": torch.ones(len(is_first), dtype=torch.int32)}
        kept = {"action": action["action"].to("meta", torch.int64)}
        return action, State(torch.zeros(len(is_first), 4), torch.zeros(len(is_first), 2, 3), kept)

    loop = collector(tmp_path, cartpoles(AutoresetMode.DISABLED), prefill=20)
    for _ in range(3):
        loop.collect(policy)
    assert [(x.device.type, x.dtype) for x in seen] == [("meta", torch.int64)] * 2
    loop.close()


@pytest.mark.parametrize(
    ("env_id", "vectorization"), [("CartPole-v1", "sync"), ("CartPole-v1", "async"), ("Pendulum-v1", "sync")]
)
def test_a_restored_collector_goes_on_bitwise(tmp_path, env_id, vectorization):
    from lit_wm.envs import read_spaces

    spaces = read_spaces(env_id)

    def policy_of(seed):
        generator = torch.Generator().manual_seed(seed)

        def policy(obs, state, is_first):
            x = obs["obs"][:, :3]
            before = (
                torch.zeros(len(x), 4) if state is None else torch.where(is_first[:, None], 0.0, state.deter)
            )
            deter = 0.5 * before + torch.nn.functional.pad(x, (0, 1))
            noise = torch.rand(len(x), 1, generator=generator) + 0.1 * deter[:, :1]
            value = (
                noise * 2 - 1
                if spaces.action["action"].classes is None
                else (noise[:, 0] > 0.5).to(torch.int32)
            )
            action = {"action": value}
            return action, State(deter, torch.zeros(len(x), 2, 3), action)

        return policy, generator

    def fresh(name):
        env = make_vector_env(env_id, 2, [0, 1], vectorization)
        return collector(tmp_path / name, env, spaces, prefill=40)

    whole, part = fresh("whole"), fresh("part")
    policy, generator = policy_of(0)
    for _ in range(70):
        whole.collect(policy)
    policy, generator = policy_of(0)
    for _ in range(33):
        part.collect(policy)
    torch.save(part.state_dict(), tmp_path / "state.pt")
    part.replay.snapshot(tmp_path / "replay-saved")
    noise = generator.get_state()
    for _ in range(5):  # goes on after the checkpoint, then dies
        part.collect(policy)
    part.close()

    resumed = fresh("resumed")
    resumed.replay.restore(tmp_path / "replay-saved")
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    policy, generator = policy_of(1)
    generator.set_state(noise)
    for _ in range(37):
        resumed.collect(policy)
    assert_equal(rows_of(resumed.replay), rows_of(whole.replay))
    one, two = whole.state_dict(), resumed.state_dict()
    for key in ("env_steps", "episodes", "finished", "return", "length"):
        assert one[key] == two[key], key
    whole.close()
    resumed.close()


def test_an_environment_without_snapshot_starts_again_and_its_episodes_are_cut(tmp_path, monkeypatch):
    import lit_wm.envs
    from lit_wm.errors import NotSupported

    def refuse(_):
        raise NotSupported("no exact snapshot of X")

    monkeypatch.setattr(lit_wm.envs, "snapshot_vector_env", refuse, raising=False)
    loop = collector(tmp_path / "a", cartpoles(AutoresetMode.DISABLED))
    policy = Policy()
    for _ in range(10):
        loop.collect(policy)
    with pytest.warns(UserWarning, match="starts new episodes"):
        state = loop.state_dict()
    loop.replay.snapshot(tmp_path / "saved")
    again = collector(tmp_path / "b", cartpoles(AutoresetMode.DISABLED))
    again.replay.restore(tmp_path / "saved")
    again.load_state_dict(state)
    for _ in range(5):
        again.collect(policy)
    rows = rows_of(again.replay)
    head = int(again.replay.storage.head[0])
    assert rows["valid"][:11].flatten().tolist() == [True] * 9 + [False, True]
    assert rows["is_init"][:head].flatten().nonzero().flatten().tolist() == [0, 10]
    assert bool(rows["next.truncated"][8])
    assert not torch.equal(rows["observation"][10], rows["observation"][0]), "the same start again"


def test_any_mix_of_entries_reaches_the_rows(tmp_path):
    from lit_wm.envs import read_spaces

    spaces = read_spaces("lit_wm/Dummy-v0")
    env = make_vector_env("lit_wm/Dummy-v0", 2, [0, 1])
    replay = RowReplay(spaces, 200, 2, tmp_path, None, 5)
    loop = Collector(env, spaces, replay, prefill=10**6)

    def policy(obs, state, is_first):
        assert {k: v.shape[1:] for k, v in obs.items()} == {
            k: torch.Size(s.shape) for k, s in spaces.obs.items()
        }
        action = {
            k: torch.zeros(2, *s.shape, dtype=getattr(torch, s.dtype)) for k, s in spaces.action.items()
        }
        return action, State(torch.zeros(2, 1), None, action)

    for _ in range(60):
        loop.collect(policy)
    rows = rows_of(replay)
    for key, spec in spaces.obs.items():
        column = rows[f"observation.{key}"]
        assert column.dtype == getattr(torch, spec.dtype)
        assert (column != 0).any(), key
    for key, spec in spaces.action.items():
        column = rows[f"action.{key}"]
        if spec.classes is None:
            assert column.min() >= -1
            assert -0.2 < column[rows["valid"].flatten()].mean() < 0.2
        else:
            assert set(column.flatten().tolist()) == set(range(spec.classes))
    means = loop.mean_frames()
    assert means.keys() == {k for k, s in spaces.obs.items() if s.is_image}
    for key, mean in means.items():
        expected = rows[f"observation.{key}"].double().mean(0)
        assert torch.allclose(mean, expected, rtol=0, atol=1e-9)


MIXED = Spaces({"obs": Spec("float32", (1,))}, {"move": Spec("float32", (2,)), "gear": Spec("int32", (), 3)})


class Still(gym.Env):
    """Remembers nothing and never ends; what matters is which action arrived."""

    observation_space = gym.spaces.Dict({"obs": gym.spaces.Box(-1, 1, (1,))})
    action_space = gym.spaces.Dict({"move": gym.spaces.Box(-1, 1, (2,)), "gear": gym.spaces.Discrete(3)})

    def reset(self, *, seed=None, options=None):
        return {"obs": np.zeros(1, np.float32)}, {}

    def step(self, action):
        return {"obs": np.zeros(1, np.float32)}, 0.0, False, False, {}


def constant(obs, state, is_first):
    n = len(obs["obs"])
    action = {"move": torch.full((n, 2), 0.5), "gear": torch.full((n,), 2, dtype=torch.int64)}
    return action, State(torch.zeros(n, 4), torch.zeros(n, 2, 3), action)


def explored(tmp_path, **options):
    envs = SyncVectorEnv([Still] * 4, autoreset_mode=AutoresetMode.DISABLED)
    loop = collector(tmp_path, envs, MIXED, seed=1, **options)
    for _ in range(500):
        loop.collect(constant)
        assert torch.equal(loop._state.action["gear"], torch.from_numpy(loop._action["gear"]))
    rows = rows_of(loop.replay)
    return rows["action.move"], rows["action.gear"]


def test_without_exploration_the_policys_action_is_executed(tmp_path):
    move, gear = explored(tmp_path)
    assert (move == 0.5).all()
    assert (gear == 2).all()


def test_epsilon_replaces_all_keys_of_a_step_by_uniform_actions(tmp_path):
    move, gear = explored(tmp_path, epsilon=0.3)
    random = (move != 0.5).any(-1)
    assert random.float().mean() == pytest.approx(0.3, abs=0.04)  # 2,000 steps: four standard deviations
    assert (gear[~random] == 2).all()
    assert torch.bincount(gear[random].long()).float().div(random.sum()).tolist() == pytest.approx(
        [1 / 3] * 3, abs=0.08
    )
    assert move[random].abs().max() <= 1


def test_action_noise_is_gaussian_on_continuous_actions_and_repeats_with_the_seed(tmp_path):
    move, gear = explored(tmp_path / "a", action_noise=0.2)
    assert (gear == 2).all()
    assert (move - 0.5).mean() == pytest.approx(0, abs=0.02)
    assert (move - 0.5).std() == pytest.approx(0.2, abs=0.01)
    assert torch.equal(move, explored(tmp_path / "b", action_noise=0.2)[0])


def test_within_episodes_the_policy_is_not_asked_while_prefilling(tmp_path):
    """Prefill counts decisions there, and plan and task of the state come along, also through a file."""
    from lit_wm.envs import read_spaces

    seen, options = [], {"obs": ("vector",), "actions": ("continuous", "discrete")}
    spaces = read_spaces("lit_wm/Dummy-v0", **options)

    def planner(obs, state, is_first):
        seen.append(state)
        n = len(is_first)
        plan = torch.zeros(n, 2, 3) if state is None else state.plan + 1
        action = {"continuous": torch.full((n, 2), 0.5), "discrete": torch.full((n,), 2)}
        return action, State(torch.zeros(n, 4), action=action, plan=plan, task=torch.arange(n))

    def fresh(name):
        envs = make_vector_env("lit_wm/Dummy-v0", 4, list(range(4)), **options)
        replay = RowReplay(spaces, 4000, 4, tmp_path / name, window=4, within_episodes=True)
        return Collector(envs, spaces, replay, prefill=800, epsilon=0.1)

    loop, again = fresh("one"), fresh("two")
    for _ in range(200):
        loop.collect(planner)
    assert seen == []
    assert loop.decisions == 800
    loop.replay.snapshot(tmp_path / "rows")
    again.replay.restore(tmp_path / "rows")
    again.load_state_dict(loop.state_dict())  # while there is no state yet
    for _ in range(10):
        loop.collect(planner)
        again.collect(planner)
    assert seen[0] is seen[1] is None
    assert seen[-1].plan[0, 0, 0] == 8
    assert seen[-1].task.tolist() == [0, 1, 2, 3]
    assert loop.decisions == again.decisions == 840 == loop.env_steps - loop.episodes
    rows = rows_of(loop.replay)
    assert loop.terminations == int(rows["next.terminated"].sum()) > 10
    assert loop.terminations < loop.episodes
    planned = (rows["action.continuous"] == 0.5).all(-1) & (rows["action.discrete"] == 2)
    assert 0 < (rows["valid"].flatten() & planned).sum() <= 40
    random = rows["action.continuous"][rows["valid"].flatten() & ~planned]
    assert 800 <= len(random) <= 830
    assert kstest(random.flatten().numpy(), "uniform", args=(-1, 2)).pvalue > 1e-3

    torch.save(loop.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    again.load_state_dict(state)
    assert torch.equal(again._state.plan, loop._state.plan)
    assert torch.equal(again._state.task, loop._state.task)
    assert (again.decisions, again.terminations) == (loop.decisions, loop.terminations)
    for part, names in ((state, ("decisions", "terminations")), (state["state"], ("plan", "task"))):
        for name in names:  # as older versions wrote it
            del part[name]
    again.load_state_dict(state)
    assert again._state.plan is None
    assert again.env_steps == loop.env_steps
