"""The ensemble of dynamics heads: apart from the model it watches, and what its disagreement changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
from small_models import BOTH, SPACES, fit, make_batch, make_module
from torch import Tensor

from lit_wm.errors import ConfigError
from lit_wm.nets.ensemble import Ensemble
from lit_wm.noise import NoiseStreams
from lit_wm.planners import CEM, MPPI, Random
from lit_wm.types import Spaces, Spec, State


@BOTH
@pytest.mark.parametrize("clip", [None, 0.1])
def test_an_ensemble_that_nothing_uses_changes_no_bit(kind: str, clip: float | None, tmp_path: Path) -> None:
    options = {} if clip is None else {"grad_clip": clip}
    without, beside = make_module(kind, **options), make_module(kind, ensemble=3, **options)
    assert fit(without, tmp_path, 4).global_step == fit(beside, tmp_path, 4).global_step == 4
    before, after = without.state_dict(), beside.state_dict()
    extra = {k for k in after if k not in before}
    assert extra
    assert all(k.startswith("model.ensemble.") for k in extra)
    for key, value in before.items():
        torch.testing.assert_close(after[key], value, rtol=0, atol=0, msg=key)
    assert beside.latest["train/loss/ensemble"] > 0
    assert beside.model.ensemble.moving[0] > 0
    assert beside.latest["train/opt/grad_norm"] == without.latest["train/opt/grad_norm"]


@BOTH
def test_its_loss_reaches_the_ensemble_alone_and_its_penalty_never_does(kind: str) -> None:
    module, batch = make_module(kind, ensemble=3, disagreement=0.5), make_batch()
    model, noise = module.model, NoiseStreams(0)
    if kind == "dreamerv3":
        out = model.loss(batch, model.initial(3), noise)
        total = out.total
    else:
        out = model.model_loss(batch, noise)
        total = out.total + model.policy_loss(out.zs, None, noise)[0]
    watched = list(model.ensemble.parameters())
    assert torch.autograd.grad(total, watched, allow_unused=True, retain_graph=True) == (None,) * len(watched)
    model.ensemble_loss(batch, out)[0].backward()
    assert all(p.grad is not None for p in watched)
    ids = {id(p) for p in watched}
    assert all(p.grad is None for p in model.parameters() if id(p) not in ids)


def test_members_disagree_where_there_were_no_data() -> None:
    torch.manual_seed(0)
    ensemble = Ensemble(3, 2, 5, 32)
    adam = torch.optim.Adam(ensemble.parameters(), lr=3e-3)
    for _ in range(300):
        x = torch.rand(64, 3) * 2 - 1
        loss, _ = ensemble.loss(x, torch.stack([x.sum(-1), x[:, 0] * x[:, 1]], -1), torch.ones(64))
        adam.zero_grad(), loss.backward(), adam.step()
    with torch.no_grad():
        inside = ensemble.disagreement(torch.rand(500, 3) * 2 - 1).mean()
        outside = ensemble.disagreement(torch.rand(500, 3) * 2 + 4).mean()
    assert 0.3 < inside < 1.5
    assert outside > 4 * inside


def test_what_does_not_count_does_not_count() -> None:
    torch.manual_seed(0)
    ensemble, x, y = Ensemble(3, 2, 4, 8).eval(), torch.randn(6, 3), torch.randn(6, 2)
    keep = torch.tensor([1, 1, 0, 1, 0, 0], dtype=torch.bool)
    spoilt = torch.where(keep.unsqueeze(1), y, torch.full_like(y, 1e6))
    loss, mean = ensemble.loss(x, spoilt, keep)
    members = ensemble.net(x[keep])
    torch.testing.assert_close(loss, (members - y[keep]).square().mean())
    torch.testing.assert_close(mean, members.var(0, correction=0).mean(-1).sqrt().mean())


def fixed(value: float) -> Any:
    return lambda x: torch.full(x.shape[:-1], value)


def steep(x: Tensor) -> Tensor:
    """A disagreement that differs between states, actions and steps; about half is less than usual."""
    return 1 + (100 * x.float() @ torch.linspace(-0.3, 0.3, x.shape[-1])).sin()


def beyond(doubt: Tensor) -> Tensor:
    """What costs: disagreement beyond the usual; less of it earns nothing."""
    return torch.where(doubt > 1, doubt - 1, 0.0)


def careful(kind: str, patch: pytest.MonkeyPatch, **options: Any) -> Any:
    """A model whose ensemble is :func:`steep`, with rewards and values of about 1."""
    model = make_module(kind, ensemble=3, **options).model.eval()
    model.bins = torch.linspace(-3, 3, len(model.bins))
    patch.setattr(model.ensemble, "disagreement", steep)
    return model


class Likeliest:
    """Noise that leaves the most likely classes."""

    def exponential(self, stream: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
        return torch.ones(shape)


@pytest.mark.parametrize("limit", [None, 1.5])
@pytest.mark.parametrize("coefficient", [0.5, -0.5])
def test_what_dreamed_steps_cost(
    coefficient: float, limit: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = careful("dreamerv3", monkeypatch, disagreement=coefficient, disagreement_limit=limit)
    start = State(torch.randn(9, 2, 32), torch.eye(4).expand(9, 2, 4, 4))
    dream = model.dream(start, NoiseStreams(0))
    monkeypatch.setattr(model, "ensemble", None)
    plain = model.dream(start, NoiseStreams(0))
    x = torch.cat([plain.feats[:-1], torch.stack([a["action"] for a in plain.actions])], -1)
    returns, trusted, alive = plain.value.clone(), steep(x) <= (limit or 1e9), torch.ones(18).bool()
    for t in (3, 2, 1, 0):
        reward = plain.reward[t + 1] - coefficient * beyond(steep(x[t]))
        ahead = 0.05 * plain.value[t + 1] + 0.95 * returns[t + 1]
        returns[t] = torch.where(trusted[t], reward + plain.cont[t + 1] * ahead, plain.value[t])
    for t in range(4):  # after the end the value stands for the return, and nothing counts
        alive = alive & trusted[t]
        returns[t] = torch.where(alive, returns[t], plain.value[t])
        assert torch.equal(dream.weight[t], plain.weight[t] * alive)
    assert alive.all() if limit is None else 0 < alive.sum() < 18
    assert 0.2 < (steep(x) < 1).float().mean() < 0.8
    torch.testing.assert_close(dream.returns, returns[:4])


def test_a_dream_that_is_not_trusted_says_nothing_of_its_rewards() -> None:
    """Not by the first return, which replayed values fall back on, nor by the scale of returns."""
    seen = []
    for bias in (0.0, 5.0):
        model = make_module("dreamerv3", ensemble=3, disagreement_limit=2.0).model
        model.ensemble.disagreement = fixed(9.0)
        with torch.no_grad():
            model.rew.output.bias[100] += bias
            out = model.loss(make_batch(), model.initial(3), NoiseStreams(0))
        seen.append([out.dream.reward, out.replay_returns, model.retnorm.lo, model.retnorm.hi])
    (reward, *before), (other, *after) = seen
    assert not torch.equal(reward, other)
    for x, y in zip(before, after, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("return_norm", ["perc", "meanstd"])
def test_values_after_the_end_say_nothing_of_the_scale_of_returns(return_norm: str) -> None:
    """The critic does not learn there: what it says is arbitrary."""
    scales, ends = [], torch.tensor([1.0, 1, 9, 9]).unsqueeze(1)
    for noise in (0.0, 50.0):
        model = make_module("dreamerv3", ensemble=3, disagreement_limit=2.0, return_norm=return_norm).model
        model.ensemble.disagreement = lambda x: ends.expand(x.shape[:-1])
        whole = model.dream

        def dream(*args: Any, whole: Any = whole, noise: float = noise) -> Any:
            out = whole(*args)
            out.returns = out.returns + noise * torch.randn(out.returns.shape) * (ends > 2)
            return out

        model.dream = dream
        with torch.no_grad():
            model.loss(make_batch(), model.initial(3), NoiseStreams(0))
        scales.append([model.retnorm.lo, model.retnorm.hi, model.retnorm.corr])
    assert scales[0][1] != 0
    assert scales[0] == scales[1]


@BOTH
@pytest.mark.parametrize("coefficient", [0.5, -0.5])
def test_what_planned_steps_cost(kind: str, coefficient: float, monkeypatch: pytest.MonkeyPatch) -> None:
    model = careful(kind, monkeypatch, disagreement=coefficient)
    actions, dreamer = torch.rand(2, 3, 3, 2) * 2 - 1, kind == "dreamerv3"
    state = State(torch.randn(2, 32), torch.eye(4).expand(2, 4, 4)) if dreamer else State(torch.rand(2, 16))
    with torch.no_grad():
        found = model.value(state, actions, NoiseStreams(0), deterministic=True)
        each = state.map(lambda x: x.repeat_interleave(3, 0))
        dream = model.imagine(each, actions.flatten(0, 1), noise=Likeliest())
        total, weight = torch.zeros(6), torch.ones(6)
        for t in range(3):
            here = model.feat(dream.states[t]) if dreamer else dream.states[t].deter
            cost = coefficient * beyond(steep(torch.cat([here, actions[:, :, t].flatten(0, 1)], -1)))
            total = total + weight * (dream.rewards[:, t] - cost)
            weight = weight * (1.0 if dreamer else model.discount) * dream.continues[:, t]
        if dreamer:
            end = model.v(dream.states[-1])
        else:
            z = dream.states[-1].deter
            last = model.pi(z, None, None, torch.ones(6, 2)).mean
            cost = coefficient * beyond(steep(torch.cat([z, last], -1)))
            end = model.q(dream.states[-1], last) - cost
    torch.testing.assert_close(found, (total + weight * end).view(2, 3))


def test_what_the_targets_of_tdmpc2_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    model = careful("tdmpc2", monkeypatch, disagreement=0.5, episodic=True)
    z, reward, ended = torch.rand(3, 4, 16), torch.randn(3, 4), (torch.rand(3, 4) < 0.5).float()
    given = (z, reward, ended, None, None)
    with torch.no_grad():
        found = model.td_target(*given, NoiseStreams(0))
        monkeypatch.setattr(model, "ensemble", None)
        action = model.pi(z, None, None, NoiseStreams(0).normal("td/policy", (3, 4, 2))).action
        cost = 0.5 * beyond(steep(torch.cat([z, action], -1)))
        plain = model.td_target(*given, NoiseStreams(0))
    torch.testing.assert_close(found, plain - model.discount * (1 - ended) * cost)
    assert 0 < ended.sum() < 12


@pytest.mark.parametrize("classes", [None, 3])
def test_what_the_policy_of_tdmpc2_pays(classes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    spaces = Spaces(SPACES.obs, {"action": Spec("int64", (), classes) if classes else Spec("float32", (2,))})
    monkeypatch.setattr(small_models, "SPACES", spaces)
    model, zs = careful("tdmpc2", monkeypatch, disagreement=0.5), torch.rand(4, 5, 16)
    monkeypatch.setattr(model, "update_scale", lambda q: model.scale.fill_(2.0))
    with torch.no_grad():
        found, _ = model.policy_loss(zs, None, NoiseStreams(0))
        monkeypatch.setattr(model, "ensemble", None)
        plain, _ = model.policy_loss(zs, None, NoiseStreams(0))
        noise = model.policy_noise(NoiseStreams(0), "policy", (4, 5))
        pi = model.pi(zs, None, None, noise)
        if classes is None:
            cost = beyond(steep(torch.cat([zs, pi.action], -1)))
        else:
            one = torch.eye(3).expand(4, 5, 3, 3)
            cost = beyond(steep(torch.cat([zs.unsqueeze(2).expand(-1, -1, 3, -1), one], -1)))
            cost = (pi.probs * cost).sum(-1)
        paid = sum(0.5**t * (0.5 * cost[t] / 2.0).mean() for t in range(4)) / 4
    torch.testing.assert_close(found - plain, paid)


@BOTH
def test_what_the_ensemble_learns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next latent of a state and the action taken there; neither across episodes nor copies."""
    model, batch = make_module(kind, ensemble=3).model, make_batch()
    fake = torch.zeros(3, 4, dtype=torch.bool)
    fake[1, 3] = True
    batch, action = replace(batch, fake=fake), batch.prev_action["action"]
    monkeypatch.setattr(model.ensemble, "loss", lambda *given: given)
    if kind == "dreamerv3":
        out = model.loss(batch, model.initial(3), NoiseStreams(0))
        x, target, keep = model.ensemble_loss(batch, out)
        latent, next_latent = out.feat[:, :-1], 0.99 * out.post_logit.softmax(-1) + 0.01 / 4
        next_latent, counts = next_latent[:, 1:].flatten(-2), ~fake
        action = action * ~batch.is_first.unsqueeze(-1)
        counts[0, 2] = False  # where an episode begins
    else:
        x, target, keep = model.ensemble_loss(batch, model.model_loss(batch, NoiseStreams(0)))
        x, target, keep, counts = x.transpose(0, 1), target.transpose(0, 1), keep.T, ~fake
        z = model.encoder(batch.obs["obs"])
        latent, next_latent = z[:, :-1], z[:, 1:]
    torch.testing.assert_close(x, torch.cat([latent, action[:, 1:]], -1))
    torch.testing.assert_close(target, next_latent)
    assert torch.equal(keep, counts[:, 1:])


@BOTH
def test_exploring_can_leave_the_task_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def total(reward: float, coefficient: float) -> Tensor:
        model = careful(kind, monkeypatch, disagreement=coefficient, reward_scale=1e-6)
        batch, noise = replace(make_batch(), reward=torch.full((3, 4), reward)), NoiseStreams(0)
        if kind == "dreamerv3":
            return model.loss(batch, model.initial(3), noise).total
        out = model.model_loss(batch, noise)
        return out.total + model.policy_loss(out.zs, None, noise)[0]

    torch.testing.assert_close(total(1.0, -1.0), total(-9.0, -1.0), rtol=1e-4, atol=1e-4)
    assert (total(1.0, -1.0) - total(1.0, 0.0)).abs() > 0.01


def test_planned_roll_outs_end_where_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_module("tdmpc2", ensemble=3, disagreement_limit=2.0).model.eval()
    state, actions = State(torch.rand(2, 16)), torch.rand(2, 3, 3, 2) * 2 - 1
    monkeypatch.setattr(model.ensemble, "disagreement", fixed(1.5))
    with torch.no_grad():
        whole = model.value(state, actions, NoiseStreams(0), deterministic=True)
        monkeypatch.setattr(model, "disagreement_limit", None)
        torch.testing.assert_close(model.value(state, actions, NoiseStreams(0), deterministic=True), whole)
        monkeypatch.setattr(model, "disagreement_limit", 1.0)  # nothing is trusted: the value of the start
        found = model.value(state, actions, NoiseStreams(0), deterministic=True)
        pi = model.pi(state.deter, None, None, torch.ones(2, 2))
        expected = model.q(state, model.action_keys(pi.mean)).unsqueeze(1).expand(2, 3)
    torch.testing.assert_close(found, expected)


def test_dreamers_plans_end_where_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_module("dreamerv3", ensemble=3, disagreement_limit=2.0).model.eval()
    state, actions = State(torch.randn(2, 32), torch.eye(4).expand(2, 4, 4)), torch.rand(2, 3, 3, 2) * 2 - 1
    monkeypatch.setattr(model.ensemble, "disagreement", fixed(9.0))
    with torch.no_grad():
        found = model.value(state, actions, NoiseStreams(0))
        feat = model.feat(state)
        expected = (model.val(feat).softmax(-1) * model.bins).sum(-1).unsqueeze(1).expand(2, 3)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@BOTH
@pytest.mark.parametrize("planner", [MPPI, CEM, Random])
def test_plans_stay_where_the_data_were(kind: str, planner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The value at the start is more than what any plan earns: a plan that ended there would be the best."""
    model = make_module(kind, ensemble=3, disagreement_limit=2.0).model.eval()
    far, beside = 0.7, slice(-2, None)

    def doubt(x: Tensor) -> Tensor:
        return torch.where(x[..., beside].abs().amax(-1) > far, 9.0, 1.0)

    monkeypatch.setattr(model.ensemble, "disagreement", doubt)
    if kind == "dreamerv3":
        monkeypatch.setattr(model, "bins", torch.linspace(-3, 3, len(model.bins)))
        with torch.no_grad():
            model.val.output.bias[-1] += 9
    else:
        monkeypatch.setattr(model, "drawn_values", lambda net, x, *_, **__: torch.full((1, len(x)), 30.0))
    search = planner(num_pi_trajs=0, num_samples=256, **({} if planner is Random else {"num_elites": 8}))
    with torch.no_grad():
        action, _ = model.act({"obs": torch.randn(16, 5)}, noise=NoiseStreams(0), planner=search)
    assert (action["action"].abs() <= far).all()
    assert action["action"].abs().max() > 0.1


@BOTH
def test_what_comes_after_the_end_is_within_the_limit(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """States beyond the goal were never recorded: that must not keep a plan from the goal."""
    dreamer, found = kind == "dreamerv3", {}
    options = {"disagreement_limit": 2.0} | ({} if dreamer else {"episodic": True})
    for ended in (True, False):
        model = make_module(kind, ensemble=3, **options).model.eval()
        with torch.no_grad():  # continues of DreamerV3, terminations of TD-MPC2
            head = model.con.output if dreamer else model.termination[-1]
            head.bias += 50.0 if ended is not dreamer else -50.0
        state = (
            State(torch.randn(1, 32), torch.eye(4).expand(1, 4, 4)) if dreamer else State(torch.rand(1, 16))
        )
        steps = iter([1.0, 9.0, 9.0])
        monkeypatch.setattr(model.ensemble, "disagreement", lambda x, s=steps: fixed(next(s))(x))
        monkeypatch.setattr(model, "within_limit", lambda value, beyond: beyond)
        with torch.no_grad():
            found[ended] = model.value(state, torch.rand(1, 4, 3, 2), NoiseStreams(0))
    assert (found[True] == 0).all()
    assert (found[False] == 2).all()


def test_plans_beyond_the_limit_come_last() -> None:
    model = make_module("tdmpc2", ensemble=3, disagreement_limit=2.0).model
    value = torch.tensor([[5.0, 1.0, 3.0, float("nan")], [5.0, 1.0, 3.0, -2.0]])
    beyond = torch.tensor([1.0, 0, 2, 0, 2, 2, 2, 2])
    found = model.within_limit(value, beyond)
    assert found[0, 1] == 1
    assert found[0, 0] < -90
    assert found[0, 2] < found[0, 0]
    assert torch.equal(found[1], value[1])  # all alike: nothing to choose by but the values


def test_imagined_roll_outs_end_where_the_limit_is_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_module("dreamerv3", ensemble=3, disagreement_limit=2.0).model.eval()
    start = State(torch.randn(5, 1, 32), torch.eye(4).expand(5, 1, 4, 4))

    def dream(second: float) -> Any:
        doubt = torch.tensor([1.0, second, 1.0, 1.0]).unsqueeze(1).expand(4, 5)
        monkeypatch.setattr(model.ensemble, "disagreement", lambda x: doubt)
        return model.dream(start, NoiseStreams(0))

    whole, ended = dream(1.0), dream(9.0)
    monkeypatch.setattr(model, "ensemble", None)
    plain = dream_without(model, start)
    torch.testing.assert_close(whole.returns, plain.returns)
    torch.testing.assert_close(whole.weight[:-1], plain.weight[:-1])
    torch.testing.assert_close(ended.weight[0], whole.weight[0])
    assert (ended.weight[1:4] == 0).all()  # the second step and what follows is not learnt from
    one_step = ended.reward[1] + ended.cont[1] * ended.value[1]  # the first falls back on the value there
    torch.testing.assert_close(ended.returns[0], one_step)


def dream_without(model: Any, start: State) -> Any:
    return model.dream(start, NoiseStreams(0))


@BOTH
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ensemble": 1}, "model.ensemble is 1; expected 0, or 2 and more"),
        ({"ensemble": True}, "model.ensemble is True"),
        ({"disagreement": 1.0}, "need an ensemble: set model.ensemble: 5"),
        ({"ensemble": 3, "disagreement_limit": 0.0}, "disagreement_limit 0.0; expected"),
        ({"ensemble": 3, "disagreement": float("nan")}, "model.disagreement is nan"),
    ],
)
def test_options_that_do_not_fit_are_named(kind: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_module(kind, **options)


def test_a_limit_on_plans_needs_plans(tmp_path: Path) -> None:
    module = make_module("tdmpc2", ensemble=3, disagreement_limit=2.0, planner="policy")
    with pytest.raises(ConfigError, match="planner: policy makes none: here it has no effect"):
        fit(module, tmp_path, 1)
