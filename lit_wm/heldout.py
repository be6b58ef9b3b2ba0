"""How well a world model foresees episodes that it was not trained on.

Plain functions on the verbs ``encode``, ``imagine``, ``decode`` and ``q``, so that every world model gets the
same figures. Nothing here needs Lightning, and no other random numbers are drawn than those handed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from lit_wm.noise import Noise
from lit_wm.openloop import posterior
from lit_wm.types import Batch, State, Tensors

HORIZONS = (1, 5, 15)
CONTEXT = 5  # frames that are filtered before a dream may begin
DREAMS = 512  # at most, evenly spread over the steps where one may begin
CHUNK = 256  # dreams and values at a time
SAMPLE = 512  # frames that the spread of an observation is taken from


@torch.no_grad()
def foresee(
    model: Any,
    episodes: Batch,
    noise: Noise | None = None,
    horizons: Sequence[int] = HORIZONS,
    context: int = CONTEXT,
) -> dict[str, float]:
    """Errors of dreams along recorded actions, and how well the values fit what happened.

    Every episode is filtered from its first step on. A dream may begin at each step that has ``context``
    frames (fewer, if the episode is shorter) behind it and one before it, up to :data:`DREAMS` do; horizon h
    is the h-th dreamed step. Values are those of all such steps.

    Args:
        model: with the verbs, ``decodes``, ``reward_scale``, ``contdisc`` and ``gamma``, see
            :class:`~lit_wm.world_model.WorldModel`.
        episodes: one in each row, filled up at its end; ``info["valid"]`` says which steps exist. (B, T)
        noise: source of all random numbers; None takes the model's own.
        horizons: those beyond the episodes are left out.
        context: see above.

    Returns:
        Means over all dreams that reach so far, in the data's units. What is relative is so to the error of
        the best constant guess: 1 is no better than knowing nothing, 0 is perfect. Of episodes with a task
        each figure is of one task and its own entries, ``TASK/...``, and the mean over the tasks that have
        it stands under the plain name.

        - ``open_loop/KEY@h``: mean squared error of an observation. Of images relative to the variance of all
          pixels together, of vectors to that of each entry; of class indices the share that is wrong.
        - ``open_loop/latent@h`` instead, of a model that does not decode: mean squared distance of the
          imagined latent state from the encoded one, relative to the variance of the encoded ones.
        - ``reward/error@h``: mean absolute error, in units of reward. ``reward/relative@h``: relative to the
          mean distance of the rewards from their median; left out where all are equal.
        - ``continue/error@h``: Brier score of the predicted probability, without the discount, that the
          episode goes on after the step.
        - ``value/bias``, ``value/correlation``: see :func:`calibration`.
    """
    if episodes.task is None:
        return _foresee(model, episodes, noise, horizons, context)
    parts: dict[str, dict[str, float]] = {}
    for number in episodes.task.unique().tolist():
        task = model.tasks[number]
        parts[task.name] = _foresee(
            model, _rows(episodes, episodes.task == number), noise, horizons, context, task.obs
        )
    names = dict.fromkeys(name for part in parts.values() for name in part)
    each = {name: [part[name] for part in parts.values() if name in part] for name in names}
    means = {name: sum(values) / len(values) for name, values in each.items()}
    return means | {f"{task}/{name}": x for task, part in parts.items() for name, x in part.items()}


def _foresee(
    model: Any,
    episodes: Batch,
    noise: Noise | None,
    horizons: Sequence[int],
    context: int,
    own: int | None = None,
) -> dict[str, float]:
    """As :func:`foresee`, of one task, whose vectors have ``own`` entries."""
    valid, device = episodes.info["valid"], episodes.reward.device
    lengths, (_, T) = valid.sum(1), valid.shape
    horizons = [h for h in horizons if h < T]
    begin = lengths.sub(1).clamp(max=context) - 1
    time = torch.arange(T, device=device)
    usable = (time >= begin[:, None]) & (time < lengths[:, None] - 1)
    every = usable.nonzero(as_tuple=True)
    if not horizons or not len(every[0]):
        return {}
    rows, times = (x[:: -(-len(x) // DREAMS)] for x in every)
    steps = torch.tensor(horizons, device=device)
    target = (times[:, None] + steps).clamp(max=T - 1)  # (S, h)
    exists = times[:, None] + steps < lengths[rows, None]
    genuine = valid if episodes.fake is None else valid & ~episodes.fake
    gamma = torch.as_tensor(model.gamma(episodes.task), device=device).double().expand(len(lengths))

    heads: list[Tensor] = []
    missed: list[Tensors] = []
    with drawing_from(model, noise):
        start = None if episodes.task is None else replace(model.initial(len(lengths)), task=episodes.task)
        first = episodes.is_first | (time == 0)
        states = posterior(model, episodes.obs, episodes.prev_action, first, start)
        latents = None if model.decodes else _vector(states)
        for e, t, goal in zip(*(x.split(CHUNK) for x in (rows, times, target)), strict=True):
            later = (t[:, None] + torch.arange(1, max(horizons) + 1, device=device)).clamp(max=T - 1)
            actions = {k: v[e[:, None], later] for k, v in episodes.prev_action.items()}
            dream = model.imagine(states[e, t], actions, max(horizons))
            heads.append(torch.cat([dream.rewards[:, steps - 1], dream.continues[:, steps - 1]], 1))
            dreamed = dream.states.stacked.map(lambda x: x[:, steps])
            if latents is not None:
                missed.append({"latent": (_vector(dreamed) - latents[e[:, None], goal]) ** 2})
            else:
                seen = {k: v[e[:, None], goal] for k, v in episodes.obs.items()}
                missed.append(_misses(seen, model.decode(dreamed)))
        q = torch.cat([
            model.q(states[e, t], {k: v[e, t + 1] for k, v in episodes.prev_action.items()})
            for e, t in zip(*(x.split(CHUNK) for x in every), strict=True)
        ]) / model.reward_scale  # fmt: skip

    result: dict[str, float] = {}

    def add(name: str, error: Tensor, keep: Tensor) -> None:  # both (S, h)
        for i, h in enumerate(horizons):
            if keep[:, i].any():
                result[f"{name}@{h}"] = float(error[keep[:, i], i].double().mean())

    reached = exists & genuine[rows[:, None], target]
    for key in missed[0]:
        error = torch.cat([m[key] for m in missed])  # (S, h, ...)
        true = latents if latents is not None else episodes.obs[key]
        if latents is None and true.is_floating_point():
            error, true = error[..., :own], true[..., :own]
        unit = _spread(true[genuine], pooled=latents is not None)
        mean = (error / unit).flatten(2).mean(-1) if error.ndim > 2 else error / unit
        add(f"open_loop/{key}", mean, reached)

    rewards, goes_on = torch.cat(heads).double().chunk(2, 1)
    happened = (~episodes.is_terminal[rows[:, None], target]).double()
    if model.contdisc:
        goes_on = (goes_on / gamma[rows, None]).clamp(max=1)
    add("continue/error", (goes_on - happened) ** 2, exists)
    rewarded = valid.any(1) if episodes.rewarded is None else episodes.rewarded
    known = exists & rewarded[rows, None]
    error = (rewards / model.reward_scale - episodes.reward[rows[:, None], target]).abs()
    add("reward/error", error, known)
    received = episodes.reward[valid & rewarded[:, None] & (time > 0)].double()
    if len(received) and (spread := (received - received.median()).abs().mean()) > 0:
        add("reward/relative", error / spread, known)
    keep = rewarded[every[0]]
    return result | calibration(q[keep], every[0][keep], every[1][keep], episodes, gamma)


def calibration(q: Tensor, rows: Tensor, times: Tensor, episodes: Batch, gamma: Tensor) -> dict[str, float]:
    """How predicted values compare with the discounted rewards that followed, in units of reward.

    A terminated episode shows the whole return of the recorded behaviour. One that was cut shows n steps of
    it: there the prediction for those steps, ``q - gamma^n * q_last`` with the last value that the model
    gives itself, is compared with their rewards. Both are then about ``1 - gamma^n``, the share that is seen,
    of the whole: a value that is wrong by b everywhere is wrong by that share of b, and even a constant one
    grows with the steps left. So the differences are weighed by the share, and for the correlation the
    multiple of it that fits best is taken out of both. (``q`` beside ``rewards + gamma^n * q_last`` would
    compare ``q`` with itself: rising values of falling returns correlate where gamma^n is large.)

    Args:
        q: predicted values of the recorded actions at the steps (rows, times).    (S,)
        episodes: as for :func:`foresee`.
        gamma: discount of each episode.                                           (B,)

    Returns:
        ``value/bias``: mean of predicted minus observed returns. Above 0 the model is optimistic, or its
        policy better than the recorded one. ``value/correlation``: of what is left of the two, the plain one
        if every episode terminated; without one of them that varies beyond the share there is none.
    """
    lengths = episodes.info["valid"].sum(1)
    last = lengths - 1
    ended = episodes.is_terminal.gather(1, last[:, None]).squeeze(1)
    stop = torch.where(ended, last, last - 1)  # a cut episode's last value is that of its last action
    reward, value = episodes.reward.double(), torch.zeros_like(episodes.reward, dtype=torch.float64)
    value[rows, times] = q.double()
    returns = torch.zeros_like(reward)
    for t in range(reward.shape[1] - 2, -1, -1):
        returns[:, t] = torch.where(t < stop, reward[:, t + 1] + gamma * returns[:, t + 1], 0)
    keep = times < stop[rows]
    rows, times = rows[keep], times[keep]
    unseen = torch.where(ended[rows], 0, gamma[rows] ** (stop[rows] - times))
    both = torch.stack([q.double()[keep] - unseen * value[rows, stop[rows]], returns[rows, times]])  # (2, S)
    share = 1 - unseen
    if share.sum() < 1e-6:
        return {}
    result = {"value/bias": float((both[0] - both[1]).sum() / share.sum())}
    left = both - torch.outer(both @ share, share) / (share @ share)
    if (left.norm(dim=1) > 1e-6 * both.norm(dim=1)).all():
        result["value/correlation"] = float(left[0] @ left[1] / left.norm(dim=1).prod())
    return result


def lines_of(found: Mapping[str, float]) -> list[str]:
    """The figures ``val/...`` of a validation to be read: losses, then each error with its horizons side by
    side; of several tasks the means.
    """
    lines: dict[str, list[str]] = {}
    for name, value in found.items():
        key, _, horizon = name.removeprefix("val/").partition("@")
        head, _, rest = key.partition("/")
        if head == "loss":
            lines.setdefault("losses", []).append(f"{rest} {value:.4g}")
        elif head in ("open_loop", "reward", "continue", "value"):
            lines.setdefault(key, []).append(f"@{horizon:<2} {value:<9.4g}" if horizon else f"{value:.4g}")
    return [
        f"  {key:<22}{', '.join(x) if key == 'losses' else '  '.join(x)}".rstrip() for key, x in lines.items()
    ]


@contextmanager
def drawing_from(model: Any, noise: Noise | None) -> Iterator[None]:
    """All verbs of ``model`` draw from ``noise`` in here, and its own streams stay as they are."""
    before = model.noise
    model.noise = before if noise is None else noise
    try:
        yield
    finally:
        model.noise = before


def _rows(episodes: Batch, keep: Tensor) -> Batch:
    """Some of the rows."""
    some: dict[str, Any] = {f.name: getattr(episodes, f.name) for f in fields(episodes)}
    for name, x in some.items():
        if isinstance(x, Tensor | dict):
            some[name] = x[keep] if isinstance(x, Tensor) else {k: v[keep] for k, v in x.items()}
    return replace(episodes, **some)


def _vector(state: State) -> Tensor:
    parts = [state.deter] if state.stoch is None else [state.deter, state.stoch.flatten(-2)]
    return torch.cat([p.float() for p in parts], -1)


def _misses(seen: Tensors, decoded: Tensors) -> Tensors:
    """Squared errors, of images in 0 ... 1; 1 for each wrong class index. (S, h, ...)"""
    result = {}
    for key, true in seen.items():
        if true.dtype == torch.uint8:
            true = true.float() / 255
        floats = true.is_floating_point()
        result[key] = (decoded[key].float() - true) ** 2 if floats else (decoded[key] != true).float()
    return result


def _spread(x: Tensor, pooled: bool) -> Tensor:
    """Variance of each entry, of images and if ``pooled`` their mean; 1 of class indices and of what never
    changes. (N, ...)
    """
    image = x.dtype == torch.uint8
    if not image and not x.is_floating_point():
        return torch.ones((), device=x.device)
    x = x[:: -(-len(x) // SAMPLE)].float() / (255 if image else 1)
    variance = x.var(0, correction=0)
    variance = variance.mean() if image or pooled else variance
    return torch.where(variance < 1e-12, 1, variance)
