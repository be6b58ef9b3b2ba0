"""Episodes as a picture: frames side by side, or curves where there are no images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from datamodules.episodes import Episode, Source, checked
from lit_wm.errors import ConfigError, DataError, nearest
from lit_wm.openloop import rgb, write_gif

_COLUMNS, _LENGTH = 10, 200  # frames of an episode on a contact sheet, and at most in a GIF
_WIDTH, _HEIGHT, _GAP = 320, 78, 2  # pixels of a plot, and between pictures
_COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b")


def preview(source: Source, path: Path, episodes: int = 8, entry: str | None = None) -> Path:
    """Write a picture of the first episodes.

    Images become a contact sheet, an episode per row with frames evenly spread over it, or with ``.gif`` a
    video of the episodes side by side. Without images, the first six elements of every entry are plotted.

    Args:
        source: bad episodes are left out.
        path: ``.png`` or ``.gif``; it appears whole or not at all.
        episodes: how many.
        entry: observation to show; the first image if there is one, else all.

    Raises:
        ConfigError: for another suffix, an unknown entry, or a GIF without images.
        DataError: if there is no episode.
    """
    from PIL import Image

    specs, kind = source.schema.spaces.obs, path.suffix.lower()
    if entry not in (None, *specs):
        near = nearest(str(entry), list(specs))
        raise ConfigError(f"--entry: no observation {entry!r}{near}\n  Observations: {', '.join(specs)}")
    name = entry or next((k for k, spec in specs.items() if spec.is_image), None)
    spec = specs[name] if name and specs[name].is_image else None
    if kind not in (".png", ".gif") or (kind == ".gif" and spec is None) or episodes < 1:
        raise ConfigError(f"{path}, {episodes} episodes: expected 1 or more in a .png, or images in a .gif.")
    rows: list[np.ndarray] = []
    for episode in islice(checked(source, "skip_episode"), episodes):
        if spec is None or name is None:
            rows.append(_curves(episode, [entry] if entry else list(specs)))
            continue
        frames = episode.observation[name]
        if kind == ".png":
            frames = frames[np.linspace(0, len(frames) - 1, min(_COLUMNS, len(frames))).round().astype(int)]
        frames = np.moveaxis(frames, 1, -1) if spec.channels_first else frames
        rows.append(rgb(torch.from_numpy(np.array(frames[:_LENGTH]))).numpy())
    if not rows:
        why = " ".join(source.report.notes[:1])
        raise DataError(f"no episode to show. {why}\n  See `lit-wm data doctor`.")
    if kind == ".gif":
        video = [_joined([x[min(t, len(x) - 1)] for x in rows]) for t in range(max(map(len, rows)))]
        return write_gif(path, torch.from_numpy(np.stack(video)))
    sheet = _joined([row if spec is None else _joined(row) for row in rows], 0)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    Image.fromarray(sheet).save(part, "PNG")
    return part.replace(path)


def _joined(pictures: Sequence[np.ndarray] | np.ndarray, axis: int = 1) -> np.ndarray:
    """Pictures (H, W, 3) side by side, or with axis 0 one below the other, on white."""
    most, whole = max(p.shape[1 - axis] for p in pictures), []
    for p in pictures:
        pad = [(0, 0), (0, 0), (0, 0)]
        pad[axis], pad[1 - axis] = (0, _GAP), (0, most - p.shape[1 - axis])
        whole.append(np.pad(p, pad, constant_values=255))
    return np.concatenate(whole, axis)


def _curves(episode: Episode, names: list[str]) -> np.ndarray:
    """Plots of an episode side by side, each with its range. (H, W, 3)"""
    from PIL import Image, ImageDraw

    entries = [*((k, episode.observation[k]) for k in names), *episode.action.items()]
    entries += [] if episode.reward is None else [("reward", episode.reward)]
    plots = []
    for name, value in entries:
        value, low, high = value.reshape(len(value), -1)[:, :6], float(value.min()), float(value.max())
        picture = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
        draw = ImageDraw.Draw(picture)
        title = f"{name}  {low:.4g} to {high:.4g}".encode("latin-1", "replace").decode("latin-1")
        draw.text((2, 1), title, "black")
        x = np.linspace(0, _WIDTH - 1, len(value))
        y = 14 + (_HEIGHT - 15) * (1 - (value - low) / ((high - low) or 1))
        for column, colour in zip(y.T, _COLOURS, strict=False):
            draw.line(list(zip(x.tolist(), column.tolist(), strict=True)), colour)
        plots.append(np.asarray(picture))
    return _joined(plots)
