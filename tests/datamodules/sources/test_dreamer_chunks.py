"""Dreamer's chunks against the Minari dataset that they were made from, and made streams."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datamodules.episodes import Episode, checked
from datamodules.sources import open_source
from datamodules.sources.dreamer_chunks import DreamerChunks
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

DATA = Path(__file__).parents[1] / "data"
FILES = sorted((DATA / "dreamer_chunks").glob("*.npz"))


def save(
    folder: Path, n: int, name: str, after: str = "0", length: int | None = None, **columns: Any
) -> Path:
    rows = {k: np.asarray(v) for k, v in columns.items()}
    size = len(next(iter(rows.values())))
    path = folder / f"2026010100000{n}F000-{name}-{after}-{length or size}.npz"
    np.savez_compressed(path, **rows)
    return path


def steps(first: int, flags: str, **more: Any) -> dict[str, Any]:
    """Rows that count up: ``f`` is a first, ``l`` a last, ``t`` a terminal, ``.`` another step."""
    n = np.arange(first, first + len(flags), dtype=np.float32)
    is_ = {
        k: np.array([c in v for c in flags]) for k, v in (("first", "f"), ("last", "lt"), ("terminal", "t"))
    }
    return {
        "x": n[:, None], "reward": n * 10, "action": n[:, None] / 100,
        **{f"is_{k}": v for k, v in is_.items()}, **more,
    }  # fmt: skip


def seen(episodes: list[Episode]) -> list[tuple[list[float], bool]]:
    return [(x.observation["obs"][:, 0].tolist(), bool(x.terminated[-1])) for x in episodes]


def test_every_value_is_that_of_the_dataset_that_the_chunks_were_made_from() -> None:
    source = DreamerChunks(FILES[::-1])
    assert source.schema.spaces.action == {"action": Spec("int32", (), 2)}
    theirs = list(checked(open_source("minari:cartpole/mixed-v0", root=str(DATA / "minari"))))
    for ours, other in zip(checked(source), theirs, strict=True):
        np.testing.assert_array_equal(ours.observation["obs"], other.observation["obs"])
        np.testing.assert_array_equal(ours.action["action"], other.action["action"])
        for key in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(ours, key), getattr(other, key))
    assert not source.report.counts


def test_streams_follow_their_successors(tmp_path: Path) -> None:
    files = [
        save(tmp_path, 1, "a", "b", **steps(0, "f..")),
        save(tmp_path, 2, "p", "q", **steps(100, "f.lf")),
        save(tmp_path, 3, "b", "c", **steps(3, "..")),
        save(tmp_path, 4, "q", **steps(104, ".t")),
        save(tmp_path, 5, "c", **steps(5, "lf..")),
    ]
    source = DreamerChunks(files)
    got = list(checked(source))
    assert seen(got) == [
        ([0, 1, 2, 3, 4, 5], False), ([6, 7, 8], False), ([100, 101, 102], False), ([103, 104, 105], True),
    ]  # fmt: skip
    np.testing.assert_array_equal(got[0].reward, [10, 20, 30, 40, 50])  # what came with the next row
    np.testing.assert_allclose(got[0].action["action"][:, 0], [0, 0.01, 0.02, 0.03, 0.04], rtol=1e-6)
    assert source.report.counts["open_end"] == 1  # the second episode of the first stream
    assert source.schema.spaces.unbounded == ()


def test_a_missing_chunk_ends_one_stream_and_begins_another(tmp_path: Path) -> None:
    files = [save(tmp_path, 1, "a", "b", **steps(0, "f..")), save(tmp_path, 3, "c", **steps(7, "..lf.l"))]
    source = DreamerChunks(files)
    assert seen(list(checked(source))) == [([0, 1, 2], False), ([7, 8, 9], False), ([10, 11, 12], False)]
    assert (source.report.counts["open_end"], source.report.counts["no_start"]) == (1, 1)


def test_a_reset_without_an_end_mark_is_an_end(tmp_path: Path) -> None:
    files = [save(tmp_path, 1, "a", "b", **steps(0, "f..f.")), save(tmp_path, 2, "b", **steps(5, "f.l"))]
    assert seen(list(checked(DreamerChunks(files)))) == [
        ([0, 1, 2], False),
        ([3, 4], False),
        ([5, 6, 7], False),
    ]


def test_of_a_chunk_saved_twice_the_longer_counts(tmp_path: Path) -> None:
    files = [
        save(tmp_path, 1, "a", **steps(0, "f.")), save(tmp_path, 1, "a", "b", **steps(0, "f...")),
        save(tmp_path, 2, "b", **steps(4, ".l")),
    ]  # fmt: skip
    assert seen(list(checked(DreamerChunks(files)))) == [([0, 1, 2, 3, 4, 5], False)]


def test_entries_of_every_kind(tmp_path: Path) -> None:
    n, rng = 5, np.random.default_rng(0)
    more = {
        "image": rng.integers(0, 256, (n, 40, 32, 3), np.uint8),
        "grey": rng.integers(0, 256, (n, 32, 32), np.uint8),
        "on": rng.random(n) > 0.5, "dyn/deter": rng.random((n, 8)), "stepid": np.zeros((n, 20), np.uint8),
        "hand": np.eye(3, dtype=np.float32)[[0, 2, 1, 0, 2]],
    }  # fmt: skip
    path = save(tmp_path, 1, "a", **steps(0, "f...l", action=np.array([0, 1, 0, 1, 0]), **more))
    options: dict[str, Any] = {"actions": ["action", "hand"], "discrete": True, "classes": {"action": 5}}
    source = DreamerChunks([path], drop="x", **options)
    assert source.schema.spaces.obs == {
        "image": Spec("uint8", (40, 32, 3)), "grey": Spec("uint8", (32, 32, 1)), "on": Spec("int32", (), 2),
    }  # fmt: skip
    assert source.schema.spaces.action == {"action": Spec("int32", (), 5), "hand": Spec("int32", (), 3)}
    (got,) = checked(source)
    np.testing.assert_array_equal(got.observation["grey"][..., 0], more["grey"])
    np.testing.assert_array_equal(got.observation["on"], more["on"])
    assert got.action["hand"].tolist() == [0, 2, 1, 0]
    with pytest.raises(ConfigError, match="'y', which is no observation\n  Observations: x, image, grey, on"):
        DreamerChunks([path], drop="y", **options)
    with pytest.raises(DataError, match="F000-a-0-5.npz has no 'arm'; found: x"):
        DreamerChunks([path], actions="arm")
    bad = save(tmp_path, 2, "b", **steps(0, "f.l", action=np.full((3, 2), 0.5)))
    with pytest.raises(DataError, match="row 0: action 'action', row 0 is not one-hot"):
        list(checked(DreamerChunks([bad], discrete=True)))


def test_an_unreadable_chunk_is_an_error_or_tolerated(tmp_path: Path) -> None:
    files = [Path(shutil.copy(path, tmp_path)) for path in FILES]
    content = files[3].read_bytes()
    files[3].write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=rf"(?s){files[3].name} cannot be read .*bytes.*tolerate=true"):
        DreamerChunks(files)
    source = DreamerChunks(files, tolerate=True)
    whole, left = list(checked(DreamerChunks(FILES))), list(checked(source))
    assert source.report.counts["unreadable_chunks"] == 1
    rows = np.concatenate([x.observation["obs"] for x in whole])
    got = np.concatenate([x.observation["obs"] for x in left])
    assert {*map(bytes, got)} == {*map(bytes, np.delete(rows, np.s_[3 * 128 : 4 * 128], 0))}
    with pytest.raises(DataError, match="none of the 1 chunks can be read"):
        DreamerChunks(files[3:4], tolerate=True)


def test_a_chunk_damaged_where_its_actions_are_not_is_tolerated_too(tmp_path: Path) -> None:
    files = [save(tmp_path, 1, "a", "b", **steps(0, "f..")), save(tmp_path, 2, "b", "c", **steps(3, "..")),
             save(tmp_path, 3, "c", **steps(5, "f.l"))]  # fmt: skip
    content = bytearray(files[1].read_bytes())
    at = content.index(b"reward.npy") + 20
    content[at : at + 60] = b"\xff" * 60
    files[1].write_bytes(content)
    with pytest.raises(DataError, match="cannot be read"):
        list(checked(DreamerChunks(files)))
    source = DreamerChunks(files, tolerate=True)
    assert seen(list(checked(source))) == [([0, 1, 2], False), ([5, 6, 7], False)]
    assert source.report.counts["unreadable_chunks"] == 1


def test_lengths_names_and_columns_are_checked(tmp_path: Path) -> None:
    wrong = save(tmp_path, 1, "a", length=9, **steps(0, "f.l"))
    with pytest.raises(DataError, match=r"'x' has the shape \(3, 1\); its name says 9 rows"):
        DreamerChunks([wrong])
    with pytest.raises(DataError, match="demo.npz is not named time-uuid-successor-length.npz"):
        DreamerChunks([tmp_path / "demo.npz"])
    rows = steps(0, "f.l")
    del rows["reward"]
    with pytest.raises(DataError, match="has no 'reward'; found: x, action, is_first"):
        list(checked(DreamerChunks([save(tmp_path, 2, "b", **rows)])))
    pickled = steps(0, "f.l") | {"y": np.array([{}, {}, {}], object)}
    with pytest.raises(DataError, match="cannot be read .*pickle"):
        DreamerChunks([save(tmp_path, 3, "c", **pickled)])


def test_an_episode_too_long_for_memory_is_cut_without_losing_a_transition(monkeypatch):
    from datamodules.sources import flat

    uri = f"npz:{Path(__file__).parents[1]}/data/dreamer_chunks"
    whole = list(checked(open_source(uri)))
    monkeypatch.setattr(flat, "LONGEST", 40)
    source = open_source(uri)
    cut = list(checked(source))
    assert len(cut) > len(whole)
    assert source.report.counts["too_long"] == len(cut) - len(whole) + source.report.counts["empty"]
    for name, of in (
        ("obs", lambda e: e.observation["obs"][:-1]),
        ("action", lambda e: e.action["action"]),
        ("reward", lambda e: e.reward),
        ("terminated", lambda e: e.terminated),
    ):
        parts = [np.concatenate([of(e) for e in episodes]) for episodes in (cut, whole)]
        assert np.array_equal(*parts), name
