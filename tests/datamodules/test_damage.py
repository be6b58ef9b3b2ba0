"""Every kind of damage through the whole ingest: one clear message, in time, and nothing left behind."""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from gymnasium import spaces
from minari.serialization import serialize_space

from datamodules.cache import Cache, ingest
from lit_wm.cli import format_error, main
from lit_wm.errors import LitWMError

DATA = Path(__file__).parent / "data"
Make = Callable[[Path], str]


def pendulum(
    change: Callable[[Any], Any] | None = None, dataset: str = "pendulum/scripted-v0", **meta: Any
) -> Make:
    """A copy of a Minari set with its HDF5 file or its metadata changed."""

    def make(folder: Path) -> str:
        copy = Path(shutil.copytree(DATA / "minari" / dataset, folder / "set-v0"))
        if change:
            with h5py.File(copy / "data/main_data.hdf5", "a") as file:
                change(file)
        if meta:
            path = copy / "data/metadata.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | meta))
        return f"minari:{copy}"

    return make


def put(key: str, value: Any) -> Callable[[Any], None]:
    """Replace a dataset of an HDF5 file by what ``value`` makes of it, or by a value."""

    def change(file: Any) -> None:
        new = value(file[key][()]) if callable(value) else value
        del file[key]
        file[key] = new

    return change


def at(key: str, place: Any, value: Any) -> Callable[[Any], None]:
    return lambda file: file[key].__setitem__(place, value)


def path(name: str, change: Callable[[Path], Any], uri: str = "") -> Make:
    """A copy of a file or folder of the test data, changed."""

    def make(folder: Path) -> str:
        source, copy = DATA / name, folder / Path(name).name
        shutil.copytree(source, copy) if source.is_dir() else shutil.copy(source, copy)
        change(copy)
        scheme = {".hdf5": "hdf5", ".npz": "npz", ".pt": "tdmpc2"}.get(copy.suffix, "minari")
        return uri.format(copy) or f"{scheme}:{copy}"

    return make


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda p: p.write_bytes(change(p.read_bytes()))


def npz(options: str = "", **change: Any) -> Make:
    """A small recording of two episodes with some arrays replaced; None leaves one out."""

    def make(folder: Path) -> str:
        rng = np.random.default_rng(0)
        arrays = {
            "observations": rng.normal(size=(20, 3)).astype(np.float32),
            "actions": rng.uniform(-1, 1, (20, 2)).astype(np.float32),
            "rewards": np.arange(20.0, dtype=np.float32),
            "dones": np.arange(20) % 10 == 9,
        }
        arrays = {k: v for k, v in (arrays | change).items() if v is not None}
        np.savez(folder / "demo.npz", **arrays)
        return f"npz:{folder / 'demo.npz'}{options}"

    return make


def d4rl(**change: Any) -> Make:
    def make(folder: Path) -> str:
        shutil.copy(DATA / "d4rl/pendulum_scripted-v2-nonext.hdf5", folder / "d.hdf5")
        with h5py.File(folder / "d.hdf5", "a") as file:
            for key, value in change.items():
                old = file[key][()] if key in file else None
                if key in file:
                    del file[key]
                if value is not None:
                    file[key] = value(old) if callable(value) else value
        return f"hdf5:{folder / 'd.hdf5'}"

    return make


def tdmpc2(change: Callable[[dict[str, torch.Tensor]], Any]) -> Make:
    def make(folder: Path) -> str:
        from tensordict import TensorDict

        n = 4
        table = {"obs": torch.randn(n, 6, 3), "action": torch.rand(n, 6, 2), "reward": torch.randn(n, 6)}
        table["action"][:, 0], table["reward"][:, 0] = torch.nan, torch.nan
        change(table)
        torch.save(TensorDict(table, [n, 6]), folder / "chunk_0.pt")
        return f"tdmpc2:{folder / 'chunk_0.pt'}"

    return make


def frames(cut: int | None) -> Make:
    """A Minari set of JPEG images; the file of row 7 of episode 1 has ``cut`` bytes."""

    def make(folder: Path) -> str:
        import io

        from PIL import Image

        data = folder / "film-v0/data"
        data.mkdir(parents=True)
        meta = json.loads((DATA / "minari/pendulum/scripted-v0/data/metadata.json").read_text())
        space = spaces.Box(0, 255, (32, 40, 3), np.uint8)
        meta |= {"observation_space": serialize_space(space), "total_episodes": 2, "total_steps": 20}
        (data / "metadata.json").write_text(json.dumps(meta))
        rng = np.random.default_rng(0)
        with h5py.File(data / "main_data.hdf5", "w") as file:
            for e in range(2):
                group = file.create_group(f"episode_{e}")
                rows = group.create_dataset("observations", (11,), h5py.vlen_dtype(np.uint8))
                for t in range(11):
                    out = io.BytesIO()
                    Image.fromarray(rng.integers(0, 255, (32, 40, 3), dtype=np.uint8)).save(out, "JPEG")
                    jpeg = out.getvalue()
                    rows[t] = np.frombuffer(jpeg[:cut] if (e, t) == (1, 7) else jpeg, np.uint8)
                group["actions"], group["rewards"] = np.zeros((10, 1), np.float32), np.zeros(10)
                group["terminations"], group["truncations"] = np.zeros(10, bool), np.arange(10) == 9
        return f"minari:{folder / 'film-v0'}"

    return make


def text(folder: Path) -> str:
    obs = spaces.Dict({"say": spaces.Text(4), "x": spaces.Box(-1, 1, (3,), np.float32)})
    return pendulum(observation_space=serialize_space(obs))(folder)


def literal(uri: str, *made: str) -> Make:
    """A URI in the folder, where nothing is but what ``made`` names: empty files, and folders ending in /."""

    def make(folder: Path) -> str:
        for name in made:
            where = folder / name
            where.parent.mkdir(parents=True, exist_ok=True)
            where.mkdir() if name.endswith("/") else where.touch()
        return uri.format(folder)

    return make


NAN = np.nan
GRAPH = '{"type": "Graph", "node_space": {}, "edge_space": {}}'
# Name, how it is made, and what the message has to say, each a part of it.
REFUSED: list[tuple[str, Make, tuple[str, ...]]] = [
    # --- absent
    ("minari id", literal("minari:pendulum/scriptd-v0"),
     ("'pendulum/scriptd-v0' not found under", "another one: ", "minari download pendulum/scriptd-v0")),
    ("npz", literal("npz:{}/a.npz", "b.npz"), ("a.npz does not exist", "b.npz")),
    ("hdf5", literal("hdf5:{}/a.hdf5"), ("a.hdf5 does not exist",)),
    ("tdmpc2", literal("tdmpc2:{}/*.pt"), ("no file matches", "Expected .pt files")),
    ("glob", literal("npz:{}/demo_*.npz", "other.npz"), ("demo_*.npz does not exist", "other.npz")),
    ("empty folder npz", literal("npz:{}"), ("holds no .npz file",)),
    ("empty folder hdf5", literal("hdf5:{}"), ("holds no .hdf5",)),
    ("empty folder minari", literal("minari:{}"), ("is no Minari dataset", "metadata.json")),
    ("empty folder torchrl", literal("torchrl:{}"), ("no TensorDict",)),
    ("no folder torchrl", literal("torchrl:{}/x"), ("is no folder",)),
    ("no folder rows", literal("rows:{}/x"), ("x is not there", "lit-wm data ingest")),
    ("folder as pt", literal("tdmpc2:{}/a.pt", "a.pt/"), ("no file matches",)),
    ("d4rl name", literal("d4rl:hoper-medium-v2"), ("'hoper-medium-v2' is no D4RL dataset",
     "hopper-medium-v2")),
    ("d4rl file", literal("d4rl:hopper-medium-v2?cache_dir={}"), ("is not in", "download=true", "curl")),
    ("minari without hdf5", path("minari/pendulum/scripted-v0",
     lambda p: (p / "data/main_data.hdf5").unlink()),
     ("main_data.hdf5 is missing", "fetch it again")),
    # --- not of the format, or cut
    ("html as hdf5", path("d4rl/pendulum_scripted-v2-nonext.hdf5", content(lambda b: b"<html>404</html>")),
     ("is not an HDF5 file (starts with '<html>", "fetch it again")),
    ("empty hdf5", path("d4rl/pendulum_scripted-v2-nonext.hdf5", content(lambda b: b"")),
     ("is empty (0 bytes)",)),
    ("hdf5 header", path("d4rl/pendulum_scripted-v2-nonext.hdf5",
     content(lambda b: b[:64] + b"\xff" * 512 + b[576:])),
     ("is damaged", "fetch it again")),
    ("half hdf5", path("d4rl/pendulum_scripted-v2-nonext.hdf5", content(lambda b: b[: len(b) // 2])),
     ("is truncated: 14,487 of 28,974 bytes", "fetch it again")),
    ("half minari", path("minari/pendulum/scripted-v0", lambda p: content(lambda b: b[: len(b) // 2])(
        p / "data/main_data.hdf5")), ("is truncated: ", "fetch it again")),
    ("half npz", path("npz/recording.npz", content(lambda b: b[: len(b) // 2])), ("is truncated: ",
     "no zip directory")),
    ("html as npz", path("npz/recording.npz", content(lambda b: b"<html>")), ("not an npz file", "'<html>'")),
    ("empty npz", path("npz/recording.npz", content(lambda b: b"")), ("is empty (0 bytes)",)),
    ("bytes in npz", path("npz/recording.npz", content(lambda b: b[:9000] + bytes(200) + b[9200:])),
     ("cannot be read",)),
    ("half pt", path("tdmpc2/chunk_0.pt", content(lambda b: b[: len(b) // 2])), ("truncated or damaged",
     "fetch it again")),
    ("html as pt", path("tdmpc2/chunk_0.pt", content(lambda b: b"<html>")), ("no file of torch.save",
     "<html>")),
    ("half arrow", path("minari/pendulum/arrow-v0", lambda p: content(lambda b: b[: len(b) // 2])(
        p / "data/1/part-0.arrow")), ("episode 1", "damaged", "on_bad=skip_episode")),
    ("half chunk", path("dreamer_chunks", lambda p: content(lambda b: b[:999])(sorted(p.iterdir())[3]),
     "npz:{}"),
     ("cannot be read", "999 bytes")),
    ("cut jpeg", frames(300), ("film-v0, episode 1, observation row 7: JPEG cannot be decoded",
     "on_bad=skip_episode")),
    ("zip of text", path("npz/recording.npz", lambda p: shutil.make_archive(str(p)[:-4], "zip", p.parent) and
                         os.replace(str(p)[:-4] + ".zip", p)), ("has no observations", "found: ")),
    # --- metadata
    ("no metadata", path("minari/pendulum/scripted-v0", lambda p: (p / "data/metadata.json").unlink()),
     ("metadata.json is missing", "fetch the dataset again")),
    ("metadata cut", path("minari/pendulum/scripted-v0", lambda p: content(lambda b: b[:99])(
        p / "data/metadata.json")), ("metadata.json is not JSON",)),
    ("text space", text, ("observation 'say' is Text", "drop=say", "text=ids")),
    ("graph space", pendulum(observation_space=GRAPH), ("is a Graph space, which no model here can take",)),
    # --- episodes
    ("key", pendulum(lambda f: f.__delitem__("episode_2/rewards")),
     ("episode 2 has no 'rewards'; found: actions, infos, ", "on_bad=skip_episode")),
    ("key npz", npz(actions=None), ("demo.npz has no actions", "found: observations, rewards, dones")),
    ("key hdf5", d4rl(observations=None), ("d.hdf5 has no observations", "found: actions")),
    ("last", pendulum(put("episode_2/observations", lambda x: x[:-1])),
     ("episode 2: 200 observations for 200 actions, expected 201", "last_obs=terminal",
     "on_bad=skip_episode")),
    ("lengths", pendulum(put("episode_1/actions", lambda x: x[:7])),
     ("episode 1: the lengths differ: observation obs 201, action action 7, reward 200, terminated 200",)),
    ("lengths npz", npz(rewards=np.zeros(19)),
     ("the lengths differ: observation 20, action 20, reward 19, done 20",)),
    ("lengths hdf5", d4rl(rewards=lambda x: x[:-3]),
     ("the lengths differ: observation 1,037, action 1,037, reward 1,034",)),
    ("shape", pendulum(put("episode_3/observations", lambda x: x[:, :2])),
     ("episode 3: observation 'obs' has the shape (.., 2), its space says (3)",)),
    ("strings", pendulum(put("episode_2/rewards", np.array([b"x"] * 200))), ("episode 2: reward has the type",
     "numbers")),
    ("strings npz", npz(observations=np.full((20, 3), "x")), ("observation 'obs' has the type <U1",
     "numbers")),
    ("objects npz", npz(observations=np.array([{}] * 20, object)),
     ("array of objects: it needs pickle; refused",)),
    ("complex npz", npz(observations=np.zeros((20, 3), complex)), ("complex", "numbers")),
    ("nan obs", pendulum(at("episode_5/observations", (3, 1), NAN)),
     ("episode 5: observation 'obs', row 3 is nan; 1 values",
                                                                  "on_bad=skip_episode")),
    ("inf action", pendulum(at("episode_0/actions", (3, 0), np.inf)),
     ("episode 0: action 'action', row 3 is inf",)),
    ("nan reward", pendulum(at("episode_5/rewards", slice(11, 16), NAN)),
     ("episode 5: reward, row 11 is nan; 5 values",)),
    ("nan npz", npz(rewards=np.where(np.arange(20) == 13, NAN, 0)),
     ("demo.npz, episode 1: reward, row 3 is nan",)),
    ("nan d4rl", d4rl(observations=lambda x: np.where(np.arange(len(x))[:, None] == 205, NAN, x)),
     ("d.hdf5, episode 1: observation 'obs', row 5 is nan",)),
    ("nan tdmpc2", tdmpc2(lambda t: t["reward"].__setitem__((2, 3), NAN)),
     ("chunk_0.pt, episode 2: reward, row 2 is nan",)),
    ("nan arrays of float16", npz(observations=np.full((20, 3), NAN, np.float16)),
     ("episode 0: observation 'obs', row 0",)),
    ("huge float64", npz(observations=np.full((20, 3), 1e300)), ("1e+300, beyond the range of float32",)),
    ("early end", pendulum(at("episode_2/terminations", 30, True)),
     ("episode 2: terminated at step 30, but 169 more",)),
    ("class", pendulum(at("episode_2/actions", 3, 7), "cartpole/mixed-v0"),
     ("episode 2: action 'action' holds 0 to 7",
                                                                        "classes 0 to 1")),
    ("flag", npz(dones=np.arange(20) / 19), ("an end mark in row 1 is 0.05", "expected 0 or 1")),
    ("flag minari", pendulum(put("episode_2/terminations", np.full(200, 7))),
     ("episode 2: terminated holds other values",)),
    ("no end", d4rl(timeouts=None), ("no episode end found in 1,037 steps; give episode_length= or split=",)),
    ("no flags at all", d4rl(timeouts=None, terminals=None), ("no episode end found in 1,037 steps",)),
    ("all empty", pendulum(lambda f: [put(f"episode_{i}/{k}", lambda x, k=k: x[: k == "observations"])(f)
                                      for i in range(6) for k in f["episode_0"] if k != "infos"]),
     ("there is no episode with a step in it", "empty 6")),
    ("zero-dimensional", npz(observations=np.float32(3)), ("demo.npz", "observation")),
    ("all zero-dimensional", npz(observations=np.float32(3), actions=np.float32(3), rewards=None, dones=None),
     ("demo.npz",)),
    ("no rows", npz(observations=np.zeros((0, 3)), actions=np.zeros((0, 2)), rewards=np.zeros(0),
     dones=np.zeros(0, bool)),
     ("demo.npz holds no steps",)),
    ("1000 integers", npz(actions=np.arange(20) * 1000), ("integers from 0 to 19000", "discrete=false")),
    ("negative classes", npz(actions=np.arange(20) - 3), ("integers from -3 to 16",)),
    ("minari as npz", path("minari/pendulum/scripted-v0", lambda p: None, "npz:{}"), ("holds no .npz file",)),
    ("single value", pendulum(put("episode_1/actions", 3.0)),
     ("episode 1: /episode_1/actions is a single value; expected one per",)),
    ("no group", pendulum(put("episode_1", np.zeros(3))), ("episode 1 is an array; expected a group",)),
    ("two flags a step", pendulum(put("episode_1/truncations", lambda x: np.stack([x, x], 1))),
     ("episode 1: truncated has the shape (200, 2); expected one flag per step", "on_bad=skip_episode")),
    ("env_spec", pendulum(env_spec="{not json"), ("env_spec in metadata.json is not JSON",)),
    ("data_format", pendulum(data_format="zarr"), ("data_format is 'zarr'; expected hdf5, arrow or parquet",
     )),
    ("no cache", lambda folder: f"rows:{folder}", ("has no rows.json",)),
]  # fmt: skip


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Caches, with one of another source, and no dataset of this machine."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(DATA / "minari"))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "d").mkdir()
    ingest("minari:pendulum/parquet-v0", tmp_path / "caches")
    return tmp_path / "caches"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("make", "parts"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_damage_is_named_in_time_and_leaves_nothing(
    make: Make, parts: tuple[str, ...], root: Path, tmp_path: Path, capsys: Any
):
    uri, before = make(tmp_path / "d"), tree(root)
    start = time.monotonic()
    with pytest.raises(LitWMError) as caught:
        ingest(uri, root)
    assert time.monotonic() - start < 5
    assert tree(root) == before
    message = format_error(caught.value, 99)
    assert len(message.splitlines()) <= 5
    for part in parts:
        assert part in message
    capsys.readouterr()
    assert main(["data", "ingest", uri, "--cache", str(tmp_path / "new")]) == 1
    assert capsys.readouterr().err.endswith(f"{format_error(caught.value)}\n")
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())


def again(name: str) -> tuple[Make, tuple[str, ...]]:
    return next(case[1:] for case in REFUSED if case[0] == name)


@pytest.mark.parametrize(
    "name", ["key", "last", "lengths", "shape", "strings", "nan obs", "inf action", "nan reward", "nan npz",
    "nan tdmpc2",
             "early end", "class", "flag minari", "cut jpeg", "half arrow", "single value",
             "two flags a step"]
)  # fmt: skip
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damage_in_one_episode_can_be_left_out(name: str, root: Path, tmp_path: Path):
    make, parts = again(name)
    cache = ingest(make(tmp_path / "d"), root, on_bad="skip_episode")
    assert cache.report["counts"]["skipped"] == 1
    assert parts[0][:20] in cache.report["notes"][-1] + cache.report["notes"][0]


def steps(cache: Cache) -> list[int]:
    return (cache.episodes["length"] - 1).tolist()


def both(file: Any) -> None:
    file["episode_0/terminations"][-1] = file["episode_1/truncations"][-1] = True
    file["episode_0/truncations"][-1] = True
    file["episode_1/truncations"][-1] = False


def test_what_is_repaired_is_counted_and_said(root: Path, tmp_path: Path):
    cuts = [at("episode_2/truncations", 30, True), lambda f: f.__delitem__("episode_5"), both]
    cuts += [put(f"episode_3/{k}", lambda x, k=k: x[: k == "observations"])
             for k in ("observations", "actions", "rewards", "terminations", "truncations")]  # fmt: skip
    cuts += [put("episode_4/observations", lambda x: x.astype(np.float64)), at("episode_4/actions", 0, 9.0)]
    cache = ingest(pendulum(lambda f: [cut(f) for cut in cuts])(tmp_path / "d"), root)
    assert steps(cache) == [200, 200, 31, 169, 200]
    assert cache.episodes["terminated"].tolist() == [True, False, False, False, False]
    counts = {
        "counts": 1,
        "both_flags": 1,
        "no_end_flag": 1,
        "split": 1,
        "empty": 1,
        "cast": 1,
        "out_of_range": 1,
    }
    assert cache.report["counts"] == counts
    notes = " ".join(cache.report["notes"])
    for part in ("metadata says 6 episodes, the file has 5: using the file",
    "truncated at step 30 of 200: cut in two",
                 "episode 3 has no step", "1 values of action 'action' beyond its bounds",
                 "neither terminated nor"):  # fmt: skip
        assert part in notes
    with h5py.File(DATA / "minari/pendulum/scripted-v0/data/main_data.hdf5") as file:
        assert cache.episodes["return"][2] == pytest.approx(file["episode_2/rewards"][:31].sum(), rel=1e-6)


def test_steps_that_metadata_get_wrong_are_counted(root: Path, tmp_path: Path):
    cache = ingest(pendulum(total_steps=10**6)(tmp_path / "d"), root)
    assert cache.report["notes"] == [
        "set-v0: metadata says 1,000,000 steps, the file has 1,037: using the file"
    ]


CLASSES = np.arange(20) % 3
# Unusual, but what it means is clear: name, how it is made, what the observations and actions are.
ACCEPTED: list[tuple[str, Make, Any]] = [
    ("float16", npz(observations=np.full((20, 3), 1.5, np.float16)), None),
    ("big-endian", npz(observations=np.full((20, 3), 1.5, ">f8"), actions=CLASSES.astype(">i4")), 3),
    ("long double", npz(observations=np.full((20, 3), 1.5, np.longdouble)), None),
    ("fortran", npz(observations=np.asfortranarray(np.full((20, 3), 1.5))), None),
    ("scalar actions", npz(actions=np.linspace(-1, 1, 20)), None),
    ("columns of one", npz(rewards=np.arange(20.0)[:, None], dones=(np.arange(20) % 10 == 9)[:, None]), None),
    ("bool actions", npz(actions=np.arange(20) % 2 == 0), 2),
    ("uint64 actions", npz(actions=CLASSES.astype(np.uint64)), 3),
    ("columns of one class", npz(actions=CLASSES[:, None]), 3),
    ("float flags", npz(dones=(np.arange(20) % 10 == 9).astype(np.float64)), None),
    ("small rewards", npz(rewards=np.arange(20, dtype=np.int8)), None),
    ("no ends", npz(dones=None), None),
    ("no rewards", npz(rewards=None), None),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("make", "classes"), [case[1:] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED]
)
def test_unusual_arrays_are_read(make: Make, classes: int | None, root: Path, tmp_path: Path):
    uri = make(tmp_path / "d")
    cache, given = ingest(uri, root), np.load(uri[4:])
    assert steps(cache) == [9, 9] if "dones" in given else [19]
    keep = [i for i in range(20) if i not in ((9, 19) if "dones" in given else (19,))]
    valid = cache.rows["valid"][:, 0].numpy()
    reward = given["rewards"].reshape(20)[keep] if "rewards" in given else np.zeros(len(keep))
    np.testing.assert_array_equal(cache.rows["next", "reward"][valid, 0].numpy(), reward.astype(np.float32))
    action = cache.rows["action"][valid].numpy()
    np.testing.assert_allclose(
        action.reshape(len(keep), -1), given["actions"][keep].reshape(len(keep), -1), rtol=1e-6
    )
    assert cache.schema.spaces.action["action"].classes == classes
    np.testing.assert_allclose(cache.rows["observation"].numpy(), given["observations"].astype(np.float32))


def test_columns_of_one_and_of_none_in_minari_and_d4rl(root: Path, tmp_path: Path):
    want = ingest("minari:pendulum/scripted-v0", root)
    for i, change in enumerate((
        put("episode_1/actions", lambda x: x[:, 0]), put("episode_1/rewards", lambda x: x[:, None]),
        put("episode_1/terminations", lambda x: x.astype(np.float32)[:, None]),
        put("episode_1/observations", lambda x: x.astype(">f8")),
        lambda f: f["episode_1"].attrs.__setitem__("seed", np.uint64(2**64 - 1)),
    )):  # fmt: skip
        (tmp_path / f"m{i}").mkdir()
        cache = ingest(pendulum(change)(tmp_path / f"m{i}"), root)
        assert (cache.rows == want.rows).all()
    flat = ingest(d4rl()(tmp_path / "d"), root)
    (tmp_path / "e").mkdir()
    other = d4rl(
        actions=lambda x: x[:, 0], rewards=lambda x: x[:, None], terminals=lambda x: x.astype(np.float64)
    )
    assert (ingest(other(tmp_path / "e"), root).rows == flat.rows).all()


def test_names_of_files_and_folders(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    place = tmp_path / "home" / "Größe ∂ & mehr [1]"
    place.mkdir(parents=True)
    shutil.copy(DATA / "npz/recording.npz", place / "ein lauf.npz")
    shutil.copytree(DATA / "minari/pendulum/arrow-v0", place / "pendel v0")
    monkeypatch.chdir(place)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        full = ingest(f"npz:{place}/ein lauf.npz", root)
        for rest in ("ein lauf.npz", "./ein lauf.npz", f"~/{place.name}/ein lauf.npz", "*.npz", "."):
            cache = ingest(f"npz:{rest}", root)
            assert (steps(cache), cache.meta) == (steps(full), full.meta)
            assert (cache.rows == full.rows).all()
    for rest in ("pendel v0", f"~/{place.name}/pendel v0", f"{place}/pendel v0/data"):
        assert steps(ingest(f"minari:{rest}", root)) == [60, 60, 60]


def test_a_folder_that_nobody_may_write_and_a_file_that_nobody_may_read(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    uri = npz()(tmp_path / "d")
    (tmp_path / "file").touch()
    with pytest.raises(
        LitWMError, match=r"cannot be written to .*file/x \(Not a directory\)(?s:.*)--cache or"
    ):
        ingest(uri, tmp_path / "file" / "x")
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(LitWMError, match=r"cannot be written to .* \(Permission denied\)"):
        ingest(uri, tmp_path / "other")
    monkeypatch.undo()

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(13, "Permission denied", uri[4:])

    monkeypatch.setattr("zipfile.ZipFile.__init__", refuse)
    monkeypatch.setattr("datamodules.sources.npz.head", refuse)
    with pytest.raises(LitWMError, match=r"demo.npz may not be read \(Permission denied\)"):
        ingest(uri, root)


def test_a_full_disk_and_a_damaged_cache(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    before = tree(root)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 9, 9))  # type: ignore[attr-defined]
        with pytest.raises(LitWMError, match=r"the rows need .* GB, 0.00 GB are free(?s:.*)Make room"):
            ingest("minari:pendulum/scripted-v0", root)
    assert tree(root) == before
    column = ingest("minari:pendulum/parquet-v0", root).folder / "observation.memmap"
    column.chmod(0o644)
    os.truncate(column, 100)
    with pytest.raises(LitWMError) as caught:
        ingest("minari:pendulum/parquet-v0", root)
    assert "column observation has 100 bytes, expected 1,224" in str(caught.value)
    command = str(caught.value).split("`lit-wm ")[1].split("`")[0]
    assert main(command.split()) == 0
    assert steps(ingest("minari:pendulum/parquet-v0", root)) == [50, 50]
