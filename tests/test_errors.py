"""Wrong inputs and what each prints: the cause and the way out in a few lines, never a traceback."""

from pathlib import Path

import pytest
import torch

from lit_wm.cli import main
from lit_wm.errors import nearest

GOLDEN = Path(__file__).parent / "parity" / "data" / "tdmpc2"
OFFICIAL = str(GOLDEN / "official_checkpoint_old_format_state.pt")

CARTPOLE = ["fit", "--config", "configs/dreamer_cartpole.yaml", "--config", "configs/overlay/debug.yaml"]
FILES = {
    "broken.yaml": "model: [1\ndata:",
    "list.yaml": "- 1\n- 2",
    "deep.yaml": "trainer: {callbacks: [{class_path: lit_wm.callbacks.DreamVideo, init_args: {row: 2}}]}",
    "misplaced.yaml": "model: {preset: size1m}",
    "share.yaml": "model: {init_args: {pretrain: {world_model: 0.02}}}",
    "cut.ckpt": "PK\x03\x04 and no more",
}

# What is typed, and what must be in the message.
WRONG = {
    "a misspelt verb": (["ft"], ["unknown verb 'ft'", "'fit'"]),
    "nothing to train": (["fit"], ["--config", "dreamer_atari.yaml"]),
    "a missing file": (
        ["fit", "--config", "configs/dreamer_atori.yaml"],
        ["no such file", "'dreamer_atari.yaml'"],
    ),
    "broken YAML": (["fit", "--config", "broken.yaml"], ["broken.yaml, line", "not YAML"]),
    "YAML without keys": (["fit", "--config", "list.yaml"], ["list.yaml", "found list"]),
    "a misspelt flag": ([*CARTPOLE, "--model.presett", "debug"], ["unknown key 'model.presett'", "'preset'"]),
    "a misspelt key in a list": (
        [*CARTPOLE, "--config", "deep.yaml"],
        ["callbacks[0].init_args.row'", "'rows'"],
    ),
    "a key in the wrong place": ([*CARTPOLE, "--config", "misplaced.yaml"], ["'model.preset'", "init_args"]),
    "a key of another group": (
        [*CARTPOLE, "--trainer.batch_size", "3"],
        ["'trainer.batch_size'", "'data.batch_size'"],
    ),
    "an unknown preset": ([*CARTPOLE, "--model.preset", "size51m"], ["'size51m'", "'size1m'"]),
    "a word for a number": ([*CARTPOLE, "--model.lr", "fast"], ["model.lr: got 'fast'", "Expected: float"]),
    "a share for a number of updates": (
        [*CARTPOLE, "--config", "share.yaml"],
        ["model.pretrain: got '0.02'", "whole numbers of updates", "{world_model: 10000"],
    ),
    "a size that does not fit": ([*CARTPOLE, "--model.deter", "33"], ["deter=33", "divisible"]),
    "a seed in two places": (
        [*CARTPOLE, "--data.seed", "3"],
        ["'data.seed' cannot be set", "seed_everything"],
    ),
    "float16": ([*CARTPOLE, "--trainer.precision", "16-mixed"], ["16-mixed is refused", "bf16-mixed"]),
    "gradient clipping": (
        [*CARTPOLE, "--trainer.gradient_clip_val", "1.0"],
        ["gradient_clip_val is refused", "Remove"],
    ),
    "gradient accumulation": (
        [*CARTPOLE, "--trainer.accumulate_grad_batches", "2"],
        ["refused", "data.batch_size"],
    ),
    "a seed of evaluation near the training's": ([*CARTPOLE, "--evaluate.seed", "5"], ["evaluate.seed 5"]),
    "another strategy": ([*CARTPOLE, "--trainer.strategy", "fsdp"], ["fsdp is refused", "auto"]),
    "an unknown environment": ([*CARTPOLE, "--data.env", "CartPol-v1"], ["CartPol-v1", "CartPole"]),
    "an unknown game": ([*CARTPOLE, "--data.env", "atari:pongg"], ["pongg", "pong"]),
    "a replay larger than the disk": (
        [*CARTPOLE, "--data.capacity", "1_000_000_000_000"],
        ["GB", "capacity"],
    ),
    "nothing to resume": ([*CARTPOLE, "--ckpt_path", "last"], ["no last checkpoint", "runs/CartPole-v1"]),
    "a missing checkpoint": ([*CARTPOLE, "--ckpt_path", "lost.ckpt"], ["lost.ckpt: no such file"]),
    "a checkpoint cut off": ([*CARTPOLE, "--ckpt_path", "cut.ckpt"], ["cut.ckpt", "cut off"]),
    "the authors' checkpoint": (
        ["test", "--ckpt_path", OFFICIAL],
        ["is of the official TD-MPC2 code", f"lit-wm convert tdmpc2 {OFFICIAL} -o OUT.ckpt"],
    ),
    "the authors' checkpoint to evaluate": (["evaluate", "--ckpt", OFFICIAL], ["lit-wm convert tdmpc2"]),
    "weights of something else": (
        [*CARTPOLE, "--ckpt_path", "weights.ckpt"],
        ["weights.ckpt", "holds no training of lit-wm"],
    ),
    "a misspelt group": (
        [*CARTPOLE, "--zzz", "1"],
        ["unknown key 'zzz'", "Known there: checkpoint, ckpt_path, config"],
    ),
    "a test of nothing": (
        ["test", "--config", "dreamer_cartpole"],
        ["'test' needs a trained model", "--ckpt_path"],
    ),
    "a store that does not answer": (
        [*CARTPOLE, "--tracking.uri", "http://127.0.0.1:9"],
        ["'http://127.0.0.1:9' does not answer: Connection refused", "--trainer.logger false"],
    ),
    "a flag without its value": ([*CARTPOLE, "--config"], ["--config needs a value"]),
    "a lonely word": ([*CARTPOLE, "now"], ["now"]),
}


@pytest.fixture(autouse=True)
def _folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    torch.save({"weight": torch.zeros(2)}, "weights.ckpt")


def test_only_what_is_near_is_suggested():
    assert nearest("robot.npz", ["demos.npz", "atari.npz"]) == ""
    assert nearest("demo.npz", ["demos.npz", "atari.npz"]) == "; did you mean 'demos.npz'?"
    assert nearest("demos", ["demos.npz"]) == "; did you mean 'demos.npz'?"
    assert nearest("model.presett", ["model.preset"]) == "; did you mean 'model.preset'?"
    assert nearest("npz", ["npz", "npy"]) == ""


@pytest.mark.parametrize("mistake", WRONG)
def test_a_wrong_input_is_explained_in_a_few_lines(mistake, capfd):
    argv, expected = WRONG[mistake]
    status = main(argv)
    printed = capfd.readouterr().err
    error = printed[printed.index("error: ") :]
    assert status == 1
    assert "Traceback" not in printed
    assert len(error.strip().splitlines()) <= 5, error
    assert not Path("runs").exists()  # a start that was refused leaves nothing
    for part in expected:
        assert part in error
    words = error.partition("Known there: ")[2].split("\n")[0].split(", ")
    assert len(words) == len(set(words)), error
