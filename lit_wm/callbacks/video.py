"""The dream as a video: what happened, what the model dreamed, and the difference."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_only

from lit_wm.callbacks.evaluate import Evaluate, data_of
from lit_wm.openloop import video_grid, write_gif


class DreamVideo(pl.Callback):
    """After every evaluation, write a GIF of open-loop dreams on held-out windows.

    Each column is one window: truth above dream above error, green border while the model sees the frames
    (half of the window), red while it dreams. Files are ``videos/dream-ENVSTEPS.gif`` in the run directory
    (with the name of the observation if there are several images) and artifacts of the MLflow run. A failure
    is a warning: a video never ends a training.

    Args:
        rows: windows side by side.
    """

    def __init__(self, rows: int = 6):
        super().__init__()
        self.rows = rows
        self.paths: list[Path] = []  # of the newest dream, one per image
        self._made_at: tuple[int, int] | None = None

    def on_validation_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Show what the evaluation has just seen."""
        if not trainer.sanity_checking:
            self.make(trainer, pl_module)

    @rank_zero_only
    def make(self, trainer: pl.Trainer, module: Any) -> None:
        """Show what the evaluation has measured, once."""
        now = (int(module.updates), int(data_of(trainer).env_steps))
        if now == self._made_at:
            return
        try:
            self._write(trainer, module, now[1])
            self._made_at = now
        except Exception as error:
            warnings.warn(f"no dream video: {type(error).__name__}: {error}", stacklevel=2)

    def _write(self, trainer: pl.Trainer, module: Any, env_steps: int) -> None:
        evaluate = find(trainer, Evaluate)
        if evaluate is None or evaluate.prediction is None or evaluate.measured_at != int(module.updates):
            return
        assert evaluate.results is not None
        assert evaluate.results.windows is not None
        windows, context = evaluate.results.windows, evaluate.window_length // 2
        whole = torch.argsort(windows.valid.sum(1), descending=True, stable=True)[: self.rows]
        images = {k: s for k, s in module.model.spaces.obs.items() if s.is_image}
        paths = []
        for key, spec in images.items():
            truth, dream = windows.obs[key][whole], evaluate.prediction[key].cpu()[whole]
            if spec.channels_first:
                truth, dream = truth.movedim(2, -1), dream.movedim(2, -1)
            name = f"dream-{env_steps:09d}" if len(images) == 1 else f"dream-{key}-{env_steps:09d}"
            path = Path(trainer.default_root_dir) / "videos" / f"{name.replace('/', '_')}.gif"
            paths.append(write_gif(path, video_grid(truth, dream, context)))
            for logger in trainer.loggers:
                if hasattr(logger, "log_artifact"):
                    logger.log_artifact(path, "videos")
        self.paths = paths


def find(trainer: pl.Trainer, kind: type) -> Any:
    """The callback of this class, or None."""
    return next((c for c in trainer.callbacks if isinstance(c, kind)), None)  # type: ignore[attr-defined]
