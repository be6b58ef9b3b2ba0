"""Random shooting: the plainest search, and the one to compare others with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lit_wm.functional import one_hot
from lit_wm.noise import Noise
from lit_wm.planners.protocol import Found, Laps, Planner, PlanningModel
from lit_wm.types import State


@dataclass(frozen=True)
class Random(Planner):
    """The best of many uniform action sequences and of the last plan one step later; nothing is refined, so
    there is one iteration. Exploration adds noise of ``min_std``; in the trace ``elites`` (N, 1) is the best
    candidate and ``score`` (N, 1) its value, NaN never being best.

    Args:
        num_samples: sequences in all, the last plan and policy samples included.
    """

    num_samples: int = 512
    num_pi_trajs: int = 0
    max_std: float = field(default=float("inf"), init=False, repr=False)  # there is none
    ordered = (("num_pi_trajs", "num_samples"),)

    def _search(
        self, model: PlanningModel, state: State, mean: Tensor, mask: Tensor | None, noise: Noise, laps: Laps
    ) -> Found:
        n, h, size = mean.shape
        shape, allowed = (n, h, self.num_samples - self.num_pi_trajs - 1, size), 1 if mask is None else mask
        if model.discrete:
            last = one_hot((mean * allowed).argmax(-1), size)
            race = noise.exponential("plan/candidates", shape)
            drawn = one_hot((mean.new_ones(()) * allowed / race.transpose(1, 2)).argmax(-1), size)
        else:
            last, drawn = mean, 2 * noise.uniform("plan/candidates", shape).transpose(1, 2) - 1
        parts = [last.unsqueeze(1), drawn]
        if p := self.num_pi_trajs:
            parts.insert(0, model.propose(state, p, h, noise).float().nan_to_num(0))
        actions = torch.cat(parts, 1)  # (N, S, H, A)
        actions = actions if mask is None else actions * mask[:, None]
        std = (self.min_std * torch.ones_like(mean)) * allowed
        trace = []
        for _ in laps(1):
            values = model.value(state, actions, noise).float().nan_to_num(-torch.inf)
            score, index = values.max(1, keepdim=True)
            best = actions.gather(1, index[..., None, None].expand(-1, 1, h, size)).squeeze(1)
            trace.append(dict(values=values, elites=index, score=score, mean=best, std=std))
        return best[:, 0], best, std, trace
