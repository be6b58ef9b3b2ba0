"""The five verbs, held to one specification for both models and every kind of observation and action.

What is expected is read from the Gymnasium spaces alone. Parameters are pushed away from their initial
values, with which rewards and values would all be zero; noise is the same in every row.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

from lit_wm import create_world_model, run_imagination
from lit_wm.errors import NotSupported
from lit_wm.noise import NoiseStreams

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
PAIRS += [("tdmpc2", o, a) for o in OBS for a in ("continuous", "discrete") if o != "dict_with_image"]


class Constant:
    """Noise that is the same in every row, so that rows can change places."""

    def exponential(self, name, shape, t=0):
        return torch.ones(shape)

    def normal(self, name, shape, t=0):
        return torch.full(shape, 0.3)

    def uniform(self, name, shape, t=0):
        return torch.full(shape, 0.5)


@cache
def built(kind, obs, action):
    options = {"tdmpc2": {"planner": "policy", "latent_dim": 512 if "image" in obs else 16}}.get(kind, {})
    model = create_world_model(f"{kind}:debug", OBS[obs], ACTION[action], device="cpu", **options)
    torch.manual_seed(1)
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
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
    assert {k: v.shape for k, v in chosen.items()} == {k: v.shape for k, v in action.items()}
    assert model.q(state, chosen).shape == (B,)


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


@pytest.mark.parametrize("kind", ["dreamerv3", "tdmpc2"])
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
    for bad in (classes + 1, classes.float(), hot[..., :4], hot.long(), classes[:, 0]):
        with pytest.raises(
            ValueError, match=r"expected integers 0 \.\.\. 4 \(3, steps\), or floats \(3, steps, 5\)"
        ):
            model.imagine(state, bad)
    with pytest.raises(ValueError, match=r"integers 0 \.\.\. 4 \(3,\), or floats \(3, 5\)"):
        model.q(state, classes)
    with pytest.raises(ValueError, match=r"action keys are \['move'\], expected \['action'\]"):
        model.q(state, {"move": classes[:, 0]})


@pytest.mark.parametrize("kind", ["dreamerv3", "tdmpc2"])
def test_predictions_are_float32_in_bfloat16_too(kind):
    model = create_world_model(f"{kind}:debug", obs_shape=(5,), action_dim=2, device="cpu")
    model.model.compute_dtype = torch.bfloat16
    dream = run_imagination(model, torch.randn(B, 5), torch.zeros(B, H, 2))
    assert dream.rewards.dtype == dream.continues.dtype == torch.float32
    assert model.q(dream.states[0], torch.zeros(B, 2)).dtype == torch.float32
