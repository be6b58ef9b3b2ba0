"""A package that knows nothing of this one: its environment and its demos train, evaluate and plan from the
command line, as README.md and docs say it.
"""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import lit_wm

ROBOT = '''
import gymnasium as gym
import numpy as np


class Drive(gym.Env):
    """Drive to a goal: 34 numbers are seen, speed (m/s) and turning rate (rad/s) are chosen."""

    def __init__(self):
        self.observation_space = gym.spaces.Box(-10, 10, (34,), np.float32)
        self.action_space = gym.spaces.Box(np.float32([-0.2, -2]), np.float32([0.8, 2]))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.pose, self.goal = np.zeros(3), self.np_random.uniform(0.5, 1.5, 2)
        return self.see(), {}

    def step(self, action):
        self.pose[2] += 0.2 * action[1]
        self.pose[:2] += 0.2 * action[0] * np.array([np.cos(self.pose[2]), np.sin(self.pose[2])])
        left = np.linalg.norm(self.goal - self.pose[:2])
        return self.see(), float(left < 0.3), bool(left < 0.3), False, {"is_success": bool(left < 0.3)}

    def see(self):
        x, y, turn = self.pose
        rays = np.minimum(np.abs(self.goal - self.pose[:2]).sum(), 3) * np.ones(24)
        numbers = [x, y, np.cos(turn), np.sin(turn), *self.goal, *(self.goal - [x, y]), 0, 1]
        return np.concatenate([numbers, rays]).astype(np.float32)


gym.register("my_robot/Drive-v0", Drive, max_episode_steps=40)
'''
RECORD = """
import gymnasium as gym, numpy as np
env = gym.make("my_robot:my_robot/Drive-v0")
columns = {"observations": [], "actions": [], "rewards": [], "dones": []}
for episode in range(6):
    obs, done = env.reset(seed=episode)[0], False
    while not done:
        bearing = np.arctan2(obs[7], obs[6]) - np.arctan2(obs[3], obs[2])
        action = np.float32([0.5 * np.cos(bearing), np.clip(5 * bearing, -2, 2)])
        after, reward, terminated, truncated, _ = env.step(action)
        done = terminated or truncated
        for name, value in zip(columns, (obs, action, reward, done)):
            columns[name].append(value)
        obs = after
np.savez("demos.npz", **{name: np.array(values) for name, values in columns.items()})
"""
# dones are ends of both kinds; these drives end at the goal.
DEMOS = {"uri": "npz:demos.npz?dones_are=terminals", "action_low": [-0.2, -2], "action_high": [0.8, 2]}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a package beside it on the path, and its demos inside."""
    tmp_path = tmp_path_factory.mktemp("outside")
    package, work = tmp_path / "code" / "my_robot", tmp_path / "work"
    package.mkdir(parents=True)
    work.mkdir()
    (package / "__init__.py").write_text(ROBOT)

    def run(*argv, status=0):
        paths = [str(package.parent), str(Path(lit_wm.__file__).parents[1])]
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "LITWM_CACHE": str(tmp_path / "cache")}
        command = [sys.executable, "-P", *argv]  # -P: as installed, the folder is not on the path
        done = subprocess.run(command, cwd=work, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr[-3000:]
        return done.stdout

    run("-c", RECORD)
    return work, run


def test_the_doctor_says_what_the_arrays_do_not(place):
    said = place[1]("-m", "lit_wm", "data", "doctor", DEMOS["uri"])
    assert "0 errors," in said
    assert "give action_low and action_high" in said


FIT = {
    "dreamer": "--config configs/dreamer_robot_demos.yaml --config configs/overlay/debug.yaml "
    "--data.prefill 40 --trainer.max_steps 5 --model.pretrain {world_model:_1,actor:_1}",
    "tdmpc2": "--config configs/tdmpc2_robot.yaml --config configs/overlay/debug_tdmpc2.yaml",
}


@pytest.mark.parametrize("model", FIT)
def test_a_robot_of_ones_own_trains_from_demos_evaluates_and_plans(model, place):
    work, run = place
    source = json.dumps([DEMOS | {"weight": [[0, 1], [100, 0.1]]}])
    flags = [word.replace(":_", ": ") for word in FIT[model].split(" ")]
    flags += ["--data.env", "my_robot:my_robot/Drive-v0", "--data.sources", source, "--name", model]
    run("-m", "lit_wm", "fit", *flags, "--trainer.logger", "false")
    (folder,) = work.glob(f"runs/*/{model}")
    with open(folder / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    shares = [float(row["replay/share/source0"]) for row in rows if row.get("replay/share/source0")]
    assert shares[0] == (1 if model == "dreamer" else pytest.approx(0.5, abs=0.26))  # pretraining is on demos
    assert 0.2 < shares[-1] < 0.8  # and the robot's own drives the rest
    of_demos = {k for row in rows for k, v in row.items() if v and k.startswith("train/source0/loss/")}
    assert len(of_demos) > 2
    flags = ["--ckpt", str(folder), "--episodes", "2", "--json", "score.json"]
    run("-m", "lit_wm", "evaluate", *flags, *(["--planner", "mppi"] if model == "dreamer" else []))
    score = json.loads((work / "score.json").read_text())
    assert score["env"] == "my_robot:my_robot/Drive-v0"
    assert score["metrics"]["episodes"] == 2
    assert 0 <= score["metrics"]["success"] <= 1
