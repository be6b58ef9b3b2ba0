"""Planning by gradient ascent on the actions, through the model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_wm.errors import ConfigError
from lit_wm.noise import Noise
from lit_wm.planners.protocol import Found, Laps, Planner, PlanningModel
from lit_wm.types import State, Tensors

EDGE = 0.999  # candidates start at most here, where tanh still has a slope


@dataclass(frozen=True)
class Gradient(Planner):
    """Adam ascent on atanh of the actions of several candidates; the best sequence seen is executed.

    The candidates are policy samples, the last plan one step later, and tanh(max_std / 2 * noise). Each
    follows its own value, predicted with the policy's mean and all critics, so that nothing is drawn on the
    way. Exploration adds noise of ``min_std``. The model's parameters get no gradient, and a caller's
    ``torch.inference_mode`` does no harm. In the trace, ``elites`` (N, 1) is the iteration's best candidate,
    ``mean`` the best sequence so far, ``score`` (N, 1) its value; NaN is never best.

    Args:
        num_candidates: sequences in all, the last plan included.
        steps: ascent steps, each a backward and a forward pass.
        lr: Adam's step size, before tanh.
    """

    num_candidates: int = 32
    steps: int = 10
    lr: float = 0.1
    ordered = (*Planner.ordered, ("num_pi_trajs", "num_candidates"))

    @torch.inference_mode(False)
    @torch.no_grad()
    def _search(
        self, model: PlanningModel, state: State, mean: Tensor, mask: Tensor | None, noise: Noise, laps: Laps
    ) -> Found:
        if model.discrete:
            raise ConfigError(
                "planner gradient: discrete actions have no gradient; expected continuous ones: choose the "
                "planner mppi, cem, random or policy"
            )
        # Tensors made in inference mode cannot take part in a graph; their copies can.
        state, best, mask = state.map(torch.clone), mean.clone(), None if mask is None else mask.clone()
        n, h, size = best.shape
        starts = [best.unsqueeze(1)]
        if p := self.num_pi_trajs:
            starts.insert(0, model.propose(state, p, h, noise).float().nan_to_num(0))
        if rest := self.num_candidates - p - 1:
            eps = noise.normal("plan/candidates", (n, h, rest, size))
            starts.append(torch.tanh(self.max_std / 2 * eps).transpose(1, 2))
        raw = torch.cat(starts, 1).clamp(-EDGE, EDGE).atanh().requires_grad_()
        adam = torch.optim.Adam([raw], lr=self.lr, maximize=True)
        best_value = best.new_full((n, 1), -torch.inf)
        std = torch.full_like(best, self.min_std) if mask is None else self.min_std * mask.expand_as(best)

        def evaluate(graph: bool) -> tuple[Tensor, Tensor]:
            nonlocal best, best_value
            with torch.set_grad_enabled(graph):
                actions = raw.tanh() if mask is None else raw.tanh() * mask[:, None]
                values = model.value(state, actions, noise, deterministic=True).float()
            top, index = values.detach().nan_to_num(-torch.inf).max(1, keepdim=True)
            chosen = actions.detach().gather(1, index[..., None, None].expand(-1, 1, h, size)).squeeze(1)
            best = torch.where((top > best_value)[..., None], chosen, best)
            best_value = torch.maximum(top, best_value)
            return values, index

        trace: list[Tensors] = []
        values, _ = evaluate(graph=True)
        for i in laps(self.steps):
            gradient = torch.autograd.grad(values, raw, torch.ones_like(values))[0]
            norm = torch.linalg.vector_norm(gradient, dim=(2, 3), keepdim=True)
            raw.grad = gradient / norm.clamp(min=1)
            adam.step()
            values, index = evaluate(graph=i + 1 < self.steps)
            trace.append(dict(values=values.detach(), elites=index, score=best_value, mean=best, std=std))
        return best[:, 0], best, std, trace
