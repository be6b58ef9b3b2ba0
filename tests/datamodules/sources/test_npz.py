import io
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from datamodules.sources import checked, flat, npz, open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

DATA = Path(__file__).parent.parent / "data" / "npz"
pytestmark = pytest.mark.filterwarnings("ignore:.*(unknown kind|no episode end|follow the last)")


def read(rest, **options):
    return list(checked(open_source(f"npz:{rest}", **options)))


def demo(n=10, ends=(4, 9)):
    rng = np.random.default_rng(n)
    return {
        "observations": rng.standard_normal((n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "dones": np.isin(np.arange(n), ends),
    }


@pytest.mark.parametrize("name", ["recording.npz", "recording_open_end.npz"])
def test_demo_recordings(name, monkeypatch):
    monkeypatch.setattr(flat, "BLOCK", 50_000)
    with np.load(DATA / name) as file:
        obs, action, reward, ends = (file[k] for k in ("observations", "actions", "rewards", "dones"))
    source, start = open_source(f"npz:{DATA / name}"), 0
    stops = [*np.flatnonzero(ends), *([] if ends[-1] else [1036])]
    with pytest.warns(UserWarning, match="dones are ends of unknown kind") as warned:
        episodes = list(checked(source))
    assert any("rows 1,000 to 1,036 follow" in str(w.message) for w in warned) == ("open" in name)
    for episode, stop in zip(episodes, stops, strict=True):
        np.testing.assert_array_equal(episode.observation["obs"], obs[start : stop + 1])
        np.testing.assert_array_equal(episode.action["action"], action[start:stop])
        np.testing.assert_array_equal(episode.reward, reward[start:stop])
        assert (episode.truncated[-1], episode.terminated.any()) == (True, False)
        start = stop + 1
    assert (start, len(episodes)) == (1037, 6)
    assert source.report.counts["open_end"] == ("open" in name)


def test_ends_that_are_terminations():
    with np.load(DATA / "recording.npz") as file:
        reward, ends = file["rewards"], file["dones"]
    episodes = read(DATA / "recording.npz", dones_are="terminals")
    np.testing.assert_array_equal(np.concatenate([e.reward for e in episodes]), reward)
    assert [e.steps for e in episodes] == np.diff(np.flatnonzero(ends), prepend=-1).tolist()
    assert all(e.fake_last and e.terminated[-1] for e in episodes)


def test_replay_form_with_images_and_one_hot_actions():
    with np.load(DATA / "atari_breakout.npz") as file:
        obs, action, reward = (file[k] for k in ("obs", "actions", "rewards"))
    source = open_source(f"npz:{DATA / 'atari_breakout.npz'}")
    assert source.schema.spaces.obs == {"obs": Spec("uint8", (3, 64, 64))}
    assert source.schema.spaces.action == {"action": Spec("int32", (), 4)}
    for episode, rows in zip(checked(source), (slice(0, 150), slice(150, 260)), strict=True):
        np.testing.assert_array_equal(episode.observation["obs"], obs[rows])
        np.testing.assert_array_equal(np.eye(4)[episode.action["action"]], action[rows][:-1])
        np.testing.assert_array_equal(episode.reward, reward[rows][:-1])
    vectors = open_source(f"npz:{DATA / 'atari_breakout.npz'}?discrete=false")
    assert vectors.schema.spaces.action == {"action": Spec("float32", (4,))}
    np.testing.assert_array_equal(next(checked(vectors)).action["action"], action[:149])


def test_replay_form_must_be_what_it_says(tmp_path):
    columns = demo()
    columns |= {"obs": columns.pop("observations"), "obs_shape": np.array([3]), "action_dim": np.array(2)}
    np.savez(tmp_path / "a.npz", **columns)
    assert open_source(f"npz:{tmp_path}/a.npz").schema.spaces.action == {"action": Spec("float32", (2,))}
    with pytest.raises(DataError, match="row 0 is .* expected one-hot"):
        read(tmp_path / "a.npz", discrete=True)
    for name, wrong, message in (("obs_shape", [4], "obs_shape says 4, the array has 3"),
                                 ("action_dim", 3, "action_dim says 3, the array has 2")):  # fmt: skip
        np.savez(tmp_path / "b.npz", **columns | {name: np.array(wrong)})
        with pytest.raises(DataError, match=message):
            read(tmp_path / "b.npz")


def ogbench(rng, lengths):
    n = sum(lengths) + len(lengths)
    ends = np.cumsum(np.array(lengths) + 1) - 1
    return {
        "observations": rng.standard_normal((n, 5)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "terminals": np.isin(np.arange(n), ends).astype(np.float32),
        "qpos": rng.standard_normal((n, 2)),
    }


def test_ogbench(tmp_path):
    lengths = [3, 1, 7]
    columns = ogbench(np.random.default_rng(0), lengths)
    np.savez_compressed(tmp_path / "maze-v0.npz", **columns)
    np.savez_compressed(tmp_path / "maze-v0-val.npz", **ogbench(np.random.default_rng(1), [4]))
    source, start = open_source(f"npz:{tmp_path}"), 0
    for episode, steps in zip(checked(source), lengths, strict=True):
        np.testing.assert_array_equal(
            episode.observation["obs"], columns["observations"][start : start + steps + 1]
        )
        np.testing.assert_array_equal(episode.action["action"], columns["actions"][start : start + steps])
        assert (episode.reward, episode.terminated.any(), episode.fake_last) == (None, False, False)
        start += steps + 1
    assert (source.meta["no_reward"], source.report.counts["validation_files"]) == (True, 1)
    for named in ("maze-v0-val.npz", "*-val.npz"):
        assert [e.steps for e in read(tmp_path / named)] == [4]
    # Read as a demonstration the same file has one row per step and real terminations.
    assert [e.steps for e in read(tmp_path / "maze-v0.npz", form="demo")] == [4, 2, 8]


def test_dreamer_chunks_are_handed_on(tmp_path):
    first = {"is_first": [True] + [False] * 4, "is_last": [False] * 4 + [True], "is_terminal": [False] * 5}
    more = {"vector": np.arange(10, dtype=np.float32).reshape(5, 2), "reward": np.arange(5.0),
            "action": np.array([1, 0, 2, 1, 0], np.int32)}  # fmt: skip
    name = f"20261121T000000F000-{'a' * 22}-{'0' * 22}-5.npz"
    np.savez_compressed(tmp_path / name, **{k: np.array(v) for k, v in (first | more).items()})
    source = open_source(f"npz:{tmp_path}")
    (episode,) = checked(source)
    np.testing.assert_array_equal(episode.reward, [1, 2, 3, 4])
    np.testing.assert_array_equal(episode.action["action"], [1, 0, 2, 1])
    with pytest.raises(ConfigError, match="split means nothing there"):
        open_source(f"npz:{tmp_path}?split=timeouts")


def test_one_file_per_episode_in_natural_order(tmp_path):
    for i in (2, 10, 1):
        columns = demo(3 + i, [2 + i] if i != 10 else [])
        np.savez(tmp_path / f"ep_{i}.npz", **columns | {"rewards": np.full(3 + i, i)})
    source = open_source(f"npz:{tmp_path}")
    episodes = list(checked(source))
    assert [(e.steps, e.reward[0]) for e in episodes] == [(3, 1), (4, 2), (12, 10)]
    assert source.report.counts["no_end"] == 1
    assert episodes[2].where == f"{tmp_path}/ep_10.npz, episode 0"
    np.savez(tmp_path / "ep_3.npz", **ogbench(np.random.default_rng(0), [3]))
    with pytest.raises(DataError, match=r"ep_3.npz is of the ogbench form, .*ep_1.npz of the demo form"):
        read(tmp_path)


def test_next_observations_and_two_end_columns(tmp_path):
    columns = demo()
    del columns["dones"]
    ends = np.arange(10)
    columns |= {
        "terminations": ends == 4,
        "truncations": ends == 9,
        "next_obs": columns["observations"] + 100,
    }
    np.savez_compressed(tmp_path / "a.npz", **columns)
    first, second = read(tmp_path / "a.npz")
    np.testing.assert_array_equal(first.observation["obs"][-1], columns["next_obs"][4])
    np.testing.assert_array_equal(second.observation["obs"][-1], columns["next_obs"][9])
    assert [(e.steps, bool(e.terminated[-1]), e.fake_last) for e in (first, second)] == [
        (5, True, False), (5, False, False)]  # fmt: skip


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_members_are_read_by_any_slices(tmp_path, monkeypatch, save, piece):
    monkeypatch.setattr(npz, "_PIECE", piece)
    rng = np.random.default_rng(0)
    arrays = {
        "a": rng.standard_normal((50, 3)),
        "b": rng.integers(0, 255, (50, 2, 4), np.uint8),
        "c": np.arange(50) > 9,
        "f": np.asfortranarray(rng.standard_normal((50, 3))),
        "big": np.arange(50).astype(">f4"),
        "n": np.array(7),
    }
    save(tmp_path / "a.npz", **arrays)
    with npz.open_npz(tmp_path / "a.npz") as members:
        for _ in range(60):
            for name in ("a", "b", "c", "f", "big"):
                start, stop = np.sort(rng.integers(0, 51, 2))
                np.testing.assert_array_equal(members[name][start:stop], arrays[name][start:stop])
        assert members["n"].value().tolist() == [7]


def test_nothing_is_unpickled(tmp_path):
    columns = demo() | {"observations": np.array([{"x": 1}] * 10, object)}
    np.savez(tmp_path / "a.npz", **columns)
    with pytest.raises(DataError, match="observations is an array of objects: it needs pickle; refused"):
        read(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"one after the other, .*\n.*np.concatenate\(list\(array\)\)"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("flags", [("rewards", "dones"), ("terminals",), ()])
def test_episodes_side_by_side_are_told_from_steps(tmp_path, flags):
    """Padded, (episodes, steps, ...), under whatever names."""
    arrays = {"observations": np.zeros((4, 10, 3)), "actions": np.zeros((4, 10, 2))}
    arrays |= {name: np.zeros((4, 10)) for name in flags}
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=r"has 10 values a row.*side by side.*\n.*\n.*np.concatenate.*dones"):
        read(tmp_path / "a.npz")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_files_are_said(tmp_path, save):
    good, bad = tmp_path / "good.npz", tmp_path / "bad.npz"
    save(good, **demo(4000, [3999]))
    whole = good.read_bytes()
    with zipfile.ZipFile(good) as archive:
        info = archive.getinfo("actions.npy")
        at = info.header_offset + sum(struct.unpack("<HH", whole[info.header_offset + 26 :][:4])) + 30 + 9000
    flipped = bytearray(whole)
    flipped[at] ^= 255
    for content, message in (
        (b"", r"bad.npz is empty \(0 bytes\)"),
        (b"<html>no</html>", r"not an npz file \(starts with '<html>no</html>'\)"),
        (whole[: len(whole) // 2], "is truncated: .* bytes, no zip directory at the end"),
        (bytes(flipped), r"bad.npz: actions cannot be read .*\n.*damaged"),
    ):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=message):
            read(bad)


def test_a_member_shorter_or_longer_than_its_header(tmp_path):
    columns = demo()
    for cut in (-8, 8):
        with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
            for name, value in columns.items():
                buffer = io.BytesIO()
                np.save(buffer, value)
                content = buffer.getvalue() + b"\0" * 8
                archive.writestr(f"{name}.npy", content[:-16] if name == "rewards" and cut < 0 else
                                 content if name == "rewards" else content[:-8])  # fmt: skip
        with pytest.raises(DataError, match="rewards .*(8 bytes early|more bytes than its header)"):
            read(tmp_path / "a.npz")


def test_what_is_missing_or_misspelt(tmp_path):
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 2)), x=np.zeros(3))
    with pytest.raises(DataError, match=r"a.npz has no actions; found: observations, x"):
        read(tmp_path / "a.npz")
    with pytest.raises(DataError, match=r"does not exist\n  In .* there are: a.npz"):
        read(tmp_path / "b.npz")
    with pytest.raises(ConfigError, match="form is 'og'"):
        read(DATA / "recording.npz", form="og")
    with pytest.raises(ConfigError, match="tolerate and actions are for Dreamer chunks"):
        read(DATA / "recording.npz", tolerate=True)
    np.savez(tmp_path / "c.npz", **demo() | {"rewards": np.zeros(9)})
    with pytest.raises(DataError, match="lengths differ: observation 10, action 10, reward 9, done 10"):
        read(tmp_path / "c.npz")


def test_values_that_are_not_finite_are_named(tmp_path):
    columns = demo()
    columns["rewards"][6] = np.nan
    np.savez(tmp_path / "a.npz", **columns)
    with pytest.raises(DataError, match=r"a.npz, episode 1: reward, row 1 is nan"):
        read(tmp_path / "a.npz")
    assert len(list(checked(open_source(f"npz:{tmp_path}/a.npz"), "skip_episode"))) == 1


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("block", [1, 1 << 25])
def test_one_episode_with_its_last_observation(tmp_path, monkeypatch, nested, block):
    monkeypatch.setattr(flat, "BLOCK", block)
    rng = np.random.default_rng(0)
    obs = {"a": rng.random((8, 3)).astype("f4"), "b": rng.random((8, 2)).astype("f4")}
    obs = {f"observations/{k}": v for k, v in obs.items()} if nested else {"obs": obs["a"]}
    rest = {"actions": rng.random((7, 1)).astype("f4"), "rewards": np.arange(7.0), "dones": np.arange(7) == 6}
    np.savez(tmp_path / "x.npz", **obs, **rest)
    (episode,) = read(tmp_path / "x.npz", dones_are="terminals")
    assert (episode.steps, episode.fake_last, episode.terminated.tolist()) == (7, False, [False] * 6 + [True])
    for name, value in obs.items():
        np.testing.assert_array_equal(episode.observation[name.removeprefix("observations/")], value)
    np.testing.assert_array_equal(episode.reward, rest["rewards"])
    np.savez(
        tmp_path / "o.npz", **obs, actions=rest["actions"], terminals=rest["dones"]
    )  # as OGBench's names
    (episode,) = read(tmp_path / "o.npz")
    assert (episode.steps, episode.terminated[-1]) == (7, True)
    np.savez(tmp_path / "x.npz", **obs, **rest | {"dones": np.arange(7) % 3 == 2})
    with pytest.raises(DataError, match=r"8 observations for 7 actions, but dones ends several episodes"):
        read(tmp_path / "x.npz")
