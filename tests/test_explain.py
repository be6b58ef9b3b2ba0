"""``explain``: what it says is what ``fit`` does."""

import json

import lightning.pytorch as pl
import pytest
import torch

from lit_wm.cli import main
from lit_wm.dreamerv3 import DreamerV3
from lit_wm.explain import LiveBytes, _Inspection, tdmpc2_flops, update_flops
from lit_wm.presets import DREAMERV3_PARAMETERS_IMAGE, TDMPC2_PARAMETERS, dreamerv3_sizes, tdmpc2_sizes
from lit_wm.tdmpc2 import TDMPC2
from lit_wm.types import Spaces, Spec

CARTPOLE = ["--config", "dreamer_cartpole", "--config", "overlay/debug"]
SPACES = {
    "image": Spaces({"image": Spec("uint8", (64, 64, 3))}, {"action": Spec("int32", (), 18)}),
    "vector": Spaces({"obs": Spec("float32", (39,))}, {"action": Spec("float32", (6,))}),
}
# Counted from the trace of the official program, 16 x 64 steps.
TFLOP = {
    "size1m": (0.10477, 0.029097), "size12m": (1.3371, 0.42895), "size25m": (2.9238, 0.95598),
    "size50m": (5.1224, 1.6914), "size100m": (11.356, 3.7873), "size200m": (20.037, 6.7167),
    "size400m": (44.745, 15.076),
}  # fmt: skip


def explained(capsys, *argv):
    assert main(["explain", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("preset", TFLOP)
def test_the_arithmetic_of_an_update_is_the_official_programs(preset):
    for spaces, expected in zip(SPACES.values(), TFLOP[preset], strict=True):
        with torch.device("meta"):
            model = DreamerV3(spaces, **dreamerv3_sizes(preset))
        assert update_flops(model, 16, 64) / 1e12 == pytest.approx(expected, rel=5e-5)


# GFLOP of an update of 256 windows, of a plan as the authors' code computes it, and of one with two critics.
GFLOP = {
    "1m": (8.8, 13.2, 13.2), "5m": (40.5, 46.4, 35.8), "19m": (141, 156, 120), "48m": (354, 375, 287),
    "317m": (2452, 2206, 1363),
}  # fmt: skip


@pytest.mark.parametrize("preset", GFLOP)
def test_the_arithmetic_of_tdmpc2s_updates_and_plans(preset):
    with torch.device("meta"):
        sizes = tdmpc2_sizes(preset)
        model = TDMPC2(SPACES["vector"], **sizes)
    whole, two = tdmpc2_flops(model, 256, drawn=sizes["num_q"]), tdmpc2_flops(model, 256)
    update, plan, plan_with_two = GFLOP[preset]
    assert whole[0] / 1e9 == pytest.approx(update, rel=5e-3)
    assert whole[1] / 1e9 == pytest.approx(plan, rel=5e-3)
    assert two[1] / 1e9 == pytest.approx(plan_with_two, rel=5e-3)


def test_the_dmc_configuration_of_tdmpc2_in_numbers(capsys):
    pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    known = explained(capsys, "--config", "tdmpc2_dmc")
    assert known["model"]["parameters"] == pytest.approx(TDMPC2_PARAMETERS["vector"]["5m"], rel=2e-3)
    assert known["model"]["copy of the critic"] == known["model"]["networks"]["critic"]
    assert known["model"]["discount"] == "gamma = 0.99"
    assert "num_samples=512" in known["model"]["planning"]
    training = known["training"]
    assert (training["updates per env step"], training["first update after env steps"]) == ("1", 2501)
    assert training["updates"] == 999_999
    memory = known["memory GB"]["tensors"]
    # weights, Adam and target; gradients are of the model, then of the policy
    total = sum(memory[k] for k in ("weights", "optimizer", "slow critic", "gradients"))
    assert 0.9 * 0.091 < total < 1.05 * 0.091
    assert 0.02 < memory["activations"] < 0.5


@pytest.mark.parametrize("more", [
    ["--data.env", "lit_wm/Dummy-v0", "--data.env_options", "{obs: [image], actions: continuous}"],
    ["--model.planner", "gradient", "--model.planner_options", "null"],
    ["--model.tasks", "mt30", "--model.task", "pendulum-swingup"],
    ["--model.train_world_model", "false", "--model.train_critic", "false", "--model.planner", "policy"],
], ids=["pixels", "gradient", "tasks", "policy"])  # fmt: skip
def test_every_kind_of_tdmpc2_is_explained(more, capsys):
    known = explained(capsys, "--config", "tdmpc2_pendulum", "--config", "overlay/debug_tdmpc2", *more)
    assert known["model"]["TFLOP per plan"] > 0
    assert known["memory GB"]["tensors"]["activations"] > 0


def test_a_measurement_of_tdmpc2_times_steps_that_plan(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--config", "tdmpc2_pendulum", "--config", "overlay/debug_tdmpc2", "--trainer.max_steps", "1000"]
    seconds = [
        1 / explained(capsys, *argv, "--measure", "4", *more)["time"]["env steps per second"]
        for more in ([], ["--model.planner", "policy"])
    ]
    assert seconds[0] > 1.5 * seconds[1]


def test_the_atari_configuration_in_numbers(capsys):
    pytest.importorskip("ale_py", reason="needs the extra 'atari'")
    known = explained(capsys, "--config", "dreamer_atari", "--model.preset", "size12m")
    assert known["model"]["parameters"] == DREAMERV3_PARAMETERS_IMAGE["size12m"]
    assert known["model"]["discount"] == "gamma = 1 - 1/333 = 0.996997"
    assert known["model"]["imagination"] == "15 steps from 1,024 states"
    assert known["training"]["updates per env step"] == "1/32"
    assert known["training"]["updates"] == 1 + (51_000_000 - 2048) // 32
    assert known["replay"]["bytes per row"]["observation"] == 64 * 64 * 3
    memory = known["memory GB"]
    assert memory["tensors"]["weights"] == pytest.approx(4 * known["model"]["parameters"] / 1e9)
    assert memory["tensors"]["optimizer"] == pytest.approx(2 * memory["tensors"]["weights"])
    assert memory["on a CPU"] == pytest.approx(memory["on a GPU"] + memory["the program"])


def test_lower_precision_needs_less(capsys):
    known = [explained(capsys, *CARTPOLE, "--trainer.precision", p) for p in ("32-true", "bf16-mixed")]
    full, half = (k["memory GB"]["tensors"]["activations"] for k in known)
    assert half < full


def test_mixed_entries_fit_on_a_page(capsys):
    assert main(["explain", *CARTPOLE, "--data.env", "lit_wm/Dummy-v0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    entries = [line for line in lines if "observation " in line[:28] or "action " in line[:28]]
    assert len(entries) >= 7
    assert len(lines) - len(entries) <= 27
    assert any("not measured" in line for line in lines)


def test_each_of_two_processes_has_half(capsys):
    one, two = (
        explained(capsys, *CARTPOLE, "--data.num_envs", "2", *more)
        for more in ([], ["--trainer.devices", "2"])
    )
    assert one["training"] == two["training"]
    assert one["model"] == two["model"]
    share = two["memory GB of 1 in 2 processes"]["tensors"]["activations"]
    assert 0.4 < share / one["memory GB"]["tensors"]["activations"] < 0.8


def test_the_first_update_comes_when_it_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*CARTPOLE, "--data.num_envs", "2", "--model.preset", "debug"]
    first = explained(capsys, *argv)["training"]["first update after env steps"]
    cli = _Inspection(argv, "cpu")
    trainer = pl.Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    trainer.fit(cli.model, cli.datamodule)
    assert 0 <= cli.datamodule.ratio.ready_at - first <= 4  # rows come two or four at a time
    cli.datamodule.close()


def test_nothing_is_allocated():
    model = _Inspection([*CARTPOLE, "--model.preset", "size400m"], "meta").model
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_a_measurement_predicts_the_end_and_leaves_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget = ["--trainer.max_steps", "1000", "--trainer.val_check_interval", "100"]
    known = explained(capsys, *CARTPOLE, *budget, "--measure", "3")
    assert known["training"]["updates"] == 1000
    time = known["time"]
    assert time["on"].endswith("3 updates")
    assert time["hours to finish"]["in all"] > 1000 * time["seconds per update"]["median"] / 3600
    assert any(key.startswith("evaluation") for key in time["hours to finish"])
    assert not list(tmp_path.iterdir())


def test_live_bytes_follow_the_storages():
    with torch.device("meta"), LiveBytes() as live:
        a = torch.empty(1000)
        b = a + 1
        half = b[:500]
        del a, b
        assert (live.now, live.peak) == (4000, 8000)
        del half
    assert live.now == 0


def test_the_name_of_a_run_that_exists_is_no_hindrance(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / "CartPole-v1" / "first"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("seed_everything: 0\n")
    assert explained(capsys, *CARTPOLE, "--name", "first")["replay"]["in"] == str(run)
    assert [p.name for p in run.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize(("words", "part"), [
    (["--measure", "few"], "--measure few: expected the number of updates"),
    (["--measure"], "expected the number of updates"),
    (["--model.imag_lenght", "3"], "'imag_length'"),
    (["--model", "lightning.pytorch.demos.boring_classes.BoringModel"], "explain knows"),
])  # fmt: skip
def test_a_wrong_input_is_explained(words, part, capsys):
    assert main(["explain", *CARTPOLE, *words]) == 1
    assert part in capsys.readouterr().err
