"""Minari datasets against Minari's own reading, and what damage does to them."""

import io
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import minari
import numpy as np
import pyarrow as pa
import pyarrow.dataset as ds
import pytest
from gymnasium import spaces
from minari.data_collector.episode_buffer import EpisodeBuffer
from minari.dataset.minari_storage import MinariStorage

from datamodules.episodes import Episode, checked
from datamodules.sources import minari as minari_source
from datamodules.sources import open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

ROOT = Path(__file__).parents[1] / "data" / "minari"
SETS = ["pendulum/scripted-v0", "pendulum/arrow-v0", "pendulum/parquet-v0", "cartpole/mixed-v0"]


def stack(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {k: stack([v[k] for v in values]) for k in values[0]}
    if isinstance(values[0], tuple):
        return tuple(stack(list(part)) for part in zip(*values, strict=True))
    return list(values) if isinstance(values[0], str) else np.stack(values)


def make(
    folder: Path, obs: spaces.Space, action: spaces.Space, lengths: tuple[int, ...] = (3, 12),
    form: str = "hdf5", jpeg: bool = True, sample: Callable[[], Any] | None = None,
) -> Path:  # fmt: skip
    """A dataset that Minari's own storage writes."""
    folder.mkdir(parents=True)
    storage = MinariStorage.new(folder / "data", obs, action, data_format=form, jpeg_encoding=jpeg)
    obs.seed(1)
    action.seed(2)
    for i, steps in enumerate(lengths):
        ends = np.zeros((2, steps), bool)
        ends[i % 2, -1] = True
        storage.update_episodes(
            [
                EpisodeBuffer(
                    id=i,
                    seed=10 + i,
                    observations=stack([(sample or obs.sample)() for _ in range(steps + 1)]),
                    actions=stack([action.sample() for _ in range(steps)]),
                    rewards=np.arange(steps) + 0.5,  # type: ignore[arg-type]
                    terminations=ends[0],  # type: ignore[arg-type]
                    truncations=ends[1],  # type: ignore[arg-type]
                )
            ]
        )
    return folder


def flat(value: Any, root: str, path: str = "") -> dict[str, Any]:
    """Nested arrays under our names, by hand."""
    if isinstance(value, dict | tuple):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, x in items for k, v in flat(x, root, f"{path}/{key}").items()}
    return {path[1:] or root: np.asarray(value)}


def same(got: Episode, storage: dict[str, Any], shift: dict[str, int] | None = None) -> None:
    for part, root in (("observation", "obs"), ("action", "action")):
        ours, theirs = getattr(got, part), flat(storage[f"{part}s"], root)
        assert set(ours) == set(theirs)
        for key, value in theirs.items():
            want = (value - (shift or {}).get(key, 0)).astype(ours[key].dtype)
            np.testing.assert_array_equal(ours[key], want.reshape(ours[key].shape), key)
    np.testing.assert_array_equal(got.reward, storage["rewards"].astype(np.float32))
    np.testing.assert_array_equal(got.terminated, storage["terminations"])
    np.testing.assert_array_equal(got.truncated, storage["truncations"])


def read(folder: Path | str, on_bad: str = "error", **options: Any) -> list[Episode]:
    return list(checked(open_source(f"minari:{folder}", **options), on_bad))


def stored(folder: Path) -> list[dict[str, Any]]:
    storage = MinariStorage.read(folder / "data")
    return list(storage.get_episodes(range(storage.total_episodes)))


@pytest.mark.parametrize("dataset", SETS)
def test_every_value_is_what_minari_reads(dataset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(ROOT))
    theirs = minari.load_dataset(dataset)
    source = open_source(f"minari:{dataset}")
    got = list(checked(source))
    assert (source.total_episodes, source.total_steps) == (theirs.total_episodes, theirs.total_steps)
    assert len(got) == theirs.total_episodes
    for ours, episode in zip(got, theirs.iterate_episodes(), strict=True):
        same(ours, vars(episode))
        assert ours.where == f"{dataset}, episode {episode.id}"
    notes = theirs.storage.get_episode_metadata(range(len(got)))
    assert [x.seed for x in got] == [note["seed"] for note in notes]
    spec = json.loads(source.meta["env_spec"])
    assert (source.meta["env_id"], source.meta["dataset_id"]) == (spec["id"], dataset)
    assert source.schema.spaces.episode_length == spec["max_episode_steps"]
    assert source.meta["ref_max_score"] == 1.0
    assert source.meta["algorithm"] == "scripted/random"
    assert not source.report.notes


def test_a_folder_is_named_by_id_root_path_or_its_data() -> None:
    first = read("pendulum/arrow-v0", root=str(ROOT))
    for folder in (ROOT / "pendulum/arrow-v0", ROOT / "pendulum/arrow-v0/data"):
        again = read(folder)
        assert len(again) == len(first) == 3
        assert again[2].where == "arrow-v0, episode 2"
    source = open_source("minari:pendulum/scripted-v0", root=str(ROOT))
    assert source.schema.low["action"].tolist() == [-2]
    assert source.schema.spaces.unbounded == ()


NESTED = spaces.Dict(
    {
        "t": spaces.Tuple((spaces.Discrete(4, start=3), spaces.Box(-1, 1, (2, 2), np.float32))),
        "d": spaces.Dict({"deep": spaces.Box(-5, 5, (), np.float64), "bits": spaces.MultiBinary(3)}),
        "pixels": spaces.Box(0, 255, (40, 32, 3), np.uint8),
        "grey": spaces.Box(0, 255, (33, 32), np.uint8),
        "small": spaces.Box(0, 255, (3, 8, 8), np.uint8),
        "board": spaces.Box(0, 5, (2, 2), np.int8),
    }
)


@pytest.mark.parametrize("form", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("jpeg", [True, False])
def test_every_space_is_read_as_minari_decodes_it(form: str, jpeg: bool, tmp_path: Path) -> None:
    folder = make(
        tmp_path / "x-v0",
        NESTED,
        spaces.MultiDiscrete([3, 3]),
        (3, 40, 1, 2, 2, 2, 2, 2, 2, 2, 5),
        form,
        jpeg,
    )
    source = open_source(f"minari:{folder}")
    assert source.schema.spaces.obs["grey"] == Spec("uint8", (33, 32, 1))
    assert source.schema.spaces.obs["t/0"] == Spec("int32", (), 4)
    assert source.meta["lossy_images"] is jpeg
    assert source.meta["start"] == {"t/0": [3]}
    got, theirs = list(checked(source)), stored(folder)
    assert [x.steps for x in got] == [3, 40, 1, 2, 2, 2, 2, 2, 2, 2, 5]  # 10 after 9, not after 1
    for ours, episode in zip(got, theirs, strict=True):
        same(ours, episode, {"t/0": 3})


def test_uneven_classes_and_started_actions_are_split_and_shifted(tmp_path: Path) -> None:
    action = spaces.Tuple((spaces.MultiDiscrete([2, 5], start=[0, 10]), spaces.Discrete(3, start=-1)))
    folder = make(tmp_path / "x-v0", spaces.Discrete(5, start=2), action)
    (ours, _), (theirs, _) = read(folder), stored(folder)
    np.testing.assert_array_equal(ours.action["0/1"], theirs["actions"][0][:, 1] - 10)
    np.testing.assert_array_equal(ours.action["0/0"], theirs["actions"][0][:, 0])
    np.testing.assert_array_equal(ours.action["1"], theirs["actions"][1] + 1)
    np.testing.assert_array_equal(ours.observation["obs"], theirs["observations"] - 2)


def test_jpegs_of_one_size_are_pictures_too(tmp_path: Path) -> None:
    space = spaces.Box(0, 255, (32, 32, 3), np.uint8)
    shades = iter(range(0, 255, 7))
    folder = make(
        tmp_path / "x-v0",
        space,
        spaces.Discrete(2),
        sample=lambda: np.full((32, 32, 3), next(shades), np.uint8),
    )
    with h5py.File(folder / "data/main_data.hdf5") as file:
        assert file["episode_0/observations"].ndim == 2  # bytes in a rectangle, no shape of a picture
    for ours, episode in zip(read(folder), stored(folder), strict=True):
        assert ours.observation["obs"].shape[1:] == (32, 32, 3)
        same(ours, episode)


@pytest.mark.parametrize("form", ["hdf5", "parquet"])
def test_text_by_choice(form: str, tmp_path: Path) -> None:
    space = spaces.Dict({"say": spaces.Text(4, charset="abé"), "x": spaces.Box(-1, 1, (1,), np.float32)})
    folder = make(tmp_path / "x-v0", space, spaces.Discrete(2), form=form)
    with pytest.raises(DataError, match="observation 'say' is Text"):
        read(folder)
    assert set(read(folder, drop="say")[0].observation) == {"x"}
    source = open_source(f"minari:{folder}?text=ids")
    words = source.meta["vocabulary"]["say"]
    for ours, episode in zip(checked(source), stored(folder), strict=True):
        assert [words[i] for i in ours.observation["say"]] == list(episode["observations"]["say"])
    with pytest.raises(ConfigError, match="text is 'words'; expected ids"):
        read(folder, text="words")
    with pytest.raises(ConfigError, match="drop names 'sya'.*did you mean 'say'"):
        read(folder, drop=["sya"])


def test_what_is_absent_is_said_with_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)
    message = (
        "(?s)'pendulum/scriptd-v0' not found under .*did you mean 'pendulum/scripted-v0'.\n"
        "  If it is another one: MINARI_DATASETS_PATH=.* minari download pendulum/scriptd-v0"
    )
    with pytest.raises(DataError, match=message):
        read("pendulum/scriptd-v0", root=str(ROOT))
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(
        DataError, match="(?s)under .*.minari/datasets.*There are: none.*: minari download a/b-v0"
    ):
        read("a/b-v0")
    assert not list(tmp_path.iterdir())  # looking does not create the root


def test_downloads_go_through_minari(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MINARI_DATASETS_PATH", raising=False)

    def fetch(dataset: str) -> None:
        shutil.copytree(ROOT / dataset, Path(os.environ["MINARI_DATASETS_PATH"]) / dataset)

    monkeypatch.setattr(minari, "download_dataset", fetch)
    assert len(read("pendulum/arrow-v0", root=str(tmp_path), download=True)) == 3
    assert "MINARI_DATASETS_PATH" not in os.environ

    def offline(dataset: str) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(minari, "download_dataset", offline)
    with pytest.raises(
        DataError, match="(?s)'a/b-v0' could not be fetched: Name or service.*run: MINARI.* minari download"
    ):
        read("a/b-v0", root=str(tmp_path), download=True)


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make_copy(dataset: str) -> Path:
        return Path(shutil.copytree(ROOT / dataset, tmp_path / dataset.rpartition("/")[2]))

    return make_copy


def edit(path: Path, change: Callable[[Any], None]) -> None:
    with h5py.File(path / "data/main_data.hdf5", "a") as file:
        change(file)


def cut(file: Any, key: str, rows: Any) -> None:
    put(file, key, file[key][()][rows])


def put(file: Any, key: str, value: Any) -> None:
    del file[key]
    file[key] = value


DAMAGE: list[tuple[str, Callable[[Any], Any], str]] = [
    ("key", lambda f: f.__delitem__("episode_2/rewards"),
     "episode 2 has no 'rewards'; found: actions, infos, observations, terminations, truncations"),
    ("last", lambda f: cut(f, "episode_2/observations", slice(50)), "the lengths differ: observation obs 50"),
    ("last2", lambda f: cut(f, "episode_2/observations", slice(-1)),
     "episode 2: 200 observations for 200 actions, expected 201"),
    ("action", lambda f: cut(f, "episode_2/actions", slice(7)), "action action 7, reward 200"),
    ("width", lambda f: cut(f, "episode_2/observations", np.s_[:, :2]), r"\(.., 2\), its space says \(3\)"),
    ("nan", lambda f: f["episode_2/rewards"].__setitem__(11, np.nan), "episode 2: reward, row 11 is nan"),
    ("text", lambda f: put(f, "episode_2/rewards", [b"x"] * 200),
     "episode 2: reward has the type"),
    ("group", lambda f: (f.__delitem__("episode_2/actions"), f.create_group("episode_2/actions/deep")),
     "'actions' is a group of deep"),
    ("type", lambda f: put(f, "episode_2", np.dtype("f4")), "'episode_2' cannot be opened .neither an array"),
    ("link", lambda f: put(f, "episode_2", h5py.SoftLink("/x")), "episode 2: 'episode_2' cannot be opened"),
    ("middle", lambda f: f["episode_2/terminations"].__setitem__(30, True), "at step 30, but 169 more"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"), [case[1:] for case in DAMAGE], ids=[case[0] for case in DAMAGE]
)
def test_damage_in_one_episode_is_named_and_can_be_left_out(
    change: Callable[[Any], Any], message: str, copy: Callable[[str], Path]
) -> None:
    folder = copy("pendulum/scripted-v0")
    edit(folder, change)
    with pytest.raises(DataError, match=message):
        read(folder)
    source = open_source(f"minari:{folder}")
    left = list(checked(source, "skip_episode"))
    assert [x.where[-1] for x in left] == ["0", "1", "3", "4", "5"]
    assert source.report.counts["skipped"] == 1


def test_a_set_without_any_rewards_is_read(copy: Callable[[str], Path]) -> None:
    folder = copy("pendulum/scripted-v0")
    whole = read(folder)
    edit(folder, lambda f: [f[f"episode_{i}"].__delitem__("rewards") for i in range(len(whole))])
    for uri in (f"minari:{folder}", f"hdf5:{folder}/data/main_data.hdf5"):
        source = open_source(uri)
        assert source.meta["no_reward"] is True
        for got, want in zip(checked(source), whole, strict=True):
            assert got.reward is None
            np.testing.assert_array_equal(got.action["action"], want.action["action"])
    assert "no_reward" not in open_source(f"minari:{ROOT / 'pendulum/scripted-v0'}").meta


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_tables_without_any_rewards_are_read(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(f"pendulum/{form}-v0")
    whole = read(folder)
    for path in folder.glob(f"data/*/*.{form}"):
        assert "no_reward" not in open_source(f"minari:{folder}").meta  # some episode has them
        table = ds.dataset(path, format=form).to_table().drop_columns(["rewards"])
        path.unlink()
        ds.write_dataset(table, path.parent, format=form, existing_data_behavior="overwrite_or_ignore",
                         basename_template=f"part-{{i}}.{form}")  # fmt: skip
    assert open_source(f"minari:{folder}").meta["no_reward"] is True
    for got, want in zip(read(folder), whole, strict=True):
        assert got.reward is None
        np.testing.assert_array_equal(got.action["action"], want.action["action"])


def test_a_path_where_nothing_is_gets_no_command_to_download_it(tmp_path: Path) -> None:
    for download in (False, True):
        with pytest.raises(DataError, match="x-v0 does not exist.\n  Expected the folder") as error:
            read(tmp_path / "x-v0", download=download)
        assert "minari download" not in str(error.value)


def test_a_missing_last_observation_can_be_accepted(copy: Callable[[str], Path]) -> None:
    folder = copy("cartpole/mixed-v0")
    edit(folder, lambda f: [cut(f, f"episode_{i}/observations", slice(-1)) for i in (0, 1)])
    first, second = read(folder, last_obs="terminal")[:2]
    assert (first.steps, first.fake_last, second.steps, second.fake_last) == (119, False, 49, True)


def test_a_missing_last_observation_is_seen_in_padded_tables(tmp_path: Path) -> None:
    folder = make(tmp_path / "x-v0", spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2), (4,), "arrow")
    edit_note = folder / "data/0/metadata.json"
    edit_note.write_text(json.dumps(json.loads(edit_note.read_text()) | {"total_steps": 5}))
    with pytest.raises(DataError, match="5 observations for 5 actions, expected 6"):
        read(folder)


def test_no_end_mark_is_a_truncation_and_both_are_a_termination(copy: Callable[[str], Path]) -> None:
    folder = copy("pendulum/scripted-v0")
    edit(
        folder,
        lambda f: [
            f["episode_0/truncations"].__setitem__(-1, False),
            f["episode_1/terminations"].__setitem__(-1, 1),
        ],
    )
    source = open_source(f"minari:{folder}")
    first, second = list(checked(source))[:2]
    assert (first.truncated[-1], second.terminated[-1], second.truncated[-1]) == (True, True, False)
    assert (source.report.counts["no_end_flag"], source.report.counts["both_flags"]) == (1, 1)


def test_metadata_that_disagree_or_are_missing(copy: Callable[[str], Path]) -> None:
    folder = copy("pendulum/scripted-v0")
    edit(folder, lambda f: f.__delitem__("episode_3"))
    source = open_source(f"minari:{folder}")
    assert [x.where[-1] for x in checked(source)] == ["0", "1", "2", "4", "5"]
    assert source.report.notes == ["scripted-v0: metadata says 6 episodes, the file has 5: using the file"]
    (folder / "data/metadata.json").write_text('{"total_')
    with pytest.raises(DataError, match=r"metadata.json is not JSON"):
        read(folder)
    (folder / "data/metadata.json").unlink()
    with pytest.raises(DataError, match=r"scripted-v0: .*metadata.json is missing, which holds the spaces"):
        read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b"<html>Not found</html>", "not an HDF5 file.*<html>"),
        (lambda b: b"", "is empty"),
        (lambda b: b[: len(b) // 2], "truncated: 64,046 of 128,092 bytes"),
        (lambda b: b[:8] + b"\xff" * 64 + b[72:], "HDF5|damaged"),
    ],
)
def test_a_damaged_file_is_named(
    change: Callable[[bytes], bytes], message: str, copy: Callable[[str], Path]
) -> None:
    path = copy("pendulum/scripted-v0") / "data/main_data.hdf5"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=f"main_data.hdf5.*{message}"):
        read(path.parents[1])


@pytest.mark.parametrize(
    ("old", "new"), [(b"HEAP", b"leap"), (b"TREE", bytes(4)), ((200).to_bytes(8, "little"), b"\xff" * 8),
                     ((200).to_bytes(8, "little"), (1 << 50).to_bytes(8, "little"))]
)  # fmt: skip
def test_damage_inside_a_file_is_an_error_of_ours(
    old: bytes, new: bytes, copy: Callable[[str], Path]
) -> None:
    """HDF5 has a type of error for each kind: of heaps, trees, and lengths that no memory holds."""
    path = copy("pendulum/scripted-v0") / "data/main_data.hdf5"
    whole = path.read_bytes()
    places = [x.start() for x in re.finditer(re.escape(old), whole)]
    skipped = []
    for at in places[:: max(len(places) // 12, 1)]:
        path.unlink()  # HDF5 knows a file that is still open
        path.write_bytes(whole[:at] + new + whole[at + len(new) :])
        try:
            source = open_source(f"minari:{path.parents[1]}")
            list(checked(source, "skip_episode"))
            skipped.append(source.report.counts["skipped"])
        except DataError:
            skipped.append(1)
    assert 1 in skipped
    assert max(skipped) == 1


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_damaged_table_is_named(form: str, copy: Callable[[str], Path]) -> None:
    folder = copy(f"pendulum/{form}-v0")
    path = folder / f"data/1/part-0.{form}"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataError, match=f"episode 1: .*part-0.{form} is damaged"):
        read(folder)
    path.unlink()
    with pytest.raises(DataError, match=f"episode 1: no .{form} file"):
        read(folder)
    assert [x.where[-1] for x in read(folder, "skip_episode")] == ["0", *"2"[: form == "arrow"]]


def rows(*values: Any) -> list[Any]:
    """13 rows, of which 4 and 5 are other ones."""
    return [values[0]] * 4 + [*values[1:]] + [values[0]] * (10 - len(values))


MIXED = spaces.Dict({"x": spaces.Box(-9, 9, (2,), np.float32), "t": spaces.Text(4)})
IMAGE = spaces.Box(0, 255, (32, 32, 3), np.uint8)
COLUMNS: list[tuple[str, spaces.Space, str, Any, str]] = [
    ("ragged", spaces.Box(-9, 9, (2,), np.float32), "observations",
     pa.array(rows([1.0, 2.0], [3.0], [4.0, 5.0, 6.0])), "'observations' has 1 values in row 4, 2 before"),
    ("no Dict", MIXED, "observations", pa.array(rows({"x": [1.0, 2.0], "t": "a"}, None)),
     "'observations' has none in row 4"),
    ("no text", MIXED, "observations",
     pa.array(rows({"x": [1.0, 2.0], "t": "a"}, {"x": [1.0, 2.0]})),
     "'observations/t' has none in row 4"),
    ("no number", MIXED, "rewards", pa.array(rows(1.0, None)), "'rewards' has none in row 4"),
    ("no image", IMAGE, "observations", pa.array(rows(b"", None)), "'observations' has none in row 4"),
    ("a Dict", IMAGE, "observations", pa.array(rows({"x": 1})), "is stored as struct<x: int64>; .* an array"),
    ("numbers", MIXED, "observations", pa.array(rows({"x": [1.0, 2.0], "t": 3})), "stored as int64; .* text"),
]  # fmt: skip


@pytest.mark.parametrize("form", ["arrow", "parquet"])
@pytest.mark.parametrize(
    ("space", "name", "column", "message"), [x[1:] for x in COLUMNS], ids=[x[0] for x in COLUMNS]
)
def test_a_column_of_a_table_that_is_no_array_is_named(
    space: spaces.Space, name: str, column: Any, message: str, form: str, tmp_path: Path
) -> None:
    folder = make(tmp_path / "x-v0", space, spaces.Discrete(2), (12, 12), form)
    path, whole = folder / f"data/1/part-0.{form}", read(folder, text="ids")
    table = ds.dataset(path, format=form).to_table()
    path.unlink()  # what was read of it may still be mapped
    ds.write_dataset(table.set_column(table.schema.names.index(name), name, column), path.parent, format=form,
                     basename_template=f"part-{{i}}.{form}",
                     existing_data_behavior="overwrite_or_ignore")  # fmt: skip
    with pytest.raises(DataError, match=f"x-v0, episode 1: .*{message}"):
        read(folder, text="ids")
    assert [x.where for x in read(folder, "skip_episode", text="ids")] == [whole[0].where]


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_a_name_that_is_no_text_is_damage(form: str, copy: Callable[[str], Path]) -> None:
    path = copy(f"pendulum/{form}-v0") / f"data/1/part-0.{form}"
    path.write_bytes(path.read_bytes().replace(b"truncations", b"trunc\xff\xfeions"))
    with pytest.raises(DataError, match=f"episode 1: .*part-0.{form} is damaged"):
        read(path.parents[2])


def test_a_compressed_table_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(
        tmp_path / "x-v0", spaces.Box(-1, 1, (500,), np.float32), spaces.Discrete(2), (50,), "arrow"
    )
    (want,) = read(folder)
    path = folder / "data/0/part-0.arrow"
    table = ds.dataset(path, format="arrow").to_table()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    path.unlink()  # what was read of it is mapped
    with pa.ipc.new_file(path, table.schema, options=options) as file:
        file.write_table(table, max_chunksize=30)  # two batches
    monkeypatch.setattr("datamodules.sources.flat.LONGEST", 17_000)
    opened: list[str] = []
    mapped = minari_source._ArrowGroup._mapped
    monkeypatch.setattr(minari_source._ArrowGroup, "_mapped",
                        lambda group, path: opened.append(path) or mapped(group, path))  # fmt: skip
    parts = read(folder)
    assert len(parts) == 7
    assert len(opened) == 1 + 1 + 2  # how many rows, then the rows
    seen = [x.observation["obs"][:-1] for x in parts] + [parts[-1].observation["obs"][-1:]]
    np.testing.assert_array_equal(np.concatenate(seen), want.observation["obs"])
    monkeypatch.setattr(minari_source, "_BATCH", 1000)
    with pytest.raises(DataError, match=r"a compressed batch of .* more than 0.\n.*without compression"):
        read(folder)


def test_a_cut_jpeg_is_named_by_episode_and_row(tmp_path: Path) -> None:
    space = spaces.Dict({"eye": spaces.Box(0, 255, (32, 32, 3), np.uint8)})
    folder = make(tmp_path / "x-v0", space, spaces.Discrete(2), (20, 20, 20))

    def change(file: Any) -> None:
        frames = file["episode_1/observations/eye"]
        frames[17] = frames[17][:-300]

    edit(folder, change)
    with pytest.raises(DataError, match="x-v0, episode 1, observation 'eye' row 17: JPEG cannot be decoded"):
        read(folder)
    assert [x.where for x in read(folder, "skip_episode")] == ["x-v0, episode 0", "x-v0, episode 2"]


def test_a_picture_of_another_size_is_refused(tmp_path: Path) -> None:
    from PIL import Image

    folder = make(tmp_path / "x-v0", spaces.Box(0, 255, (32, 32, 3), np.uint8), spaces.Discrete(2), (3,))
    out = io.BytesIO()
    Image.fromarray(np.zeros((32, 40, 3), np.uint8)).save(out, format="JPEG")
    edit(
        folder, lambda f: f["episode_0/observations"].__setitem__(2, np.frombuffer(out.getvalue(), np.uint8))
    )
    with pytest.raises(
        DataError, match=r"observation row 2: JPEG has the shape \(32, 40, 3\), its space says \(32, 32, 3\)"
    ):
        read(folder)


def test_a_space_that_minari_cannot_write_is_named(copy: Callable[[str], Path]) -> None:
    folder = copy("pendulum/arrow-v0")
    path = folder / "data/metadata.json"
    meta = json.loads(path.read_text())
    path.write_text(json.dumps(meta | {"observation_space": json.dumps({"type": "Graph"})}))
    with pytest.raises(DataError, match="observation_space in metadata.json is a Graph space"):
        read(folder)
    del meta["observation_space"]  # old sets: the environment knows
    path.write_text(json.dumps(meta))
    assert read(folder)[0].observation["obs"].shape == (61, 3)


def test_the_reader_needs_no_collector() -> None:
    assert "jax" not in sys.modules
    assert re.match(r"\d", minari.__version__)


def test_odd_metadata_run_no_code_and_are_said(copy: Callable[[str], Path], tmp_path: Path) -> None:
    folder = copy("pendulum/scripted-v0")
    path = folder / "data/metadata.json"
    known = json.loads(path.read_bytes())
    known["env_spec"] = json.dumps(
        {"id": "Pendulum-v1", "entry_point": "os:mkdir", "kwargs": {"path": "pwn"}}
    )

    def write(*without: str, **changed: Any) -> Path:
        path.write_text(json.dumps({k: v for k, v in (known | changed).items() if k not in without}))
        return folder

    # The space is that of the registered environment, whatever the file says how to make one.
    assert read(write("observation_space"))[0].observation["obs"].shape == (201, 3)
    spec = {"id": "Evil-v0", "entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "pwned")}}
    for name in ("Evil-v0", "os.path:Evil-v0", None, ["x"]):
        with pytest.raises(DataError, match="no action_space, and no environment .*\n  Add action_space"):
            read(write("action_space", env_spec=json.dumps(spec | {"id": name})))
    assert not (tmp_path / "pwned").exists()
    with pytest.raises(DataError, match="no observation_space.*\n  Add observation_space"):
        read(write("observation_space", "env_spec"))
    for wrong in ("[]", ["x"]):
        with pytest.raises(DataError, match="env_spec in metadata.json is not JSON"):
            read(write(env_spec=wrong))
    source = open_source(f"minari:{write(ref_min_score=float('nan'), ref_max_score=1.5)}")
    assert ("ref_min_score" in source.meta, source.meta["ref_max_score"]) == (False, 1.5)


def test_tables_come_in_the_order_of_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make(
        tmp_path / "x-v0", spaces.Box(-1, 1, (2,), np.float32), spaces.Discrete(2), (4,) * 12, "arrow"
    )
    want = read(folder)
    (folder / "data/3/metadata.json").write_text("[]")
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(sorted(listed(self), reverse=True)))
    source = open_source(f"minari:{folder}")
    assert [f.parent.name for f in source.files if f.suffix == ".arrow"] == [str(i) for i in range(12)]
    got = list(checked(source))
    assert [x.where for x in got] == [x.where for x in want]
    assert (got[2].seed, got[3].seed) == (12, None)


@pytest.mark.parametrize("form", ["hdf5", "arrow", "parquet"])
@pytest.mark.parametrize("jpeg", [True, False])
def test_an_episode_beyond_memory_is_cut_without_loss(
    form: str, jpeg: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obs = spaces.Dict(
        {"p": spaces.Box(0, 255, (33, 32, 3), np.uint8), "v": spaces.Box(-1, 1, (2,), np.float32)}
    )
    folder = make(tmp_path / "x-v0", obs, spaces.Discrete(3), (3, 11), form, jpeg)
    want = read(folder)
    monkeypatch.setattr("datamodules.sources.flat.LONGEST", (33 * 32 * 3 + 8) * 4)
    source = open_source(f"minari:{folder}")
    first, *parts = source.episodes()
    assert ([first.steps, *(x.steps for x in parts)], source.total_steps) == ([3, 4, 4, 3], 14)
    assert parts[1].where == "x-v0, episode 1, from step 4"
    assert [x.truncated.tolist()[-1] for x in parts] == [True, True, True]
    assert not source.report.counts["counts"]
    for key in ("p", "v"):
        rows = [x.observation[key][:-1] for x in parts] + [parts[-1].observation[key][-1:]]
        np.testing.assert_array_equal(np.concatenate(rows), want[1].observation[key])
        np.testing.assert_array_equal(parts[0].observation[key][-1], parts[1].observation[key][0])
    np.testing.assert_array_equal(
        np.concatenate([x.action["action"] for x in parts]), want[1].action["action"]
    )
    np.testing.assert_array_equal(np.concatenate([x.reward for x in parts]), want[1].reward)


@pytest.mark.parametrize("form", ["arrow", "parquet"])
def test_long_tables_are_read_by_pieces_without_what_is_dropped(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path / "x-v0", NESTED, spaces.MultiDiscrete([3, 3]), (50,), form, False)
    path = folder / f"data/0/part-0.{form}"
    table = ds.dataset(path, format=form).to_table()  # written again as two files
    path.unlink()
    for i, rows in enumerate((table[:21], table[21:])):
        ds.write_dataset(rows, path.parent, format=form, basename_template=f"part-{i}-{{i}}.{form}",
                         existing_data_behavior="overwrite_or_ignore")  # fmt: skip
    (want,) = open_source(f"minari:{folder}", drop="pixels").episodes()
    monkeypatch.setattr("datamodules.sources.flat.LONGEST", 17_000)  # 13 rows
    held: list[int] = []
    hold = minari_source._ArrowGroup._hold
    monkeypatch.setattr(minari_source._ArrowGroup, "_hold", lambda group, *rows: (
        hold(group, *rows), held.append(sum(map(len, group._held))))[0])  # fmt: skip
    parts = list(open_source(f"minari:{folder}", drop="pixels").episodes())
    assert [x.steps for x in parts] == [13, 13, 13, 11]
    assert max(held) < 20
    assert list(parts[0].observation) == list(want.observation)
    for key, value in want.observation.items():
        rows = [x.observation[key][:-1] for x in parts] + [parts[-1].observation[key][-1:]]
        np.testing.assert_array_equal(np.concatenate(rows).reshape(value.shape), value, key)
    for key, value in want.action.items():
        np.testing.assert_array_equal(np.concatenate([x.action[key] for x in parts]), value, key)
    np.testing.assert_array_equal(np.concatenate([x.reward for x in parts]), want.reward)
