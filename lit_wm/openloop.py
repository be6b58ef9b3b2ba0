"""What a world model dreams: filter a few recorded frames, then imagine on with the recorded actions.

Plain functions on the verbs of a world model (``encode``, ``imagine``, ``decode``), used by evaluation, the
dream video and the demo's report. Nothing here needs Lightning.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_wm.functional import symlog
from lit_wm.types import State, Tensors, Trajectory

MOVING = 0.1  # a pixel moves where it is further than this from the mean frame, in [0, 1] units
GREEN, RED = (0, 255, 0), (255, 0, 0)
BORDER = 2  # pixels
FPS = 15


def posterior(
    model: Any,
    obs: Tensors,
    prev_action: Tensors,
    is_first: Tensor,
    carry: State | None = None,
    noise: Any = None,
) -> State:
    """Filter recorded observations step by step.

    Args:
        model: a world model with the verb ``encode``.
        obs: observations as recorded, by key.                                    (B, T, ...)
        prev_action: action executed before each observation, by key.             (B, T, ...)
        is_first: where an episode begins.                                        (B, T) bool
        carry: state of the step before the first one; None starts from zeros.    (B, ...)
        noise: another source of noise than the model's own.

    Returns:
        The states at all T steps.                                                (B, T, ...)
    """
    extra = {} if noise is None else {"noise": noise}
    state, states = carry, []
    for t in range(is_first.shape[1]):
        now = {k: v[:, t] for k, v in obs.items()}
        action = {k: v[:, t] for k, v in prev_action.items()}
        state = model.encode(now, state, action, is_first[:, t], **extra)
        states.append(State(state.deter, state.stoch, task=state.task))
    return stack(states)


def run_imagination(model: Any, obs: Any, actions: Any) -> Trajectory:
    """What a model believes that ``actions`` lead to from ``obs``, the first observation of an episode.

    Args:
        model: either module, or a model of theirs.
        obs: (B, ...), a tensor or array, or several by name.
        actions: (B, H, ...) likewise.
    """
    return model.imagine(model.encode(obs), actions)


def stack(states: Sequence[State]) -> State:
    """Stack T states (B, ...) along a new time axis to one state (B, T, ...)."""

    def joined(name: str) -> Any:
        parts = [getattr(s, name) for s in states]
        return None if parts[0] is None else torch.stack(parts, 1)

    return State(joined("deter"), joined("stoch"), task=joined("task"))


def dream(model: Any, start: State, actions: Tensors, noise: Any = None) -> State:
    """Imagine from ``start`` (B, ...) with ``actions`` (B, H, ...): the H states after it, (B, H, ...)."""
    horizon = next(iter(actions.values())).shape[1]
    extra = {} if noise is None else {"noise": noise}
    states = model.imagine(
        State(start.deter, start.stoch, task=start.task), actions, horizon, **extra
    ).states.stacked
    return State(states.deter[:, 1:], None if states.stoch is None else states.stoch[:, 1:])


@torch.no_grad()
def open_loop(
    model: Any,
    obs: Tensors,
    prev_action: Tensors,
    is_first: Tensor,
    context: int,
    carry: State | None = None,
    noise: Any = None,
) -> Tensors:
    """Reconstruct the first ``context`` frames, dream the others from the recorded actions.

    Args:
        model: a world model with the verbs ``encode``, ``imagine`` and ``decode``.
        obs: observations as recorded, by key.                                    (B, T, ...)
        prev_action: action executed before each observation, by key.             (B, T, ...)
        is_first: where an episode begins.                                        (B, T) bool
        context: number of frames the model sees, 1 <= context < T.
        carry: state of the step before the first one; None starts from zeros.    (B, ...)
        noise: another source of noise than the model's own.

    Returns:
        What ``decode`` says for every frame, by key.                             (B, T, ...)
    """
    check_context(context, is_first.shape[1])
    first = {k: v[:, :context] for k, v in obs.items()}
    past = {k: v[:, :context] for k, v in prev_action.items()}
    future = {k: v[:, context:] for k, v in prev_action.items()}
    seen = posterior(model, first, past, is_first[:, :context], carry, noise)
    dreamed = dream(model, seen.at(-1), future, noise)
    before, after = model.decode(seen), model.decode(dreamed)
    return {k: torch.cat([before[k], after[k]], 1) for k in before}


def check_context(context: int, length: int) -> None:
    """Raise unless some of ``length`` frames are seen and some are dreamed."""
    if not 1 <= context < length:
        raise ValueError(
            f"context must be at least 1 and less than the {length} frames of a window, got {context}"
        )


@torch.no_grad()
def reconstruct(
    model: Any,
    obs: Tensors,
    prev_action: Tensors,
    is_first: Tensor,
    carry: State | None = None,
    noise: Any = None,
) -> Tensors:
    """Decode the filtered states of all T frames, by key (B, T, ...): what the model keeps of them."""
    return model.decode(posterior(model, obs, prev_action, is_first, carry, noise))


def open_loop_errors(
    obs: Tensors,
    reconstruction: Tensors,
    prediction: Tensors,
    context: int,
    horizons: Sequence[int] = (5, 15),
    mean: Mapping[str, Tensor] | None = None,
    valid: Tensor | None = None,
) -> dict[str, float]:
    """Errors of reconstruction and dream beside those of two plain baselines.

    Errors are mean squared errors: of images in [0, 1] pixel units, of vectors in symlog units. Of class
    indices it is the share that is wrong. Horizon h is the h-th dreamed frame, index ``context - 1 + h``.

    Args:
        obs: observations as recorded, by key.                                    (B, T, ...)
        reconstruction: decoded posteriors of all frames, of :func:`reconstruct`. (B, T, ...)
        prediction: of :func:`open_loop` with the same ``context``.               (B, T, ...)
        context: number of frames that the dream has seen.
        horizons: dreamed steps to look at; those beyond the window are left out.
        mean: mean frame of the training data by key, images in [0, 1].           (...)
        valid: which frames exist, where windows are of unequal length.           (B, T) bool

    Returns:
        ``reconstruction/KEY``, ``open_loop_H/KEY``, ``repeat_last_H/KEY``; with a mean frame also
        ``mean_frame/KEY``, ``mean_frame_H/KEY`` and, for images with moving pixels (further than 0.1 from
        the mean frame in any channel), ``moving/reconstruction/KEY``, ``moving/mean_frame/KEY``,
        ``moving/open_loop_H/KEY``, ``moving/mean_frame_H/KEY``.
        An error without a single frame to average over is left out.
    """
    length = next(iter(prediction.values())).shape[1]
    check_context(context, length)
    steps = {h: context - 1 + h for h in horizons if context - 1 + h < length}
    result: dict[str, float] = {}

    def add(name: str, error: Tensor, keep: Tensor) -> None:  # both of one shape
        if keep.any():
            result[name] = float(error[keep].double().mean())

    for key, guess in prediction.items():
        true = in_units(obs[key])
        keep = torch.ones(true.shape[:2], dtype=torch.bool) if valid is None else valid
        keep = keep.to(true.device)
        plain = _squared if true.is_floating_point() else _wrong
        repeated = true[:, context - 1 : context].expand_as(true)
        centre = None
        if mean is not None and key in mean:
            centre = mean[key].to(true).expand_as(true)

        add(f"reconstruction/{key}", frame_error(obs[key], reconstruction[key]), keep)
        if centre is not None:
            add(f"mean_frame/{key}", _squared(true, centre), keep)
        for h, t in steps.items():
            add(f"open_loop_{h}/{key}", frame_error(obs[key], guess)[:, t], keep[:, t])
            add(f"repeat_last_{h}/{key}", plain(true, repeated)[:, t], keep[:, t])
            if centre is not None:
                add(f"mean_frame_{h}/{key}", _squared(true, centre)[:, t], keep[:, t])
        if centre is None or not _is_image(obs[key]):
            continue

        channel = 2 if obs[key].shape[2] <= 16 < obs[key].shape[-1] else -1  # CHW or HWC
        moving = (true - centre).abs().amax(channel, keepdim=True) > MOVING
        moving = (moving & keep[:, :, None, None, None]).expand_as(true)
        seen, dreamed = reconstruction[key].to(true), guess.to(true)
        add(f"moving/reconstruction/{key}", (seen - true) ** 2, moving)
        add(f"moving/mean_frame/{key}", (centre - true) ** 2, moving)
        for h, t in steps.items():
            add(f"moving/open_loop_{h}/{key}", ((dreamed - true) ** 2)[:, t], moving[:, t])
            add(f"moving/mean_frame_{h}/{key}", ((centre - true) ** 2)[:, t], moving[:, t])
    return result


def in_units(x: Tensor) -> Tensor:
    """The units of the errors: images in [0, 1], vectors in symlog space, class indices as they are."""
    if x.dtype == torch.uint8:
        return x.float() / 255
    return symlog(x.float()) if x.is_floating_point() else x.long()


def frame_error(recorded: Tensor, decoded: Tensor) -> Tensor:
    """Error of each frame of ``decoded`` (B, T, ...) against the observations as ``recorded``. (B, T)

    ``decoded`` is what ``WorldModel.decode`` returns: images in [0, 1], vectors in environment units, class
    indices.
    """
    true = in_units(recorded)
    if _is_image(recorded):
        return _squared(true, decoded.to(true))
    if recorded.is_floating_point():
        return _squared(true, symlog(decoded.float()))
    return _wrong(true, decoded)


def _is_image(x: Tensor) -> bool:
    return x.dtype == torch.uint8


def _squared(true: Tensor, guess: Tensor) -> Tensor:
    error = (guess - true) ** 2
    return error.flatten(2).mean(-1) if error.ndim > 2 else error


def _wrong(true: Tensor, guess: Tensor) -> Tensor:
    error = (guess != true).float()
    return error.flatten(2).mean(-1) if error.ndim > 2 else error


def video_grid(truth: Tensor, pred: Tensor, context: int) -> Tensor:
    """The dream as a video: each row's truth above its prediction above their difference, rows side by side.

    The border of :data:`BORDER` pixels is green while the model sees the frames and red while it dreams; up
    to ten black frames mark the end before the video starts again.

    Args:
        truth: recorded frames.                                                   (B, T, H, W, C) uint8
        pred: predicted frames, float in [0, 1] or uint8.                         (B, T, H, W, C)
        context: number of frames that the model has seen.

    Returns:
        (T + min(10, T), 3H + 4, B * (W + 4), 3) uint8

    Source: the official agent's ``report``.
    """
    if truth.shape != pred.shape or truth.dtype != torch.uint8:
        raise ValueError(
            f"truth {tuple(truth.shape)} {truth.dtype} must be uint8 and shaped as pred {tuple(pred.shape)}"
        )
    if pred.dtype != torch.uint8:
        pred = (pred.float() * 255).clamp(0, 255).to(torch.uint8)  # truncates, as the official code does
    error = (pred.int() - truth.int() + 255).div(2, rounding_mode="trunc").to(torch.uint8)
    inner = rgb(torch.cat([truth, pred, error], 2))  # (B, T, 3H, W, 3)
    batch, length, height, width, _ = inner.shape
    seen = (torch.arange(length, device=inner.device) < context)[:, None]  # (T, 1)
    colour = torch.where(seen, inner.new_tensor(GREEN), inner.new_tensor(RED))  # (T, 3)
    shape = (batch, length, height + 2 * BORDER, width + 2 * BORDER, 3)
    video = colour[None, :, None, None, :].expand(shape).clone()
    video[:, :, BORDER:-BORDER, BORDER:-BORDER] = inner
    video = torch.cat([video, torch.zeros_like(video[:, :10])], 1)
    return video.permute(1, 2, 0, 3, 4).flatten(2, 3)


def rgb(x: Tensor) -> Tensor:
    """Three channels: RGB as it is, anything else by its mean."""
    if x.shape[-1] == 3:
        return x
    gray = x if x.shape[-1] == 1 else x.float().mean(-1, keepdim=True).to(torch.uint8)
    return gray.expand(*x.shape[:-1], 3)


def write_gif(path: str | Path, video: Tensor, fps: float = FPS) -> Path:
    """Write a video (T, H, W, 3) uint8 as an endless GIF; the file appears whole or not at all."""
    from PIL import Image

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [Image.fromarray(frame) for frame in video.cpu().numpy()]
    # GIF counts hundredths of a second: round the moments, not the durations, so that the mean rate is right.
    moments = [round(100 * t / fps) for t in range(len(frames) + 1)]
    durations = [10 * (b - a) for a, b in zip(moments[:-1], moments[1:], strict=True)]
    part = path.with_name(f".{path.name}.part")
    frames[0].save(part, format="GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    os.replace(part, path)
    return path
