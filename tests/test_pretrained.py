"""Weights of one model for another, and parts that are not trained: which tensors are whose, bit for bit."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules import ReplayDataModule
from lit_wm.dreamerv3 import DreamerV3Module
from lit_wm.errors import CheckpointError, ConfigError
from lit_wm.tdmpc2 import TDMPC2Module
from lit_wm.types import Batch, Spaces, Spec

OLD = Spaces({"obs": Spec("float32", (5,))}, {"action": Spec("float32", (3,))})
NEW = Spaces({"obs": Spec("float32", (7,))}, {"action": Spec("float32", (2,))})
OPTIONS: dict[type, dict[str, Any]] = {
    DreamerV3Module: {"deter": 32, "hidden": 16, "stoch": 4, "classes": 4, "depth": 2, "units": 16,
                      "imag_length": 3, "lr": 1e-2, "warmup": 0, "weight_decay": 0.1, "slow_rate": 0.1},
    TDMPC2Module: {"planner": "policy", "lr": 1e-2, "tau": 0.1, "episodic": True},
}  # fmt: skip
# What other spaces change: first layers, what is put out, and the copies of such.
CHANGED = {
    DreamerV3Module: {"enc.mlp0.weight", "dyn.dynin2.weight", "dec.vec.@obs.pred.weight",
                      "dec.vec.@obs.pred.bias", "pol.head.@action.mean.weight", "pol.head.@action.mean.bias",
                      "pol.head.@action.stddev.weight", "pol.head.@action.stddev.bias"},
    TDMPC2Module: {"encoder.0.weight", "dynamics.0.weight", "reward.0.weight", "critic.0.weight",
                   "target_critic.0.weight", "policy.2.weight", "policy.2.bias"},
}  # fmt: skip
BOTH = pytest.mark.parametrize("kind", [DreamerV3Module, TDMPC2Module])


def make(kind: type, spaces: Spaces = OLD, seed: int = 0, **options: Any) -> Any:
    """Random weights and statistics everywhere; each tensor of the slow critic differs from its critic's."""
    torch.manual_seed(seed)
    module = kind(spaces.to_plain(), "debug", **OPTIONS[kind] | options)
    with torch.no_grad():
        for tensor in module.model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.rand_like(tensor))
    return module


def batches(kind: type, spaces: Spaces, count: int = 3) -> list[Batch]:
    B, T, result = 3, 4, []
    for seed in range(count):
        g = torch.Generator().manual_seed(seed)
        obs, action = (
            {k: torch.rand(B, T, *s.shape, generator=g) * 2 - 1 for k, s in own.items()}
            for own in (spaces.obs, spaces.action)
        )
        ends = torch.zeros(B, T, dtype=torch.bool)
        ends[0, -1] = True
        off = torch.zeros(B, T, dtype=torch.bool)
        result.append(Batch(obs, action, torch.randn(B, T, generator=g), off, ends, ends))
    return result


class First(pl.Callback):
    """The weights before the first update."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not hasattr(self, "state"):
            self.state = weights(module)


def weights(module: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in module.model.state_dict().items()}


def fit(
    module: Any, folder: Path, spaces: Spaces = OLD, steps: int = 3, ckpt: Any = None
) -> tuple[pl.Trainer, dict[str, Tensor]]:
    first = First()
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, callbacks=[first], enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder,
    )  # fmt: skip
    loader = DataLoader(batches(type(module), spaces, 3), batch_size=None, collate_fn=lambda x: x)
    trainer.fit(module, loader, ckpt_path=ckpt, weights_only=True)
    return trainer, first.state


def saved(module: Any, path: Path) -> Path:
    """As a Trainer would save it."""
    about: dict[str, Any] = {}
    module.on_save_checkpoint(about)
    file = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams)}
    torch.save(file | about, path)
    return path


def parts_of(kind: type) -> list[str]:
    return [name for own in make(kind).model.parts().values() for name in own]


# --- Weights ----------------------------------------------------------------------------------------------


@BOTH
def test_a_module_from_a_checkpoint_is_the_same(kind: type, tmp_path: Path) -> None:
    module = make(kind)
    path = saved(module, tmp_path / "a.ckpt")
    again = kind.from_pretrained(path, lr=0.5)  # type: ignore[attr-defined]
    assert dict(again.hparams) == dict(module.hparams) | {"lr": 0.5}
    anew = {"scale"} if kind is TDMPC2Module else set()
    for name, value in weights(again).items():
        assert torch.equal(value, module.model.state_dict()[name]) is (name not in anew), name
    assert set(again.load_report.fresh) == anew
    assert not again.load_report.skipped
    assert again.updates == 0


@BOTH
@pytest.mark.parametrize("way", ["call", "option"])
def test_other_spaces_take_what_fits(kind: type, way: str, tmp_path: Path, capsys: Any) -> None:
    old = make(kind)
    path, given = saved(old, tmp_path / "a.ckpt"), weights(old)
    if way == "call":
        module = kind.from_pretrained(path, NEW)  # type: ignore[attr-defined]
        blank = kind(NEW.to_plain(), **{k: v for k, v in old.hparams.items() if k != "spaces"})
        start = weights(module)
        fit(module, tmp_path, NEW)
    else:
        module = make(kind, NEW, 1, start_from=str(path), start_partial=True)
        blank, (_, start) = make(kind, NEW, 1), fit(module, tmp_path, NEW)
    for name, value in start.items():
        if name in CHANGED[kind]:
            assert value.shape != given[name].shape, name
        elif name != "scale":
            assert torch.equal(value, given[name]), name
    if (
        way == "option"
    ):  # what is fresh is what the new run would have begun with; slow copies are the critic's
        for name in CHANGED[kind]:
            same = blank.model.state_dict()[name.replace("target_critic", "critic")]
            assert torch.equal(start[name], same), name
    for name in CHANGED[kind]:
        if name.startswith("target"):
            assert torch.equal(start[name], start[name.removeprefix("target_")])
    report = module.load_report
    assert set(report.skipped) == CHANGED[kind]
    assert set(report.fresh) == CHANGED[kind] | ({"scale"} if kind is TDMPC2Module else set())
    assert set(report.loaded) | set(report.fresh) == set(start)
    one = sorted(CHANGED[kind])[0]
    assert report.skipped[one] == (tuple(given[one].shape), tuple(start[one].shape))
    said = capsys.readouterr().err
    assert said.count("tensors loaded") == 1
    assert f"skipped {one} {list(given[one].shape)}: {list(start[one].shape)}" in said


@BOTH
def test_what_does_not_fit_is_refused_without_the_option(kind: type, tmp_path: Path) -> None:
    path = saved(make(kind), tmp_path / "a.ckpt")
    one = sorted(CHANGED[kind])[0]
    theirs = r"float32 \(5,\) in the file, float32 \(7,\) here"
    with pytest.raises(CheckpointError, match=f"{theirs}\n(.*\n)*.*start_partial: true") as error:
        fit(make(kind, NEW, start_from=str(path)), tmp_path, NEW)
    assert len(str(error.value).splitlines()) <= 5
    file = torch.load(path, weights_only=True)
    torch.save({"state_dict": file["state_dict"]}, tmp_path / "b.ckpt")  # which says nothing of its spaces
    with pytest.raises(CheckpointError, match=f"in {one} .*\n.*start_partial: true"):
        fit(make(kind, NEW, start_from=str(tmp_path / "b.ckpt")), tmp_path, NEW)
    with pytest.raises(ConfigError, match=r"start_partial needs model.start_from"):
        fit(make(kind, start_partial=True), tmp_path)
    _, start = fit(make(kind, start_from=str(path), seed=1), tmp_path)
    for name, value in weights(make(kind)).items():
        assert torch.equal(value, start[name]) is (name != "scale"), name


def of(obs: dict[str, Any], action: dict[str, Any]) -> Spaces:
    """Vectors by their sizes, images by their shapes."""
    seen = {k: Spec("uint8", n) if isinstance(n, tuple) else Spec("float32", (n,)) for k, n in obs.items()}
    return Spaces(seen, {k: Spec("float32", (n,)) for k, n in action.items()})


PAIR = of({"a": 3, "b": 3}, {"x": 2, "y": 2})
DRIVE = PAIR.action
CLASSES = {"action": Spec("int32", (), 6)}
EYES = of({"left": (64, 64, 3), "right": (64, 64, 3)}, {"action": 3})
TAKEN = {"dynamics.0.weight", "reward.0.weight", "critic.0.weight"}
UNITS = {"reward.2.weight", "reward.2.bias", "critic.2.weight", "critic.2.bias"}
POLICY = {"policy.2.weight", "policy.2.bias"}
HEADS = {f"{part}.head.logits.{name}" for part in ("rew", "val") for name in ("weight", "bias")}
ENDS = {"con.head.logit.weight", "con.head.logit.bias"}


def named(*parts: str) -> set[str]:
    return {f"{part}.{name}" for part in parts for name in ("weight", "bias")}


# What the file was trained with, what there is here, and which tensors of ours must not come from the file;
# None: that is not to be refused. All tensors of one name have one shape.
MEANINGS: list[tuple[type, Any, Any, set[str] | None]] = [
    # A Gaussian head of three actions has the outputs of one of six classes, a vector of six the columns.
    (TDMPC2Module, OLD, Spaces(OLD.obs, CLASSES), TAKEN | POLICY),
    (DreamerV3Module, of({"obs": 5}, {"action": 6}), Spaces(OLD.obs, CLASSES),
     {"dyn.dynin2.weight"} | named("pol.head.@action.logits")),
    (TDMPC2Module, of({"obs": 5}, {"action": 6}), Spaces(OLD.obs, CLASSES), TAKEN | POLICY),
    # The same width of other keys. DreamerV3 sorts them.
    (TDMPC2Module, PAIR, Spaces({k: PAIR.obs[k] for k in "ba"}, DRIVE), {"encoder.0.weight"}),
    (DreamerV3Module, PAIR, Spaces({k: PAIR.obs[k] for k in "ba"}, {k: DRIVE[k] for k in "yx"}), None),
    (TDMPC2Module, PAIR, Spaces(PAIR.obs, {k: DRIVE[k] for k in "yx"}), None),
    (TDMPC2Module, PAIR, of({"p": 3, "q": 3}, {"x": 2, "y": 2}), {"encoder.0.weight"}),
    (DreamerV3Module, PAIR, of({"p": 3, "q": 3}, {"x": 2, "y": 2}),
     {"enc.mlp0.weight"} | named("dec.vec.@p.pred", "dec.vec.@q.pred")),
    (DreamerV3Module, PAIR, of({"a": 3, "q": 3}, {"x": 2, "y": 2}),
     {"enc.mlp0.weight"} | named("dec.vec.@q.pred")),
    (TDMPC2Module, PAIR, of({"obs": 6}, {"x": 2, "y": 2}), {"encoder.0.weight"}),
    (DreamerV3Module, PAIR, of({"obs": 6}, {"x": 2, "y": 2}),
     {"enc.mlp0.weight"} | named("dec.vec.@obs.pred")),
    (TDMPC2Module, PAIR, of({"a": 3, "b": 3}, {"gas": 2, "brake": 2}), TAKEN | POLICY),
    (DreamerV3Module, PAIR, of({"a": 3, "b": 3}, {"gas": 2, "brake": 2}), {"dyn.dynin2.weight"}
     | named(*(f"pol.head.@{k}.{n}" for k in ("gas", "brake") for n in ("mean", "stddev")))),
    (DreamerV3Module, EYES, of({"right": (64, 64, 3), "left": (64, 64, 3)}, {"action": 3}),
     named("dec.imgout")),
    # As many numbers in classes of another count.
    (DreamerV3Module, Spaces({"obs": Spec("int32", (2,), 3)}, OLD.action),
     Spaces({"obs": Spec("int32", (3,), 2)}, OLD.action),
     {"enc.mlp0.weight"} | named("dec.vec.@obs.logits")),
    # What outputs and inputs are in units of.
    (TDMPC2Module, {}, {"reward_scale": 0.01}, UNITS),
    (TDMPC2Module, {}, {"vmin": -5.0, "vmax": 5.0}, UNITS),
    (DreamerV3Module, {}, {"reward_scale": 0.01}, HEADS | {f"retnorm.{k}" for k in ("lo", "hi", "corr")}),
    (DreamerV3Module, {}, {"contdisc": False}, ENDS),
    (DreamerV3Module, {}, {"squash": False}, {"enc.mlp0.weight"}),
    (DreamerV3Module, {}, {"lr": 1.0, "horizon": 50}, None),
    (TDMPC2Module, {}, {"lr": 1.0, "discount": 0.9}, None),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "there", "here", "lost"), MEANINGS)
def test_tensors_of_the_same_shape_that_mean_something_else_are_not_taken(
    kind: type, there: Any, here: Any, lost: set[str] | None, tmp_path: Path
) -> None:
    def made(given: Any, seed: int) -> Any:
        return make(kind, given, seed) if isinstance(given, Spaces) else make(kind, seed=seed, **given)

    old, new = made(there, 0), made(here, 1)
    path, given, blank = saved(old, tmp_path / "a.ckpt"), weights(old), weights(new)
    if lost is None:
        report = new.model.load_weights(path)
        assert not report.changed
        lost = set()
    else:
        with pytest.raises(
            CheckpointError, match=r"\n  .* in the file, .* here\n.*start_partial: true"
        ) as error:
            new.model.load_weights(path)
        assert len(str(error.value).splitlines()) <= 5
        assert all(torch.equal(value, blank[name]) for name, value in weights(new).items())
        report = new.model.load_weights(path, partial=True)
        assert report.changed
        assert "in the file" in str(report)
    slow, fast = f"{new.model.slow_part}.", f"{new.model.critic_part}."
    for name, value in weights(new).items():
        critic = name.replace(slow, fast)
        if critic in lost:
            assert torch.equal(value, blank[critic]), name
        elif name != "scale":
            assert torch.equal(value, given[name]), name
    copies = {name.replace(fast, slow) for name in lost if name.startswith(fast)}
    assert set(report.fresh) - {"scale"} == lost | copies


@BOTH
def test_the_only_observation_and_action_may_have_another_name(kind: type, tmp_path: Path) -> None:
    old, other = make(kind, normalize=True), of({"my.state": 5}, {"torque": 3})
    old.model.normalizer.fitted.fill_(True)
    new = make(kind, other, 1, normalize=True)
    report = new.model.load_weights(saved(old, tmp_path / "a.ckpt"))
    assert not report.changed
    assert set(report.fresh) <= {"scale"}
    x, a = torch.randn(2, 5), torch.rand(2, 3)
    for module in (old, new):
        module.eval()
    before, now = old.encode({"obs": x}), new.encode({"my.state": x})
    assert torch.equal(before.deter, now.deter)
    assert torch.equal(old.q(before, {"action": a}), new.q(now, {"torque": a}))
    if kind is TDMPC2Module:
        assert torch.equal(old.act({"obs": x})[0]["action"], new.act({"my.state": x})[0]["torque"])
    else:  # the noise of an action has its name
        policies = [m.model.pol(m.model.feat(state)) for m, state in ((old, before), (new, now))]
        assert torch.equal(policies[0]["action"].mean, policies[1]["torque"].mean)
        assert torch.equal(old.decode(before)["obs"], new.decode(now)["my.state"])


@BOTH
def test_what_is_fresh_is_the_same_in_every_call(kind: type, tmp_path: Path) -> None:
    path = saved(make(kind), tmp_path / "a.ckpt")
    state = torch.get_rng_state()
    one, two, other = (
        weights(kind.from_pretrained(path, NEW, **more))  # type: ignore[attr-defined]
        for more in ({}, {}, {"seed": 1})
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    first = next(name for name in CHANGED[kind] if name.startswith("enc"))
    assert not torch.equal(one[first], other[first])


@BOTH
def test_a_run_directory_is_its_last_checkpoint(kind: type, tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(
        CheckpointError, match=r"start_from .*run: no last checkpoint .*\nGive a run directory"
    ):
        fit(make(kind, start_from=str(tmp_path / "run")), tmp_path)
    old = make(kind)
    saved(make(kind, seed=3), folder / "best.ckpt")
    saved(old, folder / "last.ckpt")
    _, start = fit(make(kind, start_from=str(tmp_path / "run"), seed=1), tmp_path)
    called = weights(kind.from_pretrained(tmp_path / "run"))  # type: ignore[attr-defined]
    for name, value in weights(old).items():
        if name != "scale":
            assert torch.equal(value, start[name]), name
            assert torch.equal(value, called[name]), name


@BOTH
def test_a_checkpoint_of_the_other_model_is_refused(kind: type, tmp_path: Path) -> None:
    other = TDMPC2Module if kind is DreamerV3Module else DreamerV3Module
    path = saved(make(other), tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=f"of {other.__name__}.*{kind.__name__} cannot be built"):
        kind.from_pretrained(path)  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match=f"is a checkpoint of {other.__name__}, which shares no parts"):
        fit(make(kind, start_from=str(path), start_partial=True), tmp_path)
    with pytest.raises(ConfigError, match=r"no argument 'learning'"):
        kind.from_pretrained(saved(make(kind), path), learning=1)  # type: ignore[attr-defined]
    path.write_text("")
    with pytest.raises(CheckpointError, match=r"a.ckpt: not a checkpoint of lit-wm"):
        kind.from_pretrained(path)  # type: ignore[attr-defined]


@BOTH
def test_statistics_are_kept_for_the_same_observations_alone(kind: type, tmp_path: Path) -> None:
    old = make(kind, normalize=True)
    old.model.normalizer.fitted.fill_(True)
    path = saved(old, tmp_path / "a.ckpt")
    same = kind.from_pretrained(path, Spaces(OLD.obs, NEW.action))  # type: ignore[attr-defined]
    assert same.model.normalizer.fitted
    for ours, theirs in zip(same.model.normalizer.buffers(), old.model.normalizer.buffers(), strict=True):
        assert torch.equal(ours, theirs)
    two = Spaces(OLD.obs | {"more": Spec("float32", (2,))}, OLD.action)
    for spaces in (NEW, two):
        other = kind.from_pretrained(path, spaces)  # type: ignore[attr-defined]
        assert not other.model.normalizer.fitted
        assert all(
            bool((m == 0).all()) for k, m in other.model.normalizer.state_dict().items() if "mean" in k
        )


@BOTH
@pytest.mark.parametrize("way", ["start_from", "ckpt_path"])
def test_statistics_of_a_dataset_go_on_in_an_environment(kind: type, way: str, tmp_path: Path) -> None:
    """The data module asks for them before the module is set up, and the environment has none to give."""
    episode = {"windows": "episode"} if kind is TDMPC2Module else {}
    data = ReplayDataModule(
        "Pendulum-v1", {"time_limit": 20}, batch_size=2, batch_length=4, capacity=500, prefill=60,
        replay_dir=str(tmp_path / "replay"), **episode,
    )  # fmt: skip
    spaces = Spaces.from_plain(data.spaces)
    old = (
        make(kind, spaces, normalize=True, episodic=False) if episode else make(kind, spaces, normalize=True)
    )
    old.model.normalizer.fitted.fill_(True)
    want, path = dict(old.model.normalizer.state_dict()), saved(old, tmp_path / "a.ckpt")
    given = {k: v for k, v in old.hparams.items() if k != "spaces"}
    if way == "start_from":
        module, more = kind(data.spaces, **given | {"start_from": str(path)}), {}
    else:
        trainer, _ = fit(old, tmp_path, spaces)
        trainer.save_checkpoint(path)
        module, more = kind(data.spaces, **given), {"ckpt_path": path, "weights_only": True}
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=4, logger=False, enable_checkpointing=False, num_sanity_val_steps=0,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, data, **more)
    data.close()
    assert module.updates == 4
    for name, value in module.model.normalizer.state_dict().items():
        assert torch.equal(value, want[name]), name


@BOTH
def test_a_slow_critic_is_never_another_critics(kind: type, tmp_path: Path) -> None:
    """One tensor of the critic, then of its copy, is missing in the file."""
    module = make(kind)
    fast, slow = module.model.critic_part, module.model.slow_part
    name = [k for k in weights(module) if k.startswith(f"{fast}.")][-1]
    for missing in (name, name.replace(fast, slow, 1)):
        file = torch.load(saved(module, tmp_path / "a.ckpt"), weights_only=True)
        del file["state_dict"][f"model.{missing}"]
        torch.save(file, tmp_path / "a.ckpt")
        again = kind.from_pretrained(tmp_path / "a.ckpt")  # type: ignore[attr-defined]
        state, copy = weights(again), name.replace(fast, slow, 1)
        assert torch.equal(state[name], state[copy])
        assert torch.equal(state[name], weights(module)[name]) is (missing != name)
        assert copy in again.load_report.fresh


def test_rows_of_tasks_go_by_their_names(tmp_path: Path) -> None:
    tasks = [{"name": n, "obs": 5, "action": 3, "episode_length": 100} for n in ("a", "b", "c")]
    old = make(TDMPC2Module, tasks=tasks, episodic=False)
    path = saved(old, tmp_path / "a.ckpt")
    new = TDMPC2Module.from_pretrained(path, tasks=[tasks[2], tasks[0]], task="d")
    rows, before = (m.model.task_embedding.weight.detach() for m in (new, old))
    assert torch.equal(rows[:2], before[[2, 0]])
    assert float(rows[2].abs().max()) <= 0.02
    like = TDMPC2Module.from_pretrained(path, task="d", task_like="b").model.task_embedding.weight
    assert torch.equal(like.detach(), before[[0, 1, 2, 1]])


# --- Parts that are not trained ---------------------------------------------------------------------------

CASES = [(kind, {"freeze": [name]}) for kind in OPTIONS for name in parts_of(kind)]
CASES += [(kind, {"train_actor": False, "train_critic": False}) for kind in OPTIONS]
CASES += [(kind, {"freeze": parts_of(kind)[:2], "train_critic": False}) for kind in OPTIONS]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=str)
def test_what_is_frozen_never_changes_and_the_rest_does(kind: type, options: dict, tmp_path: Path) -> None:
    """Bit for bit, through weight decay, clipping, and the movement of the slow critic."""
    module = make(kind, **options)
    model, before = module.model, weights(module)
    frozen = set(options.get("freeze", ()))
    frozen |= {model.policy_part} if "train_actor" in options else set()
    frozen |= {model.critic_part} if "train_critic" in options else set()
    frozen |= {model.slow_part} if model.critic_part in frozen else set()
    if {model.policy_part, model.critic_part} <= frozen:
        frozen.add("retnorm")  # of imagined returns, which nobody learns from
    if model.policy_part in frozen:
        frozen.add("scale")
    assert {n.split(".")[0] for n, p in model.named_parameters() if not p.requires_grad} == (
        frozen - {"retnorm", "scale"} | {model.slow_part}
    )
    trainer, _ = fit(module, tmp_path)
    assert trainer.global_step == module.updates == 3
    for name, value in weights(module).items():
        if name.startswith("retnorm.") and "retnorm" not in frozen:
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name]) is (name.split(".")[0] in frozen), name
    # The optimizers list every part, and know nothing of the frozen ones.
    listed = {
        id(p): p in opt.state for opt in trainer.optimizers for g in opt.param_groups for p in g["params"]
    }
    for name, p in model.named_parameters():
        part = name.split(".")[0]
        if part != model.slow_part:
            assert listed[id(p)] is (part not in frozen), name


@BOTH
@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_with_other_parts_frozen(kind: type, first: bool, tmp_path: Path) -> None:
    """Frozen first and trained later, and the other way round: with momentum that must not move anything."""
    name = parts_of(kind)[1]
    now, later = ({"freeze": [name]}, {}) if first else ({}, {"freeze": [name]})
    trainer, _ = fit(make(kind, **now), tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    module = make(kind, seed=1, **later)
    _, start = fit(module, tmp_path, steps=6, ckpt=tmp_path / "a.ckpt")
    assert module.updates == 6
    for key, value in weights(module).items():
        if key.startswith(f"{name}."):
            assert torch.equal(value, start[key]) is not first, key


def test_a_frozen_task_embedding_is_not_even_shortened() -> None:
    tasks = [{"name": n, "obs": 5, "action": 3, "episode_length": 100} for n in ("a", "b")]
    module = make(TDMPC2Module, tasks=tasks, episodic=False, freeze=["task_embedding"])
    weight = module.model.task_embedding.weight
    with torch.no_grad():
        weight.copy_(torch.full_like(weight, 3.0))
    row = module.model.embed(torch.tensor([1]), training=True)
    assert float(row.norm()) == pytest.approx(1, abs=1e-5)
    assert bool((weight == 3).all())


@BOTH
@pytest.mark.parametrize("way", ["call", "option"])
def test_frozen_weights_that_were_not_loaded_are_named(kind: type, way: str, tmp_path: Path) -> None:
    """For other spaces, each part frozen in turn: some have weights of other shapes, others none."""
    path = saved(make(kind), tmp_path / "a.ckpt")
    for part in parts_of(kind)[:-1]:
        fresh = [n for n in CHANGED[kind] if n.startswith(f"{part}.")]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if way == "call":
                module = kind.from_pretrained(path, NEW, freeze=[part])  # type: ignore[attr-defined]
            else:
                module = make(kind, NEW, start_from=str(path), start_partial=True, freeze=[part])
            fit(module, tmp_path, NEW)
        said = [str(w.message) for w in caught if "frozen but not loaded" in str(w.message)]
        assert len(said) == bool(fresh), (part, said)
        assert all(name in said[0] for name in fresh)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(kind.from_pretrained(path, freeze=[part]), tmp_path)  # type: ignore[attr-defined]
    assert not [w for w in caught if "frozen but" in str(w.message)]


@BOTH
def test_parts_that_do_not_exist_and_all_of_them_are_refused(kind: type) -> None:
    known = parts_of(kind)
    with pytest.raises(
        ConfigError, match=f"model.freeze: '{known[1]}x' is no part .*'{known[1]}'.*\n.*{known[0]}"
    ):
        make(kind, freeze=[f"{known[1]}x"])
    with pytest.raises(ConfigError, match="nothing would be trained"):
        make(kind, freeze=known)
    with pytest.raises(ConfigError, match="nothing would be trained"):
        make(kind, freeze=[n for n in known if n != make(kind).model.policy_part], train_actor=False)
