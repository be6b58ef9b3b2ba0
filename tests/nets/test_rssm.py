"""The recurrent model against its definition, block by block and step by step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_wm.nets.rssm import RSSM
from lit_wm.noise import NoiseStreams
from lit_wm.types import State

B, T, E, A, D, H, S, C, G = 3, 5, 7, 4, 16, 6, 2, 3, 4


@pytest.fixture
def rssm() -> RSSM:
    torch.manual_seed(0)
    model = RSSM(E, A, D, H, S, C, G)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def inputs() -> tuple[Tensor, Tensor, Tensor, State]:
    generator = torch.Generator().manual_seed(1)
    tokens, action = torch.randn(B, T, E, generator=generator), 3 * torch.randn(B, T, A, generator=generator)
    first = torch.zeros(B, T, dtype=torch.bool)
    first[0, 2] = first[1, 0] = True
    carry = State(
        torch.randn(B, D, generator=generator), F.one_hot(torch.ones(B, S, dtype=torch.long), C).float()
    )
    return tokens, action * ~first.unsqueeze(-1), first, carry


def layer(model: RSSM, name: str, x: Tensor) -> Tensor:
    linear, norm = getattr(model, name), getattr(model, f"{name}norm")
    x = x @ linear.weight + linear.bias
    return F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * norm.scale)


def plain_core(model: RSSM, deter: Tensor, stoch: Tensor, action: Tensor) -> Tensor:
    """The definition: repeat the shared input for every block, multiply block by block."""
    x = torch.cat(
        [
            layer(model, "dynin0", deter),
            layer(model, "dynin1", stoch.flatten(-2)),
            layer(model, "dynin2", action / action.abs().clamp(min=1)),
        ],
        -1,
    )
    blocks = [
        torch.cat([part, x], -1) @ w for part, w in zip(deter.chunk(G, -1), model.dynhid0.weight, strict=True)
    ]
    x = torch.cat(blocks, -1) + model.dynhid0.bias
    x = F.silu(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-4) * model.dynhid0norm.scale)
    out = []
    for g, part in enumerate(x.chunk(G, -1)):
        gates = part @ model.dyngru.weight[g] + model.dyngru.bias.chunk(G)[g]
        reset, cand, update = gates.chunk(3, -1)  # inside each block
        update = torch.sigmoid(update - 1)
        old = deter.chunk(G, -1)[g]
        out.append(update * torch.tanh(torch.sigmoid(reset) * cand) + (1 - update) * old)
    return torch.cat(out, -1)


def test_a_step_is_the_definition(rssm: RSSM) -> None:
    _, action, _, carry = inputs()
    torch.testing.assert_close(
        rssm.step(carry, action[:, 1]), plain_core(rssm, carry.deter, carry.stoch, action[:, 1])
    )


def test_observing_a_sequence_equals_single_steps_with_all_gradients(rssm: RSSM) -> None:
    tokens, action, first, carry = inputs()
    states, logits = rssm.observe(tokens, action, first, carry, NoiseStreams())
    race = NoiseStreams().exponential("posterior", (B, T, S, C))
    state, deters, wanted = carry, [], []
    for t in range(T):
        keep = (~first[:, t]).float().unsqueeze(-1)
        deter = plain_core(rssm, state.deter * keep, state.stoch * keep.unsqueeze(-1), action[:, t])
        logit = rssm.posterior(deter, tokens[:, t])
        state = State(deter, rssm.sample(logit, race[:, t], torch.float32))
        deters.append(deter)
        wanted.append(logit)
        assert torch.equal(state.stoch, states.stoch[:, t])
    torch.testing.assert_close(states.deter, torch.stack(deters, 1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits, torch.stack(wanted, 1), rtol=1e-4, atol=1e-5)

    cotangent = torch.randn(B, T, S, C)
    params = [p for n, p in rssm.named_parameters() if not n.startswith("prior")]
    ours = torch.autograd.grad((logits * cotangent).sum() + states.deter.sum(), params)
    want = torch.autograd.grad(
        (torch.stack(wanted, 1) * cotangent).sum() + torch.stack(deters, 1).sum(), params
    )
    for a, b in zip(ours, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_nothing_passes_a_reset(rssm: RSSM) -> None:
    tokens, action, _, carry = inputs()
    first = torch.zeros(B, T, dtype=torch.bool)
    first[:, 2] = True
    action = action * ~first.unsqueeze(-1)
    a, _ = rssm.observe(tokens, action, first, carry, NoiseStreams())
    tokens = torch.cat([-10 * tokens[:, :2], tokens[:, 2:]], 1)
    b, _ = rssm.observe(tokens, action, first, carry, NoiseStreams())
    assert torch.equal(a.deter[:, 2:], b.deter[:, 2:])
    assert not torch.equal(a.deter[:, 1], b.deter[:, 1])


def test_a_forgotten_carry_is_the_zero_state(rssm: RSSM) -> None:
    tokens, action, first, carry = inputs()
    zeros = carry.map(torch.zeros_like)
    started, _ = rssm.observe(tokens, action, first, carry, NoiseStreams())
    fresh, _ = rssm.observe(tokens, action, first, zeros, NoiseStreams())
    assert torch.equal(started.deter[1], fresh.deter[1])
    assert not torch.equal(started.deter[2], fresh.deter[2])


def test_imagination_equals_single_steps(rssm: RSSM) -> None:
    _, action, _, start = inputs()
    feats = torch.empty(T + 1, B, D + S * C)
    with torch.no_grad():
        actions = rssm.imagine_into(
            feats, start, lambda feat, t: ({"a": feat[:, :1]}, action[:, t] + feat[:, :1]), NoiseStreams()
        )
        noise, state = NoiseStreams(), start
        for t in range(T):
            deter = plain_core(rssm, state.deter, state.stoch, action[:, t] + state.deter[:, :1])
            state = State(
                deter, rssm.sample(rssm.prior(deter), noise.exponential("prior", (B, S, C), t), torch.float32)
            )
            want = torch.cat([state.deter, state.stoch.flatten(-2)], -1)
            torch.testing.assert_close(feats[t + 1], want, rtol=1e-4, atol=1e-5)
    assert len(actions) == T


def test_actions_beyond_one_are_scaled_down(rssm: RSSM) -> None:
    action = torch.tensor([[3.0, -0.5, -4.0, 1.0]])
    torch.testing.assert_close(
        rssm.action_input(action), rssm.action_input(torch.tensor([[1.0, -0.5, -1.0, 1.0]]))
    )


def test_blocks_must_divide_the_state() -> None:
    with pytest.raises(ValueError, match="deter=10 must be divisible by blocks=4"):
        RSSM(E, A, 10, H, S, C, 4)
