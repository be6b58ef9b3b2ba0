import itertools
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from datamodules.sources import checked, open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

DATA = Path(__file__).parent.parent / "data" / "d4rl"
NONEXT, NOTIMEOUTS = (
    DATA / "pendulum_scripted-v2-nonext.hdf5",
    DATA / "halfcheetah_scripted-v0-notimeouts.hdf5",
)


def read(uri, **options):
    return list(checked(open_source(uri, **options)))


def write(path, **columns):
    with h5py.File(path, "w") as file:
        for name, value in columns.items():
            file[name.replace("__", "/")] = value
    return path


def flat(n=10, ends=(4, 9), **more):
    rng = np.random.default_rng(n)
    terminals = np.zeros(n, bool)
    terminals[list(ends)] = True
    return {
        "observations": rng.standard_normal((n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
        "terminals": terminals,
    } | more


def test_a_file_without_next_observations():
    with h5py.File(NONEXT) as file:
        obs, action, reward, ends = (file[k][:] for k in ("observations", "actions", "rewards", "timeouts"))
        assert not file["terminals"][:].any()
    source = open_source(f"hdf5:{NONEXT}")
    start = 0
    for episode, end in zip(checked(source), np.flatnonzero(ends), strict=True):
        # o_T is missing, so o_{T-1} becomes the last observation and a_{T-1} goes.
        np.testing.assert_array_equal(episode.observation["obs"], obs[start : end + 1])
        np.testing.assert_array_equal(episode.action["action"], action[start:end])
        np.testing.assert_array_equal(episode.reward, reward[start:end])
        assert episode.truncated[-1]
        assert not episode.terminated.any()
        start = end + 1
    assert (start, source.report.counts["last_dropped"]) == (1037, 6)
    repeated = read(f"hdf5:{NONEXT}?last_obs=repeat")
    assert [e.steps for e in repeated] == [200] * 5 + [37]
    assert all(e.fake_last for e in repeated)
    assert (source.files, source.meta["no_reward"], source.schema.low) == ([NONEXT], False, {})


def test_a_file_without_time_limits_needs_a_length():
    with pytest.raises(DataError, match="no episode end found in 900 steps; give episode_length= or split="):
        read(f"hdf5:{NOTIMEOUTS}")
    with h5py.File(NOTIMEOUTS) as file:
        obs = file["observations"][:]
    for options in ({"episode_length": 300}, {"split": "length=300"}):
        episodes = read(f"hdf5:{NOTIMEOUTS}", **options)
        np.testing.assert_array_equal(np.concatenate([e.observation["obs"] for e in episodes]), obs)
        assert [len(e.observation["obs"]) for e in episodes] == [300] * 3


def test_next_observations_infos_and_bounds(tmp_path):
    columns = flat(next_observations=np.arange(30, dtype=np.float32).reshape(10, 3))
    more = {
        "infos__qpos": np.zeros((10, 2)),
        "metadata__iteration": np.int64(3),
        "metadata__policy__w": np.zeros(4),
    }
    path = write(tmp_path / "a.hdf5", **columns, **more)
    with h5py.File(path, "a") as file:
        file["actions"].attrs.update(low=-2.0, high=[2.0, 3.0])
    source = open_source(f"hdf5:{path}")
    first, second = checked(source)
    np.testing.assert_array_equal(
        first.observation["obs"], np.r_[columns["observations"][:5], [[12, 13, 14]]]
    )
    np.testing.assert_array_equal(
        second.observation["obs"], np.r_[columns["observations"][5:], [[27, 28, 29]]]
    )
    assert (first.steps, first.fake_last, bool(first.terminated[-1])) == (5, False, True)
    assert source.schema.spaces.obs == {"obs": Spec("float32", (3,))}
    assert (source.schema.low["action"].tolist(), source.schema.high["action"].tolist()) == ([-2, -2], [2, 3])


def test_compressed_nested_and_without_rewards(tmp_path):
    columns = flat()
    obs = columns.pop("observations")
    del columns["rewards"]
    with h5py.File(write(tmp_path / "a.h5", **columns), "a") as file:
        images = np.arange(10 * 48).astype(np.uint8).reshape(10, 4, 4, 3)
        file.create_dataset("observations/image", data=images, chunks=(4, 2, 2, 3), compression="gzip")
        file.create_dataset("observations/vector", data=obs, chunks=(3, 3), compression="gzip")
    source = open_source(f"hdf5:{tmp_path}/a.h5")
    second = list(checked(source))[1]
    np.testing.assert_array_equal(second.observation["vector"][:5], obs[5:])
    np.testing.assert_array_equal(second.observation["image"][:5], images[5:])
    assert (source.meta["no_reward"], second.reward) == (True, None)
    assert list(read(f"hdf5:{tmp_path}/a.h5?drop=image")[0].observation) == ["vector"]


def test_several_files_are_one_source(tmp_path):
    for i in (2, 10, 1):
        write(tmp_path / f"part{i}.hdf5", **flat(rewards=np.full(10, i)))
    assert [e.reward[0] for e in read(f"hdf5:{tmp_path}/*.hdf5")] == [1, 1, 2, 2, 10, 10]
    write(tmp_path / "part3.hdf5", **flat(observations=np.zeros((10, 7))))
    with pytest.raises(DataError, match=r"part3.hdf5: observation 'obs' is float32 \(7,\)"):
        read(f"hdf5:{tmp_path}")


def groups(path, count=11, **change):
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for i in range(count):
            columns = {
                "observations": {"vec": rng.standard_normal((i + 2, 3)), "pair": np.arange(i + 2)},
                "actions": np.arange(i + 1) % 3, "rewards": np.full(i + 1, float(i)),
                "terminations": np.arange(i + 1) == i, "truncations": np.zeros(i + 1, bool),
            } | (change if i == 7 else {})  # fmt: skip
            group = file.create_group(f"episode_{i}")
            group.attrs["seed"] = 100 + i
            for name, value in columns.items():
                if isinstance(value, dict):
                    group[f"{name}/vec"], group[f"{name}/pair/_index_0"] = (
                        value["vec"],
                        value["pair"],
                    )
                elif value is not None:
                    group[name] = value
    return path


def test_groups_without_metadata(tmp_path):
    path = groups(tmp_path / "main_data.hdf5")
    source = open_source(f"hdf5:{path}")
    assert source.schema.spaces.obs == {"pair/0": Spec("int32", (), 12), "vec": Spec("float32", (3,))}
    assert source.schema.spaces.action == {"action": Spec("int32", (), 3)}
    episodes = list(checked(source))
    assert [(e.steps, e.seed, e.reward[0]) for e in episodes] == [(i + 1, 100 + i, i) for i in range(11)]
    with h5py.File(path) as file:
        np.testing.assert_array_equal(
            episodes[10].observation["vec"], file["episode_10/observations/vec"][:].astype(np.float32)
        )
    np.testing.assert_array_equal(episodes[10].observation["pair/0"], np.arange(12))
    vectors = open_source(f"hdf5:{path}?discrete=false")
    assert vectors.schema.spaces.action == {"action": Spec("float32", (1,))}
    np.testing.assert_array_equal(list(checked(vectors))[4].action["action"], [[0], [1], [2], [0], [1]])
    with pytest.raises(ConfigError, match="one group per episode"):
        open_source(f"hdf5:{path}?episode_length=3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"rewards": None},
            "episode 7 has no 'rewards'; found: actions, observations, terminations, truncations",
        ),
        ({"actions": None}, "episode_7 has no 'actions'"),
        ({"actions": np.zeros(5, int)}, "episode 7: the lengths differ: .* action action 5"),
    ],
)
def test_a_bad_group_is_named(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read(f"hdf5:{groups(tmp_path / 'a.hdf5', **change)}")


@pytest.mark.parametrize("bad", [0, 2])
@pytest.mark.parametrize("name", ["observations", "actions", "rewards", ""])
def test_a_bad_group_can_be_skipped(tmp_path, bad, name):
    path = groups(tmp_path / "a.hdf5", 4)
    with h5py.File(path, "a") as file:
        del file[f"episode_{bad}/{name}"]
        file[f"episode_{bad}/{name}"] = np.array([b"x"])
    source = open_source(f"hdf5:{path}")
    kept = [i + 1 for i in range(4) if i != bad]
    assert [e.steps for e in checked(source, "skip_episode")] == kept
    assert source.report.counts["skipped"] == 1
    with pytest.raises(DataError, match=f"episode.{bad}(.*\n)+.*on_bad=skip_episode leaves"):
        list(checked(source))


def test_damaged_files_are_said(tmp_path):
    whole = NONEXT.read_bytes()
    path = tmp_path / "a.hdf5"
    for content, message in (
        (b"", r"a.hdf5 is empty"),
        (b"<html>404 not found</html>", r"not an HDF5 file \(starts with '<html>404"),
        (whole[: len(whole) // 2], f"truncated: {len(whole) // 2:,} of {len(whole):,} bytes"),
    ):
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            open_source(f"hdf5:{path}")
    with h5py.File(path, "w") as file:
        for name, value in flat(1000, [999]).items():
            file.create_dataset(name, data=value, chunks=(250, *value.shape[1:]), compression="gzip")
        at = file["rewards"].id.get_chunk_info(2)
    content = bytearray(path.read_bytes())
    content[at.byte_offset : at.byte_offset + at.size] = bytes(at.size)
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.hdf5: /rewards cannot be read .*\n  Delete it"):
        read(f"hdf5:{path}")


def virtual(path, source, key="d"):
    """A file whose observations lie in another one."""
    layout = h5py.VirtualLayout((10, 3), "f4")
    layout[:] = h5py.VirtualSource(source, key, (10, 3))
    with h5py.File(write(path, **{k: v for k, v in flat().items() if k != "observations"}), "a") as file:
        file.create_virtual_dataset("observations", layout)
    return path


def test_a_virtual_dataset_needs_its_sources(tmp_path, monkeypatch):
    # HDF5 itself fills with zeros what it does not find.
    path = virtual(tmp_path / "v.hdf5", "part %%.h5")
    with pytest.raises(DataError, match=r"v.hdf5: /observations .* d in part %.h5, which is missing"):
        read(f"hdf5:{path}")
    write(tmp_path / "part %.h5", e=np.zeros(3))
    with pytest.raises(DataError, match=r"from d in part %.h5, which is missing"):
        read(f"hdf5:{path}")
    write(tmp_path / "part %.h5", d=flat()["observations"])
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)  # HDF5 also looks in the working directory, and for the bare name
    for found in (path, virtual(tmp_path / "sub/v.hdf5", "part %%.h5"),
                  virtual(tmp_path / "w.hdf5", "/nowhere/part %%.h5")):  # fmt: skip
        seen = [x.observation["obs"][:5] for x in read(f"hdf5:{found}")]
        np.testing.assert_array_equal(np.concatenate(seen), flat()["observations"])
    whole = virtual(tmp_path / "x.hdf5", ".", "rewards2")
    with pytest.raises(DataError, match=r"from rewards2 in \., which is missing"):
        read(f"hdf5:{whole}")


def test_a_filter_that_is_not_here_is_no_damage(tmp_path, monkeypatch):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, value in flat().items():
            file.create_dataset(name, data=np.zeros_like(value) if name == "observations" else value,
                                compression="lzf" if name == "observations" else None)  # fmt: skip
    content = bytearray(path.read_bytes())
    place = content.find(b"lzf\0") - 8
    assert content[place : place + 2] == (32000).to_bytes(2, "little")
    content[place : place + 2] = (32001).to_bytes(2, "little")  # Blosc, which h5py lacks
    path.write_bytes(content)
    monkeypatch.setitem(sys.modules, "hdf5plugin", None)
    with pytest.raises(DataError, match=r"/observations needs the filter lzf.\n  pip install hdf5plugin"):
        read(f"hdf5:{path}")


def test_what_nobody_reads_may_be_in_any_state(tmp_path):
    path = write(tmp_path / "a.hdf5", **flat())
    with h5py.File(path, "a") as file:
        file["extra"], file["kind"] = h5py.ExternalLink("none.h5", "/x"), np.dtype("f4")
        h5py.h5d.create(file.id, b"when", h5py.h5t.UNIX_D32LE, h5py.h5s.create_simple((1,)))
    assert [x.steps for x in read(f"hdf5:{path}")] == [5, 5]
    with h5py.File(path, "a") as file:
        del file["observations"]
        file["observations"] = h5py.ExternalLink("none.h5", "/x")
    with pytest.raises(DataError, match=r"'observations' cannot be opened .*open file.*\n.* put that beside"):
        read(f"hdf5:{path}")


def test_absent_files_and_folders(tmp_path):
    write(tmp_path / "hopper.hdf5", **flat())
    with pytest.raises(DataError, match=r"does not exist; did you mean 'hopper.hdf5'"):
        open_source(f"hdf5:{tmp_path}/hoper.hdf5")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match="holds no .hdf5"):
        open_source(f"hdf5:{tmp_path}/none")
    with pytest.raises(DataError, match=r"has no observations; found: x"):
        open_source(f"hdf5:{write(tmp_path / 'x.hdf5', x=np.zeros(3))}")


def test_an_entry_that_only_some_groups_have(tmp_path):
    path = write(tmp_path / "some.hdf5")
    with h5py.File(path, "w") as file:
        for i in range(3):
            file[f"episode_{i}/observations/a"] = np.zeros((3, 2), np.float32)
            file[f"episode_{i}/actions"] = np.zeros((2, 1), np.float32)
            file[f"episode_{i}/rewards"] = np.zeros(2)
        file["episode_1/observations/b"] = np.zeros((3, 2), np.float32)
    with pytest.raises(DataError, match="episode 1 has 'b', which the first good episode lacks"):
        read(f"hdf5:{path}")
    assert len(read(f"hdf5:{path}?drop=b")) == 3


def test_an_episode_beyond_memory_is_cut_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("datamodules.sources.flat.LONGEST", 32 * 3)
    path = groups(tmp_path / "g.hdf5", 9)
    want = {}
    with h5py.File(path) as file:
        for name in file:
            want[name] = {k: file[name][k][()] for k in ("observations/vec", "actions", "rewards")}
    source = open_source(f"hdf5:{path}")
    raw = list(source.episodes())
    for name, arrays in want.items():
        parts = [e for e in raw if f"episode {name[-1]}" in e.where]
        want_steps = len(arrays["rewards"])
        assert [e.steps for e in parts] == [min(3, want_steps - i) for i in range(0, want_steps, 3)]
        seen = np.concatenate(
            [e.observation["vec"][: e.steps] for e in parts] + [parts[-1].observation["vec"][-1:]]
        )
        np.testing.assert_array_equal(seen, arrays["observations/vec"])
        for a, b in itertools.pairwise(parts):
            np.testing.assert_array_equal(a.observation["vec"][-1], b.observation["vec"][0])
            assert a.truncated.tolist() == [False] * (a.steps - 1) + [True]
        np.testing.assert_array_equal(np.concatenate([e.action["action"] for e in parts]), arrays["actions"])
        np.testing.assert_array_equal(np.concatenate([e.reward for e in parts]), arrays["rewards"])


def test_a_file_that_is_being_written_is_not_called_damaged(tmp_path):
    path = tmp_path / "w.hdf5"
    code = f"import h5py; f = h5py.File({str(path)!r}, 'w'); print(f.name, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1) as writer:
        writer.stdout.readline()
        with pytest.raises(DataError, match=r"locked: another process is writing it.\n  Wait.*LOCKING=FALSE"):
            open_source(f"hdf5:{path}")
        writer.communicate(b"\n")
