"""TD-MPC2's files against ``torch.load`` of the same."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from datamodules.episodes import Episode, checked
from datamodules.sources import open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.tasks import TASK_SETS

FOLDER = Path(__file__).parents[1] / "data" / "tdmpc2"


def read(rest: Path | str, on_bad: str = "error", **options: Any) -> list[Episode]:
    return list(checked(open_source(f"tdmpc2:{rest}", **options), on_bad))


def table(
    episodes: int = 3, rows: int = 6, obs: int = 4, action: int = 2, **more: torch.Tensor
) -> TensorDict:
    made = {
        "obs": torch.randn(episodes, rows, obs),
        "action": torch.rand(episodes, rows, action),
        "reward": torch.randn(episodes, rows),
        "task": torch.zeros(episodes, rows, dtype=torch.int32),
    } | more
    made["action"][:, 0], made["reward"][:, 0] = torch.nan, torch.nan
    return TensorDict(made, [episodes, rows])


def test_every_value_is_what_torch_loads() -> None:
    source = open_source(f"tdmpc2:{FOLDER}/*.pt")
    got = list(checked(source))
    whole = [torch.load(FOLDER / f"chunk_{i}.pt", weights_only=False) for i in (0, 1)]
    theirs = [episode for part in whole for episode in part]
    assert (source.total_episodes, source.total_steps) == (len(theirs), 100 * len(theirs)) == (14, 1400)
    assert source.schema.spaces.obs["obs"].shape == (24,)
    assert source.schema.spaces.unbounded == ()  # Pendulum's are in [-2, 2] here
    for ours, episode in zip(got, theirs, strict=True):
        np.testing.assert_array_equal(ours.observation["obs"], episode["obs"])
        np.testing.assert_array_equal(ours.action["action"], episode["action"][1:])
        np.testing.assert_array_equal(ours.reward, episode["reward"][1:])
        assert ours.task == int(episode["task"][0])
        assert ours.truncated.tolist() == [False] * 99 + [True]
        assert not ours.terminated.any()
    assert source.meta["tasks"] == ["task-0", "task-1"]  # of mt30's width, but of another length
    assert got[9].where == "chunk_1.pt, episode 0"
    assert not source.report.counts


@pytest.mark.parametrize(("name", "rows"), [("mt30", 501), ("mt80", 101)])
def test_the_published_sets_are_known_by_their_sizes(name: str, rows: int, tmp_path: Path) -> None:
    obs, last = {"mt30": 24, "mt80": 39}[name], len(TASK_SETS[name]) - 1
    tasks = torch.full((2, rows), last, dtype=torch.int32)
    torch.save(table(2, rows, obs, 6, task=tasks), tmp_path / "chunk_0.pt")
    source = open_source(f"tdmpc2:{tmp_path}")
    assert source.meta["tasks"] == [task.name for task in TASK_SETS[name]]
    assert source.schema.high["action"].tolist() == [1] * 6
    assert {x.task for x in checked(source)} == {last}


def test_tasks_by_option() -> None:
    assert open_source(f"tdmpc2:{FOLDER}?tasks=[run,swing]").meta["tasks"] == ["run", "swing"]
    assert open_source(f"tdmpc2:{FOLDER}", tasks="mt30").meta["tasks"][1] == "walker-walk"
    with pytest.raises(ConfigError, match="unknown task set 'mt31'; expected mt30, mt80"):
        read(FOLDER, tasks="mt31")
    with pytest.raises(DataError, match=r"chunk_0.pt, episode 4: tasks 1 to 1; expected one below 1 \(run"):
        read(FOLDER, tasks=["run"])
    assert len(read(FOLDER, "skip_episode", tasks=["run"])) == 4


def test_terminations_and_episodes_that_end_early(tmp_path: Path) -> None:
    made = table(2, terminated=torch.zeros(2, 6))
    made["terminated"][0, -1] = 1
    made["terminated"][1, 3] = 1
    for key in ("obs", "action", "reward"):
        made[key][1, 4:] = torch.nan
    del made["task"]
    torch.save(made, tmp_path / "x.pt")
    first, second = read(tmp_path / "x.pt")
    assert (first.terminated[-1], first.truncated[-1], first.steps) == (True, False, 5)
    assert (second.terminated[-1], second.steps) == (True, 3)
    np.testing.assert_array_equal(second.observation["obs"], made["obs"][1, :4])


def test_chunks_come_in_the_order_of_their_numbers_and_holes_are_noted(tmp_path: Path) -> None:
    for i in (0, 2, 10):
        torch.save(table(1), tmp_path / f"chunk_{i}.pt")
    source = open_source(f"tdmpc2:{tmp_path}/chunk_*.pt")
    assert [x.where for x in checked(source)] == [f"chunk_{i}.pt, episode 0" for i in (0, 2, 10)]
    assert source.report.counts["missing_files"] == 8
    assert "no chunk 1, 3, 4" in source.report.notes[0]
    with pytest.raises(DataError, match="no file matches .*none"):
        read(tmp_path / "none*.pt")


def test_files_of_older_tensordicts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tensordict.tensordict as old

    def older(name: str, base: type) -> type:
        made = type(name, (base,), {"__module__": "tensordict.tensordict"})
        monkeypatch.setattr(old, name, made, raising=False)
        return made

    whole = table()
    columns = older("_StringOnlyDict", dict)()
    columns.update(whole.items())
    kept = older("TensorDict", object)()
    kept.__dict__.update(_tensordict=columns, _batch_size=whole.shape, _device=None)
    torch.save(kept, tmp_path / "old.pt")
    monkeypatch.undo()
    got = read(tmp_path / "old.pt")
    np.testing.assert_array_equal(np.stack([x.observation["obs"] for x in got]), whole["obs"])


def test_a_file_that_holds_more_than_tensors_needs_trust(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(dict(table().items()) | {"where": Path("a")}, path)
    with pytest.raises(DataError, match=r"x.pt holds more than tensors: pathlib.(?s:.*)trust=true"):
        read(path)
    with pytest.warns(UserWarning, match="may run any code"):
        assert len(read(path, trust=True)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b[: len(b) // 2], r"is truncated or damaged \(33,550 bytes"),
        (lambda b: b"<html>no", r"is no file of torch.save \(starts with b'<html>no'"),
        (lambda b: b"", "is no file of torch.save"),
    ],
)
def test_damaged_files_are_named(change: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
    shutil.copy(FOLDER / "chunk_0.pt", tmp_path)
    path = tmp_path / "chunk_1.pt"
    path.write_bytes(change((FOLDER / "chunk_1.pt").read_bytes()))
    with pytest.raises(DataError, match=f"{re.escape(str(path))} {message}"):
        read(tmp_path)


def test_other_columns_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chunk_0.pt"
    whole = table()
    torch.save(whole.exclude("reward"), path)
    with pytest.raises(DataError, match="chunk_0.pt has no 'reward'; found: obs, action, task"):
        read(path)
    torch.save(dict(whole.items()) | {"reward": whole["reward"][:, 1:]}, path)
    with pytest.raises(DataError, match=r"'reward': \(3, 5\).*expected \[episodes, T\+1\]"):
        read(path)
    torch.save(whole, path)
    torch.save(table(obs=5), tmp_path / "chunk_1.pt")
    with pytest.raises(DataError, match=r"chunk_1.pt holds .*\(6, 5\).*chunk_0.pt .*\(6, 4\)"):
        read(tmp_path)
    whole["obs"][1, 2] = torch.nan
    torch.save(whole, path)
    with pytest.raises(DataError, match="chunk_0.pt, episode 1: observation 'obs', row 2 is nan"):
        read(path)


def test_a_file_is_not_held_in_memory(tmp_path: Path) -> None:
    torch.save(table(300, 501, obs=128), tmp_path / "chunk_0.pt")
    size = (tmp_path / "chunk_0.pt").stat().st_size >> 20
    code = """
import re, sys
from datamodules.sources import open_source, checked
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
source = open_source("tdmpc2:" + sys.argv[1], tasks=["a"])
before = peak()
assert sum(x.steps for x in checked(source)) == 300 * 500
print((peak() - before) >> 10)
"""
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 50 < 70 < size  # MB, of which 32 are one block


def test_a_flipped_bit_is_seen_and_the_old_format_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chunk_0.pt"
    whole = table()
    torch.save(whole, path)
    data = bytearray(path.read_bytes())
    data[data.index(whole["obs"].numpy().tobytes()) + 9] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"chunk_0.pt is damaged \(checksum of .*data/\d(?s:.*)Delete it"):
        read(path)
    torch.save(dict(whole.items()), path, _use_new_zipfile_serialization=False)
    with pytest.raises(
        DataError, match=r"chunk_0.pt is in the old format(?s:.*)save it again with torch.save"
    ):
        read(path)
