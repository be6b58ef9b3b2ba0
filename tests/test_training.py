"""Scripts that train a model on a buffer: the calls of the tutorial, and what they promise."""

from __future__ import annotations

import csv
import warnings
from itertools import pairwise
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch

from datamodules.windows import BufferWindows
from lit_wm import create_world_model, run_imagination
from lit_wm.errors import CheckpointError, ConfigError, DataError
from lit_wm.training import ReplayBuffer, held_out_losses, train
from lit_wm.types import Spaces, Spec

NPZ = Path(__file__).parent / "datamodules" / "data" / "npz"
SMALL = {"dreamerv3:debug": {"batch_size": 2, "batch_length": 6}, "tdmpc2:debug": {"batch_size": 4}}
BOTH = pytest.mark.parametrize("name", SMALL)


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.setenv("LITWM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def filled(lengths=(12, 9, 15), width=3, actions=2, terminated=False, seed=0):
    """Observation t of episode e is (e, t, noise ...), its action noise, its reward 100 e + t."""
    rng, buffer = np.random.default_rng(seed), ReplayBuffer(1000)
    for e, steps in enumerate(lengths):
        obs = rng.normal(size=(steps + 1, width)).astype(np.float32)
        obs[:, 0], obs[:, 1] = e, np.arange(steps + 1)
        buffer.add_episode(
            obs, rng.uniform(-1, 1, (steps, actions)), 100.0 * e + np.arange(steps), terminated
        )
    return buffer


def made(name, buffer, **options):
    return create_world_model(name, data=buffer, device="cpu", **options)


def same(left, right):
    return all(torch.equal(v, right.state_dict()[k]) for k, v in left.state_dict().items())


def quietly(model, buffer, steps, **options):
    small = SMALL["tdmpc2:debug" if hasattr(model, "window_steps") else "dreamerv3:debug"]
    return train(model, buffer, steps, progress=False, **small | options)


# --- The scripts of the tutorial -----------------------------------------------------------------------


def test_the_dreamer_script_runs_at_its_full_size():
    rng, buffer = np.random.default_rng(0), ReplayBuffer(200, action_dim=18)
    for _ in range(2):
        frames = rng.integers(0, 256, (25, 3, 64, 64), np.uint8)
        buffer.add_episode(frames, rng.integers(0, 18, 24), rng.normal(size=24), terminated=True)

    model = create_world_model("dreamerv3:size50m", obs_shape=(3, 64, 64), action_dim=18)
    metrics = train(model, buffer, total_steps=2, batch_size=2, batch_length=16)
    assert np.isfinite(list(metrics.values())).all()
    assert metrics["step/grad"] == 2

    state = model.encode(buffer.sample_states(2))
    assert state.deterministic.shape == (2, 4096)
    assert state.stochastic.shape == (2, 32, 32)
    trajectory = model.imagine(state, torch.randint(0, 18, (2, 3)))
    assert model.decode(trajectory.states[-1])["obs"].shape == (2, 3, 64, 64)
    assert trajectory.rewards.shape == (2, 3)
    assert model.q(state, torch.tensor([0, 17])).shape == (2,)


def test_the_tdmpc2_script_runs_at_its_full_size():
    rng, buffer = np.random.default_rng(0), ReplayBuffer(200)
    for _ in range(2):
        buffer.add_episode(rng.normal(size=(25, 39)), rng.uniform(-1, 1, (24, 6)), rng.normal(size=24))

    model = create_world_model("tdmpc2:19m", obs_shape=(39,), action_dim=6, horizon=15)
    metrics = train(model, buffer, total_steps=2, batch_size=2, batch_length=16)
    assert np.isfinite(list(metrics.values())).all()

    state = model.encode(buffer.sample_states(2))
    assert state.deterministic.shape == (2, 768)
    assert state.stochastic is None
    trajectory = run_imagination(model, buffer.sample_states(2), torch.rand(2, 3, 6) * 2 - 1)
    assert trajectory.rewards.shape == (2, 3)
    assert model.q(state, torch.zeros(2, 6)).shape == (2,)


@pytest.mark.parametrize(
    ("name", "file", "steps", "options", "windows"),
    [
        (
            "dreamerv3:debug",
            "recording.npz",
            100,
            {"lr": 3e-3, "warmup": 0},
            {"batch_size": 8, "batch_length": 16},
        ),
        (
            "dreamerv3:debug",
            "atari_breakout.npz",
            30,
            {"lr": 3e-3, "warmup": 0},
            {"batch_size": 4, "batch_length": 12},
        ),
        ("tdmpc2:debug", "recording.npz", 150, {"lr": 3e-3}, {"batch_size": 64}),
    ],
)
def test_held_out_losses_fall_by_a_third(name, file, steps, options, windows):
    whole = ReplayBuffer.load(NPZ / file)
    seen, unseen = (ReplayBuffer(2000, spaces=whole.spaces) for _ in range(2))
    for number, e in enumerate(whole.episodes()):
        (unseen if number == 1 else seen).add_episode(
            e.observation, e.action, e.reward, e.terminated, e.truncated
        )
    model = made(name, seen, **options)
    weights = getattr(model.model, "coefs", None) or model.model.loss_scales

    def total():
        losses = held_out_losses(model, unseen, **windows)
        assert losses == held_out_losses(model, unseen, **windows)  # the same windows each time
        return sum(weights[k] * v for k, v in losses.items())

    before = total()
    train(model, seen, steps, progress=False, **windows)
    assert total() < 0.7 * before


# --- Going on ------------------------------------------------------------------------------------------


@BOTH
def test_two_calls_of_n_updates_equal_one_of_2n(name):
    buffer = filled()
    once, twice, thrice = (made(name, buffer, log_every=2) for _ in range(3))
    quietly(once, buffer, 6)
    for n in (3, 3):
        quietly(twice, buffer, n)
        twice.encode(torch.zeros(1, 3))  # what happens between them plays no part
    assert same(once, twice)
    assert twice.updates == once.updates == 6
    quietly(thrice, buffer, 3)
    thrice.optimizer_states = None  # would they not go on, it showed
    quietly(thrice, buffer, 3)
    assert not same(once, thrice)


@BOTH
def test_a_folder_goes_on_in_another_process_as_if_nothing_had_happened(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer, run = filled(), Path("runs/first")
    once, model = (made(name, buffer, log_every=1) for _ in range(2))
    quietly(once, buffer, 4)
    quietly(model, buffer, 2, folder=run)
    assert {p.name for p in run.iterdir()} == {"checkpoints", "config.yaml", "metrics.csv", "run.json"}
    record = (run / "run.json").read_text()
    model = create_world_model(run, device="cpu")
    quietly(model, buffer, 2, folder=run)
    assert same(once, model)
    with open(run / "metrics.csv") as file:
        assert [row["step/grad"] for row in csv.DictReader(file)] == ["1.0", "2.0", "3.0", "4.0"]
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlruns.db")
    (mine,) = client.search_runs([client.get_experiment_by_name("runs").experiment_id])  # one run, not two
    assert mine.info.run_name == "first"
    assert mine.info.run_id in record
    with pytest.raises(CheckpointError, match="holds a run that stands at update 4, the model at 0\n"):
        quietly(made(name, buffer), buffer, 1, folder=run)


def test_a_folder_whose_run_never_saved_begins_anew(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    buffer, run = filled(), Path("runs/first")

    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 3:
                raise RuntimeError("out of memory")

    model = made("tdmpc2:debug", buffer, log_every=1)
    with pytest.raises(RuntimeError, match="out of memory"):
        quietly(model, buffer, 5, folder=run, callbacks=[Fails()])
    assert (run / "config.yaml").exists()
    assert not list(run.glob("checkpoints/*"))
    quietly(made("tdmpc2:debug", buffer, log_every=1), buffer, 2, folder=run)
    assert create_world_model(run, device="cpu").updates == 2
    with open(run / "metrics.csv") as file:
        assert [row["step/grad"] for row in csv.DictReader(file)] == ["1.0", "2.0"]
    (run / "checkpoints" / "last.ckpt").rename(run / "checkpoints" / "best.ckpt")
    with pytest.raises(CheckpointError, match=r"holds best.ckpt of another run\n  Choose another folder"):
        quietly(model, buffer, 1, folder=run)


def test_optimizers_that_begin_anew_are_said_once(tmp_path):
    buffer, file = filled(), tmp_path / "run" / "checkpoints" / "last.ckpt"
    model = made("tdmpc2:debug", buffer)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model stands")
        quietly(model, buffer, 2, folder=tmp_path / "run", logger=False)
        quietly(create_world_model(file, device="cpu"), buffer, 1)
    saved = torch.load(file, weights_only=True)
    del saved["optimizer_states"]  # as `lit-wm export` writes it
    torch.save(saved, tmp_path / "alone.ckpt")
    model = create_world_model(tmp_path / "alone.ckpt", device="cpu")
    with pytest.warns(UserWarning, match="stands at update 2 without what its optimizers knew.*begin anew"):
        quietly(model, buffer, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="the model stands")
        quietly(model, buffer, 1)


def test_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    buffer = filled()
    quietly(made("tdmpc2:debug", buffer), buffer, 2)
    assert not list(Path().iterdir())


@BOTH
def test_it_is_the_training_step_under_a_trainer(name, capsys):
    """The same updates by hand, with optimizers of torch alone."""
    buffer, seen = filled(), []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            seen.append((trainer.global_step, trainer.max_steps))

    model = made(name, buffer, log_every=2)
    kind, step = type(model), type(model).training_step
    batches = []

    def spy(self, batch, index):
        batches.append(self.draw(batch))
        step(self, batches[-1], index)

    kind.training_step = spy
    try:
        metrics = train(model, buffer, 3, callbacks=[Look()], **SMALL[name])
    finally:
        kind.training_step = step
    assert seen == [(0, 3), (1, 3), (2, 3)]
    assert metrics["step/grad"] == 3
    assert "updates 3/3 100%" in capsys.readouterr().err
    windows = BufferWindows(buffer, SMALL[name].get("batch_length", 4), name.startswith("tdmpc2"), model.seed)
    for number, batch in enumerate(batches):
        expected = windows.batch(SMALL[name]["batch_size"], number)
        assert torch.equal(batch.obs["obs"], expected.obs["obs"])
    assert not torch.equal(batches[0].obs["obs"], batches[1].obs["obs"])


# --- From rows to batches ------------------------------------------------------------------------------


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("within", [False, True])
def test_windows_hold_what_the_buffer_holds(loaded, within, tmp_path):
    lengths = (12, 9, 15)
    buffer = filled(lengths, terminated=True)
    episodes = list(buffer.episodes())
    if loaded:
        buffer.save(tmp_path / "mine.npz")
        buffer = ReplayBuffer.load(tmp_path / "mine.npz")
    windows, crossed, starts = BufferWindows(buffer, 5, within, seed=3), 0, set()
    for number in range(40):
        batch = windows.batch(8, number)
        for b in range(8):
            e, t = batch.obs["obs"][b, :, 0].long(), batch.obs["obs"][b, :, 1].long()
            starts.add((int(e[0]), int(t[0])))
            crossed += int(e[0] != e[-1])
            assert all(
                (f == e0 and s == t0 + 1) or s == 0 for (e0, t0), (f, s) in pairwise(zip(e, t, strict=True))
            )
            for i in range(5):
                here, start = episodes[e[i]], t[i] == 0
                assert torch.equal(batch.obs["obs"][b, i], torch.from_numpy(here.observation["obs"][t[i]]))
                assert batch.is_first[b, i] == (start or (not within and i == 0))  # from a state of zeros
                assert batch.is_last[b, i] == (t[i] == lengths[e[i]])
                if (within and i == 0) or start:
                    continue  # what led here is not used
                assert torch.equal(
                    batch.prev_action["action"][b, i], torch.from_numpy(here.action["action"][t[i] - 1])
                )
                assert batch.reward[b, i] == here.reward[t[i] - 1]
                assert batch.is_terminal[b, i] == (t[i] == lengths[e[i]])
    assert (crossed == 0) == within
    assert len(starts) == (sum(n - 3 for n in lengths) if within else 39 - 4)
    again = BufferWindows(buffer, 5, within, seed=3).batch(8, 39)
    assert torch.equal(again.obs["obs"], batch.obs["obs"])  # draw 39 depends on nothing before it
    assert not torch.equal(windows.batch(8, 39, "report").obs["obs"], batch.obs["obs"])


def test_bounds_of_a_dataset_become_one_and_those_of_nobody_are_refused():
    loaded = ReplayBuffer.load(NPZ / "recording.npz")
    windows = BufferWindows(loaded, 4, True)
    assert windows.batch(64, 0).prev_action["action"].abs().max() <= 1
    buffer = ReplayBuffer(100)
    buffer.add_episode(np.zeros((9, 3)), np.full((8, 1), 2.0), np.zeros(8))
    with pytest.raises(
        DataError, match=r"action 'action' goes up to 2 in ReplayBuffer.*; models need -1 to 1"
    ):
        quietly(made("tdmpc2:debug", buffer), buffer, 1)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("form", ["ring", "mine.npz", "mine", "told"])
def test_bounds_that_are_said_become_one_and_values_beyond_them_stay(form, within, tmp_path):
    rng, ends = np.random.default_rng(0), {"action_low": -2, "action_high": np.array([2.0, 4.0])}
    actions = rng.uniform(-2, 2, (30, 2)).astype("f4")
    actions[3] = [2.6, 5]
    buffer = ReplayBuffer(100, **({} if form == "told" else ends))
    buffer.add_episode(np.arange(31.0)[:, None], actions, np.zeros(30))
    if form != "ring":
        place = tmp_path / form.replace("told", "told.npz")
        buffer.save(place)
        buffer = ReplayBuffer.load(place, **(ends if form == "told" else {}))
    assert np.array_equal(next(buffer.episodes()).action["action"], actions)  # rows keep their units
    expected = (actions.astype(np.float64) - [-2, -2]) / [4, 6] * 2 - 1
    batch, most = BufferWindows(buffer, 5, within).batch(32, 0), 0.0
    for row, first, acted in zip(
        batch.obs["obs"].long(), batch.is_first, batch.prev_action["action"], strict=True
    ):
        for i in range(1, 5):
            if not first[i]:
                np.testing.assert_allclose(acted[i], expected[row[i, 0] - 1], atol=1e-6)
                most = max(most, float(acted[i].max()))
    assert most == pytest.approx(4 / 3)
    drawn = buffer.sample_sequences(32, 4)  # what the verbs take
    told = expected[drawn["observation"].long().squeeze(-1).numpy()]
    np.testing.assert_allclose(drawn["action"], told, atol=1e-6)


def test_bounds_of_several_actions_go_by_name_and_nobodys_are_asked_for(tmp_path):
    spaces = Spaces(
        {"obs": Spec("float32", (1,))}, {k: Spec("float32", (1,)) for k in "ab"}, unbounded=("a", "b")
    )
    buffer = ReplayBuffer(50, spaces=spaces, action_low={"b": 0}, action_high={"b": 10})
    buffer.add_episode(np.zeros((9, 1)), {"a": np.full((8, 1), 0.5), "b": np.full((8, 1), 7.5)}, np.zeros(8))
    batch = BufferWindows(buffer, 5, True).batch(2, 0)
    assert (batch.prev_action["a"][:, 1:] == 0.5).all()
    assert (batch.prev_action["b"][:, 1:] == 0.5).all()
    assert buffer.spaces.unbounded == ("a",)
    plain = ReplayBuffer(50)
    plain.add_episode(np.zeros((9, 1)), np.full((8, 1), 3.0), np.zeros(8))
    plain.save(tmp_path / "plain.npz")
    model = made("tdmpc2:debug", plain)
    for data, call in ((plain, r"ReplayBuffer\("), (tmp_path / "plain.npz", r"ReplayBuffer.load\(")):
        with pytest.raises(
            DataError, match=rf"up to 3.*\n  Say .*: {call}\.\.\., action_low=, action_high=\)"
        ) as e:
            quietly(model, data, 1)
        assert "data.sources" not in str(e.value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"action_low": -1}, "give both of action_low and action_high, or none"),
        ({"action_low": 2, "action_high": 1}, "action_low 2.0 must be below action_high"),
        ({"action_low": -np.inf, "action_high": 1}, "both finite"),
        (
            {"action_low": [1, 2, 3], "action_high": 4},
            "do not fit action 'action'; expected numbers, or",
        ),
        ({"action_low": "-1", "action_high": "1"}, "action_low '-1' and action_high '1' do not fit action"),
        ({"action_low": [0, "a"], "action_high": 1}, "do not fit action 'action'; expected numbers, or"),
        ({"action_low": torch.zeros(2, requires_grad=True), "action_high": 1}, "expected numbers, or arrays"),
        ({"action_low": {1: -2}, "action_high": {1: 2}}, "are of 1; the continuous actions are action"),
        (
            {"action_low": {"gas": 1}, "action_high": {"gas": 2}},
            "are of gas; the continuous actions are action",
        ),
    ],
)
def test_bounds_that_cannot_be_are_refused(bounds, message):
    with pytest.raises(ConfigError, match=message):
        ReplayBuffer(9, **bounds).add_episode(np.zeros((3, 2)), np.zeros((2, 2)), np.zeros(2))


def test_what_act_says_can_be_learnt_from_as_it_is():
    """The loop of a notebook, with actions that lie beyond -1 ... 1 as a Gaussian's do."""
    buffer = ReplayBuffer(100, action_low=-1, action_high=1)
    model = create_world_model("dreamerv3:debug", obs_shape=(3,), action_dim=1, device="cpu")
    state, seen = None, []
    for t in range(20):
        action, state = model.act(torch.zeros(1, 3), state, mode="train")
        seen.append(action["action"][0].numpy())
        buffer.add(np.zeros(3), seen[-1], 0.0, False, t == 19, np.zeros(3))
    assert np.abs(seen).max() > 1
    batch = BufferWindows(buffer, 21, True).batch(1, 0)
    np.testing.assert_array_equal(batch.prev_action["action"][0, 1:], np.stack(seen))
    quietly(model, buffer, 1)


def test_a_copied_last_observation_is_not_learnt():
    buffer = ReplayBuffer(100)
    obs = np.arange(6.0).reshape(6, 1)
    for t in range(6):
        buffer.add(obs[t], np.zeros(1), 0.0, terminated=t == 5)  # o_6 is not said
    batch = BufferWindows(buffer, 7, True).batch(1, 0)
    assert batch.obs["obs"][0, :, 0].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert batch.fake[0].tolist() == [False] * 6 + [True]


# --- What does not fit ---------------------------------------------------------------------------------

MODEL = {"obs_shape": (3,), "action_dim": 2}


@pytest.mark.parametrize(
    ("model", "buffer", "first", "words"),
    [
        (
            {"obs_shape": (4,), "action_dim": 2},
            {},
            "obs",
            [r"model   obs: float32 \(4,\); action: float32 \(2,\)"],
        ),
        (
            {"obs_shape": (3,), "action_dim": 1},
            {},
            "action",
            [r"buffer  obs: float32 \(3,\); action: float32 \(2,\)"],
        ),
        (MODEL | {"discrete": True}, {}, "action", [r"action: 2 classes", r"action: float32 \(2,\)"]),
        ({"obs_shape": {"pose": (3,)}, "action_dim": 2}, {}, "pose", [r"model   pose: float32 \(3,\)"]),
    ],
)
def test_a_buffer_that_does_not_fit_is_one_error_before_anything_starts(
    model, buffer, first, words, tmp_path
):
    model, run = create_world_model("dreamerv3:debug", device="cpu", **model), tmp_path / "run"
    with pytest.raises(DataError, match=f"the buffer does not fit the model, first in '{first}':") as error:
        quietly(model, filled(**buffer), 1, folder=run)
    assert len(str(error.value).splitlines()) == 4
    assert "model   " in str(error.value)
    assert "buffer  " in str(error.value)
    for word in words:
        error.match(word)
    assert model.updates == 0
    assert not run.exists()


def test_images_and_classes_that_do_not_fit_are_named():
    model = create_world_model("dreamerv3:debug", obs_shape=(64, 64, 3), action_dim=18, device="cpu")
    with pytest.raises(DataError, match="first in 'obs'") as error:
        train(model, NPZ / "atari_breakout.npz", 1)
    error.match(
        r"model   obs: uint8 \(64, 64, 3\); action: 18 classes\n  buffer  obs: uint8 \(3, 64, 64\); action: 4"
    )


@pytest.mark.parametrize(
    ("name", "lengths", "options", "message"),
    [
        (
            "dreamerv3:debug",
            (3, 4),
            {"batch_length": None},
            r"a window has 64 steps, but there are 9 observ.*\n.*batch_length=9 fits",
        ),
        (
            "tdmpc2:debug",
            (2,),
            {},
            r"a window has 4 steps, but the longest episode has 3 ob.*\n.*horizon=2 fits",
        ),
        ("tdmpc2:debug", (1,), {"batch_size": 0}, "batch_size is 0; expected a whole number of 1 or more"),
        ("dreamerv3:debug", (5,), {"batch_length": 1}, "batch_length is 1; expected a whole number of 2"),
        (
            "tdmpc2:debug",
            (9,),
            {"batch_length": 8},
            "batch_length is 8; expected 4, one more than the model's horizon",
        ),
    ],
)
def test_windows_that_cannot_be_are_refused(name, lengths, options, message):
    buffer = filled(lengths)
    with pytest.raises((DataError, ConfigError), match=message):
        quietly(made(name, buffer), buffer, 1, **options)


def test_what_fits_is_what_the_error_says():
    buffer = filled((3, 4))
    quietly(made("dreamerv3:debug", buffer), buffer, 1, batch_length=9)
    buffer = filled((2,))
    quietly(made("tdmpc2:debug", buffer, horizon=2), buffer, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"total_steps": 0}, "total_steps is 0; expected a whole number"),
        ({"max_steps": 3}, "max_steps cannot be set: total_steps decides it"),
        ({"accelerator": "gpu"}, r"accelerator cannot be set: create_world_model\(device=...\) decides it"),
        ({"fast_dev_run": True}, "fast_dev_run cannot be set: total_steps decides it"),
        ({"total_steps": True}, "total_steps is True; expected a whole number"),
        ({"batch_size": True}, "batch_size is True; expected a whole number of 1 or more"),
        ({"buffer": [1, 2]}, "the data are a list; expected a ReplayBuffer, a path or the URI of a dataset"),
        ({"precison": 16}, "Trainer have no option 'precison'; did you mean 'precision'"),
        ({"batchsize": 8}, r"option 'batchsize'; did you mean 'batch_size'\?"),
        ({"leraning_rate": 1e-3}, r"'leraning_rate'\n  Those of the model.* lr, are create_world_model's"),
        ({"precision": "16-mixed"}, "precision='16-mixed' is refused: "),
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0 is refused"),
        ({"model": torch.nn.Linear(1, 1)}, "model is a Linear; expected what create_world_model gives"),
    ],
)
def test_what_the_trainer_cannot_do_is_refused(options, message):
    buffer = filled()
    call = {"model": made("tdmpc2:debug", buffer), "buffer": buffer, "total_steps": 1} | options
    with pytest.raises(ConfigError, match=message):
        train(**call)


def test_an_empty_buffer_is_refused_and_so_are_ends_that_the_model_cannot_know():
    spaces = Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("float32", (2,))})
    model = create_world_model("tdmpc2:debug", data=spaces, device="cpu")
    with pytest.raises(DataError, match="there is nothing to train on"):
        quietly(model, ReplayBuffer(10, spaces=spaces), 1)
    with pytest.raises(ConfigError, match=r"plans on beyond it\n  create_world_model\(.*episodic=True\)"):
        quietly(model, filled(terminated=True), 1)
    quietly(made("tdmpc2:debug", filled(terminated=True), episodic=True), filled(terminated=True), 1)


def test_normalisation_is_fitted_to_a_dataset():
    buffer = ReplayBuffer.load(NPZ / "recording.npz")
    model = made("tdmpc2:debug", buffer, normalize=True)
    quietly(model, buffer, 1)
    seen = np.concatenate([e.observation["obs"] for e in buffer.episodes()]).astype(np.float64)
    normal = model.model.obs_dict(torch.from_numpy(seen[None]))["obs"][0]
    assert torch.allclose(normal.mean(0), torch.zeros(34), atol=1e-3)
    with pytest.raises(ConfigError, match="normalize is fitted to a dataset"):
        quietly(made("tdmpc2:debug", filled(), normalize=True), filled(), 1)


def test_bfloat16_is_an_option_and_a_model_stays_on_its_device():
    buffer = filled()
    model = made("dreamerv3:debug", buffer)
    quietly(model, buffer, 1, precision="bf16-mixed")
    assert model.model.compute_dtype == torch.bfloat16
    quietly(model, buffer, 1)  # goes on in it
    assert model.model.compute_dtype == torch.bfloat16
    assert model.device.type == "cpu"


@BOTH
def test_without_rewards_the_world_model_learns_alone_and_says_so(name, tmp_path):
    end = np.arange(20) == 19
    np.savez(tmp_path / "demo.npz", observations=np.random.default_rng(0).normal(size=(20, 3)).astype("f4"),
             actions=np.zeros((20, 2), "f4"), dones=end)  # fmt: skip
    buffer = ReplayBuffer.load(tmp_path / "demo.npz")
    model = made(name, buffer)
    before = {k: v.clone() for k, v in model.model.state_dict().items()}
    with pytest.warns(UserWarning, match="no rewards: the world model learns, and neither actor nor critic"):
        quietly(model, buffer, 3)
    moved = {k.split(".")[0] for k, v in model.model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved
    assert not moved & {"pol", "val", "slowval", "retnorm", "policy", "critic", "target_critic", "scale"}
    assert not moved & {"rew", "reward"}
