"""The ensemble of dynamics heads: apart from the model it watches, and what its disagreement changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import BOTH, fit, make_batch, make_module
from torch import Tensor

from lit_wm.errors import ConfigError
from lit_wm.nets.ensemble import Ensemble
from lit_wm.noise import NoiseStreams
from lit_wm.types import State


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


@BOTH
def test_the_penalty_is_what_a_plan_costs(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = make_module(kind, ensemble=3, disagreement=0.5)
    model, actions = module.model.eval(), torch.rand(2, 3, 3, 2) * 2 - 1
    if kind == "dreamerv3":  # large values would hide small costs
        for head in (model.val, model.rew):
            torch.nn.init.zeros_(head.output.weight), torch.nn.init.zeros_(head.output.bias)

    def value() -> Tensor:
        state = model.encode(torch.ones(2, 5), noise=NoiseStreams(0))
        with torch.no_grad():
            planned = model.value(state, actions, NoiseStreams(0))
            return planned if kind == "tdmpc2" else torch.cat([dreamed(state), planned.flatten()])

    def dreamed(state: State) -> Tensor:
        dream = model.dream(state.map(lambda x: x.unsqueeze(1)), NoiseStreams(1))
        return dream.returns[0]

    monkeypatch.setattr(model.ensemble, "disagreement", fixed(1.0))
    usual = value()
    monkeypatch.setattr(model, "disagreement", 0.0)
    torch.testing.assert_close(value(), usual)  # 1 is the mean of the data, which costs nothing
    monkeypatch.setattr(model, "disagreement", 0.5)
    monkeypatch.setattr(model.ensemble, "disagreement", fixed(3.0))
    cost = usual - value()
    if kind == "tdmpc2":  # three steps and the policy's action at the end, each (3 - 1) / 2
        gamma = model.discount
        torch.testing.assert_close(cost, torch.full((2, 3), float(sum(gamma**t for t in range(4)))))
    else:
        assert (cost > 1).all()
    monkeypatch.setattr(model, "disagreement", -0.5)
    torch.testing.assert_close(value() - usual, cost)


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


def test_copied_observations_teach_it_nothing() -> None:
    module = make_module("tdmpc2", ensemble=3)
    batch, noise = make_batch(), NoiseStreams(0)
    fake = torch.zeros(3, 4, dtype=torch.bool)
    fake[1, 3] = True
    out = module.model.model_loss(replace(batch, fake=fake), noise)
    loss = module.model.ensemble_loss(replace(batch, fake=fake), out)[0]
    out.next_z[2, 1] = 100.0
    assert module.model.ensemble_loss(replace(batch, fake=fake), out)[0] == loss
