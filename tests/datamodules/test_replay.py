import json
import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from datamodules.files import copy_range
from datamodules.replay import RowReplay
from datamodules.rows import row_bytes, row_specs
from lit_wm.errors import CheckpointError, ConfigError, DataError
from lit_wm.types import Spaces, Spec

few = settings(max_examples=25, deadline=None)


def windows(replay, batch, length=None, mode="train"):
    """(stream, start) of every sampled window."""
    rows = replay.sample(batch, length, mode)
    return list(
        zip(
            (rows["index"][:, 0] // replay.storage.ring).tolist(),
            rows["generation"][:, 0].tolist(),
            strict=True,
        )
    )


@few
@given(
    seed=st.integers(0, 10**6), steps=st.integers(1, 90), streams=st.integers(1, 4),
    context=st.integers(0, 2), length=st.integers(1, 6),
)  # fmt: skip
def test_a_sampled_window_is_consecutive_live_rows_of_one_stream(
    make_replay, play, seed, steps, streams, context, length
):
    window = context + length
    replay = make_replay(capacity=streams * 20, streams=streams, window=window, context=context)
    game = play(replay, seed)
    for _ in range(steps):  # streams advance unequally
        game.step(np.flatnonzero(game.rng.random(streams) < 0.7))
    lead = max(context, 1)
    live = [range(max(0, len(log) - 20), len(log)) for log in game.steps]
    assert len(replay) == sum(map(len, live))
    if replay.num_windows == 0:
        assert all(len(rows) < window + (context == 0 and rows.start > 0) for rows in live)
        with pytest.raises(DataError, match="no complete window"):
            replay.sample(4)
        return
    for _ in range(3):
        rows = replay.sample(8)
        obs = rows["observation"]
        assert obs.shape == (8, length, 3)
        for b in range(8):
            stream, start = int(obs[b, 0, 0]), int(obs[b, 0, 1])
            for t in range(length):
                assert start + t in live[stream]
                assert obs[b, t].tolist() == game.steps[stream][start + t]["obs"].tolist()
            for t in range(lead + length):  # columns with the rows before
                position = max(start - lead + t, live[stream].start)
                step = game.steps[stream][position]
                assert position == int(rows["generation"][b, t])
                assert int(rows["action"][b, t]) == step["action"]
                assert bool(rows["is_init"][b, t]) == step["is_first"]
                assert bool(rows["valid"][b, t]) == (not step["is_last"])
                if position + 1 < len(game.steps[stream]) and not step["is_last"]:
                    after = game.steps[stream][position + 1]
                    outcome = {k: v[b, t].item() for k, v in rows["next"].items()}
                    assert outcome["reward"] == after["reward"]
                    assert outcome["terminated"] == after["is_terminal"]
                    assert outcome["truncated"] == after["timeout"]
            carry = game.steps[stream][max(start - 1, live[stream].start)]
            assert rows["latent", "deter"][b].tolist() == carry["deter"].tolist()
            assert rows["latent", "stoch"][b].tolist() == carry["stoch"].tolist()


def test_done_is_the_union_and_the_task_columns_are_zero(make_replay, play):
    replay = make_replay()
    play(replay, 0).run(60)
    rows = replay.storage.get(torch.arange(len(replay)))
    outcome = rows["next"]
    assert torch.equal(outcome["done"], outcome["terminated"] | outcome["truncated"])
    assert outcome["done"].any()
    assert not rows["source"].any()
    assert not rows["task"].any()


@few
@given(seed=st.integers(0, 10**6), steps=st.integers(30, 120))
def test_the_action_of_a_row_leads_to_the_next(make_replay, play, seed, steps):
    replay = make_replay()
    play(replay, seed).run(steps)
    rows = replay.sample(16)
    x, action = rows["observation"][..., 2], rows["action"][:, 1:]
    goes_on = rows["valid"].squeeze(-1)[:, 1:-1]
    expected = (3 * x[:, :-1] + action[:, :-1]) % 997
    assert (x[:, 1:] == expected)[goes_on].all()
    assert goes_on.any()
    assert not (x[:, 1:] == expected)[~goes_on].all() or goes_on.all()


def test_draws_are_uniform_over_all_windows_of_unequal_streams(make_replay, play):
    replay = make_replay(capacity=120, streams=3, window=5, online=False)
    game = play(replay, 0)
    for lengths in (np.arange(3),) * 9 + (np.array([1]),) * 60 + (np.array([2]),) * 10:
        game.step(lengths)
    expected = [(0, p) for p in range(0, 5)] + [(1, p) for p in range(29, 65)] + [(2, p) for p in range(15)]
    assert replay.num_windows == len(expected)
    counts = Counter(w for _ in range(200) for w in windows(replay, 100))
    assert set(counts) == set(expected)
    assert chisquare([counts[w] for w in expected]).pvalue > 1e-3


def test_without_context_the_oldest_row_starts_a_window_only_if_it_starts_an_episode(make_replay, play):
    replay = make_replay(capacity=20, streams=1, window=4, context=0, online=False)
    game = play(replay, 3, mean_length=5)
    seen = set()
    for _ in range(80):
        game.run(1)
        if not replay.num_windows:
            continue
        tail = max(0, len(game.steps[0]) - 20)
        first = game.steps[0][tail]["is_first"]
        starts = {int(rows["observation"][0, 0, 1]) for rows in (replay.sample(1) for _ in range(60))}
        assert min(starts) >= tail + (not first)
        assert replay.num_windows == len(game.steps[0]) - tail - 3 - (not first)
        seen.add((first, min(starts) - tail))
    assert (True, 0) in seen
    assert (False, 1) in seen


def test_the_queue_hands_out_every_window_once_and_first(make_replay, play):
    replay = make_replay(capacity=300, streams=2, window=7)
    game = play(replay, 0).run(1)
    handed = []
    for _ in range(100):
        game.run(1)
        due = len(replay.sampler.queue)
        if replay.num_windows:
            drawn = windows(replay, 3)
            handed += drawn[:due]
    assert handed == [(s, p) for p in range(1, 95, 7) for s in range(2)]


def test_the_queue_skips_evicted_windows_and_stays_out_of_reports(make_replay, play):
    replay = make_replay(capacity=20, streams=1, window=7)
    play(replay, 0).run(50)  # windows from 1, 8, 15 .. 43; rows below 30 are gone
    before = replay.state_dict()
    windows(replay, 50, mode="report")
    after = replay.state_dict()
    assert before["sampler"]["queue"] == after["sampler"]["queue"]
    assert before["sampler"]["draws"]["train"] == after["sampler"]["draws"]["train"]
    assert windows(replay, 5)[:2] == [(0, 36), (0, 43)]
    assert not replay.sampler.queue


@few
@given(seed=st.integers(0, 10**6), steps=st.integers(30, 100), later=st.integers(0, 60))
def test_write_back_reaches_live_rows_only_and_the_last_window_wins(make_replay, play, seed, steps, later):
    replay = make_replay(capacity=90, streams=3, window=7)
    game = play(replay, seed).run(steps)
    rows = replay.sample(8)
    index, generation = rows["index"][:, 1:], rows["generation"][:, 1:]
    game.run(later)
    deter = torch.arange(8 * 6 * 2, dtype=torch.float32).view(8, 6, 2) + 1000
    stoch = torch.full((8, 6, 3), 3, dtype=torch.uint8)
    model = {
        (s, p): log[p]["deter"]
        for s, log in enumerate(game.steps)
        for p in range(max(0, len(log) - 30), len(log))
    }
    stale = 0
    for b in range(8):
        for t in range(6):
            where = int(index[b, t]) // 30, int(generation[b, t])
            if where in model:
                model[where] = deter[b, t].numpy()
            else:
                stale += 1
    replay.write_back(index, generation, {"deter": deter, "stoch": stoch})
    assert replay.stale_rows == stale
    stored = replay.storage.get(torch.arange(90))["latent", "deter"]
    for (stream, position), expected in model.items():
        assert stored[stream * 30 + position % 30].tolist() == expected.tolist()


def test_equal_draws_whatever_happens_between_them(make_replay, play):
    one, two = make_replay(seed=5), make_replay(seed=5)
    play(one, 1).run(60)
    play(two, 1).run(60)
    two.sample(3, mode="report")
    torch.rand(7)
    np.random.default_rng(0).random(3)
    for _ in range(4):
        assert windows(one, 5) == windows(two, 5)
    assert windows(make_and_play(make_replay, play, seed=6), 5) != windows(
        make_and_play(make_replay, play, seed=5), 5
    )
    assert windows(make_and_play(make_replay, play, rank=1), 5) != windows(
        make_and_play(make_replay, play, rank=0), 5
    )


def make_and_play(make_replay, play, **options):
    replay = make_replay(online=False, **options)
    play(replay, 1).run(60)
    return replay


def all_columns(batch):
    return dict(batch.flatten_keys(".").items())


@few
@given(
    seed=st.integers(0, 10**6), steps=st.integers(8, 150), draws=st.integers(0, 4), after=st.integers(0, 50)
)
def test_a_restored_replay_goes_on_bitwise(make_replay, play, tmp_path_factory, seed, steps, draws, after):
    replay = make_replay(seed=seed)
    game = play(replay, seed).run(steps)
    for _ in range(draws):
        replay.sample(4)
    folder = tmp_path_factory.mktemp("snapshot") / "replay"
    replay.snapshot(folder)
    other = make_replay(seed=seed)
    play(other, seed + 1).run(30)  # must vanish
    other.restore(folder)
    assert other.state_dict() == replay.state_dict()
    twin = play(other, 0)
    twin.steps = [list(log) for log in game.steps]
    twin.rng = np.random.default_rng(9)
    game.rng = np.random.default_rng(9)
    game.run(after)
    twin.run(after)
    for _ in range(3):
        a, b = all_columns(replay.sample(6)), all_columns(other.sample(6))
        assert a.keys() == b.keys()
        for key in a:
            assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("capacity", [30, 60, 300])
def test_another_capacity_keeps_the_newest_rows(make_replay, play, tmp_path, capacity):
    replay = make_replay(capacity=120)
    game = play(replay, 0).run(100)
    replay.snapshot(tmp_path / "a")
    other = make_replay(capacity=capacity)
    other.restore(tmp_path / "a")
    assert len(other) == min(capacity, 120)
    game.replay = other
    for _ in range(3):
        ring = capacity // 3
        first = max(60, len(game.steps[0]) - ring)
        seen = other.sample(64)["observation"]
        assert int(seen[..., 1].min()) >= first + 1
        for stream, position, x in seen.flatten(0, 1).tolist():
            assert game.steps[int(stream)][int(position)]["obs"][2] == x
        assert other.num_windows == 3 * (len(game.steps[0]) - first - 6)
        game.run(17)
    other.snapshot(tmp_path / "b")  # a ring that does not begin at slot 0
    third = make_replay(capacity=120)
    third.restore(tmp_path / "b")
    seen = third.sample(64)["observation"]
    assert all(game.steps[int(s)][int(p)]["obs"][2] == x for s, p, x in seen.flatten(0, 1).tolist())


def damage_truncate(folder):
    file = next(folder.glob("observation*.rows"))
    file.write_bytes(file.read_bytes()[:-1])


def damage_flip(folder):
    file = folder / "row.rows"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def damage_column(folder):
    (folder / "row.rows").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").unlink()


def damage_json(folder):
    (folder / "sampler.json").write_text('{"draws": ')


def damage_keys(folder):
    (folder / "writer.json").write_text('{"episodes": 1}')


def damage_layout(folder):
    file = folder / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"layout": 99}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_truncate, "bytes instead of"),
        (damage_flip, "does not match its checksum"),
        (damage_column, "is missing"),
        (damage_manifest, "is not a replay snapshot"),
        (damage_json, "cannot be read"),
        (damage_keys, "it lacks episode, step"),
        (damage_layout, "has layout 99"),
    ],
)
def test_a_damaged_snapshot_is_refused_and_changes_nothing(make_replay, play, tmp_path, damage, message):
    replay = make_replay()
    play(replay, 0).run(60)
    replay.snapshot(tmp_path / "a")
    other = make_replay()
    play(other, 1).run(20)
    state, rows = other.state_dict(), other.storage.get(torch.arange(20)).clone()
    damage(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        other.restore(tmp_path / "a")
    assert other.state_dict() == state
    assert (other.storage.get(torch.arange(20)) == rows).all()


def test_a_snapshot_of_other_columns_or_streams_is_refused(make_replay, play, tmp_path):
    replay = make_replay()
    play(replay, 0).run(30)
    replay.snapshot(tmp_path / "a")
    with pytest.raises(CheckpointError, match="3 environments per process, this run has 2"):
        make_replay(streams=2).restore(tmp_path / "a")
    spaces = Spaces({"obs": Spec("float32", (4,))}, {"action": Spec("int32", (), 5)})
    with pytest.raises(CheckpointError, match=r"columns latent\.deter, latent\.stoch, observation"):
        RowReplay(spaces, 120, 3, tmp_path / "r", None, 7).restore(tmp_path / "a")


def test_a_snapshot_replaces_the_old_one_and_a_failed_one_leaves_it(make_replay, play, tmp_path, monkeypatch):
    replay = make_replay()
    game = play(replay, 0).run(30)
    replay.snapshot(tmp_path / "a")
    game.run(5)
    replay.snapshot(tmp_path / "a")
    other = make_replay()
    other.restore(tmp_path / "a")
    assert other.storage.head.tolist() == [35] * 3
    game.run(5)
    monkeypatch.setattr(type(replay.sampler), "dumps", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        replay.snapshot(tmp_path / "a")
    other.restore(tmp_path / "a")
    assert other.storage.head.tolist() == [35] * 3
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_files_are_copied_where_the_kernel_cannot(tmp_path, monkeypatch):
    def refuse(*_, **__):
        import errno

        raise OSError(errno.EXDEV, "no")

    monkeypatch.setattr("os.copy_file_range", refuse)
    data = np.random.default_rng(0).bytes(10_000)
    (tmp_path / "a").write_bytes(data)
    with open(tmp_path / "a", "rb") as source, open(tmp_path / "b", "wb") as target:
        copy_range(source.fileno(), target.fileno(), 100, 9000)
    assert (tmp_path / "b").read_bytes() == data[100:9100]


def test_a_kept_batch_is_never_overwritten(tmp_path):
    spaces = Spaces({"image": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 3)})
    replay = RowReplay(spaces, 64, 1, tmp_path, window=9, online=False)
    for i in range(64):
        no = np.zeros(1, bool)
        replay.append(
            np.array([0]), {"image": np.full((1, 64, 64, 3), i)}, no | (i == 0), ~no, {"action": np.zeros(1)}
        )
    kept = [replay.sample(2)["observation", "image"] for _ in range(6)]
    views = [replay.sample(2)["observation", "image"][0, 0].permute(2, 0, 1) for _ in range(3)]
    copies = [x.clone() for x in kept + views]
    before = kept[0].data_ptr()
    for _ in range(10):
        replay.sample(2)
    assert all(torch.equal(a, b) for a, b in zip(kept + views, copies, strict=True))
    del kept, views
    assert before in {replay.sample(2)["observation", "image"].data_ptr() for _ in range(3)}, (
        "memory is not reused"
    )


def test_a_replay_that_does_not_fit_is_refused_with_figures_and_leaves_nothing(tmp_path, monkeypatch):
    spaces = Spaces({"image": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 3)})
    size = row_bytes(row_specs(spaces))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("U", (), {"free": 1_000_000 * size - 1})())
    with pytest.raises(
        ConfigError, match=rf"12\.3 GB \(1,000,000 rows of {size:,} bytes\), but \S+ has 12\.3 GB free"
    ):
        RowReplay(spaces, 1_000_000, 1, tmp_path / "replay")
    assert not (tmp_path / "replay").exists()
    RowReplay(spaces, 1_000_000, 1, tmp_path / "replay", reachable=999_999).close()
    with pytest.raises(ConfigError, match="one window has 65"):
        RowReplay(spaces, 100, 2, tmp_path / "replay")


def test_files_go_with_the_replay_but_not_those_of_a_later_run(make_replay, tmp_path):
    spaces = Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("int32", (), 5)})
    one = RowReplay(spaces, 120, 1, tmp_path)
    two = RowReplay(spaces, 120, 1, tmp_path)
    one.close()
    assert (tmp_path / "observation.rows").exists()
    two.close()
    assert not list(tmp_path.glob("*.rows"))


def test_cut_ends_open_episodes_as_truncated(make_replay, play):
    replay = make_replay(streams=2, window=5)
    game = play(replay, 0, mean_length=1e9).run(10)
    replay.cut(np.arange(2))
    rows = replay.storage.get(torch.arange(12))
    assert rows["valid"].flatten().tolist() == [True] * 9 + [False] + [False] * 2
    assert rows["next", "truncated"].flatten().nonzero().flatten().tolist() == [8]
    assert rows["action"][9] == 0
    state = replay.state_dict()
    replay.cut(np.arange(2))  # nothing is open now
    assert replay.state_dict() == state
    assert game.steps


def test_importing_the_replay_leaves_the_process_start_method_alone():
    assert multiprocessing.get_start_method(allow_none=True) != "spawn"
