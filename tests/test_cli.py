"""The command line from end to end, on CartPole with a tiny model."""

import contextlib
import csv
import io
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import lit_wm
from lit_wm import DreamerV3Module, __version__
from lit_wm.cli import main
from lit_wm.presets import DREAMERV3, DREAMERV3_PARAMETERS_IMAGE
from lit_wm.training_cli import experiment_of, merge, shorten

CARTPOLE = ["--config", "dreamer_cartpole", "--config", "overlay/debug"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished training of three updates: its run directory."""
    folder = tmp_path_factory.mktemp("cli")
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main(["fit", *CARTPOLE, "--name", "first", "--model.actent", "1e-3"]) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "CartPole-v1" / "first"


@pytest.fixture
def at_run(run, monkeypatch):
    """The same, with the working directory where the training was started."""
    monkeypatch.chdir(run.parents[2])
    return run


def csv_steps(run):
    with open(run / "metrics.csv", newline="") as file:
        return [int(row["step/grad"].removesuffix(".0")) for row in csv.DictReader(file) if row["step/grad"]]


def printed_config(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        main(["fit", *argv, "--print_config"])
    assert stop.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["presets"]])
def test_light_verbs_answer_within_a_second_and_load_no_torch(argv):
    code = f"""
import sys
from lit_wm.cli import main
main({argv})
assert not {{'torch', 'lightning'}} & set(sys.modules)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    # Processor time: the wall clock of a busy machine would fail for other reasons.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize(
    "sources", ["minari:a/b-v0?drop=x", ["minari:a/b-v0"], [{"uri": "minari:a/b-v0"}, "x:y"]]
)
def test_runs_on_data_are_named_after_the_first_source(sources):
    assert experiment_of({"data.sources": sources}) == "minari-a-b-v0"
    assert experiment_of({"data.sources": sources, "data.env": "E-v0"}) == "E-v0"


def test_version_and_presets_say_what_the_package_holds(capsys):
    assert main(["--version"]) == 0
    assert main(["presets"]) == 0
    printed = capsys.readouterr().out
    assert f"lit-wm {__version__}" in printed
    for name in DREAMERV3:
        assert name in printed
    for count in DREAMERV3_PARAMETERS_IMAGE.values():
        assert f"{count:,}" in printed


def test_no_verb_prints_the_help_and_fails(capsys):
    assert main([]) == 2
    assert "usage: lit-wm" in capsys.readouterr().out


def test_a_broken_pipe_is_no_traceback():
    done = subprocess.run(
        f"{sys.executable} -m lit_wm presets | head -c 1", shell=True, capture_output=True, text=True
    )
    assert "Traceback" not in done.stderr


def test_a_package_in_the_working_directory_is_found_and_hides_none(tmp_path):
    (tmp_path / "beside.py").write_text("import gymnasium\ngymnasium.register('Beside-v0', 'gymnasium.envs."
                                        "classic_control:CartPoleEnv', max_episode_steps=5)\n")  # fmt: skip
    (tmp_path / "lit_wm").mkdir()  # nor ours
    (tmp_path / "lit_wm" / "__init__.py").write_text("raise SystemExit(9)")
    script = "import sys; from lit_wm.cli import main; sys.exit(main())"  # what the command lit-wm is
    argv = [
        "collect",
        "--env",
        "beside:Beside-v0",
        "--policy",
        "random",
        "--episodes",
        "1",
        "--out",
        "npz:d.npz",
    ]
    paths = os.environ | {"PYTHONPATH": str(Path(lit_wm.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-P", "-c", script, *argv], cwd=tmp_path, env=paths,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "d.npz").exists()


def test_later_files_win_over_earlier_and_flags_over_all(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("a.yaml").write_text("model: {init_args: {lr: 1e-3, warmup: 7}}\ntrainer: {max_steps: 1}")
    Path("b.yaml").write_text("model: {init_args: {lr: 2e-3}}\ntrainer: {max_steps: 2}")
    files = ["--config", "dreamer_cartpole", "--config", "a.yaml", "--config=b.yaml"]
    config = printed_config(capsys, "--trainer.max_steps", "3", *files)
    model = config["model"]["init_args"]
    assert (model["lr"], model["warmup"], model["deter"]) == (2e-3, 7, 256)
    assert config["trainer"]["max_steps"] == 3
    assert config["data"]["init_args"]["env"] == "CartPole-v1"


def test_the_defaults_fit_online_training(capsys):
    trainer = printed_config(capsys, "--data.env", "CartPole-v1")["trainer"]
    assert trainer["max_epochs"] == -1
    assert trainer["num_sanity_val_steps"] == 0
    assert trainer["check_val_every_n_epoch"] is None
    assert trainer["use_distributed_sampler"] is False


def test_another_class_drops_the_arguments_of_the_former():
    low = {"model": {"class_path": "a.A", "init_args": {"x": 1}}, "trainer": {"max_steps": 1}}
    assert merge(low, {"model": {"init_args": {"y": 2}}})["model"]["init_args"] == {"x": 1, "y": 2}
    assert merge(low, {"model": {"class_path": "b.B"}})["model"] == {"class_path": "b.B"}
    assert low["model"]["init_args"] == {"x": 1}


def test_long_parser_messages_shrink_to_their_cause():
    message = """Parser key "trainer.precision":
  Does not validate against any of the Union subtypes
  Subtypes: [typing.Literal[64, 32], typing.Literal['bf16-mixed', '32-true'], <class 'NoneType'>]
  Errors:
    - Expected a typing.Literal[64, 32]
    - Expected a typing.Literal['bf16-mixed', '32-true']
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: bf16-mixd"""
    assert shorten(message).splitlines() == [
        "trainer.precision: got 'bf16-mixd'; did you mean 'bf16-mixed'?",
        "Expected: 64, 32, bf16-mixed, 32-true",
    ]


def test_a_refusal_of_the_data_is_said_with_its_remedy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", "--config", "dreamer_minari", "--data.sources", "[npz:x?drop=a,b]"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: data.sources: 'b' is no source; in a list a comma begins the next one.",
        "  Write the URI in quotes: --data.sources '[\"npz:x?drop=a,b\"]'",
    ]


def test_a_run_directory_holds_all_that_made_the_run(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["actent"] == 1e-3
    assert config["seed_everything"] == 0
    assert "spaces" not in config["model"]["init_args"]
    record = json.loads((run / "run.json").read_text())
    assert record["versions"]["torch"] == torch.__version__
    assert csv_steps(run)[-1] == 3
    assert (run / "checkpoints" / "last.ckpt").is_file()

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run.parents[2]}/mlruns.db")
    tracked = client.get_run(record["mlflow"]["run_id"])
    assert client.get_experiment(tracked.info.experiment_id).name == "CartPole-v1"
    assert tracked.info.run_name == "first"
    assert tracked.data.metrics["step/grad"] == 3
    assert tracked.data.params["actent"] == "0.001"


def test_the_checkpoint_is_plain_data(run):
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["spaces"]["action"]["action"]["classes"] == 2


def test_last_goes_on_in_its_run_with_its_configuration_under_the_flags(at_run, capsys):
    with torch.random.fork_rng():
        assert main(["fit", "--ckpt_path", "last", "--trainer.max_steps", "5"]) == 0
    printed = capsys.readouterr().out
    assert "trainer.max_steps: 5 (the checkpoint's run had 3)" in printed
    assert "actent" not in printed  # unchanged: not a difference
    assert csv_steps(at_run) == [1, 2, 3, 4, 5]
    assert torch.load(at_run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert yaml.safe_load((at_run / "config.yaml").read_text())["model"]["init_args"]["actent"] == 1e-3
    before = json.loads((at_run / "run.json").read_text())["mlflow"]["run_id"]
    from mlflow import MlflowClient

    client = MlflowClient("sqlite:///mlruns.db")
    assert [m.value for m in client.get_metric_history(before, "step/grad")][-1] == 5


def test_a_new_name_begins_a_new_run_from_the_checkpoint(at_run):
    argv = ["fit", "--config", "dreamer_cartpole", "--config", "overlay/debug", "--ckpt_path", "last"]
    assert main([*argv, "--name", "second", "--trainer.max_steps", "6", "--trainer.logger", "false"]) == 0
    second = at_run.parent / "second"
    assert csv_steps(second)[-1] == 6
    assert "mlflow" not in json.loads((second / "run.json").read_text())


def test_a_run_is_never_overwritten(at_run, capsys):
    assert main(["fit", *CARTPOLE, "--name", "first"]) == 1
    assert "already holds a run" in capsys.readouterr().err


def test_runs_that_begin_in_one_second_have_folders_of_their_own(at_run, monkeypatch):
    monkeypatch.setattr("lit_wm.training_cli.time.strftime", lambda form: "now")
    taken = at_run.parent / f"now-{os.getpid()}"
    taken.mkdir()
    (taken / "config.yaml").write_text("{}")
    assert main(["fit", *CARTPOLE, "--trainer.max_steps", "1", "--trainer.logger", "false"]) == 0
    assert (at_run.parent / f"{taken.name}-1" / "config.yaml").exists()
    assert (taken / "config.yaml").read_text() == "{}"


def test_a_run_without_its_last_checkpoint_goes_on_from_what_there_is(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cut = Path("runs/CartPole-v1/cut")
    shutil.copytree(run, cut)
    (cut / "checkpoints" / "last.ckpt").rename(cut / "checkpoints" / ".last.ckpt")  # killed while it saved
    for argv in (["--ckpt_path", "last"], ["--ckpt_path", str(cut)], [*CARTPOLE, "--name", "cut"]):
        assert main(["fit", *argv]) == 1
        (go_on,) = re.findall(r"--ckpt_path (\S+best.ckpt) \(", capsys.readouterr().err)
    assert main(["fit", "--ckpt_path", go_on, "--trainer.max_steps", "9", "--trainer.logger", "false"]) == 0
    assert torch.load(cut / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 9
    for path in cut.glob("checkpoints/*.ckpt"):
        path.unlink()
    assert main(["fit", *CARTPOLE, "--name", "cut"]) == 1
    printed = capsys.readouterr().err
    assert "It has no checkpoint: remove it" in printed
    assert "--ckpt_path" not in printed


def test_another_size_than_the_checkpoints_is_an_error(at_run, capsys):
    argv = [
        "fit",
        "--ckpt_path",
        str(at_run),
        "--trainer.max_steps",
        "9",
        "--name",
        "third",
        "--model.units",
        "24",
    ]
    assert main(argv) == 1
    assert "other parts or sizes" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_training_with_its_own_status_and_a_checkpoint_to_go_on_from(
    number, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    step = DreamerV3Module.training_step

    def interrupted(self, batch, batch_idx):
        step(self, batch, batch_idx)
        if self.updates == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(DreamerV3Module, "training_step", interrupted)
    fit = ["fit", *CARTPOLE, "--trainer.logger", "false", "--name", "cut", "--trainer.max_steps", "4"]
    assert main(fit) == 128 + number
    printed = capsys.readouterr()
    assert "stopped after update 2" in printed.out
    assert f"{number.name}: the training was stopped before its end" in printed.err
    assert main(["fit", "--ckpt_path", "last"]) == 0
    last = torch.load(Path("runs/CartPole-v1/cut/checkpoints/last.ckpt"), weights_only=True)
    assert last["global_step"] == 4


@pytest.mark.parametrize(
    ("every", "said"),
    [("2", r"fit: return [\d.]+: 1 episode at update 2 "), ("9", "nothing was evaluated: .*interval is 9")],
)
def test_fit_ends_with_what_was_last_found(tmp_path, monkeypatch, capsys, every, said):
    monkeypatch.chdir(tmp_path)
    assert main(["fit", *CARTPOLE, "--trainer.logger", "false", "--trainer.val_check_interval", every]) == 0
    assert re.search(said, capsys.readouterr().out)


def test_validate_test_and_predict_each_leave_their_file(at_run, capsys):
    assert main(["validate", "--ckpt_path", str(at_run)]) == 0
    assert main(["test", "--ckpt_path", str(at_run / "checkpoints" / "best.ckpt")]) == 0
    assert main(["predict", "--ckpt_path", str(at_run)]) == 0
    assert "eval/return" in capsys.readouterr().out
    assert json.loads((at_run / "validate.json").read_text())["metrics"]["eval/episodes"] == 1
    test = json.loads((at_run / "test.json").read_text())
    assert min(test["returns"]) <= test["metrics"]["test/return"] <= max(test["returns"])
    with np.load(at_run / "episodes.npz", allow_pickle=False) as episodes:
        assert episodes["action/action"].shape[0] == episodes["reward"].shape[0] > 1


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """(run directory of two updates on six episodes of nobody's environment, what was printed)."""
    folder, printed = tmp_path_factory.mktemp("offline"), io.StringIO()
    rng, ends = np.random.default_rng(0), np.arange(120) % 20 == 19
    arrays = {"observations": rng.normal(size=(120, 3)), "actions": rng.uniform(-1, 1, (120, 2))}
    arrays |= {"rewards": rng.normal(size=120)}
    np.savez(folder / "d.npz", dones=ends, **{k: v.astype(np.float32) for k, v in arrays.items()})
    source = {"uri": f"npz:{folder}/d.npz?dones_are=terminals", "action_low": [-1, -1], "action_high": [1, 1]}
    flags = ["--config", "overlay/debug", "--name", "held", "--model.preset", "debug"]
    flags += ["--data.sources", json.dumps([source]), "--data.val_fraction", "0.4"]
    flags += ["--trainer.max_steps", "2", "--trainer.val_check_interval", "1", "--trainer.logger", "false"]
    flags += ["--data.cache_dir", str(folder / "cache")]
    flags += ["--checkpoint.monitor", "val/loss/rew", "--checkpoint.mode", "min"]
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed):
        assert main(["fit", *flags]) == 0
    (run,) = folder.glob("runs/*/held")
    return run, printed.getvalue()


def validations(run):
    """Of each validation the figures of held-out episodes that the training has logged."""
    with open(run / "metrics.csv", newline="") as file:
        rows = [
            {k: float(v) for k, v in row.items() if k.startswith("val/") and v}
            for row in csv.DictReader(file)
        ]
    return [row for row in rows if row]


def test_held_out_episodes_are_shown_at_the_end_and_by_validate(offline, capsys):
    run, printed = offline
    *_, last = validations(run)
    shown = printed.partition("fit: held-out episodes at update 2:\n")[2].splitlines()
    assert re.fullmatch(r"  open_loop/obs +@1 +[\d.e-]+ +@5 +[\d.e-]+ +@15 +[\d.e-]+", shown[1])
    assert f"rew {last['val/loss/rew']:.4g}" in shown[0]
    assert main(["validate", "--ckpt_path", str(run / "checkpoints" / "last.ckpt")]) == 0
    assert "\n".join(shown[:-2]) in capsys.readouterr().out
    assert json.loads((run / "validate.json").read_text())["metrics"] == pytest.approx(last, rel=1e-6)
    assert sorted(p.name for p in (run / "replay").iterdir()) == [
        "rank0",
        "validate0",
    ]  # of the fit: untouched
    assert main(["validate", "--ckpt_path", str(run), "--data.val_fraction", "0"]) == 1
    assert "no held-out episodes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ("de", r"drew from 1 source, this one would from 2 sources\.\n.*same data.sources(.|\n)*start_from"),
        ("e", r"Resume with the same data.sources"),
    ],
)
def test_other_data_than_the_checkpoints_are_refused_and_leave_the_run_as_it_was(
    offline, files, said, tmp_path, monkeypatch, capsys
):
    run = tmp_path / "run"
    shutil.copytree(offline[0], run)
    arrays = dict(np.load(offline[0].parents[2] / "d.npz"))
    np.savez(tmp_path / "d.npz", **arrays)
    np.savez(tmp_path / "e.npz", **{k: v[:80] for k, v in arrays.items()})
    config = yaml.safe_load((run / "config.yaml").read_text())["data"]["init_args"]
    (source,) = config["sources"]
    sources = [source | {"uri": f"npz:{tmp_path}/{name}.npz?dones_are=terminals"} for name in files]
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    argv = ["fit", "--ckpt_path", str(run), "--trainer.max_steps", "3"]
    assert main([*argv, "--data.sources", json.dumps(sources)]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before
    assert main(argv) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["trainer"]["max_steps"] == 3


def test_best_can_be_what_foresees_held_out_episodes_best(offline):
    run, _ = offline
    losses = [row["val/loss/rew"] for row in validations(run)]
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)
    assert len(losses) == 2
    assert best["global_step"] == 1 + losses.index(min(losses))


def test_a_folder_that_hides_the_data_modules_is_named(tmp_path):
    (tmp_path / "datamodules").mkdir()
    (tmp_path / "datamodules" / "__init__.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(Path(lit_wm.__file__).parents[1])}
    command = [sys.executable, "-m", "lit_wm", "fit", *CARTPOLE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "hides the package 'datamodules'" in done.stderr
    assert "Traceback" not in done.stderr


def test_two_processes_train_save_and_resume(tmp_path):
    root = str(Path(lit_wm.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    first = [*CARTPOLE, "--trainer.devices", "2", "--trainer.logger", "false", "--name", "two"]
    for more in (first, ["--ckpt_path", "last", "--trainer.max_steps", "5"]):
        command = [sys.executable, "-m", "lit_wm", "fit", *more]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "CartPole-v1" / "two"
    assert csv_steps(run) == [1, 2, 3, 4, 5]
    assert len(list(run.glob("checkpoints/resume-*/rank*.pt"))) == 2
