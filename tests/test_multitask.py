"""Several tasks in one model: what it sees of each, what it must not see, and what it is judged by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import ReplayDataModule
from datamodules.data import named_tasks
from datamodules.selection import common_spaces
from lit_wm.callbacks.evaluate import EpisodeResults
from lit_wm.cli import main
from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.errors import ConfigError, DataError
from lit_wm.noise import NoiseStreams
from lit_wm.scores import Reference
from lit_wm.tasks import Task, as_seen, as_taken, misfit, ordered
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Batch, Spaces, Spec

WIDE = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("float32", (3,))})
TASKS = [
    {"name": "small", "obs": 3, "action": 1, "episode_length": 50},
    {"name": "large", "obs": 5, "action": 3, "episode_length": 100},
]
TASK = torch.tensor([0, 1, 0])  # of the rows of a batch


def make_module(spaces: Spaces = WIDE, **options: Any) -> DreamerV3Module:
    """Random weights everywhere: heads that start at zero would hide most mistakes."""
    torch.manual_seed(0)
    options = {"imag_length": 3, "lr": 1e-3, "warmup": 1, "log_every": 1, "task_dim": 4} | options
    module = DreamerV3Module(spaces.to_plain(), "debug", **options)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module


def batch_of(tasks: Tensor | None = TASK, seed: int = 0, classes: int = 0) -> Batch:
    B, T, noise = 3, 6, torch.Generator().manual_seed(seed)
    action = torch.randn(B, T, 3, generator=noise)
    flags = torch.rand(2, B, T, generator=noise) < 0.1
    obs, reward = torch.randn(B, T, 5, generator=noise), torch.randn(B, T, generator=noise)
    taken = action.argmax(-1) if classes else action
    return Batch({"obs": obs}, {"action": taken}, reward, flags[0], flags[1], flags[1], task=tasks)


def fit(module: pl.LightningModule, folder: Path, batches: list[Batch]) -> list[dict[str, float]]:
    seen: list[dict[str, float]] = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
            seen.append(dict(module.latest))

    off = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=len(batches), callbacks=[Watch()], default_root_dir=folder, **off
    )
    trainer.fit(module, DataLoader(batches, batch_size=None, collate_fn=lambda x: x))
    return seen


# --- DreamerV3 ----------------------------------------------------------------------------------------------


def test_one_task_is_bit_equal_to_no_tasks(tmp_path: Path) -> None:
    runs = []
    for tasks in (None, TASKS[1:]):
        module = make_module(WIDE, tasks=tasks)
        seen = fit(module, tmp_path, [batch_of(None, seed=i) for i in range(3)])
        runs.append((module.state_dict(), seen, module.noise.state_dict()))
    for name, value in runs[0][0].items():
        assert torch.equal(value, runs[1][0][name]), name
    assert runs[0][0].keys() == runs[1][0].keys()
    assert runs[0][1] == runs[1][1]
    assert str(runs[0][2]) == str(runs[1][2])


@pytest.mark.parametrize("discrete", [False, True])
def test_padding_changes_neither_losses_nor_gradients(discrete: bool) -> None:
    spaces = Spaces(WIDE.obs, {"action": Spec("int32", (), 3)}) if discrete else WIDE
    seen = []
    for fill in (0.0, 7.0):
        module = make_module(spaces, tasks=TASKS, ensemble=2, loss_scales={"bc": 1.0})
        batch = batch_of(classes=3 * discrete)
        batch.obs["obs"][TASK == 0, :, 3:] = fill
        if discrete:
            batch.prev_action["action"][TASK == 0] = 0
        else:
            batch.prev_action["action"][TASK == 0, :, 1:] = fill
        out = module.model.loss(batch, module.model.initial(3), NoiseStreams(0))
        loss, _ = module.model.ensemble_loss(batch, out)
        (out.total + loss).backward()
        seen.append(
            (out.losses, {k: p.grad.clone() for k, p in module.named_parameters() if p.grad is not None})
        )
    for before, after in zip(*seen, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
    assert seen[0][1]["model.task_spaces.embedding"].abs().sum(1).min() > 0


def test_a_task_has_its_own_first_and_last_layer_and_no_more_actions(tmp_path: Path) -> None:
    module = make_module(WIDE, tasks=TASKS)
    model = module.model
    batch = batch_of(torch.zeros(3, dtype=torch.int64))  # the small one: entries 0 ... 2 of 3 + 5
    out = model.loss(
        batch, model.initial(3), NoiseStreams(0), {"world_model": True, "actor": True, "critic": True}
    )
    out.total.backward()
    first = model.enc.mlp0.weight.grad
    last = next(p for n, p in model.dec.named_parameters() if "vec" in n and n.endswith("weight")).grad
    assert first.shape[0] == last.shape[1] == 8
    assert first[:3].abs().sum(1).min() > 0 == first[3:].abs().max()
    assert last[:, :3].abs().sum(0).min() > 0 == last[:, 3:].abs().max()
    for actions in out.dream.actions:
        assert (actions["action"][:, 1:] == 0).all()
        assert (actions["action"][:, 0] != 0).all()
    dist = out.dream.policy["action"]
    x = torch.randn(*dist.mean.shape)
    alone = torch.distributions.Normal(dist.mean[..., 0], dist.std[..., 0])
    torch.testing.assert_close(dist.log_prob(x), alone.log_prob(x[..., 0]))
    torch.testing.assert_close(dist.entropy(), alone.entropy())


@pytest.mark.parametrize("planner", ["policy", "mppi"])
def test_verbs_carry_the_task(planner: str) -> None:
    options = {"num_samples": 8, "num_elites": 3, "num_pi_trajs": 2, "iterations": 2, "horizon": 2}
    model = make_module(WIDE, tasks=TASKS, planner=planner, planner_options=options).model
    obs, task = torch.randn(3, 5), TASK
    with torch.no_grad():
        action, state = model.act(obs, task=task)
        action, state = model.act(obs, state, torch.zeros(3, dtype=torch.bool))
        assert torch.equal(state.task, task)
        assert (action["action"][task == 0, 1:] == 0).all()
        dream = model.imagine(state, horizon=2)
        assert (dream.actions["action"][task == 0, :, 1:] == 0).all()
        seen = model.decode(dream.states.stacked)["obs"]
        assert seen.shape == (3, 3, 5)
        assert (seen[task == 0, :, 3:] == 0).all()
        assert (seen[task == 1] != 0).all()
        other = model.encode(obs, task=1 - task, noise=NoiseStreams(0))
        assert not torch.equal(other.deter, model.encode(obs, task=task, noise=NoiseStreams(0)).deter)
    with pytest.raises(ConfigError, match="2 tasks: say which by the argument `task`"):
        model.act(obs)


def test_padding_is_zero_in_any_units() -> None:
    model = make_module(WIDE, tasks=TASKS, normalize=True).model
    mean, std = torch.arange(5.0) - 9, torch.arange(5.0) + 1
    with torch.no_grad():
        state = model.encode(torch.randn(3, 5), task=TASK)
        plain = model.decode(state)["obs"]
        model.normalizer.fit({"obs": (mean, std)})
        seen = model.decode(state)["obs"]
    own = torch.arange(5) < torch.tensor([3, 5, 3]).unsqueeze(1)
    torch.testing.assert_close(seen, (plain * std + mean) * own)


def test_an_ensemble_that_nothing_uses_shortens_no_embedding(tmp_path: Path) -> None:
    runs = []
    for ensemble in (0, 3):
        torch.manual_seed(0)
        module = TDMPC2Module(
            WIDE.to_plain(), "debug", tasks=TASKS, task_dim=4, horizon=5, lr=3e-2, ensemble=ensemble,
            pretrain={"world_model": 6}, planner="policy",
        )  # fmt: skip
        with torch.no_grad():
            module.model.task_embedding.weight.copy_(torch.eye(4)[:2])
        fit(module, tmp_path, [batch_of(torch.full((3,), i % 2), seed=i) for i in range(7)])
        runs.append(module.state_dict())
    for name, value in runs[0].items():
        assert torch.equal(value, runs[1][name]), name


@pytest.mark.parametrize(
    ("spaces", "message"),
    [
        (Spaces({"obs": Spec("float32", (4,))}, WIDE.action), "4 observed numbers .* expected 5 and 3"),
        (Spaces({"a": Spec("float32", (3,)), "b": Spec("float32", (2,))}, WIDE.action), "one vector"),
    ],
)
def test_spaces_of_another_size_are_explained(spaces: Spaces, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_module(spaces, tasks=TASKS)


# --- Sources ------------------------------------------------------------------------------------------------

TWO = Spaces({"p": Spec("float32", (2,)), "v": Spec("float32", ())}, {"action": Spec("float32", (1,))}, 30)
THREE = Spaces(
    {"p": Spec("float32", (4,)), "t": Spec("float32", (2,))}, {"action": Spec("float32", (2,))}, 20
)


def test_sources_name_the_tasks_of_a_model() -> None:
    told = [("a", "two", None), ("b", "three", None), ("c", None, ["walker-walk", "own"]), ("a", "two", None)]
    spaces = {"a": TWO, "b": THREE, "c": WIDE}
    found = named_tasks(told, spaces)
    assert [tuple(t.values()) for t in found] == [
        ("two", 3, 1, 30), ("three", 6, 2, 20), ("walker-walk", 24, 6, 500),
    ]  # fmt: skip
    both = common_spaces({"a": TWO, "b": THREE}, pad=True)
    assert {k: s.shape for k, s in both.obs.items()} == {"obs": (6,)}
    assert both.action["action"].shape == (2,)
    with pytest.raises(DataError, match="b has 6 observed numbers .* task 'two' has 3 and 1"):
        named_tasks([*told, ("b", "two", None)], spaces)
    turned = Spaces(dict(reversed(TWO.obs.items())), TWO.action)
    with pytest.raises(DataError, match="d has v, p, in another order"):
        named_tasks([*told, ("d", "two", None)], spaces | {"d": turned})


def test_a_model_sees_an_environment_as_its_dataset() -> None:
    obs = {"p": torch.tensor([[1.0, 2.0]]), "v": torch.tensor([3.0])}
    model = Spaces({"obs": Spec("float32", (6,))}, {"action": Spec("float32", (2,))})
    assert as_seen(obs, TWO.obs, model.obs)["obs"].tolist() == [[1, 2, 3, 0, 0, 0]]
    turned = ordered(TWO, ["v", "p"])
    assert as_seen(obs, turned.obs, model.obs)["obs"].tolist() == [[3, 1, 2, 0, 0, 0]]
    assert ordered(TWO, ["obs"]) is TWO
    assert as_taken({"action": torch.tensor([[5.0, 0.0]])}, TWO.action)["action"].tolist() == [[5]]
    assert misfit(Task("two", 3, 1, 9), model, TWO) is None
    assert "two has 4 and 1" in str(misfit(Task("two", 4, 1, 9), model, TWO))


def test_scores_are_means_over_tasks() -> None:
    a = EpisodeResults([1.0, 3.0], [5, 5], [True, False], [False] * 2, [None] * 2, [0.1, 0.2])
    b = EpisodeResults([10.0], [7], [False], [False], [None], [None], reference=Reference(0, 20, "x"))
    score = EpisodeResults.of_tasks({"a": a, "b": b}).summary()
    assert score["eval/return"] == 6
    assert score["eval/a/return"] == 2
    assert score["eval/b/normalized"] == 50
    assert score["eval/episodes"] == 3
    assert "eval/normalized" not in score


# --- Four tasks of dm_control with different spaces, as in docs/data.md -------------------------------------

NAMES = ("cartpole_swingup", "reacher_easy", "cup_catch", "finger_spin")
SIZES = {"cartpole_swingup": (5, 1), "reacher_easy": (6, 2), "cup_catch": (8, 2), "finger_spin": (9, 2)}


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short random episodes of each; those of finger_spin in Minari's order."""
    pytest.importorskip("dm_control", reason="needs the extra 'dmc'")
    folder = tmp_path_factory.mktemp("four")
    for name in NAMES:
        out = f"rows:{folder / name}" if name != "finger_spin" else "minari:finger/random-v0"
        argv = ["--env", f"dmc:{name}", "--env-options", "repeat=2", "time_limit=16", "--episodes", "2"]
        assert main(["collect", *argv, "--out", out, "--root", str(folder / "minari")]) == 0
    return folder


def sources_of(four: Path) -> list[dict[str, Any]]:
    found = [{"uri": f"rows:{four / name}", "task": name} for name in NAMES[:3]]
    return [*found, {"uri": f"minari:{four}/minari/finger/random-v0", "task": NAMES[3]}]


def test_vectors_of_sources_stand_side_by_side(four: Path, tmp_path: Path) -> None:
    data = ReplayDataModule(sources=sources_of(four), pad=True, cache_dir=str(tmp_path))
    assert data.spaces["obs"]["obs"]["shape"] == [9]
    assert {t["name"]: (t["obs"], t["action"]) for t in data.spaces["tasks"]} == SIZES
    assert [t["episode_length"] for t in data.spaces["tasks"]] == [8] * 4
    assert data.eval_tasks["reacher_easy"]["env_options"] == {"repeat": 2, "time_limit": 16}
    assert data.eval_tasks["finger_spin"]["order"] == ["position", "touch", "velocity"]
    from datamodules.offline import CacheRows

    cache, spec = data.caches[1], data.sources[1]
    rows = CacheRows(cache, tmp_path / "own", Spaces.from_plain(data.spaces), np.array([1]), spec, lead=0)
    seen = rows.get(torch.arange(9)[None])["observation"][0]
    parts = [cache.rows["observation", k][9:] for k in ("position", "to_target", "velocity")]
    assert torch.equal(seen[:, :6], torch.cat(parts, 1))
    assert (seen[:, 6:] == 0).all()
    rows.close()
    wrong = "dmc:finger_spin observes 9 numbers and acts by 2; cup_catch has 8"
    for env, message in (("cup", "eval_env names 'cup', which is no task"), ("cup_catch", wrong)):
        data.eval_env = {env: "dmc:finger_spin"}
        del data.eval_tasks
        with pytest.raises(ConfigError, match=message):
            _ = data.eval_tasks
        data.__dict__["eval_tasks"] = None


@pytest.mark.parametrize("model", ["lit_wm.TDMPC2Module", "lit_wm.DreamerV3Module"])
def test_four_tasks_are_learnt_and_played(
    model: str,
    four: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    init: dict[str, Any] = {
        "preset": "debug",
        "tasks": "data",
        "task_dim": 4,
        "log_every": 1,
        "planner": "policy",
    }
    data: dict[str, Any] = {"sources": sources_of(four), "pad": True, "batch_size": 4, "cache_dir": "cache"}
    data |= {"val_fraction": 0.4, "env_options": {"time_limit": 6}}
    data |= {"windows": "episode", "batch_length": 4} if "TDMPC2" in model else {"batch_length": 6}
    config = {
        "model": {"class_path": model, "init_args": init},
        "data": {"class_path": "datamodules.ReplayDataModule", "init_args": data},
        "trainer": {"max_steps": 3, "val_check_interval": 3, "accelerator": "cpu", "logger": False},
        "evaluate": {"episodes": 1},
    }
    Path("four.json").write_text(json.dumps(config))
    assert main(["fit", "--config", "four.json", "--name", "one"]) == 0
    run = next(Path("runs").glob("*/one"))
    last = dict.fromkeys((run / "metrics.csv").read_text().splitlines()[0].split(","))
    assert {f"eval/{name}/return" for name in NAMES} | {"eval/return", "val/reward/error@1"} <= last.keys()
    assert {f"val/{name}/reward/error@1" for name in NAMES} <= last.keys()
    assert main(["evaluate", "--ckpt", str(run), "--episodes", "1", "--json", "all.json"]) == 0
    report = json.loads(Path("all.json").read_text())
    assert list(report["tasks"]) == list(NAMES)
    returns = [report["tasks"][name]["returns"][0] for name in NAMES]
    assert report["metrics"]["return"] == pytest.approx(sum(returns) / 4)
    assert [report["tasks"][name]["lengths"] for name in NAMES] == [[3]] * 4
    one = ["evaluate", "--ckpt", str(run), "--episodes", "1", "--json", "one.json", "--task", "cup_catch"]
    assert main(one) == 0
    assert json.loads(Path("one.json").read_text())["returns"] == report["tasks"]["cup_catch"]["returns"]
    assert main(["evaluate", "--ckpt", str(run), "--env", "dmc:cup_catch"]) == 1
    assert "say with --task which of the checkpoint's tasks is played: cartpole" in capsys.readouterr().err
    assert main([*one, "--env", "dmc:walker_walk"]) == 1
    assert "walker_walk observes 24 numbers and acts by 6; cup_catch has 8 and 2" in capsys.readouterr().err
    collect = [
        "collect",
        "--policy",
        str(run),
        "--task",
        "cup_catch",
        "--episodes",
        "1",
        "--out",
        "rows:more",
    ]
    assert main(collect) == 0


def test_without_environments_it_trains_and_says_so(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = json.dumps(sources_of(four)[:2])
    flags = [
        "--data.pad",
        "true",
        "--data.cache_dir",
        "cache",
        "--data.batch_size",
        "2",
        "--data.batch_length",
        "4",
    ]
    # No such limit: the environments recorded cannot be made, and so none is.
    flags += ["--data.env_options", "{time_limit: none}", "--model.preset", "debug", "--model.tasks", "data"]
    flags += ["--trainer.max_steps", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    assert main(["fit", "--data.sources", sources, *flags, "--name", "one"]) == 0
    assert "no environment for 2 of 2 tasks (cartpole_swingup, reacher_easy)" in capsys.readouterr().err
    assert main(["fit", "--data.sources", f"[rows:{four / NAMES[0]}]", *flags, "--name", "two"]) == 1
    assert "model.tasks: data, but no source names its task" in capsys.readouterr().err
