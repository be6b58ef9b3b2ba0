"""TD-MPC2 in plain PyTorch, in the order of the official code: what `lit_wm` is timed against.

One network call after another on concatenated inputs, every critic always (mapped over members), every step
of a plan from all candidates' own copies of the start, PyTorch's own layer norm, Mish, softmax and dropout,
Adam over lists of tensors. Written from the specification; it shares no code with the package but the names
of the noise, so that with dropout 0 both compute the same numbers, which the benchmarks assert before timing.
Vectors in, continuous actions, one task, no terminations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Net = list[dict[str, Tensor]]  # per layer: weight, bias, norm.weight, norm.bias


def simnorm(x: Tensor) -> Tensor:
    return F.softmax(x.view(*x.shape[:-1], -1, 8), -1).view(x.shape)


def symlog(x: Tensor) -> Tensor:
    return x.sign() * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    return x.sign() * torch.expm1(x.abs())


def mlp(net: Net, x: Tensor, last: Any = None, dropout: float = 0.0) -> Tensor:
    """Linear, dropout (first layer), LayerNorm, Mish; ``last`` behind the norm of the last layer, if any."""
    for i, p in enumerate(net):
        x = F.linear(x, p["weight"], p["bias"])
        if i == 0 and dropout:
            x = F.dropout(x, dropout)
        if "norm.weight" in p:
            x = F.layer_norm(x, x.shape[-1:], p["norm.weight"], p["norm.bias"], 1e-5)
            x = F.mish(x) if last is None or i < len(net) - 1 else last(x)
    return x


def ensemble(net: Net, x: Tensor, dropout: float = 0.0) -> Tensor:
    """All members on the same rows. (K, ..., bins)"""
    one = torch.vmap(lambda p, y: mlp(p, y, None, dropout), (0, None), randomness="different")
    return one(net, x)


def two_hot(x: Tensor) -> Tensor:
    """(..., 1) -> (..., 101)"""
    place = (symlog(x).clamp(-10, 10) + 10) / 0.2
    below = place.floor()
    share = place - below
    out = x.new_zeros(*x.shape[:-1], 101)
    out.scatter_(-1, below.long(), 1 - share)
    return out.scatter_(-1, (below.long() + 1) % 101, share)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return -(two_hot(target) * F.log_softmax(logits, -1)).sum(-1, keepdim=True)


def expected(logits: Tensor) -> Tensor:
    """(..., 101) -> (..., 1)"""
    bins = torch.linspace(-10, 10, 101)
    return symexp((F.softmax(logits, -1) * bins).sum(-1, keepdim=True))


class PlainTDMPC2:
    """The algorithm on copies of a model's weights.

    Args:
        weights: ``state_dict`` of a ``lit_wm.tdmpc2.TDMPC2``.
        discount: gamma.
        dropout: of the critics' first layer while learning.
    """

    def __init__(self, weights: dict[str, Tensor], discount: float, dropout: float = 0.01):
        self.nets: dict[str, Net] = {}
        for name, value in weights.items():
            net, *rest = name.split(".", 2)
            if not rest:
                continue
            layers = self.nets.setdefault(net, [])
            layers += [{} for _ in range(int(rest[0]) + 1 - len(layers))]
            layers[int(rest[0])][rest[1]] = value.detach().clone().requires_grad_(net != "target_critic")
        self.gamma, self.dropout, self.scale = discount, dropout, torch.ones(1)
        params = {k: [p for layer in net for p in layer.values()] for k, net in self.nets.items()}
        self.params = params
        self.model = params["encoder"] + params["dynamics"] + params["reward"] + params["critic"]
        groups = [{"params": params["encoder"], "lr": 9e-5}, {"params": self.model[len(params["encoder"]) :]}]
        self.optimizer = torch.optim.Adam(groups, lr=3e-4, foreach=True)
        self.policy_optimizer = torch.optim.Adam(params["policy"], lr=3e-4, eps=1e-5, foreach=True)

    def encode(self, obs: Tensor) -> Tensor:
        return mlp(self.nets["encoder"], obs, simnorm)

    def next(self, z: Tensor, action: Tensor) -> Tensor:
        return mlp(self.nets["dynamics"], torch.cat([z, action], -1), simnorm)

    def reward(self, z: Tensor, action: Tensor) -> Tensor:
        return mlp(self.nets["reward"], torch.cat([z, action], -1))

    def pi(self, z: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
        """A sample of the policy and its scaled entropy."""
        mean, raw = mlp(self.nets["policy"], z).chunk(2, -1)
        log_std = -10 + 6 * (torch.tanh(raw) + 1)
        gauss = (-0.5 * eps.pow(2) - log_std - 0.5 * math.log(2 * math.pi)).sum(-1, keepdim=True)
        action = torch.tanh(mean + eps * log_std.exp())
        log_prob = gauss - torch.log(F.relu(1 - action.pow(2)) + 1e-6).sum(-1, keepdim=True)
        return action, -log_prob * (action.shape[-1] * gauss / (log_prob + 1e-8))

    def q(self, net: str, z: Tensor, action: Tensor, drawn: Tensor, dropout: float = 0.0) -> Tensor:
        """Values of the two drawn critics, of all that are computed. (2, ..., 1)"""
        return expected(ensemble(self.nets[net], torch.cat([z, action], -1), dropout)[drawn])

    def update(self, obs: Tensor, action: Tensor, reward: Tensor, noise: Any) -> dict[str, Tensor]:
        """One gradient step on (H+1, B, O), (H, B, A), (H, B, 1); what a check compares."""
        H, B, size = action.shape
        K, rho = len(self.nets["critic"][0]["weight"]), 0.5 ** torch.arange(H + 1.0)
        with torch.no_grad():
            next_z = self.encode(obs[1:])
            pi, _ = self.pi(next_z, noise.normal("td/policy", (H, B, size)))
            drawn = noise.uniform("td/q", (K,)).argsort()[:2]
            target = reward + self.gamma * self.q("target_critic", next_z, pi, drawn).amin(0)
        z = self.encode(obs[0])
        zs, consistency = [z], torch.zeros(())
        for t in range(H):
            z = self.next(z, action[t])
            consistency = consistency + rho[t] * F.mse_loss(z, next_z[t])
            zs.append(z)
        latents = torch.stack(zs)
        logits = ensemble(
            self.nets["critic"], torch.cat([latents[:-1], action], -1), self.dropout
        )  # (K, H, B, bins)
        rewards = self.reward(latents[:-1], action)
        reward_loss = value_loss = torch.zeros(())
        for t in range(H):
            reward_loss = reward_loss + rho[t] * cross_entropy(rewards[t], reward[t]).mean()
            for k in range(K):
                value_loss = value_loss + rho[t] * cross_entropy(logits[k, t], target[t]).mean()
        losses = {"consistency": consistency / H, "reward": reward_loss / H, "value": value_loss / (H * K)}
        total = 20 * losses["consistency"] + 0.1 * losses["reward"] + 0.1 * losses["value"]
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.model, 20)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

        fixed = latents.detach()
        pi, entropy = self.pi(fixed, noise.normal("policy", (H + 1, B, size)))
        drawn = noise.uniform("policy/q", (K,)).argsort()[:2]
        for p in self.params["critic"]:
            p.requires_grad_(False)
        q = self.q("critic", fixed, pi, drawn, self.dropout).mean(0)
        low, high = torch.quantile(q[0].detach(), torch.tensor([0.05, 0.95]))
        self.scale.lerp_((high - low).clamp(min=1.0).view(1), 0.01)
        policy_loss = (-(1e-4 * entropy + q / self.scale).mean((1, 2)) * rho).mean()
        policy_loss.backward()
        torch.nn.utils.clip_grad_norm_(self.params["policy"], 20)
        self.policy_optimizer.step()
        self.policy_optimizer.zero_grad(set_to_none=True)
        for p in self.params["critic"]:
            p.requires_grad_(True)
        with torch.no_grad():
            for old, new in zip(self.params["target_critic"], self.params["critic"], strict=True):
                old.lerp_(new, 0.01)
        return {k: v.detach() for k, v in losses.items()} | {"policy": policy_loss.detach()}

    @torch.inference_mode()
    def plan(self, obs: Tensor, noise: Any, size: int = 6, horizon: int = 3) -> tuple[Tensor, Tensor]:
        """First step of an episode of N environments: actions (N, A) and the last values (N, S)."""
        N, S, P, E, H = len(obs), 512, 24, 64, horizon
        start, K = self.encode(obs), len(self.nets["critic"][0]["weight"])
        actions = torch.empty(N, H, S, size)
        z = start.repeat_interleave(P, 0)
        for t in range(H):
            pi, _ = self.pi(z, noise.normal("plan/propose", (N, P, size), t).view(N * P, size))
            actions[:, t, :P] = pi.view(N, P, size)
            if t < H - 1:
                z = self.next(z, pi)
        start = start.repeat_interleave(S, 0)
        mean, std = torch.zeros(N, H, size), torch.full((N, H, size), 2.0)
        for i in range(6):
            eps = noise.normal("plan/candidates", (N, H, S - P, size), i)
            actions[:, :, P:] = (mean.unsqueeze(2) + std.unsqueeze(2) * eps).clamp(-1, 1)
            z, value, discount = start, torch.zeros(N * S, 1), 1.0
            for t in range(H):
                a = actions[:, t].reshape(N * S, size)
                value = value + discount * expected(self.reward(z, a))
                z = self.next(z, a)
                discount *= self.gamma
            pi, _ = self.pi(z, noise.normal("plan/terminal", (N, S, size), i).view(N * S, size))
            drawn = noise.uniform("plan/q", (K,), i).argsort()[:2]
            value = (value + discount * self.q("critic", z, pi, drawn).mean(0)).view(N, S).nan_to_num(0)
            best, index = value.topk(E, 1)
            elites = actions.gather(2, index[:, None, :, None].expand(-1, H, -1, size))
            score = torch.exp(0.5 * (best - best[:, :1]))
            score = (score / score.sum(1, keepdim=True))[:, None, :, None]
            total = score.sum(2) + 1e-9
            mean = (score * elites).sum(2) / total
            std = ((score * (elites - mean.unsqueeze(2)).pow(2)).sum(2) / total).sqrt().clamp(0.05, 2)
        pick = score.view(N, E).log() - noise.exponential("plan/pick", (N, E)).log()
        return elites[torch.arange(N), 0, pick.argmax(1)].clamp(-1, 1), value
