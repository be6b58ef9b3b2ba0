"""Recurrent state-space model with a block-diagonal GRU (Hafner et al. 2025, "World model learning")."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_wm.distributions import straight_through, unimix
from lit_wm.nets.deferred import DeferredWeights
from lit_wm.nets.layers import BlockLinear, Linear, RMSNorm, _NormSiLU, from_blocks, to_blocks
from lit_wm.noise import Noise
from lit_wm.types import State, Tensors

Policy = Callable[[Tensor, int], tuple[Tensors, Tensor]]


class CoreWeights(NamedTuple):
    """The recurrent weights, cast to the compute dtype and split once per update instead of once per step."""

    in0: Tensor  # (D, h)
    in0_bias: Tensor
    in1: Tensor  # (S*C, h)
    in1_bias: Tensor
    hid_deter: Tensor  # (G, D/G, D/G)
    hid_shared: Tensor  # (3h, D)
    hid_bias: Tensor  # (D,)
    gru: Tensor  # (G, D/G, 3D/G)
    gru_bias: Tensor  # (G, 1, 3D/G)


class RSSM(nn.Module):
    """Deterministic block GRU plus S categorical latents of C classes.

    Args:
        token: size of the encoder's token.
        action: size of the flat action.
        deter, hidden, stoch, classes, blocks: sizes D, h, S, C, G.
        mix: share of the uniform distribution in every categorical.
    """

    def __init__(
        self,
        token: int,
        action: int,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        blocks: int = 8,
        mix: float = 0.01,
    ):
        super().__init__()
        if deter % blocks:
            raise ValueError(f"deter={deter} must be divisible by blocks={blocks}")
        self.deter, self.hidden, self.stoch, self.classes, self.blocks = deter, hidden, stoch, classes, blocks
        self.mix = mix
        flat = stoch * classes
        self.dynin0, self.dynin0norm = Linear(deter, hidden), RMSNorm(hidden)
        self.dynin1, self.dynin1norm = Linear(flat, hidden), RMSNorm(hidden)
        self.dynin2, self.dynin2norm = Linear(action, hidden), RMSNorm(hidden)
        self.dynhid0, self.dynhid0norm = (
            BlockLinear(deter + 3 * hidden * blocks, deter, blocks),
            RMSNorm(deter),
        )
        self.dyngru = BlockLinear(deter, 3 * deter, blocks)
        self.prior0, self.prior0norm = Linear(deter, hidden), RMSNorm(hidden)
        self.prior1, self.prior1norm = Linear(hidden, hidden), RMSNorm(hidden)
        self.priorlogit = Linear(hidden, flat)
        self.obs0, self.obs0norm = Linear(deter + token, hidden), RMSNorm(hidden)
        self.obslogit = Linear(hidden, flat)

    # --- The whole sequence ------------------------------------------------------------------------

    def observe(
        self, tokens: Tensor, action: Tensor, is_first: Tensor, carry: State, noise: Noise
    ) -> tuple[State, Tensor]:
        """Filter a sequence: posterior states and their raw logits.

        Args:
            tokens: (B, T, E). action: flat previous actions, already zero where ``is_first``. (B, T, A)
            is_first: resets the state. (B, T) bool. carry: state before the first step. (B, ...)

        Returns:
            State (B, T, ...), raw posterior logits (B, T, S, C) float32.
        """
        B, T, _ = tokens.shape
        S, C, D = self.stoch, self.classes, self.deter
        dtype = tokens.dtype
        keep = (~is_first).to(dtype).unsqueeze(-1)  # (B, T, 1)
        race = noise.exponential("posterior", (B, T, S, C))
        action_in = self.action_input(action)  # (B, T, h): out of the scan
        obs0 = self.obs0.weight.to(dtype)
        token_in = F.linear(tokens, obs0[D:].t(), self.obs0.bias.to(dtype))  # (B, T, h): out of the scan

        tape = DeferredWeights()
        w = self.core_weights(dtype, tape)
        obs_deter, obs_logit = tape.hold(obs0[:D]), tape.hold(self.obslogit.weight.to(dtype))
        logit_bias, obs_scale = self.obslogit.bias.to(dtype), self.obs0norm.scale

        deter, stoch = carry.deter.to(dtype), carry.stoch.to(dtype).flatten(-2)  # type: ignore[union-attr]
        deters, stochs, logits = [], [], []
        for t in range(T):
            last = deter * keep[:, t]
            deter = self._core(w, to_blocks(last, self.blocks), stoch * keep[:, t], action_in[:, t], last)
            deter = from_blocks(deter)
            x = _NormSiLU.apply(tape.matmul(deter, obs_deter) + token_in[:, t], obs_scale)
            logit = (tape.matmul(x, obs_logit) + logit_bias).float().unflatten(-1, (S, C))
            stoch = straight_through(unimix(logit, self.mix), race[:, t], dtype).flatten(-2)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        states = State(torch.stack(deters, 1), torch.stack(stochs, 1).unflatten(-1, (S, C)))
        return states, torch.stack(logits, 1)

    def imagine_into(
        self, feats: Tensor, start: State, policy: Policy, noise: Noise, stream: str = "prior"
    ) -> list[Tensors]:
        """Roll out ``policy`` for H steps without autograd, writing features in place.

        Args:
            feats: receives concat(deter, stoch) of the start and of every imagined state. (H+1, N, F)
            start: (N, ...) states.
            policy: (feat (N, F), t) -> (action dict, flat action (N, A)).
            stream: of the latents' noise.

        Returns:
            The H action dicts.
        """
        N, D, S, C = start.deter.shape[0], self.deter, self.stoch, self.classes
        w = self.core_weights(feats.dtype)
        feats[0, :, :D] = start.deter
        feats[0, :, D:] = start.stoch.flatten(-2)  # type: ignore[union-attr]
        deter = to_blocks(feats[0, :, :D], self.blocks)
        actions = []
        for t in range(feats.shape[0] - 1):
            action, flat = policy(feats[t], t)
            actions.append(action)
            deter = self._core(w, deter, feats[t, :, D:], self.action_input(flat), feats[t, :, :D])
            feats[t + 1, :, :D].view(N, self.blocks, -1).copy_(deter.transpose(0, 1))
            logit = self.prior(feats[t + 1, :, :D])
            race = noise.exponential(stream, (N, S, C), t)
            feats[t + 1, :, D:] = straight_through(unimix(logit, self.mix), race, feats.dtype).flatten(-2)
        return actions

    def branch(self, start: State, actions: Tensor, race: Callable[[int], Tensor]) -> Iterator[Tensor]:
        """Follow K action sequences from each state. What the state adds to the first step is computed once.

        Args:
            start: (N, ...) states.
            actions: (N, K, H, A) in the compute dtype.
            race: step -> Exp(1) noise; ones give the most likely classes.              (N*K, S, C)

        Yields:
            Features concat(deter, stoch) after each of the H steps, with autograd. (N*K, F)
        """
        N, K, H, _ = actions.shape
        dtype, h = actions.dtype, 2 * self.hidden
        w, inputs = self.core_weights(dtype), self.action_input(actions).movedim(2, 0)  # (H, N, K, h)
        flat, stoch = start.deter.to(dtype), start.stoch.to(dtype).flatten(-2)  # type: ignore[union-attr]
        deter = to_blocks(flat, self.blocks)
        for t in range(H):
            if t:
                deter = self._core(w, deter, stoch, inputs[t].flatten(0, 1), flat)
            else:
                x = torch.cat(self._core_inputs(w, stoch, flat), -1) @ w.hid_shared[:h] + w.hid_bias
                x = x + from_blocks(deter @ w.hid_deter)  # (N, D)
                x = x.unsqueeze(1) + inputs[0] @ w.hid_shared[h:]
                deter = self._gates(w, x.flatten(0, 1), deter.repeat_interleave(K, 1))
            flat = from_blocks(deter)
            stoch = self.sample(self.prior(flat), race(t), dtype).flatten(-2)
            yield torch.cat([flat, stoch], -1)

    # --- Single steps ------------------------------------------------------------------------------

    def step(self, state: State, action: Tensor) -> Tensor:
        """Next deterministic state. state (N, ...), flat action (N, A) -> (N, D)."""
        w = self.core_weights(state.deter.dtype)
        deter = to_blocks(state.deter, self.blocks)
        stoch = state.stoch.to(state.deter.dtype).flatten(-2)  # type: ignore[union-attr]
        return from_blocks(self._core(w, deter, stoch, self.action_input(action), state.deter))

    def prior(self, deter: Tensor) -> Tensor:
        """Raw prior logits. (..., D) -> (..., S, C) float32."""
        x = self.prior0norm(self.prior0(deter))
        x = self.prior1norm(self.prior1(x))
        return self.priorlogit(x).float().unflatten(-1, (self.stoch, self.classes))

    def posterior(self, deter: Tensor, token: Tensor) -> Tensor:
        """Raw posterior logits. (..., D), (..., E) -> (..., S, C) float32."""
        x = self.obs0norm(self.obs0(torch.cat([deter, token], -1)))
        return self.obslogit(x).float().unflatten(-1, (self.stoch, self.classes))

    def sample(self, logit: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
        """Straight-through one-hot sample. (..., S, C)."""
        return straight_through(unimix(logit, self.mix), noise, dtype)

    def action_input(self, action: Tensor) -> Tensor:
        """SiLU(norm(Linear(a / max(1, |a|)))). (..., A) -> (..., h)."""
        action = action / action.abs().clamp(min=1).detach()
        return self.dynin2norm(self.dynin2(action))

    # --- The recurrent core ------------------------------------------------------------------------

    def core_weights(self, dtype: torch.dtype, tape: DeferredWeights | None = None) -> CoreWeights:
        """Cast and split the recurrent weights; ``tape`` defers the gradients of the matrices to one product
        each.
        """
        hold = (lambda x: x) if tape is None else tape.hold
        size = self.deter // self.blocks
        hid = self.dynhid0.weight.to(dtype)  # (G, D/G + 3h, D/G)
        shared = hid[:, size:].transpose(0, 1).reshape(3 * self.hidden, self.deter)
        w = CoreWeights(
            hold(self.dynin0.weight.to(dtype)),
            self.dynin0.bias.to(dtype),
            hold(self.dynin1.weight.to(dtype)),
            self.dynin1.bias.to(dtype),
            hold(hid[:, :size]),
            hold(shared),
            self.dynhid0.bias.to(dtype),
            hold(self.dyngru.weight.to(dtype)),
            self.dyngru.bias.to(dtype).view(self.blocks, 1, -1),
        )
        return w

    def _core(self, w: CoreWeights, deter: Tensor, stoch: Tensor, action_in: Tensor, flat: Tensor) -> Tensor:
        """Block GRU step. deter (G, N, D/G) and the same as flat (N, D), stoch (N, S*C), action_in (N, h) ->
        (G, N, D/G).

        The inputs of all blocks share concat(x0, x1, x2), so their part of the hidden layer is one dense
        product; only the deterministic part is block-wise.
        """
        matmul = DeferredWeights.matmul
        x0, x1 = self._core_inputs(w, stoch, flat)
        x = matmul(torch.cat([x0, x1, action_in], -1), w.hid_shared) + w.hid_bias  # (N, D)
        x = x + from_blocks(matmul(deter, w.hid_deter))
        return self._gates(w, x, deter)

    def _core_inputs(self, w: CoreWeights, stoch: Tensor, flat: Tensor) -> tuple[Tensor, Tensor]:
        matmul = DeferredWeights.matmul
        x0 = _NormSiLU.apply(matmul(flat, w.in0) + w.in0_bias, self.dynin0norm.scale)
        return x0, _NormSiLU.apply(matmul(stoch, w.in1) + w.in1_bias, self.dynin1norm.scale)

    def _gates(self, w: CoreWeights, x: Tensor, deter: Tensor) -> Tensor:
        x = _NormSiLU.apply(x, self.dynhid0norm.scale)
        gates = DeferredWeights.matmul(to_blocks(x, self.blocks), w.gru) + w.gru_bias  # (G, N, 3D/G)
        reset, cand, update = gates.chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(deter, cand, torch.sigmoid(update - 1))
