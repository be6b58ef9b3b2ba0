"""The verbs: encode, act, imagine, decode, q, on every kind of space."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lit_wm.dreamerv3 import DreamerV3, DreamerV3Module
from lit_wm.errors import ConfigError
from lit_wm.noise import NoiseStreams
from lit_wm.presets import dreamerv3_sizes
from lit_wm.types import Spaces, Spec, State, Tensors

B = 3


@pytest.mark.parametrize("given", [{"obs": (3,)}, {"obs": {"obs": (3,)}, "action": {"action": 2}}, (3,)])
def test_spaces_that_are_none_say_what_is_expected(given):
    with pytest.raises(
        ConfigError, match="expected shape and type of every observation and action\nGive data"
    ):
        DreamerV3Module(given)


MIXED = Spaces(
    {
        "camera/front": Spec("uint8", (3, 48, 64)),
        "scalar": Spec("float32", ()),
        "arm.pose": Spec("float32", (2, 2)),
        "level": Spec("int32", (), 4),
        "cards": Spec("int32", (2,), 5),
    },
    {
        "throttle": Spec("float32", ()),
        "arm.joints": Spec("float32", (2, 2)),
        "gear": Spec("int32", (), 3),
        "keys/all": Spec("int32", (2,), 4),
    },
)
CAMERA = Spaces({"obs": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 4)})
SIMPLE = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("int32", (), 4)})


def build(spaces: Spaces) -> DreamerV3:
    torch.manual_seed(0)
    model = DreamerV3(spaces, **dreamerv3_sizes("debug"), imag_length=4)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def values(specs: dict[str, Spec], *lead: int, seed: int = 1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for k, s in specs.items():
        if s.is_discrete or s.is_image:
            out[k] = torch.randint(0, s.classes or 256, (*lead, *s.shape), generator=generator)
            out[k] = out[k].to(torch.uint8) if s.is_image else out[k]
        else:
            out[k] = torch.randn(*lead, *s.shape, generator=generator)
    return out


def shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in tensors.items()}


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("spaces", [SIMPLE, MIXED], ids=["simple", "mixed"])
def test_verbs_follow_each_other_on_any_spaces(spaces: Spaces) -> None:
    model = build(spaces)
    action, state = model.act(values(spaces.obs, B))
    assert shapes(action) == {k: (B, *s.shape) for k, s in spaces.action.items()}
    for k, s in spaces.action.items():
        assert not s.is_discrete or (action[k].min() >= 0 and action[k].max() < s.classes)
    dream = model.imagine(state)
    assert shapes(dream.actions) == {k: (B, 4, *s.shape) for k, s in spaces.action.items()}
    assert dream.rewards.shape == dream.continues.shape == (B, 4)
    assert len(dream.states) == 5
    seen = model.decode(dream.states[-1])
    assert shapes(seen) == {k: (B, *s.shape) for k, s in spaces.obs.items()}
    assert model.q(state, action).shape == (B,)


def test_acting_filters_with_the_action_it_chose_before() -> None:
    model = build(MIXED)
    action, state = model.act(values(MIXED.obs, B))
    obs = values(MIXED.obs, B, seed=2)
    acted = model.act(obs, state, noise=NoiseStreams(5))[1]
    encoded = model.encode(obs, State(state.deter, state.stoch), action, noise=NoiseStreams(5))
    assert torch.equal(acted.deter, encoded.deter)
    assert torch.equal(acted.stoch, encoded.stoch)
    other = {
        k: (v + 1) % MIXED.action[k].classes if MIXED.action[k].is_discrete else v / 3
        for k, v in action.items()
    }
    assert not torch.equal(model.encode(obs, state, other, noise=NoiseStreams(5)).deter, encoded.deter)


def test_a_first_step_forgets_the_state_row_by_row() -> None:
    model, obs = build(SIMPLE), values(SIMPLE.obs, B)
    _, state = model.act(obs)
    first = torch.tensor([True, False, True])
    mixed = model.encode(obs, state, is_first=first, noise=NoiseStreams(5))
    fresh = model.encode(obs, noise=NoiseStreams(5))
    going = model.encode(obs, state, noise=NoiseStreams(5))
    torch.testing.assert_close(mixed.deter, torch.where(first.unsqueeze(-1), fresh.deter, going.deter))
    assert not torch.equal(fresh.deter, going.deter)


def test_filtering_step_by_step_equals_the_training_scan() -> None:
    """What collectors store is what training would compute."""
    model, T = build(MIXED), 4
    obs, prev = values(MIXED.obs, B, T), values(MIXED.action, B, T)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 0] = first[1, 2] = True
    race = NoiseStreams(5).exponential("x", (B, T, model.dyn.stoch, model.dyn.classes))

    class Fixed:
        t = 0

        def exponential(self, name: str, shape: tuple[int, ...], t: int = 0) -> Tensor:
            return race[:, self.t] if name.startswith("act") else race

    from lit_wm.nets.heads import flat_action

    flat = flat_action(prev, MIXED.action, torch.float32) * ~first.unsqueeze(-1)
    scan, _ = model.dyn.observe(model.enc(obs), flat, first, model.initial(B), Fixed())
    noise, state = Fixed(), model.initial(B)
    for t in range(T):
        noise.t = t
        step = {k: v[:, t] for k, v in prev.items()}
        state = model.encode({k: v[:, t] for k, v in obs.items()}, state, step, first[:, t], noise)
        torch.testing.assert_close(state.deter, scan.deter[:, t], rtol=1e-4, atol=1e-5)
        assert torch.equal(state.stoch, scan.stoch[:, t])


def test_imagining_given_actions_returns_them() -> None:
    model = build(MIXED)
    actions = values(MIXED.action, B, 6)
    dream = model.imagine(model.act(values(MIXED.obs, B))[1], actions)
    assert all(torch.equal(dream.actions[k], v) for k, v in actions.items())
    assert dream.rewards.shape == (B, 6)


def test_the_policys_own_actions_lead_to_the_same_dream() -> None:
    model, state = build(SIMPLE), build(SIMPLE).encode(values(SIMPLE.obs, B))
    free = model.imagine(state, horizon=3, noise=NoiseStreams(5))
    again = model.imagine(state, free.actions, noise=NoiseStreams(5))
    assert torch.equal(free.states.stacked.deter, again.states.stacked.deter)
    assert torch.equal(free.rewards, again.rewards)


def test_q_is_reward_plus_continued_value_of_the_next_state() -> None:
    model = build(SIMPLE)
    action, state = model.act(values(SIMPLE.obs, B))
    model.noise = NoiseStreams(5)
    q = model.q(state, action)
    dream = model.imagine(state, {k: v.unsqueeze(1) for k, v in action.items()}, noise=NoiseStreams(5))
    torch.testing.assert_close(q, dream.rewards[:, 0] + dream.continues[:, 0] * model.v(dream.states[1]))


def test_decoding_is_in_the_environments_units_and_layout() -> None:
    model = build(MIXED)
    state = model.encode(values(MIXED.obs, B))
    out = model.decode(state)
    raw = model.dec(state.deter, state.stoch.flatten(-2))
    assert torch.equal(out["camera/front"], raw["camera/front"].permute(0, 3, 1, 2))
    torch.testing.assert_close(out["arm.pose"], raw["arm.pose"].sign() * raw["arm.pose"].abs().expm1())
    assert torch.equal(out["cards"], raw["cards"].argmax(-1))


def test_a_bare_tensor_stands_for_the_only_key() -> None:
    model, obs = build(SIMPLE), values(SIMPLE.obs, B)
    state = model.encode(obs["obs"], noise=NoiseStreams(5))
    assert torch.equal(state.deter, model.encode(obs, noise=NoiseStreams(5)).deter)
    assert model.q(state, torch.zeros(B, dtype=torch.int64)).shape == (B,)


def test_in_bfloat16_states_are_bfloat16_and_predictions_float32() -> None:
    model = build(MIXED)
    model.compute_dtype = torch.bfloat16
    _, state = model.act(values(MIXED.obs, B))
    assert state.deter.dtype == torch.bfloat16
    dream = model.imagine(state)
    assert dream.rewards.dtype == dream.continues.dtype == torch.float32
    assert {v.dtype for v in model.decode(state).values() if v.is_floating_point()} == {torch.float32}
    assert model.latent_specs()["deter"].dtype == "bfloat16"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.encode({}), r"observation keys \['obs'\] are missing"),
        (lambda m: m.encode({"obs": torch.zeros(B, 4)}), r"shape \(3, 4\); expected \(batch, 5\)"),
        (lambda m: m.encode({"obs": torch.zeros(5)}), r"shape \(5,\); expected \(batch, 5\)"),
        (lambda m: m.encode({"obs": torch.zeros(B, 2, 5)}), "not a sequence"),
        (
            lambda m: m.imagine(m.initial(B), {"move": torch.zeros(B, 2)}),
            r"action keys are \['move'\], expected \['action'\]",
        ),
        (lambda m: m.act({"obs": torch.zeros(B, 5)}, mode="mean"), "expected one of train, eval, greedy"),
        (lambda m: build(MIXED).encode(torch.zeros(B, 5)), "pass a dict"),
        (lambda m: m.encode(torch.zeros(B, 5), m.initial(B)), "needs the action executed since"),
        (lambda m: build(CAMERA).encode(torch.zeros(B, 64, 64, 3)), "expected an image of uint8"),
    ],
)
def test_wrong_inputs_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(build(SIMPLE))


def test_the_model_prints_its_parts() -> None:
    model = build(SIMPLE)
    assert f"{sum(p.numel() for p in model.parameters()):,}" in repr(model)
