"""The five verbs, held to one specification for both models and every kind of observation and action.

What is expected is read from the Gymnasium spaces, and worked out from the networks' outputs at the states
that the verbs' documentation names. Parameters are pushed away from their initial values, with which rewards
and values would all be zero; noise is the same in every row.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from lit_wm import create_world_model, run_imagination
from lit_wm.errors import ConfigError, NotSupported
from lit_wm.noise import NoiseStreams
from lit_wm.planners import CEM, Plan, Planner, Random
from lit_wm.types import State

B, H = 3, 4
CAMERA = Box(0, 255, (64, 64, 3), np.uint8)
OBS = {
    "image_hwc": CAMERA,
    "image_chw": Box(0, 255, (3, 64, 64), np.uint8),
    "vector": Box(-20, 20, (5,), np.float32),
    "dict": Dict(goal=Box(-1, 1, (2, 2), np.float32), level=Discrete(3), pose=Box(-1, 1, (3,), np.float32)),
    "dict_with_image": Dict(camera=CAMERA, pose=Box(-1, 1, (3,), np.float32)),
    "discrete": Discrete(4),
}
ACTION = {
    "continuous": Box(-1, 1, (2,), np.float32),
    "discrete": Discrete(5),
    "dict": Dict(gear=Discrete(3), wheel=Box(-1, 1, (2,), np.float32)),
    "multi_discrete": MultiDiscrete([3, 3]),
}
PAIRS = [("dreamerv3", o, a) for o in OBS for a in ACTION]
SEARCHED = ("continuous", "discrete")  # by planners, and by all of TD-MPC2
PAIRS += [("tdmpc2", o, a) for o in OBS for a in SEARCHED if o != "dict_with_image"]
KINDS = pytest.mark.parametrize("kind", ["dreamerv3", "tdmpc2"])


class Constant:
    """Noise that is the same in every row, so that rows can change places: samples are the likeliest class or
    the mean and 0.3 deviations; in the stream ``name`` they are the class ``pick``, or pick - 0.5 of them.
    """

    def __init__(self, name=None, pick=0):
        self.name, self.pick = name, pick

    def exponential(self, name, shape, t=0):
        noise = torch.ones(shape)
        if self.name and name.startswith(self.name):
            noise[..., self.pick] = 1e-12
        return noise

    def normal(self, name, shape, t=0):
        return torch.full(shape, self.pick - 0.5 if self.name and name.startswith(self.name) else 0.3)

    def uniform(self, name, shape, t=0):
        return torch.full(shape, 0.5)


@cache
def built(kind, obs, action, **options):
    if kind == "tdmpc2":
        options |= {"planner": "policy", "episodic": True, "latent_dim": 512 if "image" in obs else 16}
    model = create_world_model(f"{kind}:debug", OBS[obs], ACTION[action], device="cpu", **options)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    if kind == "dreamerv3":  # rewards and values of ordinary size
        for head in (model.model.rew, model.model.val):
            head.output.bias.data = -0.5 * (torch.linspace(-20, 20, 255) - 1).square()
    model.model.noise = Constant()
    return model


@pytest.fixture(params=PAIRS, ids="-".join)
def case(request):
    """Model, B observations and B x H actions of the spaces, by name."""
    kind, obs, action = request.param
    return built(kind, obs, action), drawn(OBS[obs], "obs"), drawn(ACTION[action], "action", H)


def drawn(space, alone, *steps):
    """Samples of a space as tensors (B, *steps, ...) by entry."""
    named = space.spaces if isinstance(space, Dict) else {alone: space}
    out = {}
    for k, leaf in named.items():
        leaf.seed(7)
        count = B * int(np.prod(steps, dtype=int))
        values = torch.from_numpy(np.stack([np.asarray(leaf.sample()) for _ in range(count)]))
        out[k] = values.view(B, *steps, *leaf.shape)
    return out


def bare(entries):
    """What stands alone without its name."""
    return next(iter(entries.values())) if len(entries) == 1 else entries


def every(state):
    """All tensors of a state."""
    return [state.deter, *([] if state.stoch is None else [state.stoch])]


def same(left, right):
    return all(torch.equal(x, y) for x, y in zip(every(left), every(right), strict=True))


def rows(x, index):
    return {k: v[index] for k, v in x.items()}


def at(x, t):
    """Step t of actions."""
    return {k: v[:, t] for k, v in x.items()}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def flat(actions):
    """The only action as the networks of TD-MPC2 read it."""
    (x,) = actions.values()
    return x if x.is_floating_point() else torch.nn.functional.one_hot(x, 5).float()


def feat(state):
    """What all heads of DreamerV3 read."""
    return torch.cat([state.deter, state.stoch.flatten(-2)], -1)


def symexp(x):
    return x.sign() * x.abs().expm1()


def mean_of(logits):
    """Expected value over DreamerV3's 255 bins symexp(-20 ... 20), or TD-MPC2's 101 of symlog -10 ... 10."""
    probs = logits.double().softmax(-1)
    if logits.shape[-1] == 255:
        return (probs @ symexp(torch.linspace(-20, 20, 255).double())).float()
    return symexp(probs @ torch.linspace(-10, 10, 101).double()).float()


def near(x, expected):
    torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-4)


def test_encode_gives_a_state_for_each_row(case):
    model, obs, _ = case
    state = model.encode(obs)
    assert state.deterministic is state.deter
    assert state.deter.shape[0] == B
    assert state.deter.ndim == 2
    if model.model.decodes:  # DreamerV3
        assert state.stochastic.shape[0] == B
        assert torch.equal(state.stoch.sum(-1), torch.ones(state.stoch.shape[:-1]))  # one-hot groups
    else:
        assert state.stochastic is None
    assert all(
        x.dtype == torch.float32 and x.device == model.device and x.isfinite().all() for x in every(state)
    )
    assert same(model.encode(bare(obs)), state)  # without names, as arrays, as float64
    assert same(model.encode({k: v.numpy() for k, v in obs.items()}), state)
    assert same(model.encode({k: v.double() if v.is_floating_point() else v for k, v in obs.items()}), state)
    assert not same(model.encode(rows(obs, [1, 2, 0])), state)


def test_encode_goes_on_from_the_state_unless_an_episode_begins(case):
    model, obs, actions = case
    before, taken, now = model.encode(obs), at(actions, 0), rows(obs, [1, 2, 0])
    gone_on, fresh = model.encode(now, before, taken), model.encode(now)
    mixed = model.encode(now, before, taken, torch.tensor([False, True, False]))
    unlike = {k: -v if v.is_floating_point() else (v + 1) % 3 for k, v in taken.items()}
    others = [
        model.encode(now, before, unlike),
        model.encode(now, State(before.deter + 0.5, before.stoch), taken),
    ]
    if not model.model.decodes:  # TD-MPC2's is what the last observation says
        assert all(same(x, fresh) for x in (gone_on, mixed, *others))
        return
    others.append(model.encode(now, State(before.deter, before.stoch.roll(1, -1)), taken))
    assert same(model.encode(now, before, taken, torch.ones(B, dtype=torch.bool)), fresh)
    for i in range(B):
        assert same(mixed[i], (fresh if i == 1 else gone_on)[i])
        near(model.encode(rows(now, [i]), before[[i]], rows(taken, [i])).deter[0], gone_on.deter[i])
        for other in (fresh, *others):  # the state and the action before matter
            assert (other.deter[i] - gone_on.deter[i]).abs().max() > 1e-4
    before.action = taken  # as act leaves it
    assert same(model.encode(now, before), gone_on)
    before.action = None
    with pytest.raises(ValueError, match="needs the action executed since"):
        model.encode(now, before)


def test_a_state_is_indexed_by_row(case):
    model, obs, _ = case
    state = model.encode(obs)
    for index in (1, slice(1, 3), [2, 0]):
        for whole, part in zip(every(state), every(state[index]), strict=True):
            assert torch.equal(part, whole[index])
    assert model.imagine(state[1:], horizon=2).rewards.shape == (B - 1, 2)


def test_imagine_follows_actions(case):
    model, obs, actions = case
    state = model.encode(obs)
    dream = model.imagine(state, actions)
    assert len(dream.states) == H + 1
    assert same(dream.states[0], state)
    assert all(x.shape[:2] == (B, H + 1) and x.dtype == torch.float32 for x in every(dream.states.stacked))
    assert same(dream.states[-1], dream.states.stacked[:, H])
    assert dream.actions.keys() == actions.keys()
    for k, v in actions.items():
        assert torch.equal(dream.actions[k], v)
        assert dream.actions[k].dtype == (torch.float32 if v.is_floating_point() else torch.int64)
    for x in (dream.rewards, dream.continues):
        assert x.shape == (B, H)
        assert x.dtype == torch.float32
        assert x.device == model.device
    assert dream.rewards.isfinite().all()
    assert dream.rewards.std() > 0
    assert ((dream.continues >= 0) & (dream.continues <= 1)).all()
    # Each step depends on the actions up to it, and on no later one.
    other = {k: torch.cat([v[:, :2], v[:, 2:].roll(1, 0)], 1) for k, v in actions.items()}
    changed = model.imagine(state, other)
    assert torch.allclose(changed.rewards[:, :2], dream.rewards[:, :2], atol=1e-6)
    assert not torch.allclose(changed.rewards[:, 2:], dream.rewards[:, 2:], atol=1e-6)


def test_rewards_and_continues_are_of_the_step_that_is_said(case):
    """Of the states arrived at; TD-MPC2's rewards of the states left and the actions."""
    model, obs, actions = case
    dream, net = run_imagination(model, obs, actions), model.model
    with torch.no_grad():
        if net.decodes:
            arrived = feat(dream.states.stacked)[:, 1:]
            rewards, goes_on = mean_of(net.rew(arrived)), net.con(arrived)
        else:
            z = dream.states.stacked.deter
            x = torch.cat([z[:, :-1], flat(actions)], -1)
            rewards, goes_on = mean_of(net.reward(x)), -net.termination(z[:, 1:])
    near(dream.rewards, rewards)
    near(dream.continues, goes_on.squeeze(-1).sigmoid())
    for x in (rewards, goes_on):  # steps differ
        assert (x[:, 1:] - x[:, :-1]).abs().max() > 1e-3


def test_imagine_without_actions_asks_the_policy(case):
    model, obs, actions = case
    state = model.encode(obs)
    dream = model.imagine(state, horizon=H)
    assert {k: v.shape for k, v in dream.actions.items()} == {k: v.shape for k, v in actions.items()}
    again = model.imagine(state, dream.actions)
    assert torch.allclose(again.rewards, dream.rewards, atol=1e-5)


def test_the_batch_comes_first(case):
    model, obs, actions = case
    order = [2, 0, 1]
    dream, mixed = (run_imagination(model, rows(obs, i), rows(actions, i)) for i in ([0, 1, 2], order))
    assert torch.allclose(mixed.rewards, dream.rewards[order], atol=1e-5)
    assert torch.allclose(mixed.continues, dream.continues[order], atol=1e-5)
    assert not torch.allclose(mixed.rewards, dream.rewards, atol=1e-5)
    with pytest.raises(ValueError, match="the batch comes first"):
        model.imagine(model.encode(obs), {k: v.transpose(0, 1) for k, v in actions.items()})
    with pytest.raises(ValueError, match=r"expected \(batch"):
        model.encode(rows(obs, 0))


def test_equal_noise_gives_equal_dreams(case):
    model, obs, actions = case
    first, again, other = (
        model.imagine(model.encode(obs, noise=n), actions, noise=n) for n in map(NoiseStreams, (3, 3, 4))
    )
    assert same(first.states.stacked, again.states.stacked)
    assert torch.equal(first.rewards, again.rewards)
    if first.states.stacked.stoch is not None:
        assert not same(first.states.stacked, other.states.stacked)


def test_run_imagination_is_encode_and_imagine(case):
    model, obs, actions = case
    for subject in (model, model.model):  # the module, and what is inside it
        dream = run_imagination(subject, bare(obs), bare(actions))
        assert torch.equal(dream.rewards, model.imagine(model.encode(obs), actions).rewards)


def test_q_is_one_number_a_row(case):
    model, obs, actions = case
    state, action = model.encode(obs), {k: v[:, 0] for k, v in actions.items()}
    value = model.q(state, action)
    assert value.shape == (B,)
    assert value.dtype == torch.float32
    assert value.isfinite().all()
    assert torch.equal(model.q(state, bare(action)), value)
    swapped = {k: v.roll(1, 0) for k, v in action.items()}
    assert not torch.allclose(model.q(state, swapped), value, atol=1e-6)  # depends on the action ...
    assert not torch.allclose(model.q(state[[1, 2, 0]], action), value, atol=1e-6)  # ... and on the state
    with pytest.raises(ValueError, match="the batch comes first"):
        model.q(state[:2], action)
    chosen, state = model.act(obs)
    assert model.q(state, chosen).shape == (B,)


@pytest.mark.parametrize("contdisc", [True, False])
def test_q_is_the_return_that_is_said(case, request, contdisc):
    """DreamerV3: reward + continue * value of the next state, and gamma where the continue does not hold it;
    TD-MPC2: the mean or the least of its critics.
    """
    model, obs, actions = case
    if not contdisc:
        if not model.model.decodes:
            return
        model = built(*request.node.callspec.params["case"], contdisc=False, horizon=4.0)
    state, action, net = model.encode(obs), at(actions, 0), model.model
    if not net.decodes:
        with torch.no_grad():
            each = mean_of(net.critic(torch.cat([state.deter, flat(action)], -1)))  # (K, B)
        for reduce, expected in (("mean", each.mean(0)), ("min", each.amin(0)), (None, each)):
            near(model.q(state, action, reduce=reduce), expected)
        near(model.q(state, action), each.mean(0))
        assert each.std(0).min() > 1e-3
        return
    dream = model.imagine(state, {k: v.unsqueeze(1) for k, v in action.items()})
    reward, goes_on, gamma = dream.rewards[:, 0], dream.continues[:, 0], 1.0 if contdisc else 0.75
    with torch.no_grad():
        value = mean_of(net.val(feat(dream.states[1])))
    near(net.v(dream.states[1]), value)
    near(model.q(state, action), reward + gamma * goes_on * value)
    assert ((1 - goes_on) * value).abs().max() > 1e-2  # nothing of it can be left out
    assert reward.abs().max() > 1e-2


# --- act ------------------------------------------------------------------------------------------------


def of_policy(net, state, mode):
    """The action of the policy under constant noise, by entry."""
    with torch.no_grad():
        if net.decodes:  # DreamerV3 samples, in evaluation too
            said = net.pol(feat(state)).items()
            far = 0.3 * (mode != "greedy")
            return {k: d.mean + far * d.std if d.log_p is None else d.log_p.argmax(-1) for k, d in said}
        out = net.policy(state.deter)
    if out.shape[-1] == 5:
        return {"action": out.argmax(-1)}
    mean, raw = out.chunk(2, -1)
    std = (-10 + 6 * (raw.tanh() + 1)).exp()  # its logarithm is in -10 ... 2
    return {"action": (mean + 0.3 * std * (mode == "train")).tanh()}


def test_act_is_the_policys_action_in_the_space(case, request):
    model, obs, _ = case
    space, samples = ACTION[request.node.callspec.params["case"][2]], model.model.decodes
    leaves = space.spaces if isinstance(space, Dict) else {"action": space}
    played = {}
    for mode in ("eval", "train", "greedy"):
        played[mode], state = model.act(obs, mode=mode)
        assert same(state, model.encode(obs))
        assert equal(state.action, played[mode])
        assert played[mode].keys() == leaves.keys()
        for k, expected in of_policy(model.model, state, mode).items():
            chosen, leaf = played[mode][k], leaves[k]
            torch.testing.assert_close(chosen, expected, rtol=1e-4, atol=1e-4)  # dtypes too
            assert chosen.dtype == (torch.float32 if isinstance(leaf, Box) else torch.int64)
            if (
                not isinstance(leaf, Box) or not samples or mode == "greedy"
            ):  # DreamerV3's vectors are cut by the environment
                assert all(leaf.contains(x.numpy().astype(leaf.dtype)) for x in chosen)
        assert equal(model.act(obs, mode=mode)[0], played[mode])
        low, high = (model.act(obs, mode=mode, noise=Constant("act/policy", i))[0] for i in (0, 1))
        if mode == "train" or (samples and mode == "eval"):
            assert all((low[k] < high[k]).all() for k in low)
        else:  # no noise of exploration
            assert equal(low, played[mode])
            assert equal(high, played[mode])
    assert equal(model.act(obs)[0], played["eval"])
    with pytest.raises(ValueError, match="mode is 'test'; expected one of train, eval, greedy"):
        model.act(obs, mode="test")


def test_act_goes_on_from_the_state_with_the_action_it_chose(case):
    model, obs, _ = case
    chosen, before = model.act(obs)
    now, first = rows(obs, [1, 2, 0]), torch.tensor([False, True, False])
    plain = State(before.deter, before.stoch)
    for flags in (None, first, first.numpy(), first.tolist()):
        expected = model.encode(now, plain, chosen, None if flags is None else first)
        assert same(model.act(now, before, flags)[1], expected)
        assert same(model.encode(now, plain, chosen, flags), expected)


def test_act_obeys_planners(case, monkeypatch):
    model, obs, actions = case
    asked, own = [], model.act(obs)[0]

    class Stub(Planner):
        _search = None

        def plan(self, model, state, mean_prev, t0, explore, noise, max_ms=None):
            asked.append((state, mean_prev, t0, explore, noise, max_ms))
            return Plan(answer.expand(B, -1), mean, 1, [])

    if len(actions) > 1 or actions["action"].ndim == 3 and not actions["action"].is_floating_point():
        for planner in (Random(), "mppi"):
            with pytest.raises(ConfigError, match="planners act by vectors or by one discrete choice"):
                model.act(obs, planner=planner)
        return
    vector = actions["action"].is_floating_point()
    expected = torch.tensor([[0.25, -0.5]] if vector else [3 + (3 in own["action"])])
    answer, mean = flat({"action": expected}), torch.rand(B, 3, 2)
    expected = expected.expand(B, *expected.shape[1:])

    # What it is asked, and that it is obeyed.
    noise, first = Constant(), torch.tensor([False, True, False])
    chosen, before = model.act(obs, mode="eval", noise=noise, planner=Stub(), max_ms=50)
    assert torch.equal(chosen["action"], expected)
    assert not torch.equal(chosen["action"], own["action"])
    assert before.plan is mean
    state, *others = asked.pop()
    assert same(state, model.encode(obs))
    assert (others[0], *others[2:]) == (None, False, noise, 50)
    monkeypatch.setattr(model.model, "planner", Stub())
    assert torch.equal(model.act(obs, before, first, mode="train")[0]["action"], expected)
    _, plan, t0, explore, _, max_ms = asked.pop()
    assert plan is mean
    assert torch.equal(t0, first)
    assert (explore, max_ms) == (True, None)
    model.act(obs, before)
    assert not asked.pop()[2].any()
    chosen, state = model.act(obs, planner="policy")
    assert equal(chosen, own)
    assert (asked, state.plan) == ([], None)

    # A planner whose only candidate is the last plan, a step later: nothing is left of it where an episode
    # begins, and training adds noise of the least deviation to vectors.
    before.plan = answer.unsqueeze(1).repeat(1, 3, 1).expand(B, -1, -1)
    for flags, mode in ((None, "eval"), (first, "eval"), (first, "train")):
        keep = torch.tensor([True, flags is None, True])
        wanted = expected * (keep.unsqueeze(-1) if vector else keep)
        wanted = wanted + 0.2 * 0.3 if vector and mode == "train" else wanted
        only = Random(num_samples=1, min_std=0.2)
        near(model.act(obs, before, flags, mode=mode, planner=only)[0]["action"], wanted)


@KINDS
def test_what_does_not_fit_is_refused(kind):
    model, obs = built(kind, "vector", "continuous"), drawn(OBS["vector"], "obs")
    few = dict(num_samples=8, num_elites=2, num_pi_trajs=1, iterations=1)
    _, state = model.act(obs, planner=CEM(horizon=3, **few))
    for verb in (model.encode, model.act):
        for bad in (state[:1], state[[0, 1, 2, 0]]):
            with pytest.raises(ValueError, match=rf"state is of {len(bad.deter)} rows.* 3 observations"):
                verb(obs, bad)
        for bad in (torch.tensor([True]), [True, False], np.ones(B), torch.ones(B, 1).bool(), True):
            with pytest.raises(ValueError, match=r"is_first is .*; expected bools \(3,\)"):
                verb(obs, state, is_first=bad)
    with pytest.raises(ConfigError, match=r"shape \(3, 3, 2\), expected \(3, 2, 2\)") as error:
        model.act(obs, state, planner=CEM(horizon=2, **few))
    assert "begin a new plan: state.plan = None" in str(error.value)
    state.plan = None
    assert model.act(obs, state, planner=CEM(horizon=2, **few))[1].plan.shape == (3, 2, 2)
    for bad in (CEM, 3):
        with pytest.raises(ConfigError, match="expected a name or an object"):
            model.act(obs, planner=bad)
    for planner in ("policy", CEM()):
        for bad in (0, -1, True, "50", float("nan"), float("inf")):
            with pytest.raises(ConfigError, match="expected milliseconds, a finite number above 0"):
                model.act(obs, planner=planner, max_ms=bad)


REFUSED = [(o, a) for o in OBS for a in ACTION if ("tdmpc2", o, a) not in PAIRS]


@pytest.mark.parametrize(("obs", "action"), REFUSED, ids=map("-".join, REFUSED))
def test_tdmpc2_says_what_it_cannot_take(obs, action):
    why = "vectors or images, not both" if obs == "dict_with_image" else "or by one discrete choice, not by"
    with pytest.raises(ConfigError, match=why):
        built("tdmpc2", obs, action)


def test_decode_gives_observations_or_says_that_it_cannot(case):
    model, obs, actions = case
    dream = run_imagination(model, obs, actions)
    if not model.model.decodes:
        with pytest.raises(NotSupported, match="no decoder"):
            model.decode(dream.states[-1])
        return
    for state, lead in ((dream.states[-1], (B,)), (dream.states.stacked, (B, H + 1))):
        seen = model.decode(state)
        assert seen.keys() == obs.keys()
        for k, v in obs.items():
            assert seen[k].shape == (*lead, *v.shape[1:])  # in the layout of the observations
            if v.dtype == torch.uint8:
                assert seen[k].dtype == torch.float32
                assert 0 <= seen[k].min() < seen[k].max() <= 1
            elif v.is_floating_point():
                assert seen[k].dtype == torch.float32
                assert seen[k].isfinite().all()
            else:
                assert not seen[k].is_floating_point()
                assert 0 <= seen[k].min() <= seen[k].max() < 4


def test_no_graph_is_kept_unless_wanted(case):
    model, obs, actions = case
    assert torch.is_grad_enabled()
    dream = run_imagination(model, obs, actions)
    kept = [*every(model.encode(obs)), *every(dream.states.stacked), dream.rewards, dream.continues]
    kept.append(model.q(dream.states[0], {k: v[:, 0] for k, v in actions.items()}))
    kept += model.decode(dream.states[-1]).values() if model.model.decodes else []
    assert not any(x.requires_grad for x in kept)
    assert all(p.grad is None for p in model.parameters())
    wanted = run_imagination(model.model, obs, actions).rewards
    assert wanted.requires_grad


@KINDS
def test_classes_are_integers_or_a_number_for_each(kind):
    model, obs = built(kind, "vector", "discrete"), drawn(OBS["vector"], "obs")["obs"]
    classes = torch.tensor([[0, 4, 2, 1], [3, 3, 0, 2], [1, 2, 4, 0]])
    hot = torch.nn.functional.one_hot(classes, 5).float()
    state, dream = model.encode(obs), run_imagination(model, obs, classes)
    for given in (classes.int(), classes.numpy(), hot, 3 * hot - 1, hot.double().numpy(), {"action": hot}):
        again = model.imagine(state, given)
        assert torch.equal(again.rewards, dream.rewards)
        assert torch.equal(again.actions["action"], classes)
    assert torch.equal(model.q(state, hot[:, 0]), model.q(state, classes[:, 0]))
    for bad in (classes + 1, classes - 1, classes.float(), hot[..., :4], hot.long(), classes[:, 0]):
        with pytest.raises(
            ValueError, match=r"expected integers 0 \.\.\. 4 \(3, steps\), or floats \(3, steps, 5\)"
        ):
            model.imagine(state, bad)
    with pytest.raises(ValueError, match=r"integers 0 \.\.\. 4 \(3,\), or floats \(3, 5\)"):
        model.q(state, classes)
    with pytest.raises(ValueError, match=r"expected integers 0 \.\.\. 4"):
        model.q(state, classes[:, 0] - 1)
    with pytest.raises(ValueError, match=r"action keys are \['move'\], expected \['action'\]"):
        model.q(state, {"move": classes[:, 0]})


@KINDS
def test_predictions_are_float32_in_bfloat16_too(kind):
    model = create_world_model(f"{kind}:debug", obs_shape=(5,), action_dim=2, device="cpu")
    model.model.compute_dtype = torch.bfloat16
    dream = run_imagination(model, torch.randn(B, 5), torch.zeros(B, H, 2))
    assert dream.rewards.dtype == dream.continues.dtype == torch.float32
    assert (dream.continues == 1).all() == (kind == "tdmpc2")  # that knows no terminations if not episodic
    assert model.q(dream.states[0], torch.zeros(B, 2)).dtype == torch.float32
