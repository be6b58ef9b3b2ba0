import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datamodules.episodes import Episode, Schema, Source
from datamodules.sources import open_source, register
from lit_wm.cli import main
from lit_wm.types import Spaces, Spec


@register("told")
class Told(Source):
    """PATH has one episode's length per line; rewards 0, 1, 2 ...; episodes of one step are broken."""

    def __init__(self, path: str, reward: bool = True):
        self.files, self.reward, self.meta = [Path(path)], reward, {"env_id": "Told-v0"}
        spaces = Spaces(
            {"obs": Spec("float32", (2,))}, {"a": Spec("float32", (1,)), "b": Spec("int32", (), 3)}
        )
        self.schema = Schema(spaces, {"a": np.array([-2.0])}, {"a": np.array([np.inf])})

    def episodes(self) -> Iterator[Episode]:
        for i, n in enumerate(map(int, self.files[0].read_text().split())):
            end, no = np.arange(n) == n - 1, np.zeros(n, bool)
            obs = np.full((n + 1, 2), np.inf if n == 1 else i)
            yield Episode({"obs": obs}, {"a": np.ones((n, 1)), "b": np.zeros(n, int)},
                          np.arange(n) if self.reward else None, *((end, no) if i else (no, end)),
                          f"{self.files[0]}, episode {i}")  # fmt: skip


@pytest.fixture
def told(tmp_path: Path, monkeypatch: Any) -> str:
    (tmp_path / "told.txt").write_text("3\n5\n4\n")
    monkeypatch.setenv("LITWM_CACHE", str(tmp_path / "caches"))
    return f"told:{tmp_path / 'told.txt'}"


def run(capsys: Any, *argv: str, code: int = 0) -> tuple[str, str]:
    capsys.readouterr()
    assert main(["data", *argv]) == code
    return capsys.readouterr()


def test_inspect_then_ingest_then_verify(told: str, tmp_path: Path, capsys: Any):
    root = tmp_path / "caches"
    streamed = json.loads(run(capsys, "inspect", told, "--json")[0])
    assert not root.exists()
    out, err = run(capsys, "ingest", told, "--json")
    written, folder = json.loads(out), next(root.iterdir())
    assert f"rows from {told}" in err  # the size, before
    assert (written["cache"], written["rows"]) == (str(folder), 15)
    cached = json.loads(run(capsys, "inspect", told, "--json")[0])
    for key in set(streamed) - {"bytes"}:
        assert streamed[key] == cached[key] == written[key], key
    assert (cached["uri"], cached["env_id"]) == (told, "Told-v0")
    assert (cached["episodes"], cached["steps"]) == (3, 12)
    assert (cached["terminations"], cached["truncations"]) == (2, 1)
    assert cached["lengths"]["per_episode"] == [3, 5, 4]
    returns = [3, 10, 6]
    spread = pytest.approx(np.std(returns, ddof=1))
    assert cached["returns"] == {"min": 3, "max": 10, "mean": pytest.approx(19 / 3), "std": spread,
                                 "per_episode": returns}  # fmt: skip
    assert cached["spaces"] == {
        "observation": {"obs": {"dtype": "float32", "shape": [2], "classes": None}},
        "action": {
            "a": {"dtype": "float32", "shape": [1], "classes": None, "low": [-2.0], "high": ["inf"]},
            "b": {"dtype": "int32", "shape": [], "classes": 3, "low": None, "high": None},
        },
    }
    assert run(capsys, "ingest", told)[1] == ""  # nothing to write
    verified = json.loads(run(capsys, "verify", told, "--json")[0])
    assert verified["bytes"] == cached["bytes"] == written["bytes"]
    assert not verified["repaired"]


def test_text_for_people(told: str, capsys: Any):
    out, _ = run(capsys, "inspect", told)
    assert "episodes     3: 2 terminated, 1 truncated\nsteps        12: 3 to 5 an episode\n" in out
    assert "action       a: float32 (1), -2 to inf\naction       b: int32 (scalar), 3 classes\n" in out
    out, _ = run(capsys, "inspect", told, "--option", "reward=false")
    assert "returns      none: the source has no rewards\n" in out
    assert json.loads(run(capsys, "inspect", f"{told}?reward=false", "--json")[0])["returns"] is None


def test_json_without_nan_and_with_all_episodes(told: str, tmp_path: Path, capsys: Any, monkeypatch: Any):
    (tmp_path / "told.txt").write_text("2\n" * 10_001)
    opened = open_source(told)
    opened.meta |= {"ref_min_score": float("nan"), "ref_max_score": [1.5, float("-inf")]}
    monkeypatch.setattr("lit_wm.data_cli.open_source", lambda *_, **__: opened)
    plain = json.loads(run(capsys, "inspect", told, "--json")[0], parse_constant=pytest.fail)
    assert (plain["meta"]["ref_min_score"], plain["meta"]["ref_max_score"]) == (None, [1.5, None])
    assert len(plain["lengths"]["per_episode"]) == len(plain["returns"]["per_episode"]) == 10_001


def test_bad_data(told: str, tmp_path: Path, capsys: Any):
    (tmp_path / "told.txt").write_text("3\n1\n4\n")
    for name in ("ingest", "inspect"):
        err = run(capsys, name, told, code=1)[1]
        assert "episode 1: observation 'obs', row 0 is inf" in err
    assert list((tmp_path / "caches").iterdir()) == []
    out = run(capsys, "inspect", told, "--on-bad", "skip_episode")[0]
    assert "noticed      6 arrays change their type, e.g. from float64; bad episodes left out: 1\n" in out
    assert json.loads(run(capsys, "ingest", told, "--json", "--on-bad", "skip_episode")[0])["episodes"] == 2


def test_verify_and_repair(told: str, tmp_path: Path, capsys: Any):
    assert f"{told} is not in {tmp_path / 'caches'}" in run(capsys, "verify", told, code=1)[1]
    folder = Path(json.loads(run(capsys, "ingest", told, "--json")[0])["cache"])
    column = folder / "observation.memmap"
    before = column.read_bytes()
    for source, change in ((told, before[:-1]), (f"rows:{folder}", before[:-1]), (told, b"x" + before[1:])):
        column.chmod(0o644)
        column.write_bytes(change)
        err = run(capsys, "verify", source, code=1)[1]
        assert f"column observation {'is not' if len(change) == len(before) else 'has 119 bytes'}" in err
        out, _ = run(capsys, "verify", source, "--repair")
        assert "damaged, and written again" in out
        assert column.read_bytes() == before
    assert "as written" in run(capsys, "verify", f"rows:{folder}")[0]


def test_the_cache_that_is_named_is_repaired(told: str, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    folder = json.loads(run(capsys, "ingest", "told:told.txt", "--json")[0])["cache"]
    monkeypatch.chdir("/")
    copy = shutil.copytree(folder, tmp_path / "moved" / "copy")
    before, column = (copy / "observation.memmap").read_bytes(), copy / "observation.memmap"
    column.chmod(0o644)
    column.write_bytes(b"x" + before[1:])
    out, _ = run(capsys, "verify", f"rows:{copy}", "--repair")
    assert f"cache  {copy}\n" in out
    assert column.read_bytes() == before
    assert os.listdir(tmp_path / "moved") == ["copy"]
    column.write_bytes(b"x" + before[1:])
    (tmp_path / "told.txt").write_text("3\n5\n")
    err = run(capsys, "verify", f"rows:{copy}", "--repair", code=1)[1]
    assert "told.txt, or how it is read, has changed" in err
    assert (os.listdir(tmp_path / "moved"), column.read_bytes()[:1]) == (["copy"], b"x")


def test_a_path_gets_its_uri(tmp_path: Path, told: str, capsys: Any):
    with h5py.File(tmp_path / "x.hdf5", "w"):
        pass
    np.savez(tmp_path / "x.npz", a=1)
    (tmp_path / "x.pt").touch()
    (tmp_path / "set" / "data").mkdir(parents=True)
    (tmp_path / "set" / "data" / "metadata.json").touch()
    rows = Path(json.loads(run(capsys, "ingest", told, "--json")[0])["cache"])
    known = {"x.hdf5": "hdf5", "x.npz": "npz", "x.pt": "tdmpc2", "set": "minari", rows: "rows"}
    for path, uri in known.items():
        err = run(capsys, "inspect", str(tmp_path / path), code=1)[1]
        assert f"expected a URI.\n  Write {uri}:{tmp_path / path}\n" in err
    assert "'nothing' is no source" in run(capsys, "inspect", "nothing", code=1)[1]


def test_the_command(capsys: Any, told: str):
    out, _ = run(capsys, "--help")
    assert all(name in out for name in ("ingest", "inspect", "verify", "minari:ID"))
    assert "did you mean 'inspect'" in run(capsys, "inspct", told, code=1)[1]
    assert "--option x: expected NAME=VALUE" in run(capsys, "inspect", told, "--option", "x", code=1)[1]
    assert "option x=[1: " in run(capsys, "inspect", told, "--option", "x=[1", code=1)[1]
    assert "told: has no option 'reword'; did you mean 'reward'?" in run(
        capsys, "inspect", told, "--option", "reword=1", code=1
    )[1]  # fmt: skip


def test_doctor_says_what_is_wrong_and_how_to_mend_it(told: str, tmp_path: Path, capsys: Any):
    (tmp_path / "told.txt").write_text("3\n1\n70\n70\n")
    out, _ = run(capsys, "doctor", told, code=1)
    assert "error: non finite\n  found  " in out
    assert "episode 1: observation 'obs', row 0 is inf; 4 values of this episode are not finite." in out
    assert "--on-bad skip_episode leaves these episodes out" in out
    assert "warning: duplicates" not in out
    assert re.search(r"^1 error, \d warnings?, \d+ notes? in 3 episodes$", out, re.M)
    plain = json.loads(run(capsys, "doctor", told, "--json", "--model", "tdmpc2", code=1)[0])
    assert plain["counts"]["error"] == 1
    assert plain["sources"] == {told: {"episodes": 3, "steps": 143}}
    assert set(plain["findings"][0]) == {"severity", "check", "where", "found", "meaning", "fix"}
    severities = [f["severity"] for f in plain["findings"]]
    assert severities == sorted(severities, key=["error", "warning", "note"].index)
    assert list((tmp_path / "caches").glob("*")) == []
    (tmp_path / "told.txt").write_text("3\n70\n71\n")
    assert "0 errors, " in run(capsys, "doctor", told)[0]
    assert "window of DreamerV3 has 500" in run(
        capsys, "doctor", told, "--model", "dreamerv3", "--batch-length", "500", code=1
    )[0]  # fmt: skip


def test_doctor_of_several_sources_and_of_one_that_cannot_be_opened(told: str, tmp_path: Path, capsys: Any):
    np.savez(
        tmp_path / "a.npz", observations=np.zeros((9, 4)), actions=np.zeros((9, 1)), dones=np.arange(9) == 8
    )
    (tmp_path / "b.npz").write_bytes(b"<html>")
    a, b = f"npz:{tmp_path / 'a.npz'}", f"npz:{tmp_path / 'b.npz'}"
    plain = json.loads(run(capsys, "doctor", told, a, b, "--json", code=1)[0])
    found = {f["check"]: f for f in plain["findings"] if f["severity"] == "error"}
    assert set(found) == {"spaces", "unreadable"}
    assert "is not an npz file (starts with '<html>')" in found["unreadable"]["found"]
    assert a in found["spaces"]["found"]
    assert "has no option 'reword'" in run(capsys, "doctor", told, "--option", "reword=1", code=1)[1]


def test_stats(told: str, capsys: Any):
    streamed = run(capsys, "stats", told, "--json")[0]
    run(capsys, "ingest", told)
    assert run(capsys, "stats", told, "--json")[0] == streamed
    plain = json.loads(streamed)
    assert (plain["episodes"], plain["steps"]) == (3, 12)
    obs = np.repeat([0, 1, 2], [4, 6, 5])
    entry = plain["entries"]["observation obs"]
    assert entry["mean"] == pytest.approx([obs.mean()] * 2)
    assert entry["q50"] == [1, 1]
    assert plain["entries"]["action b"] == {"rows": 12, "classes": [12, 0, 0]}
    assert plain["entries"]["reward"]["max"] == 4
    assert plain["entries"]["return"]["mean"] == pytest.approx(19 / 3)
    out, _ = run(capsys, "stats", told)
    assert re.search(r"^observation obs\[1\] +1.067 +0.7717 +0 +0 +1 +2 +2$", out, re.M)
    assert re.search(r"^action b +0: 12$", out, re.M)
    assert "reward" not in json.loads(run(capsys, "stats", f"{told}?reward=false", "--json")[0])["entries"]


def test_preview(told: str, tmp_path: Path, capsys: Any, monkeypatch: Any):
    monkeypatch.chdir(tmp_path)
    path = json.loads(run(capsys, "preview", told, "--json")[0])["path"]
    assert re.fullmatch(r"preview-.*told\.txt\.png", path)
    assert (tmp_path / path).read_bytes().startswith(b"\x89PNG")
    assert run(capsys, "preview", told, "-o", "x/y.png", "--episodes", "2")[0] == "wrote  x/y.png\n"
    assert "images in a .gif" in run(capsys, "preview", told, "-o", "y.gif", code=1)[1]
