"""Datasets as replays, against what every value of the made source says of itself."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made import BOUNDS, made_cache, scaled_action

from datamodules.offline import CacheRows, environment_bounds, observation_statistics
from datamodules.replay import RowReplay
from datamodules.rows import nested
from datamodules.selection import SourceSpec, common_spaces, model_spaces, select_episodes
from datamodules.views import dreamer_view, tdmpc2_view
from lit_wm.errors import CheckpointError, ConfigError, DataError, NotSupported
from lit_wm.types import Spaces, Spec

LENGTHS = [5, 1, 9, 3, 7, 2, 12]
EVERY = np.arange(len(LENGTHS))
LATENTS = {"deter": Spec("float32", (2,)), "stoch": Spec("uint8", (3,), classes=4)}


def replay_of(
    tmp_path, lengths=LENGTHS, window=4, within=False, chosen=None, latents=None, cache=None, **options
):
    """(replay, cache) of some or all episodes."""
    cache = cache or made_cache(tmp_path / "cache", lengths, **options.pop("source", {}))
    spec = options.pop("spec", SourceSpec("made:x"))
    keys = ("uniform", "seed", "context")
    draw = {k: options.pop(k) for k in keys if k in options}
    spaces = options.pop("spaces", None) or model_spaces(cache, options.get("stack", 1))
    context = 0 if within else draw.get("context", 1)
    chosen = np.arange(len(cache.episodes["start"])) if chosen is None else np.array(chosen)
    storage = CacheRows(
        cache, tmp_path / "run", spaces, chosen, spec, latents, 0 if within else max(context, 1), **options
    )
    replay = RowReplay.of_dataset(
        storage, spaces, window, context, draw.get("seed", 0), 0, within, draw.get("uniform", "episodes")
    )
    return replay, cache


@pytest.mark.parametrize("chosen", [None, [0, 2, 3, 6], [6], [1, 5, 6]])
@pytest.mark.parametrize("context", [0, 1, 3])
def test_the_dreamer_view_equals_the_source_value_by_value(tmp_path, chosen, context):
    length = 3
    replay, _ = replay_of(tmp_path, window=context + length, chosen=chosen, context=context)
    used = range(len(LENGTHS)) if chosen is None else chosen
    stream = [(e, t) for e in used for t in range(LENGTHS[e] + 1)]
    assert len(replay) == len(stream)
    seen = set()
    for _ in range(60):
        columns = replay.sample_columns(8)
        batch = dreamer_view(nested(columns), context, False)
        for b in range(8):
            at = stream.index(tuple(batch.obs["obs"][b, 0].int().tolist()))
            seen.add(at)
            for t in range(length):
                e, step = stream[at + t]
                assert batch.obs["obs"][b, t].tolist() == [e, step]
                first = step == 0
                assert batch.is_first[b, t] == (first or (context == 0 and t == 0))
                assert batch.is_last[b, t] == (step == LENGTHS[e])
                assert batch.is_terminal[b, t] == (step == LENGTHS[e] and e % 3 == 0)
                assert batch.reward[b, t] == (0 if first else 100 * e + step - 1)
                if not first:
                    expected = torch.full((2,), scaled_action(e, step - 1))
                    torch.testing.assert_close(batch.prev_action["action"][b, t], expected)
    # Every start is reached but those whose lead is not there.
    lead = max(context, 1) if context else 0
    assert seen == set(range(lead, len(stream) - length + 1))


@pytest.mark.parametrize("uniform", ["episodes", "windows"])
def test_windows_within_episodes_equal_the_source_and_are_uniform(tmp_path, uniform):
    replay, _ = replay_of(tmp_path, within=True, uniform=uniform)
    starts = [(e, s) for e, steps in enumerate(LENGTHS) for s in range(steps + 1 - 3)]
    assert replay.num_windows == len(starts)
    counts = dict.fromkeys(starts, 0)
    draws = 200
    for _ in range(draws):
        batch = tdmpc2_view(nested(replay.sample_columns(64)))
        e, s = batch.obs["obs"][..., 0], batch.obs["obs"][..., 1]
        assert (e == e[:, :1]).all()
        assert (s.diff(dim=1) == 1).all()
        assert torch.equal(batch.reward[:, 1:], 100 * e[:, :-1] + s[:, :-1])
        length = torch.tensor(LENGTHS)[e.long()]
        assert torch.equal(batch.is_terminal[:, 1:], ((s == length) & (e % 3 == 0))[:, 1:])
        expected = scaled_action(e[:, :-1].double(), s[:, :-1].double()).float()
        torch.testing.assert_close(batch.prev_action["action"][:, 1:, 0], expected)
        for start in zip(e[:, 0].int().tolist(), s[:, 0].int().tolist(), strict=True):
            counts[start] += 1
    long = [steps for steps in LENGTHS if steps >= 3]
    share = {e: len(starts) if uniform == "windows" else len(long) * (LENGTHS[e] - 2) for e, _ in starts}
    expected = np.array([draws * 64 / share[e] for e, _ in starts])
    chi2 = ((np.array(list(counts.values())) - expected) ** 2 / expected).sum()
    assert chi2 < len(starts) + 5 * (2 * len(starts)) ** 0.5


def test_draws_depend_on_seed_and_number_alone(tmp_path):
    replay, cache = replay_of(tmp_path)
    other, _ = replay_of(tmp_path / "other", cache=cache)
    third, _ = replay_of(tmp_path / "third", cache=cache, seed=1)
    first = [replay.sample_columns(4)["index",] for _ in range(5)]
    other.sample_columns(7, mode="report")
    assert all(torch.equal(a, other.sample_columns(4)["index",]) for a in first)
    assert not all(torch.equal(a, third.sample_columns(4)["index",]) for a in first)


def test_latents_start_empty_come_back_and_survive_a_snapshot(tmp_path):
    replay, cache = replay_of(tmp_path, latents=LATENTS, window=5)
    columns = replay.sample_columns(4)
    assert (columns["latent", "stoch"] == 255).all()
    assert (columns["latent", "deter"] == 0).all()
    rows, T = columns["index",][:, 1:], 4
    deter = rows.float().unsqueeze(-1).expand(-1, -1, 2)
    stoch = (rows % 4).to(torch.uint8).unsqueeze(-1).expand(-1, -1, 3)
    replay.write_back(rows, columns["generation",][:, 1:], {"deter": deter, "stoch": stoch})
    written = set(rows.reshape(-1).tolist())
    replay.snapshot(tmp_path / "saved")
    again, _ = replay_of(tmp_path / "again", latents=LATENTS, window=5, cache=cache)
    again.restore(tmp_path / "saved")
    for one in (replay, again):
        checked = 0
        one.sampler.draws["train"] = 1
        for _ in range(20):
            columns = one.sample_columns(4)
            for row, value, index in zip(columns["index",][:, 0].tolist(), columns["latent", "deter"],
                                         columns["latent", "stoch"], strict=True):  # fmt: skip
                assert value.tolist() == ([row, row] if row in written else [0, 0])
                assert index.tolist() == ([row % 4] * 3 if row in written else [255] * 3)
                checked += row in written
        assert checked > 5
    assert T == 4
    other, _ = replay_of(tmp_path / "o", latents=LATENTS, window=5, cache=cache, chosen=[0, 1, 2, 3])
    with pytest.raises(CheckpointError, match="same data.sources"):
        other.restore(tmp_path / "saved")


def test_frames_are_stacked_within_the_episode_when_drawn(tmp_path):
    replay, cache = replay_of(tmp_path, [4, 2, 6], window=4, within=True, stack=3, source={"image": 4})
    assert replay.spaces.obs["obs"].shape == (4, 4, 9)
    assert model_spaces(cache, 3) == replay.spaces
    for _ in range(20):
        obs = replay.sample_columns(4)["observation",]
        for frame in obs.reshape(-1, 4, 4, 9)[:, 0, 0]:
            e, t = frame[6].item(), frame[7].item()
            assert frame.tolist() == [e, max(t - 2, 0), 0, e, max(t - 1, 0), 0, e, t, 0]


def test_vectors_are_padded_and_tasks_numbered(tmp_path):
    wide = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("float32", (3,))})
    replay, cache = replay_of(tmp_path, within=True, spaces=wide, task=7, source={"width": 3})
    rows = nested(replay.sample_columns(8))
    assert rows["observation"].shape == (8, 4, 5)
    assert (rows["observation"][..., 3:] == 0).all()
    assert rows["observation"][..., 1].any()
    assert (rows["action"][..., 2] == 0).all()
    assert tdmpc2_view(rows, tasks=True).task.tolist() == [7] * 8
    small = model_spaces(cache)
    assert common_spaces({"a": small, "b": wide}, pad=True).to_plain()["obs"] == wide.to_plain()["obs"]
    with pytest.raises(DataError, match="a: obs float32 \\[3\\].*\n.*b: obs float32 \\[5\\]") as error:
        common_spaces({"a": small, "b": wide})
    assert "pad: true" in str(error.value)


def test_rewards_and_actions_are_transformed_at_transitions_only(tmp_path):
    spec = SourceSpec("made:x", reward={"scale": 0.5, "shift": -10, "clip": [-20, 30]})
    replay, _ = replay_of(tmp_path, within=True, spec=spec)
    for _ in range(10):
        batch = tdmpc2_view(nested(replay.sample_columns(16)))
        e, s = batch.obs["obs"][..., 0], batch.obs["obs"][..., 1]
        assert torch.equal(batch.reward[:, 1:], (0.5 * (100 * e + s) - 10).clamp(-20, 30)[:, :-1])
    last = ~replay.storage.arrays["valid",]
    assert (replay.storage.arrays["next", "reward"][last] == 0).all()
    assert (replay.storage.arrays["action",][last] == 0).all()
    assert BOUNDS != (-1, 1)  # else nothing was scaled


def test_unknown_bounds_of_actions_are_asked_for(tmp_path):
    cache = made_cache(tmp_path / "c", LENGTHS, bounds=False)
    with pytest.raises(DataError, match="go up to 2, and nobody says their bounds.*\n.*action_low"):
        replay_of(tmp_path, cache=cache)
    replay, _ = replay_of(
        tmp_path / "2", cache=cache, spec=SourceSpec("made:x", action_low=-2, action_high=4)
    )
    known, _ = replay_of(tmp_path / "3")
    assert np.array_equal(replay.storage.arrays["action",], known.storage.arrays["action",])
    with pytest.raises(ConfigError, match="must be below"):
        replay_of(tmp_path / "4", cache=cache, spec=SourceSpec("made:x", action_low=2, action_high=2))
    with pytest.raises(ConfigError, match=r"do not fit action 'action'; expected numbers, or arrays \(2,\)"):
        replay_of(tmp_path / "5", cache=cache, spec=SourceSpec("made:x", action_low=[-2] * 3, action_high=4))
    kept, _ = replay_of(tmp_path / "6", cache=cache, spec=SourceSpec("made:x", action_low=-1, action_high=1))
    assert kept.storage.arrays["action",].min() < -1  # somebody says what 1 is


def test_bounds_that_contradict_the_source_are_said(tmp_path, recwarn):
    replay_of(tmp_path / "1", spec=SourceSpec("made:x", action_low=BOUNDS[0], action_high=[BOUNDS[1]] * 2))
    assert not recwarn
    with pytest.warns(UserWarning, match=r"says that -2 to 4 is -1 to 1 .*make it -4 to 8\."):
        replay_of(tmp_path / "2", spec=SourceSpec("made:x", action_low=-4, action_high=8))


@pytest.mark.parametrize(
    ("env", "bounds", "said"),
    [
        ((-2, 4), True, ""),
        (
            (-2, 2),
            True,
            "is -2 to 4 by its bounds, in Env it is -2 to 2; .*\n  Right if .*action_low: -2, action_high: 2",
        ),
        (
            (-3, 4),
            False,
            r"from -2 to -1.4, nobody says .*\[-3, -3.5\] to 4: taken in those units.*\n.*-1 and 1",
        ),
    ],
)
def test_bounds_are_compared_with_those_of_the_environment(tmp_path, env, bounds, said):
    """Actions of the source are -2 to -1.5; -1 and 1 are what is scaled already, whoever says it."""
    cache, high = made_cache(tmp_path / "c", LENGTHS, bounds=bounds), np.full(2, env[1])
    low = np.full(2, env[0]) - np.array([0, 0.5]) * (not bounds)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = environment_bounds(cache, SourceSpec("made:x"), "Env", {"action": (low, high)}, EVERY)
        for spec in (SourceSpec("made:x", action_low=-1, action_high=1),
                     SourceSpec("made:x", action_low=low.tolist(), action_high=env[1])):  # fmt: skip
            assert environment_bounds(cache, spec, "Env", {"action": (low, high)}, EVERY) == {}
    assert len(caught) == bool(said)
    assert re.search(said, str(caught[0].message) if caught else "")
    assert bool(found) == (not bounds)
    if found:  # as if the source had said it
        taken, _ = replay_of(tmp_path / "taken", cache=cache, bounds=found)
        given, _ = replay_of(tmp_path / "given", cache=cache, spec=spec)
        assert np.array_equal(taken.storage.arrays["action",], given.storage.arrays["action",])


@pytest.mark.parametrize(
    ("env", "said"),
    [((-1, 1), ""), ((0.5, 3), ""), ((-0.1, 5), ""), ((-3, 3), "taken as scaled to .*\n.*action_low: -3")],
)
def test_actions_that_may_be_scaled_are_spoken_of(tmp_path, env, said):
    """Within -1 and 1, by nobody's word: known to be scaled only where the environment's units exclude it."""
    cache, bounds = made_cache(tmp_path / "c", LENGTHS, bounds=False, spread=0.5), np.full((2, 2), env).T
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert environment_bounds(cache, SourceSpec("made:x"), "Env", {"action": tuple(bounds)}, EVERY) == {}
    assert [bool(re.search(said, str(w.message))) for w in caught] == [True] * bool(said)


def test_actions_that_no_unit_fits_are_refused(tmp_path):
    cache = made_cache(tmp_path / "c", LENGTHS, bounds=False)
    bounds = {"action": (np.full(2, -1.5), np.ones(2))}
    with pytest.raises(DataError, match="values from -2 .*, in Env it is -1.5 to 1.\n  Give action_low"):
        environment_bounds(cache, SourceSpec("made:x"), "Env", bounds, EVERY)


@pytest.mark.parametrize("end", [1.5, 3.0])
def test_only_episodes_that_are_used_tell_the_units(tmp_path, end):
    """Those of others reach -2, which would contradict 1.5 and make 3 the bound."""
    cache = made_cache(tmp_path / "c", [2] * 30, bounds=False)
    bounds = {"action": (np.full(2, -end), np.full(2, end))}
    with pytest.warns(UserWarning, match=r"from -0.8 to 0.9, .*taken as scaled"):
        assert environment_bounds(cache, SourceSpec("made:x"), "Env", bounds, np.arange(12, 30)) == {}


def test_bounds_without_end_say_nothing_of_units(tmp_path):
    cache = made_cache(tmp_path / "c", LENGTHS, bounds=False)
    bounds = {"action": (np.full(2, -3.0), np.full(2, 3.0))}
    endless = {"action": np.full(2, np.inf)}
    cache.schema = replace(cache.schema, low={"action": -endless["action"]}, high=endless)
    with pytest.warns(UserWarning, match=r"from -2 to .*nobody says its bounds.*taken in those units"):
        found = environment_bounds(cache, SourceSpec("made:x"), "Env", bounds, EVERY)
    taken, _ = replay_of(tmp_path, cache=cache, bounds=found)
    assert taken.storage.arrays["action",].min() == pytest.approx(-2 / 3)


def test_values_beyond_known_bounds_are_kept(tmp_path):
    """As recorded before an environment clips them; only without bounds nobody knows what -1 and 1 are."""
    with pytest.warns(UserWarning, match=r"'action' goes up to 1.67\.\n.*right if the environment clipped"):
        wide, _ = replay_of(tmp_path, source={"spread": 2.0})
    assert wide.storage.arrays["action",].min() < -1.5
    assert wide.storage.arrays["action",].shape[1] == 2


@pytest.mark.parametrize("bounds", [True, False])  # of the source
def test_values_beyond_given_bounds_are_spoken_of_also_where_these_are_minus_one_and_one(tmp_path, bounds):
    cache = made_cache(tmp_path / "c", LENGTHS, bounds=bounds)  # -2 to -1.1
    for low, said in ((-1, "goes up to 2"), (-1.5, "goes up to 1.33"), (-3, "")):
        spec = SourceSpec("made:x", action_low=low, action_high=-low)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            replay_of(tmp_path / str(low), cache=cache, spec=spec)
        texts = [str(w.message) for w in caught if "goes up to" in str(w.message)]
        assert len(texts) == bool(said)
        assert said in "".join(texts)


def test_a_snapshot_holds_only_latents_that_were_written(tmp_path):
    replay, cache = replay_of(tmp_path, lengths=[2000], latents=LATENTS, window=5)
    columns = replay.sample_columns(2)
    rows = columns["index",][:, 1:]
    latents = {"deter": torch.ones(*rows.shape, 2), "stoch": torch.zeros(*rows.shape, 3, dtype=torch.uint8)}
    replay.write_back(rows, columns["generation",][:, 1:], latents)
    replay.snapshot(tmp_path / "saved")
    assert sum(f.stat().st_size for f in (tmp_path / "saved").iterdir()) < 2500
    again, _ = replay_of(tmp_path / "2", latents=LATENTS, window=5, cache=cache)
    again.restore(tmp_path / "saved")
    for key in LATENTS:
        old, new = (r.storage.columns["latent", key] for r in (replay, again))
        assert torch.equal(old, new)
    other, _ = replay_of(tmp_path / "3", latents={"deter": Spec("float32", (5,))}, window=5, cache=cache)
    with pytest.raises(CheckpointError, match="same data.sources"):
        other.restore(tmp_path / "saved")


def test_nothing_writes_to_a_dataset_and_short_ones_are_refused(tmp_path):
    replay, cache = replay_of(tmp_path)
    with pytest.raises(NotSupported, match="cannot be written"):
        replay.storage.set(0, {})
    for within, message in ((True, "the longest episode has 13 observations, but a window has 20"),
                            (False, "there are 46 observations, but a window has 50")):  # fmt: skip
        with pytest.raises(DataError, match=message):
            replay_of(tmp_path / str(within), cache=cache, window=20 if within else 50, within=within)


def test_the_files_of_a_run_go_and_the_cache_stays(tmp_path):
    replay, cache = replay_of(tmp_path, latents=LATENTS)
    assert list((tmp_path / "run").iterdir())
    replay.close()
    assert not list((tmp_path / "run").iterdir())
    cache.verify(full=True)


def spec_of(**options):
    return SourceSpec("made:x", **options)


def test_filters_choose_what_they_say(tmp_path):
    lengths = [(7 * i) % 30 + 1 for i in range(40)]
    cache = made_cache(tmp_path, lengths)
    returns = cache.episodes["return"]

    def chosen(**options):
        train, held = select_episodes(cache, spec_of(**options), 0.0, 0)
        assert not len(held)
        return train.tolist()

    assert chosen() == list(range(40))
    assert chosen(min_length=20) == [i for i, n in enumerate(lengths) if n >= 20]
    assert chosen(episodes=[3, 1]) == [1, 3]
    assert chosen(top_returns=0.1) == sorted(np.argsort(returns)[-4:].tolist())
    assert chosen(max_steps=sum(lengths[:5])) == list(range(5))
    assert len(chosen(fraction=0.25)) == 10
    assert chosen(fraction=0.25) == chosen(fraction=0.25)
    with pytest.raises(DataError, match="none is left"):
        chosen(min_length=99)
    with pytest.raises(DataError, match="has episodes 0 to 39"):
        chosen(episodes=[40])


@settings(max_examples=60, deadline=None)
@given(n=st.integers(2, 200), fraction=st.floats(0.01, 0.9), salt=st.integers(0, 99))
def test_a_split_is_disjoint_complete_and_stable_when_data_grow(tmp_path_factory, n, fraction, salt):
    small, large = (fake_cache([3] * k, salt) for k in (n, n + 50))
    train, held = select_episodes(small, spec_of(), fraction, 0)
    assert sorted([*train, *held]) == list(range(n))
    assert len(held) >= 1
    more, rest = select_episodes(large, spec_of(), fraction, 0)
    # One episode on each side may be there only because a side must not be empty.
    assert len(set(train) - set(more)) <= 1
    assert len(set(held) - set(rest)) <= 1
    if n > 60 and 0.2 < fraction < 0.8:
        assert set(train) <= set(more)
        assert set(held) <= set(rest)
    assert abs(len(rest) / (n + 50) - fraction) < 5 * (fraction * (1 - fraction) / (n + 50)) ** 0.5 + 0.05


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), fraction=st.floats(0.01, 0.9), salt=st.integers(0, 99), top=st.floats(0.05, 1))
def test_filters_never_move_an_episode_across_the_split(n, fraction, salt, top):
    cache = fake_cache([3] * n, salt)
    train, held = select_episodes(cache, spec_of(), fraction, 0)
    try:
        some, rest = select_episodes(cache, spec_of(top_returns=top), fraction, 0)
    except DataError:  # what the filter left is all held out
        return
    assert len(train)
    assert set(some) <= set(train)
    assert set(rest) <= set(held)


def test_a_run_that_goes_on_holds_out_the_same_episodes_and_perhaps_more(tmp_path):
    """With another seed, another name of the data, another order, and a copy of an episode."""
    first, other = fake_cache([3] * 40), fake_cache([3] * 41)
    order = np.append(np.arange(40)[::-1], 7)
    other.episodes["crc"][:] = first.episodes["crc"][order]
    train, held = select_episodes(first, SourceSpec("npz:a.npz"), 0.2, 0)
    more, rest = select_episodes(other, SourceSpec("npz:b/*.npz", fraction=1.0), 0.2, 1)
    assert set(order[more]) == set(train)
    assert set(order[rest]) == set(held)
    _, larger = select_episodes(first, SourceSpec("npz:a.npz"), 0.5, 2)
    assert set(held) < set(larger)
    some, _ = select_episodes(first, SourceSpec("npz:a.npz", fraction=0.5), 0.2, 3)
    assert set(some) <= set(train)
    copies = fake_cache([3] * 5)
    copies.episodes["crc"][:] = 1  # nothing else could be held out
    assert [len(side) for side in select_episodes(copies, spec_of(), 0.5, 0)] == [5, 0]


def fake_cache(lengths, salt=0):
    n = len(lengths)

    class Table:
        episodes = {
            "length": np.array(lengths) + 1,
            "return": np.arange(n, dtype=float),
            "crc": np.arange(n, dtype=np.uint32) + np.uint32(1000 * salt),
        }

    return Table()


def test_statistics_are_those_of_numpy_over_training_rows(tmp_path):
    replay, _ = replay_of(tmp_path, chosen=[0, 2, 6])
    rows = np.array([(e, t) for e in (0, 2, 6) for t in range(LENGTHS[e] + 1)], np.float64)
    mean, std = observation_statistics([replay.storage])["obs"]
    np.testing.assert_allclose(mean, rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(std, rows.std(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"weight": 1}, "needs a uri"),
        ({"uri": "npz:x", "wieght": 1}, "did you mean 'weight'"),
        ({"uri": "npz:x", "weight": -1}, "weight is -1"),
        ({"uri": "npz:x", "weight": [[10, 1], [0, 1]]}, "growing updates"),
        ({"uri": "npz:x", "top_returns": 0}, "top_returns is 0"),
        ({"uri": "npz:x", "reward": {"factor": 2}}, "scale: NUMBER"),
        ({"uri": "npz:x", "reward": {"clip": 5}}, "scale: NUMBER"),
        ({"uri": "npz:x", "reward": {"clip": [1, -1]}}, "scale: NUMBER"),
        ({"uri": "npz:x", "reward": {"scale": "x"}}, "scale: NUMBER"),
        ({"uri": "npz:x", "weight": "0.5"}, "weight is '0.5'"),
        ({"uri": "npz:x", "weight": None}, "weight is None"),
        ({"uri": "npz:x", "weight": float("nan")}, "weight is nan"),
        ({"uri": "npz:x", "weight": [[0, 1], 5]}, "weight is"),
        ({"uri": "npz:x", "episodes": 3}, "episodes is 3"),
        ({"uri": "npz:x", "min_length": "a"}, "min_length is 'a'"),
        ({"uri": "npz:x", "fraction": True}, "fraction is True"),
        ({"uri": "npz:x", "on_bad": "skip"}, "on_bad is 'skip'"),
    ],
)
def test_a_wrong_source_is_one_clear_error(value, message):
    with pytest.raises(ConfigError, match=message):
        SourceSpec.of(value)
