"""Time to draw a batch from the replay, beside a memory copy of the same bytes in the same minute.

    python benchmarks/replay.py

Goals: 16 x 64 images at 80 % of the copy or better, 256 x 4 vectors in 0.25 ms or less. One thread, page
cache warm.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch

from datamodules.replay import RowReplay
from datamodules.views import dreamer_view
from lit_wm.types import Spaces, Spec

ACTION = {"action": Spec("float32", (6,))}
IMAGES = Spaces({"obs": Spec("uint8", (64, 64, 3))}, ACTION)
VECTORS = Spaces({"obs": Spec("float32", (39,))}, ACTION)
LATENTS = {"deter": Spec("bfloat16", (512,)), "stoch": Spec("uint8", (32,), classes=4)}
TASKS = [
    ("images 64x64x3, 16 x 64", IMAGES, None, 40_000, 16, 64),
    ("vectors 39, 16 x 64", VECTORS, None, 1_000_000, 16, 64),
    ("vectors 39, 256 x 4", VECTORS, None, 1_000_000, 256, 4),
    ("vectors and latents", VECTORS, LATENTS, 1_000_000, 256, 4),
]


def timed(work: Callable[[], object], repeats: int = 300) -> tuple[float, float]:
    """Best and median time in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), 1e3 * sorted(times)[repeats // 2]


def filled(spaces: Spaces, latents: dict[str, Spec] | None, rows: int, length: int, folder: str) -> RowReplay:
    """A full replay, written by columns instead of row by row to save time."""
    replay = RowReplay(spaces, rows, 8, folder, latents, length + 1, online=False)
    block = torch.randint(0, 255, (10_000, *spaces.obs["obs"].shape), dtype=torch.uint8)
    for key, column in replay.storage.columns.items():
        if key == ("observation",):
            for start in range(0, rows, len(block)):
                column[start : start + len(block)] = block
        else:
            column.fill_(key == ("valid",))
    replay.storage.head[:] = rows // 8
    return replay


def draws() -> None:
    """Sampling, without and with the view."""
    print(
        f"{'ms':26}{'draw best':>10}{'median':>9}{'with view':>11}"
        f"{'copy best':>11}{'median':>9}{'share':>8}{'median':>9}"
    )
    for name, spaces, latents, rows, batch, length in TASKS:
        with tempfile.TemporaryDirectory() as folder:
            replay = filled(spaces, latents, rows, length, folder)
            target = torch.ones_like(replay.sample(batch)["observation"])
            source = target.clone()
            copy = timed(lambda: target.copy_(source))  # noqa: B023
            draw = timed(lambda: replay.sample(batch))  # noqa: B023
            view = timed(lambda: dreamer_view(replay.sample(batch), 1, False, latents))  # noqa: B023
            share = [c / d for c, d in zip(copy, draw, strict=True)]
            print(
                f"{name:26}{draw[0]:10.3f}{draw[1]:9.3f}{view[1]:11.3f}{copy[0]:11.3f}{copy[1]:9.3f}"
                f"{share[0]:8.0%}{share[1]:9.0%}"
            )
            replay.close()


def writes() -> None:
    """Writing one row to each of four streams."""
    with tempfile.TemporaryDirectory() as folder:
        replay = RowReplay(VECTORS, 100_000, 4, folder, LATENTS)
        streams, no, yes = np.arange(4), np.zeros(4, bool), np.ones(4, bool)
        obs, action = {"obs": np.ones((4, 39), np.float32)}, {"action": np.ones((4, 6), np.float32)}
        latent = {"deter": torch.ones(4, 512).bfloat16(), "stoch": torch.ones(4, 32, dtype=torch.uint8)}
        for name, work in (
            ("append 4 rows", lambda: replay.append(streams, obs, no, yes, action, latent)),
            ("outcome of 4 rows", lambda: replay.set_outcome(streams, np.ones(4), no, no)),
        ):
            best, median = timed(work, 2000)
            print(f"{name:26}{best:10.3f}{median:9.3f}")
        replay.close()


if __name__ == "__main__":
    torch.set_num_threads(1)
    draws()
    writes()
