"""Official TD-MPC2 checkpoints to ours and back, byte for byte; one clear sentence for each wrong file."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lit_wm.cli import main
from lit_wm.convert import official_tdmpc2 as official
from lit_wm.convert.official_tdmpc2 import from_official, layout, module_from_official, read, to_official
from lit_wm.envs import read_spaces
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.evaluation_cli import Stage, load_module
from lit_wm.presets import TDMPC2_PARAMETERS, TDMPC2_PARAMETERS_DOG, TDMPC2_PARAMETERS_EPISODIC, tdmpc2_sizes
from lit_wm.tasks import TASK_SETS
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Spaces, Spec

DATA = Path(__file__).parents[1] / "parity" / "data" / "tdmpc2"
# The three tasks of the golden files.
TASKS = [
    {"name": "a", "obs": 5, "action": 2, "episode_length": 500},
    {"name": "b", "obs": 8, "action": 4, "episode_length": 100},
    {"name": "c", "obs": 6, "action": 3, "episode_length": 1000},
]
KINDS = {"state": None, "multitask": TASKS}


def golden(age, kind):
    return DATA / f"official_checkpoint_{age}_format_{kind}.pt"


def contents(age="new", kind="state"):
    return torch.load(golden(age, kind), weights_only=True)["model"]


def same(ours, theirs):
    """Equal names, types, shapes and bytes; what is no tensor must be equal."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            assert ours[name] == value, name
            continue
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        assert ours[name].contiguous().numpy().tobytes() == value.contiguous().numpy().tobytes(), name


def fake(preset, tasks=None, obs=39, action=6, episodic=False, **more):
    """A file in the new layout with a preset's sizes; its zeros take no memory."""
    sizes = tdmpc2_sizes(preset, tasks) | {"obs": obs, "action": action, "num_bins": 101} | more
    if tasks:
        sizes |= {"num_tasks": len(TASK_SETS[tasks]), "obs": {"mt30": 24, "mt80": 39}[tasks]}
    out = {}
    for name, axes in layout(sizes["num_enc_layers"], tasks is not None, episodic).items():
        shape = [n if isinstance(n, int) else sum(sizes[k] for k in n.split("+")) for n in axes]
        out[name] = torch.zeros(()).expand(shape)
    out |= {"log_std_min": torch.tensor(-10), "log_std_dif": torch.tensor(12)}
    if tasks:
        out["_action_masks"] = official.action_masks(TASK_SETS[tasks])
    return out


def trainable(state):
    copies = ("_detach", "_target", "log_std", "_action_masks")
    return sum(v.numel() for k, v in state.items() if not k.startswith(copies))


# --- Round trips --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_new_to_ours_and_back_is_the_file_itself(kind):
    theirs = contents("new", kind)
    state, arguments = from_official({"model": theirs}, KINDS[kind])
    same(to_official(state, arguments), theirs)


@pytest.mark.parametrize("kind", KINDS)
def test_old_to_ours_to_new_is_what_the_official_code_converts_it_to(kind):
    expected = torch.load(DATA / f"expected_old_format_{kind}.pt", weights_only=True)
    tensors = expected["converted_state_dict"]
    if kind == "multitask":  # the official code has looked rows up since, which shortens them
        tensors["_task_emb.weight"] = expected["task_emb_before"]
    converted = to_official(*from_official(contents("old", kind), KINDS[kind]))
    same({k: v for k, v in converted.items() if isinstance(v, torch.Tensor)}, tensors)
    assert sorted(converted.keys() - tensors) == sorted(expected["converted_non_tensor_keys"])


def test_a_row_of_the_task_embedding_longer_than_one_is_kept_by_loading():
    state, _ = from_official(contents("new", "multitask"), TASKS)
    assert state["task_embedding.weight"].norm(dim=1).max() > 2.9
    module = module_from_official(golden("new", "multitask"), TASKS)
    assert torch.equal(module.model.task_embedding.weight, state["task_embedding.weight"])


@pytest.mark.parametrize("case", ["rgb_tiny", "episodic_tiny"])
def test_pictures_and_terminations_make_the_round_trip(case):
    theirs = torch.load(DATA / f"{case}.pt", weights_only=True)["state_dict"]
    state, arguments = from_official(theirs)
    back = to_official(state, arguments)
    # The repository's copy of the case leaves out the copies of the critics.
    same({k: back[k] for k in theirs}, theirs)
    assert all(k in theirs or k.startswith("_detach_Qs_params.") or "__" in k for k in back)
    assert arguments["episodic"] is (case == "episodic_tiny")
    if case == "rgb_tiny":
        assert arguments["spaces"]["obs"] == {
            "obs": {"dtype": "uint8", "shape": [9, 64, 64], "classes": None}
        }
        assert arguments["num_channels"] == 2
    module = TDMPC2Module(**arguments)
    assert not module.model.load_state_dict(state, strict=False).unexpected_keys


def test_duplicates_of_the_files_in_between_are_ignored():
    theirs = contents()
    extra = {"_terminated.0.weight": torch.ones(2)}
    for key in ("0.weight", "2.bias", "__batch_size"):
        extra |= {
            f"{old}.{key}": theirs[f"_Qs.params.{key}"] for old in ("_detach_Qs.params", "_target_Qs.params")
        }
    same(to_official(*from_official(theirs | extra)), theirs)


def test_half_precision_becomes_float32():
    theirs = {k: v.bfloat16() if isinstance(v, torch.Tensor) and v.ndim else v for k, v in contents().items()}
    state, _ = from_official(theirs)
    assert {v.dtype for v in state.values()} == {torch.float32}
    assert torch.equal(state["policy.0.weight"], theirs["_pi.0.weight"].float())


# --- What is inferred -----------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", ["1m", "5m", "19m", "48m", "317m"])
def test_the_table_counts_the_official_parameters(preset):
    for kind, tasks in {"vector": None, "mt30": "mt30", "mt80": "mt80"}.items():
        assert trainable(fake(preset, tasks)) == TDMPC2_PARAMETERS[kind][preset]


def test_the_special_cases_count_too():
    assert trainable(fake("5m", episodic=True)) == TDMPC2_PARAMETERS_EPISODIC
    assert trainable(fake("5m", obs=223, action=38)) == TDMPC2_PARAMETERS_DOG


@pytest.mark.parametrize("tasks", [None, "mt30", "mt80"])
@pytest.mark.parametrize("preset", ["1m", "5m", "19m"])
def test_the_preset_and_the_task_set_are_recognised(preset, tasks):
    _, arguments = from_official(fake(preset, tasks))
    assert arguments["preset"] == preset
    assert arguments["tasks"] == tasks
    assert not arguments.keys() & {"enc_dim", "mlp_dim", "latent_dim", "num_q", "task_dim"}
    obs = 24 if tasks == "mt30" else 39
    assert arguments["spaces"]["obs"]["obs"]["shape"] == [obs]
    assert arguments["spaces"]["action"]["action"]["shape"] == [6]
    assert arguments["spaces"]["episode_length"] == (None if tasks else 500)


def test_other_sizes_are_written_out():
    _, arguments = from_official(contents("old", "multitask"), TASKS)
    sizes = {"enc_dim": 16, "mlp_dim": 24, "latent_dim": 16, "num_enc_layers": 2, "num_q": 5, "task_dim": 6}
    assert sizes.items() <= arguments.items()
    assert arguments["tasks"] == TASKS
    assert arguments["num_bins"] == 101
    assert (arguments["log_std_min"], arguments["log_std_max"]) == (-10, 2)


# --- Refusals -------------------------------------------------------------------------------------------


def without(*names):
    return lambda s: {k: v for k, v in s.items() if k not in names}


def resized(name, axis):
    return lambda s: s | {name: torch.cat([s[name], s[name].narrow(axis, 0, 1)], axis)}


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        ("state", without("_pi.2.bias", "_dynamics.1.ln.bias"), "lacks _dynamics.1.ln.bias, _pi.2.bias$"),
        ("state", without("_target_Qs_params.0.weight"), "lacks _target_Qs_params.0.weight"),
        ("state", lambda s: s | {"_extra.weight": torch.ones(1)}, "unknown tensors: _extra.weight"),
        ("state", lambda s: {"conv.bias": torch.ones(1)}, "is no checkpoint of the official TD-MPC2.*conv"),
        ("state", lambda s: [1], "it holds list"),
        ("state", resized("_reward.0.weight", 1), "axis 1 is 20; expected 19 of latent_dim 16, action 3"),
        ("state", resized("_Qs.params.2.weight", 0), "axis 0 is 6; expected 5 of num_q 5"),
        ("state", resized("_pi.2.weight", 0), "axis 0 is 7; expected 6 of action 3"),
        ("state", lambda s: s | {"_pi.0.weight": s["_pi.0.bias"]}, "_pi.0.weight has shape .*expected 2"),
        ("state", lambda s: s | {"_pi.0.bias": "x"}, "_pi.0.bias is of type str"),
        ("state", lambda s: s | {"_detach_Qs_params.2.bias": torch.ones(5, 101)}, "differs from what it is"),
        ("multitask", resized("_task_emb.weight", 1), "expected 27 of latent_dim 16, task_dim 7, action 4"),
        ("multitask", lambda s: s | {"_action_masks": 1 - s["_action_masks"]},
         "task a are masked by .0.0, 0.0, 1.0, 1.0.; expected 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(kind, change, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        from_official(change(contents("new", kind)), KINDS[kind])
    assert len(str(caught.value).splitlines()) <= 4


def with_task(**change):
    return [TASKS[0], TASKS[1] | change, TASKS[2]]


@pytest.mark.parametrize(
    ("age", "tasks", "message"),
    [
        ("old", None, "it has 3 tasks, and only mt30 and mt80 are known"),
        ("old", "mt30", "it has 3 tasks; 30 were given"),
        ("old", with_task(action=5), r"_action_masks .*: axis 1 is 5; expected 4 of action 4"),
        ("old", with_task(obs=9), "largest observation has 8 numbers; that of the tasks has 9"),
        ("new", with_task(action=3), "task b are masked by .1.0, 1.0, 1.0, 1.0.; expected 3 ones"),
    ],
)
def test_tasks_that_do_not_fit_are_refused(age, tasks, message):
    with pytest.raises(CheckpointError, match=message):
        from_official(contents(age, "multitask"), tasks)


def test_tasks_for_a_single_task_are_refused():
    with pytest.raises(ConfigError, match="single task; leave out tasks"):
        from_official(contents(), "mt30")


def test_a_latent_that_does_not_fit_the_picture_encoder_is_refused():
    theirs = torch.load(DATA / "rgb_tiny.pt", weights_only=True)["state_dict"]
    for i in (2, 4, 6, 8):
        for field in ("weight", "bias"):
            name = f"_encoder.rgb.{i}.{field}"
            value = torch.cat([theirs[name]] * 2)
            theirs[name] = torch.cat([value] * 2, 1) if i > 2 and field == "weight" else value
    with pytest.raises(CheckpointError, match="latent_dim is 32; of 64x64 pictures the encoder leaves 64"):
        from_official(theirs)


def test_a_model_that_the_official_code_does_not_have_is_not_written():
    discrete = {"obs": {"obs": {"dtype": "float32", "shape": [4]}},
                "action": {"action": {"dtype": "int32", "shape": [], "classes": 2}}}  # fmt: skip
    module = TDMPC2Module(discrete, preset="debug")
    with pytest.raises(CheckpointError, match="no discrete"):
        to_official(module.model.state_dict(), module.hparams)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p, raw: p.write_bytes(raw[: len(raw) // 2]), "damaged, cut short"),
        (lambda p, raw: p.write_bytes(b""), "damaged, cut short"),
        (
            lambda p, raw: np.savez(p.open("wb"), observations=np.zeros(3)),
            "no checkpoint but an npz of arrays",
        ),
        (lambda p, raw: p.write_bytes(raw.replace(raw[99_000:99_064], b"\xff" * 64)), "wrong checksum"),
        (
            lambda p, raw: p.write_text("<html>not found</html>"),
            "damaged, cut short, or not|more than tensors",
        ),
        (
            lambda p, raw: torch.save({"model": Code()}, p),
            r"more than tensors \(posix.mkdir\); it was not opened",
        ),
        (lambda p, raw: p.write_bytes(pickle.dumps({"model": Code()}, 2)), "more than tensors"),
        (lambda p, raw: p.mkdir(), "cannot be read: Is a directory"),
        (lambda p, raw: None, "cannot be read: No such file"),
    ],
)
def test_files_that_are_none_are_refused_and_nothing_in_them_runs(tmp_path, monkeypatch, make, message):
    monkeypatch.chdir(tmp_path)
    make(tmp_path / "file.pt", golden("new", "state").read_bytes())
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path / "file.pt")
    assert len(str(caught.value).splitlines()) <= 3
    assert not (tmp_path / "executed").exists()


MULTITASK = str(golden("old", "multitask"))


# --- The module and the command -------------------------------------------------------------------------


def test_overrides_reach_the_module_and_wrong_ones_are_refused():
    module = TDMPC2Module.from_official(
        golden("old", "state"), discount=0.9, planner="policy", episode_length=100
    )
    assert module.model.discount == pytest.approx(0.9)
    assert TDMPC2Module.from_official(
        golden("old", "state"), episode_length=100
    ).model.discount == pytest.approx(0.95)
    assert TDMPC2Module.from_official(golden("old", "state")).model.discount == pytest.approx(0.99)
    with pytest.raises(CheckpointError, match="(?s)old_format_state.pt: .*size mismatch") as caught:
        TDMPC2Module.from_official(golden("old", "state"), mlp_dim=32)
    assert len(str(caught.value).splitlines()) <= 4


def test_one_of_several_tasks_has_its_own_sizes():
    module = TDMPC2Module.from_official(golden("old", "multitask"), tasks=TASKS, task="c")
    assert module.model.spaces.obs["obs"].shape == (6,)
    action, _ = module.policy({"obs": torch.zeros(2, 6)}, mode="eval")
    assert action["action"].shape == (2, 3)
    with pytest.raises(CheckpointError, match="task 'd' is none of this checkpoint's"):
        TDMPC2Module.from_official(golden("old", "multitask"), tasks=TASKS, task="d")


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_converts_both_ways(tmp_path, monkeypatch, capsys, kind):
    monkeypatch.chdir(tmp_path)
    Path("tasks.yaml").write_text(yaml.safe_dump(TASKS))
    tasks = ["--tasks", "tasks.yaml"] if kind == "multitask" else []
    convert = ["convert", "tdmpc2", str(golden("new", kind)), "-o", "ours.ckpt", *tasks]
    assert main(convert) == 0
    line = capsys.readouterr().out
    assert line.startswith("ours.ckpt: TD-MPC2 own sizes, ")
    assert ("3 tasks, discount 0.95 and 0.99 and 0.995" if tasks else "one task, discount 0.99") in line
    assert "K 5, L 16, " in line

    module, about = load_module(Path("ours.ckpt"))
    assert isinstance(module, TDMPC2Module)
    assert (about["env"], about["updates"], module.updates) == (None, 0, 0)
    again = TDMPC2Module.load_from_checkpoint("ours.ckpt", weights_only=True)
    same(again.state_dict(), module.state_dict())

    assert main(convert) == 1
    assert "ours.ckpt exists" in capsys.readouterr().err
    assert main([*convert, "--force"]) == 0
    assert main(["convert", "tdmpc2", "ours.ckpt", "-o", "official.pt"]) == 0
    same(torch.load("official.pt", weights_only=True)["model"], contents("new", kind))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["official.pt", "ours.ckpt", "tasks.yaml"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["dreamer", "x.pt", "-o", "y.ckpt"], "invalid choice: 'dreamer'"),
        (["tdmpc2", "x.pt", "-o", "y.ckpt"], "x.pt cannot be read: No such file"),
        (["tdmpc2", MULTITASK, "-o", "y.ckpt", "--tasks", "no.yaml"], "--tasks no.yaml: expected mt30"),
        (["tdmpc2", MULTITASK, "-o", "y.ckpt"], "Give the list: --tasks FILE.yaml"),
        (["tdmpc2", MULTITASK], "required: -o"),
    ],
)
def test_the_command_says_what_is_wrong(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *argv]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert not list(tmp_path.iterdir())


# --- Playing --------------------------------------------------------------------------------------------


def test_a_converted_checkpoint_plays_where_the_observations_add_up(tmp_path, monkeypatch, capsys):
    pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": fake("debug", obs=24)}, "walker.pt")
    assert main(["convert", "tdmpc2", "walker.pt", "-o", "walker.ckpt"]) == 0
    said = "debug, one task, discount 0.99, observation 24, action 6, K 2, L 16"
    assert said in capsys.readouterr().out
    play = ["evaluate", "--ckpt", "walker.ckpt", "--episodes", "2", "--json", "out.json", "--env-options"]
    options = "{repeat: 2, time_limit: 16}"
    assert main([*play, options, "--env", "dmc:walker_walk"]) == 0
    assert json.loads(Path("out.json").read_text())["lengths"] == [8, 8]
    assert main([*play, options, "--env", "dmc:cheetah_run"]) == 1
    error = capsys.readouterr().err
    assert "observation 'obs'" in error
    assert "float32 (24,)" in error
    assert "float32 (17,)" in error
    # The official program joins them in dm_control's order.
    assert list(read_spaces("dmc:walker_walk").obs) == ["orientations", "height", "velocity"]


TOY = """
import gymnasium as gym
import numpy as np
Box = gym.spaces.Box

class Toy(gym.Env):
    def __init__(self, shape, actions, key="obs", limit=5):
        high, kind = (255, np.uint8) if len(shape) == 3 else (1, np.float32)
        self.observation_space = gym.spaces.Dict({key: Box(0, high, tuple(shape), kind)})
        self.action_space, self.limit = Box(-1, 1, (actions,), np.float32), limit

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.observation_space.seed(seed)
        self.t = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.t += 1
        return self.observation_space.sample(), float(action.sum()), False, self.t >= self.limit, {}

gym.register("Toy-v0", entry_point=Toy)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    (tmp_path / "toy_env.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)


def play(*argv):
    status = main(["evaluate", *argv, "--env", "toy_env:Toy-v0", "--episodes", "2", "--json", "out.json"])
    return json.loads(Path("out.json").read_text()) if status == 0 else None


def test_a_task_and_a_planner_are_chosen_at_the_evaluation(toy, capsys):
    Path("tasks.yaml").write_text(yaml.safe_dump(TASKS))
    convert = ["convert", "tdmpc2", str(golden("old", "multitask")), "--tasks", "tasks.yaml"]
    assert main([*convert, "-o", "ours.ckpt"]) == 0
    assert main([*convert, "-o", "c.ckpt", "--task", "c"]) == 0
    one = ["--env-options", "{shape: [6], actions: 3, limit: 2}"]
    scores = {p: play("--ckpt", "ours.ckpt", "--task", "c", "--planner", p, *one) for p in ("cem", "policy")}
    assert (scores["cem"]["task"], scores["cem"]["planner"]) == ("c", "cem")
    assert scores["cem"]["returns"] != scores["policy"]["returns"]
    for planner, score in scores.items():
        assert play("--ckpt", "c.ckpt", "--planner", planner, *one)["returns"] == score["returns"]
    assert (
        play("--ckpt", "c.ckpt", "--task", "a", "--env-options", "{shape: [5], actions: 2, limit: 2}")["task"]
        == "a"
    )
    capsys.readouterr()
    for more, message in (
        ([], "say with --task which of the checkpoint's tasks is played: a, b, c"),
        (["--task", "cc"], "--task cc: none of the checkpoint's; did you mean 'c'?"),
        (["--task", "c", "--planner", "cen"], "unknown planner 'cen'; did you mean 'cem'"),
    ):
        assert play("--ckpt", "ours.ckpt", *one, *more) is None
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("key", ["image", "obs"])
def test_a_converted_picture_model_plays_from_stacked_pictures(toy, capsys, key):
    theirs = torch.load(DATA / "rgb_tiny.pt", weights_only=True)["state_dict"]
    torch.save({"model": theirs}, "rgb.pt")
    assert main(["convert", "tdmpc2", "rgb.pt", "-o", "rgb.ckpt"]) == 0
    actions = len(theirs["_pi.2.bias"]) // 2
    options = f"shape: [64, 64, 3], actions: {actions}, key: {key}"
    capsys.readouterr()
    for wrong in (options, f"shape: [12], actions: {actions}, key: {key}"):
        assert play("--ckpt", "rgb.ckpt", "--env-options", f"{{{wrong}}}") is None
        assert "--env-options '{pixels: true, stack: 3}'" in capsys.readouterr().err
    score = play("--ckpt", "rgb.ckpt", "--planner", "policy", "--env-options", f"{{{options}, stack: 3}}")
    assert score["lengths"] == [5, 5]


def test_entries_are_joined_in_the_order_asked_for():
    class Still:
        num_envs = 2

        def reset(self, **_):
            return {"a": np.float32([1, 2]), "b": np.float32([[3, 4], [5, 6]]), "c": np.ones(2)}, {}

    spaces = Spaces({"obs": Spec("float32", (3,))}, {})
    shown, _ = Stage(Still(), spaces, 0.0, 0, film=False, join=["b", "a"]).reset()
    assert shown["obs"].tolist() == [[3, 4, 1], [5, 6, 2]]


def test_pictures_are_shown_with_their_channels_first():
    class Still:
        num_envs = 2
        pictures = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 9), np.uint8)

        def reset(self, **_):
            return {"image": self.pictures}, {}

    spaces = Spaces({"obs": Spec("uint8", (9, 64, 64))}, {})
    shown, _ = Stage(Still(), spaces, 0.0, 0, film=False, join=["image"]).reset()
    assert shown["obs"].shape == (2, 9, 64, 64)
    assert np.array_equal(shown["obs"][1, 4], Still.pictures[1, :, :, 4])
