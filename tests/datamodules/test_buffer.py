"""The buffer for scripts, against episodes whose every value says where it belongs."""

import gc
import os
import zipfile

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import made_cache

import datamodules.sources.npz as npz
from datamodules import ReplayBuffer, open_cache, open_source
from lit_wm.errors import ConfigError, DataError, NotSupported
from lit_wm.types import Spaces, Spec

DATA = os.path.join(os.path.dirname(__file__), "data")


def made(e, steps):
    """(obs, action, reward) of an episode: obs (e, t), action (e, t, 2e), reward 100 e + t."""
    t = np.arange(steps + 1.0)
    action = np.stack([np.full(steps, e), t[:-1], np.full(steps, 2 * e)], 1)
    return np.stack([np.full(steps + 1, e), t], 1), action, 100 * e + t[:-1]


def filled(lengths, capacity=1000, steps=False, **options):
    """Every third episode terminates; the others are truncated."""
    buffer = ReplayBuffer(capacity, **options)
    for e, length in enumerate(lengths):
        obs, action, reward = made(e, length)
        if not steps:
            buffer.add_episode(obs, action, reward, terminated=e % 3 == 0)
        for t in range(length * steps):
            last = t == length - 1
            ends = {"terminated": last and e % 3 == 0, "truncated": last and e % 3 != 0}
            buffer.add(obs[t], action[t], reward[t], **ends, next_obs=obs[t + 1] if last or t % 2 else None)
    return buffer


def same(left, right):
    """Whether two streams of episodes are equal in every value."""
    for a, b in zip(left, right, strict=True):
        for x, y in ((a.observation, b.observation), (a.action, b.action)):
            assert x.keys() == y.keys()
            for k in x:
                assert x[k].dtype == y[k].dtype
                np.testing.assert_array_equal(x[k], y[k])
        for name in ("reward", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    return True


@pytest.mark.parametrize("steps", [False, True])
def test_sequences_are_aligned_within_one_episode_and_uniform(steps):
    lengths = [5, 1, 9, 3, 2]
    buffer = filled(lengths, steps=steps)
    assert (len(buffer), buffer.num_episodes, buffer.obs_shape, buffer.action_dim) == (20, 5, (2,), 3)
    starts = [(e, s) for e, n in enumerate(lengths) for s in range(n - 2)]
    counts = dict.fromkeys(starts, 0)
    for _ in range(40):
        batch = buffer.sample_sequences(50, 3)
        assert batch.batch_size == (50, 3)
        e, t = batch["observation"].unbind(-1)
        assert (e == e[:, :1]).all()
        assert (t == t[:, :1] + torch.arange(3)).all()
        assert torch.equal(batch["action"], torch.stack([e, t, 2 * e], -1))
        assert torch.equal(batch["reward"], 100 * e + t)
        assert torch.equal(batch["next_observation"], torch.stack([e, t + 1], -1))
        last = t + 1 == torch.tensor(lengths)[e.long()]
        assert torch.equal(batch["terminated"], last & (e % 3 == 0))
        assert torch.equal(batch["truncated"], last & (e % 3 != 0))
        assert torch.equal(batch["is_first"], t == 0)
        for key in zip(e[:, 0].tolist(), t[:, 0].tolist(), strict=True):
            counts[key] += 1
    expected = 2000 / len(starts)
    assert sum((n - expected) ** 2 / expected for n in counts.values()) < 32  # 10 degrees: p = 0.0004


def test_states_are_uniform_over_all_observations_of_a_ring_that_has_wrapped():
    buffer = filled([5, 4, 6, 5], capacity=15)
    held = [(e, t) for e, n in ((2, 6), (3, 5)) for t in range(n + 1)]
    held = [(1, t) for t in range(5)][len(held) - 15 :] + held
    states = torch.cat([buffer.sample_states(100) for _ in range(30)])
    found = [tuple(x) for x in states.int().tolist()]
    assert set(found) == set(held)
    expected = 3000 / 15
    assert sum((found.count(x) - expected) ** 2 / expected for x in held) < 40
    assert len(buffer) == 1 + 6 + 5
    assert buffer.num_episodes == 3


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=12),
    st.integers(2, 30),
    st.lists(st.integers(1, 7), max_size=5),
)
def test_a_ring_holds_the_newest_rows_whatever_was_drawn_meanwhile(lengths, capacity, drawn):
    buffer = ReplayBuffer(capacity)
    rows = []
    for e, length in enumerate(lengths):
        buffer.add_episode(*made(e, length), truncated=True)
        rows = [*rows, *((e, t) for t in range(length + 1))][-capacity:]
        for n in drawn:
            if n <= max((t1 - t0 for t0, t1 in spans(rows).values()), default=0):
                buffer.sample_sequences(2, n)
    held = {e: span for e, span in spans(rows).items() if span[1] > span[0]}
    assert [(int(x.observation["obs"][0, 0]), x.steps) for x in buffer.episodes()] == [
        (e, b - a) for e, (a, b) in held.items()
    ]
    assert len(buffer) == sum(b - a for a, b in held.values())
    for n in {1, *drawn}:
        starts = {(e, s) for e, (a, b) in held.items() for s in range(a, b - n + 1)}
        if not starts:
            with pytest.raises(DataError, match=f"sequence_length is {n}|no finished episode"):
                buffer.sample_sequences(1, n)
            continue
        batch = buffer.sample_sequences(200, n)
        assert {tuple(x) for x in batch["observation"][:, 0].int().tolist()} <= starts
        assert torch.equal(batch["next_observation"][:, :-1], batch["observation"][:, 1:])


def spans(rows):
    """First and last t by episode."""
    return {e: (min(t for x, t in rows if x == e), max(t for x, t in rows if x == e)) for e, _ in rows}


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=6),
    st.sampled_from(["npz", "rows"]),
    st.sampled_from(["vector", "image", "dict"]),
    st.integers(0, 2**31),
)
def test_what_was_saved_loads_exactly(tmp_path_factory, lengths, form, kind, seed):
    folder, rng = tmp_path_factory.mktemp("saved"), np.random.default_rng(seed)
    spec = {"vector": Spec("float32", (3,)), "image": Spec("uint8", (3, 5, 4)), "dict": Spec("int32", (), 7)}[
        kind
    ]
    action = {"vector": Spec("float32", (2,)), "image": Spec("int32", (), 9), "dict": Spec("int32", (2,), 4)}[
        kind
    ]
    obs, acts = {"obs": spec}, {"action": action}
    if kind == "dict":
        obs, acts = (
            {"pose": Spec("float32", (2,)), "phase": spec},
            {"arm/0": Spec("float32", (1,)), "hand": action},
        )
    buffer = ReplayBuffer(spaces=Spaces(obs, acts))

    def draw(spec, n):
        if spec.dtype == "float32":
            return rng.normal(size=(n, *spec.shape)).astype(np.float32)
        return rng.integers(0, spec.classes or 256, (n, *spec.shape)).astype(spec.dtype)

    for n in lengths:
        x, a = {k: draw(s, n + 1) for k, s in obs.items()}, {k: draw(s, n) for k, s in acts.items()}
        x, a = (x, a) if kind == "dict" else (x["obs"], a["action"])
        buffer.add_episode(x, a, rng.normal(size=n), terminated=rng.random() < 0.5)
    path = folder / ("demo.npz" if form == "npz" else "demo")
    buffer.save(path)
    again = ReplayBuffer.load(path, cache_dir=folder / "cache")
    assert again.spaces == buffer.spaces
    assert len(again) == len(buffer) == sum(lengths)
    assert same(buffer.episodes(), again.episodes())
    again.save(folder / "twice")
    assert same(buffer.episodes(), open_source(f"rows:{folder / 'twice'}").episodes())


def test_a_saved_npz_is_plain_numpy(tmp_path):
    buffer = filled([2, 3])
    buffer.save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        flat = {k: file[k] for k in file.files}
    obs, action, reward = (np.concatenate(x) for x in zip(made(0, 2), made(1, 3), strict=True))
    np.testing.assert_array_equal(flat["observations"], np.delete(obs, [2, 6], 0))
    np.testing.assert_array_equal(flat["next_observations"], np.delete(obs, [0, 3], 0))
    np.testing.assert_array_equal(flat["actions"], action)
    np.testing.assert_array_equal(flat["rewards"], reward)
    assert flat["terminations"].tolist() == [False, True, False, False, False]
    assert flat["truncations"].tolist() == [False, False, False, False, True]


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    buffer, path = filled([2, 3]), tmp_path / "x.npz"
    buffer.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(npz.np, "ascontiguousarray", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        buffer.save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.npz"]
    buffer.save(tmp_path / "rows")
    with pytest.raises(ConfigError, match="exists"):
        buffer.save(tmp_path / "rows")
    assert len(open_cache(tmp_path / "rows", verify="full").episodes["start"]) == 2


def test_a_schema_that_does_not_fit_its_file_is_refused(tmp_path):
    filled([2]).save(tmp_path / "x.npz")
    with np.load(tmp_path / "x.npz") as file:
        flat = {k: file[k] for k in file.files}
    other = str(flat["schema"]).replace('"obs": {"dtype', '"eye": {"dtype')
    for text, message in (("{", "schema cannot be read"), (other, "other entries")):
        np.savez(tmp_path / "y.npz", **(flat | {"schema": np.array(text)}))
        with pytest.raises(DataError, match=message):
            ReplayBuffer.load(tmp_path / "y.npz", cache_dir=tmp_path / "cache")


@pytest.mark.filterwarnings("ignore:.*(dones are ends|are left out)")
def test_every_form_loads_by_its_path_with_its_own_values(tmp_path):
    def load(*path, **options):
        return ReplayBuffer.load(os.path.join(DATA, *path), cache_dir=tmp_path, **options)

    folder = os.path.join(DATA, "minari", "pendulum", "scripted-v0")
    buffer = load("minari", "pendulum", "scripted-v0")
    with h5py.File(os.path.join(folder, "data", "main_data.hdf5")) as file:
        for k, e in enumerate(buffer.episodes()):
            np.testing.assert_array_equal(e.observation["obs"], file[f"episode_{k}/observations"])
            np.testing.assert_array_equal(e.action["action"], file[f"episode_{k}/actions"])
        pairs = {
            (*o.tolist(), *a.tolist())
            for k in file
            for o, a in zip(file[k]["observations"][:-1], file[k]["actions"][:], strict=True)
        }
    batch = buffer.sample_sequences(32, 8)  # the file's torques, -2 to 2, as models want them
    assert 0.5 < batch["action"].abs().max() <= 1
    rows = torch.cat([batch["observation"], batch["action"] * 2], -1).flatten(0, 1)
    assert {tuple(x) for x in rows.tolist()} <= pairs
    assert len(load("minari", "pendulum", "scripted-v0", "data", "main_data.hdf5")) == len(buffer) == 1037

    with np.load(os.path.join(DATA, "npz", "atari_breakout.npz")) as file:
        frames, actions = file["obs"], file["actions"].argmax(1)
    buffer = load("npz", "atari_breakout.npz")
    assert (buffer.obs_shape, buffer.action_dim, buffer.num_episodes) == ((3, 64, 64), 4, 2)
    batch = buffer.sample_sequences(4, 6)
    for b in range(4):
        at = [
            i for i in range(len(frames) - 5) if (frames[i : i + 6] == batch["observation"][b].numpy()).all()
        ]
        assert any((actions[i : i + 6] == batch["action"][b].numpy()).all() for i in at)
    assert load("d4rl", "halfcheetah_scripted-v0-notimeouts.hdf5", episode_length=300).num_episodes == 3
    assert load("tdmpc2", "chunk_0.pt").obs_shape == (24,)
    assert load("dreamer_chunks").num_episodes == 12
    assert len(ReplayBuffer.load(made_cache(tmp_path, [4, 2]).folder)) == 6


def test_draws_follow_from_the_seed_and_the_calls(tmp_path):
    def draws(buffer):
        drawn = []
        for n in (3, 1, 3, 2, 5, 4, 6, 7, 8, 9, 3):  # more lengths than samplers are kept
            drawn += [
                buffer.sample_sequences(4, n)["observation"].flatten(),
                buffer.sample_states(5).flatten(),
            ]
        return torch.cat(drawn)

    one, two, other = (filled([12, 9, 10], seed=seed) for seed in (1, 1, 2))
    first = draws(one)
    assert torch.equal(first, draws(two))
    assert not torch.equal(first, draws(other))
    assert not torch.equal(first, draws(one))
    one.save(tmp_path / "rows")
    assert torch.equal(first, draws(ReplayBuffer.load(tmp_path / "rows", seed=1)))


@pytest.mark.filterwarnings("ignore:.*dones are ends")
def test_transitions_that_a_file_cannot_give_are_said(tmp_path):
    columns = {"observations": np.zeros((12, 1)), "actions": np.zeros((12, 1)), "rewards": np.ones(12)}
    np.savez(tmp_path / "a.npz", dones=np.arange(12) % 4 == 3, **columns)
    for _ in range(2):  # from the file, from the cache
        with pytest.warns(UserWarning, match="3 of 12 transitions are left out"):
            assert len(ReplayBuffer.load(tmp_path / "a.npz", cache_dir=tmp_path)) == 9
    assert len(ReplayBuffer.load(tmp_path / "a.npz", cache_dir=tmp_path, last_obs="repeat")) == 12


def test_a_missing_last_observation(recwarn):
    buffer = ReplayBuffer()
    for t in range(3):
        buffer.add([float(t)], [0.5], 10 + t, terminated=t == 2)
    (e,) = buffer.episodes()
    assert e.observation["obs"][:, 0].tolist() == [0, 1, 2, 2]
    assert e.fake_last
    assert e.terminated[-1]
    for t in range(2):
        buffer.add([float(t)], [0.5], 10 + t, terminated=False)
    with pytest.warns(UserWarning, match="without next_obs is left out"):
        buffer.add([2.0], [0.5], 12, terminated=False, truncated=True)
    e = list(buffer.episodes())[1]
    assert e.observation["obs"][:, 0].tolist() == [0, 1, 2]
    assert e.truncated.tolist() == [False, True]
    assert len(recwarn) == 0
    for ended in (True, False):
        with pytest.warns(UserWarning, match=r"as many observations as actions(.|\n)*Give T\+1 observations"):
            buffer.add_episode(np.zeros((3, 1)), np.zeros((3, 1)), np.zeros(3), terminated=ended)
    assert len(buffer) == 3 + 2 + 3 + 2
    assert [x.fake_last for x in buffer.episodes()] == [True, False, True, False]


@pytest.mark.parametrize("shape", [(64, 64, 3), (1, 48, 64)])
def test_a_float_that_looks_like_an_image_is_refused(shape):
    obs, rest = np.random.default_rng(0).random((4, *shape)), (np.zeros((3, 1)), np.zeros(3))
    refused(lambda: ReplayBuffer().add_episode(obs, *rest), DataError, "looks like an image", "255 * obs")
    refused(lambda: ReplayBuffer().add(obs[0], [0.0], 0, True), DataError, "float64", str(shape))
    buffer = ReplayBuffer()
    buffer.add_episode((255 * obs).round().astype("uint8"), *rest)
    assert buffer.spaces.obs["obs"].is_image
    spaces = Spaces({"obs": Spec("float32", shape)}, {"action": Spec("float32", (1,))})
    ReplayBuffer(spaces=spaces).add_episode(obs, *rest)  # said to be none


def test_the_running_episode_counts_and_is_saved_but_not_drawn(tmp_path):
    buffer = ReplayBuffer()
    for t in range(4):
        buffer.add([float(t)], [0.0], t, False, next_obs=[t + 1.0])
    assert (len(buffer), buffer.num_episodes) == (4, 0)
    with pytest.raises(DataError, match="no finished episode yet.*4 transitions"):
        buffer.sample_states(1)
    buffer.save(tmp_path / "x.npz")
    (e,) = ReplayBuffer.load(tmp_path / "x.npz", cache_dir=tmp_path).episodes()
    assert e.observation["obs"][:, 0].tolist() == [0, 1, 2, 3, 4]
    assert e.truncated.tolist() == [0, 0, 0, 1]
    with pytest.raises(DataError, match="step by step"):
        buffer.add_episode(*made(0, 3))


def test_truncations_in_the_middle_cut_an_episode_in_two():
    buffer = ReplayBuffer()
    buffer.add_episode(*made(0, 6), truncated=[0, 0, 1, 0, 0, 0], terminated=True)
    assert [(x.steps, bool(x.terminated[-1])) for x in buffer.episodes()] == [(3, False), (3, True)]


def refused(action, error, *words):
    with pytest.raises(error) as info:
        action()
    assert len(str(info.value).splitlines()) <= 5
    for word in words:
        assert word in str(info.value), str(info.value)


def test_what_does_not_fit_is_one_clear_error(tmp_path):
    buffer = filled([3, 5])
    obs, action, reward = made(0, 4)
    refused(lambda: buffer.sample_sequences(2, 6), DataError, "sequence_length is 6", "1 to 5", "2 finished")
    refused(lambda: buffer.sample_sequences(2, 0), DataError, "sequence_length is 0")
    refused(lambda: buffer.sample_sequences(0, 2), ConfigError, "batch_size is 0")
    refused(lambda: ReplayBuffer().sample_sequences(1, 1), DataError, "no finished episode")
    refused(lambda: ReplayBuffer().spaces, DataError, "empty")
    refused(lambda: ReplayBuffer().save(tmp_path / "x.npz"), DataError, "nothing to save")
    refused(lambda: buffer.save(tmp_path / "x.hdf5"), ConfigError, "NAME.npz")
    refused(lambda: buffer.add(obs[0, :1], action[0], 0, False), DataError, "shape (.., 1)", "(2)")
    refused(lambda: buffer.add({"eye": obs[0]}, action[0], 0, False), DataError, "eye", "expected obs")
    refused(lambda: buffer.add(obs[0], action[0], np.nan, False), DataError, "reward", "nan")
    refused(lambda: buffer.add_episode(obs, action[:2], reward), DataError, "lengths differ", "episode 2")
    refused(lambda: buffer.add_episode(obs - np.inf, action, reward), DataError, "not finite")
    early = [True, False, False, False]
    refused(lambda: buffer.add_episode(obs, action, reward, early), DataError, "3 more steps follow")
    assert len(buffer) == 8  # nothing of these was kept
    buffer.add(obs[0], action[0], 0, False, next_obs=obs[1])
    refused(lambda: buffer.add(obs[2], action[2], 0, False), DataError, "not the next_obs")
    refused(lambda: ReplayBuffer(1).add([0.0], [0.0], 0, True), ConfigError, "capacity")
    refused(lambda: ReplayBuffer(obs_shape=(3,)).add([0.0], [0.0], 0, True), DataError, "obs_shape says (3,)")
    refused(lambda: ReplayBuffer(action_dim=3).add([0.0], [0.0], 0, True), DataError, "action_dim says 3")
    refused(lambda: ReplayBuffer().add([0.0], 1, 0, True), ConfigError, "action_dim")
    refused(lambda: ReplayBuffer().add(1, [0.0], 0, True), ConfigError, "spaces")
    refused(lambda: ReplayBuffer(action_dim=3).add([0.0], 3, 0, True), DataError, "classes 0 to 2")
    refused(
        lambda: ReplayBuffer(10**13).add([0.0], [0.0], 0, True), ConfigError, "Lower capacity", "directory"
    )
    refused(lambda: ReplayBuffer(action_low=1, action_high=-1), ConfigError, "must be below")
    named = {"action_low": {"a": 0}, "action_high": {"a": [1, -1]}}
    refused(lambda: ReplayBuffer(**named), ConfigError, "must be below")
    refused(lambda: ReplayBuffer(action_low=1), ConfigError, "give both")
    assert ReplayBuffer(action_low={"a": 0}, action_high=1)._schema is None
    with pytest.warns(UserWarning, match="51 observations, but capacity is 10"):
        ReplayBuffer(10).add_episode(np.zeros((51, 1)), np.zeros((50, 1)), np.zeros(50))
    refused(lambda: ReplayBuffer.load(tmp_path / "no.npz"), DataError, "does not exist")
    refused(lambda: ReplayBuffer.load("no.npz"), DataError, "working directory, ")
    refused(lambda: ReplayBuffer.load("npz:no.npz"), DataError, "working directory, ")
    (tmp_path / "x.csv").write_text("1")
    refused(lambda: ReplayBuffer.load(tmp_path / "x.csv"), DataError, "known kind", ".npz")
    refused(lambda: ReplayBuffer.load("nope:x"), ConfigError, "no source")
    buffer.save(tmp_path / "x.npz")
    place = tmp_path / "x.npz"
    refused(lambda: ReplayBuffer.load(f"{place}?classes=6"), DataError, f"a URI: npz:{place}?classes=6")
    loaded = ReplayBuffer.load(tmp_path / "x.npz", cache_dir=tmp_path)
    refused(lambda: loaded.add(obs[0], action[0], 0, False), NotSupported, "does not grow")
    refused(lambda: loaded.sample_sequences(1, 9), DataError, "1 to 5")


def test_files_go_with_the_buffer(tmp_path):
    buffer = filled([3], directory=tmp_path / "here")
    assert list((tmp_path / "here").iterdir())
    temporary = filled([3])
    folder = temporary._folder
    assert folder.exists()
    del buffer, temporary
    gc.collect()
    assert not list((tmp_path / "here").iterdir())
    assert not folder.exists()


def test_an_image_buffer_saves_without_holding_the_file(tmp_path):
    buffer = ReplayBuffer(capacity=200)
    frames = np.random.default_rng(0).integers(
        0, 256, (41, 36, 36), dtype=np.uint8
    )  # grey frames get a channel
    buffer.add_episode(frames, np.zeros((40, 1)), np.zeros(40))
    assert buffer.obs_shape == (36, 36, 1)
    buffer.save(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "x.npz") as file:
        assert file.testzip() is None
    assert same(buffer.episodes(), ReplayBuffer.load(tmp_path / "x.npz", cache_dir=tmp_path).episodes())
