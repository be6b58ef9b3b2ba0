"""Planning by sampling: MPPI as in TD-MPC2, and CEM, which is MPPI with equal weights.

Candidates are policy samples, drawn once per plan, and samples around a mean that is refitted to the best
candidates in each iteration. Equal to the authors' code for one environment.

Discrete actions are this project's extension: the mean then holds class probabilities, mixed with a uniform
distribution so that no class is lost, and candidates are drawn from it. These draws are all the exploration.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_wm.functional import one_hot
from lit_wm.noise import Noise
from lit_wm.planners.protocol import Found, Laps, Planner, PlanningModel
from lit_wm.types import State, Tensors

EPS = 1e-9
MANY_ACTIONS, MORE_ITERATIONS = 20, 2


@dataclass(frozen=True)
class MPPI(Planner):
    """Model predictive path integral control: the best candidates count by exp(temperature * value), and the
    first action of one drawn by that weight is executed, in evaluation too.

    Args:
        num_samples: candidates S, policy samples included.
        num_elites: best candidates E that the mean is fitted to.
        iterations: refits; from 20 action entries on two more are done.
        temperature: factor of the values (an inverse temperature); 0 counts all elites alike.
        min_prob: share of the uniform distribution in what discrete candidates are drawn from.
    """

    num_samples: int = 512
    num_elites: int = 64
    iterations: int = 6
    min_prob: float = 0.05
    temperature: float = 0.5
    momentum: float = field(default=0.0, init=False, repr=False)
    ordered = (*Planner.ordered, ("num_elites", "num_samples"), ("num_pi_trajs", "num_samples"))

    def _search(
        self, model: PlanningModel, state: State, mean: Tensor, mask: Tensor | None, noise: Noise, laps: Laps
    ) -> Found:
        n, h, size = mean.shape
        std = torch.full_like(mean, 0.0 if model.discrete else self.max_std)
        # Time before candidates: what the networks read at one step lies together, and sums run in the
        # official order.
        actions = mean.new_empty(n, h, self.num_samples, size)
        free = actions[:, :, self.num_pi_trajs :]
        if p := self.num_pi_trajs:
            actions[:, :, :p] = model.propose(state, p, h, noise).nan_to_num(0).transpose(1, 2)
        trace: list[Tensors] = []
        for i in laps(self.iterations + MORE_ITERATIONS * (size >= MANY_ACTIONS)):
            if model.discrete:
                prob = (1 - self.min_prob) * mean + self.min_prob / size
                prob = prob if mask is None else prob * mask
                race = prob.unsqueeze(2) / noise.exponential("plan/candidates", tuple(free.shape), i)
                free.copy_(one_hot(race.argmax(-1), size))
            else:
                eps = noise.normal("plan/candidates", tuple(free.shape), i)
                torch.mul(std.unsqueeze(2), eps, out=free).add_(mean.unsqueeze(2)).clamp_(-1, 1)
            if mask is not None:
                actions.mul_(mask[:, None])
            values = model.value(state, actions.transpose(1, 2), noise, t=i).float().nan_to_num(0)
            best, index = values.topk(self.num_elites, dim=1)
            elites = actions.gather(2, index[:, None, :, None].expand(-1, h, -1, size))
            score = torch.ones_like(best)  # at temperature 0, where an infinite value would give NaN
            if self.temperature:
                score = torch.exp(self.temperature * (best - best[:, :1]))
            score = score / score.sum(1, keepdim=True)
            weight, total = score[:, None, :, None], score.sum(1)[:, None, None] + EPS
            old = mean, std
            mean = (weight * elites).sum(2) / total
            if not model.discrete:
                std = ((weight * (elites - mean.unsqueeze(2)) ** 2).sum(2) / total).sqrt()
                std = std.clamp(self.min_std, self.max_std)
            if self.momentum:
                mean, std = mean.lerp(old[0], self.momentum), std.lerp(old[1], self.momentum)
            if mask is not None:
                mean, std = mean * mask, std * mask
            trace.append(dict(values=values, elites=index, score=score, mean=mean, std=std))
        return self._pick(elites[:, 0], score, mean[:, 0], model.discrete, noise), mean, std, trace

    def _pick(self, first: Tensor, score: Tensor, mean: Tensor, discrete: bool, noise: Noise) -> Tensor:
        """The action (N, A), from the elites' first actions (N, E, A) or the mean's (N, A)."""
        gumbel = -noise.exponential("plan/pick", tuple(score.shape)).log()
        index = (score.log() + gumbel).argmax(1)
        return first.gather(1, index[:, None, None].expand(-1, 1, first.shape[-1])).squeeze(1)


@dataclass(frozen=True)
class CEM(MPPI):
    """The cross-entropy method: MPPI at temperature 0; the mean's first action is executed, of a discrete one
    the most likely class.

    Args:
        num_samples, num_elites, iterations, min_prob: as for :class:`MPPI`.
        momentum: share of the old mean and standard deviation in the new ones.
    """

    temperature: float = field(default=0.0, init=False, repr=False)
    momentum: float = 0.0

    def _pick(self, first: Tensor, score: Tensor, mean: Tensor, discrete: bool, noise: Noise) -> Tensor:
        return one_hot(mean.argmax(-1), mean.shape[-1]) if discrete else mean
