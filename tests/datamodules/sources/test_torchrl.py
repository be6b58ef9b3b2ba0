"""TorchRL folders against the transitions that were written into them."""

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from datamodules._torchrl import ReplayBuffer
from datamodules.episodes import Episode, checked
from datamodules.sources import open_source
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec

DATA = Path(__file__).parents[1] / "data"


@pytest.fixture(scope="module")
def cartpole() -> list[Episode]:
    return list(checked(open_source("minari:cartpole/mixed-v0", root=str(DATA / "minari"))))[:5]


def ted(episode: Episode, traj: int = 0) -> TensorDict:
    """The TED form of an episode, as a collector of TorchRL gives it."""
    obs = torch.from_numpy(episode.observation["obs"])
    terminated, truncated = (
        torch.from_numpy(x.copy())[:, None] for x in (episode.terminated, episode.truncated)
    )
    return TensorDict(
        {
            "observation": obs[:-1],
            "action": torch.nn.functional.one_hot(torch.from_numpy(episode.action["action"]).long(), 2),
            "step_count": torch.arange(episode.steps)[:, None],
            "collector": {"traj_ids": torch.full((episode.steps,), traj)},
            "next": {
                "observation": obs[1:], "reward": torch.from_numpy(episode.reward)[:, None],  # type: ignore[arg-type]
                "terminated": terminated, "truncated": truncated, "done": terminated | truncated,
                "step_count": torch.arange(episode.steps)[:, None] + 1,
            },
        },
        [episode.steps],
    )  # fmt: skip


def join(episodes: list[Episode]) -> TensorDict:
    return torch.cat([ted(x, i) for i, x in enumerate(episodes)])


def read(folder: Path, on_bad: str = "error", **options: Any) -> list[Episode]:
    return list(checked(open_source(f"torchrl:{folder}", **options), on_bad))


def same(got: list[Episode], want: list[Episode]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_array_equal(ours.observation["obs"], theirs.observation["obs"])
        np.testing.assert_array_equal(ours.action["action"], theirs.action["action"])
        for key in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(ours, key), getattr(theirs, key))


@pytest.mark.parametrize("ids", [True, False])
def test_a_dump_gives_back_the_episodes(ids: bool, cartpole: list[Episode], tmp_path: Path) -> None:
    whole = join(cartpole)
    (whole if ids else whole.exclude("collector")).memmap(tmp_path / "set")
    source = open_source(f"torchrl:{tmp_path}/set")
    assert source.schema.spaces.obs == {"obs": Spec("float32", (4,))}
    assert source.schema.spaces.action == {"action": Spec("int32", (), 2)}  # from one-hot
    assert source.total_steps == sum(x.steps for x in cartpole)
    got = list(checked(source))
    same(got, cartpole)
    assert got[3].where == "set, episode 3"
    assert not {"jumps", "no_end_flag"} & {*source.report.counts}


def test_interleaved_trajectories_are_taken_apart(
    cartpole: list[Episode], tmp_path: Path, monkeypatch: Any
) -> None:
    whole = join(cartpole)
    rng = np.random.default_rng(0)
    ids = whole["collector", "traj_ids"].numpy()
    left = {k: list(np.flatnonzero(ids == k)) for k in range(5)}
    order = [left[k].pop(0) for k in rng.permutation(ids)]
    whole[torch.tensor(order)].memmap(tmp_path)
    monkeypatch.setattr("datamodules.sources.torchrl._BLOCK", 50)  # runs go on in the next block
    got = read(tmp_path)
    by_first = sorted(range(5), key=lambda k: order.index(int(np.flatnonzero(ids == k)[0])))
    same(got, [cartpole[k] for k in by_first])


def dumped(data: list[TensorDict], size: int, folder: Path, ndim: int = 1) -> Path:
    from torchrl.data.replay_buffers.storages import LazyMemmapStorage

    buffer = ReplayBuffer(storage=LazyMemmapStorage(size, ndim=ndim), batch_size=1)
    for part in data:
        buffer.extend(part)
    buffer.dumps(folder)
    return folder


def test_a_buffer_that_is_not_full(cartpole: list[Episode], tmp_path: Path) -> None:
    source = open_source(f"torchrl:{dumped([ted(cartpole[0], 7)], 500, tmp_path / 'b')}")
    assert source.total_steps == 120
    same(list(checked(source)), cartpole[:1])


@pytest.mark.parametrize("ids", [True, False])
def test_a_buffer_that_went_round_begins_with_its_oldest_row(
    ids: bool, cartpole: list[Episode], tmp_path: Path
) -> None:
    data = [ted(x, i) if ids else ted(x, i).exclude("collector") for i, x in enumerate(cartpole[:4])]
    got = read(dumped(data, 200, tmp_path / "b"))  # 120, 49, 120, 63: 17 of the second are left
    same(got[1:], cartpole[2:4])
    np.testing.assert_array_equal(got[0].observation["obs"], cartpole[1].observation["obs"][-18:])
    assert got[0].terminated[-1]


def test_rollouts_and_buffers_of_more_streams(cartpole: list[Episode], tmp_path: Path) -> None:
    long = [x for x in cartpole if x.steps == 120]
    data = torch.stack([ted(x) for x in long])  # (environments, T)
    data.memmap(tmp_path / "rollouts")
    same(read(tmp_path / "rollouts"), long)
    same(read(dumped([data], 1000, tmp_path / "b", ndim=2)), long)


def test_rows_that_do_not_follow_each_other_are_cut(cartpole: list[Episode], tmp_path: Path) -> None:
    one = ted(cartpole[0])
    torch.cat([one[:40], one[50:]]).memmap(tmp_path)
    source = open_source(f"torchrl:{tmp_path}")
    first, second = checked(source)
    obs = cartpole[0].observation["obs"]
    np.testing.assert_array_equal(first.observation["obs"], obs[:41])
    np.testing.assert_array_equal(second.observation["obs"], obs[50:])
    assert (first.truncated[-1], source.report.counts["jumps"], source.report.counts["no_end_flag"]) == (
        True,
        1,
        0,
    )


def test_an_open_end_is_truncated_and_nan_equals_nan_while_cutting(
    cartpole: list[Episode], tmp_path: Path
) -> None:
    ted(cartpole[0])[:30].memmap(tmp_path)
    source = open_source(f"torchrl:{tmp_path}")
    (got,) = checked(source)
    assert (got.steps, got.truncated[-1], source.report.counts["no_end_flag"]) == (30, True, 1)


@pytest.mark.parametrize(("kind", "want"), [("terminals", True), ("ends", False)])
def test_done_alone_means_what_the_option_says(
    kind: str, want: bool, cartpole: list[Episode], tmp_path: Path
) -> None:
    ted(cartpole[0]).exclude(("next", "terminated"), ("next", "truncated")).memmap(tmp_path)
    source = open_source(f"torchrl:{tmp_path}", dones_are=kind)
    (got,) = checked(source)
    assert (got.terminated[-1], got.truncated[-1]) == (want, not want)
    assert source.report.counts["dones_are"] == 1
    with pytest.raises(ConfigError, match="dones_are is 'both'"):
        read(tmp_path, dones_are="both")


def test_entries_of_every_kind(tmp_path: Path) -> None:
    n, seen = (
        6,
        {"pixels": torch.randint(0, 256, (6, 3, 40, 32), dtype=torch.uint8), "on": torch.rand(6, 2) > 0.5},
    )
    seen["loc"] = torch.randn(n, 2)
    after = {k: torch.cat([v[1:], v[:1]]) for k, v in seen.items() if k != "loc"}
    done = torch.tensor([[False]] * 5 + [[True]])
    data = seen | {
        "action": {"move": torch.rand(n, 2), "pick": torch.tensor([[2], [0], [1], [0], [1], [0]]),
                   "many": torch.eye(4, dtype=torch.bool)[[0, 3, 1, 2, 0, 0]]},
        "next": after | {"done": done, "terminated": done, "reward": torch.ones(n, 1)},
    }  # fmt: skip
    TensorDict(data, [n]).memmap(tmp_path)
    source = open_source(f"torchrl:{tmp_path}?classes=5")
    spaces = source.schema.spaces
    assert spaces.obs == {
        "pixels": Spec("uint8", (3, 40, 32)),
        "on": Spec("int32", (2,), 2),
    }  # loc is the policy's
    assert spaces.action["pick"] == Spec("int32", (), 5)
    assert spaces.action["many"] == Spec("int32", (), 4)
    assert spaces.unbounded == ()
    (got,) = checked(source)
    np.testing.assert_array_equal(got.observation["pixels"][:-1], seen["pixels"])
    np.testing.assert_array_equal(got.observation["on"][-1], after["on"][-1])
    assert got.action["pick"].tolist() == [2, 0, 1, 0, 1, 0]
    assert got.action["many"].tolist() == [0, 3, 1, 2, 0, 0]
    assert set(read(tmp_path, drop="on")[0].observation) == {"pixels"}
    with pytest.raises(
        ConfigError, match="drop names 'pixel', which is no observation; did you mean 'pixels'"
    ):
        read(tmp_path, drop="pixel")


def test_zeros_of_torchrls_own_loaders_are_refused(cartpole: list[Episode], tmp_path: Path) -> None:
    whole = join(cartpole)
    whole["next", "observation"][whole["next", "done"][:, 0]] = 0
    whole.memmap(tmp_path / "d4rl")
    with pytest.raises(DataError, match="(?s)next observations are zero at every end.*last_obs=terminal"):
        read(tmp_path / "d4rl")
    got = read(tmp_path / "d4rl", last_obs="terminal")
    assert [(x.steps, x.fake_last) for x in got[:2]] == [(119, False), (49, True)]
    np.testing.assert_array_equal(got[0].observation["obs"], cartpole[0].observation["obs"][:-1])
    whole.apply(torch.zeros_like).memmap(tmp_path / "minari")
    with pytest.raises(DataError, match="(?s)all observations and actions are zero.*minari:ID"):
        read(tmp_path / "minari")


def test_data_without_next_observations_lack_the_last_one(cartpole: list[Episode], tmp_path: Path) -> None:
    join(cartpole).exclude(("next", "observation"), ("next", "reward")).memmap(tmp_path)
    with pytest.raises(DataError, match="120 observations for 120 actions, expected 121"):
        read(tmp_path)
    got = read(tmp_path, last_obs="repeat")
    assert [(x.steps, x.fake_last, x.reward) for x in got[:1]] == [(120, True, None)]
    assert open_source(f"torchrl:{tmp_path}").meta["no_reward"] is True


def test_damaged_folders_are_named(cartpole: list[Episode], tmp_path: Path) -> None:
    folder = tmp_path / "set"
    join(cartpole).memmap(folder)
    file = folder / "next" / "observation.memmap"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"next/observation.memmap is truncated: 3,776 of 7,552 bytes"):
        read(folder)
    file.unlink()
    with pytest.raises(DataError, match="next/observation.memmap is missing"):
        read(folder)
    file.write_bytes(content)
    meta = folder / "meta.json"
    text = meta.read_text()
    meta.write_text(text[:40])
    with pytest.raises(DataError, match="meta.json cannot be read .*not complete"):
        read(folder)
    meta.unlink()
    with pytest.raises(DataError, match="its dump was not finished"):
        read(folder)
    meta.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "action"}))
    with pytest.raises(DataError, match="no action column; found: .*observation"):
        read(folder)
    with pytest.raises(DataError, match="no TensorDict is in it"):
        read(_empty(tmp_path))
    with pytest.raises(DataError, match="is no folder"):
        read(tmp_path / "none")


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    ends=st.lists(st.sampled_from(("terminated", "truncated", "")), min_size=6, max_size=6),
    ids=st.booleans(), has_next=st.booleans(), longest=st.sampled_from((12, 24, 1000)),
)  # fmt: skip
def test_no_step_is_lost_whatever_the_lengths(
    lengths: list[int], ends: list[str], ids: bool, has_next: bool, longest: int
) -> None:
    """Episodes of one step, without an end mark (a new id or a jump ends them), and longer than memory."""
    want, start = [], 1.0
    for i, (n, end) in enumerate(zip(lengths, ends, strict=False)):
        obs = start + np.arange(3 * (n + 1), dtype=np.float32).reshape(-1, 3)
        flags = np.zeros((2, n), bool)
        flags[0, -1], flags[1, -1] = end == "terminated", end == "truncated" or not (ids or has_next)
        reward = np.arange(n, dtype=np.float32) + i
        want.append((obs, reward, *flags))
        start = float(obs[-1, -1]) + 100
    data = {
        "observation": np.concatenate([x[0][:-1] for x in want]),
        "action": np.concatenate([x[0][:-1, :1] for x in want]),
        "collector": {"traj_ids": np.repeat(np.arange(len(want)), [len(x[1]) for x in want])},
        "next": {
            "observation": np.concatenate([x[0][1:] for x in want]),
            "reward": np.concatenate([x[1] for x in want])[:, None],
            "terminated": np.concatenate([x[2] for x in want])[:, None],
            "truncated": np.concatenate([x[3] for x in want])[:, None],
        },
    }
    data["collector"] if ids else data.pop("collector")
    data if has_next else data["next"].pop("observation")
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("datamodules.sources.flat.LONGEST", longest)
        patch.setattr("datamodules.sources.flat.BLOCK", 24)
        steps = sum(len(x[1]) for x in want)
        TensorDict(data, [steps]).memmap(folder)
        got = list(open_source(f"torchrl:{folder}").episodes())
    for obs, reward, terminated, _ in want:
        parts, left = [], len(reward)
        while left > 0:
            parts.append(got.pop(0))
            left -= parts[-1].steps
            assert parts[-1].steps == min(left + parts[-1].steps, max(longest // 12, 1))
        whole = has_next or len(parts[-1].observation["obs"]) > parts[-1].steps
        assert whole == has_next
        for part in parts[:-1]:  # cut for memory: the last observation is the first of the next piece
            assert (part.terminated.any(), part.truncated[-1], len(part.observation["obs"])) == (
                False, True, part.steps + 1)  # fmt: skip
        seen = [p.observation["obs"][: p.steps] for p in parts] + [
            parts[-1].observation["obs"][parts[-1].steps :]
        ]
        np.testing.assert_array_equal(np.concatenate(seen), obs if has_next else obs[:-1])
        for part, following in itertools.pairwise(parts):
            np.testing.assert_array_equal(part.observation["obs"][-1], following.observation["obs"][0])
        np.testing.assert_array_equal(np.concatenate([p.reward for p in parts]).reshape(-1), reward)
        assert parts[-1].terminated[-1] == terminated[-1]
        assert not np.concatenate([p.terminated for p in parts])[:-1].any()
    assert not got
