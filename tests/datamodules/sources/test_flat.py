from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datamodules.episodes import checked
from datamodules.sources import flat
from datamodules.sources.flat import Ends, FlatSource, Table
from lit_wm.errors import ConfigError, DataError
from lit_wm.types import Spec


class Arrays(FlatSource):
    """Flat arrays in memory instead of a file."""

    def __init__(self, arrays, drop=(), shared_last=False, **options):
        @contextmanager
        def read(_):
            table = Table.find("memory", arrays, drop)
            table.shared_last = shared_last
            yield table

        self.meta = {}
        self.setup([Path("memory")], read, **options)


def steps(n, rng=None):
    rng = rng or np.random.default_rng(0)
    return {
        "observations": rng.standard_normal((n, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (n, 2)).astype(np.float32),
        "rewards": rng.standard_normal(n).astype(np.float32),
    }


def marks(n, ends):
    out = np.zeros(n, bool)
    out[list(ends)] = True
    return out


lengths = st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(lengths, st.booleans(), st.booleans(), st.sampled_from([1, 40, 200, 1 << 20]), st.data())
def test_no_value_is_lost_or_moved(plan, has_next, open_end, block, data):
    n, ends = sum(t for t, _ in plan), np.cumsum([t for t, _ in plan]) - 1
    rng = np.random.default_rng(n)
    arrays = steps(n, rng)
    terminal = [e for e, (_, t) in zip(ends, plan, strict=True) if t and not (open_end and e == n - 1)]
    arrays["terminals"] = marks(n, terminal).astype(data.draw(st.sampled_from([np.float32, bool, np.uint8])))[
        :, None
    ]
    arrays["timeouts"] = marks(n, [e for e in ends if e not in terminal and not (open_end and e == n - 1)])
    if has_next:
        arrays["next_observations"] = rng.standard_normal((n, 3)).astype(np.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "BLOCK", block)
        source = Arrays(arrays, may_be_open=True)
        with pytest.warns(UserWarning, match="truncated") if open_end else pytest.MonkeyPatch.context():
            raw = list(source.episodes())
    assert len(raw) == len(plan)
    start = 0
    for episode, (t, is_terminal) in zip(raw, plan, strict=True):
        rows = slice(start, start + t)
        np.testing.assert_array_equal(episode.observation["obs"][:t], arrays["observations"][rows])
        np.testing.assert_array_equal(episode.action["action"], arrays["actions"][rows])
        np.testing.assert_array_equal(episode.reward, arrays["rewards"][rows])
        assert len(episode.observation["obs"]) == t + has_next
        if has_next:
            np.testing.assert_array_equal(
                episode.observation["obs"][-1], arrays["next_observations"][start + t - 1]
            )
        start += t
        ended = is_terminal and not (open_end and start == n)
        assert episode.terminated.tolist() == [False] * (t - 1) + [ended]
        assert episode.truncated.tolist() == [False] * (t - 1) + [not ended]
    # Without the next observation a truncated episode gives up its last transition, a terminated one none.
    kept = list(checked(source))
    assert sum(e.steps for e in kept) == n - (0 if has_next else sum(not e.terminated[-1] for e in raw))
    assert all(len(e.observation["obs"]) == e.steps + 1 for e in kept)


@pytest.mark.parametrize(
    ("split", "length", "ends", "terminated"),
    [
        (None, None, [3, 6, 9, 14], [False, True, False, False]),
        ("timeouts", None, [3, 9, 14], [False, False, False]),
        ("terminals", None, [6, 14], [True, False]),
        ("length=5", None, [4, 9, 14], [False] * 3),
        (None, 2, [1, 3, 5, 6, 8, 9, 11, 13, 14], [False] * 3 + [True] + [False] * 5),
        ("terminals|length=4", None, [3, 6, 10, 14], [False, True, False, False]),
        ("jump>5", None, [10, 14], [False, False]),
        ("timeouts|jump>5", None, [3, 9, 10, 14], [False] * 4),
    ],
)
def test_rules_for_ends(split, length, ends, terminated):
    arrays = steps(15) | {"terminals": marks(15, [6]), "timeouts": marks(15, [3, 9])}
    arrays["observations"][:11, :2] = 0, 1
    arrays["observations"][11:, :2] = 4, 5  # a jump of 5.66
    arrays["observations"][7, 2] = 100  # not a position
    source = Arrays(arrays, ends=Ends.parse(split, length))
    raw = list(source.episodes())
    assert (np.cumsum([e.steps for e in raw]) - 1).tolist() == ends
    assert [bool(e.terminated[-1]) for e in raw] == terminated
    assert all(not e.terminated[:-1].any() and (e.terminated ^ e.truncated)[-1] for e in raw)
    assert source.report.counts["terminals_ignored"] == (6 not in ends)


def test_jumps_are_found_between_blocks(monkeypatch):
    arrays = steps(50) | {"timeouts": marks(50, [49])}
    arrays["observations"][:, :2] = np.repeat(np.arange(10), 5)[:, None] * 10
    monkeypatch.setattr(flat, "BLOCK", 12 * 5)
    raw = list(Arrays(arrays, ends=Ends.parse("jump>1", None)).episodes())
    assert [e.steps for e in raw] == [5] * 10


def test_both_flags_are_handed_on():
    arrays = steps(6) | {"terminals": marks(6, [2, 5]), "timeouts": marks(6, [5])}
    source = Arrays(arrays)
    assert [(e.terminated[-1], e.truncated[-1]) for e in source.episodes()] == [(True, False), (True, True)]
    assert [bool(e.terminated[-1]) for e in checked(source)] == [True, True]
    assert source.report.counts["both_flags"] == 1


@pytest.mark.parametrize(
    ("columns", "dones_are", "expected"),
    [
        ({"dones": [2, 5]}, "ends", [False, False]),
        ({"done": [2, 5]}, "terminals", [True, True]),
        ({"dones": [2, 5], "truncations": [2]}, "ends", [False, True]),  # the older meaning: either kind
        ({"dones": [2, 5], "terminated": [2]}, "ends", [True, False]),
        ({"dones": [1], "terminations": [2], "truncated": [5]}, "ends", [True, False]),
    ],
)
@pytest.mark.filterwarnings("ignore:.*unknown kind")
def test_done_beside_other_marks(columns, dones_are, expected):
    arrays = steps(6) | {k: marks(6, v) for k, v in columns.items()}
    raw = list(Arrays(arrays, dones_are=dones_are).episodes())
    assert [(e.steps, bool(e.terminated[-1])) for e in raw] == [(3, expected[0]), (3, expected[1])]


def test_shared_last_rows_and_a_row_alone():
    arrays = steps(8) | {"timeouts": marks(8, [2, 3])}
    source = Arrays(arrays, shared_last=True)
    raw = list(source.episodes())
    assert [(e.steps, len(e.observation["obs"])) for e in raw] == [(2, 3), (0, 1), (3, 4)]
    np.testing.assert_array_equal(raw[2].observation["obs"], arrays["observations"][4:])
    np.testing.assert_array_equal(raw[2].action["action"], arrays["actions"][4:7])
    assert [e.steps for e in checked(source)] == [2, 3]
    assert (source.report.counts["empty"], source.report.counts["open_end"]) == (1, 2)


@pytest.mark.parametrize("has_next", [False, True])
def test_an_episode_beyond_memory_is_cut_without_loss(monkeypatch, has_next):
    arrays = steps(20) | {"terminals": marks(20, [16, 19])}
    if has_next:
        arrays["next_observations"] = arrays["observations"] + 1
    monkeypatch.setattr(flat, "LONGEST", 12 * 7)
    source = Arrays(arrays)
    raw = list(source.episodes())
    assert [e.steps for e in raw] == [7, 7, 3, 3]
    assert [len(e.observation["obs"]) for e in raw] == [8, 8, 3 + has_next, 3 + has_next]
    np.testing.assert_array_equal(raw[0].observation["obs"][-1], raw[1].observation["obs"][0])
    assert [bool(e.terminated[-1]) for e in raw] == [False, False, True, True]
    assert (source.report.counts["too_long"], source.report.counts["split"]) == (2, 0)


@pytest.mark.parametrize(
    ("array", "options", "spec"),
    [
        (np.zeros((4, 3)), {}, Spec("float32", (3,))),
        (np.zeros(4, np.float32), {}, Spec("float32", (1,))),
        (np.array([0, 3, 1, 0]), {}, Spec("int32", (), 4)),
        (np.array([[0], [3], [1], [0]]), {}, Spec("int32", (), 4)),
        (np.array([0, 3, 1, 0]), {"classes": 9}, Spec("int32", (), 9)),
        (np.array([0, 3, 1, 0]), {"discrete": False}, Spec("float32", (1,))),
        (np.array([[0, 1], [1, 2], [0, 0], [0, 0]]), {}, Spec("int32", (2,), 3)),
        (np.array([0.0, 2, 1, 0]), {"classes": 3}, Spec("int32", (), 3)),
        (np.eye(4), {"discrete": True}, Spec("int32", (), 4)),
    ],
)
def test_actions_are_inferred_and_read(array, options, spec):
    arrays = steps(4) | {"actions": array, "terminals": marks(4, [3])}
    source = Arrays(arrays, **options)
    assert source.schema.spaces.action == {"action": spec}
    assert source.schema.low == {}
    (episode,) = checked(source)
    expected = np.arange(4) if options.get("discrete") else array.reshape(4, *spec.shape)
    np.testing.assert_array_equal(episode.action["action"], expected)


@pytest.mark.parametrize(
    ("array", "spec"),
    [
        (np.zeros((4, 8, 8, 3), np.uint8), Spec("uint8", (8, 8, 3))),
        (np.zeros((4, 32, 40), np.uint8), Spec("uint8", (32, 40, 1))),
        (np.zeros((4, 8, 9), np.uint8), Spec("float32", (8, 9))),
        (np.array([7, 0, 1, 2]), Spec("int32", (), 8)),
        (np.array([-1, 0, 1, 2]), Spec("float32", (1,))),
        (np.array([0, 0, 1, 5000]), Spec("float32", (1,))),
    ],
)
def test_observations_are_inferred(array, spec):
    source = Arrays(steps(4) | {"observations": array, "terminals": marks(4, [3])})
    assert source.schema.spaces.obs == {"obs": spec}
    (episode,) = checked(source)
    np.testing.assert_array_equal(episode.observation["obs"][:4], array.reshape(4, *spec.shape))


def test_nested_observations_and_drop():
    arrays = steps(4) | {"terminals": marks(4, [3])}
    whole = arrays.pop("observations")
    arrays |= {"observations/left/a": whole, "observations/b": whole[:, :1]}
    arrays |= {f"next_observations/{k}": arrays[f"observations/{k}"] * 2 for k in ("left/a", "b")}
    (episode,) = checked(Arrays(arrays))
    assert list(episode.observation) == ["left/a", "b"]
    np.testing.assert_array_equal(episode.observation["b"], np.r_[whole[:, :1], 2 * whole[-1:, :1]])
    (episode,) = checked(Arrays(arrays, drop=["b"]))
    np.testing.assert_array_equal(episode.observation["left/a"][-1], 2 * whole[-1])
    assert list(episode.observation) == ["left/a"]
    with pytest.raises(ConfigError, match="drop names 'c'"):
        Arrays(arrays, drop=["c"])


@pytest.mark.parametrize(("channels", "actions"), [(1, 1), (1, 2), (2, 1)])
def test_columns_of_width_1_beside_images_are_steps(channels, actions):
    end = marks(20, [9, 19])[:, None]
    arrays = {"observations": np.zeros((20, channels, 64, 64), np.uint8), "actions": np.ones((20, actions)),
              "rewards": np.arange(20.0)[:, None], "terminals": end, "timeouts": end & False}  # fmt: skip
    episodes = list(checked(Arrays(arrays, last_obs="repeat")))
    assert [e.reward.tolist() for e in episodes] == [list(range(10)), list(range(10, 20))]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"actions": None},
            r"memory has no actions; found: observations, rewards, terminals.\n.*state, actions\|action, ",
        ),
        ({"observations": None}, "memory has no observations"),
        ({"rewards": np.zeros(9)}, "lengths differ: observation 10, action 10, reward 9, terminated 10"),
        ({"terminals": np.float32(1)}, "lengths differ: .* terminated 0"),
        ({"terminals": np.full(10, 0.5)}, "row 0 is 0.5; expected 0 or 1"),
        ({"terminals": np.full(10, np.nan)}, "row 0 is nan"),
        ({"terminals": np.zeros((10, 2))}, "expected one 0 or 1 per step"),
        ({"actions": np.array(["a"] * 10)}, "type <U1; expected numbers"),
        ({"actions": np.full(10, -1)}, "integers from -1 to -1; expected classes from 0"),
        ({"actions": np.full(10, 300)}, "integers from 300 to 300; .*\n.*discrete=false"),
        (
            {"terminals": np.zeros(10, bool)},
            "no episode end found in 10 steps; give episode_length= or split=",
        ),
        (
            {k: np.zeros((0, 2)) for k in ("observations", "actions", "rewards", "terminals")},
            "holds no steps",
        ),
    ],
)
def test_what_cannot_be_read_is_said(change, message):
    arrays = {k: v for k, v in (steps(10) | {"terminals": marks(10, [9])} | change).items() if v is not None}
    with pytest.raises(DataError, match=message):
        list(Arrays(arrays).episodes())


def test_wrong_options_are_said():
    arrays = steps(4) | {"terminals": marks(4, [3])}
    for split, length in (("timeout", None), ("jump>", None), ("length=0", None), (None, 0), (None, "x")):
        with pytest.raises(ConfigError, match=r"split|episode_length"):
            Ends.parse(split, length)
    with pytest.raises(ConfigError, match="last_obs is 'x'"):
        Arrays(arrays, last_obs="x")
    with pytest.raises(ConfigError, match="dones_are"):
        Arrays(arrays, dones_are="x")
    with pytest.raises(
        DataError, match="no timeouts to split by; found: observation, action, reward, terminated"
    ):
        list(Arrays(arrays, ends=Ends.parse("timeouts", None)).episodes())
    with pytest.raises(ConfigError, match="needs a single vector"):
        list(
            Arrays(
                arrays | {"observations": np.zeros((4, 8, 8, 3), np.uint8)}, ends=Ends.parse("jump>1", None)
            ).episodes()
        )


def test_without_rewards():
    source = Arrays({k: v for k, v in steps(4).items() if k != "rewards"} | {"terminals": marks(4, [3])})
    assert source.meta["no_reward"] is True
    assert next(checked(source)).reward is None


def following(n=20, ends=(4, 11, 19)):
    """Flat columns whose next observations are right."""
    arrays, true = steps(n), np.random.default_rng(1).standard_normal((n, 3)).astype(np.float32)
    inside = np.setdiff1d(np.arange(n), ends)
    true[inside] = arrays["observations"][inside + 1]
    return arrays | {"terminals": marks(n, ends), "next_observations": true}, np.array(ends)


@pytest.mark.parametrize("block", [1, 150, 1 << 25])
def test_next_observations_that_are_none(block, monkeypatch):
    monkeypatch.setattr(flat, "BLOCK", block)
    arrays, ends = following()
    source = Arrays(arrays)
    assert [e.observation["obs"][-1].tolist() for e in source.episodes()] == arrays["next_observations"][
        ends
    ].tolist()
    assert not source.report.counts
    zero = arrays | {"next_observations": arrays["next_observations"].copy()}
    zero["next_observations"][ends] = 0
    same = arrays | {"next_observations": arrays["observations"]}
    for wrong, what in ((zero, "zero at the end of every episode"), (same, "equal to the observations")):
        with pytest.raises(DataError, match=f"{what}.*\n.*last_obs=terminal ignores"):
            list(checked(Arrays(wrong), "skip_episode"))
        assert [e.fake_last for e in checked(Arrays(wrong, last_obs="terminal"))] == [True] * 3
    zero["next_observations"][ends[0]] = 1
    source = Arrays(zero)
    list(source.episodes())
    assert source.report.counts == {"next_zero": 2}
    black = {k: v for k, v in zero.items() if "obs" not in k}  # a true frame may be black
    black |= {k: np.full((20, 2, 2, 3), 9, np.uint8) for k in ("observations", "next_observations")}
    black["observations"][::2], black["next_observations"][1::2] = 0, 0
    list(Arrays(black).episodes())


def test_next_observations_that_do_not_fit():
    arrays, _ = following()
    arrays["next_observations"][[6, 13]] += 1
    source = Arrays(arrays)
    list(source.episodes())
    assert source.report.counts == {"next_differs": 2}
    assert "in 2 of 17 rows" in source.report.notes[0]
    for other in (np.zeros((20, 4)), np.full((20, 3), b"x")):
        with pytest.raises(DataError, match="next observation 'obs' is .* the observation float32"):
            Arrays(arrays | {"next_observations": other})


def test_a_jump_with_a_signed_exponent():
    assert Ends.parse("jump>1e+5", None).jump == Ends.parse("jump>1e5", None).jump == 1e5
