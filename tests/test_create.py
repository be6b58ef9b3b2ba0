"""One call from a name and two shapes to a model."""

from __future__ import annotations

import inspect
import warnings
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary
from tensordict import TensorDict

from lit_wm import DreamerV3Module, Spaces, TDMPC2Module, create_world_model
from lit_wm.errors import CheckpointError, ConfigError, DataError, EnvError
from lit_wm.noise import NoiseStreams
from lit_wm.presets import DREAMERV3_PARAMETERS_IMAGE, TDMPC2_PARAMETERS
from lit_wm.training import ReplayBuffer, train
from lit_wm.types import Spec
from lit_wm.world_model import WorldModel

NPZ = Path(__file__).parent / "datamodules" / "data" / "npz"
LINE = Spaces({"obs": Spec("float32", (3,))}, {"action": Spec("float32", (1,))})


def spaces_of(name="dreamerv3:debug", *given, **options):
    return create_world_model(name, *given, device="cpu", **options).model.spaces


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LITWM_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("device", ["cpu", None])
def test_the_names_of_the_tutorial_make_the_published_sizes(device):
    model = create_world_model("dreamerv3:size50m", obs_shape=(3, 64, 64), action_dim=18, device=device)
    assert type(model) is DreamerV3Module
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad) == DREAMERV3_PARAMETERS_IMAGE["size50m"]
    )
    assert model.device.type == (device or ("cuda" if torch.cuda.is_available() else "cpu"))
    assert model.model.spaces == Spaces(
        {"obs": Spec("uint8", (3, 64, 64))}, {"action": Spec("int32", (), 18)}
    )
    model = create_world_model("tdmpc2:19m", obs_shape=(39,), action_dim=6, device=device)
    assert type(model) is TDMPC2Module
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == TDMPC2_PARAMETERS["vector"]["19m"]
    assert model.model.spaces == Spaces({"obs": Spec("float32", (39,))}, {"action": Spec("float32", (6,))})


def test_a_name_alone_is_the_size_of_the_reference():
    assert create_world_model("tdmpc2", (39,), 6, device="cpu").hparams["preset"] == "5m"
    small = {k: 16 for k in ("deter", "hidden", "units")} | {"depth": 2}  # all but the widths
    sizes = create_world_model("dreamerv3", (39,), 6, device="cpu", **small).model.dyn
    assert (sizes.stoch, sizes.classes) == (32, 64)  # of size200m


def test_the_same_call_makes_the_same_weights_and_leaves_global_noise_alone():
    before = torch.get_rng_state()
    first, again, other = (
        create_world_model("tdmpc2:debug", (5,), 2, device="cpu", seed=s).state_dict() for s in (0, 0, 1)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(v, again[k]) for k, v in first.items())
    assert not all(torch.equal(v, other[k]) for k, v in first.items())


@pytest.mark.parametrize(
    ("name", "obs", "discrete", "classes"),
    [
        ("dreamerv3:debug", (64, 64, 3), None, 4),
        ("dreamerv3:debug", (5,), None, None),
        ("dreamerv3:debug", (64, 64, 3), False, None),
        ("dreamerv3:debug", (5,), True, 4),
        ("dreamerv3:debug", {"front": (64, 64, 3), "pose": 5}, None, 4),
        ("tdmpc2:debug", (5,), None, None),
        ("tdmpc2:debug", (5,), True, 4),
    ],
)
def test_a_number_of_actions_counts_classes_where_it_says(name, obs, discrete, classes):
    (spec,) = spaces_of(name, obs, 4, discrete=discrete).action.values()
    assert spec == (Spec("float32", (4,)) if classes is None else Spec("int32", (), classes))


def test_spaces_of_gymnasium_and_names():
    seen = Dict(camera=Box(0, 255, (64, 64, 3), np.uint8), level=Discrete(3, start=5))
    assert spaces_of("dreamerv3:debug", seen, Dict(gas=Box(-2, 2, (1,)), keys=MultiBinary(4))) == Spaces(
        {"camera": Spec("uint8", (64, 64, 3)), "level": Spec("int32", (), 3)},
        {"gas": Spec("float32", (1,)), "keys": Spec("int32", (4,), 2)},
    )
    named = spaces_of("dreamerv3:debug", {"a": (2,), "b": Spec("int32", (), 3)}, {"x": 2, "y": 1})
    assert named == Spaces(
        {"a": Spec("float32", (2,)), "b": Spec("int32", (), 3)},
        {"x": Spec("float32", (2,)), "y": Spec("float32", (1,))},
    )
    with pytest.raises(ConfigError, match="action has none"):
        spaces_of("tdmpc2:debug", (5,), Box(-np.inf, np.inf, (2,)))


def test_observed_classes_count_from_zero_and_a_gray_image_needs_no_axis():
    seen = Dict(view=Box(0, 255, (64, 64), np.uint8), level=Discrete(3, start=5))
    model = create_world_model("dreamerv3:debug", seen, 2, device="cpu")
    assert model.model.spaces.obs["view"].shape == (64, 64, 1)
    view = np.stack([seen["view"].sample() for _ in range(3)])

    def belief(level, view=view):
        model.model.noise = NoiseStreams(0)
        return model.encode({"view": view, "level": level})

    flat, deep = (belief(np.array([0, 1, 2]), v) for v in (view, view[..., None]))
    assert torch.equal(flat.stoch, deep.stoch)
    for level, found in (([5, 6, 7], "5 to 7"), ([0, 100, 1], "0 to 100"), ([-1, 0, 0], "-1 to 0")):
        with pytest.raises(
            ValueError, match=rf"'level' is {found}; expected classes, integers 0 ... 2\n.*start"
        ):
            belief(np.array(level))
    with pytest.raises(ValueError, match=r"'level' is torch.float32; expected classes, integers 0 ... 2"):
        belief(np.array([0.0, 1.0, 2.0]))
    with pytest.raises(ValueError, match=r"'view' has shape \(64, 64\); expected \(batch, 64, 64, 1\)"):
        belief(np.array([0]), view[0])


def test_numbers_of_numpy_are_numbers():
    assert spaces_of("dreamerv3:debug", (np.int64(5),), np.int64(4)) == spaces_of("dreamerv3:debug", (5,), 4)
    assert spaces_of("dreamerv3:debug", np.int32(5), 4, discrete=True).action["action"].classes == 4
    buffer = ReplayBuffer(np.int64(50), action_dim=Discrete(2).n)
    buffer.add_episode(np.zeros((9, 5)), np.arange(8) % 2, np.zeros(8))
    sizes = {"batch_size": np.int64(2), "batch_length": np.int32(4)}
    train(create_world_model("dreamerv3:debug", data=buffer, device="cpu"), buffer, np.int64(1), **sizes)
    for wrong in (True, np.True_, 4.0, np.array([4])):
        with pytest.raises(ConfigError, match="action_dim is "):
            spaces_of("dreamerv3:debug", (5,), wrong)


def test_the_robots_value_is_a_return_of_the_task_times_its_scale():
    data = Path(__file__).parents[1] / "benchmarks" / "checkpoints" / "robot.ckpt"
    model = create_world_model(data, device="cpu")
    assert model.model.reward_scale == 10
    state = model.encode(np.full((8, 34), 0.5, "f4"))
    value = model.q(state, np.zeros((8, 2), "f4")) / model.model.reward_scale
    assert 0 < value.mean() < 1.2  # one goal of 1 in an episode
    for verb in (model.q, model.imagine):
        assert "reward_scale" in verb.__doc__


@pytest.mark.parametrize("name", ["dreamerv3:debug", "tdmpc2:debug"])
def test_a_dream_of_no_step_is_refused(name):
    model = create_world_model(name, (5,), 2, device="cpu")
    state = model.encode(np.zeros((3, 5), "f4"))
    assert model.imagine(state, horizon=np.int64(1)).rewards.shape == (3, 1)
    for wrong in (0, -1, 2.0):
        with pytest.raises(ValueError, match=f"horizon is {wrong}; expected a whole number of 1 or more"):
            model.imagine(state, horizon=wrong)
    with pytest.raises(ValueError, match=r"\(3, 0, 2\); expected \(3, steps, 2\); .* then one step or more"):
        model.imagine(state, torch.zeros(3, 0, 2))
    with pytest.raises(ValueError, match="horizon is 3, but action 'action' has 5 steps; expected one of"):
        model.imagine(state, torch.zeros(3, 5, 2), horizon=3)
    assert model.imagine(state, torch.zeros(3, 5, 2), horizon=5).rewards.shape == (3, 5)


@pytest.mark.parametrize("name", ["dreamerv3:debug", "tdmpc2:debug"])
def test_a_broken_observation_is_said_once(name):
    model, obs = create_world_model(name, (5,), 2, device="cpu"), np.zeros((2, 5), "f4")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")
        _, state = model.act(obs)
        for bad in (np.nan, np.inf):
            obs[1, 3] = bad
            action, _ = model.act(obs, state)
    (said,) = (str(w.message) for w in told)
    assert said.startswith("observation 'obs' has NaN or infinite values")
    assert action["action"].isfinite().all()


@pytest.mark.parametrize("name", ["dreamerv3:debug", "tdmpc2:debug"])
def test_what_is_no_array_of_numbers_is_named(name):
    model = create_world_model(name, (5,), 2, device="cpu")
    state = model.encode(np.zeros((1, 5), "f4"))
    with pytest.raises(ValueError, match="observation 'obs' is no tensor or array of numbers: "):
        model.act(np.array([["a"] * 5]))
    with pytest.raises(ValueError, match="action 'action' is no tensor or array of numbers: "):
        model.q(state, [["a", "b"]])


def test_the_action_of_a_state_may_be_an_array_and_has_its_batch():
    model, obs = create_world_model("dreamerv3:debug", (5,), 2, device="cpu"), np.zeros((1, 5), "f4")
    _, state = model.act(obs)
    found = []
    for given in (torch.full((1, 2), 0.5), np.full((1, 2), 0.5), torch.zeros(1, 2)):
        state.action, model.model.noise = {"action": given}, NoiseStreams(0)
        found.append(model.act(obs, state)[1].deter)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    state.action = {"action": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"action 'action' is torch.float32 \(2,\); expected \(1, 2\)"):
        model.act(obs, state)


def test_data_say_the_spaces():
    recording = Spaces({"obs": Spec("float32", (34,))}, {"action": Spec("float32", (2,))})
    for data in (NPZ / "recording.npz", str(NPZ / "recording.npz"), f"npz:{NPZ}/recording.npz"):
        found = spaces_of("tdmpc2:debug", data=data)
        assert found == recording
        assert found.episode_length == 199  # the longest, for the discount
    buffer = ReplayBuffer(100)
    buffer.add_episode(np.zeros((8, 34)), np.zeros((7, 2)), np.zeros(7))
    assert spaces_of("tdmpc2:debug", data=buffer) == recording
    assert spaces_of("tdmpc2:debug", data=buffer).episode_length == 7
    assert spaces_of("tdmpc2:debug", data=recording) == recording
    cartpole = spaces_of("dreamerv3:debug", data="CartPole-v1")
    assert spaces_of("dreamerv3:debug", data="env:CartPole-v1") == cartpole
    assert cartpole.action == {"action": Spec("int32", (), 2)}
    assert cartpole.episode_length == 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "dreamer:size50m"}, "no world model 'dreamer:size50m'; did you mean 'dreamerv3:size50m'"),
        ({"name": "tdmpc2:size50m"}, r"no world model 'tdmpc2:size50m'.*\n  Known: dreamerv3:debug,"),
        ({"name": "tdmpc2:"}, "no world model 'tdmpc2:'"),
        ({"name": "size50m"}, "no world model 'size50m'; did you mean"),
        ({"obs_shape": None}, r"Give data, or both of obs_shape and action_dim, e.g. obs_shape=\(39,\)"),
        ({"action_dim": None}, "Give data, or both"),
        ({"obs_shape": "39"}, r"obs_shape is '39'; expected a shape, such as \(39,\)"),
        ({"obs_shape": (0, 3)}, r"obs_shape is \(0, 3\)"),
        ({"action_dim": 0}, "action_dim is 0; expected a whole number"),
        ({"action_dim": True}, "action_dim is True"),
        ({"action_dim": (2, 3)}, r"action_dim is \(2, 3\); expected a whole number"),
        ({"data": "CartPole-v1"}, "give one or the other"),
        ({"learning_rate": 1e-3}, "tdmpc2:debug: 'learning_rate' is no option of it"),
        ({"horizn": 3}, "did you mean 'horizon'"),
        ({"preset": "5m"}, "'preset' is part of the name"),
        (
            {"obs_shape": None, "action_dim": None, "obs_space": 1, "action_space": 2},
            r"'obs_space', 'action_space' are no options of it.*\n  Spaces .* as obs_shape and action_dim\.$",
        ),
        ({"name": ""}, "no world model ''"),
        ({"lr": "fast"}, "tdmpc2:debug: lr is 'fast'; expected float$"),
        ({"horizon": 2.5}, "tdmpc2:debug: horizon is 2.5; expected int$"),
        ({"episodic": 1}, "tdmpc2:debug: episodic is 1; expected bool$"),
        ({"name": "dreamerv3:debug", "actor_lr": True}, "actor_lr is True; expected float or None$"),
        (
            {"name": "tdmpc2:1m", "obs_shape": (3, 64, 64), "discrete": False},
            r"tdmpc2:1m: .* latent_dim is 128; .*\nUse num_channels=8, or latent_dim=512, or the size 5m$",
        ),
        ({"name": "dreamerv3:debug", "obs_shape": (3, 65, 65)}, "multiples of 16 .*, e.g. to 64x64$"),
        ({"discrete": True, "planner": "gradient"}, "debug: planner='gradient' needs continuous actions"),
        ({"freeze": ["encodr"]}, "tdmpc2:debug: freeze: 'encodr' is no part of"),
        ({"device": "tpu"}, "device='tpu': PyTorch finds .* here; expected cpu, cuda, cuda:N or None"),
        ({"device": "cuda:99"}, "device='cuda:99': PyTorch finds"),
    ],
)
def test_what_cannot_be_made_is_one_clear_error(given, message):
    call = {"name": "tdmpc2:debug", "obs_shape": (5,), "action_dim": 2, "device": "cpu"} | given
    with pytest.raises(ConfigError, match=message) as error:
        create_world_model(**call)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("kind", ["tdmpc2", "chunk"])
def test_bounds_that_a_file_does_not_state_are_unknown_not_infinite(kind, tmp_path):
    rng, form = np.random.default_rng(0), "20260101T000000F000-a-0-60.npz" if kind == "chunk" else "0.pt"
    for scale in (1.0, 2.0):
        place = tmp_path / f"{scale:g}" / form
        place.parent.mkdir()
        action = scale * rng.uniform(0.9, 1, (3, 20, 2)).astype("f4")
        obs, reward = rng.normal(size=(3, 20, 4)).astype("f4"), np.zeros((3, 20), "f4")
        if kind == "chunk":
            first = np.arange(60) % 20 == 0
            flags = {"is_first": first, "is_last": np.roll(first, -1), "is_terminal": np.zeros(60, bool)}
            arrays = {
                "obs": obs.reshape(60, 4),
                "action": action.reshape(60, 2),
                "reward": reward.reshape(60),
            }
            np.savez(place, **arrays, **flags)
        else:
            action[:, 0] = np.nan  # what led to the first observation
            columns = {"obs": obs, "action": action, "reward": reward}
            torch.save(TensorDict({k: torch.from_numpy(v) for k, v in columns.items()}, [3, 20]), place)
        model = create_world_model("tdmpc2:debug", data=place, device="cpu")
        if scale == 1:
            train(model, place, 1, batch_size=2, progress=False)
            continue
        with pytest.raises(DataError, match=r"nobody says their bounds.*\n.*Buffer.load\(.*action_low="):
            train(model, place, 1, batch_size=2)
        told = ReplayBuffer.load(place, action_low=-2, action_high=2)
        train(model, told, 1, batch_size=2, progress=False)


@pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])
def test_verbs_show_the_arguments_and_words_of_the_model(kind):
    owner = {"DreamerV3Module": "DreamerV3", "TDMPC2Module": "TDMPC2"}[kind.__name__]
    own = getattr(import_module(kind.__module__), owner)
    for verb in ("encode", "imagine", "decode", "q", "act"):
        shown, wanted = (inspect.signature(getattr(x, verb)) for x in (kind, own))
        assert shown == wanted
        assert "args" not in shown.parameters
        for text in (getattr(WorldModel, verb).__doc__, getattr(own, verb).__doc__):
            assert " ".join(text.split()) in " ".join(getattr(kind, verb).__doc__.split())
    assert list(inspect.signature(kind(LINE.to_plain(), "debug").imagine).parameters)[:2] == [
        "state",
        "actions",
    ]
    assert "0 ... 1, not 0 ... 255" in kind.decode.__doc__


@pytest.mark.parametrize("name", ["dreamerv3:debug", "tdmpc2:debug"])
def test_a_verb_refuses_what_is_no_state(name):
    model, obs, acts = create_world_model(name, data=LINE, device="cpu"), torch.zeros(2, 3), torch.zeros(2, 1)
    dream = model.imagine(model.encode(obs), horizon=2)
    for bad in (obs, obs.numpy(), dream, dream.states):
        word = type(bad).__name__
        for call in (
            lambda b=bad: model.decode(b),
            lambda b=bad: model.imagine(b, acts[:, None]),
            lambda b=bad: model.imagine(state=b),
            lambda b=bad: model.q(b, acts),
            lambda b=bad: model.act(obs, b),
            lambda b=bad: model.encode(obs, state=b),
        ):
            with pytest.raises(TypeError, match=rf"takes a state, .*trajectory.states\[-1\].* is a {word}$"):
                call()
    with pytest.raises(TypeError, match="this is a NoneType"):
        model.imagine(None)
    model.act(obs, None)


def test_a_missing_gpu_and_an_unknown_environment_are_said():
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device='cuda': PyTorch finds no GPU here"):
            create_world_model("tdmpc2:debug", (5,), 2, device="cuda")
    for data, why in {
        "CartPol-v1": "did you mean 'CartPole-v1'",
        "minri:pendulum/random-v0": "no source; did you mean 'minari'",
        "demos.npz": "demos.npz does not exist; expected a file",
    }.items():
        with pytest.raises(EnvError, match=f"'{data}' is neither an environment nor data:\n.*(\n.*)?{why}"):
            create_world_model("dreamerv3:debug", data=data, device="cpu")


def test_a_checkpoint_is_a_name_too(tmp_path):
    buffer = ReplayBuffer.load(NPZ / "recording.npz")
    model = create_world_model("dreamerv3:debug", data=buffer, device="cpu")
    train(
        model, buffer, 1, batch_size=2, batch_length=8, folder=tmp_path / "run", logger=False, progress=False
    )
    for path in (tmp_path / "run", str(tmp_path / "run" / "checkpoints" / "last.ckpt")):
        for said in ({}, {"obs_shape": (34,), "action_dim": 2}, {"data": buffer}):
            again = create_world_model(path, device="cpu", **said)
            assert again.updates == 1
            assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())
    with pytest.raises(
        ConfigError, match=r"has obs: float32 \(34,\); the arguments say obs: float32 \(35,\)\n"
    ):
        create_world_model(tmp_path / "run", obs_shape=(35,), device="cpu")
    with pytest.raises(ConfigError, match=r"the arguments say obs: uint8 \(3, 64, 64\)"):
        create_world_model(tmp_path / "run", data=NPZ / "atari_breakout.npz", device="cpu")
    with pytest.raises(ConfigError, match="with options of its own: leave out lr\n.* from_pretrained"):
        create_world_model(tmp_path / "run", lr=1e-3)
    with pytest.raises(
        CheckpointError, match="other.ckpt: no such checkpoint\nGive a run directory or a .ckpt"
    ):
        create_world_model(tmp_path / "other.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=f"^{tmp_path}/empty: no last checkpoint under .*\nGive a run"):
        create_world_model(str(tmp_path / "empty"))
