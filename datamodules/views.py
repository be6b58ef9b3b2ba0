"""What a model sees of the rows.

Dreamer counts time by observations: reward and flags of a step are those that came *with* its observation,
while a row holds what its action led to. Sampled windows therefore begin with at least one lead row::

    row      lead       K          K+1                  batch t = row K + t
    obs      (not read) o[0]       o[1]
    action   a[-1]      a[0]       a[1]                 prev_action[t] = action of the row before
    next.*   r[0]       r[1]       r[2]                 reward[t]      = next.reward of the row before
    latent   carry      refreshed by write_back
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lit_wm.types import Batch, Spec, State, Tensors

_PLACE = ("index", "generation", "source")  # where rows are, for whoever writes back
NO_LATENT = 255  # class index where there is no latent; its one-hot vector is zero


def class_index(stoch: Tensor) -> Tensor:
    """Class indices of one-hot groups, uint8; 255 where a group is all zero. (..., S, C) -> (..., S)."""
    value, index = stoch.max(-1)
    return torch.where(value > 0, index, NO_LATENT).to(torch.uint8)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Inverse of :func:`class_index`. (..., S) uint8 -> (..., S, C)."""
    return (index.unsqueeze(-1) == torch.arange(classes, dtype=torch.uint8, device=index.device)).to(dtype)


def to_latents(state: State, specs: Mapping[str, Spec]) -> Tensors:
    """A state in the form in which rows store it, on its own device."""
    latents = {}
    for key, spec in specs.items():
        value = getattr(state, key).detach()
        latents[key] = class_index(value) if spec.is_discrete else value.to(getattr(torch, spec.dtype))
    return latents


def to_state(latents: Mapping[str, Tensor], specs: Mapping[str, Spec]) -> State:
    """Inverse of :func:`to_latents`."""
    deter = latents["deter"]
    if "stoch" not in specs:
        return State(deter)
    classes = specs["stoch"].classes
    assert classes is not None
    return State(deter, one_hot(latents["stoch"], classes, deter.dtype))


def dreamer_view(
    rows: Any, context: int, time_limit_is_terminal: bool | Tensor, latents: Mapping[str, Spec] | None = None,
    tasks: bool = False,
) -> Batch:  # fmt: skip
    """Sampled rows as a Dreamer batch.

    Args:
        rows: what ``RowReplay.sample`` returned for windows of K + T rows.
        context: K. With K = 0 every sequence starts from a zero state: its first step is marked ``is_first``.
        time_limit_is_terminal: whether the value after a time limit is zero, as in the official Atari runs;
            of each row, if it is a tensor (B,).
        latents: the stored latents; None leaves ``carry`` empty.
        tasks: whether the batch names the task of each step of it.

    Returns:
        A batch of T steps. ``is_last`` is also set where the next row starts an episode, which repairs
        episodes that were broken off; the last step of a sequence cannot be repaired.
    """
    lead = max(context, 1)
    first = rows["is_init"].squeeze(-1)  # (B, lead + T)
    outcome = {k: v.squeeze(-1)[:, lead - 1 : -1] for k, v in rows["next"].items()}  # (B, T)
    is_first = first[:, lead:]
    ended = outcome["terminated"]
    if isinstance(time_limit_is_terminal, Tensor):
        ended = ended | (outcome["truncated"] & time_limit_is_terminal[:, None])
    elif time_limit_is_terminal:
        ended = ended | outcome["truncated"]
    is_terminal = ended & ~is_first
    reward = outcome["reward"].masked_fill(is_first, 0.0)
    is_last = ~rows["valid"].squeeze(-1)[:, lead:]
    is_last[:, :-1] |= is_first[:, 1:]
    if context == 0:
        is_first = is_first.clone()
        is_first[:, 0] = True
    return Batch(
        obs=_entries(rows, "observation", "obs"),
        prev_action={k: v[:, lead - 1 : -1] for k, v in _entries(rows, "action", "action").items()},
        reward=reward,
        is_first=is_first,
        is_last=is_last,
        is_terminal=is_terminal,
        carry=to_state(rows["latent"], latents) if latents and context else None,
        task=rows["task"][:, lead:].long() if tasks else None,
        fake=rows["fake_last"].squeeze(-1)[:, lead:] if "fake_last" in rows else None,
        info={k: rows[k] if k == "source" else rows[k][:, lead:] for k in _PLACE if k in rows},
    )


def tdmpc2_view(rows: Any, tasks: bool = False) -> Batch:
    """Sampled rows as a TD-MPC2 batch of T = H + 1 steps, all of one episode::

        row      s          s+1        s+2                  batch t = row s + t
        obs      o[0]       o[1]       o[2]
        action   a[0]       a[1]       (not read)           prev_action[t] = action of the row before
        next.*   r[1]       r[2]       (not read)           reward[t]      = next.reward of the row before
        batch 0  zeros: what led to the first observation is not used

    Args:
        rows: what ``RowReplay.sample`` returned for windows of T rows within episodes.
        tasks: whether the batch names the task of each row of it.

    Returns:
        A batch of T steps. ``is_terminal`` is set where the task itself ended, never by a time limit;
        ``is_first`` and ``is_last`` where the episode begins and ends.
    """
    outcome = rows["next"]
    return Batch(
        obs=_entries(rows, "observation", "obs"),
        prev_action={k: _later(v) for k, v in _entries(rows, "action", "action").items()},
        reward=_later(outcome["reward"].squeeze(-1)),
        is_first=rows["is_init"].squeeze(-1),
        is_last=~rows["valid"].squeeze(-1),
        is_terminal=_later(outcome["terminated"].squeeze(-1)),
        task=rows["task"][:, 0].long() if tasks else None,
        fake=rows["fake_last"].squeeze(-1) if "fake_last" in rows else None,
        info={k: rows[k] for k in _PLACE if k in rows},
    )


def _later(x: Tensor) -> Tensor:
    """Moved on by one step, with zeros first. (B, T, ...)"""
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def _entries(rows: Any, group: str, alone: str) -> Tensors:
    value = rows[group]
    return {alone: value} if isinstance(value, Tensor) else dict(value.items())
