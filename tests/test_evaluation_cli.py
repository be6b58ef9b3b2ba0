"""``evaluate`` and ``export`` from end to end: repeatable numbers, videos, noise, success, lone files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import lit_wm
from lit_wm import DreamerV3Module
from lit_wm.cli import main
from lit_wm.evaluation_cli import Stage, load_module, open_envs
from lit_wm.types import Spaces, Spec, State

DEBUG = ["--config", "overlay/debug", "--trainer.logger", "false", "--name", "one"]


def train(folder, *argv):
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", *argv, *DEBUG]) == 0
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with a CartPole run in float32 and an image run in bfloat16, of three updates each."""
    folder = tmp_path_factory.mktemp("evaluate")
    train(folder, "--config", "dreamer_cartpole")
    options = ["--data.env", "lit_wm/Dummy-v0", "--data.env_options", "{obs: [image, vector, discrete]}"]
    train(folder, *options, "--model.preset", "debug", "--trainer.precision", "bf16-mixed")
    return folder


@pytest.fixture
def at(workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    return workplace


CARTPOLE, DUMMY = "runs/CartPole-v1/one", "runs/lit_wm-Dummy-v0/one"


def evaluate(*argv, ckpt=CARTPOLE, file="out.json"):
    assert main(["evaluate", "--ckpt", str(ckpt), "--json", file, "--episodes", "5", *argv]) == 0
    return json.loads(Path(file).read_text())


def seconds(video):
    """A GIF's length; equal frames are one."""
    total = 0
    for i in range(video.n_frames):
        video.seek(i)
        total += video.info["duration"]
    return total / 1000


def test_the_same_seed_gives_the_same_file_bit_for_bit_with_and_without_a_video(at, capsys):
    first = evaluate("--seed", "3")
    printed = capsys.readouterr()
    assert evaluate("--seed", "3", "--video", "play.gif") == first
    assert evaluate("--seed", "4")["returns"] != first["returns"]
    assert first["lengths"] == [int(x) for x in first["returns"]]
    assert first["metrics"]["return"] == np.mean(first["returns"])
    assert first["metrics"]["return_low"] <= first["metrics"]["return"] <= first["metrics"]["return_high"]
    assert "success" not in first["metrics"]
    assert "95 % interval" in printed.out
    assert "playing 5 episodes ..." in printed.err
    assert "environment: CartPole-v1\n" in printed.out
    with Image.open("play.gif") as video:
        assert max(video.size) == 320
        assert seconds(video) == pytest.approx((first["lengths"][0] + 1) / 50)
    assert not list(at.glob(".*.part"))


def test_a_lone_file_knows_its_environment_options_and_precision(at, tmp_path):
    shutil.copy(f"{DUMMY}/checkpoints/last.ckpt", tmp_path / "lone.ckpt")
    inside, alone = evaluate(ckpt=f"{DUMMY}/checkpoints/last.ckpt"), evaluate(ckpt=tmp_path / "lone.ckpt")
    assert inside["returns"] == alone["returns"]
    assert alone["env"] == "lit_wm/Dummy-v0"
    assert alone["env_options"] == {"obs": ["image", "vector", "discrete"]}
    assert alone["precision"] == "bf16-mixed"
    assert load_module(tmp_path / "lone.ckpt")[0].model.compute_dtype == torch.bfloat16
    assert main(["test", "--ckpt_path", str(tmp_path / "lone.ckpt"), "--evaluate.test_episodes", "1"]) == 0


def test_greedy_takes_the_likeliest_action(at, monkeypatch):
    sampled = evaluate("--mode", "eval")
    monkeypatch.setattr("lit_wm.dreamerv3.sample_actions", None)  # nothing is drawn
    report = evaluate("--mode", "greedy")
    assert (sampled["mode"], report["mode"]) == ("eval", "greedy")
    assert report["lengths"] != sampled["lengths"]


def test_a_dreamer_plans_if_it_is_asked_to(at):
    short = ["--max-episode-steps", "3"]
    report = {p: evaluate("--planner", p, *short) for p in ("random", "policy")}
    assert report["random"]["planner"] == "random"
    assert report["policy"]["lengths"] == evaluate(*short)["lengths"]  # the checkpoint's own
    module, _ = load_module(Path(CARTPOLE, "checkpoints", "last.ckpt"), planner="random")
    assert module.model.planner.num_samples == 512


def test_an_exported_model_is_small_and_acts_as_the_whole_checkpoint(at, tmp_path, capsys):
    out = tmp_path / "model.ckpt"
    assert main(["export", "--ckpt", CARTPOLE, "-o", str(out)]) == 0
    assert "MB" in capsys.readouterr().out
    whole = torch.load(f"{CARTPOLE}/checkpoints/last.ckpt", weights_only=True)
    small = torch.load(out, weights_only=True)
    assert whole["state_dict"].keys() == small["state_dict"].keys()
    assert any("slow" in k for k in small["state_dict"])
    assert not {"optimizer_states", "loops", "callbacks", "ReplayDataModule"} & small.keys()
    module = DreamerV3Module.load_from_checkpoint(out, weights_only=True)
    assert module.updates == 3
    assert evaluate(ckpt=out)["returns"] == evaluate(ckpt=f"{CARTPOLE}/checkpoints/last.ckpt")["returns"]
    assert main(["fit", "--ckpt_path", str(out), "--trainer.max_steps", "4", "--name", "on"]) == 1
    assert "cannot go on" in capsys.readouterr().err
    assert main(["export", "--ckpt", str(out), "-o", str(out)]) == 1


def test_a_video_shows_the_image_that_the_model_sees(at):
    result = evaluate("--video", "seen.gif", "--max-episode-steps", "4", "--num-envs", "1", ckpt=DUMMY)
    assert result["metrics"]["cut"] == sum(result["cut"]) > 0
    with Image.open("seen.gif") as video:
        assert video.size == (64, 64)
        assert seconds(video) == pytest.approx((result["lengths"][0] + 1) / 30, abs=0.01)


class Still:
    """Three environments that always show the same."""

    num_envs = 3

    def reset(self, seed=None, options=None):
        image = np.full((3, 32, 32, 3), 128, np.uint8)
        image[:, :16] = 255
        return {"image": image, "vector": np.ones((3, 500), np.float32), "kind": np.ones(3, np.int32)}, {}


def test_noise_is_in_the_units_of_vectors_and_in_parts_of_an_images_scale():
    specs = {
        "image": Spec("uint8", (32, 32, 3)),
        "vector": Spec("float32", (500,)),
        "kind": Spec("int32", (), 4),
    }

    def look(sigma, seed=0):
        return Stage(Still(), Spaces(specs, {}), sigma, seed, film=False).reset()[0]

    seen, again = look(0.1), look(0.1)
    assert seen["vector"].dtype == np.float32
    assert np.std(seen["vector"] - 1) == pytest.approx(0.1, rel=0.1)
    assert seen["image"].dtype == np.uint8
    assert np.std(seen["image"][:, 16:].astype(float)) == pytest.approx(25.5, rel=0.1)
    assert np.mean(seen["image"][:, :16] == 255) == pytest.approx(0.5, abs=0.1)  # clipped, not wrapped
    assert (seen["kind"] == 1).all()
    assert all(np.array_equal(seen[k], again[k]) for k in seen)
    assert not np.array_equal(look(0.1, seed=1)["vector"], seen["vector"])
    assert np.array_equal(look(0.0)["vector"], np.ones((3, 500)))


def test_noise_reaches_the_policy_and_repeats_itself(at, monkeypatch):
    def lean(self, obs, state, is_first, mode, noise):  # an untrained policy would not look
        return {"action": (obs["obs"][:, 2] + obs["obs"][:, 3] > 0).long()}, State(obs["obs"])

    monkeypatch.setattr(DreamerV3Module, "policy", lean)
    clear, blurred = evaluate(), evaluate("--obs-noise", "1")
    assert np.mean(clear["returns"]) > 2 * np.mean(blurred["returns"])
    assert evaluate("--obs-noise", "1") == blurred


class Solved(gym.Wrapper):
    """Says at the end whether an episode was short."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        self.steps = getattr(self, "steps", 0) + 1
        if terminated or truncated:
            info, self.steps = info | {"is_success": np.bool_(self.steps < 20)}, 0
        return obs, reward, terminated, truncated, info


def test_success_is_what_the_environment_says_at_the_end(at):
    gym.register("lit_wm/Solved-v0", lambda: Solved(gym.make("CartPole-v1")))
    try:
        result = evaluate("--env", "lit_wm/Solved-v0", "--num-envs", "3")
    finally:
        del gym.registry["lit_wm/Solved-v0"]
    assert result["success"] == [n < 20 for n in result["lengths"]]
    assert result["metrics"]["success"] == np.mean(result["success"])


WRONG = {
    "no episodes": (["--episodes", "0"], ["--episodes is 0", "1 or more"]),
    "negative noise": (["--obs-noise", "-1"], ["--obs-noise is -1.0", "0 or more"]),
    "noise that is none": (["--obs-noise", "nan"], ["--obs-noise is nan"]),
    "no such file": (["--ckpt", "nowhere.ckpt"], ["error: --ckpt nowhere.ckpt: no such file"]),
    "no such environment": (["--env", "CartPool-v1"], ["'CartPool-v1'", "CartPole"]),
    "another observation": (["--env", "Pendulum-v1"], ["observation 'obs'", "float32 (4,)", "float32 (3,)"]),
    "another action": (
        [
            "--env",
            "lit_wm/Dummy-v0",
            "--ckpt",
            DUMMY,
            "--env-options",
            "{obs: [image, vector, discrete], actions: discrete}",
        ],
        ["action 'continuous'", "float32 (2,)", "has none"],
    ),
    "no rendering": (
        ["--env", "lit_wm/Blank-v0", "--video", "a.gif"],
        ["lit_wm/Blank-v0", "no rendering"],
    ),
    "another kind of video": (["--video", "a.mp4"], ["ends in .gif"]),
    "options that are none": (["--env-options", "3"], ["expected keys and values"]),
    "a misspelt flag": (["--episode-count", "3"], ["--episode-count", "--help"]),
    "a folder for a file": (["--json", "."], ["cannot be written"]),
    "a misspelt file": (
        ["--ckpt", f"{CARTPOLE}/checkpoints/lost.ckpt"],
        [
            "no such file; did you mean 'last.ckpt'",
            f"In {CARTPOLE}/checkpoints: best.ckpt, last.ckpt, resume-",
        ],
    ),
    "a misspelt folder": (["--ckpt", "runs/CartPole-v2/x.ckp"], ["no such file", "In runs: CartPole-v1/, "]),
    "a misspelt planner": (
        ["--planner", "mpi"],
        ["error: --planner: unknown planner 'mpi'; did you mean 'mppi'"],
    ),
    "gradient of classes": (
        ["--planner", "gradient"],
        ["error: --planner: gradient needs continuous actions"],
    ),
    "no tasks": (["--task", "walk"], ["--task", "is of a DreamerV3Module, which has none"]),
    "a foreign device": (["--device", "tpu"], ["--device tpu"]),
}


@pytest.mark.parametrize(("argv", "said"), WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_is_said_in_a_few_lines(at, argv, said, capsys):
    class Blank(gym.Env):
        metadata = {"render_modes": []}
        observation_space = gym.spaces.Box(-9, 9, (4,), np.float32)
        action_space = gym.spaces.Discrete(2)

    gym.registry.pop("lit_wm/Blank-v0", None)
    gym.register("lit_wm/Blank-v0", Blank)
    assert main(["evaluate", "--ckpt", CARTPOLE, *argv]) == 1
    printed = capsys.readouterr().err
    assert all(word in printed for word in said), printed
    assert len(printed.splitlines()) <= 5


def test_a_file_without_environment_asks_for_one_with_an_example(at, capsys):
    loaded = torch.load(f"{CARTPOLE}/checkpoints/last.ckpt", weights_only=True)
    loaded["lit_wm"]["env"] = None
    (at / "nowhere").mkdir()
    torch.save(loaded, at / "nowhere" / "x.ckpt")
    assert main(["evaluate", "--ckpt", "nowhere/x.ckpt"]) == 1
    assert "e.g. --env CartPole-v1" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("verb", ["evaluate", "test"])
def test_a_signal_ends_it_with_the_count_of_episodes_and_no_file(at, verb, number):
    options = (
        ["--evaluate.test_episodes", "100000"]
        if verb == "test"
        else ["--episodes", "100000", "--json", "x.json"]
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(lit_wm.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lit_wm", verb, "--ckpt_path", CARTPOLE, *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    for line in process.stderr:
        if line.startswith("playing 100,000 episodes"):
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert f"{number.name}: stopped after " in printed
    assert "of 100000 episodes" in printed
    assert "Traceback" not in printed
    assert not Path("x.json").exists()
    assert not Path(CARTPOLE, "test.json").exists()


def test_other_lengths_of_an_episode_are_noted(at, capsys):
    """A converted checkpoint does not know its action repeat: a score at another one would mislead."""
    evaluate()
    assert "decisions here" not in capsys.readouterr().err
    evaluate("--env-options", "{time_limit: 7}")
    printed = capsys.readouterr()
    assert "has 7 decisions here, the checkpoint's had 500" in printed.err
    assert "environment: CartPole-v1 (time_limit: 7)\n" in printed.out


def test_a_rendering_needs_no_screen(monkeypatch, capfd):
    for name in ("SDL_VIDEODRIVER", "XDG_RUNTIME_DIR", "DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    env = open_envs("CartPole-v1", 1, {}, render=True)
    env.reset(seed=0)
    assert env.envs[0].render().shape == (400, 600, 3)
    env.close()
    assert capfd.readouterr().err == ""
