"""Time to draw a batch from the replay, beside a memory copy of the same bytes in the same minute.

    python benchmarks/replay.py

Goals: 16 x 64 images at 80 % of the copy or better, 256 x 4 vectors in 0.25 ms or less. One thread, page cache warm.
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
LATENTS = {"deter": Spec("bfloat16", (512,)), "stoch": Spec("uint8", (32,), classes=4)}
TASKS = {
    "images 64x64x3, 16 x 64": (Spaces({"image": Spec("uint8", (64, 64, 3))}, ACTION), 40_000, 16, 64),
    "vectors 39, 16 x 64": (Spaces({"obs": Spec("float32", (39,))}, ACTION), 1_000_000, 16, 64),
    "vectors 39, 256 x 4": (Spaces({"obs": Spec("float32", (39,))}, ACTION), 1_000_000, 256, 4),
}


def timed(work: Callable[[], object], repeats: int = 200) -> tuple[float, float]:
    """Best and median time in ms."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1e3 * min(times), 1e3 * sorted(times)[repeats // 2]


def filled(spaces: Spaces, rows: int, length: int, folder: str) -> RowReplay:
    """A full replay of random observations, written past its rows' checks for speed."""
    replay = RowReplay(spaces, rows, 8, folder, LATENTS, length + 1, online=False)
    for key, spec in replay.storage.specs.items():
        column = replay.storage.columns[key]
        if key[0] == "observation":
            block = torch.randint(0, 255, (min(rows, 10_000), *spec.shape), dtype=torch.uint8).to(
                column.dtype
            )
            for start in range(0, rows, len(block)):
                column[start : start + len(block)] = block
        else:
            column.fill_(key == ("valid",))
    replay.storage.head[:] = rows // 8
    return replay


def main() -> None:
    torch.set_num_threads(1)
    print(f"{'':26}{'best ms':>9}{'median':>9}{'copy best':>11}{'median':>9}{'share best':>12}{'median':>9}")
    for name, (spaces, rows, batch, length) in TASKS.items():
        with tempfile.TemporaryDirectory() as folder:
            replay = filled(spaces, rows, length, folder)
            size = (
                sum(v.nbytes for v in replay.sample(batch)["observation"].flatten_keys().values())
                if ("obs" not in spaces.obs)
                else replay.sample(batch)["observation"].nbytes
            )
            source, target = torch.ones(size, dtype=torch.uint8), torch.ones(size, dtype=torch.uint8)
            copy = timed(lambda: target.copy_(source))  # noqa: B023
            draw = timed(lambda: replay.sample(batch))  # noqa: B023
            shares = [c / d for c, d in zip(copy, draw, strict=True)]
            print(
                f"{name:26}{draw[0]:9.3f}{draw[1]:9.3f}{copy[0]:11.3f}{copy[1]:9.3f}{shares[0]:12.0%}{shares[1]:9.0%}"
            )
            view = timed(lambda: dreamer_view(replay.sample(batch), 1, False, LATENTS))  # noqa: B023
            print(f"{'  with the Dreamer view':26}{view[0]:9.3f}{view[1]:9.3f}")
            replay.close()

    spaces = TASKS["vectors 39, 16 x 64"][0]
    with tempfile.TemporaryDirectory() as folder:
        replay = RowReplay(spaces, 100_000, 4, folder, LATENTS)
        streams, no, yes = np.arange(4), np.zeros(4, bool), np.ones(4, bool)
        obs, action = {"obs": np.ones((4, 39), np.float32)}, {"action": np.ones((4, 6), np.float32)}
        latent = {
            "deter": torch.ones(4, 512, dtype=torch.bfloat16),
            "stoch": torch.ones(4, 32, dtype=torch.uint8),
        }
        best, median = timed(lambda: replay.append(streams, obs, no, yes, action, latent), 2000)
        print(f"{'append 4 rows':26}{best:9.3f}{median:9.3f}")
        best, median = timed(lambda: replay.set_outcome(streams, np.ones(4), no, no), 2000)
        print(f"{'outcome of 4 rows':26}{best:9.3f}{median:9.3f}")
        replay.close()


if __name__ == "__main__":
    main()
