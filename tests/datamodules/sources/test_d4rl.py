import shutil
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from torchrl.data.datasets.d4rl_infos import D4RL_DATASETS

from datamodules.sources import checked, open_source
from datamodules.sources.d4rl import BASE, table
from lit_wm.errors import DataError

DATA = Path(__file__).parent.parent / "data" / "d4rl"


@pytest.fixture(autouse=True)
def _no_files_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("D4RL_DATASET_DIR", raising=False)


def put(folder, name, source=None, **columns):
    path = folder / table()[name]["file"].split("/")[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    if source:
        shutil.copy(source, path)
        return path
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            file[key] = value
    return path


def test_the_table_has_every_name():
    rows = table()
    assert len(rows) == 179
    assert all(row["file"].count("/") == 1 and row["file"].endswith(".hdf5") for row in rows.values())
    assert all(50 <= int(row["steps"]) <= 1000 for row in rows.values())
    assert all(float(r["ref_min"]) < float(r["ref_max"]) for r in rows.values() if r["ref_min"])
    assert {name: BASE + row["file"] for name, row in rows.items()} == D4RL_DATASETS


def test_a_local_file_is_found_where_d4rl_keeps_it(tmp_path, monkeypatch):
    name, local = "hopper-medium-v2", DATA / "pendulum_scripted-v2-nonext.hdf5"
    path = put(tmp_path / "home/.d4rl/datasets", name, local)
    assert open_source(f"d4rl:{name}").files == [path]
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path / "env"))
    assert open_source(f"d4rl:{name}").files == [path]  # the first one that has it
    path = put(tmp_path / "env", name, local)
    assert open_source(f"d4rl:{name}").files == [path]
    path = put(tmp_path / "given", name, local)
    source = open_source(f"d4rl:{name}", cache_dir=str(tmp_path / "given"))
    assert source.files == [path]
    assert [e.steps for e in checked(source)] == [199] * 5 + [36]
    assert source.meta == {"format": "d4rl", "no_reward": False, "dataset_id": name,
                           "ref_min_score": -20.272305, "ref_max_score": 3234.3}  # fmt: skip
    assert (source.schema.low["action"].tolist(), source.schema.high["action"].tolist()) == ([-1], [1])


def test_without_the_file_the_command_that_fetches_it_is_said(tmp_path):
    with pytest.raises(DataError) as error:
        open_source("d4rl:kitchen-complete-v0", cache_dir=tmp_path / "my sets")
    name = "mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    fetch = f"curl -fL -C - --create-dirs -o '{tmp_path}/my sets/{name}' {BASE}kitchen/{name}"
    assert fetch in str(error.value)
    assert "download=true" in str(error.value)
    assert not (tmp_path / "my sets").exists()
    with pytest.raises(DataError, match="no D4RL dataset; did you mean 'hopper-medium-v2'"):
        open_source("d4rl:hoper-medium-v2")


def test_without_timeouts_the_time_limit_cuts(tmp_path):
    put(tmp_path, "pen-human-v0", **columns(250, terminals=[119]))
    source = open_source("d4rl:pen-human-v0", cache_dir=tmp_path)
    assert [(e.steps, bool(e.terminated[-1])) for e in source.episodes()] == [
        (100, False), (20, True), (100, False), (30, False)]  # fmt: skip
    assert source.report.counts["time_limit"] == 1
    source = open_source("d4rl:pen-human-v0", cache_dir=tmp_path, split="terminals")
    assert [e.steps for e in source.episodes()] == [120, 130]


def columns(n, terminals=(), timeouts=None, jump=None):
    obs = np.zeros((n, 4), np.float32)
    obs[:, 3] = np.arange(n)
    if jump is not None:
        obs[jump + 1 :, :2] = 3
    rows = np.arange(n)
    out = {"observations": obs, "actions": np.zeros((n, 2), np.float32), "rewards": np.zeros(n, np.float32),
           "terminals": np.isin(rows, terminals).astype(np.float32)}  # fmt: skip
    return out if timeouts is None else out | {"timeouts": np.isin(rows, timeouts)}


def test_antmaze_ends_at_timeouts_not_at_its_clusters_of_terminals(tmp_path):
    arrays = columns(30, terminals=[5, 6, 7, 19], timeouts=[9, 19, 29], jump=11)
    for name, expected in (("antmaze-umaze-v2", [10, 10, 10]), ("antmaze-umaze-v0", [10, 2, 8, 10])):
        put(tmp_path, name, **arrays)
        source = open_source(f"d4rl:{name}", cache_dir=tmp_path)
        episodes = list(source.episodes())
        assert [e.steps for e in episodes] == expected
        assert [bool(e.terminated[-1]) for e in episodes][-2:] == [True, False]
        assert (source.report.counts["terminals_ignored"], source.report.counts["family"]) == (3, 1)
    source = open_source("d4rl:antmaze-umaze-v2?split=terminals|timeouts", cache_dir=tmp_path)
    assert [e.steps for e in source.episodes()] == [6, 1, 1, 2, 10, 10]


def test_maze2d_goals_are_the_ends(tmp_path):
    put(tmp_path, "maze2d-umaze-v1", **columns(1000, timeouts=[399, 700]))
    source = open_source("d4rl:maze2d-umaze-v1", cache_dir=tmp_path)
    assert [e.steps for e in source.episodes()] == [400, 301, 299]
    assert "new goal" in source.report.notes[0]


def test_a_changed_file_is_refused(tmp_path):
    path = put(tmp_path, "hopper-medium-v2", DATA / "pendulum_scripted-v2-nonext.hdf5")
    with pytest.raises(DataError, match="has the checksum .* expected 00ff"):
        open_source("d4rl:hopper-medium-v2", cache_dir=tmp_path, sha256="00ff")
    assert path.exists()


def test_neither_gym_nor_d4rl_is_imported(tmp_path):
    put(tmp_path, "hopper-medium-v2", DATA / "pendulum_scripted-v2-nonext.hdf5")
    code = (
        "import sys; from datamodules.sources import open_source; "
        f"list(open_source('d4rl:hopper-medium-v2', cache_dir={str(tmp_path)!r}).episodes()); "
        "assert not {'d4rl', 'gym', 'torchrl', 'jax', 'minari'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
