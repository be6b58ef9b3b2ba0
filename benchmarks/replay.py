"""Time to draw a batch from the replay and to ingest a dataset, beside what the machine and others need.

    python benchmarks/replay.py                 writes benchmarks/results/replay.md
    python benchmarks/replay.py --only ingest   prints that part

One process, one thread, page cache warm; every round times all of a row's columns once, in turn, so that
they meet the same noise. Goals: images at 80 % of a memory copy or better; vectors within three times of a
bare ``index_select`` of the same rows; at 5 million rows while writing at most 6 times the time at ten
thousand and at most 0.5 ms; ingest within twice the time of reading the file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import shutil
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tensordict
import torch
import torchrl
from tensordict import TensorDict

from datamodules.cache import Cache, ingest
from datamodules.episodes import Episode, Schema, Source
from datamodules.mixture import Mixture, Prefetch
from datamodules.offline import CacheRows
from datamodules.replay import RowReplay
from datamodules.rows import nested
from datamodules.selection import SourceSpec, model_spaces
from datamodules.sources import register
from datamodules.views import dreamer_view, tdmpc2_view
from lit_wm.types import Spaces, Spec

ACTION = {"action": Spec("float32", (6,))}
IMAGES = Spaces({"obs": Spec("uint8", (64, 64, 3))}, ACTION)
VECTORS = Spaces({"obs": Spec("float32", (39,))}, ACTION)
READ = ["action", ("next", "reward"), ("next", "terminated"), "is_init", "valid"]  # what every batch has
# Name, spaces, rows, rows of an episode, batch, steps.
TASKS = [
    ("images 64x64x3, 16 x 64", IMAGES, 40_000, 500, 16, 64),
    ("vectors 39, 16 x 64", VECTORS, 1_000_000, 1000, 16, 64),
    ("vectors 39, 256 x 4", VECTORS, 1_000_000, 1000, 256, 4),
]


@register("random")
class Random(Source):
    """Random episodes of one of the spaces: ``random:images`` or ``random:vectors``."""

    def __init__(self, rest: str, rows: int, length: int):
        self.spaces = IMAGES if rest == "images" else VECTORS
        self.rows, self.length = rows, length
        self.schema, self.files, self.meta = Schema(self.spaces), [], {}

    def episodes(self) -> Iterator[Episode]:
        rng, spec = np.random.default_rng(0), self.spaces.obs["obs"]
        end, no = np.zeros((2, self.length - 1), bool)
        end[-1] = True
        for i in range(self.rows // self.length):
            if spec.is_image:
                obs: Any = rng.integers(0, 255, (self.length, *spec.shape), np.uint8)
            else:
                obs = rng.normal(size=(self.length, *spec.shape)).astype(np.float32)
            action = rng.uniform(-1, 1, (self.length - 1, 6)).astype(np.float32)
            reward = np.zeros(self.length - 1, np.float32)
            yield Episode({"obs": obs}, {"action": action}, reward, no, end, f"episode {i}")


def rounds(works: dict[str, Callable[[], object]], repeats: int) -> dict[str, tuple[float, float]]:
    """Best and median time of each in ms; slow ones are tried less often."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for i in range(repeats):
        for name, work in works.items():
            if times[name] and min(times[name]) > 0.005 and i % 10:
                continue
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: (1e3 * min(t), 1e3 * sorted(t)[len(t) // 2]) for name, t in times.items()}


def filled(
    spaces: Spaces, rows: int, length: int, window: int, within: bool, streams: int, folder: str
) -> RowReplay:
    """A full ring, written by columns instead of row by row to save time."""
    replay = RowReplay(
        spaces, rows, streams, folder, None, window, int(not within), online=False, within_episodes=within
    )
    block = torch.randint(0, 255, (10_000, *spaces.obs["obs"].shape), dtype=torch.uint8)
    for key, column in replay.storage.columns.items():
        if key == ("observation",):
            for start in range(0, rows, len(block)):
                column[start : start + len(block)] = block[: rows - start]
        else:
            column.fill_(key == ("valid",))
    ring = replay.storage.ring
    first = torch.arange(streams * ring) % ring % length
    replay.storage.columns["is_init",][first == 0] = True
    replay.storage.columns["valid",][first == length - 1] = False
    replay.storage.head[:] = ring
    replay.sampler.rebuild()
    return replay


def of_cache(cache: Cache, window: int, within: bool, folder: str) -> RowReplay:
    spaces, lead = model_spaces(cache), int(not within)
    chosen = np.arange(len(cache.episodes["start"]))
    storage = CacheRows(cache, Path(folder), spaces, chosen, SourceSpec("random:x"), None, lead)
    return RowReplay.of_dataset(storage, spaces, window, lead, within_episodes=within)


def torchrl_buffer(cache: Cache, batch: int, steps: int, folder: str) -> Any:
    """The same rows behind TorchRL's own sampler, as its documentation sets it up for sequences."""
    from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

    rows = cache.rows
    buffer = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(len(cache), scratch_dir=folder),
        sampler=SliceSampler(num_slices=batch, traj_key="episode", cache_values=True, truncated_key=None),
        batch_size=batch * steps,
    )
    keys = ["observation", "action", ("next", "reward"), ("next", "terminated"), "is_init", "episode"]
    for start in range(0, len(cache), 20_000):
        part = rows[start : start + 20_000]
        buffer.extend(TensorDict({k: part[k] for k in keys}, part.batch_size).clone())
    return buffer


def draws(lines: list[str], folder: Path, repeats: int) -> None:
    """Sampling, beside the copy of the same bytes and beside others."""
    head = ["ms, best / median", "copy", "bare index_select", "ring", "ring + view", "dataset"]
    head += ["dataset + view", "two datasets", "drawn ahead", "TorchRL", "HDF5", "Minari"]
    lines += ["", "| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, spaces, rows, length, batch, steps in TASKS:
        within, image = steps == 4, spaces is IMAGES
        window = steps if within else steps + 1
        kind = "images" if image else "vectors"
        cache = ingest(f"random:{kind}", folder / "cache", rows=rows, length=length)
        ring = filled(spaces, rows, length, window, within, 1 if within else 8, str(folder / f"ring-{name}"))
        data = of_cache(cache, window, within, str(folder / f"data-{name}"))
        second = of_cache(cache, window, within, str(folder / f"second-{name}"))
        both = Mixture({"a": data, "b": second}, lambda update: [0.5, 0.5])
        ahead = Prefetch(Mixture({"a": data}, None), batch)
        column = cache.rows["observation"].as_subclass(torch.Tensor)
        target = torch.empty(batch * steps, *column.shape[1:], dtype=column.dtype)
        source = target.clone()
        rng = np.random.default_rng(1)

        def starts() -> np.ndarray:
            at = rng.integers(0, rows - steps, batch)  # noqa: B023
            return at[:, None] + np.arange(steps)  # noqa: B023

        indices = [torch.from_numpy(starts().reshape(-1)) for _ in range(repeats)]
        turn = iter(indices * 2)

        columns = [column, *(cache.rows[k].as_subclass(torch.Tensor) for k in READ)]
        outs = [torch.empty(batch * steps, *x.shape[1:], dtype=x.dtype) for x in columns]

        def select(index: torch.Tensor) -> None:
            for x, out in zip(columns, outs, strict=True):  # noqa: B023
                torch.index_select(x, 0, index, out=out)

        def view(replay: RowReplay) -> object:
            found = nested(replay.sample_columns(batch))  # noqa: B023
            return tdmpc2_view(found) if within else dreamer_view(found, 1, False, None)  # noqa: B023

        others = torchrl_buffer(cache, batch, steps, str(folder / f"torchrl-{name}"))
        with h5py.File(folder / f"{kind}.hdf5", "a") as file:
            if "observations" not in file:
                file.create_dataset("observations", data=column.numpy())
                file.create_dataset("actions", data=cache.rows["action"].numpy())
                file.create_dataset("rewards", data=cache.rows["next", "reward"].numpy())
            sets = [file[k] for k in ("observations", "actions", "rewards")]

            def from_hdf5() -> object:
                return [np.stack([x[w[0] : w[-1] + 1] for w in starts()]) for x in sets]  # noqa: B023

            works: dict[str, Callable[[], object]] = {
                "copy": lambda: target.copy_(source),  # noqa: B023
                "bare": lambda: select(next(turn)),  # noqa: B023
                "ring": lambda: ring.sample_columns(batch),  # noqa: B023
                "ring + view": lambda: view(ring),  # noqa: B023
                "dataset": lambda: data.sample_columns(batch),  # noqa: B023
                "dataset + view": lambda: view(data),  # noqa: B023
                "two datasets": lambda: both.sample_columns(batch),  # noqa: B023
                "drawn ahead": lambda: ahead.next(),  # noqa: B023
                "TorchRL": lambda: others.sample(),  # noqa: B023
                "HDF5": from_hdf5,
            }
            minari = minari_set(folder, kind, cache, length)
            works["Minari"] = lambda: cut(minari, batch, steps)  # noqa: B023
            times = rounds(works, repeats)
        cells = [f"{best:.3f} / {median:.3f}" for best, median in times.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        copy, bare = times["copy"], times["bare"]
        for who in ("ring", "dataset"):
            (best, median), line = times[who], f"\n- {name}, {who}: "
            line += f"{copy[0] / best:.0%} of the copy (best), {copy[1] / median:.0%} (median); "
            line += f"{best / bare[0]:.2f} times the bare gather (best), {median / bare[1]:.2f} (median)"
            lines[0] += line
        ahead.rewind()
        for replay in (ring, data, second):
            replay.close()


def minari_set(folder: Path, kind: str, cache: Cache, length: int) -> Any:
    """The first episodes, 256 or 40 with images, as a Minari dataset, which is read by whole episodes."""
    import minari
    from gymnasium import spaces
    from minari.data_collector import EpisodeBuffer

    image = kind == "images"
    rows = cache.rows
    buffers = []
    for i in range(40 if image else 256):
        part = slice(i * length, (i + 1) * length)
        obs, end = rows["observation"][part].numpy(), np.arange(length - 1) == length - 2
        buffers.append(
            EpisodeBuffer(
                id=i, observations=obs, actions=rows["action"][part][:-1].numpy(),
                rewards=[0.0] * (length - 1), terminations=[False] * (length - 1), truncations=end.tolist(),
            )
        )  # fmt: skip
    import os

    os.environ["MINARI_DATASETS_PATH"] = str(folder / "minari")
    name = f"bench/{kind}-v0"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if name in minari.list_local_datasets():
            return minari.load_dataset(name)
        shape = rows["observation"].shape[1:]
        space = (
            spaces.Box(0, 255, shape, np.uint8) if image else spaces.Box(-np.inf, np.inf, shape, np.float32)
        )
        return minari.create_dataset_from_buffers(
            name, buffers, observation_space=space, action_space=spaces.Box(-1, 1, (6,), np.float32),
            jpeg_encoding=False,
        )  # fmt: skip


def cut(dataset: Any, batch: int, steps: int) -> list[np.ndarray]:
    """What a user of Minari does for a batch of sequences."""
    starts = np.random.default_rng(0).integers(0, 400, batch)
    found = dataset.sample_episodes(batch)
    return [e.observations[s : s + steps] for e, s in zip(found, starts, strict=True)]


def sizes(lines: list[str], folder: Path, repeats: int) -> None:
    """256 x 4 vectors from rings of growing size, 16 rows being written before each draw."""
    lines += ["", "| rows, 16 of them written before each draw | ms best | median |", "|---|---|---|"]
    streams = np.arange(16)
    no, yes = np.zeros(16, bool), np.ones(16, bool)
    obs, action = {"obs": np.ones((16, 39), np.float32)}, {"action": np.ones((16, 6), np.float32)}
    found = {}
    for rows in (10_000, 100_000, 1_000_000, 5_000_000):
        replay = filled(VECTORS, rows // 16 * 16, 500, 4, True, 16, str(folder / f"size{rows}"))
        times = []
        for t in range(repeats):
            first = yes if t % 100 == 0 else no
            replay.append(streams, obs, first, ~(no | (t % 100 == 99)), action)
            start = time.perf_counter()
            replay.sample_columns(256)
            times.append(1e3 * (time.perf_counter() - start))
        found[rows] = min(times), sorted(times)[repeats // 2]
        lines.append(f"| {rows:,} | {found[rows][0]:.3f} | {found[rows][1]:.3f} |")
        replay.close()
    small, large = found[10_000], found[5_000_000]
    lines[0] += (
        f"\n- 5,000,000 rows while writing: {large[1]:.3f} ms (median), {large[1] / small[1]:.1f} times that "
        f"at 10,000 ({small[1]:.3f} ms)"
    )


def write_hdf5(path: Path, form: str, rows: int = 1_000_000, length: int = 1000) -> None:
    """``groups``: one per episode, as Minari has; ``gzip``: compressed arrays, as D4RL's; ``flat`` ones."""
    rng = np.random.default_rng(0)
    obs = rng.normal(size=(rows, 39)).astype(np.float32)
    action = rng.uniform(-1, 1, (rows, 6)).astype(np.float32)
    reward, no = rng.normal(size=rows), np.zeros(rows, bool)
    end = np.arange(rows) % length == length - 1
    with h5py.File(path, "w") as file:
        if form != "groups":
            flat = {"observations": obs, "next_observations": np.roll(obs, -1, 0), "actions": action}
            flat |= {"rewards": reward.astype(np.float32), "terminals": no, "timeouts": end}
            for name, value in flat.items():
                file.create_dataset(name, data=value, compression="gzip" if form == "gzip" else None)
            return
        for i in range(rows // length):
            group, part = file.create_group(f"episode_{i}"), slice(i * length, (i + 1) * length)
            group["observations"] = np.concatenate([obs[part], obs[:1]])
            group["actions"], group["rewards"] = action[part], reward[part]
            group["terminations"], group["truncations"] = no[part], end[part]
            group.attrs["id"], group.attrs["total_steps"] = i, length


def peak() -> float:
    """GB that this process has held; the peak of ``getrusage`` begins with that of its parent."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


def _ingest(path: Path, root: Path, repeats: int, pipe: Any) -> None:
    """In a process of its own, so that its peak memory is its own."""
    torch.set_num_threads(1)
    before = peak()
    ingest(f"hdf5:{path}", root)
    most, start = peak(), time.perf_counter()
    cache = ingest(f"hdf5:{path}", root)
    _ = cache.rows, cache.episodes
    again, times = time.perf_counter() - start, []
    for i in range(repeats):
        clocks = [(time.perf_counter(), time.process_time())]
        for work in (lambda: read_all(path), lambda: ingest(f"hdf5:{path}", root / str(i))):  # noqa: B023
            work()
            clocks.append((time.perf_counter(), time.process_time()))
        times.append(np.diff(clocks, axis=0))
        shutil.rmtree(root / str(i))
    pipe.send((np.median(times, 0), again, before, most))


def read_all(path: Path) -> None:
    """Every array of a file, into memory, one at a time."""

    def read(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            node[()]

    with h5py.File(path) as file:
        file.visititems(read)


def ingestion(lines: list[str], folder: Path, repeats: int = 5) -> None:
    """1 million vector steps from HDF5: medians of rounds that read and ingest in turn."""
    forms = {"groups": "a group per episode, as Minari", "gzip": "gzip, as D4RL", "flat": "flat arrays"}
    for form, name in forms.items():
        path = folder / f"{form}.hdf5"
        write_hdf5(path, form)
        spawn = multiprocessing.get_context("spawn")
        here, there = spawn.Pipe()
        process = spawn.Process(target=_ingest, args=(path, folder / form, repeats, there))
        process.start()
        there.close()
        ((read, read_cpu), (whole, cpu)), again, before, most = here.recv()
        process.join()
        size = path.stat().st_size / 1e6
        lines[0] += (
            f"\n- ingest of 1,000,000 steps (39 numbers, HDF5 of {size:.0f} MB, {name}): {whole:.2f} s, "
            f"{whole / read:.2f} times the time of reading the file with h5py ({read:.2f} s), "
            f"{cpu / read_cpu:.2f} times its CPU time; opening it again {again:.3f} s; peak memory "
            f"{most:.2f} GB, {before:.2f} GB of it the interpreter with its packages"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "replay.md")
    parser.add_argument("--repeats", type=int, default=300)
    parser.add_argument("--only", choices=("ingest", "draws"), help="print this part, and write no file")
    parser.add_argument("--folder", type=Path, help="where the files of the benchmark lie: 6 GB")
    given = parser.parse_args()
    torch.set_num_threads(1)
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout
    lines = [
        "# Replay\n\n"
        f"`python benchmarks/replay.py`, commit {commit.strip()}, torch {torch.__version__}, torchrl "
        f"{torchrl.__version__}, tensordict {tensordict.__version__}, {platform.machine()}, one thread.\n"
    ]
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        if given.only != "draws":
            ingestion(lines, Path(folder))
        if given.only != "ingest":
            sizes(lines, Path(folder), given.repeats * 3)
            draws(lines, Path(folder), given.repeats)
    lines.append(
        "\nring: rows of environments, 8 streams (one for 256 x 4). dataset: rows of a cache. 16 x 64 are "
        "windows of the stream for DreamerV3, 256 x 4 windows of episodes for TD-MPC2; the view makes the "
        "model's batch of them. Two datasets: half of each batch from each. Drawn ahead: one batch after "
        "another while a thread draws. TorchRL: SliceSampler with "
        "cache_values on LazyMemmapStorage. HDF5: contiguous datasets, one slice per window and column. "
        "Minari: sample_episodes, then cut; 256 episodes, 40 with images."
    )
    if given.only is None:
        given.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
