import errno
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules import cache as caches
from datamodules import writing
from datamodules.cache import Cache, find_cache, ingest, open_cache, write_rows
from datamodules.episodes import Episode, Schema, Source
from datamodules.rows import row_specs
from datamodules.sources import open_source, register
from datamodules.writing import plan_size
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spaces, Spec

SPACES = Spaces(
    {"pixels": Spec("uint8", (3, 2, 3)), "a/b.c": Spec("float32", (2,))},
    {"arm": Spec("float32", (2,)), "key": Spec("int32", (), 4)},
)


def episode(number: int, steps: int, reward: bool = True) -> Episode:
    r = np.random.default_rng([number, steps])
    ends = np.zeros((2, steps), bool)
    ends[number % 2, -1] = True
    pixels = r.integers(0, 256, (steps + 1, 3, 2, 3), np.uint8)
    return Episode(
        {"pixels": pixels, "a/b.c": r.random((steps + 1, 2), "f4")},
        {"arm": r.random((steps, 2), "f4") - 2, "key": r.integers(0, 4, steps)},
        r.random(steps) if reward else None,
        *ends,
        where=f"made up, episode {number}",
        seed=number if number % 3 else None,
        task=number % 4,
        fake_last=number % 5 == 0,
    )  # fmt: skip


@register("listed")
class Made(Source):
    """PATH holds a JSON list of lengths: one episode each. ``pause`` seconds before each of them."""

    def __init__(self, path: str, pause: float = 0, reward: bool = True, bad: int = -1, log: str = ""):
        self.files, self.lengths = [Path(path)], json.loads(Path(path).read_text())
        self.pause, self.reward, self.bad, self.log = pause, reward, bad, log
        self.schema = Schema(SPACES, {"arm": np.full(2, -2.0)}, {"arm": np.array([np.inf, 3.0])})
        self.meta = {"env_id": "Made-v0"}
        self.total_episodes, self.total_steps = len(self.lengths), sum(self.lengths)

    def episodes(self) -> Iterator[Episode]:
        if self.log:
            with open(self.log, "a") as file:
                file.write("read\n")
        for i, steps in enumerate(self.lengths):
            time.sleep(self.pause)
            made = episode(i, steps, self.reward)
            if i == self.bad:
                made.observation["a/b.c"][0, 1] = np.nan
            yield made


@pytest.fixture
def made(tmp_path: Path) -> str:
    return source(tmp_path / "lengths.json", [5, 1, 12, 3, 1, 7])


def source(path: Path, lengths: list[int]) -> str:
    path.write_text(json.dumps(lengths))
    return f"listed:{path}"


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def by_hand(lengths: list[int]) -> dict[str, list[Any]]:
    """Row after row, as data.md writes the table down."""
    rows: dict[str, list[Any]] = {}
    for number, steps in enumerate(lengths):
        e = episode(number, steps)
        for t in range(steps + 1):
            last = t == steps
            row = {
                "observation/pixels": e.observation["pixels"][t],
                "observation/a/b.c": e.observation["a/b.c"][t],
                "action/arm": np.zeros(2) if last else e.action["arm"][t],
                "action/key": 0 if last else e.action["key"][t],
                "next/reward": [0 if last else np.float32(e.reward[t])],
                "next/terminated": [number % 2 == 0 and t == steps - 1],
                "next/truncated": [number % 2 == 1 and t == steps - 1],
                "next/done": [t == steps - 1],
                "is_init": [t == 0],
                "valid": [not last],
                "episode": number,
                "step": t,
                "source": 0,
                "task": number % 4,
            }
            for key, value in row.items():
                rows.setdefault(key, []).append(value)
    return rows


@pytest.mark.parametrize(("buffer", "block"), [(1 << 25, 1 << 26), (1, 64), (300, 1000)])
def test_rows_are_those_written_by_hand(made: str, tmp_path: Path, monkeypatch: Any, buffer: int, block: int):
    monkeypatch.setattr(writing, "BUFFER", buffer)
    monkeypatch.setattr(writing, "BLOCK", block)
    cache = ingest(made, tmp_path / "root")
    lengths = [5, 1, 12, 3, 1, 7]
    expected = by_hand(lengths)
    loaded = TensorDict.load_memmap(cache.folder)
    assert {k if isinstance(k, tuple) else (k,) for k in loaded.keys(True, True)} == set(row_specs(SPACES))
    assert loaded.batch_size == cache.rows.batch_size == torch.Size([len(cache)])
    for key, spec in row_specs(SPACES).items():
        column = loaded[key].numpy()
        assert column.dtype == spec.dtype
        assert column.shape == (35, *spec.shape)
        np.testing.assert_array_equal(column, np.array(expected["/".join(key)]))
    table, start = cache.episodes, np.cumsum([0, *(n + 1 for n in lengths)])
    assert table["start"].tolist() == start[:-1].tolist()
    assert table["length"].tolist() == [n + 1 for n in lengths]
    sums = [np.float32(episode(i, n).reward).astype(float).sum() for i, n in enumerate(lengths)]
    np.testing.assert_allclose(table["return"], sums, rtol=1e-12)
    assert table["terminated"].tolist() == [True, False] * 3
    assert table["fake_last"].tolist() == [True, False, False, False, False, True]
    assert table["seed"].tolist() == [-1, 1, 2, -1, 4, 5]
    assert table["task"].tolist() == [0, 1, 2, 3, 0, 1]
    assert len(set(table["crc"].tolist())) == 6
    assert (cache.uri, cache.schema, cache.meta) == (made, cache.schema, {"env_id": "Made-v0"})
    assert cache.schema.high["arm"].tolist() == [np.inf, 3.0]
    assert cache.schema.spaces == SPACES
    columns = sum(p.stat().st_size for p in cache.folder.rglob("*.memmap"))
    assert plan_size(open_source(made)) == columns
    cache.verify(full=True)


def test_numpy_reads_every_file(made: str, tmp_path: Path):
    cache, seen = ingest(made, tmp_path / "root"), 0
    for meta in (cache.folder / "meta.json", *cache.folder.glob("[!e]*/meta.json")):
        for name, facts in json.loads(meta.read_text()).items():
            if isinstance(facts, dict) and "dtype" in facts:
                file = meta.parent / f"{name.replace('/', '%2F')}.memmap"
                column = np.memmap(
                    file, facts["dtype"].removeprefix("torch."), "r", shape=tuple(facts["shape"])
                )
                key = (name,) if meta.parent == cache.folder else (meta.parent.name, name)
                np.testing.assert_array_equal(column, cache.rows[key].numpy())
                seen += 1
    assert seen == len(row_specs(SPACES))


def test_sources_without_rewards(made: str, tmp_path: Path):
    cache = ingest(made, tmp_path / "root", reward=False)
    assert cache.meta["no_reward"] is True
    assert not cache.rows["next", "reward"].any()
    assert cache.rows["next", "done"].sum() == 6


def test_a_cache_is_found_by_content_and_options(made: str, tmp_path: Path, monkeypatch: Any):
    root, path = tmp_path / "root", tmp_path / "lengths.json"
    assert find_cache(made, root) is None
    assert not root.exists()
    first = ingest(made, root)
    assert first.folder.name == f"listed-lengths.json-{first.key[:16]}"
    assert [p.name for p in root.iterdir()] == [first.folder.name]
    hashed: list[Path] = []
    blocks = writing.blocks
    monkeypatch.setattr(writing, "blocks", lambda path, size: (hashed.append(path), blocks(path, size))[1])
    assert ingest(made, root).folder == find_cache(made, root).folder == first.folder
    assert hashed == []  # not read again
    path.write_text(path.read_text())  # same content, another time
    assert ingest(made, root).folder == first.folder
    assert hashed == [path]
    assert ingest(made, root).folder == first.folder
    assert hashed == [path]
    assert ingest(made, root, bad=0, on_bad="skip_episode").report["counts"]["skipped"] == 1
    assert find_cache(f"{made}?reward=false", root) is None
    size, times = path.stat().st_size, path.stat()
    path.write_text("[5, 1, 12, 3, 1, 8]")  # same size and time
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert path.stat().st_size == size
    assert len(ingest(made, root)) == 36
    assert len(list(root.iterdir())) == 3


def test_large_files_are_known_by_samples(made: str, tmp_path: Path, monkeypatch: Any):
    path = tmp_path / "lengths.json"
    path.write_text(path.read_text() + " " * (3 << 20))
    monkeypatch.setattr(caches, "_WHOLE", 1 << 20)
    cache = ingest(made, tmp_path / "root")
    assert cache.facts["digest"]["kind"] == "sampled"
    assert ingest(made, tmp_path / "root").key == cache.key
    with open(path, "r+") as file:
        file.seek(1 << 20)
        file.write("\n")
    assert ingest(made, tmp_path / "root").key != cache.key


def test_an_error_leaves_nothing(made: str, tmp_path: Path, monkeypatch: Any):
    root = tmp_path / "root"
    with pytest.raises(DataError, match="made up, episode 3: observation 'a/b.c', row 0 is nan"):
        ingest(made, root, bad=3)
    assert list(root.iterdir()) == []
    with pytest.raises(DataError, match=r"no episode with a step.*\n.*skipped 1"):
        ingest(source(tmp_path / "one.json", [4]), root, bad=0, on_bad="skip_episode")
    assert list(root.iterdir()) == []
    path = tmp_path / "lengths.json"
    with pytest.raises(DataError, match=r"lengths.json changed while it was read"):
        ingest(made, root, progress=lambda episodes, *_: path.touch() if episodes == 3 else None)
    assert list(root.iterdir()) == []

    def interrupt(episodes: int, *_: int) -> None:  # a signal itself is ignored in background jobs
        if episodes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ingest(made, root, progress=interrupt)
    assert list(root.iterdir()) == []


def test_a_full_disk(made: str, tmp_path: Path, monkeypatch: Any):
    root, usage = tmp_path / "root", shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(DataError, match=r"the rows need 0.00 GB, 0.00 GB are free"):
        ingest(made, root)
    assert list(root.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    append = writing.ColumnFiles.append

    def full(self: Any, columns: Any) -> None:
        append(self, columns)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writing.ColumnFiles, "append", full)
    with pytest.raises(DataError, match=r"the disk is full: .*GB are free"):
        ingest(made, root)
    assert list(root.iterdir()) == []


def damage(cache: Cache, name: str, how: str) -> None:
    path = cache.folder / name
    data = bytearray(path.read_bytes())
    path.unlink()
    if how == "flip":
        data[len(data) // 2] ^= 1
    if how != "missing":
        path.write_bytes(data[:-4] if how == "cut" else data)


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        ("observation/pixels.memmap", "cut", "column observation/pixels has 626 bytes, expected 630"),
        ("observation/a%2Fb.c.memmap", "missing", "column observation/a/b.c is missing, expected 280"),
        ("episodes/start.memmap", "cut", "column episodes/start has 44 bytes, expected 48"),
        ("meta.json", "cut", "file meta.json has"),
        ("next/reward.memmap", "flip", "column next/reward is not what was written: bytes 0 to 140"),
        ("meta.json", "flip", "file meta.json is not what was written"),
    ],
)
def test_damage_is_named(made: str, tmp_path: Path, name: str, how: str, message: str):
    root = tmp_path / "root"
    cache = ingest(made, root)
    before = content(cache.folder)
    damage(cache, name, how)
    with pytest.raises(DataError, match=message.replace("(", r"\(")) as caught:
        open_cache(cache.folder, verify="full")
    assert f"verify rows:{cache.folder} --repair" in str(caught.value)
    if how != "flip":
        with pytest.raises(DataError, match="--repair"):
            ingest(made, root)
    again = ingest(made, root, replace=True)
    assert content(again.folder) == before
    assert [p.name for p in root.iterdir()] == [cache.folder.name]


def test_what_is_no_cache_of_this_layout(made: str, tmp_path: Path):
    cache = ingest(made, tmp_path / "root")
    path, facts = cache.folder / "rows.json", cache.facts
    for layout, advice in ((99, "Update lit-wm, or delete"), (0, "Delete the folder"), (None, "Delete")):
        path.write_text(json.dumps({**facts, "layout": layout}))
        with pytest.raises(DataError, match=f"has layout {layout}, this version reads layout 1.\n  {advice}"):
            open_cache(cache.folder)
    path.write_text(json.dumps({k: v for k, v in facts.items() if k != "schema"}))
    with pytest.raises(DataError, match=r"rows.json lacks or garbles 'schema'"):
        open_cache(cache.folder)
    path.write_text("{")
    with pytest.raises(DataError, match=r"rows.json cannot be read"):
        open_cache(cache.folder)
    path.unlink()
    with pytest.raises(DataError, match=r"has no rows.json"):
        open_cache(cache.folder)
    with pytest.raises(DataError, match=r"is not there"):
        open_cache(tmp_path / "nowhere")


def test_names_that_tensordict_keeps(tmp_path: Path):
    path = tmp_path / "x"
    path.touch()

    class Clash(Made):
        def __init__(self) -> None:
            self.files, self.meta = [path], {}
            self.schema = Schema(Spaces({"shape": Spec("float32", (1,))}, SPACES.action))

    with pytest.raises(DataError, match="'shape', which TensorDict keeps for itself"):
        write_rows(Clash(), tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_one_of_several_entries_may_be_called_as_a_single_one(tmp_path: Path):
    class Pair(Made):
        def __init__(self) -> None:
            self.files, self.meta = [], {}
            vector, button = Spec("float32", (2,)), Spec("int32", (), 4)
            self.schema = Schema(Spaces({"obs": vector, "x": vector}, {"action": button, "y": button}))

        def episodes(self) -> Iterator[Episode]:
            one = episode(0, 3)
            one.observation = {"obs": one.observation["a/b.c"], "x": -one.observation["a/b.c"]}
            one.action = {"action": one.action["key"], "y": 3 - one.action["key"]}
            yield one

    write_rows(Pair(), tmp_path / "out")
    back, made = (next(iter(s.episodes())) for s in (open_source(f"rows:{tmp_path / 'out'}"), Pair()))
    for kind in ("observation", "action"):
        for key, value in getattr(made, kind).items():
            np.testing.assert_array_equal(getattr(back, kind)[key], value)


def test_writing_where_the_caller_says(made: str, tmp_path: Path):
    cache = write_rows(open_source(made), tmp_path / "out")
    assert open_cache(tmp_path / "out", verify="full").rows["valid"].sum() == 29
    assert (cache.uri, cache.folder) == (None, tmp_path / "out")
    with pytest.raises(ConfigError, match="exists; expected a new folder"):
        write_rows(open_source(made), tmp_path / "out")
    with pytest.raises(DataError, match="was not written from a source"):
        caches.rewrite(tmp_path / "out")


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(made: str, tmp_path: Path):
    root = tmp_path / "root"
    for name in ("listed-lengths.json.tmp-1-aaaaaaaa", "other.tmp-2-bbbbbbbb", "alive.tmp-3-cccccccc"):
        (root / name).mkdir(parents=True)
        (root / name / "0.part").touch()
    (root / ".lit_wm-listed-lengths.json.lock").touch()
    with open(root / ".lit_wm-alive.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cache = ingest(made, root)
        assert {p.name for p in root.iterdir()} == {
            cache.folder.name,
            ".lit_wm-alive.lock",
            "alive.tmp-3-cccccccc",
        }


def test_the_root(monkeypatch: Any, tmp_path: Path):
    monkeypatch.setenv("LITWM_CACHE", str(tmp_path))
    assert caches.cache_root() == tmp_path
    assert caches.cache_root("x") == Path("x").absolute()
    monkeypatch.delenv("LITWM_CACHE")
    assert caches.cache_root() == Path.home() / ".cache/lit_wm/rows"


def child(*arguments: Any, **options: Any) -> multiprocessing.process.BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=ingest, args=arguments, kwargs=options)
    process.start()
    return process


def test_two_writers_make_one_cache(made: str, tmp_path: Path):
    root, log = tmp_path / "root", tmp_path / "log"
    both = [child(f"{made}?pause=0.1&log={log}", root) for _ in range(2)]
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert log.read_text() == "read\n"
    assert [p.is_dir() for p in root.iterdir()] == [True]


def test_killed_twenty_times_and_then_whole(tmp_path: Path):
    made = source(tmp_path / "lengths.json", list(range(1, 60))) + "?pause=0.01"
    reference = ingest(made, tmp_path / "other")
    root, r, cut = tmp_path / "root", np.random.default_rng(0), 0
    for _ in range(20):
        process = child(made, root)
        time.sleep(r.uniform(0.05, 0.6))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        names = [p.name for p in root.iterdir()]
        assert not any((root / name).is_dir() and ".tmp-" not in name for name in names)
        cut += any(".tmp-" in name for name in names)
        assert sum(".tmp-" in name for name in names) <= 1
    assert cut > 10  # most were in the middle
    cache = ingest(made, root)
    assert content(cache.folder) == content(reference.folder)
    assert [p.name for p in root.iterdir()] == [cache.folder.name]
    cache.verify(full=True)


def test_files_of_others_in_the_folder_stay(made: str, tmp_path: Path):
    root = tmp_path / "root"
    root.mkdir()
    for name in ("uv.lock", "thesis.tmp-backup", "a.tmp-1-2"):
        (root / name).touch()
    (root / "exp.tmp-old").mkdir()
    ingest(made, root)
    names = {path.name for path in root.iterdir()}
    assert names > {"uv.lock", "thesis.tmp-backup", "a.tmp-1-2", "exp.tmp-old"}
    assert len(names) == 5


def test_a_relative_root_is_a_root(made: str, tmp_path: Path, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    cache = ingest(made, "here")
    assert cache.folder.parent == tmp_path / "here"
    monkeypatch.setenv("LITWM_CACHE", "there")
    assert ingest(made).folder.parent == tmp_path / "there"
    assert len(ingest(made).rows) == 35


def test_one_file_is_one_cache_however_its_place_is_written(tmp_path: Path, monkeypatch: Any):
    (tmp_path / "sub").mkdir()
    np.savez(tmp_path / "sub" / "a.npz", observations=np.zeros((5, 2)), actions=np.zeros((5, 1)),
             rewards=np.zeros(5), dones=np.arange(5) == 4)  # fmt: skip
    monkeypatch.chdir(tmp_path)
    places = ("sub/a.npz", "./sub/../sub/a.npz", str(tmp_path / "sub" / "a.npz"))
    with pytest.warns(UserWarning, match="ends of unknown kind"):
        assert len({ingest(f"npz:{place}", tmp_path / "c").folder for place in places}) == 1
    for uri in ("npz:sub/a.npz", f"rows:{ingest('npz:sub/a.npz', tmp_path / 'c').folder}"):
        with pytest.warns(UserWarning, match="ends of unknown kind") as said:  # each time it is opened
            ingest(uri, tmp_path / "c")
        assert len(said) == 1


def test_another_version_of_a_reader_is_another_cache(made: str, tmp_path: Path, monkeypatch: Any):
    first = ingest(made, tmp_path)
    monkeypatch.setattr(Made, "version", 2)
    assert ingest(made, tmp_path).folder != first.folder
