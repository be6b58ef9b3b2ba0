"""The shipped checkpoints play as their cards say, and the README repeats the recorded results."""

import fcntl
import inspect
import json
import os
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

from lit_wm.cli import main
from lit_wm.training_cli import load_yaml

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = sorted((ROOT / "benchmarks" / "checkpoints").glob("*.ckpt"))
RESULTS = {p.stem.removeprefix("prove-"): p for p in (ROOT / "benchmarks" / "results").glob("prove-*.json")}


def test_every_proof_has_its_page_curve_and_checkpoint():
    shipped = {p.stem for p in CHECKPOINTS}
    assert RESULTS.keys() >= shipped >= {"cartpole", "pendulum", "robot", "pixels"}
    for task, path in RESULTS.items():
        assert path.with_suffix(".md").exists()
        assert path.with_suffix(".png").exists()
        assert task not in shipped or (ROOT / "benchmarks" / "checkpoints" / f"{task}.md").exists()


@pytest.mark.parametrize("path", CHECKPOINTS, ids=lambda p: p.stem)
def test_a_shipped_checkpoint_plays_as_recorded(path, tmp_path):
    assert path.stat().st_size <= 5_000_000
    out = tmp_path / "score.json"
    assert main(["evaluate", "--ckpt", str(path), "--episodes", "8", "--seed", "7", "--json", str(out)]) == 0
    played = json.loads(out.read_text())["metrics"]["return"]
    proof = json.loads(RESULTS[path.stem].read_text())
    recorded = next(r for r in proof["results"] if r["seed"] == proof.get("shared", 0))["metrics"]
    # Other episodes than the recorded ones: eight of them scatter by the recorded spread.
    assert abs(played - recorded["return"]) <= 4 * recorded["return_std"] / 8**0.5 + 0.02 * abs(played)


@pytest.mark.parametrize("task", RESULTS)
def test_the_readme_repeats_the_recorded_figures(task):
    row = next(line for line in (ROOT / "README.md").read_text().splitlines() if f"prove-{task}.md" in line)
    values = [result["value"] for result in json.loads(RESULTS[task].read_text())["results"]]
    shown = [float(word) for word in re.findall(r"-?\d+\.?\d*", row.split("|")[3].replace(",", ""))]
    assert shown == pytest.approx(values, abs=0.05 if max(map(abs, values)) > 2 else 0.005)


def test_the_readme_repeats_the_recorded_offline_scores():
    table = (ROOT / "README.md").read_text().partition("results/offline.md")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    shown = {row[0]: [[float(x) for x in cell.split(",")] for cell in row[1:]] for row in rows}
    record = json.loads((ROOT / "benchmarks" / "results" / "offline.json").read_text())["rows"]
    for name, task in {"Pendulum-v1": "pendulum", "robot with LiDAR": "robot"}.items():
        for method, values in zip(("bc", "iql", "dreamer", "tdmpc2"), shown.pop(name), strict=True):
            found = next(r["scores"] for r in record if (r["task"], r["method"]) == (task, method))
            assert values == pytest.approx(found, abs=0.051)
    assert not shown


def test_the_guide_and_the_readme_repeat_what_was_recorded_online():
    record = json.loads((ROOT / "benchmarks" / "results" / "offline-to-online.json").read_text())["rows"]
    found: dict = {}
    for row in record:
        share = row["worst"] / row["offline"]
        found.setdefault((row["method"], row["task"]), {}).setdefault(row["arm"], []).append(share)
    table = (ROOT / "docs" / "offline.md").read_text().partition("offline-to-online.md)")[2]
    lines = [line.strip("|").split("|") for line in table.partition("\n\n")[0].splitlines()[2:]]
    for name, *cells in lines:
        method, task = name.lower().replace("-", "").replace("dreamerv3", "dreamer").strip().split(", ")
        arms = found.pop((method, task))
        for arm, cell in zip(("kept", "alone", "steep"), cells, strict=True):
            shown = [float(x) for x in cell.split(",") if x.strip()]
            assert shown == pytest.approx(arms.get(arm, []), abs=0.0051)
    assert not found
    worst = min(row["worst"] / row["offline"] for row in record if row["arm"] == "kept")
    assert f"kept at least {int(100 * worst)} %" in (ROOT / "README.md").read_text()


def test_the_guide_repeats_what_demonstrations_saved():
    record = json.loads((ROOT / "benchmarks" / "results" / "robot-demos.json").read_text())["rows"]
    text = (ROOT / "docs" / "offline.md").read_text()
    table = text.partition("robot-demos.md)")[2]
    lines = [line.strip("|").split("|") for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert len(lines) == 3
    for (_, cell), arm in zip(lines, ("alone", "demos", "demos+pretraining"), strict=True):
        found = [row["env_steps"] for row in record if row["arm"] == arm]
        shown = [None if "not" in x else int(x.replace(",", "")) for x in cell.split(";")]
        assert shown == found
    cloned = [row["returns"] for row in record if row["arm"] == "demos+pretraining"]
    later = [returns[next(i for i, r in enumerate(returns) if r >= 0.8) :] for returns in cloned]
    lowest, last = min(map(min, later)), {returns[-1] for returns in later}
    assert last == {1.0}
    assert f"fall to {lowest:.2f} at worst" in text


@pytest.fixture
def proving(monkeypatch, tmp_path):
    """(prove, proof of four updates, run, file with the words of its training), which is done at once."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import prove

    options = {"trainer.max_steps": 4, "data.env": None}
    proof = prove.Proof("dreamer_cartpole", (0,), "return", 0, "return", options=options)
    run, python, words = tmp_path / "run", tmp_path / "python", tmp_path / "words"
    (run / "checkpoints").mkdir(parents=True)
    config = prove.settings(proof) | {"seed_everything": 0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    torch.save({"global_step": 4}, tmp_path / "done")
    there = f"{run}/checkpoints"
    python.write_text(
        f'#!/bin/sh\necho "$@" > {words}\nmkdir -p {there}\ncp {tmp_path}/done {there}/last.ckpt\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(prove.sys, "executable", str(python))
    return prove, proof, run, words


def test_a_proof_goes_on_from_the_newest_checkpoint_there_is(proving):
    prove, proof, run, words = proving
    for name, updates in (("updates-000000001", 1), ("best", 2)):
        torch.save({"global_step": updates}, run / "checkpoints" / f"{name}.ckpt")
    os.utime(run / "checkpoints" / "updates-000000001.ckpt", (1, 1))
    prove.train(proof, 0, run)
    assert words.read_text().split()[2:5] == ["fit", "--ckpt_path", str(run / "checkpoints" / "best.ckpt")]
    words.unlink()
    prove.train(proof, 0, run)
    assert not words.exists()  # it has finished
    torch.save({"global_step": 3}, run / "checkpoints" / "last.ckpt")
    prove.train(proof, 0, run)
    assert words.read_text().split()[4] == str(run / "checkpoints" / "last.ckpt")


def test_a_proof_whose_best_is_its_end_is_not_trained_again(proving, tmp_path):
    prove, proof, run, words = proving
    torch.save({"global_step": 4}, run / "checkpoints" / "best.ckpt")
    prove.train(proof, 0, run)
    assert not words.exists()
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 4


def test_a_proof_without_a_checkpoint_begins_anew_unless_it_is_under_way(proving):
    prove, proof, run, words = proving
    (run / "checkpoints" / ".last.ckpt").write_text("cut")
    with open(run.with_suffix(".log"), "a") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process"):
            prove.train(proof, 0, run)
    assert (run / "config.yaml").exists()
    prove.train(proof, 0, run)
    assert "--ckpt_path" not in words.read_text()
    assert {p.name for p in run.rglob("*") if p.is_file()} == {"processor_seconds", "last.ckpt"}
    assert (run.with_name("run-killed") / "config.yaml").exists()  # nothing is lost


def test_a_proof_beside_an_environment_goes_on_with_its_replay_or_begins_anew(proving):
    prove, proof, run, words = proving
    proof.options["data.env"] = "CartPole-v1"
    (run / "config.yaml").write_text(yaml.safe_dump(prove.settings(proof) | {"seed_everything": 0}))
    torch.save({"global_step": 3}, run / "checkpoints" / "best.ckpt")
    prove.train(proof, 0, run)
    assert "--ckpt_path" not in words.read_text()
    (run / "checkpoints" / "last.ckpt").unlink()
    prove.train(proof, 0, run)
    assert run.with_name("run-killed1").exists()  # no room is taken twice
    assert (run.with_name("run-killed") / "checkpoints" / "best.ckpt").exists()


def test_the_offline_proofs_name_options_and_files_that_exist(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import prove_offline as offline

    from datamodules import ReplayDataModule
    from lit_wm import DreamerV3Module, TDMPC2Module

    known = {"dreamer": DreamerV3Module, "tdmpc2": TDMPC2Module}
    groups = {
        m: {"model": inspect.signature(kind), "data": inspect.signature(ReplayDataModule)}
        for m, kind in known.items()
    }
    of_model = [*offline.OPTIONS.values(), offline.TINY, offline.GENTLE, {"dreamer": offline.OFFLINE}]
    of_model += [{"dreamer": task.offline} for task in offline.TASKS.values()]
    for model, options in [(m, o) for named in of_model for m, o in named.items()] + [
        ("dreamer", options) for options in (*offline.DEMOS.values(), *offline.ARMS.values())
    ]:
        for group, name in (path.split(".") for path in options):
            assert name in groups[model][group].parameters, name
    for task in offline.TASKS.values():
        assert task.judged >= 20
        assert (ROOT / "benchmarks" / "checkpoints" / f"{task.expert}.ckpt").exists()
        for config in task.configs.values():
            assert load_yaml(ROOT / "configs" / f"{config}.yaml")["data"]["init_args"]["env"] == task.env


def test_the_guide_to_planners_repeats_what_was_measured():
    def cells(path, mark):
        lines = (ROOT / path).read_text().partition(mark)[2].partition("\n\n")[0].splitlines()
        lines = [line.strip("|").split("|") for line in lines if "---" not in line]
        return [[cell.strip(" `") for cell in line] for line in lines]

    measured = cells("benchmarks/results/planning.md", "| options |\n")
    found = {(row[0].rpartition("/")[2][:5], row[1], row[3]): f"{row[4]}; {row[7]}" for row in measured}
    shown = cells("docs/planning.md", "| robot, TD-MPC2 |\n")
    columns = [(task, model) for task in ("Pendu", "Lidar") for model in ("DreamerV3", "TDMPC2")]
    table = {(*c, row[0]): cell for row in shown for c, cell in zip(columns, row[1:], strict=True)}
    assert table == found
    assert len(table) == 20


@pytest.mark.parametrize(
    ("words", "recorded"),
    [([], True), (["--task", "robot"], False), (["--seeds", "2"], False), (["--tiny"], False)]
    + [(["--methods", "tdmpc2", "tdmpc2+bc"], False)],
)
def test_only_the_whole_proof_writes_over_its_record(words, recorded, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import prove_offline as offline

    seen = []
    monkeypatch.setattr(offline.Proofs, "prove_offline", lambda self: seen.append(self.given.out) or True)
    monkeypatch.setattr(sys, "argv", ["prove_offline.py", "offline", "--runs", str(tmp_path), *words])
    assert offline.main() == 0
    assert (seen == [ROOT / "benchmarks" / "results"]) is recorded
    assert recorded or seen[0].is_relative_to(tmp_path)


def test_the_table_of_planners_names_what_cannot_be_and_survives_a_mistake(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import planning

    from lit_wm.errors import ConfigError

    page, ckpt = tmp_path / "planning.md", str(ROOT / "benchmarks" / "checkpoints" / "cartpole.ckpt")
    argv = ["planning.py", "--ckpt", ckpt, "--episodes", "1", "--max-episode-steps", "4", "--out", str(page)]
    monkeypatch.setattr(sys, "argv", [*argv, "--planners", "policy", "random", "gradient"])
    planning.main()
    before = page.read_text()
    assert "| DreamerV3 |" in before
    assert re.findall(r"\| (policy|gradient|random) \|", before) == ["policy", "random"]
    assert before.endswith("cartpole.ckpt: `gradient` has no gradient of a choice.\n")
    monkeypatch.setattr(sys, "argv", [*argv, "--planners", "mppi", "--options", "{mppi: {num_sample: 32}}"])
    with pytest.raises(ConfigError, match="num_sample"):
        planning.main()
    assert page.read_text() == before
