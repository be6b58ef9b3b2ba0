"""Does it learn from data alone, does it keep that online, and what are demonstrations worth?

    python benchmarks/prove_offline.py offline [--task pendulum robot] [--methods bc iql dreamer tdmpc2 ...]
    python benchmarks/prove_offline.py online  [--task ...] [--methods dreamer tdmpc2]
    python benchmarks/prove_offline.py demos
        [--seeds 0 1] [--jobs 2] [--runs DIR] [--out DIR] [--title PAGE] [--tiny]

``offline``: ``lit-wm collect`` plays a shipped checkpoint, made medium by random actions, and a random
player. Both models learn from these episodes alone, and so do behaviour cloning of the best 30 % of them and
IQL, both of d3rlpy. DreamerV3 is judged as its evaluations are, by samples of its policy; ``greedy`` beside
it are its most likely actions, as those two act. A score is 100 (return - random) / (expert - random); the
expert is the checkpoint without random actions. ``METHOD+OPTION`` adds options of :data:`OPTIONS`, such as
``tdmpc2+ensemble``.

``online``: the last offline checkpoint of each method goes on in the environment, beside the dataset and, as
ablations of DreamerV3, without it or at its configuration's rate and warm-up (:data:`ARMS`). What counts is
the worst evaluation, relative to the offline score.

``demos``: env steps until the robot reaches its goals, alone, with 50 drives of the shipped checkpoint, and
with pretraining on them as well.

Every training is a process of one thread; what has finished is not repeated, what was interrupted goes on.
Pages of other tasks, methods or seeds than the default lie beside the runs, those of ``--tiny`` too, which
goes through all of it in minutes and proves nothing.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prove import ENV, ROOT, SHOWN, Proof, curve, judge, machine, processor_minutes, random_player, train

from lit_wm.callbacks.evaluate import run_episodes
from lit_wm.envs import make_vector_env
from lit_wm.noise import stream_seed
from lit_wm.scores import Reference, normalized_score
from lit_wm.tracking import versions

Json = dict[str, Any]


@dataclass
class Task:
    """An environment, who plays for the data, and how much of it."""

    env: str
    expert: str  # a shipped checkpoint
    epsilon: float  # its share of random actions
    episodes: int  # of the medium player, and as many random ones
    configs: dict[str, str]  # by model
    env_steps: int  # online
    judged: int  # episodes of the last judgement
    online: dict[str, tuple[int, int]]  # by model: updates between two evaluations, and their episodes
    iql: Json = field(default_factory=dict)  # d3rlpy's options
    env_options: Json = field(default_factory=dict)
    offline: Json = field(default_factory=dict)  # of DreamerV3


TASKS = {
    # Rewards of each step: scaled as IQL's authors do it for such tasks.
    "pendulum": Task("Pendulum-v1", "pendulum", 0.6, 100, {"dreamer": "dreamer_pendulum",
                     "tdmpc2": "tdmpc2_pendulum"}, 2_500, 30, {"dreamer": (250, 10), "tdmpc2": (500, 10)},
                     {"reward_scaler": ("ReturnBased", {"multiplier": 1000.0})}),
    # A reward at the goal only: -1 a step, expectile and temperature as they do it for mazes. A decision is
    # for two steps, which TD-MPC2 needs here; the checkpoint has learnt to take them one by one.
    # DreamerV3's horizon is as many decisions as an episode may have; ``patience`` is the default.
    "robot": Task("lit_wm/LidarRobot-v0", "robot", 0.5, 200, {"dreamer": "dreamer_robot",
                  "tdmpc2": "tdmpc2_robot"}, 3_000, 100, {"dreamer": (150, 50), "tdmpc2": (750, 50)},
                  {"reward_scaler": ("ConstantShift", {"shift": -1.0}), "expectile": 0.9,
                   "weight_temp": 10.0}, {"repeat": 2}, {"data.batch_length": 16, "model.horizon": 50.0}),
}  # fmt: skip
MODELS = ["dreamer", "tdmpc2"]
DEFAULT = {"offline": ["bc", "iql", *MODELS], "online": MODELS, "demos": MODELS}
SEEDS = [0, 1]
UPDATES = {"dreamer": 10_000, "tdmpc2": 5_000, "bc": 10_000, "iql": 30_000}
OPTIONS: dict[str, dict[str, Json]] = {
    "ensemble": dict.fromkeys(MODELS, {"model.ensemble": 5, "model.disagreement": 1.0}),
    "limit": dict.fromkeys(MODELS, {"model.ensemble": 5, "model.disagreement_limit": 4.0}),
    "bc": {"dreamer": {"model.loss_scales": {"bc": 1.0}}, "tdmpc2": {"model.bc_coef": 1.0}},
    "patience": {"dreamer": {"model.horizon": 333.0}},  # the default
    "policy": {"tdmpc2": {"model.planner": "policy", "model.planner_options": {}}},
    "mppi": {"dreamer": {"model.planner": "mppi"}},
}
OFFLINE: Json = {"model.anneal": 18_000}  # DreamerV3: the rate is halved in the end
# Online the optimizers begin anew, those of DreamerV3 at a quarter of the rate of its configurations and
# reached slowly; ``steep`` is the whole. TD-MPC2's rate never changes. ``alone`` leaves the dataset out.
GENTLE: Json = {"dreamer": {"model.lr": 1e-4, "model.warmup": 500}, "tdmpc2": {}}
ARMS: dict[str, Json] = {"kept": {}, "alone": {"data.sources": None}, "steep": {}}
DEMOS: dict[str, Json] = {
    "alone": {},
    "demos": {"data.sources": [{"uri": "DEMOS", "weight": [[0, 1], [2_000, 0.1]]}]},
    "demos+pretraining": {
        "data.sources": [{"uri": "DEMOS", "weight": [[0, 1], [3_500, 0.1]]}],
        "model.pretrain": {"world_model": 1_000, "actor": 500},
    },
}
GOALS = 0.8  # share of goals that counts as learnt, in the mean of two evaluations in a row
TINY: dict[str, Json] = {
    "dreamer": {"model.preset": "debug", "model.deter": None, "model.imag_length": 3, "data.batch_size": 2,
                "data.batch_length": 8, "data.num_envs": 1, "data.train_ratio": 1, "model.log_every": 1},
    "tdmpc2": {"model.preset": "debug", "data.batch_size": 8, "data.prefill": 20, "data.first_updates": 1,
               "data.utd": 0.05, "model.log_every": 1,
               "model.planner_options": {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 4,
                                         "iterations": 1}},
}  # fmt: skip


def lit_wm(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "lit_wm", *words], cwd=ROOT, env=ENV, check=True)


class Proofs:
    """The trainings of one command line."""

    def __init__(self, given: argparse.Namespace):
        self.given, self.runs = given, given.runs.resolve() / ("tiny" if given.tiny else "offline")
        self.updates = dict.fromkeys(UPDATES, 12) if given.tiny else UPDATES
        self.commits: set[str] = set()  # of the trainings

    def judged(self, name: str) -> int:
        return 2 if self.given.tiny else TASKS[name].judged

    # --- Data ---------------------------------------------------------------------------------------

    def collect(self, name: str) -> list[str]:
        """URIs of the task's episodes, played unless they are there."""
        task, out = TASKS[name], []
        number = 3 if self.given.tiny else task.episodes
        env = ["--env", task.env]
        if task.env_options:
            env += ["--env-options", *(f"{k}={v}" for k, v in task.env_options.items())]
        for kind, words in (
            ("medium", ["--policy", str(self.checkpoint(task)), "--epsilon", str(task.epsilon)]),
            ("random", ["--policy", "random", "--seed", "1000"]),
        ):
            folder = self.runs / "data" / f"{name}-{kind}"
            out.append(f"rows:{folder}")
            if not folder.exists():
                folder.parent.mkdir(parents=True, exist_ok=True)
                more = ["--episodes", str(number), "--num-envs", "8", "--device", "cpu", "--out", out[-1]]
                lit_wm("collect", *env, *words, *more)
        return out

    @staticmethod
    def checkpoint(task: Task) -> Path:
        return ROOT / "benchmarks" / "checkpoints" / f"{task.expert}.ckpt"

    def reference(self, name: str) -> Reference:
        """Returns of the random player and of the expert, measured here."""
        path, task = self.runs / "data" / f"{name}-reference.json", TASKS[name]
        if not path.exists():
            episodes, report = (4 if self.given.tiny else 100), path.with_suffix(".tmp")
            words = ["--ckpt", str(self.checkpoint(task)), "--episodes", str(episodes), "--device", "cpu"]
            lit_wm("evaluate", *words, "--json", str(report))
            high = json.loads(report.read_text())["metrics"]["return"]
            path.write_text(json.dumps([random_player(task.env, episodes, **task.env_options), high]))
            report.unlink()
        low, high = json.loads(path.read_text())
        return Reference(low, high, f"random actions and {task.expert}.ckpt")

    # --- Trainings ----------------------------------------------------------------------------------

    def proof(self, name: str, method: str, **options: Any) -> Proof:
        """A training of one of our models, from its configuration for the task."""
        model, *added = method.split("+")
        for option in added:
            options |= OPTIONS[option][model]
        if self.given.tiny:
            options |= TINY[model]
        return Proof(TASKS[name].configs[model], (), "return", -np.inf, "return", episodes=self.judged(name),
                     options=options)  # fmt: skip

    def offline(self, name: str, method: str) -> Proof:
        """A training on the data alone."""
        model = method.split("+")[0]
        sources, n = [{"uri": uri} for uri in self.collect(name)], self.updates[model]
        often = {"trainer.max_steps": n, "trainer.val_check_interval": n if self.given.tiny else n // 4}
        data = {"data.env": None, "data.sources": sources, "data.mix": "proportional"}
        episodes = {"evaluate.episodes": 2 if model == "tdmpc2" or self.given.tiny else 10}
        more = OFFLINE | TASKS[name].offline if model == "dreamer" else {}
        return self.proof(name, method, **data, **often, **episodes, **more)

    def run(self, *words: Any) -> Path:
        return self.runs / "-".join(map(str, words))

    def score(self, name: str, method: str, seed: int) -> Json:
        """Train and judge one method offline."""
        run = self.run(name, method, seed)
        if method in ("bc", "iql"):
            path = run / "evaluate.json"
            if not path.exists():
                words = [method, name, str(seed), str(self.updates[method]), str(self.judged(name))]
                command = [sys.executable, __file__, "--baseline", *words, str(self.runs / "data"), str(run)]
                subprocess.run(command, cwd=ROOT, env=ENV, check=True)
            return json.loads(path.read_text())
        proof = self.offline(name, method)
        self.train(proof, seed, run)
        report = judge(proof, run)
        result = {"metrics": report["metrics"], "updates": report["updates"],
                  "processor_minutes": processor_minutes(run)}  # fmt: skip
        if method.startswith("dreamer"):  # its evaluations sample
            result["greedy"] = judge(proof, run, "--mode", "greedy")["metrics"]
        return result

    def train(self, proof: Proof, seed: int, run: Path) -> None:
        """Train one of our models, and note with which code."""
        train(proof, seed, run)
        git = json.loads((run / "run.json").read_text())["git"] or {"commit": "unknown", "changed": []}
        self.commits.add(f"{git['commit'][:7]}{' with changes' * bool(git['changed'])}")

    def parallel(self, jobs: list[Any], work: Any) -> list[Any]:
        with ThreadPoolExecutor(self.given.jobs) as pool:
            return list(pool.map(lambda job: work(*job), jobs))

    # --- The three proofs ---------------------------------------------------------------------------

    def prove_offline(self) -> bool:
        """All methods on all tasks."""
        names, methods, seeds = self.given.task, self.given.methods, self.given.seeds
        references = {name: self.reference(name) for name in names if self.collect(name)}
        jobs = [(n, m, s) for n in names for m in methods for s in seeds]
        found = dict(zip(jobs, self.parallel(jobs, self.score), strict=True))
        rows, table, verdicts = [], {}, []
        variants = [(m, how) for m in methods for how in ("", "greedy") if not how or m.startswith("dreamer")]
        for name in names:
            for method, how in variants:
                reports = [found[name, method, s] for s in seeds]
                returns = [r[how or "metrics"]["return"] for r in reports]
                method = ", ".join(filter(None, (method, how)))
                scores = [float(normalized_score(references[name], x)) for x in returns]
                table[name, method] = float(np.mean(scores))
                rows.append({"task": name, "method": method, "returns": returns, "scores": scores,
                             "updates": reports[0]["updates"],
                             "processor_minutes": [r["processor_minutes"] for r in reports]})  # fmt: skip
            for model in MODELS:
                if {model, "bc", "iql"} <= set(methods):
                    bound = max(table[name, "bc"], 0.9 * table[name, "iql"])
                    verdicts.append((name, model, table[name, model] >= bound))
        lines = ["| task | method | normalised score | of each seed | return | updates | CPU minutes |",
                 "|---|---|---|---|---|---|---|"]  # fmt: skip
        for r in rows:
            cpu = ", ".join("-" if m is None else f"{m:.0f}" for m in r["processor_minutes"])
            each = ", ".join(f"{x:.1f}" for x in r["scores"])
            ends = ", ".join(f"{x:.4g}" for x in r["returns"])
            lines.append(f"| {r['task']} | {r['method']} | **{np.mean(r['scores']):.1f}** | {each} | {ends} "
                         f"| {r['updates']:,} | {cpu} |")  # fmt: skip
        lines += ["", *(f"- {n}: {ref}" for n, ref in references.items()), ""]
        lines += [f"- {model} on {name}: at least cloning, and 0.9 of IQL: {'kept' if ok else 'NOT kept'}"
                  for name, model, ok in verdicts]  # fmt: skip
        for name, task in ((n, TASKS[n]) for n in names):
            number = 3 if self.given.tiny else task.episodes
            lines.append(f"- {name}: {number} episodes of {task.expert}.ckpt with {task.epsilon:.0%} "
                         f"random actions, {number} of a random player"
                         + "".join(f"; DreamerV3's {k} is {v:g}" for k, v in task.offline.items())
                         + "".join(f"; {k} {v} for all but the expert" for k, v in task.env_options.items())
                         )  # fmt: skip
        for method in (m for m in methods if "+" in m):
            model, *added = method.split("+")
            options = {k: v for option in added for k, v in OPTIONS[option][model].items()}
            lines.append(f"- {method}: {', '.join(f'{k} {v}' for k, v in options.items())}")
        bars = {m: [table[n, m] for n in names] for m in dict.fromkeys(m for _, m in table)}
        title = self.given.title or ("offline" if methods == DEFAULT["offline"] else "offline-options")
        self.write("offline", title, lines, {"rows": rows, "references": references}, bars=(names, bars))
        return all(ok for *_, ok in verdicts)

    def prove_online(self) -> bool:
        """Offline checkpoints that go on online, DreamerV3's in all :data:`ARMS`."""
        jobs = [(n, m, s, arm) for n in self.given.task for m in self.given.methods
                for s in self.given.seeds for arm in ARMS
                if arm == "kept" or m.startswith("dreamer")]  # fmt: skip
        starts = sorted({job[:3] for job in jobs})
        before = dict(zip(starts, self.parallel(starts, self.score), strict=True))
        runs = dict(zip(jobs, self.parallel(jobs, self.go_on), strict=True))
        rows = []
        for (name, method, seed, arm), run in runs.items():
            steps, returns = evaluations(run)
            ref = self.reference(name)
            start = float(normalized_score(ref, before[name, method, seed]["metrics"]["return"]))
            scores = normalized_score(ref, returns).tolist()
            rows.append({"task": name, "method": method, "seed": seed, "arm": arm, "offline": start,
                         "worst": min(scores), "last": scores[-1], "steps": steps, "scores": scores,
                         "processor_minutes": processor_minutes(run)})  # fmt: skip
        lines = ["| task | method | seed | arm | offline score | worst online | share | last |",
                 "|---|---|---|---|---|---|---|---|"]  # fmt: skip
        for r in rows:
            share = r["worst"] / r["offline"] if r["offline"] > 0 else float("nan")
            lines.append(f"| {r['task']} | {r['method']} | {r['seed']} | {r['arm']} | {r['offline']:.1f} "
                         f"| {r['worst']:.1f} | {share:.2f} | {r['last']:.1f} |")  # fmt: skip
        kept = [r["worst"] >= 0.8 * r["offline"] for r in rows if r["arm"] == "kept"]
        gentle = ", ".join(f"{k} {v:g}" for k, v in GENTLE["dreamer"].items())
        lines += [
            "",
            f"With the dataset kept never below 80 % of the offline score: {sum(kept)} of {len(kept)}.",
            "",
            f"kept: the dataset is half of each batch; DreamerV3 has {gentle} in place of its "
            "configuration's. alone: without the dataset. steep: with it, at the configuration's rate and "
            "warm-up.",
        ]
        curves = {
            (r["task"], r["method"]): [
                (f"{q['arm']}, seed {q['seed']}", [0, *q["steps"]], [q["offline"], *q["scores"]])
                for q in rows
                if (q["task"], q["method"]) == (r["task"], r["method"])
            ]
            for r in rows
        }
        title = self.given.title or f"offline-to-online{'-options' * (self.given.methods != MODELS)}"
        self.write("online", title, lines, {"rows": rows}, curves=curves, label="normalised score")
        return all(kept)

    def go_on(self, name: str, method: str, seed: int, arm: str) -> Path:
        """Train one arm online from the offline checkpoint."""
        model, task, run = method.split("+")[0], TASKS[name], self.run(name, method, seed, "online", arm)
        steps = 420 if self.given.tiny else task.env_steps
        start = self.run(name, method, seed) / "checkpoints" / "last.ckpt"
        often, episodes = (5, 2) if self.given.tiny else task.online[model]
        options = {"data.sources": [{"uri": uri, "weight": 0.5} for uri in self.collect(name)], **ARMS[arm],
                   **({} if arm == "steep" else GENTLE[model]),
                   "data.env_options": task.env_options, "data.max_env_steps": steps,
                   "model.start_from": str(start),
                   "trainer.val_check_interval": often, "evaluate.episodes": episodes}  # fmt: skip
        if model == "dreamer":
            options |= {k: v for k, v in task.offline.items() if k.startswith("model.")}
        if model == "tdmpc2":  # it need not look around at random: the model knows the task
            options |= {"data.prefill": 0, "data.first_updates": 1}
        self.train(self.proof(name, method, **options), seed, run)
        return run

    def prove_demos(self) -> bool:
        """Env steps until the robot reaches its goals."""
        demos, number = self.runs / "data" / "robot-demos.npz", 2 if self.given.tiny else 50
        if not demos.exists():
            words = ["--policy", str(self.checkpoint(TASKS["robot"])), "--episodes", str(number)]
            lit_wm("collect", *words, "--seed", "5000", "--device", "cpu", "--out", f"npz:{demos}")
        jobs = [(arm, seed) for seed in self.given.seeds for arm in DEMOS]
        runs = dict(zip(jobs, self.parallel(jobs, lambda a, s: self.drive(a, s, demos)), strict=True))
        rows = []
        for (arm, seed), run in runs.items():
            steps, returns = evaluations(run)
            means = np.convolve(returns, [0.5, 0.5], "valid")
            reached = [steps[i + 1] for i, mean in enumerate(means) if mean >= GOALS]
            rows.append({"arm": arm, "seed": seed, "env_steps": reached[0] if reached else None,
                         "steps": steps, "returns": returns,
                         "processor_minutes": processor_minutes(run)})  # fmt: skip
        lines = [f"| start | seed | env steps to {GOALS:.0%} of the goals | last | CPU minutes |",
                 "|---|---|---|---|---|"]  # fmt: skip
        for r in rows:
            first = "not reached" if r["env_steps"] is None else f"{r['env_steps']:,}"
            cpu = r["processor_minutes"]
            lines.append(f"| {r['arm']} | {r['seed']} | {first} | {r['returns'][-1]:.2f} "
                         f"| {'-' if cpu is None else f'{cpu:.0f}'} |")  # fmt: skip
        lines += ["", f"{number} drives of robot.ckpt. An evaluation has 20 episodes; two in a row count."]
        curves = {
            ("robot", "dreamer"): [(f"{r['arm']}, seed {r['seed']}", r["steps"], r["returns"]) for r in rows]
        }
        self.write("demos", "robot-demos", lines, {"rows": rows}, curves=curves, label="goals reached")
        return True

    def drive(self, arm: str, seed: int, demos: Path) -> Path:
        """Train one arm of the demos."""
        run, options = self.run("demos", arm, seed), json.loads(json.dumps(DEMOS[arm]))
        for source in options.get("data.sources", ()):
            source["uri"] = f"npz:{demos}"
        options |= {"trainer.val_check_interval": 125, "data.max_env_steps": 10_000}
        if self.given.tiny:
            options |= {"trainer.val_check_interval": 5, "data.max_env_steps": 120, "evaluate.episodes": 2}
            options |= (
                {"model.pretrain": {"world_model": 4, "actor": 3}} if "model.pretrain" in options else {}
            )
        self.train(self.proof("robot", "dreamer", **options), seed, run)
        return run

    # --- Results ------------------------------------------------------------------------------------

    def write(self, proof: str, title: str, lines: list[str], record: Json, bars: Any = None,
              curves: Any = None, label: str = "") -> None:  # fmt: skip
        """The page, the figures and the plot."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        out, panels = self.given.out, list(curves) if curves else [""]
        out.mkdir(parents=True, exist_ok=True)
        size = (max(6.4, 4.2 * len(panels)), 3.6)
        figure, axes = plt.subplots(1, len(panels), figsize=size, squeeze=False, sharey=True)
        if bars:
            names, table = bars
            for i, (method, scores) in enumerate(table.items()):
                axes[0, 0].bar(
                    np.arange(len(names)) + 0.8 * i / len(table), scores, 0.8 / len(table), label=method
                )
            axes[0, 0].set_xticks(np.arange(len(names)) + 0.4, names)
            axes[0, 0].set_ylabel("normalised score")
        for ax, panel in zip(axes[0], panels if curves else (), strict=False):
            for text, steps, values in curves[panel]:
                ax.plot(steps, values, marker=".", label=text, alpha=0.8)
            ax.set(title=", ".join(panel), xlabel="environment steps", ylabel=label)
        for ax in axes[0]:
            beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5)} if bars else {}
            ax.legend(frameon=not bars, fontsize=7, **beside)
        figure.tight_layout()
        figure.savefig(out / f"{title}.png", dpi=110)
        words = [proof, *(("--methods", *self.given.methods) if title.endswith("options") else ())]
        words += ["--tiny"] if self.given.tiny else []
        words += [] if self.given.task == list(TASKS) or proof == "demos" else ["--task", *self.given.task]
        command = " ".join(["python benchmarks/prove_offline.py", *words])
        seeds = ", ".join(map(str, self.given.seeds))
        head = ["git", "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(head, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
        page = [
            f"# {title}",
            "",
            f"`{command}`, seeds {seeds}. What the columns are: its first lines.",
            "",
            *lines,
        ]
        known = {k: v for k, v in versions().items() if k in SHOWN}
        if {"bc", "iql"} & set(self.given.methods):
            known["d3rlpy"] = metadata.version("d3rlpy")
        told = ", ".join(f"{k} {v}" for k, v in known.items())
        trained = ", ".join(sorted(self.commits)) or "none"
        page += ["", f"![{title}]({title}.png)", "", f"Machine: {machine()}. {told}. Last commits of "
                 f"the trainings: {trained}; of the page: {commit or 'unknown'}.", ""]  # fmt: skip
        (out / f"{title}.md").write_text("\n".join(page))
        (out / f"{title}.json").write_text(json.dumps(record) + "\n")
        print("\n".join([*lines, "", f"written: {out / title}.md"]))


def evaluations(run: Path) -> tuple[list[int], list[float]]:
    """Env steps and returns of a run's evaluations; with pretraining its own axis counts updates."""
    steps, returns = curve(run, "eval/return")
    with open(run / "metrics.csv") as file:
        known = [
            (int(float(r["step"])), float(r["step/env"])) for r in csv.DictReader(file) if r.get("step/env")
        ]
    axis, env = zip(*known, strict=True)
    later = np.maximum(np.subtract(steps, axis[-1]), 0)  # environment steps too
    return [round(x) for x in np.interp(steps, axis, env) + later], returns


# --- d3rlpy -----------------------------------------------------------------------------------------


def baseline(method: str, name: str, seed: int, updates: int, episodes: int, data: Path, run: Path) -> None:
    """Train and judge ``bc`` or ``iql`` of d3rlpy on the rows that our models learn from."""
    import d3rlpy
    import structlog
    from d3rlpy import preprocessing

    from datamodules.sources.rows import Rows

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    task, begun = TASKS[name], time.process_time()
    played = [e for kind in ("medium", "random") for e in Rows(str(data / f"{name}-{kind}")).episodes()]
    if method == "bc":  # of equal returns the shorter episodes
        played = sorted(played, key=lambda e: (-float(e.reward.sum()), e.steps))[: round(0.3 * len(played))]
    columns: dict[str, list[Any]] = {k: [] for k in ("obs", "action", "reward", "terminated", "truncated")}
    for e in played:
        # d3rlpy has no place for the observation after a time limit: one more row, whose step is never drawn.
        T = e.steps + int(e.truncated[-1])
        for key, value in (
            ("obs", e.observation["obs"]),
            ("action", e.action["action"]),
            ("reward", e.reward),
        ):
            columns[key].append(np.concatenate([value, np.zeros_like(value[:1])])[:T])
        ends = np.arange(T) == T - 1
        columns["terminated"].append(ends & bool(e.terminated[-1]))
        columns["truncated"].append(ends & bool(e.truncated[-1]))
    flat = {k: np.concatenate(v).astype(np.float32) for k, v in columns.items()}
    d3rlpy.seed(seed)
    dataset = d3rlpy.dataset.MDPDataset(flat["obs"], flat["action"], flat["reward"][:, None],
                                        flat["terminated"], flat["truncated"])  # fmt: skip
    options: Json = {"observation_scaler": preprocessing.StandardObservationScaler()}
    if method == "iql":
        kind, words = task.iql["reward_scaler"]
        options |= task.iql | {"reward_scaler": getattr(preprocessing, f"{kind}RewardScaler")(**words)}
    config = d3rlpy.algos.IQLConfig if method == "iql" else d3rlpy.algos.BCConfig
    algorithm = config(**options).create(device="cpu:0")
    quiet: Json = {"logger_adapter": d3rlpy.logging.NoopAdapterFactory(), "show_progress": False}
    algorithm.fit(dataset, n_steps=updates, n_steps_per_epoch=updates, **quiet)
    minutes = (time.process_time() - begun) / 60

    def policy(obs: Any, state: Any, is_first: Any) -> Any:
        action = np.clip(algorithm.predict(obs["obs"].numpy()), -1, 1)
        return {"action": torch.from_numpy(action)}, None

    env = make_vector_env(task.env, min(8, episodes), list(range(min(8, episodes))), **task.env_options)
    # The episodes that `lit-wm evaluate` plays.
    results = run_episodes(policy, env, episodes, stream_seed(0, 0, "evaluate") % 2**30)
    env.close()
    run.mkdir(parents=True, exist_ok=True)
    algorithm.save_model(str(run / "model.pt"))
    report = {"metrics": results.summary(""), "updates": updates, "processor_minutes": minutes}
    (run / "part.json").write_text(json.dumps(report | {"transitions": dataset.transition_count}))
    os.replace(run / "part.json", run / "evaluate.json")


def main() -> int:
    if sys.argv[1:2] == ["--baseline"]:
        method, name, seed, updates, episodes, data, run = sys.argv[2:]
        baseline(method, name, int(seed), int(updates), int(episodes), Path(data), Path(run))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("proof", choices=["offline", "online", "demos"])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (2)")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "prove")
    parser.add_argument("--out", type=Path, help="of the defaults benchmarks/results, else beside the runs")
    parser.add_argument("--title", help="name of the page of offline or online, without .md")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    given.methods = given.methods or DEFAULT[given.proof]
    usual = (given.methods, given.task, given.seeds) == (DEFAULT[given.proof], list(TASKS), SEEDS)
    beside = given.runs / ("tiny" if given.tiny else "pages")  # no record is lost to a variant of it
    given.out = given.out or (ROOT / "benchmarks" / "results" if usual and not given.tiny else beside)
    for method in given.methods:
        model, *added = method.split("+")
        if model not in UPDATES or any(model not in OPTIONS.get(option, {}) for option in added):
            parser.error(f"no method {method!r}: {', '.join(UPDATES)}, with + {', '.join(OPTIONS)}")
    return 0 if getattr(Proofs(given), f"prove_{given.proof}")() or given.tiny else 1


if __name__ == "__main__":
    sys.exit(main())
