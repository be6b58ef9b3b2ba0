"""An ensemble of dynamics heads: where its members disagree, the data say little."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_wm.nets.normed import Layers
from lit_wm.returns import gather_values

RATE = 0.01  # share of a batch in the running mean


class Ensemble(nn.Module):
    """Members that predict the next latent state from a state and an action, from different starts.

    They are drawn apart from all other random numbers, read the world model's states without sending
    gradients back, and have an optimizer of their own: a model with an ensemble that nothing uses learns bit
    for bit what it learns without.

    Args:
        inputs: size of state and action together.
        outputs: size of what is predicted.
        members: how many.
        units: width of the two hidden layers.

    Source: Sekar et al. 2020, "Planning to explore via self-supervised world models"; Yu et al. 2020, "MOPO".
    """

    def __init__(self, inputs: int, outputs: int, members: int, units: int):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.net = Layers(inputs, units, units, outputs, members=members)
        self.register_buffer("moving", torch.zeros(2))  # mean disagreement, and its weight so far

    moving: Tensor

    def loss(self, x: Tensor, target: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error of all members, and their mean disagreement on the data.

        Args:
            x: states and actions. (..., inputs)
            target: the next states, as they were inferred. (..., outputs)
            keep: which of them count. (...)
        """
        weight = keep.flatten().float()
        weight = weight / weight.sum().clamp(min=1.0)
        predicted = self.net(x.detach().flatten(0, -2))
        error = (predicted - target.detach().flatten(0, -2).float()).square().mean(-1)
        mean = (_spread(predicted.detach()) * weight).sum()
        if self.training:
            now = torch.stack([gather_values(mean).mean(), torch.ones_like(mean)])
            self.moving.lerp_(now, RATE)
        return (error * weight).sum(-1).mean(), mean

    def disagreement(self, x: Tensor) -> Tensor:
        """Standard deviation of the members, 1 where it is as large as on average in the data; the
        members get no gradient. (..., inputs) -> (...)
        """
        mean, weight = self.moving
        usual = torch.where(weight > 0, mean / weight.clamp(min=1e-9), 1.0).clamp(min=1e-9)
        every = torch.arange(len(self.net.first.weight), device=x.device)
        return _spread(self.net.chosen(every, x.flatten(0, -2))).view(x.shape[:-1]) / usual


def _spread(predicted: Tensor) -> Tensor:
    """(K, N, outputs) -> (N,); the floor keeps the root's slope finite where all agree."""
    return predicted.var(0, correction=0).mean(-1).clamp(min=1e-12).sqrt()
