"""The end of the demo: how well the model foresees, whether that was promised, and what to do next."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from lit_wm.callbacks.checkpoint import ResumableCheckpoint
from lit_wm.callbacks.evaluate import Evaluate, data_of, leaving
from lit_wm.callbacks.video import DreamVideo, find
from lit_wm.errors import LitWMError


class DemoError(LitWMError):
    """The demo has run, but the model is worse than promised."""


class DemoReport(pl.Callback):
    """Print the held-out errors beside their baselines, then five lines: where everything is and what to do
    next.

    Args:
        max_ratio: fail if an image's reconstruction error is more than this many times the mean frame's.
        max_moving_ratio: the same on moving pixels.
        full_config: configuration of the full-size training.
    """

    def __init__(
        self,
        max_ratio: float | None = None,
        max_moving_ratio: float | None = None,
        full_config: str = "configs/dreamer_atari.yaml",
    ):
        super().__init__()
        self.max_ratio, self.max_moving_ratio, self.full_config = max_ratio, max_moving_ratio, full_config

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Measure the final weights and show their dream, if the last evaluation did not."""
        evaluate, video = find(trainer, Evaluate), find(trainer, DreamVideo)
        if evaluate is not None:
            evaluate.catch_up(trainer, pl_module)
            if video is not None:
                video.make(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Print, then check the promise.

        Raises:
            DemoError: a ratio is too high or could not be measured.
        """
        if leaving(trainer):
            return
        evaluate = find(trainer, Evaluate)
        errors = {} if evaluate is None else evaluate.errors
        failures = self._failures(errors)
        if trainer.is_global_zero:
            print("\n".join(["", *error_lines(errors), "", *self.next_lines(trainer, pl_module)]), flush=True)
        failures = trainer.strategy.broadcast(
            failures
        )  # windows differ between processes, the verdict must not
        if failures:
            raise DemoError("\n".join(failures))

    def _failures(self, errors: dict[str, float]) -> list[str]:
        failures = []
        for limit, prefix, what in (
            (self.max_ratio, "", "reconstruction error"),
            (self.max_moving_ratio, "moving/", "reconstruction error on moving pixels"),
        ):
            if limit is None:
                continue
            keys = [n.partition("mean_frame/")[2] for n in errors if n.startswith(f"{prefix}mean_frame/")]
            if not keys:
                failures.append(
                    f"the {what} could not be measured: no held-out frames with a mean frame to compare"
                )
            for key in keys:
                ratio = errors[f"{prefix}reconstruction/{key}"] / errors[f"{prefix}mean_frame/{key}"]
                if not ratio <= limit:  # NaN fails
                    failures.append(
                        f"the held-out {what} of '{key}' is {ratio:.2f} times the mean frame's; "
                        f"at most {limit:g} was promised\n"
                        "Train longer, or report this with the seed and the versions in run.json"
                    )
        return failures

    def next_lines(self, trainer: pl.Trainer, module: Any) -> list[str]:
        """Where run, checkpoint and video are; how to open MLflow, resume, evaluate, train at full size."""
        run, python = short(trainer.default_root_dir), shlex.quote(short(sys.executable))
        if threads := os.environ.get("OMP_NUM_THREADS"):
            python = f"OMP_NUM_THREADS={shlex.quote(threads)} {python}"
        checkpoint, video = find(trainer, ResumableCheckpoint), find(trainer, DreamVideo)
        places = []
        uri = None
        for logger in trainer.loggers:
            if hasattr(logger, "tracking_uri") and hasattr(logger, "run_id"):
                uri = str(logger.tracking_uri)
                places.append(f"MLflow run {logger.run_id} in {uri}")
        if checkpoint is not None and checkpoint.last_model_path:
            places.append(f"checkpoint {short(checkpoint.last_model_path)}")
        if video is not None:
            places += [f"dream video {short(path)}" for path in video.paths]
        last = shlex.quote(short(checkpoint.last_model_path)) if checkpoint is not None else "last"
        more = []
        if trainer.max_steps > 0:
            more.append(f"--trainer.max_steps {2 * trainer.max_steps}")
        data = data_of(trainer)
        if (steps := getattr(data, "max_env_steps", None)) is not None:
            more.append(f"--data.max_env_steps {2 * steps}")
        store = uri if uri is not None and "://" in uri else "sqlite:///mlruns.db"
        look = (
            f"open {store}"
            if store.startswith("http")
            else f"{python} -m mlflow ui --backend-store-uri {store}"
        )
        return [
            f"results:   {', '.join(places)}",
            f"MLflow:    {look}",
            f"resume:    {python} -m lit_wm fit --ckpt_path {last} {' '.join(more)}".rstrip(),
            f"evaluate:  {python} -m lit_wm test --ckpt_path {shlex.quote(run)}",
            f"full size: {python} -m lit_wm fit --config {self.full_config}",
        ]


def error_lines(errors: dict[str, float]) -> list[str]:
    """The errors of :func:`lit_wm.openloop.open_loop_errors` as a table, one paragraph per observation."""
    lines = []
    keys = [name.removeprefix("reconstruction/") for name in errors if name.startswith("reconstruction/")]
    for key in keys:
        here = {
            name.removesuffix(f"/{key}"): value for name, value in errors.items() if name.endswith(f"/{key}")
        }
        lines.append(
            f"held-out error of '{key}' (mean squared error; images in 0 ... 1, vectors in symlog units)"
        )
        mean = here.get("mean_frame")
        ratio = "" if not mean else f"   {here['reconstruction'] / mean:.2f} x mean frame {mean:.6f}"
        lines.append(f"  reconstruction          {here['reconstruction']:.6f}{ratio}")
        horizons = [int(n.removeprefix("open_loop_")) for n in here if n.startswith("open_loop_")]
        for h in sorted(horizons):
            base = "".join(
                f"   {what} {here[name]:.6f}"
                for what, name in (
                    ("mean frame", f"mean_frame_{h}"),
                    ("repeated last frame", f"repeat_last_{h}"),
                )
                if name in here
            )
            lines.append(f"  open loop {h:>3} steps     {here[f'open_loop_{h}']:.6f}{base}")
        if moving := here.get("moving/mean_frame"):
            seen = here["moving/reconstruction"]
            lines.append(
                f"  on moving pixels        {seen:.6f}   {seen / moving:.2f} x mean frame {moving:.6f}"
            )
    return lines or ["held-out error: not measured, no evaluation has seen any frames"]


def short(path: str | Path) -> str:
    """The path as seen from the working directory, if it lies below it."""
    relative = os.path.relpath(path)
    return os.path.abspath(path) if relative.startswith("..") else relative
