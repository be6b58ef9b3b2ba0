"""One line of progress in the units that matter: environment steps, updates, return, rates, time left."""

from __future__ import annotations

import shutil
import sys
import time
from collections import deque
from datetime import timedelta
from typing import Any, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar

from lit_wm.callbacks.evaluate import data_of


class RLProgressBar(ProgressBar):
    """A line that is rewritten in a terminal and repeated now and then in a log.

    Args:
        refresh_s: seconds between two updates of the line in a terminal.
        log_every_s: seconds between two lines where the output is no terminal.
        window_s: rates are means over this many seconds.
    """

    def __init__(self, refresh_s: float = 0.5, log_every_s: float = 30.0, window_s: float = 60.0):
        super().__init__()
        self.refresh_s, self.log_every_s, self.window_s = refresh_s, log_every_s, window_s
        self.last_return: float | None = None
        self._logged: float | None = None
        self._enabled = True
        self._shown = float("-inf")
        self._width = 0
        self._history: deque[tuple[float, int, int]] = deque()

    def disable(self) -> None:
        """Say nothing; Lightning calls this in all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print a line of its own above the progress."""
        if self._enabled:
            self.clear()
            print(*args, **kwargs)

    @property
    def _file(self) -> TextIO:
        return sys.stderr

    # --- Hooks -------------------------------------------------------------------------------------

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """The first update can take a while: the replay fills first."""
        self._history.clear()
        self._shown = float("-inf")
        if not int(pl_module.updates) and getattr(data_of(trainer), "env", "") is not None:
            self._show("filling the replay ...", float("-inf"))

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count, and show the line if it is time."""
        now = time.monotonic()
        data = data_of(trainer)
        if finished := getattr(getattr(data, "collector", None), "finished", None):
            self.last_return = float(finished[-1][0])
        logged = getattr(pl_module, "latest", {}).get("train/return")
        if logged is not self._logged:  # the metrics have just taken what has finished
            self.last_return = self._logged = logged
        self._history.append((now, int(pl_module.env_steps), int(pl_module.updates)))
        while len(self._history) > 2 and now - self._history[0][0] > self.window_s:
            self._history.popleft()
        if self._is_due(now):
            self._show(self.line(trainer), now)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Evaluation makes no updates: say what is going on."""
        now = time.monotonic()
        if trainer.state.fn == "fit" and (self._file.isatty() or self._is_due(now)):
            self._show(self.line(trainer) + " | evaluating ...", now)

    def episodes(self, done: int, total: int, steps: int, trainer: pl.Trainer | None = None) -> None:
        """Show how many episodes of an evaluation are done; with the last one the line goes."""
        now = time.monotonic()
        if done >= total:
            self.clear()
        elif self._is_due(now):
            lead = ""
            if trainer is not None and trainer.state.fn == "fit":
                lead = f"{self.line(trainer)} | evaluating: "
            line = f"{lead}episodes {done:,}/{total:,} | {steps:,} step{'s' * (steps != 1)}"
            if self._shown == float("-inf") and not self._file.isatty():  # its counts would say nothing
                line = f"playing {total:,} episode{'s' * (total != 1)} ..."
            self._show(line, now)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        """Leave the last line standing."""
        if self._history:
            self._show(self.line(trainer), time.monotonic())
        if self._enabled and self._file.isatty():
            self._file.write("\n")
        self._width = 0

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Errors begin on a line of their own."""
        if self._enabled and self._width:
            self._file.write("\n")
        self._width = 0

    # --- The line ----------------------------------------------------------------------------------

    def line(self, trainer: pl.Trainer) -> str:
        """For example ``env steps 1,200/10,000 12% | updates 38 | return 21.0 | ... | ETA 0:01:32``."""
        if not self._history:
            return "env steps 0"
        (began, steps0, updates0), (now, steps, updates) = self._history[0], self._history[-1]
        seconds = now - began
        rates = ((steps - steps0) / seconds, (updates - updates0) / seconds) if seconds > 0 else (0.0, 0.0)
        data = data_of(trainer)
        most_steps = getattr(data, "max_env_steps", None)
        most_updates = trainer.max_steps if trainer.max_steps > 0 else None
        collects = getattr(data, "env", "") is not None
        parts = [_count("env steps", steps, most_steps)] if collects else []
        parts.append(_count("updates", updates, most_updates))
        if self.last_return is not None:
            parts.append(f"return {self.last_return:.1f}")
        if seconds > 0:
            parts.append(f"{_rate(rates[0])} env steps/s " * collects + f"{_rate(rates[1])} updates/s")
        limits = ((most_steps, steps, rates[0]), (most_updates, updates, rates[1]))
        left = [(most - count) / rate for most, count, rate in limits if most and rate > 0]
        if left:
            parts.append(f"ETA {timedelta(seconds=round(max(0.0, min(left))))}")
        return " | ".join(parts)

    def _is_due(self, now: float) -> bool:
        return now - self._shown >= (self.refresh_s if self._file.isatty() else self.log_every_s)

    def _show(self, line: str, now: float) -> None:
        self._shown = now
        if not self._enabled:
            return
        if self._file.isatty():
            line = line[: shutil.get_terminal_size().columns - 1]
            self._file.write("\r" + line.ljust(self._width))
            self._width = len(line)
        else:
            self._file.write(line + "\n")
        self._file.flush()

    def clear(self) -> None:
        """Take the line away, where it is one of a terminal."""
        if self._width:
            self._file.write("\r" + " " * self._width + "\r")
            self._width = 0


def _count(name: str, value: int, most: int | None) -> str:
    return f"{name} {value:,}" + (f"/{most:,} {min(1.0, value / most):.0%}" if most else "")


def _rate(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"
