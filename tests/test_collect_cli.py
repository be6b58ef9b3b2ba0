"""``collect`` from end to end: datasets of random actions and of a checkpoint, refusals, signals."""

import json
import os
import signal
import subprocess
import sys
import time

import minari
import numpy as np
import pytest
import torch

import lit_wm
from datamodules.cache import open_cache
from datamodules.sources import open_source
from lit_wm import DreamerV3Module
from lit_wm.cli import main
from lit_wm.envs import read_spaces


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "sets"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "sets"


def checkpoint(path, env_id, **options):
    """A file as ``export`` writes it, of a model with its first weights."""
    module = DreamerV3Module(read_spaces(env_id, **options).to_plain(), preset="debug")
    about = {"class_path": "lit_wm.DreamerV3Module", "env": env_id, "env_options": options}
    about |= {"precision": "32-true", "updates": 7, "env_steps": 0}
    hyper_parameters = dict(module.hparams)
    torch.save(
        {"state_dict": module.state_dict(), "hyper_parameters": hyper_parameters, "lit_wm": about}, path
    )
    return module


def test_random_episodes_are_a_dataset_that_both_readers_open(root, capsys):
    argv = ["--env", "CartPole-v1", "--policy", "random", "--episodes", "6", "--out", "minari:cart/random-v0"]
    assert main(["collect", *argv, "--seed", "3", "--num-envs", "4", "--author", "Ada"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "look at it: lit-wm data inspect minari:cart/random-v0"
    dataset = minari.load_dataset("cart/random-v0")
    lengths = [len(episode) for episode in dataset]
    assert f"6 episodes, {sum(lengths)} steps" in out
    metadata = dataset.storage.metadata
    assert (metadata["algorithm_name"], metadata["author"]) == ("random", {"Ada"})
    assert "lit-wm collect --env CartPole-v1" in metadata["description"]
    assert dataset.recover_environment().spec.id == "CartPole-v1"
    assert main(["data", "inspect", "minari:cart/random-v0", "--json", "--cache", "cache"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["episodes"], shown["steps"]) == (6, sum(lengths))

    assert main(["collect", *argv]) == 1
    assert "exists" in capsys.readouterr().err
    assert main(["collect", *argv, "--overwrite", "--root", "elsewhere", "--max-steps", "9", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert max(report["lengths"]) <= 9
    assert report["terminated"] == [
        n < 9 or t for n, t in zip(report["lengths"], report["terminated"], strict=True)
    ]
    assert main(["data", "inspect", *report["inspect"].split()[-1:], "--json", "--cache", "cache"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == sum(report["lengths"])


def test_what_is_said_can_be_typed_and_names_no_folder(root, capsys):
    checkpoint("model.ckpt", "CartPole-v1", time_limit=9)
    argv = ["collect", "--episodes", "1", "--device", "cpu", "--policy", os.path.abspath("model.ckpt")]
    assert main([*argv, "--out", "rows:made/my rows"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith("lit-wm data inspect 'rows:made/my rows'")
    assert (
        open_cache("made/my rows")
        .meta["description"]
        .endswith("--policy model.ckpt --out 'rows:made/my rows'")
    )


def test_a_checkpoint_plays_in_its_own_environment_into_rows(root, capsys):
    module = checkpoint("model.ckpt", "CartPole-v1", time_limit=30)
    argv = ["collect", "--policy", "model.ckpt", "--episodes", "3", "--json", "--device", "cpu"]
    assert main([*argv, "--out", "rows:made/rows"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["env_options"] == {"time_limit": 30}
    assert report["policy"].startswith("DreamerV3 (eval, ")
    cache = open_cache("made/rows")
    assert cache.meta["env_id"] == "CartPole-v1"
    assert (cache.episodes["length"] - 1).tolist() == report["lengths"]
    # The same actions as the module's own, asked for the same observations.
    rows, n = cache.rows, report["lengths"][0]
    state = None
    for t in range(n):
        obs = {"obs": rows["observation"][t : t + 1].clone()}
        action, state = module.eval().policy(obs, state, torch.tensor([t == 0]), "eval", None)
        assert int(action["action"]) == int(rows["action"][t])
    assert main([*argv, "--out", "minari:cart/model-v0", "--mode", "train", "--epsilon", "0.5"]) == 0
    named = minari.load_dataset("cart/model-v0").storage.metadata["algorithm_name"]
    assert named.startswith("DreamerV3 (train, ")
    assert "epsilon 0.5" in named
    assert main([*argv, "--out", "rows:made/rows"]) == 1
    assert main([*argv, "--out", "rows:made/rows", "--overwrite", "--episodes", "2"]) == 0
    assert len(open_cache("made/rows").episodes["start"]) == 2
    assert main([*argv, "--out", "rows:made", "--overwrite"]) == 1
    assert "replaces rows only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--out", "minari:x-v0"], "give --env ID"),
        (["--env", "CartPole-v1"], "expected minari:ID"),
        (["--env", "CartPole-v1", "--out", "hdf5:x"], "expected minari:ID"),
        (["--env", "CartPole-v1", "--out", "minari:x"], "NAME-vNUMBER"),
        (["--env", "CartPole-v1", "--out", "minari:x-v0", "--epsilon", "2"], "0 to 1"),
        (["--env", "CartPole-v1", "--out", "minari:x-v0", "--episodes", "0"], "expected 1 or more"),
        (["--env", "CartPole-v1", "--out", "minari:x-v0", "--env-options", "size"], "K=V"),
        (
            ["--env", "CartPole-v1", "--out", "minari:x-v0", "--policy", "none.ckpt"],
            "--policy none.ckpt: no such",
        ),
        (["--env", "CartPool-v1", "--out", "minari:x-v0"], "CartPole-v1"),
        (["--env", "CartPole-v1", "--out", "minari:x-v0", "--env-options", "reapeat=2"], "reapeat"),
        (["--env", "Pendulum-v1", "--out", "minari:x-v0", "--policy", "model.ckpt"], "the checkpoint has"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_played(root, capsys, argv, expected):
    checkpoint("model.ckpt", "CartPole-v1")
    assert main(["collect", *argv]) == 1
    error = capsys.readouterr().err
    assert expected in error
    assert len(error.strip().splitlines()) <= 5
    assert not root.exists() or not any(root.iterdir())


def test_demos_in_an_npz_are_the_same_episodes_with_their_bounds(root, capsys):
    argv = ["collect", "--env", "lit_wm/LidarRobot-v0", "--episodes", "3", "--seed", "5", "--num-envs", "2"]
    for out in ("rows:rows", "npz:made/demos.npz"):
        assert main([*argv, "--out", out]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "look at it: lit-wm data inspect npz:made/demos.npz"
    assert os.listdir("made") == ["demos.npz"]
    cache, demos = open_cache("rows"), np.load("made/demos.npz")  # without pickle
    here = cache.rows["valid"].squeeze(-1)
    for name, column in {"observations": "observation", "actions": "action"}.items():
        np.testing.assert_array_equal(demos[name], cache.rows[column][here].numpy())
    assert demos["terminations"].sum() + demos["truncations"].sum() == 3
    assert main(["data", "inspect", "npz:made/demos.npz", "--json", "--cache", "cache"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["episodes"], shown["steps"]) == (3, int(here.sum()))
    assert (
        open_source("npz:made/demos.npz").schema.to_plain() == cache.schema.to_plain()
    )  # -1 to 1, not what was seen of it

    assert main([*argv, "--out", "npz:made/demos.npz"]) == 1
    assert main([*argv, "--out", "npz:made/demos"]) == 1
    assert "ends in .npz" in capsys.readouterr().err
    assert main([*argv, "--out", "npz:made/demos.npz", "--overwrite", "--episodes", "1"]) == 0
    assert len(np.load("made/demos.npz")["rewards"]) < int(here.sum())


def test_options_of_the_environment_in_both_spellings(root):
    argv = ["collect", "--env", "lit_wm/Dummy-v0", "--episodes", "1", "--env-options"]
    assert main([*argv, "size=32", "obs=[image, vector]", "--out", "minari:a-v0"]) == 0
    assert main([*argv, "{size: 32, obs: [image, vector]}", "--out", "minari:b-v0"]) == 0
    a, b = (minari.load_dataset(f"{name}-v0") for name in "ab")
    assert a.observation_space == b.observation_space
    assert a.observation_space["image"].shape == (32, 32, 3)
    np.testing.assert_array_equal(a[0].observations["image"], b[0].observations["image"])
    assert a.storage.metadata["env_options"] == {"size": 32, "obs": ["image", "vector"]}


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_leaves_nothing(root, number):
    env = os.environ | {"PYTHONPATH": os.path.dirname(os.path.dirname(lit_wm.__file__))}
    argv = [sys.executable, "-m", "lit_wm", "collect", "--env", "CartPole-v1", "--episodes", "1000000"]
    process = subprocess.Popen(
        [*argv, "--out", "minari:cart/x-v0"], env=env, stderr=subprocess.PIPE, text=True
    )
    while not list(root.glob(".*/new/data/main_data.hdf5")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "nothing was written" in error
    assert not any(root.iterdir())
