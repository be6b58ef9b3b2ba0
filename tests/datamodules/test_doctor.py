"""Every finding from data with that defect alone, and none from data without it."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from datamodules.cache import ingest
from datamodules.doctor import CHECKS, MODELS, Doctor, Finding, discounted, examine
from datamodules.episodes import Episode, Schema, Source
from datamodules.sources import open_source
from datamodules.survey import Sample, Survey
from lit_wm.types import Spaces, Spec

DATA = Path(__file__).parent / "data"
OBS, ACTION, CLASS = Spec("float32", (3,)), Spec("float32", (2,)), Spec("int32", (), 5)


class Made(Source):
    """Twelve episodes of 40 to 51 random steps within bounds of -1 and 1; every other one terminates."""

    def __init__(
        self,
        change: Callable[[int, Episode], Episode | None] | None = None,
        spaces: Spaces | None = None,
        bounds: float | None = 1.0,
        **meta: Any,
    ):
        spaces = spaces or Spaces({"obs": OBS}, {"action": ACTION}, 60)
        known = {k: np.ones(s.shape) for k, s in spaces.action.items() if not s.is_discrete and bounds}
        self.schema = Schema(
            spaces, {k: -v * bounds for k, v in known.items()}, {k: v * bounds for k, v in known.items()}
        )
        self.meta, self.files, self.change = {"env_id": "Made-v0", **meta}, [], change or (lambda i, e: e)

    def episodes(self) -> Iterator[Episode]:
        for i in range(12):
            rng, steps = np.random.default_rng(i), 40 + i

            def some(spec: Spec, count: int, rng: np.random.Generator = rng) -> np.ndarray:
                if spec.classes or spec.dtype == "uint8":
                    return rng.integers(0, spec.classes or 256, (count, *spec.shape)).astype(spec.dtype)
                return rng.uniform(-0.9, 0.9, (count, *spec.shape)).astype(np.float32)

            obs = {k: some(s, steps + 1) for k, s in self.schema.spaces.obs.items()}
            action = {k: some(s, steps) for k, s in self.schema.spaces.action.items()}
            end, no = np.arange(steps) == steps - 1, np.zeros(steps, bool)
            flags = (no, end) if i % 2 else (end, no)
            reward = rng.normal(size=steps).astype(np.float32)
            if (made := self.change(i, Episode(obs, action, reward, *flags, f"episode {i}"))) is not None:
                yield made


def findings(source: Source, **options: Any) -> dict[str, Finding]:
    found = examine([Doctor("made:x", source, **options)])
    return {f.check: f for f in found if f.check != "episodic"}


def test_nothing_is_found_where_nothing_is_wrong():
    assert examine([Doctor("made:x", Made(), ["dreamerv3"])]) == []
    (note,) = examine([Doctor("made:x", Made())])
    assert (note.check, note.found, note.fix) == (
        "episodic",
        "6 of 12 episodes terminate",
        "for TD-MPC2: --model.episodic true",
    )


def steps(count: int) -> Callable[[int, Episode], Episode]:
    """Episodes of ``count`` steps with the end flags of the others."""

    def cut(i: int, e: Episode) -> Episode:
        flags = [np.append(np.zeros(count - 1, bool), x[-1]) for x in (e.terminated, e.truncated)]
        again = -(-count // e.steps)
        obs = {k: np.concatenate([v] * (again + 1))[: count + 1] for k, v in e.observation.items()}
        act = {k: np.concatenate([v] * again)[:count] for k, v in e.action.items()}
        return replace(e, observation=obs, action=act, reward=np.tile(e.reward, again)[:count],
                       terminated=flags[0], truncated=flags[1])  # fmt: skip

    return cut


def only(first: int, change: Callable[[Episode], Episode]) -> Callable[[int, Episode], Episode]:
    return lambda i, e: change(e) if i < first else e


def with_action(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, Episode], Episode]:
    return lambda i, e: replace(e, action={"action": f(e.action["action"])})


def with_obs(f: Callable[[np.ndarray], np.ndarray]) -> Callable[[int, Episode], Episode]:
    return lambda i, e: replace(e, observation={"obs": f(e.observation["obs"])})


def put(array: np.ndarray, place: Any, value: Any) -> np.ndarray:
    array = np.array(array)
    array[place] = value
    return array


def image(*shape: int) -> Spaces:
    return Spaces({"obs": Spec("uint8", shape)}, {"action": ACTION}, 60)


def ended(e: Episode, terminated: bool) -> Episode:
    end = e.terminated | e.truncated
    return replace(e, terminated=end & terminated, truncated=end & (not terminated))


def without_steps(e: Episode) -> Episode:
    assert e.reward is not None
    obs, action = ({k: v[:n] for k, v in part.items()} for n, part in ((1, e.observation), (0, e.action)))
    return Episode(obs, action, e.reward[:0], e.terminated[:0], e.truncated[:0], e.where)


no_limit = Spaces({"obs": OBS}, {"action": ACTION})


def noted(name: str) -> Source:
    """A source whose reader noticed something."""
    source = Made()
    source.report.count(name, "what was noticed", 2)
    return source


CASES: list[tuple[str, Source, str, str]] = [
    ("non_finite", Made(only(3, lambda e: replace(e, reward=put(e.reward, 7, np.nan)))), "error",
     "3 episodes; the first: episode 0: reward, row 7 is nan; 1 values"),
    ("lengths_differ", Made(only(1, lambda e: replace(e, reward=e.reward[1:]))), "error",
     "episode 0: the lengths differ: observation obs 41, action action 40, reward 39"),
    ("shape", Made(only(1, lambda e: replace(e, observation={"obs": e.observation["obs"][:, :2]}))), "error",
     "episode 0: observation 'obs' has the shape (.., 2), its space says (3)"),
    ("early_end", Made(only(1, lambda e: replace(e, terminated=put(e.terminated, 3, True)))), "error",
     "terminated at step 3, but 36 more steps follow"),
    ("type", Made(only(1, lambda e: replace(e, reward=e.reward.astype("S8")))), "error",
     "reward has the type |S8"),
    ("nothing", Made(lambda i, e: None), "error", "no episode with a step"),
    ("few_episodes", Made(lambda i, e: e if i < 2 else None), "note", "episodes: 2, of 81 steps together"),
    ("few_episodes", Made(lambda i, e: None if i else steps(70)(i, e), no_limit), "warning",
     "episodes: 1, of 70 steps together"),
    ("wrong_length", Made(spaces=replace(no_limit, episode_length=49)), "warning",
     "2 episodes are longer than the time limit of 49 steps, up to 51"),
    ("terminal_is_limit", Made(steps(60)), "", ""),  # half of them are truncated there
    ("terminal_is_limit", Made(lambda i, e: ended(steps(60)(i, e), True)), "warning",
     "12 episodes terminate after exactly 60 steps, the time limit"),
    ("terminal_is_limit", Made(lambda i, e: ended(steps(100)(i, e), True), no_limit), "warning",
     "12 episodes terminate after exactly 100 steps, which looks like"),
    ("terminal_is_limit", Made(lambda i, e: ended(steps(37)(i, e), True), no_limit), "", ""),
    ("no_terminations", Made(lambda i, e: ended(e, False)), "note", "none of 12 episodes terminates"),
    ("no_terminations", Made(lambda i, e: ended(e, False), env_id="HalfCheetah-v5"), "", ""),
    ("short_episodes", Made(only(2, lambda e: steps(2)(0, e))), "warning",
     "2 of 12 episodes have fewer than the 4 observations of a TD-MPC2 window, the longest has 52"),
    ("no_window", Made(steps(2)), "warning", "12 of 12 episodes; a window of TD-MPC2 has 4 observations"),
    ("no_rewards", Made(lambda i, e: replace(e, reward=None)), "warning", "the source has no rewards"),
    ("constant_reward", Made(lambda i, e: replace(e, reward=0 * e.reward)), "warning",
     "all 546 rewards are 0"),
    ("constant_reward", Made(lambda i, e: ended(replace(e, reward=0 * e.reward - 1), False)), "note",
     "all 546 rewards are -1"),
    # Where episodes terminate, a constant reward says something.
    ("constant_reward", Made(lambda i, e: replace(e, reward=0 * e.reward + 1)), "", ""),
    ("two_hot_range", Made(lambda i, e: replace(e, reward=1e5 * e.reward)), "warning",
     "the bins of TD-MPC2 to 2.203e+04"),
    ("two_hot_resolution", Made(lambda i, e: replace(e, reward=1e-4 * e.reward)), "warning",
     "of the distance of two"),
    ("unbounded_action", Made(with_action(lambda a: 3 * a), bounds=None), "warning", "values up to 2.7"),
    ("unbounded_action", Made(bounds=None), "", ""),
    ("action_range", Made(with_action(lambda a: put(a, (3, 1), 1.5))), "warning",
     "to 1.5, the space says -1 to 1 (12 values)"),
    ("narrow_action", Made(bounds=50.0), "warning", "fill 1.8% of their bounds"),
    ("constant_action", Made(with_action(lambda a: put(a, np.s_[:, 1], 0.25))), "warning",
     "element 1 never changes"),
    ("unused_classes", Made(with_action(lambda a: a % 3), Spaces({"obs": OBS}, {"action": CLASS}, 60)),
     "note", "never chosen: 3, 4 of 5 classes"),
    ("constant_column", Made(with_obs(lambda o: put(o, np.s_[:, 2], 7))), "note",
     "element 2 of 3 never changes"),
    ("image_type", Made(spaces=Spaces({"obs": Spec("float32", (20, 20, 3))}, {"action": ACTION}, 60)),
     "warning", "float32 (20, 20, 3)"),
    ("image_layout", Made(spaces=image(20, 24, 32)), "warning", "shape (20, 24, 32): which axis"),
    ("image_values", Made(with_obs(lambda o: o % 2), image(20, 20, 3)), "warning", "pixels are 0 to 1"),
    ("image_values", Made(spaces=image(3, 20, 20)), "", ""),
    ("black_frames", Made(with_obs(lambda o: put(o, slice(20), 0)), image(20, 20, 3)), "warning",
     "240 of 558 frames are all black"),
    ("black_frames", Made(with_obs(lambda o: put(o, 0, 0)), image(20, 20, 3)), "note", "12 of 558 frames"),
    ("mixed_obs", Made(spaces=Spaces({"state": OBS} | image(32, 32, 3).obs, {"action": ACTION}, 60)),
     "warning", "obs, beside state"),
    ("lossy_images", Made(spaces=image(32, 32, 3), lossy_images=True), "note", "JPEG"),
    ("cast", Made(lambda i, e: replace(e, observation={"obs": np.float64(e.observation["obs"])})), "note",
     "12 arrays"),
    ("both_flags", Made(lambda i, e: replace(e, truncated=e.terminated | e.truncated)), "note", "6 ends are"),
    ("no_end_flag", Made(lambda i, e: replace(e, truncated=e.truncated & False)), "note",
     "6 ends are neither"),
    ("split", Made(only(2, lambda e: replace(e, truncated=put(e.truncated, 9, True)))), "warning",
     "2 truncations in the middle of an episode; the first: episode 0: truncated at step 9"),
    *((name, noted(name), "warning", "2") for name in (
        "next_zero", "next_differs", "too_long", "missing_files", "unreadable_chunks", "no_start", "jumps")),
    ("counts", noted("counts"), "warning", "what was noticed"),
    ("empty", Made(only(1, without_steps)), "note", "1 episodes"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "source", "severity", "found"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_each_defect_is_found_and_no_other(check: str, source: Source, severity: str, found: str):
    seen = findings(source)
    if not severity:
        assert check not in seen
        return
    assert (seen[check].severity, seen[check].where[:6]) == (severity, "made:x")
    assert found in seen[check].found
    also = {
        "few_episodes",
        "cast",
        "short_episodes",
        "terminal_is_limit",
        "two_hot_resolution",
        "no_terminations",
    }
    assert {k for k, f in seen.items() if f.severity != "note"} - {check} <= also
    assert all((f.meaning and f.fix and "{" not in f.where) for f in seen.values())


def test_every_check_is_tested():
    here = {case[0] for case in CASES} | {"episodic"}
    later = {
        "unreadable",
        "classes",
        "duplicates",
        "reward_shift",
        "lost_reward",
        "unused_arrays",
        "fake_last",
        "last_dropped",
        "noticed",
        "dones",
        "no_end",
        "open_end",
        "spaces",
        "bounds",
    }
    assert here | later == set(CHECKS)
    assert not here & later


@pytest.mark.parametrize("model", MODELS)
def test_a_model_asked_for_makes_its_limits_errors(model: str):
    huge = Made(lambda i, e: replace(e, reward=np.float32(1e9) * e.reward))
    seen = findings(huge, models=[model])["two_hot_range"]
    assert seen.severity == "error"
    scale = float(seen.fix.split("scale: ")[1].split("}")[0])
    again = Made(lambda i, e: replace(e, reward=np.float32(1e9 * scale) * e.reward))
    assert "two_hot_range" not in findings(again, models=[model])  # the fix mends it
    assert "batch" in findings(Made(), models=[model], batch_length=10_000)["no_window"].fix


def test_the_bins_are_those_of_the_models():
    from lit_wm.distributions import symexp_bins
    from lit_wm.functional import symlog
    from lit_wm.tdmpc2 import TDMPC2Module

    bins = symexp_bins(255)
    dreamer = MODELS["dreamerv3"]
    assert bins[-1].item() == pytest.approx(dreamer.top, rel=1e-5)
    assert symlog(bins).diff()[0].item() == pytest.approx(dreamer.spacing, rel=1e-3)
    import inspect

    o = {k: p.default for k, p in inspect.signature(TDMPC2Module.__init__).parameters.items()}
    tdmpc2 = MODELS["tdmpc2"]
    assert np.log1p(tdmpc2.top) == pytest.approx(o["vmax"])
    assert tdmpc2.spacing == pytest.approx((o["vmax"] - o["vmin"]) / (o["num_bins"] - 1))
    assert tdmpc2.discount(200) == pytest.approx((200 / 5 - 1) / (200 / 5))
    assert tdmpc2.discount(10_000) == o["discount_max"]


def test_discounted_returns():
    reward = np.random.default_rng(0).normal(size=300)
    want, value = [], 2.5
    for r in reward[::-1]:
        want.append(value := r + 0.97 * value)
    np.testing.assert_allclose(discounted(reward, 0.97, 2.5), want[::-1], rtol=1e-9)


class Shifted(Source):
    """Another source with its rewards stored ``by`` steps later."""

    def __init__(self, source: Source, by: int):
        self.source, self.by = source, by
        self.schema, self.meta, self.files = source.schema, source.meta, source.files
        self.last_obs = source.last_obs

    def episodes(self) -> Iterator[Episode]:
        for e in self.source.episodes():
            assert e.reward is not None
            yield replace(e, reward=np.roll(np.asarray(e.reward), self.by))


@pytest.mark.parametrize(("by", "way"), [(-1, "early"), (0, ""), (1, "late")])
def test_rewards_one_step_off_are_suspected(by: int, way: str):
    cheetah = f"hdf5:{DATA}/d4rl/halfcheetah_scripted-v0-notimeouts.hdf5?episode_length=300"
    seen = findings(Shifted(open_source(cheetah), by))
    assert ("reward_shift" in seen) == bool(way)
    if way:
        assert f"one step too {way}" in seen["reward_shift"].meaning


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("kind", ["noise", "rare"])
def test_rewards_that_nothing_predicts_are_not_suspected(seed: int, kind: str):
    def change(i: int, e: Episode) -> Episode:
        rng = np.random.default_rng([seed, i])
        return replace(e, reward=rng.normal(size=e.steps) if kind == "noise" else rng.random(e.steps) < 0.02)

    assert "reward_shift" not in findings(Made(change))


@pytest.mark.parametrize(
    "uri",
    ["minari:{}/minari/pendulum/scripted-v0", "minari:{}/minari/cartpole/mixed-v0", "npz:{}/dreamer_chunks"],
)
def test_good_sets_raise_neither_errors_nor_warnings(uri: str):
    assert {f.severity for f in findings(open_source(uri.format(DATA))).values()} <= {"note"}


def test_duplicates_and_final_observations():
    seen = findings(open_source(f"tdmpc2:{DATA}/tdmpc2/*.pt"))
    assert seen["duplicates"].found == "5 of 14 episodes are equal to another one, e.g. 9 to 4"
    assert (
        "episodes without their last observation: 6"
        in findings(open_source(f"npz:{DATA}/npz/recording.npz"))["last_dropped"].found
    )
    ends = findings(open_source(f"npz:{DATA}/npz/recording.npz?dones_are=terminals"))
    assert ends["fake_last"].found.startswith("6 episodes end with a copy")


def test_a_warning_of_a_reader_is_one_finding(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    columns = {"observations": np.arange(60)[:, None] * 1.0, "actions": np.zeros((60, 1))}
    seen = findings(open_source(f"npz:{DATA}/npz/recording.npz"))
    assert seen["dones"].severity == "warning"
    assert "dones are ends of unknown kind" in seen["dones"].found
    assert "dones_are=terminals" in seen["dones"].fix
    np.savez(tmp_path / "a.npz", rewards=np.arange(60.0), **columns)
    bare = findings(open_source(f"npz:{tmp_path}/a.npz"))
    assert "no episode end found in 60 steps" in bare["no_end"].found
    assert "episode_length" in bare["no_end"].fix
    assert not {"noticed", "no_terminations"} & (seen.keys() | bare.keys())
    assert not [f for f in bare.values() if "dones_are" in f.fix]
    assert not recwarn


def test_a_limit_that_is_no_number_is_none():
    spaces = Spaces({"obs": OBS}, {"action": ACTION}, "200")  # type: ignore[arg-type]
    assert (
        findings(Made(spaces=spaces)).keys()
        == findings(Made(spaces=replace(spaces, episode_length=None))).keys()
    )


def test_what_only_discrete_and_one_hot_data_can_do_wrong():
    spaces = Spaces({"obs": OBS}, {"action": Spec("int32", (), 3)}, 60)
    seen = findings(Made(with_action(lambda a: a + 1), spaces))["classes"]
    assert seen.severity == "error"
    assert (
        "12 episodes; the first: episode 0: action 'action' holds 1 to 3; expected classes 0 to 2"
        in seen.found
    )
    assert "--on-bad skip_episode" in seen.fix


def test_rewards_that_were_left_out_are_no_constant_reward(tmp_path: Path):
    """Three drives with a reward at the goal only, as docs/offline.md makes them."""
    end = np.arange(60) % 20 == 19
    rng = np.random.default_rng(0)
    columns = {"observations": rng.normal(size=(60, 3)), "actions": rng.uniform(-1, 1, (60, 2))}
    np.savez(tmp_path / "a.npz", **columns, rewards=end * 1.0, dones=end)
    uri = f"npz:{tmp_path}/a.npz"
    seen = findings(open_source(uri))
    assert "constant_reward" not in seen
    assert "3 episodes are left out" in seen["lost_reward"].found
    assert "dones_are=terminals" in seen["lost_reward"].fix
    assert "last_obs=repeat" in seen["lost_reward"].fix
    with pytest.warns(UserWarning, match="dones are ends"):
        cache = ingest(uri, tmp_path / "caches")
    assert "lost_reward" in findings(open_source(f"rows:{cache.folder}"))
    assert "lost_reward" not in findings(open_source(f"{uri}?dones_are=terminals"))


def test_episodes_that_shall_be_left_out_are_no_error(tmp_path: Path):
    """A NaN in an observation also differs from any next observation."""
    rng, end = np.random.default_rng(0), np.arange(200) % 20 == 19
    seen = rng.normal(size=(201, 3))
    columns = {"observations": seen[:-1].copy(), "next_observations": seen[1:]}
    columns["observations"][25, 1] = np.nan
    columns |= {"actions": rng.uniform(-1, 1, (200, 2)), "rewards": rng.normal(size=200), "terminals": end}
    np.savez(tmp_path / "a.npz", **columns)
    found = findings(open_source(f"npz:{tmp_path}/a.npz"), on_bad="skip_episode")
    assert found["non_finite"].severity == "warning"
    assert found["non_finite"].found.startswith("left out: ")
    assert "skip_episode" not in found["non_finite"].fix
    assert not {"next_differs", "nothing"} & set(found)
    broken = Made(lambda i, e: replace(e, reward=put(e.reward, 7, np.nan)))
    assert findings(broken, on_bad="skip_episode")["nothing"].severity == "error"


def test_arrays_that_nobody_reads_are_named(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    columns = {"observations": np.zeros((9, 3)), "actions": np.zeros((9, 1)), "terminals": np.arange(9) == 8}
    np.savez(tmp_path / "a.npz", **columns, qpos=np.zeros(9))
    found = findings(open_source(f"npz:{tmp_path}/a.npz"))["unused_arrays"].found
    assert found.endswith("a.npz: arrays that are not read: qpos")
    assert not recwarn
    np.savez(tmp_path / "b.npz", **columns, reward_s=np.zeros(9))
    with pytest.warns(UserWarning, match="not read: reward_s; did you mean 'rewards' by 'reward_s'"):
        assert "unused_arrays" in findings(open_source(f"npz:{tmp_path}/b.npz"))


def test_several_sources_are_compared():
    wide = Spaces({"obs": Spec("float32", (5,))}, {"action": ACTION}, 60)
    doctors = [Doctor("a", Made()), Doctor("b", Made(spaces=wide)), Doctor("c", Made(bounds=2.0))]
    assert "bounds" not in {f.check for f in examine(doctors)}  # each is rescaled by its own
    doctors.append(Doctor("d", Made(bounds=None)))
    found = {f.check: f for f in examine(doctors)}
    assert found["spaces"].where == "a, b, c, d"
    assert "b: obs float32 [5]" in found["spaces"].found
    assert "pad: true" in found["spaces"].fix
    assert found["bounds"].severity == "warning"
    assert found["bounds"].found == "d does not say the bounds of its actions; others do: c: -2 to 2"
    same = [Doctor("a", Made()), Doctor("d", Made(bounds=None))]  # in -1 to 1 both
    assert not {"spaces", "bounds"} & {f.check for f in examine(same)}


def test_damaged_files_are_findings(tmp_path: Path):
    path = tmp_path / "a.hdf5"
    with h5py.File(path, "w") as file:
        for name, width in (("observations", 3), ("actions", 2)):
            file.create_dataset(name, data=np.random.default_rng(0).random((4000, width), np.float32),
            chunks=(100, width),
                                compression="gzip")  # fmt: skip
        file["terminals"] = np.arange(4000) % 50 == 49
    content = bytearray(path.read_bytes())
    content[30_000:33_000] = bytes(3000)
    path.write_bytes(content)
    seen = findings(open_source(f"hdf5:{path}"))["unreadable"]
    assert (seen.severity, "cannot be read" in seen.found) == ("error", True)
    cache = ingest(f"minari:{DATA}/minari/pendulum/arrow-v0", tmp_path / "caches")
    column = cache.folder / "observation.memmap"
    column.chmod(0o644)
    column.write_bytes(b"x" + column.read_bytes()[1:])
    assert "do not match their checksum" in findings(open_source(f"rows:{cache.folder}"))["unreadable"].found


def test_a_cache_tells_what_its_source_was_like(tmp_path: Path):
    with pytest.warns(UserWarning, match="dones are ends"):
        cache = ingest(f"npz:{DATA}/npz/recording.npz", tmp_path)
    seen = findings(open_source(f"rows:{cache.folder}"))
    assert "last_dropped" in seen
    assert "dones are ends of unknown kind" in seen["dones"].found


@pytest.mark.parametrize("size", [10, 1000])
def test_statistics_are_those_of_numpy(size: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("datamodules.survey._SAMPLE", 12 * size)  # bytes: all rows, or 256 of them
    spaces = Spaces(
        {"v": OBS, "i": Spec("uint8", (4, 5, 3)), "c": Spec("int32", (2,), 4)}, {"action": ACTION}, 60
    )
    source = Made(spaces=spaces)
    survey = Survey(source.schema)
    for e in source.episodes():
        survey.add(e)
    plain = json.loads(json.dumps(survey.to_plain()))
    episodes = list(source.episodes())
    assert (plain["episodes"], plain["steps"]) == (12, sum(e.steps for e in episodes))
    v, i, c = (np.concatenate([e.observation[k] for e in episodes]) for k in "vic")
    for name, value, axis in (("observation v", v, 0), ("observation i", i, None),
                              ("reward", np.concatenate([e.reward for e in episodes]), None)):  # fmt: skip
        got = plain["entries"][name]
        for key in ("mean", "std", "min", "max"):
            want = getattr(value.astype(np.float64), key)(axis)
            np.testing.assert_allclose(got[key], want, rtol=1e-6, err_msg=f"{name} {key}")
        tolerance = 0 if size == 1000 or name == "observation i" else 0.4
        for key, q in (("q01", 1), ("q50", 50), ("q99", 99)):
            want = np.percentile(
                value, q, axis, method="inverted_cdf" if name == "observation i" else "linear"
            )
            np.testing.assert_allclose(got[key], want, rtol=1e-5, atol=tolerance)
    counts = plain["entries"]["observation c"]["classes"]
    assert counts == [[int((c[:, k] == x).sum()) for x in range(4)] for k in range(2)]
    assert plain["entries"]["return"]["min"] == pytest.approx(min(e.reward.sum() for e in episodes), rel=1e-5)
    assert plain["entries"]["length"]["max"] == 51
    returns = [e.reward.sum(dtype=np.float64) for e in episodes]  # of the sample, as evaluations say it
    assert plain["entries"]["return"]["std"] == pytest.approx(np.std(returns, ddof=1))


def test_a_sample_is_uniform_and_bounded():
    hits = np.zeros(1000)
    for seed in range(30):
        sample = Sample(100)
        sample._rng = np.random.default_rng(seed)
        for start in range(0, 1000, 50):
            sample.add(50, lambda index, start=start: start + index[:, None])
            assert sum(map(len, sample._rows)) <= 250
        rows = sample.rows[:, 0]
        assert len(set(rows.tolist())) == len(rows) == 100
        hits[rows] += 1
    assert hits.reshape(10, 100).sum(1) == pytest.approx(np.full(10, 300), abs=70)
